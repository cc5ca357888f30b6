"""`python -m benchmarks.lab.pairs`: how far from the best pair is what the search recommends?"""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", required=False, type=click.Path(exists=True, path_type=Path))
def main(run: Path | None) -> None:
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
