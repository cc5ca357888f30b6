"""The table "My loss has …" of docs/adapters/write_your_own.md: each line against the plain loss.

At τ = 1 each is the loss that it takes the place of, in value and gradient. A time for each frame
or position is, at any τ, what each frame or position gives on its own.
"""

import pytest
import torch
from torch.nn import functional as F

from s2dm_loss import NoiseSchedule, SkipStepLoss
from s2dm_loss.testing import check_swap

SCHEDULE = NoiseSchedule.linear(1000)
T = torch.tensor([5, 300, 700, 999])
X0 = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = (torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.7).float()
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0])


def noisy():
    noise = torch.randn_like(X0)
    alpha, sigma = (s.float().reshape(-1, 1, 1, 1) for s in SCHEDULE.alpha_sigma(T))
    return alpha * X0 + sigma * noise, noise


def learned_variance(model, criterion):
    x_t, noise = noisy()
    mean, variance = model(torch.cat([x_t, x_t], dim=1), T).chunk(2, dim=1)
    bound = (variance - mean.detach()).square().mean()
    if criterion is None:
        return F.mse_loss(mean, noise) + bound
    return criterion.from_output(mean, noise, T) + bound


def self_conditioning(model, criterion):
    x_t, noise = noisy()
    with torch.no_grad():
        first = model(x_t, T).detach()
    output = model(x_t + 0.1 * first, T)
    return (
        F.mse_loss(output, noise) if criterion is None else criterion.from_output(output, noise, T)
    )


def mask(model, criterion):
    x_t, noise = noisy()
    output = model(x_t, T)
    if criterion is None:
        return (MASK * (output - noise) ** 2).sum() / (3 * MASK.sum())
    target, weight = criterion.regression_target(noise, T)
    error = weight[:, None, None, None] * MASK * (output - target).square()
    return error.sum() / (3 * MASK.sum())


def tokens(model, criterion):
    """One loss for each column of pixels, each with a weight."""
    x_t, noise = noisy()
    output, columns = model(x_t, T), torch.linspace(0.5, 2, 8)
    if criterion is None:
        return (columns * (output - noise).square().mean((1, 2))).mean()
    target, weight = criterion.regression_target(noise, T)
    each = (output - target).square().mean((1, 2))
    return (weight[:, None] * columns * each).mean()


def weights(model, criterion):
    x_t, noise = noisy()
    output = model(x_t, T)
    if criterion is None:
        return (WEIGHTS * (output - noise).square().mean((1, 2, 3))).mean()
    return criterion.from_output(output, noise, T, weights=WEIGHTS)


def summed(model, criterion):
    x_t, noise = noisy()
    output = model(x_t, T)
    if criterion is None:
        return (output - noise).square().sum((1, 2, 3)).mean()
    return criterion.from_output(output, noise, T) * X0[0].numel()


def huber(model, criterion):
    x_t, noise = noisy()
    output = model(x_t, T)
    if criterion is None:
        return F.huber_loss(output, noise)
    target, weight = criterion.regression_target(noise, T)
    each = F.huber_loss(output, target, reduction="none")
    return (weight * each.mean((1, 2, 3))).mean()


ROWS = (learned_variance, self_conditioning, mask, tokens, weights, summed, huber)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_a_row_of_the_table(row):
    report = check_swap(
        lambda model: row(model, None),
        lambda model, tau: row(model, SkipStepLoss(SCHEDULE, 49, tau=tau)),
        rtol=1e-6,
    )
    assert report.calls == (2 if row is self_conditioning else 1)


def criterion(prediction_type):
    return SkipStepLoss(SCHEDULE, 49, prediction_type=prediction_type, reduction="none")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_time_for_each_frame(prediction_type):
    """[B, T, C, H, W] with t of shape [B, T]: bit for bit each frame's own loss."""
    output, target, x_t = torch.randn(3, 2, 5, 3, 4, 4).unbind(0)
    t = torch.randint(1000, (2, 5))
    loss = criterion(prediction_type)
    found = loss.from_output(*(x.flatten(0, 1) for x in (output, target, t, x_t)))
    for b in range(2):
        each = loss.from_output(output[b], target[b], t[b], x_t[b])
        assert torch.equal(found.reshape(2, 5)[b], each)


def test_a_time_for_each_position():
    """[B, C, n] with t of shape [B, 1, n]."""
    output, target, x_t = torch.randn(3, 2, 3, 16).unbind(0)
    t = torch.randint(1000, (2, 1, 16))
    loss = criterion("v_prediction")
    moved = [x.movedim(2, 1).flatten(0, 1) for x in (output, target, x_t)]
    found = loss.from_output(*moved[:2], t.flatten(), moved[2]).reshape(2, 16)
    for n in range(16):
        each = loss.from_output(output[..., n], target[..., n], t[:, 0, n], x_t[..., n])
        torch.testing.assert_close(found[:, n], each, rtol=1e-6, atol=0)


def test_the_network_is_called_with_gamma():
    """γ = -log SNR, as in E(3) molecules: the table gives ᾱ = sigmoid(-γ)."""
    gamma = torch.linspace(-10, 10, 500, dtype=torch.float64)
    schedule = NoiseSchedule.from_log_snr(-gamma)
    torch.testing.assert_close(schedule.alphas_cumprod, torch.sigmoid(-gamma))


def test_a_time_of_another_shape_is_refused_with_the_cure():
    output, target = torch.randn(2, 2, 5, 3, 4, 4).unbind(0)
    for t in (torch.randint(1000, (2, 5)), torch.randint(1000, (2, 1, 5))):
        with pytest.raises(ValueError, match=r"flatten\(0, 1\)"):
            criterion("epsilon").from_output(output, target, t)
