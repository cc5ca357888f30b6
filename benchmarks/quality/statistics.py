"""Improvements over plain training, paired by seed, with intervals.

A seed's own luck moves a distance by more than most of the effects under test, but it moves both
sides of a pair alike: same initialisation, data order, training noise and starting noise. So the
ratio of two distances is taken within each seed, in logarithms, and the interval over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

FLOOR_MARGIN = 1.25
"""A distance of less than this many floors says nothing of the samples."""
FRECHET, KERNEL, SPREAD = "images_frechet", "images_kernel", "spread"
RAW_FRECHET = "raw_frechet"
KEYS = ["method", "sampler", "steps", "seed"]


class Cell(NamedTuple):
    """A sampler at a number of steps."""

    sampler: str
    steps: int


def cell_key(method: str, cell: Cell) -> str:
    """Return what a record calls a method's cell; of the plain network it is the cell alone."""
    where = f"{cell.sampler}-{cell.steps}"
    return where if method == "plain" else f"{method}, {where}"


class Interval(NamedTuple):
    """A mean over seeds with Student's 95 % interval, which is infinite for one seed."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def interval(values: Iterable[float]) -> Interval:
    """Return the mean of one value per seed, at least one, and its interval."""
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        raise ValueError("values: expected one value per seed, got none")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = float(stats.t.ppf(0.975, array.size - 1) * stats.sem(array))
    return Interval(mean, mean - half, mean + half, array.size)


def log_ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return log(ours / theirs) for the seeds that both have.

    Raises:
        ValueError: If a distance is not positive, as a kernel distance at the floor may be.
    """
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if any(value <= 0 for pair in pairs for value in pair):
        raise ValueError(f"distances: expected positive ones, got {pairs}")
    return [math.log(a / b) for a, b in pairs]


def change(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Return by how many per cent ours is nearer; None without a common seed.

    It is 100 (1 - ours / theirs), at the mean log ratio over the seeds.
    """
    logs = log_ratios(ours, theirs)
    if not logs:
        return None
    found = interval(logs)
    mean, low, high = (-100 * math.expm1(x) for x in (found.mean, found.high, found.low))
    return Interval(mean, low, high, found.seeds)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values that hold together: Holm's (1979), which is Bonferroni step by step."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for done, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        least = max(least, min(1.0, (len(p_values) - done) * p_values[name]))
        adjusted[name] = least
    return adjusted


def percent(found: Interval | None, digits: int = 1) -> str | None:
    """Return a change as text, with its interval where there is one, bold where it excludes 0."""
    if found is None:
        return None
    if found.seeds == 1:
        return f"{found.mean:+.{digits}f} %"
    text = f"{found.mean:+.{digits}f} % [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.sign else text


class Results:
    """One run's record as a long table: a row for each method, sampler, steps and seed."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        """Make the table of what `benchmarks.quality.record.collect` returns."""
        self.record = record
        table = pd.DataFrame(record["rows"], columns=record["columns"])
        self.table = table.set_index(KEYS).sort_index()
        self.methods: list[str] = list(table["method"].unique())
        cells = table[["method", "sampler", "steps"]].drop_duplicates()
        self._cells = [(name, Cell(sampler, steps)) for name, sampler, steps in cells.to_numpy()]

    @property
    def base(self) -> str:
        """The sampler that others are compared with: DDIM, or Euler for a flow network."""
        return "ddim" if any(cell.sampler == "ddim" for _, cell in self._cells) else "euler"

    def title(self, method: str) -> str:
        """Return a method's name in tables."""
        return self.record["titles"][method]

    def cells(self, method: str) -> list[Cell]:
        """Return the cells of a method, in the order of the run."""
        return [cell for name, cell in self._cells if name == method]

    def values(self, method: str, cell: Cell, measure: str = FRECHET) -> dict[int, float]:
        """Return a measure by seed; empty where there is none."""
        if (method, cell) not in self._cells or measure not in self.table:
            return {}
        found = self.table.loc[(method, *cell), measure].dropna()
        return {int(seed): float(value) for seed, value in found.items()}

    def mean(self, method: str, cell: Cell, measure: str = FRECHET) -> float:
        """Return the mean over the seeds, or raise LookupError if there are none."""
        values = self.values(method, cell, measure)
        if not values:
            raise LookupError(f"{self.record['preset']} has no {measure} of {method} at {cell}")
        return sum(values.values()) / len(values)

    @property
    def floor(self) -> float:
        """The Fréchet distance at which as many real images as there are samples would lie.

        Of two sets of n and m real images it is proportional to 1/n + 1/m, and one pair of sets
        was measured.
        """
        measured = self.record["floor"]
        each = measured["images_each"]
        other = measured.get("reference", each)
        reference = measured.get("reference", 2 * each)  # without, all images are the reference
        samples = self.record["settings"]["samples"]
        share = (1 / samples + 1 / reference) / (1 / each + 1 / other)
        return float(measured["frechet"] * share)

    def at_floor(self, method: str, cell: Cell, measure: str = FRECHET) -> bool:
        """Return whether a method's mean distance is about as small as that of real images."""
        near = measure.endswith("frechet") and bool(self.values(method, cell, measure))
        return near and self.mean(method, cell, measure) < FLOOR_MARGIN * self.floor

    def change(
        self, method: str, cell: Cell, measure: str = FRECHET, over: tuple[str, Cell] | None = None
    ) -> Interval | None:
        """Return by how many per cent a method is nearer to the data; None if not measured.

        Over the plain network in the same cell, or the method and cell that `over` names.
        """
        theirs = self.values(*(over or ("plain", cell)), measure)
        return change(self.values(method, cell, measure), theirs)

    def mean_change(
        self, method: str, cells: Iterable[Cell], measure: str = FRECHET, over: str = "plain"
    ) -> Interval | None:
        """Return the change over several cells, a log ratio averaged over them within each seed.

        Only seeds that have every cell count; None where there are none.
        """
        per_cell = []
        for cell in cells:
            ours, theirs = (self.values(name, cell, measure) for name in (method, over))
            per_cell.append({s: log_ratios({s: ours[s]}, theirs)[0] for s in ours if s in theirs})
        seeds = sorted(set.intersection(*map(set, per_cell))) if per_cell else []
        means = {s: math.exp(sum(one[s] for one in per_cell) / len(per_cell)) for s in seeds}
        return change(means, dict.fromkeys(means, 1.0))

    def chosen_elsewhere(self, methods: Iterable[str], cell: Cell) -> dict[int, str]:
        """Return, for each seed, the method that is nearest on average in the other seeds.

        So that what is reported of a seed was not chosen on it. Methods that lack a seed are left
        out; empty with one seed.
        """
        found = pd.DataFrame({name: self.values(name, cell) for name in methods}).sort_index()
        whole = found.dropna(axis="columns")
        if len(whole) < 2 or whole.empty:
            return {}
        return (whole.sum() - whole).idxmin(axis="columns").to_dict()

    def dose(self, loss: str, gain: str, cell: Cell) -> Interval | None:
        """Return the share of the way to its gain that a trained loss has come, by the spread.

        None where one of the two was not measured.
        """
        plain, trained, full = (self.values(name, cell, SPREAD) for name in ("plain", loss, gain))
        seeds = sorted(plain.keys() & trained.keys() & full.keys())
        shares = [(trained[s] - plain[s]) / (full[s] - plain[s]) for s in seeds]
        return interval(shares) if shares else None
