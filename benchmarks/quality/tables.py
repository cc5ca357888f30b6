"""Results as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.pages.tables import MISSING, markdown_table
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Interval, Results

AT_FLOOR = "at the floor"


def cell_title(cell: Cell) -> str:
    """Return a cell's name in tables."""
    return f"{TITLES[cell.sampler]}, {cell.steps} steps"


def percent(found: Interval | None) -> str:
    """Return an improvement as text, bold where its interval excludes 0."""
    if found is None:
        return MISSING
    if found.count == 1:
        return f"{found.mean:+.1f} %"
    text = f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"
    return f"**{text}**" if found.sign else text


def improvement(
    results: Results, method: str, cell: Cell, measure: str | None = None, baseline: str = "plain"
) -> str:
    """Return the improvement in one cell as text; where it says nothing, that it does not."""
    if results.at_floor(method, cell, measure) and results.at_floor(baseline, cell, measure):
        return AT_FLOOR
    return percent(results.improvement(method, [cell], measure, baseline))


def distance_table(
    results: Results, methods: Sequence[str], cells: Sequence[Cell], measure: str | None = None
) -> str:
    """Return a table of distances, sampler and steps down, methods across.

    With one seed the improvement over the first method stands beside each distance; with several,
    the standard deviation over them.
    """
    rows = []
    for cell in cells:
        row = [cell_title(cell)]
        for method in methods:
            values = list(results.values(method, cell, measure).values())
            if not values:
                row.append(MISSING)
                continue
            text = f"{np.mean(values):.3f}"
            if len(values) > 1:
                text += f" ± {np.std(values, ddof=1):.3f}"
            elif method != methods[0]:
                text += f" ({improvement(results, method, cell, measure, methods[0])})"
            row.append(text)
        rows.append(row)
    return markdown_table(["sampler", *(results.title(m) for m in methods)], rows)
