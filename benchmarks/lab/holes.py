"""What `docs/evidence_lab.md` can say: numbers, rows of tables and a figure, from results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.files import load_json
from benchmarks.pages.figures import COLORS, new_figure, zero_line
from benchmarks.pages.tables import signed
from benchmarks.provenance import ROOT
from benchmarks.quality.samplers import TITLES

RESULTS = ROOT / "benchmarks" / "results" / "lab"
CORE = ("ddim", "pndm", "deis")
SEARCHES = {"raw values": "raw", "classifier features of 8-bit images": "images"}
"""The searches on trained networks, and the measure that each is judged by."""
Row = dict[str, Any]


def study(name: str) -> Row:
    """Return a study's document."""
    document: Row = load_json(RESULTS / f"{name}.json")
    return document


def best(skip: int, change: float, least: float = 0.01) -> str:
    """Return the best skip and what it changes; "none" for a change that is too small."""
    return f"{skip}: {signed(change)}" if change < -least else "none"


def by_sampler(name: str, title: str, least: float = 0.01) -> Iterable[tuple[str, str, list[str]]]:
    """Yield a study's best gains: name and sampler, and a text for each number of steps."""
    rows = study(name)["rows"]
    for key in dict.fromkeys((r[title], r.get("temperature", 1), r["sampler"]) for r in rows):
        found = [r for r in rows if (r[title], r.get("temperature", 1), r["sampler"]) == key]
        changes = [
            r["relative"][str(r["best_skip"])] if isinstance(r["relative"], dict) else r["relative"]
            for r in found
        ]
        texts = [best(r["best_skip"], c, least) for r, c in zip(found, changes, strict=True)]
        yield key[0] + (", warm posterior" if key[1] > 1 else ""), TITLES[key[2]], texts


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

    def of(self, **wanted: int) -> list[Row]:
        """Return the cells of some steps or some number of samples."""
        return [row for row in self.rows if wanted.items() <= row.items()]


def coverage() -> list[Law]:
    """Return the coverage study."""
    rows = study("coverage_gaussian")["rows"] + study("coverage_mixture")["rows"]
    return [
        Law(f"{law}, d = {size}", [row for row in rows if (row["law"], row["size"]) == (law, size)])
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


def searched() -> Iterable[tuple[str, list[str]]]:
    """Yield sampler and steps, and what each search on trained networks recommends and changes."""
    rows = study("digits")["rows"]
    for sampler, steps in dict.fromkeys((row["sampler"], row["steps"]) for row in rows):
        found = [row for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)]
        cells = []
        for name, measure in SEARCHES.items():
            changes, least = [], []
            for row in found:
                plain = row["plain"][measure]
                grid = [judged[measure] for judged in row["grid"].values()]
                changes.append(row["searches"][name]["judged"][measure] / plain - 1)
                least.append(min(plain, *grid) / plain - 1)
            labels = sorted({row["searches"][name]["recommended"] for row in found})
            cells += ["; ".join(labels), signed(fmean(changes)), signed(fmean(least))]
        yield f"{TITLES[sampler]}, {steps} steps", cells


def distance_by_skip() -> Figure:
    """Draw the distance over plain's by the skip of the gain, for three samplers."""
    found = study("gaussian")
    figure, (panels,) = new_figure(3, 1, len(CORE), width=9, sharey=True)
    skips = list(range(*found["curve_skips"]))
    for panel, sampler in zip(panels, CORE, strict=True):
        rows = [r for r in found["rows"] if r["sampler"] == sampler and r["steps"] <= 100]
        for row, color in zip(rows, COLORS[1:], strict=False):
            relative = [value / row["plain"] for value in row["curve"]]
            panel.plot(skips, relative, color=color, label=f"{row['steps']} steps")
        zero_line(panel, 1)
        panel.set(title=TITLES[sampler], xlabel="skip k of the gain", yscale="log", ylim=(0.1, 10))
    panels[0].set_ylabel("distance over plain's")
    panels[1].legend(loc="lower right")
    return figure


HOLES = {
    "lab_study": study,
    "lab_titles": TITLES,
    "lab_best": best,
    "lab_by_sampler": by_sampler,
    "lab_exceptions": exceptions,
    "lab_coverage": coverage,
    "lab_pooled": pooled,
    "lab_shares": shares,
    "lab_searched": searched,
    "lab_signed": signed,
}
FIGURES = {"lab/gaussian": distance_by_skip}
