"""diffusers: a correction on a trained pipeline, with no training.

    with shrink_pipeline(pipe, skip_set=49):
        images = pipe(num_inference_steps=10).images

A correction stands at `scheduler.step`, which every pipeline calls with the network's output, t
and the latents: the one place that knows σ, whatever the network is called with. So one mechanism
serves ε, v, x_0 and flow, every denoiser, compiled, offloaded or quantised, and several of them
(Wan 2.2). The output there is the guided one. Guidance adds outputs up with weights whose sum is 1,
and ε̂ is linear in the output, so scaling the guided ε̂ is the same as scaling each ε̂ in it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack, override

from s2dm_loss.adapters.diffusers_scheduler import is_flow, is_the_path_of, output_of, path_of
from s2dm_loss.checks import check_number, describe
from s2dm_loss.coefficients import GainOptions
from s2dm_loss.prediction import PredictionType
from s2dm_loss.sampling.corrections import Correction
from s2dm_loss.sampling.result import Recommendation
from s2dm_loss.sampling.scaled_model import ScaledModel
from s2dm_loss.schedule import Schedule
from s2dm_loss.skip_set import Skips

__all__ = ["PipelineCorrection", "correct_pipeline", "shrink_pipeline"]


def shrink_pipeline(
    pipe: Any, skip_set: Skips, **options: Unpack[GainOptions]
) -> PipelineCorrection:
    """Give a trained pipeline the gain s(t) that S²-DM's loss would have taught it.

    Each noise prediction becomes s(t) ε̂, until the returned handle is removed; in a `with`
    statement, until its end:

        with shrink_pipeline(pipe, skip_set=49):
            images = pipe(num_inference_steps=10).images

    Args:
        pipe: A diffusers pipeline with a `scheduler`.
        skip_set: The skips, as for `SkipStepLoss`: 49 on 1,000 timesteps, 0.05 on flow matching. A
            larger skip is a smaller s(t).
        options: tau, estimator and max_c2, as for `SkipStepLoss`. The prediction type is the
            scheduler's.

    Returns:
        The handle that takes the gain off again.

    Raises:
        TypeError, ValueError: if an argument is not as said, if the scheduler has no gain (EDM,
            times that are log σ), or if the pipeline has a correction already.
    """

    def with_gain(model: nn.Module, schedule: Schedule, kind: PredictionType) -> nn.Module:
        given: GainOptions = {"prediction_type": kind}
        given.update(options)
        return ScaledModel.with_gain(model, schedule, skip_set, **given)

    return PipelineCorrection(pipe, with_gain)


def correct_pipeline(
    pipe: Any, correction: Correction | Recommendation, strength: float | None = None
) -> PipelineCorrection:
    """Put a correction on a pipeline, until the returned handle is removed.

        schedule = schedule_of(pipe.scheduler)
        with correct_pipeline(pipe, ScoreRescaling(schedule), 1.05):
            images = pipe(num_inference_steps=10).images

    What a search has found goes in without a strength, `correct_pipeline(pipe, found)`; if it found
    that no correction is better, nothing is changed.

    Args:
        pipe: A diffusers pipeline with a `scheduler`.
        correction: The correction, for the pipeline's schedule and prediction type ("flow" for flow
            matching), or what a search returned.
        strength: Its strength; left out for what a search returned.

    Raises:
        TypeError: if an argument is not as said.
        ValueError: if the correction is for another schedule or prediction type than the
            scheduler's, if it scales the start noise (which goes in as `latents=`), if it is one of
            your own that does more than to scale what the model returns, or if the pipeline has a
            correction already.
    """
    if isinstance(correction, Recommendation):
        if strength is not None:
            raise TypeError(f"strength must be left out for a Recommendation, got {strength!r}")
        correct_model, correct_noise = correction.correct_model, correction.correct_noise
    elif isinstance(correction, Correction):
        if strength is None:
            raise TypeError("strength must be given with a correction, such as 49 with SkipGain")
        check_number("strength", strength, -torch.inf, torch.inf, open_ends=True)
        correct_model = partial(correction.correct_model, strength=strength)
        correct_noise = partial(correction.correct_noise, strength=strength)
    else:
        raise TypeError(
            "correction must be a Correction with a strength, or what a search returned, got "
            f"{describe(correction)}"
        )
    noise = torch.linspace(-2, 2, 4, device="cpu")
    if not torch.equal(correct_noise(noise.clone()), noise):
        raise ValueError(
            f"correction changes the start noise, which a pipeline draws itself, got {correction!r}"
            ": draw the latents, and pass `latents=correction.correct_noise(latents, strength)`"
        )
    return PipelineCorrection(pipe, lambda model, *_: correct_model(model))


class PipelineCorrection:
    """A correction on a pipeline's scheduler, until it is removed.

    Attributes:
        active: Whether it is on.
    """

    def __init__(
        self,
        pipe: Any,
        make: Callable[[nn.Module, Schedule, PredictionType], nn.Module],
    ) -> None:
        """Put the correction on.

        Args:
            pipe: The pipeline.
            make: Called with a model, the scheduler's schedule and its prediction type: returns a
                `ScaledModel` of the model, or the model where nothing is to be changed.
        """
        if not hasattr(pipe, "scheduler"):
            raise TypeError(
                f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}"
            )
        self._pipe, self._scheduler = pipe, pipe.scheduler
        schedule, self._prediction_type = path_of(pipe.scheduler)
        network = nn.Identity()  # in the place of the pipeline's own, whose output comes to `step`
        model = make(network, schedule, self._prediction_type)
        self._scaled: ScaledModel | None = None
        if model is not network:
            self._scaled = _checked(model, network, schedule, self._prediction_type)
        self._step = _CorrectedStep(pipe.scheduler, self)
        self._before = pipe.scheduler.__dict__.get("step")
        if self._scaled is not None and getattr(self._before, "is_active", False):
            raise ValueError(
                f"pipe's {type(pipe.scheduler).__name__} has a correction already, and two would "
                "multiply: remove the first handle. Another pipeline that shares the scheduler "
                "takes its own, `type(scheduler).from_config(scheduler.config)`"
            )
        self.active: bool = True
        if self._scaled is not None:
            pipe.scheduler.step = self._step

    def remove(self) -> None:
        """Take the correction off; once is enough, twice does no harm."""
        self.active = False
        if self._scheduler.__dict__.get("step") is not self._step:
            return  # taken off before, or wrapped by another, who will find it without effect
        if self._before is None:
            del self._scheduler.step
        else:
            self._scheduler.step = self._before

    def __enter__(self) -> Self:
        if not self.active:
            raise ValueError("the correction has been removed: make another one for this `with`")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()
        exchanged = getattr(self._pipe, "scheduler", None) is not self._scheduler
        if kind is None and exchanged and self._scaled is not None:
            warnings.warn(
                "pipe's scheduler was exchanged while the correction was on, and the new one had "
                "none: put the correction on after the exchange",
                stacklevel=2,
            )

    def _corrected(self, scheduler: Any, output: Any, t: Any, sample: Tensor) -> Any:
        """Return a network's output, as `step` has it, with its noise prediction scaled."""
        assert self._scaled is not None  # noqa: S101 - for the type checker
        if output_of(scheduler) != self._prediction_type:
            raise ValueError(
                f"scheduler's prediction_type was {self._prediction_type!r} and is "
                f"{output_of(scheduler)!r}: remove the correction, and put it on anew"
            )
        if is_flow(scheduler):
            if scheduler.step_index is None:
                scheduler._init_step_index(t)
            # The rounding of a shift can lead past 1.
            sigma = scheduler.sigmas[scheduler.step_index].clamp(0, 1)
            return self._scaled.rescale(output, sample, sigma)
        if self._prediction_type != "epsilon":
            # Euler's x_0 + σ ε, say, as the network has seen it.
            sample = scheduler.scale_model_input(sample, t)
        return self._scaled.rescale(output, sample, torch.as_tensor(t).round().long())

    def __deepcopy__(self, memo: object) -> Self:
        """Return the handle itself: it is for the copy of its scheduler as well."""
        return self

    @override
    def __reduce__(self) -> tuple[Callable[[], PipelineCorrection], tuple[()]]:
        """Keep nothing: a scheduler is pickled with its `step`, and the loaded one has its own."""
        return _removed, ()

    @override
    def __repr__(self) -> str:
        what = "nothing" if self._scaled is None else self._scaled.extra_repr()
        state = "active" if self.active else "removed"
        return f"{type(self).__name__}({what}, {type(self._scheduler).__name__}, {state})"


class _CorrectedStep:
    """`scheduler.step` with a correction of the output before it."""

    def __init__(self, scheduler: Any, handle: PipelineCorrection) -> None:
        self.scheduler, self.handle, self.step = scheduler, handle, scheduler.step
        self.__signature__ = inspect.signature(scheduler.step)  # pipelines ask whether it has eta

    @property
    def is_active(self) -> bool:
        """Whether it corrects."""
        return self.handle.active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_active:
            return self.step(*args, **kwargs)
        call = self.__signature__.bind(*args, **kwargs)
        given = call.arguments
        if given.get("per_token_timesteps") is not None:
            raise ValueError(
                "scheduler.step must have one t for each call, got per_token_timesteps: a "
                "correction is not offered for them"
            )
        given["model_output"] = self.handle._corrected(
            self.scheduler, given["model_output"], given["timestep"], given["sample"]
        )
        return self.step(*call.args, **call.kwargs)


def _removed() -> PipelineCorrection:
    handle = object.__new__(PipelineCorrection)
    handle._scheduler = handle._scaled = None
    handle.active = False
    return handle


def _checked(
    model: nn.Module, network: nn.Module, schedule: Schedule, prediction_type: PredictionType
) -> ScaledModel:
    """Return the model of a correction, or say why it is none for a pipeline."""
    if not isinstance(model, ScaledModel) or model.model is not network:
        inner = f" of a {type(model.model).__name__}" if isinstance(model, ScaledModel) else ""
        raise ValueError(
            f"correction makes a {type(model).__name__}{inner} of the network; on a pipeline it "
            "must make a ScaledModel of the network itself, which scales what that returns"
        )
    if model.prediction_type != prediction_type:
        raise ValueError(
            f"correction is for prediction_type {model.prediction_type!r}, and the pipeline's is "
            f"{prediction_type!r}: make it with prediction_type={prediction_type!r}"
        )
    if not is_the_path_of(model.schedule, schedule, prediction_type):
        raise ValueError(
            f"correction is for {model.schedule!r}, and the pipeline's is {schedule!r}: make it "
            "with schedule_of(pipe.scheduler)"
        )
    return model
