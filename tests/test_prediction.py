"""Conversions between prediction types, against the definitions on x_t = a x_0 + b ε."""

import pytest
import torch
from hypothesis import assume, given

from s2dm_loss import ContinuousSchedule, NoiseSchedule
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon, read_output
from tests.strategies import normal, schedules, seeds, shapes, targets_of, timesteps

TYPES = ["epsilon", "v_prediction", "sample", "flow", "score"]
PATHS = [
    ContinuousSchedule.vp(),
    ContinuousSchedule.sub_vp(),
    ContinuousSchedule.cosine(),
    ContinuousSchedule.flow(),
]


def check(schedule, t, shape, seed, rtol):
    x0, eps = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    a, b = (scale.reshape(-1, *[1] * (len(shape) - 1)) for scale in schedule.alpha_sigma(t))
    x_t = a * x0 + b * eps
    for kind, output in targets_of(x0, eps, a, b).items():
        found = epsilon_from_output(output, x_t, t, schedule, kind)
        torch.testing.assert_close(found, eps, rtol=rtol, atol=rtol)
        back = output_from_epsilon(eps, x_t, t, schedule, kind)
        torch.testing.assert_close(back, output, rtol=rtol, atol=rtol)


@given(schedules(max_size=100), shapes, seeds)
def test_definitions_and_round_trips_on_random_schedules(schedule, shape, seed):
    bar = schedule.alphas_cumprod
    good = ((bar > 1e-6) & (bar < 1 - 1e-6)).nonzero().flatten()
    assume(good.numel() > 0)
    t = good[timesteps(good.numel(), shape[0], seed)]
    check(schedule, t, shape, seed, rtol=1e-7)


@pytest.mark.parametrize("schedule", PATHS, ids=repr)
def test_definitions_and_round_trips_on_continuous_paths(schedule):
    t = torch.tensor([0.01, 0.3, 0.5, 0.7, 0.99], dtype=torch.float64)
    check(schedule, t, (5, 3, 2), 0, rtol=1e-9)


@pytest.mark.parametrize("kind", TYPES)
def test_zero_terminal_snr_gives_finite_noise(kind):
    """At ᾱ = 0, x_t is the noise itself; every type but "sample" divides by nothing there."""
    schedule = NoiseSchedule.linear(1000).rescale_zero_terminal_snr()
    x0, eps, t = normal(1, 3, seed=0), normal(1, 3, seed=1), torch.tensor([999])
    output = targets_of(x0, eps, torch.zeros(1, 1), torch.ones(1, 1))[kind]
    torch.testing.assert_close(epsilon_from_output(output, eps, t, schedule, kind), eps)


@pytest.mark.parametrize("kind", TYPES[1:])
def test_half_outputs_are_lifted(kind):
    schedule = NoiseSchedule.linear(1000)
    output, x_t = normal(2, 3, seed=0, dtype=torch.bfloat16), normal(2, 3, seed=1).float()
    t = torch.tensor([300, 800])
    eps_hat = epsilon_from_output(output, x_t, t, schedule, kind)
    assert eps_hat.dtype == torch.float32
    exact = epsilon_from_output(output.double(), x_t.double(), t, schedule, kind)
    torch.testing.assert_close(eps_hat.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_prediction_is_the_first_of_a_tuple():
    first, second = torch.zeros(2), torch.ones(2)
    for output in (first, (first, second), [first, "extra"]):
        assert read_output(output) is first
    for nothing in ((), ("extra", first), {"sample": first}):
        with pytest.raises(TypeError, match="model must return a tensor"):
            read_output(nothing)


def test_noise_as_the_output_is_checked_like_the_others():
    schedule, x_t = NoiseSchedule.linear(1000), torch.zeros(2, 3)
    for convert in (epsilon_from_output, output_from_epsilon):
        with pytest.raises(ValueError, match="must have the shape of x_t"):
            convert(torch.zeros(2), x_t, torch.tensor([0, 1]), schedule, "epsilon")
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1000\)"):
            convert(x_t, x_t, torch.tensor([0, 5000]), schedule, "epsilon")
        output = x_t.bfloat16()
        assert convert(output, x_t, torch.tensor([0, 1]), schedule, "epsilon") is output
