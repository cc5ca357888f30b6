"""The whole mathematics of S²-DM: the functions of t that the loss is made of.

Notation: ᾱ of the schedule, k a skip, τ the share of the plain loss, a and b of the path
x_t = a x_0 + b ε.

1. The loss on a noise prediction ε̂ (arXiv 2401.01520, Eq. 13, and the released code):

    α_skip(t) = ᾱ_t / ᾱ_{t-k}                      the transition t-k → t in one jump
    c²(t)     = (1 - α_skip) / α_skip = ᾱ_{t-k} / ᾱ_t - 1
    L(t)      = τ mse(ε̂, ε) + (1-τ) mse(c ε̂, ζ)    where a skip is valid (t >= k)
    L(t)      = mse(ε̂, ε)                          elsewhere, which is τ = 1, c = 0

Several skips at once are the mean of their losses: c and c² become means over the valid skips.

2. An estimator is a reading of ζ = u ε + v ξ + η, with a drawn noise ξ, and a noise η of variance
n of which only the expectation is taken:

    estimator    u  v  n
    "expected"   0  0  1    the exact expectation over fresh noise
    "fresh"      0  1  0    fresh noise, as the released code draws it
    "shared"     1  0  0    the same noise ε, as the equation is printed

3. Both terms are quadratics in ε̂. Completing the square leaves one,

    L(t) = A mse(ε̂, s ε + g ξ) + a constant that ε̂ does not touch,
    A = τ + (1-τ) c²,   s = (τ + (1-τ) c u) / A,   g = (1-τ) c v / A.

`SkipStepLoss` leaves the constant out. So a network learns s(t) E[ε | x_t].

4. The same on any output. A trainer's loss is mse(output, target) with output = p x_0 + q ε
(`s2dm_loss.prediction`; ε itself is p = 0, q = 1). Solved for the noise,

    ε̂ = ratio · output + lift · x_t,    mse(output, target) = mse(ε̂, ε) / ratio².

S²-DM keeps that weight of the trainer's choosing. Written on the output,

    L = A mse(output, s target + (s-1) (lift / ratio) x_t + (g / ratio) ξ),

which at τ = 1, where A = s = 1 and g = 0, is the trainer's own loss. From x_0 and ε the same target
is p x_0 + (q + (s-1) / ratio) ε + (g / ratio) ξ. ε is what target and x_t say it is, which stays
true where a trainer changed either (noise offset, input perturbation, DREAM). A weighting w of the
noise's error (`s2dm_loss.weighting`) multiplies L by w ratio².

5. Bounds. Where ᾱ comes near 0, c² has no bound, and there an output says nothing of ε either:
ratio goes to 0, x_t is all noise. So

    c² <= max_c2 · min(1, ratio²),   c² <= max_c2 / max(1, w),   c <= √max_c2 · min(1, ratio²),

with which every target is finite and the loss goes smoothly to the trainer's own as ratio → 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict, Unpack

from s2dm_loss._torch import real_tensors
from s2dm_loss.checks import check_choice, check_number, check_rows, describe
from s2dm_loss.prediction import (
    PathPoint,
    PredictionType,
    output_scales,
    read_prediction_type,
)
from s2dm_loss.schedule import Schedule, check_schedule, wide_times
from s2dm_loss.skip_set import Skips, SkipSet
from s2dm_loss.weighting import Weighting, read_weighting, weights_at

DEFAULT_TAU = 0.99
DEFAULT_MAX_C2 = 100.0

Estimator = Literal["expected", "fresh", "shared"]


class Zeta(NamedTuple):
    """A reading of ζ = on_noise · ε + on_skip_noise · ξ + η, section 2 of the module.

    Attributes:
        on_noise: u, what stands on the noise ε in x_t.
        on_skip_noise: v, what stands on a drawn noise ξ; not 0 if the estimator draws one.
        unseen_variance: Variance of η, whose expectation is taken: it is logged, and no target
            holds it.
    """

    on_noise: float
    on_skip_noise: float
    unseen_variance: float


ESTIMATORS: dict[Estimator, Zeta] = {
    "expected": Zeta(on_noise=0, on_skip_noise=0, unseen_variance=1),
    "fresh": Zeta(on_noise=0, on_skip_noise=1, unseen_variance=0),
    "shared": Zeta(on_noise=1, on_skip_noise=0, unseen_variance=0),
}
check_rows("ESTIMATORS", ESTIMATORS, Estimator)


class GainOptions(TypedDict, total=False):
    """What a gain s(t) depends on besides schedule and skips; `SkipStepLoss` says what they are."""

    tau: float
    estimator: Estimator
    prediction_type: PredictionType
    weighting: Weighting | None
    max_c2: float


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
    def zeta(self) -> Zeta:
        """The estimator's row."""
        return ESTIMATORS[self.estimator]

    @property
    def weight(self) -> Tensor:
        """A = τ + (1-τ) c², the weight of the one remaining squared error."""
        return self.tau + self._skip_share(self.c2)

    @property
    def gain(self) -> Tensor:
        """s, what the regression target multiplies ε by: the trained ε̂ is s(t) E[ε | x_t]."""
        return self._over_weight(self.tau + self._skip_share(self.c * self.zeta.on_noise), 0.0, 1.0)

    @property
    def gain_minus_one(self) -> Tensor:
        """The gain minus 1, computed directly, since it is later divided by a value near 0."""
        return self._over_weight(self._skip_share(self.c * self.zeta.on_noise - self.c2), -1.0)

    @property
    def skip_gain(self) -> Tensor:
        """g, what the regression target multiplies the drawn noise ξ by."""
        return self._over_weight(self._skip_share(self.c * self.zeta.on_skip_noise), 0.0)

    def _skip_share(self, factor: Tensor) -> Tensor:
        """Return (1-τ) times a factor, which without a bound on c² can be infinite where τ is 1."""
        return torch.where(self.tau < 1, (1 - self.tau) * factor, 0.0)

    def _over_weight(self, numerator: Tensor, limit: float, default: float = 0.0) -> Tensor:
        """Return a value over A, its limit where A is infinite, and `default` where A is 0."""
        weight = self.weight
        # A is near 0 only if τ = 0 and ᾱ is nearly constant; s is then arbitrary: that of no skip.
        some = weight > _SMALLEST_WEIGHT
        quotient = torch.where(some, numerator / torch.where(some, weight, 1.0), default)
        return torch.where(weight.isinf(), limit, quotient)


_SMALLEST_WEIGHT = 1e-30


def coefficients(
    schedule: Schedule,
    skip_set: Skips,
    *,
    t: Tensor | None = None,
    tau: float = DEFAULT_TAU,
    estimator: Estimator = "expected",
    prediction_type: PredictionType = "epsilon",
    max_c2: float = DEFAULT_MAX_C2,
    weighting: Weighting | None = None,
) -> Coefficients:
    """Return τ, c and c² as functions of t, and with them A, s and g.

    Args:
        schedule: The noise schedule.
        skip_set: The skips, as for `SkipStepLoss`.
        t: Times of any shape; every timestep of a discrete schedule if not given.
        tau: As for `SkipStepLoss`.
        estimator: As for `SkipStepLoss`.
        prediction_type: As for `SkipStepLoss`: near ᾱ = 0 an output other than ε bounds c².
        max_c2: As for `SkipStepLoss`.
        weighting: As for `SkipStepLoss`: where it is above 1 it bounds c².

    Raises:
        TypeError, ValueError: if an argument is not as said, or the skips do not fit the schedule.
    """
    schedule = check_schedule(schedule)
    tau = check_number("tau", tau, 0.0, 1.0)
    max_c2 = check_number("max_c2", max_c2, 0.0, math.inf)
    check_choice("estimator", estimator, ESTIMATORS)
    weight_of = read_weighting(weighting)
    if t is None:
        t = schedule.timesteps
        if t is None:
            raise ValueError("t must be given for a continuous schedule, got None")
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor, got {describe(t)}")
    schedule.check_timesteps(t)
    path = PathPoint.at(schedule, t)
    earlier, valid = SkipSet.wrap(skip_set).earlier(t, schedule)
    at_earlier, at_t = (schedule.log_alphas_cumprod_at(time) for time in (earlier, wide_times(t)))
    # Where a skip is lost in rounding, also between two infinities, nothing has been skipped.
    log_ratio = torch.where(at_earlier == at_t, 0.0, at_earlier - at_t)
    c2 = torch.where(valid, log_ratio.expm1().clamp(min=0.0, max=max_c2), 0.0)
    valid_skips = valid.sum(0)
    c, c2 = (total.sum(0) / valid_skips.clamp(min=1) for total in (c2.sqrt(), c2))

    reach = output_scales(prediction_type, path).ratio.square().clamp(max=1.0)
    c = c.minimum(_bound(reach, math.sqrt(max_c2)))
    c2 = c2.minimum(_bound(reach, max_c2))
    if weight_of is not None:
        bound = max_c2 / weights_at(weight_of, path).clamp(min=1.0)
        c, c2 = c.minimum(bound.sqrt()), c2.minimum(bound)
    return Coefficients(
        tau=torch.where(valid_skips > 0, tau, torch.ones_like(c2)),
        c=c,
        c2=c2,
        estimator=estimator,
    )


def gain(
    schedule: Schedule,
    skip_set: Skips,
    *,
    t: Tensor | None = None,
    **options: Unpack[GainOptions],
) -> Tensor:
    """Return s(t), float64: the factor on E[ε | x_t] that the loss trains a network to.

    Args:
        schedule: The noise schedule.
        skip_set: The skips, as for `SkipStepLoss`.
        t: Times of any shape; every timestep of a discrete schedule if not given.
        options: `GainOptions`, as for `SkipStepLoss`. At late t the loss on v, x_0 or flow teaches
            less of the gain than that on ε.

    Raises:
        TypeError, ValueError: if an argument is not as said; the message names it.

    >>> from s2dm_loss import NoiseSchedule, gain
    >>> s = gain(NoiseSchedule.linear(1000), skip_set=49)
    >>> float(s[0]), round(float(1 / s.min()), 4)
    (1.0, 1.0164)
    """
    kind = read_prediction_type(options.get("prediction_type"), check_schedule(schedule))
    options["prediction_type"] = kind
    return coefficients(schedule, skip_set, t=t, **options).gain


def warn_if_the_start_fails(
    schedule: Schedule, gain: Callable[[Tensor], Tensor], *, stacklevel: int
) -> None:
    """Warn where a sampler that starts at the last timestep with s(t) ε̂ is left with noise.

    A step of DDIM from t to t' multiplies what is missing of ε̂ by b a' / a: with next to no signal
    at t, as of cosine schedules, that is thousands. Judged by the first of ten steps.
    """
    timesteps = schedule.timesteps
    if timesteps is None:
        return
    with real_tensors():
        last = timesteps[-1:]
        (a, b), scale = schedule.alpha_sigma(last), gain(last).detach()
        if bool(a == 0):  # where such a network cannot start at all
            return
        a_next, b_next = schedule.alpha_sigma((last - max(1, len(timesteps) // 10)).clamp(min=0))
        s, left = float(scale), float((1 - scale) * b / a * a_next / b_next)
    if left > 1:
        warnings.warn(
            f"the gain at the last timestep of {schedule!r}, which has next to no signal, is "
            f"{s:.3f}: DDIM and other solvers that start there with a network of the noise "
            f"are left with {left:,.0f} times the noise, or clipped with too little spread. "
            "DDPM in all steps, a start earlier (timestep_spacing='leading' in diffusers) and a "
            "network of v are safe",
            stacklevel=stacklevel + 1,
        )


class LossRows(NamedTuple):
    """All that one loss looks up at t, each of the shape of t; None is 0 at every t.

    L = weight · mse(output, on_target · target + on_input · x_t + on_skip_noise · ξ)
      = weight · mse(output, on_data · x_0 + on_noise · ε + on_skip_noise · ξ)

    Attributes:
        weight: A, times the weighting on the scale of the output.
        slope: Twice the weight, which the gradient needs.
        on_target: s.
        on_input: (s-1) lift / ratio; None if the output is noise alone.
        on_skip_noise: g / ratio; None if the estimator draws none.
        on_noise: q + (s-1) / ratio.
        on_data: p; None if the output is noise alone.
    """

    weight: Tensor
    slope: Tensor
    on_target: Tensor
    on_input: Tensor | None
    on_skip_noise: Tensor | None
    on_noise: Tensor
    on_data: Tensor | None


def loss_rows(
    at_t: Coefficients,
    prediction_type: PredictionType,
    path: PathPoint,
    *,
    weighting: Callable[[Tensor], Tensor] | None,
    normalize: bool,
) -> LossRows:
    """Return what a loss looks up, from its coefficients and its path at the same times."""
    scales, s_minus_1 = output_scales(prediction_type, path), at_t.gain_minus_one
    # Where ratio is 0 the output says nothing of ε: its target stays as it is.
    no_signal = scales.ratio == 0

    def where_signal(value: Tensor) -> Tensor:
        return torch.where(no_signal, 0.0, value)

    weight = torch.ones_like(at_t.c2) if normalize else at_t.weight
    if weighting is not None:
        weight = weight * output_weights(weighting, prediction_type, path)
    draws = at_t.zeta.on_skip_noise != 0
    # Infinite for the score at σ = 0; the weighting is 0 there.
    on_noise = torch.where(scales.q.isinf(), 0.0, scales.q)
    return LossRows(
        weight=weight,
        slope=2 * weight,
        on_target=torch.where(no_signal, 1.0, at_t.gain),
        on_input=None if scales.shift is None else where_signal(s_minus_1 * scales.shift),
        on_skip_noise=where_signal(at_t.skip_gain * scales.inverse_ratio) if draws else None,
        on_noise=on_noise + where_signal(s_minus_1 * scales.inverse_ratio),
        on_data=scales.p,
    )


def output_weights(
    weighting: Callable[[Tensor], Tensor], prediction_type: PredictionType, path: PathPoint
) -> Tensor:
    """Return w ratio²: what multiplies the output's error if w multiplies the noise's."""
    # The product has limits at the path's ends that its factors do not have.
    ratio = output_scales(prediction_type, path.within_the_ends()).ratio
    return weights_at(weighting, path) * ratio.square()


def _bound(reach: Tensor, largest: float) -> Tensor:
    """Return largest · reach; 0 where reach is 0, also for an infinite bound."""
    return torch.where(reach == 0, 0.0, reach * largest)
