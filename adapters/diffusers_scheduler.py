"""diffusers: what a scheduler says of the noise and of the network's output.

Trainers that are built on diffusers' schedulers read them through here as well.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from s2dm_loss.checks import check_choice
from s2dm_loss.continuous import ContinuousSchedule
from s2dm_loss.prediction import PredictionType
from s2dm_loss.schedule import NoiseSchedule, Schedule

__all__ = ["prediction_type_of", "schedule_of"]

CONFIGURED = ("epsilon", "v_prediction", "sample")

# More than the relative difference of ᾱ between diffusers' float32 tables and the same schedule in
# float64; measured over its schedulers and schedules it stays below 4e-5.
_FLOAT32_ROUNDING = 1e-4
# Options that change the path, which few schedulers take, and at which they change nothing: Mochi's
# and CogVideoX's.
_OF_SOME = {"invert_sigmas": False, "snr_shift_scale": 1.0}


def schedule_of(scheduler: Any) -> Schedule:
    """Return the schedule that a diffusers scheduler noises with, as this library's own.

    Where the config's `beta_schedule` gives the scheduler's table to float32 rounding, it is
    rebuilt in float64, since c at k = 1 loses four digits in float32; else the table is taken as
    it is. Zero terminal SNR is ᾱ = 0 at the end, also where the scheduler writes 2^-24 for it. With
    `invert_sigmas` (Mochi) the time is its σ too, which counts the data: they lie at 1.

    Raises:
        TypeError: if `scheduler` is no diffusers scheduler.
        ValueError: if its path is neither variance-preserving nor straight; the message gives the
            reason.
    """
    name = type(scheduler).__name__
    config = getattr(scheduler, "config", None)
    if config is None or not callable(getattr(scheduler, "set_timesteps", None)):
        raise TypeError(f"scheduler must be a diffusers scheduler, got a {name}")
    _check_ignored(scheduler)
    if name.startswith("FlowMatch"):
        return ContinuousSchedule.flow(data_at=1 if config.get("invert_sigmas") else 0)
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
    table = torch.as_tensor(table).detach().to("cpu", torch.float64, copy=True)
    # By its end, since a config may name the option of another scheduler, which this one ignores.
    if config.get("rescale_betas_zero_snr") and table[-1] == 2**-24:
        table[-1] = 0.0
    exact = _rebuilt(config, table.numel())
    if exact is not None and table[-1] == 0:  # also where a trainer has rescaled the table itself
        exact = exact.rescale_zero_terminal_snr()
    if exact is not None and is_the_table_of(exact, table):
        return exact
    return NoiseSchedule.from_alphas_cumprod(table)


def _check_ignored(scheduler: Any) -> None:
    """Raise ValueError if a scheduler does not do what its config, made for another one, asks for.

    `from_config` keeps such options. The scheduler then samples on another path than the network's.
    """
    takes = inspect.signature(type(scheduler).__init__).parameters
    for option, neutral in _OF_SOME.items():
        value = scheduler.config.get(option, neutral)
        if value != neutral and option not in takes:
            raise ValueError(
                f"scheduler must do what its config says, got {option}={value!r} of a "
                f"{type(scheduler).__name__}, which ignores it and samples on another path than "
                "the network was trained on: take the pipeline's own class of scheduler"
            )


def scheduler_of(pipe: Any) -> Any:
    """Return a pipeline's scheduler, or raise TypeError."""
    if not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"pipe must be a diffusers pipeline with a scheduler, got {type(pipe).__name__}"
        )
    return pipe.scheduler


def path_of(scheduler: Any) -> tuple[Schedule, PredictionType]:
    """Return the path that a scheduler samples on, and what its `step` takes the output for.

    Besides the schedulers of `schedule_of` these are the diffusion schedulers set to flow matching,
    with `use_flow_sigmas` and `flow_prediction` (Wan's UniPC).

    Raises:
        TypeError: if `scheduler` is no diffusers scheduler.
        ValueError: if its path is none of these; the message gives the reason.
    """
    if is_flow(scheduler):
        _check_ignored(scheduler)
        sigma_max = scheduler.config.get("sigma_max") or 0
        # Cosmos-Predict2 writes it there. UniPC has its own: of σ / (1 - σ) (Cosmos-Predict2.5).
        if sigma_max > 1 and not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                "scheduler must have the σ of flow matching, from 0 to 1, got a "
                f"{type(scheduler).__name__} with sigma_max {sigma_max}: its "
                "pipeline (Cosmos-Predict2) samples x_0 + σ ε with it, and hands the noise to "
                "`step`. ScaledModel corrects its denoiser in a loop of your own"
            )
        kind = output_of(scheduler)
        return ContinuousSchedule.flow(data_at=1 if kind == "velocity" else 0), kind
    schedule = schedule_of(scheduler)
    if scheduler.config.get("timestep_type") == "continuous":
        raise ValueError(
            "scheduler must have the timesteps of training, got timestep_type 'continuous' of a "
            f"{type(scheduler).__name__}, whose t is a quarter of log σ"
        )
    return schedule, output_of(scheduler)


def output_of(scheduler: Any) -> PredictionType:
    """Return what a scheduler's `step` takes the network's output for."""
    if is_flow(scheduler):  # Mochi's σ is 1 at the data, and its velocity has the other sign
        return "velocity" if scheduler.config.get("invert_sigmas") else "flow"
    return prediction_type_of(scheduler)


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler samples on the straight path of flow matching, with `sigmas`."""
    config = getattr(scheduler, "config", {})
    return type(scheduler).__name__.startswith("FlowMatch") or bool(
        hasattr(scheduler, "alphas_cumprod")
        and config.get("use_flow_sigmas")
        and config.get("prediction_type") == "flow_prediction"
    )


def is_the_table_of(schedule: Schedule, alphas_cumprod: Tensor) -> bool:
    """Return whether ᾱ, `[T]`, is that of a discrete schedule, up to the rounding of float32."""
    if not isinstance(schedule, NoiseSchedule):
        return False
    ours = schedule.alphas_cumprod
    return ours.shape == alphas_cumprod.shape and torch.allclose(
        ours, alphas_cumprod, rtol=_FLOAT32_ROUNDING, atol=0.0
    )


def is_the_path_of(schedule: Schedule, other: Schedule, prediction_type: str) -> bool:
    """Return whether a network of `other` has the noise in its output that `schedule` says.

    An ε has it on every path of one ᾱ; what is in another output hangs on the path as well, x_0 + σ
    ε or √ᾱ x_0 + √(1-ᾱ) ε.
    """
    if isinstance(other, NoiseSchedule):
        if not is_the_table_of(schedule, other.alphas_cumprod):
            return False
        times = other.timesteps
    elif schedule.timesteps is not None:
        return False
    else:
        times = torch.linspace(0, 1, 65, dtype=torch.float64, device="cpu")
    if prediction_type == "epsilon":
        pairs = [[one.log_alphas_cumprod_at(times).exp()] for one in (schedule, other)]
    else:
        pairs = [list(one.alpha_sigma(times)) for one in (schedule, other)]
    return all(
        torch.allclose(a, b, rtol=_FLOAT32_ROUNDING, atol=1e-12)
        for a, b in zip(*pairs, strict=True)
    )


def prediction_type_of(scheduler: Any) -> PredictionType:
    """Return what `scheduler.config` says the model predicts, "epsilon" where it says nothing."""
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    check_choice("scheduler.config.prediction_type", prediction_type, CONFIGURED)
    return prediction_type  # type: ignore[no-any-return]


def _rebuilt(config: Any, num_train_timesteps: int) -> NoiseSchedule | None:
    """The schedule that a scheduler's config names, in float64; None if it is not one of ours."""
    named = config.get("beta_schedule", "squaredcos_cap_v2")  # UnCLIP knows no other
    betas = config.get("trained_betas")
    with suppress(ValueError):  # β of 0 or 1 at an end: the scheduler's table has them
        if betas is not None:
            return NoiseSchedule.from_betas(betas)
        if named == "squaredcos_cap_v2":
            return NoiseSchedule.cosine(num_train_timesteps)
        if named in ("linear", "scaled_linear"):
            make = NoiseSchedule.linear if named == "linear" else NoiseSchedule.scaled_linear
            return make(num_train_timesteps, config["beta_start"], config["beta_end"])
    return None
