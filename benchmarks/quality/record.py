"""A run's results in one compact record, which can be committed and written about."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.files import load_json
from benchmarks.quality.layout import Layout
from benchmarks.quality.plan import branching, jobs
from benchmarks.quality.presets import Preset
from benchmarks.quality.statistics import Cell, cell_key

CURVE = 20
"""Points of a loss curve that are kept, where there are several seeds."""
COLUMNS = [
    *("method", "seed", "sampler", "steps", "raw_frechet", "raw_kernel"),
    *("images_frechet", "images_kernel", "spread"),
]


def collect(preset: Preset, root: Path) -> dict[str, Any]:
    """Return all results of a run, in one compact record.

    A row has `COLUMNS`, with None where a feature network takes no raw samples. Spreads by octave
    are over the data's; `gaussian_spreads` is what the sampler alone leaves of Gaussian data.
    """
    layout = Layout.of(preset, root)
    rows: list[list[Any]] = []
    titles: dict[str, str] = {}
    trainings: dict[str, dict[str, Any]] = {}
    versions_seen: dict[str, Any] = {}
    bands: dict[str, list[float]] = {}
    alone: dict[str, float] = {}
    alone_in_bands: dict[str, list[float]] = {}
    raw_spreads: dict[str, dict[str, float]] = {}
    commits: dict[str, None] = {}  # a run that was resumed may have several; in order, once each
    differed = False
    for job in jobs(preset):
        method, seed = job.arm.method, job.seed
        record = layout.model(method.objective, seed) / "training.json"
        if record.exists():
            training = load_json(record)
            if len(preset.seeds) > 1:
                # The curves of a whole grid would be most of its record.
                curve = training["curve"]
                training["curve"] = curve[:: -math.ceil(len(curve) / CURVE)][::-1]
            ours = method.objective.ours
            training["loss_share"] = 1 - (branching(preset, method.objective) or 0) if ours else 0.0
            trainings.setdefault(method.objective.name, {})[str(seed)] = training
        for sampler, steps in job.cells():
            path = layout.cell(method, seed, sampler, steps)
            if not path.exists():
                continue
            cell, where = load_json(path), f"{sampler}-{steps}"
            name = cell_key(method.name, Cell(sampler, steps))
            titles[method.name] = cell["title"]
            bands[f"{name}, seed {seed}"] = [round(value, 4) for value in cell["band_spreads"]]
            if "raw_spread" in cell:
                raw_spreads.setdefault(name, {})[str(seed)] = round(cell["raw_spread"], 5)
            if "gaussian_spread" in cell:
                alone[where] = round(cell["gaussian_spread"], 5)
                found = cell["gaussian_band_spreads"]
                alone_in_bands[where] = [round(value, 4) for value in found]
            versions_seen = cell["versions"]
            commits[versions_seen["commit"] or "unknown"] = None
            differed |= versions_seen["checkout_differed"]
            distances = [
                round(cell[kind][key], 6) if kind in cell else None
                for kind in ("raw", "images")
                for key in ("frechet", "kernel")
            ]
            rows.append([method.name, seed, sampler, steps, *distances, round(cell["spread"], 5)])
    floor = layout.floor
    commit = {"commit": ", ".join(commits) or None, "checkout_differed": differed}
    return {
        "preset": preset.name,
        "settings": preset.settings,
        "versions": {**versions_seen, **commit},
        "floor": load_json(floor) if floor.exists() else None,
        "titles": titles,
        "columns": COLUMNS,
        "rows": rows,
        "trainings": trainings,
        "band_spreads": bands,
        "gaussian_spreads": alone,
        "gaussian_band_spreads": alone_in_bands,
        "raw_spreads": raw_spreads,
        "searches": [load_json(path) for path in sorted(root.glob("search-*.json"))],
    }
