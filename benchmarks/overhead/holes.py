"""What `docs/overhead.md` can say: numbers, tables and figures, from committed results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.files import load_json
from benchmarks.overhead.contenders import LABELS
from benchmarks.overhead.levels import KNOWN, LATENTS, Cell
from benchmarks.pages.figures import COLORS, new_figure
from benchmarks.provenance import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "overhead"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
HEADS = (("float32",) * 2, ("bfloat16",) * 2, ("compiled", "float32"), ("compiled", "bfloat16"))
"""Levels of the loss alone, and their types."""
STEPS = ("eager", "compiled", "graph", "compiled graph")
DRAWN = {"expected": 1, "mse": 0, "min_snr": 3, "released": 4}


class Device:
    """One device's results, as a template asks for them."""

    def __init__(self, path: Path) -> None:
        """Read what `python -m benchmarks.overhead run` wrote."""
        self.label, self.levels = DEVICES[path.stem], load_json(path)
        machine = self.levels["float32"]["machine"]
        self.machine = machine.get("gpu", machine["cpu"])
        self.versions = sorted({level["version"] for level in self.levels.values()})
        (copy,) = self.levels["bandwidth"]["figures"]
        self.copy_rate: float = copy["copy_bytes_per_second"][1]  # read and written

    def cells(self, level: str, *dtypes: str) -> list[Cell]:
        """Return a level's results, of some types or all, sizes before what people train on."""
        found = self.levels.get(level, {}).get("figures", [])
        found = [cell for cell in found if not dtypes or cell["dtype"] in dtypes]
        return sorted(found, key=lambda c: (c.get("name", "2^")[:2] != "2^", math.prod(c["shape"])))

    def known(self) -> list[tuple[str, Cell]]:
        """Return the float32 cells of the shapes people train on, by name."""
        ends = {cell["name"].split(", ")[-1]: cell for cell in self.cells("float32")}
        return [(name, ends[name]) for name in KNOWN if name in ends]

    @property
    def old(self) -> bool:
        """Whether that was the head before 0.3, which moved the data seven times."""
        row = self.counted("float32")["expected"]
        return bool(row["bytes"] > 6.5 * row["data_bytes"])

    @property
    def fastest_step(self) -> Cell:
        """The plain training step that takes least, of those that were measured."""
        return min(self.steps, key=median)

    @property
    def steps(self) -> list[Cell]:
        """The timed training steps, of every kind."""
        levels = ("step", "step-compiled", "step-graph")
        return [cell for level in levels for cell in self.cells(level) if "microseconds" in cell]

    @property
    def added(self) -> tuple[float, float]:
        """Least and most that `expected` adds to the fastest plain step, by the heads' times.

        Measured beside the step, and where the head was measured at the step's shape once more.
        """
        step = self.fastest_step
        level = step["dtype"] if step["mode"] == "eager" else step["mode"]
        again = [c for c in self.cells(level, step["dtype"]) if c["shape"] == step["shape"]]
        heads = [step["head"], *again]
        shares = [(median(head, "expected") - median(head)) / median(step) for head in heads]
        return min(shares), max(shares)

    @property
    def extra(self) -> float:
        """By how many microseconds `expected` takes longer at the shapes people train on."""
        return max(median(cell, "expected") - median(cell) for _, cell in self.known())

    @property
    def unmeasured(self) -> list[str]:
        """What the plan for a GPU has and these results do not, by level."""
        shapes = {tuple(cell["shape"]): cell["name"] for cell in self.cells("float32")}
        missing = []
        for level, dtype in HEADS[1:]:
            found = {tuple(cell["shape"]): cell["name"] for cell in self.cells(level, dtype)}
            left = [name for shape, name in shapes.items() if shape not in found]
            where = " and ".join(left)
            if len(found) < len(left):
                where = "any size" + (f" but {' and '.join(found.values())}" if found else "")
            if left:
                title = dtype if level == dtype else f"{level} {dtype}"
                missing.append(f"{title} at {where}")
        timed = {cell["mode"] for cell in self.steps}
        steps = STEPS if self.label == "GPU" else STEPS[:2]  # no graphs on a CPU
        return missing + [f"the step, {name}" for name in steps if name not in timed]

    def counted(self, dtype: str, shape: Sequence[int] = LATENTS) -> dict[str, Cell]:
        """Return the counts at one shape, by contender."""
        wanted = {"dtype": dtype, "shape": list(shape)}.items()
        return {row["contender"]: row for row in self.cells("counts") if wanted <= row.items()}

    def held(self, name: str) -> float:
        """Return the most tensors of the data's size that a loss holds at once, in float32."""
        rows = [row for row in self.cells("counts", "float32") if row["contender"] == name]
        return max(row["peak_bytes"] / row["data_bytes"] for row in rows)

    @property
    def waits(self) -> int:
        """How often one of our losses makes the host wait, or breaks a graph."""
        return sum(
            row["sync_operators"] + (row.get("sync") is not None) + row.get("graph_breaks", 0)
            for row in self.cells("counts")
            if row["contender"] in ("expected", "fresh", "shared")
        )

    def losses(self, level: str, dtype: str) -> list[str]:
        """Return what was timed beside `F.mse_loss`, in the tables' order."""
        timed = {pair for cell in self.cells(level, dtype) for pair in cell["ratios"]}
        return [name for name in LABELS if f"{name}/mse" in timed]

    @property
    def large(self) -> list[Cell]:
        """The float32 cells whose time is that of the data."""
        cells = self.cells("float32") + self.cells("compiled", "float32")
        return [cell for cell in cells if math.prod(cell["shape"]) >= 2**22]

    def moved(self, cell: Cell) -> tuple[float, float]:
        """Return shares of a copy's speed: by bytes moved, and by those that any loss must move."""
        row = self.counted(cell["dtype"])["expected"]
        moved = row["bytes" if cell["mode"] == "eager" else "compiled_bytes"] / row["data_bytes"]
        least = useful_rate(cell, "expected") / self.copy_rate
        return moved / 3 * least, least


def median(cell: Cell, name: str = "mse") -> float:
    """Return what a loss takes in microseconds."""
    return float(cell["microseconds"][name][1])


def useful_rate(cell: Cell, name: str) -> float:
    """Return bytes a second that any loss must move: ε̂ and ε read, one gradient written."""
    size = getattr(torch, cell["dtype"]).itemsize * math.prod(cell["shape"])
    return 3 * size / (median(cell, name) / 1e6)


def devices() -> list[Device]:
    """Return the devices that have results."""
    paths = [RESULTS / f"{name}.json" for name in DEVICES]
    return [Device(path) for path in paths if path.exists()]


def rates(name: str) -> Figure:
    """Draw GB/s of the losses by size, below the speed of a copy."""
    device = Device(RESULTS / f"{name}.json")
    figure, ((axes,),) = new_figure(3.4)
    cells = [cell for cell in device.cells("float32") if cell["name"].startswith("2^")]
    sizes = [math.prod(cell["shape"]) for cell in cells]
    for loss, color in DRAWN.items():
        speeds = [useful_rate(cell, loss) / 1e9 for cell in cells]
        label = LABELS[loss].replace("`", "")
        axes.plot(sizes, speeds, marker="o", markersize=3, color=COLORS[color], label=label)
    ceiling = device.copy_rate / 1e9
    axes.axhline(ceiling, color=COLORS[2], linestyle="--", linewidth=1.2, label="a copy")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="elements of ε̂", ylabel="GB/s", ylim=(0, 1.1 * ceiling))
    axes.minorticks_off()
    figure.legend(loc="outside lower center", ncols=3)
    return figure


HOLES = {
    "overhead_devices": devices,
    "overhead_labels": LABELS,
    "overhead_heads": HEADS,
    "useful_rate": useful_rate,
}
FIGURES = {f"overhead/{name}": partial(rates, name) for name in DEVICES}
