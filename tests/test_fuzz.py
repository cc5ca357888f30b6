"""Random calls of the whole public surface against an oracle that shares no code with it.

A finite right answer or one of our errors: never a crash, a silent broadcast, a NaN from finite
input, a warning (they are errors here). `HYPOTHESIS_PROFILE=nightly pytest tests/test_fuzz.py` runs
50,000 examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from s2dm_loss import (
    ContinuousSchedule,
    NoiseSchedule,
    ScaledModel,
    SkipSet,
    SkipStepLoss,
    coefficients,
    epsilon_from_output,
    gain,
    output_from_epsilon,
    skip_step_loss,
)
from tests.helpers import oracle
from tests.helpers.oracle import Pair, Scales
from tests.strategies import normal

FUZZ = settings(
    max_examples=5 * settings.default.max_examples,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TYPES = ["epsilon", "v_prediction", "sample", "flow", "score"]
ESTIMATORS = ["expected", "fresh", "shared"]
WEIGHTINGS = [None, None, "uniform", "min_snr", "soft_min_snr", "p2", "sigmoid"]


@dataclass
class Case:
    """A schedule with skips, some of its times, and the oracle's view of both."""

    schedule: Any
    skip_set: Any
    t: Tensor
    pairs: list[Pair]
    earlier: list[list[Pair]]


@st.composite
def discrete(draw: st.DrawFn, batch: int) -> Case:
    kind = draw(st.sampled_from(["betas", "zero_snr", "alphas_cumprod", "log_snr", "sigmas"]))
    size = draw(st.integers(2, 40))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rising = torch.rand(size, generator=source, dtype=torch.float64).add(1e-3).cumsum(0)
    if kind in ("betas", "zero_snr"):
        scale = 10 ** draw(st.floats(-6, -0.5))
        table = (rising / rising[-1] * scale).clamp(1e-9, 0.999).tolist()
        schedule = NoiseSchedule.from_betas(table)
        schedule = schedule.rescale_zero_terminal_snr() if kind == "zero_snr" else schedule
    elif kind == "alphas_cumprod":
        table = (1 - rising / rising[-1]).clamp(min=0).tolist()  # ends in 0
        schedule = NoiseSchedule.from_alphas_cumprod(table)
    elif kind == "log_snr":
        table = (20 * (0.5 - rising / rising[-1])).tolist()
        schedule = NoiseSchedule.from_log_snr(table)
    else:
        table = (1e-3 + 80 * rising / rising[-1]).tolist()
        schedule = NoiseSchedule.from_sigmas(table)
    path = oracle.discrete_path(kind, table)
    times = draw(st.lists(st.integers(0, size - 1), min_size=batch, max_size=batch))
    form = draw(st.sampled_from(["int", "several", "stride", "sampled"]))
    if form == "int":
        offsets = [draw(st.integers(1, size - 1))]
        skip_set: Any = offsets[0]
    elif form == "several":
        offsets = sorted(draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=4)))
        skip_set = SkipSet(offsets)
    elif form == "stride":
        steps = draw(st.integers(2, size))
        offsets, skip_set = [size // steps], SkipSet.for_sampling_steps(steps)
        if offsets[0] >= size:  # T = 2 and 2 steps leave a stride of 1
            offsets = []
    else:
        visited = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=8)))
        skip_set = SkipSet.from_timesteps(draw(st.permutations(visited)))
        before = [[v for v in visited if v < t] for t in times]
        earlier = [[path[found[-1]]] if found else [] for found in before]
    if form != "sampled":
        earlier = [[path[t - k] for k in offsets if t >= k] for t in times]
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.int16]))
    t = torch.tensor(times, dtype=dtype)
    return Case(schedule, skip_set, t, [path[i] for i in times], earlier)


CONTINUOUS = {
    "vp": ContinuousSchedule.vp(),
    "sub_vp": ContinuousSchedule.sub_vp(),
    "cosine": ContinuousSchedule.cosine(),
    "flow": ContinuousSchedule.flow(),
    "ve": ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 0.002 + 80 * t)),
}


@st.composite
def continuous(draw: st.DrawFn, batch: int) -> Case:
    kind = draw(st.sampled_from(sorted(CONTINUOUS)))
    last = 1 - 1e-6 if kind == "cosine" else 1.0
    floats = st.floats(1e-4, last)
    times = draw(st.lists(floats, min_size=batch, max_size=batch))
    exact = [float(t) for t in torch.tensor(times, dtype=torch.float64)]
    count = draw(st.integers(1, 3))
    offsets = draw(st.lists(st.floats(1e-3, 0.5), min_size=count, max_size=count, unique=True))
    earlier = [[oracle.continuous_pair(kind, t - k) for k in offsets if t - k >= 0] for t in exact]
    t = torch.tensor(times, dtype=torch.float64)
    pairs = [oracle.continuous_pair(kind, time) for time in exact]
    return Case(CONTINUOUS[kind], SkipSet(offsets), t, pairs, earlier)


@st.composite
def cases(draw: st.DrawFn, batch: int) -> Case:
    return draw(discrete(batch) if draw(st.integers(0, 2)) else continuous(batch))


def laid_out(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The same values in one of the layouts that tensors come in."""
    layout = draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"]))
    if layout == "channels_last" and values.ndim in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats[values.ndim])
    if layout == "transposed" and values.ndim > 2:
        return values.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "sliced":
        wide = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1])
        wide[..., ::2] = values
        return wide[..., ::2]
    return values.contiguous()


shapes = st.sampled_from([(), (5,), (3, 4), (2, 3, 3), (3, 2, 2, 2), (1,), (7, 1)])
dtypes = st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.half])
TOLERANCE = {torch.float64: 1e-8}


def reduced(losses: Tensor, reduction: str, weights: Tensor | None) -> Tensor:
    losses = losses if weights is None else losses * weights
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


@FUZZ
@given(st.data())
def test_the_loss_of_a_noise_prediction(data: st.DataObject) -> None:
    draw = data.draw
    batch = draw(st.integers(1, 4))
    case, estimator = draw(cases(batch)), draw(st.sampled_from(ESTIMATORS))
    tau = draw(st.one_of(st.floats(1e-6, 1), st.sampled_from([0.0, 0.99, 1.0])))
    max_c2 = draw(st.sampled_from([100.0, 100.0, 0.0, 1.0, 1e4]))
    weighting, reduction = (
        draw(st.sampled_from(each)) for each in (WEIGHTINGS, ["none", "sum", "mean"])
    )
    normalize, dtype, seed = draw(st.booleans()), draw(dtypes), draw(st.integers(0, 2**31))
    shape = (batch, *draw(shapes))
    eps_hat, eps, zeta = (
        laid_out(lambda s: draw(s), normal(*shape, seed=seed + i).to(dtype)) for i in range(3)
    )
    given_zeta = zeta if estimator == "fresh" else None
    weights = normal(batch, seed=seed + 3).abs() if draw(st.booleans()) else None
    options = {"tau": tau, "estimator": estimator, "reduction": reduction, "max_c2": max_c2}

    def expected_of(wide: Tensor) -> Tensor:
        losses = []
        for i in range(batch):
            at = oracle.scales(case.pairs[i], case.earlier[i], tau, max_c2, weighting)
            e, z = eps[i].double(), zeta[i].double()
            if normalize:
                best = oracle.minimiser(at, e, z, estimator)
                losses.append(at.weight * (wide[i] - best).square().mean())
            else:
                losses.append(oracle.two_terms(at, wide[i], e, z, estimator))
        return reduced(torch.stack(losses), reduction, weights)

    leaf = eps_hat.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    criterion = SkipStepLoss(
        case.schedule, case.skip_set, weighting=weighting, normalize=normalize, **options
    )
    entry = draw(st.sampled_from(["method", "function", "step"]))
    if entry == "function" and weighting is None:
        loss = skip_step_loss(
            leaf,
            eps,
            case.t,
            schedule=case.schedule,
            skip_set=case.skip_set,
            normalize=normalize,
            skip_noise=given_zeta,
            weights=weights,
            **options,
        )
    elif entry == "step":
        x0 = eps.detach().roll(1, 0)
        loss = criterion(
            lambda x_t, t: leaf, x0, case.t, noise=eps, skip_noise=given_zeta, weights=weights
        )
    else:
        loss = criterion.from_prediction(leaf, eps, case.t, skip_noise=given_zeta, weights=weights)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide = eps_hat.double().requires_grad_()
    expected = expected_of(wide)
    compare(loss, leaf, expected, wide, dtype)


def compare(loss: Tensor, leaf: Tensor, expected: Tensor, wide: Tensor, dtype: Any) -> None:
    """The value and the gradient, each to the rounding of its type."""
    rtol = TOLERANCE.get(dtype, 3e-5)
    assert loss.isfinite().all()
    assert loss.shape == expected.shape
    scale = max(float(expected.detach().abs().max()), 1e-12)
    assert float((loss.double() - expected).detach().abs().max()) <= rtol * max(scale, 1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    (exact,) = torch.autograd.grad(expected.sum(), wide)
    assert gradient.dtype == leaf.dtype
    assert gradient.isfinite().all()
    half = {torch.bfloat16: 1e-2, torch.half: 2e-3}.get(dtype, rtol)
    scale = max(float(exact.abs().max()), 1e-2)
    assert float((gradient.double() - exact).abs().max()) <= half * scale


@FUZZ
@given(st.data())
def test_the_loss_of_any_output(data: st.DataObject) -> None:
    draw = data.draw
    batch = draw(st.integers(1, 4))
    case, estimator = draw(cases(batch)), draw(st.sampled_from(ESTIMATORS))
    kind, weighting = draw(st.sampled_from(TYPES)), draw(st.sampled_from(WEIGHTINGS))
    tau = draw(st.one_of(st.floats(1e-6, 1), st.sampled_from([0.0, 0.99, 1.0])))
    max_c2 = draw(st.sampled_from([100.0, 100.0, 0.0, 1.0]))
    dtype, seed = draw(st.sampled_from([torch.float64, torch.float32])), draw(st.integers(0, 2**31))
    shape = (batch, *draw(shapes))
    output, x0, eps, zeta = (normal(*shape, seed=seed + i) for i in range(4))
    if kind == "score" and any(pair[1] == 0 for pair in case.pairs):
        return  # a score without noise is infinite
    try:
        criterion = SkipStepLoss(
            case.schedule,
            case.skip_set,
            tau=tau,
            estimator=estimator,
            max_c2=max_c2,
            prediction_type=kind,
            weighting=weighting,
            reduction="none",
        )
    except ValueError as caught:
        refused = str(caught)
    else:
        refused = ""
    if refused:
        assert "weighting must lie in" in refused
        return
    given_zeta = zeta if estimator == "fresh" else None

    wide = output.clone().requires_grad_()
    target, x_t, losses = torch.empty_like(x0), torch.empty_like(x0), []
    for i, pair in enumerate(case.pairs):
        ratio = oracle.ratio_of(kind, pair)
        a, b = float(pair[0]), float(pair[1])
        p, q = oracle.parts(kind, a, b)
        target[i], x_t[i] = p * x0[i] + q * eps[i], a * x0[i] + b * eps[i]
        at = oracle.scales(pair, case.earlier[i], tau, max_c2, weighting, ratio)
        big_a = at.tau + (1 - at.tau) * at.c2
        best = oracle.minimiser(at, eps[i], zeta[i], estimator)
        if ratio == 0:  # no signal: the plain loss, whose weight is τ
            at = Scales(at.tau, (), 0.0, at.c2, a, b, at.weight)
            changed = target[i]
        elif p == 0:
            changed = q * best
        else:
            # The output that stands for `best` on the same x_t.
            changed = p * (x_t[i] - b * best) / a + q * best
        weight = big_a if weighting is None else big_a * at.weight * float(ratio) ** 2
        losses.append(weight * (wide[i] - changed).square().mean())
    expected = torch.stack(losses)

    leaf = output.to(dtype).requires_grad_()
    inputs = target.to(dtype), x_t.to(dtype), case.t
    zeta = None if given_zeta is None else given_zeta.to(dtype)
    entry = draw(st.sampled_from(["output", "target", "step"]))
    if entry == "output":
        loss = criterion.from_output(leaf, *inputs, skip_noise=zeta)
    elif entry == "target" or kind == "epsilon":
        changed, weight = criterion.regression_target(*inputs, skip_noise=zeta)
        difference = (leaf - changed).square()
        loss = weight * (difference.flatten(1).mean(1) if difference.ndim > 1 else difference)
    else:
        loss = criterion(
            lambda x_t, t: leaf, x0.to(dtype), case.t, noise=eps.to(dtype), skip_noise=zeta
        )
    if big(expected):
        assert loss.isfinite().all()
        return
    close(loss, leaf, expected, wide, dtype)


def big(expected: Tensor) -> bool:
    """Where the data's own size leaves float32, or the oracle's float64, no digits to compare."""
    return bool(expected.abs().max() > 1e6)


def close(loss: Tensor, leaf: Tensor, expected: Tensor, wide: Tensor, dtype: Any) -> None:
    rtol = 1e-6 if dtype == torch.float64 else 2e-3
    assert loss.isfinite().all()
    scale = max(float(expected.detach().abs().max()), 1.0)
    assert float((loss.double() - expected).detach().abs().max()) <= rtol * scale
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    (exact,) = torch.autograd.grad(expected.sum(), wide)
    scale = max(float(exact.abs().max()), 1.0)
    assert float((gradient.double() - exact).abs().max()) <= rtol * scale


@FUZZ
@given(st.data())
def test_coefficients_gain_and_the_shrunk_model(data: st.DataObject) -> None:
    draw = data.draw
    case = draw(cases(3))
    tau, max_c2 = draw(st.floats(0.01, 1)), draw(st.sampled_from([100.0, 1.0, 0.0]))
    kind = draw(st.sampled_from(TYPES))
    x_t, output = normal(3, 2, seed=1), normal(3, 2, seed=2)
    found = coefficients(case.schedule, case.skip_set, t=case.t, tau=tau, max_c2=max_c2)
    s = gain(case.schedule, case.skip_set, t=case.t, tau=tau, max_c2=max_c2)
    options: Any = {"t": case.t, "tau": tau, "max_c2": max_c2, "prediction_type": kind}
    of_output = gain(case.schedule, case.skip_set, **options)

    class Fixed(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return output

    shrunk = ScaledModel.with_gain(
        Fixed(), case.schedule, case.skip_set, tau=tau, max_c2=max_c2, prediction_type=kind
    )(x_t, case.t)
    assert shrunk.isfinite().all()
    eps_hat = epsilon_from_output(output, x_t, case.t, case.schedule, kind)
    for i, pair in enumerate(case.pairs):
        at = oracle.scales(pair, case.earlier[i], tau, max_c2, None)
        assert float(found.c2[i]) == pytest.approx(at.c2, rel=1e-8, abs=1e-11)
        assert float(found.c[i]) == pytest.approx(at.c, rel=1e-8, abs=1e-6)
        expected_gain = at.tau / (at.tau + (1 - at.tau) * at.c2)
        assert float(s[i]) == pytest.approx(expected_gain, rel=1e-8)
        a, b = at.a, at.b
        if a < 1e-3 or b < 1e-3:
            continue  # where the conversions themselves cancel
        p, q = oracle.parts(kind, a, b)
        at = oracle.scales(pair, case.earlier[i], tau, max_c2, None, oracle.ratio_of(kind, pair))
        expected_gain = at.tau / (at.tau + (1 - at.tau) * at.c2)
        assert float(of_output[i]) == pytest.approx(expected_gain, rel=1e-8)
        by_hand = (a * output[i] - p * x_t[i]) / (a * q - b * p)
        torch.testing.assert_close(eps_hat[i], by_hand, rtol=1e-6, atol=1e-6)
        scaled = expected_gain * by_hand
        expected = p * (x_t[i] - b * scaled) / a + q * scaled
        torch.testing.assert_close(shrunk[i], expected, rtol=1e-5, atol=1e-5)
        back = output_from_epsilon(
            by_hand[None], x_t[i : i + 1], case.t[i : i + 1], case.schedule, kind
        )
        torch.testing.assert_close(back[0], output[i], rtol=1e-5, atol=1e-5)


def answer(call: Callable[[], Any]) -> tuple[str, Any]:
    """What our errors say, "" where there is none, and what came back."""
    try:
        return "", call()
    except (TypeError, ValueError) as error:
        return str(error), None


wrong_shapes = st.sampled_from(
    [(4,), (4, 3), (4, 1), (1, 3), (3, 4, 3), (), (0,), (4, 3, 1), (8, 3)]
)
anything = st.one_of(
    st.none(),
    st.integers(-3, 2000),
    st.floats(allow_nan=True),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.builds(lambda shape: torch.zeros(shape), wrong_shapes),
    st.builds(lambda shape: torch.ones(shape, dtype=torch.long), wrong_shapes),
    st.builds(lambda shape: torch.zeros(shape, device="meta"), wrong_shapes),
)
LINEAR = NoiseSchedule.linear(1000)


@FUZZ
@given(st.data())
def test_wrong_arguments_are_our_errors(data: st.DataObject) -> None:
    """Whatever stands in one argument's place: right shapes, or a TypeError or ValueError."""
    x, t = torch.zeros(4, 3), torch.tensor([0, 9, 500, 999])
    kind = data.draw(st.sampled_from(["prediction", "output", "target", "step", "shrunk"]))
    names = {
        "prediction": ["eps_hat", "noise", "t", "weights", "skip_noise"],
        "output": ["output", "target", "x_t", "t", "weights", "skip_noise"],
        "target": ["target", "x_t", "t"],
        "step": ["x0", "t", "noise", "weights", "skip_noise"],
        "shrunk": ["x_t", "t"],
    }[kind]
    values: dict[str, Any] = dict.fromkeys(names, x)
    values.update(
        {
            name: value
            for name, value in (("t", t), ("weights", None), ("skip_noise", None))
            if name in names
        }
    )
    changed = data.draw(st.sampled_from(names))
    values[changed] = data.draw(anything)
    v = SkipStepLoss(LINEAR, 9, prediction_type="v_prediction", reduction="none")
    plain = SkipStepLoss(LINEAR, 9, reduction="none")
    call = {
        "prediction": lambda: plain.from_prediction(**values),
        "output": lambda: v.from_output(**values),
        "target": lambda: v.regression_target(**values)[0],
        "step": lambda: v(lambda x_t, t: x_t, **values),
        "shrunk": lambda: ScaledModel.with_gain(Echo(), LINEAR, 9)(**values),
    }[kind]
    message, result = answer(call)
    assert len(message) < 600
    if message:
        return
    leading = len(values["x_t"] if kind == "shrunk" else values[names[0]])
    assert result.shape[0] == leading
    assert not result.isnan().any() or result.device.type == "meta"


class Echo(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t


@FUZZ
@given(
    anything, anything, st.sampled_from(["betas", "alphas_cumprod", "log_snr", "sigmas", "skip"])
)
def test_wrong_settings_are_our_errors(first: Any, second: Any, what: str) -> None:
    make = {
        "betas": lambda: NoiseSchedule.from_betas(first),
        "alphas_cumprod": lambda: NoiseSchedule.from_alphas_cumprod(first),
        "log_snr": lambda: NoiseSchedule.from_log_snr(first),
        "sigmas": lambda: NoiseSchedule.from_sigmas(first),
        "skip": lambda: SkipStepLoss(LINEAR, first, tau=second if second is not None else 0.99),
    }[what]
    message, made = answer(make)
    assert len(message) < 600
    assert message or repr(made)
