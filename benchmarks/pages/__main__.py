"""`python -m benchmarks.pages`: fill the holes of all pages, or check that they are filled."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; fail if a page is not up to date.")
@click.argument("pages", nargs=-1)
def main(check: bool, pages: tuple[str, ...]) -> None:
    """Write PAGES, such as docs/evidence.md, or all pages, from committed results."""
    from benchmarks.pages.render import render_all

    try:
        changed = render_all(Path(), only=pages, write=not check)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for path in changed:
        click.echo(f"{path} is out of date" if check else f"Wrote {path}.")
    if check and changed:
        raise click.ClickException("run `python -m benchmarks.pages` and commit what it writes")


main()
