"""The loss alone. Each level yields its results one by one, the most useful first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar

import click
import torch

from benchmarks.overhead import measure
from benchmarks.overhead.contenders import Loss, compiled, contenders
from benchmarks.overhead.measure import Shape

T = TypeVar("T")
Cell = dict[str, Any]

LATENTS = (64, 4, 64, 64)
KNOWN = {
    "CIFAR10": (128, 3, 32, 32),
    "SD latents": LATENTS,
    "CelebA": (128, 3, 64, 64),
    "ADM-256": (16, 3, 256, 256),
    "video latents": (4, 16, 13, 60, 90),
}
"""What people train on, by the end of a cell's name."""
ALLOCATIONS = 5


def flat_shape(log2: int) -> Shape:
    """Return 64 samples of 4 channels, square, of 2^log2 elements in all; log2 is even."""
    side = 2 ** ((log2 - 8) // 2)
    return (64, 4, side, side)


@dataclass(frozen=True)
class Settings:
    """Where, how large and how long."""

    device: torch.device
    seconds: float  # for each cell of a table, compilation not counted
    largest: int  # log2 of the largest size; even
    step_batch: int
    step_seconds: float  # for each training step
    deadline: float = float("inf")  # by `time.monotonic`; what comes later is left out
    small: bool = False  # for a rehearsal: one sample of each known shape, and a small network
    other: dict[str, Loss] = field(default_factory=dict)  # of another version, by that version

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes people train on, then the sizes from the largest to 2^14, by name."""
        known = {name: (1, *shape[1:]) if self.small else shape for name, shape in KNOWN.items()}
        return known | {f"2^{n}": flat_shape(n) for n in range(self.largest, 13, -2)}

    def in_time(self, cells: Sequence[T], seconds: float = 0) -> Iterator[tuple[T, float]]:
        """Yield each cell and its seconds, until the deadline.

        A cell gets its even share of what is left, less a part for what is not timed.
        """
        for done, cell in enumerate(cells):
            left = self.deadline - time.monotonic()
            if left <= 0:
                click.echo(f"  out of time: {len(cells) - done} of {len(cells)} left out", err=True)
                return
            yield cell, min(seconds or self.seconds, 0.6 * left / (len(cells) - done))


def interleave_heads(
    settings: Settings, losses: Mapping[str, Loss], shape: Shape, dtype: torch.dtype, seconds: float
) -> dict[str, list[float]]:
    """Time losses, forward and backward, on inputs that are allocated anew now and then.

    Where the inputs happen to lie in memory moves a ratio by 5 % and more.
    """
    times: dict[str, list[float]] = {name: [] for name in losses}
    # Several times the last cache, which is 50 MiB on an H100.
    least_bytes = (1 if settings.small else 256) * 2**20
    for _ in range(ALLOCATIONS):
        inputs = measure.inputs_in_turn(shape, dtype, settings.device, least_bytes)
        calls = {
            name: lambda loss=loss, inputs=inputs: measure.gradient_of(loss, next(inputs))
            for name, loss in losses.items()
        }
        part = measure.interleave(calls, settings.device, seconds / ALLOCATIONS, 20 // ALLOCATIONS)
        for name, values in part.items():
            times[name] += values
    return times


def bandwidth(settings: Settings) -> Iterator[Cell]:
    """Speed of a copy between tensors that exist already."""
    mebibytes = 16 if settings.small else 1024 if settings.device.type == "cuda" else 128
    rates = measure.copy_bandwidth(settings.device, mebibytes, settings.seconds)
    yield {"mebibytes": mebibytes, "copy_bytes_per_second": rates}


def heads(settings: Settings, mode: str, dtypes: Sequence[torch.dtype]) -> Iterator[Cell]:
    """Forward and backward of the loss alone, "eager" or "compiled", at every shape and size."""
    # Of each type the shapes that people train on come before the sizes.
    cells = sorted(product(dtypes, settings.shapes.items()), key=lambda c: c[1][0] not in KNOWN)
    losses_in = {dtype: contenders(settings.device, dtype) | settings.other for dtype in dtypes}
    for (dtype, (name, shape)), seconds in settings.in_time(cells):
        losses = compiled(losses_in[dtype]) if mode == "compiled" else losses_in[dtype]
        try:
            times = interleave_heads(settings, losses, shape, dtype, seconds)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            click.echo(f"  {name}: more than the device's memory, left out", err=True)
            continue
        yield {
            "name": name,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "mode": mode,
            **measure.summarise(times),
        }


def counts(settings: Settings) -> Iterator[Cell]:
    """Peak memory, operators, bytes, kernels, syncs, graph breaks, gradients: exact, no clock."""
    latents = settings.shapes["SD latents"]
    shapes = sorted((settings.shapes[name] for name in KNOWN), key=lambda shape: shape != latents)
    cells = [
        (shape, dtype, name, loss)
        for shape, dtype in product(shapes, (torch.float32, torch.bfloat16))
        for name, loss in (contenders(settings.device, dtype) | settings.other).items()
    ]
    for (shape, dtype, name, loss), _ in settings.in_time(cells):
        arguments = measure.some_arguments(shape, dtype, settings.device)
        work = measure.gradient_of(loss, arguments)
        work()  # what happens once only, such as the first read of a table
        with measure.OperatorCount(large=arguments[0].nbytes) as count:
            work()
        arguments[0].grad = None  # not held before the peak
        row: Cell = {
            "contender": name,
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "data_bytes": arguments[0].nbytes,
            "peak_bytes": measure.peak_memory(work, settings.device),
            "operators": count.operators,
            "data_operators": count.data_operators,
            "bytes": count.bytes,
            "sync_operators": count.syncs,
        }
        if settings.device.type == "cuda":
            row |= {"kernels": measure.kernels(work), "sync": None}
            try:
                with measure.syncs_forbidden():
                    work()
            except RuntimeError as error:
                row["sync"] = str(error).splitlines()[0]
        if shape == latents:
            torch.compiler.reset()
            explained = torch._dynamo.explain(loss)(*arguments)
            row["graph_breaks"] = explained.graph_break_count
            if explained.graph_break_count == 0:
                row["compiled_bytes"] = measure.inductor_bytes(loss, arguments)
        if name == "expected":
            row["gradient_error"] = measure.gradient_error(loss, arguments)
        yield row
