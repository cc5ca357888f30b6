import shutil
from dataclasses import replace
from unittest.mock import DEFAULT, Mock, patch

import pytest
import torch
from quality_tools import KILLED, ONE_ARM, TINY, stopped_at, what_was_made

import benchmarks.quality.search as searching
from benchmarks.files import load_json, load_tensors, save_json
from benchmarks.quality import data as datasets
from benchmarks.quality import runner
from benchmarks.quality.corrections import Gain
from benchmarks.quality.data import load_digits, to_model_range, to_uint8
from benchmarks.quality.networks import SpectralUNetSpec, UNetSpec
from benchmarks.quality.objectives import MinSNR, Plain, SkipStep
from benchmarks.quality.plan import jobs, plan, training_steps
from benchmarks.quality.presets import PRESETS, arm
from benchmarks.quality.record import collect
from benchmarks.quality.report import keep, write_report
from benchmarks.quality.runner import Bench, run
from benchmarks.quality.samplers import sample
from benchmarks.quality.streams import Purpose, generator
from s2dm_loss import gain
from s2dm_loss.sampling import StartScaling


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    run(TINY, root)
    return root


def test_every_cell_has_its_result(finished):
    assert len(list(finished.glob("cells/**/*.json"))) == 2 * (4 + 4 + 1)
    cell = load_json(finished / "cells/plain/seed0/ddim-2.json")
    assert cell["settings"] == TINY.settings
    assert cell["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    kept = load_tensors(finished / "cells/plain/seed0/ddim-2.pt")["samples"]
    assert (kept.shape, kept.dtype) == ((36, 1, 8, 8), torch.uint8)
    assert kept.untyped_storage().nbytes() == kept.numel()  # and not all samples behind a view
    assert not list(finished.glob("models/**/checkpoint.pt"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")
def test_a_run_on_a_gpu(tmp_path, monkeypatch):
    """The same numbers as on a CPU, but for rounding: the same images, noise and first weights."""
    network = SpectralUNetSpec(UNetSpec(8, (1, 2), blocks=1, attention_at=()), fast=False)
    budget = replace(TINY.budget, keep_at=(0.5,), branch_at=0.5)
    arms = (*KILLED.arms, arm(Plain(), Gain(99), ("ddim", "unipc", "pndm"), (4,)))
    for device in ("cuda", "cpu"):
        monkeypatch.setenv("S2DM_DEVICE", device)
        run(replace(KILLED, network=network, budget=budget, arms=arms), tmp_path / device)
    training = load_json(tmp_path / "cuda/models/plain/seed0/training.json")
    assert training["device"] == torch.cuda.get_device_name()
    for cell in ("plain/seed0/ddim-4", "plain+gain99/seed0/ddim-4", "plain+gain99/seed0/unipc-4"):
        paths = (tmp_path / device / f"cells/{cell}.json" for device in ("cuda", "cpu"))
        there, here = (load_json(path)["spread"] for path in paths)
        assert there == pytest.approx(here, rel=0.02), cell


@pytest.mark.parametrize(("name", "factor"), [("plain", None), ("plain+gain99", gain)])
def test_a_cell_is_of_its_own_methods_samples(finished, name, factor):
    bench = Bench(TINY, finished)
    network = bench.model(Plain(), 0)
    table = torch.ones(1000) if factor is None else factor(bench.path.schedule, 99).float()
    start = torch.randn(64, 1, 8, 8, generator=generator(0, Purpose.START))

    def corrected(x, t):
        return table[t] * network(x, t)

    samples = sample(corrected, "ddim", bench.path.schedule, 2, start, torch.Generator())
    cell = load_json(finished / f"cells/{name}/seed0/ddim-2.json")
    data = to_model_range(load_digits().images)
    wanted = samples.std(0).mean() / data.std(0).mean()
    assert cell["spread"] == pytest.approx(float(wanted), rel=1e-4)
    # The first band is the mean of an image.
    means = [values.mean((1, 2, 3)).std() for values in (samples, data)]
    assert cell["band_spreads"][0] == pytest.approx(float(means[0] / means[1]), rel=1e-4)
    assert cell["raw"]["frechet"] == pytest.approx(bench.distances.compare(samples).frechet)
    saved = bench.distances.compare(to_uint8(samples))
    assert cell["images"]["frechet"] == pytest.approx(saved.frechet)


def test_samples_in_batches_that_are_kept_in_8_bits(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "cells/plain/seed0/ddim-2.json").unlink()
    bench = Bench(replace(TINY, sample_batch=20), tmp_path)
    bench.features.takes_floats = False
    for job in jobs(replace(TINY, seeds=(0,))):
        bench.do(job)
    network = bench.model(Plain(), 0)
    draws = [(n, generator(0, Purpose.START, part)) for part, n in enumerate([20, 20, 20, 4])]
    start = torch.cat([torch.randn(n, 1, 8, 8, generator=draw) for n, draw in draws])
    samples = sample(network, "ddim", bench.path.schedule, 2, start, torch.Generator())
    cell = load_json(tmp_path / "cells/plain/seed0/ddim-2.json")
    spread = float(to_model_range(load_digits().images).std(0).mean())
    saved = to_model_range(to_uint8(samples)).std(0).mean()
    assert cell["spread"] == pytest.approx(float(saved) / spread, rel=1e-4)
    assert abs(float(samples.std(0).mean()) / float(saved) - 1) > 0.01  # what the clamp takes
    assert "raw" not in cell


def test_samples_are_compared_with_what_is_held_out_by_one_kind_of_features(tmp_path, monkeypatch):
    digits = load_digits()
    split = replace(digits, images=digits.images[:1500], held_out=digits.images[1500:] // 2)
    monkeypatch.setattr(runner.datasets, "load", lambda *_: split)
    bench = Bench(TINY, tmp_path)
    assert bench.distances.compare(split.reference).frechet == pytest.approx(0, abs=1e-3)
    assert bench.distances.compare(split.images).frechet > 0.1
    spread = to_model_range(split.reference).std(0).mean()
    assert bench.data_spread == pytest.approx(float(spread), rel=1e-4)
    floor = bench.floor()
    assert (floor["images_each"], floor["reference"]) == (TINY.samples, 297)
    # And by the features of the folder: a processor without bfloat16 takes ImageNet's in float32.
    bench.features.description = "the same, rounded"
    with pytest.raises(ValueError, match="would be of the same, rounded"):
        bench.floor()


def test_what_is_there_is_not_done_again_and_what_is_lost_comes_back(finished):
    before = what_was_made(TINY, finished)
    with patch.multiple(runner, train=None, sample=None):
        run(TINY, finished)
    assert what_was_made(TINY, finished) == before
    for lost in ("seed1/deis-3", "seed0/ddim-2"):
        (finished / f"cells/plain/{lost}.json").unlink()
    assert plan(TINY, finished).cells == 2
    run(TINY, finished)
    assert what_was_made(TINY, finished) == before


def test_batches_of_a_killed_cell_are_kept(tmp_path, monkeypatch):
    batched = replace(ONE_ARM, sample_batch=20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(batched, whole)
    interrupted = Mock(wraps=sample, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt])
    monkeypatch.setattr(runner, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(batched, killed)
    interrupted.side_effect = None
    run(batched, killed)
    # Of the first cell's 20 + 20 + 20 + 4 images, the first two batches were not made again.
    calls = [len(call.args[4]) for call in interrupted.call_args_list]
    assert (calls[:5], len(calls)) == ([20, 20, 20, 20, 4], 1 + 4 * 4)
    assert what_was_made(batched, killed) == what_was_made(batched, whole)
    assert not list(killed.glob("cells/plain/seed0/*/"))


def test_a_preset_samples_the_networks_of_another(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "tiny")
    more = replace(ONE_ARM, name="more", samples=128, networks_of=TINY)
    assert plan(more, tmp_path / "more").trainings == 0
    run(more, tmp_path / "more")
    assert not (tmp_path / "more" / "models").exists()
    # The first batch starts from the same noise.
    paths = (tmp_path / name / "cells/plain/seed0/ddim-2.pt" for name in ("tiny", "more"))
    few, many = (load_tensors(path)["samples"] for path in paths)
    assert torch.equal(few, many)
    record = collect(more, tmp_path / "more")
    assert record["trainings"]["plain"]["0"]["steps"] == TINY.budget.steps
    assert {row[3] for row in record["rows"]} == {2, 3}


def test_networks_that_another_preset_is_to_have_are_trained_in_its_folder(tmp_path):
    more = replace(ONE_ARM, name="more", samples=128, networks_of=ONE_ARM)
    run(more, tmp_path / "more")
    assert load_json(tmp_path / "tiny/settings.json") == ONE_ARM.settings
    assert plan(ONE_ARM, tmp_path / "tiny").trainings == 0
    # Of other settings neither the run itself is taken for one's own nor its networks.
    longer = replace(ONE_ARM, budget=replace(TINY.budget, steps=13))
    said = r"tiny holds results of other settings \(budget\)"
    for other in (longer, replace(longer, name="other", networks_of=longer)):
        with pytest.raises(ValueError, match=said):
            run(other, tmp_path / other.name)
    assert not (tmp_path / "other").exists()


def test_what_branches_and_what_is_trained_from_the_start():
    preset = PRESETS["cifar10-wide-10k"]
    steps = {(o := one.method.objective): training_steps(preset, o) for one in preset.arms}
    branched = {SkipStep(9): 4_000, SkipStep(49): 4_000}
    assert steps == {Plain(): 16_000, MinSNR(): 16_000, **branched}


def test_progress_ends_at_its_total(tmp_path, monkeypatch):
    """And no rounding error beyond it, of which tqdm warns: from the start, and resumed."""
    ends = []

    class Bar(runner.tqdm):
        def close(self):
            ends.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(runner, "tqdm", Bar)
    stopped_at(TINY, tmp_path / "tiny", 5)
    for preset in (TINY, replace(ONE_ARM, name="more", samples=128, networks_of=TINY)):
        ends.clear()
        run(preset, tmp_path / preset.name)
        assert ends[0][0] == ends[0][1] > 0


def test_the_report(finished, tmp_path):
    text = write_report(TINY, finished)
    assert text == (finished / "table.md").read_text()
    record = load_json(finished / "results.json")
    assert record == collect(TINY, finished)
    cell = load_json(finished / "cells/skip9-expected/seed1/deis-3.json")
    row = next(r for r in record["rows"] if r[:4] == ["skip9-expected", 1, "deis", 3])
    assert row[4] == pytest.approx(cell["raw"]["frechet"], abs=1e-6)
    assert row[6] == pytest.approx(cell["images"]["frechet"], abs=1e-6)
    kept = load_json(keep(TINY, finished, tmp_path))
    for by_seed in record["trainings"].values():
        for training in by_seed.values():
            assert training.pop("curve")
    assert kept == record


def test_a_record_says_all_that_it_was_made_with(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    first = load_json(next(tmp_path.glob("models/*/*/training.json")))["versions"]
    for path, changed in (
        ("models/plain/seed1/training.json", {"torch": "9.8", "commit": "a"}),
        ("cells/skip9-expected/seed1/deis-3.json", {"torch": "9.9", "checkout_differed": True}),
    ):
        made = load_json(tmp_path / path)
        made["versions"] = {**first, "checkout_differed": False, **changed}
        save_json(tmp_path / path, made)
    versions = collect(TINY, tmp_path)["versions"]
    assert versions["torch"] == f"{first['torch']}, 9.8, 9.9"
    assert versions["commit"] == f"{first['commit']}, a"
    assert versions["checkout_differed"]
    assert versions["python"] == first["python"]


@pytest.mark.parametrize(("steps", "shown"), [((2, 3), True), ((3,), False)])
def test_a_column_that_lacks_cells(finished, tmp_path, steps, shown):
    """The picture shows the cells that every column has; before, the report was lost with it."""
    plain, gain_with_two_steps = replace(TINY.arms[0], steps=steps), TINY.arms[2]
    preset = replace(TINY, arms=(plain, gain_with_two_steps), columns=("plain", "plain+gain99"))
    ignored = shutil.ignore_patterns("*.png")
    shutil.copytree(finished, tmp_path, ignore=ignored, dirs_exist_ok=True)
    assert "| DDIM, 3 steps |" in write_report(preset, tmp_path)
    assert (tmp_path / "samples.png").exists() == shown
    # With one seed there are loss curves, and a correction has none.
    write_report(replace(preset, seeds=TINY.seeds[:1]), tmp_path)
    assert not (tmp_path / "loss.png").exists()


def test_other_data_are_not_mixed_into_a_folder(tmp_path, monkeypatch):
    run(ONE_ARM, tmp_path / "tiny")
    digits = load_digits()
    other = replace(digits, images=digits.images.flip(0))
    monkeypatch.setattr(runner.datasets, "load", lambda *_: other)
    sampling = replace(ONE_ARM, name="more", samples=32, networks_of=ONE_ARM)
    for preset in (replace(ONE_ARM, seeds=(1,)), sampling):
        with pytest.raises(ValueError, match=r"data: .*tiny is of other images than"):
            run(preset, tmp_path / preset.name)


@pytest.mark.parametrize("samplers", [["ddim"], ["ddim", "deis"]])
def test_a_search_is_kept_and_judged_on_noise_of_its_own(tmp_path, monkeypatch, samplers):
    preset = replace(ONE_ARM, samples=48, sample_batch=32)
    run(preset, tmp_path)
    far = StartScaling((1.5, 3.0))  # from no correction
    monkeypatch.setattr(searching, "SAMPLES", 64)
    monkeypatch.setattr(searching, "standard_corrections", lambda *_, **__: (far,))
    found = searching.search(preset, tmp_path, 0, samplers, 2)
    assert " x 64 samples to compare" in found["cost"]

    bench = Bench(preset, tmp_path)
    start = torch.randn(48, *bench.data.shape, generator=generator(0, Purpose.START, 1_000))
    model = bench.model(ONE_ARM.arms[0].method.objective, 0, lambda _: None)

    def distances(sampler, noise):
        images = sample(model, sampler, bench.path.schedule, 2, noise, torch.Generator())
        compared = bench.distances.compare(datasets.to_uint8(images))
        return pytest.approx([compared.frechet, compared.kernel], rel=1e-3)

    *_, strength = found["recommended"].replace("none", "1").split()
    corrected = distances(found["sampler"], start * float(strength))
    assert [found["plain"], found["plain_kernel"]] == distances("ddim", start)
    assert [found["corrected"], found["corrected_kernel"]] == corrected

    monkeypatch.setattr(searching, "Bench", None)  # all that follows reads the file
    assert searching.search(preset, tmp_path, 0, samplers, 2) == found
    assert load_json(tmp_path / f"search-seed0-{'-'.join(samplers)}-2.json") == found
    assert collect(preset, tmp_path)["searches"] == [found]
