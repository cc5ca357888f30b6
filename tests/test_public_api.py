"""The public names, what is documented about them, and what importing them costs."""

from __future__ import annotations

import importlib
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


def test_all_is_sorted_and_what_a_star_import_brings():
    assert s2dm_loss.__all__ == sorted(s2dm_loss.__all__)
    namespace: dict[str, object] = {}
    exec("from s2dm_loss import *", namespace)  # noqa: S102
    assert sorted(namespace.keys() - {"__builtins__"}) == sorted(s2dm_loss.__all__)


def test_no_name_hides_a_module():
    """`import s2dm_loss.coefficients as c` gives the module."""
    for module in pkgutil.iter_modules(s2dm_loss.__path__):
        found = importlib.import_module(f"s2dm_loss.{module.name}")
        assert getattr(s2dm_loss, module.name) is found


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


@pytest.mark.slow
def test_importing_brings_the_core_alone_and_takes_a_tenth_of_what_torch_takes():
    # A share, since processors differ by three; the least of several runs, since memory is shared.
    shares = []
    while len(shares) < 5 and min(shares, default=1) > 0.1:
        run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True)  # noqa: S603
        share, modules = json.loads(run.stdout)
        shares.append(share)
        tops = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
        assert tops <= {"s2dm_loss", "einops", "torch", "typing_extensions"}
        assert not any(module.startswith("s2dm_loss.adapters") for module in modules)
    assert min(shares) <= 0.1, shares
