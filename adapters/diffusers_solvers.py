"""diffusers: the solvers that a pipeline can be searched with, and how many steps each takes."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from itertools import count
from typing import Any

from s2dm_loss.adapters.diffusers_scheduler import is_flow
from s2dm_loss.checks import describe

# Names of solvers, and what each needs besides the config of the scheduler in use.
_DIFFUSION: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
}
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
_FLOWS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": _FLOW,
    "UniPCMultistepScheduler": _FLOW,
}


def solvers_of(scheduler: Any, given: Sequence[Any] | None) -> dict[str, Any]:
    """Return copies of the scheduler in use, which comes first, and of those to try, by name."""
    solvers = {_short(scheduler): copy.deepcopy(scheduler)}
    if given is not None:
        if not isinstance(given, Sequence) or any(isinstance(one, type) for one in given):
            raise TypeError(
                "schedulers must be a list of schedulers, each made with "
                f"from_config(pipe.scheduler.config), got {describe(given)}"
            )
        for one in given:
            name, others = _short(one), count(2)
            while name in solvers and _settings(solvers[name]) != _settings(one):
                name = f"{_short(one)} {next(others)}"
            solvers.setdefault(name, copy.deepcopy(one))
        return solvers
    import diffusers

    flow, config = is_flow(scheduler), dict(scheduler.config)
    if flow:  # its shift has two names
        shift = config.get("flow_shift", config.get("shift", 1.0))
        config = {**config, "shift": shift, "flow_shift": shift}
    for name, options in (_FLOWS if flow else _DIFFUSION).items():
        kind = getattr(diffusers, name)
        if _short(kind) not in solvers:
            takes = inspect.signature(kind.__init__).parameters
            known = {n: v for n, v in {**config, **options}.items() if n in takes}
            solvers[_short(kind)] = kind.from_config(known)
    return solvers


def _short(scheduler: Any) -> str:
    """Return a scheduler's name in the table."""
    name = (scheduler if isinstance(scheduler, type) else type(scheduler)).__name__
    for end in ("Scheduler", "Discrete", "Multistep"):
        name = name.removesuffix(end)
    return name


def _settings(scheduler: Any) -> dict[str, str]:
    return {name: str(v) for name, v in scheduler.config.items() if not name.startswith("_")}


def steps_of(scheduler: Any, calls: int) -> int:
    """Return the number of steps that make as many network calls, or one less."""
    return (calls + 1) // 2 if getattr(scheduler, "order", 1) == 2 else calls


def plain_config(scheduler: Any) -> dict[str, Any]:
    """Return what of a scheduler's config JSON has, which is all but defaults."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)  # an infinity is the default, which it is made with again
        return isinstance(value, (str, int, list, tuple, type(None)))

    # `trained_betas` may be NumPy's.
    config = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in scheduler.config.items()}
    return {name: value for name, value in config.items() if is_plain(value)}
