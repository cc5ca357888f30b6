"""The public names, what is documented about them, and what importing them costs."""

import importlib
import json
import pkgutil
import re
import sys

import pytest

import s2dm_loss
import s2dm_loss.adapters
from tests.helpers.commands import ROOT, run

DOCS = ROOT / "docs/api"


@pytest.mark.skipif(not DOCS.is_dir(), reason="the pages are not beside these tests")
def test_every_public_name_and_every_adapter_is_documented():
    """By itself or with its module, and in the overview."""
    pages = {path.stem: path.read_text() for path in DOCS.glob("*.md")}
    entries = set(re.findall(r"^::: (s2dm_loss[\w.]*)$", "\n".join(pages.values()), re.M))
    public = set(s2dm_loss.__all__) - {"__version__"}
    for name in public:
        module = getattr(s2dm_loss, name).__module__
        assert entries & {f"s2dm_loss.{name}", f"{module}.{name}", module}, name
    assert public <= set(re.findall(r"\[`(\w+)`\]\[s2dm_loss\.", pages["index"]))
    adapters = pkgutil.iter_modules(s2dm_loss.adapters.__path__)
    assert {f"s2dm_loss.adapters.{module.name}" for module in adapters} <= entries


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
        share, modules = json.loads(run(sys.executable, "-c", IMPORT))
        shares.append(share)
        tops = {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names)
        assert tops <= {"s2dm_loss", "einops", "torch", "typing_extensions"}
        assert not any(module.startswith("s2dm_loss.adapters") for module in modules)
    assert min(shares) <= 0.1, shares
