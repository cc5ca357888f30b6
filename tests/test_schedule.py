"""Schedules against the tables of diffusers and guided-diffusion, and against exact arithmetic."""

import math
import pickle

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from s2dm_loss import ContinuousSchedule, NoiseSchedule, ScaledModel, SkipSet, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from s2dm_loss.schedule import Schedule
from tests.strategies import COSINE, FLOW, LINEAR, VP, betas, same

PATHS = [VP, ContinuousSchedule.sub_vp(), ContinuousSchedule.cosine(), FLOW]
EACH_PATH = pytest.mark.parametrize("path", PATHS, ids=repr)
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


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_of_guided_diffusion_to_float64_rounding(name):
    gaussian_diffusion = pytest.importorskip("guided_diffusion.gaussian_diffusion")
    expected = np.cumprod(1 - gaussian_diffusion.get_named_beta_schedule(name, 1000))
    table = getattr(NoiseSchedule, name)(1000).alphas_cumprod.numpy()
    np.testing.assert_allclose(table, expected, rtol=1e-12, atol=0)


@given(betas(max_size=50))
@settings(max_examples=30)
def test_from_betas_against_60_digits(values):
    schedule = NoiseSchedule.from_betas(values)
    with mpmath.workdps(60):
        product, expected_log, expected_snr = mpmath.mpf(1), [], []
        for beta in values:
            product *= 1 - mpmath.mpf(beta)
            expected_log.append(float(mpmath.log(product)))
            expected_snr.append(float(mpmath.log(product / (1 - product))))
    np.testing.assert_allclose(schedule.log_alphas_cumprod.numpy(), expected_log, rtol=1e-13)
    np.testing.assert_allclose(schedule.log_snr.numpy(), expected_snr, rtol=1e-12, atol=1e-12)


@given(betas(min_size=2, max_size=200))
def test_constructors_agree(values):
    schedule = NoiseSchedule.from_betas(values)
    again = NoiseSchedule.from_log_snr(schedule.log_snr)
    torch.testing.assert_close(
        again.log_alphas_cumprod, schedule.log_alphas_cumprod, rtol=1e-11, atol=1e-300
    )
    reaches_noise = len(values) < 100 or schedule.alphas_cumprod[-1] <= 0.9  # as ᾱ is asked to
    if reaches_noise and schedule.alphas_cumprod.diff().lt(0).all():
        again = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod)
        torch.testing.assert_close(
            again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-12, atol=0
        )


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (NoiseSchedule([-0.5, -1.0]), "NoiseSchedule([2 values])"),
        (NoiseSchedule.linear(500, beta_end=0.01), "NoiseSchedule.linear(500, beta_end=0.01)"),
        (
            NoiseSchedule.cosine(10).rescale_zero_terminal_snr(),
            "NoiseSchedule.cosine(10).rescale_zero_terminal_snr()",
        ),
    ],
)
def test_what_a_repr_says(schedule, said):
    assert repr(schedule) == said


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


def test_which_betas_look_like_cumulative_products():
    falls = torch.linspace(0.95, 0.05, 10, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"fall from 0\.95 to 0\.05, which look like ᾱ"):
        NoiseSchedule.from_betas(falls)
    with pytest.raises(ValueError, match=r"fall from 0\.95 to 0\.005, which look like ᾱ"):
        NoiseSchedule.from_betas(torch.cat([falls[:1], falls[5:], falls[5:] / 10]))
    flat = torch.cat([falls[:5], falls[4:]])
    rest = torch.linspace(0.5, 0.05, 10, dtype=torch.float64)
    for table in (falls[:9], flat, rest, falls.flip(0)):
        found = NoiseSchedule.from_betas(table).alphas_cumprod
        torch.testing.assert_close(found, (1 - table).cumprod(0), rtol=1e-12, atol=0)


def test_log_snr_at_the_ends_of_float64():
    schedule = NoiseSchedule.from_log_snr([800.0, 40.0, 0.0, -40.0, -800.0, -math.inf])
    expected = [-0.0, -math.exp(-40), -math.log(2), -40 - math.exp(-40), -800.0, -math.inf]
    np.testing.assert_allclose(schedule.log_alphas_cumprod.numpy(), expected, rtol=1e-15)


def test_alpha_sigma_of_a_discrete_schedule():
    t = torch.tensor([0, 500, 999])
    a, b = LINEAR.alpha_sigma(t)
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    np.testing.assert_allclose(a.numpy(), np.sqrt(expected), rtol=1e-13)
    np.testing.assert_allclose(b.numpy(), np.sqrt(1 - expected), rtol=1e-11)


@EACH_PATH
def test_paths_run_from_data_to_noise(path):
    log_bar = path.log_alphas_cumprod_at(torch.linspace(0, 1, 1001))
    assert log_bar[0] == 0
    assert log_bar[-1] < -9
    assert (log_bar.diff() < 0).all()


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(10), *PATHS], ids=repr)
def test_protocol_draws_and_pickles(schedule):
    assert isinstance(schedule, Schedule)
    draws = [
        schedule.draw_timesteps(1000, device=CPU, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    schedule.check_timesteps(draws[0])
    if isinstance(schedule, NoiseSchedule):
        assert set(draws[0].tolist()) == set(range(10))
    else:
        assert draws[0].mean() == pytest.approx(0.5, abs=0.05)
        assert schedule.min_time == (1e-5 if "vp" in repr(schedule) else 0)
    again = pickle.loads(pickle.dumps(schedule))  # noqa: S301 - our own bytes
    assert repr(again) == repr(schedule)
    t = draws[0][:5]
    assert torch.equal(again.log_alphas_cumprod_at(t), schedule.log_alphas_cumprod_at(t))


def test_from_sigmas_is_the_path_of_edm():
    sigmas = torch.tensor([0.002, 0.1, 1.0, 80.0], dtype=torch.float64)
    schedule = NoiseSchedule.from_sigmas(sigmas)
    t = torch.arange(4)
    found = *schedule.alpha_sigma(t), schedule.alphas_cumprod
    same(found, (torch.ones_like(sigmas), sigmas, 1 / (1 + sigmas**2)), rtol=1e-13, atol=0)
    # c² = ᾱ_s / ᾱ_t - 1 is (1 + σ_t²) / (1 + σ_s²) - 1.
    c2 = coefficients(schedule, 1, max_c2=math.inf).c2
    expected = (1 + sigmas[1:] ** 2) / (1 + sigmas[:-1] ** 2) - 1
    torch.testing.assert_close(c2[1:], expected, rtol=1e-12, atol=0)


def test_a_path_of_ones_own_by_its_logarithms():
    own = ContinuousSchedule(lambda t: (torch.log1p(-t), t.log()), name="mine")
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    same(own.alpha_sigma(t), FLOW.alpha_sigma(t))
    torch.testing.assert_close(own.log_alphas_cumprod_at(t), FLOW.log_alphas_cumprod_at(t))
    assert repr(own) == "mine"
    # Also by some that are never below zero.
    path = ContinuousSchedule(lambda t: (0 * t, 1 + 3 * t))
    assert float(path.alpha_sigma(torch.tensor(1.0))[1]) == pytest.approx(math.exp(4))


@pytest.mark.parametrize(
    "make",
    [NoiseSchedule, NoiseSchedule.from_betas, NoiseSchedule.from_log_snr],
    ids=["log", "betas", "log_snr"],
)
def test_a_schedule_owns_its_table(make):
    given = -torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    given = -given if make == NoiseSchedule.from_betas else given
    schedule = make(given)
    before = schedule.alphas_cumprod
    given.fill_(-7.0)
    assert torch.equal(schedule.alphas_cumprod, before)


def test_numpy_arrays_of_any_kind():
    betas = np.linspace(1e-4, 0.02, 50)
    locked = betas.copy()
    locked.flags.writeable = False
    other_order = betas.astype(betas.dtype.newbyteorder())
    expected = NoiseSchedule.from_betas(betas.tolist()).alphas_cumprod
    for array in (betas, betas[::-1].copy()[::-1], locked, other_order):
        assert torch.equal(NoiseSchedule.from_betas(array).alphas_cumprod, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_small_integer_times(dtype):
    """200 - 201 is 255 in uint8, a later time in place of none."""
    schedule, skip = NoiseSchedule.linear(128), 101
    t = torch.tensor([0, 5, 100, 101, 127])
    earlier, valid = SkipSet(skip).earlier(t.to(dtype), schedule)
    assert valid[0].tolist() == [False, False, False, True, True]
    assert earlier[0].tolist() == [0, 5, 100, 0, 26]
    bar = schedule.alphas_cumprod
    expected = torch.tensor([0, 0, 0, bar[0] / bar[101] - 1, bar[26] / bar[127] - 1])
    found = coefficients(schedule, skip, t=t.to(dtype)).c2
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=0)


def test_continuous_times_are_drawn_in_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        t = FLOW.draw_timesteps(10_000, device=CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert t.dtype == torch.float32
    assert t.unique().numel() > 9_900


def test_vmap_over_continuous_times():
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    found = torch.func.vmap(lambda t: coefficients(FLOW, 0.1, t=t).c2)(t)
    torch.testing.assert_close(found, coefficients(FLOW, 0.1, t=t).c2)


PATHS_THAT_ARE_NONE = [
    (lambda t: (t.log(), torch.log1p(-t)), ValueError, r"one that rises.*say data_at=1"),
    (lambda t: (0 * t - 1, 0 * t - 1), ValueError, "the same at every t"),
    (lambda t: t, TypeError, "must return two tensors.*got a tensor of shape"),
    (lambda t: (0.0, 1.0), TypeError, "must return two tensors"),
    (lambda t: (t.sum(), t), ValueError, r"of the shape of t.*shape \(\)"),
    (lambda t: (t.log(), (t - 2).log()), ValueError, "without NaN, got NaN"),
    (lambda t: (1 - t, t), ValueError, "from_alpha_sigma takes them"),
    (lambda t: (0 * t + 1, 80 * t), ValueError, "from_alpha_sigma"),
    (1.0, TypeError, "must be callable"),
]
# Named as the user's own function, and not as its logarithms.
COEFFICIENTS_THAT_ARE_NONE = [
    (lambda t: (1.0, 80 * t), TypeError, r"two tensors, alpha and sigma.*got 1.0 \(float\) and a"),
    (lambda t: t, TypeError, "two tensors, alpha and sigma.*got a tensor of shape"),
    (lambda t: (0.999 - t, t), ValueError, "at least 0, got -0.001 for t from 0 to 1"),
    (lambda t: (t.sum(), t), ValueError, r"of the shape of t.*shape \(\)"),
]


@pytest.mark.parametrize(
    ("make", "path", "error", "message"),
    [
        *((ContinuousSchedule, *case) for case in PATHS_THAT_ARE_NONE),
        *(
            (ContinuousSchedule.from_alpha_sigma, path, error, f"^alpha_sigma must return .*{said}")
            for path, error, said in COEFFICIENTS_THAT_ARE_NONE
        ),
    ],
)
def test_paths_that_are_none(make, path, error, message):
    with pytest.raises(error, match=message):
        make(path)


BETAS = torch.linspace(1e-4, 0.02, 1000)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (BETAS, "got a Tensor: NoiseSchedule.from_betas takes β, from_alphas_cumprod"),
        (np.ones(3000), "got a ndarray: NoiseSchedule.from_betas takes"),
        (1000, r"got 1000 \(int\): NoiseSchedule.linear\(1000\)"),
        ("linear", r"got 'linear' \(str\): NoiseSchedule.linear\(1000\)"),
        (
            type("DDPMScheduler", (), {"alphas_cumprod": BETAS})(),
            "got a DDPMScheduler: NoiseSchedule.from_alphas_cumprod",
        ),
        (None, "got a NoneType: see NoiseSchedule"),
    ],
)
def test_what_is_no_schedule_is_sent_to_its_constructor(schedule, message):
    for make in (
        lambda: SkipStepLoss(schedule, 9),
        lambda: coefficients(schedule, 9),
        lambda: ScaledModel.with_gain(torch.nn.Identity(), schedule, 9),
    ):
        with pytest.raises(TypeError, match=message) as caught:
            make()
        assert len(str(caught.value)) < 300


@EACH_PATH
def test_times_outside_a_path_are_an_error_or_nan(path):
    outside = torch.tensor([0.5, 2.0, -1.0])
    for read in (path.log_alphas_cumprod_at, path.alpha_sigma):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            read(outside)
    # Where no value can be read: under vmap as compiled and on a GPU.
    for values in torch.func.vmap(path.alpha_sigma)(outside):
        assert values.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("make", [NoiseSchedule.from_betas, NoiseSchedule.from_alphas_cumprod])
@pytest.mark.parametrize("count", [[1000], 1000, torch.tensor([1000])])
def test_a_number_of_timesteps_is_sent_to_its_constructor(make, count):
    with pytest.raises(ValueError, match=r"got 1000, which looks like the number of timesteps: No"):
        make(count)


def test_only_the_last_beta_may_be_1():
    last = NoiseSchedule.from_betas([0.1, 0.5, 1.0]).alphas_cumprod
    assert last.tolist() == pytest.approx([0.9, 0.45, 0.0], abs=1e-16)
    assert last[-1] == NoiseSchedule.from_betas([1.0]).alphas_cumprod == 0


class Delegating:
    """Hands everything on, as a wrapper that logs or times would."""

    def __init__(self, schedule):
        self._schedule = schedule

    def __getattr__(self, name):
        if name == "_schedule":
            raise AttributeError(name)
        return getattr(self._schedule, name)


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(10), ContinuousSchedule.flow(data_at=1)])
def test_a_delegating_schedule_is_one_on_every_python(schedule):
    """From Python 3.12 on, `runtime_checkable` does not see what `__getattr__` gives."""
    wrapped = Delegating(schedule)
    assert isinstance(wrapped, Schedule)
    skip, t = (2, torch.tensor([5])) if schedule.timesteps is not None else (0.2, torch.ones(1) / 2)
    for made in (SkipStepLoss(wrapped, skip), SkipStepLoss(schedule, skip)):
        assert made.coefficients_at(t).gain == SkipStepLoss(schedule, skip).coefficients_at(t).gain
    for none in (object(), NoiseSchedule, Delegating(object())):
        assert not isinstance(none, Schedule)

    class Subclass(Schedule):
        pass

    assert not isinstance(schedule, Subclass)
    assert isinstance(Subclass(), Subclass)


@pytest.mark.parametrize(
    ("read", "whole", "end"),
    [
        (NoiseSchedule.from_sigmas, torch.linspace(0.01, 1.0, 100).double(), 1.001),
        (NoiseSchedule.from_alphas_cumprod, torch.linspace(0.999, 0.91, 100).double(), 0.9),
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
        lambda: (NoiseSchedule.from_betas([0.1, 0.2, 0.3]), SkipSet.from_timesteps([0, 2])),
        lambda: (NoiseSchedule.from_sigmas([0.1, 2.0]), SkipSet.from_skipped([1], 2)),
        lambda: (ContinuousSchedule.vp(data_at=1), SkipSet.from_timesteps([0.0, 0.5])),
        lambda: (ContinuousSchedule.from_alpha_sigma(lambda t: (1 - t, t)), SkipSet(0.5)),
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
