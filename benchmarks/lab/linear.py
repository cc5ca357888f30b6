"""A sampler on one Gaussian: the covariance of what it returns, with no sampling error.

With data N(0, diag(v)) the exact ε̂ is linear in x_t, E[ε | x_t] = √(1-ᾱ) x_t / (ᾱ v + 1 - ᾱ), and
so is every step of DDIM, PNDM, DEIS and DPM++ 2M.  A start of one standard deviation that is pushed
through diffusers' own scheduler therefore returns the standard deviation of the samples along each
axis, and the Fréchet distance (the squared 2-Wasserstein distance) to the data is
Σ (√v_out - √v)², exact up to the scheduler's float32 tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.samplers import sample
from s2dm_loss import NoiseSchedule


@dataclass(frozen=True)
class Imperfection:
    """What is wrong with an otherwise exact ε-model; the default is nothing.

    Attributes:
        title: How the tables name it.
        scale: ε̂ is this times the exact one, at every t.
        late_scale: The same where ᾱ < 0.05, that is at the start of sampling.
        noise: Standard deviation of an independent error of ε̂ in each call.
        believed: Maps the data's variances to those that the model takes them for.
    """

    title: str = "exact"
    scale: float = 1.0
    late_scale: float = 1.0
    noise: float = 0.0
    believed: Callable[[Tensor], Tensor] = torch.clone


def output_variances(
    variances: Tensor,
    gains: Tensor,
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    imperfection: Imperfection | None = None,
) -> Tensor:
    """Return the variances of a sampler's output along the data's axes.

    Args:
        variances: The data's, v, float64 ``[D]``.
        gains: s(t) of every candidate, float64 ``[K, T]``.
        schedule: The noise schedule.
        sampler: A deterministic sampler of ``benchmarks.quality.samplers``.
        steps: Sampling steps.
        imperfection: What is wrong with the model.

    Returns:
        float64 ``[K, D]``.
    """
    wrong = imperfection or Imperfection()
    believed = wrong.believed(variances)
    calls = itertools.count(1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        a = schedule.alphas_cumprod[t]
        epsilon = (1 - a).sqrt() * x / (a * believed + 1 - a) * wrong.scale
        if a < 0.05:
            epsilon = epsilon * wrong.late_scale
        if wrong.noise:
            epsilon[:, next(calls)] += wrong.noise
        return gains[:, t, None, None] * epsilon

    # One row for each independent source of variance: the start, then the error of each call, of
    # which PNDM makes one more than it takes steps.
    start = torch.zeros(len(gains), 2 + steps if wrong.noise else 1, len(variances))
    start[:, 0] = 1
    samples = sample(model, sampler, schedule, steps, start.double(), torch.Generator())
    return samples.square().sum(1)


def frechet(output: Tensor, variances: Tensor) -> Tensor:
    """Return Σ (√v_out - √v)² / Σ v, shape ``[K]``: 0 is perfect, 1 is a single point."""
    return (output.sqrt() - variances.sqrt()).square().sum(-1) / variances.sum()
