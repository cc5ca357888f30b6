"""The figures of the evidence pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.pages.figures import COLORS, STYLE, new_figure, zero_line
from benchmarks.quality.evidence.records import GRID, IMAGES, MEASURES, RAW, title
from benchmarks.quality.presets import CORE, STEPS
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Interval, Results
from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, coefficients

Places = Sequence[float] | NDArray[Any]
MEASURE_COLORS = {IMAGES: COLORS[3], RAW: COLORS[1]}


def intervals(
    axes: Axes,
    places: Places,
    found: Sequence[Interval | None],
    *,
    low: float = -np.inf,
    across: bool = False,
    line: bool = False,
    **style: Any,
) -> None:
    """Draw means with their t intervals, leaving out what was not measured.

    Args:
        axes: Where.
        places: One for each interval.
        found: The intervals.
        low: What lies below is cut off there and marked by an arrow, and a mean by its number.
        across: Draw along x.
        line: Join the means.
        style: Colour and label.
    """
    kept = [(at, i) for at, i in zip(places, found, strict=True) if i is not None]
    inside = [(at, i) for at, i in kept if i.mean >= low]
    style = {"markersize": 4, "capsize": 2, "linewidth": 1.2, **style}
    if inside:
        at, means = [p for p, _ in inside], [i.mean for _, i in inside]
        ends = np.array([[i.mean - max(i.low, low), i.high - i.mean] for _, i in inside]).T
        ends[~np.isfinite(ends)] = 0  # one seed
        form = "o-" if line else "o"
        if across:
            axes.errorbar(means, at, xerr=ends, fmt=form, **style)
        else:
            axes.errorbar(at, means, yerr=ends, fmt=form, **style)
    for place, one in kept:
        if one.low >= low or not np.isfinite(one.low):
            continue
        x, y = (low, place) if across else (place, low)
        arrow = "<" if across else "v"
        axes.plot(x, y, arrow, color=style["color"], markersize=5, clip_on=False)
        if one.mean < low and not line:  # of lines, several would be cut off at one place
            shift = (5, -2.5) if across else (3, 4)
            axes.annotate(
                f"{one.mean:.0f}", (x, y), shift, textcoords="offset points", fontsize=8,
                color=style["color"],
            )  # fmt: skip


def by_steps(results: Results, names: Sequence[str], measure: str = IMAGES) -> Figure:
    """Return the improvement against steps, a panel for each sampler."""
    with mpl.rc_context(STYLE):
        figure, (panels,) = new_figure(2.9, 1, len(CORE), sharey=True)
        for axes, sampler in zip(panels, CORE, strict=True):
            for number, name in enumerate(names):
                found = [results.improvement(name, [Cell(sampler, n)], measure) for n in STEPS]
                places = np.arange(len(STEPS)) + 0.09 * (number - (len(names) - 1) / 2)
                color = COLORS[number + 1]
                intervals(
                    axes, places, found, low=-40, line=True, color=color, label=title(results, name)
                )
            zero_line(axes)
            axes.set_xticks(range(len(STEPS)), [str(steps) for steps in STEPS])
            axes.set(title=TITLES[sampler], xlabel="steps")
        panels[0].set_ylabel(f"improvement over plain, %, {MEASURES[measure]}")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def forest(results: Results, names: Sequence[str]) -> Figure:
    """Return the mean improvement of every method, one below the other."""
    rows = -np.arange(len(names))
    with mpl.rc_context(STYLE):
        figure, ((axes,),) = new_figure(0.26 * len(names) + 0.9)
        for offset, measure in ((0.15, IMAGES), (-0.15, RAW)):
            found = [results.improvement(name, GRID, measure) for name in names]
            intervals(
                axes, rows + offset, found, low=-60, across=True,
                color=MEASURE_COLORS[measure], label=MEASURES[measure],
            )  # fmt: skip
        axes.set_yticks(rows, [title(results, name) for name in names])
        zero_line(axes, vertical=True)
        axes.set_xlim(-60, 60)
        axes.set_xlabel("improvement over plain, %")
        figure.legend(loc="outside upper right", ncols=2)
    return figure


def by_seed(panels: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> Figure:
    """Return values by seed, a panel for each heading.

    Args:
        panels: {heading: groups}, where a group {name: values} has a colour of its own; the names
            of all panels stand one below the other.
    """
    groups = [
        list(dict.fromkeys(name for group in same for name in group))
        for same in zip(*panels.values(), strict=True)
    ]
    names = [name for group in groups for name in group]
    with mpl.rc_context(STYLE):
        figure, (row,) = new_figure(
            0.24 * len(names) + 0.9, 1, len(panels), sharex=True, sharey=True
        )
        for axes, (heading, found) in zip(row, panels.items(), strict=True):
            for group, color in zip(found, COLORS[1:], strict=False):
                for name, values in group.items():
                    place = -names.index(name)
                    axes.plot(values, [place] * len(values), "o", color=color, ms=4, alpha=0.8)
                    axes.plot(np.mean(values), place, "|", color=color, ms=11)
            zero_line(axes, vertical=True)
            axes.set_title(heading, fontsize="small")
        row[0].set_yticks(-np.arange(len(names)), names)
        figure.supxlabel("improvement over plain, %, 8-bit", fontsize="medium")
    return figure


def sweeps(results: Results, groups: dict[str, dict[str, str]], *, low: float = -65.0) -> Figure:
    """Return the mean improvement of some sweeps, {panel: {label: method}}, in both measures."""
    with mpl.rc_context(STYLE):
        figure, (panels,) = new_figure(2.7, 1, len(groups), sharey=True)
        for axes, (heading, names) in zip(panels, groups.items(), strict=True):
            for shift, measure in ((-0.08, IMAGES), (0.08, RAW)):
                found = [results.improvement(name, GRID, measure) for name in names.values()]
                intervals(
                    axes, np.arange(len(names)) + shift, found, low=low,
                    color=MEASURE_COLORS[measure], label=MEASURES[measure],
                )  # fmt: skip
            axes.set_xticks(range(len(names)), list(names))
            axes.set(title=heading, xlim=(-0.5, len(names) - 0.5))
            axes.tick_params(axis="x", labelsize=8)
            zero_line(axes)
        panels[0].set_ylabel("improvement over plain, %")
        panels[0].legend(loc="lower left")
    return figure


def grouped(
    groups: Sequence[Sequence[Interval | None]], labels: Sequence[str], names: Sequence[str]
) -> Figure:
    """Return means with intervals, several side by side at each name."""
    with mpl.rc_context(STYLE):
        figure, ((axes,),) = new_figure(2.7)
        for position, label in enumerate(labels):
            shift = 0.16 * (position - (len(labels) - 1) / 2)
            found = [group[position] for group in groups]
            places = np.arange(len(groups)) + shift
            intervals(axes, places, found, color=COLORS[position + 1], label=label)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        zero_line(axes)
        axes.set_ylabel("improvement over plain, %")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def gain_sweep(results: Results, gains: dict[int, str]) -> Figure:
    """Return improvement and spread against the k of the gain, a line for each number of steps."""
    skips = list(gains)
    with mpl.rc_context(STYLE):
        figure, ((images, raw), (spread, legend)) = new_figure(4.8, 2, 2)
        for steps, color in zip(STEPS, COLORS[1:], strict=False):
            cell = Cell("ddim", steps)
            for axes, measure, low in ((images, IMAGES, -30.0), (raw, RAW, -60.0)):
                found = [results.improvement(name, [cell], measure) for name in gains.values()]
                intervals(
                    axes, skips, found, low=low, line=True, color=color, label=f"{steps} steps"
                )
                axes.set(title=f"improvement, %, {MEASURES[measure]}", xlabel="k of the gain")
            spreads = [
                np.mean(list(results.values(name, cell, "spread").values()))
                for name in gains.values()
            ]
            spread.plot(skips, spreads, color=color, marker="o", markersize=3)
        spread.set(title="spread of samples over data's", xlabel="k of the gain")
        for axes, at in ((images, 0), (raw, 0), (spread, 1)):
            zero_line(axes, at)
        legend.axis("off")
        legend.legend(*raw.get_legend_handles_labels(), loc="center left", title="DDIM")
    return figure


def continuous_time(skips: Sequence[int]) -> tuple[Figure, dict[int, float]]:
    """Return discrete and continuous gains beside each other, and their largest gap in %."""
    discrete = NoiseSchedule.linear(1000)
    continuous = ContinuousSchedule.vp()
    times = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    gaps = {}
    with mpl.rc_context(STYLE):
        figure, ((left, right),) = new_figure(2.7, 1, 2)
        for skip, color in zip(skips, COLORS[1:], strict=False):
            table = coefficients(discrete, skip).gain
            path = coefficients(continuous, SkipSet(skip / 1000), t=times).gain
            left.plot(times, 1 / table, color=color, label=f"k = {skip}")
            left.plot(times, 1 / path, color=COLORS[0], linestyle=":", linewidth=1.4)
            # Just above t = k the two differ in whether the skip still fits.
            valid = torch.arange(1000) > skip
            gap = (path / table - 1)[valid]
            right.plot(times[valid], 100 * gap, color=color)
            gaps[skip] = 100 * float(gap.abs().max())
        left.set(xlabel="time", title="λ(t): discrete, VP-SDE dotted")
        right.set(xlabel="time", title="difference of the gains, %")
        left.legend()
    return figure, gaps
