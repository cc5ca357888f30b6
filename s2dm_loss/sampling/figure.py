"""The figure of a search: the candidates with their intervals, and how it came to them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from s2dm_loss.sampling.corrections import NoCorrection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from s2dm_loss.sampling.result import Recommendation


def draw(found: Recommendation) -> Figure:
    """Return a figure of what was compared, and one axis for each correction that was scanned.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    scanned = {id(p.correction): p.correction for p in found.scan}
    corrections = [c for c in scanned.values() if not isinstance(c, NoCorrection)]
    columns = 1 + len(corrections)
    height = max(2.8, 0.9 + 0.28 * len(found.candidates))
    figure = Figure(figsize=(4.6 + 2.6 * len(corrections), height), layout="constrained")
    compared, *scans = figure.subplots(1, columns, squeeze=False)[0]

    several = len(found.cost.calls) > 1
    names = [f"{c.sampler}, {c.label}" if several else c.label for c in found.candidates]
    for row, candidate in enumerate(found.candidates):
        below, above = candidate.difference - candidate.low, candidate.high - candidate.difference
        color = "C3" if candidate is found.recommended else "C0"
        if candidate.distance < math.inf:
            compared.errorbar(
                candidate.difference, row, xerr=[[below], [above]], fmt="o", color=color
            )
    compared.axvline(0, color="0.6", linewidth=0.8)
    compared.set_yticks(range(len(names)), names)
    compared.invert_yaxis()
    compared.set_xlabel(f"distance less that of {names[0]}, with 95 % intervals")

    for axis, correction in zip(scans, corrections, strict=True):
        # The last stage that tried a sampler without correction has its level.
        for number, sampler in enumerate(found.cost.calls):
            points = [p for p in found.scan if p.sampler == sampler]
            for samples in sorted({p.samples for p in points}):
                line = sorted(
                    (p.strength if p.correction is correction else correction.none, p.distance)
                    for p in points
                    if p.samples == samples
                    and (p.correction is correction or isinstance(p.correction, NoCorrection))
                    and p.distance < math.inf
                )
                if len(line) > 1:
                    axis.plot(*zip(*line, strict=True), "o-", color=f"C{number}", markersize=3)
        axis.set_xlabel(correction.name.removesuffix("="))
        axis.set_ylabel("distance, choosing")
    return figure
