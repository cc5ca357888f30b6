"""diffusers: the gain s(t) on a trained pipeline, with no training.

with shrink_pipeline(pipe, skip_set=99):
    images = pipe(num_inference_steps=10).images
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Self, override

from s2dm_loss.adapters.diffusers_scheduler import (
    has_the_path_of,
    is_the_table_of,
    prediction_type_of,
    schedule_of,
)
from s2dm_loss.checks import check_choice, describe
from s2dm_loss.coefficients import DEFAULT_MAX_C2, DEFAULT_TAU, Estimator
from s2dm_loss.prediction import PredictionType, read_output
from s2dm_loss.sampling.result import Recommendation
from s2dm_loss.sampling.scaled_model import ScaledModel
from s2dm_loss.schedule import NoiseSchedule
from s2dm_loss.skip_set import Skips, SkipSet

__all__ = ["PipelineGain", "correct_pipeline", "shrink_pipeline"]

NoisyChannels = Literal["first", "last"] | None


def shrink_pipeline(
    pipe: Any,
    skip_set: Skips,
    *,
    tau: float = DEFAULT_TAU,
    estimator: Estimator = "expected",
    max_c2: float = DEFAULT_MAX_C2,
    component: str | None = None,
    noisy_channels: NoisyChannels = None,
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
        noisy_channels: Where x_t is in an input that has conditions concatenated to it, "first" (as
            in inpainting) or "last" (as in Marigold). Only a denoiser that predicts anything but
            noise needs it.

    Returns:
        The handle that takes the gain off again.

    Raises:
        TypeError: if `pipe` is no pipeline.
        ValueError: if its scheduler has no gain (flow matching, EDM, times that are log σ), its
            denoiser hides the names of its arguments behind `*args`, or it has a gain already; and
            in a call, if conditions are concatenated and `noisy_channels` is missing.
    """
    return PipelineGain(
        pipe,
        partial(
            ScaledModel.with_gain,
            schedule=_schedule(pipe),
            skip_set=SkipSet.wrap(skip_set),
            tau=tau,
            estimator=estimator,
            max_c2=max_c2,
        ),
        component,
        noisy_channels,
    )


def correct_pipeline(
    pipe: Any,
    recommendation: Recommendation,
    *,
    component: str | None = None,
    noisy_channels: NoisyChannels = None,
) -> PipelineGain:
    """Put what a search has recommended on a pipeline's denoiser, until the handle is removed.

        with correct_pipeline(pipe, recommendation):
            images = pipe(latents=recommendation.correct_noise(latents)).images

    A recommendation about the start noise acts through `latents` alone, which not every pipeline
    takes (`DDIMPipeline` does not); one of none does nothing.

    Args:
        pipe: A diffusers pipeline with a `scheduler` and a denoiser, `unet` or `transformer`.
        recommendation: What `CorrectionSearch` has found.
        component: Name of the denoiser, if it is neither `unet` nor `transformer`.
        noisy_channels: As for `shrink_pipeline`.

    Raises:
        TypeError: if `pipe` is no pipeline, or `recommendation` not what a search returns.
        ValueError: if its schedule or its prediction type is not that of the search, if the
            recommended correction is one of your own that does more to the model than to scale what
            it returns, or if the pipeline has a gain already.
    """
    if not isinstance(recommendation, Recommendation):
        raise TypeError(
            "recommendation must be a Recommendation, what a search returns, got "
            f"{describe(recommendation)}"
        )

    def corrected(denoiser: nn.Module, prediction_type: PredictionType) -> nn.Module:
        model = recommendation.correct_model(denoiser)
        if model is denoiser:
            return model
        if not isinstance(model, ScaledModel):
            raise ValueError(
                f"recommendation makes a {type(model).__name__} of the denoiser; on a pipeline it "
                "must make a ScaledModel, which scales what the denoiser returns"
            )
        if model.model is not denoiser:
            raise ValueError(
                f"recommendation makes a {type(model).__name__} of a {type(model.model).__name__}, "
                "and not of the denoiser itself; on a pipeline there is one correction of it"
            )
        if model.prediction_type != prediction_type:
            raise ValueError(
                f"recommendation is for prediction_type {model.prediction_type!r}, and the "
                f"pipeline's is {prediction_type!r}"
            )
        if not is_the_table_of(model.schedule, schedule.alphas_cumprod) or (
            # The noise in an output hangs on the path, x_0 + σ ε or √ᾱ x_0 + √(1-ᾱ) ε.
            prediction_type != "epsilon" and not has_the_path_of(model.schedule, schedule)
        ):
            raise ValueError(
                f"recommendation is for {model.schedule!r}, and the pipeline's is {schedule!r}"
            )
        return model

    schedule = _schedule(pipe)
    return PipelineGain(pipe, corrected, component, noisy_channels)


class PipelineGain:
    """What `shrink_pipeline` returns: the gain on a pipeline's denoiser, until it is removed.

    Attributes:
        active: Whether the gain is on.
    """

    def __init__(
        self,
        pipe: Any,
        make: Callable[..., nn.Module],
        component: str | None = None,
        noisy_channels: NoisyChannels = None,
    ) -> None:
        """Put the gain on.

        Args:
            pipe: The pipeline.
            make: Called `make(denoiser, prediction_type=...)`, returns a `ScaledModel`, or
                the denoiser where nothing is to be changed.
            component: Name of the denoiser.
            noisy_channels: As for `shrink_pipeline`.
        """
        if noisy_channels is not None:
            check_choice("noisy_channels", noisy_channels, ("first", "last"))
        self._component, denoiser = _denoiser(pipe, component)
        # torch.compile wraps a module, which may have a gain already and knows the names of the
        # arguments.
        self._inner = inner = getattr(denoiser, "_orig_mod", denoiser)
        self._make = make
        self._scaled: Any = make(denoiser, prediction_type=prediction_type_of(pipe.scheduler))
        if self._scaled is not denoiser and inner in _SHRUNK:
            raise ValueError(
                f"pipe has a gain on its {type(inner).__name__} already, and two would multiply: "
                "remove the first handle"
            )
        self._pipe = pipe
        self._scheduler = pipe.scheduler
        self._denoiser: nn.Module | None = denoiser
        self._noisy_channels = noisy_channels
        self._signature = inspect.signature(inner.forward)
        names = self._signature.parameters.keys()
        named = "timestep" in names and names & {"sample", "hidden_states"}
        if self._scaled is not denoiser and not named:
            raise ValueError(
                f"the forward of pipe's {type(inner).__name__} must name timestep, and sample or "
                f"hidden_states, got {self._signature}: give the pipeline the denoiser itself"
            )
        self._hook = denoiser.register_forward_hook(self._rescale, with_kwargs=True)
        if self._scaled is not denoiser:
            _SHRUNK.add(inner)
        self.active: bool = True

    def remove(self) -> None:
        """Take the gain off; once is enough, twice does no harm."""
        if self.active:
            self._hook.remove()
            if self._scaled is not self._denoiser:
                _SHRUNK.discard(self._inner)
            self.active = False

    def __enter__(self) -> Self:
        if not self.active:
            raise ValueError("the gain has been removed: put it on anew for another `with`")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()
        now = getattr(self._pipe, self._component, None)
        if (
            kind is None
            and self._scaled is not self._denoiser
            and isinstance(now, nn.Module)
            and not any(m is self._denoiser or m in _SHRUNK for m in now.modules())
        ):
            warnings.warn(
                f"pipe's {self._component} was exchanged while the gain was on, and the new one "
                "had none: put the gain on after the exchange",
                stacklevel=2,
            )

    def _rescale(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        # A copy of the denoiser has copied the hook, but it is not what the handle is for.
        if module is not self._denoiser or self._scaled is self._denoiser:
            return output
        if self._pipe.scheduler is not self._scheduler:
            self._check_exchanged()
        call = self._signature.bind(*args, **kwargs).arguments
        x_t = call["sample"] if "sample" in call else call["hidden_states"]
        prediction = read_output(output)
        variance = str(self._pipe.scheduler.config.get("variance_type")).startswith("learned")
        learned_variance = variance or prediction.shape[1] == 2 * x_t.shape[1]
        # A pipeline's scheduler, and with it the prediction type, can be exchanged.
        prediction_type = prediction_type_of(self._pipe.scheduler)
        channels, *rest = prediction.shape[1:]
        sizes = (channels // 2 if learned_variance else channels, *rest)
        x_t = self._without_conditions(x_t, sizes, prediction_type)
        if prediction_type != self._scaled.prediction_type:
            self._scaled = self._make(self._denoiser, prediction_type=prediction_type)
        return self._scaled.rescale(output, x_t, call["timestep"])

    def _check_exchanged(self) -> None:
        """Raise ValueError unless a pipeline's new scheduler has the schedule of the gain."""
        if not is_the_table_of(self._scaled.schedule, _schedule(self._pipe).alphas_cumprod):
            raise ValueError(
                f"pipe has another scheduler, a {type(self._pipe.scheduler).__name__}, whose "
                "alphas_cumprod are not those of the gain: remove the gain and put it on anew"
            )
        self._scheduler = self._pipe.scheduler

    def _without_conditions(
        self, x_t: Tensor, sizes: tuple[int, ...], prediction_type: PredictionType
    ) -> Tensor:
        """Return the noisy channels, of these sizes after the batch's.

        They are the first axis after the batch, or the second of CogVideoX's videos.
        """
        if x_t.shape[1:] == sizes:
            return x_t
        if prediction_type != "epsilon" and self._noisy_channels is None:
            raise ValueError(
                "noisy_channels must be 'first' or 'last', the place of x_t in the denoiser's "
                f"input {tuple(x_t.shape)}, to scale the noise in an output of {prediction_type!r} "
                f"with {sizes} for each sample; got None"
            )
        last = self._noisy_channels == "last"
        return x_t[(slice(None), *(slice(-n, None) if last else slice(n) for n in sizes))]

    def __deepcopy__(self, memo: object) -> Self:
        """Return the handle itself: a copy of the denoiser copies its hooks, and has no gain."""
        return self

    @override
    def __reduce__(self) -> tuple[Callable[[], PipelineGain], tuple[()]]:
        """Keep nothing: a denoiser is pickled with its hooks, and what is loaded has no gain."""
        return _removed, ()

    @override
    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        kind, what = type(self._denoiser).__name__, "nothing"
        if self._scaled is not self._denoiser:
            what = self._scaled.extra_repr()
        return f"PipelineGain({what}, {kind}, {state})"


def _removed() -> PipelineGain:
    handle = object.__new__(PipelineGain)
    handle._denoiser = handle._scaled = None
    handle.active = False
    return handle


# Denoisers that have a gain.
_SHRUNK: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _schedule(pipe: Any) -> NoiseSchedule:
    if not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}"
        )
    schedule = schedule_of(pipe.scheduler)
    if pipe.scheduler.config.get("timestep_type") == "continuous":
        raise ValueError(
            "pipe must have a scheduler whose timesteps are those of training, got timestep_type "
            f"'continuous' of its {type(pipe.scheduler).__name__}, a quarter of log σ"
        )
    if not isinstance(schedule, NoiseSchedule):
        raise ValueError(
            "pipe must have a scheduler with alphas_cumprod, got a "
            f"{type(pipe.scheduler).__name__}: the gain is not offered for flow matching, "
            "whose transformers do not agree on whether a timestep is σ or 1000 σ"
        )
    return schedule


def _denoiser(pipe: Any, component: str | None) -> tuple[str, nn.Module]:
    names = ("unet", "transformer") if component is None else (component,)
    for name in names:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise ValueError(
        f"pipe must have a denoiser named {' or '.join(names)}, got a {type(pipe).__name__}: "
        "name it with component="
    )
