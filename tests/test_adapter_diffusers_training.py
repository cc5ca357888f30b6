"""A training run in the manner of diffusers' scripts: it learns, saves, loads and samples."""

import warnings

import pytest
import torch

from s2dm_loss.adapters.diffusers import SkipLoss
from tests.helpers.diffusers_parts import (
    diffusers,
    make_scheduler,
    min_snr_weights,
    tiny_conditional_unet,
)
from tests.helpers.small import digits

with warnings.catch_warnings():
    # accelerate imports names that warn about their own future.
    warnings.simplefilter("ignore")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_train_text_to_image(kind, accelerator, tmp_path):
    """With `--prediction_type`, set in the loop, and `--snr_gamma 5`.

    Its checkpoint has the keys of an untouched run, whose model loads it and samples.
    """
    torch.manual_seed(0)
    zero_snr = kind == "v_prediction"
    scheduler = make_scheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_snr)
    named = {"prediction_type": "sample"} if kind == "sample" else {}
    skip_loss = SkipLoss.from_scheduler(scheduler, skip_set=9, reduction="none", **named)
    unet, text = tiny_conditional_unet(), torch.zeros(16, 3, 8)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(digits(256), batch_size=16, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    losses = []
    for latents in loader:
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, t)
        scheduler.register_to_config(prediction_type=kind)
        velocity = scheduler.get_velocity(latents, noise, t)
        target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[kind]
        loss = skip_loss(unet(noisy, t, text, return_dict=False)[0], target, t, noisy)
        loss = (loss * min_snr_weights(scheduler, t, 5.0)).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])

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
