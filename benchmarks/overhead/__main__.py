"""The command line: `python -m benchmarks.overhead`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import click
import torch

from benchmarks.files import load_json, write_whole
from benchmarks.overhead.details import SUMMARIES
from benchmarks.overhead.levels import LEVELS
from benchmarks.overhead.page import write_page
from benchmarks.overhead.settings import Settings
from benchmarks.provenance import ROOT, git, machine

COMMITTED = ROOT / "benchmarks" / "results" / "overhead"
PAGE = ROOT / "docs" / "overhead.md"
SOURCES = ("s2dm_loss/*.py", "benchmarks/overhead")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEVEL_HELP = "\n".join(
    f"  {name:10} {(level.__doc__ or '').partition(chr(10))[0]}" for name, level in LEVELS.items()
)
OUT = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/overhead"),
    show_default=True,
    help="Folder of the figures, DEVICE.json.",
)


@click.group(help="What the loss costs, on a CPU or a GPU.\n\n\b\nLevels:\n" + LEVEL_HELP)
def main() -> None:
    """Group the commands."""


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[cuda where there is one]")
@click.option("--level", "levels", type=click.Choice(list(LEVELS)), multiple=True, help="[all]")
@click.option("--seconds", default=2.0, show_default=True, help="Time for each cell of a table.")
@click.option("--smallest", default=14, show_default=True, help="log2 of the smallest size; even.")
@click.option("--largest", type=int, help="log2 of the largest size [26; 28 on a GPU].")
@click.option(
    "--in-full",
    type=int,
    multiple=True,
    help="log2 of a size to be compiled and taken in bfloat16 too [20 and 22].",
)
@click.option("--step-batch", type=int, help="Batch of the training step [4; 128 on a GPU].")
@click.option("--step-seconds", default=60.0, show_default=True, help="Time for that step.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of torch [its own choice].")
@click.option(
    "--clock",
    type=click.Choice(list(CLOCKS)),
    default="wall",
    show_default=True,
    help="What times a CPU. CPU time, with one thread, is for a machine that does other work.",
)
@OUT
def run(
    device: str | None,
    levels: tuple[str, ...],
    seconds: float,
    smallest: int,
    largest: int | None,
    in_full: tuple[int, ...],
    step_batch: int | None,
    step_seconds: float,
    threads: int | None,
    clock: str,
    out: Path,
) -> None:
    """Measure, and write the figures; a level measured before is replaced."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("device: torch sees no GPU here")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    on_gpu = name == "cuda"
    largest = largest or (28 if on_gpu else 26)
    sizes = range(smallest, largest + 1, 2)
    if not set(in_full) <= set(sizes):
        raise click.ClickException(
            f"in-full: expected sizes that are measured, {', '.join(map(str, sizes))}, got "
            f"{', '.join(map(str, in_full))}"
        )
    settings = Settings(
        device=torch.device(name),
        seconds=seconds,
        smallest=smallest,
        largest=largest,
        in_full=in_full or (20, 22),
        step_batch=step_batch or (128 if on_gpu else 4),
        step_seconds=step_seconds,
        # Several times the last cache of either: 32 MiB here, 50 MiB on an H100.
        cache_bytes=256 * 2**20,
        clock=CLOCKS[clock],
    )
    path = out / f"{name}.json"
    command = shlex.join(["python", "-m", "benchmarks.overhead", *_without_out(sys.argv[1:])])
    try:
        results = load_json(path) if path.exists() else {}
        for level in levels or tuple(LEVELS):
            click.echo(f"Measuring {level} on {name}, into {path}:", err=True)
            load_before, began = os.getloadavg(), time.time()
            figures = LEVELS[level](settings)
            results[level] = {
                "machine": machine(settings.device),
                "command": command,
                "commit": git("rev-parse", "HEAD"),
                "local_changes": bool(git("status", "--porcelain", "--", *SOURCES)),
                "clock": "CUDA events" if on_gpu else clock,
                "seconds": round(time.time() - began, 1),
                # Above 0 before: something else was running.
                "load_average_before": round(load_before[0], 2),
                "load_average_after": round(os.getloadavg()[0], 2),
                # As they will be read again: lists for tuples.
                "figures": json.loads(json.dumps(figures)),
            }
            text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
            write_whole(path, lambda file, text=text: file.write_text(text, encoding="utf-8"))  # type: ignore[misc]
            click.echo(f"\n{SUMMARIES[level](results)}")
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo(
            "\nStopped. The levels measured before are kept; --level runs the rest.", err=True
        )
        raise SystemExit(130) from None
    click.echo(f"Wrote {path}.")


def _without_out(arguments: list[str]) -> list[str]:
    """Return a command line less the folder that it wrote into, which is one machine's own."""
    kept, words = [], iter(arguments)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return kept


@main.command()
@OUT
def keep(out: Path) -> None:
    """Copy the figures to where they are committed."""
    paths = sorted(out.glob("*.json"))
    if not paths:
        raise click.ClickException(f"out: no figures in {out}; measure them with `run` first")
    for path in paths:
        write_whole(COMMITTED / path.name, lambda file, path=path: shutil.copyfile(path, file))  # type: ignore[misc]
        click.echo(f"Wrote {COMMITTED / path.name}.")


@main.command()
def page() -> None:
    """Write docs/overhead.md and its plots from the committed figures."""
    write_page(COMMITTED, PAGE)
    click.echo(f"Wrote {PAGE}.")


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.overhead")
