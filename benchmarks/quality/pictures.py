"""The pictures of one run: samples side by side, and loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from benchmarks.files import load_tensors
from benchmarks.pages.figures import COLORS, new_figure, zero_line
from benchmarks.quality.layout import Layout
from benchmarks.quality.presets import Preset
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Results

TILE_COLUMNS, TILE_ROWS = 8, 2
GAP_SHADE = 96


def _show(axes: Axes, images: Tensor) -> None:
    """Show uint8 images `[N, C, H, W]` in a grid with gaps."""
    gap = max(1, images.shape[-1] // 12)
    padded = F.pad(images[: TILE_COLUMNS * TILE_ROWS], (gap, gap, gap, gap), value=GAP_SHADE)
    _, channels, height, width = padded.shape
    grid = padded.view(TILE_ROWS, TILE_COLUMNS, channels, height, width).permute(0, 3, 1, 4, 2)
    tile = grid.reshape(TILE_ROWS * height, TILE_COLUMNS * width, channels)
    axes.imshow(tile.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def samples_figure(
    preset: Preset, root: Path, cells: Sequence[Cell], methods: Sequence[str], real: Tensor
) -> Figure:
    """Return samples side by side: methods across, cells down, the data first.

    Every panel starts from the same noise, so an image can be followed from panel to panel.
    """
    layout = Layout.of(preset, root)
    known = {arm.method.name: arm.method for arm in preset.arms}
    height, width = 0.9 * (len(cells) + 1) + 0.3, 3.4 * len(methods) + 0.6
    figure, grid = new_figure(height, len(cells) + 1, len(methods), width=width)
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
    """Return the curves of the squared error, by which all compare, and its gap to plain's."""
    results = Results(record)
    figure, ((left, right),) = new_figure(3.2, 1, 2, width=8.4)
    curves = {}
    for method in methods:
        curve = next(iter(record["trainings"][method].values()))["curve"]
        steps = np.array([point["step"] for point in curve])
        curves[method] = np.array([point["epsilon_mse"] for point in curve])
        left.plot(steps, curves[method], label=results.title(method), alpha=0.85)
    for method in methods[1:]:
        gap = curves[method] - curves[methods[0]]
        right.plot(steps, gap, label=results.title(method), color=COLORS[methods.index(method)])
    left.set(xlabel="training step", title="mean squared error in training")
    # The first points, from an untrained network, would flatten everything after them.
    left.set_ylim(top=1.6 * float(np.median(curves[methods[0]])), auto=True)
    left.legend()
    right.set(xlabel="training step", title="its difference from plain training")
    zero_line(right)
    right.legend()
    return figure
