"""Adapters: the loss in a trainer's own terms, one module a trainer.

Each imports its trainer only when it is used. Import them as `s2dm_loss.adapters.<name>`.

What `skip_step` means is the same in each: it returns a changed copy of the trainer's object and
leaves the object as it is. A network inside is shared, not copied. The options are those of
`SkipStepLoss`; one that the trainer settles itself is an error that says so.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from s2dm_loss.checks import check_choice
from s2dm_loss.loss import SkipStepLoss

__all__ = ["SETTLED", "changed_copy", "check_options", "check_plain", "owner_of", "reduce_changed"]

_Object = TypeVar("_Object")
_OPTIONS = [
    name
    for name, option in inspect.signature(SkipStepLoss).parameters.items()
    if option.kind is option.KEYWORD_ONLY
]

# What a trainer with a loss of its own settles, and why it is no option of its adapter.
SETTLED = {
    "prediction_type": "it is read from the trainer",
    "reduction": "the trainer reduces its loss itself",
    "timesteps": "the trainer draws its timesteps itself",
}


def check_options(options: Mapping[str, Any], refused: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of a loss, without those that an adapter refuses.

    Args:
        options: `LossOptions` as a user has given them.
        refused: The reason for each option that the adapter does not offer.

    Raises:
        TypeError: if there is no such option.
        ValueError: if a refused one is given (`None` counts as not given).
    """
    for name, value in options.items():
        try:
            check_choice("an option", name, _OPTIONS)
        except ValueError as error:
            raise TypeError(f"{error}") from None
        if name in refused and value is not None:
            raise ValueError(f"{name} cannot be given here, got {value!r}: {refused[name]}")
    return {name: value for name, value in options.items() if name not in refused}


def check_plain(
    name: str, value: Any, mixin: type, kind: str = "", attributes: Sequence[str] = ()
) -> None:
    """Raise TypeError for what is no object of a kind, ValueError for one that has the loss."""
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an object of the trainer's, got the class {value.__name__}"
        )
    if isinstance(value, mixin):
        raise ValueError(
            f"{name} must have its plain loss, got a {type(value).__name__}, which is what "
            "skip_step has returned: give it the trainer's own object"
        )
    if missing := [attribute for attribute in attributes if not hasattr(value, attribute)]:
        raise TypeError(
            f"{name} must be {kind}, got a {type(value).__name__} without {', '.join(missing)}"
        )


def owner_of(value: Any, method: str) -> str:
    """Return the name of the class that a method is of; "" for one of a wrapped object."""
    return next((kind.__name__ for kind in type(value).__mro__ if method in vars(kind)), "")


def changed_copy(plain: _Object, mixin: Any, **attributes: Any) -> _Object:
    """Return a copy of a trainer's object, with a mixin in front of its class and new attributes.

    A module's copy shares parameters, buffers and submodules with the module, and what is added to
    one of the two later is not in the other.
    """
    changed = copy.copy(plain)
    if isinstance(changed, nn.Module):
        for name in vars(nn.Module()):
            if isinstance(vars(changed).get(name), (dict, set)):
                vars(changed)[name] = copy.copy(vars(changed)[name])
    kind: Any = type(plain)
    changed.__class__ = _extend(mixin, kind)
    for name, value in attributes.items():
        setattr(changed, name, value)
    return changed


def reduce_changed(changed: Any) -> tuple[Any, ...]:
    """Return what pickles such a copy, whose class pickle would not find by its name."""
    return _restore, (*type(changed).__bases__, changed.__dict__)


@functools.cache
def _extend(mixin: Any, plain: Any) -> Any:
    """Return a trainer's class with an adapter's mixin in front of it; made once for each."""
    return type(f"SkipStep{plain.__name__}", (mixin, plain), {})


def _restore(mixin: Any, plain: Any, state: dict[str, Any]) -> Any:
    changed = object.__new__(_extend(mixin, plain))
    changed.__dict__.update(state)
    return changed
