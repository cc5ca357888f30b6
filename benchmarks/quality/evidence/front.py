"""The table that the README and `evidence.md` begin with: what helps DDIM at 10 steps."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.pages.tables import counted, listed, markdown_table
from benchmarks.quality.corrections import ScoreRescaling
from benchmarks.quality.evidence.cifar10_answers import (
    ALPHA,
    MORE,
    PRESET,
    RESCALED,
    UNET,
    over_ddim,
    over_plain,
    p_values,
    searched,
    without_training,
)
from benchmarks.quality.evidence.records import IMAGES, TEN, Evidence, corrected, methods, trained
from benchmarks.quality.objectives import MinSNR
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.statistics import Interval, Results
from benchmarks.quality.tables import percent

Finding = Callable[[Results], Interval | None]
DATA_SETS = ("CIFAR10, the paper's U-Net", "CIFAR10, small network", "digits", "crops")


def front_table(evidence: Evidence) -> str:
    """Return the 8-bit improvements on three data sets, the simplest remedy first."""
    unet, cifar10, digits, crops = map(evidence.results, (UNET, PRESET, "digits-full", "textures"))
    more, *studies = map(evidence.results, (MORE, "digits-corrections", "textures-corrections"))

    def by_solver(solver: str) -> list[tuple[Results | None, Finding]]:
        return [
            (one, lambda results: over_ddim(results, solver, TEN.steps))
            for one in (unet, cifar10, *studies)
        ]

    def over(name: str, *columns: Results | None) -> list[tuple[Results | None, Finding]]:
        return [(one, lambda results: over_plain(results, name, TEN)) for one in columns]

    everywhere = (unet, cifar10, digits, crops)
    rows: dict[str, list[tuple[Results | None, Finding]]] = {
        "PNDM in DDIM's place": by_solver("pndm"),
        "UniPC in DDIM's place": by_solver("unipc"),
        "the loss's gain, k = 49, without training": over(corrected(49), *everywhere),
        "the loss, k = 49": over(trained(49), *everywhere),
        "the loss, k = 9, the paper's default": over(trained(9), *everywhere),
        "Temporal Score Rescaling, without training, its strength chosen on other seeds": [
            *over(RESCALED, unet),
            *((one, _rescaled) for one in (cifar10, *studies)),
        ],
        "what the search recommends, given the metric's features": [
            (None, searched),
            (cifar10, searched),
        ],
        "the weighting Min-SNR-5, from the start": over(MinSNR().name, None, more, digits),
    }
    found = {
        name: [None if results is None else find(results) for results, find in columns]
        for name, columns in rows.items()
    }
    return markdown_table(
        ["DDIM at 10 steps, 8-bit: nearer to the data by", *DATA_SETS],
        [
            [name, *("" if one is None else percent(one) for one in columns)]
            + [""] * (len(DATA_SETS) - len(columns))
            for name, columns in found.items()
            if any(columns)
        ],
    )


def front_note(evidence: Evidence) -> str:
    """Return what a reader of the table has to know of its rows; nothing without CIFAR10's."""
    unet, cifar10, more = map(evidence.results, (UNET, PRESET, MORE))
    share = PRESETS[PRESET].budget.branch_at
    if cifar10 is None or more is None or share is None:
        return ""
    seeds, min_snr = (
        counted(len(one.values(name, TEN)), "seed")
        for one, name in ((cifar10, "plain"), (more, MinSNR().name))
    )
    few, many = (f"{one.record['settings']['samples']:,}" for one in (cifar10, more))
    large = (
        ""
        if unet is None
        else f"The paper's U-Net is {counted(len(unet.values('plain', TEN)), 'seed')}, with the "
        "strength of score rescaling that was chosen on the small network; no other was tried on "
        "it, and no search. "
    )
    return (
        f"{large}The small network is {seeds} of {few} samples, where Min-SNR has {min_snr} of "
        f"{many}. *Digits* are scikit-learn's, *crops* of photographs, both 8 x 8 and of three or "
        "five seeds. The loss was trained from the start on these two, on CIFAR10 for the last "
        f"{100 * (1 - share):.0f} % of the training. PNDM calls the network 11 times. An empty "
        "cell was not measured. Means are of the logarithms of the ratios."
        f"{_together(cifar10)}"
    )


def _together(results: Results) -> str:
    """Say which rows of CIFAR10's column hold by Holm's correction, and which by themselves."""
    chosen = dict.fromkeys(_chosen_rescaling(results).values())
    rows = {
        "unipc": "UniPC",
        **dict.fromkeys(chosen, "score rescaling"),
        corrected(49): "the gain of k = 49",
        trained(49): "the loss with k = 49",
        trained(9): "the loss with k = 9",
    }
    alone, adjusted = p_values(results)
    if not alone.keys() >= rows.keys():
        return ""
    kept = [text for name, text in rows.items() if adjusted[name] < ALPHA]
    lost = [text for name, text in rows.items() if alone[name] < ALPHA <= adjusted[name]]
    said = f"{listed(kept)} differ from plain DDIM" if kept else "none differs from plain DDIM"
    each = "each taken" if len(lost) > 1 else "taken"
    rest = f"; {listed(lost)} only {each} by itself" if lost else ""
    return (
        f" Of the {len(alone)} comparisons made in this cell on the small network, by Holm's "
        f"correction over all, {said}{rest}."
    )


def _rescaled(results: Results) -> Interval | None:
    """Return what score rescaling does, its strength chosen on the other seeds."""
    return over_plain(results, _chosen_rescaling(results), TEN)


def _chosen_rescaling(results: Results) -> dict[int, str]:
    known = methods(results.record["preset"])
    family = [
        name
        for name in without_training(results, TEN)
        if isinstance(known[name].correction, ScoreRescaling)
    ]
    return results.chosen_elsewhere(family, TEN, IMAGES)
