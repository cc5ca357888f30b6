"""Argument checks shared by the public functions and the adapters.

Each error names the argument, what came, and what was expected. The checks of tensors read no
values, so they cost no host sync.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import Tensor


def describe(value: object) -> str:
    """Say what a value is, with shape, dtype and device for a tensor."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`; it names the one that was meant."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
            + _did_you_mean(value, choices)
        )


# What the field also calls the choices of this library.
_OTHER_NAMES = {"eps": "epsilon", "noise": "epsilon", "x0": "sample", "x_0": "sample"}


def _did_you_mean(value: object, choices: tuple[str, ...]) -> str:
    """Return ": did you mean …?" for a name like one of the choices, and "" for another."""
    if not isinstance(value, str):
        return ""
    said = value.lower().replace("-", "_")
    meant = [_OTHER_NAMES[said]] if _OTHER_NAMES.get(said) in choices else []
    meant += [choice for choice in choices if said and choice.startswith(said + "_")]
    meant += difflib.get_close_matches(said, choices, n=1)
    return f": did you mean {meant[0]!r}?" if meant else ""


def check_rows(name: str, rows: Mapping[Any, object], names: Any) -> None:
    """Raise RuntimeError unless a table has a row for each name of a `Literal`, and no other."""
    if set(rows) != set(get_args(names)):
        odd = sorted(set(rows) ^ set(get_args(names)))
        raise RuntimeError(f"{name} and its type must have the same names, they differ in {odd}")


def check_number(
    name: str, value: object, low: float, high: float, *, open_ends: bool = False
) -> float:
    """Return `value` as a float in [low, high], or in (low, high) with `open_ends`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {describe(value)}")
    value = float(value)
    inside = low < value < high if open_ends else low <= value <= high
    if not inside:
        left, right = ("(", ")") if open_ends else ("[", "]")
        raise ValueError(f"{name} must lie in {left}{low}, {high}{right}, got {value!r}")
    return value


def check_count(name: str, value: object, low: int = 1) -> int:
    """Return `value` as an int of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def check_switch(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


class FixedSettings:
    """Attributes that are read once, when tables are made, and cannot be set again."""

    _fixed: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._fixed:
            super().__setattr__(name, value)
        elif name in self.__dict__:
            raise AttributeError(
                f"{name} is read when a {type(self).__name__} is made and cannot be changed after "
                "that: make another one"
            )
        else:
            # Past nn.Module, which would take a schedule or a weighting that is one for a part of
            # the network: with keys in its checkpoints, and to be moved and cast with it.
            object.__setattr__(self, name, value)


def check_batch(name: str, value: object) -> Tensor:
    """Return a floating-point tensor with a batch axis."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")
    if value.ndim == 0:
        raise ValueError(f"{name} must have a batch axis, got {describe(value)}")
    return value


def check_like(name: str, value: object, like_name: str, like: Tensor) -> Tensor:
    """Return a floating-point tensor of the shape and on the device of `like`."""
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim):
        value = check_batch(name, value)  # which says what is wrong
    if value.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape of {like_name}, {tuple(like.shape)}, got {describe(value)}"
            + _channels_hint(name, value, like)
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, got {describe(value)}"
        )
    return value


def check_per_sample(name: str, value: object, like_name: str, like: Tensor) -> Tensor:
    """Return a tensor of shape [B] on the device of `like`, a tensor of shape [B, ...].

    Shape [B] and no other: a [B, 1] or scalar tensor would broadcast against a data axis.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}")
    if value.shape != like.shape[:1]:
        raise ValueError(
            f"{name} must have shape ({like.shape[0]},), one value for each sample of {like_name} "
            f"of shape {tuple(like.shape)}, got {describe(value)}{_frames_hint(value, like)}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, got {describe(value)}"
        )
    return value


def _frames_hint(value: Tensor, like: Tensor) -> str:
    if value.ndim < 2 or value.shape[:1] != like.shape[:1] or value.numel() == len(value):
        return ""
    return ": where each frame has its own, make frames samples, `x.flatten(0, 1)` of every tensor"


def _channels_hint(name: str, value: Tensor, like: Tensor) -> str:
    """Say what more channels than those of `like` are, or ""."""
    if not value.ndim == like.ndim >= 2 or value.shape[2:] != like.shape[2:]:
        return ""
    channels, expected = value.shape[1], like.shape[1]
    if name == "x_t" and channels > expected:
        return (
            ": more channels look like a condition beside the noisy data. Pass the noisy channels "
            f"alone, such as `x_t[:, :{expected}]`"
        )
    if channels == 2 * expected:
        return (
            ": twice the channels look like a learned variance beside the noise. Pass the first "
            "half, `value.chunk(2, dim=1)[0]`, and train the variance with its own term"
        )
    return ""


def as_float64(name: str, values: Any) -> Tensor:
    """Return a sequence, array or tensor as a 1-d float64 tensor on the CPU, always a copy."""
    if isinstance(values, Tensor) and values.requires_grad:
        raise ValueError(f"{name} must be fixed, got one that requires grad: detach it")
    try:
        if hasattr(values, "__array_interface__"):
            # A copy, in the machine's byte order: torch takes no other, nor a reversed array.
            values = values.astype(values.dtype.newbyteorder("="))
        tensor = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach().clone()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a sequence of numbers, got {describe(values)}") from error
    if tensor.ndim != 1 or not tensor.numel():
        raise ValueError(f"{name} must be 1-d and not empty, got shape {tuple(tensor.shape)}")
    if tensor.isnan().any():
        raise ValueError(f"{name} must not hold NaN, got one at index {_first(tensor.isnan())}")
    return tensor


def plain_value(value: Any) -> Any:
    """Return numbers and names, also in lists and dicts, as JSON has them: without infinity."""
    if isinstance(value, dict):
        return {name: plain_value(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(each) for each in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else str(float(value))


def read_plain_value(value: Any) -> Any:
    """Return the infinities and NaN that `plain_value` wrote as text, the rest as it is."""
    if isinstance(value, dict):
        return {name: read_plain_value(each) for name, each in value.items()}
    if isinstance(value, list):
        return [read_plain_value(each) for each in value]
    return float(value) if value in ("inf", "-inf", "nan") else value


def check_all(name: str, values: Tensor, good: Tensor, expected: str) -> None:
    """Raise ValueError naming the first of `values` that is not `good`."""
    if not good.all():
        index = _first(~good)
        raise ValueError(f"{name} must {expected}, got {values[index].item()!r} at index {index}")


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0])
