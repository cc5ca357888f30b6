"""`python -m benchmarks.lab`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import click

# Here, since importing the studies themselves takes seconds, and help should be there at once.
ABOUT = {
    "gaussian": "a Gaussian of the digits' covariance and its exact ε-model: every skip up to 499",
    "imperfect": "the same Gaussian with an ε-model that is wrong in a known way",
    "strength": "whether k and τ are one parameter: the best τ of each k",
    "flow": "Euler on the straight path, Gaussian data: the share of the spread that it leaves",
    "coverage_gaussian": "whether the search's intervals hold on Gaussian data",
    "coverage_mixture": "the same where two of the axes are a ring of eight Gaussians",
    "coverage_tails": "the same where values have heavy tails",
    "whole_search": "whether the intervals of a whole search hold after its scan has chosen",
    "digits": "the search on trained networks, judged by a classifier's features on fresh noise",
}
"""What each of `benchmarks.lab.studies.STUDIES` is."""
LISTED = "\n".join(f"  {name:17} {about}" for name, about in ABOUT.items())


@click.group(help="Run the exact lab's studies.\n\n\b\nStudies:\n" + LISTED)
def main() -> None:
    """Group the commands."""


@main.command("run")
@click.argument("names", nargs=-1, type=click.Choice(list(ABOUT)), required=True)
def run_command(names: tuple[str, ...]) -> None:
    """Run studies and write one JSON each; `python -m benchmarks.pages` puts them on the pages."""
    import torch
    from tqdm import tqdm

    from benchmarks.files import save_json
    from benchmarks.lab.holes import RESULTS
    from benchmarks.lab.studies import STUDIES
    from benchmarks.provenance import versions

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


@main.command("pairs")
@click.argument("run", required=False, type=click.Path(exists=True, path_type=Path))
def pairs_command(run: Path | None) -> None:
    """Judge searches over pairs of sampler and correction, and keep that for the pages.

    Of exact models, or of the network of the digits in RUN, such as runs/digits.
    """
    from benchmarks.files import load_json, save_json
    from benchmarks.lab.best_pair import CASES, digits, study
    from benchmarks.lab.holes import RESULTS
    from benchmarks.provenance import versions

    cases = {"digits, 10 steps": digits(run)} if run else CASES
    path, made_with = RESULTS / "pairs.json", versions()
    for name, case in cases.items():
        found = study(case)
        click.echo(f"{name}: DDIM {found['in use']:.4g}, best {found['best pair']}")
        known = load_json(path) if path.exists() else {}
        save_json(path, {**known, name: {**found, "versions": made_with}})


if __name__ == "__main__":
    main()
