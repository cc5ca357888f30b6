"""The table "My loss has …" of docs/adapters/write_your_own.md: each line against the plain loss.

A time for each frame gives, at any τ, what each frame gives on its own.
"""

import pytest
import torch
from torch.nn import functional as F

from s2dm_loss import SkipStepLoss
from s2dm_loss.testing import check_swap
from tests.strategies import LINEAR, normal

T, WEIGHTS = torch.tensor([5, 300, 700, 999]), torch.tensor([0.5, 2.0, 1.0, 3.0])
X_T, NOISE = (normal(4, 3, 8, 8, seed=seed, dtype=torch.float32) for seed in (3, 4))
MASK, COLUMNS = (normal(4, 1, 8, 8, seed=2) < 0.5).float(), torch.linspace(0.5, 2, 8)


def once(model):
    return model(X_T, T)


def twice(model):
    """Self-conditioning."""
    return model(X_T + 0.1 * once(model).detach(), T)


def with_variance(model):
    """A learned variance beside the mean, and its own term."""
    mean, variance = model(torch.cat([X_T, X_T], dim=1), T).chunk(2, dim=1)
    return mean, (variance - mean.detach()).square().mean()


def plain(output):
    return F.mse_loss(output, NOISE)


def ours(output, criterion, **given):
    return criterion.from_output(output, NOISE, T, **given)


def of_target(loss):
    """A loss of output, target and weight: the noise and 1, or the changed ones."""

    def changed(output, criterion):
        target, weight = criterion.regression_target(NOISE, T)
        return loss(output, target, weight[:, None, None, None])

    return once, lambda output: loss(output, NOISE, 1), changed


ROWS = {
    "self-conditioning": (twice, plain, ours),
    "learned variance": (
        with_variance,
        lambda both: plain(both[0]) + both[1],
        lambda both, criterion: ours(both[0], criterion) + both[1],
    ),
    "mask": of_target(lambda out, to, w: (w * MASK * (out - to) ** 2).sum() / (3 * MASK.sum())),
    "tokens": of_target(
        lambda out, to, w: (w * COLUMNS * (out - to).square().mean((1, 2), True)).mean()
    ),
    "huber": of_target(lambda out, to, w: (w * F.huber_loss(out, to, reduction="none")).mean()),
    "weights": (
        once,
        lambda out: (WEIGHTS * (out - NOISE).square().mean((1, 2, 3))).mean(),
        lambda out, criterion: ours(out, criterion, weights=WEIGHTS),
    ),
    "sums": (
        once,
        lambda out: (out - NOISE).square().sum((1, 2, 3)).mean(),
        lambda out, criterion: ours(out, criterion) * X_T[0].numel(),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_table(name):
    called, theirs, swapped = ROWS[name]
    report = check_swap(
        lambda model: theirs(called(model)),
        lambda model, tau: swapped(called(model), SkipStepLoss(LINEAR, 49, tau=tau)),
        rtol=1e-6,
    )
    assert report.calls == (2 if name == "self-conditioning" else 1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_time_for_each_frame(kind):
    """[B, T, C, H, W] with t of shape [B, T]: bit for bit each frame's own loss."""
    data, t = torch.randn(3, 2, 5, 3, 4, 4), torch.randint(1000, (2, 5))
    loss = SkipStepLoss(LINEAR, 49, prediction_type=kind, reduction="none").from_output
    output, target, x_t = data.flatten(1, 2)
    found = loss(output, target, t.flatten(), x_t).reshape(2, 5)
    for b, (output, target, x_t) in enumerate(data.unbind(1)):
        assert torch.equal(found[b], loss(output, target, t[b], x_t))
    for wrong in (t, t[:, None]):
        with pytest.raises(ValueError, match=r"flatten\(0, 1\)"):
            loss(data[0], data[1], wrong, data[2])
