"""What the library's search recommends for a trained network, judged on fresh noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.files import load_json, save_json
from benchmarks.quality import data as datasets
from benchmarks.quality.layout import check_settings, claimed
from benchmarks.quality.objectives import Plain
from benchmarks.quality.presets import Preset
from benchmarks.quality.runner import Bench
from benchmarks.quality.samplers import sample
from benchmarks.quality.statistics import Cell
from benchmarks.quality.streams import Purpose, generator
from s2dm_loss import CorrectionSearch
from s2dm_loss.sampling import standard_corrections

SAMPLES = 512
DATA_ROWS = 12_000
"""Samples of each candidate, and training images that the search is given."""


def search(
    preset: Preset, root: Path, seed: int, cell: Cell, data_folder: Path | None = None
) -> dict[str, Any]:
    """Ask `CorrectionSearch` about a preset's plain network, and judge what it says.

    The search sees training images and noise of its own; the judge compares samples from further
    noise with the preset's reference, as a cell is measured.  Kept in a file of the run's folder.
    """
    check_settings(preset, root)
    path = root / f"search-seed{seed}-{cell.sampler}-{cell.steps}.json"
    if path.exists():
        stored: dict[str, Any] = load_json(path)
        return stored
    with claimed(preset, root):
        result = _searched(Bench(preset, root, data_folder), seed, cell)
        save_json(path, result)
        return result


def _searched(bench: Bench, seed: int, cell: Cell) -> dict[str, Any]:
    bench.floor()  # which knows the data and the features that the folder is of
    bench.network.load_state_dict(bench.model(Plain(), seed).state_dict())
    noise = generator(seed, Purpose.SAMPLER)

    def run(network: nn.Module, start: Tensor) -> Tensor:
        network = bench.path.on_sampler(network)
        return sample(network, cell.sampler, bench.path.schedule, cell.steps, start, noise).clone()

    def features(samples: Tensor) -> Tensor:
        found: Tensor = bench.features(datasets.to_uint8(samples).to(bench.features.device))
        return found

    kind = bench.path.prediction_type
    model = bench.path.on_schedule(bench.network)
    question = CorrectionSearch(
        model,
        run,
        datasets.to_model_range(bench.data.images[:DATA_ROWS]),
        standard_corrections(bench.path.schedule, prediction_type=kind),
        features=features,
        num_samples=SAMPLES,
        batch_size=256,
        seed=seed,
    )
    tqdm.write(str(question.cost))
    found = question.recommend(tqdm)
    draw = generator(seed, Purpose.START, 1_000)
    starts = torch.randn(bench.preset.samples, *bench.data.shape, generator=draw)

    def judged(corrected: bool) -> float:
        network = found.correct_model(model) if corrected else model
        change = found.correct_noise if corrected else torch.clone
        batches = starts.split(bench.preset.sample_batch)
        images = [datasets.to_uint8(run(network, change(start))) for start in batches]
        return bench.distances.compare(torch.cat(images)).frechet

    return {
        "seed": seed,
        "sampler": cell.sampler,
        "steps": cell.steps,
        "recommended": found.recommended.label,
        "cost": str(question.cost),
        "plain": judged(corrected=False),
        "corrected": judged(corrected=True),
    }
