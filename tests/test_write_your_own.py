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
COLUMNS = torch.linspace(0.5, 2, 8)


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
    if criterion is None:
        return F.mse_loss(output, noise)
    return criterion.from_output(output, noise, T)


# Of output and noise: the plain loss. Of these, the changed target and its weight: ours.


def of_target(plain):
    """A loss of the error's elements [B, C, H, W], each sample's times its weight."""

    def row(model, criterion):
        x_t, noise = noisy()
        output, target, weight = model(x_t, T), noise, torch.ones(4)
        if criterion is not None:
            target, weight = criterion.regression_target(noise, T)
        return plain(output, target, weight[:, None, None, None])

    return row


def of_output(plain, **given):
    def row(model, criterion):
        x_t, noise = noisy()
        output = model(x_t, T)
        if criterion is None:
            return plain((output - noise).square())
        loss = criterion.from_output(output, noise, T, **given)
        return loss if given else loss * X0[0].numel()

    return row


ROWS = {
    "learned variance": learned_variance,
    "self-conditioning": self_conditioning,
    "mask": of_target(
        lambda out, target, w: (w * MASK * (out - target) ** 2).sum() / (3 * MASK.sum())
    ),
    "tokens": of_target(
        lambda out, target, w: (w * COLUMNS * (out - target).square().mean((1, 2), True)).mean()
    ),
    "weights": of_output(lambda e: (WEIGHTS * e.mean((1, 2, 3))).mean(), weights=WEIGHTS),
    "sums": of_output(lambda e: e.sum((1, 2, 3)).mean()),
    "huber": of_target(
        lambda out, target, w: (w * F.huber_loss(out, target, reduction="none")).mean()
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table(name):
    report = check_swap(
        lambda model: ROWS[name](model, None),
        lambda model, tau: ROWS[name](model, SkipStepLoss(SCHEDULE, 49, tau=tau)),
        rtol=1e-6,
    )
    assert report.calls == (2 if name == "self-conditioning" else 1)


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
    for wrong in (t, t[:, None]):
        with pytest.raises(ValueError, match=r"flatten\(0, 1\)"):
            loss.from_output(output, target, wrong, x_t)


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
