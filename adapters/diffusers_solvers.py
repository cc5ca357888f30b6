"""diffusers: the solvers that a pipeline can be searched with, and how many steps each takes."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
# What other schedulers make of the σ of flow matching by these is none.
_FLOW |= dict.fromkeys(("use_beta_sigmas", "use_exponential_sigmas", "use_karras_sigmas"), False)
_FLOWS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": _FLOW,
    "UniPCMultistepScheduler": _FLOW,
}

# What a config says of the network, and must not be another class's default.
_OF_NETWORK = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type")


def solvers_of(scheduler: Any, given: Sequence[Any] | None) -> dict[str, Callable[[], Any]]:
    """Return what makes copies of the scheduler in use, which comes first, and of those to try.

    By name. Making one may raise, as diffusers does where a config is none for a class.
    """
    solvers = {short_name(scheduler): scheduler}
    if given is not None:
        if not isinstance(given, Sequence) or any(isinstance(one, type) for one in given):
            raise TypeError(
                "schedulers must be a list of schedulers, each made with "
                f"from_config(pipe.scheduler.config), got {describe(given)}"
            )
        for one in given:
            name, others = short_name(one), count(2)
            while name in solvers and _settings(solvers[name]) != _settings(one):
                name = f"{short_name(one)} {next(others)}"
            solvers.setdefault(name, one)
    makers: dict[str, Callable[[], Any]] = {
        name: partial(_copied, one) for name, one in solvers.items()
    }
    if given is None:
        import diffusers

        for name, options in (_FLOWS if is_flow(scheduler) else _DIFFUSION).items():
            kind = getattr(diffusers, name)
            makers.setdefault(short_name(kind), partial(_like, scheduler, kind, options))
    return makers


def _copied(scheduler: Any) -> Any:
    """Return a copy of a scheduler, or say why there is none."""
    if inspect.isfunction(vars(scheduler).get("step")):
        raise ValueError(
            f"scheduler must have the step of its class, got a {type(scheduler).__name__} with a "
            "function in its place, which would step this scheduler in each copy: del "
            "scheduler.step, and set it again after the search"
        )
    return copy.deepcopy(scheduler)


def _like(scheduler: Any, kind: type[Any], options: dict[str, Any]) -> Any:
    """Return a scheduler of another class for the pipeline of this one.

    It is `kind.from_config(scheduler.config)`, where `kind` has its own default for what the config
    leaves at one. Kept besides are what the network was trained with, what was changed later (by
    StableDiffusionPipeline, say), and the shift of a flow. DDIM clips only where this one does.
    """
    config, takes, own = scheduler.config, _parameters(kind), _parameters(type(scheduler))
    unset = {*config.get("_use_default_values", ())}.intersection(own).difference(_OF_NETWORK)
    known = {n: v for n, v in config.items() if n not in unset or v != own[n].default}
    known["clip_sample"] = bool(config.get("clip_sample"))
    known["shift"] = known["flow_shift"] = _shift_of(scheduler)
    return kind(**{name: v for name, v in {**known, **options}.items() if name in takes})


def _shift_of(scheduler: Any) -> float:
    """Return the shift of a flow, which has two names in configs, and may have been set later."""
    if hasattr(type(scheduler), "shift"):
        return float(scheduler.shift)
    name = "flow_shift" if hasattr(scheduler, "alphas_cumprod") else "shift"
    return float(scheduler.config.get(name, 1.0))


def _parameters(kind: type[Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.__init__).parameters


def short_name(scheduler: Any) -> str:
    """Return a scheduler's name in the table."""
    name = (scheduler if isinstance(scheduler, type) else type(scheduler)).__name__
    for end in ("Scheduler", "Discrete", "Multistep"):
        name = name.removesuffix(end)
    return name


def _settings(scheduler: Any) -> dict[str, str]:
    settings = {name: str(v) for name, v in scheduler.config.items() if not name.startswith("_")}
    return {**settings, "set shift": str(_shift_of(scheduler))}


def steps_of(scheduler: Any, calls: int) -> int:
    """Return the number of steps that make as many network calls, or one less."""
    return (calls + 1) // 2 if getattr(scheduler, "order", 1) == 2 else calls


def plain_of(scheduler: Any) -> dict[str, Any]:
    """Return what makes a scheduler again, as JSON's own types."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)  # an infinity is the default, which it is made with again
        return isinstance(value, (str, int, list, tuple, type(None)))

    # Not `_use_default_values`: from_config leaves out what it names, also what was changed later.
    takes = _parameters(type(scheduler))
    config = {n: v for n, v in scheduler.config.items() if n in takes}
    # `trained_betas` may be NumPy's.
    config = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in config.items()}
    config = {name: value for name, value in config.items() if is_plain(value)}
    plain = {"class": type(scheduler).__name__, "config": config}
    # Set after the config's own, which other values were made with.
    return {**plain, "shift": _shift_of(scheduler)} if hasattr(scheduler, "set_shift") else plain


def scheduler_from(plain: dict[str, Any]) -> Any:
    """Return the scheduler that `plain_of` has kept."""
    import diffusers

    scheduler = getattr(diffusers, plain["class"]).from_config(plain["config"])
    if "shift" in plain:
        scheduler.set_shift(plain["shift"])
    return scheduler
