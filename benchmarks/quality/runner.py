"""Objective x seed -> one trained network -> sampler x steps -> one JSON file per cell."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.files import load_json, load_tensors, save_json, save_tensors
from benchmarks.provenance import versions
from benchmarks.quality import data as datasets
from benchmarks.quality.layout import FLOOR, REFERENCE, Layout, claimed
from benchmarks.quality.metrics import FeatureDistances, noise_floor
from benchmarks.quality.networks import default_device
from benchmarks.quality.objectives import Method, Objective, Plain
from benchmarks.quality.paths import PATHS
from benchmarks.quality.plan import Job, branching, jobs, plan, training_cost, training_steps
from benchmarks.quality.presets import Preset
from benchmarks.quality.samplers import sample
from benchmarks.quality.spectra import Frequencies
from benchmarks.quality.streams import Purpose, generator
from benchmarks.quality.training import kept_state, train

KEPT_SAMPLES = 36
"""Of each cell, a square of pictures."""

Advance = Callable[[float], object]


class Bench:
    """A preset's data, schedule, features and folder, and what is done with them."""

    def __init__(self, preset: Preset, root: Path, data_folder: Path | None = None) -> None:
        """Load the data and make the feature network."""
        self.preset, self.root, self.layout = preset, root, Layout.of(preset, root)
        self.device = default_device()
        self.path = PATHS[preset.path]().to(self.device)
        self.data = datasets.load(preset.data, data_folder)
        self.features = preset.features.build(self.data, root, self.device)
        self.distances = FeatureDistances(
            self.features, self.data.reference, cache=root / REFERENCE
        )
        self.versions = versions()
        # One network for all weights that are sampled with: it is compiled once.
        self.network = preset.network.build(self.data.shape).to(self.device)
        self.network.eval().requires_grad_(False)
        real = datasets.to_model_range(self.data.reference).double()
        self.data_spread = float(real.std(0).mean())
        self.frequencies = Frequencies(self.data.shape[-1]).double()
        self.data_band_spreads = self._band_spreads(real)

    def floor(self) -> dict[str, Any]:
        """Return the distances between sets of real images; measured once."""
        path, digest = self.root / FLOOR, self.data.digest
        if not path.exists():
            compared = self.data.images, self.data.held_out, self.preset.samples
            floor = noise_floor(self.features, *compared, cache=self.root / REFERENCE)
            save_json(path, {"features": self.features.description, "data": digest, **floor})
        stored: dict[str, Any] = load_json(path)
        if stored["features"] != self.features.description:
            raise ValueError(
                f"features: the folder's distances are of {stored['features']}, this machine's "
                f"would be of {self.features.description}; take a new folder"
            )
        for floor_of in dict.fromkeys((path, self.layout.networks / FLOOR)):
            if floor_of.exists() and load_json(floor_of).get("data") != digest:
                raise ValueError(
                    f"data: {floor_of.parent} is of other images than these {len(self.data)} of "
                    f"{self.data.name}; take a new folder"
                )
        return stored

    def model(
        self, objective: Objective, seed: int, advance: Advance = lambda _: None
    ) -> nn.Module:
        """Return a trained network, trained here if it is not yet."""
        folder = self.layout.model(objective, seed)
        folder.mkdir(parents=True, exist_ok=True)
        cost = training_cost(self.preset, objective) / training_steps(self.preset, objective)
        branch = None
        if (share := branching(self.preset, objective)) is not None:
            self.model(Plain(), seed, advance)
            branch = kept_state(self.layout.model(Plain(), seed), round(100 * share))
        # Two workers may want the same network: the second waits, and loads it.
        with FileLock(folder / "lock"):
            return train(
                objective,
                seed,
                data=self.data,
                path=self.path,
                network=self.preset.network,
                budget=self.preset.budget,
                folder=folder,
                device=self.device,
                branch=branch,
                progress=lambda steps: advance(steps * cost),
            )

    def do(self, job: Job, advance: Advance = lambda _: None) -> None:
        """Do whatever of a job is not done."""
        method, seed = job.arm.method, job.seed
        paths = {cell: self.layout.cell(method, seed, *cell) for cell in job.cells()}
        missing = [cell for cell, path in paths.items() if not path.exists()]
        for cell in paths.keys() - set(missing):
            shutil.rmtree(paths[cell].with_suffix(""), ignore_errors=True)
        if not missing:
            return
        self.network.load_state_dict(self.model(method.objective, seed, advance).state_dict())
        for sampler, steps in missing:
            self._measure(method, seed, sampler, steps)
            advance(self.preset.samples * steps)

    def _measure(self, method: Method, seed: int, sampler: str, steps: int) -> None:
        path = self.layout.cell(method, seed, sampler, steps)
        model = self.network
        if method.correction is not None:
            model = method.correction.apply(model, self.path).to(self.device)
        samples = self._samples(model, seed, sampler, steps, path.with_suffix(""))
        saved = datasets.to_uint8(samples) if samples.is_floating_point() else samples
        values = datasets.to_model_range(samples).double()
        result: dict[str, Any] = {
            "method": method.name,
            "title": method.title,
            "seed": seed,
            "sampler": sampler,
            "steps": steps,
            "samples": self.preset.samples,
            "images": asdict(self.distances.compare(saved)),
            "spread": float(values.std(0).mean()) / self.data_spread,
            "band_spreads": (self._band_spreads(values) / self.data_band_spreads).tolist(),
            "settings": self.preset.settings,
            "versions": self.versions,
        }
        if samples.is_floating_point():
            result["raw"] = asdict(self.distances.compare(samples))
        save_tensors(path.with_suffix(".pt"), {"samples": saved[:KEPT_SAMPLES].clone()})
        save_json(path, result)
        shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # its batches

    def _samples(
        self, model: nn.Module, seed: int, sampler: str, steps: int, partial: Path
    ) -> Tensor:
        """Return the samples.

        Where there are several batches each is kept in `partial` until the cell is done, since
        at 1000 steps a cell takes hours.
        """
        size, total = self.preset.sample_batch, self.preset.samples
        counts = [min(size, total - first) for first in range(0, total, size)]
        batches = []
        for part, count in enumerate(counts):
            path = partial / f"{part}.pt"
            if path.exists():
                batches.append(load_tensors(path)["samples"])
                continue
            draw = generator(seed, Purpose.START, part)
            start = torch.randn(count, *self.data.shape, generator=draw).to(self.device)
            noise = generator(seed, Purpose.SAMPLER, part)
            x = sample(model, sampler, self.path.schedule, steps, start, noise).cpu()
            batches.append(x if self.features.takes_floats else datasets.to_uint8(x))
            if len(counts) > 1:
                save_tensors(path, {"samples": batches[-1]})
        return torch.cat(batches)

    def _band_spreads(self, values: Tensor) -> Tensor:
        """Return the standard deviation in each octave of frequencies."""
        found = self.frequencies.coordinates(values).var(0).mean(0).flatten()
        bands = self.frequencies.bands.flatten()
        return (bands.bincount(found) / bands.bincount()).sqrt()


def run(preset: Preset, root: Path, *, workers: int = 1, data_folder: Path | None = None) -> None:
    """Do all jobs of a preset that are not done, in processes of one thread each if several.

    Raises:
        ValueError: If the folder is a file, holds results of other settings, or is in use.
        OSError: If something cannot be written; what is done is kept.
    """
    with claimed(preset, root):
        todo = plan(preset, root)
        if workers > 1:
            torch.set_num_threads(1)
        # Built before any worker, which then find the feature network in its file.
        bench = Bench(preset, root, data_folder)
        bench.floor()
        with tqdm(
            total=todo.cost + todo.done,
            initial=todo.done,
            desc=preset.name,
            smoothing=0,  # two processes report in bursts
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        ) as bar:
            if workers == 1:
                for job in jobs(preset):
                    bar.set_postfix_str(job.name)
                    bench.do(job, bar.update)
            else:
                _share(preset, root, data_folder, workers, bar)


class _Batched:
    """Passes progress on about four times a second, so that counting costs nothing."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.pending, self.last = 0.0, time.monotonic()

    def __call__(self, cost: float) -> None:
        self.pending += cost
        if time.monotonic() - self.last > 0.25:
            self.flush()

    def flush(self) -> None:
        """Pass on what is left."""
        self.advance(self.pending)
        self.pending, self.last = 0.0, time.monotonic()


_worker: tuple[Bench, _Batched]


def _start_worker(preset: Preset, root: Path, data_folder: Path | None, queue: Any) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process sees to its end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker = Bench(preset, root, data_folder), _Batched(queue.put)


def _end_with_parent() -> None:
    """End this process when the one that started it has died, lest it keep its locks for good."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> str:
    bench, advance = _worker
    bench.do(job, advance)
    advance.flush()
    return job.name


def _share(
    preset: Preset, root: Path, data_folder: Path | None, workers: int, bar: tqdm[Any]
) -> None:
    """Let several single-threaded processes do the jobs.

    A tiny network gains nothing from a second thread, and twice the work from a second process.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()

    def listen() -> None:
        while (cost := queue.get()) is not None:
            bar.update(cost)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (preset, root, data_folder, queue))
    try:
        futures = [pool.submit(_work, job) for job in jobs(preset)]
        for future in as_completed(futures):
            bar.set_postfix_str(f"last: {future.result()}")
    except BaseException:
        # Not later than now: a job can take hours, and the next run does what this one left. The
        # queue is left alone, since a process that is ended may hold its lock.
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    pool.shutdown()
    queue.put(None)
    listener.join()
