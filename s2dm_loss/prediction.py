"""What a model predicts: from its output to ε̂ and back.

On a path x_t = a x_0 + b ε (a² + b² = 1 for a variance-preserving schedule, a + b = 1 for flow
matching):

    "epsilon"       ε
    "v_prediction"  v = a ε - b x_0       (Salimans and Ho, arXiv 2202.00512)
    "sample"        x_0
    "flow"          u = ε - x_0           (Lipman et al., arXiv 2210.02747)
    "score"         -ε / b                (Song et al., arXiv 2011.13456)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from s2dm_loss._checks import check_batch, check_choice, check_like, check_per_sample, describe
from s2dm_loss.schedule import Schedule

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "score"]
PREDICTION_TYPES: tuple[PredictionType, ...] = (
    "epsilon",
    "v_prediction",
    "sample",
    "flow",
    "score",
)


def epsilon_from_output(
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction_type: PredictionType,
) -> Tensor:
    """Return ε̂ from a model's output.

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
    if prediction_type == "epsilon":
        return output
    output, x_t, a, b = _prepare("output", output, x_t, t, schedule)
    if prediction_type == "v_prediction":
        return (b * x_t + a * output) / (a**2 + b**2)
    if prediction_type == "sample":
        return (x_t - a * output) / b
    if prediction_type == "flow":
        return (x_t + a * output) / (a + b)
    return -b * output


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
    if prediction_type == "epsilon":
        return epsilon
    epsilon, x_t, a, b = _prepare("epsilon", epsilon, x_t, t, schedule)
    if prediction_type == "v_prediction":
        return ((a**2 + b**2) * epsilon - b * x_t) / a
    if prediction_type == "sample":
        return (x_t - b * epsilon) / a
    if prediction_type == "flow":
        return ((a + b) * epsilon - x_t) / a
    return -epsilon / b


def epsilon_scales(prediction_type: PredictionType, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return ratio and lift / ratio, with ε̂ = ratio · output + lift · x_t.

    For "v_prediction", "sample" and "flow", each on its own kind of path. At a = 0, where ratio is
    0, lift / ratio is infinite.
    """
    if prediction_type == "v_prediction":
        return a, b / a
    if prediction_type == "sample":
        return -a / b, -1 / a
    return a, 1 / a


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
    a, b = (
        rearrange(scale.to(dtype), "b -> b" + " 1" * (x_t.ndim - 1))
        for scale in schedule.alpha_sigma(t)
    )
    return value.to(dtype), x_t.to(dtype), a, b
