"""The loss head: where the loss meets the data.

Everything else in the loss has one value for each sample and costs little. The head moves
the data six times and makes one new tensor of their size, which ends as the gradient:

    forward     residual = output - scale · target     reads two, writes one
                norms of pieces of the residual        reads one
    backward    residual *= a factor                   reads one, writes one

`F.mse_loss` moves them eight times and makes three such tensors. On a CPU half types need float32
copies, of which the head holds two at once, as `F.mse_loss` does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from s2dm_loss._torch import is_watched, needs_plain_operators, quick_apply, replicated_like
from s2dm_loss.checks import check_rows

Reduction = Literal["mean", "sum", "none"]


class ReductionRow(NamedTuple):
    """What a loss of data [B, ...] is of its weighted squares.

    Attributes:
        first_axis: Their sum is divided by the number of values in this axis and all after it;
            beyond the last axis by nothing.
        per_sample: Whether the result has shape [B].
    """

    first_axis: int
    per_sample: bool


REDUCTIONS: dict[Reduction, ReductionRow] = {
    "mean": ReductionRow(first_axis=0, per_sample=False),
    "sum": ReductionRow(first_axis=1, per_sample=False),
    "none": ReductionRow(first_axis=1, per_sample=True),
}
check_rows("REDUCTIONS", REDUCTIONS, Reduction)

# Longest run of values that one float32 norm adds up. A CPU's norm adds in 8 lanes, one after the
# other: over 2^14 equal values that is wrong by 1e-5, over 256 by less than 1e-6.
_PIECE = 256


def along(per_sample: Tensor, data: Tensor) -> Tensor:
    """Give a [B] tensor the rank of `data`, so that it can only meet the batch axis."""
    return per_sample.view((-1, *(1,) * (data.ndim - 1)))


def weighted_square(
    output: Tensor,
    share: Tensor,
    slope: Tensor,
    scales: Sequence[Tensor],
    data: Sequence[Tensor],
    *,
    per_sample: bool,
) -> Tensor:
    """Return Σ share · (output - Σ scale · data)², over all axes or all but the batch.

    Args:
        output: Of shape [B, ...]; autograd gives its gradient without a second residual.
        share: What each squared value counts, of shape [B, 1, ...] and the rank of `output`, in the
            dtype of the result.
        slope: Twice the share, which the gradient needs.
        scales: Shaped as the share and in its dtype.
        data: One for each scale, shaped as `output`.
        per_sample: Whether the result has shape [B].
    """
    # Plain operators too where anything but the output needs a gradient, and for no data at all.
    # A schedule that learns is in the scales, and with `normalize` not in the share.
    plain = needs_plain_operators(output) or not output.numel()
    for tensor in (share, *scales, *data):  # in half the time of `any`
        plain = plain or tensor.requires_grad
    if plain:
        share, *scales = replicated_like(output, share, *scales)
        return _plain_square(output, share, scales, data, per_sample=per_sample)
    return _quick_square(output, (share, slope, scales, data), per_sample)


def _plain_square(
    output: Tensor,
    share: Tensor,
    scales: Sequence[Tensor],
    data: Sequence[Tensor],
    *,
    per_sample: bool,
) -> Tensor:
    residual = output
    for scale, part in zip(scales, data, strict=True):
        # No `addcmul`: `torch.func.linearize` ends the process at one with a value.
        residual = residual - scale * part
    squares = residual.to(share.dtype).square()
    # No einops: a compiled loss would check at each call all that einops looks up.
    if squares.ndim > 1:
        squares = squares.sum(tuple(range(1, squares.ndim)), keepdim=True)
    squares = share * squares
    return squares.view(-1) if per_sample else squares.sum()


class _WeightedSquare(torch.autograd.Function):
    """The square whose residual becomes its gradient, in place.

    Autograd's own would keep the residual until it has made the gradient beside it, and would
    record each step of the arithmetic on [B], which is most of what a small batch costs.

    What needs no gradient comes as one tuple, since autograd's care for each argument costs time.
    Nothing that an operator made is changed in place while somebody watches: selective
    checkpointing may keep the output of any operator here.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        output: Tensor,
        fixed: tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]],
        per_sample: bool,
    ) -> Tensor:
        share, slope, scales, data = fixed
        in_place = not is_watched()
        residual = _residual(output, slope.dtype, scales, data, in_place=in_place)
        # The residual is no saved tensor, since it is there to be overwritten. A second backward
        # through the same graph makes it again from the saved ones.
        ctx.residual, ctx.slope, ctx.dtype = residual, slope, output.dtype
        ctx.in_place = in_place
        ctx.save_for_backward(output, slope, *scales, *data)
        squares = _piece_norms(residual).square() * share.view(-1, 1)
        return squares.sum(1) if per_sample else squares.sum()

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        # Compiled autograd has one graph for every call, which knows saved tensors alone.
        anew = torch.is_grad_enabled() or torch.compiler.is_compiling()
        # In one step: of two threads that come back through one graph only one can have it.
        residual = None if anew else vars(ctx).pop("residual", None)
        if residual is None:
            output, slope, *parts = ctx.saved_tensors
            scales, data = parts[: len(parts) // 2], parts[len(parts) // 2 :]
            in_place = not is_watched()
            residual = _residual(output, slope.dtype, scales, data, in_place=in_place)
            gradient = residual * _factor(grad, slope)
        else:
            factor = _factor(grad, ctx.slope)
            try:
                gradient = residual.mul_(factor) if ctx.in_place else residual * factor
            except RuntimeError:
                # Several gradients at once (`is_grads_batched`) do not fit into one residual.
                gradient = residual * factor
        return gradient if gradient.dtype == ctx.dtype else gradient.to(ctx.dtype), None, None


_quick_square = quick_apply(_WeightedSquare)


def _factor(grad: Tensor, slope: Tensor) -> Tensor:
    """Return what the residual is multiplied by, for the gradient of a scalar or of [B]."""
    return slope * (along(grad, slope) if grad.ndim else grad)


def _residual(
    output: Tensor,
    dtype: torch.dtype,
    scales: Sequence[Tensor],
    data: Sequence[Tensor],
    *,
    in_place: bool,
) -> Tensor:
    """Return output - Σ scale · data in `dtype`, one new tensor."""
    residual, ours = output, False
    if output.is_cpu and output.dtype != dtype:
        # A CPU's operators copy what is of another dtype. Out of place there would be three copies.
        residual, ours = output.to(dtype), in_place
    for scale, part in zip(scales, data, strict=True):
        if ours:
            residual.addcmul_(part, scale, value=-1)
        else:
            residual = torch.addcmul(residual, part, scale, value=-1)
            ours = in_place
    return residual


def _piece_norms(values: Tensor) -> Tensor:
    """Return the norms of each sample's pieces, of shape [B, pieces]."""
    count = values.shape[1:].numel()
    pieces, piece, rest = _pieces(count)
    if not values.is_contiguous():
        # A sum is the same in the order in which memory has the values. With the batch innermost
        # they are copied: strided values are added in one lane, with eight times the rounding.
        axes = sorted(range(1, values.ndim), key=values.stride, reverse=True)
        values = values.permute(0, *axes).reshape(values.shape[0], count).contiguous()
    if not rest:
        norms: Tensor = torch.linalg.vector_norm(values.view(-1, pieces, piece), dim=2)
        return norms
    values = values.reshape(-1, count)
    last = torch.linalg.vector_norm(values[:, count - rest :], dim=1, keepdim=True)
    values = values[:, : count - rest].view(-1, pieces, piece)
    return torch.cat([torch.linalg.vector_norm(values, dim=2), last], dim=1)


@functools.lru_cache(maxsize=64)
def _pieces(count: int) -> tuple[int, int, int]:
    """Return how many pieces, of which length, and the rest: 0 unless they would be too short."""
    piece = max(n for n in range(1, min(count, _PIECE) + 1) if count % n == 0)
    if piece < count and piece < _PIECE // 8:
        piece = _PIECE
    return count // piece, piece, count % piece
