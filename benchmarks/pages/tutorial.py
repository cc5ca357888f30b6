"""`python -m benchmarks.pages.tutorial`: run the tutorial and write down what it prints.

The blocks of `docs/tutorial.md` run in order in one namespace. What a block prints stands below it,
and at the end of the page which run that was, with a digest of the code that ran.
`docs/tutorial.ipynb` is the same as a notebook, with the same outputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n(?P<output>.*?)^```\n)?", re.M | re.S
)
RUN = re.compile(r"(?<=<!-- run -->\n).*?(?=<!-- /run -->)", re.S)
_HIDDEN = re.compile(r"^<!--.*?-->\n*", re.M)
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]+\)")


def digest(text: str) -> str:
    """Return what stands for the code of a page."""
    code = "".join(match["code"] for match in BLOCK.finditer(text))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def ran(text: str, run: Callable[[str], str]) -> str:
    """Return a page with what each block prints, where it prints anything, below it."""

    def printed(match: re.Match[str]) -> str:
        block = f"```python\n{match['code']}```\n"
        output = run(match["code"]).rstrip()
        return f"{block}\n```text\n{output}\n```\n" if output else block

    return BLOCK.sub(printed, text)


def notebook(text: str) -> str:
    """Return a page as a notebook: its text and, between, its blocks with what they print.

    Links to other pages keep their words alone, as a notebook stands by itself.
    """
    cells: list[dict[str, Any]] = []

    def lines(block: str) -> list[str]:
        return block.strip("\n").splitlines(keepends=True)

    def add_text(part: str) -> None:
        part = _LINK.sub(r"\1", _HIDDEN.sub("", RUN.sub("", part))).strip()
        if part:
            cells.append({"cell_type": "markdown", "metadata": {}, "source": lines(part)})

    end = 0
    for match in BLOCK.finditer(text):
        add_text(text[end : match.start()])
        end = match.end()
        printed = match["output"]
        stream = {"output_type": "stream", "name": "stdout", "text": lines(printed or "")}
        cells.append(
            {
                "cell_type": "code",
                "execution_count": None,
                "metadata": {},
                "outputs": [stream] if printed else [],
                "source": lines(match["code"]),
            }
        )
    add_text(text[end:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


@click.command()
def main() -> None:
    """Run docs/tutorial.md as it stands, and write down what it prints."""
    import torch

    from benchmarks.files import write_text

    namespace: dict[str, Any] = {"__name__": PAGE.stem}

    def run(code: str) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, str(PAGE), "exec"), namespace)  # noqa: S102 - our own page
        return output.getvalue()

    start = time.process_time()
    text = ran(PAGE.read_text(encoding="utf-8"), run)
    seconds = time.process_time() - start
    said = (
        f"\nThe run that is shown: Python {platform.python_version()}, torch {torch.__version__}, "
        f"threads: {torch.get_num_threads()}, {seconds:.0f} s of processor time; its code has the "
        f"digest `{digest(text)}`.\n\n"
    )
    text = RUN.sub(said, text)
    write_text(PAGE, text)
    write_text(NOTEBOOK, notebook(text))


if __name__ == "__main__":
    main()
