"""Gaussian mixtures on a diffusion path: density, E[ε | x_t] and samples in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s2dm_loss import NoiseSchedule


@dataclass(frozen=True)
class Mixture:
    """Σ_j w_j N(m_j, diag(v_j)).

    Attributes:
        weights: w, float64 ``[J]``, adding up to 1.
        means: m, float64 ``[J, D]``.
        variances: v, float64 ``[J, D]``, at least 0.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    @classmethod
    def gaussian(cls, variances: Tensor) -> Mixture:
        """One centered Gaussian with the given variances ``[D]`` along the axes."""
        variances = variances.double()[None]
        return cls(torch.ones(1, dtype=torch.float64), torch.zeros_like(variances), variances)

    @classmethod
    def ring(cls, count: int = 8, radius: float = 1.0, deviation: float = 0.1) -> Mixture:
        """``count`` round Gaussians on a circle in the plane."""
        angles = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        means = radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        weights = torch.full((count,), 1 / count, dtype=torch.float64)
        return cls(weights, means, torch.full_like(means, deviation**2))

    @property
    def mean(self) -> Tensor:
        """Mean of the whole, ``[D]``."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """Covariance of the whole, ``[D, D]``."""
        away = self.means - self.mean
        return (self.weights @ self.variances).diag() + (self.weights * away.T) @ away

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``count`` samples, float64 ``[count, D]``."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        normal = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return normal * self.variances.sqrt()[component] + self.means[component]

    def epsilon(self, x: Tensor, alphas_cumprod: float, temperature: float = 1.0) -> Tensor:
        """Return E[ε | x_t = x] = -√(1-ᾱ) ∇ log p_t(x), shape ``[B, D]``.

        Where p_t is the density of x_t = √ᾱ x_0 + √(1-ᾱ) ε.

        Args:
            x: float64 ``[B, D]``.
            alphas_cumprod: ᾱ, below 1.
            temperature: Divides the log-posterior of the components; 1 is exact, and above 1 is a
                model that cannot quite tell the components apart.
        """
        away = x[None] - math.sqrt(alphas_cumprod) * self.means[:, None, :]
        variances = alphas_cumprod * self.variances + (1 - alphas_cumprod)
        scaled = away / variances[:, None, :]
        # log w_j N_j(x) but for a constant, [J, B], and -∇ log N_j(x), [J, B, D].
        logits = (
            self.weights.log()[:, None]
            - 0.5 * (away * scaled).sum(2)
            - 0.5 * (2 * math.pi * variances).log().sum(1)[:, None]
        )
        posterior = (logits / temperature).softmax(0)
        return math.sqrt(1 - alphas_cumprod) * torch.einsum("jb,jbd->bd", posterior, scaled)


class ExactModel(nn.Module):
    """E[ε | x_t] of a mixture as an ε-model, called ``(x, t)`` with one t for the whole batch.

    Args:
        mixture: The data's law.
        schedule: The noise schedule.
        temperature: As in :meth:`Mixture.epsilon`.
    """

    def __init__(self, mixture: Mixture, schedule: NoiseSchedule, temperature: float = 1.0) -> None:
        """Keep the formula's parts."""
        super().__init__()
        self.mixture = mixture
        self.alphas_cumprod = schedule.alphas_cumprod.tolist()
        self.temperature = temperature

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[ε | x_t] for x of shape ``[B, D]``, in the dtype of x."""
        alphas_cumprod = self.alphas_cumprod[int(t)]
        return self.mixture.epsilon(x.double(), alphas_cumprod, self.temperature).to(x.dtype)
