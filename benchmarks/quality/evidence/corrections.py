"""`evidence_corrections.md`: what can be put on a trained network, compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.pages.tables import MISSING, counted, markdown_table
from benchmarks.quality.corrections import (
    Correction,
    EpsilonScaling,
    Gain,
    ScoreRescaling,
    StartScaling,
)
from benchmarks.quality.evidence.records import IMAGES, RAW, Evidence
from benchmarks.quality.objectives import Method, Plain
from benchmarks.quality.presets import FITTED, PRESETS, SINGLE
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import (
    Cell,
    Interval,
    Results,
    improvement_of_ratios,
    interval,
)
from benchmarks.quality.tables import cell_title, percent

STUDIES = {"digits-corrections": "Digits", "textures-corrections": "Textures"}
CELLS = [Cell(sampler, steps) for sampler in ("ddim", "deis") for steps in (10, 20)]
SOLVERS = ("deis", "pndm", "dpm++2m", "unipc")
FAMILIES: dict[str, type[Correction]] = {
    "gain in k": Gain,
    "Epsilon Scaling": EpsilonScaling,
    "start noise": StartScaling,
    "Temporal Score Rescaling": ScoreRescaling,
}
KERNEL = "images_kernel"
HARM = 2.0
"""Per cent of the distance that a correction may not add in any cell."""


def corrections_page(evidence: Evidence) -> Iterable[str]:
    """Yield the parts of the page."""
    yield (
        "A trained network can be corrected without training: its ε̂ times a factor, or its start "
        "noise times one. Here the corrections with one strength are compared, each at strengths "
        "on both sides of none, with three that have none to choose: a Gaussian gain for each "
        "principal axis, which makes every step exact for Gaussian data of the data's covariance; "
        "one gain for each step, fitted by gradient to where the same sampler with ten times the "
        "steps ends; and the best gain of each octave of frequencies at each time, "
        "E[ε ε̂] / E[ε̂²] on the data. Improvements of the Fréchet distance over the plain network "
        "with 95 % intervals over the seeds, bold where they exclude 0. A strength is chosen on "
        "the other seeds, so that what is reported of a seed was not chosen on it."
    )
    studied = {name: evidence.results(name) for name in STUDIES}
    measured = {STUDIES[name]: results for name, results in studied.items() if results is not None}
    yield "## The three without a strength: did they earn a place?"
    yield from _verdicts(measured)
    for name, heading in STUDIES.items():
        yield f"## {heading}"
        yield from _study(name, studied[name])
    yield from _reduction(evidence)


def names_of(family: Iterable[Correction]) -> list[str]:
    """Return the names of corrections of the plain network."""
    return [Method(Plain(), one).name for one in family]


def of_family(kind: type[Correction], corrections: Sequence[Correction] = SINGLE) -> list[str]:
    """Return the names of a family's strengths."""
    return names_of(one for one in corrections if isinstance(one, kind))


def _plain(seeds: Iterable[int]) -> dict[int, str]:
    return dict.fromkeys(seeds, "plain")


def _study(name: str, results: Results | None) -> Iterable[str]:
    command = f"`python -m benchmarks.quality run {name}`"
    if results is None:
        yield f"{MISSING.capitalize()}; {command} would."
        return
    seeds = len(results.values("plain", CELLS[0]))
    yield (
        f"{counted(seeds, 'network')}, {results.record['settings']['samples']:,} samples a cell, "
        f"distances in {results.record['floor']['features']}: {command}. As many real images as "
        f"there are samples lie at about {results.floor:.2f}."
    )
    for measure, label in ((IMAGES, "8-bit"), (RAW, "raw")):
        yield f"### {label.capitalize()}"
        yield _families(results, measure)
    yield "### A better solver at the same number of network calls"
    yield _solvers(results)
    if table := band_table(results):
        yield "### Where the spread is missing"
        yield (
            "Spread of the plain network's samples over the data's, raw, by octave of spatial "
            "frequency, mean over the seeds. Below 1 is what a gain can put back; above 1 is the "
            "network's own error, which more steps make plainer and no gain mends."
        )
        yield table
        yield _worse_with_steps(results)


def _families(results: Results, measure: str) -> str:
    rows = []
    for cell in CELLS:
        values = list(results.values("plain", cell, measure).values())
        row = [cell_title(cell), f"{np.mean(values):.3f}" if values else MISSING]
        for kind in FAMILIES.values():
            chosen = results.chosen_elsewhere([*of_family(kind), "plain"], cell, measure)
            found = results.against(chosen, _plain(chosen), cell, measure)
            row.append(_with_strengths(results, chosen, found))
        row += [percent(results.improvement(one, [cell], measure)) for one in names_of(FITTED)]
        rows.append(row)
    header = ["sampler", "plain", *FAMILIES, *(one.title for one in FITTED)]
    return markdown_table(header, rows)


def _with_strengths(results: Results, chosen: Mapping[int, str], found: Interval | None) -> str:
    if found is None:
        return MISSING
    strengths = dict.fromkeys(
        "none" if name == "plain" else results.title(name).split()[-1] for name in chosen.values()
    )
    return f"{percent(found)} ({', '.join(strengths)})"


def _solvers(results: Results) -> str:
    rows = []
    for steps in (10, 20):
        ddim = Cell("ddim", steps)
        row = [f"{steps} steps"]
        for solver in SOLVERS:
            theirs = results.values("plain", Cell(solver, steps), IMAGES)
            base = results.values("plain", ddim, IMAGES)
            row.append(percent(improvement_of_ratios(theirs, base)))
        chosen = results.chosen_elsewhere([*names_of(SINGLE), "plain"], ddim, IMAGES)
        row.append(percent(results.against(chosen, _plain(chosen), ddim, IMAGES)))
        rows.append(row)
    header = ["plain network, 8-bit, over DDIM", *(TITLES[s] for s in SOLVERS)]
    return markdown_table([*header, "DDIM with the best single strength"], rows)


def verdict_of(measured: Mapping[str, Results], name: str) -> tuple[int, int, list[str]]:
    """Return in how many comparisons a fitted correction beats the best single strength.

    A comparison is a data set, a cell and a measure, 8-bit Fréchet or kernel distance.

    Returns:
        Comparisons won with an interval above 0, all comparisons, and the cells in which the
        Fréchet distance is more than `HARM` per cent above the plain network's.
    """
    won = total = 0
    harmed = []
    for data, results in measured.items():
        for cell in CELLS:
            chosen = results.chosen_elsewhere([*names_of(SINGLE), "plain"], cell, IMAGES)
            ours = dict.fromkeys(chosen, name)
            found = results.against(ours, chosen, cell, IMAGES)
            if found is None:
                continue
            total += 2
            won += found.sign > 0
            won += _nearer_in_kernel(results, name, chosen, cell)
            plain = results.improvement(name, [cell], IMAGES)
            if plain is not None and plain.mean < -HARM:
                harmed.append(f"{data.lower()}, {cell_title(cell)}")
    return won, total, harmed


def _nearer_in_kernel(results: Results, name: str, chosen: Mapping[int, str], cell: Cell) -> bool:
    # The kernel distance is near 0 where samples are good: differences, not ratios.
    ours = results.values(name, cell, KERNEL)
    theirs = {seed: results.values(one, cell, KERNEL) for seed, one in chosen.items()}
    found = [theirs[s][s] - ours[s] for s in chosen if s in ours and s in theirs[s]]
    return bool(found) and interval(found).sign > 0


def _verdicts(measured: Mapping[str, Results]) -> Iterable[str]:
    if not measured:
        yield f"{MISSING.capitalize()}."
        return
    yield (
        f"The rule, set before: in the library only what beats the best single strength with an "
        "interval above 0, in the 8-bit Fréchet and in the kernel distance, on every data set, "
        "with DDIM and with DEIS, at 10 and at 20 steps, and in no cell makes the plain network's "
        f"mean distance longer by more than {HARM:g} %."
    )
    lines = []
    for one, name in zip(FITTED, names_of(FITTED), strict=True):
        won, total, harmed = verdict_of(measured, name)
        if not total:
            lines.append(f"- **{one.title}**: {MISSING}.")
            continue
        stays = won == total and not harmed
        lines.append(
            f"- **{one.title}**: {'in' if stays else 'not in the library'}. It beats the best "
            f"single strength in {won} of {total} comparisons"
            + (f", and makes it longer by more in {'; '.join(harmed)}." if harmed else ".")
        )
    yield "\n".join(lines)


def _worse_with_steps(results: Results) -> str:
    """Say what the finest octave does where more steps bring samples no closer to the data."""
    few, many = Cell("ddim", 20), Cell("ddim", 100)
    distances = [list(results.values("plain", cell, IMAGES).values()) for cell in (few, many)]
    bands = results.record["band_spreads"]
    finest = [
        [values[-1] for key, values in bands.items() if key.startswith(f"ddim-{cell.steps},")]
        for cell in (few, many)
    ]
    if not all((*distances, *finest)) or np.mean(distances[1]) <= np.mean(distances[0]):
        return ""
    return (
        f"From {few.steps} to {many.steps} steps the 8-bit distance *rises*, from "
        f"{np.mean(distances[0]):.2f} to {np.mean(distances[1]):.2f}, while the finest octave's "
        f"spread goes from {np.mean(finest[0]):.2f} to {np.mean(finest[1]):.2f}: its power comes "
        "right and the distance does not, so that what this network puts into the finest octave "
        "is not the data's detail. Few steps leave it out, and score better for it."
    )


def band_spreads(results: Results) -> dict[Cell, list[float]]:
    """Return the spread of the plain network's samples over the data's, by cell and band.

    The mean over the seeds; the first band is the mean of a channel, the others are octaves.
    """
    by_cell: dict[Cell, list[list[float]]] = {}
    for key, bands in results.record.get("band_spreads", {}).items():
        sampler, steps = key.split(",")[0].rsplit("-", 1)
        by_cell.setdefault(Cell(sampler, int(steps)), []).append(bands)
    return {cell: np.mean(by_cell[cell], axis=0).tolist() for cell in sorted(by_cell)}


def band_table(results: Results, samplers: Sequence[str] = ("ddim",)) -> str:
    """Return `band_spreads` as a table, beside what the sampler alone leaves where it is known."""
    alone = results.record.get("gaussian_band_spreads", {})
    rows: list[list[str]] = []
    for cell, bands in band_spreads(results).items():
        if cell.sampler not in samplers:
            continue
        measured = {cell_title(cell): bands}
        if left := alone.get(f"{cell.sampler}-{cell.steps}"):
            measured["what the sampler leaves of Gaussian data"] = left
        rows += [
            [heading, *(f"{value:.2f}" for value in values)] for heading, values in measured.items()
        ]
    if not rows:
        return ""
    octaves = [f"octave {i}" for i in range(1, len(rows[0]) - 1)]
    return markdown_table(["plain network", "mean of a channel", *octaves], rows)


def _reduction(evidence: Evidence) -> Iterable[str]:
    yield "## Was it the reduction?"
    yield (
        "The released code averages its loss over an image's values where the code that it started "
        "from sums them, and both clip the gradient's norm at 1. For Adam a factor is nothing, but "
        "not for a clip: a sum's gradient is 64 times as large here, and clipped far sooner. So "
        "a published gain may be that of the mean over the sum. The plain loss both ways, and the "
        "released loss (`fresh`), with the gradient clipped at 1, against the plain mean:"
    )
    results = evidence.results("digits-reduction")
    if results is None:
        yield f"{MISSING.capitalize()}; `python -m benchmarks.quality run digits-reduction` would."
        return
    rows = []
    for name in dict.fromkeys(arm.method.name for arm in PRESETS["digits-reduction"].arms):
        if name == "plain":
            continue
        cells = results.cells("plain")
        found = [results.improvement(name, cells, m) for m in (IMAGES, RAW)]
        ten = [results.improvement(name, [Cell("ddim", 10)], m) for m in (IMAGES, RAW)]
        rows.append([results.title(name), *map(percent, (*found, *ten))])
    header = ["", "8-bit, mean over cells", "raw", "DDIM, 10 steps, 8-bit", "raw, same"]
    yield markdown_table(header, rows)
    seeds = len(results.values("plain-sum", Cell("ddim", 10), IMAGES))
    command = "`python -m benchmarks.quality run digits-reduction`"
    yield f"{counted(seeds, 'seed').capitalize()}: {command}."
