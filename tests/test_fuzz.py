"""Random calls of the whole public surface against an oracle that shares no code with it.

A finite right answer or one of our errors: never a crash, a silent broadcast, a NaN from finite
input, a warning (they are errors here). 50,000 examples:

    HYPOTHESIS_PROFILE=nightly pytest -m "" tests/test_fuzz.py
"""

from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, ScaledModel, SkipSet, SkipStepLoss, gain
from s2dm_loss.coefficients import coefficients
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon
from tests.helpers import oracle
from tests.strategies import (
    ESTIMATORS,
    FLOW,
    LINEAR,
    TYPES,
    VP,
    Same,
    drawn,
    loss_and_gradient,
    mean_of_squares,
    normal,
)

FUZZ = settings(
    max_examples=5 * settings.default.max_examples,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:prediction_type 'flow' is noise minus data"),
    pytest.mark.filterwarnings("ignore:the sampled timesteps go from"),
]
WEIGHTINGS = [None, None, "uniform", "min_snr", "soft_min_snr", "p2", "sigmoid"]


@dataclass
class Case:
    """A schedule with skips, some of its times, and the oracle's view of both."""

    schedule: Any
    skip_set: Any
    t: Tensor
    pairs: list
    earlier: list
    rates: list | None = None

    def kinds(self):
        return st.sampled_from([*TYPES, "velocity"] if self.rates else TYPES)

    def scales(self, *settings):
        """The oracle's, with tau, max_c2, weighting and prediction type."""
        rates = self.rates or [None] * len(self.pairs)
        values = zip(self.pairs, self.earlier, rates, strict=True)
        return [oracle.scales(pair, earlier, *settings, rate) for pair, earlier, rate in values]


@st.composite
def discrete(draw, batch):
    kind = draw(st.sampled_from(["betas", "zero_snr", "alphas_cumprod", "log_snr", "sigmas"]))
    size = draw(st.integers(2, 40))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rising = torch.rand(size, generator=source, dtype=torch.float64).add(1e-3).cumsum(0)
    share = rising / rising[-1]
    given = "betas" if kind == "zero_snr" else kind
    table = {
        "betas": (share * 10 ** draw(st.floats(-6, -0.5))).clamp(1e-9, 0.999),
        "alphas_cumprod": (1 - share).clamp(min=0),  # ends in 0
        "log_snr": 20 * (0.5 - share),
        "sigmas": 1e-3 + 80 * share,
    }[given].tolist()
    schedule = getattr(NoiseSchedule, f"from_{given}")(table)
    schedule = schedule.rescale_zero_terminal_snr() if kind == "zero_snr" else schedule
    times = draw(st.lists(st.integers(0, size - 1), min_size=batch, max_size=batch))
    form = draw(st.sampled_from(["int", "several", "stride", "sampled"]))
    if form == "sampled":
        visited = sorted(draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=8)))
        skip_set = SkipSet.from_timesteps(draw(st.permutations(visited)))
        earlier = [[v for v in visited if v < t][-1:] for t in times]
    elif form == "stride":
        steps = draw(st.integers(2, size))
        skip_set = SkipSet.for_sampling_steps(steps)
        earlier = [[t - size // steps] for t in times]
    else:
        most = 4 if form == "several" else 1
        offsets = sorted(draw(st.sets(st.integers(1, size - 1), min_size=1, max_size=most)))
        skip_set = offsets if form == "several" else offsets[0]
        earlier = [[t - k for k in offsets] for t in times]
    types = torch.int64, torch.int32, torch.uint8, torch.int16, torch.uint16
    t = torch.tensor(times, dtype=draw(st.sampled_from(types)))
    path = oracle.discrete_path(kind, table)
    earlier = [[path[s] for s in each if s >= 0] for each in earlier]
    return Case(schedule, skip_set, t, [path[i] for i in times], earlier)


CONTINUOUS = {
    "vp": VP,
    "sub_vp": ContinuousSchedule.sub_vp(),
    "cosine": ContinuousSchedule.cosine(min_time=1e-5),
    "flow": FLOW,
    "ve": ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 80 * t)),
}


@st.composite
def continuous(draw, batch):
    kind = draw(st.sampled_from(sorted(CONTINUOUS)))
    floats = st.floats(1e-4, 1 - 1e-6 if kind == "cosine" else 1.0)
    times = draw(st.lists(floats, min_size=batch, max_size=batch))
    offsets = draw(st.lists(st.floats(1e-3, 0.5), min_size=1, max_size=3, unique=True))
    earlier = [[oracle.continuous_pair(kind, t - k) for k in offsets if t >= k] for t in times]
    pairs = [oracle.continuous_pair(kind, t) for t in times]
    rates = [oracle.continuous_rates(kind, t) for t in times]
    t = torch.tensor(times, dtype=torch.float64)
    return Case(CONTINUOUS[kind], SkipSet(offsets), t, pairs, earlier, rates)


@st.composite
def cases(draw, batch):
    return draw(discrete(batch) if draw(st.integers(0, 2)) else continuous(batch))


def laid_out(draw, values):
    """The same values in one of the layouts that tensors come in."""
    layout = draw(st.sampled_from(["contiguous", "channels_last", "sliced"]))
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1) if values.ndim > 2 else values
    if layout == "sliced":
        wide = values.new_zeros(*values.shape[:-1], 2 * values.shape[-1])
        wide[..., ::2] = values
        return wide[..., ::2]
    return values


shapes = st.sampled_from([(), (5,), (3, 4), (2, 3, 3), (3, 2, 2, 2), (1,), (7, 1)])
dtypes = st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16, torch.half])


def answer(call):
    """What our errors say, "" where there is none, and what came back."""
    try:
        return "", call()
    except (TypeError, ValueError) as error:
        return str(error), None


def reduced(losses, reduction, weights):
    losses = losses if weights is None else losses * weights
    return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]


def compare(found, expected, dtype, rtol, least):
    """Value and gradient, each to the rounding of its type."""
    for value, exact, floor in zip(found, expected, (1.0, least), strict=True):
        assert value.isfinite().all()
        assert value.shape == exact.shape
        scale = max(float(exact.abs().max()), floor)
        assert float((value.double() - exact).abs().max()) <= rtol * scale
        rtol = max(rtol, {torch.bfloat16: 1e-2, torch.half: 2e-3}.get(dtype, 0))


@settings(FUZZ, max_examples=2 * FUZZ.max_examples)
@pytest.mark.filterwarnings("ignore:weighting .* the last timestep:UserWarning")
@given(st.data())
def test_the_loss_of_any_output(data):
    draw = data.draw
    batch = draw(st.integers(1, 4))
    case = draw(cases(batch))
    kind = draw(st.just("epsilon") | case.kinds())
    if kind == "score" and any(pair[1] == 0 for pair in case.pairs):
        return  # a score without noise is infinite
    if kind != "epsilon" and any(0 < pair[0] < 1e-12 for pair in case.pairs):
        return  # where the oracle's noise in the output cancels in float64
    # Nearer to 1 it is 1 in float32, and no skip term is logged.
    tau = draw(st.one_of(st.floats(1e-6, 1 - 1e-6), st.sampled_from([0.0, 0.99, 1.0])))
    max_c2 = draw(st.sampled_from([100.0, 100.0, 0.0, 1.0, 1e4]))
    weighting, estimator = draw(st.sampled_from(WEIGHTINGS)), draw(st.sampled_from(ESTIMATORS))
    reduction, normalize = draw(st.sampled_from(["none", "sum", "mean"])), draw(st.booleans())
    options = {"tau": tau, "max_c2": max_c2, "weighting": weighting, "prediction_type": kind}
    options |= {"estimator": estimator, "reduction": reduction, "normalize": normalize}
    message, criterion = answer(lambda: SkipStepLoss(case.schedule, case.skip_set, **options))
    if message:
        assert "weighting must lie in" in message
        return
    scales, of_noise = case.scales(tau, max_c2, weighting, kind), kind == "epsilon"
    dtype = draw(dtypes if of_noise else st.sampled_from([torch.float64, torch.float32]))
    shape, seed = (batch, *draw(shapes)), draw(st.integers(0, 2**31))
    output, *wide = (laid_out(draw, normal(*shape, seed=seed + i).to(dtype)) for i in range(4))
    x0, eps, xi = (values.double() for values in wide)
    target, x_t = torch.empty_like(x0), torch.empty_like(x0)
    for i, at in enumerate(scales):
        target[i], x_t[i] = at.p * x0[i] + at.q * eps[i], at.a * x0[i] + at.b * eps[i]
    weights = normal(batch, seed=seed + 4).abs() if draw(st.booleans()) else None

    def exact_loss(x):
        values = zip(scales, x, x0, eps, xi, strict=True)
        losses = [at.loss(*each, estimator, normalize=normalize) for at, *each in values]
        return reduced(torch.stack(losses), reduction, weights)

    exact = loss_and_gradient(exact_loss, output.double())
    inputs = target.to(dtype), case.t, None if of_noise else x_t.to(dtype)
    given_xi = drawn(estimator, wide[2])
    entry = draw(st.sampled_from(["output", "target", "step", *["terms"] * of_noise]))
    rtol = {True: 1e-8, False: 3e-5}[dtype == torch.float64] * (1 if of_noise else 100)
    if entry == "terms":
        terms = criterion.terms(output, inputs[0], case.t, **given_xi)
        for i, at in enumerate(scales):
            expected = at.two_terms(output[i].double(), eps[i], xi[i], estimator)
            for found, value in zip((terms.simple, terms.skip, terms.total), expected, strict=True):
                # c² may be 1e4 times what is left of two terms that cancel.
                atol = rtol * max(1.0, at.c2) * (at.weight or 1.0)
                assert float(found[i]) == pytest.approx(float(value), rel=rtol, abs=atol)
        return

    def loss_of(x):
        if entry == "output":
            return criterion.from_output(x, *inputs, weights=weights, **given_xi)
        if entry == "target":
            changed, weight = criterion.regression_target(*inputs, **given_xi)
            of_sample = weight * mean_of_squares(x - changed)
            return reduced(of_sample, reduction, weights if weights is None else weights.to(weight))
        noise = {"noise": wide[1], "weights": weights}
        return criterion(lambda x_t, t: x, wide[0], case.t, **noise, **given_xi)

    found = loss_and_gradient(loss_of, output)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[1].dtype == dtype
    if not of_noise and exact[0].abs().max() > 1e6:
        # The data's own size leaves float32, or the oracle's float64, no digits to compare.
        assert found[0].isfinite().all()
        return
    compare(found, exact, dtype, rtol, least=1e-2 if of_noise else 1.0)


@FUZZ
@given(st.data())
def test_coefficients_gain_and_the_scaled_model(data):
    draw = data.draw
    case = draw(cases(3))
    tau, max_c2 = draw(st.floats(0.01, 1)), draw(st.sampled_from([100.0, 1.0, 0.0]))
    kind = draw(case.kinds())
    x_t, output = normal(3, 2, seed=1), normal(3, 2, seed=2)
    where, options = (case.schedule, case.skip_set), {"tau": tau, "max_c2": max_c2}
    found = coefficients(*where, t=case.t, **options)
    s = gain(*where, t=case.t, prediction_type="epsilon", **options)
    of_output = gain(*where, t=case.t, prediction_type=kind, **options)
    scaled_model = ScaledModel.with_gain(nn.Identity(), *where, prediction_type=kind, **options)
    scaled_output = scaled_model.rescale(output, x_t, case.t)
    assert scaled_output.isfinite().all()
    eps_hat = epsilon_from_output(output, x_t, case.t, case.schedule, kind)
    scales = (case.scales(tau, max_c2, None, each) for each in ("epsilon", kind))
    for i, (at, of_kind) in enumerate(zip(*scales, strict=True)):
        assert float(found.c2[i]) == pytest.approx(at.c2, rel=1e-8, abs=1e-11)
        assert float(found.c[i]) == pytest.approx(at.c, rel=1e-8, abs=1e-6)
        assert float(s[i]) == pytest.approx(at.gain, rel=1e-8)
        at = of_kind
        if at.a < 1e-3 or at.b < 1e-3:
            continue  # where the conversions themselves cancel
        assert float(of_output[i]) == pytest.approx(at.gain, rel=1e-8)
        by_hand, scaled = at.noise_in(output[i], x_t[i]), at.scaled(output[i], x_t[i])
        torch.testing.assert_close(eps_hat[i], by_hand, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(scaled_output[i], scaled, rtol=1e-5, atol=1e-5)
        one = slice(i, i + 1)
        back = output_from_epsilon(by_hand[None], x_t[one], case.t[one], case.schedule, kind)
        torch.testing.assert_close(back[0], output[i], rtol=1e-5, atol=1e-5)


misfits = st.sampled_from([(4,), (4, 3), (4, 1), (1, 3), (3, 4, 3), (), (0,), (4, 3, 1), (8, 3)])
anything = st.one_of(
    st.none(),
    st.integers(-3, 2000),
    st.floats(allow_nan=True),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
    st.builds(lambda shape: torch.zeros(shape), misfits),
    st.builds(lambda shape: torch.ones(shape, dtype=torch.long), misfits),
    st.builds(lambda shape: torch.zeros(shape, device="meta"), misfits),
)


OTHERS = ("t", "weights", "skip_noise")  # which are not of the data's shape, or there


@FUZZ
@given(st.data())
def test_wrong_arguments_are_our_errors(data):
    """Whatever stands in one argument's place: right shapes, or a TypeError or ValueError."""
    x, t = torch.zeros(4, 3), torch.tensor([0, 9, 500, 999])
    of_v = SkipStepLoss(LINEAR, 9, prediction_type="v_prediction", reduction="none")
    plain = SkipStepLoss(LINEAR, 9, reduction="none")
    calls = {
        "eps_hat noise t skip_noise": lambda **given: plain.terms(**given).total,
        "output target t x_t weights skip_noise": of_v.from_output,
        "target t x_t": lambda **given: of_v.regression_target(**given)[0],
        "x0 t noise weights skip_noise": lambda **given: of_v(lambda x_t, t: x_t, **given),
        "x_t t": ScaledModel.with_gain(Same(), LINEAR, 9),
    }
    signature = data.draw(st.sampled_from(list(calls)))
    names = signature.split()
    values = dict.fromkeys(names, x)
    values |= {name: t if name == "t" else None for name in names if name in OTHERS}
    values[data.draw(st.sampled_from(names))] = data.draw(anything)
    message, result = answer(lambda: calls[signature](**values))
    assert len(message) < 600
    if message:
        return
    assert len(result) == len(values[names[0]])
    assert not result.isnan().any() or result.device.type == "meta"


@FUZZ
@given(
    anything, anything, st.sampled_from(["betas", "alphas_cumprod", "log_snr", "sigmas", "skip"])
)
def test_wrong_settings_are_our_errors(first, second, what):
    def make():
        if what == "skip":
            return SkipStepLoss(LINEAR, first, tau=0.99 if second is None else second)
        return getattr(NoiseSchedule, f"from_{what}")(first)

    message, made = answer(make)
    assert len(message) < 600
    assert message or repr(made)
