"""What `docs/monitor.md` can say: numbers and figures, from the committed run."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks.files import load_json
from benchmarks.pages.figures import COLORS, new_figure, zero_line
from benchmarks.provenance import ROOT

RESULT = ROOT / "benchmarks" / "results" / "monitor.json"
TITLES = {"plain": "plain", "skip_step": "S²-DM"}


class Run:
    """The committed run, as a template asks for it."""

    def __init__(self) -> None:
        """Read the results."""
        self.record: dict[str, Any] = load_json(RESULT)
        self.names = [key for key in self.record["training"][0] if key.startswith("loss/")]

    def __getattr__(self, name: str) -> Any:
        """Return a part of the record."""
        try:
            return self.record[name]
        except KeyError:
            raise AttributeError(name) from None

    def level(self, number: int) -> str:
        """Return a level's range, such as "-6.2 to -4.2"."""
        return self.names[number + 1].partition("log_snr_")[2].replace("_", " ")

    def trained(self, steps: int, level: int = -1) -> float:
        """Return the training loss of a level, over all with -1, up to a step."""
        (row,) = (row for row in self.record["training"] if row["step"] == steps)
        return float(row[self.names[level + 1]])

    def validated(self, steps: int) -> dict[str, Any]:
        """Return the validation loss at a step."""
        (row,) = (row for row in self.record["validation"] if row["step"] == steps)
        return dict(row)

    def fall(self, first: int, last: int, level: int = -1) -> str:
        """Return by how much a level's training loss falls, such as "2 %"."""
        return f"{100 * (1 - self.trained(last, level) / self.trained(first, level)):.0f} %"


def monitor() -> Run:
    """Return the run; a function, so that other pages are written without it."""
    return Run()


def levels() -> Figure:
    """Return the validation loss by level, with two standard errors."""
    found = Run().levels
    figure, axes = new_figure(2.9)
    for color, (kind, title) in enumerate(TITLES.items(), 1):
        means, errors = zip(*found[kind], strict=True)
        bars = [2 * error for error in errors]
        axes[0, 0].errorbar(
            found["log_snr"],
            means,
            yerr=bars,
            marker=".",
            linewidth=1,
            color=COLORS[color],
            label=title,
        )
    axes[0, 0].set(xlabel="log SNR (left: noise, right: data)", ylabel="loss", yscale="log")
    axes[0, 0].legend()
    return figure


def compared() -> Figure:
    """Return the paired difference by level in percent, with two standard errors."""
    found = Run().levels
    figure, axes = new_figure(2.9)
    means, errors = zip(*found["difference"], strict=True)
    before = [after - mean for (after, _), mean in zip(found["plain"], means, strict=True)]
    zero_line(axes[0, 0])
    axes[0, 0].errorbar(
        found["log_snr"],
        [100 * mean / base for mean, base in zip(means, before, strict=True)],
        yerr=[200 * error / base for error, base in zip(errors, before, strict=True)],
        marker=".",
        linewidth=1,
        color=COLORS[1],
    )
    axes[0, 0].set(xlabel="log SNR (left: noise, right: data)", ylabel="difference, %")
    return figure


HOLES: dict[str, Any] = {"monitor": monitor}
FIGURES = {"monitor/levels": levels, "monitor/compared": compared}
