"""The README's numbers are those of the committed results, and its commands those that CI runs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the evidence's statistics need the extra `quality`")
pytest.importorskip("matplotlib", reason="so do its pages")
from benchmarks.quality.corrections import ScoreRescaling
from benchmarks.quality.evidence.cifar10_answers import (
    MARGIN,
    OTHERS,
    PRESET,
    answer,
    by_kind,
    is_sound,
    learned_shares,
    over_ddim,
    over_plain,
)
from benchmarks.quality.evidence.corrections import CELLS as CORRECTED
from benchmarks.quality.evidence.corrections import SOLVERS, names_of, of_family
from benchmarks.quality.presets import FITTED, PRESETS, SINGLE
from benchmarks.quality.statistics import Cell, Results
from benchmarks.quality.tables import distance_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results/quality"
CELLS = [Cell(name, steps) for name in ("ddim", "pndm", "deis") for steps in (10, 20, 50, 100)]
TEN_STEPS = [Cell("ddim", 10)]
SPECTRAL, (WIDE, BRIEF, TINY) = PRESET, OTHERS


def results_of(name: str) -> Results:
    return Results(json.loads((RESULTS / f"{name}.json").read_text()))


@pytest.mark.parametrize(
    ("preset", "method", "cells", "measure"),
    [
        ("digits-full", "skip9-expected", CELLS, "images_frechet"),
        ("digits-full", "skip99-expected", TEN_STEPS, "images_frechet"),
        ("digits-full", "skip99-expected", CELLS, "images_frechet"),
        ("digits-full", "plain+gain99", TEN_STEPS, "images_frechet"),
        ("digits-full", "min-snr-5", CELLS, "images_frechet"),
        ("textures", "skip99-expected", CELLS, "images_frechet"),
    ],
)
def test_evidence_in_the_readme_is_that_of_the_record(preset, method, cells, measure):
    found = results_of(preset).improvement(method, cells, measure)
    assert found.count == 5
    assert f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]" in README


def test_what_the_readme_says_in_words_is_so():
    """No effect at k = 9; help and harm at k = 99; Min-SNR above every skip."""
    results = results_of("digits-full")

    def sign(method, cells):
        return results.improvement(method, cells, "images_frechet").sign

    assert sign("skip9-expected", CELLS) == 0
    assert sign("skip99-expected", TEN_STEPS) == sign("plain+gain99", TEN_STEPS) == 1
    assert sign("skip99-expected", CELLS) == -1
    best = results.improvement("min-snr-5", CELLS, "images_frechet").low
    for method in results.methods:
        if method.startswith("skip"):
            assert results.improvement(method, CELLS, "images_frechet").high < best


def test_what_the_readme_says_of_solvers_and_corrections_is_so():
    """UniPC over DDIM; score rescaling above every other correction in 8-bit digits, not crops."""
    digits, textures = results_of("digits-corrections"), results_of("textures-corrections")
    solver = over_ddim(digits, "unipc", 10).mean
    assert f"and by {solver:.1f} % on the digits" in " ".join(README.split())
    rescaling = of_family(ScoreRescaling)
    others = [name for name in names_of((*SINGLE, *FITTED)) if name not in rescaling]
    for cell in CORRECTED:
        chosen = digits.chosen_elsewhere(rescaling, cell, "images_frechet")
        found = digits.against(chosen, dict.fromkeys(chosen, "plain"), cell, "images_frechet")
        if cell == TEN_STEPS[0]:
            assert f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]" in README
        best = max(digits.improvement(name, [cell], "images_frechet").mean for name in others)
        assert found.low > best
        chosen = textures.chosen_elsewhere([*rescaling, "plain"], cell, "images_frechet")
        found = textures.against(chosen, dict.fromkeys(chosen, "plain"), cell, "images_frechet")
        assert found.sign == 0


def said(found) -> str:
    return f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"


def recommended(results, label) -> str:
    """What the search's one recommendation for all seeds did, as text."""
    searches = results.record["searches"]
    assert {one["recommended"] for one in searches} == {label}
    return " and ".join(f"{100 * (1 - one['corrected'] / one['plain']):+.1f} %" for one in searches)


def test_what_the_readme_says_of_cifar10_is_so():
    results, flat = results_of(SPECTRAL), " ".join(README.split())
    ten = TEN_STEPS[0]
    found = answer(results)
    assert said(found["loss"]) in README
    assert max(-found["loss"].low, found["loss"].high) <= MARGIN  # "equivalent"
    assert said(found["correction"]) in README
    candidates = [name for name in results.methods if name.startswith("plain+")]
    chosen = results.chosen_elsewhere(candidates, ten, "images_frechet")
    assert set(chosen.values()) <= set(of_family(ScoreRescaling, [ScoreRescaling(1.05)]))
    assert max(found[solver].mean for solver in SOLVERS) == found["unipc"].mean
    assert f"than DDIM's by {found['unipc'].mean:.1f} % on CIFAR10, by" in flat
    assert recommended(results, "score rescaling, k = 1.03") in flat
    worst = over_plain(results, "plain+rescaling1.4", ten)
    assert f"k = 1.4, +6.4 % and +8.4 %, which here is {worst.mean:+.1f} %" in flat
    of_gain = results.improvements("plain+gain49", ten, "images_frechet").values()
    assert f"{' and '.join(f'{one:+.1f} %' for one in of_gain)} here" in flat
    # What the plot's description says of its points.
    losses, gains, corrections, solvers = by_kind(results)
    small = [value for values in (*losses.values(), *gains.values()) for value in values]
    assert max(map(abs, small)) < 6
    assert all(10 < value < 11.5 for value in corrections["Temporal Score Rescaling"])
    assert all(17 < value < 20.5 for value in solvers["UniPC"])
    assert f"({millions(results)} million parameters, 2 million images seen)" in flat
    assert is_sound(results) is False
    assert all(0.065 < each < 0.08 for each in lacking(results))  # "lack 7 %"


def test_what_the_readme_says_of_a_larger_network_on_cifar10_is_so():
    results, flat = results_of(WIDE), " ".join(README.split())
    ten = TEN_STEPS[0]
    assert f"by {over_ddim(results, 'unipc', 10).mean:.1f} % with a larger network there" in flat
    of_gain = results.improvements("plain+gain49", ten, "images_frechet").values()
    assert f"{' and '.join(f'{one:+.1f} %' for one in of_gain)} on two larger ones" in flat
    assert f"those of the larger ({millions(results)} million) lack 4 to 5 %" in flat
    assert all(0.035 < each < 0.055 for each in lacking(results))  # "lack 4 to 5 %"
    assert not any(name.startswith("skip") for name in results.methods)
    assert all(31.5 < value < 32.5 for value in by_kind(results)[-1]["UniPC"])  # in the plot


def test_what_the_readme_says_of_the_larger_network_after_fewer_images_is_so():
    results, flat = results_of(BRIEF), " ".join(README.split())
    ten = TEN_STEPS[0]
    of_gain = results.improvements("plain+gain49", ten, "images_frechet").values()
    said_of_gain = " and ".join(f"{one:+.1f} %" for one in of_gain)
    assert f"and {said_of_gain} on these after a fifth of the training" in flat
    steps = [PRESETS[name].budget.steps for name in (BRIEF, WIDE)]
    assert steps[0] / steps[1] == pytest.approx(1 / 5, abs=0.02)
    assert results.record["settings"]["network"] == results_of(WIDE).record["settings"]["network"]
    shares = " and ".join(f"{100 * share:.0f} %" for share in learned_shares(results, 49))
    assert f"with k = 49, had come {shares} of the way" in flat
    assert PRESETS[BRIEF].budget.branch_at == 0.75  # "the last quarter"
    losses = [said(over_plain(results, f"skip{skip}-expected", ten)) for skip in (9, 49)]
    assert f"k = 9 {losses[0]}, k = 49 {losses[1]}." in flat
    rescaled = said(over_plain(results, "plain+rescaling1.05", ten))
    assert f"{rescaled} with the larger network after fewer images" in flat


def millions(results) -> str:
    return f"{results.record['trainings']['plain']['0']['parameters'] / 1e6:.2f}"


def lacking(results) -> list[float]:
    """The shares of the data's spread that samples lack besides what the sampler takes."""
    alone = results.record["gaussian_spreads"]["ddim-50"]
    spreads = results.values("plain", Cell("ddim", 50), "spread").values()
    return [1 - spread / alone for spread in spreads]


def test_what_the_readme_says_of_a_younger_network_on_cifar10_is_so():
    results = results_of(TINY)
    assert said(over_plain(results, "plain+gain49", TEN_STEPS[0])) in README
    assert recommended(results, "score rescaling, k = 1.4") in README
    images = [PRESETS[name].budget.steps for name in (TINY, SPECTRAL)]
    assert images[0] * 4 == images[1]  # "a quarter as long"


@pytest.mark.parametrize("measure", ["images_frechet", "raw_frechet"])
def test_the_digits_tables_in_the_readme_are_those_of_the_record(measure):
    cells = [Cell(name, steps) for name in ("ddim", "pndm", "deis") for steps in (10, 20, 50)]
    methods = ["plain", "skip9-expected", "skip99-expected"]
    assert distance_table(results_of("digits"), methods, cells, measure) in README


def test_the_command_that_ci_runs_is_in_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "from_readme test" in script
    assert README.count("<!-- command: test -->\n```sh\n") == 1
    assert README.count("<!-- command: digits -->\n```sh\n") == 1
