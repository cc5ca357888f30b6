"""A run's results in one compact record, which can be committed and written about."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.files import load_json
from benchmarks.quality.layout import Layout
from benchmarks.quality.plan import jobs
from benchmarks.quality.presets import Preset

CURVE = 20
"""Points of a loss curve that are kept, where there are several seeds."""


def collect(preset: Preset, root: Path) -> dict[str, Any]:
    """Return all results of a run, in one compact record.

    A row is [method, seed, sampler, steps, raw Fréchet, raw kernel, Fréchet of the images, kernel
    of the images, spread], with None where a feature network takes no raw samples.
    """
    layout = Layout.of(preset, root)
    rows: list[list[Any]] = []
    titles: dict[str, str] = {}
    trainings: dict[str, dict[str, Any]] = {}
    versions_seen: dict[str, str | None] = {}
    fitted: dict[str, dict[str, Any]] = {}
    bands: dict[str, list[float]] = {}
    alone: dict[str, float] = {}
    alone_in_bands: dict[str, list[float]] = {}
    raw_spreads: dict[str, dict[str, float]] = {}
    commits: dict[str, None] = {}  # a run that was resumed may have several; in order, once each
    for job in jobs(preset):
        method, seed = job.arm.method, job.seed
        record = layout.model(method.objective, seed) / "training.json"
        if record.exists():
            training = load_json(record)
            if len(preset.seeds) > 1:
                # The curves of a whole grid would be most of its record.
                curve = training["curve"]
                training["curve"] = curve[:: -math.ceil(len(curve) / CURVE)][::-1]
            trainings.setdefault(method.objective.name, {})[str(seed)] = training
        for sampler, steps in job.cells():
            path = layout.cell(method, seed, sampler, steps)
            if not path.exists():
                continue
            cell = load_json(path)
            titles[method.name] = cell["title"]
            if method.name == "plain" and "band_spreads" in cell:
                bands[f"{sampler}-{steps}, seed {seed}"] = [
                    round(value, 4) for value in cell["band_spreads"]
                ]
            if method.name == "plain" and "raw_spread" in cell:
                spreads = raw_spreads.setdefault(f"{sampler}-{steps}", {})
                spreads[str(seed)] = round(cell["raw_spread"], 5)
            if "gaussian_spread" in cell:
                alone[f"{sampler}-{steps}"] = round(cell["gaussian_spread"], 5)
            if "gaussian_band_spreads" in cell:
                alone_in_bands[f"{sampler}-{steps}"] = [
                    round(value, 4) for value in cell["gaussian_band_spreads"]
                ]
            if "fitted" in cell:
                fitted.setdefault(method.name, {})[f"{sampler}-{steps}, seed {seed}"] = {
                    t: [round(gain, 4) for gain in gains] for t, gains in cell["fitted"].items()
                }
            versions_seen = cell["versions"]
            commits[versions_seen["commit"] or "unknown"] = None
            distances = [
                round(cell[kind][key], 6) if kind in cell else None
                for kind in ("raw", "images")
                for key in ("frechet", "kernel")
            ]
            rows.append([method.name, seed, sampler, steps, *distances, round(cell["spread"], 5)])
    floor = layout.floor
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
        "fitted": fitted,
        "band_spreads": bands,
        "gaussian_spreads": alone,
        "gaussian_band_spreads": alone_in_bands,
        "raw_spreads": raw_spreads,
        "searches": [load_json(path) for path in sorted(root.glob("search-*.json"))],
    }  # fmt: skip
