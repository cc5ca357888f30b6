"""What the API pages show of the docstrings and signatures of the library."""

from __future__ import annotations

import re
from typing import Any

import griffe

# A paragraph that starts with >>>, up to the next empty line.
_EXAMPLE = re.compile(r"^>>>.*(?:\n(?!\s*$).*)*", re.M)
# What tells doctest how to compare, and a reader nothing.
_DIRECTIVE = re.compile(r" *# doctest:.*")


class ReadableDocstrings(griffe.Extension):
    """Examples as code, and defaults as the values that they name."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Visit everything in the package."""
        _visit(pkg, pkg)


def _visit(thing: griffe.Object, package: griffe.Module) -> None:
    if thing.docstring is not None:
        thing.docstring.value = _EXAMPLE.sub(_fenced, thing.docstring.value)
    if isinstance(thing, griffe.Function):
        for parameter in thing.parameters:
            if isinstance(parameter.default, griffe.ExprName):
                parameter.default = _value(parameter.default, package)
    for member in thing.members.values():
        if isinstance(member, griffe.Object):
            _visit(member, package)


def _fenced(example: re.Match[str]) -> str:
    return f"```pycon\n{_DIRECTIVE.sub('', example[0])}\n```"


def _value(name: griffe.ExprName, package: griffe.Module) -> griffe.Expr | str:
    """`DEFAULT_TAU` to 0.99: a reader wants the number. Names from elsewhere stay."""
    path = name.canonical_path
    if not path.startswith(f"{package.path}."):
        return name
    named = package[path.removeprefix(f"{package.path}.")]
    value = named.value if isinstance(named, griffe.Attribute) else None
    return name if value is None else value
