"""What the pages can say of the exact lab: numbers, rows of tables and a figure, from results."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.files import load_json
from benchmarks.pages.figures import COLORS, new_figure, zero_line
from benchmarks.pages.tables import signed
from benchmarks.provenance import ROOT
from benchmarks.quality.samplers import TITLES
from s2dm_loss import CorrectionSearch, NoiseSchedule
from s2dm_loss.sampling import standard_corrections
from s2dm_loss.sampling.choosing import plan_of

RESULTS = ROOT / "benchmarks" / "results" / "lab"
SHOWN = ("ddim", "pndm")
SEARCHES = {"raw": "raw values", "features": "classifier features of 8-bit images"}
"""The searches on trained networks."""
Row = dict[str, Any]


def study(name: str) -> Row:
    """Return a study's document."""
    return load_json(RESULTS / f"{name}.json")


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if wanted.items() <= row.items()]


def best_gains() -> Iterable[tuple[str, list[str]]]:
    """Yield each sampler and, for each number of steps, the best gain and what it changes."""
    rows = [row for row in study("gaussian")["rows"] if row["steps"] <= 100]
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        found = select(rows, sampler=sampler)
        changes = [(row["best_skip"], row["best"] / row["plain"] - 1) for row in found]
        cells = [f"{k}: {signed(change)}" if change < -0.01 else "none" for k, change in changes]
        yield TITLES[sampler], cells


def gaussian(sampler: str, steps: int) -> Row:
    """Return the row of a sampler."""
    (row,) = select(study("gaussian")["rows"], sampler=sampler, steps=steps)
    return row


def exceptions() -> list[Row]:
    """Return where a gain helps, by at least 1 %, though no spread is missing, or the reverse."""
    return [
        row
        for row in study("imperfect")["rows"]
        if (row["plain_spread"] < 1) != (row["relative"] < -0.01)
    ]


class Law(NamedTuple):
    """The coverage study of one law in one number of dimensions."""

    name: str
    rows: list[Row]

    @property
    def boundary(self) -> list[Row]:
        """The cells at the boundary."""
        return [row | row["boundary"] for row in self.rows if "boundary" in row]


def coverage() -> list[Law]:
    """Return the coverage study."""
    rows = study("coverage_gaussian")["rows"] + study("coverage_mixture")["rows"]
    return [
        Law(f"{law}, d = {size}", select(rows, law=law, size=size))
        for law, size in dict.fromkeys((row["law"], row["size"]) for row in rows)
    ]


def pooled(rows: Sequence[Row], name: str) -> str:
    """Return a share of all repeats."""
    if not rows:
        return ""
    return f"{sum(row[name] for row in rows) / sum(row['repeats'] for row in rows):.1%}"


def shares(rows: Sequence[Row], name: str) -> list[float]:
    """Return the share of each cell's repeats."""
    return [row[name] / row["repeats"] for row in rows]


def searched(name: str) -> list[float]:
    """Return what a search on trained networks changes, as it is judged by 8-bit features."""
    return [
        row["searches"][SEARCHES[name]]["judged"]["images"] / row["plain"]["images"] - 1
        for row in study("digits")["rows"]
    ]


def pair_searches() -> Iterable[tuple[str, list[str]]]:
    """Yield each case, and how far from the best pair the searches ended, over all and over DDIM.

    0 % is the best pair, 100 % DDIM with no correction.
    """
    for case, found in study("pairs").items():
        cells = []
        for rows in found["searches"].values():
            left = [row["left"] for row in rows]
            held = sum(row["holds"] for row in rows)
            cells.append(
                f"{sum(left) / len(left):.1%}, at most {max(left):.1%}; "
                f"intervals {held} of {len(rows)}"
            )
        yield case, [text.replace("%", " %") for text in cells]


def strength_gap(least: int = 9) -> float:
    """Return how far the distances of skips from `least` on differ, each at its best τ.

    As a share of the plain distance; the largest of all samplers and steps.
    """
    gaps = []
    for row in study("strength")["rows"]:
        found = [each["distance"] for k, each in row["best_tau_of_skip"].items() if int(k) >= least]
        gaps.append((max(found) - min(found)) / row["plain"])
    return max(gaps)


def distance_by_skip() -> Figure:
    """Draw the distance over plain's by the skip of the gain, for samplers of two orders."""
    found = study("gaussian")
    figure, (panels,) = new_figure(3, 1, len(SHOWN), sharey=True)
    skips = list(range(*found["curve_skips"]))
    for panel, sampler in zip(panels, SHOWN, strict=True):
        rows = [row for row in select(found["rows"], sampler=sampler) if row["steps"] <= 100]
        for row, color in zip(rows, COLORS[1:], strict=False):
            relative = [value / row["plain"] for value in row["curve"]]
            panel.plot(skips, relative, color=color, label=f"{row['steps']} steps")
        zero_line(panel, 1)
        panel.set(title=TITLES[sampler], xlabel="skip k of the gain", yscale="log", ylim=(0.1, 10))
    panels[0].set_ylabel("distance over plain's")
    panels[1].legend(loc="upper right", labelspacing=0.3)
    return figure


def search_samples(samplers: int) -> str:
    """Return how many samples a search over so many samplers draws at most, with its defaults."""
    samples = inspect.signature(CorrectionSearch).parameters["num_samples"].default
    corrections = standard_corrections(NoiseSchedule.linear(1000))
    return f"{plan_of(samplers, corrections, samples).samples:,}"


HOLES = {
    "lab_study": study,
    "lab_search_samples": search_samples,
    "lab_best_gains": best_gains,
    "lab_gaussian": gaussian,
    "lab_exceptions": exceptions,
    "lab_strength_gap": strength_gap,
    "lab_coverage": coverage,
    "lab_pooled": pooled,
    "lab_shares": shares,
    "lab_pairs": pair_searches,
    "lab_searched": searched,
    "lab_signed": signed,
}
FIGURES = {"lab/gaussian": distance_by_skip}
