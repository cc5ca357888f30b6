"""Pipelines in the shape of Flux, SD3 and Wan.

Their loop is that of diffusers' pipelines in our words: the network's calls with guidance,
`strength`, the callback. The network is a formula: a correction meets its output at the scheduler
and never the network.
"""

import torch
from torch import nn

from tests.helpers.diffusers_parts import diffusers


class Denoiser(nn.Module):
    def forward(self, x, t, prompt):
        return torch.sin(x + t / 1000 + prompt)


class Shaped(diffusers.DiffusionPipeline):
    """One loop; a subclass calls the transformer."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(transformer=Denoiser(), scheduler=scheduler)

    def __call__(self, latents, steps=4, image=None, strength=1.0, callback_on_step_end=None):
        dynamic = self.scheduler.config.get("use_dynamic_shifting")
        self.scheduler.set_timesteps(steps, **({"mu": 0.8} if dynamic else {}))
        timesteps = self.scheduler.timesteps
        if image is not None:
            begin = steps - int(steps * strength)
            begin *= getattr(self.scheduler, "order", 1)
            timesteps = timesteps[begin:]
            self.scheduler.set_begin_index(begin)
            sigma = self.scheduler.sigmas[begin]
            latents = (1 - sigma) * image + sigma * latents
        for index, t in enumerate(timesteps):
            output = self.denoise(latents, t)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                given = {"latents": latents}
                latents = callback_on_step_end(self, index, t, given).pop("latents", latents)
        return latents


class Flux(Shaped):
    """Packed latents [B, tokens, C], and a network that takes the guidance."""

    shape = (2, 16, 4)

    def denoise(self, x, t):
        return self.transformer(x, t, 3.0)


class SD3(Shaped):
    """Guidance on a doubled batch."""

    shape = (2, 2, 8, 8)

    def denoise(self, x, t):
        prompts = torch.tensor([0.0, 1.0]).repeat_interleave(len(x)).reshape(-1, 1, 1, 1)
        plain, prompted = self.transformer(torch.cat([x, x]), t, prompts).chunk(2)
        return plain + 3 * (prompted - plain)


class Wan(Shaped):
    """Videos, and guidance by two calls."""

    shape = (2, 2, 1, 8, 8)

    def denoise(self, x, t):
        plain, prompted = (self.transformer(x, t, prompt) for prompt in (0.0, 1.0))
        return plain + 3 * (prompted - plain)
