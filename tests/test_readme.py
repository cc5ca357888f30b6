"""The README's numbers are those of the committed results, and its commands those that CI runs."""

import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="the evidence's statistics need the extra `quality`")
from benchmarks.quality.statistics import Cell, Results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results/quality"
ROWS = {
    "trained, k = 9 (the paper's default)": "skip9-expected",
    "trained, k = 49": "skip49-expected",
    "trained, k = 99": "skip99-expected",
    "no training, gain k = 49": "plain+gain49",
    "no training, gain k = 99": "plain+gain99",
}
CELLS = [Cell(name, steps) for name in ("ddim", "pndm", "deis") for steps in (10, 20, 50, 100)]


@pytest.mark.parametrize("title", ROWS)
def test_evidence_in_the_readme_is_that_of_the_record(title):
    results = Results(json.loads((RESULTS / "digits-full.json").read_text()))
    shown = []
    for measure in ("raw_frechet", "images_frechet"):
        for cells in ([Cell("ddim", 10)], CELLS):
            found = results.improvement(ROWS[title], cells, measure)
            assert found.count == 5
            shown.append(f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]")
    assert f"| {title} | {' | '.join(shown)} |" in README


def test_the_digits_table_in_the_readme_is_that_of_the_record():
    results = Results(json.loads((RESULTS / "digits.json").read_text()))
    for sampler, title in (("ddim", "DDIM"), ("pndm", "PNDM"), ("deis", "DEIS")):
        for steps in (10, 20, 50):
            cell = Cell(sampler, steps)
            row = f"| {title}, {steps} steps | {results.values('plain', cell)[0]:.3f} |"
            for method in ("skip9-expected", "skip99-expected"):
                better = results.improvements(method, cell)[0]
                row += f" {results.values(method, cell)[0]:.3f} ({better:+.1f} %) |"
            assert row in README


def test_the_command_that_ci_runs_is_in_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "from_readme test" in script
    assert README.count("<!-- command: test -->\n```sh\n") == 1
    assert README.count("<!-- command: digits -->\n```sh\n") == 1
