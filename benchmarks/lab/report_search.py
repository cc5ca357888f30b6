"""The page's part on the search, from the JSON of its studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from benchmarks.pages.tables import markdown_table
from benchmarks.quality.samplers import TITLES

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


def judged_best(row: Row, measure: str) -> int:
    """Return the skip that the classifier's features find best."""
    return int(min(row["judged"], key=lambda skip: row["judged"][skip][measure]))


def signed(share: float) -> str:
    """Return a share as a signed percentage."""
    return f"{100 * share:+.0f} %"


def search_sections(studies: Mapping[str, Row]) -> Iterable[str]:
    """Yield the sections on the criteria, the statistic and the search."""
    yield from _search(studies["search"])
    yield from _coverage([studies["coverage_gaussian"], studies["coverage_mixture"]])
    yield from _whole_search(studies["whole_search"])
    yield from _digits(studies["digits"])
    yield from _searches(studies["digits"])


def _search(study: Row) -> Iterable[str]:
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
        f"k = {', '.join(map(str, laws[0]['strengths']))} (below 0 the inverse of the gain) "
        "against none, as many data as samples; Gaussian axes of variance 1/√i, in the mixture "
        f"with a ring of eight Gaussians for the first two. {min(r['repeats'] for r in cells)} to "
        f"{max(r['repeats'] for r in cells)} repeats a cell. The four intervals are to hold "
        f"together in 95 %. The lowest of {len(cells)} cells is {lowest:.1%}, where 200 "
        "repeats alone make a cell uncertain by 1.5 %; the table pools the numbers of steps. A "
        "false alarm is a gain called better than none that is not, at the boundary: with the data "
        "scaled so that k = 9 changes nothing and the others harm.\n"
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
                _pooled(at_boundary, "joint"),
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
            "at the boundary",
            "largest bias, in standard deviations",
            "false alarms",
            "most in a cell",
        ],
        rows,
    )
    yield (
        "Power: in how many of the repeats a gain is recommended, by ascending n. With many steps "
        "there is little to win, and in few dimensions little to see it by:\n"
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
        "noise. Changes against plain, mean over the seeds where there are several:\n"
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
                row += ["; ".join(_counted(labels)), signed(fmean(changes)), signed(fmean(best))]
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
        f"The plain networks of the digits, {seeds} {'seed' if seeds == 1 else 'seeds'}, DDIM, "
        "PNDM and DEIS with 10, 20 and 50 "
        f"steps. Each criterion saw {study['num_samples']} samples and the data, nothing else; "
        "its choice is then judged by the Fréchet distance of classifier features on fresh noise "
        f"({study['judged_on']} samples), beside the best that a search with those features "
        "finds. Raw: samples as the sampler returns them. 8-bit: the same as files hold them.\n"
    )
    yield "![Best skip by sampling steps](assets/lab/best_skip.svg)\n"
    table = []
    for name, title in (CRITERIA | LINES).items():
        cells = [title]
        for measure in ("raw", "images"):
            changes, regrets = _judged(rows_of, name, measure)
            cells += [signed(fmean(changes)), signed(max(changes)), signed(fmean(regrets))]
        table.append(tuple(cells))
    best = ["the best on the grid"]
    for measure in ("raw", "images"):
        changes = [
            row["judged"][str(judged_best(row, measure))][measure] / row["judged"]["0"][measure] - 1
            for row in rows_of
        ]
        best += [signed(fmean(changes)), signed(max(changes)), ""]
    table.append(tuple(best))
    yield markdown_table(
        [
            "criterion",
            "raw: change",
            "worst",
            "above the best",
            "8-bit: change",
            "worst",
            "above the best",
        ],
        table,
    )
    table = []
    for sampler in CORE:
        for steps in sorted({row["steps"] for row in rows_of}):
            here = [r for r in rows_of if (r["sampler"], r["steps"]) == (sampler, steps)]
            chosen = sorted(r["chosen"]["recommended"] for r in here)
            best_skips = {m: sorted(judged_best(r, m) for r in here) for m in ("raw", "images")}
            changes, _ = _judged(here, "recommended", "raw")
            saved, _ = _judged(here, "recommended", "images")
            table.append(
                (
                    f"{TITLES[sampler]}, {steps} steps",
                    _listed(chosen),
                    signed(fmean(changes)),
                    signed(fmean(saved)),
                    _listed(best_skips["raw"]),
                    _listed(best_skips["images"]),
                )
            )
    yield markdown_table(
        [
            "k, one for each seed (0: none)",
            "recommended",
            "its change, raw",
            "its change, 8-bit",
            "best, raw",
            "best, 8-bit",
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
        regrets.append(value / judged[str(judged_best(row, measure))][measure] - 1)
    return changes, regrets


def _listed(skips: Sequence[int]) -> str:
    return ", ".join(map(str, skips))
