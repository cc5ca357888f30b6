"""diffusers: the loss in its training scripts.

    skip_loss = SkipLoss.from_scheduler(noise_scheduler, skip_set=9)  # once
    # In the place of F.mse_loss.
    loss = skip_loss(model_pred, target, noisy_latents, timesteps)

A script's loss is mse(output, target), whichever of ε, v and x_0 the output is, and so is this one
at τ = 1: it is `SkipStepLoss.from_prediction` for an ε and `from_output` for any other output, with
the schedule and the prediction type read from the script's noise scheduler
(`diffusers_scheduler`). The gain on a pipeline, `shrink_pipeline`, is in `diffusers_pipeline`.
"""

from __future__ import annotations

import re
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from s2dm_loss.adapters.diffusers_pipeline import (
    PipelineCorrection,
    correct_pipeline,
    shrink_pipeline,
)
from s2dm_loss.adapters.diffusers_scheduler import (
    PredictionType,
    prediction_type_of,
    schedule_of,
)
from s2dm_loss.checks import check_batch, check_choice, check_like, check_per_sample, describe
from s2dm_loss.coefficients import DEFAULT_MAX_C2, DEFAULT_TAU, Estimator
from s2dm_loss.continuous import ContinuousSchedule
from s2dm_loss.functional import Reduction
from s2dm_loss.loss import SkipStepLoss
from s2dm_loss.output import RegressionTarget
from s2dm_loss.schedule import NoiseSchedule, Schedule, check_schedule
from s2dm_loss.skip_set import Skips, SkipSet
from s2dm_loss.weighting import Weighting

__all__ = ["PipelineCorrection", "SkipLoss", "correct_pipeline", "schedule_of", "shrink_pipeline"]


class SkipLoss(nn.Module):
    """The S²-DM loss (arXiv 2401.01520) in the place of a diffusers script's `F.mse_loss`.

    >>> from diffusers import DDPMScheduler
    >>> from s2dm_loss.adapters.diffusers import SkipLoss
    >>> noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    >>> skip_loss = SkipLoss.from_scheduler(noise_scheduler, skip_set=9)
    >>> skip_loss
    SkipLoss(NoiseSchedule.linear(1000), SkipSet(9), tau=0.99, estimator='expected')

    It draws nothing (except ζ of the estimator "fresh"), calls no model, has no parameters and
    leaves no keys in a `state_dict`.
    """

    def __init__(
        self,
        schedule: Schedule,
        skip_set: Skips = 9,
        *,
        scheduler: Any = None,
        prediction_type: PredictionType | None = None,
        tau: float = DEFAULT_TAU,
        estimator: Estimator = "expected",
        reduction: Reduction = "mean",
        weighting: Weighting | None = None,
        normalize: bool = False,
        max_c2: float = DEFAULT_MAX_C2,
    ) -> None:
        """Make the loss; `from_scheduler` does so from what a script has at hand.

        Args:
            schedule: The noise schedule.
            skip_set: The skips, as for `SkipStepLoss`.
            scheduler: The diffusers scheduler whose config says the prediction type.
            prediction_type: What the model predicts: needed where the config does not say it.
            tau: τ in [0, 1]; 1 is the script's own loss.
            estimator: "expected", "fresh" or "shared".
            reduction: "mean" or "sum" over the batch, or "none" for shape [B].
            weighting: A weighting by its name, such as "min_snr", or a function of log SNR, exact
                for each prediction type; see `SkipStepLoss`. A script's `snr_gamma` is then not
                needed; what it passes in `weights` multiplies.
            normalize: Drop the weight A(t), as for `SkipStepLoss`.
            max_c2: Upper bound on c², and on c² w on the scale of the output.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        super().__init__()
        schedule = check_schedule(schedule)
        if prediction_type is not None:
            check_choice("prediction_type", prediction_type, get_args(PredictionType))
        elif scheduler is None or schedule.timesteps is None:
            raise ValueError("prediction_type must be given where no config says it, got None")
        self.scheduler = scheduler
        self.prediction_type: PredictionType | None = prediction_type
        # One for each prediction type that the config has been seen to say.
        self._criteria = nn.ModuleDict()
        self._settings: dict[str, Any] = {
            "schedule": schedule,
            "skip_set": SkipSet.wrap(skip_set),
            "tau": tau,
            "estimator": estimator,
            "reduction": reduction,
            "weighting": weighting,
            "normalize": normalize,
            "max_c2": max_c2,
        }
        known = prediction_type or prediction_type_of(scheduler)
        self._criteria[known] = SkipStepLoss(**self._settings, prediction_type=known)

    @classmethod
    def from_scheduler(
        cls,
        scheduler: Any,
        skip_set: Skips = 9,
        *,
        prediction_type: PredictionType | None = None,
        tau: float = DEFAULT_TAU,
        estimator: Estimator = "expected",
        reduction: Reduction = "mean",
        weighting: Weighting | None = None,
        normalize: bool = False,
        max_c2: float = DEFAULT_MAX_C2,
    ) -> Self:
        """Make the loss for the noise scheduler that the script trains with.

        Args:
            scheduler: A diffusers scheduler with `alphas_cumprod` (DDPM, DDIM, PNDM, ...), or a
                FlowMatch scheduler. The table is copied: a later `add_noise`, which moves the
                scheduler's own between devices, does not touch it.
            skip_set: The skips: timesteps, as for `SkipStepLoss`; for a FlowMatch scheduler floats
                in units of σ.
            prediction_type: Left out, `scheduler.config.prediction_type` is read at each call, as
                scripts set it inside their loop. Two cases have to be said by name: "sample", and
                for a FlowMatch scheduler "flow" (target = noise - x_0, as Flux) or "sample"
                (target = x_0, as SD3 with `--precondition_outputs`).
            tau: τ in [0, 1], the share of the plain loss; 1 is the script's own loss.
            estimator: "expected", "fresh" or "shared".
            reduction: "mean" or "sum" over the batch, or "none" for shape [B]. The data axes are
                always averaged.
            weighting: A weighting by its name, such as "min_snr", or a function of log SNR, exact
                for each prediction type; see `SkipStepLoss`. A script's `snr_gamma` is then not
                needed; what it passes in `weights` multiplies.
            normalize: Drop the weight A(t), as for `SkipStepLoss`.
            max_c2: Upper bound on c²; see `SkipStepLoss.from_output`.

        Raises:
            TypeError: if `scheduler` is no diffusers scheduler.
            ValueError: if the loss has no meaning for it; the message gives the reason.
        """
        schedule = schedule_of(scheduler)
        if isinstance(schedule, ContinuousSchedule) and prediction_type not in ("flow", "sample"):
            raise ValueError(
                f"prediction_type must be given for a {type(scheduler).__name__}, whose config "
                "does not say it: 'flow' where target = noise - x_0 (Flux; SD3 with "
                "--precondition_outputs 0), 'sample' where target = x_0 (SD3's default), got "
                f"{prediction_type!r}"
            )
        if isinstance(schedule, NoiseSchedule) and prediction_type is None:
            _check_named(prediction_type_of(scheduler))
        if isinstance(schedule, NoiseSchedule) and prediction_type == "flow":
            raise ValueError(
                f"prediction_type 'flow' belongs to a FlowMatch scheduler, got it with a "
                f"{type(scheduler).__name__}"
            )
        return cls(
            schedule,
            skip_set,
            scheduler=scheduler,
            prediction_type=prediction_type,
            tau=tau,
            estimator=estimator,
            reduction=reduction,
            weighting=weighting,
            normalize=normalize,
            max_c2=max_c2,
        )

    @override
    def forward(
        self,
        model_pred: Tensor,
        target: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        *,
        weights: Tensor | None = None,
        skip_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss of an output that the script has made already.

        Args:
            model_pred: The model's output, of shape [B, ...].
            target: What the script compares it with, of the same shape.
            noisy_latents: The x_t that the model was given, of the same shape: after any scaling
                to unit variance (`scale_model_input`), before anything is concatenated to it.
            timesteps: Integer timesteps of shape [B]; for a FlowMatch scheduler the σ in x_t,
                floating point, of shape [B].
            weights: Per-sample weights of shape [B] (Min-SNR), multiplied in before the reduction.
            skip_noise: ζ of the estimator "fresh", of the shape of `target`; drawn if not given.
            generator: Random stream of the drawn ζ.

        Returns:
            A scalar, or shape [B] with reduction "none"; float32, or float64 for float64 input.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        criterion = self._check_call(target, noisy_latents, timesteps, model_pred)
        if criterion.prediction_type == "epsilon":
            # With the loss's constant, so that its value is the released code's.
            return criterion.from_prediction(
                model_pred,
                target,
                timesteps,
                skip_noise=skip_noise,
                weights=weights,
                generator=generator,
            )
        return criterion.from_output(
            model_pred,
            target,
            noisy_latents,
            timesteps,
            skip_noise=skip_noise,
            weights=weights,
            generator=generator,
        )

    def regression_target(
        self,
        target: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
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
        criterion = self._check_call(target, noisy_latents, timesteps)
        return criterion.regression_target(
            target, noisy_latents, timesteps, skip_noise=skip_noise, generator=generator
        )

    @property
    def criterion(self) -> SkipStepLoss:
        """The loss for the prediction type that holds now."""
        prediction_type = self._prediction_type()
        if prediction_type not in self._criteria:
            self._criteria[prediction_type] = SkipStepLoss(
                **self._settings, prediction_type=prediction_type
            )
        return cast("SkipStepLoss", self._criteria[prediction_type])

    @property
    def _is_flow(self) -> bool:
        return self._settings["schedule"].timesteps is None

    def _prediction_type(self) -> PredictionType:
        given = self.prediction_type
        if given is not None and (self.scheduler is None or self._is_flow):
            return given
        configured = prediction_type_of(self.scheduler)
        if given not in (None, configured):
            raise ValueError(
                f"prediction_type {given!r} was given, but the scheduler's config now says "
                f"{configured!r}"
            )
        if given is None:
            _check_named(configured)
        return configured

    def _check_call(
        self,
        target: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        model_pred: Tensor | None = None,
    ) -> SkipStepLoss:
        """Return the loss of one call, or raise in the words of the script."""
        check_batch("target", target)
        if model_pred is not None:
            check_like("model_pred", model_pred, "target", target)
        if check_batch("noisy_latents", noisy_latents).shape != target.shape:
            raise ValueError(
                f"noisy_latents must have the shape of target, {tuple(target.shape)}: the noisy "
                "channels alone, for the samples of target, without what is concatenated to them, "
                f"got {describe(noisy_latents)}"
            )
        check_like("noisy_latents", noisy_latents, "target", target)
        self._check_times(timesteps, target)
        return self.criterion

    def _check_times(self, timesteps: Tensor, target: Tensor) -> None:
        if not isinstance(timesteps, Tensor):
            raise TypeError(f"timesteps must be a tensor, got {describe(timesteps)}")
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
        text = repr(next(iter(self._criteria.values())))
        text = re.sub(r", prediction_type='\w+'", "", text.replace("SkipStepLoss(", "SkipLoss(", 1))
        if self.prediction_type is None:
            return text
        return f"{text[:-1]}, prediction_type={self.prediction_type!r})"


def _check_named(configured: PredictionType) -> None:
    """Raise ValueError where only the config says what has to be said by name."""
    if configured == "sample":
        raise ValueError(
            "prediction_type 'sample' must be given by name, "
            "from_scheduler(..., prediction_type='sample'), and only where model_pred is the "
            "model's prediction of x_0 as it stands. The SDXL scripts subtract the noise from it "
            "first: no loss on x_0, and nothing a noise prediction could be read from"
        )
