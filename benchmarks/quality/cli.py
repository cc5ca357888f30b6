"""The command line: `python -m benchmarks.quality`."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks.quality.presets import PRESETS, Preset
from benchmarks.quality.samplers import TITLES

HELP = "\n".join(f"  {name:13} {preset.about}" for name, preset in PRESETS.items())


@click.group(help="What the loss does to samples.\n\n\b\nPresets:\n" + HELP)
def main() -> None:
    """Group the commands."""


@contextmanager
def _in_one_line(again: str) -> Iterator[None]:
    """Say what went wrong in one line where a user can mend it, and how to go on."""
    from benchmarks.quality.layout import InUseError

    try:
        yield
    except BrokenProcessPool as error:
        raise click.ClickException(
            "a worker process died, perhaps for want of memory; what is done is kept, and "
            f"`{again} --workers 1` goes on from there"
        ) from error
    except OSError as error:
        raise click.ClickException(f"{error}\n`{again}` goes on where it was.") from error
    except (ValueError, ModuleNotFoundError, FloatingPointError, InUseError) as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo(f"\nStopped. What is done is kept, and `{again}` goes on from there.", err=True)
        raise SystemExit(130) from None


def _preset(name: str, seeds: str | None) -> Preset:
    preset = PRESETS[name]
    if seeds is None:
        return preset
    try:
        chosen = tuple(int(seed) for seed in seeds.split(","))
    except ValueError as error:
        raise click.BadParameter(f"expected numbers such as 0,1,2, got {seeds!r}") from error
    if len(set(chosen)) < len(chosen):
        raise click.BadParameter(f"expected each seed once, got {seeds!r}")
    return preset.seeded(chosen)


def _describe(preset: Preset, root: Path, workers: int, data: Path | None) -> None:
    from benchmarks.quality.layout import check_settings
    from benchmarks.quality.plan import estimate, plan

    check_settings(preset, root)
    todo = plan(preset, root)
    seconds = estimate(preset, todo, data) / workers
    click.echo(
        f"{preset.name}, into {root}:\n"
        f"  networks to train    {todo.trainings}, {todo.network_steps:,} network steps of "
        f"{preset.budget.batch_size} images\n"
        f"  cells to measure     {todo.cells}, {todo.sampling_calls:,} network calls on "
        f"{preset.samples:,} images each\n"
        f"  done already         {todo.done / (todo.done + todo.cost):.0%}\n"
        f"  estimated time       {seconds / 60:.1f} minutes with {workers} process(es), "
        "at the speed that this machine has now"
    )


def _run(preset: Preset, root: Path, workers: int, data: Path | None) -> None:
    first = int(os.environ.get("RANK", "0")) == 0
    began = time.perf_counter()
    if first:
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
    if not first:
        return
    click.echo(write_report(preset, root, data))
    if complete:
        click.echo(f"{root} was complete already; only its report was written again:")
    else:
        click.echo(f"Complete after {(time.perf_counter() - began) / 60:.1f} minutes, in {root}:")
    for name, purpose in FILES.items():
        if (root / name).exists():
            click.echo(f"  {name:18} {purpose}")


def _again(command: str, preset: str, options: Mapping[str, object]) -> str:
    """Return the command line that goes on with what this one began."""
    given = [(name, str(value)) for name, value in options.items() if value is not None]
    words = [command, preset, *(word for pair in given for word in pair)]
    return f"python -m benchmarks.quality {shlex.join(words)}"


@main.command("run")
@click.argument("preset", type=click.Choice(list(PRESETS)))
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder [runs/PRESET].")
@click.option("--workers", type=click.IntRange(1), help="Processes, of one thread each if several.")
@click.option("--seeds", help="Seeds, such as 0,1,2 [the preset's].")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of CIFAR10 or CelebA.")
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
    processes = workers or min(chosen.workers, os.cpu_count() or 1)
    with _in_one_line(_again("run", preset, {"--out": out, "--seeds": seeds, "--data": data})):
        (_describe if dry_run else _run)(chosen, root, processes, data)


@main.command("search")
@click.argument("preset", type=click.Choice(list(PRESETS)))
@click.option("--sampler", type=click.Choice(list(TITLES)), default="ddim", show_default=True)
@click.option("--steps", type=click.IntRange(1, 1000), default=10, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder [runs/PRESET].")
@click.option("--seeds", help="Seeds, such as 0,1,2 [the preset's].")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of CIFAR10 or CelebA.")
def search_command(
    preset: str, sampler: str, steps: int, out: Path | None, seeds: str | None, data: Path | None
) -> None:
    """Ask the library's search which correction PRESET's plain networks want."""
    chosen = _preset(preset, seeds)
    options = {"--sampler": sampler, "--steps": steps, "--out": out, "--seeds": seeds}
    with _in_one_line(_again("search", preset, {**options, "--data": data})):
        from benchmarks.quality.search import search
        from benchmarks.quality.statistics import Cell

        for seed in chosen.seeds:
            found = search(chosen, out or Path("runs") / preset, seed, Cell(sampler, steps), data)
            click.echo(
                f"Seed {seed}: recommended {found['recommended']}; on fresh noise the distance is "
                f"{found['corrected']:.4g}, and {found['plain']:.4g} without a correction."
            )


@main.command("keep")
@click.argument("preset", type=click.Choice(list(PRESETS)))
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder [runs/PRESET].")
@click.option("--seeds", help="Seeds of the run, such as 0,1,2 [the preset's].")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/quality"),
    show_default=True,
    help="Where committed results lie.",
)
def keep_command(preset: str, out: Path | None, seeds: str | None, folder: Path) -> None:
    """Copy the results of PRESET, finished or not, to where they are committed."""
    from benchmarks.quality.report import keep

    options = {"--out": out, "--seeds": seeds, "--folder": folder}
    with _in_one_line(_again("keep", preset, options)):
        for path in keep(_preset(preset, seeds), out or Path("runs") / preset, folder):
            click.echo(f"Wrote {path}.")


@main.command("page")
@click.option(
    "--docs",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("docs"),
    show_default=True,
    help="Folder of the pages; their figures go to assets/evidence in it.",
)
def page_command(docs: Path) -> None:
    """Write the evidence pages from the committed results."""
    from benchmarks.quality.evidence import write_pages

    for path in write_pages(docs):
        click.echo(f"Wrote {path}.")
