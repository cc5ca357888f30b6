"""The loss head: mean squares over the data axes, where the loss meets the data.

All else in the loss has one value for each sample and costs next to nothing; memory traffic is what
the head costs. It moves the data seven times and makes one new tensor of its size:

    forward     residual = ε̂ - gain · ε      reads two, writes one
                Σ residual², Σ ε²            read one each, write none
    backward    residual *= a factor         reads one, writes one: it has become the gradient

`F.mse_loss` moves the data eight times and makes three such tensors, two of which it holds at once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import override


def mean_square(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mean values² over every axis but the batch, of shape [B] and in `dtype`."""
    if _needs_plain_operators(values):
        return reduce(values.to(dtype).square(), "b ... -> b", "mean")
    return _sum_of_squares(values, dtype) / math.prod(values.shape[1:])


def completed_square(eps_hat: Tensor, weight: Tensor, constant: Tensor, *target: Tensor) -> Tensor:
    """Return weight · mean (ε̂ - Σ gain · noise)² + constant, of shape [B].

    Args:
        eps_hat: ε̂ of shape [B, ...].
        weight: Of shape [B]; like `constant` and the gains in the dtype of the result.
        constant: Of shape [B].
        target: Each gain, of shape [B], and its noise, of the shape of ε̂, in turn.
    """
    if _needs_plain_operators(weight, constant, *target):
        error = reduce(_residual(eps_hat, *target).square(), "b ... -> b", "mean")
        return weight * error + constant
    loss: Tensor = _CompletedSquare.apply(  # type: ignore[no-untyped-call]
        eps_hat, weight, constant, *target
    )
    return loss


class _CompletedSquare(torch.autograd.Function):
    """The square whose residual becomes its gradient, in place.

    Autograd's own would keep the residual until it has made the gradient beside it, and would
    record each step of the arithmetic on [B], which is most of what a small batch costs.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any, eps_hat: Tensor, weight: Tensor, constant: Tensor, *target: Tensor
    ) -> Tensor:
        residual = _residual(eps_hat, *target)
        count = math.prod(eps_hat.shape[1:])
        mean = 1 / count if count else math.nan
        # The residual is no saved tensor, since it is there to be overwritten. A second backward
        # through the same graph makes it again from the saved ones.
        ctx.residual, ctx.dtype, ctx.factor = residual, eps_hat.dtype, 2 * mean
        ctx.save_for_backward(weight, eps_hat, *target)
        return torch.addcmul(
            constant, weight, _sum_of_squares(residual, residual.dtype), value=mean
        )

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, eps_hat, *target = ctx.saved_tensors
        factor = _along(grads[0] * weight * ctx.factor, eps_hat)
        residual, ctx.residual = ctx.residual, None
        if residual is None or torch.is_grad_enabled():
            gradient = _residual(eps_hat, *target) * factor
        else:
            try:
                gradient = residual.mul_(factor)
            except RuntimeError:
                # Several gradients at once (`is_grads_batched`) do not fit into one residual.
                gradient = residual * factor
        return gradient.to(ctx.dtype), None, None, *[None] * len(target)


def _residual(eps_hat: Tensor, *target: Tensor) -> Tensor:
    residual = eps_hat
    for gain, noise in zip(target[::2], target[1::2], strict=True):
        residual = torch.addcmul(residual, noise, _along(gain, noise), value=-1)
    return residual


def _along(per_sample: Tensor, data: Tensor) -> Tensor:
    # As `functional.along` does, without the time to parse a pattern.
    return per_sample.view(-1, *[1] * (data.ndim - 1))


def _sum_of_squares(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Σ values² of each sample, without writing the squares."""
    if values.ndim == 1:
        return values.to(dtype).square()
    norm: Tensor
    axes = list(range(1, values.ndim))
    # On a CPU a norm adds up in `dtype` one by one, which over 10⁵ float32 values is wrong by 1e-6.
    # Shorter sums, one for each channel, are exact enough; they are slow in another memory format.
    if values.device.type == "cpu" and values.ndim > 2 and values.is_contiguous():
        norm = torch.linalg.vector_norm(values, dim=axes[1:], dtype=dtype)
        return norm.square().sum(1)
    norm = torch.linalg.vector_norm(values, dim=axes, dtype=dtype)
    return norm.square()


def _needs_plain_operators(*constants: Tensor) -> bool:
    """Whether more is asked than the gradient of ε̂, or another than autograd asks.

    Plain operators answer whatever transform stands around them (torch.func, forward mode, batched
    gradients), and the compiler fuses them by itself.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(tensor.requires_grad for tensor in constants)
    )
