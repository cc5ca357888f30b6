"""`python -m benchmarks.pages.example`: run the worked example and write down what it prints.

The blocks of `docs/worked_example.md` run in order in one namespace. What a block prints stands
below it, and at the end of the page which run that was, with a digest of the code that ran.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.files import write_whole

PAGE = Path(__file__).parents[2] / "docs" / "worked_example.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n```text\n.*?^```\n)?", re.M | re.S)
RUN = re.compile(r"(?<=<!-- run -->\n).*?(?=<!-- /run -->)", re.S)


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


@click.command()
def main() -> None:
    """Run docs/worked_example.md as it stands, and write down what it prints."""
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
    write_whole(PAGE, lambda partial: partial.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.pages.example")
