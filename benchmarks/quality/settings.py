"""What all cells of a run depend on: as text in its folder, back from that text, and in words."""

from __future__ import annotations

import ast
from typing import Any

from benchmarks.quality.budget import Budget
from benchmarks.quality.features import ClassifierFeatures, EfficientNetFeatures
from benchmarks.quality.networks import (
    MLPSpec,
    PixelUNetSpec,
    SpectralUNetSpec,
    UNetSpec,
)

RECORDS = {
    kind.__name__: kind
    for kind in (
        *(Budget, MLPSpec, UNetSpec, PixelUNetSpec, SpectralUNetSpec),
        *(ClassifierFeatures, EfficientNetFeatures),
    )
}


def read(text: str) -> Any:
    """Return the settings that a text says, the defaults of today for what it does not name.

    So that a folder from before a setting was thought of is still recognised.

    Args:
        text: The `repr` of one of `RECORDS`, of a version of this code with perhaps fewer
            fields; any other text stands for itself.
    """
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        return text


def _value(node: ast.expr) -> Any:
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if not (isinstance(node.func, ast.Name) and node.func.id in RECORDS):
        raise ValueError(f"expected one of {', '.join(RECORDS)}, got {ast.unparse(node.func)}")
    given = {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
    return RECORDS[node.func.id](**given)


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return the names of the settings that two runs do not share."""
    return [
        key
        for key in current
        if stored.get(key) != current[key] and read(str(stored.get(key))) != read(str(current[key]))
    ]
