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
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from s2dm_loss.adapters.diffusers_scheduler import is_flow, output_of

# What a pipeline hands to every scheduler, and not every `step` takes.
_OPTIONAL = ("eta", "generator", "use_clipped_model_output")


class Output(nn.Module):
    """Stands for a pipeline's network: returns the output that has come to `scheduler.step`."""

    output: Any

    @override
    def forward(self, x_t: Tensor, t: Tensor) -> Any:
        del x_t, t
        return self.output


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
        if isinstance(self._before, _Step) and self._before.handle.active:
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
            # The rounding of a shift can lead past 1.
            time = scheduler.sigmas[scheduler.step_index].clamp(0, 1)
        else:
            time = torch.as_tensor(t).round().long()
            _check_scaled(scheduler, sample, t)
            if kind != "epsilon":
                # Euler's x_0 + σ ε, say, as the network has seen it.
                sample = scheduler.scale_model_input(sample, t)
        self._network.output = output
        try:
            return self._model(sample, time)
        finally:
            self._network.output = None

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.handle.active:
            return self.step(*args, **kwargs)
        self.handle.used = True
        takes = self.__signature__.parameters
        kwargs = {n: v for n, v in kwargs.items() if n in takes or n not in _OPTIONAL}
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
