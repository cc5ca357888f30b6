"""Apply the diff that a page of docs/adapters shows to a trainer's script."""

import re
from pathlib import Path

PAGES = Path(__file__).parents[2] / "docs" / "adapters"


def apply_docs_diff(page: str, script: str, source: str) -> str:
    """Return `source` after the page's diff block titled `script`.

    A line of the diff's file that is not in the source exactly once is an error: then a newcomer
    would not find it either.
    """
    text = (PAGES / page).read_text(encoding="utf-8")
    block = re.search(rf'```diff title="{re.escape(script)}"\n(.*?)```', text, re.S)
    if block is None:
        raise LookupError(f"no diff of {script} in docs/adapters/{page}")
    hunks = re.split(r"^@@.*\n", block[1], flags=re.M)
    for lines in map(str.splitlines, filter(None, hunks)):
        old = "".join(line[1:] + "\n" for line in lines if line[:1] in ("-", " "))
        new = "".join(line[1:] + "\n" for line in lines if line[:1] in ("+", " "))
        if source.count(old) != 1:
            raise LookupError(f"{script} has {source.count(old)} times:\n{old}")
        source = source.replace(old, new)
    return source
