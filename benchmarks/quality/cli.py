"""The command line: `python -m benchmarks.quality`."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.quality.catalogue import CATALOGUE, listed

if TYPE_CHECKING:  # torch and its friends take seconds to import, and help should be there at once
    from benchmarks.quality.presets import Preset

RESULTS = Path("benchmarks/results/quality")
"""Where committed results lie, in the checkout from which `keep` is called."""


@click.group(
    help="What the loss does to samples: `run digits` is the README's run.\n\n\b\nPresets:\n"
    + listed(),
)
def main() -> None:
    """Group the commands."""


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Say what went wrong in one line where a user can mend it, and how to go on."""
    context = click.get_current_context()
    words = [str(context.info_name), *filter(None, [context.params.get("preset")])]
    for name in ("steps", "out", "seeds", "data", "seconds"):
        if (value := context.params.get(name)) is not None:
            words += [f"--{name}", str(value)]
    for name in ("sampler", "part"):
        for value in context.params.get(f"{name}s", ()):
            words += [f"--{name}", str(value)]
    again = f"python -m benchmarks.quality {shlex.join(words)}"
    try:
        yield
    except BrokenProcessPool as error:
        raise click.ClickException(
            "a worker process died, perhaps for want of memory; what is done is kept, and "
            f"`{again} --workers 1` goes on from there"
        ) from error
    except (FileNotFoundError, ModuleNotFoundError, ValueError, FloatingPointError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{error}\n`{again}` goes on where it was.") from error
    except KeyboardInterrupt:
        click.echo(f"\nStopped. What is done is kept, and `{again}` goes on from there.", err=True)
        raise SystemExit(130) from None


def _preset(name: str, seeds: str | None) -> Preset:
    from benchmarks.quality.presets import PRESETS

    preset = PRESETS[name]
    if seeds is None:
        return preset
    try:
        chosen = tuple(int(seed) for seed in seeds.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected numbers such as 0,1,2, got {seeds!r}") from error
    if len(set(chosen)) < len(chosen):
        raise click.BadParameter(f"expected each seed once, got {seeds!r}")
    return replace(preset, seeds=chosen)


def _describe(preset: Preset, root: Path) -> None:
    from benchmarks.quality.layout import check_settings
    from benchmarks.quality.plan import plan

    check_settings(preset, root)
    todo = plan(preset, root)
    click.echo(
        f"{preset.name}, into {root}:\n"
        f"  networks to train    {todo.trainings}, {todo.network_steps:,} network steps of "
        f"{preset.budget.batch_size} images\n"
        f"  cells to measure     {todo.cells}, {todo.sampling_calls:,} network calls on "
        f"{preset.samples:,} images each\n"
        f"  all of it takes      {CATALOGUE[preset.name].cost}\n"
        f"  done already         {todo.done / (todo.done + todo.cost):.0%}"
    )


def _run(preset: Preset, root: Path, workers: int, data: Path | None) -> None:
    from benchmarks.quality.data import check_folder

    check_folder(preset.data, data)
    began = time.perf_counter()
    click.echo(
        f"Preparing {preset.name} in {root}: the images, the network that measures distances, "
        "and how far real images are from real ones."
    )
    # After the line above: importing torch's friends takes seconds.
    from benchmarks.quality.plan import plan
    from benchmarks.quality.report import FILES, write_report
    from benchmarks.quality.runner import run

    complete = root.is_dir() and plan(preset, root).cost == 0
    run(preset, root, workers=workers, data_folder=data)
    click.echo(write_report(preset, root, data))
    if complete:
        click.echo(f"{root} was complete already; only its report was written again:")
    else:
        click.echo(f"Complete after {(time.perf_counter() - began) / 60:.1f} minutes, in {root}:")
    for name, purpose in FILES.items():
        if (root / name).exists():
            click.echo(f"  {name:18} {purpose}")


PRESET = click.argument("preset", metavar="PRESET", type=click.Choice(list(CATALOGUE)))
OUT = click.option("--out", type=click.Path(path_type=Path), help="The run's folder [runs/PRESET].")
SEEDS = click.option("--seeds", help="Seeds, such as 0,1,2 [the preset's].")
DATA = click.option("--data", type=click.Path(path_type=Path), help="Folder of CIFAR10.")


@main.command("run")
@PRESET
@OUT
@click.option("--workers", type=click.IntRange(1), help="Processes, of one thread each if several.")
@SEEDS
@DATA
@click.option("--dry-run", is_flag=True, help="Say what it would cost, and stop.")
def run_command(
    preset: str,
    out: Path | None,
    workers: int | None,
    seeds: str | None,
    data: Path | None,
    dry_run: bool,
) -> None:
    """Run PRESET, or go on with it; then write its report."""
    chosen = _preset(preset, seeds)
    root = out or Path("runs") / preset
    with _in_one_line():
        if dry_run:
            _describe(chosen, root)
        else:
            _run(chosen, root, workers or min(chosen.workers, os.cpu_count() or 1), data)


@main.command("search")
@PRESET
@click.option(
    "--sampler", "samplers", multiple=True, default=["ddim"], show_default=True, help="Or several."
)
@click.option("--steps", type=click.IntRange(1, 1000), default=10, show_default=True)
@OUT
@SEEDS
@DATA
def search_command(
    preset: str,
    samplers: tuple[str, ...],
    steps: int,
    out: Path | None,
    seeds: str | None,
    data: Path | None,
) -> None:
    """Ask the search which sampler and correction PRESET's plain networks want."""
    chosen = _preset(preset, seeds)
    with _in_one_line():
        from benchmarks.quality.samplers import TITLES
        from benchmarks.quality.search import search

        if unknown := [name for name in samplers if name not in TITLES]:
            raise ValueError(f"sampler: expected one of {', '.join(TITLES)}, got {unknown[0]!r}")
        for seed in chosen.seeds:
            root = out or Path("runs") / preset
            found = search(chosen, root, seed, samplers, steps, data)
            click.echo(
                f"Seed {seed}: recommended {found['sampler']} with {found['recommended']}; on "
                f"fresh noise the distance is {found['corrected']:.4g}, and {found['plain']:.4g} "
                f"with {samplers[0]} and no correction."
            )


@main.command("gpu")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/gpu"), show_default=True)
@DATA
@click.option("--part", "parts", type=int, multiple=True, help="Number of a part [all of them].")
@click.option("--seconds", type=click.IntRange(1), help="Time for each part [480].")
@click.option("--dry-run", is_flag=True, help="List the parts, and stop.")
def gpu_command(
    out: Path, data: Path | None, parts: tuple[int, ...], seconds: int | None, dry_run: bool
) -> None:
    """Do what is planned for minutes on a GPU, one part after the other."""
    from benchmarks.quality import gpu

    numbered = dict(enumerate(gpu.PARTS, 1))
    if unknown := [number for number in parts if number not in numbered]:
        raise click.BadParameter(f"part must be 1 to {len(numbered)}, got {unknown[0]}")
    chosen = {number: numbered[number] for number in parts or numbered}
    for number, part in chosen.items():
        click.echo(f"{number}. {part.name}, {seconds or gpu.LIMIT} s at most: {part.about}")
    if dry_run:
        return
    with _in_one_line():
        for part in chosen.values():
            click.echo(gpu.do(part, out, data, seconds or gpu.LIMIT))


@main.command("keep")
@PRESET
@OUT
@SEEDS
def keep_command(preset: str, out: Path | None, seeds: str | None) -> None:
    """Copy PRESET's results, finished or not, to the committed ones."""
    from benchmarks.quality.report import keep

    with _in_one_line():
        path = keep(_preset(preset, seeds), out or Path("runs") / preset, RESULTS)
        click.echo(f"Wrote {path}.")
