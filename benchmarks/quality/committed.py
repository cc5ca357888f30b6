"""The committed results by the names that pages use."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.files import load_json
from benchmarks.quality.statistics import Cell, Results

FOLDER = Path(__file__).parents[1] / "results" / "quality"
ARCHIVE = "archive"
"""Records of presets that are no longer in the code."""
NAMES = {
    "unet": "cifar10-unet",
    "small": "cifar10-wide",
    "small-10k": "cifar10-wide-10k",
    "eps16": "cifar10-16",
    "eps16-10k": "cifar10-16-10k",
    "eps16-million": "cifar10-16-million",
    "flow16": "cifar10-16-flow",
    "flow16-10k": "cifar10-16-flow-10k",
    "flow16-million": "cifar10-16-flow-million",
}
"""Short names of runs; any other is a preset's own."""
IN_WORDS = {r"gain (-?[\d.]+)": r"plain+gain\1", r"loss (-?[\d.]+)": r"skip\1-expected"}


@cache
def records() -> dict[str, dict[str, Any]]:
    """Return all committed records by preset, those of the archive included."""
    found = {path.stem: load_json(path) for path in sorted(FOLDER.glob("*.json"))}
    return {**found.pop(ARCHIVE), **found}


@cache
def results(run: str) -> Results:
    """Return the results of a run, or raise LookupError if none are committed."""
    preset, known = NAMES.get(run, run), records()
    if preset not in known:
        raise LookupError(f"no committed results of {run!r}; there are {', '.join(known)}")
    return Results(known[preset])


def method_name(words: str) -> str:
    """Return a method's name in the records: "gain 49", "loss 49", or the name itself.

    "loss 49 + gain 9" is the gain put on the trained loss.
    """
    name, _, rest = words.partition(" + ")
    for pattern, recorded in IN_WORDS.items():
        name = re.sub(f"^{pattern}$", recorded, name)
    return f"{name}+{method_name(rest).removeprefix('plain+')}" if rest else name


def cell(run: str, sampler: str | None, steps: int) -> Cell:
    """Return a cell; without a sampler of the one that others are compared with."""
    return Cell(sampler or results(run).base, steps)
