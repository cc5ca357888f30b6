"""The README's numbers are those of the committed results, and its commands those that CI runs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the evidence's statistics need the extra `quality`")
pytest.importorskip("matplotlib", reason="so do its pages")
from benchmarks.quality.corrections import ScoreRescaling
from benchmarks.quality.evidence.cifar10 import answer, over_ddim
from benchmarks.quality.evidence.corrections import CELLS as CORRECTED
from benchmarks.quality.evidence.corrections import names_of, of_family
from benchmarks.quality.presets import FITTED, SINGLE
from benchmarks.quality.statistics import Cell, Results
from benchmarks.quality.tables import distance_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results/quality"
CELLS = [Cell(name, steps) for name in ("ddim", "pndm", "deis") for steps in (10, 20, 50, 100)]
TEN_STEPS = [Cell("ddim", 10)]


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
        ("textures", "skip99-expected", CELLS, "raw_frechet"),
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
    assert f"{solver:.1f} % nearer to the data than DDIM's" in " ".join(README.split())
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


def test_what_the_readme_says_of_cifar10_is_so():
    results = results_of("cifar10-tiny")
    found = [
        results.improvement("skip9-expected", TEN_STEPS, "images_frechet"),
        results.improvement("plain+gain49", TEN_STEPS, "images_frechet"),
        answer(results)["correction"],
    ]
    for one in found:
        assert f"{one.mean:+.1f} % [{one.low:+.1f}, {one.high:+.1f}]" in README
    assert [one.sign for one in found] == [-1, -1, 1]
    names = [name for name in results.methods if name.startswith("plain+")]
    chosen = results.chosen_elsewhere(names, TEN_STEPS[0], "images_frechet")
    factors = {float(name.removeprefix("plain+scaling")) for name in chosen.values()}
    assert all(factor < 1 for factor in factors)
    searches = results.record["searches"]
    assert all(one["recommended"].startswith("score rescaling") for one in searches)
    gained = [f"{100 * (1 - one['corrected'] / one['plain']):+.1f} %" for one in searches]
    assert " and ".join(gained) in README


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
