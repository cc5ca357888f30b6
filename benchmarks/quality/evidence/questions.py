"""The six questions that the paper's public reviews asked, answered by measurement."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from benchmarks.pages.tables import markdown_table
from benchmarks.quality.corrections import Gain
from benchmarks.quality.evidence.conclusions import verdict
from benchmarks.quality.evidence.figures import continuous_time, gain_sweep, grouped, sweeps
from benchmarks.quality.evidence.records import (
    GRID,
    IMAGES,
    MEASURES,
    RAW,
    Evidence,
    corrected,
    methods,
    skips_of,
    title,
    trained,
)
from benchmarks.quality.objectives import Plain, SkipStep
from benchmarks.quality.presets import LONG, STEPS
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Results
from benchmarks.quality.tables import AT_FLOOR, percent

SHOWN = (9, 49, 99)


def questions(evidence: Evidence, results: Results) -> Iterable[str]:
    """Yield the section."""
    yield "## The reviewers' six questions"
    yield "What the public reviews of the paper asked, in their order."
    for number, (question, answer) in enumerate(QUESTIONS.items(), start=1):
        yield f"### {number}. {question}"
        yield from answer(evidence, results)


def _doing_anything(evidence: Evidence, results: Results) -> Iterable[str]:
    lines = []
    for skip in skips_of():
        found = results.improvement(trained(skip), GRID, IMAGES)
        if found is not None:
            lines.append(f"- k = {skip}: {percent(found)}, {verdict(found)} (8-bit).")
    yield "\n".join(lines)
    taus = sorted(
        method.objective.tau
        for method in methods("digits-full").values()
        if isinstance(method.objective, SkipStep)
        and method.correction is None
        and (method.objective.skip, method.objective.estimator) == (49, "expected")
    )
    sweep = {f"τ = {tau:g}": SkipStep(49, tau=tau).name for tau in taus}
    rows = []
    for label, name in sweep.items():
        found = results.improvement(name, GRID, IMAGES)
        raw = percent(results.improvement(name, GRID, RAW))
        rows.append([label, percent(found), raw, verdict(found)])
    yield (
        "The weight matters through the gain s = τ / (τ + (1 − τ) c²), which τ and k set together. "
        "At k = 49:"
    )
    yield markdown_table(["", "8-bit", "raw", "8-bit, in words"], rows)
    skips = {str(skip): trained(skip) for skip in skips_of()}
    numbers = {label.removeprefix("τ = "): name for label, name in sweep.items()}
    yield evidence.figure(
        "question1",
        "Improvement by skip and by τ; arrows lead to what lies below -65 %",
        sweeps(results, {"τ = 0.99, by k": skips, "k = 49, by τ": numbers}),
    )


def _sampled_timesteps(evidence: Evidence, results: Results) -> Iterable[str]:
    yield (
        "A network for each number of steps, trained with plain L_simple on the timesteps that "
        "DDIM and PNDM visit and on no others, sampled by those two with those steps:"
    )
    rows, groups = [], []
    for steps in (10, 20, 50):
        cells = [Cell("ddim", steps), Cell("pndm", steps)]
        names = [f"only-ddim-{steps}", trained(49), trained(99)]
        found = [results.improvement(name, cells, IMAGES) for name in names]
        raw = results.improvement(names[0], cells, RAW)
        rows.append([f"{steps} steps", *map(percent, found), percent(raw)])
        groups.append(found)
    labels = ["only the sampled timesteps", "S²-DM k = 49", "S²-DM k = 99"]
    yield markdown_table(["8-bit", *labels, "only the sampled timesteps, raw"], rows)
    yield evidence.figure(
        "question2",
        "Training on the sampled timesteps only, 8-bit",
        grouped(groups, labels, [row[0] for row in rows]),
    )


def _equation_13(evidence: Evidence, results: Results) -> Iterable[str]:
    yield (
        "As printed, with one noise ε in both terms (`shared`), one output is asked to match ε "
        "and, scaled by c, to match ε again; the compromise is the gain (τ + (1 − τ) c) / A, above "
        "1 where c < 1. The released code draws a second noise (`fresh`), of which the network can "
        "learn nothing, and the gain is τ / A, never above 1. The two readings are two methods:"
    )
    estimators = ("expected", "fresh", "shared")
    skips = [skip for skip in skips_of() if f"skip{skip}-shared" in methods("digits-full")]
    rows, groups = [], []
    for skip in skips:
        names = [f"skip{skip}-{estimator}" for estimator in estimators]
        found = [results.improvement(name, GRID, IMAGES) for name in names]
        raw = results.improvement(names[-1], GRID, RAW)
        rows.append([f"k = {skip}", *map(percent, found), percent(raw)])
        groups.append(found)
    yield markdown_table(["8-bit", *estimators, "shared, raw"], rows)
    yield evidence.figure(
        "question3",
        "Improvement by reading of Eq. 13, 8-bit",
        grouped(groups, estimators, [f"k = {skip}" for skip in skips]),
    )


def _continuous_time(evidence: Evidence, _results: Results) -> Iterable[str]:
    figure, gaps = continuous_time(SHOWN)
    listed = ", ".join(f"{gap:.3f} % at k = {skip}" for skip, gap in gaps.items())
    yield (
        "Yes. c depends on the schedule through ᾱ alone, c² = ᾱ(t − δ) / ᾱ(t) − 1, so any Gaussian "
        "path has it, with a skip δ in units of time. The VP-SDE with δ = k / 1000 against the "
        f"discrete linear schedule with skip k: the gains differ by at most {listed}. "
        "`SkipStepLoss(ContinuousSchedule.vp(), skip_set=0.009)` trains with it; that the gains "
        "agree is computed here, samples of a continuous-time model were not measured."
    )
    yield evidence.figure("question4", "Discrete and continuous gains", figure)


def _stochastic(evidence: Evidence, results: Results) -> Iterable[str]:
    yield "Mean over 10, 20, 50 and 100 steps:"
    samplers = [s for s in TITLES if results.values("plain", Cell(s, 10))]
    rows, groups = [], []
    for sampler in samplers:
        cells = [Cell(sampler, steps) for steps in STEPS]
        found = [results.improvement(trained(skip), cells, IMAGES) for skip in SHOWN]
        raw = results.improvement(trained(99), cells, RAW)
        rows.append([TITLES[sampler], *map(percent, found), percent(raw)])
        groups.append(found)
    labels = [f"k = {skip}" for skip in SHOWN]
    yield markdown_table(["8-bit", *labels, "k = 99, raw"], rows)
    names = [TITLES[sampler] for sampler in samplers]
    yield evidence.figure(
        "question5", "Improvement by sampler, 8-bit", grouped(groups, labels, names)
    )
    cells = [Cell("ddim", steps) for steps in LONG]
    rows = [
        [title(results, name), *(percent(results.improvement(name, [c], IMAGES)) for c in cells)]
        for name in [*map(trained, SHOWN), *map(corrected, SHOWN)]
    ]
    yield "With many steps (DDIM, 8-bit):"
    yield markdown_table(["", *(f"{steps} steps" for steps in LONG)], rows)
    yield (
        "In training, the loss adds a table look-up and elementwise arithmetic to a step and no "
        "second call of the network, where SA-DPM makes two. What that takes is measured alone, "
        "by [the overhead benchmark](overhead.md); this grid ran on a machine that did other work, "
        "so it says nothing of time."
    )


def _not_steadily(evidence: Evidence, results: Results) -> Iterable[str]:
    gains = {0: "plain"} | {
        method.correction.skip: name
        for name, method in methods("digits-full").items()
        if isinstance(method.objective, Plain)
        and isinstance(method.correction, Gain)
        and name in results.methods
    }
    rows: list[list[str]] = []
    chosen: list[int] = []
    for steps in STEPS:
        cell = Cell("ddim", steps)
        row = [f"DDIM, {steps} steps"]
        for measure in MEASURES:
            means = {
                skip: found.mean
                for skip, name in gains.items()
                if (found := results.improvement(name, [cell], measure)) is not None
            }
            best = max(means, key=means.__getitem__)
            at_floor = all(results.at_floor(gains[k], cell, measure) for k in (0, best))
            change = AT_FLOOR if at_floor else f"{means[best]:+.1f} %"
            row += [f"k = {best}", change] if best else ["no gain", ""]
            chosen += [best] if measure == IMAGES else []
        row.append(f"{np.mean(list(results.values('plain', cell, 'spread').values())):.3f}")
        rows.append(row)
    yield (
        "A larger k is a stronger shrinking of ε̂. With few steps a sampler's results have too "
        "little spread; a smaller ε̂ leaves more of it in, and it is right for one size of gain and "
        "too much beyond. "
        + (
            "More steps leave less to correct, and the best k gets smaller. "
            if chosen == sorted(chosen, reverse=True) and chosen[0] > chosen[-1]
            else ""
        )
        + "Measured with the gain on the plain network, where k can be swept without training:"
    )
    header = ["", "best k, 8-bit", "improvement", "best k, raw", "improvement", "spread"]
    yield markdown_table(header, rows)
    yield (
        "The spread is the standard deviation of the raw samples over the data's, plain network."
    )
    yield evidence.figure(
        "question6",
        "Improvement and spread by skip; arrows lead to what lies below the panels",
        gain_sweep(results, gains),
    )


QUESTIONS = {
    "Is the term with weight 0.01 doing anything?": _doing_anything,
    "How does training on the sampled timesteps only compare?": _sampled_timesteps,
    "How is Eq. 13 to be read?": _equation_13,
    "Is there a continuous-time counterpart?": _continuous_time,
    "Does it also help stochastic sampling? What does it cost?": _stochastic,
    "Why does quality not improve steadily with k?": _not_steadily,
}
