"""Corrections: their factors by formula, and the fitted ones where the answer is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality.corrections import (
    AxisGains,
    BandGains,
    Correction,
    EpsilonScaling,
    Frequencies,
    Gain,
    PrincipalAxes,
    ScoreRescaling,
    Setting,
    StartScaling,
    StepGains,
    best_gains,
    gaussian_gains,
    gaussian_variances,
)
from benchmarks.quality.data import ImageSet, to_model_range
from benchmarks.quality.samplers import sample
from s2dm_loss import NoiseSchedule, gain

SCHEDULE = NoiseSchedule.linear(1000)
LEVELS = SCHEDULE.alphas_cumprod.double()


def an_image_set(count: int = 3000) -> ImageSet:
    """Grey 4 x 4 images of two strong directions and some noise about the middle grey."""
    draw = torch.Generator().manual_seed(0)
    strong = torch.randn(count, 2, generator=draw) @ torch.randn(2, 16, generator=draw) * 15
    values = 127.5 + strong + 6 * torch.randn(count, 16, generator=draw)
    return ImageSet("made", values.round().clamp(0, 255).to(torch.uint8).view(-1, 1, 4, 4))


DATA = an_image_set()


def a_setting(sampler: str = "ddim", steps: int = 10) -> Setting:
    return Setting(SCHEDULE, DATA, sampler, steps, seed=0)


class Exact(nn.Module):
    """E[ε | x_t] for Gaussian data with the mean and covariance of `DATA`."""

    def __init__(self) -> None:
        super().__init__()
        values = to_model_range(DATA.images).flatten(1).double()
        self.mean = values.mean(0)
        self.variances, self.axes = torch.linalg.eigh(values.T.cov())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = LEVELS[t]
        centred = (x.flatten(1).double() - level.sqrt() * self.mean) @ self.axes
        noise = (1 - level).sqrt() * centred / (level * self.variances + 1 - level)
        return (noise @ self.axes.T).view_as(x).float()


class Ones(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(x)


def factor(correction: Correction, t: int) -> float:
    model, start, fitted = correction.apply(Ones(), a_setting())
    assert start == 1
    assert fitted is None
    scaled: Tensor = model(torch.zeros(3, 1, 4, 4), torch.tensor(t))
    assert scaled.shape == (3, 1, 4, 4)
    assert bool((scaled == scaled[0, 0, 0, 0]).all())
    return float(scaled[0, 0, 0, 0])


@pytest.mark.parametrize("t", [0, 50, 500, 999])
def test_corrections_scale_the_networks_answer(t: int) -> None:
    wanted = float(gain(SCHEDULE, 49)[t])
    assert factor(Gain(49), t) == pytest.approx(wanted)
    assert factor(Gain(-49), t) == pytest.approx(1 / wanted)
    assert factor(EpsilonScaling(1.017), t) == pytest.approx(1 / 1.017)
    assert factor(EpsilonScaling(1.01, -0.02), t) == pytest.approx(1 / (1.01 - 0.02 * t / 1000))
    noise = float((1 - LEVELS[t]) / LEVELS[t])
    assert factor(ScoreRescaling(2), t) == pytest.approx((1 + noise) / (1 / 2 + noise))


def test_a_line_has_a_name_of_its_own() -> None:
    assert EpsilonScaling(1.0).name == "scaling1"
    assert EpsilonScaling(1.0, 0.02).name == "scaling1-slope0.02"
    assert EpsilonScaling(1.0, -0.02).title == "Epsilon Scaling λ = 1, slope = -0.02"


def test_the_start_noise_is_scaled_and_the_network_left_alone() -> None:
    model = Ones()
    assert StartScaling(1.2).apply(model, a_setting()) == (model, 1.2, None)


def test_frequencies_are_an_orthonormal_basis_of_cosines() -> None:
    basis = Frequencies(8)
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = basis.coordinates(x)
    torch.testing.assert_close(found.square().sum(), x.square().sum())
    torch.testing.assert_close(basis.images(found), x)
    torch.testing.assert_close(found[..., 0, 0], 8 * x.mean((2, 3)))  # the mean of a channel
    rows = torch.arange(8.0)
    wave = torch.cos(math.pi * 3 * (rows + 0.5) / 8).expand(1, 1, 8, 8)
    peak = basis.coordinates(wave).abs().flatten().argmax()
    assert int(peak) == 3
    assert basis.count == 4
    assert basis.bands[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert int(basis.bands[5, 2]) == 3


def test_principal_axes_of_the_data() -> None:
    basis = PrincipalAxes(DATA)
    x = to_model_range(DATA.images)
    torch.testing.assert_close(basis.images(basis.coordinates(x)).view_as(x), x)
    spread = basis.coordinates(x).double().var(0)
    torch.testing.assert_close(spread, basis.variances, rtol=1e-3, atol=1e-6)
    assert float(spread[-3]) < 0.05 * float(spread[-2])  # two strong directions


def test_the_gaussian_gains_of_ddim_are_their_formula() -> None:
    variances = torch.tensor([1e-4, 0.01, 0.25, 1.0, 4.0], dtype=torch.float64)
    times, gains = gaussian_gains("ddim", SCHEDULE, 10, variances)
    assert times.tolist() == list(range(900, -1, -100))
    sigmas = torch.cat([((1 - LEVELS) / LEVELS).sqrt()[times], torch.zeros(1)]).double()
    for row in range(10):
        here, there = sigmas[row], sigmas[row + 1]
        both = ((variances + here**2) * (variances + there**2)).sqrt()
        wanted = (variances + here**2 - both) / (here * (here - there))
        # diffusers' 1 - ᾱ is float32, and at t = 0 it is 1e-4.
        torch.testing.assert_close(gains[row], wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("sampler", ["ddim", "deis", "dpm++2m"])
def test_axis_gains_make_a_sampler_exact_for_gaussian_data(sampler: str) -> None:
    exact = Exact()
    start = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    noise = start.flatten(1).double() @ exact.axes
    times, _ = gaussian_gains(sampler, SCHEDULE, 5, exact.variances)
    first = LEVELS[times[0]]
    # The exact path from noise of variance 1 at the first timestep.
    wanted = (exact.variances / (first * exact.variances + 1 - first)).sqrt()

    def error(model: nn.Module) -> float:
        x = sample(model, sampler, SCHEDULE, 5, start, torch.Generator())
        found = (x.flatten(1).double() - exact.mean) @ exact.axes
        factors = (found * noise).sum(0) / noise.square().sum(0)
        return float((factors / wanted).log().abs().max())

    corrected = AxisGains().apply(exact, a_setting(sampler, 5)).model
    assert error(corrected) < 0.01
    assert error(exact) > 0.05


@pytest.mark.parametrize("steps", [10, 50])
def test_the_spread_that_ddim_leaves_of_gaussian_data_is_the_product_of_its_steps(
    steps: int,
) -> None:
    variances = torch.tensor([1e-3, 0.25, 4.0, 200.0], dtype=torch.float64)
    levels = [float(LEVELS[t]) for t in range(1000 - 1000 // steps, -1, -1000 // steps)]
    factor = torch.ones(4, dtype=torch.float64)
    for here, there in pairwise([*levels, 1.0]):
        noise = (1 - here) ** 0.5 / (1 - here + here * variances)
        x0 = (1 - (1 - here) ** 0.5 * noise) / here**0.5
        factor *= there**0.5 * x0 + (1 - there) ** 0.5 * noise
    # DDIM's own loss, with nothing wrong in the network.
    assert float((factor.square().sum() / variances.sum()).sqrt()) < 0.97
    found = gaussian_variances("ddim", SCHEDULE, steps, variances)
    torch.testing.assert_close(found, factor.square(), rtol=2e-3, atol=0)


def test_many_steps_and_better_solvers_keep_the_spread_of_gaussian_data() -> None:
    variances = torch.tensor([0.25, 4.0, 100.0], dtype=torch.float64)
    for sampler, steps in (("ddim", 1000), ("unipc", 50)):
        found = gaussian_variances(sampler, SCHEDULE, steps, variances)
        assert float((found.sum() / variances.sum()).sqrt()) == pytest.approx(1, abs=0.01)


def test_a_sampler_that_visits_a_time_twice_has_no_gaussian_gains() -> None:
    with pytest.raises(ValueError, match="sampler: expected one that visits each timestep once"):
        gaussian_gains("pndm", SCHEDULE, 10, torch.ones(2, dtype=torch.float64))


class Wrong(Exact):
    """The exact model with the mean of every channel too weak by a tenth at late times."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise = super().forward(x, t)
        return noise - 0.1 * noise.mean((2, 3), keepdim=True) if t > 500 else noise


def test_band_gains_find_and_mend_what_a_network_has_wrong() -> None:
    times, gains = best_gains(Wrong(), a_setting(), Frequencies(4))
    assert gains.shape == (21, 3)
    # The images' own mean is small, so a best gain is known to a few parts in a thousand.
    late = times > 500
    torch.testing.assert_close(
        gains[late, 0], torch.full((10,), 1 / 0.9).double(), rtol=0.02, atol=0
    )
    torch.testing.assert_close(gains[late, 1:], torch.ones(10, 2).double(), rtol=0.02, atol=0)
    model, start, fitted = BandGains().apply(Wrong(), a_setting())
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    t = torch.tensor(750)
    wrong = (Wrong()(x, t) - Exact()(x, t)).square().mean()
    mended = (model(x, t) - Exact()(x, t)).square().mean()
    assert start == 1
    assert fitted == dict(zip(times.tolist(), gains.tolist(), strict=True))
    assert float(mended) < 0.05 * float(wrong)


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_step_gains_end_where_a_long_run_ends(sampler: str) -> None:
    setting = a_setting(sampler, 4)
    model, start, fitted = StepGains().apply(Exact(), setting)
    noise = torch.randn(256, 1, 4, 4, generator=torch.Generator().manual_seed(5))

    def error(network: nn.Module) -> float:
        wanted = sample(Exact(), sampler, SCHEDULE, 40, noise, torch.Generator())
        reached = sample(network, sampler, SCHEDULE, 4, noise, torch.Generator())
        return float((reached - wanted).square().mean())

    assert start == 1

    assert fitted is not None
    assert len(fitted) == 4
    assert error(model) < 0.7 * error(Exact())
