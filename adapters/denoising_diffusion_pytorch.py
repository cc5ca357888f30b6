"""The loss in lucidrains/denoising-diffusion-pytorch: one line after the diffusion is made.

    diffusion = GaussianDiffusion(model, image_size=128, timesteps=1000)
    diffusion = skip_step(diffusion, skip_set=49)

The trainer's own `p_losses` runs, on a changed output of the model: noise offset,
self-conditioning, immiscible noise and Min-SNR weights are what they are without the adapter. The
trainer is not imported.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

from torch import Tensor
from typing_extensions import Unpack

from s2dm_loss.adapters import (
    SETTLED,
    changed_copy,
    check_options,
    check_plain,
    owner_of,
    reduce_changed,
)
from s2dm_loss.adapters.changed_output import changed_output, check_tau
from s2dm_loss.head import along
from s2dm_loss.loss import LossOptions, SkipStepLoss
from s2dm_loss.prediction import PredictionType
from s2dm_loss.schedule import NoiseSchedule
from s2dm_loss.skip_set import Skips

__all__ = ["SkipStepMixin", "skip_step"]

Diffusion = TypeVar("Diffusion")

_OBJECTIVES: dict[str, PredictionType] = {
    "pred_noise": "epsilon",
    "pred_x0": "sample",
    "pred_v": "v_prediction",
}
_ATTRIBUTES = ("p_losses", "model", "model_predictions", "betas", "objective", "loss_weight")
# Whose p_losses takes a squared error of `self.model(x_t, t, ...)`.
_KNOWN = ("GaussianDiffusion", "GaussianDiffusion1D")
_REFUSED = {
    **SETTLED,
    "weighting": "the trainer weighs its loss itself, as with min_snr_loss_weight=True",
}


def skip_step(diffusion: Diffusion, skip_set: Skips, **options: Unpack[LossOptions]) -> Diffusion:
    """Return a copy of `diffusion` that has the S²-DM loss, with the same network in it.

    The copy's `forward` and `p_losses` have the S²-DM loss on the scale of the trainer's; samplers
    and the keys of its `state_dict` stay as they are. The model is called as often as before.

    Args:
        diffusion: A `GaussianDiffusion` or `GaussianDiffusion1D`, of any objective and schedule.
        skip_set: The skips, in timesteps.
        options: Those of `SkipStepLoss`, without `weighting` and what the trainer settles itself. τ
            lies in (0, 1]; 1 is the trainer's own loss, bit for bit.

    Raises:
        TypeError: if `diffusion` is none of the trainer's, or is in continuous time.
        ValueError: if it has a loss of another kind, or the S²-DM loss already.
    """
    _check_diffusion(diffusion)
    plain: Any = diffusion
    criterion = SkipStepLoss(
        NoiseSchedule.from_betas(plain.betas),
        skip_set,
        **check_options(options, _REFUSED),
        prediction_type=_OBJECTIVES[plain.objective],
    )
    check_tau(criterion.tau)
    return changed_copy(diffusion, SkipStepMixin, skip_step_loss=criterion)


class SkipStepMixin:
    """What `skip_step` puts in front of a diffusion's class."""

    skip_step_loss: SkipStepLoss
    _predicts_for_itself: bool = False

    def p_losses(
        self, x_start: Tensor, t: Tensor, *args: Any, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """Return the loss; the arguments are the trainer's.

        Args:
            x_start: Clean data of shape [B, ...].
            t: Integer timesteps of shape [B].
            args: Further arguments of the trainer's `p_losses`.
            loss_reduction: "mean", or "none" for shape [B].
            kwargs: Further arguments of the trainer's `p_losses`.
        """
        this: Any = self
        plain: Any = super()
        weights: list[Tensor] = []

        def change(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            # DataParallel's replicas share their hooks.
            if self._predicts_for_itself or module is not this.model:
                return None
            changed, weight = changed_output(self.skip_step_loss, output, t, inputs[0])
            weights.append(weight)
            return changed

        hook = this.model.register_forward_hook(change)
        try:
            losses: Tensor = plain.p_losses(x_start, t, *args, loss_reduction="none", **kwargs)
        finally:
            hook.remove()
        losses = losses * along(weights[0], losses)
        # GaussianDiffusion1D can be asked for the loss of each element.
        return losses if loss_reduction == "none" or losses.ndim > 1 else losses.mean()

    def model_predictions(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as the trainer does: self-conditioning asks for it in the middle of a loss."""
        plain: Any = super()
        self._predicts_for_itself = True
        try:
            return plain.model_predictions(*args, **kwargs)
        finally:
            self._predicts_for_itself = False

    # The class is made at run time, so pickle would not find it by name.
    __reduce__ = reduce_changed


def _check_diffusion(diffusion: Any) -> None:
    kind = "a GaussianDiffusion of denoising-diffusion-pytorch with discrete timesteps"
    check_plain("diffusion", diffusion, SkipStepMixin, kind, _ATTRIBUTES)
    owner = owner_of(diffusion, "p_losses")
    if owner not in _KNOWN:
        raise ValueError(
            f"diffusion must have the p_losses of {' or '.join(_KNOWN)}, got that of "
            f"{owner or 'what it wraps'}, which is no squared error of the model's output alone"
        )
    if "loss_reduction" not in inspect.signature(diffusion.p_losses).parameters:
        raise ValueError(
            "diffusion.p_losses must take loss_reduction, as it does from "
            "denoising-diffusion-pytorch 2.3 on: without it there is no loss of each sample"
        )
