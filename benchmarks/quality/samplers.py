"""diffusers' samplers, all set up alike.

One choice for all of them but `ddim-quad`: the `leading` timestep spacing (the uniform steps of
DDIM's own repository), no clipping and no thresholding of the predicted image (that repository does
not clip either, and clipping would hide part of what a gain on ε̂ changes), and diffusers' defaults
elsewhere.  PNDM skips its Runge-Kutta warm-up, which would cost up to nine extra calls.

`ddim-quad` visits DDIM's quadratically spaced timesteps (Song et al., arXiv 2010.02502, D.2), which
lie closer at small t; diffusers' DDIM has no such spacing, and DPM-Solver++ of first order is DDIM
on any timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2dm_loss import NoiseSchedule

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
    "ddim-quad": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
}
TITLES = {
    "ddim": "DDIM",
    "pndm": "PNDM",
    "deis": "DEIS",
    "ddpm": "DDPM",
    "dpm++2m": "DPM++ 2M",
    "unipc": "UniPC",
    "ddim-quad": "DDIM, quadratic spacing",
}


def make_scheduler(name: str, schedule: NoiseSchedule) -> Any:
    """Return diffusers' scheduler of that name for a noise schedule.

    Raises:
        ValueError: If there is no sampler of that name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {name!r}")
    import diffusers

    kind, settings = SAMPLERS[name]
    alphas_cumprod = schedule.alphas_cumprod.double()
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return getattr(diffusers, kind)(
        num_train_timesteps=len(alphas_cumprod),
        trained_betas=(1 - alphas_cumprod / before).numpy(),
        prediction_type="epsilon",
        timestep_spacing="leading",
        **settings,
    )


def set_steps(scheduler: Any, name: str, steps: int, device: torch.device | None = None) -> None:
    """Have a scheduler of `make_scheduler` take so many steps."""
    if name != "ddim-quad":
        scheduler.set_timesteps(steps, device=device)
        return
    last = scheduler.config.num_train_timesteps
    times = torch.linspace(0, (0.8 * last) ** 0.5, steps).square().int()
    scheduler.set_timesteps(timesteps=times.flip(0).tolist(), device=device)


def visited(name: str, schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return the timesteps a sampler visits, ascending and each once, int64 `[<= steps]`."""
    scheduler = make_scheduler(name, schedule)
    set_steps(scheduler, name, steps)
    times: Tensor = scheduler.timesteps.long().unique()
    return times


@torch.inference_mode()
def sample(
    model: Model,
    sampler: str,
    schedule: NoiseSchedule,
    steps: int,
    start: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Turn noise into samples.

    Args:
        model: Called `(x, t)` with `t` of shape `[]`; returns ε̂.
        sampler: A key of `SAMPLERS`.
        schedule: The schedule the model was trained on.
        steps: Sampling steps.
        start: Standard normal noise `[B, C, H, W]`.
        generator: For the noise that a stochastic sampler adds.

    Returns:
        Samples `[B, C, H, W]`, not clamped.
    """
    return trajectory(model, sampler, schedule, steps, start, generator)


def trajectory(
    model: Model,
    sampler: str,
    schedule: NoiseSchedule,
    steps: int,
    start: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return what `sample` does, with gradients where the model asks for them."""
    scheduler = make_scheduler(sampler, schedule)
    set_steps(scheduler, sampler, steps, start.device)
    extra = {"generator": generator} if sampler == "ddpm" else {}
    x: Tensor = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False, **extra)[0]
    return x
