"""Schedules against the tables of diffusers and guided-diffusion, and against exact arithmetic."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from s2dm_loss.schedule import Schedule
from tests.strategies import COSINE, FLOW, LINEAR, VP, betas, pickled, same

PATHS = [VP, ContinuousSchedule.sub_vp(), ContinuousSchedule.cosine(), FLOW]
CPU = torch.device("cpu")
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (LINEAR, {}),
        (NoiseSchedule.scaled_linear(1000), SCALED),
        (COSINE, {"beta_schedule": "squaredcos_cap_v2"}),
        (
            NoiseSchedule.linear(100, 0.001, 0.1),
            {"beta_start": 0.001, "beta_end": 0.1, "num_train_timesteps": 100},
        ),
    ],
    ids=repr,
)
def test_tables_of_diffusers_to_float32_rounding(schedule, config):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**config).alphas_cumprod.double()
    # 1000 float32 factors, each within half an ulp.
    torch.testing.assert_close(schedule.alphas_cumprod, theirs, rtol=6e-5, atol=0)
    if config in ({}, SCALED):
        theirs = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **config).alphas_cumprod
        table = schedule.rescale_zero_terminal_snr().alphas_cumprod
        assert table[-1] == 0
        assert table[0] == pytest.approx(float(schedule.alphas_cumprod[0]), rel=1e-14)
        torch.testing.assert_close(table, theirs.double(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
def test_tables_of_guided_diffusion_and_stable_diffusion_to_float64_rounding(name):
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    if name != "scaled_linear":
        diffusion = pytest.importorskip("guided_diffusion.gaussian_diffusion")
        betas = diffusion.get_named_beta_schedule(name, 1000)
    table = getattr(NoiseSchedule, name)(1000).alphas_cumprod
    np.testing.assert_allclose(table, np.cumprod(1 - betas), rtol=1e-12)


@given(betas(max_size=50))
@settings(max_examples=30)
def test_constructors_against_60_digits(values):
    with mpmath.workdps(60):
        left = [1 - mpmath.mpf(beta) for beta in values]
        products = [mpmath.fprod(left[: i + 1]) for i in range(len(left))]
        bars = [float(bar) for bar in products]
        logs = [float(mpmath.log(bar)) for bar in products]
        log_snrs = [float(mpmath.log(bar / (1 - bar))) for bar in products]
        paths = [[float(mpmath.sqrt(x)) for x in (bar, 1 - bar)] for bar in products]
    schedule = NoiseSchedule.from_betas(values)
    np.testing.assert_allclose(schedule.log_alphas_cumprod, logs, rtol=1e-13)
    np.testing.assert_allclose(schedule.log_snr, log_snrs, rtol=1e-12, atol=1e-12)
    found = torch.stack(schedule.alpha_sigma(schedule.timesteps), 1)
    np.testing.assert_allclose(found, paths, rtol=1e-12)
    of_log_snr = NoiseSchedule.from_log_snr(log_snrs).log_alphas_cumprod
    np.testing.assert_allclose(of_log_snr, logs, rtol=1e-11)
    of_bars = NoiseSchedule.from_alphas_cumprod(bars).alphas_cumprod
    np.testing.assert_allclose(of_bars, bars, rtol=1e-12)


def test_what_a_repr_says():
    cosine = NoiseSchedule.cosine(10).rescale_zero_terminal_snr()
    assert repr(cosine) == "NoiseSchedule.cosine(10).rescale_zero_terminal_snr()"
    for name in ("linear", "scaled_linear", "cosine"):
        assert repr(getattr(NoiseSchedule, name)()) == f"NoiseSchedule.{name}(1000)"
    linear = NoiseSchedule.linear(500, beta_end=0.01)
    assert repr(linear) == "NoiseSchedule.linear(500, beta_end=0.01)"
    assert repr(NoiseSchedule([-0.5, -1.0])) == "NoiseSchedule([2 values])"


def test_what_a_table_may_hold():
    ends = NoiseSchedule.from_alphas_cumprod([1.0, 0.5, 0.0])
    assert ends.log_alphas_cumprod.tolist() == [0.0, math.log(0.5), -math.inf]
    for one in (
        NoiseSchedule.from_alphas_cumprod([0.25]),
        NoiseSchedule.from_log_snr([-math.log(3)]),
        NoiseSchedule.from_sigmas([math.sqrt(3)]),
        NoiseSchedule.from_betas([0.75]),
    ):
        assert one.alphas_cumprod.tolist() == pytest.approx([0.25], rel=1e-15)
    two = NoiseSchedule.from_alphas_cumprod([0.8, 0.3]).rescale_zero_terminal_snr()
    np.testing.assert_allclose(two.alphas_cumprod.numpy(), [0.8, 0.0], rtol=1e-15)
    last = NoiseSchedule.from_betas([0.1, 0.5, 1.0]).alphas_cumprod
    assert last.tolist() == pytest.approx([0.9, 0.45, 0.0], abs=1e-16)
    assert last[-1] == NoiseSchedule.from_betas([1.0]).alphas_cumprod == 0


FALLS = torch.linspace(0.95, 0.05, 10, dtype=torch.float64)


@pytest.mark.parametrize(
    "table",
    [
        1 / torch.arange(1000, 0, -1, dtype=torch.float64),  # ddim's "jsd"
        1 - LINEAR.alphas_cumprod[-99:],  # 99 values may be part of a schedule
        *(FALLS[:9], FALLS.flip(0), torch.cat([FALLS[:5], FALLS[4:]])),
        torch.linspace(0.5, 0.05, 10, dtype=torch.float64),
    ],
    ids=len,
)
def test_betas_that_look_like_nothing_else(table):
    found = NoiseSchedule.from_betas(table).alphas_cumprod
    torch.testing.assert_close(found, (1 - table).cumprod(0), rtol=1e-12, atol=0)


def test_log_snr_at_the_ends_of_float64():
    schedule = NoiseSchedule.from_log_snr([800.0, 40.0, 0.0, -40.0, -800.0, -math.inf])
    expected = [-0.0, -math.exp(-40), -math.log(2), -40 - math.exp(-40), -800.0, -math.inf]
    np.testing.assert_allclose(schedule.log_alphas_cumprod.numpy(), expected, rtol=1e-15)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(10), *PATHS], ids=repr)
def test_protocol_draws_and_pickles(schedule):
    assert isinstance(schedule, Schedule)
    t, again, other = (
        schedule.draw_timesteps(1000, device=CPU, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(t, again)
    assert not torch.equal(t, other)
    if isinstance(schedule, NoiseSchedule):
        assert set(t.tolist()) == set(range(10))
    else:
        assert t.mean() == pytest.approx(0.5, abs=0.05)
        assert schedule.min_time == (1e-5 if "vp" in repr(schedule) else 0)
    again = pickled(schedule)
    assert repr(again) == repr(schedule)
    assert torch.equal(again.log_alphas_cumprod_at(t), schedule.log_alphas_cumprod_at(t))


def test_from_sigmas_is_the_path_of_edm():
    sigmas = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    schedule = NoiseSchedule.from_sigmas(sigmas)
    found = *schedule.alpha_sigma(torch.arange(4)), schedule.alphas_cumprod
    same(found, (torch.ones_like(sigmas), sigmas, 1 / (1 + sigmas**2)), rtol=1e-13, atol=0)


def test_a_path_of_ones_own_by_its_logarithms():
    own = ContinuousSchedule(lambda t: (torch.log1p(-t), t.log()), name="mine")
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    same(own.alpha_sigma(t), FLOW.alpha_sigma(t))
    torch.testing.assert_close(own.log_alphas_cumprod_at(t), FLOW.log_alphas_cumprod_at(t))
    assert repr(own) == "mine"
    # Also by some that are never below zero.
    path = ContinuousSchedule(lambda t: (0 * t, 1 + 3 * t))
    assert float(path.alpha_sigma(torch.tensor(1.0))[1]) == pytest.approx(math.exp(4))


def test_numpy_arrays_of_any_kind():
    betas = np.linspace(1e-4, 0.02, 50)
    locked = betas.copy()
    locked.flags.writeable = False
    other_order = betas.astype(betas.dtype.newbyteorder())
    expected = NoiseSchedule.from_betas(betas.tolist()).alphas_cumprod
    for array in (betas, betas[::-1].copy()[::-1], locked, other_order):
        assert torch.equal(NoiseSchedule.from_betas(array).alphas_cumprod, expected)
    table = np.array([-0.1, -0.5])
    schedule = NoiseSchedule(table)
    table.fill(-7.0)  # the schedule owns its table
    assert schedule.log_alphas_cumprod.tolist() == [-0.1, -0.5]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_small_integer_times(dtype):
    """200 - 201 is 255 in uint8, a later time in place of none."""
    t = torch.tensor([0, 5, 100, 101, 127], dtype=dtype)
    earlier, valid = SkipSet(101).earlier(t, NoiseSchedule.linear(128))
    assert valid[0].tolist() == [False, False, False, True, True]
    assert earlier[0].tolist() == [0, 5, 100, 0, 26]


def test_continuous_times_are_drawn_in_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    t = FLOW.draw_timesteps(10_000, device=CPU)
    assert t.dtype == torch.float32
    assert t.unique().numel() > 9_900


def test_vmap_over_continuous_times():
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    found = torch.func.vmap(lambda t: coefficients(FLOW, 0.1, t=t).c2)(t)
    torch.testing.assert_close(found, coefficients(FLOW, 0.1, t=t).c2)


class Delegating:
    """Hands everything on, as a wrapper that logs or times would."""

    def __init__(self, schedule):
        self._schedule = schedule

    def __getattr__(self, name):
        return getattr(self._schedule, name)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(10), ContinuousSchedule.vp(data_at=1)])
def test_a_delegating_schedule_is_one(schedule):
    wrapped = Delegating(schedule)
    skip, t = (2, torch.tensor([5])) if schedule.timesteps is not None else (0.2, torch.ones(1) / 2)
    found, expected = (SkipStepLoss(each, skip).coefficients_at(t) for each in (wrapped, schedule))
    assert found.gain == expected.gain
    for none in (object(), NoiseSchedule, Delegating(object())):
        with pytest.raises(TypeError, match="schedule must be"):
            SkipStepLoss(none, skip)
    assert not isinstance(object(), Schedule)
    subclass = type("Subclass", (Schedule,), {})
    assert not isinstance(schedule, subclass)
    assert isinstance(subclass(), subclass)


@pytest.mark.parametrize(
    ("read", "whole", "end"),
    [
        (NoiseSchedule.from_sigmas, torch.linspace(0.01, 1.0, 100).double(), 1.001),
        (NoiseSchedule.from_alphas_cumprod, torch.linspace(0.999, 0.91, 100).double(), 0.9),
        (NoiseSchedule.from_log_snr, torch.linspace(9e3, 0.0, 100).double(), -1e-3),
    ],
)
def test_where_the_checks_of_a_table_begin(read, whole, end):
    with pytest.raises(ValueError, match=r"looks? like"):
        read(whole)
    read(whole[1:])  # 99 values may be part of a schedule
    whole = whole.clone()
    whole[-1] = end  # the end tells, and no other value
    assert read(whole).num_train_timesteps == 100


@pytest.mark.parametrize(
    "make",
    [
        lambda: (NoiseSchedule.cosine(10).rescale_zero_terminal_snr(), SkipSet([1, 2])),
        lambda: (NoiseSchedule.cosine(10), SkipSet(1)),
        lambda: (NoiseSchedule.from_betas([0.1, 0.2, 0.3]), SkipSet.from_timesteps([0, 2])),
        lambda: (NoiseSchedule.from_sigmas([0.1, 2.0]), SkipSet.from_timesteps([0, 1])),
        lambda: (ContinuousSchedule.vp(data_at=1), SkipSet.from_timesteps([0.0, 0.5])),
        lambda: (ContinuousSchedule.from_alpha_sigma(lambda t: (1 - t**2, t)), SkipSet(0.5)),
    ],
)
def test_schedules_are_made_in_any_mode(make):
    """Fake tensors have no values, and another default device may have none either."""
    expected = SkipStepLoss(*make())
    t = expected.schedule.timesteps
    t = torch.tensor([0.3, 0.9]) if t is None else t
    for mode in (FakeTensorMode(), torch.device("meta"), torch.inference_mode()):
        with mode:
            criterion = SkipStepLoss(*make())
        found, gain = (each.coefficients_at(t).gain for each in (criterion, expected))
        assert torch.equal(found, gain)
