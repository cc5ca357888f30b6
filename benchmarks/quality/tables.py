"""Results as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.pages.tables import MISSING, markdown_table
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Interval, Results

AT_FLOOR = "at the floor"


def percent(found: Interval | None, digits: int = 1) -> str | None:
    """Return a change as text, with its interval where there is one, bold where it excludes 0."""
    if found is None:
        return None
    if found.seeds == 1:
        return f"{found.mean:+.{digits}f} %"
    text = f"{found.mean:+.{digits}f} % [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.sign else text


def distance_table(
    results: Results, methods: Sequence[str], cells: Sequence[Cell], measure: str
) -> str:
    """Return a table of distances, sampler and steps down, methods across.

    With one seed the change over the first method stands beside each distance, unless both are at
    the floor; with several, the standard deviation over them.
    """
    rows = []
    for cell in cells:
        row = [f"{TITLES[cell.sampler]}, {cell.steps} steps"]
        for method in methods:
            values = list(results.values(method, cell, measure).values())
            if not values:
                row.append(MISSING)
                continue
            text = f"{np.mean(values):.3f}"
            if len(values) > 1:
                text += f" ± {np.std(values, ddof=1):.3f}"
            elif method != methods[0]:
                floored = all(results.at_floor(one, cell, measure) for one in (method, methods[0]))
                over = results.change(method, cell, measure, (methods[0], cell))
                text += f" ({AT_FLOOR if floored else percent(over) or MISSING})"
            row.append(text)
        rows.append(row)
    return markdown_table(["sampler", *(results.title(m) for m in methods)], rows)
