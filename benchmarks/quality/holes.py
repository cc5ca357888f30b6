"""What pages can say of the quality results: `HOLES` and `FIGURES` of `benchmarks.pages`.

A run is named as in `committed.NAMES`, a method in words: "gain 49" (put on the plain network),
"loss 49" (trained), "rescaling" (its strength chosen on the other seeds) or "search" (what the
library's search recommended); another name is one of the records. Without a sampler a hole is about
the run's base sampler, DDIM or Euler, and every change is over the plain network's samples by that
sampler in as many steps, unless `over` names another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from scipy import stats

from benchmarks.pages.tables import counted, listed, markdown_table
from benchmarks.quality import evidence_figures, statistics
from benchmarks.quality.committed import cell, method_name, results
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import FRECHET, KERNEL, SPREAD, Cell, Results, percent
from s2dm_loss import ContinuousSchedule, NoiseSchedule, gain

ALPHA = 0.05
MEASURES = {"frechet": FRECHET, "kernel": KERNEL, "raw frechet": statistics.RAW_FRECHET}
GRID = [Cell(sampler, n) for sampler in ("ddim", "pndm", "deis") for n in (10, 20, 50, 100)]
"""The cells of the digits' means."""
Row = tuple[str, str, str | None]
"""Of a table: its title, method and sampler."""


def compared(
    run: str,
    method: str,
    sampler: str | None = None,
    steps: int = 10,
    measure: str = "frechet",
    over: str | tuple[str, str | None, int] | None = None,
) -> tuple[dict[int, float], dict[int, float]]:
    """Return a method's distances by seed, and those that they are compared with."""
    found, key, where = results(run), MEASURES[measure], cell(run, sampler, steps)
    if method == "search":
        kept = _searches(found, where) if key == FRECHET else []
        ours = {one["seed"]: float(one["corrected"]) for one in kept}
        return ours, {one["seed"]: float(one["plain"]) for one in kept}
    if isinstance(over, tuple):
        baseline = method_name(over[0]), cell(run, *over[1:])
    else:
        baseline = "plain", cell(run, over, steps)
    theirs = found.values(*baseline, key)
    if method != "rescaling":
        return found.values(method_name(method), where, key), theirs
    names = _rescaling(found, cell(run, None, steps))
    by_seed = {seed: found.values(name, where, key) for seed, name in names.items()}
    return {seed: values[seed] for seed, values in by_seed.items() if seed in values}, theirs


def change(*of: Any, digits: int = 1, **more: Any) -> str | None:
    """Return by how many per cent a method's samples are nearer to the data than plain ones.

    This and the next three take the arguments of `compared`.
    """
    return percent(statistics.change(*compared(*of, **more)), digits)


def moved(*of: Any, digits: int = 1, **more: Any) -> str:
    """Return the mean of `change` in words: "4.4 % nearer", or "10.3 % farther"."""
    value = points(*of, **more)
    return f"{abs(value):.{digits}f} % {'nearer' if value > 0 else 'farther'}"


def points(*of: Any, **more: Any) -> float:
    """Return the mean of `change` as a number, for a claim that a page makes on a condition."""
    return _measured(*of, **more).mean


def mean_change(run: str, method: str, measure: str = "frechet", over: str = "plain") -> str | None:
    """Return the change over DDIM, PNDM and DEIS at 10, 20, 50 and 100 steps, as text."""
    names = method_name(method), method_name(over)
    return percent(results(run).mean_change(names[0], GRID, MEASURES[measure], names[1]))


def verdict(*of: Any, **more: Any) -> str:
    """Return "better", "worse" or "no difference shown", by the interval over the seeds."""
    return {1: "better", -1: "worse", 0: "no difference shown"}[_measured(*of, **more).sign]


def distance(
    run: str,
    method: str = "plain",
    sampler: str | None = None,
    steps: int = 10,
    measure: str = "frechet",
) -> str:
    """Return the mean Fréchet distance, or kernel distance in thousandths, as text."""
    value = results(run).mean(method_name(method), cell(run, sampler, steps), MEASURES[measure])
    value *= 1000 if "kernel" in measure else 1
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def spread(
    run: str,
    method: str = "plain",
    sampler: str | None = None,
    steps: int = 10,
    *,
    raw: bool = False,
) -> str:
    """Return the spread of the samples over the data's, the mean over the seeds, as text.

    Of 8-bit images, or raw, as the sampler returns them.
    """
    found, name, where = results(run), method_name(method), cell(run, sampler, steps)
    if raw:
        by_seed = found.record["raw_spreads"][statistics.cell_key(name, where)].values()
        return f"{sum(by_seed) / len(by_seed):.3f}"
    return f"{found.mean(name, where, SPREAD):.3f}"


def dose(run: str, skip: float, steps: int = 10, sampler: str | None = None) -> str | None:
    """Return the share of the way to its gain that the trained loss has come, by the spread."""
    names = (method_name(f"loss {skip:g}"), method_name(f"gain {skip:g}"))
    found = results(run).dose(*names, cell(run, sampler, steps))
    return None if found is None else f"{100 * found.mean:.0f} %"


def times_floor(run: str) -> str:
    """Return how many times farther than real images the plain samples of 10 steps are."""
    return f"{results(run).mean('plain', cell(run, None, 10)) / results(run).floor:.1f}"


def fact(run: str, name: str) -> str:
    """Return something about a run: one of the names in `facts` below."""
    found = results(run)
    record = found.record
    budget, trainings = record["settings"]["budget"], record["trainings"]
    first = {name: next(iter(by_seed.values())) for name, by_seed in trainings.items()}
    loss_shares = [one["loss_share"] for name, one in first.items() if "skip" in name]
    number = {word: float(value) for word, value in re.findall(r"(steps|batch_size)=(\d+)", budget)}
    commits = str(record["versions"]["commit"]).split(", ")
    facts: dict[str, Callable[[], str]] = {
        "seeds": lambda: counted(found.table.index.unique("seed").size, "seed"),
        "samples": lambda: f"{record['settings']['samples']:,}",
        "images": lambda: f"{int(number['steps'] * number['batch_size']):,}",
        "parameters": lambda: f"{first['plain']['parameters'] / 1e6:.2f}",
        "floor": lambda: f"{found.floor:.1f}" if found.floor > 10 else f"{found.floor:.2f}",
        "features": lambda: str(record["floor"]["features"]),
        "device": lambda: str(first["plain"]["device"]),
        "versions": lambda: ", ".join(
            f"{key} {value}" for key, value in record["versions"].items()
            if value and key in ("python", "torch", "diffusers", "torchmetrics")
        ),
        "commits": lambda: listed([f"`{commit[:10]}`" for commit in commits]),
        "differed": lambda: (
            "differed" if record["versions"]["checkout_differed"] else "did not differ"
        ),
        "loss share": lambda: f"{100 * loss_shares[0]:.0f} %",
    }  # fmt: skip
    return facts[name]()


def table(
    head: str, columns: Sequence[tuple[str, str, str]], rows: Sequence[Row], steps: int = 10
) -> str:
    """Return a table of changes; a row of the loss says its dose, an empty cell is not measured.

    Columns are (title, run, measure).
    """
    lines = []
    for title, method, sampler in rows:
        line = [title]
        for _, run, measure in columns:
            text = change(run, method, sampler, steps, measure) or ""
            is_loss = method.startswith("loss ") and "+" not in method
            if text and is_loss and measure == "frechet":
                share = dose(run, float(method.split()[1]), steps, sampler)
                text += f" (dose {share})" if share else ""
            line.append(text)
        lines.append(line)
    return _table([head, *(title for title, *_ in columns)], lines)


def cells_table(run: str, rows: Sequence[Row], steps: Sequence[int]) -> str:
    """Return a table of a run: a row's kernel distance and spread by the number of steps."""
    found, lines = results(run), []
    for title, method, sampler in rows:
        line, name = [title], method_name(method)
        for n in steps:
            text = ""
            if found.values(name, cell(run, sampler, n), KERNEL):
                text = distance(run, method, sampler, n, measure="kernel")
                text += f", {spread(run, method, sampler, n)}"
            line.append(text)
        lines.append(line)
    return _table(["", *(f"{n} steps" for n in steps)], lines)


def mean_table(run: str) -> str:
    """Return the methods of a grid: mean over its cells and DDIM at 10 steps, by three measures."""
    found = results(run)
    lines = []
    for method in found.methods:
        if method == "plain" or not set(GRID) <= set(found.cells(method)):
            continue
        line = [found.title(method)]
        for measure in ("frechet", "kernel", "raw frechet"):
            line.append(mean_change(run, method, measure) or "")
            line.append(change(run, method, "ddim", 10, measure) or "")
        lines.append(line)
    titles = ("8-bit", "8-bit kernel", "raw")
    head = ["", *(f"{title}, {of}" for title in titles for of in ("mean", "DDIM 10"))]
    return _table(head, lines)


class Together(NamedTuple):
    """What holds of several comparisons by Holm's correction, with adjusted p-values."""

    compared: int
    held: str
    missed: str
    p_of_missed: str
    weakest: str
    weakest_p: str


def together(run: str, rows: Sequence[Row], steps: int = 10, measure: str = "kernel") -> Together:
    """Return which rows of `table` differ from plain together, and which one just misses it."""
    p_values = {}
    for title, method, sampler in rows:
        logs = statistics.log_ratios(*compared(run, method, sampler, steps, measure))
        if len(logs) > 1:
            p_values[title] = float(stats.ttest_1samp(logs, 0).pvalue)
    adjusted = statistics.holm(p_values)
    order = sorted(adjusted, key=adjusted.__getitem__)
    held = [title for title in p_values if adjusted[title] < ALPHA]
    missed = next((title for title in order if adjusted[title] >= ALPHA), "none")
    return Together(
        len(p_values),
        listed(held) if held else "none",
        missed,
        f"{adjusted.get(missed, 1.0):.3f}",
        order[-1],
        f"{adjusted[order[-1]]:.3f}",
    )


def gains_that_help(low: float, high: float, *runs: str) -> str:
    """Return in how many of the samplers of these networks a gain helps, as "9 of 9".

    Only where the plain samples have a spread from `low` to `high`; of all networks on ε without a
    name.
    """
    names = runs or [run for run in evidence_figures.GAINED if results(run).base == "ddim"]
    pairs = [pair for run in names for pair in evidence_figures.spreads_and_gains(run)]
    found = [nearer > 0 for spread, nearer in pairs if low <= spread < high]
    return f"{sum(found)} of {len(found)}"


def octave(run: str, method: str, sampler: str | None, steps: int, index: int) -> str:
    """Return the spread in an octave of frequencies over the data's; the first is the coarsest."""
    found, name, where = results(run), method_name(method), cell(run, sampler, steps)
    bands, key = found.record["band_spreads"], statistics.cell_key(name, where)
    seeds = found.values(name, where, SPREAD)
    values = [bands[f"{key}, seed {seed}"][index] for seed in seeds]
    return f"{sum(values) / len(values):.2f}"


def continuous_gap(skip: int) -> str:
    """Return by how much the gains of the VP-SDE and of the linear schedule differ at most."""
    n = torch.arange(skip + 1, 1000)  # just above k the two differ in whether the skip still fits
    discrete = gain(NoiseSchedule.linear(1000), skip)[n].double()
    continuous = gain(ContinuousSchedule.vp(), skip / 1000, t=(n.double() + 1) / 1000)
    return f"{100 * float((continuous / discrete - 1).abs().max()):.3f} %"


def claim(holds: bool) -> str:
    """Return nothing, or raise ValueError; for a sentence whose words hang on results."""
    if not holds:
        raise ValueError("the results no longer say what this sentence says")
    return ""


def best_pair(run: str, steps: int) -> str:
    """Return the correction and sampler of the plain network that are nearest to the data.

    By the kernel distance, which is said as well. Of what has all seeds: the mean of fewer may be
    lower by the seed alone.
    """
    found = results(run)
    words = {name: found.title(name) for name in found.methods} | {"plain": "no correction"}
    pairs = [
        (found.mean(method, where, KERNEL), f"{TITLES[where.sampler]} with {words[method]}")
        for method in found.methods
        for where in found.cells(method)
        if method.split("+")[0] == "plain"
        and where.steps == steps
        and found.values(method, where).keys() == found.values("plain", where).keys()
    ]
    value, title = min(pairs)
    return f"{title}, kernel distance {1000 * value:.1f} thousandths"


def recommended(run: str, sampler: str, steps: int = 10) -> str:
    """Return what the library's search recommends for the plain network, of each seed."""
    found = _searches(results(run), Cell(sampler, steps))
    return " and ".join(dict.fromkeys(_named(one) for one in found))


class PairSearch(NamedTuple):
    """What the search over pairs of sampler and correction recommends, and how that does."""

    pairs: str
    change: str | None
    nearer: float


def pair_search(run: str, steps: int = 10) -> PairSearch:
    """Return what the search over pairs recommends, and how much nearer that is on fresh noise.

    In the kernel distance, over the base sampler with no correction.
    """
    kept = [one for one in _all_searches(results(run), steps) if len(one["samplers"]) > 1]
    theirs = {one["seed"]: one["plain_kernel"] for one in kept}
    found = statistics.change({one["seed"]: one["corrected_kernel"] for one in kept}, theirs)
    if found is None:
        raise ValueError(f"no pairs were searched on {run}")
    names = [f"{TITLES[one['sampler']]} with {_named(one)}" for one in kept]
    return PairSearch(listed(list(dict.fromkeys(names))), percent(found), found.mean)


def archive_row(preset: str) -> list[str]:
    """Return images, seeds, plain DDIM 10 over the floor, and what gain and loss 49 do there."""
    found = results(preset)
    where = Cell("ddim", 10)
    changes = [found.change(method_name(f"{kind} 49"), where) for kind in ("gain", "loss")]
    gains = [percent(one) or "" for one in changes]
    return [fact(preset, "images"), fact(preset, "seeds").split()[0], times_floor(preset), *gains]


def _measured(*of: Any, **more: Any) -> statistics.Interval:
    """Return the change of `compared`, and refuse where nothing was measured."""
    found = statistics.change(*compared(*of, **more))
    if found is None:
        raise ValueError(f"nothing was measured of {of}")
    return found


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table of the lines that say something."""
    return markdown_table(head, [line for line in lines if any(line[1:])]).rstrip()


def _rescaling(found: Results, where: Cell) -> dict[int, str]:
    """Return for each seed the score rescaling that is best on the others, or the only one."""
    names = [name for name in found.methods if name.startswith("plain+rescaling")]
    names = [name for name in names if found.values(name, where)]
    if len(names) == 1:
        return dict.fromkeys(found.values("plain", where), names[0])
    return found.chosen_elsewhere(names, where)


def _searches(found: Results, where: Cell) -> list[dict[str, Any]]:
    """Return what `search.search` kept in a cell, a record for each seed."""
    kept = _all_searches(found, where.steps)
    return [one for one in kept if one["samplers"] == [where.sampler]]


def _all_searches(found: Results, steps: int) -> list[dict[str, Any]]:
    """Return the searches of a run, of which older records name one sampler only."""
    kept = [one for one in found.record.get("searches", []) if one["steps"] == steps]
    return [{"samplers": [one["sampler"]], **one} for one in kept]


def _named(search: Mapping[str, Any]) -> str:
    """Return what a search recommends, in words."""
    return "no correction" if search["recommended"] == "none" else str(search["recommended"])


HOLES: dict[str, Callable[..., Any]] = {
    each.__name__: each
    for each in (
        *(archive_row, best_pair, cells_table, change, claim, continuous_gap, distance, dose, fact),
        *(gains_that_help, markdown_table, mean_change, mean_table, moved, octave, pair_search),
        *(points, recommended, spread, table, times_floor, together, verdict),
    )
}
FIGURES: dict[str, Callable[[], Figure]] = {
    f"quality/{name}": draw for name, draw in evidence_figures.FIGURES.items()
}
