"""Conversions between prediction types, against the definitions on x_t = a x_0 + b ε."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from s2dm_loss import ContinuousSchedule
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon, read_output
from tests.strategies import (
    FLOW,
    LINEAR,
    TYPES,
    VP,
    ZERO_SNR,
    beside,
    normal,
    normals,
    same,
    schedules,
    seeds,
    shapes,
    targets_of,
    timesteps,
)

PATHS = [VP, ContinuousSchedule.sub_vp(), ContinuousSchedule.cosine(), FLOW]


@given(schedules(max_size=100) | st.sampled_from(PATHS), shapes, seeds)
def test_definitions_and_round_trips(schedule, shape, seed):
    times = schedule.timesteps
    times = torch.linspace(0.01, 0.99, 99, dtype=torch.float64) if times is None else times
    bar = schedule.log_alphas_cumprod_at(times).exp()
    good = times[(bar > 1e-6) & (bar < 1 - 1e-6)]
    assume(good.numel() > 0)
    t = good[timesteps(good.numel(), shape[0], seed)]
    x0, eps = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    a, b = (beside(scale, x0) for scale in schedule.alpha_sigma(t))
    x_t, rounding = a * x0 + b * eps, 1e-11 / float(torch.minimum(a, b).min())
    for kind, output in targets_of(x0, eps, a, b).items():
        found = epsilon_from_output(output, x_t, t, schedule, kind)
        back = output_from_epsilon(eps, x_t, t, schedule, kind)
        same((found, back), (eps, output), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kind", TYPES)
def test_zero_terminal_snr_gives_finite_noise(kind):
    """At ᾱ = 0, x_t is the noise itself; every type but "sample" divides by nothing there."""
    x0, eps = normals(2, 1, 3)
    output = targets_of(x0, eps, torch.zeros(1, 1), torch.ones(1, 1))[kind]
    found = epsilon_from_output(output, eps, torch.tensor([999]), ZERO_SNR, kind)
    torch.testing.assert_close(found, eps)


@pytest.mark.parametrize("kind", TYPES[1:])
def test_half_outputs_are_lifted(kind):
    output, x_t = normal(2, 3, seed=0, dtype=torch.bfloat16), normal(2, 3, seed=1).float()
    t = torch.tensor([300, 800])
    eps_hat = epsilon_from_output(output, x_t, t, LINEAR, kind)
    assert eps_hat.dtype == torch.float32
    exact = epsilon_from_output(output.double(), x_t.double(), t, LINEAR, kind)
    torch.testing.assert_close(eps_hat.double(), exact, rtol=1e-5, atol=1e-5)


def test_what_holds_a_prediction():
    x = torch.zeros(2)
    for output in (x, (x, None), [x], SimpleNamespace(sample=x)):
        assert read_output(output) is x
    for output in ((), ("extra", x), {"sample": x}):
        with pytest.raises(TypeError, match="model must return a tensor"):
            read_output(output)


@pytest.mark.parametrize("convert", [epsilon_from_output, output_from_epsilon])
def test_noise_as_the_output_is_checked_like_the_others(convert):
    x_t, t = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="must have the shape of x_t"):
        convert(torch.zeros(2), x_t, t, LINEAR, "epsilon")
    with pytest.raises(ValueError, match=r"t must lie in \[0, 1000\)"):
        convert(x_t, x_t, 5000 * t, LINEAR, "epsilon")
    output = x_t.bfloat16()
    assert convert(output, x_t, t, LINEAR, "epsilon") is output
