"""What `validation_loss` returns: losses by sample and level, compared, printed and drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self, override

from s2dm_loss.checks import (
    check_choice,
    check_number,
    describe,
    plain_value,
    read_plain_value,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {"plain": "plain", "skip_step": "S²-DM"}


class Estimate(NamedTuple):
    """A mean over the samples and its standard error."""

    mean: float
    error: float


@dataclass(frozen=True)
class ValidationLoss:
    """The losses of each sample at each level; n samples, L levels.

    Attributes:
        index: The samples' indices, int64 of shape [n], rising.
        fingerprint: Of each sample the sum of its values with fixed signs and their size, of shape
            [n, 2]; `compare` tells by it whether two results are of the same data.
        losses: By kind of loss, float64 of shape [n, L]: "plain", mse(output, target), and
            "skip_step", the S²-DM loss, if there was a `skip_set`.
        log_snr: log SNR in the middle of each level, L floats, rising: from noise to data.
        settings: What `validation_loss` was called with.
    """

    index: Tensor
    fingerprint: Tensor
    losses: dict[str, Tensor]
    log_snr: list[float]
    settings: dict[str, Any]

    def overall(self, kind: str = "plain") -> Estimate:
        """Return the mean over all times, with its error over the samples.

        Args:
            kind: "plain" or "skip_step".
        """
        return _estimates(self._losses(kind).mean(1, keepdim=True))[0]

    def by_level(self, kind: str = "plain") -> list[Estimate]:
        """Return the mean at each level."""
        return _estimates(self._losses(kind))

    def compare(self, other: ValidationLoss, *, confidence: float = 0.95) -> Comparison:
        """Return this result's loss minus another's, sample by sample.

        Both models have seen the same samples, times and noise, so most of the spread of the
        samples cancels, and the interval is much narrower than that of two separate means.

        Args:
            other: The result of another checkpoint on the same data, with the same settings.
            confidence: Of the intervals, in (0, 1).

        Raises:
            TypeError, ValueError: if `other` is no such result.
        """
        check_number("confidence", confidence, 0.0, 1.0, open_ends=True)
        if not isinstance(other, ValidationLoss):
            raise TypeError(f"other must be a ValidationLoss, got {describe(other)}")
        for name in {**self.settings, **other.settings}:
            mine, theirs = self.settings.get(name), other.settings.get(name)
            if mine != theirs:
                raise ValueError(f"other must have the same {name}, {mine!r}, got {theirs!r}")
        same = torch.equal(self.index, other.index) and same_log_snr(self.log_snr, other.log_snr)
        if not (same and bool(same_samples(self.fingerprint, other.fingerprint).all())):
            raise ValueError(
                "other must be of the same samples, in the same order, and the same schedule: "
                "give validation_loss a loader that does not shuffle, or indices, and latents that "
                "are not drawn anew"
            )
        return Comparison(
            {kind: self.losses[kind] - other.losses[kind] for kind in self.losses},
            {kind: [level.mean for level in other.by_level(kind)] for kind in self.losses},
            self.log_snr,
            confidence,
        )

    def metrics(self, prefix: str = "val") -> dict[str, float]:
        """Return a flat dict of floats, for any logger."""
        found = {}
        for kind in self.losses:
            found[f"{prefix}/{kind}"], found[f"{prefix}/{kind}_error"] = self.overall(kind)
            for level, estimate in enumerate(self.by_level(kind)):
                name = f"{prefix}_{kind}/{level:02d}_log_snr_{self.log_snr[level]:.1f}"
                found[name] = estimate.mean
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON can hold it; `from_dict` reads it back.

        The values of each sample are in it, which a comparison needs.
        """
        found = {
            "settings": self.settings,
            "log_snr": self.log_snr,
            "overall": {kind: self.overall(kind)._asdict() for kind in self.losses},
            "by_level": {
                kind: [estimate._asdict() for estimate in self.by_level(kind)]
                for kind in self.losses
            },
            "index": self.index.tolist(),
            "fingerprint": self.fingerprint.tolist(),
            "losses": {kind: losses.tolist() for kind, losses in self.losses.items()},
        }
        plain: dict[str, Any] = plain_value(found)
        return plain

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the result that `to_dict` wrote."""
        state = read_plain_value(dict(state))
        return cls(
            index=torch.tensor(state["index"], dtype=torch.int64, device="cpu"),
            fingerprint=torch.tensor(state["fingerprint"], dtype=torch.float64, device="cpu"),
            losses={
                kind: torch.tensor(values, dtype=torch.float64, device="cpu")
                for kind, values in state["losses"].items()
            },
            log_snr=state["log_snr"],
            settings=state["settings"],
        )

    def plot(self) -> Figure:
        """Return a figure of the loss against log SNR, with two standard errors (matplotlib)."""
        figure, axes = _figure("loss")
        for kind in self.losses:
            _draw(axes, self.log_snr, self.by_level(kind), 2.0, _TITLES[kind])
        axes.set_yscale("log")
        axes.legend(frameon=False)
        return figure

    @override
    def __str__(self) -> str:
        count, kinds = len(self.index), list(self.losses)
        lines = [
            f"validation loss of {count} samples at {len(self.log_snr)} levels, mean ± standard "
            "error",
            f"{'log SNR':>8}" + "".join(f"{_TITLES[kind]:>22}" for kind in kinds),
        ]
        columns = [[*self.by_level(kind), self.overall(kind)] for kind in kinds]
        for label, *row in zip(
            [*(f"{value:.1f}" for value in self.log_snr), "all"], *columns, strict=True
        ):
            cells = (f"{mean:.5g} ± {error:.2g}" for mean, error in row)
            lines.append(f"{label:>8}" + "".join(f"{cell:>22}" for cell in cells))
        return "\n".join(lines)

    def _losses(self, kind: str) -> Tensor:
        check_choice("kind", kind, self.losses)
        return self.losses[kind]


@dataclass(frozen=True)
class Comparison:
    """The difference of two validation losses, one's minus the other's, with intervals.

    Attributes:
        differences: For each kind of loss the differences of shape [n, L].
        reference: For each kind the other's mean loss at each level, what percents are of.
        log_snr: log SNR in the middle of each level.
        confidence: Of the intervals.
    """

    differences: dict[str, Tensor]
    reference: dict[str, list[float]]
    log_snr: list[float]
    confidence: float

    def overall(self, kind: str = "plain") -> Estimate:
        """Return the mean difference over all times; below 0 the first model is better."""
        return _estimates(self.differences[kind].mean(1, keepdim=True))[0]

    def interval(self, kind: str = "plain") -> tuple[float, float]:
        """Return the interval of the mean difference over all times (Student's t, paired)."""
        mean, error = self.overall(kind)
        half = self._quantile() * error
        return mean - half, mean + half

    def by_level(self, kind: str = "plain") -> list[Estimate]:
        """Return the mean difference at each level."""
        return _estimates(self.differences[kind])

    def plot(self) -> Figure:
        """Return a figure of the difference in percent against log SNR, with its intervals.

        In percent of the other's loss at each level: the levels of high noise have a small loss.
        """
        figure, axes = _figure("difference of the loss, %")
        for kind, reference in self.reference.items():
            per_cent = [100 / base if base else math.nan for base in reference]
            shares = [
                Estimate(share * mean, share * error)
                for (mean, error), share in zip(self.by_level(kind), per_cent, strict=True)
            ]
            _draw(axes, self.log_snr, shares, self._quantile(), _TITLES[kind])
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.legend(frameon=False)
        return figure

    @override
    def __str__(self) -> str:
        lines = []
        for kind in self.differences:
            mean, (low, high) = self.overall(kind).mean, self.interval(kind)
            verdict = "lower" if high < 0 else "higher" if low > 0 else "not told apart"
            verdict = verdict if math.isfinite(mean) else "not finite"
            reference = fmean(self.reference[kind])
            percent = 100 * mean / reference if reference else math.nan
            lines.append(
                f"{_TITLES[kind]} loss {verdict}: {mean:+.4g} [{low:+.4g}, {high:+.4g}] "
                f"({percent:+.2f} %), {100 * self.confidence:g} % interval, paired"
            )
        return "\n".join(lines)

    def _quantile(self) -> float:
        count = len(next(iter(self.differences.values())))
        return t_quantile((1 + self.confidence) / 2, count - 1)


def same_log_snr(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    """Return whether the values are the same but for a logarithm's last digits on two machines."""
    return len(mine) == len(theirs) and all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9) for a, b in zip(mine, theirs, strict=True)
    )


def same_samples(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return which fingerprints are of the same samples, rounded to half precision or not.

    bfloat16 moves a sum by about 0.001 of the sample's size, and two samples differ by about it.
    """
    near = (mine - theirs).abs() <= 0.01 * mine[:, 1:]
    return (near | (mine == theirs) | (mine.isnan() & theirs.isnan())).all(1)


def t_quantile(probability: float, degrees: int) -> float:
    """Return a quantile of Student's t, exact for 1 and 2 degrees; NaN for none.

    Else its expansion in 1 / degrees, Abramowitz and Stegun 26.7.5: within 0.5 % of a 97.5 %
    quantile from 4 degrees on.
    """
    if degrees < 1:
        return math.nan
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    z: float = NormalDist().inv_cdf(probability)
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(degrees) ** power for power, term in enumerate(terms, 1))


def _estimates(losses: Tensor) -> list[Estimate]:
    """Return mean and standard error of each column of [n, L]; one sample has no error, NaN."""
    count = len(losses)
    spread = losses.std(0) if count > 1 else torch.full_like(losses[0], math.nan)
    error = spread / math.sqrt(count)
    return [Estimate(*pair) for pair in zip(losses.mean(0).tolist(), error.tolist(), strict=True)]


def _figure(label: str) -> tuple[Figure, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a figure needs matplotlib: pip install matplotlib", name="matplotlib"
        ) from error
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("log SNR  (left: noise, right: data)")
    axes.set_ylabel(label)
    return figure, axes


def _draw(
    axes: Any, log_snr: list[float], estimates: list[Estimate], factor: float, label: str
) -> None:
    means, errors = zip(*estimates, strict=True)
    axes.errorbar(
        log_snr,
        means,
        yerr=[factor * error for error in errors],
        marker="o",
        markersize=3,
        linewidth=1,
        capsize=2,
        label=label,
    )
