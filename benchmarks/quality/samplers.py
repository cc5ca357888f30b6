"""diffusers' samplers, all set up alike.

For networks that predict ε: the `leading` timestep spacing (the uniform steps of DDIM's own
repository), no clipping and no thresholding of the predicted image (that repository does not clip
either, and clipping would hide part of what a gain on ε̂ changes), and diffusers' defaults
elsewhere.  PNDM skips its Runge-Kutta warm-up, which would cost up to nine extra calls.

For flow networks: Euler in equal steps from t = 1 to 0, as the pipelines of Flux run it, or with
the times shifted by 3, as SD3's; UniPC. Heun takes half as many steps, so that it makes as many
calls of the network; diffusers' has other times than its Euler, so it is here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2dm_loss import NoiseSchedule
from s2dm_loss.schedule import Schedule

Model = Callable[[Tensor, Tensor], Tensor]

# diffusers' class and what it needs beyond the settings that all share. By name, since the pages
# are written without diffusers, which takes seconds to import.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "deis": ("DEISMultistepScheduler", {}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
    "euler-shift3": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "unipc-flow": (
        "UniPCMultistepScheduler",
        {"use_flow_sigmas": True, "flow_shift": 1.0, "prediction_type": "flow_prediction"},
    ),
}
HEUN = {"heun": 1.0, "heun-shift3": 3.0}
"""Shifts."""
TITLES = {
    "ddim": "DDIM",
    "pndm": "PNDM",
    "deis": "DEIS",
    "ddpm": "DDPM",
    "dpm++2m": "DPM++ 2M",
    "unipc": "UniPC",
    "euler": "Euler",
    "euler-shift3": "Euler, shift 3",
    "heun": "Heun",
    "heun-shift3": "Heun, shift 3",
    "unipc-flow": "UniPC",
}


def make_scheduler(name: str, schedule: Schedule) -> Any:
    """Return diffusers' scheduler of that name, or raise ValueError if a schedule has none."""
    known = SAMPLERS if isinstance(schedule, NoiseSchedule) else FLOW
    if name not in known:
        raise ValueError(f"sampler: expected one of {', '.join(known)}, got {name!r}")
    import diffusers

    kind, settings = known[name]
    if isinstance(schedule, NoiseSchedule):
        alphas_cumprod = schedule.alphas_cumprod.double()
        before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        settings = {
            "trained_betas": (1 - alphas_cumprod / before).numpy(),
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            **settings,
        }
    return getattr(diffusers, kind)(num_train_timesteps=1000, **settings)


def flow_times(steps: int, shift: float = 1.0) -> Tensor:
    """Return the ends of steps from 1 to 0, float64, shifted as in arXiv 2403.03206, Eq. 23."""
    equal = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * equal / (1 + (shift - 1) * equal)


@torch.inference_mode()
def sample(
    model: Model,
    sampler: str,
    schedule: Schedule,
    steps: int,
    start: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Turn standard normal noise into samples, not clamped, `[B, C, H, W]`.

    The model is called `(x, t)` with t of shape `[]`, and returns ε̂ or, on a flow, the velocity.
    The sampler is a key of `SAMPLERS`, or of `FLOW` or `HEUN` on a continuous schedule; the
    generator is for the noise that a stochastic one adds.
    """
    if sampler in HEUN and not isinstance(schedule, NoiseSchedule):
        return heun(model, HEUN[sampler], steps, start)
    scheduler = make_scheduler(sampler, schedule)
    if sampler.startswith("euler"):
        scheduler.set_timesteps(sigmas=flow_times(steps).tolist()[:-1], device=start.device)
    else:
        scheduler.set_timesteps(steps, device=start.device)
    extra = {"generator": generator} if sampler == "ddpm" else {}
    x: Tensor = start * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False, **extra)[0]
    return x


def heun(model: Model, shift: float, calls: int, start: Tensor) -> Tensor:
    """Return samples of dx/dt = û by Heun's method, whose last step is Euler's."""
    x = start
    for t, following in itertools.pairwise(flow_times(max(1, calls // 2), shift).float()):
        step = following - t
        velocity = model(x, 1000 * t)
        ahead = x + step * velocity
        if following > 0:
            velocity = (velocity + model(ahead, 1000 * following)) / 2
        x = x + step * velocity
    return x
