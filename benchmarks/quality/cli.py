"""The command line: ``python -m benchmarks.quality``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from benchmarks.quality.page import write_page
from benchmarks.quality.presets import PRESETS, Preset
from benchmarks.quality.report import keep, write_report
from benchmarks.quality.runner import estimate, plan, run

HELP = "\n".join(f"  {name:12} {preset.about}" for name, preset in PRESETS.items())


@click.group(help="What the loss does to samples.\n\n\b\nPresets:\n" + HELP)
def main() -> None:
    """Group the commands."""


def _preset(name: str, seeds: str | None) -> Preset:
    preset = PRESETS[name]
    if seeds is None:
        return preset
    try:
        return preset.seeded(tuple(int(seed) for seed in seeds.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"expected numbers such as 0,1,2, got {seeds!r}") from error


def _describe(preset: Preset, root: Path, workers: int, data: Path | None) -> None:
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


@main.command("run")
@click.argument("preset", type=click.Choice(list(PRESETS)))
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder [runs/PRESET].")
@click.option("--workers", type=click.IntRange(1), help="Processes, each with one thread.")
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
    if dry_run:
        _describe(chosen, root, processes, data)
        return
    began = time.perf_counter()
    try:
        run(chosen, root, workers=processes, data_folder=data)
        if int(os.environ.get("RANK", "0")) == 0:
            click.echo(write_report(chosen, root, data))
            minutes = (time.perf_counter() - began) / 60
            click.echo(f"Wrote {root} in {minutes:.1f} minutes.")
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise click.ClickException(str(error)) from error


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
    try:
        kept = keep(_preset(preset, seeds), out or Path("runs") / preset, folder)
    except FileNotFoundError as error:
        raise click.ClickException(str(error)) from error
    for path in kept:
        click.echo(f"Wrote {path}.")


@main.command("page")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    default=Path("docs/evidence.md"),
    show_default=True,
    help="The page; its figures go to assets/evidence beside it.",
)
def page_command(to: Path) -> None:
    """Write the evidence page from the committed results."""
    write_page(to)
    click.echo(f"Wrote {to}.")
