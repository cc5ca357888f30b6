"""Whole training runs in the manner of diffusers' scripts: they learn, save, load and sample."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from s2dm_loss.adapters.diffusers import SkipLoss
from tests.helpers.diffusers_parts import (
    diffusers,
    digits,
    make_scheduler,
    min_snr_weights,
    tiny_conditional_unet,
    tiny_unet,
)

with warnings.catch_warnings():
    # accelerate imports names that warn about their own future.
    warnings.simplefilter("ignore")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

STEPS = 20


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, gradient_accumulation_steps=1)
    AcceleratorState._reset_state(True)


def train_unconditional(accelerator, prediction_type, skip_loss=None):
    """The loop of train_unconditional.py, with its loss lines or ours; returns losses and model."""
    torch.manual_seed(0)
    model = tiny_unet()
    noise_scheduler = make_scheduler(prediction_type=prediction_type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    dataloader = torch.utils.data.DataLoader(digits(), batch_size=32, shuffle=True)
    model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    if skip_loss == "ours":
        skip_loss = SkipLoss.from_scheduler(
            noise_scheduler,
            skip_set=9,
            prediction_type="sample" if prediction_type == "sample" else None,
            reduction="mean" if prediction_type == "epsilon" else "none",
        )
    losses, batches = [], iter(dataloader)
    while len(losses) < STEPS:
        try:
            clean_images = next(batches)
        except StopIteration:
            batches = iter(dataloader)
            continue
        noise = torch.randn(clean_images.shape)
        timesteps = torch.randint(0, 1000, (clean_images.shape[0],)).long()
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps).sample
            if prediction_type == "epsilon":
                if skip_loss is None:
                    loss = F.mse_loss(model_output.float(), noise.float())
                else:
                    loss = skip_loss(model_output, noise, timesteps, noisy_images)
            else:
                alpha_t = noise_scheduler.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
                snr_weights = alpha_t / (1 - alpha_t)
                if skip_loss is None:
                    loss = F.mse_loss(model_output.float(), clean_images.float(), reduction="none")
                    loss = (snr_weights * loss).mean()
                else:
                    loss = skip_loss(model_output, clean_images, timesteps, noisy_images)
                    loss = (snr_weights.flatten() * loss).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, accelerator.unwrap_model(model), noise_scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_train_unconditional(accelerator, prediction_type, tmp_path):
    losses, model, scheduler = train_unconditional(accelerator, prediction_type, "ours")
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])

    # A checkpoint has the keys of an untouched run, and loads into the untouched model.
    model.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == tiny_unet().state_dict().keys()
    x, t = digits(2), torch.tensor([10, 500])
    with torch.no_grad():
        assert torch.equal(loaded(x, t).sample, model(x, t).sample)

    pipe = diffusers.DDPMPipeline(unet=loaded, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, num_inference_steps=5, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    assert images.std() > 0


def test_the_run_is_the_untouched_one_up_to_the_skip_term(accelerator):
    """The same draws and nearly the same loss: only the constants of Eq. 13 lie between."""
    ours, *_ = train_unconditional(accelerator, "epsilon", "ours")
    plain, *_ = train_unconditional(accelerator, "epsilon")
    assert ours == pytest.approx(plain, rel=0.05)
    assert ours != plain


def test_train_text_to_image(accelerator, tmp_path):
    """v by `--prediction_type`, set in the loop, and `--snr_gamma 5`."""
    torch.manual_seed(0)
    unet = tiny_conditional_unet()
    noise_scheduler = make_scheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    skip_loss = SkipLoss.from_scheduler(noise_scheduler, skip_set=9, reduction="none")
    images = digits()
    losses = []
    for _ in range(STEPS):
        latents = images[torch.randint(0, len(images), (16,))]
        with accelerator.accumulate(unet):
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (16,)).long()
            noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
            encoder_hidden_states = torch.zeros(16, 3, 8)
            noise_scheduler.register_to_config(prediction_type="v_prediction")
            target = noise_scheduler.get_velocity(latents, noise, timesteps)
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states, return_dict=False)[0]
            loss = skip_loss(model_pred, target, timesteps, noisy_latents)
            loss = (loss * min_snr_weights(noise_scheduler, timesteps, 5.0)).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])

    accelerator.save_state(str(tmp_path))
    unet = accelerator.unwrap_model(unet)
    untouched = tiny_conditional_unet()
    from safetensors.torch import load_file

    untouched.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    scheduler = diffusers.DDIMScheduler.from_config(
        noise_scheduler.config, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(5)
    x, text = torch.randn(2, 1, 8, 8), torch.zeros(2, 3, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(untouched(x, t, text).sample, t, x).prev_sample
    assert x.isfinite().all()
