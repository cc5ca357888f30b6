"""What the adapter uses of denoising-diffusion-pytorch, as its source documents it.

`GaussianDiffusion` with its three objectives, float32 buffers, loss weights, Min-SNR and noise
offset. Self-conditioning and immiscible noise are tested on the trainer's own code, which CI has
from PyPI.
"""

import torch
from torch import Tensor, nn


class GaussianDiffusion(nn.Module):
    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        timesteps: int = 1000,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
    ) -> None:
        super().__init__()
        self.model, self.image_size, self.objective = model, image_size, objective
        self.num_timesteps = timesteps
        self.offset_noise_strength = offset_noise_strength
        betas = {"linear": _linear, "cosine": _cosine, "sigmoid": _sigmoid}[beta_schedule](
            timesteps
        )
        alphas_cumprod = (1 - betas).cumprod(0)
        snr = alphas_cumprod / (1 - alphas_cumprod)
        clipped = snr.clamp(max=min_snr_gamma) if min_snr_loss_weight else snr
        weight = {"pred_noise": clipped / snr, "pred_x0": clipped, "pred_v": clipped / (snr + 1)}
        for name, table in {
            "betas": betas,
            "alphas_cumprod": alphas_cumprod,
            "loss_weight": weight[objective],
        }.items():
            self.register_buffer(name, table.float())

    def model_predictions(self, x: Tensor, t: Tensor) -> None:
        """For its samplers and self-conditioning."""

    def p_losses(self, x_start, t, noise=None, loss_reduction="mean"):
        noise = torch.randn_like(x_start) if noise is None else noise
        if self.offset_noise_strength:
            offset = torch.randn(x_start.shape[:2])
            noise += self.offset_noise_strength * offset.reshape(*x_start.shape[:2], 1, 1)
        alphas_cumprod = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        target = {
            "pred_noise": noise,
            "pred_x0": x_start,
            "pred_v": alpha * noise - sigma * x_start,
        }[self.objective]
        output = self.model(alpha * x_start + sigma * noise, t, None)
        loss = (output - target).square().mean(dim=(1, 2, 3)) * self.loss_weight[t]
        return loss if loss_reduction == "none" else loss.mean()

    def forward(self, img: Tensor, *args, times: Tensor | None = None, **kwargs) -> Tensor:
        if times is None:
            times = torch.randint(0, self.num_timesteps, (img.shape[0],)).long()
        return self.p_losses(img * 2 - 1, times, *args, **kwargs)


def _linear(timesteps: int) -> Tensor:
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)


def _cosine(timesteps: int) -> Tensor:
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    return _betas(torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2)


def _sigmoid(timesteps: int) -> Tensor:
    """Jabri et al., arXiv 2212.11972, from -3 to 3."""
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    low, high = torch.tensor([-3.0, 3.0], dtype=torch.float64).sigmoid()
    return _betas((high - (6 * t - 3).sigmoid()) / (high - low))


def _betas(alphas_cumprod: Tensor) -> Tensor:
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999)
