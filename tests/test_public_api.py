"""The public names, what is documented about them, and what importing them costs."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import s2dm_loss
import s2dm_loss.adapters

ROOT = Path(__file__).parents[1]
TRAINERS = ("accelerate", "diffusers", "guided_diffusion", "transformers")
needs_docs = pytest.mark.skipif(
    not (ROOT / "docs/api").is_dir(), reason="the pages are not beside these tests"
)


@needs_docs
def test_every_public_name_is_documented():
    """By itself, or with its module."""
    text = "".join(path.read_text() for path in sorted((ROOT / "docs/api").glob("*.md")))
    entries = set(re.findall(r"^::: (s2dm_loss[\w.]*)$", text, re.M))
    for name in set(s2dm_loss.__all__) - {"__version__"}:
        module = getattr(s2dm_loss, name).__module__
        assert entries & {f"s2dm_loss.{name}", f"{module}.{name}", module}, name


@needs_docs
def test_the_overview_of_the_api_links_every_public_name():
    overview = (ROOT / "docs/api/index.md").read_text()
    linked = set(re.findall(r"\[`(\w+)`\]\[s2dm_loss\.", overview))
    assert set(s2dm_loss.__all__) - {"__version__"} <= linked


@needs_docs
def test_every_adapter_is_documented():
    page = (ROOT / "docs/api/adapters.md").read_text()
    documented = re.findall(r"^::: s2dm_loss\.adapters\.(\w+)$", page, re.M)
    modules = pkgutil.iter_modules(s2dm_loss.adapters.__path__)
    assert sorted(documented) == sorted(module.name for module in modules)


def test_all_is_sorted_and_every_name_is_there():
    assert s2dm_loss.__all__ == sorted(s2dm_loss.__all__)
    for name in s2dm_loss.__all__:
        assert hasattr(s2dm_loss, name), name


def test_every_public_class_and_function_and_method_has_a_docstring():
    bare = []
    for name in s2dm_loss.__all__:
        item = getattr(s2dm_loss, name)
        if not callable(item):
            continue
        members = vars(item).items() if inspect.isclass(item) else ()
        for member_name, member in [("", item), *members]:
            public = not member_name.startswith("_")
            function = inspect.isroutine(member) or isinstance(member, property)
            if (member is item or (public and function)) and not inspect.getdoc(member):
                bare.append(f"{name}.{member_name}")
    assert not bare


def test_no_name_hides_a_module():
    """`import s2dm_loss.coefficients as c` gives the module."""
    for module in pkgutil.iter_modules(s2dm_loss.__path__):
        found = importlib.import_module(f"s2dm_loss.{module.name}")
        assert getattr(s2dm_loss, module.name) is found


def test_a_star_import_brings_exactly_the_public_names():
    namespace: dict[str, object] = {}
    exec("from s2dm_loss import *", namespace)  # noqa: S102
    assert sorted(namespace.keys() - {"__builtins__"}) == sorted(s2dm_loss.__all__)


IMPORT = """
import json, sys, time
start = time.process_time()  # not the clock: other programs run as well
import torch
before = set(sys.modules)
between = time.process_time()
import s2dm_loss
share = (time.process_time() - between) / (between - start)
print(json.dumps([share, sorted(set(sys.modules) - before)]))
"""


def import_once() -> tuple[float, list[str]]:
    command = [sys.executable, "-c", IMPORT]
    run = subprocess.run(command, capture_output=True, check=True)  # noqa: S603 - our own code
    share, modules = json.loads(run.stdout)
    return share, modules


def test_importing_brings_the_core_and_its_dependencies_alone():
    _, modules = import_once()
    tops = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
    assert tops <= {"s2dm_loss", "einops", "torch", "typing_extensions"}
    assert not tops & set(TRAINERS)
    assert not any(module.startswith("s2dm_loss.adapters") for module in modules)


def test_importing_takes_at_most_a_tenth_of_what_torch_takes():
    # A share, since processors differ by three; the least of several runs, since memory is shared.
    shares = []
    for _ in range(5):
        shares.append(import_once()[0])
        if shares[-1] <= 0.1:
            return
    pytest.fail(f"imports took {[f'{share:.1%}' for share in shares]} of torch's")
