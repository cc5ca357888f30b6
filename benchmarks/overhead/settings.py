"""What every level shares: how large, how long, which ratios, a line for each result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click
import torch

from benchmarks.overhead.contenders import Loss
from benchmarks.overhead.measure import Inputs, forward_backward, interleave

PAIRS = [
    ("mse_lifted", "mse"),
    ("min_snr", "mse"),
    ("expected", "mse"),
    ("fresh", "mse"),
    ("shared", "mse"),
    ("released", "mse"),
    ("expected", "mse_lifted"),
    ("expected", "min_snr"),
    ("released", "expected"),
    ("sa_dpm", "mse"),
    ("sa_dpm", "expected"),
]
ALLOCATIONS = 5


@dataclass(frozen=True)
class Settings:
    """How large and how long.

    Attributes:
        device: Where.
        seconds: Time for each cell, compilation not counted.
        smallest: log2 of the smallest size.
        largest: log2 of the largest size.
        in_full: log2 of the sizes that are compiled and taken in bfloat16 too; each compilation
            takes many seconds.
        step_batch: Batch of the training step.
        step_seconds: Time for the training step.
        cache_bytes: What the input sets have to fill before they take turns again.
        clock: What times a CPU: the wall's clock, or the process's own CPU time.
    """

    device: torch.device
    seconds: float
    smallest: int
    largest: int
    in_full: tuple[int, ...]
    step_batch: int
    step_seconds: float
    cache_bytes: int
    clock: Callable[[], float]

    def interleave(
        self, prepare: Mapping[str, Callable[[], Callable[[], None]]], seconds: float
    ) -> dict[str, list[float]]:
        """Time contenders in turn, as `measure.interleave` does."""
        return interleave(prepare, self.device, seconds, clock=self.clock)

    def interleave_heads(
        self, losses: Mapping[str, Loss], shape: tuple[int, ...], dtype: torch.dtype, seconds: float
    ) -> dict[str, list[float]]:
        """Time losses, forward and backward, on inputs that are allocated anew now and then.

        Where the inputs happen to lie in memory moves a ratio by 5 % and more.
        """
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(ALLOCATIONS):
            inputs = Inputs(shape, dtype, self.device, self.cache_bytes)
            calls = {name: forward_backward(loss, inputs) for name, loss in losses.items()}
            part = interleave(
                calls,
                self.device,
                seconds / ALLOCATIONS,
                clock=self.clock,
                least_rounds=20 // ALLOCATIONS,
            )
            for name, values in part.items():
                times[name] += values
        return times


def say(cell: dict[str, Any]) -> None:
    """Report a result in a line while others are still being measured."""
    words = [str(cell[key]) for key in ("name", "contender", "dtype", "mode") if key in cell]
    if "ratios" in cell:
        name = "expected" if "expected/mse" in cell["ratios"] else "shipped"
        median = cell["ratios"][f"{name}/mse"][1]
        words.append(f"ours takes {median:.2f} times F.mse_loss's time")
    elif "peak_bytes" in cell:
        words.append(f"{cell['peak_bytes'] / cell['data_bytes']:.2f} tensors held at once")
    click.echo("  " + " ".join(words), err=True)
