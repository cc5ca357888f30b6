"""The loss in ermongroup/ddim, the base of the paper's code: one line in `functions/losses.py`.

-    'simple': noise_estimation_loss,
+    'simple': ddim_loss(skip_set=49),

The paper's own k is 9.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch import Tensor, nn
from typing_extensions import Unpack, override

from s2dm_loss import NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.adapters import SETTLED, check_options
from s2dm_loss.checks import as_float64, check_all, check_choice, check_count
from s2dm_loss.head import along
from s2dm_loss.loss import LossOptions
from s2dm_loss.skip_set import Skips

__all__ = ["DdimLoss", "ddim_loss", "ddim_timesteps"]

DataReduction = Literal["sum", "mean"]
SkipType = Literal["uniform", "quad"]

_REFUSED = {**SETTLED, "reduction": "the trainer's keepdim and data_reduction say it"}


def ddim_loss(
    skip_set: Skips,
    *,
    data_reduction: DataReduction = "sum",
    **options: Unpack[LossOptions],
) -> DdimLoss:
    """Return the S²-DM loss as an entry of the trainer's `loss_registry`.

    It is called as `noise_estimation_loss` is, `loss(model, x0, t, e, b, keepdim=False)`, with the
    noise e and the trainer's table of β, and returns a scalar, or shape [N] with `keepdim`.

    Args:
        skip_set: The skips, as for `SkipStepLoss`.
        data_reduction: Over the data axes the trainer sums and the paper's fork of it averages.
            The default keeps the trainer's scale; at its gradient clipping of 1 the two train
            very differently, so give a plain run that is compared the same one.
        options: Those of `SkipStepLoss`, without what the trainer settles itself: what its network
            predicts (ε), the reduction over the batch, and how it draws its timesteps.

    Raises:
        TypeError, ValueError: if an argument is not as said. Whether the skips fit the schedule
            is known at the first call.
    """
    check_choice("data_reduction", data_reduction, get_args(DataReduction))
    given = check_options(options, _REFUSED)
    skips = SkipSet.wrap(skip_set)
    # β comes with the first batch only; a wrong option is found now, on some schedule.
    SkipStepLoss(NoiseSchedule.linear(2), 1, **given)
    return DdimLoss(skips, data_reduction, given)


def ddim_timesteps(
    num_timesteps: int, num_sampling_steps: int, skip_type: SkipType = "uniform"
) -> list[int]:
    """Return the timesteps that the trainer's sampler visits, ascending.

    `SkipSet.from_timesteps(ddim_timesteps(1000, 50, "quad"))` pairs each t with the latest of them
    before it. "quad" has uneven gaps, and repeats itself at its start for 30 steps and more.

    Args:
        num_timesteps: T, the length of the schedule.
        num_sampling_steps: What `--timesteps` says.
        skip_type: What `--skip_type` says.
    """
    total = check_count("num_timesteps", num_timesteps)
    steps = check_count("num_sampling_steps", num_sampling_steps, low=2)
    check_choice("skip_type", skip_type, get_args(SkipType))
    if steps > total:
        raise ValueError(f"num_sampling_steps must be at most num_timesteps, {total}, got {steps}")
    if skip_type == "uniform":
        return list(range(0, total, total // steps))
    end = math.sqrt(total * 0.8)
    roots = [index * (end / (steps - 1)) for index in range(steps - 1)]
    return [int(root * root) for root in [*roots, end]]


class DdimLoss:
    """What `loss_registry` holds, with the tables of the β that it was last called with."""

    def __init__(
        self, skip_set: SkipSet, data_reduction: DataReduction, options: dict[str, Any]
    ) -> None:
        """Take what `ddim_loss` has checked."""
        self.skip_set: SkipSet = skip_set
        self.data_reduction: DataReduction = data_reduction
        self.options: dict[str, Any] = options
        self._betas: Tensor | None = None

    def __call__(
        self,
        model: nn.Module,
        x0: Tensor,
        t: Tensor,
        e: Tensor,
        b: Tensor,
        keepdim: bool = False,
    ) -> Tensor:
        """Return the loss; see `ddim_loss`."""
        if b is not self._betas:
            # The trainer passes the same tensor at every step, so this happens once.
            self._criterion = self._make_criterion(b)
            self._betas = b
        a = (1 - b).cumprod(dim=0).index_select(0, t)
        x_t = x0 * along(a.sqrt(), x0) + e * along((1.0 - a).sqrt(), e)
        losses = self._criterion.from_output(model(x_t, t.float()), e, t)
        if self.data_reduction == "sum":
            losses = losses * e[0].numel()
        return losses if keepdim else losses.mean(dim=0)

    def _make_criterion(self, b: Tensor) -> SkipStepLoss:
        betas = as_float64("b", b)
        # The trainer's schedule "jsd" ends with β = 1.
        check_all("b", betas, (betas > 0) & (betas <= 1), "lie in (0, 1]")
        return SkipStepLoss(
            NoiseSchedule.from_betas(betas), self.skip_set, reduction="none", **self.options
        )

    @override
    def __repr__(self) -> str:
        options = [f", {name}={value!r}" for name, value in self.options.items()]
        given = f"{self.skip_set!r}, data_reduction={self.data_reduction!r}{''.join(options)}"
        return f"ddim_loss({given})"
