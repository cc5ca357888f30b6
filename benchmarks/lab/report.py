"""Figures and the page fragment, from the JSON of the studies.

``docs/evidence.md`` takes the fragment in; every number in it is read from the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.files import load_json, write_whole
from benchmarks.lab.report_search import CORE, Row, judged_best, search_sections, signed
from benchmarks.pages.figures import COLORS, STYLE, save_figure
from benchmarks.pages.tables import markdown_table
from benchmarks.quality.samplers import TITLES

RESULTS = Path(__file__).parents[1] / "results" / "lab"
ASSETS = Path(__file__).parents[2] / "docs" / "assets" / "lab"
FIGURES = ("gaussian.svg", "best_skip.svg")


def write_report(results: Path = RESULTS, figures: Path = ASSETS, folder: Path = RESULTS) -> None:
    """Write the figures and ``lab.md``.

    Args:
        results: Folder of the studies' JSON.
        figures: Folder for the figures.
        folder: Folder for the fragment.
    """
    studies = {path.stem: load_json(path) for path in sorted(results.glob("*.json"))}
    with mpl.rc_context(STYLE):
        save_figure(_gaussian_figure(studies["gaussian"]), figures / FIGURES[0])
        save_figure(_best_skip_figure(studies["gaussian"], studies["digits"]), figures / FIGURES[1])
    text = "\n".join(_page(studies))
    write_whole(folder / "lab.md", lambda partial: partial.write_text(text, encoding="utf-8"))


def _gaussian_figure(study: Row) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(CORE), sharey=True)
    first, last, stride = study["curve_skips"]
    skips = list(range(first, last, stride))
    for panel, sampler in zip(panels, CORE, strict=True):
        rows = [r for r in study["rows"] if r["sampler"] == sampler and r["steps"] <= 100]
        for row, color in zip(rows, COLORS[1:], strict=False):
            relative = [value / row["plain"] for value in row["curve"]]
            panel.plot(skips, relative, color=color, label=f"{row['steps']} steps")
        panel.axhline(1, color=COLORS[0], linewidth=1)
        panel.set(title=TITLES[sampler], xlabel="skip k of the gain", yscale="log", ylim=(0.1, 10))
    panels[0].set_ylabel("distance to the data over plain's")
    panels[1].legend(loc="lower right")
    return figure


def _best_skip_figure(gaussian: Row, digits: Row) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for sampler, color in zip(CORE, COLORS[1:], strict=False):
        exact = [r for r in gaussian["rows"] if r["sampler"] == sampler and r["steps"] <= 100]
        axes.plot(
            [r["steps"] for r in exact],
            [r["best_skip"] for r in exact],
            color=color,
            label=f"{TITLES[sampler]}, exact model",
        )
        trained = [r for r in digits["rows"] if r["sampler"] == sampler]
        axes.plot(
            [r["steps"] * (1 + 0.03 * (r["seed"] - 2)) for r in trained],
            [judged_best(r, "raw") for r in trained],
            linestyle="",
            marker="o",
            markersize=4,
            alpha=0.6,
            color=color,
            label=f"{TITLES[sampler]}, networks",
        )
    axes.set(xscale="log", xlabel="sampling steps", ylabel="best skip k of the gain (0: none)")
    axes.set_xticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    return figure


def _page(studies: dict[str, Row]) -> Iterable[str]:
    yield "## The exact lab: what a gain does when the model is perfect\n"
    yield from _exact(studies["gaussian"])
    yield from _mixtures(studies["mixtures"])
    yield from _imperfect(studies["imperfect"])
    yield from _strength(studies["strength"])
    yield "## Which gain for my model? The criteria compared\n"
    yield from search_sections(studies)
    yield "### Commands of the lab\n"
    yield "```sh"
    yield from (study["command"] for study in studies.values())
    yield "python -m benchmarks.lab report\n```\n"


def _exact(study: Row) -> Iterable[str]:
    yield (
        "On Gaussian data E[ε | x_t] is a formula, every step of a deterministic sampler is "
        "linear, and the Fréchet distance of its samples to the data is exact: no training, no "
        "random numbers. The data here have the covariance of the digits. What is left is the "
        "sampler's discretisation error, and **with few steps a gain mends much of it**: DDIM's "
        "step cuts a corner and leaves too little spread, and a smaller ε̂ takes less noise away.\n"
    )
    yield "![Distance to the data by the skip of the gain](assets/lab/gaussian.svg)\n"
    rows = []
    for row in study["rows"]:
        gained = row["best"] / row["plain"] - 1
        helps = gained < -0.01
        rows.append(
            (
                TITLES[row["sampler"]],
                str(row["steps"]),
                f"{row['plain_spread']:.3f}",
                f"{row['plain']:.2g}",
                str(row["best_skip"]) if helps else "none",
                signed(gained) if helps else "",
                signed(row["relative"]["99"]) if row["relative"]["99"] < 10 else "> +1000 %",
            )
        )
    yield markdown_table(
        [
            "exact model, τ = 0.99",
            "steps",
            "spread",
            "distance, plain",
            "best k",
            "change",
            "change at k = 99",
        ],
        rows,
    )
    yield (
        "Spread is the samples' root mean square over the data's; the distance is the Fréchet "
        "distance over the data's variance. The best k falls as the steps grow: for DDIM, of first "
        "order, the gain is a correction of its step size, and the higher-order samplers want one "
        "at their fewest steps only. A gain that is too large is far worse than none.\n"
    )


def _mixtures(study: Row) -> Iterable[str]:
    floors = {row["law"]: row["floor"] for row in study["rows"]}
    yield "### Mixtures\n"
    yield (
        "The same with mixtures, whose E[ε | x_t] is not linear. Each cell is the best of seven "
        "gains (k up to 199) and what it changes; the distance is a squared sliced 2-Wasserstein "
        f"distance of {study['samples']} samples over the variance, all gains from the same noise. "
        "Two sets of true samples are "
        + " and ".join(f"{floor:.2g} ({law})" for law, floor in floors.items())
        + " apart, so changes of less than 5 % count as none. A warm posterior (temperature 2) is "
        "a model that cannot quite tell the components apart: a model error that a gain mends in "
        "part.\n"
    )
    rows = []
    for law, temperature in dict.fromkeys((r["law"], r["temperature"]) for r in study["rows"]):
        for sampler in CORE:
            cells = [
                (r["best_skip"], r["relative"][str(r["best_skip"])])
                for r in study["rows"]
                if (r["law"], r["temperature"], r["sampler"]) == (law, temperature, sampler)
            ]
            title = law + (", warm posterior" if temperature > 1 else "")
            rows.append((title, TITLES[sampler], *(_best(*cell, least=0.05) for cell in cells)))
    yield markdown_table(["data", "sampler", "5", "10", "20", "50"], rows)


def _best(skip: int, change: float, least: float = 0.01) -> str:
    return f"{skip}: {signed(change)}" if change < -least else "none"


def _imperfect(study: Row) -> Iterable[str]:
    yield "### A model that is wrong in a known way\n"
    cells = study["rows"]
    exceptions = [r for r in cells if (r["plain_spread"] < 1) != (r["relative"] < -0.01)]
    coarse = sum(r["model"].startswith("coarse") for r in exceptions)
    others = [r for r in exceptions if not r["model"].startswith("coarse")]
    where = sorted({f"{TITLES[r['sampler']]} with {r['steps']} steps" for r in others})
    yield (
        "The same Gaussian and an ε̂ that is exact but for one error. Each cell is the best k and "
        "what it changes, with 10, 20, 50 and 100 steps. **A gain helps where the samples have "
        "too little spread**: an ε̂ that is too large, or a model that takes the data for narrower "
        "than they are, wants a gain at many steps and with any sampler; an ε̂ that is too small, "
        "or a blurred model, wants none, or less than the exact one. Independent errors add "
        "spread, so with DDIM and DEIS they want less of a gain too. The rule of thumb, a gain if "
        "and only if the spread without one is below the data's, is right (a change of at least "
        f"1 %) in {len(cells) - len(exceptions)} of {len(cells)} cells. Of the others {coarse} are "
        "of the coarse model, whose missing spread lies in directions that it does not know and "
        f"no gain restores, and {len(others)} are {' and '.join(where)}.\n"
    )
    rows = []
    for model in dict.fromkeys(row["model"] for row in cells):
        for sampler in CORE:
            found = [r for r in cells if r["model"] == model and r["sampler"] == sampler]
            texts = (_best(r["best_skip"], r["relative"]) for r in found)
            rows.append((model, TITLES[sampler], *texts))
    yield markdown_table(["ε̂", "sampler", "10", "20", "50", "100"], rows)


def _strength(study: Row) -> Iterable[str]:
    yield "### k and τ are nearly one parameter\n"
    yield (
        "λ(t) − 1 is (1−τ)/τ times c²(t), and c² grows with k at every t, though not in one shape "
        "(c²/(kβ) of k = 99 runs from 0.56 to 2.88). With τ free every k reaches nearly the same "
        "distance, and with k free every τ does; the exact model again, the distance over plain's "
        "and in brackets the value that reached it:\n"
    )
    rows = []
    for row in study["rows"]:
        if row["sampler"] != "ddim" and row["steps"] > 10:
            continue
        tuned = (
            f"{found['distance'] / row['plain']:.2f} ({found['tau']:.3f})"
            for found in row["best_tau_of_skip"].values()
        )
        rows.append((f"{TITLES[row['sampler']]}, {row['steps']} steps", *tuned))
    skips = study["rows"][0]["best_tau_of_skip"]
    yield markdown_table(["best τ of a given k", *(f"k = {k}" for k in skips)], rows)
    rows = []
    for row in study["rows"]:
        if row["sampler"] != "ddim" and row["steps"] > 10:
            continue
        tuned = (
            f"{found['distance'] / row['plain']:.2f} ({found['skip']})"
            for found in row["best_skip_of_tau"].values()
        )
        rows.append((f"{TITLES[row['sampler']]}, {row['steps']} steps", *tuned))
    taus = study["rows"][0]["best_skip_of_tau"]
    yield markdown_table(["best k of a given τ", *(f"τ = {tau}" for tau in taus)], rows)
    yield (
        "Smaller k with smaller τ is a little better throughout, but a search over k at τ = 0.99 "
        "loses little of what a search over both could win. τ was searched down to 0.37 and k up "
        "to 499, so values at those ends are bounds.\n"
    )
