"""Apply the diff that a page of docs/adapters shows to a trainer's script.

A page shows a hunk without the indentation that all its lines share, and may cut a long line of the
trainer's own short with "…". The hunks stand in the order of the file.
"""

import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "adapters"
CUT = "…"


def docs_diff(page: str, title: str) -> str:
    """The diff block of a page with this title."""
    text = (PAGES / page).read_text(encoding="utf-8")
    block = re.search(
        rf'^(?P<indent> *)```diff title="{re.escape(title)}"\n(?P<diff>.*?)^(?P=indent)```',
        text,
        re.S | re.M,
    )
    if block is None:
        raise LookupError(f"no diff of {title} in docs/adapters/{page}")
    indent = len(block["indent"])
    return "".join(line[indent:] for line in block["diff"].splitlines(keepends=True))


def apply_docs_diff(page: str, title: str, source: str) -> str:
    """Return `source` after the page's diff block with this title."""
    return changed_by(docs_diff(page, title), source, title)


def hunks_of(diff: str) -> list[list[str]]:
    """The lines of each hunk."""
    return [part.splitlines() for part in re.split(r"^@@.*\n", diff, flags=re.M) if part.strip()]


def changed_by(diff: str, source: str, name: str) -> str:
    """Return `source` after a dedented diff.

    What a hunk takes away and shows around it has to be in the source exactly once, below the hunk
    before it: then a newcomer finds it too.
    """
    done, rest = "", source
    for hunk in hunks_of(diff):
        old = [line for line in hunk if line[:1] != "+"]
        pattern = "".join(map(_pattern, old)).replace("(?P=indent)", "(?P<indent>[ \t]*)", 1)
        found = list(re.finditer(pattern, source, re.M))
        if len(found) != 1 or found[0].start() < len(source) - len(rest):
            where = "before its place" if len(found) == 1 else f"{len(found)} times"
            raise LookupError(f"{name} has {where}:\n" + "\n".join(old))
        (match,) = found
        start, end = (place - len(source) + len(rest) for place in match.span())
        theirs = iter(match[0].splitlines(keepends=True))
        new = ""
        for line in hunk:
            if line[:1] == "+":
                new += match["indent"] + line[1:] + "\n" if line[1:] else "\n"
                continue
            kept = next(theirs)
            new += kept if line[:1] != "-" else ""
        done, rest = done + rest[:start] + new, rest[end:]
    return done + rest


def _pattern(line: str) -> str:
    text = line[1:]
    if not text:
        return r"^[ \t]*\n"
    cut = text.endswith(CUT)
    tail = r"[^\n]*" if cut else ""
    return "^(?P=indent)" + re.escape(text.removesuffix(CUT)) + tail + r"\n"
