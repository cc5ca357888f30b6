"""The report of one run: its table, its pictures and its record."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.files import save_record, write_text
from benchmarks.pages.figures import save_figure
from benchmarks.pages.tables import MISSING, counted, markdown_table
from benchmarks.quality import data as datasets
from benchmarks.quality.layout import check_settings
from benchmarks.quality.pictures import loss_figure, samples_figure
from benchmarks.quality.presets import CORE, Preset
from benchmarks.quality.record import collect
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Results, percent

FILES = {
    "table.md": "the tables above",
    "samples.png": "samples side by side, each row from the same noise",
    "loss.png": "loss curves",
    "results.json": "every number, with the settings and versions that made it",
    "cells": "one JSON per result, with its first samples",
    "models": "the trained networks",
}
"""What a finished run leaves in its folder, and what for."""


def keep(preset: Preset, root: Path, folder: Path) -> Path:
    """Write a run's record, but for its loss curves, to where results are committed.

    Raises:
        FileNotFoundError: If the run has no results.
        ValueError: If its folder holds results of other settings.
    """
    check_settings(preset, root)
    record = collect(preset, root)
    if not record["rows"]:
        raise FileNotFoundError(f"out: no results in {root}; run the preset first")
    for by_seed in record["trainings"].values():
        for training in by_seed.values():
            del training["curve"]
    path = folder / f"{preset.name}.json"
    save_record(path, record)
    return path


def distance_table(
    results: Results, methods: Sequence[str], cells: Sequence[Cell], measure: str
) -> str:
    """Return a table of distances, sampler and steps down, methods across.

    With one seed the change over the first method stands beside each distance, unless both are at
    the floor; with several, the standard deviation over them.
    """
    rows = []
    for cell in cells:
        row = [f"{TITLES[cell.sampler]}, {cell.steps} steps"]
        for method in methods:
            values = list(results.values(method, cell, measure).values())
            if not values:
                row.append(MISSING)
                continue
            text = f"{np.mean(values):.3f}"
            if len(values) > 1:
                text += f" ± {np.std(values, ddof=1):.3f}"
            elif method != methods[0]:
                floored = all(results.at_floor(one, cell, measure) for one in (method, methods[0]))
                over = results.change(method, cell, measure, (methods[0], cell))
                text += f" ({'at the floor' if floored else percent(over) or MISSING})"
            row.append(text)
        rows.append(row)
    return markdown_table(["sampler", *(results.title(m) for m in methods)], rows)


def write_report(preset: Preset, root: Path, data_folder: Path | None = None) -> str:
    """Write a finished run's table, pictures and record into its folder; return the table."""
    record = collect(preset, root)
    results = Results(record)
    present = [m for m in (preset.columns or results.methods) if m in results.methods]
    cells = [c for c in results.cells(present[0]) if c.sampler in (*CORE, "euler", "heun")]
    text = (
        f"Fréchet distance to the data, lower is better; {preset.samples:,} samples, "
        f"{counted(len(preset.seeds), 'seed')}, {record['floor']['features']}.\n\n"
        "8-bit images, as files hold them:\n\n"
        + distance_table(results, present, cells, "images_frechet")
    )
    if any(results.values(present[0], cell, "raw_frechet") for cell in cells):
        text += "\nRaw, as the sampler returns them:\n\n"
        text += distance_table(results, present, cells, "raw_frechet")
    text += (
        f"\nThe floor, at which as many real images lie, is at about {results.floor:.2f}: closer "
        "to it than a quarter, a difference says nothing.\n"
    )
    save_record(root / "results.json", record)
    write_text(root / "table.md", text)
    # A correction of a trained network has no curve.
    trained = [name for name in present if name in record["trainings"]]
    if len(preset.seeds) == 1 and len(trained) > 1:
        save_figure(partial(loss_figure, record, trained), root / "loss.png")
    if common := [c for c in cells if all(results.values(name, c) for name in present)]:
        fewest, most = min(c.steps for c in common), max(c.steps for c in common)
        shown = [c for c in common if c.steps == fewest or c == Cell(results.base, most)]
        real = datasets.load(preset.data, data_folder).reference
        chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
        draw = partial(samples_figure, preset, root, shown, present, real[chosen[:128]])
        save_figure(draw, root / "samples.png")
    return text
