"""The loss in kohya-ss/sd-scripts: one line in `train_network.py` or `sdxl_train_network.py`.

    -    trainer = NetworkTrainer()
    +    trainer = skip_step(NetworkTrainer(), skip_set=49)

and, with `SkipSet.for_sampling_steps(20)`, in `flux_train_network.py` or `sd3_train_network.py`.

The trainer's own loss runs (l2, huber or smooth_l1), with its masks and weights: it is given
another target, and A(t) as the weighting that it multiplies by. The trainer is not imported.

The scripts that have a loop instead of a trainer (`sdxl_train.py`, `train_db.py`, `fine_tune.py`,
`flux_train.py`, `sd3_train.py`) ask `loss_of` for the loss and change their target with its
`regression_target`.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from s2dm_loss.adapters import SETTLED, changed_copy, check_options, check_plain, owner_of
from s2dm_loss.adapters.diffusers_scheduler import schedule_of
from s2dm_loss.continuous import ContinuousSchedule
from s2dm_loss.head import along
from s2dm_loss.loss import LossOptions, SkipStepLoss
from s2dm_loss.prediction import PredictionType
from s2dm_loss.schedule import NoiseSchedule, Schedule
from s2dm_loss.skip_set import Skips, SkipSet

__all__ = ["SkipStepMixin", "loss_of", "skip_step"]

Trainer = TypeVar("Trainer")

_LOGGER = logging.getLogger(__name__)
_METHODS = ("get_noise_scheduler", "get_noise_pred_and_target", "call_unet", "assert_extra_args")
# By the class that makes noise and target. None: --v_parameterization says it.
_PREDICTS: dict[str, PredictionType | None] = {
    "NetworkTrainer": None,
    "FluxNetworkTrainer": "flow",
    "Sd3NetworkTrainer": "sample",
}
_REFUSED = {**SETTLED, "weighting": "the trainer weighs its loss itself, as with --min_snr_gamma"}


def loss_of(
    args: Any, noise_scheduler: Any, skip_set: Skips, **options: Unpack[LossOptions]
) -> SkipStepLoss:
    """Return the loss for a script's arguments and the scheduler that it noises with.

    Args:
        args: The script's arguments, of which `loss_type` is read, and `v_parameterization` for a
            DDPM scheduler.
        noise_scheduler: Its DDPM scheduler, after it was fixed for `--zero_terminal_snr`, or its
            FlowMatch scheduler.
        skip_set: The skips, in timesteps or, for a FlowMatch scheduler, in units of σ.
        options: Those of `SkipStepLoss`, without `weighting` and what the script settles itself.
            For a FlowMatch scheduler `prediction_type` says what the script's target is: "flow"
            (noise - latents: Flux) or "sample" (latents: SD3).

    Raises:
        TypeError, ValueError: if an argument is not as said, or the loss has no squared part.
    """
    _check_loss_type(args)
    schedule = schedule_of(noise_scheduler)
    if schedule.timesteps is not None:
        predicts: PredictionType = "v_prediction" if args.v_parameterization else "epsilon"
        return _loss(schedule, skip_set, options, predicts)
    target_is = options.pop("prediction_type", None)
    if target_is != "flow" and target_is != "sample":
        raise ValueError(
            f"prediction_type must be given for a {type(noise_scheduler).__name__}: 'flow' where "
            "the script's target is noise - latents (Flux), 'sample' where it is latents (SD3), "
            f"got {target_is!r}"
        )
    return _loss(schedule, skip_set, options, target_is)


def skip_step(trainer: Trainer, skip_set: Skips, **options: Unpack[LossOptions]) -> Trainer:
    """Return a copy of a trainer of LoRA networks that has the S²-DM loss.

    Validation keeps the plain loss.

    Args:
        trainer: A `NetworkTrainer`, `SdxlNetworkTrainer`, `FluxNetworkTrainer` or
            `Sd3NetworkTrainer`, before its `train` is called.
        skip_set: The skips, in timesteps; for Flux and SD3 floats in units of σ, which is read from
            the timesteps that the trainer has rounded to its weights' dtype.
        options: Those of `SkipStepLoss`, without `weighting` and what the trainer settles itself. τ
            = 1 is the trainer's own loss, bit for bit.

    Raises:
        TypeError: if `trainer` is none of this kind.
        ValueError: if it trains another kind of network, or has the S²-DM loss already.
    """
    kind = "a NetworkTrainer of sd-scripts (a script with a loop of its own takes `loss_of`)"
    check_plain("trainer", trainer, SkipStepMixin, kind, _METHODS)
    owner, other = (owner_of(trainer, name) for name in _METHODS[:2])
    if owner != other or owner not in _PREDICTS:
        sign = "-" if owner == "LuminaNetworkTrainer" else ""  # its target is latents - noise
        raise ValueError(
            "trainer must train Stable Diffusion, SDXL, Flux or SD3, got a "
            f"{type(trainer).__name__} with a {_METHODS[1]} of its own: make skip_loss = "
            "SkipStepLoss(ContinuousSchedule.flow(), SkipSet.for_sampling_steps(20), "
            "prediction_type='flow', normalize=True) once in its module, and behind the line that "
            f"makes its target, write target = {sign}skip_loss.regression_target("
            f"{sign}target, sigmas.flatten(), noisy_model_input.view_as(target)).target"
        )
    predicts = _PREDICTS[owner]
    given: dict[str, Any] = {"skip_set": SkipSet.wrap(skip_set), **options}
    # A wrong option is found now, on the trainer's T, and not after its models are loaded.
    if predicts is None:
        _loss(NoiseSchedule.scaled_linear(1000), given["skip_set"], options, "epsilon")
    else:
        _loss(ContinuousSchedule.flow(), given["skip_set"], options, predicts)
        given["prediction_type"] = predicts
    return changed_copy(trainer, SkipStepMixin, skip_step_options=given)


class SkipStepMixin:
    """What `skip_step` puts in front of a trainer's class."""

    skip_step_options: dict[str, Any]
    skip_step_loss: SkipStepLoss
    _inputs: list[Tensor]

    def assert_extra_args(self, args: Any, *datasets: Any, **kwargs: Any) -> Any:
        """Refuse what the loss has no meaning for before any model is loaded."""
        plain: Any = super()
        _check_loss_type(args)
        gamma = getattr(args, "ip_noise_gamma", None)
        if gamma and self.skip_step_options.get("prediction_type") == "flow":
            raise ValueError(
                f"ip_noise_gamma must be 0 for Flux, got {gamma}: x_t is rebuilt from latents and "
                "target, which do not hold that second noise. Leave --ip_noise_gamma out"
            )
        return plain.assert_extra_args(args, *datasets, **kwargs)

    def get_noise_scheduler(self, args: Any, device: torch.device) -> Any:
        """Make the trainer's scheduler, and the loss for it."""
        plain: Any = super()
        noise_scheduler = plain.get_noise_scheduler(args, device)
        self.skip_step_loss = loss_of(args, noise_scheduler, **self.skip_step_options)
        _LOGGER.info("s2dm-loss: %r", self.skip_step_loss)
        return noise_scheduler

    def call_unet(
        self,
        args: Any,
        accelerator: Any,
        unet: Any,
        noisy_latents: Tensor,
        *more: Any,
        **named: Any,
    ) -> Any:
        """Call the model as the trainer does, and keep what goes in."""
        plain: Any = super()
        self._inputs.append(noisy_latents)
        return plain.call_unet(args, accelerator, unet, noisy_latents, *more, **named)

    def get_noise_pred_and_target(
        self,
        args: Any,
        accelerator: Any,
        noise_scheduler: Any,
        latents: Tensor,
        batch: Any,
        text_encoder_conds: Any,
        unet: Any,
        *more: Any,
        is_train: bool = True,
        **named: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the prediction, the changed target, the timesteps and the weighting."""
        plain: Any = super()
        criterion = self.skip_step_loss
        self._inputs = []

        def watched(noisy_latents: Tensor, *inputs: Any, **options: Any) -> Any:
            self._inputs.append(noisy_latents)
            return unet(noisy_latents, *inputs, **options)

        # SD3's target does not hold the noise, so x_t has to be seen; Flux calls its model with
        # packed latents.
        called = watched if criterion.prediction_type == "sample" else unet
        conds = (batch, text_encoder_conds, called)
        prediction, target, timesteps, weighting = plain.get_noise_pred_and_target(
            args, accelerator, noise_scheduler, latents, *conds, *more, is_train=is_train, **named
        )
        if not is_train:
            return prediction, target, timesteps, weighting
        t = timesteps if criterion.schedule.timesteps is not None else timesteps.float() / 1000
        # Flux: x_t = (1-σ) latents + σ noise. Elsewhere gradient checkpointing makes x_t require a
        # gradient; a target has none.
        x_t = self._inputs[0].detach() if self._inputs else latents + along(t, latents) * target
        changed, weight = criterion.regression_target(target, t, x_t)
        for index, attributes in enumerate(batch.get("custom_attributes", ())):
            if attributes.get("diff_output_preservation"):
                # The target is the network's output without its adapter: no noise there.
                changed[index], weight[index] = target[index].to(changed.dtype), 1
        weight = along(weight, target)
        return prediction, changed, timesteps, weight if weighting is None else weight * weighting

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.skip_step_options})"


def _loss(
    schedule: Schedule, skip_set: Skips, options: LossOptions, prediction_type: PredictionType
) -> SkipStepLoss:
    given = check_options(options, _REFUSED)
    return SkipStepLoss(schedule, skip_set, **given, prediction_type=prediction_type)


def _check_loss_type(args: Any) -> None:
    if getattr(args, "loss_type", "l2") == "l1":
        raise ValueError(
            "loss_type must be 'l2', 'huber' or 'smooth_l1', got 'l1': S²-DM is a squared error, "
            "and l1 has no part of one"
        )
