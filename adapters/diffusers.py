"""diffusers: the loss in its training scripts.

    skip_loss = SkipLoss.from_scheduler(noise_scheduler, skip_set=49)  # once
    # In the place of F.mse_loss.
    loss = skip_loss(model_pred, target, timesteps, noisy_latents)

A script's loss is mse(output, target), whichever of ε, v, x_0 and flow the output is, and so is
this one at τ = 1: it is `SkipStepLoss.from_output`, with the schedule and the prediction type read
from the script's noise scheduler (`diffusers_scheduler`). What corrects a trained pipeline is in
`diffusers_pipeline`, what searches for it in `diffusers_search`; all of it can be imported here.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack, override

from s2dm_loss.adapters import SETTLED, check_options
from s2dm_loss.adapters.diffusers_pipeline import (
    PipelineCorrection,
    correct_pipeline,
    shrink_pipeline,
)
from s2dm_loss.adapters.diffusers_scheduler import (
    CONFIGURED,
    is_the_path_of,
    prediction_type_of,
    schedule_of,
)
from s2dm_loss.adapters.diffusers_search import PipelineRecommendation, search_pipeline
from s2dm_loss.checks import check_batch, check_choice, check_like, check_per_sample, describe
from s2dm_loss.loss import LossOptions, RegressionTarget, SkipStepLoss
from s2dm_loss.prediction import PredictionType
from s2dm_loss.schedule import Schedule, check_schedule
from s2dm_loss.skip_set import Skips, SkipSet

__all__ = [
    "PipelineCorrection",
    "PipelineRecommendation",
    "SkipLoss",
    "correct_pipeline",
    "schedule_of",
    "search_pipeline",
    "shrink_pipeline",
]

_REFUSED = {"timesteps": SETTLED["timesteps"]}


class SkipLoss(nn.Module):
    """The S²-DM loss (arXiv 2401.01520) in the place of a diffusers script's `F.mse_loss`.

    >>> from diffusers import DDPMScheduler
    >>> from s2dm_loss.adapters.diffusers import SkipLoss
    >>> noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    >>> skip_loss = SkipLoss.from_scheduler(noise_scheduler, skip_set=49)
    >>> skip_loss  # doctest: +ELLIPSIS
    SkipLoss(NoiseSchedule.linear(1000), SkipSet(49), tau=0.99, ...)

    It draws nothing (except ξ of the estimator "fresh"), calls no model, has no parameters and
    leaves no keys in a `state_dict`.
    """

    def __init__(
        self,
        schedule: Schedule,
        skip_set: Skips,
        *,
        scheduler: Any = None,
        **options: Unpack[LossOptions],
    ) -> None:
        """Make the loss; `from_scheduler` does so from what a script has at hand.

        Args:
            schedule: The noise schedule.
            skip_set: The skips, as for `SkipStepLoss`.
            scheduler: The diffusers scheduler whose config says the prediction type.
            options: Those of `SkipStepLoss` but `timesteps`, which the script draws. Where no
                config says the prediction type, `prediction_type` is needed. With a `weighting` a
                script's `snr_gamma` is not needed; what it passes in `weights` multiplies.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        super().__init__()
        settings = check_options(options, _REFUSED)
        schedule = check_schedule(schedule)
        self.prediction_type: PredictionType | None = settings.pop("prediction_type", None)
        if self.prediction_type is None and (scheduler is None or schedule.timesteps is None):
            raise ValueError("prediction_type must be given where no config says it, got None")
        if scheduler is not None:
            of_scheduler = schedule_of(scheduler)
            # A v hangs on the whole path, and a config may come to say one.
            if not is_the_path_of(schedule, of_scheduler, self.prediction_type or "v_prediction"):
                raise ValueError(
                    f"schedule must be that of scheduler, {of_scheduler!r}, got {schedule!r}: "
                    "SkipLoss.from_scheduler(scheduler, skip_set) takes it from there"
                )
        self.scheduler = scheduler
        # One for each prediction type that the config has been seen to say.
        self._criteria = nn.ModuleDict()
        self._settings = {**settings, "schedule": schedule, "skip_set": SkipSet.wrap(skip_set)}
        self._criterion_of(self.prediction_type or _configured(scheduler))

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, skip_set: Skips, **options: Unpack[LossOptions]
    ) -> Self:
        """Make the loss for the noise scheduler that the script trains with.

        Args:
            scheduler: A diffusers scheduler with `alphas_cumprod` (DDPM, DDIM, PNDM, ...), or a
                FlowMatch scheduler. The table is copied: a later `add_noise`, which moves the
                scheduler's own between devices, does not touch it.
            skip_set: The skips: timesteps, as for `SkipStepLoss`; for a FlowMatch scheduler floats
                in units of σ. `SkipSet.for_sampling_steps(20)` serves both.
            options: As for the class. `prediction_type` left out,
                `scheduler.config.prediction_type` is read at each call, as scripts set it inside
                their loop. Two cases have to be said by name: "sample", and for a FlowMatch
                scheduler "flow" (target = noise - x_0, as Flux), "sample" (target = x_0, as SD3
                with `--precondition_outputs`) or "velocity" (of a scheduler with `invert_sigmas`,
                whose σ counts the data: target = x_0 - noise, as Mochi).

        Raises:
            TypeError: if `scheduler` is no diffusers scheduler, or an option is unknown.
            ValueError: if the loss has no meaning for it; the message gives the reason.
        """
        schedule, name = schedule_of(scheduler), type(scheduler).__name__
        prediction_type = options.get("prediction_type")
        if prediction_type not in ("flow", "sample", "velocity") and schedule.timesteps is None:
            raise ValueError(
                f"prediction_type must be given for a {name}, whose config does not say it: 'flow' "
                "where target = noise - x_0 (Flux; SD3 with --precondition_outputs 0), 'sample' "
                f"where target = x_0 (SD3's default), got {prediction_type!r}"
            )
        if prediction_type is not None and schedule.timesteps is not None:
            if prediction_type == "flow":
                raise ValueError(
                    f"prediction_type 'flow' belongs to a FlowMatch scheduler, got it with a {name}"
                )
            check_choice("prediction_type", prediction_type, CONFIGURED)
        return cls(schedule, skip_set, scheduler=scheduler, **options)

    @override
    def forward(
        self,
        model_pred: Tensor,
        target: Tensor,
        timesteps: Tensor,
        noisy_latents: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        skip_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss of an output that the script has made already.

        Args:
            model_pred: The model's output, of shape [B, ...].
            target: What the script compares it with, of the same shape.
            timesteps: Integer timesteps of shape [B]; for a FlowMatch scheduler the σ in x_t,
                floating point, of shape [B].
            noisy_latents: The x_t that the model was given, of the shape of `target`: after any
                scaling to unit variance (`scale_model_input`), before anything is concatenated to
                it. Required but for a noise prediction, for which it is checked and not used.
            weights: Per-sample weights of shape [B] (Min-SNR), multiplied in before the reduction.
            skip_noise: ξ of the estimator "fresh", of the shape of `target`; drawn if not given.
            generator: Random stream of the drawn ξ.

        Returns:
            A scalar, or shape [B] with reduction "none"; float32, or float64 for float64 input.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        criterion = self._check_call(target, timesteps, noisy_latents)
        return criterion.from_output(
            check_like("model_pred", model_pred, "target", target),
            target,
            timesteps,
            noisy_latents,
            skip_noise=skip_noise,
            weights=weights,
            generator=generator,
        )

    def regression_target(
        self,
        target: Tensor,
        timesteps: Tensor,
        noisy_latents: Tensor | None = None,
        *,
        skip_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RegressionTarget:
        """Return the changed target and its weight, for a script that keeps its own loss.

        For Huber losses, masks and two-part losses; the arguments are those of the loss, and
        `SkipStepLoss.regression_target` says what comes back.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        criterion = self._check_call(target, timesteps, noisy_latents)
        return criterion.regression_target(
            target, timesteps, noisy_latents, skip_noise=skip_noise, generator=generator
        )

    @property
    def criterion(self) -> SkipStepLoss:
        """The loss for the prediction type that holds now."""
        given = self.prediction_type
        if given is None:
            return self._criterion_of(_configured(self.scheduler))
        if self.scheduler is not None and not self._is_flow:
            said = prediction_type_of(self.scheduler)
            if given != said:
                raise ValueError(
                    f"prediction_type {given!r} was given, but the scheduler's config now says "
                    f"{said!r}"
                )
        return self._criterion_of(given)

    def _criterion_of(self, prediction_type: PredictionType) -> SkipStepLoss:
        if prediction_type not in self._criteria:
            self._criteria[prediction_type] = SkipStepLoss(
                **self._settings, prediction_type=prediction_type
            )
        return cast("SkipStepLoss", self._criteria[prediction_type])

    @property
    def _is_flow(self) -> bool:
        return self._settings["schedule"].timesteps is None

    def _check_call(
        self, target: Tensor, timesteps: Tensor, noisy_latents: Tensor | None
    ) -> SkipStepLoss:
        """Return the loss of one call, or raise in the words of the script."""
        check_batch("target", target)
        self._check_times(timesteps, target)
        criterion = self.criterion
        if noisy_latents is None:
            if criterion.prediction_type in ("epsilon", "score"):
                return criterion
            raise ValueError(
                f"noisy_latents must be given for prediction_type {criterion.prediction_type!r}, "
                "whose target holds data, got None: skip_loss(model_pred, target, timesteps, "
                "noisy_latents)"
            )
        if check_batch("noisy_latents", noisy_latents).shape != target.shape:
            raise ValueError(
                f"noisy_latents must have the shape of target, {tuple(target.shape)}: the noisy "
                "channels alone, for the samples of target, without what is concatenated to them, "
                f"got {describe(noisy_latents)}"
            )
        check_like("noisy_latents", noisy_latents, "target", target)
        return criterion

    def _check_times(self, timesteps: Tensor, target: Tensor) -> None:
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"timesteps must be a tensor, got {describe(timesteps)}")
        if timesteps.is_floating_point() and timesteps.shape == target.shape and target.ndim > 1:
            raise ValueError(
                f"timesteps must have shape ({len(target)},), got {describe(timesteps)}: they come "
                "before noisy_latents, skip_loss(model_pred, target, timesteps, noisy_latents)"
            )
        flow = self._is_flow
        if timesteps.is_floating_point() != flow:
            raise TypeError(
                "timesteps must be the σ of each sample, floating point in [0, 1], for a flow-"
                f"matching model, got {describe(timesteps)}"
                if flow
                else "timesteps must be integers, as the script drew them, got "
                f"{describe(timesteps)}: a half type rounds them (bfloat16 turns 999 into 1000), "
                "and the float timesteps of EDM-style training are no rows of a table"
            )
        if timesteps.shape != target.shape[:1]:
            size = target.shape[0]
            if timesteps.ndim == 1 and timesteps.shape[0] == 2 * size:
                hint = (
                    ": with prior preservation the script chunks model_pred and target but not "
                    "the timesteps; chunk noisy_latents and timesteps too, "
                    "`timesteps.chunk(2)[0]`"
                )
            else:
                hint = ": `sigmas.flatten()`" if flow and timesteps.numel() == size else ""
            raise ValueError(
                f"timesteps must have shape ({size},), one for each sample of target of shape "
                f"{tuple(target.shape)}, got {describe(timesteps)}{hint}"
            )
        check_per_sample("timesteps", timesteps, "target", target)

    @override
    def __repr__(self) -> str:
        text = repr(next(iter(self._criteria.values()))).replace("SkipStepLoss(", "SkipLoss(", 1)
        # One that a config says may change.
        return text if self.prediction_type else re.sub(r", prediction_type='\w+'", "", text)


def _configured(scheduler: Any) -> PredictionType:
    """Return what the config says, or raise ValueError where it has to be said by name."""
    configured = prediction_type_of(scheduler)
    if configured == "sample":
        raise ValueError(
            "prediction_type 'sample' must be given by name, "
            "from_scheduler(..., prediction_type='sample'), and only where model_pred is the "
            "model's prediction of x_0 as it stands. The SDXL scripts subtract the noise from it "
            "first: no loss on x_0, and nothing a noise prediction could be read from"
        )
    return configured
