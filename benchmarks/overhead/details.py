"""The folds of `docs/overhead.md`: tables by dtype and mode, the step, counts, tries, the limit."""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmarks.overhead.contenders import ATTEMPTS, LABELS
from benchmarks.overhead.figures import (
    DEVICES,
    HEAD_ORDER,
    Results,
    bandwidth_shares,
    by_shape,
    duration,
    eager_cells,
    extra_time,
    quartiles,
    shape_text,
    share_range,
)
from benchmarks.pages.tables import markdown_table


def head_table(cells: list[Results]) -> str:
    """Return the times of the losses of one dtype and mode."""
    names = [name for name in HEAD_ORDER if name in cells[0]["microseconds"] and name != "mse"]
    rows = []
    for cell in cells:
        time = duration(cell["microseconds"]["mse"][1])
        ratios = [quartiles(cell["ratios"][f"{name}/mse"], 2) for name in names]
        rows.append([cell["name"], shape_text(cell["shape"]), time, *ratios])
    header = ["", "shape", "`F.mse_loss`", *(LABELS[name] for name in names)]
    return markdown_table(header, rows)


def overhead_text(results: Results) -> str:
    """Say what small and large sizes show."""
    cells = eager_cells(results)
    on_gpu = "gpu" in results["counts"]["machine"]
    most = {
        name: max(
            row["kernels" if on_gpu else "operators"]
            for row in results["counts"]["figures"]
            if (row["contender"], row["dtype"]) == (name, "float32")
        )
        for name in ("expected", "mse")
    }
    if on_gpu:
        extra = [extra_time(cell) for cell in cells]
        return (
            "Of all but the largest sizes this is the host's time to launch, from an idle device: "
            f"`expected` runs up to {most['expected']} kernels where `F.mse_loss` runs "
            f"{most['mse']}, most of them on one value a sample. That is {min(extra):.0f} to "
            f"{max(extra):.0f} µs more, once a step, whatever the size. In a training step the "
            "device has other work meanwhile.\n"
        )
    smallest = min(cells, key=lambda cell: math.prod(cell["shape"]))
    return (
        "Small sizes show the price of calling operators at all, and not of the data: `expected` "
        f"calls {most['expected']} where `F.mse_loss` calls {most['mse']}, most of them on one "
        f"value a sample. At {smallest['name']} elements that is {extra_time(smallest):.0f} µs "
        "more, once a step. Large sizes show the fresh memory that is not touched.\n"
    )


def step_text(results: Results) -> str:
    """Return what a whole training step takes."""
    figures, on_gpu = results["step"]["figures"], "gpu" in results["step"]["machine"]
    names = [name for name in (*HEAD_ORDER, "sa_dpm") if name in figures["microseconds"]]
    rows = []
    for name in names:
        ratio = figures["ratios"].get(f"{name}/mse")
        extra = figures["peak_bytes"][name] - figures["peak_bytes"]["mse"]
        rows.append(
            [
                LABELS[name],
                duration(figures["microseconds"][name][1]),
                quartiles(ratio, 3) if ratio else "1",
                f"{extra / 2**20:+.2f} MiB",
            ]
        )
    table = markdown_table(["loss", "step", "÷ `F.mse_loss`", "peak memory above it"], rows)
    text = (
        f"Forward, loss, backward and optimizer of {figures['model']} "
        f"({figures['parameters'] / 1e6:.1f} M parameters), batch {figures['shape'][0]}, "
        f"{'convolutions in TF32 as torch has it, ' if on_gpu else ''}"
        f"{figures['rounds']} rounds.\n\n{table}\n"
        "Losses that differ by microseconds differ here by the noise of a whole step. "
        f"By the head's own times at this shape `expected` adds {share_range(results)} to the "
        "plain step, from an idle device.\n"
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


def count_text(results: Results) -> str:
    """Return memory, operators, bytes and syncs."""
    on_gpu = "gpu" in results["counts"]["machine"]
    parts = []
    for dtype in ("float32", "bfloat16"):
        for shape, contenders in by_shape(results, dtype):
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
                f"{dtype}, {shape_text(shape)}",
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
            parts.append(markdown_table(header, rows))
    parts.append(
        "Peak memory and passes are in tensors of the data's own size and dtype; passes are the "
        "bytes that operators take in and give out, so what `F.mse_loss` does inside is not in "
        "them. Compiled, they are Inductor's own count.\n"
    )
    return "\n".join(parts)


def attempts_text(cells: list[Results]) -> str:
    """Return the forms that the head went through."""
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
                    duration(cell["microseconds"][name][1]),
                    quartiles(ratio, 2) if name != "mse" else "1",
                    f"{memory:.2f}",
                ]
            )
    header = ["size", "mode", "form of `expected`", "time", "÷ `F.mse_loss`", "peak memory"]
    return markdown_table(header, rows)


def limit_text(results: Results) -> str:
    """Return how far the head is from the speed of a copy."""
    rate = results["bandwidth"]["figures"]["copy_bytes_per_second"]
    rows = []
    for cell in results["head"]["figures"]:
        if cell["dtype"] != "float32" or math.prod(cell["shape"]) < 2**22:
            continue
        moved, least = bandwidth_shares(results, cell, "expected")
        rows.append([cell["name"], cell["mode"], f"{moved:.0%}", f"{least:.0%}"])
    table = markdown_table(
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


def provenance(found: dict[str, Results]) -> str:
    """Return what each level was measured on, and with which command."""
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
    table = markdown_table(
        ["", "level", "machine", "clock", "load average before / after", "commit", "command"], rows
    )
    return table + (
        "\nA load average above 0 before a level is other work on the same machine, or the level "
        "before it. The figures with all quartiles are in `benchmarks/results/overhead/`.\n"
    )


def bandwidth_text(results: Results) -> str:
    """Return the speed of a copy."""
    low, middle, high = results["bandwidth"]["figures"]["copy_bytes_per_second"]
    return f"A copy moves {middle / 1e9:.1f} ({low / 1e9:.1f}, {high / 1e9:.1f}) GB/s.\n"


def heads_text(results: Results) -> str:
    """Return the tables of every dtype and mode that was measured."""
    groups: dict[str, list[Results]] = {}
    for cell in results["head"]["figures"]:
        groups.setdefault(f"{cell['mode'].capitalize()}, {cell['dtype']}", []).append(cell)
    return "\n".join(f"**{title}**\n\n{head_table(cells)}" for title, cells in groups.items())


SUMMARIES: dict[str, Callable[[Results], str]] = {
    "counts": count_text,
    "bandwidth": bandwidth_text,
    "head": heads_text,
    "attempts": lambda results: attempts_text(results["attempts"]["figures"]),
    "step": step_text,
}
"""What a run prints of each level."""
