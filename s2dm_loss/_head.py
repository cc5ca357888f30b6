"""The loss head: mean squares over the data axes, where the loss meets the data.

All else in the loss has one value for each sample and costs next to nothing; memory traffic is what
the head costs. It moves the data seven times and makes one new tensor of its size:

    forward     Σ ε²                         reads one
                residual = ε̂ - gain · ε      reads two, writes one
                Σ residual²                  reads one
    backward    residual *= a factor         reads one, writes one: it has become the gradient

`F.mse_loss` moves the data eight times and makes three such tensors, two of which it holds at once.
Compiled, the head moves the data five times: ε̂ and ε in, twice, and the gradient out. Of half types
a CPU needs copies in float32, of which the head holds two at once, as `F.mse_loss` does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

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
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def mean_square(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mean values² over every axis but the batch, of shape [B] and in `dtype`.

    It goes into constants, which a coefficient of zero switches off: where the squares are more
    than `dtype` holds, it is the largest number, since zero times that is zero.
    """
    if _needs_plain_operators(values, values):
        return _finite(_plain_mean_square(values, dtype))
    count = values.shape[1:].numel()
    return _finite(_sum_of_squares(values, count, dtype)) * (1 / count if count else math.nan)


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
        (weights,) = placed_like(per_sample, weights.to(per_sample.dtype))
        return _reduce_batch(per_sample * weights, reduction)
    constants = (weight, constant, noise_constant, *target)
    if not _needs_plain_operators(eps_hat, *constants):
        return _CompletedSquare.apply(eps_hat, constants, reduction)  # type: ignore[no-untyped-call, no-any-return]
    plain = functools.partial(_plain_completed_square, reduction=reduction)
    if _is_better_made_twice():
        # Left to itself, the compiler writes the residual for the backward pass to read. Made there
        # again, from ε̂ and ε that are there anyway, the head moves the data 5 times and not 7.
        plain = functools.partial(checkpoint, plain, use_reentrant=False, preserve_rng_state=False)
    return plain(eps_hat, *placed_like(eps_hat, *constants))


def _plain_completed_square(
    eps_hat: Tensor,
    weight: Tensor,
    constant: Tensor | None,
    noise_constant: Tensor | None,
    *target: Tensor,
    reduction: Reduction,
) -> Tensor:
    residual = eps_hat
    for gain, noise in _pairs(target):
        # Not `_residual`: `torch.func.linearize` ends the process at an `addcmul` with a value.
        residual = residual - along(gain, noise) * noise
    loss = weight * _plain_mean_square(residual, weight.dtype)
    if constant is not None:
        loss = loss + constant
    if noise_constant is not None:
        loss = loss + noise_constant * mean_square(target[1], weight.dtype)
    return _reduce_batch(loss, reduction)


def _plain_mean_square(values: Tensor, dtype: torch.dtype) -> Tensor:
    squares = values.to(dtype).square()
    # Without einops: a compiled loss would check at each call all that einops looks up.
    return squares.mean(_data_axes(squares)) if squares.ndim > 1 else squares


class _CompletedSquare(torch.autograd.Function):
    """The square whose residual becomes its gradient, in place.

    Autograd's own would keep the residual until it has made the gradient beside it, and would
    record each step of the arithmetic on [B], which is most of what a small batch costs.

    What needs no gradient comes as one tuple, since autograd's care for each argument costs time.
    Nothing is changed in place before the backward pass: selective checkpointing may keep the
    output of any operator here, and refuses one that was changed since.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any, eps_hat: Tensor, constants: tuple[Tensor, ...], reduction: Reduction
    ) -> Tensor:
        weight, constant, noise_constant, *target = constants
        count = eps_hat.shape[1:].numel()
        mean = 1 / count if count else math.nan
        # First, while ε is read from memory in any case: the residual finds it in the cache then.
        if noise_constant is not None:
            noise_sum = _finite(_sum_of_squares(target[1], count, weight.dtype))
            constant = _add_product(constant, noise_constant, noise_sum, mean)
        if eps_hat.is_cpu and eps_hat.dtype != weight.dtype and not _is_watched():
            residual = _lifted_residual(eps_hat, weight.dtype, *target)
        else:
            residual = _residual(eps_hat, *target)
        over_batch = max(len(eps_hat), 1) if reduction == "mean" else 1
        scale = weight * (2 * mean / over_batch)
        # The residual is no saved tensor, since it is there to be overwritten. A second backward
        # through the same graph makes it again from the saved ones.
        ctx.residual, ctx.scale, ctx.dtype = residual, scale, eps_hat.dtype
        ctx.save_for_backward(eps_hat, scale, *target)
        loss = _add_product(constant, weight, _sum_of_squares(residual, count, weight.dtype), mean)
        return _reduce_batch(loss, reduction)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        # Compiled autograd has one graph for every call, which knows saved tensors alone.
        residual = None if torch.compiler.is_compiling() else ctx.residual
        if residual is None or torch.is_grad_enabled():
            eps_hat, scale, *target = ctx.saved_tensors
            gradient = _residual(eps_hat, *target) * along(grad * scale, eps_hat)
        else:
            ctx.residual = None
            factor = along(grad * ctx.scale, residual)
            try:
                gradient = residual.mul_(factor)
            except RuntimeError:
                # Several gradients at once (`is_grads_batched`) do not fit into one residual.
                gradient = residual * factor
        return gradient if gradient.dtype == ctx.dtype else gradient.to(ctx.dtype), None, None


def _residual(eps_hat: Tensor, *target: Tensor) -> Tensor:
    residual = eps_hat
    for gain, noise in _pairs(target):
        residual = torch.addcmul(residual, noise, along(gain, noise), value=-1)
    return residual


def _lifted_residual(eps_hat: Tensor, dtype: torch.dtype, *target: Tensor) -> Tensor:
    # A CPU's operators copy what is of another dtype. Out of place there would be three at once.
    residual = eps_hat.to(dtype)
    for gain, noise in _pairs(target):
        residual.addcmul_(noise, along(gain, noise), value=-1)
    return residual


def _pairs(target: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    # Not one iterator twice, which torch 2.4's compiler pairs wrongly.
    return zip(target[::2], target[1::2], strict=True)


def along(per_sample: Tensor, data: Tensor) -> Tensor:
    """Give a [B] tensor the rank of `data`, so that it can only meet the batch axis."""
    return per_sample.view((-1, *(1,) * (data.ndim - 1)))


def _data_axes(data: Tensor) -> tuple[int, ...]:
    return tuple(range(1, data.ndim))


# On a CPU a norm adds up in the dtype of its result, in 8 lanes where memory is dense and one by
# one elsewhere, which over 2^24 float32 values is wrong by 1e-3. Samples longer than these stay
# below 1e-6 as a sum of pieces. What was a half type has few digits, which round less evenly.
# Shorter ones are below 1e-6 unless all values are equal, when every addition is rounded the same
# way: by 6e-6 at 3 · 32 · 32 values. Pieces there would cost 5 % of a small batch's step.
_LONG_SUM = 2**14
_LONG_HALF_SUM = 2**11
_PIECE = 2**8
_CHUNK = 2**18  # values whose squares may be written, where memory is not dense


def _sum_of_squares(values: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return Σ values² of each sample, which has `count` of them, without writing the squares."""
    if values.ndim == 1:
        return values.to(dtype).square()
    if not values.is_cpu:
        norm: Tensor = torch.linalg.vector_norm(values, dim=_data_axes(values), dtype=dtype)
        return norm * norm
    longest = _LONG_SUM
    if values.dtype != dtype:
        values, longest = values.to(dtype), _LONG_HALF_SUM
    if not values.is_contiguous() and (values.stride(0) != count or 0 in values.stride()):
        longest = _PIECE
    if count <= longest:
        norm = torch.linalg.vector_norm(values, dim=_data_axes(values))
        return norm * norm
    if not values.is_contiguous():
        # A sum is the same in the order in which memory has the values.
        axes = sorted(_data_axes(values), key=values.stride, reverse=True)
        values = values.permute(0, *axes)
        if not values[:1].is_contiguous():
            return _sum_of_chunks(values)
    pieces, rest = divmod(count, _PIECE)
    if rest:
        values = values.view(len(values), count)
        last = torch.linalg.vector_norm(values[:, -rest:], dim=1, keepdim=True)
        values = values[:, :-rest]
    norms = torch.linalg.vector_norm(values.view(len(values), pieces, _PIECE), dim=2)
    if rest:
        norms = torch.cat([norms, last], dim=1)
    # A sum, unlike a norm, adds up in pairs, and is right to its last digits in float32. No product
    # of vectors: autocast would make that in a half type.
    sums: Tensor = norms.square().sum(1)
    return sums


def _sum_of_chunks(values: Tensor) -> Tensor:
    """Return Σ values² where a norm is slow or not exact: expanded axes, cropped images."""
    axes = _data_axes(values)
    longest = max(axes, key=values.size)
    chunks = min(-(-values.numel() // _CHUNK), values.shape[longest])
    sums = [chunk.square().sum(axes) for chunk in values.tensor_split(chunks, longest)]
    return torch.stack(sums).sum(0)


def _finite(sums: Tensor) -> Tensor:
    """Return the largest number for infinity. What is not a number stays so."""
    return sums.clamp_max(torch.finfo(sums.dtype).max)


def _add_product(base: Tensor | None, first: Tensor, second: Tensor, scale: float) -> Tensor:
    if base is None:
        return torch.mul(first, second) * scale
    return torch.addcmul(base, first, second, value=scale)


def _reduce_batch(per_sample: Tensor, reduction: Reduction) -> Tensor:
    return _REDUCE[reduction](per_sample)


_REDUCE: dict[Reduction, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "none": lambda per_sample: per_sample,
}


def _is_watched() -> bool:
    """Whether something looks at each operator, such as selective checkpointing."""
    return torch._C._len_torch_dispatch_stack() > 0


def _is_better_made_twice() -> bool:
    return (
        _CHECKPOINTS_COMPILE
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
    )


def _needs_plain_operators(eps_hat: Tensor, *constants: Tensor | None) -> bool:
    """Whether more is asked than the gradient of ε̂, or another than autograd asks.

    Plain operators answer whatever transform stands around them (torch.func, forward mode, batched
    gradients) and whatever tensors are made of (DTensor), and the compiler fuses them by itself.
    """
    plain = (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_made_of_tensors(eps_hat)
    )
    for tensor in constants:  # in half the time of `any`
        plain = plain or (tensor is not None and tensor.requires_grad)
    return plain


def _is_made_of_tensors(tensor: Tensor) -> bool:
    """Whether it is a DTensor, a quantised tensor or the like."""
    return type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__")


def placed_like(data: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """Return `tensors`, those of shape [B] on every device of the mesh where `data` is a DTensor.

    Each device makes the coefficients from t, of the whole batch, whatever part of ε̂ lies there.
    DTensor is known by its attributes: its module takes long to import, and has moved.
    """
    mesh = None if type(data) is Tensor else getattr(data, "device_mesh", None)
    if mesh is None:
        return tensors
    kind: Any = type(data)
    return tuple(
        tensor
        if tensor is None or tensor.ndim != 1 or hasattr(tensor, "device_mesh")
        else kind.from_local(tensor, mesh, run_check=False)
        for tensor in tensors
    )


def whole(per_sample: Any) -> Tensor:
    """Return a DTensor of shape [B] as the plain tensor of the whole batch, any other as it is."""
    plain = type(per_sample) is Tensor or not hasattr(per_sample, "device_mesh")
    tensor: Tensor = per_sample if plain else per_sample.full_tensor()
    return tensor
