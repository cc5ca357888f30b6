"""The command line: `python -m benchmarks.overhead`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.files import load_json, save_json
from benchmarks.overhead import against as other_version
from benchmarks.overhead import levels, plan, step
from benchmarks.overhead.levels import Cell, Settings
from benchmarks.pages.tables import markdown_table
from benchmarks.provenance import git, machine
from s2dm_loss import __version__

SOURCES = ("s2dm_loss/*.py", "benchmarks/overhead")
LEVELS: dict[str, Callable[[Settings], Iterator[Cell]]] = {
    "bandwidth": levels.bandwidth,
    "float32": partial(levels.eager, dtype=torch.float32),
    "bfloat16": partial(levels.eager, dtype=torch.bfloat16),
    "compiled": levels.compiled_heads,
    "step": step.step,
    "step-compiled": step.step_compiled,
    "step-graph": step.step_graph,
    "counts": levels.counts,
}
# What a head may take of `F.mse_loss`'s time on two threads, by log2 of its size; 0.8 beyond.
GOALS = {"2^14": 1.65, "2^16": 1.35, "2^18": 0.95, "2^20": 0.85}

OUT = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/overhead"),
    show_default=True,
    help="Folder of the figures, DEVICE.json; benchmarks/results/overhead is the page's.",
)
THREADS = click.option(
    "--threads", type=click.IntRange(1), help="CPU threads of torch [its own choice]."
)
STEP_BATCH = click.option("--step-batch", type=int, help="Batch of the step [4; 128 on a GPU].")


@click.group()
def main() -> None:
    """What the loss costs, on a CPU or a GPU."""


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[cuda where there is one]")
@click.option("--level", "names", type=click.Choice(list(LEVELS)), multiple=True, help="[all]")
@click.option("--seconds", default=2.0, show_default=True, help="Time for each cell of a table.")
@click.option("--smallest", default=14, show_default=True, help="log2 of the smallest size; even.")
@click.option("--largest", type=int, help="log2 of the largest size [26; 28 on a GPU].")
@STEP_BATCH
@click.option("--step-seconds", default=60.0, show_default=True, help="Time for each step.")
@THREADS
@click.option("--budget", type=float, help="Seconds after which nothing new is begun.")
@click.option("--small", is_flag=True, help="For a rehearsal: one sample, a small network.")
@OUT
def run(
    device: str | None,
    names: tuple[str, ...],
    seconds: float,
    smallest: int,
    largest: int | None,
    step_batch: int | None,
    step_seconds: float,
    threads: int | None,
    budget: float | None,
    small: bool,
    out: Path,
) -> None:
    """Measure, and write after each result; a level measured before is replaced."""
    began = time.monotonic()
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("device: torch sees no GPU here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device == "cuda"
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings = Settings(
        device=torch.device(device),
        seconds=seconds,
        smallest=smallest,
        largest=largest or (28 if on_gpu else 26),
        step_batch=step_batch or (128 if on_gpu else 4),
        step_seconds=step_seconds,
        # Several times the last cache of either: 50 MiB on an H100.
        cache_bytes=(1 if small else 256) * 2**20,
        deadline=began + (budget or float("inf")),
        small=small,
    )
    for name in names or tuple(LEVELS):
        click.echo(f"Measuring {name} on {device}:", err=True)
        _measure(name, LEVELS[name](settings), settings, out / f"{device}.json")
    click.echo(f"Wrote {out / device}.json.")


def _measure(name: str, cells: Iterator[Cell], settings: Settings, path: Path) -> list[Cell]:
    """Write a level's results to `path`, where other levels' stay, one after the other."""
    began, figures = time.monotonic(), []
    shown = {
        "machine": machine(settings.device),
        "version": __version__,
        "command": shlex.join(["python", "-m", "benchmarks.overhead", *_own_words(sys.argv[1:])]),
        "commit": git("rev-parse", "HEAD"),
        "local_changes": bool(git("status", "--porcelain", "--", *SOURCES)),
        "clock": "CUDA events" if settings.device.type == "cuda" else "wall",
        # Above 0: something else was running.
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    try:
        for cell in cells:
            figures.append(cell)
            click.echo(f"  {summary(cell)}", err=True)
            results = load_json(path) if path.exists() else {}
            took = round(time.monotonic() - began, 1)
            results[name] = {**shown, "seconds": took, "figures": figures}
            save_json(path, results)
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        click.echo(f"  {name}: the rest is left out: {str(error).splitlines()[0]}", err=True)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    return figures


def summary(cell: Cell) -> str:
    """Return a result in a line."""
    words = [str(cell[key]) for key in ("name", "contender", "dtype", "mode") if key in cell]
    for pair, (_, median, _) in cell.get("ratios", {}).items():
        words.append(f"{pair} {median:.2f}")
    if "data_bytes" in cell:
        words.append(f"{cell['peak_bytes'] / cell['data_bytes']:.2f} tensors held at once")
    if "copy_bytes_per_second" in cell:
        words.append(f"{cell['copy_bytes_per_second'][1] / 1e9:.1f} GB/s")
    return "  ".join(words)


def _own_words(arguments: list[str]) -> list[str]:
    """Return a command line less the folders in it, which are one machine's own."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in ("--out", "--against"):
            next(words, None)
        elif not word.startswith(("--out=", "--against=")):
            kept.append(word)
    return kept


@main.command()
@click.option("--minutes", default=8.0, show_default=True, help="Time for all of it.")
@click.option("--rehearse", is_flag=True, help="On the CPU, at small sizes.")
@STEP_BATCH
@OUT
def gpu(minutes: float, rehearse: bool, step_batch: int | None, out: Path) -> None:
    """Measure all that is worth it on a GPU in minutes, the most useful first."""
    if not rehearse and not torch.cuda.is_available():
        raise click.ClickException("gpu: torch sees no GPU here; --rehearse needs none")
    options = ["--out", str(out), "--seconds", "1", "--step-seconds", "25"]
    options += ["--device", "cpu" if rehearse else "cuda"]
    if rehearse:
        options += ["--small", "--largest", "14", "--step-batch", str(step_batch or 1)]
    elif step_batch is not None:
        options += ["--step-batch", str(step_batch)]
    plan.follow(plan.run_command(options), 60 * minutes - 5, click.echo)


@main.command()
@click.option(
    "--against",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Checkout of the other version.",
)
@click.option("--seconds", default=10.0, show_default=True, help="Time for each size.")
@click.option("--smallest", default=14, show_default=True, help="log2 of the smallest size; even.")
@click.option("--largest", default=24, show_default=True, help="log2 of the largest size.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@OUT
def head(
    folder: Path, seconds: float, smallest: int, largest: int, threads: int, out: Path
) -> None:
    """Compare the loss with that of another version, forward and backward, in one run."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        version, other = other_version.other_loss(folder)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    settings = Settings(
        torch.device("cpu"), seconds, smallest, largest, 0, 0.0, cache_bytes=256 * 2**20
    )
    cells = other_version.against(settings, other)
    found = _measure("head", cells, settings, out / "head.json")
    results = load_json(out / "head.json")
    results["head"]["against"] = version
    save_json(out / "head.json", results)
    click.echo(f"Old: {version}. New: {__version__}. Times over those of F.mse_loss.\n")
    click.echo(against_table(found))


def against_table(cells: list[Cell]) -> str:
    """Return the ratios of both versions by size, with the goals."""
    rows = []
    for cell in cells:
        goal = GOALS.get(cell["name"], 0.8) if cell["dtype"] == "float32" else 1.0
        old, new = (cell["ratios"][f"{name}/mse"][1] for name in ("old", "new"))
        numbers: list[Any] = [f"{old:.2f}", f"{new:.2f}", f"≤ {goal}"]
        numbers.append("met" if new <= goal else "missed")
        numbers += [f"{cell['operators'][name]}" for name in ("old", "new")]
        rows.append([f"{cell['dtype']}, {cell['name']}", *numbers])
    header = ["", "old", "new", "goal", "", "operators, old", "operators, new"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.overhead")
