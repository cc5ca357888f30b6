"""The loss where a trainer's target is out of reach: the output is changed in its place.

Trainers that make the target and the squared error inside one function can still be given another
output, by a hook or a wrapper of the network. With the changed target s · target + r and the weight
A of `SkipStepLoss.regression_target`,

    A (output - s target - r)² = A s² ((output - r) / s - target)²,

so the trainer's own loss of (output - r) / s, times A s², is the S²-DM loss. At τ = 1 both are the
trainer's own, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2dm_loss.checks import check_batch, check_like
from s2dm_loss.functional import along, draw_like, loss_dtype
from s2dm_loss.loss import SkipStepLoss
from s2dm_loss.output import RegressionTarget

__all__ = ["ChangedOutput", "changed_output", "check_tau"]


class ChangedOutput(NamedTuple):
    """What a trainer's squared error has to be given, and be multiplied by.

    Attributes:
        output: The changed output, of shape [B, ...]; float32, or float64 for float64 input.
        weight: What each sample's squared error is multiplied by, of shape [B].
    """

    output: Tensor
    weight: Tensor


def changed_output(
    criterion: SkipStepLoss, output: Tensor, x_t: Tensor, t: Tensor
) -> ChangedOutput:
    """Return the output that makes a trainer's own squared error the loss of `criterion`.

    Args:
        criterion: The loss, made for what the network predicts; its τ above 0.
        output: The network's output, of shape [B, ...].
        x_t: The noisy input that the network was given, of the same shape.
        t: Times of shape [B].

    Raises:
        TypeError, ValueError: if an argument is not as said; the message names it.
    """
    check_tau(criterion.tau)
    check_like("x_t", x_t, "output", check_batch("output", output))
    fresh = criterion.estimator == "fresh"
    dtype = loss_dtype(output, x_t)
    one = torch.ones(len(output), dtype=dtype, device=output.device)
    zero = torch.zeros_like(one)

    def answer(target: Tensor, x_t: Tensor, zeta: Tensor) -> RegressionTarget:
        skip_noise = zeta if fresh else None
        return criterion.regression_target(target, x_t, t, skip_noise=skip_noise)

    # Target, x_t and ζ enter linearly: the factor of each is the answer to 1 for it alone.
    scale, weight = answer(one, zero, zero)
    changed = output.to(dtype)
    if criterion.prediction_type not in ("epsilon", "score"):
        changed = changed - along(answer(zero, one, zero).target, x_t) * x_t
    if fresh:
        changed = changed - along(answer(zero, zero, one).target, x_t) * draw_like(x_t, None)
    return ChangedOutput(changed / along(scale, changed), weight * scale.square())


def check_tau(tau: float) -> None:
    """Raise ValueError at τ = 0, where the changed target is 0 and no output is as good."""
    if tau == 0:
        raise ValueError("tau must be above 0 where the trainer makes its target, got 0")
