"""The numbers of the page on monitoring.

The README's network learns the digits, on six of seven images; the rest are held out. Its loss is
logged by noise level, it is validated from time to time, and then three things are measured: how
much the validation loss varies with its seed, how much stratified times take from the batch loss,
and what an update costs.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks.provenance import machine, versions
from benchmarks.quality.data import load_digits, to_model_range
from benchmarks.quality.networks import MLPSpec
from s2dm_loss import NoiseSchedule, SkipStepLoss
from s2dm_loss.monitor import LossByNoise, validation_loss
from s2dm_loss.validation_result import ValidationLoss

SCHEDULE, SKIP = NoiseSchedule.linear(1000), 49
HELD_OUT, BATCH = 256, 128
CHECKED = (250, 500, 1000, 2000, 4000, 6000, 8000, 12_000)
EARLY = 500
SEEDS, DRAWS = 100, 2000


def measured() -> dict[str, Any]:
    """Train, and return the record."""
    torch.set_num_threads(1)
    torch.manual_seed(0)  # of the network's weights
    images = to_model_range(load_digits().images)
    images = images[torch.randperm(len(images), generator=_source(0))]
    held_out, images = images[:HELD_OUT], images[HELD_OUT:]
    model = MLPSpec(width=128, blocks=3).build((1, 8, 8))
    results, training = {}, []
    for step, by_noise in _trained(model, images):
        result = validation_loss(model, [held_out], SCHEDULE, skip_set=SKIP)
        results[step] = result
        training.append({"step": step, **by_noise})
        click.echo(f"{step}: {result.overall()}")
    return {
        "provenance": {**versions(), **machine(torch.device("cpu"))},
        "training": training,
        "validation": _compared(results),
        "levels": _levels(results),
        "variance": [_variance(model, held_out, levels) for levels in (4, 16)],
        "stratified": [_stratified(model, images, size) for size in (16, 128)],
        "update_microseconds": _cost(),
    }


def _source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _trained(model: nn.Module, images: Tensor) -> Iterator[tuple[int, dict[str, float]]]:
    """Train, and yield at some steps the loss by noise level since the last of them."""
    source = _source(1)
    criterion = SkipStepLoss(SCHEDULE, SKIP, reduction="none")
    by_noise = LossByNoise(SCHEDULE)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(1, CHECKED[-1] + 1):
        rows = torch.randint(len(images), (BATCH,), generator=source)
        t = torch.randint(1000, (BATCH,), generator=source)
        losses = criterion(model, images[rows], t, generator=source)
        optimizer.zero_grad()
        by_noise(t, losses).mean().backward()
        optimizer.step()
        if step in CHECKED:
            yield step, by_noise.compute()
            by_noise.reset()


def _compared(results: dict[int, ValidationLoss]) -> list[dict[str, Any]]:
    """Return each result, and its paired difference from the one before."""
    rows = [{"step": step, **result.overall()._asdict()} for step, result in results.items()]
    for row, (before, result) in zip(rows[1:], pairwise(results.values()), strict=True):
        compared = result.compare(before)
        row |= {"difference": compared.overall().mean, "interval": compared.interval()}
    return rows


def _levels(results: dict[int, ValidationLoss]) -> dict[str, Any]:
    """Return the last result by level, and its difference from an early one."""
    early, last = results[EARLY], results[CHECKED[-1]]
    return {
        "log_snr": last.log_snr,
        **{kind: last.by_level(kind) for kind in last.losses},
        "difference": last.compare(early).by_level(),
    }


def _variance(model: nn.Module, held_out: Tensor, levels: int) -> dict[str, Any]:
    """Compare the variance over seeds with that of random times, at equal network calls."""
    fixed = [
        validation_loss(model, [held_out], SCHEDULE, levels=levels, seed=seed).overall().mean
        for seed in range(SEEDS)
    ]
    plain = SkipStepLoss(SCHEDULE, SKIP, tau=1.0)
    repeated = held_out.repeat(levels, 1, 1, 1)
    seeds = range(10_000, 10_000 + SEEDS)
    with torch.no_grad():
        drawn = [float(plain(model, repeated, generator=_source(seed))) for seed in seeds]
    return {"levels": levels, "samples": len(held_out), **_spread(fixed=fixed, random=drawn)}


def _stratified(model: nn.Module, images: Tensor, batch_size: int) -> dict[str, Any]:
    """Compare the variance of the batch loss with stratified and with uniform times."""
    source = _source(2)
    losses: dict[str, list[float]] = {}
    for name in ("stratified", "uniform"):
        criterion, losses[name] = SkipStepLoss(SCHEDULE, SKIP, timesteps=name), []
        for _ in range(DRAWS):
            rows = torch.randint(len(images), (batch_size,), generator=source)
            with torch.no_grad():
                losses[name].append(float(criterion(model, images[rows], generator=source)))
    return {"batch_size": batch_size, **_spread(**losses)}


def _spread(**losses: list[float]) -> dict[str, float]:
    """Return relative deviations and the ratio of variances, second over first."""
    found = {name: torch.tensor(values).double() for name, values in losses.items()}
    first, second = found.values()
    deviations = {f"{name}_cv": float(x.std() / x.mean()) for name, x in found.items()}
    return deviations | {"ratio": float(second.var() / first.var())}


def _cost() -> dict[str, float]:
    """Return microseconds of one update on a CPU, the best of some repeats."""
    t, losses = torch.randint(1000, (BATCH,), generator=_source(3)), torch.rand(BATCH)
    by_noise = LossByNoise(SCHEDULE)

    def best(call: Callable[[], object], number: int = 1000) -> float:
        repeats = timeit.repeat(call, timer=time.process_time, number=number, repeat=7)
        return 1e6 * min(repeats) / number

    return {
        "update": best(lambda: by_noise.update(t, losses)),
        "compute": best(by_noise.compute, 100),
        "mean": best(lambda: losses.mean()),
    }
