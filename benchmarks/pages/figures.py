"""Colours, the style and the files of figures.

A page shows a figure on white and on near-black, and a phone shows it at 390 pixels: so the ground
is transparent, ink and colours are legible on both, and a figure is no wider than `WIDTH`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.files import write_whole

INK = "#7d838c"
COLORS = ("#7d838c", "#1e88e5", "#43a047", "#fb8c00", "#e53935", "#ab47bc", "#00a08a", "#a1776a")
WIDTH = 5.2
STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.facecolor": "none",
    "figure.dpi": 110,
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "svg.hashsalt": "s2dm-loss",  # the same results give the same file
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def new_figure(
    height: float, *shape: int, width: float = WIDTH, **options: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes in an array of `shape`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*(shape or (1, 1)), squeeze=False, **options)


def save_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure in the style of the pages and write it, always the same file."""
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
    with mpl.rc_context(STYLE):
        figure = draw()
        write_whole(path, lambda file: figure.savefig(file, metadata=metadata))


def zero_line(axes: Axes, at: float = 0.0, *, vertical: bool = False) -> None:
    """Draw the line of no difference."""
    draw = axes.axvline if vertical else axes.axhline
    draw(at, color=COLORS[0], linewidth=1)
