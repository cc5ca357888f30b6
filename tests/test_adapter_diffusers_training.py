"""Whole training runs in the manner of diffusers' scripts: they learn, save, load and sample."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from s2dm_loss.adapters.diffusers import SkipLoss
from tests.helpers.diffusers_parts import (
    diffusers,
    make_scheduler,
    min_snr_weights,
    tiny_conditional_unet,
    tiny_unet,
)
from tests.helpers.small import digits

with warnings.catch_warnings():
    # accelerate imports names that warn about their own future.
    warnings.simplefilter("ignore")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

pytestmark = pytest.mark.slow
STEPS = 16


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, gradient_accumulation_steps=1)
    AcceleratorState._reset_state(True)


def train(accelerator, unet, lr, loss_of, batch_size=32):
    """The loop of the scripts around their loss lines; returns the losses."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=lr)
    loader = torch.utils.data.DataLoader(digits(256), batch_size=batch_size, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    losses = []
    for _ in range(STEPS * batch_size // 256):
        for latents in loader:
            with accelerator.accumulate(unet):
                noise = torch.randn(latents.shape)
                timesteps = torch.randint(0, 1000, (latents.shape[0],)).long()
                loss = loss_of(unet, latents, noise, timesteps)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_train_unconditional(accelerator, prediction_type):
    """train_unconditional.py, with its loss lines and with ours: nearly the same loss."""
    scheduler = make_scheduler(prediction_type=prediction_type)
    named = "sample" if prediction_type == "sample" else None
    skip_loss = SkipLoss.from_scheduler(
        scheduler, skip_set=9, prediction_type=named, reduction="none"
    )

    def loss_of(ours):
        def each(unet, images, noise, t):
            noisy = scheduler.add_noise(images, noise, t)
            output, target = unet(noisy, t).sample, images if named else noise
            if ours:
                loss = skip_loss(output, target, t, noisy)
            else:
                loss = F.mse_loss(output, target, reduction="none").mean((1, 2, 3))
            alphas_cumprod = scheduler.alphas_cumprod[t]
            snr = alphas_cumprod / (1 - alphas_cumprod)
            return (loss * snr if named else loss).mean()

        return each

    runs = []
    for ours in (False, True):
        torch.manual_seed(0)
        runs.append(train(accelerator, tiny_unet(), 5e-3, loss_of(ours)))
    plain, losses = runs
    assert losses != plain
    if prediction_type == "epsilon":
        assert losses == pytest.approx(plain, rel=0.05)
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


def test_train_text_to_image(accelerator, tmp_path):
    """v by `--prediction_type`, set in the loop, and `--snr_gamma 5`.

    Its checkpoint has the keys of an untouched run, whose model loads it and samples.
    """
    torch.manual_seed(0)
    unet, text = tiny_conditional_unet(), torch.zeros(16, 3, 8)
    scheduler = make_scheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True)
    skip_loss = SkipLoss.from_scheduler(scheduler, skip_set=9, reduction="none")

    def loss_of(unet, latents, noise, t):
        noisy = scheduler.add_noise(latents, noise, t)
        scheduler.register_to_config(prediction_type="v_prediction")
        target = scheduler.get_velocity(latents, noise, t)
        loss = skip_loss(unet(noisy, t, text, return_dict=False)[0], target, t, noisy)
        return (loss * min_snr_weights(scheduler, t, 5.0)).mean()

    losses = train(accelerator, unet, 1e-2, loss_of, batch_size=16)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])

    accelerator.save_state(str(tmp_path))
    untouched = tiny_conditional_unet()
    from safetensors.torch import load_file

    untouched.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    sampler = diffusers.DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    sampler.set_timesteps(5)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for t in sampler.timesteps:
            x = sampler.step(untouched(x, t, text[:2]).sample, t, x).prev_sample
    assert x.isfinite().all()
