"""A run's results in one compact record, which can be committed and written about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.files import load_json
from benchmarks.quality.layout import FLOOR, Layout
from benchmarks.quality.objectives import SkipStep
from benchmarks.quality.plan import branching, jobs
from benchmarks.quality.presets import Preset
from benchmarks.quality.statistics import Cell, cell_key

COLUMNS = [
    *("method", "seed", "sampler", "steps", "raw_frechet", "raw_kernel"),
    *("images_frechet", "images_kernel", "spread"),
]


def collect(preset: Preset, root: Path) -> dict[str, Any]:
    """Return all results of a run, in one compact record.

    A row has `COLUMNS`, with None where a feature network takes no raw samples. Spreads by octave
    are over the data's.
    """
    layout = Layout.of(preset, root)
    floor = layout.root / FLOOR
    record: dict[str, Any] = {
        "preset": preset.name,
        "settings": preset.settings,
        "versions": {},
        "floor": load_json(floor) if floor.exists() else None,
        "titles": {},
        "columns": COLUMNS,
        "rows": [],
        "trainings": {},
        "band_spreads": {},
        "searches": [load_json(path) for path in sorted(root.glob("search-*.json"))],
    }
    made_with: list[dict[str, Any]] = []
    for job in jobs(preset):
        method, seed = job.arm.method, job.seed
        trained = layout.model(method.objective, seed) / "training.json"
        if trained.exists():
            training = load_json(trained)
            made_with.append(training.pop("versions", {}))
            ours = isinstance(method.objective, SkipStep)
            training["loss_share"] = 1 - (branching(preset, method.objective) or 0) if ours else 0.0
            record["trainings"].setdefault(method.objective.name, {})[str(seed)] = training
        for sampler, steps in job.cells():
            path = layout.cell(method, seed, sampler, steps)
            if not path.exists():
                continue
            cell, name = load_json(path), cell_key(method.name, Cell(sampler, steps))
            record["titles"][method.name] = cell["title"]
            bands = [round(value, 4) for value in cell["band_spreads"]]
            record["band_spreads"][f"{name}, seed {seed}"] = bands
            made_with.append(cell["versions"])
            distances = [
                round(cell[kind][key], 6) if kind in cell else None
                for kind in ("raw", "images")
                for key in ("frechet", "kernel")
            ]
            row = [method.name, seed, sampler, steps, *distances, round(cell["spread"], 5)]
            record["rows"].append(row)
    record["versions"] = _joined(made_with)
    return record


def _joined(made_with: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all versions of a run that was resumed: in order, each once."""
    found: dict[str, dict[Any, None]] = {}
    for versions in made_with:
        for name, value in versions.items():
            found.setdefault(name, {})[value] = None
    differed = any(found.pop("checkout_differed", ()))
    joined = {name: ", ".join(filter(None, values)) or None for name, values in found.items()}
    return {**joined, "checkout_differed": differed}
