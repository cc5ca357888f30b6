"""Plots in the page itself, whose text and axes take the page's colour on light and dark alike.

`<!-- plot: NAME -->` in a page becomes a plot of the library's own tables, drawn when the site is
built, in the page's font. A picture of the benchmarks, which as a file has a grey that is legible
on either ground and good on neither, is put into the page as well.
"""

from __future__ import annotations

import html
import io
import posixpath
import re
from collections.abc import Callable

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from torch import Tensor

from s2dm_loss import ContinuousSchedule, NoiseSchedule, gain
from s2dm_loss.coefficients import coefficients

SKIPS = (1, 9, 49, 99)
COLORS = ("#1e88e5", "#43a047", "#fb8c00", "#e53935")  # legible on white and on near-black
_PICTURE = re.compile(r'(<p>)?<img alt="(?P<alt>[^"]*)" src="(?P<src>[^":]+\.svg)" ?/?>(?(1)</p>)')
# A phone's width shows a picture of the benchmarks at this scale; one that is wider scrolls.
SMALLEST = 0.78
_GREY = "#7d838c"  # the ink of benchmarks/pages/figures.py
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_STYLE = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.prop_cycle": mpl.cycler(color=COLORS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 10,
    "grid.alpha": 0.2,
    "grid.color": _INK,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "s2dm-loss",  # the same build gives the same file
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def on_page_content(content: str, page: Page, files: Files, **_: object) -> str:
    """Draw the plots of a page."""

    def plot(match: re.Match[str]) -> str:
        if match[1] not in PLOTS:
            raise PluginError(f"{page.file.src_uri}: no plot is named {match[1]!r}")
        draw, alt = PLOTS[match[1]]
        with mpl.rc_context(_STYLE):
            return f'<figure class="plot">{_svg(draw(), alt)}</figure>'

    def picture(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.url), match["src"]))
        file = files.get_file_from_path(path)
        if file is None:
            raise PluginError(f"{page.file.src_uri}: {path} is not on the site")
        (width,) = re.findall(r'<svg [^>]*\bwidth="([\d.]+)pt"', file.content_string)
        size = f"max-width: {width}pt; min-width: {SMALLEST * float(width):.0f}pt"
        svg = _inline(file.content_string, html.unescape(match["alt"]), _GREY)
        return f'<figure class="plot">{svg.replace("<svg", f"<svg style={size!r}", 1)}</figure>'

    return re.sub(r"<!-- plot: (\w+) -->", plot, _PICTURE.sub(picture, content))


def loss_tables() -> Figure:
    """c, A, s and λ on the linear schedule."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = list(figure.subplots(2, 2, sharex=True).flat)
    schedule = NoiseSchedule.linear(1000)
    for k in SKIPS:
        table = coefficients(schedule, k)
        curves = (table.c, table.weight, table.gain, 1 / gain(schedule, k))
        for axis, curve in zip(axes, curves, strict=True):
            _line(axis, schedule.timesteps, curve, f"k = {k}")
    titles = (
        "c(t), noise over signal of the jump",
        "A(t), weight",
        "s(t), gain on the target",
        "λ(t) = 1 / s(t)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.grid(visible=True)
    for axis in axes[2:]:
        axis.set_xlabel("t")
    axes[0].legend()
    return figure


def skip_and_tau() -> Figure:
    """λ(t) for skips and for τ, on two schedules."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    rows = figure.subplots(2, 2, sharex=True)
    schedules = (
        (NoiseSchedule.linear(1000), "linear"),
        (NoiseSchedule.scaled_linear(1000), "scaled linear"),
    )
    for row, (schedule, name) in zip(rows, schedules, strict=True):
        for k in SKIPS:
            _line(row[0], schedule.timesteps, 1 / gain(schedule, k), f"k = {k}")
        for tau in (0.999, 0.99, 0.97, 0.95):
            curve = 1 / gain(schedule, 49, tau=tau)
            _line(row[1], schedule.timesteps, curve, f"τ = {tau}")
        row[0].set_title(f"{name}: λ(t) at τ = 0.99")
        row[1].set_title(f"{name}: λ(t) at k = 49")
        for axis in row:
            axis.grid(visible=True)
            axis.legend()
    for axis in rows[1]:
        axis.set_xlabel("t")
    return figure


def schedule_ends() -> Figure:
    """λ(t) towards the end of schedules whose ᾱ comes near 0."""
    figure = Figure(figsize=(8, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    discrete = (
        (NoiseSchedule.linear(1000), "linear"),
        (NoiseSchedule.cosine(1000), "cosine"),
        (NoiseSchedule.linear(1000).rescale_zero_terminal_snr(), "linear, zero terminal SNR"),
    )
    for schedule, name in discrete:
        _line(left, schedule.timesteps, 1 / gain(schedule, 9), name)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for path, name in ((ContinuousSchedule.vp(), "VP-SDE"), (ContinuousSchedule.flow(), "flow")):
        _line(right, t, 1 / gain(path, 0.01, t=t, prediction_type="epsilon"), name)
    left.set_title("λ(t), k = 9")
    right.set_title("λ(t), δ = 0.01")
    for axis in (left, right):
        axis.set_yscale("log")
        axis.set_yticks([1.0, 1.1, 1.3, 2.0], ["1", "1.1", "1.3", "2"])
        axis.minorticks_off()
        axis.set_xlabel("t")
        axis.grid(visible=True)
        axis.legend()
    return figure


PLOTS: dict[str, tuple[Callable[[], Figure], str]] = {
    "loss_tables": (
        loss_tables,
        "Four panels over t on the linear schedule, for k of 1, 9, 49 and 99: c, A and λ grow with "
        "t and with k, s falls.",
    ),
    "skip_and_tau": (
        skip_and_tau,
        "λ(t) on the linear and scaled-linear schedules: a larger k and a smaller τ both raise it.",
    ),
    "schedule_ends": (
        schedule_ends,
        "λ(t) of the cosine, zero-terminal-SNR and flow schedules rises to about 2 at the last "
        "times, where c² is bounded.",
    ),
}


def _line(axis: Axes, x: Tensor, y: Tensor, label: str) -> None:
    axis.plot(x.numpy(), y.numpy(), label=label)


def _svg(figure: Figure, alt: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = _inline(buffer.getvalue(), alt, _INK)
    return re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the page sets the font


def _inline(svg: str, alt: str, ink: str) -> str:
    """Return an SVG file as an element of a page, with the page's colour in the place of `ink`."""
    svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)  # the page sets the size
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
