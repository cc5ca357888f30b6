"""The loss in kohya-ss/sd-scripts: one line in `train_network.py` or `sdxl_train_network.py`.

    -    trainer = NetworkTrainer()
    +    trainer = skip_step(NetworkTrainer(), skip_set=49)

The trainer's own loss runs, of whichever type and with its masks and weights: it is given another
target, and A(t) as the weighting that it multiplies by. The trainer is not imported.

The scripts that have a loop instead of a trainer (`sdxl_train.py`, `train_db.py`, `fine_tune.py`)
ask `loss_of` for the loss and change their target with its `regression_target`. The trainers of
flow matching (Flux, SD3, ...) make x_t and σ inside a method: a patch changes their target there.
"""

from __future__ import annotations

import logging
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from s2dm_loss.adapters import SETTLED, changed_copy, check_options, check_plain
from s2dm_loss.adapters.diffusers_scheduler import schedule_of
from s2dm_loss.head import along
from s2dm_loss.loss import LossOptions, SkipStepLoss
from s2dm_loss.schedule import NoiseSchedule
from s2dm_loss.skip_set import Skips, SkipSet

__all__ = ["SkipStepMixin", "loss_of", "skip_step"]

Trainer = TypeVar("Trainer")

_LOGGER = logging.getLogger(__name__)
_METHODS = ("get_noise_scheduler", "get_noise_pred_and_target", "call_unet", "assert_extra_args")
# Whose own methods make the noise and the target: not those of the flow-matching trainers.
_OWNER = "NetworkTrainer"
_REFUSED = {**SETTLED, "weighting": "the trainer weighs its loss itself, as with --min_snr_gamma"}
_FLOW = (
    "flow matching takes SkipStepLoss(ContinuousSchedule.flow(), "
    "SkipSet.for_sampling_steps(20), prediction_type='flow') and, behind the line that makes the "
    "target, its regression_target(target, sigmas.flatten(), noisy_model_input)"
)


def loss_of(
    args: Any, noise_scheduler: Any, skip_set: Skips, **options: Unpack[LossOptions]
) -> SkipStepLoss:
    """Return the loss for a script's arguments and the scheduler that it noises with.

    Args:
        args: The script's arguments, of which `v_parameterization` and `loss_type` are read.
        noise_scheduler: Its DDPM scheduler, after it was fixed for `--zero_terminal_snr`.
        skip_set: The skips, in timesteps.
        options: Those of `SkipStepLoss`, without `weighting` and what the script settles itself.

    Raises:
        TypeError, ValueError: if an argument is not as said, or the loss has no squared part.
    """
    _check_loss_type(args)
    schedule = schedule_of(noise_scheduler)
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            "noise_scheduler must be one with timesteps and ᾱ (DDPM), got a "
            f"{type(noise_scheduler).__name__}: {_FLOW}"
        )
    return SkipStepLoss(
        schedule,
        skip_set,
        **check_options(options, _REFUSED),
        prediction_type="v_prediction" if args.v_parameterization else "epsilon",
    )


def skip_step(trainer: Trainer, skip_set: Skips, **options: Unpack[LossOptions]) -> Trainer:
    """Return a copy of a trainer of Stable Diffusion or SDXL networks that has the S²-DM loss.

    What it validates stays the plain loss.

    Args:
        trainer: A `NetworkTrainer` or `SdxlNetworkTrainer`, before its `train` is called.
        skip_set: The skips, in timesteps.
        options: Those of `SkipStepLoss`, without `weighting` and what the trainer settles itself. τ
            = 1 is the trainer's own loss, bit for bit.

    Raises:
        TypeError: if `trainer` is none of this kind.
        ValueError: if it trains flow matching, or has the S²-DM loss already.
    """
    plain: Any = trainer
    kind: Any = type(trainer)
    check_plain("trainer", trainer, SkipStepMixin)
    if missing := [name for name in _METHODS if not hasattr(trainer, name)]:
        raise TypeError(
            "trainer must be a NetworkTrainer of sd-scripts, got a "
            f"{kind.__name__} without {', '.join(missing)}: a script that makes its loss in a loop "
            "takes `loss_of` in that loop"
        )
    for name in _METHODS[:2]:
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if owner.__name__ != _OWNER:
            raise ValueError(
                f"trainer must train Stable Diffusion or SDXL, got a {kind.__name__} with a {name} "
                f"of its own: {_FLOW}"
            )
    given: dict[str, Any] = {"skip_set": SkipSet.wrap(skip_set), **options}
    # A wrong option is found now, on the trainer's T, and not after its models are loaded.
    SkipStepLoss(
        NoiseSchedule.scaled_linear(1000), given["skip_set"], **check_options(options, _REFUSED)
    )
    return changed_copy(plain, SkipStepMixin, skip_step_options=given)  # type: ignore[no-any-return]


class SkipStepMixin:
    """What `skip_step` puts in front of a trainer's class."""

    skip_step_options: dict[str, Any]
    skip_step_loss: SkipStepLoss
    _calls: list[tuple[Tensor, list[int] | None]]

    def assert_extra_args(self, args: Any, *datasets: Any, **kwargs: Any) -> Any:
        """Refuse what the loss has no meaning for before any model is loaded."""
        plain: Any = super()
        _check_loss_type(args)
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
        indices: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the model as the trainer does, and keep what goes in."""
        plain: Any = super()
        self._calls.append((noisy_latents, indices))
        if indices is not None:
            kwargs["indices"] = indices
        return plain.call_unet(args, accelerator, unet, noisy_latents, *more, **kwargs)

    def get_noise_pred_and_target(
        self, *args: Any, is_train: bool = True, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the prediction, the changed target, the timesteps and the weighting."""
        plain: Any = super()
        self._calls = []
        prediction, target, timesteps, weighting = plain.get_noise_pred_and_target(
            *args, is_train=is_train, **kwargs
        )
        if not is_train:
            return prediction, target, timesteps, weighting
        # Gradient checkpointing makes the noisy latents require a gradient; a target has none.
        noisy_latents = self._calls[0][0].detach()
        changed, weight = self.skip_step_loss.regression_target(target, timesteps, noisy_latents)
        for _, preserved in self._calls[1:]:
            # Samples that shall keep the output of the network without its adapter: no noise there.
            changed[preserved] = target[preserved].to(changed.dtype)
            weight[preserved] = 1
        weight = along(weight, target)
        return prediction, changed, timesteps, weight if weighting is None else weight * weighting

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.skip_step_options})"


def _check_loss_type(args: Any) -> None:
    if getattr(args, "loss_type", "l2") == "l1":
        raise ValueError(
            "loss_type must be 'l2', 'huber' or 'smooth_l1', got 'l1': S²-DM is a squared error, "
            "and l1 has no part of one"
        )
