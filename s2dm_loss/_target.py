"""Is a trainer's target what a criterion takes it for? Told by the noise that is read out of it.

The noise ε̂ in a target on x_t = a x_0 + b ε has two properties, whatever the data: its mean square
is 1, and its mean product with x_t is b. Together they say that ε̂ is uncorrelated with the data
that it leaves, a x̂_0 = x_t - b ε̂, which is most sensitive to a small share of data in ε̂. Each mean
is tested over the whole batch and over groups of similar t, against its own standard error:

    mean ε̂² - 1                          variance 2 / n
    mean ε̂ x̂_0 / root mean square x̂_0    variance 1 / n
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2dm_loss.checks import check_like, check_per_sample, describe
from s2dm_loss.loss import SkipStepLoss
from s2dm_loss.prediction import PREDICTION_TYPES, PathPoint, PredictionType
from s2dm_loss.schedule import NoiseSchedule, Schedule, data_at_of

MIN_VALUES = 8192
_GROUPS = 8
# Of the up to 18 tests of a right target, one is beyond four standard errors in 0.1 % of batches.
_STANDARD_ERRORS = 4.0
# What tables in float32 and inputs in half precision may change a mean by.
_SLACK = 0.01
# A v tells its schedule by what the size of the data differs from that of the noise.
_SAME_SIZE = 0.1
# Samples in which rounding moves ε̂ by more, which are those next to the data, say nothing.
_MOST_ROUNDING = 0.03


@dataclass(frozen=True)
class TargetReport:
    """What `check_target` has measured.

    Attributes:
        values: How many values were judged.
        mean_square: Mean square of the noise in the target; 1 for a right one.
        correlation: Of that noise and the data that it leaves in x_t; 0 for a right one.
        error: Root mean square of its difference from `noise`, if that was given.
        worst: The largest deviation over its tolerance, above 1 for a wrong one.
        rows: One line for each group of similar times.
    """

    values: int
    mean_square: float
    correlation: float
    error: float | None
    worst: float
    rows: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the target is what it was taken for."""
        return self.worst <= 1

    def __str__(self) -> str:
        """Return a table."""
        last = "" if self.error is None else "   error"
        head = f"                   times   mean square   correlation{last}"
        return "\n".join([head, *self.rows])


def check_target(
    criterion: SkipStepLoss,
    target: Tensor,
    t: Tensor,
    x_t: Tensor,
    *,
    mask: Tensor | None = None,
    noise: Tensor | None = None,
) -> TargetReport:
    """Raise AssertionError unless a criterion reads standard noise out of a trainer's target.

    `check_swap` cannot detect a wrong prediction type or a wrong schedule. Here the noise in the
    target must have mean square 1 and no correlation with the data that it leaves in x_t. Only the
    right reading has both. Switch off what a trainer changes about the noise (an offset, perturbed
    inputs).

    Measured on batches of 8,192 values (128 samples of 64, or 16 of 512; a linear DDPM schedule,
    flow matching, alpha = cos(π t / 2); Gaussian data of variance 1 and 0.25, and data of ±1): of
    600 batches for each wrong pair of prediction types on each schedule none passed, and 1 of 1,800
    batches was accused wrongly. Of 8 samples at random times, a batch whose times are all late
    can pass: give many samples, or times from all over the schedule.

    Args:
        criterion: The loss that the adapter makes; diffusers' `SkipLoss` has it as `.criterion`.
        target: What the trainer compares the network's output with, of shape [B, ...].
        t: Times of shape [B] as the criterion is given them, from all over the schedule.
        x_t: The network's noisy input, of the shape of `target`.
        mask: Which values count, of a shape that broadcasts to that of `target`; not 0 where one
            does.
        noise: The trainer's noise ε, of the same shape. With it the prediction type is judged
            exactly, for any number of values, and so are a reversed time and, of a v, the schedule
            on data of variance near 1, which nothing else detects. Where the target is the noise
            alone, schedule and time are judged by x_t, from some 1,000 values on.

    Returns:
        What was measured.

    Raises:
        AssertionError: if it is another target; the message names the readings that fit it.
        ValueError: if `noise` is needed, for too few values or for a v that fits on data of root
            mean square 0.9 to 1.1, or an argument is not as said.
    """
    if not isinstance(criterion, SkipStepLoss):
        own = ": pass its `.criterion`" if hasattr(criterion, "criterion") else ""
        raise TypeError(f"criterion must be a SkipStepLoss, got {describe(criterion)}{own}")
    check_like("x_t", x_t, "target", target)
    check_per_sample("t", t, "target", target)
    if noise is not None:
        check_like("noise", noise, "target", target)
    if mask is not None:
        _check_mask(mask, target)
    if not len(target):
        raise ValueError(f"target must hold samples, got {describe(target)}")
    batch = _Batch.of(target, t, x_t, mask, noise)
    path = PathPoint.at(criterion.schedule, t)
    report = batch.read(path, criterion.prediction_type)
    if noise is None and report.values < MIN_VALUES:
        raise ValueError(
            f"target must hold {MIN_VALUES} values or more to be judged without `noise`, got "
            f"{report.values} that count: give a larger batch, or the trainer's noise as `noise`. "
            "Not counted are those under the mask and samples too near the data for their type"
        )
    if noise is not None and report.values == 0:
        raise ValueError("target must hold values that count, got none: see `mask` and t")
    if not report.fits:
        raise AssertionError(
            "the noise in target must have mean square 1 and no correlation with the data: "
            f"{criterion.prediction_type!r} on {criterion.schedule!r} is not what the trainer "
            f"trains.\n{report}\n{_remedy(batch, criterion, t, path)}"
        )
    if noise is None and criterion.prediction_type == "v_prediction":
        _check_size(batch, path)
    return report


def _check_size(batch: _Batch, path: PathPoint) -> None:
    """Raise ValueError for data as large as the noise, which any rotation of (x_t, v) turns into.

    On a variance-preserving path x_0 = a x_t - b v.
    """
    data = path.a[:, None] * batch.x_t - path.b[:, None] * batch.target
    size = float((data.square() * batch.counts).sum() / batch.counts.sum()) ** 0.5
    on_circle = torch.hypot(path.a, path.b).allclose(torch.ones_like(path.a))
    if on_circle and abs(size - 1) < _SAME_SIZE:
        raise ValueError(
            "noise must be given to judge a v on data of root mean square 0.9 to 1.1, got none on "
            f"data of {size:.2f}: there a v fits every variance-preserving schedule. Pass the "
            "trainer's noise"
        )


def _check_mask(mask: object, target: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {describe(mask)}")
    try:
        mask.expand_as(target)
    except RuntimeError as error:
        raise ValueError(
            f"mask must have a shape that broadcasts to that of target, {tuple(target.shape)}, got "
            f"{describe(mask)}"
        ) from error


@dataclass(frozen=True)
class _Batch:
    """A batch as float64 of shape [B, D]; `counts` is 1 where a value counts."""

    target: Tensor
    t: Tensor
    x_t: Tensor
    counts: Tensor
    noise: Tensor | None
    eps: float

    @classmethod
    def of(
        cls, target: Tensor, t: Tensor, x_t: Tensor, mask: Tensor | None, noise: Tensor | None
    ) -> _Batch:
        """Return the batch, detached."""
        counts = torch.ones_like(target) if mask is None else (mask != 0).expand_as(target)

        def flat(name: str, values: Tensor) -> Tensor:
            # What does not count may be NaN.
            kept = torch.where(counts != 0, values.detach().double(), 0.0)
            if not kept.isfinite().all():
                raise ValueError(
                    f"{name} must be finite where it counts, got {int((~kept.isfinite()).sum())} "
                    f"values of {kept.numel()} that are not: see what the trainer divides by, or "
                    "whether half precision overflows"
                )
            return kept.reshape(len(target), -1)

        eps = max(torch.finfo(values.dtype).eps for values in (target, x_t))
        return cls(
            flat("target", target),
            t.detach(),
            flat("x_t", x_t),
            flat("mask", counts),
            None if noise is None else flat("noise", noise),
            eps,
        )

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the data axis of the values that count, of shape [B]."""
        return (values * self.counts).sum(1) / self.counts.sum(1).clamp(min=1)

    def read(self, path: PathPoint, prediction_type: PredictionType) -> TargetReport:
        """Return how well the target fits a path and a prediction type."""
        p, q = PREDICTION_TYPES[prediction_type](path)
        a, b = path.a, path.b
        if p is None:
            ratio, lift = 1 / q, torch.zeros_like(q)
        else:
            d = a * q - b * p
            ratio, lift = a / d, -p / d
        parts = ratio[:, None] * self.target, lift[:, None] * self.x_t
        epsilon = parts[0] + parts[1]
        # The parts differ by ε alone if they are right. By its own size a wrong one, much too
        # large, would say nothing.
        smaller = torch.minimum(*(self.mean(part.square()).sqrt() for part in parts))
        rounding = self.eps * (1 + 2 * smaller)
        square, correlation = self.mean(epsilon.square()) - 1, self._correlation(epsilon, b)
        error = off_path = None
        if self.noise is not None:
            error = self.mean((epsilon - self.noise).square())
            # Where the target is the noise, it says nothing of the path.
            off_path = self._correlation(self.noise, b)
        numbers = self.counts.sum(1) * (rounding <= _MOST_ROUNDING)
        kept = numbers.nonzero().flatten()
        kept = kept[self.t[kept].argsort()]
        if len(kept) == 0:
            return TargetReport(0, float("nan"), float("nan"), None, float("inf"), ())
        worst, rows = 0.0, []
        groups = kept.tensor_split(min(_GROUPS, len(kept)))
        for group in (*groups, kept):
            n = numbers[group]
            root_n = float(n.sum()) ** 0.5
            means = [float((each[group] * n).sum() / n.sum()) for each in (square, correlation)]
            cells = f"{means[0] + 1:11.4g} {means[1]:13.3g}"
            if error is None or off_path is None:
                spread = zip(means, (2**0.5, 1.0), strict=True)
                misfit = max(
                    abs(mean) / (_SLACK + _STANDARD_ERRORS * each / root_n) for mean, each in spread
                )
            else:
                errors = error[group].sqrt()
                misfit = float((errors / (_SLACK + 4 * rounding[group])).max())
                mean = abs(float((off_path[group] * n).sum() / n.sum()))
                misfit = max(misfit, mean / (_SLACK + _STANDARD_ERRORS / root_n))
                cells += f" {float(errors.max()):7.2g}"
            worst = max(worst, misfit if misfit == misfit else float("inf"))
            first, last = (float(self.t[group[end]]) for end in (0, -1))
            rows.append(f"{first:10.4g} to {last:10.4g}   {cells}")
        # Of the last group, which is all.
        return TargetReport(
            values=int(n.sum()),
            mean_square=means[0] + 1,
            correlation=means[1],
            error=None if error is None else float((error[kept] * n).sum() / n.sum()) ** 0.5,
            worst=worst,
            rows=tuple(rows[:-1]),
        )

    def _correlation(self, noise: Tensor, b: Tensor) -> Tensor:
        """Return the correlation of a noise with the data that it leaves in x_t, of shape [B]."""
        data = self.x_t - b[:, None] * noise
        size = self.mean(data.square()).sqrt()
        # Where there are no data but rounding they say nothing.
        there = size > 10 * self.eps * self.mean(self.x_t.square()).sqrt()
        return torch.where(there, self.mean(noise * data) / size, 0.0)


def _remedy(batch: _Batch, criterion: SkipStepLoss, t: Tensor, path: PathPoint) -> str:
    """Return which other readings fit the target, those first that change least."""
    negated = replace(batch, target=-batch.target)
    readings = [(batch, what, other) for what, other in _paths(criterion.schedule, t, path)]
    readings += [(negated, [*what, "-output for -target"], other) for _, what, other in readings]
    for given, what, other in readings:
        fitting: list[str] = []
        for kind in PREDICTION_TYPES:
            try:
                report = given.read(other(), kind)
            except (ValueError, AttributeError, NotImplementedError):  # no velocity there
                continue
            if report.fits and report.values:
                changed = [] if kind == criterion.prediction_type else [f"prediction_type={kind!r}"]
                fitting.append(" and ".join([*changed, *what]))
        if fitting:
            return f"What fits it: {', or '.join(fitting)}."
    return (
        "Nothing else fits it on this schedule: is the schedule the trainer's, is x_t the input "
        "before any scaling, and is every change of the noise (offset, perturbed input) off?"
    )


def _paths(
    schedule: Schedule, t: Tensor, path: PathPoint
) -> Iterator[tuple[list[str], Callable[[], PathPoint]]]:
    """Yield what to change about a schedule or x_t, and the path that is left."""
    yield [], lambda: path
    steps = schedule.timesteps
    if steps is None:
        turned, how = 1 - t, f"data_at={1 - data_at_of(schedule)}"
    else:
        turned, how = steps.numel() - 1 - t, f"{steps.numel() - 1} - t"

    def backwards() -> PathPoint:
        def rates() -> tuple[Tensor, Tensor]:
            alpha_rate, sigma_rate = schedule.derivatives(turned)  # type: ignore[attr-defined]
            return -alpha_rate, -sigma_rate

        return PathPoint(*schedule.alpha_sigma(turned), rates=rates)

    yield [f"time turned round, {how}"], backwards
    size = torch.hypot(path.a, path.b)

    def no_rates() -> tuple[Tensor, Tensor]:
        raise ValueError("a scaled path has no derivatives here")

    sigma_form = isinstance(schedule, NoiseSchedule) and bool((path.a == 1).all())
    if not sigma_form:
        yield (
            ["x_t = x_0 + σ ε, the path of NoiseSchedule.from_sigmas, or x_t divided by √(1+σ²)"],
            lambda: PathPoint(torch.ones_like(path.a), path.b / path.a, no_rates),
        )
    yield (
        ["x_t of variance-preserving scale, √ᾱ x_0 + √(1-ᾱ) ε, or x_t multiplied by √(1+σ²)"],
        lambda: PathPoint(path.a / size, path.b / size, no_rates),
    )
