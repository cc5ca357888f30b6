from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.files import load_json, save_record
from benchmarks.quality.page import GRID, Sources, write_page
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.report import percent
from benchmarks.quality.statistics import Results

# How far each method is from the data, as a factor on plain, in a made-up grid.
FACTORS = {
    "plain": 1.0,
    "skip9-expected": 0.9,
    "skip49-expected": 1.2,
    "skip49-fresh": 1.2,
    "plain+gain9": 0.9,
    "plain+gain49": 1.6,
}


def a_record() -> dict[str, Any]:
    wobble = (0.97, 1.0, 1.02, 1.01, 0.99)
    rows = []
    for position, (name, factor) in enumerate(FACTORS.items()):
        for seed in range(5):
            # Seeds differ much, methods within a seed little: what pairing is for.
            luck = wobble[(seed + position) % 5] ** 0.2
            base = (1 + seed) * (1.0 if name == "plain" else luck)
            rows += [
                [name, seed, *cell, factor * base, 0.1, 2 * factor * base, 0.2, 0.9]
                for cell in GRID
            ]
    return {
        "preset": "digits-full",
        "settings": PRESETS["digits-full"].settings,
        "versions": {"torch": "2", "commit": "abc"},
        "floor": {"features": "some features", "frechet": 0.5, "images_each": 898},
        "paper": {},
        "titles": {name: name.replace("-", " ") for name in FACTORS},
        "columns": [
            "method", "seed", "sampler", "steps",
            "raw_frechet", "raw_kernel", "images_frechet", "images_kernel", "spread",
        ],
        "rows": rows,
        "trainings": {},
    }  # fmt: skip


def a_page(folder: Path, record: dict[str, Any] | None) -> str:
    sources = Sources(folder / "quality", folder / "lab", folder / "assets")
    if record is not None:
        save_record(sources.quality / "digits-full.json", record)
    write_page(folder / "evidence.md", sources)
    return (folder / "evidence.md").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    a_page(folder, a_record())
    return folder


def test_the_page_says_what_the_results_say(made: Path) -> None:
    record = a_record()
    text = (made / "evidence.md").read_text()
    results = Results(record)
    nine = results.improvement("skip9-expected", GRID)
    assert nine is not None
    assert nine.sign == 1
    assert f"| skip9 expected | {percent(nine)} |" in text
    assert percent(nine).startswith("**")
    assert (
        f"- The paper's default, k = 9: {percent(nine)}, better than plain training (raw)." in text
    )
    assert re.search(r"- skip49 expected: .*, worse than plain training \(raw\)", text)
    assert "They agree within their intervals at every skip measured." in text
    assert "Of 2 skips, training is better than the gain alone at 1, worse at 0" in text
    assert "interval excludes 0: skip9 expected, **+" in text
    row = next(line for line in text.splitlines() if line.startswith("| PNDM, 50 steps | skip9"))
    assert "none" not in row
    for number in range(1, 7):
        assert f"### {number}. " in text
        assert f"question{number}.svg" in text
        assert (made / f"assets/question{number}.svg").stat().st_size > 2000
    assert "τ = 0.9 | not measured yet" in text


def test_no_difference_is_not_called_a_difference(tmp_path: Path) -> None:
    record = a_record()
    for row in record["rows"]:
        if row[0] == "skip9-expected":
            row[4] *= (0.8, 1.2, 1.1, 0.9, 1.3)[row[1]]
    text = a_page(tmp_path, record)
    assert re.search(r"k = 9: [-+].*, no difference from plain training that 5 seeds", text)
    assert "The largest mean improvement" not in text
    row = next(line for line in text.splitlines() if line.startswith("| PNDM, 50 steps | none"))
    assert row.startswith("| PNDM, 50 steps | none |  | skip9 expected |")


@pytest.mark.parametrize("preset", ["patches", "cifar10", "celeba"])
def test_what_was_not_measured_is_said_so_beside_the_papers_numbers(
    tmp_path: Path, preset: str
) -> None:
    text = a_page(tmp_path, None)
    assert "The grid on the digits: not measured yet." in text
    row = next(line for line in text.splitlines() if line.startswith(f"| {preset} |"))
    assert "not measured yet" in row
    wanted = {"patches": "none", "cifar10": "8.01", "celeba": "8.97 % to 27.08 %"}
    assert wanted[preset] in row


def test_fragments_of_the_lab_are_included_in_order(tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    lab.mkdir()
    (lab / "b.md").write_text("## Second\n")
    (lab / "a.md").write_text("## First\n")
    text = a_page(tmp_path, None)
    assert text.index("## First") < text.index("## Second") < text.index("## Every command")


def test_the_page_is_the_same_for_the_same_results(tmp_path: Path, made: Path) -> None:
    assert a_page(tmp_path, a_record()) == (made / "evidence.md").read_text()
    for figure in (made / "assets").iterdir():
        assert figure.read_bytes() == (tmp_path / "assets" / figure.name).read_bytes()


def test_every_command_on_the_page_exists(tmp_path: Path) -> None:
    text = a_page(tmp_path, None)
    for name in PRESETS:
        assert f"python -m benchmarks.quality run {name}" in text


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    record = a_record()
    save_record(tmp_path / "record.json", record)
    assert load_json(tmp_path / "record.json") == record
    lines = (tmp_path / "record.json").read_text().splitlines()
    assert sum(line.startswith("  [") for line in lines) == len(record["rows"])
