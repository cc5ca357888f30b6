"""The loss as the paper writes it, term by term, for logging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from s2dm_loss._torch import replicated_like
from s2dm_loss.coefficients import Zeta


class LossTerms(NamedTuple):
    """The paper's two terms and their sum (arXiv 2401.01520, Eq. 13), each of shape [B].

    Attributes:
        simple: The plain loss, mse(ε̂, ε), times the weighting if there is one.
        skip: The skip term, mse(c ε̂, ζ), times the same; 0 where τ is 1.
        tau: τ, and 1 where no skip is valid.
        total: tau · simple + (1 - tau) · skip. Its gradient is that of the loss, or A times that
            with `normalize=True`. Its value is larger by a constant that no network changes.
    """

    simple: Tensor
    skip: Tensor
    tau: Tensor
    total: Tensor


def loss_terms(
    eps_hat: Tensor,
    noise: Tensor,
    skip_noise: Tensor | None,
    at_t: Sequence[Tensor],
    estimator: Zeta,
) -> LossTerms:
    """Return the terms; `at_t` is τ, c, c² and the weighting, [B], in the result's dtype."""
    tau, c, c2, weight = replicated_like(eps_hat, *at_t)
    eps_hat, noise = eps_hat.to(c2.dtype), noise.to(c2.dtype)
    zeta = estimator.on_noise * noise
    if skip_noise is not None:
        zeta = zeta + estimator.on_skip_noise * skip_noise.to(c2.dtype)
    # mean (c ε̂ - ζ)²; of several skips, c and c² are means. Beside an infinite c² nothing counts.
    cross = torch.where(c.isinf(), 0.0, 2 * c) * _mean(eps_hat * zeta)
    skip = c2 * _mean(eps_hat.square()) - cross + _mean(zeta.square())
    skip = weight * torch.where(tau < 1, skip + estimator.unseen_variance, 0.0)
    simple = weight * _mean((eps_hat - noise).square())
    return LossTerms(simple, skip, tau, tau * simple + (1 - tau) * skip)


def _mean(values: Tensor) -> Tensor:
    """Return the mean over every axis but the batch."""
    return reduce(values, "b ... -> b", "mean")
