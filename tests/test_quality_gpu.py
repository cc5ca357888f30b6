"""The plan for a GPU, rehearsed on a tiny network on the CPU."""

from dataclasses import replace

import pytest
import torch
from quality_tools import ONE_ARM, TINY

from benchmarks.files import load_json, load_tensors
from benchmarks.quality import gpu, search
from benchmarks.quality.corrections import Gain
from benchmarks.quality.objectives import Plain, SkipStep
from benchmarks.quality.presets import arm
from benchmarks.quality.statistics import Cell


def shrunk(preset):
    """The same arms and seeds on digits, few steps and images."""
    tiny = replace(
        preset, data=TINY.data, network=TINY.network, features=TINY.features, samples=16,
        sample_batch=16, budget=replace(TINY.budget, branch_at=None), workers=1,
    )  # fmt: skip
    few = tuple(replace(one, steps=one.steps[:1]) for one in tiny.arms[:4])
    return replace(tiny, arms=few)


@pytest.mark.parametrize("part", gpu.PARTS[:4], ids=lambda part: part.name)
def test_each_part_writes_its_record(part, tmp_path):
    small = replace(part, preset=shrunk(part.preset))
    said = gpu.do(small, tmp_path, None)
    record = load_json(tmp_path / f"{part.name}.json")
    cells = sum(len(one.samplers) for one in small.preset.arms) * len(part.preset.seeds)
    assert len(record["rows"]) == cells
    assert said == f"{part.name}: complete; {cells} cells in {tmp_path / part.name}.json"
    assert (tmp_path / "weights").exists() == part.keep_weights


def test_the_plan_asks_what_it_says():
    first, loss, _, flow, last = gpu.PARTS
    assert first.preset.seeds == last.preset.seeds == (1,)
    assert loss.preset.budget.branch_at is None
    assert {one.method.objective for one in loss.preset.arms} == {SkipStep(49)}
    assert flow.preset.path == "flow"
    assert Gain(0.05) in {one.method.correction for one in flow.preset.arms}
    assert last.searches == (Cell("ddim", 10), Cell("unipc", 10))
    # The search finds the first part's network in that part's folder.
    for key in ("data", "network", "budget", "samples", "features"):
        assert last.preset.settings[key] == first.preset.settings[key]


def test_a_part_that_takes_too_long_stops_and_goes_on(tmp_path, monkeypatch):
    part = gpu.Part(
        "made", "of a test", replace(ONE_ARM, arms=(arm(Plain(), None, ("ddim",), (2,)),))
    )

    def slow(*_, **__):
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "run", slow)
        assert "stopped after 1 seconds; the same command goes on; 0 cells" in gpu.do(
            part, tmp_path, None, seconds=1
        )
    assert "complete; 1 cells" in gpu.do(part, tmp_path, None)


def test_the_search_is_asked_in_the_first_parts_folder(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu, "search", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(gpu, "run", lambda *_, **__: None)
    gpu.do(gpu.PARTS[-1], tmp_path, None)
    assert [(root, seed, cell) for _, root, seed, cell, _ in asked] == [
        (tmp_path / gpu.PARTS[0].name, 1, cell) for cell in gpu.PARTS[-1].searches
    ]
    assert search.SAMPLES > 0


def test_weights_are_kept_in_small_files(tmp_path):
    draw = torch.Generator().manual_seed(0)
    weights = {f"layer{n}": torch.randn(100, 10, generator=draw) for n in range(5)}
    weights["count"] = torch.tensor([3])
    torch.save(weights, tmp_path / "weights.pt")
    gpu.save_in_parts(tmp_path / "weights.pt", tmp_path / "kept", size=4500)
    files = sorted((tmp_path / "kept").iterdir())
    assert [len(load_tensors(path)) for path in files] == [2, 2, 2]
    found = gpu.load_from_parts(tmp_path / "kept")
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-8, atol=0)
        assert found[name].dtype == tensor.dtype
