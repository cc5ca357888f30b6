"""The figures of the evidence pages, drawn from committed results."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean

from matplotlib.figure import Figure

from benchmarks.pages.figures import COLORS, new_figure, zero_line
from benchmarks.quality.committed import method_name, results
from benchmarks.quality.statistics import FRECHET, KERNEL, RAW_FRECHET, SPREAD, Cell, log_ratios

NETWORKS = {"unet": "U-Net", "eps16": "16 x 16", "small": "small network"}
ROWS = (
    ("gain, k = 49", "gain 49", "ddim"),
    ("loss, k = 49", "loss 49", "ddim"),
    ("loss, k = 9", "loss 9", "ddim"),
    ("UniPC", "plain", "unipc"),
    ("gain with UniPC", "gain 49", "unipc"),
    ("loss with UniPC", "loss 49", "unipc"),
    ("PNDM", "plain", "pndm"),
)
LINES = {
    "unet": {"plain": "plain", "loss 49": "loss, k = 49"},
    "eps16": {"plain": "plain", "gain 49": "gain, k = 49", "loss 49": "loss, k = 49"},
    "flow16": {"plain": "plain", "gain 0.05": "gain, δ = 0.05", "loss 0.05": "loss, δ = 0.05"},
}
# None: the network before it, after twice the training, in its colour and hollow.
GAINED = {
    "unet": "U-Net",
    "small": "small network",
    "digits-full": "digits",
    "textures": "crops",
    "eps16": "16 x 16, ε",
    "eps16-million": None,
    "flow16": "16 x 16, flow",
    "flow16-million": None,
}


def spreads_and_gains(run: str) -> list[tuple[float, float]]:
    """Return, for each sampler and number of steps, plain spread and what a gain does there.

    The gain of a 20-step sampler's step; by how many per cent it is nearer, in the kernel distance.
    """
    table = results(run)
    name = method_name("gain 49" if table.base == "ddim" else "gain 0.05")
    found = []
    for where in table.cells(name):
        if (by_gain := table.change(name, where, KERNEL)) is not None:
            plain = table.values("plain", where, SPREAD)
            spread = fmean(plain[seed] for seed in table.values(name, where, KERNEL))
            found.append((spread, by_gain.mean))
    return found


def gains() -> Figure:
    """Draw what a gain does against the spread of the plain samples, a point for each sampler."""
    figure, ((axes,),) = new_figure(3.4)
    colors, color = iter(COLORS[1:]), COLORS[0]
    for run, title in GAINED.items():
        color = next(colors) if title else color
        spreads, changes = zip(*spreads_and_gains(run), strict=True)
        marker = "o" if results(run).base == "ddim" else "s"
        face = color if title else "none"
        axes.plot(spreads, changes, marker, color=color, mfc=face, ms=4, alpha=0.8, label=title)
    zero_line(axes)
    zero_line(axes, 1.0, vertical=True)
    axes.set(xlabel="spread of the plain samples over the data's", ylabel="nearer with the gain, %")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def seeds() -> Figure:
    """Draw the change at 10 steps of each seed, a panel for each network."""
    figure, (panels,) = new_figure(2.6, 1, len(NETWORKS), sharey=True)
    for axes, (run, title) in zip(panels, NETWORKS.items(), strict=True):
        table = results(run)
        plain = {key: table.values("plain", Cell("ddim", 10), key) for key in (FRECHET, KERNEL)}
        for row, (_, method, sampler) in enumerate(ROWS):
            for shift, key, color in ((0.15, FRECHET, COLORS[1]), (-0.15, KERNEL, COLORS[3])):
                values = table.values(method_name(method), Cell(sampler, 10), key)
                changes = [-100 * math.expm1(log) for log in log_ratios(values, plain[key])]
                places = [shift - row] * len(changes)
                label = {FRECHET: "Fréchet", KERNEL: "kernel"}[key] if row == 0 else None
                axes.plot(changes, places, "o", color=color, ms=4, alpha=0.8, label=label)
        zero_line(axes, vertical=True)
        axes.set_title(title)
    panels[0].set_yticks([-row for row in range(len(ROWS))], [title for title, *_ in ROWS])
    figure.supxlabel("nearer than plain DDIM, %", fontsize="medium")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper right", ncols=2)
    return figure


def by_steps(run: str) -> Figure:
    """Draw kernel distance and spread against the number of steps, with the base sampler."""
    table = results(run)
    figure, ((left, right),) = new_figure(2.7, 1, 2)
    for (method, label), color in zip(LINES[run].items(), COLORS, strict=False):
        name = method_name(method)
        cells = sorted(c for c in table.cells(name) if c.sampler == table.base)
        for axes, key, scale in ((left, KERNEL, 1e3), (right, SPREAD, 1.0)):
            heights = [scale * table.mean(name, cell, key) for cell in cells]
            axes.plot([c.steps for c in cells], heights, "o-", color=color, ms=4, label=label)
    for axes, title in ((left, "kernel distance, thousandths"), (right, "spread over data's")):
        axes.set(title=title, xlabel="sampling steps", xscale="log")
        ticks = sorted({c.steps for c in table.cells("plain") if c.sampler == table.base})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    zero_line(right, 1.0)
    left.legend()
    return figure


def skips() -> Figure:
    """Draw change and spread on the digits against the k of the gain, by DDIM's steps."""
    table = results("digits-full")
    ks = (1, 9, 49, 99, 149, 199)
    figure, ((images, raw, spread),) = new_figure(2.7, 1, 3, width=7.2)
    for steps, color in zip((10, 20, 50, 100), COLORS[1:], strict=False):
        where = Cell("ddim", steps)
        names = {k: f"plain+gain{k}" for k in ks if table.values(f"plain+gain{k}", where)}
        for axes, key in ((images, FRECHET), (raw, RAW_FRECHET)):
            changes = [one.mean for n in names.values() if (one := table.change(n, where, key))]
            axes.plot(list(names), changes, "o-", color=color, ms=3, label=f"{steps} steps")
        spreads = [table.mean(name, where, SPREAD) for name in names.values()]
        spread.plot(list(names), spreads, "o-", color=color, ms=3)
    for axes, title in ((images, "nearer, %, 8-bit"), (raw, "nearer, %, raw")):
        axes.set(title=title, xlabel="k of the gain", ylim=(-60, 60))
        zero_line(axes)
    spread.set(title="spread over data's", xlabel="k of the gain")
    zero_line(spread, 1.0)
    raw.legend()
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "gains": gains,
    "readme": lambda: by_steps("unet"),
    "seeds": seeds,
    "skips": skips,
    "steps_eps16": lambda: by_steps("eps16"),
    "steps_flow16": lambda: by_steps("flow16"),
}
