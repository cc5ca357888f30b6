"""Adapters: the loss in a trainer's own terms, one module a trainer.

Each imports its trainer only when it is used. Import them as `s2dm_loss.adapters.<name>`.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def extend(mixin: Any, plain: Any) -> Any:
    """Return a trainer's class with an adapter's mixin in front of it; made once for each."""
    return type(f"SkipStep{plain.__name__}", (mixin, plain), {})


def reduce_extended(extended: Any) -> tuple[Any, ...]:
    """Return what pickles an object of such a class, which pickle would not find by its name."""
    return _restore, (*type(extended).__bases__, extended.__dict__)


def _restore(mixin: Any, plain: Any, state: dict[str, Any]) -> Any:
    extended = object.__new__(extend(mixin, plain))
    extended.__dict__.update(state)
    return extended
