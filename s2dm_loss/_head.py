"""The loss head: mean squares over the data axes, where the loss meets the data.

All else in the loss has one value for each sample and costs next to nothing; memory traffic is what
the head costs. It moves the data seven times and makes one new tensor of its size:

    forward     Σ ε²                         reads one
                residual = ε̂ - gain · ε      reads two, writes one
                Σ residual²                  reads one
    backward    residual *= a factor         reads one, writes one: it has become the gradient

`F.mse_loss` moves the data eight times and makes three such tensors, two of which it holds at once.
Compiled, the head moves the data five times: ε̂ and ε in, twice, and the gradient out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion
from typing_extensions import override

# Earlier compilers refuse a checkpoint inside DistributedDataParallel, or next to the question
# whether a function transform is active. The module is slow to import there, too.
_CHECKPOINTS_COMPILE = TorchVersion(torch.__version__) >= "2.13"
if _CHECKPOINTS_COMPILE:
    from torch.utils.checkpoint import checkpoint

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")


def mean_square(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mean values² over every axis but the batch, of shape [B] and in `dtype`."""
    if _needs_plain_operators(values):
        squares = values.to(dtype).square()
        # Without einops: a compiled loss would check at each call all that einops looks up.
        return squares.mean(_data_axes(squares)) if squares.ndim > 1 else squares
    return _sum_of_squares(values, dtype) * _one_over_count(values)


def completed_square(
    eps_hat: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    noise_constant: Tensor | None,
    *target: Tensor,
    reduction: Reduction = "none",
    weights: Tensor | None = None,
) -> Tensor:
    """Return weight · mean (ε̂ - Σ gain · noise)² + constant + noise_constant · mean ε².

    Args:
        eps_hat: ε̂ of shape [B, ...].
        weight: Of shape [B]; like the constants and the gains in the dtype of the result.
        constant: Of shape [B]; None for zero.
        noise_constant: Of shape [B], for ε, the first noise; None for zero.
        target: Each gain, of shape [B], and its noise, of the shape of ε̂, in turn.
        reduction: "mean" or "sum" over the batch, or "none" for shape [B].
        weights: Per-sample weights of shape [B], multiplied in before the reduction.
    """
    if weights is not None:
        per_sample = completed_square(eps_hat, weight, constant, noise_constant, *target)
        return _reduce_batch(per_sample * weights.to(per_sample.dtype), reduction)
    if not _needs_plain_operators(weight, constant, noise_constant, *target):
        return _apply_completed_square(
            eps_hat, weight, constant, noise_constant, reduction, *target
        )
    plain = functools.partial(_plain_completed_square, reduction=reduction)
    if _is_better_made_twice():
        # Left to itself, the compiler writes the residual for the backward pass to read. Made there
        # again, from ε̂ and ε that are there anyway, the head moves the data 5 times and not 7.
        plain = functools.partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=False)
    return plain(eps_hat, weight, constant, noise_constant, *target)


def _plain_completed_square(
    eps_hat: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    noise_constant: Tensor | None,
    *target: Tensor,
    reduction: Reduction,
) -> Tensor:
    loss = weight * mean_square(_residual(eps_hat, *target), weight.dtype)
    if constant is not None:
        loss = loss + constant
    if noise_constant is not None:
        loss = loss + noise_constant * mean_square(target[1], weight.dtype)
    return _reduce_batch(loss, reduction)


class _CompletedSquare(torch.autograd.Function):
    """The square whose residual becomes its gradient, in place.

    Autograd's own would keep the residual until it has made the gradient beside it, and would
    record each step of the arithmetic on [B], which is most of what a small batch costs.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        eps_hat: Tensor,
        weight: Tensor,
        constant: Tensor | None,
        noise_constant: Tensor | None,
        reduction: Reduction,
        *target: Tensor,
    ) -> Tensor:
        mean = _one_over_count(eps_hat)
        # First, while ε is read from memory in any case: the residual finds it in the cache then.
        if noise_constant is not None:
            noise_sum = _sum_of_squares(target[1], weight.dtype)
            constant = _add_product(constant, noise_constant, noise_sum, mean)
        residual = _residual(eps_hat, *target)
        # The residual is no saved tensor, since it is there to be overwritten. A second backward
        # through the same graph makes it again from the saved ones.
        ctx.residual, ctx.dtype, ctx.factor = residual, eps_hat.dtype, 2 * mean
        if reduction == "mean":
            ctx.factor /= max(len(eps_hat), 1)
        ctx.save_for_backward(weight, eps_hat, *target)
        loss = _add_product(constant, weight, _sum_of_squares(residual, weight.dtype), mean)
        return _reduce_batch(loss, reduction)

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
        return gradient.to(ctx.dtype), None, None, None, None, *[None] * len(target)


# `Function.apply` without its search for function transforms, which has been made by then.
_apply_completed_square: Callable[..., Tensor] = super(
    torch.autograd.Function, _CompletedSquare
).apply


def _residual(eps_hat: Tensor, *target: Tensor) -> Tensor:
    residual = eps_hat
    for gain, noise in zip(target[::2], target[1::2], strict=True):
        residual = torch.addcmul(residual, noise, _along(gain, noise), value=-1)
    return residual


def _along(per_sample: Tensor, data: Tensor) -> Tensor:
    # As `functional.along` does, without the time to parse a pattern.
    return per_sample.view(-1, *[1] * (data.ndim - 1))


def _data_axes(data: Tensor) -> tuple[int, ...]:
    return tuple(range(1, data.ndim))


def _one_over_count(data: Tensor) -> float:
    count = data.shape[1:].numel()
    return 1 / count if count else math.nan


# On a CPU a norm adds up one by one in the dtype of its result, which over 2 · 10⁵ float32 values
# is wrong by 4e-6. Samples longer than this are summed in shorter pieces, their channels, unless
# another memory format makes that slow.
_LONG_SUM = 2**15


def _sum_of_squares(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Σ values² of each sample, without writing the squares."""
    if values.ndim == 1:
        return values.to(dtype).square()
    norm: Tensor
    axes, long = _data_axes(values), values.shape[1:].numel() > _LONG_SUM
    if long and values.ndim > 2 and values.device.type == "cpu" and values.is_contiguous():
        norm = torch.linalg.vector_norm(values, dim=axes[1:], dtype=dtype)
        return norm.square_().sum(1)
    norm = torch.linalg.vector_norm(values, dim=axes, dtype=dtype)
    return norm.square_()


def _add_product(base: Tensor | None, first: Tensor, second: Tensor, scale: float) -> Tensor:
    if base is None:
        return torch.mul(first, second).mul_(scale)
    return torch.addcmul(base, first, second, value=scale)


def _reduce_batch(per_sample: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return per_sample
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


def _is_better_made_twice() -> bool:
    return (
        _CHECKPOINTS_COMPILE
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
    )


def _needs_plain_operators(*constants: Tensor | None) -> bool:
    """Whether more is asked than the gradient of ε̂, or another than autograd asks.

    Plain operators answer whatever transform stands around them (torch.func, forward mode, batched
    gradients), and the compiler fuses them by itself.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(tensor is not None and tensor.requires_grad for tensor in constants)
    )
