"""`docs/overhead.md`, written from the figures: no number on that page is typed by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl

from benchmarks.overhead.contenders import LABELS
from benchmarks.overhead.details import (
    attempts_text,
    count_text,
    heads_text,
    limit_text,
    overhead_text,
    provenance,
    step_text,
)
from benchmarks.overhead.figures import (
    DEVICES,
    Results,
    by_shape,
    copy_rate,
    duration,
    eager_cells,
    extra_time,
    head_shares,
    quartiles,
    shape_text,
    share_range,
    useful_rate,
    value_range,
)
from benchmarks.overhead.goals import goals
from benchmarks.pages.figures import COLORS, STYLE, new_figure, save_figure
from benchmarks.pages.tables import folded, listed, markdown_table
from benchmarks.pages.tables import write_page as write_parts

SOURCE = "`python -m benchmarks.overhead page` from benchmarks/results/overhead; its words are in "
KNOWN = ("CIFAR10", "SD latents", "CelebA", "ADM-256", "video latents")
"""The shapes that users know, by the end of a cell's name."""
DRAWN = {"expected": 1, "mse": 0, "min_snr": 3, "released": 4}

GOALS = """\
Ratios of times of one forward and backward of the loss head, float32, eager unless it says
otherwise, over every size and shape of at least 2²⁰ elements: from the least to the greatest median
ratio, of which the worse decides; in brackets the same by the fastest rounds, which other work on
the machine disturbs least.
"""

WHY = """\
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
the gradient, 5 passes. Left to itself the compiler for a CPU keeps the residual, as it does for
`F.mse_loss`, and makes 7; a checkpoint in the head tells it not to (torch 2.13 and later).
"""

HOW = """\
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
    """Write the page, and a plot for each device that was measured.

    Raises:
        FileNotFoundError: If there are no figures.
    """
    found: dict[str, Results] = {
        device: json.loads(path.read_text(encoding="utf-8"))
        for device in DEVICES
        if (path := results / f"{device}.json").exists()
    }
    if not found:
        raise FileNotFoundError(f"no figures in {results}: run `python -m benchmarks.overhead run`")
    write_parts(page, "Overhead", SOURCE + "benchmarks/overhead/page.py", _parts(found, page))


def _parts(found: dict[str, Results], page: Path) -> Iterable[str]:
    for device, results in found.items():
        if len(found) > 1:
            yield f"## On a {DEVICES[device]}"
        yield from _answer(device, results)
        picture = f"assets/overhead/{device}.svg"
        _plot(results, page.parent / picture)
        yield f"![GB/s of the losses by size, below the speed of a copy]({picture})"
        yield (
            "GB/s, in the table and in the figure: the bytes that any loss has to move (read ε̂ and "
            "ε, write one gradient) over the time it took, forward and backward, eager, float32. A "
            "copy between tensors that exist already is the ceiling"
            + (
                "; a fresh tensor, which every gradient is, costs a CPU more than that."
                if device == "cpu"
                else "."
            )
        )
    yield _left_out(found)
    yield "## Details"
    yield folded("The goals and the figures", f"{GOALS}\n{goals(found)}")
    yield folded("Why it costs so little", WHY)
    for device, results in found.items():
        yield from _device(DEVICES[device], results)
    yield folded("How it was measured, and on what", f"{HOW}\n{provenance(found)}")


def _known(results: Results) -> list[tuple[str, Results]]:
    """Return the eager float32 cells of the shapes that users know, by name."""
    return [
        (name, cell)
        for name in KNOWN
        for cell in eager_cells(results)
        if cell["name"].split(", ")[-1] == name
    ]


def _answer(device: str, results: Results) -> Iterable[str]:
    cells = _known(results)
    ratios = [cell["ratios"]["expected/mse"][1] for _, cell in cells]
    extra = [extra_time(cell) for _, cell in cells]
    # The shapes at which memory and syncs were counted.
    counted = {shape: rows["expected"] for shape, rows in by_shape(results, "float32")}
    plain = {shape: rows["mse"] for shape, rows in by_shape(results, "float32")}
    most = max(row["peak_bytes"] / row["data_bytes"] for row in counted.values())
    theirs = max(row["peak_bytes"] / row["data_bytes"] for row in plain.values())
    syncs = sum(row["sync_operators"] for row in counted.values())
    step = results["step"]["figures"]
    most_added = head_shares(results)[1]
    slows = "No" if most_added < 0.005 else "Hardly" if most_added < 0.01 else "Yes"
    yield (
        f"**Does the loss slow a training down? {slows}: it adds {share_range(results)} to "
        f"a step of CIFAR10's U-Net, batch {step['shape'][0]}, eager, on a {DEVICES[device]}.** In "
        f"place of `F.mse_loss` it takes {value_range(ratios)} times as long at shapes that people "
        f"train on, at worst {max(extra):.0f} µs more a step; in float32 it holds {most:.0f} "
        f"tensor of the data's size at once where that holds {theirs:.0f}, and it {_waits(syncs)}."
    )
    header = ["", "shape", "forward and backward", "÷ `F.mse_loss`", "GB/s", "share of a copy's"]
    errors = any("gradient_error" in row for row in counted.values())
    header += ["peak memory, tensors", *(["gradient error"] if errors else []), "host syncs"]
    rows = []
    for name, cell in cells:
        rate = useful_rate(cell, "expected")
        row = [
            name,
            shape_text(cell["shape"]),
            duration(cell["microseconds"]["expected"][1]),
            quartiles(cell["ratios"]["expected/mse"], 2),
            f"{rate / 1e9:.1f}",
            f"{rate / copy_rate(results):.0%}",
        ]
        count = counted.get(tuple(cell["shape"]), {})
        row.append(f"{count['peak_bytes'] / count['data_bytes']:.2f}" if count else "")
        row += [f"{count['gradient_error']:.1g}" if count else ""] if errors else []
        row.append(str(count["sync_operators"]) if count else "")
        rows.append(row)
    yield markdown_table(header, rows)


def _waits(syncs: int) -> str:
    """Say how often the host waits for the device."""
    if not syncs:
        return "never makes the host wait for the device"
    return f"makes the host wait for the device, {syncs} time{'s' if syncs > 1 else ''}"


def _left_out(found: dict[str, Results]) -> str:
    missing = [
        f"on a {label} (`python -m benchmarks.overhead run --device {device}` measures it, and "
        "there also kernels, host syncs under debug mode and a captured CUDA graph)"
        for device, label in DEVICES.items()
        if device not in found
    ]
    for device, results in found.items():
        rows = [rows["expected"] for _, rows in by_shape(results, "float32")]
        shapes = {tuple(row["shape"]) for row in rows}
        uncounted = [name for name, cell in _known(results) if tuple(cell["shape"]) not in shapes]
        if uncounted:
            missing.append(f"memory and syncs of {listed(uncounted)} on a {DEVICES[device]}")
        in_full = [cell["name"] for cell in results["head"]["figures"] if cell["mode"] != "eager"]
        missing.append(
            f"compiled and in bfloat16 on a {DEVICES[device]} any size but "
            f"{listed(list(dict.fromkeys(in_full)))}"
        )
        if not any("gradient_error" in row for row in rows):
            missing.append(f"the error of the gradient on a {DEVICES[device]}")
    return f"Not measured, and left out: {'; '.join(missing)}." if missing else ""


def _device(label: str, results: Results) -> Iterable[str]:
    text = (
        "Time of the head, forward and backward, as a ratio to `F.mse_loss` in the same mode and "
        f"dtype.\n\n{heads_text(results)}\n{overhead_text(results)}"
    )
    if "gpu" not in results["head"]["machine"]:
        text += (
            "\nCompiled, `fresh` and the released formula draw noise inside, and Inductor's random "
            "numbers are slow on a CPU; given as `skip_noise` they are drawn outside."
        )
    yield folded(f"Every size, mode and dtype on a {label}", text)
    yield folded(f"A whole training step on a {label}", step_text(results))
    yield folded(f"Memory, operators, syncs on a {label}", count_text(results))
    yield folded(f"What was tried on a {label}", attempts_text(results["attempts"]["figures"]))
    yield folded(f"How far from the limit on a {label}", limit_text(results))


def _plot(results: Results, path: Path) -> None:
    cells = [cell for cell in eager_cells(results) if cell["name"].startswith("2^")]
    with mpl.rc_context(STYLE):
        figure, ((axes,),) = new_figure(3.4)
        sizes = [math.prod(cell["shape"]) for cell in cells]
        for name, color in DRAWN.items():
            rates = [useful_rate(cell, name) / 1e9 for cell in cells]
            label = LABELS[name].replace("`", "")
            axes.plot(sizes, rates, marker="o", markersize=3, color=COLORS[color], label=label)
        ceiling = copy_rate(results) / 1e9
        axes.axhline(ceiling, color=COLORS[2], linestyle="--", linewidth=1.2, label="a copy")
        axes.set_xscale("log", base=2)
        axes.set(xlabel="elements of ε̂", ylabel="GB/s", ylim=(0, 1.1 * ceiling))
        axes.minorticks_off()
        figure.legend(loc="outside lower center", ncols=3)
    save_figure(figure, path)
