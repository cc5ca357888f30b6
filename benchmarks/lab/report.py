"""Figures and the page fragment, from the JSON of the studies.

``docs/evidence.md`` takes the fragment in; every number in it is read from the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.quality.files import load_json, write_whole
from benchmarks.quality.report import COLORS, STYLE, markdown_table, save_figure
from benchmarks.quality.samplers import TITLES

RESULTS = Path(__file__).parents[1] / "results" / "lab"
ASSETS = Path(__file__).parents[2] / "docs" / "assets" / "lab"
FIGURES = ("gaussian.svg", "best_skip.svg")
CORE = ("ddim", "pndm", "deis")
LINES = {
    "norm line": "λ(t) from the norms of one run, step by step",
    "accumulated norm line": "λ(t) from the same, from the error accumulated",
}
CRITERIA = {
    "fréchet": "Fréchet distance, raw values",
    "recommended": "the same, where surely better than none",
    "energy": "energy distance, raw values",
    "norm": "norm of ε̂ as in training",
}

SEARCHES = {"raw values": "raw", "classifier features of 8-bit images": "images"}
"""The searches on trained networks, and the measure that each is judged by."""

Row = dict[str, Any]


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
            [_oracle(r, "raw") for r in trained],
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
    axes.legend(fontsize=7)
    return figure


def _oracle(row: Row, measure: str) -> int:
    """Return the skip that the classifier's features find best."""
    return int(min(row["judged"], key=lambda skip: row["judged"][skip][measure]))


def _signed(share: float) -> str:
    return f"{100 * share:+.0f} %"


def _page(studies: dict[str, Row]) -> Iterable[str]:
    yield "## The exact lab: what a gain does when the model is perfect\n"
    yield from _exact(studies["gaussian"])
    yield from _mixtures(studies["mixtures"])
    yield from _imperfect(studies["imperfect"])
    yield from _strength(studies["strength"])
    yield "## Which gain for my model? The criteria compared\n"
    yield from _search(studies["search"], studies["false_alarms"])
    yield from _coverage([studies["coverage_gaussian"], studies["coverage_mixture"]])
    yield from _whole_search(studies["whole_search"])
    yield from _digits(studies["digits"])
    yield from _searches(studies["digits"])
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
                _signed(gained) if helps else "",
                _signed(row["relative"]["99"]) if row["relative"]["99"] < 10 else "> +1000 %",
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
    return f"{skip}: {_signed(change)}" if change < -least else "none"


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


def _search(study: Row, alarms: Row) -> Iterable[str]:
    yield (
        "[`GainSearch`](which_gain.md) samples with several k from the same noise and compares "
        "the samples with data. On the exact model above the right answer is known. With "
        f"{study['num_samples']} samples and the default skips, over {len(study['rows'])} "
        "searches (DDIM, PNDM and DEIS with 5, 10, 20 and 50 steps):\n"
    )
    rows = []
    for name, title in (CRITERIA | LINES).items():
        ratios = [r["chosen"][name]["distance"] / r["plain"] for r in study["rows"]]
        hits = [r["chosen"][name].get("skip") == r["best_skip"] for r in study["rows"]]
        best = [r["best"] / r["plain"] for r in study["rows"]]
        rows.append(
            (
                title,
                "" if name in LINES else f"{sum(hits)} of {len(hits)}",
                f"{median(ratios):.2f}",
                f"{fmean(min(r, 100) for r in ratios):.2f}",
                f"{max(ratios):.3g}",
                f"{sum(r > 1.01 for r in ratios)}",
            )
        )
    rows.append(("the best on the grid", "", f"{median(best):.2f}", f"{fmean(best):.2f}", "", "0"))
    yield markdown_table(
        [
            "criterion",
            "finds the best",
            "distance over plain's, median",
            "mean",
            "worst",
            "worse than plain",
        ],
        rows,
    )
    yield (
        f"Where no gain helps (PNDM with {alarms['steps']} steps, {alarms['num_samples']} samples) "
        f"one was recommended in {alarms['alarms']} of {alarms['repeats']} searches.\n"
    )


def _coverage(laws: Sequence[Row]) -> Iterable[str]:
    cells = [row for law in laws for row in law["rows"]]
    counts = sorted({row["count"] for row in cells})
    steps = sorted({row["steps"] for row in cells})
    lowest = min(row["joint"] / row["repeats"] for row in cells)
    yield "### Do its intervals hold?\n"
    yield (
        "The plug-in Fréchet distance of n samples is too large by about b/n, with a b that grows "
        "with the spread, so a difference of two distances is biased against the larger gain. The "
        "search removes it by two halves, and its intervals come from influence functions. Here "
        f"the truth is exact: DDIM with {', '.join(map(str, steps))} steps and an exact model, "
        f"k = {', '.join(map(str, laws[0]['strengths']))} (below 0 the inverse of the gain) against "
        "none, as many data as samples; Gaussian axes of variance 1/√i, in the mixture with a ring "
        f"of eight Gaussians for the first two. {min(r['repeats'] for r in cells)} to "
        f"{max(r['repeats'] for r in cells)} repeats a cell. The four intervals are to hold "
        f"together in 95 %. The lowest of {len(cells)} cells is {lowest:.1%}; the table pools the "
        "numbers of steps. A false alarm is a gain called better than none that is not, where "
        "the data are scaled so that k = 9 changes nothing and the others harm.\n"
    )
    rows, power = [], []
    for law, size in dict.fromkeys((row["law"], row["size"]) for row in cells):
        found = [row for row in cells if (row["law"], row["size"]) == (law, size)]
        at_boundary = [row | row["boundary"] for row in found if "boundary" in row]
        rows.append(
            (
                f"{law}, d = {size}",
                *(_pooled([r for r in found if r["count"] == n], "joint") for n in counts),
                _pooled(found, "joint"),
                f"{max(row['bias'] for row in found):.2f}",
                _pooled(at_boundary, "alarms"),
                f"{max(row['alarms'] / row['repeats'] for row in at_boundary):.1%}",
            )
        )
        power.append(
            (
                f"{law}, d = {size}",
                *(" / ".join(_power(r) for r in found if r["steps"] == number) for number in steps),
            )
        )
    yield markdown_table(
        [
            "joint coverage",
            *(f"n = {n}" for n in counts),
            "all",
            "largest bias, in standard deviations",
            "false alarms",
            "most in a cell",
        ],
        rows,
    )
    yield (
        "Power: in how many of the repeats a gain is recommended, by ascending n. With many steps there is little to win, and in few "
        "dimensions little to see it by:\n"
    )
    yield markdown_table(["recommended", *(f"{number} steps" for number in steps)], power)


def _pooled(rows: Sequence[Row], name: str) -> str:
    if not rows:
        return ""
    return f"{sum(row[name] for row in rows) / sum(row['repeats'] for row in rows):.1%}"


def _power(row: Row) -> str:
    return f"{1 - row['recommended']['0'] / row['repeats']:.0%}"


def _whole_search(study: Row) -> Iterable[str]:
    yield (
        "The whole search over all corrections, which chooses on a third of the data and reports "
        f"on the rest and on fresh noise: {len(study['variances'])} Gaussian axes, DDIM, "
        f"{study['num_samples']} samples, {study['data']} data, {study['repeats']} repeats. At the "
        "null the data have the very spread of the samples, so that every correction harms.\n"
    )
    rows = []
    for row in study["rows"]:
        chosen = row["recommended"]
        named = ", ".join(f"{name} {count}" for name, count in sorted(chosen.items()) if count)
        rows.append(
            (
                ("null, " if row["null"] else "") + f"{row['steps']} steps",
                f"{row['joint'] / study['repeats']:.1%}",
                f"{row['alarms'] / study['repeats']:.1%}",
                named,
                "" if row["null"] else f"{row['mean_distance'] / row['plain']:.2f}",
                "" if row["null"] else f"{row['best_of_coarse_grid'] / row['plain']:.2f}",
            )
        )
    yield markdown_table(
        [
            "",
            "joint coverage",
            "false alarms",
            "recommended",
            "distance over plain's, mean",
            "best of the coarse grid",
        ],
        rows,
    )


def _searches(study: Row) -> Iterable[str]:
    cells = study["rows"]
    yield (
        "The same networks and the search over all corrections: the gain in both directions, a "
        "constant λ, the start noise times a constant, Temporal Score Rescaling. Two searches, one "
        "on raw values and one with `features=` the classifier's of 8-bit images, which is what "
        "the judge uses; both judged on fresh noise beside the best of the "
        f"{len(cells[0]['grid'])} strengths of the coarse scan, found by brute force on that very "
        "noise. Changes against plain, mean over the seeds:\n"
    )
    rows = []
    for sampler in CORE:
        for steps in sorted({row["steps"] for row in cells}):
            found = [r for r in cells if (r["sampler"], r["steps"]) == (sampler, steps)]
            row = [f"{TITLES[sampler]}, {steps} steps"]
            for name, measure in SEARCHES.items():
                changes, best = [], []
                for cell in found:
                    plain = cell["judged"]["0"][measure]
                    grid = [judged[measure] for judged in cell["grid"].values()]
                    changes.append(cell["searches"][name]["judged"][measure] / plain - 1)
                    best.append(min(plain, *grid) / plain - 1)
                labels = [cell["searches"][name]["recommended"] for cell in found]
                row += ["; ".join(_counted(labels)), _signed(fmean(changes)), _signed(fmean(best))]
            rows.append(tuple(row))
    yield markdown_table(
        [
            "",
            "raw values recommend",
            "raw: change",
            "best",
            "8-bit features recommend",
            "8-bit: change",
            "best",
        ],
        rows,
    )


def _counted(labels: Sequence[str]) -> Iterable[str]:
    for label in dict.fromkeys(sorted(labels)):
        times = labels.count(label)
        yield label if times == 1 else f"{label} ({times} times)"


def _digits(study: Row) -> Iterable[str]:
    rows_of = study["rows"]
    seeds = len({row["seed"] for row in rows_of})
    yield "### On trained networks\n"
    yield (
        f"The plain networks of the digits, {seeds} seeds, DDIM, PNDM and DEIS with 10, 20 and 50 "
        f"steps. Each criterion saw {study['num_samples']} samples and the data, nothing else; "
        "its choice is then judged by the Fréchet distance of classifier features on fresh noise "
        f"({study['judged_on']} samples), beside the best that a search with those features "
        "finds. Raw: samples as the sampler returns them. Clamped: the same as 8-bit images.\n"
    )
    yield "![Best skip by sampling steps](assets/lab/best_skip.svg)\n"
    table = []
    for name, title in (CRITERIA | LINES).items():
        cells = [title]
        for measure in ("raw", "images"):
            changes, regrets = _judged(rows_of, name, measure)
            cells += [_signed(fmean(changes)), _signed(max(changes)), _signed(fmean(regrets))]
        table.append(tuple(cells))
    best = ["the best on the grid"]
    for measure in ("raw", "images"):
        changes = [
            row["judged"][str(_oracle(row, measure))][measure] / row["judged"]["0"][measure] - 1
            for row in rows_of
        ]
        best += [_signed(fmean(changes)), _signed(max(changes)), ""]
    table.append(tuple(best))
    yield markdown_table(
        [
            "criterion",
            "raw: change",
            "worst",
            "above the best",
            "clamped: change",
            "worst",
            "above the best",
        ],
        table,
    )
    table = []
    for sampler in CORE:
        for steps in sorted({row["steps"] for row in rows_of}):
            cells = [r for r in rows_of if (r["sampler"], r["steps"]) == (sampler, steps)]
            chosen = sorted(r["chosen"]["recommended"] for r in cells)
            oracle = {m: sorted(_oracle(r, m) for r in cells) for m in ("raw", "images")}
            changes, _ = _judged(cells, "recommended", "raw")
            clamped, _ = _judged(cells, "recommended", "images")
            table.append(
                (
                    f"{TITLES[sampler]}, {steps} steps",
                    _listed(chosen),
                    _listed(oracle["raw"]),
                    _signed(fmean(changes)),
                    _listed(oracle["images"]),
                    _signed(fmean(clamped)),
                )
            )
    yield markdown_table(
        [
            "k, one for each seed (0: none)",
            "recommended",
            "best, raw",
            "change, raw",
            "best, clamped",
            "change, clamped",
        ],
        table,
    )


def _judged(rows: Sequence[Row], name: str, measure: str) -> tuple[list[float], list[float]]:
    """Return, of each row, the change against plain and the excess over the best on the grid."""
    changes, regrets = [], []
    for row in rows:
        judged = row["judged"]
        value = (
            row["lines"][name][measure]
            if name in LINES
            else judged[str(row["chosen"][name])][measure]
        )
        changes.append(value / judged["0"][measure] - 1)
        regrets.append(value / judged[str(_oracle(row, measure))][measure] - 1)
    return changes, regrets


def _listed(skips: Sequence[int]) -> str:
    return ", ".join(map(str, skips))
