"""What `docs/evidence_lab.md` can say: numbers, tables and a figure, from committed results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from benchmarks.files import load_json
from benchmarks.pages.figures import COLORS, new_figure, zero_line
from benchmarks.pages.tables import markdown_table, signed
from benchmarks.provenance import ROOT
from benchmarks.quality.samplers import TITLES

RESULTS = ROOT / "benchmarks" / "results" / "lab"
CORE = ("ddim", "pndm", "deis")
SEARCHES = {"raw values": "raw", "classifier features of 8-bit images": "images"}
"""The searches on trained networks, and the measure that each is judged by."""
Row = dict[str, Any]


class Lab:
    """The studies' results, as a template asks for them.

    Args:
        folder: Folder of the JSON that `python -m benchmarks.lab run` wrote.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        """Read nothing yet."""
        self.folder = folder

    @cached_property
    def studies(self) -> dict[str, Row]:
        """The studies' documents, by name."""
        return {path.stem: load_json(path) for path in sorted(self.folder.glob("*.json"))}

    def rows(self, study: str) -> list[Row]:
        """Return a study's rows."""
        found: list[Row] = self.studies[study]["rows"]
        return found

    @property
    def gaussian(self) -> str:
        """The best gain of the exact model, by sampler and steps."""
        table = []
        for row in self.rows("gaussian"):
            gained = row["best"] / row["plain"] - 1
            at_99 = row["relative"]["99"]
            table.append(
                [
                    TITLES[row["sampler"]],
                    str(row["steps"]),
                    f"{row['plain_spread']:.3f}",
                    f"{row['plain']:.2g}",
                    *_best(row["best_skip"], gained),
                    signed(at_99) if at_99 < 10 else "> +1000 %",
                ]
            )
        header = ["τ = 0.99", "steps", "spread", "distance", "best k", "change", "at k = 99"]
        return markdown_table(header, table)

    @property
    def flow(self) -> str:
        """Euler's spread on the straight path, over the data's, and with the gain of a skip."""
        rows = self.rows("flow")
        skips = list(rows[0]["gain"])
        table = [
            [
                "uniform" if row["shift"] == 1 else f"shift {row['shift']:g}",
                f"{row['variance']:g}",
                str(row["steps"]),
                *(f"{value:.3f}" for value in (row["plain"], *row["gain"].values())),
                f"{row['heun']:.3f}",
            ]
            for row in rows
        ]
        header = ["times", "variance", "steps", "Euler", *(f"δ = {delta}" for delta in skips)]
        return markdown_table([*header, "Heun, half the steps"], table)

    @property
    def floors(self) -> dict[str, float]:
        """How far apart two sets of true samples of each mixture are."""
        return {row["law"]: row["floor"] for row in self.rows("mixtures")}

    @property
    def mixtures(self) -> str:
        """The best gain on mixtures; a change below 5 % counts as none."""
        rows = self.rows("mixtures")
        titles = {
            (row["law"], row["temperature"]): row["law"]
            + (", warm posterior" if row["temperature"] > 1 else "")
            for row in rows
        }
        return _by_sampler(
            "data",
            [
                (
                    titles[row["law"], row["temperature"]],
                    row["sampler"],
                    row["steps"],
                    row["best_skip"],
                    row["relative"][str(row["best_skip"])],
                )
                for row in rows
            ],
            least=0.05,
        )

    @property
    def imperfect(self) -> str:
        """The best gain of models that are wrong in a known way."""
        names = ("model", "sampler", "steps", "best_skip", "relative")
        return _by_sampler("ε̂", [tuple(r[n] for n in names) for r in self.rows("imperfect")])

    @property
    def exceptions(self) -> list[Row]:
        """Cells in which a gain helps, by at least 1 %, although no spread is missing, or not."""
        return [
            row
            for row in self.rows("imperfect")
            if (row["plain_spread"] < 1) != (row["relative"] < -0.01)
        ]

    @property
    def strength(self) -> str:
        """The best τ of a given k."""
        rows = [r for r in self.rows("strength") if r["sampler"] == "ddim" or r["steps"] <= 10]
        table = [
            [
                f"{TITLES[row['sampler']]}, {row['steps']} steps",
                *(
                    f"{found['distance'] / row['plain']:.2f} ({found['tau']:.3f})"
                    for found in row["best_tau_of_skip"].values()
                ),
            ]
            for row in rows
        ]
        return markdown_table(["", *(f"k = {k}" for k in rows[0]["best_tau_of_skip"])], table)

    @property
    def coverage_rows(self) -> list[Row]:
        """The cells of the coverage study, of both laws."""
        return self.rows("coverage_gaussian") + self.rows("coverage_mixture")

    def _laws(self) -> Iterable[tuple[str, list[Row]]]:
        rows = self.coverage_rows
        for law, size in dict.fromkeys((row["law"], row["size"]) for row in rows):
            found = [row for row in rows if (row["law"], row["size"]) == (law, size)]
            yield f"{law}, d = {size}", found

    @property
    def lowest_coverage(self) -> float:
        """The lowest joint coverage of a cell."""
        return min(row["joint"] / row["repeats"] for row in self.coverage_rows)

    @property
    def coverage(self) -> str:
        """How often the intervals hold together, and how often a gain is called better wrongly."""
        counts = sorted({row["count"] for row in self.coverage_rows})
        table = []
        for title, found in self._laws():
            boundary = [row | row["boundary"] for row in found if "boundary" in row]
            table.append(
                [
                    title,
                    *(_pooled([r for r in found if r["count"] == n], "joint") for n in counts),
                    _pooled(found, "joint"),
                    _pooled(boundary, "joint"),
                    f"{max(row['bias'] for row in found):.2f}",
                    _pooled(boundary, "alarms"),
                    f"{max(row['alarms'] / row['repeats'] for row in boundary):.1%}",
                ]
            )
        header = ["", *(f"n = {n}" for n in counts), "all", "at the boundary", "largest bias"]
        return markdown_table([*header, "false alarms", "most in a cell"], table)

    @property
    def power(self) -> str:
        """How often a gain is recommended, by ascending n."""
        steps = sorted({row["steps"] for row in self.coverage_rows})
        table = [
            [
                title,
                *(
                    " / ".join(
                        f"{1 - row['recommended']['0'] / row['repeats']:.0%}"
                        for row in found
                        if row["steps"] == number
                    )
                    for number in steps
                ),
            ]
            for title, found in self._laws()
        ]
        return markdown_table(["recommended", *(f"{number} steps" for number in steps)], table)

    @property
    def whole_search(self) -> str:
        """Coverage, false alarms and gain of the whole search over all corrections."""
        repeats = self.studies["whole_search"]["repeats"]
        table = []
        for row in self.rows("whole_search"):
            chosen = ", ".join(f"{name} {n}" for name, n in sorted(row["recommended"].items()) if n)
            left = [row["mean_distance"] / row["plain"], row["best_of_coarse_grid"] / row["plain"]]
            table.append(
                [
                    ("null, " if row["null"] else "") + f"{row['steps']} steps",
                    f"{row['joint'] / repeats:.1%}",
                    f"{row['alarms'] / repeats:.1%}",
                    chosen,
                    *("" if row["null"] else f"{share:.2f}" for share in left),
                ]
            )
        header = ["", "joint coverage", "false alarms", "recommended", "distance left"]
        return markdown_table([*header, "best of the grid"], table)

    @property
    def digits(self) -> str:
        """What the search recommends for trained networks, judged on fresh noise."""
        rows = self.rows("digits")
        table = []
        for sampler, steps in dict.fromkeys((row["sampler"], row["steps"]) for row in rows):
            found = [row for row in rows if (row["sampler"], row["steps"]) == (sampler, steps)]
            cells = [f"{TITLES[sampler]}, {steps} steps"]
            for name, measure in SEARCHES.items():
                changes, best = [], []
                for row in found:
                    plain = row["plain"][measure]
                    grid = [judged[measure] for judged in row["grid"].values()]
                    changes.append(row["searches"][name]["judged"][measure] / plain - 1)
                    best.append(min(plain, *grid) / plain - 1)
                labels = sorted({row["searches"][name]["recommended"] for row in found})
                cells += ["; ".join(labels), signed(fmean(changes)), signed(fmean(best))]
            table.append(cells)
        header = ["", "raw values", "change", "best", "8-bit features", "change", "best"]
        return markdown_table(header, table)


def _best(skip: int, change: float, least: float = 0.01) -> tuple[str, str]:
    return (str(skip), signed(change)) if change < -least else ("none", "")


def _by_sampler(
    title: str, cells: Sequence[tuple[str, str, int, int, float]], least: float = 0.01
) -> str:
    """Return a row for each name and sampler, a column for each number of steps."""
    steps = sorted({cell[2] for cell in cells})
    rows = []
    for name, sampler in dict.fromkeys(cell[:2] for cell in cells):
        found = {n: _best(k, c, least) for a, s, n, k, c in cells if (a, s) == (name, sampler)}
        texts = [": ".join(part for part in found[n] if part) for n in steps]
        rows.append([name, TITLES[sampler], *texts])
    return markdown_table([title, "sampler", *map(str, steps)], rows)


def _pooled(rows: Sequence[Row], name: str) -> str:
    if not rows:
        return ""
    return f"{sum(row[name] for row in rows) / sum(row['repeats'] for row in rows):.1%}"


def distance_by_skip() -> Figure:
    """Draw the distance over plain's by the skip of the gain, for three samplers."""
    study = load_json(RESULTS / "gaussian.json")
    figure, (panels,) = new_figure(3, 1, len(CORE), width=9, sharey=True)
    skips = list(range(*study["curve_skips"]))
    for panel, sampler in zip(panels, CORE, strict=True):
        rows = [r for r in study["rows"] if r["sampler"] == sampler and r["steps"] <= 100]
        for row, color in zip(rows, COLORS[1:], strict=False):
            relative = [value / row["plain"] for value in row["curve"]]
            panel.plot(skips, relative, color=color, label=f"{row['steps']} steps")
        zero_line(panel, 1)
        panel.set(title=TITLES[sampler], xlabel="skip k of the gain", yscale="log", ylim=(0.1, 10))
    panels[0].set_ylabel("distance over plain's")
    panels[1].legend(loc="lower right")
    return figure


HOLES = {"lab": Lab()}
FIGURES = {"lab/gaussian": distance_by_skip}
