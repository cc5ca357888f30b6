"""Every fenced Python block of the README and the pages runs, one page in one namespace.

A block below the comment `<!-- requires: module -->` is left out where that module cannot be
imported. The comment `<!-- test: statement -->` is run as a block is, and makes the rest short.
"""

import importlib.util
import json
import re
import textwrap
import unicodedata
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from benchmarks.pages.tutorial import NOTEBOOK, PAGE, RUN, digest, notebook, ran
from tests.helpers.commands import ROOT

FENCE = re.compile(
    r"^(?:<!-- requires: (?P<module>[\w.]+) -->\n+)?"
    r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)$",
    re.M | re.S,
)
ALL_PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
COLUMNS = 80  # what a block of the site shows on a desktop without scrolling
DIFF_OR_TEXT = re.compile(" *(diff|text)")


class Block(NamedTuple):
    line: int
    requires: str | None
    code: str

    def run(self, page, namespace):
        # As many empty lines in front as the block has in its page, so that a traceback counts
        # lines as the page does.
        code = compile("\n" * self.line + self.code, str(page), "exec")
        exec(code, namespace)  # noqa: S102 - our own page


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    tests = re.finditer(r"^<!-- test: (?P<code>.*) -->$", text, re.M)
    fences = [match for match in FENCE.finditer(text) if match["info"].startswith("python")]
    found = [(match, None, match["code"]) for match in tests]
    found += [(match, match["module"], textwrap.dedent(match["code"])) for match in fences]
    return sorted(Block(text[: m.start("code")].count("\n"), *rest) for m, *rest in found)


def snippets_of(page, *requires):
    """Run the blocks that need one of these modules (None: no module); what they define."""
    namespace: dict[str, object] = {}
    for block in blocks_of(page):
        if block.requires in requires:
            block.run(page, namespace)
    return namespace


HEAVY = ("README.md", "correct.md")  # they train, or search over samplers
PAGES = [
    pytest.param(page, marks=[pytest.mark.slow] * (page.name in HEAVY))
    for page in filter(blocks_of, ALL_PAGES)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace, missing = {"__name__": page.stem}, set()
    for block in blocks_of(page):
        if block.requires and importlib.util.find_spec(block.requires) is None:
            missing.add(block.requires)
        else:
            block.run(page, namespace)
    if missing:
        pytest.skip(f"the rest ran; not installed: {', '.join(sorted(missing))}")


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_fence_is_found_and_narrow_and_is_no_doctest(page):
    """A fence that the pattern above misses would go unrun, and `>>>` in one is text to it."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^\s*(?:```+|~~~+) *\{?\.?py", text, re.M)
    blocks = [block.code for block in blocks_of(page) if "\n" in block.code]
    assert len(fences) == len(blocks)
    assert not any(code.lstrip().startswith(">>>") for code in blocks)
    # But diffs, which have a trainer's lines to the letter, and what a block has printed.
    narrow = [block for block in FENCE.finditer(text) if not DIFF_OR_TEXT.match(block["info"])]
    lines = [(b["indent"], line) for b in narrow for line in b["code"].splitlines()]
    assert [line for indent, line in lines if columns_of(line) - len(indent) > COLUMNS] == []


def columns_of(line):
    """Cells of a fixed-width font: a combining accent, as that of ε̂, has none of its own."""
    return sum(not unicodedata.combining(character) for character in line)


def test_the_numbers_of_the_tutorial_are_those_of_its_code():
    text = PAGE.read_text(encoding="utf-8")
    assert f"`{digest(text)}`" in RUN.search(text)[0], "python -m benchmarks.pages.tutorial"


def test_the_notebook_is_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert NOTEBOOK.read_text(encoding="utf-8") == notebook(text)
    cells = json.loads(notebook(text))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert [block.code.strip() for block in blocks_of(PAGE) if "\n" in block.code] == code
    printed = [cell["outputs"][0]["text"] for cell in cells if cell.get("outputs")]
    assert printed
    assert all("".join(lines) in text for lines in printed)


def test_what_a_block_prints_stands_below_it_and_nothing_else_does():
    page = "```python\n1\n```\n\n```text\nold\n```\n\nwords\n\n```python\n2\n```\n"
    found = ran(page, {"1\n": "", "2\n": "new\n"}.get)
    assert found == ("```python\n1\n```\n\nwords\n\n```python\n2\n```\n\n```text\nnew\n```\n")
    assert ran(found, {"1\n": "", "2\n": "new\n"}.get) == found
    assert digest(found) == digest(page) != digest(page.replace("2", "3"))


def test_the_line_for_a_solver_of_flow_matching_samples_the_data():
    """A network that is exact for data N(0, 0.5²); without these options it is taken for noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    page = (ROOT / "docs" / "correct.md").read_text(encoding="utf-8")
    (options,) = re.findall(r"add\s+`(prediction_type=.*?)`", page)
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    given = eval(f"dict({options})", {"pipe": pipe})  # noqa: S307 - our own page

    def spread(scheduler):
        scheduler.set_timesteps(20)
        x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            sigma = float(t) / 1000
            a, variance = 1 - sigma, 0.25 * (1 - sigma) ** 2 + sigma**2
            x = scheduler.step((sigma - 0.25 * a) / variance * x, t, x).prev_sample
        return float(x.std())

    config = pipe.scheduler.config
    assert spread(UniPCMultistepScheduler.from_config(config, **given)) == pytest.approx(0.5, 0.05)
    assert spread(UniPCMultistepScheduler.from_config(config)) > 0.8
