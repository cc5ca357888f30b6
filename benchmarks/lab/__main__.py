"""`python -m benchmarks.lab`."""

from __future__ import annotations

import time
from functools import partial

import click
import torch
from tqdm import tqdm

from benchmarks.files import save_json
from benchmarks.lab.holes import RESULTS
from benchmarks.lab.studies import STUDIES
from benchmarks.provenance import versions


def about(study: object) -> str:
    """Return the first line of a study's docstring, of one with an argument set too."""
    return (getattr(study, "func", study).__doc__ or "").partition("\n")[0]


HELP = "\n".join(f"  {name:17} {about(study)}" for name, study in STUDIES.items())


@click.group(help="Run the exact lab's studies.\n\n\b\nStudies:\n" + HELP)
def main() -> None:
    """Group the commands."""


@main.command("run")
@click.argument("names", nargs=-1, type=click.Choice(list(STUDIES)), required=True)
def run_command(names: tuple[str, ...]) -> None:
    """Run studies and write one JSON each; `python -m benchmarks.pages` puts them on the pages."""
    torch.set_num_threads(1)
    for name in names:
        began = time.perf_counter()
        result = STUDIES[name](partial(tqdm, desc=name))
        document = {
            "study": name,
            "command": f"python -m benchmarks.lab run {name}",
            "seconds": round(time.perf_counter() - began, 1),
            "versions": versions(),
            **result,
        }
        save_json(RESULTS / f"{name}.json", document)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.lab")
