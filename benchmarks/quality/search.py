"""What the library's search recommends for a trained network, judged on fresh noise.

Of one sampler it asks which correction, of several which pair of sampler and correction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.files import load_json, save_json
from benchmarks.quality import data as datasets
from benchmarks.quality.layout import check_settings, claimed
from benchmarks.quality.metrics import Distances
from benchmarks.quality.objectives import Plain
from benchmarks.quality.presets import Preset
from benchmarks.quality.runner import Bench
from benchmarks.quality.samplers import sample
from benchmarks.quality.streams import Purpose, generator
from s2dm_loss import CorrectionSearch
from s2dm_loss.sampling import standard_corrections

SAMPLES = 512
DATA_ROWS = 12_000
"""Samples of each candidate, and training images that the search is given."""


def search(
    preset: Preset,
    root: Path,
    seed: int,
    samplers: Sequence[str],
    steps: int,
    data_folder: Path | None = None,
) -> dict[str, Any]:
    """Ask `CorrectionSearch` about a preset's plain network, and judge what it says.

    The search sees training images and noise of its own; the judge compares samples from further
    noise with the preset's reference, as a cell is measured: of the first sampler with no
    correction, and of what is recommended. Kept in a file of the run's folder.
    """
    check_settings(preset, root)
    path = root / f"search-seed{seed}-{'-'.join(samplers)}-{steps}.json"
    if path.exists():
        return load_json(path)
    with claimed(preset, root):
        result = _searched(Bench(preset, root, data_folder), seed, samplers, steps)
        save_json(path, result)
        return result


def _searched(bench: Bench, seed: int, samplers: Sequence[str], steps: int) -> dict[str, Any]:
    bench.floor()  # which knows the data and the features that the folder is of
    bench.network.load_state_dict(bench.model(Plain(), seed).state_dict())
    noise = generator(seed, Purpose.SAMPLER)

    def run(sampler: str, network: nn.Module, start: Tensor) -> Tensor:
        network = bench.path.on_sampler(network)
        return sample(network, sampler, bench.path.schedule, steps, start, noise).clone()

    def features(samples: Tensor) -> Tensor:
        return bench.features(datasets.to_uint8(samples).to(bench.features.device))

    kind = bench.path.prediction_type
    model = bench.path.on_schedule(bench.network)
    question = CorrectionSearch(
        model,
        {name: partial(run, name) for name in samplers},
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

    def judged(sampler: str, network: nn.Module, change: Callable[[Tensor], Tensor]) -> Distances:
        batches = starts.split(bench.preset.sample_batch)
        images = [datasets.to_uint8(run(sampler, network, change(start))) for start in batches]
        return bench.distances.compare(torch.cat(images))

    plain = judged(samplers[0], model, torch.clone)
    corrected = judged(found.sampler, found.correct_model(model), found.correct_noise)
    return {
        "seed": seed,
        "samplers": list(samplers),
        "steps": steps,
        "sampler": found.sampler,
        "recommended": found.recommended.label,
        "cost": str(question.cost),
        "plain": plain.frechet,
        "corrected": corrected.frechet,
        "plain_kernel": plain.kernel,
        "corrected_kernel": corrected.kernel,
        "versions": bench.versions,
    }
