"""diffusers: a changed model in the place of a scheduler's network, at `scheduler.step`.

Every pipeline calls `scheduler.step` with the network's output, t and the latents: the one place
that knows σ, whatever the network is called with. So one mechanism serves ε, v, x_0 and flow, every
denoiser, compiled, offloaded or quantised, and several of them (Wan 2.2). The output there is the
guided one. Guidance adds outputs up with weights whose sum is 1, and ε̂ is linear in the output, so
scaling the guided ε̂ is the same as scaling each ε̂ in it.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from s2dm_loss.adapters.diffusers_scheduler import is_flow, is_the_path_of, output_of
from s2dm_loss.prediction import PredictionType
from s2dm_loss.sampling.scaled_model import ScaledModel
from s2dm_loss.schedule import Schedule

# What a pipeline hands to every scheduler, and not every `step` takes.
_OPTIONAL = ("eta", "generator", "use_clipped_model_output")


class Output(nn.Module):
    """Stands for a pipeline's network: returns the output that has come to `scheduler.step`."""

    def __init__(self) -> None:
        """Make one; copies of a scheduler may step with it in threads, each with its own output."""
        super().__init__()
        self.here: threading.local = threading.local()

    @override
    def forward(self, x_t: Tensor, t: Tensor) -> Any:
        del x_t, t
        return self.here.output


def check_correction(
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


class StepCorrection:
    """A model of an `Output`, called in each `scheduler.step`, until it is removed.

    Attributes:
        active: Whether it is on.
        used: Whether a step was taken while it was on.
    """

    scheduler: Any = None
    active: bool = False
    used: bool = False

    def __init__(self, scheduler: Any, network: Output, model: nn.Module) -> None:
        """Put the model on a scheduler.

        Raises:
            ValueError: if the scheduler has one already.
        """
        self.scheduler = scheduler
        self._network, self._model = network, model
        self._kind = output_of(scheduler)
        self._before = scheduler.__dict__.get("step")
        if any(one.handle.active for one in _steps_in(scheduler.step)):
            raise ValueError(
                f"pipe's {type(scheduler).__name__} has a correction already, and two would "
                "multiply: remove the first handle. Another pipeline that shares the scheduler "
                "takes its own, `type(scheduler).from_config(scheduler.config)`"
            )
        self._step = _Step(scheduler, self)
        scheduler.step = self._step
        self.active = True

    def remove(self) -> None:
        """Take it off; once is enough, twice does no harm."""
        self.active = False
        if self.scheduler is None or self.scheduler.__dict__.get("step") is not self._step:
            return  # taken off before, or wrapped by another, who will find it without effect
        if self._before is None:
            del self.scheduler.step
        else:
            self.scheduler.step = self._before

    def warn_of(self, pipe: Any, stacklevel: int) -> None:
        """Warn if nothing was corrected, as the pipeline took another scheduler or no step."""
        now = pipe.scheduler
        on = any(one.handle is self for one in _steps_in(getattr(now, "step", None)))
        if now is not self.scheduler and not on:
            warnings.warn(
                "pipe's scheduler was exchanged while the correction was on, and the new one had "
                "none: put the correction on after the exchange",
                stacklevel=stacklevel + 1,
            )
        elif not self.used:
            warnings.warn(
                "scheduler.step was not called while the correction was on, so nothing was "
                "corrected: a pipeline that steps in another way (ParaDiGMS by "
                "batch_step_no_noise) or with another scheduler takes none",
                stacklevel=stacklevel + 1,
            )

    def corrected(self, scheduler: Any, output: Any, t: Any, sample: Tensor) -> Any:
        """Return the corrected output for one call of `step`."""
        kind = output_of(scheduler)
        if kind != self._kind:
            raise ValueError(
                f"scheduler's prediction_type was {self._kind!r} and is {kind!r}: remove the "
                "correction, and put it on anew"
            )
        if is_flow(scheduler):
            if scheduler.step_index is None:
                scheduler._init_step_index(t)
                _check_sigmas(scheduler)
            # The rounding of a shift can lead past 1.
            time = scheduler.sigmas[scheduler.step_index].clamp(0, 1)
        else:
            time = torch.as_tensor(t).round().long()
            _check_scaled(scheduler, sample, t)
            if kind != "epsilon":
                # Euler's x_0 + σ ε, say, as the network has seen it.
                sample = scheduler.scale_model_input(sample, t)
        self._network.here.output = output
        try:
            return self._model(sample, time)
        finally:
            del self._network.here.output

    def __deepcopy__(self, memo: object) -> Self:
        """Return the handle itself: it is for the copy of its scheduler as well."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Keep nothing: a scheduler is pickled with its `step`, and the loaded one has its own."""
        return {}


class _Step:
    """`scheduler.step` with a correction of the output before it."""

    def __init__(self, scheduler: Any, handle: StepCorrection) -> None:
        self.scheduler, self.handle, self.step = scheduler, handle, scheduler.step
        self.__signature__ = inspect.signature(scheduler.step)  # pipelines ask whether it has eta
        takes = self.__signature__.parameters
        takes_all = any(one.kind is one.VAR_KEYWORD for one in takes.values())
        self._left_out = {} if takes_all else {*_OPTIONAL}.difference(takes)
        if not takes.keys() >= {"model_output", "timestep", "sample"}:
            raise ValueError(
                "scheduler.step must name model_output, timestep and sample, got a step of "
                f"{self.__signature__}: wrap it with functools.wraps"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.handle.active:
            return self.step(*args, **kwargs)
        self.handle.used = True
        kwargs = {n: v for n, v in kwargs.items() if n not in self._left_out}
        call = self.__signature__.bind(*args, **kwargs)
        given = call.arguments
        if given.get("per_token_timesteps") is not None:
            raise ValueError(
                "scheduler.step must have one t for each call, got per_token_timesteps: a "
                "correction is not offered for them"
            )
        given["model_output"] = self.handle.corrected(
            self.scheduler, given["model_output"], given["timestep"], given["sample"]
        )
        return self.step(*call.args, **call.kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Step:
        """Return one for the copy of its scheduler.

        Where the scheduler's attributes alone are copied it is itself: StableDiffusionPanorama
        keeps a copy of them for each view, and puts them back into the scheduler.
        """
        if id(self.scheduler) not in memo:
            return self
        copied = object.__new__(_Step)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def _steps_in(step: Any) -> Iterator[_Step]:
    """Yield the corrected steps that a scheduler's `step` is, or wraps as functools.wraps does."""
    while step is not None:
        if isinstance(step, _Step):
            yield step
        step = getattr(step, "step" if isinstance(step, _Step) else "__wrapped__", None)


def _check_sigmas(scheduler: Any) -> None:
    """Raise ValueError unless σ goes from 1 to 0, or from 0 to 1 where it counts the data."""
    sigmas, falls = scheduler.sigmas, scheduler.sigmas.diff()
    falls = -falls if output_of(scheduler) == "velocity" else falls
    if not bool((sigmas.max() < 1.001) & (falls < 1e-6).all()):
        raise ValueError(
            "scheduler must have the σ of flow matching, from 1 to 0, got values from "
            f"{float(sigmas[0]):.4g} over {float(sigmas.max()):.4g} to {float(sigmas[-1]):.4g}: "
            "set use_beta_sigmas, use_exponential_sigmas and use_karras_sigmas to False"
        )


def _check_scaled(scheduler: Any, sample: Tensor, t: Any) -> None:
    """Raise ValueError if the scheduler scales the network's input, and the pipeline left that out.

    Where a scheduler has a `step_index`, `scale_model_input` has set it before the first step.
    """
    left_out = getattr(scheduler, "step_index", 0) is None
    if left_out and scheduler.scale_model_input(sample, t) is not sample:
        raise ValueError(
            f"pipe must call scale_model_input, as a {type(scheduler).__name__} asks, and does "
            "not: its images would be wrong. Take a scheduler whose input is x_t as it is: DDIM, "
            "PNDM, DEIS, DPM++ or UniPC"
        )
