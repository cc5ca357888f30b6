"""Parts of `evidence_cifar10.md`: other samplers, samples, steps, trainings and reductions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.pages.tables import MISSING, counted, listed, markdown_table
from benchmarks.quality.corrections import Gain
from benchmarks.quality.evidence.cifar10_answers import (
    SETTLED,
    SPREAD_CELLS,
    over_ddim,
    over_plain,
    raw_spreads,
    without_training,
)
from benchmarks.quality.evidence.corrections import KERNEL
from benchmarks.quality.evidence.records import IMAGES, RAW, TEN, corrected, title, trained
from benchmarks.quality.objectives import Method, MinSNR, Summed
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.statistics import Cell, Interval, Results
from benchmarks.quality.tables import cell_title, percent

MIN_SNR = MinSNR().name
RAW_KERNEL = "raw_kernel"
MIN_SNR_GAINS = tuple(Method(MinSNR(), Gain(skip)).name for skip in (9, 49))


def by_sampler(results: Results, more: Iterable[str] = ()) -> str:
    """Return the improvements of the loss and of its gain in all cells but the headline's.

    Args:
        results: Of a network.
        more: Further methods.
    """
    cells = [cell for cell in sorted(results.cells("plain")) if cell != TEN]
    found = {
        name: {cell: one for cell in cells if (one := over_plain(results, name, cell)) is not None}
        for name in (trained(9), corrected(9), trained(49), corrected(49), *more)
    }
    rows = [
        [
            cell_title(cell),
            f"{_mean(results, 'plain', cell):.1f}",
            *(
                percent(column[cell]) if cell in column else ""
                for column in found.values()
                if column
            ),
        ]
        for cell in cells
        if any(cell in column for column in found.values())
    ]
    if not rows:
        return ""
    header = [
        title(results, name).removeprefix("plain L_simple + ") for name in found if found[name]
    ]
    text = markdown_table(["", "plain", *header], rows)
    return f"The same with other samplers and steps, Fréchet:\n\n{text}"


def with_more_samples(results: Results, more: Results) -> Iterable[str]:
    """Yield what as many samples as there are test images say, of the cells of the answer.

    Args:
        results: The answer's.
        more: Of the same networks, with more samples.
    """
    few, many = (f"{one.record['settings']['samples']:,}" for one in (results, more))
    yield f"## With {many} samples"
    yield (
        f"The cells of the answer again, with as many samples as there are test images; the first "
        f"{few} are those above. As many training images lie at **{more.floor:.1f}**, and at "
        f"{1e3 * more.record['floor']['kernel']:.2f} thousandths by the kernel distance. DDIM at "
        "10 steps, or the solver named."
    )
    rows, moved = [], []
    for heading, name, cell in _answers_cells(more):
        before, now = (_improvement(one, name, cell) for one in (results, more))
        rows.append([heading, percent(before), percent(now), _off_ddims_kernel(more, name, cell)])
        if before is not None and now is not None:
            moved.append(abs(before.mean - now.mean))
    header = ["", f"{few} samples", f"{many} samples", f"kernel, {many}"]
    yield markdown_table(header, rows)
    if moved:
        yield (
            f"Doubling the samples moves no improvement by more than {max(moved):.2f} percentage "
            "points."
        )


def unclamped(results: Results) -> Iterable[str]:
    """Yield what the answer is of the samples before they are clamped and rounded."""
    yield "## Before the samples are clamped and rounded"
    plain = {measure: _mean(results, "plain", TEN, measure) for measure in (IMAGES, RAW)}
    yield (
        "The cells of the answer again, as the sampler returns the samples: their values beyond "
        "an image's range are shown to the network of features, which was trained on photographs "
        "and has seen none. With DDIM at 10 steps the plain network lies at "
        f"{plain[RAW]:.1f}, raw, and at {plain[IMAGES]:.1f} in 8 bits."
    )
    rows, moved = [], []
    for heading, name, cell in _answers_cells(results):
        images, raw = (_improvement(results, name, cell, measure) for measure in (IMAGES, RAW))
        kernel = _off_ddims_kernel(results, name, cell, RAW_KERNEL)
        spreads = spreads_by_seed(results, name, cell)
        rows.append([heading, percent(images), percent(raw), kernel, spreads])
        if images is not None and raw is not None:
            moved.append(abs(images.mean - raw.mean))
    yield markdown_table(["", "8-bit", "raw", "kernel, raw", "spread, raw"], rows)
    if moved:
        yield (
            f"No improvement differs by more than {max(moved):.2f} percentage points between the "
            "two."
        )


def _answers_cells(results: Results) -> Iterable[tuple[str, str, Cell]]:
    """Yield heading, method and cell: the losses and corrections, then the other solvers."""
    names = [trained(9), corrected(9), trained(49), corrected(49)]
    names += [name for name in without_training(results, TEN) if name not in names]
    for name in names:
        yield title(results, name), name, TEN
    for cell in results.cells("plain"):
        if cell != TEN:
            yield cell_title(cell), "plain", cell


def min_snr(results: Results) -> Iterable[str]:
    """Yield what Min-SNR from the start does, and what a gain adds to it."""
    seeds = results.values(MIN_SNR, TEN, IMAGES)
    if not seeds:
        return
    yield "## Min-SNR from the start"
    yield (
        f"{title(results, MIN_SNR)}, trained from the plain run's first weights with its images, "
        f"timesteps and noise; {counted(len(seeds), 'seed')}, "
        f"{results.record['settings']['samples']:,} samples."
    )
    rows = []
    for cell in results.cells(MIN_SNR):
        found = over_plain(results, MIN_SNR, cell)
        rows.append([f"{title(results, MIN_SNR)} over plain", cell_title(cell), percent(found)])
        kernel = results.difference(MIN_SNR, [cell], KERNEL)
        rows[-1] += [thousandths(kernel), spreads_by_seed(results, MIN_SNR, cell)]
    for name in MIN_SNR_GAINS:
        if results.values(name, TEN):
            found = over_plain(results, name, TEN, MIN_SNR)
            kernel = results.difference(name, [TEN], KERNEL, MIN_SNR)
            heading = title(results, name).removeprefix(f"{title(results, MIN_SNR)} + ")
            rows.append([f"{heading} on it, over Min-SNR", cell_title(TEN), percent(found)])
            rows[-1] += [thousandths(kernel), spreads_by_seed(results, name, TEN)]
    yield markdown_table(["", "sampler", "Fréchet", "kernel", "spread"], rows)


def with_many_steps(long: Results) -> Iterable[str]:
    """Yield what the loss does where the sampler's own error is small."""
    yield "## With many steps"
    cells = [cell for cell in sorted(long.cells("plain")) if long.values(trained(9), cell)]
    rows = []
    for cell in cells:
        plain = list(long.values("plain", cell, KERNEL).values())
        rows.append(
            [
                cell_title(cell),
                str(len(plain)),
                f"{_mean(long, 'plain', cell):.1f}",
                percent(over_plain(long, trained(9), cell)),
                f"{1e3 * np.mean(plain):.1f}",
                thousandths(long.difference(trained(9), [cell], KERNEL)),
                spreads_by_seed(long, "plain", cell),
            ]
        )
    yield (
        f"{long.record['settings']['samples']:,} samples a cell. So few lie far from the test "
        f"images by the Fréchet distance whatever they are, as many training images at "
        f"{long.floor:.0f}: read the kernel distance, in thousandths, which has no bias."
    )
    header = ["", "seeds", "plain, Fréchet", "k = 9", "plain, kernel", "taken off it by k = 9"]
    yield markdown_table([*header, "spread, plain"], rows)


def beside(wide: Results, other: Results, after: str, more: str) -> Iterable[str]:
    """Yield what becomes of the answer elsewhere, its own seeds beside all of them.

    Args:
        wide: The answer's network.
        other: Some of its seeds, trained for longer or with another network.
        after: What was changed, in words that end a sentence.
        more: What there is more of.
    """
    seeds = sorted(other.values("plain", TEN))
    same = wide.of_seeds(seeds)
    columns = {
        f"`{wide.record['preset']}`, all seeds": wide,
        f"{_seeds(seeds)} alone": same,
        f"`{other.record['preset']}`": other,
    }
    rows, moved = [], []
    for name in other.methods:
        for cell in other.cells(name):
            if "@" in name or (name == "plain" and cell.sampler == "ddim"):
                continue
            found = [_improvement(one, name, cell) for one in columns.values()]
            heading = "" if name == "plain" else f"{title(other, name)}, "
            rows.append([f"{heading}{cell_title(cell)}", *map(percent, found)])
            if found[1] is not None and found[2] is not None:
                moved.append(abs(found[1].mean - found[2].mean))
    before, now = (_mean(one, "plain", TEN) for one in (same, other))
    yield (
        f"The plain network's distance with DDIM at 10 steps goes from {before:.1f} to {now:.1f}. "
        "Improvements over it, and of other solvers over DDIM at as many steps:"
    )
    yield markdown_table(["", *columns], rows)
    if moved:
        yield (
            f"On the same {'seed' if len(seeds) == 1 else 'seeds'} no improvement moves by more "
            f"than {max(moved):.1f} percentage points with {after}."
        )
    spreads = [
        abs(later - earlier)
        for cell in SPREAD_CELLS
        for earlier, later in zip(raw_spreads(same, cell), raw_spreads(other, cell), strict=False)
    ]
    if spreads and max(spreads) < SETTLED and now < before:
        yield (
            "The spread of the plain network's samples, raw, is that of before to within "
            f"{max(spreads):.4f} of the data's: {more} brings them nearer to the data and not "
            "farther apart. What is missing of it is not for want of "
            f"{more.removeprefix('more ')}, as far as that was tried."
        )


def _seeds(seeds: list[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed([str(seed) for seed in seeds])}"


def reduction(results: Results) -> Iterable[str]:
    """Yield what the sum in place of the mean does."""
    summed = Summed().name
    seeds = results.values(summed, TEN)
    if not seeds:
        return
    yield "## A sum in place of a mean"
    cells = results.cells(summed)
    found = [over_plain(results, summed, cell) for cell in cells]
    rows = [
        [
            cell_title(cell),
            f"{_mean(results, 'plain', cell):.1f}",
            percent(improved),
            thousandths(results.difference(summed, [cell], KERNEL)),
            spreads_by_seed(results, "plain", cell),
            spreads_by_seed(results, summed, cell),
        ]
        for cell, improved in zip(cells, found, strict=True)
    ]
    budget = PRESETS[results.record["preset"]].budget
    yield (
        "The released code averages its loss over an image's values where its base sums them, and "
        f"both clip the gradient's norm at {budget.grad_clip:g}. The plain loss both ways, "
        f"{counted(len(seeds), 'seed')} of {budget.steps * budget.batch_size:,} images, "
        "all else alike ([on the digits](evidence_corrections.md#was-it-the-reduction)):"
    )
    header = ["", "mean, Fréchet", "sum over mean", "kernel", "spread, mean", "spread, sum"]
    yield markdown_table(header, rows)
    signs = {one.mean > 0 for one in found if one is not None}
    if signs == {True}:
        sure = sum(one.sign == 1 for one in found if one is not None)
        yield (
            f"The sum is the nearer one in every cell, in {sure} of {len(found)} with an interval "
            "above 0. So nothing says that a gain published against the sum is the mean's. The "
            "protocol expected no difference: Adam divides a factor out, but a clip does not."
        )
    elif signs == {False}:
        yield (
            "The mean is the nearer one in every cell. So a gain that was published against the "
            "sum may be the mean's."
        )


def _improvement(results: Results, name: str, cell: Cell, measure: str = IMAGES) -> Interval | None:
    if name == "plain":
        return over_ddim(results, *cell, measure)
    return over_plain(results, name, cell, measure=measure)


def _off_ddims_kernel(results: Results, name: str, cell: Cell, measure: str = KERNEL) -> str:
    ours, theirs = results.values(name, cell, measure), results.values("plain", TEN, measure)
    found = [theirs[seed] - ours[seed] for seed in ours if seed in theirs]
    return f"{1e3 * np.mean(found):+.1f}" if found else MISSING


def thousandths(found: Interval | None) -> str:
    """Return a difference of kernel distances as text."""
    return MISSING if found is None else f"{1e3 * found.mean:+.1f}"


def spreads_by_seed(results: Results, name: str, cell: Cell) -> str:
    """Return the spreads of a method's samples as text, by seed."""
    return ", ".join(f"{value:.3f}" for value in results.values(name, cell, "spread").values())


def _mean(results: Results, name: str, cell: Cell, measure: str = IMAGES) -> float:
    return float(np.mean(list(results.values(name, cell, measure).values())))
