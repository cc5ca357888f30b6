"""The command line: ``python -m benchmarks.quality``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from benchmarks.quality.presets import PRESETS, Preset
from benchmarks.quality.runner import plan, run, seconds_per_forward

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
    seconds = todo.cost * seconds_per_forward(preset, data)
    click.echo(
        f"{preset.name}, into {root}:\n"
        f"  networks to train    {todo.trainings}, {todo.training_steps:,} steps of "
        f"{preset.budget.batch_size} images\n"
        f"  cells to measure     {todo.cells}, {todo.sampling_calls:,} network calls on "
        f"{preset.samples:,} images each\n"
        f"  done already         {todo.done / (todo.done + todo.cost):.0%}\n"
        f"  estimated time       {seconds / 60 / workers:.1f} minutes with {workers} worker(s) "
        "on this machine, if it is idle"
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
    run(chosen, root, workers=processes, data_folder=data)
