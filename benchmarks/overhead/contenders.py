"""What is compared: losses of (ε̂, ε, t) that return a scalar, on the linear schedule with k = 9."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from s2dm_loss import NoiseSchedule, SkipStepLoss, coefficients
from s2dm_loss.coefficients import Estimator

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

SKIP, TAU = 9, 0.99
LABELS = {
    "mse": "`F.mse_loss`",
    "mse_lifted": "`F.mse_loss` in float32",
    "min_snr": "Min-SNR",
    "expected": "ours, `expected`",
    "fresh": "ours, `fresh`",
    "shared": "ours, `shared`",
    "released": "released formula",
    "sa_dpm": "SA-DPM, K = 2",
}


def contenders(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Loss]:
    """Return the losses by name, with their tables on `device`; "mse" is the yardstick."""
    losses: dict[str, Loss] = {"mse": lambda eps_hat, noise, _t: F.mse_loss(eps_hat, noise)}
    if dtype != torch.float32:
        losses["mse_lifted"] = lambda e, n, _t: F.mse_loss(e.float(), n.float())
    losses["min_snr"] = min_snr_loss(device)
    estimators: tuple[Estimator, ...] = ("expected", "fresh", "shared")
    for estimator in estimators:
        criterion = SkipStepLoss(NoiseSchedule.linear(), SKIP, tau=TAU, estimator=estimator)
        losses[estimator] = criterion.to(device).from_prediction
    losses["released"] = released_loss(device)
    return losses


def min_snr_loss(device: torch.device, gamma: float = 5.0) -> Loss:
    """Min-SNR-γ (arXiv 2303.09556) in the steps that the training scripts of diffusers take."""
    alphas_cumprod = NoiseSchedule.linear().alphas_cumprod.float().to(device)

    def loss(eps_hat: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = alphas_cumprod.sqrt()[t]
        sigma = (1.0 - alphas_cumprod).sqrt()[t]
        snr = (alpha / sigma) ** 2
        weight = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
        error = F.mse_loss(eps_hat.float(), noise.float(), reduction="none")
        return (error.mean(dim=list(range(1, error.ndim))) * weight).mean()

    return loss


def released_loss(
    device: torch.device, skip: int = SKIP, tau: float = TAU
) -> Callable[..., Tensor]:
    """Eq. 13 with a fresh target, written out as the released code has it.

    A second noise tensor, two squared errors, a boolean mask for each branch, and the two branches
    concatenated.
    """
    c_table = coefficients(NoiseSchedule.linear(), skip).c.float().to(device)

    def loss(eps_hat: Tensor, noise: Tensor, t: Tensor, skip_noise: Tensor | None = None) -> Tensor:
        zeta = torch.randn_like(noise) if skip_noise is None else skip_noise
        axes = list(range(1, noise.ndim))
        early, late = t < skip, t >= skip
        plain = (noise[early] - eps_hat[early]).square().mean(dim=axes)
        c = c_table[t[late]].view(-1, *[1] * len(axes))
        simple = (noise[late] - eps_hat[late]).square().mean(dim=axes)
        skipped = (zeta[late] - c * eps_hat[late]).square().mean(dim=axes)
        return torch.cat([plain, tau * simple + (1 - tau) * skipped]).mean()

    return loss


def square_table(device: torch.device) -> Tensor:
    """Return weight, gain, constant and noise_constant of `expected`, of shape [T, 4]."""
    square = coefficients(NoiseSchedule.linear(), SKIP, tau=TAU).complete_square()
    given = [field for field in square if field is not None]
    return torch.stack(given, dim=-1).float().to(device)


def attempts(device: torch.device) -> dict[str, Loss]:
    """Return the steps that the head of `expected` went through, from plain to what is shipped."""
    table = square_table(device)

    def rows(t: Tensor) -> tuple[Tensor, ...]:
        return table.index_select(0, t).unbind(-1)

    def wide(values: Tensor, like: Tensor) -> Tensor:
        return values.view(-1, *[1] * (like.ndim - 1))

    def axes(data: Tensor) -> list[int]:
        return list(range(1, data.ndim))

    def plain(eps_hat: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        weight, gain, constant, noise_constant = rows(t)
        error = (eps_hat - wide(gain, noise) * noise).square().mean(dim=axes(noise))
        return (
            weight * error + noise_constant * noise.square().mean(axes(noise)) + constant
        ).mean()

    def mean_by_norm(data: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(data, dim=axes(data))
        return norm.square() / math.prod(data.shape[1:])

    def norms(eps_hat: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        weight, gain, constant, noise_constant = rows(t)
        error = mean_by_norm(torch.addcmul(eps_hat, noise, wide(gain, noise), value=-1))
        return (weight * error + noise_constant * mean_by_norm(noise) + constant).mean()

    criterion = SkipStepLoss(NoiseSchedule.linear(), SKIP, tau=TAU).to(device)
    per_sample = SkipStepLoss(NoiseSchedule.linear(), SKIP, tau=TAU, reduction="none").to(device)
    return {
        "mse": lambda eps_hat, noise, _t: F.mse_loss(eps_hat, noise),
        "plain": plain,
        "norms": norms,
        "in_place": lambda *arguments: per_sample.from_prediction(*arguments).mean(),
        "shipped": criterion.from_prediction,
    }


ATTEMPTS = {
    "mse": "`F.mse_loss`",
    "plain": "the completed square in plain operators",
    "norms": "squares summed by a norm, which writes none; autograd's backward",
    "in_place": "the residual becomes the gradient, in place; the batch's mean left to autograd",
    "shipped": "shipped: the batch's mean inside as well",
    "gradient_first": "compiled, the gradient made in the forward pass and scaled in the backward",
}


def gradient_first_loss(device: torch.device) -> Loss:
    """`expected` with loss and gradient made by one compiled function in the forward pass."""
    table = square_table(device)

    @torch.compile(dynamic=False, fullgraph=True)
    def both(eps_hat: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        weight, gain, constant, noise_constant = table.index_select(0, t).unbind(-1)
        axes = list(range(1, noise.ndim))
        shape = (-1, *[1] * len(axes))
        residual = eps_hat - gain.view(shape) * noise
        loss = weight * residual.square().mean(axes) + constant
        loss = (loss + noise_constant * noise.square().mean(axes)).mean()
        return loss, residual * (weight * (2 / noise.numel())).view(shape)

    class GradientFirst(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, eps_hat: Tensor, noise: Tensor, t: Tensor) -> Tensor:
            loss, ctx.gradient = both(eps_hat, noise, t)
            return loss

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
            return ctx.gradient.mul_(grad), None, None

    return GradientFirst.apply
