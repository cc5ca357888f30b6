"""`evidence_cifar10.md`: real photographs, the protocol first."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.pages.tables import MISSING, counted, listed, markdown_table
from benchmarks.quality.corrections import BandGains, Gain
from benchmarks.quality.evidence.corrections import KERNEL, SOLVERS, band_table
from benchmarks.quality.evidence.records import IMAGES, TEN, Evidence, corrected, trained
from benchmarks.quality.objectives import Method, Plain
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.settings import in_words
from benchmarks.quality.statistics import Cell, Interval, Results, interval
from benchmarks.quality.tables import cell_title, percent

PRESET = "cifar10-tiny"
SOUND = 0.03
"""How far the spread of a sound network's samples may be from the data's."""
LATE = 900
"""From this timestep on a network that has not learned enough gets the mean colour wrong."""

PROTOCOL = """\
Written down, and committed with the preset, before the first sample was drawn:

- **Question**: by how much does the loss change the samples of a network trained on CIFAR10, at the
  paper's default k = 9 and at k = 49; does its gain on the plain network do the same without
  training; what do the other corrections with one number do, on both sides of none; and what does a
  better solver do at the same number of network calls?
- **Primary measure**: samples as 8-bit images, Fréchet distance of ImageNet features to the 10,000
  *test* images, DDIM at 10 steps. Beside it the kernel distance (unbiased) of the same features,
  DDIM at 20 steps, DEIS and PNDM.
- **The floor**: as many training images as there are samples, against the test images.
- **Losses** other than the plain one branch off the plain run's state at 75 % of its steps, with
  the same images, timesteps and noise to the end, where the learning rate has fallen to zero.
- **Soundness of the plain network**: the spread of its samples with 50 steps within 3 % of the
  data's, and the best gain of the mean colour, E[ε ε̂] / E[ε̂²], near 1 at late times. If it is not
  sound, the results say so and stand as those of a network that has not learned enough; its younger
  selves at 25 and 50 % show whether an effect goes away with training.
- **Choices**: the strength of a correction is chosen on one seed and reported on the other.
- **Cut first, if time runs out**: cells, in the order of the preset from its end.

Changed on the way: when the plain network's cells with 10 and 20 steps were in, and nothing else,
the order of the cells after them; when λ = 0.99 turned out to help, λ = 0.98 and 0.97 beside it.\
"""


def cifar10_page(evidence: Evidence) -> Iterable[str]:
    """Yield the parts of the page."""
    results = evidence.results(PRESET)
    if results is None:
        yield f"CIFAR10, preset `{PRESET}`: {MISSING}."
    else:
        yield _answer(results)
        yield from _network(results)
        yield from _sound(results)
        yield from _losses(results)
        yield from _corrections(results)
        yield from _searched(results)
        yield from _younger(results)
        yield from _not_run(results)
    yield "## Protocol"
    yield PROTOCOL


def answer(results: Results) -> dict[str, Interval | None]:
    """Return what the answer's sentence holds: the loss, the best correction, the best solver."""
    corrections = [*_without_training(results, TEN), "plain"]
    chosen = results.chosen_elsewhere(corrections, TEN, IMAGES)
    return {
        "loss": results.improvement(trained(9), [TEN], IMAGES),
        "correction": results.against(chosen, dict.fromkeys(chosen, "plain"), TEN, IMAGES),
        **{solver: over_ddim(results, solver, 10) for solver in SOLVERS},
    }


def over_ddim(results: Results, solver: str, steps: int) -> Interval | None:
    """Return the improvement of the plain network's samples by a solver over DDIM's."""
    ddim = results.values("plain", Cell("ddim", steps), IMAGES)
    other = results.values("plain", Cell(solver, steps), IMAGES)
    found = [100 * (1 - other[seed] / ddim[seed]) for seed in ddim if seed in other]
    return interval(found) if found else None


def _without_training(results: Results, cell: Cell) -> list[str]:
    """Return the corrections of the finished plain network with one strength, in a cell."""
    single = {
        arm.method.name
        for arm in PRESETS[PRESET].arms
        if arm.method.correction is not None
        and arm.method.correction.single
        and arm.method.percent == 100
    }
    return [name for name in results.methods if name in single and results.values(name, cell)]


def in_short(results: Results) -> str:
    """Return the answer in one clause: the loss, the best correction, the best solver."""
    found = answer(results)
    solvers = {s: one for s in SOLVERS if (one := found[s]) is not None}
    best = max(solvers, key=lambda s: solvers[s].mean, default=None)
    solver = MISSING if best is None else f"{percent(solvers[best])} ({TITLES[best]})"
    searched = [
        f"{100 * (1 - one['corrected'] / one['plain']):+.1f} %"
        for one in results.record.get("searches", [])
        if Cell(one["sampler"], one["steps"]) == TEN
    ]
    search = f"what the search recommends, by {listed(searched)}; " if searched else ""
    return (
        "the paper's loss at its default k = 9 changes the 8-bit distance of DDIM's samples at 10 "
        f"steps by {percent(found['loss'])}; the best correction of those tried below, chosen on "
        f"the other seed, by {percent(found['correction'])}; {search}the best other solver at the "
        f"same number of network calls by {solver}"
    )


def _answer(results: Results) -> str:
    return (
        f"On CIFAR10, with this network, {in_short(results)}. Positive is better. "
        "Intervals are Student's t over the seeds, which with two of them is 12.7 standard errors; "
        "bold where they exclude 0. They cover what another seed would change, "
        "not another network or data set."
    )


def _network(results: Results) -> Iterable[str]:
    record = results.record
    settings, floor = record["settings"], record["floor"]
    budget = PRESETS[PRESET].budget
    runs = [run for seeds in record["trainings"].values() for run in seeds.values()]
    yield "## The network, and what was spent"
    images = budget.steps * budget.batch_size
    larger = PRESETS["cifar10-small"].budget
    share = images / (larger.steps * larger.batch_size)
    yield f"""\
- **Network**: {in_words(settings["network"])}, 2.6 million parameters.
- **Training**: {in_words(settings["budget"])}. {images:,} images a seed, about
  {images / 50_000:.0f} epochs: {100 * share:.0f} % of what the preset `cifar10-small` takes.
- **Distances**: {floor["features"]}, {settings["samples"]:,} samples against the 10,000 test
  images. As many training images lie at **{results.floor:.1f}**, and at
  {1e3 * floor["kernel"]:.2f} thousandths by the kernel distance.
- **Spent**: {counted(len(runs), "training")}; `python -m benchmarks.quality run {PRESET}`."""


def _sound(results: Results) -> Iterable[str]:
    yield "## Is the plain network sound?"
    rows = []
    for cell in (TEN, Cell("ddim", 20), Cell("ddim", 50), Cell("ddim", 100)):
        values = results.values("plain", cell, "spread")
        distances = results.values("plain", cell, IMAGES)
        if values:
            rows.append(
                [
                    cell_title(cell),
                    ", ".join(f"{value:.3f}" for value in values.values()),
                    ", ".join(f"{value:.1f}" for value in distances.values()),
                ]
            )
    yield markdown_table(
        ["plain network", "spread of samples over the data's, by seed", "Fréchet distance"], rows
    )
    fifty = list(results.values("plain", Cell("ddim", 50), "spread").values())
    if fifty:
        within = all(abs(value - 1) <= SOUND for value in fifty)
        yield (
            f"With 50 steps the spread is within {100 * SOUND:g} % of the data's in every seed, as "
            "the protocol asks."
            if within
            else f"With 50 steps the spread is not within {100 * SOUND:g} % of the data's, as the "
            "protocol asks: all that follows stands for a network that has not learned enough."
        )
    if table := band_table(results):
        yield "The same by octave of spatial frequency, mean over the seeds:"
        yield table
    fitted = results.record.get("fitted", {}).get(f"plain+{BandGains().name}", {})
    late = [gains[0] for table in fitted.values() for t, gains in table.items() if int(t) >= LATE]
    if late:
        yield (
            "The best gain of the mean colour, E[ε ε̂] / E[ε̂²], on training images at "
            f"t ≥ {LATE}: {min(late):.3f} to {max(late):.3f} (1 for a network that has learned it)."
        )


def _losses(results: Results) -> Iterable[str]:
    yield "## The loss, and its gain without training"
    yield (
        "8-bit. Fréchet: improvement over the plain network. Kernel: 1,000 times what is taken off "
        "the plain network's distance; positive is better in both."
    )
    rows = []
    for name in (trained(9), corrected(9), trained(49), corrected(49)):
        for cell in results.cells(name) if name in results.methods else []:
            kernel = results.difference(name, [cell], KERNEL)
            plain = results.values("plain", cell, IMAGES)
            rows.append(
                [
                    results.title(name),
                    cell_title(cell),
                    f"{np.mean(list(plain.values())):.1f}" if plain else MISSING,
                    percent(results.improvement(name, [cell], IMAGES)),
                    MISSING if kernel is None else f"{1e3 * kernel.mean:+.3f}",
                ]
            )
    yield markdown_table(["", "sampler", "plain", "Fréchet", "kernel"], rows)
    pairs = [
        found
        for skip in (9, 49)
        for cell in results.cells("plain")
        if (found := results.improvement(trained(skip), [cell], IMAGES, corrected(skip)))
        is not None
    ]
    if pairs:
        largest = max(pairs, key=lambda one: abs(one.mean))
        yield (
            f"Training with the loss against its gain on the plain network: in {len(pairs)} cells "
            f"the difference is at most {abs(largest.mean):.1f} % of the distance."
        )


def _corrections(results: Results) -> Iterable[str]:
    yield "## Corrections without training, and better solvers"
    yield "DDIM, 8-bit, by seed and in the mean; a strength on each side of none."
    rows = []
    for name in dict.fromkeys([*_without_training(results, TEN), f"plain+{BandGains().name}"]):
        row = [results.title(name)] if name in results.methods else []
        if not row:
            continue
        for cell in (TEN, Cell("ddim", 20)):
            by_seed = results.improvements(name, cell, IMAGES)
            mean = f"{np.mean(list(by_seed.values())):+.1f} %" if by_seed else ""
            row.append(mean + "".join(f", {value:+.1f}" for value in by_seed.values()))
        spread = results.values(name, TEN, "spread").values()
        row.append(", ".join(f"{value:.3f}" for value in spread))
        rows.append(row)
    header = ["", "10 steps: mean, seeds", "20 steps", "spread at 10 steps"]
    yield markdown_table(header, rows)
    chosen = results.chosen_elsewhere([*_without_training(results, TEN), "plain"], TEN, IMAGES)
    if chosen:
        names = listed([results.title(name) for name in dict.fromkeys(chosen.values())])
        yield f"Chosen on the other seed, for 10 steps: {names}."
    rows = [
        [TITLES[s], *(percent(over_ddim(results, s, steps)) for steps in (10, 20))] for s in SOLVERS
    ]
    yield markdown_table(["plain network, over DDIM", "10 steps", "20 steps"], rows)


def _searched(results: Results) -> Iterable[str]:
    rows = []
    for found in results.record.get("searches", []):
        cell = Cell(found["sampler"], found["steps"])
        names = _without_training(results, cell)
        values = {name: results.values(name, cell, IMAGES).get(found["seed"]) for name in names}
        by_name = {name: value for name, value in values.items() if value is not None}
        plain = results.values("plain", cell, IMAGES)[found["seed"]]
        best = min(by_name, key=lambda name: by_name[name])
        rows.append(
            [
                f"{found['seed']}, {cell_title(cell)}",
                found["recommended"],
                f"{100 * (1 - found['corrected'] / found['plain']):+.1f} %",
                f"{results.title(best)}, {100 * (1 - by_name[best] / plain):+.1f} %",
            ]
        )
    if rows:
        yield "### What the search says"
        yield (
            "`CorrectionSearch` with these features, on training images only; what it recommends "
            "is judged on noise that it has not seen, against the test images. The last column is "
            "the best of all strengths above, chosen on the samples that it is reported on."
        )
        header = ["seed", "recommends", "improvement on fresh noise", "best by brute force"]
        yield markdown_table(header, rows)


def _younger(results: Results) -> Iterable[str]:
    yield "## Does an effect go away with training?"
    rows = []
    for percent_seen in (25, 50, 100):
        base = Method(Plain(), percent=percent_seen).name
        distances = results.values(base, TEN, IMAGES).values()
        spread = results.values(base, TEN, "spread").values()
        row = [f"{percent_seen} %", ", ".join(f"{value:.1f}" for value in distances) or MISSING]
        row.append(", ".join(f"{value:.3f}" for value in spread) or MISSING)
        name = Method(Plain(), Gain(49), percent_seen).name
        row.append(percent(results.improvement(name, [TEN], IMAGES, base)))
        rows.append(row)
    header = ["training seen", "plain, DDIM 10", "spread, DDIM 10", "gain k = 49"]
    yield markdown_table(header, rows)
    yield "The younger are the averaged weights of the same run, before its rate has fallen."


def _not_run(results: Results) -> Iterable[str]:
    preset = PRESETS[PRESET]
    wanted = [
        (arm.method, Cell(sampler, steps))
        for arm in preset.arms
        for sampler in arm.samplers
        for steps in arm.steps
    ]
    absent = [
        f"{method.title} with {cell_title(cell)}"
        for method, cell in wanted
        if len(results.values(method.name, cell, IMAGES)) < len(preset.seeds)
    ]
    yield "## What was not run"
    if absent:
        yield f"Of the preset, for want of time: {'; '.join(absent)}."
    yield (
        "Of what would make it an answer for good: at least two million images a seed, 10,000 "
        "samples a cell, a third seed, Min-SNR from the start, the `fresh` estimator, Inception's "
        "features, the paper's network (`cifar10`), CelebA."
    )
