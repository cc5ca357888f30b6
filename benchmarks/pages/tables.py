"""Markdown tables, and numbers as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.files import write_whole

MISSING = "not measured yet"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|:--|" + "--:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def folded(title: str, text: str) -> str:
    """Return a block that opens when its title is clicked; an admonition of pymdownx.details."""
    indented = "\n".join(f"    {line}" if line else "" for line in text.strip().split("\n"))
    return f'??? note "{title}"\n\n{indented}\n'


def signed(share: float, digits: int = 0) -> str:
    """Return a share such as 0.05 as text, "+5 %"."""
    return f"{100 * share:+.{digits}f} %"


def counted(number: int, thing: str) -> str:
    """Return "1 seed" or "5 seeds"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def write_page(path: Path, title: str, source: str, parts: Iterable[str]) -> None:
    """Write a page that a program made, and say so where an editor will see it.

    Args:
        path: The page.
        title: Its heading.
        source: The command that writes it and, after a semicolon, where its words stand.
        parts: Its paragraphs, tables and headings; empty ones are left out.
    """
    kept = [f"# {title}", f"<!-- Written by {source}. -->"]
    kept += [part.strip("\n") for part in parts if part.strip()]
    text = "\n\n".join(kept) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
