"""`evidence_results.md`: every table."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.pages.tables import MISSING, folded, markdown_table
from benchmarks.quality.evidence.cifar10_answers import ON_THE_PAGE
from benchmarks.quality.evidence.conclusions import best_trained, trained_or_not
from benchmarks.quality.evidence.figures import forest
from benchmarks.quality.evidence.questions import questions
from benchmarks.quality.evidence.records import (
    GRID,
    IMAGES,
    MEASURES,
    RAW,
    TEN,
    Evidence,
    corrected,
    on_the_grid,
    peers,
    skips_of,
    title,
    trained,
)
from benchmarks.quality.presets import CORE, PRESETS, STEPS
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Interval, Results
from benchmarks.quality.tables import cell_title, distance_table, improvement, percent


def results_page(evidence: Evidence) -> Iterable[str]:
    """Yield the parts of the page."""
    if evidence.full is None:
        yield f"The grid on the digits: {MISSING}."
    else:
        yield from _grid(evidence, evidence.full)
    yield from _textures(evidence)
    yield from _other_data(evidence)


def _grid(evidence: Evidence, results: Results) -> Iterable[str]:
    yield (
        "Digits, five seeds, unless a section says otherwise. Improvements are of the Fréchet "
        "distance over plain training, with 95 % intervals over the seeds, bold where they exclude "
        "0; a mean is over DDIM, PNDM and DEIS at 10, 20, 50 and 100 steps. *8-bit* is the samples "
        "as image files hold them, *raw* as the sampler returns them."
    )
    yield f"{_floor_in_words(results)}"
    names = on_the_grid("digits-full")
    yield "## Every method"
    yield "`plain + …` are corrections of the plain network that need no training."
    yield _methods_table(results, names)
    measured = [name for name in names if results.improvement(name, GRID) is not None]
    yield evidence.figure(
        "methods", "Improvement of every method; arrows lead below -60 %", forest(results, measured)
    )
    yield "### In the kernel distance"
    yield (
        "The same samples by the kernel distance (squared maximum mean discrepancy, cubic kernel), "
        "which has no bias of sample size: 1,000 times what a method takes off plain training's, "
        "so positive is better. No percentages: where samples are good it is about 0 or below."
    )
    yield _kernel_table(results, names)
    yield from _by_cell(results)
    yield _trained_against_gain(results)
    yield _peers(results)
    yield _estimators(results)
    yield from questions(evidence, results)


def _floor_in_words(results: Results) -> str:
    return (
        f"As many real images as there are samples would lie at a distance of about "
        f"{results.floor:.2f} (see [how it was measured](evidence_method.md#the-floor)). Where "
        "plain training and the method are both within a quarter of that, a percentage says "
        "nothing of the samples, and the table says *at the floor*. A mean over cells holds every "
        "cell, since a method can still harm where plain training is at the floor."
    )


def _methods_table(results: Results, names: list[str]) -> str:
    rows = []
    for name in names:
        found = {m: results.improvement(name, GRID, m) for m in MEASURES}
        ten = [results.improvement(name, [TEN], m) for m in MEASURES]
        row = [_with_bootstrap(found[IMAGES]), _with_bootstrap(found[RAW]), *map(percent, ten)]
        rows.append([title(results, name), *row])
    header = ["method", "8-bit", "raw", "DDIM, 10 steps, 8-bit", "DDIM, 10 steps, raw"]
    return markdown_table(header, rows)


def _kernel_table(results: Results, names: list[str]) -> str:
    def thousandth(found: Interval | None) -> str:
        if found is None:
            return MISSING
        text = f"{1e3 * found.mean:+.1f}"
        if found.count > 1:
            text += f" [{1e3 * found.low:+.1f}, {1e3 * found.high:+.1f}]"
        return f"**{text}**" if found.sign else text

    columns = [
        (cells, measure) for measure in ("images_kernel", "raw_kernel") for cells in (GRID, [TEN])
    ]
    plain = [
        1e3 * np.mean([np.mean(list(results.values("plain", c, m).values())) for c in cells])
        for cells, m in columns
    ]
    rows = [["plain L_simple itself", *(f"{value:.1f}" for value in plain)]]
    for name in names:
        found = [results.difference(name, cells, measure) for cells, measure in columns]
        rows.append([title(results, name), *map(thousandth, found)])
    header = ["method", "8-bit", "DDIM, 10 steps, 8-bit", "raw", "DDIM, 10 steps, raw"]
    return markdown_table(header, rows)


def _by_cell(results: Results) -> Iterable[str]:
    names = [trained(skip) for skip in skips_of()]
    nine = [
        found.mean
        for cell in GRID
        if (found := results.improvement(trained(9), [cell], IMAGES)) is not None
    ]
    yield "## By sampler and steps"
    yield (
        'In the paper\'s form, with `estimator="expected"`. The paper reports 3.27 % to 14.06 % on '
        "CIFAR10 and 8.97 % to 27.08 % on CelebA, in FID"
        + (
            f"; with its default, k = 9, our cells range from {min(nine):+.1f} % to "
            f"{max(nine):+.1f} % in 8 bits"
            if nine
            else ""
        )
        + ". These are digits and another feature space, so the sizes cannot be set side by side; "
        "the sign and the order can."
    )
    for measure, label in MEASURES.items():
        rows = [
            [cell_title(cell), *(improvement(results, name, cell, measure) for name in names)]
            for cell in GRID
        ]
        means = (percent(results.improvement(name, GRID, measure)) for name in names)
        rows.append(["mean", *means])
        yield markdown_table([label, *(f"k = {skip}" for skip in skips_of())], rows)
    measured = [name for name in ("plain", *names) if name in results.methods]
    for measure, label in MEASURES.items():
        table = distance_table(results, measured, GRID, measure)
        yield folded(f"The {label} distances behind it", table)
    rows = []
    for cell in GRID:
        row = [cell_title(cell)]
        for measure in MEASURES:
            best = best_trained(results, [cell], measure)
            row += [best[0], percent(best[1])] if best is not None else ["none", ""]
        rows.append(row)
    yield folded(
        "The best trained setting for each sampler",
        "Over all skips, τ and estimators, the one with the largest improvement whose interval "
        "lies above 0. Each is the best of many, chosen on the same data that it is reported on."
        "\n\n" + markdown_table(["", "best, 8-bit", "", "best, raw", ""], rows),
    )


def _trained_against_gain(results: Results) -> str:
    rows = []
    for skip in skips_of():
        ours, gain = trained(skip), corrected(skip)
        rows.append(
            [
                f"k = {skip}",
                percent(results.improvement(ours, GRID, IMAGES)),
                percent(results.improvement(gain, GRID, IMAGES)),
                *(_with_bootstrap(results.improvement(ours, GRID, m, gain)) for m in MEASURES),
            ]
        )
    header = ["", "trained, 8-bit", "gain, 8-bit", "trained over gain, 8-bit", "the same, raw"]
    return (
        "## The trained loss against the gain without training\n\n"
        "The loss's minimiser is s(t) E[ε | x_t], so a plainly trained network multiplied by s(t) "
        "(`ShrunkModel`) should do as well. The last two columns compare the two directly: the "
        "improvement of the trained network over the corrected one.\n\n"
        + markdown_table(header, rows)
        + f"\nIn words: {trained_or_not(results)}"
    )


def _peers(results: Results) -> str:
    ours = trained(49)
    rows = []
    for name in peers():
        row = [title(results, name)]
        for measure in MEASURES:
            row.append(percent(results.improvement(name, GRID, measure)))
            row.append(percent(results.improvement(name, GRID, measure, ours)))
        rows.append(row)
    text = (
        "## Its peers\n\nSame data, network, seeds, number of steps and random numbers. SA-DPM "
        "calls the network twice in each training step, so it has twice the computation of the "
        f"others. Each over plain training, and over {title(results, ours)} (positive: the peer is "
        "better):\n\n" + markdown_table(["", "8-bit", "over k = 49", "raw", "over k = 49"], rows)
    )
    rows = []
    for skip in (49, 99):
        name = f"min-snr-5+gain{skip}"
        found = [
            results.improvement(name, cells, measure, "min-snr-5")
            for measure in MEASURES
            for cells in (GRID, [TEN])
        ]
        rows.append([f"gain k = {skip}", *map(percent, found)])
    return (
        text
        + "\nDoes the gain add to a better objective? The network trained with Min-SNR-5, with the "
        "gain put on afterwards, over the same network without it:\n\n"
        + markdown_table(["", "8-bit", "DDIM, 10 steps, 8-bit", "raw", "DDIM, 10 steps, raw"], rows)
    )


def _estimators(results: Results) -> str:
    rows, signs = [], []
    for skip in skips_of():
        expected, fresh = trained(skip), f"skip{skip}-fresh"
        compared = [results.improvement(fresh, GRID, m, expected) for m in MEASURES]
        signs += [one.sign for one in compared if one is not None]
        if compared[0] is not None:
            rows.append([f"k = {skip}", *map(_with_bootstrap, compared)])
    if not rows:
        conclusion = MISSING.capitalize()
    elif any(signs):
        different = len(signs) - signs.count(0)
        conclusion = f"They differ, by their intervals, in {different} of {len(signs)} comparisons"
    else:
        conclusion = "They agree within their intervals at every skip measured"
    return (
        "## `expected` against `fresh`\n\n`expected` is the average of the released code's `fresh` "
        "over its second noise: the same minimiser with less variance. The improvement of `fresh` "
        f"over `expected`:\n\n{markdown_table(['', '8-bit', 'raw'], rows)}\n{conclusion}."
    )


def _textures(evidence: Evidence) -> Iterable[str]:
    yield "## Does it hold where 8 bits change little?"
    yield (
        "`textures`: 8 x 8 grey crops of two photographs, with the digits' network, budget and "
        "samplers. Hardly one of their pixels is at either end of the range, so 8-bit images "
        "differ from raw samples only where these left it. Read the first table before the "
        "second: where more steps bring samples no closer to the data, the network's own error "
        "dominates, and there is no discretisation error for a gain to mend."
    )
    results = evidence.results("textures")
    if results is None:
        yield f"{MISSING.capitalize()}."
        return
    rows = []
    for sampler in CORE:
        row = [TITLES[sampler]]
        for steps in STEPS:
            found = (
                np.mean(list(results.values("plain", Cell(sampler, steps), measure).values()))
                for measure in (IMAGES, RAW, "spread")
            )
            row.append(" / ".join(f"{value:.3f}" for value in found))
        rows.append(row)
    yield (
        "Plain training: Fréchet distance 8-bit / raw / spread of the samples over the data's "
        f"({results.record['floor']['features']}; the floor is at about {results.floor:.2f})."
    )
    yield markdown_table(["", *(f"{steps} steps" for steps in STEPS)], rows)
    yield _methods_table(results, on_the_grid("textures"))


def _other_data(evidence: Evidence) -> Iterable[str]:
    yield "## Other data"
    rows = []
    for name, preset in PRESETS.items():
        if preset.data in ("digits", "textures") or name in ON_THE_PAGE:
            continue
        paper = "; ".join(f"{what}: {value}" for what, value in preset.paper.items()) or "none"
        results = evidence.results(name)
        if results is None:
            rows.append([f"`{name}`", MISSING, paper])
            continue
        for method in results.methods[1:]:
            found = results.improvement(method, results.cells(method), IMAGES)
            rows.append([f"`{name}`, {title(results, method)}", percent(found), paper])
    yield markdown_table(["preset", "mean over its cells, 8-bit", "the paper reports"], rows)
    yield "The other presets on CIFAR10 have [a page of their own](evidence_cifar10.md)."


def _with_bootstrap(found: Interval | None) -> str:
    """Return an improvement with both its intervals."""
    if found is None:
        return MISSING
    return f"{percent(found)}; bootstrap [{found.boot_low:+.1f}, {found.boot_high:+.1f}]"
