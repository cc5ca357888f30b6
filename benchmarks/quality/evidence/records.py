"""The committed results, and which methods they should and do hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.files import load_json
from benchmarks.pages.figures import save_figure
from benchmarks.quality.corrections import Gain
from benchmarks.quality.objectives import Method, Plain, SampledTimesteps, SkipStep
from benchmarks.quality.presets import CORE, PRESETS, STEPS
from benchmarks.quality.statistics import Cell, Interval, Results

GRID = [Cell(sampler, steps) for sampler in CORE for steps in STEPS]
TEN = Cell("ddim", 10)
"""The paper's headline: DDIM, 10 steps."""
IMAGES, RAW = "images_frechet", "raw_frechet"
MEASURES = {IMAGES: "8-bit", RAW: "raw"}


@dataclass(frozen=True)
class Sources:
    """Where the pages' material lies.

    Attributes:
        quality: Folder of the records that `keep` writes.
        lab: Folder of Markdown fragments on the exact lab.
    """

    quality: Path = Path("benchmarks/results/quality")
    lab: Path = Path("benchmarks/results/lab")


class Evidence:
    """The records, and the folder for figures.

    Args:
        sources: Where the results lie.
        assets: Folder for the figures.
    """

    def __init__(self, sources: Sources, assets: Path) -> None:
        """Read the records."""
        self.assets = assets
        self.records: dict[str, dict[str, Any]] = {
            name: load_json(path)
            for name in PRESETS
            if (path := sources.quality / f"{name}.json").exists()
        }
        self.fragments = sorted(sources.lab.glob("*.md"))
        self.full = self.results("digits-full")

    def results(self, preset: str) -> Results | None:
        """Return a preset's results, or None where there are none."""
        return Results(self.records[preset]) if preset in self.records else None

    def figure(self, name: str, alt: str, figure: Figure) -> str:
        """Write a figure, and return the line that shows it."""
        save_figure(figure, self.assets / f"{name}.svg")
        return f"![{alt}](assets/evidence/{name}.svg)"


def methods(preset: str) -> dict[str, Method]:
    """Return the methods of a preset by name, by what they are and then by their settings."""
    found = {arm.method.name: arm.method for arm in PRESETS[preset].arms}
    return dict(sorted(found.items(), key=lambda item: _place(item[1])))


def on_the_grid(preset: str) -> list[str]:
    """Return the methods but plain training that a preset measures in every cell of the grid."""
    cells: dict[str, set[Cell]] = {}
    for arm in PRESETS[preset].arms:
        found = {Cell(sampler, steps) for sampler in arm.samplers for steps in arm.steps}
        cells.setdefault(arm.method.name, set()).update(found)
    return [name for name in methods(preset) if name != "plain" and cells[name] >= set(GRID)]


def peers(preset: str = "digits-full") -> list[str]:
    """Return the methods of others."""
    known = methods(preset)
    return [name for name in on_the_grid(preset) if known[name].is_peer]


def skips_of(preset: str = "digits-full") -> list[int]:
    """Return the skips that were trained with, at the default τ and estimator."""
    return [
        method.objective.skip
        for method in methods(preset).values()
        if isinstance(method.objective, SkipStep)
        and method == Method(SkipStep(method.objective.skip))
    ]


def trained(skip: int) -> str:
    """Return the name of the loss with a skip."""
    return SkipStep(skip).name


def corrected(skip: int) -> str:
    """Return the name of plain training with the gain of a skip put on."""
    return Method(Plain(), Gain(skip)).name


def title(results: Results, name: str) -> str:
    """Return a method's name in tables, results or not."""
    if name in results.record["titles"]:
        return results.title(name)
    known = {arm.method.name: arm.method for p in PRESETS.values() for arm in p.arms}
    return known[name].title


def better(
    results: Results, names: list[str], than: str, cells: list[Cell] | None = None
) -> list[str]:
    """Return the methods that are better than another in both measures, by their intervals."""

    def is_better(name: str) -> bool:
        found: list[Interval | None] = [
            results.improvement(name, cells or GRID, measure, than) for measure in MEASURES
        ]
        return all(one is not None and one.sign > 0 for one in found)

    return [name for name in names if is_better(name)]


def _place(method: Method) -> tuple[object, ...]:
    """Return where a method stands: ours, the gain, peers, then combinations."""
    objective, correction = method.objective, method.correction
    if isinstance(objective, SkipStep) and correction is None:
        estimators = ("expected", "fresh", "shared")
        default = objective.tau == SkipStep(1).tau
        return 0, not default, estimators.index(objective.estimator), objective.skip, objective.tau
    if isinstance(objective, Plain):
        if isinstance(correction, Gain):
            return 1, correction.skip, correction.tau
        return (3, "", method.name) if correction else (-1,)
    if isinstance(objective, SampledTimesteps):
        return 5, objective.steps
    return (3 if correction is None else 4, method.name)
