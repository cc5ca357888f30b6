"""`evidence.md`: what was found, what to do about it, one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.pages.tables import MISSING, counted, listed, markdown_table
from benchmarks.quality.evidence.cifar10_answers import (
    UNET,
    by_method,
    in_short,
    measured_networks,
    over_ddim,
    over_plain,
)
from benchmarks.quality.evidence.figures import by_steps
from benchmarks.quality.evidence.front import front_note, front_table
from benchmarks.quality.evidence.records import (
    GRID,
    IMAGES,
    MEASURES,
    TEN,
    Evidence,
    better,
    corrected,
    methods,
    on_the_grid,
    peers,
    skips_of,
    title,
    trained,
)
from benchmarks.quality.presets import CORE, PRESETS, STEPS
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Interval, Results
from benchmarks.quality.tables import percent

DEFAULT = 9
"""The paper's skip."""
SHOWN = (49, 99)
"""The skips that the conclusions follow through the samplers."""


def verdict(found: Interval | None) -> str:
    """Say what an interval says, and no more."""
    if found is None:
        return MISSING
    if found.sign > 0:
        return "better than plain training"
    if found.sign < 0:
        return "worse than plain training"
    return f"no difference from plain training that {found.count} seeds can show"


def where(results: Results, name: str, measure: str) -> list[str]:
    """Return the cells in which a method is better, worse, neither, and at the floor."""
    groups: dict[str, list[Cell]] = {"better": [], "worse": [], "neither": [], "at the floor": []}
    for cell in GRID:
        found = results.improvement(name, [cell], measure)
        if found is None:
            return [MISSING] * len(groups)
        at_floor = all(results.at_floor(one, cell, measure) for one in (name, "plain"))
        group = "at the floor" if at_floor else ("neither", "better", "worse")[found.sign]
        groups[group].append(cell)
    return [cells_in_words(cells) for cells in groups.values()]


def cells_in_words(cells: Sequence[Cell]) -> str:
    """Return cells as "DDIM 10, 20; PNDM 10"."""
    parts = []
    for sampler in dict.fromkeys(cell.sampler for cell in cells):
        steps = [str(cell.steps) for cell in cells if cell.sampler == sampler]
        parts.append(f"{TITLES[sampler]} {', '.join(steps)}")
    return "; ".join(parts)


def conclusions(evidence: Evidence) -> Iterable[str]:
    """Yield the parts of the page."""
    results = evidence.full
    if results is None:
        yield f"The grid on the digits: {MISSING}."
        return
    yield (
        "Is the loss worth it? Measured beside its peers, in the same network, budget and random "
        "numbers. *8-bit* is the samples as image files hold them, which is what most people "
        "deliver; *raw* is what the sampler returns. Every percentage is by how much the Fréchet "
        "distance to the data falls below that of the plainly trained network with the same "
        "sampler, another solver's below DDIM's, with a 95 % interval over the seeds, bold where "
        "it excludes 0. A mean over the seeds is of the percentages; in the first table and on "
        "CIFAR10 of the logarithms of the ratios."
    )
    yield front_table(evidence)
    if note := front_note(evidence):
        yield note
    yield "## What was found"
    yield f"On the digits, with {counted(_seeds(results), 'seed')}, where nothing else is said."
    yield "\n".join(f"- {line}" for line in _findings(evidence, results))
    yield "By sampler and number of steps, from the intervals of each cell:"
    yield markdown_table(
        ["", "better than plain", "worse", "no difference shown", "at the floor"],
        [
            [f"k = {skip}, {label}", *where(results, trained(skip), measure)]
            for measure, label in MEASURES.items()
            for skip in SHOWN
        ],
    )
    yield (
        "*At the floor*: both as close to the data as real images of that number are, so nothing "
        "can be said ([how it was measured](evidence_method.md#the-floor))."
    )
    best = _strongest_peer(results)
    shown = [trained(49), corrected(49), "min-snr-5"]
    shown += [best] if best is not None and best not in shown else []
    shown = [name for name in shown if results.improvement(name, GRID, IMAGES) is not None]
    if shown:
        yield evidence.figure(
            "steps",
            "Improvement of the 8-bit Fréchet distance over plain training against the number of "
            "steps, for DDIM, PNDM and DEIS",
            by_steps(results, shown),
        )
    yield "## What to do"
    yield "\n".join(f"- {line}" for line in _advice(results, evidence.results(UNET)))
    yield "## In one table"
    yield (
        f"The mean over {listed([TITLES[s] for s in CORE])} at {listed([str(n) for n in STEPS])} "
        "steps, and the paper's headline cell alone."
    )
    yield _summary(results)
    yield (
        "[Every result](evidence_results.md), by sampler, steps, skip and τ, and the questions of "
        "the paper's reviews; [CIFAR10](evidence_cifar10.md); [corrections without "
        "training](evidence_corrections.md) against one another and against better solvers; "
        "[how it was measured](evidence_method.md), with the commands; "
        "[the exact lab](evidence_lab.md), where the model is a formula."
    )


def _seeds(results: Results) -> int:
    return len(results.values("plain", TEN, IMAGES))


def _findings(evidence: Evidence, results: Results) -> Iterable[str]:
    default = [results.improvement(trained(DEFAULT), GRID, measure) for measure in MEASURES]
    yield (
        f"**The paper's default, k = {DEFAULT}**: "
        + "; ".join(
            f"{percent(found)} ({label}), {verdict(found)}"
            for found, label in zip(default, MEASURES.values(), strict=True)
        )
        + "."
    )
    yield f"**The same gain without training**: {trained_or_not(results)}"
    for measure, label in MEASURES.items():
        best = best_trained(results, GRID, measure)
        yield (
            f"**The best setting of the loss**, {label}, mean over all cells: "
            + (
                f"{best[0]}, {percent(best[1])}; it is the best of many, so expect less elsewhere."
                if best is not None
                else "none whose interval lies above 0."
            )
        )
    names = [title(results, name) for name in better(results, peers(), trained(49))]
    if names:
        yield f"**Better than k = 49 in both measures**, with intervals: {listed(names)}."
    textures = evidence.results("textures")
    if textures is not None:
        said = [
            f"k = {skip} {percent(found)}"
            for skip in (DEFAULT, *SHOWN)
            if (found := textures.improvement(trained(skip), GRID, IMAGES)) is not None
        ]
        yield (
            "**On a second data set**, 8 x 8 crops of photographs, trained and 8-bit, mean over "
            f"all cells: {', '.join(said)}."
        )
    if (unet := evidence.results(UNET)) is not None:
        seeds = counted(_seeds(unet), "seed")
        yield f"**On CIFAR10**, the paper's U-Net and {seeds}: {by_method(unet)}."
    for photographs in measured_networks(evidence)[:1]:
        yield (
            f"**On CIFAR10**, a small network and {counted(_seeds(photographs), 'seed')}: "
            f"{in_short(photographs)}."
        )
    absent = [name for name in PRESETS if name not in evidence.records]
    if absent:
        yield f"**Presets that were not run**: {listed([f'`{name}`' for name in absent])}."


def trained_or_not(results: Results) -> str:
    """Say how training with the loss compares with putting its gain on afterwards."""
    found = [
        results.improvement(trained(skip), GRID, measure, corrected(skip))
        for skip in skips_of()
        for measure in MEASURES
    ]
    signs = [one.sign for one in found if one is not None]
    if not signs:
        return f"{MISSING}."
    if not any(signs):
        return (
            "the interval of the difference holds 0 at every skip, in either measure: on these "
            "data, training with the loss and putting its gain on a plainly trained network cannot "
            "be told apart."
        )
    return (
        f"of {len(signs)} comparisons (skips and measures), training is better than the gain alone "
        f"in {signs.count(1)}, worse in {signs.count(-1)}, and cannot be told from it in "
        f"{signs.count(0)}."
    )


def best_trained(
    results: Results, cells: Sequence[Cell], measure: str
) -> tuple[str, Interval] | None:
    """Return the best trained setting whose interval lies above 0."""
    found = [
        (title(results, name), one)
        for name, method in methods("digits-full").items()
        if method.objective.ours
        and method.correction is None
        and (one := results.improvement(name, cells, measure)) is not None
        and one.sign > 0
    ]
    return max(found, key=lambda pair: pair[1].mean, default=None)


def _strongest_peer(results: Results) -> str | None:
    """Return the peer with the largest mean improvement in 8 bits besides Min-SNR."""
    found = {
        name: one.mean
        for name in peers()
        if name != "min-snr-5" and (one := results.improvement(name, GRID, IMAGES)) is not None
    }
    return max(found, key=found.__getitem__, default=None)


def _summary(results: Results) -> str:
    names = [name for skip in skips_of() for name in (trained(skip), corrected(skip))]
    rows = []
    for name in [*names, *peers()]:
        if name not in on_the_grid("digits-full"):
            continue
        found = [
            percent(results.improvement(name, cells, measure))
            for measure in MEASURES
            for cells in (GRID, [TEN])
        ]
        rows.append([title(results, name), *found])
    header = ["over plain training", "8-bit", "DDIM, 10 steps, 8-bit", "raw"]
    return markdown_table([*header, "DDIM, 10 steps, raw"], rows)


def _of_solvers(unet: Results | None) -> str:
    """Say what the paper's U-Net says of solvers, and of k = 49 beside them."""
    if unet is None:
        return ""
    gain = percent(over_plain(unet, corrected(49), TEN))
    unipc, pndm = Cell("unipc", TEN.steps), Cell("pndm", TEN.steps)
    beside = [percent(over_plain(unet, name, unipc)) for name in (trained(49), corrected(49))]
    return (
        f" On the paper's U-Net the gain of k = 49 did {gain} with DDIM at {TEN.steps} steps, "
        f"UniPC {percent(over_ddim(unet, 'unipc', TEN.steps))} and PNDM "
        f"{percent(over_ddim(unet, 'pndm', TEN.steps))}. There the loss with k = 49 did "
        f"{beside[0]} to UniPC's samples and its gain {beside[1]}, and the loss "
        f"{percent(over_plain(unet, trained(49), pndm))} to PNDM's."
    )


def _advice(results: Results, unet: Results | None) -> Iterable[str]:
    yield (
        "**Take a better solver first.** It costs nothing, or one call. UniPC did more than any "
        "skip, in the loss or as a gain, on the digits and on the small network of CIFAR10."
        f"{_of_solvers(unet)}"
    )
    names = [title(results, name) for name in better(results, peers(), trained(49))]
    if names:
        yield (
            f"**If you train, take a better objective too.** On the digits {listed(names)} did "
            "more in both measures, at the same cost; whether the gain adds to it is under "
            "[peers](evidence_results.md#its-peers). On CIFAR10 Min-SNR did "
            "[less](evidence_cifar10.md#min-snr-from-the-start)."
        )
    yield (
        "**Try the gain before you train.** `ShrunkModel(model, schedule, skip_set=k)` costs a few "
        "samplings of a network that you have. "
        "[`CorrectionSearch`](which_gain.md#its-rivals-correctionsearch) finds k, or what does "
        "more than any k."
    )
    yield f"**It depends on the sampler and the steps.** {_by_sampler(results)}"
    spreads = [
        float(np.mean(list(values.values())))
        for steps in (10, 100)
        if (values := results.values("plain", Cell("ddim", steps), "spread"))
    ]
    yield (
        "**Look at the spread of your samples.** The gain makes ε̂ smaller and so the samples more "
        "spread: there must be spread missing for it to put back. "
        + (
            f"Here plain DDIM had {spreads[0]:.2f} of the data's at 10 steps and "
            f"{spreads[1]:.2f} at 100. "
            if len(spreads) == 2
            else ""
        )
        + "A network whose samples are too spread already is harmed by it."
    )
    yield (
        "**Judge by what you will use.** Where many pixels lie at an end of the range, 8-bit and "
        "raw samples can answer differently, as on these digits."
    )
    worst = [
        f"k = {skip} {percent(found)}"
        for skip in skips_of()
        if (found := results.improvement(trained(skip), GRID, IMAGES)) is not None
        and found.sign < 0
    ]
    if worst:
        yield f"**More is not better.** 8-bit, mean over all cells: {', '.join(worst)}."
    yield (
        "**Leave τ at 0.99 and move k.** What counts is the gain s(t), and a smaller τ acts as a "
        "larger k."
    )
    yield (
        '**Use `estimator="expected"`** unless you must reproduce the released code draw for draw.'
    )


def _by_sampler(results: Results) -> str:
    lines = []
    for measure, label in MEASURES.items():
        said = []
        for sampler in CORE:
            cells = [Cell(sampler, steps) for steps in STEPS]
            said.append(
                f"{TITLES[sampler]} {percent(results.improvement(trained(49), cells, measure))}"
            )
        lines.append(f"{label}: {', '.join(said)}")
    return "k = 49, mean over the steps, " + "; ".join(lines) + "."
