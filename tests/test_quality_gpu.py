"""The plan for a GPU, rehearsed on a tiny network on the CPU."""

import shutil
import signal
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from quality_tools import ONE_ARM, TINY

from benchmarks.files import load_json, load_tensors, write_whole
from benchmarks.quality import gpu, runner
from benchmarks.quality.cli import main


def shrunk(preset):
    """The same arms and seeds on digits, few steps and images."""
    few = tuple(replace(one, steps=one.steps[:1]) for one in preset.arms[:4])
    return replace(TINY, path=preset.path, arms=few, seeds=preset.seeds, samples=16)


@pytest.mark.parametrize("part", gpu.PARTS[:4], ids=lambda part: part.name)
def test_each_part_writes_its_record(part, tmp_path):
    small = replace(part, preset=shrunk(part.preset))
    cells = sum(len(one.samplers) for one in small.preset.arms) * len(part.preset.seeds)
    assert f"{part.name}: complete; {cells} cells in" in gpu.do(small, tmp_path, None)
    assert len(load_json(tmp_path / f"{part.name}.json")["rows"]) == cells
    assert (tmp_path / "weights").exists() == part.keep_weights


def test_a_part_that_takes_too_long_stops_and_goes_on(tmp_path):
    part = gpu.Part("made", "of a test", ONE_ARM)
    save_json = runner.save_json

    def out_of_time(_path):
        assert signal.alarm(0) > 500
        signal.raise_signal(signal.SIGALRM)

    def slow(path, content):
        save_json(path, content)
        if "cells" in path.parts:  # whoever writes a file must not take it for the file's fault
            write_whole(tmp_path / "file", out_of_time)

    with patch.object(runner, "save_json", slow):
        said = gpu.do(part, tmp_path, None, seconds=999)
    assert "stopped after 999 seconds; the same command goes on; 1 cells" in said
    assert len(load_json(tmp_path / "made.json")["rows"]) == 1
    assert not (tmp_path / "file").exists()
    assert "complete; 4 cells" in gpu.do(part, tmp_path, None)


def test_the_command_line_sets_the_limit(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(gpu, "do", lambda *given: limits.append(given[3]))
    for extra in ([], ["--seconds", "7"]):
        CliRunner().invoke(main, ["gpu", "--part", "1", "--out", str(tmp_path), *extra])
    assert limits == [gpu.LIMIT, 7]
    said = CliRunner().invoke(main, ["gpu", "--part", "9"])
    assert "part must be 1 to 5, got 9" in said.output


def test_the_search_is_asked_about_the_first_parts_network(tmp_path, monkeypatch):
    first, *_, last = gpu.PARTS
    asked = []
    monkeypatch.setattr(gpu, "search", lambda *arguments: asked.append(arguments[1:5]))
    monkeypatch.setattr(gpu, "run", lambda *_, **__: None)
    gpu.do(last, tmp_path, None)
    assert asked == [(tmp_path / first.name, *first.preset.seeds, gpu.SOLVERS, 10)]
    assert last.preset.settings == first.preset.settings


def test_weights_are_kept_in_small_files(tmp_path):
    weights = {f"layer{n}": torch.randn(100, 50) for n in range(5)} | {"mean": torch.randn(3)}
    torch.save(weights, tmp_path / "weights.pt")
    gpu.save_in_parts(tmp_path / "weights.pt", tmp_path / "kept", size=22_500)
    files = sorted((tmp_path / "kept").iterdir())
    assert [len(load_tensors(path)) for path in files] == [2, 2, 2]
    found = gpu.load_from_parts(tmp_path / "kept")
    torch.testing.assert_close(found, weights, rtol=2**-8, atol=0)
    assert torch.equal(found["mean"], weights["mean"])


def test_kept_weights_are_not_trained_again(tmp_path):
    part = gpu.Part("made", "a small one", ONE_ARM, keep_weights=True)
    gpu.do(part, tmp_path, None)
    (weights,) = (tmp_path / "made").rglob("weights.pt")
    before = load_tensors(weights), load_json(weights.with_name("training.json"))
    shutil.rmtree(tmp_path / "made")
    assert "complete" in gpu.do(part, tmp_path, None)
    torch.testing.assert_close(load_tensors(weights), before[0], rtol=2**-8, atol=0)
    assert load_json(weights.with_name("training.json")) == before[1]  # its seconds too
