"""diffusers: the loss in its training scripts, and the gain on its pipelines.

    skip_loss = SkipLoss.from_scheduler(noise_scheduler, skip_set=9)        # once
    loss = skip_loss(model_pred, target, noisy_latents, timesteps)          # in place of F.mse_loss

A script's loss is mse(output, target), whichever of ε, v and x_0 the output is, and so is this one
at τ = 1: it is `SkipStepLoss.from_prediction` for an ε and `from_output` for any other output, with
the schedule and the prediction type read from the script's noise scheduler.
"""

from __future__ import annotations

import inspect
import re
import weakref
from types import TracebackType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from s2dm_loss._checks import (
    as_float64,
    check_batch,
    check_choice,
    check_like,
    check_per_sample,
    describe,
)
from s2dm_loss._head import Reduction
from s2dm_loss.coefficients import DEFAULT_MAX_C2, DEFAULT_TAU, Estimator
from s2dm_loss.continuous import ContinuousSchedule
from s2dm_loss.loss import SkipStepLoss
from s2dm_loss.output import RegressionTarget
from s2dm_loss.prediction import read_output
from s2dm_loss.schedule import NoiseSchedule, Schedule
from s2dm_loss.shrink import ShrunkModel
from s2dm_loss.skip_set import Skips
from s2dm_loss.weighting import Weighting

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
_PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

# More than the relative difference of ᾱ between diffusers' float32 tables and the same schedule in
# float64; measured over its schedulers and schedules it stays below 4e-5.
_FLOAT32_ROUNDING = 1e-4


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
        if prediction_type is not None:
            check_choice("prediction_type", prediction_type, _PREDICTION_TYPES)
        elif scheduler is None or schedule.timesteps is None:
            raise ValueError("prediction_type must be given where no config says it, got None")
        self.scheduler = scheduler
        self.prediction_type: PredictionType | None = prediction_type
        # One for each prediction type that the config has been seen to say.
        self._criteria = nn.ModuleDict()
        self._settings: dict[str, Any] = {
            "schedule": schedule,
            "skip_set": skip_set,
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
        if configured == "sample" and given is None:
            raise ValueError(
                "prediction_type 'sample' must be given by name, "
                "from_scheduler(..., prediction_type='sample'), and only where model_pred is the "
                "model's prediction of x_0 as it stands. The SDXL scripts subtract the noise from "
                "it first: no loss on x_0, and nothing a noise prediction could be read from"
            )
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


def shrink_pipeline(
    pipe: Any,
    skip_set: Skips,
    *,
    tau: float = DEFAULT_TAU,
    estimator: Estimator = "expected",
    max_c2: float = DEFAULT_MAX_C2,
    component: str | None = None,
) -> PipelineGain:
    """Give a trained pipeline the gain s(t) that the loss would have taught it, with no training.

    Each noise prediction of the pipeline's denoiser becomes s(t) ε̂, until the returned handle is
    removed; in a `with` statement, until its end:

        with shrink_pipeline(pipe, skip_set=99):
            images = pipe(num_inference_steps=10).images

    Nothing of it is saved by `pipe.save_pretrained`. It is the elementwise gain of each call, so
    classifier-free guidance on a doubled batch works as ever.

    Args:
        pipe: A diffusers pipeline with a `scheduler` and a denoiser, `unet` or `transformer`.
        skip_set: The skips, as for `SkipStepLoss`; a larger skip is a smaller s(t).
        tau: τ in [0, 1].
        estimator: "expected" and "fresh" have the same gain, "shared" another.
        max_c2: Upper bound on c²; see `coefficients`.
        component: Name of the denoiser, if it is neither `unet` nor `transformer`.

    Returns:
        The handle that takes the gain off again.

    Raises:
        TypeError: if `pipe` is no pipeline.
        ValueError: if its scheduler has no gain (flow matching, EDM), or it has one already.
    """
    return PipelineGain(
        pipe, skip_set, tau=tau, estimator=estimator, max_c2=max_c2, component=component
    )


class PipelineGain:
    """What `shrink_pipeline` returns: the gain on a pipeline's denoiser, until it is removed.

    Attributes:
        active: Whether the gain is on.
    """

    def __init__(
        self,
        pipe: Any,
        skip_set: Skips,
        *,
        tau: float = DEFAULT_TAU,
        estimator: Estimator = "expected",
        max_c2: float = DEFAULT_MAX_C2,
        component: str | None = None,
    ) -> None:
        """Put the gain on; the arguments are those of `shrink_pipeline`."""
        denoiser = _denoiser(pipe, component)
        schedule = schedule_of(pipe.scheduler)
        if not isinstance(schedule, NoiseSchedule):
            raise ValueError(
                "pipe must have a scheduler with alphas_cumprod, got a "
                f"{type(pipe.scheduler).__name__}: the gain is not offered for flow matching, "
                "whose transformers do not agree on whether a timestep is σ or 1000 σ"
            )
        if denoiser in _SHRUNK:
            raise ValueError(
                f"pipe has a gain on its {type(denoiser).__name__} already, and two would "
                "multiply: remove the first handle"
            )
        self._settings: dict[str, Any] = {
            "model": denoiser,
            "schedule": schedule,
            "skip_set": skip_set,
            "tau": tau,
            "estimator": estimator,
            "max_c2": max_c2,
        }
        self._shrunk = ShrunkModel(
            **self._settings, prediction_type=prediction_type_of(pipe.scheduler)
        )
        self._pipe = pipe
        self._denoiser = denoiser
        # torch.compile wraps a module; the wrapped one knows the names of the arguments.
        inner = getattr(denoiser, "_orig_mod", denoiser)
        self._signature = inspect.signature(inner.forward)
        self._hook = denoiser.register_forward_hook(self._shrink, with_kwargs=True)
        _SHRUNK.add(denoiser)
        self.active: bool = True

    def remove(self) -> None:
        """Take the gain off; once is enough, twice does no harm."""
        if self.active:
            self._hook.remove()
            _SHRUNK.discard(self._denoiser)
            self.active = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def _shrink(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        call = self._signature.bind(*args, **kwargs).arguments
        x_t = call["sample"] if "sample" in call else call["hidden_states"]
        prediction = read_output(output)
        variance = str(self._pipe.scheduler.config.get("variance_type")).startswith("learned")
        learned_variance = variance or prediction.shape[1] == 2 * x_t.shape[1]
        # Inpainting and image conditions are concatenated behind the noisy channels.
        x_t = x_t[:, : prediction.shape[1] // 2 if learned_variance else prediction.shape[1]]
        # A pipeline's scheduler, and with it the prediction type, can be exchanged.
        prediction_type = prediction_type_of(self._pipe.scheduler)
        if prediction_type != self._shrunk.prediction_type:
            self._shrunk = ShrunkModel(**self._settings, prediction_type=prediction_type)
        return self._shrunk.shrink(output, x_t, call["timestep"])

    @override
    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        gain = self._shrunk
        return (
            f"PipelineGain({gain.schedule!r}, {gain.skip_set!r}, tau={gain.tau}, "
            f"estimator={gain.estimator!r}, {type(self._denoiser).__name__}, {state})"
        )


# Denoisers that have a gain.
_SHRUNK: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def schedule_of(scheduler: Any) -> Schedule:
    """Return the schedule that a diffusers scheduler noises with, as this library's own.

    Where the config's `beta_schedule` gives the scheduler's table to float32 rounding, it is
    rebuilt in float64, since c at k = 1 loses four digits in float32; else the table is taken as
    it is. Zero terminal SNR is ᾱ = 0 at the end, also where the scheduler writes 2^-24 for it.

    Raises:
        TypeError: if `scheduler` is no diffusers scheduler.
        ValueError: if it has no variance-preserving path; the message gives the reason.
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", None)
    if config is None or not callable(getattr(scheduler, "set_timesteps", None)):
        raise TypeError(f"scheduler must be a diffusers scheduler, got {describe(scheduler)}")
    if name.startswith("FlowMatch"):
        return ContinuousSchedule.flow()
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        reason = (
            "EDM trains on σ and float timesteps, which have no skip in timesteps"
            if name.startswith("EDM")
            else "without ᾱ there is no transition from t - k to t to take the skip from"
        )
        raise ValueError(
            f"scheduler must have alphas_cumprod (DDPM, DDIM, PNDM, ...), got a {name}: {reason}"
        )
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        raise ValueError(
            f"scheduler must noise with its alphas_cumprod, got a {name} set to flow matching: "
            "give the FlowMatch scheduler that the model trains with"
        )
    # A copy: add_noise moves the scheduler's own table between devices.
    table = as_float64("scheduler.alphas_cumprod", table).clone()
    if config.get("rescale_betas_zero_snr"):
        table[-1] = 0.0
    exact = _rebuilt(config, table.numel())
    if exact is not None and torch.allclose(
        exact.alphas_cumprod, table, rtol=_FLOAT32_ROUNDING, atol=0.0
    ):
        return exact
    return NoiseSchedule.from_alphas_cumprod(table)


def prediction_type_of(scheduler: Any) -> PredictionType:
    """Return what `scheduler.config` says the model predicts, "epsilon" where it says nothing."""
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    check_choice(
        "scheduler.config.prediction_type", prediction_type, ("epsilon", "v_prediction", "sample")
    )
    return prediction_type  # type: ignore[no-any-return]


def _rebuilt(config: Any, num_train_timesteps: int) -> NoiseSchedule | None:
    """The schedule that a scheduler's config names, in float64; None if it is not one of ours."""
    named = config.get("beta_schedule", "squaredcos_cap_v2")  # UnCLIP knows no other
    betas = config.get("trained_betas")
    if betas is not None:
        exact = NoiseSchedule.from_betas(betas)
    elif named in ("linear", "scaled_linear"):
        build = getattr(NoiseSchedule, named)
        exact = build(num_train_timesteps, config["beta_start"], config["beta_end"])
    elif named == "squaredcos_cap_v2":
        exact = NoiseSchedule.cosine(num_train_timesteps)
    else:
        return None
    return exact.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else exact


def _denoiser(pipe: Any, component: str | None) -> nn.Module:
    if not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}"
        )
    names = ("unet", "transformer") if component is None else (component,)
    for name in names:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ValueError(
        f"pipe must have a denoiser named {' or '.join(names)}, got a {type(pipe).__name__}: "
        "name it with component="
    )
