"""The loss on plain tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from s2dm_loss._head import REDUCTIONS, completed_square, mean_square, placed_like, whole
from s2dm_loss._head import Reduction as Reduction
from s2dm_loss._head import along as along
from s2dm_loss.checks import check_batch, check_choice, check_like, check_per_sample
from s2dm_loss.coefficients import (
    DEFAULT_MAX_C2,
    DEFAULT_TAU,
    ESTIMATORS,
    Coefficients,
    CompletedSquare,
    Estimator,
    coefficients,
)
from s2dm_loss.schedule import Schedule, drawn_by
from s2dm_loss.skip_set import Skips


class LossTerms(NamedTuple):
    """The two terms of the loss as the paper writes them, each of shape [B].

    loss = tau · simple + (1 - tau) · skip without `normalize`, with tau = 1 and skip = 0 where no
    skip is valid. A loss with τ = 1 has no skip term, and there skip is 0 everywhere.

    Attributes:
        simple: The plain loss, mse(ε̂, ε), times the weighting if there is one.
        skip: The skip term, mse(c ε̂, ζ), times the same.
        tau: τ, and 1 where no skip is valid.
    """

    simple: Tensor
    skip: Tensor
    tau: Tensor


def skip_step_loss(
    eps_hat: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    schedule: Schedule,
    skip_set: Skips = 9,
    tau: float = DEFAULT_TAU,
    estimator: Estimator = "expected",
    reduction: Reduction = "mean",
    skip_noise: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = False,
    max_c2: float = DEFAULT_MAX_C2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the S²-DM loss of a noise prediction (arXiv 2401.01520, Eq. 13).

    `SkipStepLoss` is the same with its tables made once; prefer it in a training loop.

    Args:
        eps_hat: Predicted noise ε̂, floating point, of shape [B, ...].
        noise: The noise ε in x_t, of the same shape.
        t: Times of shape [B].
        schedule: The noise schedule.
        skip_set: The skips, as for `SkipStepLoss`.
        tau: τ in [0, 1].
        estimator: "expected", "fresh" or "shared".
        reduction: "mean" or "sum" over the batch, or "none" for shape [B]. The data axes are
            always averaged.
        skip_noise: ζ of the estimator "fresh", of the shape of `noise`; drawn if not given.
        weights: Per-sample weights of shape [B], multiplied in before the reduction.
        normalize: Drop the weight A(t) and the constant: mse(ε̂, target).
        max_c2: Upper bound on c²; see `coefficients`.
        generator: Random stream of the drawn ζ.

    Returns:
        A scalar, or shape [B] with reduction "none"; float32, or float64 for float64 input.

    Raises:
        TypeError, ValueError: if an argument is not as said; the message names it.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_prediction(eps_hat, noise, t, weights)
    skip_noise = read_skip_noise(estimator, skip_noise, "noise", noise, generator)
    at_t = coefficients(schedule, skip_set, t=whole(t), tau=tau, estimator=estimator, max_c2=max_c2)
    square = at_t.complete_square(normalize=normalize).to(loss_dtype(eps_hat, noise))
    return completed_square_loss(eps_hat, noise, square, skip_noise, reduction, weights)


def completed_square_loss(
    eps_hat: Tensor,
    noise: Tensor,
    square: CompletedSquare,
    skip_noise: Tensor | None,
    reduction: Reduction,
    weights: Tensor | None,
) -> Tensor:
    """Return the loss of one quadratic whose fields have shape [B] and the dtype of the loss."""
    weight, gain, constant, noise_constant, skip_gain, skip_constant, cross_constant = square
    target = [gain, noise]
    if skip_noise is not None and skip_gain is not None:
        target += [skip_gain, skip_noise]
        if skip_constant is not None and cross_constant is not None:
            skip_constant, cross_constant = placed_like(skip_noise, skip_constant, cross_constant)
            constant = skip_constant * mean_square(skip_noise, weight.dtype)
            constant = constant + cross_constant * _mean(noise.to(weight.dtype) * skip_noise)
    return completed_square(
        eps_hat,
        weight,
        constant,
        noise_constant,
        *target,
        reduction=reduction,
        weights=weights,
    )


def loss_terms(
    eps_hat: Tensor, noise: Tensor, at_t: Coefficients, skip_noise: Tensor | None = None
) -> LossTerms:
    """Return the two terms, for logging; the fields of `at_t` have shape [B]."""
    dtype = loss_dtype(eps_hat, noise)
    eps_hat, noise = eps_hat.to(dtype), noise.to(dtype)
    tau, c, c2 = (field.to(dtype) for field in (at_t.tau, at_t.c, at_t.c2))
    skip = c2 * _mean(eps_hat.square())
    if at_t.estimator == "expected":
        skip = skip + 1
    else:
        zeta = noise if skip_noise is None else skip_noise.to(dtype)
        skip = skip - 2 * c * _mean(eps_hat * zeta) + _mean(zeta.square())
    skip = torch.where(tau < 1, skip, 0.0)
    return LossTerms(simple=_mean((eps_hat - noise).square()), skip=skip, tau=tau)


def check_prediction(
    eps_hat: Tensor,
    noise: Tensor,
    t: Tensor,
    weights: Tensor | None = None,
    names: tuple[str, str] = ("eps_hat", "noise"),
) -> None:
    """Raise unless the tensors of one loss call fit together; `names` are the first two's."""
    check_batch(names[1], noise)
    check_like(names[0], eps_hat, names[1], noise)
    if noise.requires_grad and not eps_hat.requires_grad:
        raise ValueError(
            f"{names[1]} requires grad and {names[0]} does not: the prediction comes first, "
            f"({', '.join(names)}, ...)"
        )
    check_per_sample("t", t, names[1], noise)
    if weights is not None:
        check_per_sample("weights", weights, names[1], noise)


def read_skip_noise(
    estimator: Estimator,
    skip_noise: Tensor | None,
    like_name: str,
    like: Tensor,
    generator: torch.Generator | None,
) -> Tensor | None:
    """Return ζ where the estimator has one, drawn if it is not given, and None elsewhere.

    Raises:
        TypeError, ValueError: if ζ is given to another estimator, or is not shaped as `like`.
    """
    if estimator != "fresh":
        if skip_noise is not None:
            raise ValueError(
                f"skip_noise belongs to the estimator 'fresh', got it with {estimator!r}"
            )
        return None
    if skip_noise is None:
        return draw_like(like, generator)
    return check_like("skip_noise", skip_noise, like_name, like)


def draw_like(noise: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw Gaussian noise of the shape, dtype and device of `noise`."""
    return torch.randn(noise.shape, dtype=noise.dtype, device=noise.device, **drawn_by(generator))


def loss_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: half types are lifted."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _mean(values: Tensor) -> Tensor:
    """Mean over every axis but the batch."""
    return reduce(values, "b ... -> b", "mean")
