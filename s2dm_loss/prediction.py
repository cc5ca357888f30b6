"""What a model predicts: from its output to ε̂ and back.

On a path x_t = a x_0 + b ε (a² + b² = 1 for a variance-preserving schedule, a + b = 1 for flow
matching, a = 1 in EDM's form) every output is p x_0 + q ε:

    "epsilon"       ε
    "v_prediction"  v = a ε - b x_0       (Salimans and Ho, arXiv 2202.00512)
    "sample"        x_0
    "flow"          u = ε - x_0           (Lipman et al., arXiv 2210.02747)
    "score"         -ε / b                (Song et al., arXiv 2011.13456)

Solved for ε with d = a q - b p,

    ε̂ = ratio · output + lift · x_t,    ratio = a / d,    lift = -p / d,

and ratio = 1 / q, lift = 0 where there is no x_0 in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from s2dm_loss._head import along
from s2dm_loss.checks import check_batch, check_choice, check_like, check_per_sample, describe
from s2dm_loss.schedule import Schedule

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "score"]
PREDICTION_TYPES: tuple[PredictionType, ...] = get_args(PredictionType)

# p, None where it is 0 at every t, and q.
_PARTS: dict[PredictionType, Callable[[Tensor, Tensor], tuple[Tensor | None, Tensor]]] = {
    "epsilon": lambda _a, b: (None, torch.ones_like(b)),
    "v_prediction": lambda a, b: (-b, a),
    "sample": lambda a, b: (torch.ones_like(a), torch.zeros_like(b)),
    "flow": lambda a, b: (-torch.ones_like(a), torch.ones_like(b)),
    "score": lambda _a, b: (None, -1 / b),
}


class OutputScales(NamedTuple):
    """How an output and ε̂ hang together at each t; None stands for zero.

    output = p x_0 + q ε, and ε̂ = ratio · output + lift · x_t. `inverse_ratio` is 1 / ratio and
    `shift` is lift / ratio, both infinite where the output says nothing of ε (ratio = 0).
    """

    p: Tensor | None
    q: Tensor
    ratio: Tensor
    inverse_ratio: Tensor
    shift: Tensor | None


def output_scales(prediction_type: PredictionType, a: Tensor, b: Tensor) -> OutputScales:
    """Return the scales of an output on a path x_t = a x_0 + b ε, each of the shape of a."""
    p, q = _PARTS[prediction_type](a, b)
    if p is None:
        return OutputScales(None, q, 1 / q, q, None)
    d = a * q - b * p
    return OutputScales(p, q, a / d, d / a, -p / a)


def epsilon_from_output(
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction_type: PredictionType,
) -> Tensor:
    """Return ε̂ from a model's output.

    To train on it, give the output itself to `SkipStepLoss.from_output`: a squared error of this ε̂
    weighs the output's by ratio², which is 0 at an end of most schedules.

    Args:
        output: The model's output, of shape [B, ...].
        x_t: The noisy input it was given, of the same shape.
        t: Its times, of shape [B].
        schedule: The noise schedule.
        prediction_type: What the output is.

    Returns:
        ε̂ of shape [B, ...], in float32 at least (the output itself for "epsilon"). For "sample"
        it is infinite or NaN at a time without noise.

    Raises:
        TypeError, ValueError: if an argument is not as said.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    given = output
    output, x_t, a, b = _prepare("output", output, x_t, t, schedule)
    if prediction_type == "epsilon":
        return given
    p, q = _PARTS[prediction_type](a, b)
    return output * (1 / q) if p is None else (a * output - p * x_t) / (a * q - b * p)


def output_from_epsilon(
    epsilon: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction_type: PredictionType,
) -> Tensor:
    """Return the model output that stands for ε̂; the inverse of `epsilon_from_output`.

    All but "epsilon" and "score" divide by a, which is 0 at zero terminal SNR: there x_t is pure
    noise, says nothing of x_0, and the result is infinite or NaN.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    given = epsilon
    epsilon, x_t, a, b = _prepare("epsilon", epsilon, x_t, t, schedule)
    if prediction_type == "epsilon":
        return given
    p, q = _PARTS[prediction_type](a, b)
    return q * epsilon if p is None else ((a * q - b * p) * epsilon + p * x_t) / a


def read_output(output: Any) -> Tensor:
    """Return the tensor in a model's output: a tensor, a tuple's first, or a `.sample`."""
    if isinstance(output, Tensor):
        return output
    sample = getattr(output, "sample", None)
    if isinstance(sample, Tensor):
        return sample
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        "model must return a tensor, a tuple that starts with one, or an object with a tensor "
        f"`.sample`, got {describe(output)}"
    )


def _prepare(
    name: str, value: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_like(name, value, "x_t", check_batch("x_t", x_t))
    check_per_sample("t", t, "x_t", x_t)
    dtype = torch.promote_types(torch.promote_types(value.dtype, x_t.dtype), torch.float32)
    a, b = (along(scale.to(dtype), x_t) for scale in schedule.alpha_sigma(t))
    return value.to(dtype), x_t.to(dtype), a, b
