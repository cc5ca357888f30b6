"""Trainers' own code, from checkouts and unpacked packages that environment variables name.

What a trainer imports for data, pictures and metrics, and what its loss does not use, is stubbed.
Two trainers are on PyPI: .ci/trainers.txt says how to install them into such a folder.
"""

import importlib
import os
import sys
import warnings
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest


def stub(name, **attributes):
    """A module in which every public name can be imported."""
    module = ModuleType(name)
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None)
    module.__getattr__ = _public
    vars(module).update(attributes)
    return module


def _public(name):
    if name.startswith("_"):
        raise AttributeError(name)
    # A class or function that is imported and not used.
    return type(name, (), {"__init__": lambda self, *_, **__: None})


class Anything(SimpleNamespace):
    """Settings that are off unless said."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


def stubs(*names):
    """Stubs by their dotted names, each the attribute of its parent that Python would make it."""
    modules = {name: stub(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent in modules:
            setattr(modules[parent], child, module)
    return modules


def root_of(variable):
    """The checkout that an environment variable names, or skip."""
    root = os.environ.get(variable)
    if root is None:
        pytest.skip(f"set {variable} to a checkout of the trainer")
    return Path(root)


@contextmanager
def checkout_on_path(root, stubbed=()):
    """Let the flat modules of `root` be imported, and stubs stand for what is not installed.

    Trainers call their modules `models`, `utils` or `datasets`, names that others use as well: on
    leaving, every module that came in is dropped and every one that gave way is back.
    """
    names = {path.stem for path in root.iterdir() if path.suffix == ".py" or path.is_dir()}
    names |= {name.split(".")[0] for name in stubbed}

    def taken_out():
        found = {n: module for n, module in sys.modules.items() if n.split(".")[0] in names}
        for name in found:
            del sys.modules[name]
        return found

    before = taken_out()
    sys.modules.update(stubbed)
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        taken_out()
        sys.modules.update(before)


def load(root, *names, stubbed=()):
    """Import modules of a checkout."""
    with checkout_on_path(root, stubbed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the trainers' own
        return [importlib.import_module(name) for name in names]


def load_below(root, package, *names, stubbed=()):
    """Import modules of a package without running the `__init__` of the package."""
    bare = ModuleType(package)
    bare.__path__ = [str(root / package)]
    names = [f"{package}.{name}" for name in names]
    return load(root, *names, stubbed={package: bare, **dict(stubbed)})


def denoising_diffusion_pytorch(*names):
    """The package and modules of it."""
    package, root = "denoising_diffusion_pytorch", root_of("S2DM_DENOISING_DIFFUSION_PYTORCH_ROOT")
    stubbed = stubs(
        *("torchvision", "torchvision.transforms", "torchvision.utils"),
        *("ema_pytorch", "pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"),
    )
    return load(root, package, *(f"{package}.{name}" for name in names), stubbed=stubbed)


def k_diffusion_layers():
    """`k_diffusion.layers`, without the rest of the package."""
    stubbed = stubs(
        *("dctorch", "dctorch.functional", "safetensors", "torchdiffeq", "torchsde"),
        *("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
    )
    root = root_of("S2DM_K_DIFFUSION_ROOT")
    return load_below(root, "k_diffusion", "layers", stubbed=stubbed)[0]
