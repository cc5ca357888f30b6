"""The loss on the scale of a network's own output, whatever it predicts.

A trainer's loss is mse(output, target), whichever of ε, v, x_0, flow and score the output is. On
the noise prediction in it that is the plain loss times a weight w(t) of the trainer's choosing,

    mse(output, target) = w mse(ε̂, ε),    ε̂ = ratio · output + lift · x_t,    w = 1 / ratio²,

and S²-DM keeps that weight: L = w (τ mse(ε̂, ε) + (1-τ) mse(c ε̂, ζ)). Written on the output (the
square of `coefficients`, divided by ratio), and with ζ for the estimator "fresh" alone,

    L = A mse(output, s target + (s-1) (lift / ratio) x_t + (g / ratio) ζ) + a constant,

so at τ = 1, where A = s = 1 and g = 0, it is the trainer's own loss. ε is what target and x_t say
it is, which stays true where a trainer has changed either (noise offset, input perturbation,
DREAM). The constant, which no gradient sees, is left out: times w it would be infinite at ᾱ = 0.
There an output cannot express a gain on ε̂ either (x_t is all noise, ε̂ = x_t), so besides
c² <= max_c2 there holds c² <= max_c2 ratio², which takes the loss smoothly to τ times the trainer's
own as ratio goes to 0.

With a weighting (`s2dm_loss.weighting`) w is the weighting's and not the trainer's. c² has the same
bound, and c² w <= max_c2 besides: what the loss teaches is that of the loss without the weighting,
but where w is above 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from s2dm_loss.coefficients import Coefficients, Estimator, coefficients
from s2dm_loss.prediction import PredictionType, output_scales
from s2dm_loss.schedule import Schedule
from s2dm_loss.skip_set import Skips
from s2dm_loss.weighting import weights_at, within_the_ends


class RegressionTarget(NamedTuple):
    """What a trainer's own loss has to regress on, and be multiplied by, to be this loss.

    Attributes:
        target: The changed target, of shape [B, ...]; float32, or float64 for float64 input.
        weight: What each sample's loss is multiplied by, of shape [B].
    """

    target: Tensor
    weight: Tensor


class OutputSquare(NamedTuple):
    """One quadratic in an output = p x_0 + q ε; every field has the shape of t, None is zero.

    L = weight · mse(output, on_target · target + on_input · x_t + on_skip_noise · ζ)

    where the target and x_t are at hand, and the same from x_0 and ε is

    L = weight · mse(output, on_data · x_0 + on_noise · ε + on_skip_noise · ζ).
    """

    weight: Tensor
    on_target: Tensor
    on_input: Tensor | None
    on_skip_noise: Tensor
    on_data: Tensor | None
    on_noise: Tensor


def output_square(
    at_t: Coefficients,
    prediction_type: PredictionType,
    a: Tensor,
    b: Tensor,
    *,
    weighting: Callable[[Tensor], Tensor] | None = None,
    normalize: bool = False,
) -> OutputSquare:
    """Return the quadratic in an output on a path x_t = a x_0 + b ε, in the dtype of a.

    `at_t` has the bound of `bound_on_c2`.
    """
    scales = output_scales(prediction_type, a, b)
    square, less = at_t.complete_square(normalize=normalize), at_t.gain_excess
    # Where ratio is 0 nothing can be said of ε, and s = 1 and g = 0.
    silent = scales.ratio == 0

    def per_ratio(scale: Tensor, factor: Tensor) -> Tensor:
        return torch.where(silent, 0.0, scale * factor)

    weight = square.weight
    if weighting is not None:
        weight = weight * output_weights(weighting, prediction_type, a, b)
    skip_gain = torch.zeros_like(a) if square.skip_gain is None else square.skip_gain
    return OutputSquare(
        weight=weight,
        on_target=torch.where(silent, 1.0, square.gain),
        on_input=None if scales.shift is None else per_ratio(less, scales.shift),
        on_skip_noise=per_ratio(skip_gain, scales.inverse_ratio),
        on_data=scales.p,
        # Infinite for the score without noise, where a weighting leaves nothing of its error.
        on_noise=torch.where(scales.q.isinf(), 0.0, scales.q)
        + per_ratio(less, scales.inverse_ratio),
    )


def output_coefficients(
    schedule: Schedule,
    skip_set: Skips,
    t: Tensor | None,
    *,
    tau: float,
    estimator: Estimator,
    prediction_type: PredictionType,
    max_c2: float,
    weighting: Callable[[Tensor], Tensor] | None = None,
) -> Coefficients:
    """Return the `Coefficients` of the loss on an output, with the bound of `bound_on_c2`."""
    at_t = coefficients(schedule, skip_set, t=t, tau=tau, estimator=estimator, max_c2=max_c2)
    if t is None:
        t = schedule.timesteps
    if t is None:  # which `coefficients` has refused
        return at_t
    a, b = schedule.alpha_sigma(t)
    return at_t.bounded(bound_on_c2(prediction_type, weighting, a, b, max_c2))


def bound_on_c2(
    prediction_type: PredictionType,
    weighting: Callable[[Tensor], Tensor] | None,
    a: Tensor,
    b: Tensor,
    max_c2: float,
) -> Tensor:
    """Return the bound on c² with which none of c², c² / ratio² and c² w is above max_c2."""
    ratio = output_scales(prediction_type, a, b).ratio
    # Neither a ratio of 0 nor a bound of 0 is to meet infinity.
    none = (ratio == 0) | (max_c2 == 0)
    bound = torch.where(none, 0.0, ratio.square().clamp(max=1.0) * max_c2)
    if weighting is not None:
        bound = torch.minimum(
            bound, max_c2 / weights_at(weighting, *within_the_ends(a, b)).clamp(min=1.0)
        )
    return bound


def output_weights(
    weighting: Callable[[Tensor], Tensor], prediction_type: PredictionType, a: Tensor, b: Tensor
) -> Tensor:
    """Return w · ratio², what a weighting of the noise's error is for the output's."""
    # The product has limits at the path's ends that its factors do not have.
    a, b = within_the_ends(a, b)
    return weights_at(weighting, a, b) * output_scales(prediction_type, a, b).ratio.square()
