"""Objective x seed -> one trained network -> sampler x steps -> one JSON file per cell.

The folder of a run:

    settings.json                              what all cells depend on
    features.pt                                the feature network
    floor.json                                 distances between halves of the data
    models/<objective>/seed<n>/                weights.pt, training.json; checkpoint.pt meanwhile
    cells/<method>/seed<n>/<sampler>-<steps>.json    one result, and .pt with its first samples

Each file appears whole or not at all, and whatever is there is not done again; so a run that was
killed goes on where it was by being started again.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.quality import data as datasets
from benchmarks.quality.files import load_json, load_tensors, save_json, save_tensors
from benchmarks.quality.metrics import FeatureDistances, noise_floor
from benchmarks.quality.objectives import Method, Objective
from benchmarks.quality.presets import Arm, Preset
from benchmarks.quality.samplers import sample
from benchmarks.quality.streams import Purpose, generator
from benchmarks.quality.training import train
from s2dm_loss import NoiseSchedule

KEPT_SAMPLES = 32
PACKAGES = ("s2dm-loss", "torch", "diffusers", "accelerate", "torchmetrics", "scikit-learn")
BACKWARD_COST = 2
"""A backward pass costs about two forward passes; progress is counted in forward passes."""

Advance = Callable[[float], object]


@dataclass(frozen=True)
class Job:
    """One arm at one seed: a training, unless it is done, and its cells."""

    arm: Arm
    seed: int

    def cells(self) -> Iterator[tuple[str, int]]:
        """Yield (sampler, steps)."""
        yield from itertools.product(self.arm.samplers, self.arm.steps)


@dataclass(frozen=True)
class Layout:
    """Where a run keeps its files."""

    root: Path

    def model(self, objective: Objective, seed: int) -> Path:
        """Return the folder of one training run."""
        return self.root / "models" / objective.name / f"seed{seed}"

    def cell(self, method: Method, seed: int, sampler: str, steps: int) -> Path:
        """Return the file of one result."""
        return self.root / "cells" / method.name / f"seed{seed}" / f"{sampler}-{steps}.json"


def jobs(preset: Preset) -> list[Job]:
    """Return all jobs, the most important first: every seed of an arm before the next arm."""
    return [Job(arm, seed) for arm in preset.arms for seed in preset.seeds]


def _no_progress(amount: float) -> None:
    """Tell nobody."""


def versions() -> dict[str, str | None]:
    """Return what a result depends on besides its settings."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607 - wherever git is
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    found["commit"] = git.stdout.strip() or None
    return found


def check_settings(preset: Preset, root: Path) -> None:
    """Claim a folder for a preset's settings.

    Raises:
        ValueError: If the folder holds results made with other settings.
    """
    path = root / "settings.json"
    settings = preset.settings
    if not path.exists():
        save_json(path, settings)
        return
    stored = load_json(path)
    differing = [key for key in settings if stored.get(key) != settings[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"out: {root} holds results of other settings ({', '.join(differing)}): {key} is "
            f"{stored.get(key)!r} there and {settings[key]!r} here; choose another folder"
        )


class Bench:
    """A preset's data, schedule, features and folder, and what is done with them."""

    def __init__(self, preset: Preset, root: Path, data_folder: Path | None = None) -> None:
        """Load the data and make the feature network."""
        self.preset = preset
        self.layout = Layout(root)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.schedule = NoiseSchedule.linear(1000)
        self.data = datasets.load(preset.data, data_folder)
        with self.accelerator.main_process_first():
            network = preset.features.build(self.data, root, self.accelerator.device)
        self.features = network
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        self.distances = FeatureDistances(network, self.data.reference[share])
        self.versions = versions()
        real = datasets.to_model_range(self.data.reference).double()
        self.data_spread = float(real.std(0).mean())

    def floor(self) -> dict[str, Any]:
        """Return the distances between sets of real images; measured once."""
        path = self.layout.root / "floor.json"
        if not path.exists():
            held_out, samples = self.data.held_out, self.preset.samples
            floor = noise_floor(self.features, self.data.images, held_out, samples)
            save_json(path, {"features": self.features.description, **floor})
        stored: dict[str, Any] = load_json(path)
        return stored

    def model(self, objective: Objective, seed: int, advance: Advance) -> nn.Module:
        """Return a trained network, trained here if it is not yet."""
        folder = self.layout.model(objective, seed)
        folder.mkdir(parents=True, exist_ok=True)
        cost = training_cost(self.preset, objective) / self.preset.budget.steps
        # Two workers may want the same network: the second waits, and loads it. The processes of
        # `accelerate launch` train one network together.
        alone = self.accelerator.num_processes == 1
        with FileLock(folder / "lock") if alone else nullcontext():
            return train(
                objective,
                seed,
                data=self.data,
                schedule=self.schedule,
                network=self.preset.network,
                budget=self.preset.budget,
                folder=folder,
                accelerator=self.accelerator,
                progress=lambda steps: advance(steps * cost),
            )

    def do(self, job: Job, advance: Advance = _no_progress) -> None:
        """Do whatever of a job is not done."""
        method, seed = job.arm.method, job.seed
        missing = [
            cell for cell in job.cells() if not self.layout.cell(method, seed, *cell).exists()
        ]
        if not missing:
            return
        model = self.model(method.objective, seed, advance)
        if method.correction is not None:
            model = method.correction.apply(model, self.schedule).to(self.accelerator.device)
        for sampler, steps in missing:
            self._measure(model, method, seed, sampler, steps)
            advance(self.preset.samples * steps)

    def _measure(
        self, model: nn.Module, method: Method, seed: int, sampler: str, steps: int
    ) -> None:
        path = self.layout.cell(method, seed, sampler, steps)
        began = time.perf_counter()
        samples = self._samples(model, seed, sampler, steps, path.with_suffix(""))
        sampled = time.perf_counter()
        saved = samples if samples.dtype == torch.uint8 else datasets.to_uint8(samples)
        result: dict[str, Any] = {
            "method": method.name,
            "title": method.title,
            "seed": seed,
            "sampler": sampler,
            "steps": steps,
            "samples": self.preset.samples,
            "images": asdict(self.distances.compare(saved)),
        }
        if samples.is_floating_point():
            result["raw"] = asdict(self.distances.compare(samples))
        result |= {
            "spread": self._spread(samples) / self.data_spread,
            "sampling_seconds": round(sampled - began, 2),
            "metric_seconds": round(time.perf_counter() - sampled, 2),
            "settings": self.preset.settings,
            "versions": self.versions,
        }
        if self.accelerator.is_main_process:
            save_tensors(path.with_suffix(".pt"), {"samples": saved[:KEPT_SAMPLES].cpu()})
            save_json(path, result)
            for part in path.with_suffix("").glob("*.pt"):
                part.unlink()
            if path.with_suffix("").is_dir():
                path.with_suffix("").rmdir()
        self.accelerator.wait_for_everyone()

    def _samples(
        self, model: nn.Module, seed: int, sampler: str, steps: int, partial: Path
    ) -> Tensor:
        """Return this process's share of the samples.

        Where there are several batches each is kept in ``partial`` until the cell is done, since
        at 1000 steps a cell takes hours.
        """
        size, total = self.preset.sample_batch, self.preset.samples
        counts = [min(size, total - first) for first in range(0, total, size)]
        accelerator = self.accelerator
        if len(counts) < accelerator.num_processes:
            raise ValueError(
                f"samples: expected at least one batch of {size} for each of the "
                f"{accelerator.num_processes} processes, got {len(counts)} in all"
            )
        mine = range(accelerator.process_index, len(counts), accelerator.num_processes)
        batches = []
        for part in mine:
            path = partial / f"{part}.pt"
            if path.exists():
                batches.append(load_tensors(path)["samples"])
                continue
            start = torch.randn(
                counts[part], *self.data.shape, generator=generator(seed, Purpose.START, part)
            )
            noise = generator(seed, Purpose.SAMPLER, part)
            x = sample(model, sampler, self.schedule, steps, start.to(accelerator.device), noise)
            x = x.cpu() if self.features.takes_floats else datasets.to_uint8(x).cpu()
            if len(counts) > 1:
                save_tensors(path, {"samples": x})
            batches.append(x)
        return torch.cat(batches)

    def _spread(self, samples: Tensor) -> float:
        """Return the standard deviation over samples, averaged over pixels."""
        values = samples if samples.is_floating_point() else datasets.to_model_range(samples)
        values = values.double()
        sums = torch.stack([torch.full_like(values[0], len(values)), values.sum(0)])
        sums = torch.cat([sums, values.square().sum(0, keepdim=True)])
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.accelerator.device), "sum").cpu()
        count, first, second = sums
        variance = (second - first.square() / count) / (count - 1)
        return float(variance.sqrt().mean())


def training_cost(preset: Preset, objective: Objective) -> float:
    """Return a training's cost in forward passes of one image."""
    budget = preset.budget
    return budget.steps * budget.batch_size * objective.model_calls * (1 + BACKWARD_COST)


@dataclass(frozen=True)
class Plan:
    """What is left to do.

    Attributes:
        trainings: Networks to train, those that are under way included.
        network_steps: Steps of a network left, forward and backward.
        cells: Results to make.
        sampling_calls: Calls of a network for a batch of ``samples``.
        cost: Everything, in forward passes of one image.
        done: What is done already, in the same unit.
    """

    trainings: int
    network_steps: int
    cells: int
    sampling_calls: int
    cost: float
    done: float


def plan(preset: Preset, root: Path) -> Plan:
    """Return what a run would have to do; reads the folder and starts nothing."""
    layout = Layout(root)
    trainings = network_steps = cells = sampling_calls = 0
    cost = done = 0.0
    seen = set()
    for job in jobs(preset):
        method, seed = job.arm.method, job.seed
        if (method.objective, seed) not in seen:
            seen.add((method.objective, seed))
            folder = layout.model(method.objective, seed)
            whole = training_cost(preset, method.objective)
            left = 0 if (folder / "training.json").exists() else preset.budget.steps
            if left and (folder / "checkpoint.pt").exists():
                left -= load_tensors(folder / "checkpoint.pt")["step"]
            trainings += left > 0
            network_steps += left * method.objective.model_calls
            cost += whole * left / preset.budget.steps
            done += whole * (1 - left / preset.budget.steps)
        for sampler, steps in job.cells():
            if layout.cell(method, seed, sampler, steps).exists():
                done += preset.samples * steps
            else:
                cells += 1
                sampling_calls += steps
                cost += preset.samples * steps
    return Plan(trainings, network_steps, cells, sampling_calls, cost, done)


def estimate(preset: Preset, todo: Plan, data_folder: Path | None = None) -> float:
    """Return the seconds that one process would need for a plan, from a few steps and calls."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = datasets.load(preset.data, data_folder).shape
    model = preset.network.build(shape).to(device)
    schedule = NoiseSchedule.linear(1000)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images = torch.randn(preset.budget.batch_size, *shape, device=device)
    times = torch.zeros(len(images), dtype=torch.long, device=device)
    start = torch.randn(min(preset.sample_batch, preset.samples), *shape, device=device)

    def one_step() -> None:
        model(images, times).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def one_call() -> None:
        sample(model, "ddim", schedule, 1, start, torch.Generator())

    threads = torch.get_num_threads()
    if preset.workers > 1:
        torch.set_num_threads(1)
    try:
        per_step = _seconds(one_step, device)
        per_image = _seconds(one_call, device) / len(start)
    finally:
        torch.set_num_threads(threads)
    return todo.network_steps * per_step + todo.sampling_calls * preset.samples * per_image


def _seconds(action: Callable[[], None], device: torch.device, repeats: int = 5) -> float:
    action()
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def run(preset: Preset, root: Path, *, workers: int = 1, data_folder: Path | None = None) -> None:
    """Do all jobs of a preset that are not done.

    Args:
        preset: The experiment.
        root: The run's folder.
        workers: Processes that share the jobs, each with one thread; 1 for a GPU and under
            ``accelerate launch``.
        data_folder: Where a local data set lies.

    Raises:
        ValueError: If the folder holds results of other settings, or workers and
            ``accelerate launch`` are combined.
        RuntimeError: If another run is at work in the folder.
    """
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if workers > 1 and distributed:
        raise ValueError(f"workers: expected 1 under `accelerate launch`, got {workers}")
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / "lock")
    first = int(os.environ.get("RANK", "0")) == 0
    try:
        if first:
            lock.acquire(timeout=0)
    except Timeout as error:
        raise RuntimeError(f"out: another run is at work in {root}") from error
    try:
        if first:
            check_settings(preset, root)
        todo = plan(preset, root)
        if workers > 1:
            torch.set_num_threads(1)
        # Built before any worker, which then find the feature network in its file.
        bench = Bench(preset, root, data_folder)
        if first:
            bench.floor()
        with tqdm(
            total=(todo.cost + todo.done) / 1e6,
            initial=todo.done / 1e6,
            desc=preset.name,
            smoothing=0,  # two processes report in bursts
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=not first,
        ) as bar:
            if workers == 1:
                for job in jobs(preset):
                    bar.set_postfix_str(f"{job.arm.method.name}, seed {job.seed}")
                    bench.do(job, _Batched(lambda cost: bar.update(cost / 1e6)))
            else:
                _share(preset, root, data_folder, workers, bar)
    finally:
        lock.release()


class _Batched:
    """Passes progress on about four times a second, so that counting costs nothing."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.pending = 0.0
        self.last = time.monotonic()

    def __call__(self, cost: float) -> None:
        self.pending += cost
        now = time.monotonic()
        if now - self.last > 0.25:
            self.advance(self.pending)
            self.pending, self.last = 0.0, now


_bench: Bench | None = None
_advance: Advance = _no_progress


def _start_worker(preset: Preset, root: Path, data_folder: Path | None, queue: Any) -> None:
    global _bench, _advance
    torch.set_num_threads(1)
    _bench = Bench(preset, root, data_folder)
    _advance = _Batched(queue.put)


def _work(job: Job) -> str:
    if _bench is None:
        raise RuntimeError("the worker has not been started")
    _bench.do(job, _advance)
    return f"{job.arm.method.name}, seed {job.seed}"


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
            bar.update(cost / 1e6)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        with ProcessPoolExecutor(
            workers, context, _start_worker, (preset, root, data_folder, queue)
        ) as pool:
            futures = [pool.submit(_work, job) for job in jobs(preset)]
            try:
                for future in as_completed(futures):
                    bar.set_postfix_str(f"last: {future.result()}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        queue.put(None)
        listener.join()


def collect(preset: Preset, root: Path) -> dict[str, Any]:
    """Return all results of a run, in one compact record.

    A row is [method, seed, sampler, steps, raw Fréchet, raw kernel, Fréchet of the images, kernel
    of the images, spread], with None where a feature network takes no raw samples.
    """
    layout = Layout(root)
    rows: list[list[Any]] = []
    titles: dict[str, str] = {}
    trainings: dict[str, dict[str, Any]] = {}
    versions_seen: dict[str, str | None] = {}
    commits: dict[str, None] = {}  # a run that was resumed may have several; in order, once each
    for job in jobs(preset):
        method, seed = job.arm.method, job.seed
        record = layout.model(method.objective, seed) / "training.json"
        if record.exists():
            training = load_json(record)
            if len(preset.seeds) > 1:
                # The curves of a whole grid would be most of its record.
                del training["curve"]
            trainings.setdefault(method.objective.name, {})[str(seed)] = training
        for sampler, steps in job.cells():
            path = layout.cell(method, seed, sampler, steps)
            if not path.exists():
                continue
            cell = load_json(path)
            titles[method.name] = cell["title"]
            versions_seen = cell["versions"]
            commits[versions_seen["commit"] or "unknown"] = None
            distances = [
                round(cell[kind][key], 6) if kind in cell else None
                for kind in ("raw", "images")
                for key in ("frechet", "kernel")
            ]
            rows.append([method.name, seed, sampler, steps, *distances, round(cell["spread"], 5)])
    floor = root / "floor.json"
    return {
        "preset": preset.name,
        "settings": preset.settings,
        "versions": {**versions_seen, "commit": ", ".join(commits) or None},
        "floor": load_json(floor) if floor.exists() else None,
        "paper": preset.paper,
        "titles": titles,
        "columns": [
            "method", "seed", "sampler", "steps",
            "raw_frechet", "raw_kernel", "images_frechet", "images_kernel", "spread",
        ],
        "rows": rows,
        "trainings": trainings,
    }  # fmt: skip
