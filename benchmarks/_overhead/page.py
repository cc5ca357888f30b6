"""`docs/overhead.md`, written from the figures: no number on that page is typed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks._overhead.contenders import ATTEMPTS, LABELS

Results = dict[str, Any]  # one device's JSON
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
NOT_MEASURED = "not measured yet"
LARGE = 2**20
HEAD_ORDER = ("mse", "mse_lifted", "min_snr", "expected", "shared", "fresh", "released")

INTRO = """\
# Overhead

<!-- Written by `python -m benchmarks.overhead page` from benchmarks/results/overhead; edit
     benchmarks/_overhead/page.py. -->

Does the loss slow a training down? `python -m benchmarks.overhead run` answers on your machine, and
this page is written from what it measured on ours.
"""

GOALS = """\
## The goals and the figures

Ratios of times of one forward and backward of the loss head, float32, eager unless it says
otherwise, over every size and shape of at least 2²⁰ elements: from the least to the greatest median
ratio, of which the worse decides; in brackets the same by the fastest rounds, which other work on
the machine disturbs least.
"""

WHY = """\
## Why it costs so little

A loss head computes next to nothing; it waits for memory. So what counts is how often the data, ε̂
and ε, are read or written ("passes"), and how many new tensors of their size are made: on a CPU a
fresh page costs more than the arithmetic on it.

| | forward | backward | passes | tensors made | held at once |
|---|---|---|---|---|---|
| `F.mse_loss` | read ε̂, ε, write squares, read them | clear a gradient, read ε̂, ε, write it | 8 \
| 3 | 2 |
| ours, `expected` and `shared` | read ε, read ε̂, ε, write the residual, read it | read the \
residual, turn it into the gradient where it is | 7 | 1 | 1 |

(`F.mse_loss` as PyTorch's source has it: the scalar it returns keeps memory for all the squares.)
The gradient of `weight · mean (ε̂ - gain · ε)²` is the residual times one number for each sample, so
the residual is overwritten with it. A second backward through the same graph, a gradient of the
gradient, `torch.func` and forward mode get a fresh one.

Under `torch.compile` the head is plain operators, which Inductor fuses: the forward pass reads ε̂
and ε and keeps nothing but a number for each sample, the backward pass reads both again and writes
the gradient, 5 passes. Left to itself the compiler keeps the residual, as it does for `F.mse_loss`,
and makes 7; a checkpoint in the head tells it not to (torch 2.13 and later).
"""

HOW = """\
## How it was measured

One process; every contender on the same tensors, once a round, each round in an order of its own.
A ratio is taken within each round, so that what else the machine does meets both sides; the
tables give its median and, in brackets, its quartiles. Several sets of inputs take turns until they
fill 256 MiB (256 sets at most), so that none is found in a cache; all are allocated anew five times
a cell, since where they happen to lie in memory moves a ratio by 5 % and more. The clock is named
below: on a GPU, CUDA events from an idle stream, so that the host's time to launch counts; on a CPU
that does other work at the same time, the CPU time of one thread, to which other work adds nothing
but its share of the caches. Memory is the allocator's own account. Operators and bytes are counted
below autograd and have a ceiling in `tests/test_head_cost.py`, so they cannot grow unseen. Min-SNR
is the path of the diffusers training scripts; the released formula is written plainly, with its
second noise tensor, two squared errors, masks and concatenation, and like `fresh` it draws the
noise ζ.
"""


def write_page(results: Path, page: Path) -> None:
    """Write the page, and a plot beside each device's figures."""
    found: dict[str, Results] = {}
    for device in DEVICES:
        path = results / f"{device}.json"
        if path.exists():
            found[device] = json.loads(path.read_text(encoding="utf-8"))
    if not found:
        raise FileNotFoundError(f"no figures in {results}: run `python -m benchmarks.overhead run`")
    parts = [INTRO, GOALS, _goals(found), WHY]
    for device, label in DEVICES.items():
        parts.append(f"## On a {label}\n")
        if device not in found:
            parts.append(
                f"{NOT_MEASURED.capitalize()}: no GPU was at hand. `python -m benchmarks.overhead "
                "run --device cuda` measures all of the above and, on a GPU only, the kernels "
                "launched, host syncs (`torch.cuda.set_sync_debug_mode`) and the capture of a "
                "whole training step in a CUDA graph.\n"
            )
            continue
        picture = results / f"{device}.svg"
        _plot(found[device]["head"]["figures"], picture)
        link = f"../{picture.relative_to(page.parent.parent).as_posix()}"
        parts += _device(found[device], link)
    parts += [HOW, _provenance(found)]
    page.write_text("\n".join(part.rstrip("\n") + "\n" for part in parts), encoding="utf-8")


def _goals(found: dict[str, Results]) -> str:
    rows = []
    for figure, goal, measure in (
        ("`expected` ÷ `F.mse_loss`", "≤ 1.05", _ratio("expected/mse", 1.05)),
        ("the same, stretch goal", "≤ 0.8", _ratio("expected/mse", 0.8)),
        (
            "compiled `expected` ÷ compiled `F.mse_loss`",
            "≤ 1.05",
            _ratio("expected/mse", 1.05, mode="compiled"),
        ),
        ("`expected` ÷ Min-SNR path", "≤ 0.7", _ratio("expected/min_snr", 0.7)),
        (
            "released formula ÷ `expected`",
            "≥ 6 on a CPU, ≥ 5 on a GPU",
            _ratio("released/expected", {"cpu": 6.0, "cuda": 5.0}, at_least=True),
        ),
        ("whole training step, `expected` ÷ `F.mse_loss`", "≤ 1.005", _whole_step),
        ("whole training step, SA-DPM (K = 2) ÷ `expected`", "reported", _sa_dpm),
        ("peak memory of the head above `F.mse_loss`, in data tensors", "≤ 0", _memory),
        ("host syncs, graph breaks", "0, 0", _syncs),
        (
            "share of the measured copy bandwidth, largest size",
            "≥ 80 % on a GPU",
            _bandwidth_goal,
        ),
    ):
        cells = [
            measure(device, found[device]) if device in found else NOT_MEASURED
            for device in DEVICES
        ]
        rows.append([figure, goal, *cells])
    return _table(["figure", "goal", *DEVICES.values()], rows)


def _ratio(
    pair: str, goal: float | dict[str, float], *, mode: str = "eager", at_least: bool = False
) -> Any:
    def measure(device: str, results: Results) -> str:
        cells = [
            cell
            for cell in results["head"]["figures"]
            if cell["mode"] == mode
            and cell["dtype"] == "float32"
            and math.prod(cell["shape"]) >= LARGE
        ]
        medians = [cell["ratios"][pair][1] for cell in cells]
        fastest = [cell["fastest"][pair] for cell in cells]
        bound = goal[device] if isinstance(goal, dict) else goal
        met = min(medians) >= bound if at_least else max(medians) <= bound
        return f"{_range(medians)} ({_range(fastest)}): {_verdict(met)}"

    return measure


def _whole_step(_device: str, results: Results) -> str:
    figures = results["step"]["figures"]
    low, middle, high = figures["ratios"]["expected/mse"]
    alone = 1 + _head_share(figures)
    text = f"{_quartiles([low, middle, high], 3)}; by the head's own times {alone:.4f}: "
    # The head's own times settle what the step's noise leaves open.
    open_ = low <= 1.005 < high
    return text + _verdict((alone if open_ else middle) <= 1.005)


def _head_share(figures: Results) -> float:
    """Return what `expected` adds to the plain step, by the head's own times."""
    times = figures["head"]["microseconds"]
    return (times["expected"][1] - times["mse"][1]) / figures["microseconds"]["mse"][1]


def _sa_dpm(_device: str, results: Results) -> str:
    return _quartiles(results["step"]["figures"]["ratios"]["sa_dpm/expected"], 2)


def _memory(_device: str, results: Results) -> str:
    above = []
    for shape, rows in _count_groups(results, "float32"):
        data = 4 * math.prod(shape)
        above.append((rows["expected"]["peak_bytes"] - rows["mse"]["peak_bytes"]) / data)
    return f"{min(above):+.3f} to {max(above):+.3f}: {_verdict(max(above) <= 0)}"


def _syncs(device: str, results: Results) -> str:
    ours = [
        row
        for row in results["counts"]["figures"]
        if row["contender"] in ("expected", "fresh", "shared")
    ]
    syncs = sum(row["sync_operators"] for row in ours)
    if device == "cuda":
        syncs += sum(row["sync"] is not None for row in ours)
    breaks = sum(row.get("graph_breaks", 0) for row in ours)
    return f"{syncs}, {breaks}: {_verdict(syncs == breaks == 0)}"


def _bandwidth_goal(device: str, results: Results) -> str:
    cell = max(
        (
            cell
            for cell in results["head"]["figures"]
            if cell["mode"] == "eager" and cell["dtype"] == "float32"
        ),
        key=lambda cell: math.prod(cell["shape"]),
    )
    moved, _ = _bandwidth_shares(results, cell, "expected")
    text = f"{moved:.0%} at {cell['name']}"
    return f"{text}: {_verdict(moved >= 0.8)}" if device == "cuda" else text


def _bandwidth_shares(results: Results, cell: Results, name: str) -> tuple[float, float]:
    """Return (bytes moved, least bytes possible) ÷ (time · copy bandwidth).

    The least is to read ε̂ and ε and to write one gradient.
    """
    rate = results["bandwidth"]["figures"]["copy_bytes_per_second"][1]
    size = {"float32": 4, "bfloat16": 2}[cell["dtype"]] * math.prod(cell["shape"])
    row = next(
        row
        for row in reversed(results["counts"]["figures"])
        if row["contender"] == name and row["dtype"] == cell["dtype"]
    )
    counted = row["bytes"] if cell["mode"] == "eager" else row["compiled_bytes"]
    could_move = rate * cell["microseconds"][name][1] / 1e6
    return counted / row["data_bytes"] * size / could_move, 3 * size / could_move


def _device(results: Results, picture: str) -> list[str]:
    head = results["head"]["figures"]
    parts = [
        f"![Time of the loss head over that of F.mse_loss, by size]({picture})\n",
        "Time of the head, forward and backward, as a ratio to `F.mse_loss` in the same mode and "
        "dtype.\n",
    ]
    for dtype in ("float32", "bfloat16"):
        for mode in ("eager", "compiled"):
            cells = [cell for cell in head if cell["dtype"] == dtype and cell["mode"] == mode]
            if cells:
                parts += [f"### {mode.capitalize()}, {dtype}\n", _head_table(cells)]
                if (dtype, mode) == ("float32", "eager"):
                    parts.append(_overhead_text(results, cells))
                if mode == "compiled" and "gpu" not in results["head"]["machine"]:
                    parts.append(
                        "`fresh` and the released formula draw noise inside, and Inductor's random "
                        "numbers are slow on a CPU; given as `skip_noise` they are drawn outside.\n"
                    )
    parts += ["### A whole training step\n", _step_text(results["step"]["figures"])]
    parts += ["### Memory, operators, syncs\n", _count_text(results)]
    parts += ["### What was tried\n", _attempts_text(results["attempts"]["figures"])]
    parts += ["### How far from the limit\n", _limit_text(results)]
    return parts


def _head_table(cells: list[Results]) -> str:
    names = [name for name in HEAD_ORDER if name in cells[0]["microseconds"] and name != "mse"]
    rows = []
    for cell in cells:
        time = _duration(cell["microseconds"]["mse"][1])
        ratios = [_quartiles(cell["ratios"][f"{name}/mse"], 2) for name in names]
        rows.append([cell["name"], _shape(cell["shape"]), time, *ratios])
    header = ["", "shape", "`F.mse_loss`", *(LABELS[name] for name in names)]
    return _table(header, rows)


def _overhead_text(results: Results, cells: list[Results]) -> str:
    smallest = min(cells, key=lambda cell: math.prod(cell["shape"]))
    times = smallest["microseconds"]
    extra = times["expected"][1] - times["mse"][1]
    counts = {
        row["contender"]: row["operators"]
        for row in results["counts"]["figures"]
        if row["dtype"] == "float32"
    }
    return (
        "Small sizes show the price of calling operators at all, and not of the data: `expected` "
        f"calls {counts['expected']} where `F.mse_loss` calls {counts['mse']}, most of them on one "
        f"value a sample. At {smallest['name']} elements that is {extra:.0f} µs more, once a "
        "step. Large sizes show the fresh memory that is not touched.\n"
    )


def _step_text(figures: Results) -> str:
    names = [name for name in (*HEAD_ORDER, "sa_dpm") if name in figures["microseconds"]]
    rows = []
    for name in names:
        ratio = figures["ratios"].get(f"{name}/mse")
        extra = figures["peak_bytes"][name] - figures["peak_bytes"]["mse"]
        rows.append(
            [
                LABELS[name],
                _duration(figures["microseconds"][name][1]),
                _quartiles(ratio, 3) if ratio else "1",
                f"{extra / 2**20:+.2f} MiB",
            ]
        )
    table = _table(["loss", "step", "÷ `F.mse_loss`", "peak memory above it"], rows)
    share = _head_share(figures)
    text = (
        f"Forward, loss, backward and optimizer of {figures['model']} "
        f"({figures['parameters'] / 1e6:.1f} M parameters), batch {figures['shape'][0]}, "
        f"{figures['rounds']} rounds.\n\n{table}\n"
        "Losses that differ by microseconds differ here by the noise of a step that takes seconds. "
        "By the head's own times at this shape, which have no such noise, `expected` changes the "
        f"plain step by {share:+.4%}.\n"
    )
    if "cuda_graph" in figures:
        held = ", ".join(
            f"{LABELS[name]}: {'yes' if graph['captured'] and graph['falls'] else 'no'}"
            for name, graph in figures["cuda_graph"].items()
        )
        text += (
            f"\nThe whole step captured in a CUDA graph, replayed, and its loss falling: {held}.\n"
        )
    return text


def _count_text(results: Results) -> str:
    on_gpu = "gpu" in results["counts"]["machine"]
    parts = []
    for dtype in ("float32", "bfloat16"):
        for shape, contenders in _count_groups(results, dtype):
            rows = []
            for name in (name for name in HEAD_ORDER if name in contenders):
                row = contenders[name]
                data = row["data_bytes"]
                cells = [
                    LABELS[name],
                    f"{row['peak_bytes'] / data:.2f}",
                    str(row["data_operators"]),
                    str(row["operators"]),
                    f"{row['bytes'] / data:.1f}",
                    str(row["sync_operators"]),
                ]
                if "graph_breaks" in row:
                    # Inductor's own count, where the graph is whole.
                    moved = row.get("compiled_bytes")
                    cells += [
                        str(row["graph_breaks"]),
                        "-" if moved is None else f"{moved / data:.1f}",
                    ]
                if on_gpu:
                    cells += [str(row["kernels"]), row["sync"] or "none"]
                rows.append(cells)
            header = [
                f"{dtype}, {_shape(shape)}",
                "peak memory",
                "operators on data",
                "operators",
                "passes",
                "sync operators",
            ]
            if len(rows[0]) > len(header) + 2 * on_gpu:
                header += ["graph breaks", "passes, compiled"]
            if on_gpu:
                header += ["kernels", "sync under debug mode"]
            parts.append(_table(header, rows))
    parts.append(
        "Peak memory and passes are in tensors of the data's own size and dtype; passes are the "
        "bytes that operators take in and give out, so what `F.mse_loss` does inside is not in "
        "them. Compiled, they are Inductor's own count.\n"
    )
    return "\n".join(parts)


def _attempts_text(cells: list[Results]) -> str:
    rows = []
    for cell in cells:
        for name in cell["microseconds"]:
            ratio = cell["ratios"][f"{name}/mse"]
            memory = cell["peak_bytes"][name] / (4 * math.prod(cell["shape"]))
            label = ATTEMPTS[name] if name != "shipped" or cell["mode"] == "eager" else "shipped"
            rows.append(
                [
                    cell["name"],
                    cell["mode"],
                    label,
                    _duration(cell["microseconds"][name][1]),
                    _quartiles(ratio, 2) if name != "mse" else "1",
                    f"{memory:.2f}",
                ]
            )
    header = ["size", "mode", "form of `expected`", "time", "÷ `F.mse_loss`", "peak memory"]
    return _table(header, rows)


def _limit_text(results: Results) -> str:
    rate = results["bandwidth"]["figures"]["copy_bytes_per_second"]
    rows = []
    for cell in results["head"]["figures"]:
        if cell["dtype"] != "float32" or math.prod(cell["shape"]) < 2**22:
            continue
        moved, least = _bandwidth_shares(results, cell, "expected")
        rows.append([cell["name"], cell["mode"], f"{moved:.0%}", f"{least:.0%}"])
    table = _table(
        ["size", "mode", "bytes moved ÷ what a copy moves", "least bytes ÷ what a copy moves"], rows
    )
    text = (
        f"A copy between tensors that exist already moves {rate[1] / 1e9:.1f} GB/s here. The head "
        "of `expected` in those terms, by the bytes that it moves, and by the least that any head "
        f"could, which is to read ε̂ and ε and to write one gradient:\n\n{table}\n"
    )
    if "gpu" not in results["bandwidth"]["machine"]:
        text += (
            "On a CPU the distance is mostly the cost of touching fresh memory for the residual, "
            "which a copy into an existing tensor does not pay.\n"
        )
    return text


def _provenance(found: dict[str, Results]) -> str:
    rows = []
    for device, results in found.items():
        for level, run in results.items():
            machine = run["machine"]
            where = machine.get("gpu", machine["cpu"])
            if "gpu" in machine:
                where += f", driver {machine['driver']}, CUDA {machine['cuda']}"
            else:
                where += f", {machine['cores']} cores, {machine['threads']} threads"
            load = f"{run['load_average_before']} / {run['load_average_after']}"
            commit = run["commit"][:10] + (" and local changes" if run["local_changes"] else "")
            rows.append(
                [
                    DEVICES[device],
                    level,
                    f"{where}, torch {machine['torch']}, Python {machine['python']}",
                    run["clock"],
                    load,
                    commit,
                    f"`{run['command']}`",
                ]
            )
    table = _table(
        ["", "level", "machine", "clock", "load average before / after", "commit", "command"], rows
    )
    return table + (
        "\nA load average above 0 before a level is other work on the same machine, or the level "
        "before it. The figures with all quartiles are in `benchmarks/results/overhead/`.\n"
    )


def _plot(cells: list[Results], path: Path) -> None:
    colours = {
        "expected": "#1e88e5",
        "shared": "#43a047",
        "fresh": "#8e24aa",
        "min_snr": "#fb8c00",
        "released": "#e53935",
    }
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "s2dm-loss", "font.size": 10}):
        figure = Figure(figsize=(9, 4), layout="constrained", facecolor="white")
        lines = {
            mode: [
                cell
                for cell in cells
                if cell["mode"] == mode
                and cell["dtype"] == "float32"
                and cell["name"].startswith("2^")
            ]
            for mode in ("eager", "compiled")
        }
        lines = {mode: sizes for mode, sizes in lines.items() if len(sizes) > 1}
        axes = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
        for axis, (mode, sizes) in zip(axes, lines.items(), strict=True):
            x = [math.prod(cell["shape"]) for cell in sizes]
            for name, colour in colours.items():
                ratios = [cell["ratios"][f"{name}/mse"] for cell in sizes]
                low, middle, high = zip(*ratios, strict=True)
                axis.plot(x, middle, marker="o", markersize=3, color=colour, label=_plain(name))
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
            axis.minorticks_off()
            axis.set_title(f"{mode}, float32", loc="left")
            axis.set_xlabel("elements of ε̂")
            axis.grid(visible=True, alpha=0.2)
        axes[0].set_ylabel("time ÷ F.mse_loss")
        axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def _count_groups(
    results: Results, dtype: str
) -> Iterable[tuple[tuple[int, ...], dict[str, Results]]]:
    """Group the counts of one dtype by shape, then by contender."""
    groups: dict[tuple[int, ...], dict[str, Results]] = {}
    for row in results["counts"]["figures"]:
        if row["dtype"] == dtype:
            groups.setdefault(tuple(row["shape"]), {})[row["contender"]] = row
    return groups.items()


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(name: str) -> str:
    return LABELS[name].replace("`", "")


def _quartiles(values: list[float], digits: int) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}, {high})"


def _range(values: list[float]) -> str:
    ends = (min(values), max(values))
    ends = [f"{value:.2f}" if value < 10 else f"{value:.1f}" for value in ends]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape))


def _duration(microseconds: float) -> str:
    if microseconds < 1e3:
        return f"{microseconds:.0f} µs"
    return f"{microseconds / 1e3:.1f} ms" if microseconds < 1e6 else f"{microseconds / 1e6:.2f} s"


def _verdict(met: bool) -> str:
    return "met" if met else "**missed**"
