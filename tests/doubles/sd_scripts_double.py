"""What the adapter uses of sd-scripts' `NetworkTrainer`, as its source documents it.

One step of it with its loss types, masks and weights. Written from the behaviour at commit
48d368fa557731ad0488c07304dfeba8c07910eb, and compared with it where a checkout is at hand.
"""

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr
from torch.nn import functional as F

from tests.helpers.diffusers_parts import STABLE_DIFFUSION


def preserved_of(batch):
    """The samples whose target is the network's own output before training."""
    attributes = enumerate(batch.get("custom_attributes", []))
    return [index for index, each in attributes if each.get("diff_output_preservation")]


class NetworkTrainer:
    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        pass

    def get_noise_scheduler(self, args, device):
        scheduler = DDPMScheduler(**STABLE_DIFFUSION)
        # Of the schedule before it is fixed, as the trainer has it.
        scheduler.all_snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        if args.zero_terminal_snr:
            betas = rescale_zero_terminal_snr(scheduler.betas)
            scheduler.alphas_cumprod = (1 - betas).cumprod(0)
        return scheduler

    def call_unet(
        self, args, accelerator, unet, noisy_latents, timesteps, text_conds, *_, indices=None
    ):
        if indices is not None:  # as the SDXL trainer takes them
            noisy_latents, timesteps = noisy_latents[indices], timesteps[indices]
        return unet(noisy_latents, timesteps, text_conds[0]).sample

    def get_noise_pred_and_target(
        self, args, accelerator, noise_scheduler, latents, batch, text_encoder_conds, unet, network,
        weight_dtype, train_unet, is_train=True,
    ):  # fmt: skip
        noise = torch.randn_like(latents)
        if args.noise_offset:
            noise = noise + args.noise_offset * torch.randn(*latents.shape[:2], 1, 1)
        t = torch.randint(args.min_timestep, args.max_timestep, (len(latents),))
        perturbed = noise
        if args.ip_noise_gamma:
            perturbed = noise + args.ip_noise_gamma * torch.randn_like(latents)
        noisy = noise_scheduler.add_noise(latents, perturbed, t).requires_grad_(train_unet)
        inputs = (args, accelerator, unet, noisy, t, text_encoder_conds, batch, weight_dtype)
        with torch.set_grad_enabled(is_train):
            prediction = self.call_unet(*inputs)
        target = noise
        if args.v_parameterization:
            target = noise_scheduler.get_velocity(latents, noise, t)
        if preserved := preserved_of(batch):
            network.set_multiplier(0.0)
            with torch.no_grad():
                target[preserved] = self.call_unet(*inputs, indices=preserved)
            network.set_multiplier(1.0)
        return prediction, target, t, None

    def process_batch(
        self, batch, text_encoders, unet, network, vae, noise_scheduler, vae_dtype, weight_dtype,
        accelerator, args, *_, is_train=True, train_unet=True, **__,
    ):  # fmt: skip
        latents = batch["latents"] * 0.18215
        prediction, target, t, weighting = self.get_noise_pred_and_target(
            args, accelerator, noise_scheduler, latents, batch, batch["text_encoder_outputs_list"],
            unet, network, weight_dtype, train_unet, is_train=is_train,
        )  # fmt: skip
        error = prediction.float() - target.float()
        if args.loss_type == "l2":
            loss = error**2
        else:
            c = args.huber_scale * (args.huber_c ** (t / 1000)).reshape(-1, 1, 1, 1)
            loss = 2 * c * ((error**2 + c**2).sqrt() - c)
        if weighting is not None:
            loss = loss * weighting
        if batch.get("alpha_masks") is not None:
            loss = loss * F.interpolate(batch["alpha_masks"][:, None], loss.shape[2:], mode="area")
        loss = loss.mean((1, 2, 3)) * batch["loss_weights"]
        snr = noise_scheduler.all_snr[t]
        bounded = snr.clamp(max=1000)
        if args.min_snr_gamma:
            clipped = snr.clamp(max=args.min_snr_gamma)
            loss = loss * clipped / (snr + 1 if args.v_parameterization else snr)
        if args.scale_v_pred_loss_like_noise_pred:
            loss = loss * bounded / (bounded + 1)
        if args.v_pred_like_loss:
            loss = loss + loss * (bounded + 1) / bounded * args.v_pred_like_loss
        if args.debiased_estimation_loss:
            loss = loss / (bounded + 1 if args.v_parameterization else bounded.sqrt())
        return loss.mean()


class FluxNetworkTrainer(NetworkTrainer):
    """Flux's, and what SD3's has in common with it: σ, x_t and the target in one method."""

    def get_noise_scheduler(self, args, device):
        return FlowMatchEulerDiscreteScheduler(shift=3.0)

    def predict(self, unet, x_t, sigma):
        return unet(img=x_t.flatten(2), timesteps=sigma.flatten()).reshape(x_t.shape)  # packed

    def target(self, latents, noise):
        return noise - latents

    def get_noise_pred_and_target(
        self, args, _accelerator, _scheduler, latents, batch, _conds, unet, *_, is_train=True
    ):
        noise, sigma = torch.randn_like(latents), torch.rand(len(latents), 1, 1, 1)
        x_t = (1 - sigma) * latents + sigma * noise
        with torch.set_grad_enabled(is_train):
            prediction = self.predict(unet, x_t, sigma)
        target = self.target(latents, noise)
        if preserved := preserved_of(batch):
            with torch.no_grad():
                target[preserved] = self.predict(unet, x_t[preserved], sigma[preserved])
        weighting = 1 / (sigma + 1) if args.weighting_scheme else None
        return prediction, target, 1000 * sigma.flatten(), weighting


class Sd3NetworkTrainer(FluxNetworkTrainer):
    get_noise_scheduler = FluxNetworkTrainer.get_noise_scheduler
    get_noise_pred_and_target = FluxNetworkTrainer.get_noise_pred_and_target

    def predict(self, unet, x_t, sigma):
        return unet(x_t, 1000 * sigma.flatten()) * -sigma + x_t

    def target(self, latents, noise):
        return latents.clone()
