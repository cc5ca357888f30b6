"""What the adapter uses of denoising-diffusion-pytorch, as its source documents it.

Without self-conditioning and immiscible noise, which are tested on the trainer's own code.
"""

import torch
from torch import nn


class GaussianDiffusion(nn.Module):
    model_predictions = None  # for its samplers and self-conditioning

    def __init__(
        self,
        model,
        *,
        image_size,
        timesteps=1000,
        objective="pred_v",
        beta_schedule="sigmoid",
        offset_noise_strength=0.0,
        min_snr_loss_weight=False,
    ):
        super().__init__()
        self.model, self.num_timesteps, self.objective = model, timesteps, objective
        self.offset_noise_strength = offset_noise_strength
        betas = SCHEDULES[beta_schedule](timesteps)
        alphas_cumprod = (1 - betas).cumprod(0)
        snr = alphas_cumprod / (1 - alphas_cumprod)
        clipped = snr.clamp(max=5) if min_snr_loss_weight else snr
        weight = {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", alphas_cumprod.float())
        self.register_buffer("loss_weight", weight[objective].float())

    def p_losses(self, x_start, t, noise=None, loss_reduction="mean"):
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.offset_noise_strength:
            noise += self.offset_noise_strength * torch.randn(x_start.shape[:2])[..., None, None]
        alphas_cumprod = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        v = alpha * noise - sigma * x_start
        target = {"pred_noise": noise, "pred_x0": x_start, "pred_v": v}[self.objective]
        output = self.model(alpha * x_start + sigma * noise, t, None)
        loss = (output - target).square().mean(dim=(1, 2, 3)) * self.loss_weight[t]
        return loss if loss_reduction == "none" else loss.mean()

    def forward(self, img, *args, times=None, **kwargs):
        if times is None:
            times = torch.randint(0, self.num_timesteps, (img.shape[0],))
        return self.p_losses(img * 2 - 1, times, *args, **kwargs)


def _linear(timesteps):
    return torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)


def _cosine(timesteps):
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    return _betas(torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2)


def _sigmoid(timesteps):
    """Jabri et al., arXiv 2212.11972, from -3 to 3."""
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    low, high = torch.tensor([-3.0, 3.0], dtype=torch.float64).sigmoid()
    return _betas((high - (6 * t - 3).sigmoid()) / (high - low))


def _betas(alphas_cumprod):
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)


SCHEDULES = {"linear": _linear, "cosine": _cosine, "sigmoid": _sigmoid}
