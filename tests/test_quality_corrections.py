"""Samplers and corrections: what they leave of Gaussian data, by formula."""

import math
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from benchmarks.quality.corrections import EpsilonScaling, Gain, ScoreRescaling, StepPush
from benchmarks.quality.paths import EpsilonPath, FlowPath
from benchmarks.quality.samplers import FLOW, HEUN, SAMPLERS, TITLES, make_scheduler, sample
from benchmarks.quality.spectra import Frequencies
from benchmarks.quality.streams import Purpose, generator
from s2dm_loss import NoiseSchedule, gain
from tests.helpers import recursions

SCHEDULE = NoiseSchedule.linear(1000)
LEVELS = SCHEDULE.alphas_cumprod.double()


class Answer(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.forward = answer


def wavy(x, t):
    return x.cos() * (1 + t / 1000)


def factor(correction, t):
    x, model = torch.zeros(3, 1, 4, 4), Answer(wavy)
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
    assert [*basis.bands[0].tolist(), int(basis.bands[5, 2])] == [0, 1, 2, 2, 3, 3, 3, 3, 3]


def velocity(x, called, variances=1.0):
    """E[ε - x_0 | x_t] of Gaussian data, called with 1000 t."""
    t = called.double() / 1000
    return (t - (1 - t) * variances) / ((1 - t) ** 2 * variances + t**2) * x


@pytest.mark.parametrize(("sampler", "shift"), [("euler", 1.0), ("euler-shift3", 3.0)])
@pytest.mark.parametrize("delta", [0, 0.05, 0.1])
def test_what_euler_leaves_of_a_flow_with_a_gain_and_without(sampler, shift, delta):
    path, start = FlowPath(), torch.ones(1, 1, dtype=torch.float64)
    model = Gain(delta).apply(Answer(velocity), path) if delta else velocity
    for steps in (10, 20, 28, 50):
        found = float(sample(model, sampler, path.schedule, steps, start, torch.Generator()))
        assert found == pytest.approx(recursions.euler(1.0, steps, delta, shift), rel=1e-4)


def test_heun_calls_a_flow_network_no_more_often_than_euler():
    start, model = torch.ones(1, 1, dtype=torch.float64), Mock(wraps=velocity)
    found = sample(model, "heun", FlowPath().schedule, 10, start, torch.Generator())
    calls = [float(call.args[1]) for call in model.call_args_list]
    assert (len(calls), calls[0], min(calls)) == (9, 1000, pytest.approx(200))
    assert abs(float(found) - 1) < 0.1


@pytest.mark.parametrize("sampler", [*FLOW, *HEUN])
def test_samplers_of_a_flow_keep_the_spread_of_gaussian_data_in_many_steps(sampler):
    variances = torch.tensor([[0.25, 1.0, 4.0]], dtype=torch.float64)
    model, start = partial(velocity, variances=variances), torch.ones_like(variances)
    found = sample(model, sampler, FlowPath().schedule, 400, start, torch.Generator())
    torch.testing.assert_close(found, variances.sqrt(), rtol=0.02, atol=0)


@pytest.mark.parametrize("strength", [0.02, -0.005])
def test_a_push_is_the_step_that_dcw_writes_down(strength):
    """x' + c (x' - x̂_0) after each of five Euler steps, against the factor on the velocity."""
    path = FlowPath()
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    pushed = StepPush(strength, 5).apply(Answer(wavy), path)
    found = sample(pushed, "euler", path.schedule, 5, start, torch.Generator())
    x = start
    for n in range(5, 0, -1):
        slope = wavy(x, torch.tensor(200.0 * n))
        clean, x = x - n / 5 * slope, x - slope / 5
        x = x + strength * (x - clean)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)


SPREAD = 0.5


def exact(x, t):
    """E[ε | x_t] for data drawn from N(0.3, SPREAD²)."""
    a = SCHEDULE.alphas_cumprod[t].to(x)
    return (1 - a).sqrt() * (x - a.sqrt() * 0.3) / (a * SPREAD**2 + 1 - a)


def draw(name, steps, seed=0):
    start = torch.randn(4096, 1, 2, 2, generator=generator(seed, Purpose.START))
    return sample(exact, name, SCHEDULE, steps, start, generator(seed, Purpose.SAMPLER))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_recovers_gaussian_data_from_its_exact_model(name):
    # DDPM's own variance is right for small steps only.
    steps = 1000 if name == "ddpm" else 100
    samples = draw(name, steps)
    assert float(samples.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(samples.std()) == pytest.approx(SPREAD, rel=0.03)
    assert torch.equal(samples, draw(name, steps))
    assert not torch.equal(samples, draw(name, steps, seed=1))
    scheduler = make_scheduler(name, SCHEDULE)
    table = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(table, SCHEDULE.alphas_cumprod, rtol=1e-5, atol=0)
    assert not scheduler.config.get("clip_sample", False)
    assert name in TITLES


def test_timesteps_that_are_visited():
    for name, first in {"ddim": 0, "pndm": 0, "ddpm": 0, "deis": 90}.items():
        scheduler = make_scheduler(name, SCHEDULE)
        scheduler.set_timesteps(10)
        wanted = list(range(first, 1000, 90 if first else 100))[:10]
        assert scheduler.timesteps.unique().tolist() == wanted
    with pytest.raises(ValueError, match=r"sampler: expected one of ddim, pndm, .*, got 'euler'"):
        make_scheduler("euler", SCHEDULE)
    with pytest.raises(ValueError, match=r"sampler: expected one of ddim, .*, got 'heun'"):
        sample(lambda x, _: x, "heun", EpsilonPath().schedule, 4, torch.ones(1), torch.Generator())
