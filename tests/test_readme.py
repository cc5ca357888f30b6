"""The README's numbers are those of the committed results, and its commands those that CI runs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the evidence's statistics need the extra `quality`")
pytest.importorskip("matplotlib", reason="so do its pages")
from benchmarks.quality.corrections import ScoreRescaling
from benchmarks.quality.evidence.cifar10_answers import (
    MARGIN,
    PRESET,
    answer,
    by_kind,
    is_sound,
    left_by_network,
    over_ddim,
    over_plain,
    spread_left,
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
SPECTRAL, TINY = "cifar10-spectral", "cifar10-tiny"


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


def by_seed(results, method) -> str:
    values = results.improvements(method, TEN_STEPS[0], "images_frechet").values()
    return " and ".join(f"{value:+.1f} %" for value in values)


def test_what_the_readme_says_of_cifar10_is_so():
    results, flat = results_of(PRESET), " ".join(README.split())
    ten, found = TEN_STEPS[0], answer(results)
    assert {one.count for one in found.values() if one is not None} == {3}
    assert f"{said(found['loss'])}, which we call equivalent" in flat
    assert max(-found["loss"].low, found["loss"].high) <= MARGIN
    assert f"k = 49 on CIFAR10 {said(over_plain(results, 'skip49-expected', ten))};" in flat
    gained = over_plain(results, "plain+gain49", ten)
    assert f"does as much: {said(gained)} on CIFAR10 with k = 49" in flat
    assert gained.mean > over_plain(results, "skip49-expected", ten).mean
    young = [over_plain(results, f"plain@{n}+gain49", ten, f"plain@{n}").mean for n in (25, 50)]
    shares = f"({young[0]:+.1f} % after a quarter of the training, {young[1]:+.1f} % after half)"
    assert shares in flat
    assert f"did most: {said(found['correction'])} on CIFAR10" in flat
    candidates = [name for name in results.methods if name.startswith("plain+")]
    chosen = results.chosen_elsewhere(candidates, ten, "images_frechet")
    assert set(chosen.values()) == set(of_family(ScoreRescaling, [ScoreRescaling(1.05)]))
    assert max(one.mean for s in SOLVERS if (one := found[s])) == found["unipc"].mean
    assert f"than DDIM's by {found['unipc'].mean:.1f} % on CIFAR10 and" in flat
    loss_with_unipc = over_plain(results, "skip49-expected", Cell("unipc", 10))
    assert f"loss with k = 49 adds {said(loss_with_unipc)}." in flat
    with_unipc = over_plain(results, "plain+gain49", Cell("unipc", 10))
    assert f"The same gain of k = 49 did {said(with_unipc)} with UniPC" in flat
    assert f"({millions(results)} million parameters, 2 million images seen)" in flat
    assert is_sound(results) is False


def test_what_the_readme_says_of_other_networks_on_cifar10_is_so():
    spectral, tiny, flat = results_of(SPECTRAL), results_of(TINY), " ".join(README.split())
    ten = TEN_STEPS[0]
    assert f"on a smaller network {by_seed(spectral, 'plain+gain49')}, and" in flat
    sizes = [
        results.record["trainings"]["plain"]["0"]["parameters"]
        for results in (spectral, results_of(PRESET))
    ]
    assert sizes[0] < sizes[1]
    images = [PRESETS[name].budget.steps for name in (TINY, SPECTRAL)]
    assert images[0] * 4 == images[1]  # "a quarter as long"
    assert f"{said(over_plain(tiny, 'plain+gain49', ten))} on one trained for a quarter" in flat
    assert f"k = 1.03, {recommended(spectral, 'score rescaling, k = 1.03')} on noise" in flat
    younger = recommended(tiny, "score rescaling, k = 1.4")
    worst = over_plain(spectral, "plain+rescaling1.4", ten)
    assert f"k = 1.4, which there did {younger} and on the other does {worst.mean:+.1f} %" in flat


def test_what_the_plots_description_says_is_so():
    losses, gains, corrections, solvers = by_kind(results_of(PRESET))
    assert list(losses) == ["S²-DM k = 9, expected", "S²-DM k = 49, expected"]
    k_9, k_49 = losses.values()
    assert all(0.4 < value < 1 for value in k_9)
    assert all(4 < value < 5.2 for value in k_49)
    assert all(5 < value < 8 for value in gains["gain k = 49"])
    assert all(16 < value < 18 for value in corrections["Temporal Score Rescaling"])
    assert all(31.5 < value < 32.5 for value in solvers["UniPC"])


def test_the_readme_says_what_spread_is_lacking():
    results = results_of(PRESET)
    cell = Cell("ddim", 50)
    lacking = [1 - one for one in left_by_network(results, cell, spread_left(results, cell))]
    assert all(0.03 < one < 0.04 for one in lacking)  # "lack 3 to 4 %"
    assert "its samples lack 3 to 4 % of the data's spread" in " ".join(README.split())


def millions(results) -> str:
    return f"{results.record['trainings']['plain']['0']['parameters'] / 1e6:.2f}"


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
