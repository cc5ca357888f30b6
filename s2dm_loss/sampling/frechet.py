"""A statistic: how much nearer to the data one set of samples lies than another.

The Fréchet distance between two sets, |μ_x - μ_y|² + tr C_x + tr C_y - 2 tr (C_x C_y)^½, comes out
too large where the covariances are those of samples, by about b/n with a b that grows with the
samples' own spread: a difference of two distances is biased against the set that spreads more. Two
halves of n/2 have the bias 2b/n, so

    2 · distance of all - mean distance of the halves

has none in first order, and is hardly noisier (Quenouille's jackknife; the same step in 1/n that
FID∞ takes, Chong and Forsyth, arXiv 1911.07023).

The intervals come from influence functions. The derivative of the overlap tr (C_x C_y)^½ by C_x is
T/2 with T the map that carries the one Gaussian to the other, T C_x T = C_y, and T⁻¹/2 by C_y. To
first order a difference of distances is so a mean over samples plus a mean over data: a few
decompositions for each set, and no resampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCE = 0.95
# Above this many dimensions a covariance of a few thousand samples is mostly noise, and below this
# many samples for each of them the bias is no longer b/n. It takes four on Gaussian data, eight on
# one-hot ones.
MAX_AXES = 128
SAMPLES_PER_AXIS = 8
# Draws from the joint law of the differences, for the common bound and the shares.
DRAWS = 4096


class Axes:
    """Coordinates along the axes in which the data vary most, and what lies outside them.

    Up to `MAX_AXES` dimensions these are the values themselves. Any orthonormal axes make a valid
    distance, so the leading ones need not be exact, and a randomised decomposition is enough: an
    exact one takes minutes for images. But they must not be found on the data that are then
    compared, which vary along them more than other data do.
    """

    def __init__(self, data: Tensor, count: int, seed: int) -> None:
        """Find `count` axes of data [N, D], or take all of them where D is not larger."""
        self.center: Tensor = data.mean(0)
        self.axes: Tensor | None = None
        if count < data.shape[1]:
            with torch.random.fork_rng(devices=[]):
                # Of the CPU alone: `torch.manual_seed` would seed each GPU, which stays so.
                torch.default_generator.manual_seed(seed)
                self.axes = torch.svd_lowrank(data - self.center, q=count, niter=4)[2]

    def __call__(self, values: Tensor) -> Tensor:
        """Return [N, P + 1]: the coordinates along the axes, and the distance from them."""
        values = values - self.center
        if self.axes is None:
            return torch.cat([values, values.new_zeros(len(values), 1)], dim=1)
        along = values @ self.axes
        outside = (values.square().sum(1) - along.square().sum(1)).clamp(min=0).sqrt()
        return torch.cat([along, outside[:, None]], dim=1)


class Differences(NamedTuple):
    """Sets of samples against the first of them, each entry of shape [K].

    Attributes:
        distance: Fréchet distance from the data, without the bias. It can come out below 0.
        best_share: How probable it is that this set is the nearest to the data.
        difference: `distance` less that of the first set.
        low: Lower ends of the intervals of `difference`, which hold together.
        high: Upper ends.
        own_high: Upper ends for the difference from the set's own baseline; these hold together
            with the intervals of `difference`.
    """

    distance: Tensor
    best_share: Tensor
    difference: Tensor
    low: Tensor
    high: Tensor
    own_high: Tensor


class FrechetComparison:
    """Fréchet distances of several sets of samples from the same data.

    Samples of one row number come from the same noise in every set, so that the noise common to
    all falls out of the differences.
    """

    def __init__(self, data: Tensor, num_samples: int, seed: int) -> None:
        """Take the data's coordinates, float64 [M, P + 1] as `Axes` returns them."""
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._data = data
        # Shuffled: data are often sorted by class.
        self._halves = self._split(num_samples)
        self._data_halves = self._split(len(data))
        self._data_gaussians = [_Gaussian(data)] + [_Gaussian(data[h]) for h in self._data_halves]
        self._distances: list[float] = []
        self._influences: list[tuple[Tensor, Tensor]] = []

    def _split(self, count: int) -> tuple[Tensor, ...]:
        return torch.randperm(count, generator=self._generator, device="cpu").chunk(2)

    def add(self, samples: Tensor) -> float:
        """Take the coordinates of the next set, and return its distance."""
        by_sample = torch.zeros(len(samples), dtype=torch.float64, device="cpu")
        by_datum = torch.zeros(len(self._data), dtype=torch.float64, device="cpu")
        distance = torch.inf
        gaussians = [_Gaussian(samples), *(_Gaussian(samples[half]) for half in self._halves)]
        # Finite samples can be too large to be squared.
        if all(gaussian.is_finite for gaussian in gaussians):
            whole, *parts = (
                _Pair(*pair) for pair in zip(gaussians, self._data_gaussians, strict=True)
            )
            distance = 2 * whole.distance
            distance -= sum(part.distance for part in parts) / 2
            # Each half by the map of the other: a map follows the samples it was made from. But
            # where only a few rows have a direction, one half may lack it, and their part would be
            # lost: then by the map of all.
            maps = [whole, whole] if {part.rank for part in parts} != {whole.rank} else parts[::-1]
            for part, half, rows in zip(maps, self._halves, self._data_halves, strict=True):
                by_sample[half], by_datum[rows] = part.influences(samples[half], self._data[rows])
        elif not self._distances:
            raise ValueError(
                "sample must return finite samples, got NaN, infinity or values too large to square"
            )
        self._distances.append(distance)
        # A set without a distance takes no part in the common bound.
        self._influences.append(
            (by_sample, by_datum) if distance < torch.inf else self._influences[0]
        )
        return distance

    def differences(self, baselines: Sequence[int] | None = None) -> Differences:
        """Compare all sets with the first, and each with a baseline of its own.

        Args:
            baselines: For each set the number of its baseline; the first if not given.
        """
        distance = torch.tensor(self._distances, dtype=torch.float64, device="cpu")
        count = len(distance)
        # Each set against the first, and those with another baseline against that, too.
        pairs = [(i, 0) for i in range(count)]
        pairs += [(i, base) for i, base in enumerate(baselines or ()) if base]
        left, right = torch.tensor(pairs, device="cpu").T
        difference = distance[left] - distance[right]
        # Of the mean over samples plus that over data, which are independent.
        parts = []
        for influences in zip(*self._influences, strict=True):
            by_set = torch.stack(influences)
            parts.append((by_set[left] - by_set[right]).cov() / by_set.shape[1])
        covariance = (parts[0] + parts[1]).reshape(len(pairs), len(pairs))
        error = covariance.diagonal().sqrt()
        # Correlations, so that the variance of a set that has diverged does not swamp the others'.
        per_error = 1 / error.masked_fill(error == 0, torch.inf)
        values, vectors = torch.linalg.eigh(per_error[:, None] * covariance * per_error)
        normal = torch.randn(
            DRAWS, len(pairs), generator=self._generator, dtype=torch.float64, device="cpu"
        )
        deviations = (normal * values.clamp(min=0).sqrt()) @ vectors.T
        # One bound for all: the largest of the standardised deviations.
        reach = torch.quantile(deviations.abs().amax(1), CONFIDENCE) * error
        winners = (difference + deviations * error)[:, :count].argmin(1)
        high = difference + reach
        own_high = high[:count].clone()
        own_high[left[count:]] = high[count:]
        return Differences(
            distance,
            torch.bincount(winners, minlength=count) / DRAWS,
            difference[:count],
            (difference - reach)[:count],
            high[:count],
            own_high,
        )


class _Gaussian:
    """Mean and covariance of coordinates [N, P + 1]."""

    def __init__(self, coordinates: Tensor) -> None:
        along = coordinates[:, :-1]
        self.mean = along.mean(0)
        centered = along - self.mean
        self.covariance: Tensor = centered.T @ centered / (len(along) - 1)
        self.trace = float(self.covariance.diagonal().sum())
        # Of what lies outside the axes only the root mean square is followed.
        self.outside = float(coordinates[:, -1].square().mean().sqrt())

    @property
    def is_finite(self) -> bool:
        """Whether all that a distance is made of is."""
        return bool(self.covariance.isfinite().all()) and math.isfinite(self.outside)

    @cached_property
    def factor(self) -> Tensor:
        """A factor L of the covariance, C = L Lᵀ, less directions that are rounding alone."""
        values, vectors = torch.linalg.eigh(self.covariance)
        rounding = values[-1] * len(values) * torch.finfo(values.dtype).eps
        factor: Tensor = vectors * torch.where(values > rounding, values, 0.0).sqrt()
        return factor


class _Pair:
    """The distance of two Gaussians, and its derivative by each."""

    def __init__(self, samples: _Gaussian, data: _Gaussian) -> None:
        self.samples, self.data = samples, data
        # With C_y = L Lᵀ, C_x = K Kᵀ and Lᵀ K = U Σ Vᵀ: the overlap is tr Σ, T = L U Σ⁻¹ Uᵀ Lᵀ and
        # T⁻¹ = K V Σ⁻¹ Vᵀ Kᵀ. Σ itself, since of its square the small ones are lost.
        left, overlap, right = torch.linalg.svd(data.factor.T @ samples.factor)
        self.distance = (
            float((samples.mean - data.mean).square().sum())
            + samples.trace
            + data.trace
            - 2 * float(overlap.sum())
            + (samples.outside - data.outside) ** 2
        )
        # There is no map in directions that one of the two does not have.
        there = overlap > 1e-12 * overlap[0]
        self.rank = int(there.sum())
        root = overlap.masked_fill(~there, 1.0).rsqrt() * there
        self._to_data = data.factor @ left * root  # times its transpose: T
        self._to_samples = samples.factor @ right.mT * root  # times its transpose: T⁻¹

    def influences(self, samples: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each sample and each datum adds to the distance, up to a constant."""
        shift = self.samples.mean - self.data.mean
        outside = self.samples.outside, self.data.outside
        return (
            _influence(samples, self.samples.mean, shift, self._to_data, outside),
            _influence(data, self.data.mean, -shift, self._to_samples, outside[::-1]),
        )


def _influence(
    values: Tensor, mean: Tensor, shift: Tensor, root: Tensor, outside: tuple[float, float]
) -> Tensor:
    centered = values[:, :-1] - mean
    carried = centered @ root
    own, other = outside
    ratio = other / own if own > 0 else 0.0
    return (
        2 * centered @ shift
        + centered.square().sum(1)
        - carried.square().sum(1)
        + (1 - ratio) * values[:, -1].square()
    )
