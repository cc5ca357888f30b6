"""What a network trained with the loss learns: s(t) E[ε | x_t].

On Gaussian data x_0 ~ N(0, v), E[ε | x_t] = b x_t / (a² v + b²) is linear in x_t, so a model with
one weight for each timestep holds it exactly.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s2dm_loss import NoiseSchedule, SkipStepLoss

SCHEDULE = NoiseSchedule.linear(1000)
TIMES = torch.tensor([5, 98, 99, 400, 700, 999])
K, TAU, VARIANCE = 99, 0.9, 0.6


def orthonormal(count, generator):
    """x_0, ε and ζ with their moments exact in the sample, so that no sampling error is left."""
    q, _ = torch.linalg.qr(torch.randn(count, 3, generator=generator, dtype=torch.float64))
    return (q * count**0.5).unbind(1)


def train(loss_of):
    """Fit one weight for each of TIMES by L-BFGS, to convergence."""
    samples = 64
    x0, noise, zeta = orthonormal(samples, torch.Generator().manual_seed(0))
    x0 = x0 * VARIANCE**0.5
    t = TIMES.repeat_interleave(samples)
    x0, noise, zeta = (value.repeat(len(TIMES))[:, None] for value in (x0, noise, zeta))
    bar = SCHEDULE.alphas_cumprod[t][:, None]
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    weights = nn.Parameter(torch.zeros(len(TIMES), dtype=torch.float64))
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-13, tolerance_change=0, history_size=20
    )

    def closure():
        optimizer.zero_grad()
        eps_hat = weights.repeat_interleave(samples)[:, None] * x_t
        loss = loss_of(eps_hat, noise, t, zeta)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    return weights.detach()


def conditional_mean():
    bar = SCHEDULE.alphas_cumprod[TIMES]
    return (1 - bar).sqrt() / (bar * VARIANCE + 1 - bar)


def c2_of_skip():
    bar = SCHEDULE.alphas_cumprod
    return torch.where(TIMES >= K, bar[(TIMES - K).clamp(min=0)] / bar[TIMES] - 1, 0.0)


def test_plain_loss_learns_the_conditional_mean():
    weights = train(lambda eps_hat, noise, t, zeta: F.mse_loss(eps_hat, noise))
    torch.testing.assert_close(weights, conditional_mean(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("estimator", ["expected", "fresh", "shared"])
def test_skip_step_loss_learns_it_times_s(estimator, normalize):
    criterion = SkipStepLoss(SCHEDULE, K, tau=TAU, estimator=estimator, normalize=normalize)

    def loss_of(eps_hat, noise, t, zeta):
        given_zeta = {"skip_noise": zeta} if estimator == "fresh" else {}
        return criterion.from_output(eps_hat, noise, t, **given_zeta)

    c2 = c2_of_skip()
    skip = torch.where(TIMES >= K, 1 - TAU, 0.0)
    numerator = 1 - skip + (skip * c2.sqrt() if estimator == "shared" else 0)
    s = numerator / (1 - skip + skip * c2)
    assert s[:2].tolist() == [1, 1]
    assert (s[2:] - 1).abs().min() > 1e-3  # far above the tolerance below
    torch.testing.assert_close(train(loss_of), s * conditional_mean(), rtol=1e-7, atol=0)
