"""Trainers' own code from checkouts of their repositories, named by environment variables.

What a trainer imports for data, pictures and metrics, and what its loss does not use, is stubbed.
"""

import importlib
import os
import warnings
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.checkouts import checkout_on_path


class _Anything:
    """Stands for a class or function that is imported and not used."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def stub(name: str, **attributes: Any) -> ModuleType:
    """A module in which every public name can be imported."""
    module = ModuleType(name)
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None)
    module.__getattr__ = _public
    vars(module).update(attributes)
    return module


def _public(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return _Anything


def stubs(*names: str) -> dict[str, ModuleType]:
    """Stubs by their dotted names, each the attribute of its parent that Python would make it."""
    modules = {name: stub(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], child, module)
    return modules


def root_of(variable: str) -> Path:
    """The checkout that an environment variable names, or skip."""
    root = os.environ.get(variable)
    if root is None:
        pytest.skip(f"set {variable} to a checkout of the trainer")
    return Path(root)


def load(root: Path, *names: str, stubbed: Mapping[str, ModuleType] = {}) -> list[ModuleType]:
    """Import modules of a checkout."""
    with checkout_on_path(root, stubbed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own
        return [importlib.import_module(name) for name in names]


def load_below(
    root: Path, package: str, *names: str, stubbed: Mapping[str, ModuleType] = {}
) -> list[ModuleType]:
    """Import modules of a package without running the `__init__` of the package."""
    bare = ModuleType(package)
    bare.__path__ = [str(root / package)]
    return load(root, *(f"{package}.{name}" for name in names), stubbed={package: bare, **stubbed})
