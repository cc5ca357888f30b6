"""What `docs/overhead.md` can say: numbers, tables and figures, from committed results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.files import load_json
from benchmarks.overhead.contenders import LABELS
from benchmarks.overhead.levels import KNOWN, LATENTS
from benchmarks.pages.figures import COLORS, new_figure
from benchmarks.pages.tables import markdown_table
from benchmarks.provenance import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "overhead"
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
BYTES = {"float32": 4, "bfloat16": 2}
HEADS = (
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("compiled", "float32"),
    ("compiled", "bfloat16"),
)
"""Levels of the loss alone, and their types."""
STEPS = ("eager", "compiled", "graph", "compiled graph")
DRAWN = {"expected": 1, "mse": 0, "min_snr": 3, "released": 4}
Cell = dict[str, Any]


class Device:
    """One device's results, as a template asks for them.

    Args:
        path: The JSON that `python -m benchmarks.overhead run` wrote.
    """

    def __init__(self, path: Path) -> None:
        """Read the results."""
        self.label, self.levels = DEVICES[path.stem], load_json(path)

    def cells(self, level: str) -> list[Cell]:
        """Return the results of a level, sizes in order before the shapes people train on."""
        found: list[Cell] = self.levels.get(level, {}).get("figures", [])
        named = all("name" in cell for cell in found)
        return sorted(found, key=_order) if named else found

    def known(self, level: str = "float32") -> list[tuple[str, Cell]]:
        """Return the cells of the shapes people train on, by name."""
        ends = {cell["name"].split(", ")[-1]: cell for cell in self.cells(level)}
        return [(name, ends[name]) for name in KNOWN if name in ends]

    @property
    def machine(self) -> str:
        """The device's name."""
        found = self.levels["float32"]["machine"]
        return str(found.get("gpu", found["cpu"]))

    @property
    def versions(self) -> list[str]:
        """Versions of the library that were measured."""
        return sorted({level["version"] for level in self.levels.values()})

    @property
    def copy_rate(self) -> float:
        """Bytes a second of a copy, read and written."""
        return float(self.cells("bandwidth")[0]["copy_bytes_per_second"][1])

    @property
    def fastest_step(self) -> Cell:
        """The plain training step that takes least, of those that were measured."""
        timed = [cell for cell in self.cells("step") + self._other_steps() if _median(cell)]
        return min(timed, key=_median)

    def _other_steps(self) -> list[Cell]:
        return self.cells("step-compiled") + self.cells("step-graph")

    @property
    def added(self) -> tuple[float, float]:
        """Least and most that `expected` adds to the fastest plain step, by the heads' times.

        Measured beside the step, and where the head was measured at the step's shape once more.
        """
        step = self.fastest_step
        level = step["dtype"] if step["mode"] == "eager" else step["mode"]
        again = [cell for cell in self.cells(level) if cell["dtype"] == step["dtype"]]
        heads = [step["head"], *(cell for cell in again if cell["shape"] == step["shape"])]
        shares = [extra_time(head) / _median(step) for head in heads]
        return min(shares), max(shares)

    @property
    def added_text(self) -> str:
        """Those shares as text."""
        least, most = (f"{100 * share:.2f}" for share in self.added)
        return f"{least} %" if least == most else f"{least} to {most} %"

    @property
    def ratios_text(self) -> str:
        """`expected` over `F.mse_loss` at the shapes people train on, eager, float32."""
        ratios = [cell["ratios"]["expected/mse"][1] for _, cell in self.known()]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    @property
    def extra(self) -> float:
        """By how many microseconds it takes longer there, at most."""
        return max(extra_time(cell) for _, cell in self.known())

    @property
    def unmeasured(self) -> list[str]:
        """What the plan for a GPU has and these results do not, by level."""
        shapes = {cell["name"] for cell in self.cells("float32")}
        missing = []
        for level, dtype in HEADS[1:]:
            found = {cell["name"] for cell in self.cells(level) if cell["dtype"] == dtype}
            title = dtype if level == dtype else f"{level} {dtype}"
            if not found:
                missing.append(f"{title} at any size")
            elif found < shapes:
                missing.append(f"{title} at any size but {' and '.join(sorted(found))}")
        timed = {cell["mode"] for cell in self.cells("step") + self._other_steps() if _median(cell)}
        missing += [f"the step, {name}" for name in STEPS if name not in timed]
        return missing

    def counted(self, dtype: str, shape: Sequence[int] = LATENTS) -> dict[str, Cell]:
        """Return the counts at one shape, by contender."""
        return {
            row["contender"]: row
            for row in self.cells("counts")
            if row["dtype"] == dtype and tuple(row["shape"]) == tuple(shape)
        }

    def held(self, name: str) -> float:
        """Return the most tensors of the data's size that a loss holds at once, in float32."""
        rows = [row for row in self.cells("counts") if row["dtype"] == "float32"]
        return max(r["peak_bytes"] / r["data_bytes"] for r in rows if r["contender"] == name)

    @property
    def waits(self) -> int:
        """How often one of our losses makes the host wait, or breaks a graph."""
        ours = [
            r for r in self.cells("counts") if r["contender"] in ("expected", "fresh", "shared")
        ]
        return sum(
            r["sync_operators"] + (r.get("sync") is not None) + r.get("graph_breaks", 0)
            for r in ours
        )

    def moved(self, cell: Cell) -> tuple[float, float]:
        """Return shares of a copy's speed: by bytes moved, and by those that any loss must move."""
        row = self.counted(cell["dtype"])["expected"]
        moved = row["bytes" if cell["mode"] == "eager" else "compiled_bytes"] / row["data_bytes"]
        least = useful_rate(cell, "expected") / self.copy_rate
        return moved / 3 * least, least

    @property
    def table(self) -> str:
        """What a reader comes for: `expected` at the shapes people train on."""
        rows = []
        for name, cell in self.known():
            rate = useful_rate(cell, "expected")
            row = self.counted("float32", cell["shape"]).get("expected", {})
            error = row.get("gradient_error")
            rows.append(
                [
                    name,
                    shape_text(cell["shape"]),
                    duration(cell["microseconds"]["expected"][1]),
                    quartiles(cell["ratios"]["expected/mse"], 2),
                    f"{rate / 1e9:.1f}",
                    _percent(rate / self.copy_rate),
                    f"{row['peak_bytes'] / row['data_bytes']:.2f}" if row else "",
                    "" if error is None else f"{error:.1g}",
                    str(row["sync_operators"]) if row else "",
                ]
            )
        header = ["", "shape", "forward and backward", "÷ `F.mse_loss`", "GB/s"]
        header += ["share of a copy's", "peak memory, tensors", "gradient error", "host syncs"]
        return markdown_table(header, rows)

    def heads(self, level: str, dtype: str) -> str:
        """Return the times of a level and dtype over `F.mse_loss`'s."""
        cells = [cell for cell in self.cells(level) if cell["dtype"] == dtype]
        names = [name for name in LABELS if cells and f"{name}/mse" in cells[0]["ratios"]]
        rows = [
            [
                cell["name"],
                shape_text(cell["shape"]),
                duration(_median(cell)),
                *(quartiles(cell["ratios"][f"{name}/mse"], 2) for name in names),
            ]
            for cell in cells
        ]
        header = ["", "shape", LABELS["mse"], *(LABELS[name] for name in names)]
        return markdown_table(header, rows) if rows else ""

    @property
    def steps(self) -> str:
        """Times of a whole training step."""
        rows = []
        for cell in self.cells("step") + self._other_steps():
            for name in (name for name in LABELS if name in cell.get("microseconds", {})):
                ratio = cell["ratios"].get(f"{name}/mse")
                memory = cell.get("peak_bytes", {})
                extra = memory[name] - memory["mse"] if memory else 0
                rows.append(
                    [
                        f"{cell['dtype']}, {cell['mode']}",
                        LABELS[name],
                        duration(cell["microseconds"][name][1]),
                        quartiles(ratio, 3) if ratio else "1",
                        f"{extra / 2**20:+.1f} MiB" if memory else "",
                    ]
                )
        return markdown_table(["", "loss", "step", "÷ `F.mse_loss`", "peak memory above it"], rows)

    def counts(self, dtype: str) -> str:
        """Return memory, operators, bytes and syncs at the shape of Stable Diffusion's latents."""
        columns: dict[str, Callable[[Cell], str]] = {
            "peak memory": lambda row: f"{row['peak_bytes'] / row['data_bytes']:.2f}",
            "operators": lambda row: str(row["operators"]),
            "on data": lambda row: str(row["data_operators"]),
            "passes": lambda row: f"{row['bytes'] / row['data_bytes']:.1f}",
            "compiled": lambda row: _share(row, "compiled_bytes"),
            "graph breaks": lambda row: str(row["graph_breaks"]),
            "syncs": lambda row: str(row["sync_operators"]),
        }
        found = self.counted(dtype)
        if "kernels" in found["mse"]:
            columns["kernels"] = lambda row: str(row["kernels"])
            columns["sync seen by CUDA"] = lambda row: "yes" if row["sync"] else "no"
        rows = [
            [LABELS[name], *(column(found[name]) for column in columns.values())]
            for name in LABELS
            if name in found
        ]
        return markdown_table([dtype, *columns], rows)

    @property
    def limit(self) -> str:
        """How far large sizes are from the speed of a copy."""
        rows = [
            [cell["name"], cell["mode"], *map(_percent, self.moved(cell))]
            for level in ("float32", "compiled")
            for cell in self.cells(level)
            if cell["dtype"] == "float32" and math.prod(cell["shape"]) >= 2**22
        ]
        return markdown_table(["size", "", "by the bytes moved", "by the least bytes"], rows)


def _order(cell: Cell) -> tuple[bool, int]:
    return not cell["name"].startswith("2^"), math.prod(cell["shape"])


def _median(cell: Cell) -> float:
    return float(cell.get("microseconds", {}).get("mse", (0, 0))[1])


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _share(row: Cell, name: str) -> str:
    return f"{row[name] / row['data_bytes']:.1f}" if name in row else ""


def extra_time(timed: Cell) -> float:
    """Return by how many microseconds `expected` takes longer than `F.mse_loss`."""
    return float(timed["microseconds"]["expected"][1] - timed["microseconds"]["mse"][1])


def quartiles(values: Sequence[float], digits: int) -> str:
    """Return the median, and in brackets the quartiles."""
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}, {high})"


def shape_text(shape: Iterable[int]) -> str:
    """Return a shape such as 64×4×64×64."""
    return "×".join(map(str, shape))


def duration(microseconds: float) -> str:
    """Return a time in the unit that suits it."""
    if microseconds < 1e3:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def useful_rate(cell: Cell, name: str) -> float:
    """Return bytes a second that any loss must move: ε̂ and ε read, one gradient written."""
    size = BYTES[cell["dtype"]] * math.prod(cell["shape"])
    return 3 * size / (cell["microseconds"][name][1] / 1e6)


class Overhead:
    """What the page can name.

    Args:
        folder: Folder of the results.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        """Read nothing yet."""
        self.folder = folder

    @cached_property
    def devices(self) -> list[Device]:
        """The devices that have results."""
        paths = [self.folder / f"{name}.json" for name in DEVICES]
        return [Device(path) for path in paths if path.exists()]

    @property
    def gpu_has_run_the_plan(self) -> bool:
        """Whether a GPU's results have what only the plan measures."""
        return any(d.label == "GPU" and "step-compiled" in d.levels for d in self.devices)

    @property
    def provenance(self) -> str:
        """What each level was measured on, and with which command."""
        rows = []
        for device, name in ((d, name) for d in self.devices for name in d.levels):
            level = device.levels[name]
            found = level["machine"]
            where = f"{found['cpu']}, {found['cores']} cores, {found['threads']} threads"
            if "gpu" in found:
                where = f"{found['gpu']}, driver {found['driver']}, CUDA {found['cuda']}"
            changed = " and local changes" if level["local_changes"] else ""
            rows.append(
                [
                    f"{device.label}, {name}",
                    f"{where}, torch {found['torch']}, Python {found['python']}",
                    f"{level['version']}, {level['commit'][:10]}{changed}",
                    str(level["load_average_before"]),
                    f"`{level['command']}`",
                ]
            )
        return markdown_table(["", "machine", "library", "load before", "command"], rows)


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


HOLES = {"overhead": Overhead()}
FIGURES = {f"overhead/{name}": partial(rates, name) for name in DEVICES}
