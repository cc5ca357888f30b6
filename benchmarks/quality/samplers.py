"""diffusers' samplers, all set up alike.

One choice for all of them: the `leading` timestep spacing (the uniform steps of DDIM's own
repository), no clipping and no thresholding of the predicted image (that repository does not clip
either, and clipping would hide part of what a gain on ε̂ changes), and diffusers' defaults
elsewhere.  PNDM skips its Runge-Kutta warm-up, which would cost up to nine extra calls.
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
}
TITLES = {"ddim": "DDIM", "pndm": "PNDM", "deis": "DEIS", "ddpm": "DDPM", "dpm++2m": "DPM++ 2M"}


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


def visited(name: str, schedule: NoiseSchedule, steps: int) -> Tensor:
    """Return the timesteps a sampler visits, ascending and each once, int64 `[<= steps]`."""
    scheduler = make_scheduler(name, schedule)
    scheduler.set_timesteps(steps)
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
    scheduler = make_scheduler(sampler, schedule)
    scheduler.set_timesteps(steps, device=start.device)
    extra = {"generator": generator} if sampler == "ddpm" else {}
    x: Tensor = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False, **extra)[0]
    return x
