"""Every fenced Python block of the README and the pages runs, one page in one namespace.

A block below the comment `<!-- requires: module -->` is left out where that module cannot be
imported.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^(?P<requires><!-- requires: (?P<module>[\w.]+) -->\n+)?"
    r"^(?P<indent> *)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```$",
    re.M | re.S,
)


class Block(NamedTuple):
    line: int
    requires: str | None
    code: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in BLOCK.finditer(text):
        indent = len(match["indent"])
        code = "".join(line[indent:] or "\n" for line in match["code"].splitlines(keepends=True))
        blocks.append(Block(text[: match.start("code")].count("\n"), match["module"], code))
    return blocks


PAGES = [
    page for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]) if blocks_of(page)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": page.stem}
    missing = []
    for line, requires, code in blocks_of(page):
        if requires and importlib.util.find_spec(requires) is None:
            missing.append(requires)
            continue
        # As many empty lines in front as the block has in its page, so that a traceback counts
        # lines as the page does.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)  # noqa: S102
    if missing:
        pytest.skip(f"the rest ran; not installed: {', '.join(sorted(set(missing)))}")


def test_every_python_fence_is_found():
    """A fence that the pattern above misses would go unrun in silence."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        fences = re.findall(r"^\s*(?:```+|~~~+) *\{?\.?py", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) == len(blocks_of(page)), page


def test_no_page_uses_doctest_prompts_in_a_fence():
    """`>>>` in a python fence is text to the test above, not code that is checked."""
    for page in PAGES:
        for block in blocks_of(page):
            assert not block.code.lstrip().startswith(">>>"), (page, block.line)
