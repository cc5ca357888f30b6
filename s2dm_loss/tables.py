"""Functions of t as tables: made once and in float64, read on any device and in any type.

The float64 source of a table never leaves the CPU and is no buffer, so no cast, move, export or
synchronisation of a module reaches it; what is read are copies of it, and a copy is kept only if it
is a real tensor, made under no transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from s2dm_loss._torch import full_tensor, is_traced, real_tensors


class DeviceCopies:
    """A tensor on the CPU, and a copy of it in each type and on each device that asks.

    Attributes:
        source: The tensor.
        copies: The copies made so far.
    """

    def __init__(self, source: Tensor) -> None:
        """Take the tensor."""
        self.source = source
        self.copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the tensor on a device and in a type, copied the first time only."""
        copy = self.copies.get((device, dtype))
        if copy is not None:
            return copy
        if is_traced():
            return self.source.to(device, dtype)
        with torch.inference_mode(False):
            copy = self.source.to(device, dtype)
        if type(copy) is Tensor:  # and no fake tensor
            self.copies[copy.device, dtype] = copy  # "cuda" becomes "cuda:0", which readers ask for
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copies": {}}


class TabledModule(nn.Module):
    """A module whose tables are ready on the device that it is moved to.

    Compiled code cannot make the copies, and these modules have no buffers that `.to()` would move.
    """

    def _copy_tables(self, device: torch.device) -> None:
        """Have copies ready on a device; a subclass knows of what."""
        raise NotImplementedError

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = fn(torch.empty(0, device="cpu")).device
        if device.type != "meta":  # which holds no values
            self._copy_tables(device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no annotations
        return self


_MOST_TABLES = 64
"""More numbers of values to divide by are divided by anew at each call."""
_WHOLE = (1, 1)
"""The table whose values are divided by nothing, for what has shape [B]."""


class TimeTable:
    """Several functions of t, packed into one table over a schedule's timesteps.

    In continuous time, where there is nothing to keep, the functions are called.
    """

    def __init__(
        self,
        functions: Callable[[Tensor], Sequence[Tensor]],
        timesteps: Tensor | None,
        *,
        shares: int = 0,
    ) -> None:
        """Make the table.

        Args:
            functions: Maps times to K values, each of the shape of the times.
            timesteps: All times, int64 of shape [T]; None in continuous time.
            shares: How many of them, the first ones, `at` divides.

        Raises:
            ValueError: if the timesteps are not 0 … T-1, or a value requires a gradient.
        """
        self._functions, self._shares = functions, shares
        # By what the first values in it are divided by, and the rank of what is read from it; none
        # in continuous time.
        self._tables: dict[tuple[int, int], DeviceCopies] = {}
        if timesteps is None:
            return
        with real_tensors():
            _check_timesteps(timesteps)
            table = torch.stack(tuple(functions(timesteps))).to("cpu", torch.float64)
            if table.requires_grad:
                raise ValueError(
                    "schedule, weighting and scale must be fixed on a discrete schedule, where "
                    "their values are kept, got values that require a gradient"
                )
            self._tables[_WHOLE] = DeviceCopies(table)
            self.copy_to(torch.device("cpu"))

    def at(
        self, t: Tensor, dtype: torch.dtype, divisor: int = 1, rank: int = 1
    ) -> Sequence[Tensor]:
        """Return the K values at times t, each of their shape and in `dtype`.

        Args:
            t: The times.
            dtype: Of what is returned.
            divisor: Of the shares.
            rank: Of what is returned: times of shape [B] give [B, 1, …], which meets the batch axis
                of data of that rank and no other.

        Raises:
            ValueError: if a timestep lies outside the table; see `read_table`.
        """
        # A table is read at every step, and is almost always there.
        if type(t) is Tensor and not is_traced():
            tables = self._tables.get((divisor, rank))
            table = None if tables is None else tables.copies.get((t.device, dtype))
            if table is not None:
                return read_table(table, t, axis=1).unbind(0)
        return self._made_at(full_tensor(t), dtype, divisor, rank)

    def _made_at(self, t: Tensor, dtype: torch.dtype, divisor: int, rank: int) -> Sequence[Tensor]:
        traced = is_traced()
        if not self._tables:
            values: Sequence[Tensor] = [value.to(dtype) for value in self._functions(t)]
        elif not traced and (mode := getattr(t, "fake_mode", None)) is not None:
            # A mode takes no tensor but its own, unless told to.
            table = mode.from_tensor(self._tables[_WHOLE].source).to(t.device, dtype)
            values = read_table(table, t, axis=1).unbind(0)
        # Held here: another thread's table may take the place of this one meanwhile.
        elif not traced and (kept := self._kept(divisor, rank)) is not None:
            return read_table(kept.on(t.device, dtype), t, axis=1).unbind(0)
        else:
            values = read_table(self._tables[_WHOLE].on(t.device, dtype), t, axis=1).unbind(0)
        values = *(value / divisor for value in values[: self._shares]), *values[self._shares :]
        return values if rank == 1 else [value.view(-1, *(1,) * (rank - 1)) for value in values]

    def _kept(self, divisor: int, rank: int) -> DeviceCopies | None:
        """Return a table of its own: a division and a view at each call would cost time."""
        kept = self._tables.get((divisor, rank))
        if kept is not None or len(self._tables) >= _MOST_TABLES:
            return kept
        with real_tensors():
            table = self._tables[_WHOLE].source.clone()
            table[: self._shares] /= divisor
            table = table.view(*table.shape, *(1,) * (rank - 1))
        kept = DeviceCopies(table)
        self._tables = {**self._tables, (divisor, rank): kept}
        return kept

    def copy_to(self, device: torch.device) -> None:
        """Have the float32 copy ready on a device."""
        if self._tables:
            self._tables[_WHOLE].on(device, torch.float32)


def _check_timesteps(timesteps: Tensor) -> None:
    """Raise ValueError unless the timesteps are 0 … T-1, as the columns of a table are counted."""
    count = timesteps.numel()
    if not torch.equal(timesteps.cpu(), torch.arange(count)):
        few = [str(t) for t in timesteps.flatten()[:2].tolist()]
        said = ", ".join([*few, "…", str(timesteps.flatten()[-1].item())] if count else ["none"])
        raise ValueError(
            f"schedule's timesteps must be 0, 1, …, T-1, of shape [T] and int64, got {said}"
        )


def read_table(table: Tensor, t: Tensor, axis: int = 0) -> Tensor:
    """Return what a table has at t along an axis, which the axes of t replace.

    Raises:
        ValueError: if a timestep lies outside the table. On a GPU, where the host cannot know
            without waiting, it is the device's own assertion instead; compiled, the values are NaN.
    """
    if t.ndim != 1:
        shape = table.shape[:axis] + t.shape + table.shape[axis + 1 :]
        return read_table(table, t.reshape(-1), axis).reshape(shape)
    if t.dtype not in (torch.int32, torch.int64):
        t = t.long()
    last = table.shape[axis]
    if torch.compiler.is_compiling():
        # Compiled code counts a negative index from the end. The axis is the last one here.
        inside = (t >= 0) & (t < last)
        return torch.where(inside, table.index_select(axis, torch.where(inside, t, 0)), math.nan)
    try:
        # index_select, unlike table[..., t], refuses an index below 0: it counts from no end.
        return table.index_select(axis, t)
    except (IndexError, RuntimeError) as error:
        outside = t[(t < 0) | (t >= last)]
        if outside.numel() == 0:
            raise
        raise ValueError(f"t must lie in [0, {last}), got {outside[0].item()}") from error
