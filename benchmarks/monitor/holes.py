"""What `docs/monitor.md` can say: numbers and figures, from the committed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.files import load_json
from benchmarks.pages.figures import COLORS, new_figure, zero_line
from benchmarks.provenance import ROOT

RESULT = ROOT / "benchmarks" / "results" / "monitor.json"
TITLES = {"plain": "plain", "skip_step": "S²-DM"}


class Run(dict[str, Any]):
    """The committed record, with what a template asks of it besides."""

    @property
    def names(self) -> list[str]:
        """Names of the training losses, the one over all levels first."""
        return [key for key in self["training"][0] if key.startswith("loss/")]

    def level(self, number: int) -> str:
        """Return a level's range, such as "-6.2 to -4.2"."""
        return self.names[number + 1].partition("log_snr_")[2].replace("_", " ")

    def trained(self, steps: int, level: int = -1) -> float:
        """Return the training loss of a level, over all with -1, up to a step."""
        (row,) = (row for row in self["training"] if row["step"] == steps)
        return float(row[self.names[level + 1]])

    def validated(self, steps: int) -> dict[str, Any]:
        """Return the validation loss at a step."""
        (row,) = (row for row in self["validation"] if row["step"] == steps)
        return dict(row)

    def fall(self, first: int, last: int, level: int = -1) -> str:
        """Return by how much a level's training loss falls, such as "2 %"."""
        return f"{100 * (1 - self.trained(last, level) / self.trained(first, level)):.0f} %"


def monitor() -> Run:
    """Return the run; a function, so that other pages are written without it."""
    return Run(load_json(RESULT))


def _draw(axes: Axes, means: Sequence[float], errors: Sequence[float], **style: Any) -> None:
    """Draw values by noise level, with two standard errors."""
    bars = [2 * error for error in errors]
    axes.errorbar(
        monitor()["levels"]["log_snr"], means, yerr=bars, marker=".", linewidth=1, **style
    )
    axes.set_xlabel("log SNR (left: noise, right: data)")


def levels() -> Figure:
    """Return the validation loss by level."""
    figure, ((axes,),) = new_figure(2.9)
    for color, (kind, title) in enumerate(TITLES.items(), 1):
        _draw(axes, *zip(*monitor()["levels"][kind], strict=True), color=COLORS[color], label=title)
    axes.set(ylabel="loss", yscale="log")
    axes.legend()
    return figure


def compared() -> Figure:
    """Return the paired difference by level in percent."""
    found = monitor()["levels"]
    figure, ((axes,),) = new_figure(2.9)
    # Over what it was before.
    rows = [
        (100 * mean / (after - mean), 100 * error / (after - mean))
        for (mean, error), (after, _) in zip(found["difference"], found["plain"], strict=True)
    ]
    zero_line(axes)
    _draw(axes, *zip(*rows, strict=True), color=COLORS[1])
    axes.set_ylabel("difference, %")
    return figure


HOLES: dict[str, Any] = {"monitor": monitor}
FIGURES = {"monitor/levels": levels, "monitor/compared": compared}
