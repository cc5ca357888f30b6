"""diffusers: which solver and which correction suit a trained pipeline?"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from s2dm_loss.adapters.diffusers_scheduler import (
    is_the_path_of,
    path_of,
    scheduler_of,
)
from s2dm_loss.adapters.diffusers_solvers import plain_of, scheduler_from, solvers_of, steps_of
from s2dm_loss.adapters.diffusers_step import Output, StepCorrection, check_correction
from s2dm_loss.checks import check_batch, check_count, describe
from s2dm_loss.prediction import evaluating
from s2dm_loss.sampling.corrections import Correction, EpsilonScaling, ScoreRescaling, SkipGain
from s2dm_loss.sampling.progress import Progress
from s2dm_loss.sampling.result import Recommendation
from s2dm_loss.sampling.search import CorrectionSearch

# Arguments of a call that the search gives itself, and lists that hold no entry a prompt.
_OF_SEARCH = ("generator", "num_inference_steps", "return_dict", "sigmas", "timesteps")
_NOT_LISTED = (
    "callback_on_step_end_tensor_inputs",
    "skip_guidance_layers",  # SD3
    "spatio_temporal_guidance_blocks",  # LTX
)
_OVERSHOOT = 0.01  # of 1, as a resized image may have


def search_pipeline(
    pipe: Any,
    images: Tensor,
    steps: int = 10,
    *,
    schedulers: Sequence[Any] | None = None,
    corrections: Sequence[Correction] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    num_samples: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = True,
    **call: Any,
) -> PipelineRecommendation:
    """Find the solver and the correction with which a pipeline's images are nearest to yours.

        found = search_pipeline(pipe, images, steps=10, prompt=prompts)
        with found:
            pipe(prompts[0], num_inference_steps=found.steps)

    Solvers that the pipeline or its scheduler's config does not take, or that are for another
    output or noise schedule, are left out, and named on stderr. The pipeline is used as it is:
    memory stays that of one.

    Args:
        pipe: A diffusers pipeline with a `scheduler`.
        images: What its images should look like, of shape [N, C, H, W] in [0, 1], N at least 32:
            a few hundred or more, of the size that the pipeline returns. With another
            `output_type`, "latent" say, of what that is.
        steps: Network calls of one image (twice as many where guidance calls the network twice).
            The scheduler in use makes as many steps; Heun makes half as many.
        schedulers: Schedulers to try besides the one in use; by default DDIM, PNDM, DEIS, DPM++ and
            UniPC, or for flow matching Euler, Heun, DPM++ and UniPC.
        corrections: What to try with each; by default the gain, Epsilon Scaling and Score
            Rescaling, for the pipeline's schedule and prediction type.
        features: Maps images [B, C, H, W] to [B, D], in which they are compared; the features of
            your metric serve best. By default the values themselves.
        num_samples: Images of each finalist, at least 32.
        batch_size: Images in one call of the pipeline.
        seed: Seed of everything that is drawn.
        progress: As for `CorrectionSearch.recommend`. The table is printed unless it is False.
        call: Further arguments of the pipeline's call. A list or a tensor (`prompt`,
            `prompt_embeds`, `class_labels`, …) holds one entry a prompt, and each image draws one
            of them, the same for every candidate; a string is for all of them. A tuple
            (`original_size`) goes in as it is. Timesteps, σ and generators are the search's own.

    Raises:
        TypeError, ValueError: if an argument is not as said, or the pipeline fails with the
            scheduler in use; the message names it.
    """
    check_batch("images", images)
    check_count("steps", steps)
    if images.ndim < 3:
        raise ValueError(f"images must have shape [N, C, H, W], got {describe(images)}")
    schedule, kind = path_of(scheduler_of(pipe))
    if corrections is None:
        corrections = [
            one(schedule, prediction_type=kind)
            for one in (SkipGain, EpsilonScaling, ScoreRescaling)
        ]
    runner = _Runner(pipe, steps, call)
    for one in corrections:
        if one.changes_noise:
            raise ValueError(
                f"corrections must leave the start noise, which the pipeline draws, got {one!r}"
            )
        for strength in one.strengths:
            model = one.correct_model(runner.network, strength)
            check_correction(model, runner.network, schedule, kind)
    with _quiet(pipe, progress):
        solvers = runner.usable(solvers_of(pipe.scheduler, schedulers), images, progress)
        search = CorrectionSearch(
            runner.network,
            {name: partial(runner, scheduler) for name, scheduler in solvers.items()},
            images,
            corrections,
            features=features,
            num_samples=num_samples,
            batch_size=batch_size,
            noise_shape=(1,),  # a seed
            seed=seed,
        )
        found = search.recommend(progress)
    result = PipelineRecommendation(pipe, solvers, found, steps)
    if progress:
        print(result)  # noqa: T201 - the answer
    return result


class PipelineRecommendation:
    """The scheduler and the correction for a pipeline: `with found:` puts both on it.

    Attributes:
        recommendation: What the search found: candidates, intervals, cost, `plot()`.
        scheduler: The recommended scheduler.
        steps: The `num_inference_steps` for it.
    """

    def __init__(
        self, pipe: Any, schedulers: Mapping[str, Any], found: Recommendation, steps: int
    ) -> None:
        """Take the pipeline, its schedulers by name, and what a search at `steps` calls found."""
        self._pipe, self._schedulers, self._calls = pipe, dict(schedulers), steps
        self.recommendation = found
        self.scheduler: Any = self._schedulers[found.sampler]
        self.steps: int = steps_of(self.scheduler, steps)
        self._block: AbstractContextManager[None] | None = None

    def __enter__(self) -> Self:
        if self._block is not None:
            raise ValueError("the recommendation is on already: leave the first `with` before")
        network = Output()
        # Also without a correction: it drops what a pipeline hands to every scheduler.
        model = self.recommendation.correct_model(network)
        block = _corrected(self._pipe, self.scheduler, network, model)
        block.__enter__()
        self._block = block
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.__exit__(kind, error, traceback)

    def to_dict(self) -> dict[str, Any]:
        """Return what was found in JSON's own types, with the schedulers' configs."""
        schedulers = {name: plain_of(one) for name, one in self._schedulers.items()}
        return {**self.recommendation.to_dict(), "schedulers": schedulers, "calls": self._calls}

    @classmethod
    def from_dict(cls, pipe: Any, values: dict[str, Any]) -> Self:
        """Read what `to_dict` returned, for a pipeline of the same network.

        Raises:
            TypeError, ValueError: if the pipeline's scheduler is of another schedule or prediction
                type than the one that was searched with.
        """
        schedulers = {name: scheduler_from(one) for name, one in values["schedulers"].items()}
        schedule, kind = path_of(next(iter(schedulers.values())))
        own, own_kind = path_of(scheduler_of(pipe))
        if kind != own_kind or not is_the_path_of(schedule, own, kind):
            raise ValueError(
                f"values are of a pipeline of {schedule!r} and {kind!r}, and the scheduler of pipe "
                f"says {own!r} and {own_kind!r}: search with this pipeline"
            )
        found = Recommendation.from_dict(values, schedule)
        return cls(pipe, schedulers, found, values["calls"])

    @override
    def __repr__(self) -> str:
        return f"PipelineRecommendation({self.recommendation!r})"

    @override
    def __str__(self) -> str:
        return f"{self.recommendation}"


class _Runner:
    """Calls a pipeline with one scheduler and one model of its output."""

    def __init__(self, pipe: Any, steps: int, call: dict[str, Any]) -> None:
        self.pipe, self.steps, self.network = pipe, steps, Output().eval()
        self.call = {"output_type": "pt", **call}
        for name in _OF_SEARCH:
            if name in call:
                raise ValueError(f"call must leave {name} to the search, which sets it itself")
        if self.call["output_type"] != "latent" and getattr(pipe, "safety_checker", None):
            raise ValueError(
                "pipe must have no safety_checker, whose black images would count as samples: "
                "set pipe.safety_checker = None during the search"
            )
        texts = {n: v for n, v in call.items() if isinstance(v, str) and "prompt" in n}
        self.listed = {
            name: value
            for name, value in self.call.items()
            if isinstance(value, (list, Tensor)) and name not in _NOT_LISTED
        }
        lengths = {name: len(value) for name, value in self.listed.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"call's lists must have one entry a prompt, got {lengths}: as many in each"
            )
        self.prompts = next(iter(lengths.values()), 0)
        if texts and (self.prompts or "prompt" in texts):
            # Pipelines want a list of each, or of none.
            self.prompts = self.prompts or 1
            self.listed |= {name: self.prompts * [text] for name, text in texts.items()}

    def __call__(self, scheduler: Any, model: nn.Module, noise: Tensor) -> Tensor:
        """Return images [B, C, H, W] for seeds that stand in `noise`, [B, 1]."""
        seeds = (noise.flatten().float().view(torch.int32) & 0x7FFFFFFF).tolist()
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        given = dict(self.call)
        for name, values in self.listed.items():
            rows = [seed % self.prompts for seed in seeds]
            given[name] = values[rows] if isinstance(values, Tensor) else [values[i] for i in rows]
        if not self.listed and "batch_size" in inspect.signature(self.pipe.__call__).parameters:
            given["batch_size"] = len(seeds)
        steps = steps_of(scheduler, self.steps)
        with _corrected(self.pipe, scheduler, self.network, model), torch.no_grad():
            output = self.pipe(
                generator=generators, num_inference_steps=steps, return_dict=False, **given
            )[0]
        if not isinstance(output, Tensor):  # NumPy's, with the channels last
            output = torch.as_tensor(output).movedim(-1, 1)
        return output.detach()

    def usable(
        self, solvers: dict[str, Callable[[], Any]], images: Tensor, progress: Progress
    ) -> dict[str, Any]:
        """Return the solvers with which the pipeline gives an image; the first has to."""
        usable: dict[str, Any] = {}
        path, predicted = path_of(self.pipe.scheduler)
        for name, make in solvers.items():
            try:
                scheduler = make()
                own, takes = path_of(scheduler)
                if takes != predicted:
                    raise ValueError(
                        f"it takes the output for {takes!r}, and it is "
                        f"{predicted!r}: make it with from_config(pipe.scheduler.config)"
                    )
                if not is_the_path_of(own, path, predicted):
                    raise ValueError(f"it is on {own!r}, and the scheduler in use on {path!r}")
                image = self(scheduler, self.network, torch.ones(1, 1))
                if not bool(image.isfinite().all()):
                    raise ValueError("its image is not finite")
                _check_images(images, image)
                usable[name] = scheduler
            except Exception as error:
                if not usable:
                    raise
                if progress:
                    reason = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
                    print(f"left out: {name} ({reason})", file=sys.stderr)  # noqa: T201
        return usable


def _check_images(images: Tensor, own: Tensor) -> None:
    """Raise ValueError unless images have the size of a pipeline's own, and values in [0, 1]."""
    if images.shape[1:] != own.shape[1:]:
        raise ValueError(
            f"images must have the size that the pipeline returns, {tuple(own.shape[1:])}, got "
            f"{tuple(images.shape[1:])}"
        )
    # Not where the pipeline's own are something else, latents say.
    (low, high), (own_low, own_high) = images.aminmax(), own.aminmax()
    if min(low, 1 - high) < -_OVERSHOOT and own_low >= 0 and own_high <= 1:
        raise ValueError(
            f"images must lie in [0, 1] as the pipeline's do, got values from {low:.3g} to "
            f"{high:.3g}: (images + 1) / 2, images / 255 or images.clamp(0, 1)"
        )


@contextmanager
def _corrected(pipe: Any, scheduler: Any, network: Output, model: nn.Module) -> Iterator[None]:
    """Put a scheduler on a pipeline, with a model of its network's output at each step."""
    handle = StepCorrection(scheduler, network, model)
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        yield
        handle.warn_of(pipe, stacklevel=4)
    finally:
        handle.remove()
        pipe.scheduler = before


@contextmanager
def _quiet(pipe: Any, progress: Progress) -> Iterator[None]:
    """Put a pipeline's networks into evaluation mode, without its own progress bars, and back."""
    config = dict(getattr(pipe, "_progress_bar_config", {}))
    parts = {n: p for n, p in pipe.components.items() if isinstance(p, nn.Module)}
    training = [name for name, part in parts.items() if part.training]
    if training and progress:
        said = f"{', '.join(training)}: put into evaluation mode, and back at the end"
        print(said, file=sys.stderr)  # noqa: T201
    with ExitStack() as stack:
        for part in parts.values():
            stack.enter_context(evaluating(part))
        pipe.set_progress_bar_config(disable=True)
        try:
            yield
        finally:
            pipe.set_progress_bar_config(**config)
