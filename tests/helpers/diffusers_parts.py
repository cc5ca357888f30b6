"""diffusers' own parts for the tests, and the logic of its training scripts.

`script_step` is the middle of train_text_to_image.py and train_unconditional.py (diffusers, commit
58eb52c0803ea9af3abec60841c2a093bdf1f951) in our words: what is drawn, in its order, what the target
is, and the loss line. With `skip_loss` the loss line is ours.
"""

import warnings
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn import functional as F

with warnings.catch_warnings():
    # diffusers imports names of torch.jit and of other packages that warn about their own future.
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

# Schedulers with alphas_cumprod, less RePaint and UnCLIP, which take no beta_schedule in common.
SCHEDULERS = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"),
    *("LMSDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler"),
    "SASolverScheduler",
)


def make_scheduler(name="DDPMScheduler", **config):
    return getattr(diffusers, name)(**config)


class Script(NamedTuple):
    """The arguments of a script that change its loss."""

    prediction_type: str = "epsilon"
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    snr_gamma: float | None = None
    dream_training: bool = False
    dtype: torch.dtype = torch.float32


def script_step(script, model, scheduler, latents, skip_loss=None):
    """Return the loss of one step, by the script's line or by `skip_loss`."""

    def unet(x_t, t, *_):
        return SimpleNamespace(sample=model(x_t, t))

    noise = torch.randn_like(latents)
    if script.noise_offset:
        noise += script.noise_offset * torch.randn(latents.shape[0], latents.shape[1], 1, 1)
    perturbed = noise
    if script.input_perturbation:
        perturbed = noise + script.input_perturbation * torch.randn_like(noise)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (latents.shape[0],)).long()
    noisy_latents = add_noise(scheduler, latents, perturbed, timesteps)
    # The scripts set this in their loop, after the scheduler and any loss were built.
    scheduler.register_to_config(prediction_type=script.prediction_type)
    target = {
        "epsilon": noise,
        "v_prediction": velocity(scheduler, latents, noise, timesteps),
        "sample": latents,
    }[script.prediction_type]
    if script.dream_training:
        noisy_latents, target = compute_dream_and_update_latents(
            unet, scheduler, timesteps, noise, noisy_latents, target, None, 1.0
        )
    model_pred = unet(noisy_latents, timesteps).sample.to(script.dtype)

    weights = 1.0
    if script.prediction_type == "sample":
        alphas_cumprod = scheduler.alphas_cumprod[timesteps]
        weights = alphas_cumprod / (1 - alphas_cumprod)
    elif script.snr_gamma is not None:
        weights = min_snr_weights(scheduler, timesteps, script.snr_gamma)
    if skip_loss is None:
        loss = F.mse_loss(model_pred.float(), target.float(), reduction="none")
        loss = loss.mean(dim=list(range(1, loss.ndim)))
    else:
        loss = skip_loss(model_pred, target, timesteps, noisy_latents)
    return (loss * weights).mean()


# Their add_noise and get_velocity are those that the training scripts use. The others' take a
# sampler's own timesteps, and some of them return x_0 + σ ε, which their pipelines then scale.
TRAINING_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler")


def add_noise(scheduler, latents, noise, timesteps):
    """The x_t that a model is given."""
    if type(scheduler).__name__ in TRAINING_SCHEDULERS:
        return scheduler.add_noise(latents, noise, timesteps)
    alphas_cumprod = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    return alphas_cumprod**0.5 * latents + (1 - alphas_cumprod) ** 0.5 * noise


def velocity(scheduler, latents, noise, timesteps):
    if type(scheduler).__name__ in TRAINING_SCHEDULERS:
        return scheduler.get_velocity(latents, noise, timesteps)
    alphas_cumprod = scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    return alphas_cumprod**0.5 * noise - (1 - alphas_cumprod) ** 0.5 * latents


def min_snr_weights(scheduler, timesteps, gamma):
    """The weights of train_text_to_image.py's `--snr_gamma` branch."""
    snr = compute_snr(scheduler, timesteps)
    weights = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    if scheduler.config.prediction_type == "epsilon":
        return weights / snr
    if scheduler.config.prediction_type == "v_prediction":
        return weights / (snr + 1)
    return weights


def tiny_unet():
    """diffusers' own U-Net, small enough for a test, for 8x8 images of one channel."""
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    )


def tiny_conditional_unet():
    """The U-Net of text-to-image, for 8x8 latents of one channel and text of width 8."""
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
    )
