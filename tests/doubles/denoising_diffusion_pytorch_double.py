"""What the adapter uses of denoising-diffusion-pytorch, as its source documents it.

`GaussianDiffusion` with its three objectives, float32 buffers, loss weights, Min-SNR, noise offset
and self-conditioning; `Unet` stands for any network with its call signature. Written from the
behaviour at commit faed4db28e724735323fa91c70aa9b28a6e1cbac, and compared with it where a checkout
is at hand.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ModelPrediction(NamedTuple):
    pred_noise: Tensor
    pred_x_start: Tensor


class Unet(nn.Module):
    def __init__(
        self, dim: int, *, dim_mults=(1,), channels: int = 3, self_condition=False, flash_attn=False
    ) -> None:
        del dim_mults, flash_attn
        super().__init__()
        self.channels = self.out_dim = channels
        self.self_condition = self_condition
        self.net = nn.Sequential(
            nn.Conv2d(channels, dim, 3, padding=1), nn.SiLU(), nn.Conv2d(dim, channels, 1)
        )

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        if x_self_cond is not None:
            x = x + 0.1 * x_self_cond
        return self.net(x) * (1 + time.reshape(-1, 1, 1, 1) / 1000)


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
        self.self_condition = model.self_condition
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

    def normalize(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = self._alpha_sigma(t)
        return alpha * x_start + sigma * noise

    def model_predictions(self, x: Tensor, t: Tensor) -> ModelPrediction:
        output = self.model(x, t, None)
        alpha, sigma = self._alpha_sigma(t)
        if self.objective == "pred_noise":
            return ModelPrediction(output, (x - sigma * output) / alpha)
        x_start = output if self.objective == "pred_x0" else alpha * x - sigma * output
        return ModelPrediction((x - alpha * x_start) / sigma, x_start)

    def p_losses(self, x_start, t, noise=None, offset_noise_strength=None, loss_reduction="mean"):
        noise = torch.randn_like(x_start) if noise is None else noise
        offset = offset_noise_strength or self.offset_noise_strength
        if offset:
            noise += offset * torch.randn(x_start.shape[:2]).reshape(*x_start.shape[:2], 1, 1)
        alpha, sigma = self._alpha_sigma(t)
        x_t, condition = self.q_sample(x_start=x_start, t=t, noise=noise), None
        if self.self_condition and random.random() < 0.5:  # noqa: S311 - as the trainer draws it
            with torch.no_grad():
                condition = self.model_predictions(x_t, t).pred_x_start
        output = self.model(x_t, t, condition)
        target = {
            "pred_noise": noise,
            "pred_x0": x_start,
            "pred_v": alpha * noise - sigma * x_start,
        }[self.objective]
        loss = (output - target).square().mean(dim=(1, 2, 3)) * self.loss_weight[t]
        return loss if loss_reduction == "none" else loss.mean()

    def forward(self, img: Tensor, *args, times: Tensor | None = None, **kwargs) -> Tensor:
        if times is None:
            times = torch.randint(0, self.num_timesteps, (img.shape[0],)).long()
        return self.p_losses(self.normalize(img), times, *args, **kwargs)


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
