"""The measured figures, read and put into words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Results = dict[str, Any]  # one device's JSON
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
LARGE = 2**20
HEAD_ORDER = ("mse", "mse_lifted", "min_snr", "expected", "shared", "fresh", "released")


def eager_cells(results: Results) -> list[Results]:
    """Return the cells of the head in eager mode and float32, which the answers are of."""
    return [
        cell
        for cell in results["head"]["figures"]
        if (cell["mode"], cell["dtype"]) == ("eager", "float32")
    ]


def extra_time(timed: Results) -> float:
    """Return by how many microseconds `expected` takes longer than `F.mse_loss`."""
    times = timed["microseconds"]
    extra: float = times["expected"][1] - times["mse"][1]
    return extra


def head_shares(results: Results) -> tuple[float, float]:
    """Return the least and the most that `expected` adds to the plain step, by the head's times.

    Measured beside the step, and where the head was measured at the step's shape once more.
    """
    step = results["step"]["figures"]
    again = eager_cells(results) if "head" in results else []
    heads = [step["head"], *(cell for cell in again if cell["shape"] == step["shape"])]
    shares = [extra_time(head) / step["microseconds"]["mse"][1] for head in heads]
    return min(shares), max(shares)


def share_range(results: Results) -> str:
    """Return `head_shares` as text."""
    least, most = (f"{share:.2%}" for share in head_shares(results))
    return least if least == most else f"{least} to {most}"


def bandwidth_shares(results: Results, cell: Results, name: str) -> tuple[float, float]:
    """Return (bytes moved, least bytes possible) ÷ (time · copy bandwidth).

    The least is to read ε̂ and ε and to write one gradient.
    """
    counted = "bytes" if cell["mode"] == "eager" else "compiled_bytes"
    row = next(  # one shape alone is compiled
        row
        for row in reversed(results["counts"]["figures"])
        if row["contender"] == name and row["dtype"] == cell["dtype"] and counted in row
    )
    least = useful_rate(cell, name) / copy_rate(results)
    return row[counted] / row["data_bytes"] / 3 * least, least


def by_shape(results: Results, dtype: str) -> Iterable[tuple[tuple[int, ...], dict[str, Results]]]:
    """Group the counts of one dtype by shape, then by contender."""
    groups: dict[tuple[int, ...], dict[str, Results]] = {}
    for row in results["counts"]["figures"]:
        if row["dtype"] == dtype:
            groups.setdefault(tuple(row["shape"]), {})[row["contender"]] = row
    return groups.items()


def quartiles(values: list[float], digits: int) -> str:
    """Return the median, and in brackets the quartiles."""
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}, {high})"


def value_range(values: list[float]) -> str:
    """Return the least and the greatest."""
    low, high = (f"{value:.{2 if value < 10 else 1}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def shape_text(shape: Iterable[int]) -> str:
    """Return a shape such as 64×4×64×64."""
    return "×".join(map(str, shape))


def duration(microseconds: float) -> str:
    """Return a time in the unit that suits it."""
    if microseconds < 1e3:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def copy_rate(results: Results) -> float:
    """Return the bytes a second of a copy, read and written."""
    rate: float = results["bandwidth"]["figures"]["copy_bytes_per_second"][1]
    return rate


def useful_rate(cell: Results, name: str) -> float:
    """Return the bytes a second that count: ε̂ and ε read and one gradient written."""
    size = {"float32": 4, "bfloat16": 2}[cell["dtype"]] * math.prod(cell["shape"])
    return 3 * size / (cell["microseconds"][name][1] / 1e6)
