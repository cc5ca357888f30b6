"""The README's numbers are those of the committed results, and its commands those that CI runs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the evidence's statistics need the extra `quality`")
pytest.importorskip("matplotlib", reason="so do its pages")
from benchmarks.quality.corrections import ScoreRescaling
from benchmarks.quality.evidence.cifar10_answers import (
    MARGIN,
    MORE,
    PRESET,
    SOUND_CELLS,
    answer,
    by_kind,
    chosen_correction,
    is_sound,
    left_by_network,
    over_plain,
    searched,
    spread_left,
)
from benchmarks.quality.evidence.corrections import CELLS as CORRECTED
from benchmarks.quality.evidence.corrections import SOLVERS, of_family
from benchmarks.quality.evidence.front import front_table
from benchmarks.quality.evidence.records import TEN, Evidence, Sources, corrected, trained
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.statistics import Cell, Results, improvement_of_ratios
from benchmarks.quality.tables import distance_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results/quality"
CELLS = [Cell(name, steps) for name in ("ddim", "pndm", "deis") for steps in (10, 20, 50, 100)]
FLAT = " ".join(README.split())
SPECTRAL, TINY = "cifar10-spectral", "cifar10-tiny"
CIFAR10 = sorted(path.stem for path in RESULTS.glob("cifar10-*.json"))


def results_of(name: str) -> Results:
    return Results(json.loads((RESULTS / f"{name}.json").read_text()))


def said(found) -> str:
    return f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"


def by_seed(results, method) -> str:
    values = results.improvements(method, TEN, "images_frechet").values()
    return " and ".join(f"{value:+.1f} %" for value in values)


def recommended(results, label) -> str:
    """What the search's one recommendation for all seeds did, as text."""
    searches = results.record["searches"]
    assert {one["recommended"] for one in searches} == {label}
    return " and ".join(f"{100 * (1 - one['corrected'] / one['plain']):+.1f} %" for one in searches)


def test_the_table_in_front_is_that_of_the_records(tmp_path):
    assert front_table(Evidence(Sources(RESULTS), tmp_path)) in README


@pytest.mark.parametrize(
    ("preset", "method", "cells"),
    [
        ("digits-full", "skip9-expected", CELLS),
        ("digits-full", "skip99-expected", [TEN]),
        ("digits-full", "skip99-expected", CELLS),
        ("digits-full", "min-snr-5", CELLS),
        ("textures", "skip99-expected", CELLS),
    ],
)
def test_evidence_in_the_readme_is_that_of_the_record(preset, method, cells):
    found = results_of(preset).improvement(method, cells, "images_frechet")
    assert found.count == 5
    assert said(found) in README


def test_what_the_readme_says_of_the_digits_is_so():
    """No effect at k = 9; help and harm at k = 99; Min-SNR above every skip; rescaling best."""
    results = results_of("digits-full")

    def improvement(method, cells=CELLS):
        return results.improvement(method, cells, "images_frechet")

    assert improvement("skip9-expected").sign == 0
    assert improvement("skip99-expected", [TEN]).sign == 1
    assert improvement("skip99-expected").sign == -1
    best = improvement("min-snr-5").low
    skips = [name for name in results.methods if name.startswith("skip")]
    assert all(improvement(name).high < best for name in skips)
    textures = results_of("textures-corrections")
    for cell in CORRECTED:  # "on 8 x 8 crops of photographs score rescaling did nothing"
        chosen = textures.chosen_elsewhere(
            [*of_family(ScoreRescaling), "plain"], cell, "images_frechet"
        )
        found = textures.against(chosen, dict.fromkeys(chosen, "plain"), cell, "images_frechet")
        assert found.sign == 0


def test_what_the_readme_says_of_cifar10_is_so():
    results, found = results_of(PRESET), answer(results_of(PRESET))
    assert {one.count for one in found.values() if one is not None} == {3}
    # "It costs nothing and does most", with DDIM's samples in front of it.
    solvers = [found[solver].mean for solver in SOLVERS]
    assert found["unipc"].mean == max(solvers)
    assert min(found["unipc"].low, searched(results).low) > found["loss"].high
    assert found["unipc"].low > max(found["correction"].high, searched(results).high)
    exact = improvement_of_ratios(
        results.values("plain", Cell("unipc", 50), "images_frechet"),
        results.values("plain", TEN, "images_frechet"),
    )
    assert f"nearer than DDIM at 10 by only {said(exact)}." in FLAT
    loss, gain, rescaling = (
        said(over_plain(results, name, Cell("unipc", 10)))
        for name in ("skip49-expected", "plain+gain49", "plain+rescaling1.05")
    )
    assert f"loss with k = 49 adds {loss}, its gain {gain}, and the score" in FLAT
    assert f"the score rescaling that suits DDIM {rescaling}." in FLAT
    assert max(-found["loss"].low, found["loss"].high) <= MARGIN  # "we call it equivalent"
    gained = over_plain(results, "plain+gain49", TEN)
    assert gained.mean > over_plain(results, "skip49-expected", TEN).mean  # "does as much"
    young = [over_plain(results, f"plain@{n}+gain49", TEN, f"plain@{n}").mean for n in (25, 50)]
    shares = f"{young[0]:+.1f} % after a quarter of the training, {young[1]:+.1f} % after half."
    assert f"on CIFAR10 {shares}" in FLAT
    assert set(chosen_correction(results).values()) == {"plain+rescaling1.05"}
    too_much = over_plain(results, "plain+rescaling1.1", TEN)
    assert f"by 1.05 helps above and by 1.1 does {said(too_much)};" in FLAT
    assert f"({millions(results)} million parameters, 2 million images seen)" in FLAT
    assert is_sound(results) is False


def test_loss_and_gain_are_as_near_to_one_another_as_the_alternatives_say():
    page = (ROOT / "docs/alternatives.md").read_text(encoding="utf-8")
    assert "the two were within 8 % of one another in every cell we measured" in page
    compared = [
        found.mean
        for preset in ("digits-full", "textures", *CIFAR10)
        for results in [results_of(preset)]
        for skip in (1, 9, 49, 99, 149)
        for cell in results.cells("plain")
        if not results.at_floor(trained(skip), cell, "images_frechet")
        and (found := over_plain(results, trained(skip), cell, corrected(skip))) is not None
    ]
    assert len(compared) > 80
    assert 7 < max(map(abs, compared)) < 8


def test_what_the_readme_says_of_min_snr_on_cifar10_is_so():
    more = results_of(MORE)
    on_top = over_plain(more, "min-snr-5+gain49", TEN, "min-snr-5")
    assert on_top.count == over_plain(more, "min-snr-5", TEN).count == 2
    assert f"the gain of k = 49 on top of it does another {said(on_top)}." in FLAT


def test_what_the_readme_says_of_other_networks_on_cifar10_is_so():
    spectral, tiny = results_of(SPECTRAL), results_of(TINY)
    assert f"gain of k = 49 did {by_seed(spectral, 'plain+gain49')} on a smaller network" in FLAT
    sizes = [
        results.record["trainings"]["plain"]["0"]["parameters"]
        for results in (spectral, results_of(PRESET))
    ]
    assert sizes[0] < sizes[1]
    images = [PRESETS[name].budget.steps for name in (TINY, SPECTRAL)]
    assert images[0] * 4 == images[1]  # "a quarter as long"
    assert f"{said(over_plain(tiny, 'plain+gain49', TEN))} on one trained for a quarter" in FLAT
    smaller = recommended(spectral, "score rescaling, k = 1.03")
    younger = recommended(tiny, "score rescaling, k = 1.4")
    assert f"k = 1.03, {smaller} on noise it has not seen, and with k = 1.4, {younger}." in FLAT
    # "There the search recommends score rescaling too": for the answer's network it does as well.
    assert recommended(results_of(PRESET), "score rescaling, k = 1.03")


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
    lacking = [
        1 - one
        for cell in SOUND_CELLS
        for one in left_by_network(results, cell, spread_left(results, cell))
    ]
    assert 0.015 < min(lacking) < 0.025  # "lack 2 to 4 %"
    assert 0.035 < max(lacking) < 0.045
    assert "its samples lack 2 to 4 % of the data's spread" in FLAT


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
