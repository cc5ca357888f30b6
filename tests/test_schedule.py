"""Schedules against the tables of diffusers and guided-diffusion, and against exact arithmetic."""

import math
import pickle

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from s2dm_loss import ContinuousSchedule, NoiseSchedule, Schedule
from tests.strategies import betas

diffusers = pytest.importorskip("diffusers")

PATHS = {
    "vp": ContinuousSchedule.vp(),
    "sub_vp": ContinuousSchedule.sub_vp(),
    "cosine": ContinuousSchedule.cosine(),
    "flow": ContinuousSchedule.flow(),
}


@pytest.mark.parametrize(
    ("schedule", "config"),
    [
        (
            NoiseSchedule.linear(1000),
            {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        ),
        (
            NoiseSchedule.scaled_linear(1000),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (NoiseSchedule.cosine(1000), {"beta_schedule": "squaredcos_cap_v2"}),
        (
            NoiseSchedule.linear(100, 0.001, 0.1),
            {
                "beta_schedule": "linear",
                "beta_start": 0.001,
                "beta_end": 0.1,
                "num_train_timesteps": 100,
            },
        ),
    ],
    ids=repr,
)
def test_tables_of_diffusers_to_float32_rounding(schedule, config):
    theirs = diffusers.DDPMScheduler(**config).alphas_cumprod.double()
    # 1000 float32 factors, each within half an ulp.
    torch.testing.assert_close(schedule.alphas_cumprod, theirs, rtol=6e-5, atol=0)


@pytest.mark.parametrize(("name", "ours"), [("linear", "linear"), ("cosine", "cosine")])
def test_tables_of_guided_diffusion_to_float64_rounding(name, ours):
    gaussian_diffusion = pytest.importorskip("guided_diffusion.gaussian_diffusion")
    their_betas = gaussian_diffusion.get_named_beta_schedule(name, 1000)
    expected = np.cumprod(1 - their_betas)
    table = getattr(NoiseSchedule, ours)(1000).alphas_cumprod.numpy()
    np.testing.assert_allclose(table, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr_is_that_of_diffusers(name):
    ours = getattr(NoiseSchedule, name)(1000)
    config = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}[name]
    theirs = diffusers.DDIMScheduler(
        beta_schedule=name,
        beta_start=config[0],
        beta_end=config[1],
        rescale_betas_zero_snr=True,
    ).alphas_cumprod.double()
    table = ours.rescale_zero_terminal_snr().alphas_cumprod
    assert table[-1] == 0
    assert table[0] == pytest.approx(float(ours.alphas_cumprod[0]), rel=1e-14)
    torch.testing.assert_close(table, theirs, rtol=1e-3, atol=1e-7)


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
    if schedule.alphas_cumprod.diff().lt(0).all():
        again = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod)
        torch.testing.assert_close(
            again.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-12, atol=0
        )


def test_log_snr_at_the_ends_of_float64():
    schedule = NoiseSchedule.from_log_snr([800.0, 40.0, 0.0, -40.0, -800.0, -math.inf])
    expected = [-0.0, -math.exp(-40), -math.log(2), -40 - math.exp(-40), -800.0, -math.inf]
    np.testing.assert_allclose(schedule.log_alphas_cumprod.numpy(), expected, rtol=1e-15)


def test_alpha_sigma_of_a_discrete_schedule():
    schedule = NoiseSchedule.linear(1000)
    t = torch.tensor([0, 500, 999])
    a, b = schedule.alpha_sigma(t)
    expected = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[0, 500, 999]]
    np.testing.assert_allclose(a.numpy(), np.sqrt(expected), rtol=1e-13)
    np.testing.assert_allclose(b.numpy(), np.sqrt(1 - expected), rtol=1e-11)


@pytest.mark.parametrize("t", [0.001, 0.1, 0.37, 0.9, 0.999])
def test_continuous_paths_are_the_published_ones(t):
    integral = 0.1 * t + 0.5 * t**2 * 19.9
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, 0.0)]
    expected = {
        "vp": (math.exp(-0.5 * integral), math.sqrt(1 - math.exp(-integral))),
        "sub_vp": (math.exp(-0.5 * integral), 1 - math.exp(-integral)),
        "flow": (1 - t, t),
        "cosine": (math.sqrt(f[0] / f[1]), math.sqrt(1 - f[0] / f[1])),
    }
    for name, (a, b) in expected.items():
        values = PATHS[name].alpha_sigma(torch.tensor(t, dtype=torch.float64))
        assert float(values[0]) == pytest.approx(a, rel=1e-11)
        assert float(values[1]) == pytest.approx(b, rel=1e-11)


@pytest.mark.parametrize("name", PATHS)
def test_alphas_cumprod_of_a_path_is_its_normalised_alpha(name):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    a, b = PATHS[name].alpha_sigma(t)
    expected = a**2 / (a**2 + b**2)
    torch.testing.assert_close(
        PATHS[name].log_alphas_cumprod_at(t).exp(), expected, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("name", PATHS)
def test_paths_run_from_data_to_noise(name):
    ends = PATHS[name].log_alphas_cumprod_at(torch.tensor([0.0, 1.0]))
    assert ends[0] == 0
    assert ends[1] < -9
    t = torch.linspace(0, 1, 1001)
    assert (PATHS[name].log_alphas_cumprod_at(t).diff() < 0).all()


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(10), *PATHS.values()], ids=repr)
def test_protocol_draws_and_pickles(schedule):
    assert isinstance(schedule, Schedule)
    draws = [
        schedule.draw_timesteps(
            1000, device=torch.device("cpu"), generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    schedule.check_timesteps(draws[0])
    if isinstance(schedule, NoiseSchedule):
        assert set(draws[0].tolist()) == set(range(10))
    else:
        assert draws[0].mean() == pytest.approx(0.5, abs=0.05)
    again = pickle.loads(pickle.dumps(schedule))  # noqa: S301 - our own bytes
    assert repr(again) == repr(schedule)
    t = draws[0][:5]
    assert torch.equal(again.log_alphas_cumprod_at(t), schedule.log_alphas_cumprod_at(t))


def test_a_path_of_ones_own():
    own = ContinuousSchedule(lambda t: (torch.log1p(-t), t.log()), name="mine")
    t = torch.rand(9)
    assert torch.equal(
        own.log_alphas_cumprod_at(t), ContinuousSchedule.flow().log_alphas_cumprod_at(t)
    )
    assert repr(own) == "mine"


def test_reprs_name_what_differs_from_the_default():
    assert repr(NoiseSchedule.linear(500, beta_end=0.01)) == (
        "NoiseSchedule.linear(500, beta_end=0.01)"
    )
    assert repr(NoiseSchedule.cosine(10).rescale_zero_terminal_snr()) == (
        "NoiseSchedule.cosine(10).rescale_zero_terminal_snr()"
    )
