"""What a model predicts: from its output to ε̂ and back.

On a path x_t = a x_0 + b ε (a² + b² = 1 for a variance-preserving schedule, a + b = 1 for flow
matching, a = 1 in EDM's form) every output is p x_0 + q ε:

    "epsilon"       ε
    "v_prediction"  v = (a ε - b x_0) / √(a² + b²)    (Salimans and Ho, arXiv 2202.00512)
    "sample"        x_0
    "flow"          u = ε - x_0, whatever the path    (Lipman et al., arXiv 2210.02747)
    "velocity"      dx_t/dt = a' x_0 + b' ε, in the schedule's own time
    "score"         -ε / b                            (Song et al., arXiv 2011.13456)

Solved for ε with d = a q - b p,

    ε̂ = ratio · output + lift · x_t,    ratio = a / d,    lift = -p / d,

and ratio = 1 / q, lift = 0 where there is no x_0 in the output.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from s2dm_loss._torch import before_each_call, real_tensors
from s2dm_loss.checks import (
    check_batch,
    check_choice,
    check_like,
    check_per_sample,
    check_rows,
    describe,
)
from s2dm_loss.continuous import check_velocity, is_flow, warn_if_not_straight
from s2dm_loss.head import along
from s2dm_loss.schedule import Schedule

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "velocity", "score"]

# e^-30: where one of a and b is less than this share of the other, |log snr| is 60.
_SMALLEST_SHARE = 9.357622968840175e-14


@dataclass(frozen=True)
class PathPoint:
    """A schedule's path at some times: x_t = a x_0 + b ε, in float64.

    Attributes:
        a: The coefficient of the data.
        b: The coefficient of the noise.
        rates: Called for da/dt and db/dt, in the schedule's own time.
    """

    a: Tensor
    b: Tensor
    rates: Callable[[], tuple[Tensor, Tensor]]

    @classmethod
    def at(cls, schedule: Schedule, t: Tensor) -> PathPoint:
        """Return a schedule's path at times t."""

        def rates() -> tuple[Tensor, Tensor]:
            if not hasattr(schedule, "derivatives"):
                check_velocity(schedule)  # which says what to take
            continuous: Any = schedule
            found: tuple[Tensor, Tensor] = continuous.derivatives(t)
            return found

        return cls(*schedule.alpha_sigma(t), rates=rates)

    def within_the_ends(self) -> PathPoint:
        """Return it with |log snr| <= 60, so that every weighting has a value."""
        a = self.a.maximum(self.b * _SMALLEST_SHARE)
        return PathPoint(a, self.b.maximum(self.a * _SMALLEST_SHARE), self.rates)


def _v_parts(path: PathPoint) -> tuple[Tensor, Tensor]:
    norm = torch.hypot(path.a, path.b)
    return -path.b / norm, path.a / norm


# p, None where it is 0 at every t, and q.
PREDICTION_TYPES: dict[PredictionType, Callable[[PathPoint], tuple[Tensor | None, Tensor]]] = {
    "epsilon": lambda path: (None, torch.ones_like(path.b)),
    "v_prediction": _v_parts,
    "sample": lambda path: (torch.ones_like(path.a), torch.zeros_like(path.b)),
    "flow": lambda path: (-torch.ones_like(path.a), torch.ones_like(path.b)),
    "velocity": lambda path: path.rates(),
    "score": lambda path: (None, -1 / path.b),
}
check_rows("PREDICTION_TYPES", PREDICTION_TYPES, PredictionType)


def read_prediction_type(
    prediction_type: PredictionType | None, schedule: Schedule
) -> PredictionType:
    """Return what a network predicts: if it is not said "epsilon", but nothing on a flow.

    Raises:
        ValueError: if it is none of the prediction types, or not said on a flow.
    """
    if prediction_type is not None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        return prediction_type
    if is_flow(schedule):
        raise ValueError(
            f"prediction_type must be given on {schedule!r}: 'flow' for noise minus data, "
            "'velocity' for dx_t/dt in your own time, 'epsilon' for the noise"
        )
    return "epsilon"


def check_prediction_type(
    prediction_type: PredictionType, schedule: Schedule, *, weighted: bool
) -> None:
    """Raise ValueError unless a network on this schedule can be trained to predict that."""
    if prediction_type == "velocity":
        check_velocity(schedule)
    if prediction_type == "flow":
        warn_if_not_straight(schedule)
    with real_tensors():
        timesteps = schedule.timesteps
        if timesteps is None or weighted:
            return
        _, q = PREDICTION_TYPES[prediction_type](PathPoint.at(schedule, timesteps))
        if q.isinf().any():
            raise ValueError(
                f"prediction_type {prediction_type!r} must have noise at every timestep, got none "
                f"at t = {timesteps[q.isinf()][0].item()}, where it is infinite: a weighting, such "
                "as 'uniform', counts the error of the noise instead"
            )


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


def output_scales(prediction_type: PredictionType, path: PathPoint) -> OutputScales:
    """Return the scales of an output on a path, each of the shape of t."""
    # Checked here, not by callers: torch 2.4 cannot compile what reads the table in two modules.
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    p, q = PREDICTION_TYPES[prediction_type](path)
    if p is None:
        return OutputScales(None, q, 1 / q, q, None)
    a = path.a
    d = a * q - path.b * p
    # Without signal an output says nothing of ε, also where its own two parts vanish (0 / 0).
    ratio = torch.where(a == 0, 0.0, a / d)
    return OutputScales(p, q, ratio, d / a, -p / a)


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
    p, q, a, b = _scales_beside("output", output, x_t, t, schedule, prediction_type)
    if prediction_type == "epsilon":
        return output
    output = output.to(q.dtype)
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
    p, q, a, b = _scales_beside("epsilon", epsilon, x_t, t, schedule, prediction_type)
    if prediction_type == "epsilon":
        return epsilon
    epsilon = epsilon.to(q.dtype)
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


def _modules_of(model: Any) -> Iterator[nn.Module]:
    """Yield the modules in a model: itself, of a method or `partial`, or named in a function."""
    if isinstance(model, nn.Module):
        yield model
    elif isinstance(model, partial):
        for part in (model.func, *model.args, *model.keywords.values()):
            yield from _modules_of(part)
    elif inspect.ismethod(model):
        yield from _modules_of(model.__self__)
    elif hasattr(model, "__wrapped__"):
        yield from _modules_of(model.__wrapped__)
    elif inspect.isfunction(model):
        named = inspect.getclosurevars(model)
        for value in (*named.nonlocals.values(), *named.globals.values()):
            if isinstance(value, nn.Module):
                yield value


class _Called(threading.local):
    """The modules that `evaluating` has put into evaluation mode, in this thread."""

    training: list[nn.Module] | None = None


_called = _Called()


def _evaluate(module: nn.Module, _: object = None) -> None:
    """Put a module that is called into evaluation mode, where this thread is `evaluating`."""
    if not torch.compiler.is_compiling() and _called.training is not None:
        for part in module.modules() if module.training else ():
            if part.training:
                _called.training.append(part)
                part.training = False


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Put the modules that a model is or calls into evaluation mode, and each back as it was.

    By their attribute: what a module's own `eval()` does, such as merging adapters, could not be
    undone part by part. A function's are found when it calls them; those that compiled code calls
    only if the function names them.
    """
    outer, _called.training = _called.training, []
    try:
        for module in _modules_of(model):
            for part in module.modules():
                _evaluate(part)
        with nullcontext() if isinstance(model, nn.Module) else before_each_call(_evaluate):
            yield
    finally:
        for module in _called.training:
            module.training = True
        _called.training = outer


def _scales_beside(
    name: str,
    value: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction_type: PredictionType,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Check the arguments, and return p, q, a and b beside the data, in the dtype of the result."""
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    check_like(name, value, "x_t", check_batch("x_t", x_t))
    check_per_sample("t", t, "x_t", x_t)
    dtype = torch.promote_types(torch.promote_types(value.dtype, x_t.dtype), torch.float32)
    path = PathPoint.at(schedule, t)
    p, q = PREDICTION_TYPES[prediction_type](path)
    q, a, b = (along(scale.to(dtype), x_t) for scale in (q, path.a, path.b))
    return None if p is None else along(p.to(dtype), x_t), q, a, b
