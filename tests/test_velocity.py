"""The prediction type "velocity" on any path, and v on paths that are not normalised."""

import math
import warnings

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon
from tests.strategies import normal
from tests.test_derivatives import INNER, MAKERS, closed_forms

SHAPE = (len(INNER), 3, 4)


def along(values):
    return torch.as_tensor(values).reshape(-1, 1, 1)


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("name", MAKERS)
def test_velocity_gives_what_the_v_of_the_normalised_path_gives(name, data_at):
    """By closed forms: u = λ x_t + μ v, so the loss on u is μ² times that on v."""
    schedule = MAKERS[name](data_at)
    t = 1 - INNER if data_at else INNER
    a, b, p, q = (along(value) for value in closed_forms(name, INNER.numpy()))
    if data_at:
        p, q = -p, -q
    x0, noise = normal(*SHAPE, seed=0), normal(*SHAPE, seed=1)
    x_t, norm = a * x0 + b * noise, (a**2 + b**2).sqrt()
    rate, mu = (a * p + b * q) / norm**2, (a * q - b * p) / norm
    v, velocity = (a * noise - b * x0) / norm, p * x0 + q * noise
    torch.testing.assert_close(velocity, rate * x_t + mu * v, rtol=1e-11, atol=1e-11)
    for kind, output in (("velocity", velocity), ("v_prediction", v)):
        found = epsilon_from_output(output, x_t, t, schedule, kind)
        torch.testing.assert_close(found, noise, rtol=1e-11, atol=1e-11)
        back = output_from_epsilon(noise, x_t, t, schedule, kind)
        torch.testing.assert_close(back, output, rtol=1e-10, atol=1e-10)

    of_v = v + 0.1 * normal(*SHAPE, seed=2)
    skip = {"tau": 0.9, "reduction": "none"}
    # Small enough that no bound on c² acts, which depend on the scale of the output.
    losses = {
        kind: SkipStepLoss(schedule, 1e-3, prediction_type=kind, max_c2=1e30, **skip)
        for kind in ("velocity", "v_prediction")
    }
    found = losses["velocity"].from_output(rate * x_t + mu * of_v, velocity, t, x_t)
    expected = losses["v_prediction"].from_output(of_v, v, t, x_t)
    torch.testing.assert_close(found, mu.flatten() ** 2 * expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("data_at", [0, 1])
def test_on_the_straight_path_velocity_is_flow(data_at):
    schedule = ContinuousSchedule.flow(data_at=data_at)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    output, target, x_t = (normal(9, 5, seed=seed) for seed in range(3))
    sign = -1 if data_at else 1
    losses = [
        SkipStepLoss(schedule, 0.05, prediction_type=kind, reduction="none").from_output(
            factor * output, factor * target, t, x_t
        )
        for kind, factor in (("velocity", sign), ("flow", 1))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


def test_a_v_network_on_a_table_of_sigmas_has_the_gain_of_the_loss():
    """On x_0 + σ ε, v is (ε - σ x_0) / √(1+σ²), as in k-diffusion and diffusers' Euler.

    By hand: c² = (1 + 2²) / (1 + 1²) - 1 = 1.5 at t = 2, s = 0.99 / (0.99 + 0.01 · 1.5).
    """
    sigmas = torch.tensor([0.01, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    schedule = NoiseSchedule.from_sigmas(sigmas)
    criterion = SkipStepLoss(schedule, 1, prediction_type="v_prediction")
    x0, noise, t = normal(1, 6, seed=0), normal(1, 6, seed=1), torch.tensor([2])
    v, x_t = (noise - 2 * x0) / math.sqrt(5), x0 + 2 * noise
    regressed = criterion.regression_target(v, t, x_t).target
    # ε̂ = (σ x_t + √(1+σ²) v) / (1+σ²) of v itself is the noise, of the target s times it.
    read = (2 * x_t + math.sqrt(5) * regressed) / 5
    torch.testing.assert_close(read, 0.98507462686567 * noise, rtol=1e-12, atol=1e-12)
    assert float(criterion.coefficients_at(t).gain) == pytest.approx(0.98507462686567, rel=1e-12)


def test_what_is_said_when_a_loss_is_made():
    gvp = MAKERS["gvp"](1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SkipStepLoss(gvp, 0.05, prediction_type="flow")
    assert [str(w.message).count("prediction_type='velocity'") for w in caught] == [1]
    assert caught[0].filename == __file__
    with pytest.raises(ValueError, match=r"'velocity' takes a schedule with derivatives.*no time"):
        SkipStepLoss(NoiseSchedule.linear(10), 1, prediction_type="velocity")
    with pytest.raises(ValueError, match=r"dsigma/dt must be finite.*min_time"):
        SkipStepLoss(ContinuousSchedule.cosine(), 0.05, prediction_type="velocity")


def test_a_velocity_that_vanishes_at_the_noise_end_has_tau_times_the_plain_loss_there():
    """x_t = t² x_0 + (1 - t²) ε: at t = 0 both rates are 0, and ε̂ would be 0 / 0."""
    path = ContinuousSchedule.from_alpha_sigma(lambda t: (t**2, 1 - t**2), data_at=1)
    criterion = SkipStepLoss(path, 0.05, prediction_type="velocity", reduction="none")
    output, x_t = normal(2, 5, seed=0), normal(2, 5, seed=1)
    t = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    found = criterion.from_output(output, torch.zeros_like(output), t, x_t)
    expected = 0.99 * output.square().mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
