"""The table and the pictures of one run."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality import data as datasets
from benchmarks.quality.files import load_tensors, save_record, write_whole
from benchmarks.quality.objectives import SkipStep
from benchmarks.quality.presets import Preset
from benchmarks.quality.runner import Layout, collect
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Interval, Results
from s2dm_loss import NoiseSchedule, coefficients

COLORS = ("#5f6368", "#1e88e5", "#43a047", "#fb8c00", "#e53935", "#8e24aa", "#00897b", "#6d4c41")
STYLE: Any = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.facecolor": "white",
    "figure.dpi": 110,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.hashsalt": "s2dm-loss",  # the same results give the same file
}
TILE_COLUMNS, TILE_ROWS = 8, 2
GAP_SHADE = 96


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, the same file for the same figure."""
    metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
    with mpl.rc_context(STYLE):  # the style's salt is read on saving
        write_whole(path, lambda file: figure.savefig(file, metadata=metadata))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|:--|" + "--:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def percent(found: Interval | None) -> str:
    """Return an improvement as text, bold where its interval excludes 0."""
    if found is None:
        return "not measured yet"
    if found.count == 1:
        return f"{found.mean:+.1f} %"
    text = f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"
    return f"**{text}**" if found.sign else text


def distance_table(
    results: Results, methods: Sequence[str], cells: Sequence[Cell], measure: str | None = None
) -> str:
    """Return a table of distances, sampler and steps down, methods across.

    With one seed the improvement over the first method stands beside each distance; with several,
    the standard deviation over them.
    """
    rows = []
    for cell in cells:
        row = [f"{TITLES[cell.sampler]}, {cell.steps} steps"]
        for method in methods:
            values = list(results.values(method, cell, measure).values())
            if not values:
                row.append("not measured yet")
                continue
            text = f"{np.mean(values):.3f}"
            if len(values) > 1:
                text += f" ± {np.std(values, ddof=1):.3f}"
            elif method != methods[0]:
                text += f" ({percent(results.improvement(method, [cell], measure, methods[0]))})"
            row.append(text)
        rows.append(row)
    return markdown_table(["sampler", *(results.title(m) for m in methods)], rows)


def _tile(images: Tensor) -> Tensor:
    """Arrange uint8 images ``[N, C, H, W]`` in a grid ``[rows, columns, C]`` with gaps."""
    count = TILE_COLUMNS * TILE_ROWS
    gap = max(1, images.shape[-1] // 12)
    padded = F.pad(images[:count], (gap, gap, gap, gap), value=GAP_SHADE)
    _, channels, height, width = padded.shape
    grid = padded.view(TILE_ROWS, TILE_COLUMNS, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2).reshape(TILE_ROWS * height, TILE_COLUMNS * width, channels)


def _show(axes: Axes, images: Tensor) -> None:
    tile = _tile(images)
    axes.imshow(tile.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def samples_figure(
    preset: Preset, root: Path, cells: Sequence[Cell], methods: Sequence[str], real: Tensor
) -> Figure:
    """Return samples side by side: methods across, cells down, the data first.

    Every panel starts from the same noise, so an image can be followed from panel to panel.
    """
    layout = Layout(root)
    known = {arm.method.name: arm.method for arm in preset.arms}
    with mpl.rc_context(STYLE):
        figure = Figure(
            figsize=(3.4 * len(methods) + 0.6, 0.9 * (len(cells) + 1) + 0.3), layout="constrained"
        )
        grid = figure.subplots(len(cells) + 1, len(methods), squeeze=False)
        for column, name in enumerate(methods):
            grid[0, column].set_title(known[name].title)
            count = TILE_COLUMNS * TILE_ROWS
            _show(grid[0, column], real[column * count : (column + 1) * count])
            for row, cell in enumerate(cells, start=1):
                path = layout.cell(known[name], preset.seeds[0], *cell).with_suffix(".pt")
                _show(grid[row, column], load_tensors(path)["samples"])
        labels = ["data", *(f"{TITLES[c.sampler]}\n{c.steps} steps" for c in cells)]
        for row, label in enumerate(labels):
            grid[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def loss_figure(record: dict[str, Any], methods: Sequence[str]) -> Figure:
    """Return the loss curves: mse(ε, ε̂), which all objectives share, and its gap to plain's."""
    results = Results(record)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        curves = {}
        for method in methods:
            curve = next(iter(record["trainings"][method].values()))["curve"]
            steps = np.array([point["step"] for point in curve])
            curves[method] = np.array([point["epsilon_mse"] for point in curve])
            left.plot(steps, curves[method], label=results.title(method), alpha=0.85)
        for method in methods[1:]:
            gap = curves[method] - curves[methods[0]]
            right.plot(steps, gap, label=results.title(method), color=COLORS[methods.index(method)])
        left.set(xlabel="training step", title="mse(ε, ε̂) in training")
        # The first points, from an untrained network, would flatten everything after them.
        left.set_ylim(top=1.6 * float(np.median(curves[methods[0]])), auto=True)
        left.legend()
        right.set(xlabel="training step", title="its difference from plain training")
        right.axhline(0, color=COLORS[0], linewidth=1)
        right.legend()
    return figure


def coefficients_figure(skips: Sequence[int]) -> Figure:
    """Return c(t), A(t) and s(t) of the linear schedule for some skips."""
    schedule = NoiseSchedule.linear(1000)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2.9), layout="constrained")
        panels = figure.subplots(1, 3)
        for position, skip in enumerate(skips, start=1):
            tables = coefficients(schedule, skip)
            for axes, table in zip(panels, (tables.c, tables.weight, tables.gain), strict=True):
                axes.plot(table.numpy(), label=f"k = {skip}", color=COLORS[position])
        titles = ("c(t)", "A(t), the loss's weight", "s(t), the target's gain")
        for axes, title in zip(panels, titles, strict=True):
            axes.set(xlabel="t", title=title)
        panels[0].legend()
    return figure


PICTURES = ("samples.png", "loss.png", "coefficients.png")


def keep(preset: Preset, root: Path, folder: Path) -> list[Path]:
    """Copy a run's record, and the pictures of its report, to where results are committed.

    Raises:
        FileNotFoundError: If the run has no results.
    """
    record = collect(preset, root)
    if not record["rows"]:
        raise FileNotFoundError(f"out: no results in {root}; run the preset first")
    kept = [folder / f"{preset.name}.json"]
    save_record(kept[0], record)
    for name in PICTURES:
        picture = root / name
        if picture.exists():
            kept.append(folder / f"{preset.name}-{name}")
            write_whole(kept[-1], partial(shutil.copyfile, picture))
    return kept


def write_report(preset: Preset, root: Path, data_folder: Path | None = None) -> str:
    """Write a finished run's table, pictures and record into its folder; return the table."""
    record = collect(preset, root)
    results = Results(record)
    present = [m for m in (preset.columns or results.methods) if m in results.methods]
    cells = [c for c in results.cells(present[0]) if c.sampler in ("ddim", "pndm", "deis")]
    floor = record["floor"]
    text = (
        f"Fréchet distance to the data, lower is better; {preset.samples:,} samples, "
        f"{len(preset.seeds)} seed(s), {floor['features']}.\n\n"
        + distance_table(results, present, cells)
        + f"\nTwo random halves of the data ({floor['images_each']:,} images each) are "
        f"{floor['frechet']:.3f} apart.\n"
    )
    if results.primary == "raw_frechet":
        text += (
            "\nThe same for samples clamped to [-1, 1] and rounded to 8 bits, as image files:\n\n"
            + distance_table(results, present, cells, "images_frechet")
        )
    if preset.paper:
        text += "\nThe paper's numbers, for comparison:\n\n"
        text += markdown_table(["", preset.data], [[k, v] for k, v in preset.paper.items()])
    times = [
        f"{results.title(name)} {run['milliseconds_per_step']:.1f} ms"
        for name in present
        if (run := next(iter(record["trainings"].get(name, {}).values()), None)) is not None
    ]
    text += f"\nTime per training step: {', '.join(times)}.\n"

    save_record(root / "results.json", record)
    write_whole(root / "table.md", lambda file: file.write_text(text, encoding="utf-8"))
    skips = sorted(
        {
            arm.method.objective.skip
            for arm in preset.arms
            if arm.method.name in present and isinstance(arm.method.objective, SkipStep)
        }
    )
    save_figure(coefficients_figure(skips), root / "coefficients.png")
    if len(preset.seeds) == 1:
        save_figure(loss_figure(record, present), root / "loss.png")
    fewest, most = min(c.steps for c in cells), max(c.steps for c in cells)
    shown = [c for c in cells if c.steps == fewest or (c.sampler == "ddim" and c.steps == most)]
    real = datasets.load(preset.data, data_folder).images
    chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    save_figure(
        samples_figure(preset, root, shown, present, real[chosen[:128]]), root / "samples.png"
    )
    return text
