"""Improvements over plain training, paired by seed, with intervals.

A seed's own luck moves a Fréchet distance by more than most of the effects under test, but it
moves both sides of a pair alike: same initialisation, data order, training noise and starting
noise.  So the relative improvement is taken within each seed, and the interval over the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 10_000
FLOOR_MARGIN = 1.25
"""A distance of less than this many floors says nothing of the samples."""


class Cell(NamedTuple):
    """A sampler at a number of steps."""

    sampler: str
    steps: int


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with two 95 % intervals.

    Attributes:
        mean: The mean.
        low: Lower end of Student's t interval.
        high: Its upper end.
        boot_low: Lower end of the percentile bootstrap over seeds.
        boot_high: Its upper end.
        count: Seeds.
    """

    mean: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    count: int

    @property
    def sign(self) -> int:
        """1 or -1 where the t interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def errors_either_side(count: int) -> float:
    """Return how many standard errors a 95 % t interval of `count` values reaches either way."""
    return math.inf if count == 1 else float(stats.t.ppf(0.975, count - 1))


def interval(values: Iterable[float]) -> Interval:
    """Return the mean of one value per seed, and its intervals.

    With five seeds a percentile bootstrap is too narrow (it cannot reach beyond the extremes it
    has seen), so the t interval decides and the bootstrap stands beside it.

    Raises:
        ValueError: If there are no values.
    """
    array: NDArray[np.float64] = np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        raise ValueError("values: expected one value per seed, got none")
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, float("-inf"), float("inf"), float("-inf"), float("inf"), 1)
    half = errors_either_side(array.size) * float(array.std(ddof=1) / np.sqrt(array.size))
    draw = np.random.default_rng(0).integers(array.size, size=(RESAMPLES, array.size))
    boot_low, boot_high = np.percentile(array[draw].mean(1), [2.5, 97.5])
    return Interval(
        mean, mean - half, mean + half, float(boot_low), float(boot_high), int(array.size)
    )


def log_ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Return log(ours / theirs) by seed, for the seeds that both have."""
    return [math.log(ours[seed] / theirs[seed]) for seed in ours if seed in theirs]


def improvement_of_ratios(
    ours: Mapping[int, float], theirs: Mapping[int, float]
) -> Interval | None:
    """Return 100 (1 - ours / theirs) at the mean log ratio over the seeds; None without a seed."""
    logs = log_ratios(ours, theirs)
    if not logs:
        return None
    found = interval(logs)
    mean, low, high, boot_low, boot_high = (
        -100 * math.expm1(value)
        for value in (found.mean, found.high, found.low, found.boot_high, found.boot_low)
    )
    return Interval(mean, low, high, boot_low, boot_high, found.count)


def p_value(values: Sequence[float]) -> float:
    """Return Student's two-sided p-value of a mean of 0, one value per seed; 1 with one seed."""
    array: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    if array.size < 2 or not array.any():
        return 1.0
    error = array.std(ddof=1) / np.sqrt(array.size)
    return float(2 * stats.t.sf(abs(array.mean()) / max(error, 1e-300), array.size - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values that hold together: Holm's (1979), which is Bonferroni step by step."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for done, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        least = max(least, min(1.0, (len(p_values) - done) * p_values[name]))
        adjusted[name] = least
    return adjusted


class Results:
    """The rows of one run's record, by method, cell and seed.

    Args:
        record: What `benchmarks.quality.runner.collect` returns.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        """Sort the rows."""
        self.record = record
        columns = list(record["columns"])
        self._values: dict[str, dict[tuple[str, Cell], dict[int, float]]] = {}
        for row in record["rows"]:
            entry = dict(zip(columns, row, strict=True))
            key = (entry["method"], Cell(entry["sampler"], entry["steps"]))
            for measure in columns[4:]:
                if entry[measure] is not None:
                    by_seed = self._values.setdefault(measure, {}).setdefault(key, {})
                    by_seed[entry["seed"]] = entry[measure]
        # The samples as the sampler returns them, where the feature network takes them.
        self.primary = "raw_frechet" if "raw_frechet" in self._values else "images_frechet"

    def of_seeds(self, seeds: Iterable[int]) -> Results:
        """Return the results of some of the seeds."""
        place, kept = self.record["columns"].index("seed"), set(seeds)
        rows = [row for row in self.record["rows"] if row[place] in kept]
        raw = {
            cell: {seed: value for seed, value in by_seed.items() if int(seed) in kept}
            for cell, by_seed in self.record.get("raw_spreads", {}).items()
        }
        return Results({**self.record, "rows": rows, "raw_spreads": raw})

    @property
    def methods(self) -> list[str]:
        """Names of the methods that have results, in the order of the run."""
        return list(dict.fromkeys(row[0] for row in self.record["rows"]))

    def title(self, method: str) -> str:
        """Return a method's name in tables."""
        title: str = self.record["titles"][method]
        return title

    def cells(self, method: str) -> list[Cell]:
        """Return the cells of a method, in the order of the run."""
        found = (key[1] for key in self._values[self.primary] if key[0] == method)
        return list(dict.fromkeys(found))

    def values(self, method: str, cell: Cell, measure: str | None = None) -> dict[int, float]:
        """Return a measure by seed; empty where there is none."""
        return self._values.get(measure or self.primary, {}).get((method, cell), {})

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

    def at_floor(self, method: str, cell: Cell, measure: str | None = None) -> bool:
        """Return whether a method's mean distance is as small as that of real images."""
        measure = measure or self.primary
        values = self.values(method, cell, measure)
        if not values or not measure.endswith("frechet"):
            return False
        return float(np.mean(list(values.values()))) < FLOOR_MARGIN * self.floor

    def improvements(
        self, method: str, cell: Cell, measure: str | None = None, baseline: str = "plain"
    ) -> dict[int, float]:
        """Return 100 (1 - d / d_baseline) by seed, for the seeds that both have."""
        ours = self.values(method, cell, measure)
        theirs = self.values(baseline, cell, measure)
        return {seed: 100 * (1 - ours[seed] / theirs[seed]) for seed in ours if seed in theirs}

    def difference(
        self, method: str, cells: Iterable[Cell], measure: str, baseline: str = "plain"
    ) -> Interval | None:
        """Return d_baseline - d, averaged over cells within each seed; positive is better.

        For the kernel distance, which is near 0 or below where samples are good.
        """
        per_cell = []
        for cell in cells:
            ours, theirs = (self.values(name, cell, measure) for name in (method, baseline))
            per_cell.append({seed: theirs[seed] - ours[seed] for seed in ours if seed in theirs})
        return _over_seeds(per_cell)

    def improvement(
        self,
        method: str,
        cells: Iterable[Cell],
        measure: str | None = None,
        baseline: str = "plain",
    ) -> Interval | None:
        """Return the improvement, averaged over cells within each seed.

        Only seeds that have every cell count; None where there are none.
        """
        return _over_seeds([self.improvements(method, c, measure, baseline) for c in cells])

    def chosen_elsewhere(
        self, methods: Iterable[str], cell: Cell, measure: str | None = None
    ) -> dict[int, str]:
        """Return, for each seed, the method that is nearest on average in the other seeds.

        So that what is reported of a seed was not chosen on it. Methods that lack a seed are left
        out; empty with one seed.
        """
        found = {name: self.values(name, cell, measure) for name in methods}
        seeds = set().union(*(values.keys() for values in found.values()))
        whole = {name: values for name, values in found.items() if set(values) == seeds}

        def elsewhere(name: str, seed: int) -> float:
            return float(np.mean([value for s, value in whole[name].items() if s != seed]))

        if len(seeds) < 2 or not whole:
            return {}
        return {s: min(whole, key=lambda name: elsewhere(name, s)) for s in sorted(seeds)}

    def against(
        self,
        ours: Mapping[int, str],
        theirs: Mapping[int, str],
        cell: Cell,
        measure: str | None = None,
    ) -> Interval | None:
        """Return the improvement of one choice of methods over another, each by seed."""
        pairs = [
            (self.values(ours[seed], cell, measure), self.values(theirs[seed], cell, measure), seed)
            for seed in ours
            if seed in theirs
        ]
        found = [100 * (1 - a[seed] / b[seed]) for a, b, seed in pairs if seed in a and seed in b]
        return interval(found) if found else None


def _over_seeds(per_cell: list[dict[int, float]]) -> Interval | None:
    """Return the interval of the mean over cells, for the seeds that have them all."""
    seeds = set.intersection(*map(set, per_cell)) if per_cell else set()
    if not seeds:
        return None
    return interval(float(np.mean([found[seed] for found in per_cell])) for seed in sorted(seeds))
