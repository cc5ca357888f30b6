"""Finite everywhere: every built-in schedule, every timestep, every skip, half outputs."""

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from tests.strategies import normal

DISCRETE = [
    NoiseSchedule.linear(1000),
    NoiseSchedule.scaled_linear(1000),
    NoiseSchedule.cosine(1000),
    NoiseSchedule.linear(1000).rescale_zero_terminal_snr(),
    NoiseSchedule.scaled_linear(1000).rescale_zero_terminal_snr(),
    NoiseSchedule.cosine(1000).rescale_zero_terminal_snr(),
]
CONTINUOUS = [
    ContinuousSchedule.vp(),
    ContinuousSchedule.sub_vp(),
    ContinuousSchedule.cosine(),
    ContinuousSchedule.flow(),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = (2, 2)


def check(criterion, t, outputs, noise):
    for eps_hat in outputs:
        eps_hat.grad = None
        loss = criterion.from_output(eps_hat, noise, t)
        loss.sum().backward()
        assert loss.isfinite().all(), (criterion, loss.isfinite().logical_not().nonzero()[0])
        assert eps_hat.grad.isfinite().all(), criterion
        # No timestep weighs more than the bound on c² allows: 0.99 + 0.01 · 100.
        assert loss.max() < 1.99 * 40


def outputs_for(count):
    return [normal(count, *SHAPE, seed=0, dtype=dtype).requires_grad_() for dtype in DTYPES]


@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_every_timestep_and_every_skip(schedule):
    t, noise = schedule.timesteps, normal(1000, *SHAPE, seed=1).float()
    outputs = outputs_for(1000)
    for k in range(1, 1000):
        at_t = coefficients(schedule, k)
        for values, low, high in ((at_t.weight, 0.99, 1.99), (at_t.gain, 0.99 / 1.99, 1.0)):
            assert values.min() > low - 1e-12, k
            assert values.max() < high + 1e-12, k
        if k % 50 in (1, 49):
            check(SkipStepLoss(schedule, k, reduction="none"), t, outputs, noise)


@pytest.mark.parametrize("estimator", ["fresh", "shared"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_every_timestep_with_the_other_forms(schedule, estimator, normalize):
    t, noise = schedule.timesteps, normal(1000, *SHAPE, seed=1).float()
    outputs = outputs_for(1000)
    for k in (1, 9, 49, 99, 500, 999, [1, 9, 999]):
        criterion = SkipStepLoss(
            schedule, k, estimator=estimator, normalize=normalize, reduction="none"
        )
        check(criterion, t, outputs, noise)


@pytest.mark.parametrize("estimator", ["expected", "fresh", "shared"])
@pytest.mark.parametrize("schedule", CONTINUOUS, ids=repr)
def test_continuous_time_with_both_ends(schedule, estimator):
    t, noise = torch.linspace(0, 1, 401), normal(401, *SHAPE, seed=1).float()
    outputs = outputs_for(401)
    for skip in (1e-4, 0.001, 0.009, 0.1, 0.5, 0.999, [0.01, 0.3]):
        criterion = SkipStepLoss(schedule, skip, estimator=estimator, reduction="none")
        check(criterion, t, outputs, noise)


def test_without_the_bound_the_last_timestep_is_infinite():
    """What the bound is for; an infinite weight there, and no NaN at the timesteps before."""
    schedule = NoiseSchedule.linear(1000).rescale_zero_terminal_snr()
    criterion = SkipStepLoss(schedule, 9, max_c2=float("inf"), reduction="none")
    eps_hat, noise = normal(1000, 3, seed=0), normal(1000, 3, seed=1)
    loss = criterion.from_output(eps_hat, noise, schedule.timesteps)
    assert loss[:-1].isfinite().all()
    assert loss[-1] == float("inf")


def test_float64_tables_matter_at_small_skips():
    """A float32 ᾱ gives c a relative error of 1.7e-4 at k = 1; ours is at float32 rounding."""
    schedule = NoiseSchedule.linear(1000)
    t = schedule.timesteps[1:]
    # With ε̂ = 1 and ε = 0 the loss is A: at τ = 0 it is c².
    ones, zeros = torch.ones(999, 1), torch.zeros(999, 1)
    loss = SkipStepLoss(schedule, 1, tau=0.0, reduction="none").from_output(ones, zeros, t)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[1:]
    torch.testing.assert_close(loss.double(), beta / (1 - beta), rtol=1.2e-7, atol=0)
