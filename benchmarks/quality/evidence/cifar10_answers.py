"""What the pages say of CIFAR10, computed: improvements, choices, soundness."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.pages.tables import MISSING, listed
from benchmarks.quality.corrections import BandGains, Gain, ScoreRescaling
from benchmarks.quality.evidence.corrections import FAMILIES, SOLVERS
from benchmarks.quality.evidence.records import IMAGES, TEN, Evidence, corrected, trained
from benchmarks.quality.objectives import Method, Plain
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import (
    Cell,
    Interval,
    Results,
    holm,
    improvement_of_ratios,
    log_ratios,
    p_value,
)
from benchmarks.quality.tables import percent

PRESET = "cifar10-wide"
"""The small network that most was measured on, and with the most seeds."""
UNET = "cifar10-unet"
"""The paper's own U-Net; one seed."""
WIDER = "cifar10-wider"
"""A larger one of the same kind, to have one that is sound."""
OTHERS = (UNET, WIDER, "cifar10-spectral", "cifar10-brief", "cifar10-tiny")
"""The others."""
MORE = "cifar10-wide-10k"
"""The cells of the answer with more samples, and Min-SNR."""
UNCLAMPED = "cifar10-wide-raw"
"""The cells of the answer before the samples are clamped and rounded."""
LONG = "cifar10-wide-long"
"""The same network with many steps."""
LONGER = "cifar10-longer"
"""The same network, trained for longer."""
BATCH = "cifar10-batch"
"""The same network, in larger batches."""
AVERAGED = "cifar10-averaged"
"""The same network, averaged over more of its steps."""
REDUCTION = "cifar10-reduction"
"""The sum in place of the mean."""
ON_THE_PAGE = (PRESET, MORE, UNCLAMPED, LONG, LONGER, BATCH, AVERAGED, REDUCTION, *OTHERS)
"""The presets that `evidence_cifar10.md` is of."""
SOUND = 0.03
"""How far the spread of a sound network's samples may be from what the sampler leaves."""
SPREAD_CELLS = (*(Cell("ddim", steps) for steps in (10, 20, 50, 100)), Cell("unipc", 50))
SOUND_CELLS = SPREAD_CELLS[2:]
SETTLED = 0.01
"""By how much less the spread may change with training to be called settled."""
LATE = 900
"""From this timestep on a network that has not learned enough gets the mean colour wrong."""
TOLD_BY_SPREAD = 0.02
"""What a gain must change the spread by for a training to be compared with it so."""
RESCALED = Method(Plain(), ScoreRescaling(1.05)).name
"""The correction that is chosen on the small network, whichever seed is left out."""
ALPHA = 0.05
"""Below it a p-value is called a difference."""
MARGIN = 2.0
"""Per cent of the distance within which a method counts as equivalent to plain training."""


def measured_networks(evidence: Evidence) -> list[Results]:
    """Return the results there are, of the network that most was measured on first."""
    found = (evidence.results(name) for name in (PRESET, *OTHERS))
    return [results for results in found if results is not None]


def answer(results: Results) -> dict[str, Interval | None]:
    """Return what the answer's sentence holds: the loss, the best correction, the solvers."""
    return {
        "loss": over_plain(results, trained(9), TEN),
        "correction": over_plain(results, chosen_correction(results), TEN),
        **{solver: over_ddim(results, solver, 10) for solver in SOLVERS},
    }


def over_plain(
    results: Results,
    method: str | dict[int, str],
    cell: Cell,
    baseline: str = "plain",
    measure: str = IMAGES,
) -> Interval | None:
    """Return the improvement of a method, or of one for each seed, over another."""
    theirs = results.values(baseline, cell, measure)
    return improvement_of_ratios(_by_seed(results, method, cell, measure), theirs)


def over_ddim(results: Results, solver: str, steps: int, measure: str = IMAGES) -> Interval | None:
    """Return the improvement of the plain network's samples by a solver over DDIM's."""
    ddim = results.values("plain", Cell("ddim", steps), measure)
    return improvement_of_ratios(results.values("plain", Cell(solver, steps), measure), ddim)


def p_values(results: Results) -> tuple[dict[str, float], dict[str, float]]:
    """Return the p-values of all comparisons with plain DDIM at 10 steps, by method or solver.

    Each by itself, then all together by Holm's correction; empty with one seed.
    """
    plain = results.values("plain", TEN, IMAGES)
    compared = {
        name: results.values(name, TEN, IMAGES)
        for name in results.methods
        if name != "plain" and "@" not in name
    } | {solver: results.values("plain", Cell(solver, 10), IMAGES) for solver in SOLVERS}
    logs = {name: log_ratios(values, plain) for name, values in compared.items()}
    alone = {name: p_value(one) for name, one in logs.items() if len(one) > 1}
    return alone, holm(alone)


def _by_seed(
    results: Results, method: str | dict[int, str], cell: Cell, measure: str = IMAGES
) -> dict[int, float]:
    if isinstance(method, str):
        return results.values(method, cell, measure)
    found = {seed: results.values(name, cell, measure) for seed, name in method.items()}
    return {seed: values[seed] for seed, values in found.items() if seed in values}


def chosen_correction(results: Results) -> dict[int, str]:
    """Return the correction with one strength, or none, that is best on the other seeds."""
    candidates = [*without_training(results, TEN), "plain"]
    return results.chosen_elsewhere(candidates, TEN, IMAGES)


def searched(results: Results, cell: Cell = TEN) -> Interval | None:
    """Return what the search's recommendations do in a cell, on noise that it has not seen."""
    found = [
        one
        for one in results.record.get("searches", [])
        if Cell(one["sampler"], one["steps"]) == cell
    ]
    return improvement_of_ratios(
        {one["seed"]: one["corrected"] for one in found},
        {one["seed"]: one["plain"] for one in found},
    )


def strengths(*presets: str) -> list[str]:
    """Return the corrections of the finished plain network with one strength, sorted by it."""
    single = {
        (type(one).__name__, *vars(one).values(), arm.method.name)
        for preset in presets
        for arm in PRESETS[preset].arms
        if (one := arm.method.correction) is not None
        and one.single
        and arm.method == Method(Plain(), one)
    }
    return [name for *_, name in sorted(single)]


def without_training(results: Results, cell: Cell) -> list[str]:
    """Return the corrections with one strength that were measured in a cell."""
    return [name for name in strengths(results.record["preset"]) if results.values(name, cell)]


def in_short(results: Results) -> str:
    """Return the answer in one clause: the loss, the best correction, the best solver."""
    found = answer(results)
    solvers = {s: one for s in SOLVERS if (one := found[s]) is not None}
    best = max(solvers, key=lambda s: solvers[s].mean, default=None)
    solver = MISSING if best is None else f"{percent(solvers[best])} ({TITLES[best]})"
    found_by_search = searched(results)
    search = (
        f"what the search recommends, by {percent(found_by_search)}; " if found_by_search else ""
    )
    return (
        "the paper's loss at its default k = 9 shortens the 8-bit distance of DDIM's samples at 10 "
        f"steps by {percent(found['loss'])}; the best correction of those tried below, chosen on "
        f"other seeds, by {percent(found['correction'])}; {search}the best other solver at the "
        f"same number of network calls by {solver}"
    )


def by_method(results: Results) -> str:
    """Return what each method does to DDIM's samples at 10 steps, in one clause.

    For a network of one seed, on which nothing can be chosen.
    """

    def one(name: str) -> str:
        return percent(over_plain(results, name, TEN))

    solvers = {
        TITLES[s] + (", with one call more" if s == "pndm" else ""): found
        for s in SOLVERS
        if (found := over_ddim(results, s, 10))
    }
    ranked = sorted(solvers, key=lambda title: -solvers[title].mean)
    return (
        f"the paper's loss at its default k = 9 shortens the 8-bit distance of DDIM's samples at "
        f"10 steps by {one(trained(9))}, its gain without training by {one(corrected(9))}; the "
        f"loss with k = 49 by {one(trained(49))}, its gain by {one(corrected(49))}; score "
        f"rescaling by 1.05, the best correction on the small network, by {one(RESCALED)}; other "
        "solvers at as many steps by "
        + listed([f"{percent(solvers[title])} ({title})" for title in ranked])
    )


def by_kind(results: Results) -> list[dict[str, list[float]]]:
    """Return the improvements at DDIM, 10 steps, by seed: losses, gains, corrections, solvers.

    Of each kind of correction but the gain the only strength, or the one that is best on the other
    seeds; of the losses those that every seed has.
    """
    plain = results.values("plain", TEN, IMAGES)
    methods = {arm.method.name: arm.method for arm in PRESETS[results.record["preset"]].arms}
    losses = [
        name
        for name, one in methods.items()
        if one == Method(one.objective)
        and name != "plain"
        and results.values(name, TEN).keys() == plain.keys()
    ]
    single = without_training(results, TEN)
    kinds: dict[str, dict[int, str]] = {}
    for family, kind in FAMILIES.items():
        names = [name for name in single if isinstance(methods[name].correction, kind)]
        if kind is Gain:
            gains = names
        elif len(names) == 1:  # nothing to choose, so one seed will do
            kinds[family] = dict.fromkeys(plain, names[0])
        elif chosen := results.chosen_elsewhere(names, TEN, IMAGES):
            kinds[family] = chosen
    groups: list[dict[str, str | dict[int, str]]] = [
        {results.title(name): name for name in losses},
        {results.title(name).removeprefix(f"{Plain().title} + "): name for name in gains},
        dict(kinds),
    ]
    found = [
        {title: _by_seed(results, name, TEN) for title, name in group.items()} for group in groups
    ]
    found.append({TITLES[s]: results.values("plain", Cell(s, 10), IMAGES) for s in SOLVERS})
    return [
        {
            title: [-100 * math.expm1(log) for log in log_ratios(values, plain)]
            for title, values in group.items()
            if values
        }
        for group in found
    ]


def spread_left(results: Results | None, cell: Cell) -> float | None:
    """Return the spread that a cell's sampler alone leaves of Gaussian data, over the data's."""
    stored = {} if results is None else results.record.get("gaussian_spreads", {})
    found: float | None = stored.get(f"{cell.sampler}-{cell.steps}")
    return found


def raw_spreads(results: Results, cell: Cell) -> list[float]:
    """Return the spread of a cell's samples before the clamp, by seed; empty where not kept."""
    kept = results.record.get("raw_spreads", {})
    stored: dict[str, float] = kept.get(f"{cell.sampler}-{cell.steps}", {})
    return [stored[seed] for seed in sorted(stored)]


def left_by_network(results: Results, cell: Cell, alone: float | None) -> list[float]:
    """Return the spread of a cell's samples over what the sampler alone leaves, by seed.

    Of the samples before the clamp where that was kept, else of their 8-bit images.
    """
    spreads = raw_spreads(results, cell) or results.values("plain", cell, "spread").values()
    return [] if alone is None else [spread / alone for spread in spreads]


def left_where_asked(results: Results) -> dict[Cell, list[float]]:
    """Return `left_by_network` in the cells that soundness asks about."""
    return {
        cell: left_by_network(results, cell, spread_left(results, cell)) for cell in SOUND_CELLS
    }


def learned_shares(results: Results, skip: int) -> list[float]:
    """Return how far training has come from plain to the gain, by the spread, for each seed.

    Empty where it was not trained, or where the gain hardly changes the spread.
    """
    plain, gain, loss = (
        results.values(name, TEN, "spread") for name in ("plain", corrected(skip), trained(skip))
    )
    return [
        (loss[seed] - plain[seed]) / (gain[seed] - plain[seed])
        for seed in sorted(loss.keys() & plain.keys() & gain.keys())
        if abs(gain[seed] - plain[seed]) > TOLD_BY_SPREAD
    ]


def mean_colour_gains(results: Results) -> list[float]:
    """Return the best gains of the mean colour at late times, over times and seeds."""
    fitted = results.record.get("fitted", {}).get(f"plain+{BandGains().name}", {})
    return [gains[0] for table in fitted.values() for t, gains in table.items() if int(t) >= LATE]


def left_by_octave(results: Results, cell: Cell) -> list[float]:
    """Return the spread in each band of frequencies over what the sampler alone leaves of it.

    Of 8-bit samples, the mean over the seeds; empty where it was not measured.
    """
    key = f"{cell.sampler}-{cell.steps}"
    alone = results.record.get("gaussian_band_spreads", {}).get(key, [])
    stored = results.record.get("band_spreads", {})
    found = [bands for name, bands in stored.items() if name.startswith(f"{key},")]
    if not (alone and found):
        return []
    return [float(np.mean(seeds)) / left for *seeds, left in zip(*found, alone, strict=True)]


def is_sound(results: Results) -> bool | None:
    """Return whether the plain network is sound by the protocol; None where that is open."""
    gains = mean_colour_gains(results)
    deviations, complete = [gain - 1 for gain in gains], bool(gains)
    for ratios in left_where_asked(results).values():
        complete &= bool(ratios)
        deviations += [ratio - 1 for ratio in ratios]
    if any(abs(deviation) > SOUND for deviation in deviations):
        return False
    return True if complete else None
