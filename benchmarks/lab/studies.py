"""The experiments. Each returns one JSON document, and none needs another's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lab.coverage import coverage, tails, whole_search
from benchmarks.lab.flow import spread
from benchmarks.lab.linear import (
    EXACT,
    Imperfection,
    frechet,
    gains,
    output_variances,
    recommend,
    run,
)
from benchmarks.quality import data as datasets
from benchmarks.quality.layout import claimed
from benchmarks.quality.objectives import Plain
from benchmarks.quality.presets import DIGITS_FULL
from benchmarks.quality.runner import Bench

Json = dict[str, Any]
Bar = Callable[[list[Any]], Iterable[Any]]

SAMPLERS = ("ddim", "pndm", "deis", "dpm++2m")
CORE = ("ddim", "pndm", "deis")
NUM_SAMPLES = 1024
"""Of a search on trained networks, and of what it is judged on."""


def digit_variances() -> Tensor:
    """Return the variances of the digits along their principal axes, largest last, [64]."""
    digits = datasets.to_model_range(datasets.load_digits().images).flatten(1).double()
    return torch.linalg.eigvalsh(digits.T.cov()).clamp(min=0)


def gaussian(bar: Bar) -> Json:
    """Return the best skip of each sampler and number of steps, and the distance by the skip."""
    variances = digit_variances()
    table = gains(range(500))
    cells = [*product(SAMPLERS, (5, 10, 20, 50, 100)), ("ddim", 1000)]
    rows = []
    for sampler, steps in bar(cells):
        row, distance = _scanned(variances, table, sampler, steps)
        rows.append(
            {
                **row,
                "best": float(distance[row["best_skip"]]),
                "relative": {k: float(distance[k] / distance[0]) - 1 for k in (9, 49, 99)},
                "curve": [float(f"{d:.4g}") for d in distance[:300:5]],
            }
        )
    return {"distance": "Frechet over total variance", "curve_skips": [0, 300, 5], "rows": rows}


def _scanned(
    variances: Tensor, table: Tensor, sampler: str, steps: int, wrong: Imperfection = EXACT
) -> tuple[Json, Tensor]:
    """Return the best row of a table of gains, of which the first is none, and all distances."""
    output = output_variances(variances, table, sampler, steps, wrong)
    distance = frechet(output, variances)
    row = {
        "sampler": sampler,
        "steps": steps,
        "plain": float(distance[0]),
        "plain_spread": float((output[0].sum() / variances.sum()).sqrt()),
        "best_skip": int(distance.argmin()),
    }
    return row, distance


def strength(bar: Bar) -> Json:
    """Return the best τ of each k, and the distance with it."""
    variances = digit_variances()
    taus = [1 - 10 ** (-e / 20) for e in range(4, 100)]
    tables = {k: torch.cat([gains([k], tau) for tau in taus]) for k in (1, 9, 49, 99, 199)}
    rows = []
    for sampler, steps in bar(list(product(("ddim", "deis"), (5, 10, 20, 50)))):
        tuned = {}
        for skip, table in tables.items():
            distance = frechet(output_variances(variances, table, sampler, steps), variances)
            best = int(distance.argmin())
            tuned[skip] = {"tau": taus[best], "distance": float(distance[best])}
        plain = float(frechet(output_variances(variances, gains([0]), sampler, steps), variances))
        rows.append({"sampler": sampler, "steps": steps, "plain": plain, "best_tau_of_skip": tuned})
    return {"rows": rows}


IMPERFECTIONS = (
    EXACT,
    Imperfection("ε̂ 1 % too large", scale=1.01),
    Imperfection("ε̂ 1 % too small", scale=0.99),
    Imperfection("ε̂ 1 % too large where ᾱ < 0.05", late_scale=1.01),
    Imperfection("ε̂ 1 % too small where ᾱ < 0.05", late_scale=0.99),
    Imperfection("independent error of 0.05 a call", noise=0.05),
    Imperfection("independent error of 0.2 a call", noise=0.2),
    Imperfection("blurred: variances taken 0.03 too large", believed=lambda v: v + 0.03),
    Imperfection(
        "coarse: only the 16 largest axes known",
        believed=lambda v: torch.where(v >= v.topk(16).values.min(), v, 0.0),
    ),
    Imperfection("timid: variances taken 10 % too small", believed=lambda v: 0.9 * v),
)


def imperfect(bar: Bar) -> Json:
    """Return the best skip with each of `IMPERFECTIONS`."""
    variances = digit_variances()
    table = gains(range(500))
    rows = []
    cells = product(IMPERFECTIONS, CORE, (10, 20, 50, 100))
    for wrong, sampler, steps in bar(list(cells)):
        row, distance = _scanned(variances, table, sampler, steps, wrong)
        relative = float(distance.min() / distance[0]) - 1
        rows.append({"model": wrong.title, **row, "relative": relative})
    return {"rows": rows}


def flow(bar: Bar) -> Json:
    """Return the share of the spread: plain, with Heun, and with each gain."""
    skips = (0.05, 0.1, 0.2, 0.3)
    rows = []
    cells = product((1.0, 3.0), (1.0, 0.25), (10, 20, 28, 50))
    for shift, variance, steps in bar(list(cells)):
        row = {"shift": shift, "variance": variance, "steps": steps}
        exact = partial(spread, variance, steps, shift=shift)
        row |= {"plain": exact(), "heun": exact(method="heun")}
        rows.append(row | {"gain": {delta: exact(skip=delta) for delta in skips}})
    return {"tau": 0.99, "rows": rows}


def digits(bar: Bar, root: Path = Path("runs/digits-full")) -> Json:
    """Search and judge, on the networks of a run's folder."""
    with claimed(DIGITS_FULL, root):
        bench = Bench(DIGITS_FULL, root)
        cells = bar(list(product(CORE, (10, 20, 50))))
        rows = [_digits_cell(bench, sampler, steps) for sampler, steps in cells]
    return {
        "network": repr(DIGITS_FULL.network),
        "features": bench.features.description,
        "num_samples": NUM_SAMPLES,
        "rows": rows,
    }


def _digits_cell(bench: Bench, sampler: str, steps: int) -> Json:
    images = datasets.to_model_range(bench.data.images)
    model = bench.model(Plain(), 0)
    fresh = torch.Generator().manual_seed(77)
    start = torch.randn(NUM_SAMPLES, *images.shape[1:], generator=fresh)
    draw = partial(run, sampler=sampler, steps=steps)

    def judge(model: nn.Module, noise: Tensor) -> dict[str, float]:
        samples = datasets.to_uint8(draw(model, noise))
        return {"images": bench.distances.compare(samples).frechet}

    def bench_features(samples: Tensor) -> Tensor:
        return bench.distances.network(datasets.to_uint8(samples))

    searches = {}
    named = {"raw values": None, "classifier features of 8-bit images": bench_features}
    for name, features in named.items():
        found = recommend(model, {sampler: draw}, images, NUM_SAMPLES, 0, features)
        searches[name] = {
            "recommended": found.recommended.label,
            "judged": judge(found.correct_model(model), found.correct_noise(start)),
        }
    return {"sampler": sampler, "steps": steps, "plain": judge(model, start), "searches": searches}


STUDIES: dict[str, Callable[[Bar], Json]] = {
    "gaussian": gaussian,
    "imperfect": imperfect,
    "strength": strength,
    "flow": flow,
    "coverage_gaussian": partial(coverage, law="gaussian"),
    "coverage_mixture": partial(coverage, law="mixture"),
    "coverage_tails": tails,
    "whole_search": whole_search,
    "digits": digits,
}
