"""Corrections and what a sampler leaves of Gaussian data, by formula."""

import math

import pytest
import torch
from torch import nn

from benchmarks.quality.corrections import EpsilonScaling, Gain, ScoreRescaling, StepPush
from benchmarks.quality.paths import EpsilonPath, FlowPath
from benchmarks.quality.samplers import FLOW, HEUN, sample
from benchmarks.quality.spectra import Frequencies
from s2dm_loss import NoiseSchedule, gain
from tests.helpers import recursions

SCHEDULE = NoiseSchedule.linear(1000)
LEVELS = SCHEDULE.alphas_cumprod.double()


class Wavy(nn.Module):
    def forward(self, x, t):
        return x.cos() * (1 + t / 1000)


def factor(correction, t):
    x, model = torch.zeros(3, 1, 4, 4), Wavy()
    scaled = correction.apply(model, EpsilonPath())(x, torch.tensor(t))
    return float((scaled / model(x, torch.tensor(t))).unique())  # the same everywhere


@pytest.mark.parametrize("t", [0, 50, 500, 999])
def test_corrections_scale_the_networks_answer(t):
    wanted = float(gain(SCHEDULE, 49)[t])
    assert factor(Gain(49), t) == pytest.approx(wanted)
    assert factor(Gain(-49), t) == pytest.approx(1 / wanted)
    assert factor(EpsilonScaling(1.017), t) == pytest.approx(1 / 1.017)
    noise = float((1 - LEVELS[t]) / LEVELS[t])
    assert factor(ScoreRescaling(2), t) == pytest.approx((1 + noise) / (1 / 2 + noise))


def test_frequencies_are_an_orthonormal_basis_of_cosines():
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
    assert basis.bands[0].tolist() == [0, 1, 2, 2, 3, 3, 3, 3]
    assert int(basis.bands[5, 2]) == 3


# Of Gaussian data of variance 1, dx/dt = (2 t - 1) / ((1-t)² + t²) x; to three digits.
LEFT_BY_EULER = {
    ("euler", None): (0.879, 0.938, 0.955, 0.975),
    ("euler", 0.05): (0.897, 0.955, 0.973, 0.993),
    ("euler", 0.1): (0.906, 0.968, 0.985, 1.004),
    ("euler-shift3", None): (0.833, 0.913, 0.937, 0.964),
    ("euler-shift3", 0.05): (0.851, 0.931, 0.955, 0.983),
}


class Velocity(nn.Module):
    """E[ε - x_0 | x_t] of Gaussian data of variance 1, called with 1000 t."""

    def forward(self, x, called):
        t = called.double() / 1000
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x


@pytest.mark.parametrize(("sampler", "delta"), LEFT_BY_EULER)
def test_what_euler_leaves_of_a_flow_with_a_gain_and_without(sampler, delta):
    """Against Euler's steps written out, and against the figures of another program."""
    path, start = FlowPath(), torch.ones(1, 1, dtype=torch.float64)
    model = Velocity() if delta is None else Gain(delta).apply(Velocity(), path)
    shift = 3.0 if sampler == "euler-shift3" else 1.0
    for steps, figure in zip((10, 20, 28, 50), LEFT_BY_EULER[sampler, delta], strict=True):
        found = float(sample(model, sampler, path.schedule, steps, start, torch.Generator()))
        wanted = recursions.euler(1.0, steps, delta or 0.0, shift)
        assert found == pytest.approx(wanted, rel=1e-4)
        assert found == pytest.approx(figure, abs=6e-4)


def test_heun_calls_a_flow_network_no_more_often_than_euler():
    calls = []

    def model(x, t):
        calls.append(float(t))
        return Velocity()(x, t)

    start = torch.ones(1, 1, dtype=torch.float64)
    found = sample(model, "heun", FlowPath().schedule, 10, start, torch.Generator())
    assert len(calls) == 9
    assert (calls[0], min(calls)) == (1000, pytest.approx(200))
    assert abs(float(found) - 1) < 0.1


@pytest.mark.parametrize("sampler", [*FLOW, *HEUN])
def test_samplers_of_a_flow_keep_the_spread_of_gaussian_data_in_many_steps(sampler):
    variances = torch.tensor([[0.25, 1.0, 4.0]], dtype=torch.float64)

    def model(x, called):
        t = called.double() / 1000
        return (t - (1 - t) * variances) / ((1 - t) ** 2 * variances + t**2) * x

    start = torch.ones_like(variances)
    found = sample(model, sampler, FlowPath().schedule, 400, start, torch.Generator())
    torch.testing.assert_close(found, variances.sqrt(), rtol=0.02, atol=0)


@pytest.mark.parametrize("strength", [0.02, -0.005])
def test_a_push_is_the_step_that_dcw_writes_down(strength):
    """x' + c (x' - x̂_0) after each of five Euler steps, against the factor on the velocity."""
    path, model = FlowPath(), Wavy()
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    pushed = StepPush(strength, 5).apply(model, path)
    found = sample(pushed, "euler", path.schedule, 5, start, torch.Generator())
    x = start
    for n in range(5, 0, -1):
        velocity = model(x, torch.tensor(200.0 * n))
        clean, x = x - n / 5 * velocity, x - velocity / 5
        x = x + strength * (x - clean)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)
