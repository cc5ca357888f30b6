"""diffusers: a correction on a trained pipeline, with no training.

    with shrink_pipeline(pipe, skip_set=49):
        images = pipe(num_inference_steps=10).images

How it is done is in `diffusers_step`; which solver and which correction suit a pipeline,
`search_pipeline` finds out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from typing_extensions import Self, Unpack, override

from s2dm_loss.adapters.diffusers_scheduler import path_of, scheduler_of
from s2dm_loss.adapters.diffusers_solvers import short_name
from s2dm_loss.adapters.diffusers_step import Output, StepCorrection, check_correction
from s2dm_loss.checks import check_number, describe
from s2dm_loss.coefficients import GainOptions
from s2dm_loss.prediction import PredictionType
from s2dm_loss.sampling.corrections import Correction, StoredCorrection
from s2dm_loss.sampling.result import Recommendation
from s2dm_loss.sampling.scaled_model import ScaledModel
from s2dm_loss.schedule import Schedule
from s2dm_loss.skip_set import Skips


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
        options: tau, estimator, weighting and max_c2, as for `SkipStepLoss`. The prediction type is
            the scheduler's.

    Returns:
        The handle that takes the gain off again.

    Raises:
        TypeError, ValueError: if an argument is not as said, if the scheduler has no gain (EDM,
            times that are log σ, Cosmos-Predict2), or if the pipeline has a correction already.
    """

    def with_gain(model: nn.Module, schedule: Schedule, kind: PredictionType) -> nn.Module:
        given: GainOptions = {"prediction_type": kind, **options}
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
    that no correction is better, nothing is changed. A warning says if it has tried the pipeline's
    scheduler, and recommends another.

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
        _check_sampler(correction, scheduler_of(pipe))
        strength, correction = correction.strength, correction.correction
    if isinstance(correction, StoredCorrection):
        correction = correction.on(path_of(scheduler_of(pipe))[0])
    elif not isinstance(correction, Correction):
        raise TypeError(
            "correction must be a Correction with a strength, or a Recommendation, got "
            f"{describe(correction)}: what search_pipeline returned goes on by `with found:`"
        )
    if strength is None:
        raise TypeError("strength must be given with a correction, such as 49 with SkipGain")
    check_number("strength", strength, -torch.inf, torch.inf, open_ends=True)
    if correction.changes_noise:
        raise ValueError(
            f"correction changes the start noise, which a pipeline draws itself, got {correction!r}"
            ": draw the latents, and pass `latents=correction.correct_noise(latents, strength)`"
        )
    change = partial(correction.correct_model, strength=strength)
    return PipelineCorrection(pipe, lambda model, *_: change(model))


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
        self._pipe, self._scheduler = pipe, scheduler_of(pipe)
        path, network = path_of(self._scheduler), Output()
        model = make(network, *path)
        self._step: StepCorrection | None = None
        self._says = "nothing"
        if model is not network:
            self._says = check_correction(model, network, *path).extra_repr()
            self._step = StepCorrection(self._scheduler, network, model)
        self.active: bool = True
        self._entered = False

    def remove(self) -> None:
        """Take the correction off, and warn if it was never used; twice does no harm."""
        self._remove(warn=True)

    def _remove(self, *, warn: bool) -> None:
        warn, self.active = warn and self.active, False
        if self._step is not None:
            self._step.remove()
            if warn:
                self._step.warn_of(self._pipe, stacklevel=3)

    def __enter__(self) -> Self:
        if not self.active:
            raise ValueError("the correction has been removed: make another one for this `with`")
        if self._entered:  # the end of the inner block would take it off for the rest of the outer
            raise ValueError("the correction is on already: leave the first `with` before")
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove(warn=kind is None)

    @override
    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"{type(self).__name__}({self._says}, {type(self._scheduler).__name__}, {state})"


def _check_sampler(found: Recommendation, scheduler: Any) -> None:
    """Warn if a search has tried the scheduler in use, and recommends another one."""
    name = short_name(scheduler)
    if name in found.cost.calls and found.sampler.partition(" ")[0] != name:
        warnings.warn(
            f"correction was found for {found.sampler}, and the pipeline's scheduler is {name}: "
            "exchange the scheduler first, or search with this one alone",
            stacklevel=3,
        )
