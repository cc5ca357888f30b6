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
from s2dm_loss.coefficients import ESTIMATORS
from s2dm_loss.head import along
from s2dm_loss.loss import RegressionTarget, SkipStepLoss
from s2dm_loss.loss_table import draw_like

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
    criterion: SkipStepLoss, output: Tensor, t: Tensor, x_t: Tensor
) -> ChangedOutput:
    """Return the output that makes a trainer's own squared error the loss of `criterion`.

    Args:
        criterion: The loss, made for what the network predicts; its τ above 0.
        output: The network's output, of shape [B, ...].
        t: Times of shape [B].
        x_t: The noisy input that the network was given, of the shape of `output`.

    Raises:
        TypeError, ValueError: if an argument is not as said; the message names it.
    """
    check_tau(criterion.tau)
    check_like("x_t", x_t, "output", check_batch("output", output))
    dtype = torch.promote_types(torch.promote_types(output.dtype, x_t.dtype), torch.float32)
    one = torch.ones(len(output), dtype=dtype, device=output.device)
    zero = torch.zeros_like(one)
    fresh = ESTIMATORS[criterion.estimator].on_skip_noise != 0

    def answer(target: Tensor, x_t: Tensor, xi: Tensor) -> RegressionTarget:
        skip_noise = xi if fresh else None
        return criterion.regression_target(target, t, x_t, skip_noise=skip_noise)

    # Target, x_t and ξ enter linearly: the factor of each is the answer to 1 for it alone.
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
