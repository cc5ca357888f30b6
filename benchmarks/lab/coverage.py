"""Whether the search's intervals hold, where the truth is known to all digits.

A repeat draws data and start noise anew and compares the samples of several gains by the statistic
of the search.  A sampler of an exact model acts on independent parts of the data one by one, so its
samples are put together from two kinds of parts: Gaussian axes, on which it is a factor
(``linear``), and a ring of eight Gaussians in the plane, for which it is run once on a pool of
noise.  Rows of the pool are drawn with replacement: the pool is the population, its moments the
truth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.lab.linear import SCHEDULE, gains, output_variances, recommend, run
from benchmarks.lab.mixtures import ExactModel, Mixture
from s2dm_loss import SkipGain
from s2dm_loss.sampling import Correction, PredictionScaling, StartScaling
from s2dm_loss.sampling.corrections import NONE
from s2dm_loss.sampling.frechet import FrechetComparison

RING = Mixture.ring()


class Cells(NamedTuple):
    """Sampling steps, numbers of samples, those also measured at the boundary, and repeats."""

    steps: tuple[int, ...]
    counts: tuple[int, ...]
    boundary: tuple[int, ...]
    repeats: int


STRENGTHS = (-49, 9, 49, 99)
"""The skips compared, below 0 for the inverse of the gain."""
FEW_AXES = Cells((10, 20, 50, 100), (512, 1024, 2048, 4096), (512, 4096), 400)
MANY_AXES = Cells((10, 50, 100), (512, 1024, 4096), (512,), 200)
CELLS = {2: FEW_AXES, 16: FEW_AXES, 64: MANY_AXES, 128: MANY_AXES}
"""What is measured for each number of axes."""
POOL = 65_536
TAILS = {"normal": None, "Student's t, 5 degrees": 5, "Student's t, 3 degrees": 3}
"""Degrees of freedom: with 3, values have no fourth moment and estimated variances no variance."""


@dataclass(frozen=True)
class Population:
    """Data of independent parts, and what a sampler makes of noise.

    Attributes:
        variances: The Gaussian axes' variances, ``[D]``.
        outputs: The samples' variances along them, ``[K, D]``.
        pool: The sampler's output on the first two axes, whose data are the ring,
            ``[K, POOL, 2]``; None where all axes are Gaussian.
        data_scale: Factor on the data.
        degrees: Of the multivariate Student's t, scaled to the variances, that the axes have in
            place of a Gaussian's.
    """

    variances: Tensor
    outputs: Tensor
    pool: Tensor | None = None
    data_scale: float = 1.0
    degrees: int | None = None

    def distances(self) -> Tensor:
        """Return the true Fréchet distances, ``[K]``."""
        spread, overlap = self._parts()
        total = self.variances.sum()
        if self.pool is not None:
            total = total + RING.covariance.trace()
        return spread + self.data_scale**2 * total - 2 * self.data_scale * overlap

    def at_the_boundary(self, index: int) -> Population:
        """Return the population whose data are scaled so that one strength changes nothing.

        The distance is quadratic in the scale of the data, and its square is common to all
        strengths.
        """
        spread, overlap = self._parts()
        scale = (spread[index] - spread[0]) / (2 * (overlap[index] - overlap[0]))
        return replace(self, data_scale=float(scale))

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Return |μ|² + tr C and tr (C_x C_y)^½ of every strength, for data of mean 0."""
        spread = self.outputs.sum(1)
        overlap = (self.outputs * self.variances).sqrt().sum(1)
        if self.pool is not None:
            centered = self.pool - self.pool.mean(1, keepdim=True)
            covariance = centered.mT @ centered / self.pool.shape[1]
            common = torch.linalg.eigvals(covariance @ RING.covariance).real
            spread = spread + self.pool.square().sum(2).mean(1)
            overlap = overlap + common.sqrt().sum(1)
        return spread, overlap

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return data ``[count, D + 1]`` and paired samples ``[K, count, D + 1]``."""
        size, degrees = len(self.variances), self.degrees

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def unit() -> Tensor:
            values = normal(count, size)
            if degrees is not None:
                # One divisor a sample: a sample that is far out is so along all axes.
                values /= (normal(degrees, count, 1).square().sum(0) / (degrees - 2)).sqrt()
            return values

        data = [unit() * self.variances.sqrt()]
        samples = [unit() * self.outputs.sqrt()[:, None]]
        if self.pool is not None:
            data.insert(0, RING.draw(count, generator))
            rows = torch.randint(self.pool.shape[1], (count,), generator=generator)
            samples.insert(0, self.pool[:, rows])
        # The last column is what lies outside the axes: nothing.
        data.append(torch.zeros(count, 1, dtype=torch.float64))
        samples.append(torch.zeros(len(self.outputs), count, 1, dtype=torch.float64))
        return self.data_scale * torch.cat(data, 1), torch.cat(samples, 2)


@cache
def ring_pool(steps: int, size: int = POOL) -> Tensor:
    """Return DDIM's output on the ring for every strength, from the same noise."""
    correction, model = SkipGain(SCHEDULE), ExactModel(RING, SCHEDULE)
    noise = torch.randn(size, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return torch.stack(
        [run(correction.correct_model(model, k), noise, steps=steps) for k in (0, *STRENGTHS)]
    )


def population(size: int, steps: int, pool: Tensor | None = None) -> Population:
    """Return a population of ``size`` axes, the i-th Gaussian one of variance 1 / √i."""
    gaussian = size if pool is None else size - 2
    variances = torch.arange(1, gaussian + 1, dtype=torch.float64).rsqrt()
    outputs = output_variances(variances, gains((0, *STRENGTHS)), "ddim", steps)
    return Population(variances, outputs, pool)


def repeated(drawn: Population, count: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Compare ``repeats`` times, and count how often the intervals hold.

    Returns:
        ``joint``: repeats in which every interval holds the truth.  ``alarms``: repeats in which a
        strength that does not help is called better than none beyond doubt.  ``recommended``: how
        often which strength is.
    """
    truth = drawn.distances()
    truth = truth - truth[0]
    holds, alarms, recommended = 0, 0, dict.fromkeys((0, *STRENGTHS), 0)
    for number in range(seed, seed + repeats):
        data, samples = drawn.draw(count, torch.Generator().manual_seed(number))
        comparison = FrechetComparison(data, count, number)
        for rows in samples:
            comparison.add(rows)
        found = comparison.differences()
        holds += bool(((found.low <= truth) & (truth <= found.high)).all())
        sure = found.high < 0
        alarms += bool((sure & (truth > -1e-12)).any())  # 0 but for rounding
        best = int(torch.where(sure, found.distance, torch.inf).argmin()) if sure.any() else 0
        recommended[(0, *STRENGTHS)[best]] += 1
    return {
        "truth": [float(f"{value:.4g}") for value in truth[1:]],
        "joint": holds,
        "alarms": alarms,
        "recommended": recommended,
    }


def coverage(bar: Any, law: str) -> dict[str, Any]:
    """Joint coverage, false alarms at a boundary, and power, of the statistic of the search."""
    rows = []
    cells = [(size, *each) for size, of in CELLS.items() for each in product(of.steps, of.counts)]
    for cell, (size, steps, count) in enumerate(bar(cells)):
        drawn = population(size, steps, ring_pool(steps) if law == "mixture" else None)
        repeats = CELLS[size].repeats
        seed = cell * 10_000 + (5_000_000 if law == "mixture" else 0)
        row = {"law": law, "size": size, "steps": steps, "count": count, "repeats": repeats}
        row |= repeated(drawn, count, repeats, seed=seed)
        if count in CELLS[size].boundary:
            # Where the smallest gain changes nothing.
            boundary = drawn.at_the_boundary(1 + STRENGTHS.index(9))
            row["boundary"] = repeated(boundary, count, repeats, seed=seed + 5_000)
        rows.append(row)
    return {"strengths": STRENGTHS, "data": "as many as samples", "rows": rows}


def tails(bar: Any, repeats: int = 400) -> dict[str, Any]:
    """Joint coverage with each of `TAILS`, in 16 dimensions with 10 steps."""
    gaussian = population(16, 10)
    rows = []
    for law, count in bar(list(product(TAILS, (512, 1024, 4096)))):
        drawn = replace(gaussian, degrees=TAILS[law])
        row = {"law": law, "size": 16, "steps": 10, "count": count, "repeats": repeats}
        rows.append(row | repeated(drawn, count, repeats, seed=9_000_000))
    return {"strengths": STRENGTHS, "data": "as many as samples", "rows": rows}


def whole_search(bar: Any, repeats: int = 200, num_samples: int = 512) -> dict[str, Any]:
    """Search over all corrections on Gaussian data in four dimensions.

    At the null the data have the very spread of the samples, so
    that every correction harms.
    """
    variances = torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    model = ExactModel(Mixture.gaussian(variances), SCHEDULE)
    rows = []
    for null, steps in bar([(True, 10), (False, 10), (False, 20)]):
        data_variances = _outputs(variances, NONE, 0, steps) if null else variances
        law = Mixture.gaussian(data_variances)

        def distance(
            correction: Correction, strength: float, steps: int = steps, law: Mixture = law
        ) -> float:
            outputs = _outputs(variances, correction, strength, steps)
            return float((outputs.sqrt() - law.variances[0].sqrt()).square().sum())

        holds, alarms, left = 0, 0, []
        for seed in range(repeats):
            draw = torch.Generator().manual_seed(20_000 + seed)
            data = law.draw(2 * num_samples, draw).float()
            ddim = {"ddim": partial(run, steps=steps)}
            found = recommend(model, ddim, data, num_samples, seed)
            truths = {c.label: distance(c.correction, c.strength) for c in found.candidates}
            plain, chosen = truths["none"], found.recommended
            holds += all(
                c.low - 1e-9 <= truths[c.label] - plain <= c.high + 1e-9 for c in found.candidates
            )
            alarms += found.improves and truths[chosen.label] >= plain
            left.append(truths[chosen.label])
        rows.append(
            {
                "null": null,
                "steps": steps,
                "plain": distance(NONE, 0),
                "joint": holds,
                "alarms": int(alarms),
                "mean_distance": sum(left) / repeats,
            }
        )
    return {
        "variances": variances.tolist(),
        "num_samples": num_samples,
        "repeats": repeats,
        "rows": rows,
    }


def _outputs(variances: Tensor, correction: Correction, strength: float, steps: int) -> Tensor:
    """Return the variances of DDIM's output with a correction, exactly."""
    table = gains([0])
    if isinstance(correction, PredictionScaling):
        table = correction.scale(torch.arange(table.shape[1]), strength)[None]
    outputs = output_variances(variances, table, "ddim", steps)[0]
    return outputs * strength**2 if isinstance(correction, StartScaling) else outputs
