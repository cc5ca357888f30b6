"""The table that the README and `evidence.md` begin with: what helps DDIM at 10 steps."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.pages.tables import counted, markdown_table
from benchmarks.quality.corrections import ScoreRescaling
from benchmarks.quality.evidence.cifar10_answers import (
    MORE,
    PRESET,
    over_ddim,
    over_plain,
    searched,
    without_training,
)
from benchmarks.quality.evidence.records import IMAGES, TEN, Evidence, corrected, methods, trained
from benchmarks.quality.objectives import MinSNR
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.statistics import Interval, Results
from benchmarks.quality.tables import percent

Finding = Callable[[Results], Interval | None]


def front_table(evidence: Evidence) -> str:
    """Return the 8-bit improvements on CIFAR10 and on the digits, the simplest remedy first."""
    cifar10, more = evidence.results(PRESET), evidence.results(MORE)
    digits, corrections = evidence.full, evidence.results("digits-corrections")

    def unipc(results: Results) -> Interval | None:
        return over_ddim(results, "unipc", TEN.steps)

    def on_cifar10(name: str) -> Finding:
        return lambda results: over_plain(results, name, TEN)

    def on_digits(name: str) -> Finding:
        return lambda results: results.improvement(name, [TEN], IMAGES)

    min_snr, gain = MinSNR().name, corrected(49)
    rows: dict[str, list[tuple[Results | None, Finding]]] = {
        "UniPC in DDIM's place": [(cifar10, unipc), (corrections, unipc)],
        "Temporal Score Rescaling, without training": [
            (cifar10, _rescaled),
            (corrections, _rescaled),
        ],
        "what the search recommends, without training": [(cifar10, searched), (None, searched)],
        "the loss's gain, k = 49, without training": [
            (cifar10, on_cifar10(gain)),
            (digits, on_digits(gain)),
        ],
        "the loss, k = 49": [
            (cifar10, on_cifar10(trained(49))),
            (digits, on_digits(trained(49))),
        ],
        "the loss, k = 9, the paper's default": [
            (cifar10, on_cifar10(trained(9))),
            (digits, on_digits(trained(9))),
        ],
        "the weighting Min-SNR-5, from the start": [
            (more, on_cifar10(min_snr)),
            (digits, on_digits(min_snr)),
        ],
    }
    found = {
        name: [None if results is None else find(results) for results, find in columns]
        for name, columns in rows.items()
    }
    return markdown_table(
        ["DDIM at 10 steps, 8-bit: nearer to the data by", "CIFAR10", "digits"],
        [
            [name, *("" if one is None else percent(one) for one in columns)]
            for name, columns in found.items()
            if any(columns)
        ],
    )


def front_note(evidence: Evidence) -> str:
    """Return what a reader of the table has to know of its rows; nothing without CIFAR10's."""
    cifar10, more = evidence.results(PRESET), evidence.results(MORE)
    share = PRESETS[PRESET].budget.branch_at
    if cifar10 is None or more is None or share is None:
        return ""
    min_snr = counted(len(more.values(MinSNR().name, TEN)), "seed")
    few, many = (f"{one.record['settings']['samples']:,}" for one in (cifar10, more))
    return (
        f"Three or five seeds on the digits, {counted(len(cifar10.values('plain', TEN)), 'seed')} "
        f"of {few} samples on CIFAR10, where Min-SNR has {min_snr} of {many}. Min-SNR was trained "
        "from the start on both, the loss on the digits only: on CIFAR10 it had the last "
        f"{100 * (1 - share):.0f} % of the training."
    )


def _rescaled(results: Results) -> Interval | None:
    """Return what score rescaling does, its strength chosen on the other seeds."""
    known = methods(results.record["preset"])
    family = [
        name
        for name in without_training(results, TEN)
        if isinstance(known[name].correction, ScoreRescaling)
    ]
    chosen = results.chosen_elsewhere(family, TEN, IMAGES)
    if results.record["preset"] == PRESET:
        return over_plain(results, chosen, TEN)
    return results.against(chosen, dict.fromkeys(chosen, "plain"), TEN, IMAGES)
