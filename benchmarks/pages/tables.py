"""Markdown tables, and numbers as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MISSING = "not measured yet"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|:--|" + "--:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def signed(share: float, digits: int = 0) -> str:
    """Return a share such as 0.05 as text, "+5 %"."""
    return f"{100 * share:+.{digits}f} %"


def counted(number: int, thing: str) -> str:
    """Return "1 seed" or "5 seeds"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
