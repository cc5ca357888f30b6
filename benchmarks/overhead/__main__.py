"""The command line: `python -m benchmarks.overhead`."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.overhead.plan import LEVELS, follow

if TYPE_CHECKING:  # torch takes seconds to import, and help should be there at once
    from benchmarks.overhead.levels import Settings

OUT = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("runs/overhead"),
    show_default=True,
    help="Folder of the figures, DEVICE.json; benchmarks/results/overhead is the page's.",
)
AGAINST = click.option(
    "--against",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Checkout of another version, whose loss is measured too.",
)


@click.group()
def main() -> None:
    """What the loss costs, on a CPU or a GPU."""


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[cuda where there is one]")
@click.option("--level", "names", type=click.Choice(LEVELS), multiple=True, help="[all]")
@click.option("--seconds", default=2.0, show_default=True, help="Time for each cell of a table.")
@click.option("--largest", type=int, help="log2 of the largest size [26; 28 on a GPU].")
@click.option("--step-batch", type=int, help="Batch of the step [4; 128 on a GPU].")
@click.option("--step-seconds", default=60.0, show_default=True, help="Time for each step.")
@click.option("--budget", default=float("inf"), help="Seconds after which nothing new is begun.")
@click.option("--small", is_flag=True, help="For a rehearsal: one sample, a small network.")
@AGAINST
@OUT
def run(
    device: str | None,
    names: tuple[str, ...],
    budget: float,
    against: Path | None,
    out: Path,
    **sizes: Any,
) -> None:
    """Measure, and write after each result; a level measured before is replaced."""
    import torch

    from benchmarks.overhead.contenders import other_loss
    from benchmarks.overhead.levels import Settings

    deadline = time.monotonic() + budget
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException("device: torch sees no GPU here")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes["largest"] = sizes["largest"] or (28 if device == "cuda" else 26)
    sizes["step_batch"] = sizes["step_batch"] or (128 if device == "cuda" else 4)
    torch.manual_seed(0)
    try:
        other = other_loss(against, torch.device(device)) if against else {}
        settings = Settings(torch.device(device), deadline=deadline, other=other, **sizes)
        for name in names or LEVELS:
            click.echo(f"Measuring {name} on {device}:", err=True)
            try:
                _measure(name, settings, out / f"{device}.json")
            except torch.cuda.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                click.echo(
                    f"  the rest of {name} is left out: {str(error).splitlines()[0]}", err=True
                )
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Wrote {out / device}.json.")


def _measure(name: str, settings: Settings, path: Path) -> None:
    """Write a level's results to `path`, where other levels' stay, one after the other."""
    from benchmarks.files import load_json, save_json
    from benchmarks.overhead.step import MEASURE
    from benchmarks.provenance import git, machine
    from s2dm_loss import __version__

    figures = []
    folders = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--out", "--against"):  # one machine's own
        folders.add_argument(option)
    changes = git("status", "--porcelain", "--", "s2dm_loss/*.py", "benchmarks/overhead")
    shown = {
        "machine": machine(settings.device),
        "version": __version__,
        "command": f"python -m benchmarks.overhead {shlex.join(folders.parse_known_args()[1])}",
        "commit": git("rev-parse", "HEAD"),
        "local_changes": bool(changes),
        # Above 0: something else was running.
        "load_average_before": round(os.getloadavg()[0], 2),
    }
    for cell in MEASURE[name](settings):
        figures.append(cell)
        said = [cell[key] for key in ("name", "contender", "dtype", "mode") if key in cell]
        said += [f"{pair} {ratio[1]:.2f}" for pair, ratio in cell.get("ratios", {}).items()]
        click.echo(f"  {'  '.join(said)}", err=True)
        results = load_json(path) if path.exists() else {}
        save_json(path, {**results, name: {**shown, "figures": figures}})


@main.command()
@click.option("--rehearse", is_flag=True, help="On the CPU, at small sizes.")
@AGAINST
@OUT
def gpu(rehearse: bool, against: Path | None, out: Path) -> None:
    """Measure all that is worth it on a GPU in 8 minutes, the most useful first."""
    import torch

    if not rehearse and not torch.cuda.is_available():
        raise click.ClickException("gpu: torch sees no GPU here; --rehearse needs none")
    options = ["--out", str(out), "--seconds", "1", "--step-seconds", "25"]
    options += ["--against", str(against)] if against else []
    rehearsal = ["--device", "cpu", "--small", "--largest", "14", "--step-batch", "1"]
    options += rehearsal if rehearse else ["--device", "cuda"]
    follow(options, 8 * 60 - 5, click.echo)


if __name__ == "__main__":
    main()
