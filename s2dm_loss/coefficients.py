"""The whole mathematics of S²-DM: the functions of t that the loss is made of.

Notation, with ᾱ of the schedule, k a skip and τ the share of the plain loss:

    α_skip(t) = ᾱ_t / ᾱ_{t-k}                    the transition t-k → t in one jump
    c²(t)     = (1 - α_skip) / α_skip = ᾱ_{t-k} / ᾱ_t - 1
    L(t)      = τ mse(ε̂, ε) + (1-τ) mse(c ε̂, ζ)  where a skip is valid (t >= k)
    L(t)      = mse(ε̂, ε)                        elsewhere

(arXiv 2401.01520, Eq. 13 and the released code.) Both terms are quadratics in ε̂. Completing the
square leaves one,

    L(t) = A mse(ε̂, target) + a constant that ε̂ does not touch, A = τ + (1-τ) c²,

and each estimator, that is each reading of ζ, is a target and a constant:

    estimator   ζ                  target     constant (mean over the elements)
    "fresh"     new Gaussian       s ε + g ζ  (τ - A s²) ε² + (1-τ - A g²) ζ²
                noise                         - 2 A s g ε ζ
    "expected"  its expectation    s ε        (τ - A s²) ε² + (1-τ)
    "shared"    the same noise ε   (s + g) ε  (1 - A (s+g)²) ε²

with s = τ / A and g = (1-τ) c / A. Where no skip is valid, τ = 1 and c = 0 say the plain loss.
Several skips at once are the mean of their losses: c and c² become means over the valid skips.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from s2dm_loss.checks import check_choice, check_number, check_switch, describe
from s2dm_loss.schedule import Schedule, check_schedule, wide_dtype
from s2dm_loss.skip_set import Skips, SkipSet

Estimator = Literal["expected", "fresh", "shared"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

DEFAULT_TAU = 0.99
DEFAULT_MAX_C2 = 100.0


class CompletedSquare(NamedTuple):
    """One quadratic in ε̂; every field has the shape of t, and None stands for zero.

    L = weight · mse(ε̂, gain · ε + skip_gain · ζ)
        + constant + noise_constant · mean ε² + skip_constant · mean ζ² + cross_constant · mean εζ

    Attributes:
        weight: A, what the squared error counts.
        gain: s, on ε in the target.
        constant: What is added as it stands.
        noise_constant: What mean ε² counts.
        skip_gain: g, on ζ in the target; for the estimator "fresh".
        skip_constant: What mean ζ² counts.
        cross_constant: What mean εζ counts.
    """

    weight: Tensor
    gain: Tensor
    constant: Tensor | None = None
    noise_constant: Tensor | None = None
    skip_gain: Tensor | None = None
    skip_constant: Tensor | None = None
    cross_constant: Tensor | None = None

    def to(self, dtype: torch.dtype) -> CompletedSquare:
        """Return it with every field in `dtype`."""
        fields: list[Any] = [None if field is None else field.to(dtype) for field in self]
        return CompletedSquare(*fields)

    def times(self, factor: Tensor) -> CompletedSquare:
        """Return the square of `factor` times the loss; the target stays."""

        def scaled(field: Tensor | None) -> Tensor | None:
            return None if field is None else factor * field

        return CompletedSquare(
            weight=factor * self.weight,
            gain=self.gain,
            constant=scaled(self.constant),
            noise_constant=scaled(self.noise_constant),
            skip_gain=self.skip_gain,
            skip_constant=scaled(self.skip_constant),
            cross_constant=scaled(self.cross_constant),
        )


@dataclass(frozen=True)
class Coefficients:
    """The loss at each t: every tensor is float64 and has the shape of t.

    Attributes:
        tau: τ where a skip is valid, 1 elsewhere.
        c: Mean of c over the valid skips, 0 where there is none.
        c2: Mean of c² over the valid skips, 0 where there is none.
        estimator: The reading of ζ.
    """

    tau: Tensor
    c: Tensor
    c2: Tensor
    estimator: Estimator

    @property
    def weight(self) -> Tensor:
        """A = τ + (1-τ) c², the weight of the one remaining squared error."""
        return self.tau + self._skip_share(self.c2)

    @property
    def gain(self) -> Tensor:
        """s, what the regression target multiplies ε by: the trained ε̂ is s(t) E[ε | x_t]."""
        return self.complete_square().gain

    @property
    def gain_excess(self) -> Tensor:
        """`gain` - 1 without cancellation, as it may be divided by what is next to nothing."""
        c = self.c if self.estimator == "shared" else 0.0
        return self._over_weight(c - self.c2, limit=-1.0)

    def complete_square(self, *, normalize: bool = False) -> CompletedSquare:
        """Return the one quadratic; with `normalize`, mse(ε̂, target) without A and constant."""
        check_switch("normalize", normalize)
        a = self.weight
        s = self.tau / self._safe_weight
        g = self._over_weight(self.c, limit=0.0)
        square = _SQUARES[self.estimator](self.tau, a, s, g)
        if normalize:
            return CompletedSquare(torch.ones_like(a), square.gain, skip_gain=square.skip_gain)
        return square

    def _skip_share(self, factor: Tensor) -> Tensor:
        """Return (1-τ) times a factor, which without a bound on c² can be infinite where τ is 1."""
        return torch.where(self.tau < 1, (1 - self.tau) * factor, 0.0)

    def _over_weight(self, factor: Tensor, *, limit: float) -> Tensor:
        """Return (1-τ) times a factor over A, and its limit where A is infinite."""
        return torch.where(self.weight.isinf(), limit, self._skip_share(factor) / self._safe_weight)

    @property
    def _safe_weight(self) -> Tensor:
        # A is next to 0 only at τ = 0 where ᾱ hardly falls: nothing to learn there, any s will do.
        return torch.where(self.weight > _SMALLEST_WEIGHT, self.weight, 1.0)

    def bounded(self, max_c2: Tensor) -> Coefficients:
        """Return it with c² <= `max_c2`, of the shape of t."""
        # Not `dataclasses.replace`, which torch 2.4 does not compile.
        c, c2 = self.c.minimum(max_c2.sqrt()), self.c2.minimum(max_c2)
        return Coefficients(self.tau, c, c2, self.estimator)


_SMALLEST_WEIGHT = 1e-30

# The three readings of ζ, as in the table at the top of the module, from τ, A, s and g.
_SQUARES: dict[Estimator, Callable[[Tensor, Tensor, Tensor, Tensor], CompletedSquare]] = {
    "expected": lambda tau, a, s, _g: CompletedSquare(
        a, s, constant=1 - tau, noise_constant=tau - a * s**2
    ),
    "fresh": lambda tau, a, s, g: CompletedSquare(
        a,
        s,
        noise_constant=tau - a * s**2,
        skip_gain=g,
        skip_constant=1 - tau - a * g**2,
        cross_constant=-2 * a * s * g,
    ),
    "shared": lambda _tau, a, s, g: CompletedSquare(a, s + g, noise_constant=1 - a * (s + g) ** 2),
}


def coefficients(
    schedule: Schedule,
    skip_set: Skips,
    *,
    t: Tensor | None = None,
    tau: float = DEFAULT_TAU,
    estimator: Estimator = "expected",
    max_c2: float = DEFAULT_MAX_C2,
) -> Coefficients:
    """Return c, c², A and s as functions of t.

    Args:
        schedule: The noise schedule.
        skip_set: The skips, as for `SkipStepLoss`.
        t: Times of any shape; every timestep of a discrete schedule if not given.
        tau: τ in [0, 1], the share of the plain loss.
        estimator: "expected", "fresh" or "shared".
        max_c2: Upper bound on c², at least 0. The default of 100 changes nothing on the linear and
            scaled-linear schedules for any k <= 100 (there c² stays below 7). On schedules whose ᾱ
            comes near 0 (cosine, zero terminal SNR, flow matching) it bounds the last few
            timesteps, where c² would reach 1e5 or infinity: at τ = 0.99 no timestep then weighs
            more than 1.99 and no gain is below 0.497. `math.inf` takes the bound away.

    Raises:
        TypeError, ValueError: if an argument is not as said, or the skips do not fit the schedule.
    """
    schedule = check_schedule(schedule)
    tau = check_number("tau", tau, 0.0, 1.0)
    max_c2 = check_number("max_c2", max_c2, 0.0, math.inf)
    check_choice("estimator", estimator, ESTIMATORS)
    if t is None:
        t = schedule.timesteps
        if t is None:
            raise ValueError("t must be given for a continuous schedule, got None")
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {describe(t)}")
    schedule.check_timesteps(t)
    earlier, valid = SkipSet.wrap(skip_set).earlier(t, schedule)
    if t.is_floating_point():
        t = t.to(wide_dtype(t.device))

    at_earlier, at_t = (schedule.log_alphas_cumprod_at(time) for time in (earlier, t))
    # Where a skip is lost in rounding, also between two infinities, nothing has been skipped.
    log_ratio = torch.where(at_earlier == at_t, 0.0, at_earlier - at_t)
    # The clamp stands before the `where`: a masked infinity would survive as NaN in 0 * inf below.
    c2 = torch.where(valid, log_ratio.expm1().clamp(min=0.0, max=max_c2), 0.0)
    valid_skips = valid.sum(0)
    c, c2 = (total.sum(0) / valid_skips.clamp(min=1) for total in (c2.sqrt(), c2))
    return Coefficients(
        tau=torch.where(valid_skips > 0, tau, torch.ones_like(c2)), c=c, c2=c2, estimator=estimator
    )
