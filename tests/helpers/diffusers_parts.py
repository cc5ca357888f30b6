"""diffusers' own parts for the tests."""

import math
import warnings

import torch
from torch import nn

from s2dm_loss.sampling import Correction

with warnings.catch_warnings():
    # diffusers imports names of torch.jit and of other packages that warn about their own future.
    warnings.simplefilter("ignore")
    import diffusers


class Clipped(Correction):
    """docs/correct.md's own, which leaves noise of ordinary size as it is."""

    name, none, strengths = "noise within", math.inf, (2.0, 3.0)

    def correct_noise(self, noise, strength):
        return noise.clamp(-strength, strength)


STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OF_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def make_scheduler(name="DDPMScheduler", **config):
    return getattr(diffusers, name)(**config)


def tiny_pipeline():
    """diffusers' own, small enough for a test, for 8x8 images of one channel."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Denoiser(nn.Module):
    def forward(self, x, t, prompt):
        return torch.sin(x + t / 1000 + prompt)


class FlowPipeline(diffusers.DiffusionPipeline):
    """The loop of diffusers' pipelines of flow matching in our words.

    The network is a formula: a correction meets its output at the scheduler and never the network.
    """

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(transformer=Denoiser(), scheduler=scheduler)

    def __call__(self, latents, steps=4, image=None, strength=1.0, callback_on_step_end=None):
        dynamic = self.scheduler.config.get("use_dynamic_shifting")
        self.scheduler.set_timesteps(steps, **({"mu": 0.8} if dynamic else {}))
        timesteps = self.scheduler.timesteps
        if image is not None:
            begin = (steps - int(steps * strength)) * getattr(self.scheduler, "order", 1)
            timesteps = timesteps[begin:]
            self.scheduler.set_begin_index(begin)
            sigma = self.scheduler.sigmas[begin]
            latents = (1 - sigma) * image + sigma * latents
        for index, t in enumerate(timesteps):
            plain, prompted = (self.transformer(latents, t, prompt) for prompt in (0.0, 1.0))
            output = plain + 3 * (prompted - plain)
            latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                given = {"latents": latents}
                latents = callback_on_step_end(self, index, t, given).pop("latents", latents)
        return latents
