"""The search of a preset: kept, judged on noise of its own, and on the page."""

from dataclasses import replace

import pytest
import torch
from quality_tools import ONE_ARM

import benchmarks.quality.search as searching
from benchmarks.files import load_json
from benchmarks.quality import data as datasets
from benchmarks.quality.record import collect
from benchmarks.quality.runner import Bench, run
from benchmarks.quality.samplers import sample
from benchmarks.quality.search import search
from benchmarks.quality.streams import Purpose, generator
from s2dm_loss import CorrectionSearch
from s2dm_loss.sampling import StartScaling


def test_a_search_is_kept_and_judged_on_noise_of_its_own(tmp_path, monkeypatch):
    preset = replace(ONE_ARM, samples=48, sample_batch=32)
    run(preset, tmp_path)
    asked = []

    def small(*args, **settings):
        asked.append(settings["num_samples"])
        return CorrectionSearch(*args, **{**settings, "num_samples": 64})

    far = StartScaling((1.5, 3.0))  # from no correction
    monkeypatch.setattr(searching, "CorrectionSearch", small)
    monkeypatch.setattr(searching, "standard_corrections", lambda *_, **__: (far,))
    found = search(preset, tmp_path, 0, ["ddim"], 2)
    assert asked == [searching.SAMPLES]
    assert "5 x 32 samples to choose" in found["cost"]

    bench = Bench(preset, tmp_path)
    start = torch.randn(48, *bench.data.shape, generator=generator(0, Purpose.START, 1_000))
    model = bench.model(ONE_ARM.arms[0].method.objective, 0, lambda _: None)

    def distance(noise):
        images = sample(model, "ddim", bench.path.schedule, 2, noise, torch.Generator())
        return bench.distances.compare(datasets.to_uint8(images)).frechet

    assert found["plain"] == pytest.approx(distance(start), rel=1e-3)
    *_, strength = found["recommended"].replace("none", "1").split()
    assert found["corrected"] == pytest.approx(distance(start * float(strength)), rel=1e-3)

    monkeypatch.setattr(searching, "Bench", None)  # all that follows reads the file
    assert search(preset, tmp_path, 0, ["ddim"], 2) == found
    assert load_json(tmp_path / "search-seed0-ddim-2.json") == found
    assert collect(preset, tmp_path)["searches"] == [found]
