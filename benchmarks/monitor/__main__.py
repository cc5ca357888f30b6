"""`python -m benchmarks.monitor`: the numbers of the page on monitoring."""

import click


@click.command()
def main() -> None:
    """Train on the digits, measure, and write the numbers down."""
    from benchmarks.files import save_json
    from benchmarks.monitor.digits import measured
    from benchmarks.monitor.holes import RESULT

    save_json(RESULT, measured())


main()
