"""``docs/evidence.md``, written from the committed results and from nothing else.

Every number, every "better" and every "no difference" below comes out of the records: the prose
only says what was asked.  Whatever has no record is "not measured yet".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.files import load_json, write_whole
from benchmarks.quality.presets import CORE, LONG, PRESETS, STEPS
from benchmarks.quality.report import (
    COLORS,
    STYLE,
    distance_table,
    markdown_table,
    percent,
    save_figure,
)
from benchmarks.quality.samplers import TITLES
from benchmarks.quality.statistics import Cell, Interval, Results
from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, coefficients

GRID = [Cell(sampler, steps) for sampler in CORE for steps in STEPS]
SKIPS = (1, 9, 49, 99, 149)
PEERS = ("min-snr-5", "ddpm-ip-0.1", "sa-dpm-2", "plain+scaling1.017", "plain+scaling1.04")
RAW, IMAGES = "raw_frechet", "images_frechet"
MISSING = "not measured yet"


@dataclass(frozen=True)
class Sources:
    """Where the page's material lies.

    Attributes:
        quality: Folder of the records that ``keep`` writes.
        lab: Folder of Markdown fragments on the exact lab.
        assets: Folder for the figures.
        link: How the page links to that folder.
    """

    quality: Path = Path("benchmarks/results/quality")
    lab: Path = Path("benchmarks/results/lab")
    assets: Path = Path("docs/assets/evidence")
    link: str = "assets/evidence"


def verdict(found: Interval | None) -> str:
    """Say what an interval says, and no more."""
    if found is None:
        return MISSING
    if found.sign > 0:
        return "better than plain training"
    if found.sign < 0:
        return "worse than plain training"
    return f"no difference from plain training that {found.count} seeds can show"


FAMILIES = (
    r"skip(\d+)-expected",
    r"skip(\d+)-fresh",
    r"skip(\d+)-shared",
    r"skip\d+-expected-tau([\d.]+)",
    r"plain\+gain(\d+)",
    r"plain\+scaling([\d.]+)",
    r"only-ddim-(\d+)",
)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort methods by family, and by their number within it; the peers come last."""

    def key(name: str) -> tuple[int, float]:
        for place, family in enumerate(FAMILIES):
            if found := re.fullmatch(family, name):
                return place, float(found[1])
        return len(FAMILIES), 0.0

    return sorted(names, key=key)


def with_bootstrap(found: Interval | None) -> str:
    """Return an improvement with both its intervals."""
    if found is None:
        return MISSING
    return f"{percent(found)}; bootstrap [{found.boot_low:+.1f}, {found.boot_high:+.1f}]"


class Page:
    """Writes the page.

    Args:
        sources: Where its material lies.
    """

    def __init__(self, sources: Sources) -> None:
        """Read the records."""
        self.sources = sources
        self.records = {
            name: load_json(path)
            for name in PRESETS
            if (path := sources.quality / f"{name}.json").exists()
        }
        self.full = Results(self.records["digits-full"]) if "digits-full" in self.records else None

    def write(self, path: Path) -> None:
        """Write the page and its figures."""
        text = "\n\n".join(part.strip() for part in self._parts() if part.strip()) + "\n"
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def _parts(self) -> Iterable[str]:
        yield "# Evidence"
        yield (
            "<!-- Written by `python -m benchmarks.quality page` from benchmarks/results; "
            "edit benchmarks/quality/page.py instead. -->"
        )
        if self.full is None:
            yield "The grid on the digits: not measured yet."
        else:
            yield from self._grid(self.full)
        yield from self._textures()
        yield from self._readme_run()
        yield from self._other_data()
        yield from self._lab()
        yield self._commands()

    def _grid(self, results: Results) -> Iterable[str]:
        yield self._summary(results)
        yield self._setting(results)
        yield self._all_methods(results)
        yield self._paper_form(results)
        yield self._best_by_cell(results)
        yield self._trained_or_not(results)
        yield self._peers(results)
        yield self._estimators(results)
        yield "## The reviewers' six questions"
        yield self._question1(results)
        yield self._question2(results)
        yield self._question3(results)
        yield self._question4()
        yield self._question5(results)
        yield self._question6(results)
        yield self._advice(results)

    def _figure(self, name: str, alt: str, figure: Figure) -> str:
        save_figure(figure, self.sources.assets / f"{name}.svg")
        return f"![{alt}]({self.sources.link}/{name}.svg)"

    # What was found, and how it was measured.

    def _summary(self, results: Results) -> str:
        ten = Cell("ddim", 10)
        names = [f"skip{skip}-expected" for skip in SKIPS] + list(PEERS)
        rows = []
        for name in names:
            raw, images = (results.improvement(name, GRID, measure) for measure in (RAW, IMAGES))
            if raw is not None:
                few = [percent(results.improvement(name, [ten], m)) for m in (RAW, IMAGES)]
                rows.append([results.title(name), percent(raw), percent(images), *few])
        header = ["improvement over plain training", "raw", "clamped"]
        header += ["DDIM, 10 steps, raw", "clamped"]
        lines = []
        default = results.improvement("skip9-expected", GRID)
        if default is not None:
            lines.append(
                f"- The paper's default, k = 9: {percent(default)}, {verdict(default)} (raw)."
            )
        best = self._best(results, GRID, RAW)
        if best is not None:
            lines.append(
                "- The largest mean improvement of a trained setting whose interval excludes 0: "
                f"{best[0]}, {percent(best[1])}. It is the best of many, so expect less elsewhere."
            )
        worse = self._better_peers(results)
        if worse:
            lines.append(
                f"- Better than k = 49 in both measures, with intervals: {', '.join(worse)}."
            )
        return (
            "What the loss does to samples, measured on handwritten digits with five seeds, "
            "beside its peers. Mean relative improvement over plain training, over DDIM, PNDM and "
            "DEIS at 10, 20, 50 and 100 steps, and for the paper's headline cell alone: 95 % "
            "intervals, paired by seed, bold where they exclude 0; positive is better. *Raw* is "
            "samples as the sampler returns them, *clamped* the same as 8-bit images.\n\n"
            + markdown_table(header, rows)
            + "\n"
            + "\n".join(lines)
        )

    def _better_peers(self, results: Results) -> list[str]:
        """Return the peers that are better than k = 49 in both measures, by their intervals."""
        return [
            results.title(name)
            for name in PEERS
            if all(
                (found := results.improvement(name, GRID, measure, "skip49-expected")) is not None
                and found.sign > 0
                for measure in (RAW, IMAGES)
            )
        ]

    def _best(
        self, results: Results, cells: Sequence[Cell], measure: str
    ) -> tuple[str, Interval] | None:
        """Return the best trained setting whose interval excludes 0."""
        found = [
            (results.title(name), improvement)
            for name in results.methods
            if name.startswith("skip")
            and (improvement := results.improvement(name, cells, measure)) is not None
            and improvement.sign > 0
        ]
        return max(found, key=lambda pair: pair[1].mean, default=None)

    def _best_by_cell(self, results: Results) -> str:
        rows = []
        for cell in GRID:
            row = [f"{TITLES[cell.sampler]}, {cell.steps} steps"]
            for measure in (RAW, IMAGES):
                best = self._best(results, [cell], measure)
                row += [best[0], percent(best[1])] if best is not None else ["none", ""]
            rows.append(row)
        return (
            "## The best trained setting for each sampler\n\nOver all skips, τ and estimators "
            "measured, the one with the largest improvement whose interval excludes 0. Each is the "
            "best of many, chosen on the same data that it is reported on.\n\n"
            + markdown_table(["", "best, raw", "", "best, clamped", ""], rows)
        )

    def _setting(self, results: Results) -> str:
        record = results.record
        settings, floor, versions = record["settings"], record["floor"], record["versions"]
        listed = ", ".join(f"{k} {v}" for k, v in versions.items() if v and k != "commit")
        plain_raw, plain_images = (
            np.mean(list(results.values("plain", Cell("deis", 50), measure).values()))
            for measure in (RAW, IMAGES)
        )
        return f"""
## How it was measured

- **Data**: scikit-learn's 1797 handwritten digits, 8 x 8. **Network**: `{settings["network"]}`,
  with a gated connection from input to output. **Budget**: `{settings["budget"]}`, averaged
  weights for sampling. **Schedule**: {settings["schedule"]}.
- **Common random numbers**: for each seed, every objective has the same initialisation, the same
  images in the same order, the same timesteps and the same noise; what an objective draws besides
  (the fresh ζ, DDPM-IP's ξ, SA-DPM's second noise) comes from a stream of its own. Sampling
  starts from the same noise for every method, sampler and number of steps. One reduction, the mean.
- **Samplers**: diffusers', all with `leading` timestep spacing and no clipping inside the sampler;
  PNDM without its Runge-Kutta warm-up.
- **Distance**: the Fréchet distance (torchmetrics) between {settings["samples"]:,} samples and the
  data, on {floor["features"]}, scaled to unit mean variance. Two random halves of the data
  ({floor["images_each"]} images each) are {floor["frechet"]:.3f} apart, more than many cells below
  since those compare larger sets: read differences, not absolute values.
- **Two measures**. *Raw*: samples as the sampler returns them. *Clamped*: clamped to the image
  range and rounded to 8 bits, as a file would be. On these digits they differ much, since more
  than half of all pixels are at the very end of the range: DEIS at 50 steps, plain training, is at
  {plain_raw:.3f} raw and {plain_images:.3f} clamped, because clamping turns the small noise around
  black into a grey veil and cuts strokes that overshoot. Both are given everywhere; where they
  disagree, the improvement depends on what is done with the samples, and we say so.
- **Intervals**: relative improvement within each seed, then Student's t over the seeds; beside it,
  where shown, a percentile bootstrap over the seeds, which is too narrow with five of them.
- **Versions**: {listed}.
"""

    # The tables.

    def _all_methods(self, results: Results) -> str:
        return (
            "## Every method\n\nMean relative improvement over plain training, over DDIM, PNDM "
            "and DEIS at 10, 20, 50 and 100 steps. `plain + …` are corrections of the plain "
            "network that need no training.\n\n"
            + _methods_table(results)
            + "\n"
            + self._figure("methods", "Improvement of every method", self._forest(results))
        )

    def _forest(self, results: Results) -> Figure:
        names = [
            name
            for name in in_order(results.methods)
            if name != "plain" and results.improvement(name, GRID) is not None
        ]
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(8.4, 0.24 * len(names) + 0.9), layout="constrained")
            axes = figure.subplots()
            for offset, measure, color, label in (
                (0.13, RAW, COLORS[1], "raw"),
                (-0.13, IMAGES, COLORS[3], "clamped"),
            ):
                found = [results.improvement(name, GRID, measure) for name in names]
                rows = -np.arange(len(names)) + offset
                _errorbars(axes, rows, found, color=color, label=label, across=True)
            axes.set_yticks(-np.arange(len(names)), [results.title(name) for name in names])
            axes.axvline(0, color=COLORS[0], linewidth=1)
            # One disastrous method would flatten the others.
            axes.set_xlim(-60, 60)
            axes.set_xlabel("improvement over plain, %, 95 % t intervals; cut off below -60 %")
            figure.legend(loc="outside upper right", ncols=2)
        return figure

    def _paper_form(self, results: Results) -> str:
        names = [f"skip{skip}-expected" for skip in SKIPS]
        names = [name for name in names if name in results.methods]
        parts = []
        for measure, label in ((RAW, "raw"), (IMAGES, "clamped")):
            rows = []
            for cell in GRID:
                row = [f"{TITLES[cell.sampler]}, {cell.steps} steps"]
                row += [percent(results.improvement(name, [cell], measure)) for name in names]
                rows.append(row)
            rows.append(
                ["mean", *(percent(results.improvement(name, GRID, measure)) for name in names)]
            )
            header = [label, *(f"k = {name[4:].split('-')[0]}" for name in names)]
            parts.append(markdown_table(header, rows))
        nine = [results.improvement("skip9-expected", [cell]) for cell in GRID]
        means = [found.mean for found in nine if found is not None]
        reach = (
            f"With the paper's default, k = 9, our cells range from {min(means):+.1f} % to "
            f"{max(means):+.1f} % (raw). "
            if means
            else ""
        )
        distances = [name for name in ("plain", *names) if name in results.methods]
        return (
            "## In the paper's form\n\nRelative improvement over plain training by sampler and "
            'steps, with `estimator="expected"`. The paper reports 3.27 % to 14.06 % on '
            f"CIFAR10 and 8.97 % to 27.08 % on CelebA, in FID. {reach}These are digits and "
            "another feature space, so the sizes cannot be set side by side; the sign and the "
            "order can.\n\n"
            + "\n".join(parts)
            + "\nThe raw distances behind it:\n\n"
            + distance_table(results, distances, GRID, RAW)
        )

    def _trained_or_not(self, results: Results) -> str:
        rows, signs = [], []
        for skip in SKIPS:
            trained, corrected = f"skip{skip}-expected", f"plain+gain{skip}"
            found = results.improvement(trained, GRID, RAW, corrected)
            if found is None:
                continue
            signs.append(found.sign)
            rows.append(
                [
                    f"k = {skip}",
                    percent(results.improvement(trained, GRID)),
                    percent(results.improvement(corrected, GRID)),
                    with_bootstrap(found),
                    percent(results.improvement(trained, GRID, IMAGES, corrected)),
                ]
            )
        if not rows:
            conclusion = ""
        elif not any(signs):
            conclusion = (
                "No interval excludes 0: on these data, training with the loss and putting its "
                "gain on a plainly trained network come to the same."
            )
        else:
            better, worse = signs.count(1), signs.count(-1)
            conclusion = (
                f"Of {len(signs)} skips, training is better than the gain alone at {better}, "
                f"worse at {worse}, and cannot be told from it at {signs.count(0)}."
            )
        return (
            "## The trained loss against the gain without training\n\n"
            "The loss's minimiser is s(t) E[ε | x_t], so a plainly trained network multiplied by "
            "s(t) (`ShrunkModel`) should do as well. The last two columns compare the two "
            "directly: the improvement of the trained network over the corrected one.\n\n"
            + markdown_table(
                ["", "trained", "gain, no training", "trained over gain, raw", "clamped"], rows
            )
            + f"\n{conclusion}"
        )

    def _peers(self, results: Results) -> str:
        ours = "skip49-expected"
        rows = []
        for name in PEERS:
            if results.improvement(name, GRID) is None:
                continue
            row = [results.title(name)]
            for measure in (RAW, IMAGES):
                row.append(percent(results.improvement(name, GRID, measure)))
                row.append(percent(results.improvement(ours, GRID, measure, name)))
            rows.append(row)
        return (
            "## Its peers\n\nSame data, network, seeds, number of steps and random numbers. "
            "SA-DPM calls the network twice in each training step, so it has twice the "
            f"computation of the others. Beside each, how much {results.title(ours)} improves "
            "on it (negative: the peer is better):\n\n"
            + markdown_table(
                ["", "peer, raw", "k = 49 over it", "peer, clamped", "k = 49 over it"], rows
            )
            + self._added_gain(results)
        )

    def _added_gain(self, results: Results) -> str:
        rows = []
        for skip in (49, 99):
            name = f"min-snr-5+gain{skip}"
            found = [
                results.improvement(name, cells, measure, "min-snr-5")
                for cells in (GRID, [Cell("ddim", 10)])
                for measure in (RAW, IMAGES)
            ]
            if found[0] is not None:
                rows.append([f"gain k = {skip}", *map(percent, found)])
        if not rows:
            return ""
        return (
            "\nDoes the gain add to a better objective? The network trained with Min-SNR-5, with "
            "the gain put on afterwards, over the same network without it:\n\n"
            + markdown_table(
                ["", "raw", "clamped", "DDIM, 10 steps, raw", "clamped"],
                rows,
            )
        )

    def _estimators(self, results: Results) -> str:
        rows, signs = [], []
        for skip in SKIPS:
            expected, fresh = f"skip{skip}-expected", f"skip{skip}-fresh"
            found = results.improvement(fresh, GRID, RAW, expected)
            if found is None:
                continue
            signs.append(found.sign)
            rows.append(
                [
                    f"k = {skip}",
                    percent(results.improvement(expected, GRID)),
                    percent(results.improvement(fresh, GRID)),
                    with_bootstrap(found),
                ]
            )
        if not rows:
            conclusion = ""
        elif any(signs):
            conclusion = (
                f"They differ, by their intervals, at {len(signs) - signs.count(0)} of "
                f"{len(signs)} skips."
            )
        else:
            conclusion = "They agree within their intervals at every skip measured."
        return (
            "## `expected` against `fresh`\n\n`expected` is the average of the released code's "
            "`fresh` over its second noise: the same minimiser with less variance. The last "
            "column is the improvement of `fresh` over `expected`.\n\n"
            + markdown_table(["", "expected", "fresh", "fresh over expected"], rows)
            + f"\n{conclusion}"
        )

    # The six questions.

    def _question1(self, results: Results) -> str:
        taus = {0.9: "-tau0.9", 0.95: "-tau0.95", 0.99: "", 0.995: "-tau0.995"}
        sweep = {tau: f"skip49-expected{suffix}" for tau, suffix in taus.items()}
        rows = []
        for tau, name in sweep.items():
            raw, images = (results.improvement(name, GRID, m) for m in (RAW, IMAGES))
            rows.append([f"τ = {tau:g}", percent(raw), percent(images), verdict(raw)])

        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(8.4, 3.0), layout="constrained")
            left, right = figure.subplots(1, 2)
            for measure, color, label in ((RAW, COLORS[1], "raw"), (IMAGES, COLORS[3], "clamped")):
                skips = [f"skip{skip}-expected" for skip in SKIPS]
                for axes, names in ((left, skips), (right, list(sweep.values()))):
                    found = [results.improvement(name, GRID, measure) for name in names]
                    _errorbars(axes, np.arange(len(names)), found, color=color, label=label)
            left.set_xticks(range(len(SKIPS)), [f"k = {skip}" for skip in SKIPS])
            left.set(title="τ = 0.99, by skip", ylabel="improvement over plain, %")
            right.set_xticks(range(len(sweep)), [f"τ = {tau:g}" for tau in sweep])
            right.set(title="k = 49, by τ")
            for axes in (left, right):
                axes.axhline(0, color=COLORS[0], linewidth=1)
                axes.set_ylim(bottom=-65)  # τ = 0.9 would flatten the others
            left.legend(loc="lower left")
        return (
            "### 1. Is the term with weight 0.01 doing anything?\n\n"
            + self._list_verdicts(results, [f"skip{skip}-expected" for skip in SKIPS])
            + "\nThe weight matters through the gain s = τ / (τ + (1 − τ) c²), which τ and k set "
            "together. At k = 49:\n\n"
            + markdown_table(["", "raw", "clamped", "raw, in words"], rows)
            + "\n"
            + self._figure("question1", "Improvement by skip and by τ, cut off below -65 %", figure)
        )

    def _list_verdicts(self, results: Results, names: Sequence[str]) -> str:
        lines = [
            f"- {results.title(name)}: {percent(found)}, {verdict(found)} (raw).\n"
            for name in names
            if name in results.methods and (found := results.improvement(name, GRID)) is not None
        ]
        return "".join(lines)

    def _question2(self, results: Results) -> str:
        rows, groups = [], []
        for steps in (10, 20, 50):
            cells = [Cell("ddim", steps), Cell("pndm", steps)]
            names = [f"only-ddim-{steps}", "skip49-expected", "skip99-expected"]
            found = [results.improvement(name, cells) for name in names]
            clamped = results.improvement(names[0], cells, IMAGES)
            rows.append([f"{steps} steps", *map(percent, found), percent(clamped)])
            groups.append(found)
        labels = ["only the sampled timesteps", "S²-DM k = 49", "S²-DM k = 99"]
        figure = _grouped(groups, labels, [f"{steps} steps" for steps in (10, 20, 50)])
        return (
            "### 2. How does training on the sampled timesteps only compare?\n\n"
            "A network for each number of steps, trained with plain L_simple on the timesteps "
            "that DDIM and PNDM visit and on no others, sampled by those two with those steps:\n\n"
            + markdown_table(
                ["raw", *labels, "only the sampled timesteps, clamped"],
                rows,
            )
            + "\n"
            + self._figure("question2", "Training on the sampled timesteps only", figure)
        )

    def _question3(self, results: Results) -> str:
        skips = [skip for skip in SKIPS if f"skip{skip}-shared" in results.methods]
        rows, groups = [], []
        for skip in skips:
            found = [
                results.improvement(f"skip{skip}-{estimator}", GRID)
                for estimator in ("expected", "fresh", "shared")
            ]
            clamped = results.improvement(f"skip{skip}-shared", GRID, IMAGES)
            rows.append([f"k = {skip}", *map(percent, found), percent(clamped)])
            groups.append(found)
        figure = _grouped(
            groups, ["expected", "fresh", "shared"], [f"k = {skip}" for skip in skips]
        )
        return (
            "### 3. How is Eq. 13 to be read?\n\n"
            "As printed, with one noise ε in both terms (`shared`), one output is asked to match "
            "ε and, scaled by c, to match ε again; the compromise is the gain (τ + (1 − τ) c) / A, "
            "above 1 where c < 1. The released code draws a second noise (`fresh`), of which the "
            "network can learn nothing, and the gain is τ / A, never above 1. The two readings "
            "are two methods:\n\n"
            + markdown_table(["raw", "expected", "fresh", "shared", "shared, clamped"], rows)
            + "\n"
            + self._figure("question3", "Improvement by reading of Eq. 13", figure)
        )

    def _question4(self) -> str:
        discrete = NoiseSchedule.linear(1000)
        continuous = ContinuousSchedule.vp()
        times = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
        gaps = {}
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(8.4, 3.0), layout="constrained")
            left, right = figure.subplots(1, 2)
            for skip, color in zip((9, 49, 99), COLORS[1:], strict=False):
                table = coefficients(discrete, skip).gain
                path = coefficients(continuous, SkipSet(skip / 1000), t=times).gain
                left.plot(times, 1 / table, color=color, label=f"k = {skip}")
                left.plot(times, 1 / path, color="black", linestyle=":", linewidth=1)
                # Just above t = k the two differ in whether the skip still fits.
                valid = torch.arange(1000) > skip
                gap = (path / table - 1)[valid]
                right.plot(times[valid], 100 * gap, color=color)
                gaps[skip] = 100 * float(gap.abs().max())
            left.set(xlabel="time", title="λ(t) = 1/s(t): discrete, and VP-SDE (dotted)")
            right.set(xlabel="time", title="difference of the gains, %")
            left.legend()
        listed = ", ".join(f"{gap:.3f} % at k = {skip}" for skip, gap in gaps.items())
        return (
            "### 4. Is there a continuous-time counterpart?\n\n"
            "Yes. c depends on the schedule through ᾱ alone, c² = ᾱ(t − δ) / ᾱ(t) − 1, so any "
            "Gaussian path has it, with a skip δ in units of time. The VP-SDE with δ = k / 1000 "
            "against the discrete linear schedule with skip k: the gains differ by at most "
            f"{listed}. `SkipStepLoss(ContinuousSchedule.vp(), skip_set=0.009)` trains with it; "
            "that the gains agree is computed here, samples of a continuous-time model were not "
            "measured.\n\n" + self._figure("question4", "Discrete and continuous gains", figure)
        )

    def _question5(self, results: Results) -> str:
        samplers = [s for s in TITLES if results.values("plain", Cell(s, 10))]
        skips = (9, 49, 99)
        rows, groups = [], []
        for sampler in samplers:
            cells = [Cell(sampler, steps) for steps in STEPS]
            found = [results.improvement(f"skip{skip}-expected", cells) for skip in skips]
            clamped = results.improvement("skip99-expected", cells, IMAGES)
            rows.append([TITLES[sampler], *map(percent, found), percent(clamped)])
            groups.append(found)
        labels = [f"k = {skip}" for skip in skips]
        figure = _grouped(groups, labels, [TITLES[sampler] for sampler in samplers])
        return (
            "### 5. Does it also help stochastic sampling? What does it cost?\n\n"
            "Mean over 10, 20, 50 and 100 steps:\n\n"
            + markdown_table(["raw", *labels, "k = 99, clamped"], rows)
            + "\n"
            + self._figure("question5", "Improvement by sampler", figure)
            + "\n\n"
            + self._long(results)
            + self._cost(results)
        )

    def _long(self, results: Results) -> str:
        cells = [Cell("ddim", steps) for steps in LONG]
        names = ["skip9-expected", "skip49-expected", "skip99-expected"]
        names += ["plain+gain9", "plain+gain49", "plain+gain99"]
        rows = [
            [results.title(name), *(percent(results.improvement(name, [c])) for c in cells)]
            for name in names
            if all(results.values(name, cell) for cell in cells)
        ]
        if not rows:
            return ""
        return (
            "With many steps (DDIM, raw):\n\n"
            + markdown_table(["", *(f"{steps} steps" for steps in LONG)], rows)
            + "\n"
        )

    def _cost(self, results: Results) -> str:
        trainings = results.record["trainings"]
        calls = {name: runs for name, runs in trainings.items() if name.startswith("sa-dpm")}
        extra = " SA-DPM calls the network twice per step." if calls else ""
        return (
            "In training, the loss adds a table look-up and elementwise arithmetic to a step: no "
            f"second call of the network.{extra} What that takes is measured alone, on an idle "
            "machine, by the overhead benchmark; the grid ran on a shared one, so its times per "
            "step are not a measurement."
        )

    def _question6(self, results: Results) -> str:
        gains = {0: "plain"} | {
            skip: f"plain+gain{skip}"
            for skip in (1, 9, 49, 99, 149, 199)
            if f"plain+gain{skip}" in results.methods
        }
        skips = list(gains)
        with mpl.rc_context(STYLE):
            figure = Figure(figsize=(9.6, 3.0), layout="constrained")
            panels = figure.subplots(1, 3)
            for steps, color in zip(STEPS, COLORS[1:], strict=False):
                cell = Cell("ddim", steps)
                for axes, measure in zip(panels, (RAW, IMAGES), strict=False):
                    found = [results.improvement(name, [cell], measure) for name in gains.values()]
                    _errorbars(axes, skips, found, color=color, label=f"{steps} steps", line=True)
                spreads = [
                    float(np.mean(list(results.values(name, cell, "spread").values())))
                    for name in gains.values()
                ]
                panels[2].plot(skips, spreads, color=color, marker="o", markersize=3)
            for axes, title in zip(
                panels,
                ("improvement, raw, %", "improvement, clamped, %", "spread of samples / data"),
                strict=True,
            ):
                axes.set(xlabel="k of the gain", title=title)
                axes.axhline(1 if "spread" in title else 0, color=COLORS[0], linewidth=1)
            panels[0].set_ylim(bottom=-60)  # k = 199 would flatten the others
            panels[1].set_ylim(bottom=-30)
            panels[0].legend(loc="lower left")
        rows: list[list[str]] = []
        best_raw: list[int] = []
        for steps in STEPS:
            cell = Cell("ddim", steps)
            row = [f"DDIM, {steps} steps"]
            for measure in (RAW, IMAGES):
                means = {
                    skip: improvement.mean
                    for skip, name in gains.items()
                    if (improvement := results.improvement(name, [cell], measure)) is not None
                }
                best = max(means, key=means.__getitem__)
                row += [f"k = {best}" if best else "no gain", f"{means[best]:+.1f} %"]
                best_raw += [best] if measure == RAW else []
            spread = results.values("plain", cell, "spread").values()
            row.append(f"{np.mean(list(spread)):.3f}")
            rows.append(row)
        return (
            "### 6. Why does quality not improve steadily with k?\n\n"
            "A larger k is a stronger shrinking of ε̂. With few steps a sampler's results have "
            "too little spread; a smaller ε̂ leaves more of it in, and it is right for one size "
            "of gain and too much beyond. "
            + (
                "More steps leave less to correct, and the best k gets smaller. "
                if best_raw == sorted(best_raw, reverse=True) and best_raw[0] > best_raw[-1]
                else ""
            )
            + "Measured with the gain on the plain network, where k can be swept without "
            "training:\n\n"
            + markdown_table(
                ["", "best k, raw", "improvement", "best k, clamped", "improvement", "spread"],
                rows,
            )
            + "\nThe spread is the standard deviation of the samples over the data's, plain "
            "network, before clamping.\n\n"
            + self._figure("question6", "Improvement, cut off below, and spread by skip", figure)
        )

    def _advice(self, results: Results) -> str:
        samplers = []
        for sampler in CORE:
            found = results.improvement(
                "skip49-expected", [Cell(sampler, steps) for steps in STEPS]
            )
            samplers.append(f"{TITLES[sampler]} {percent(found)}")
        gain_is_enough = all(
            found is None or found.sign <= 0
            for skip in SKIPS
            for found in [
                results.improvement(f"skip{skip}-expected", GRID, RAW, f"plain+gain{skip}")
            ]
        )
        enough = (
            "In no comparison here did training with the loss do better than this. "
            if gain_is_enough
            else "Where training does better, the comparison above says so. "
        )
        peers = self._better_peers(results)
        first = (
            f"- **A better objective may give more.** {', '.join(peers)} did here, in both "
            "measures; whether the gain adds to it is in the section on peers.\n"
            if peers
            else ""
        )
        return f"""
## Advice

{first}- **Try the gain before you train.** `ShrunkModel(model, schedule, skip_set=k)` costs a few
  samplings of a network that you have. {enough.strip()}
- **It is for few steps and samplers of low order.** k = 49, mean over 10 to 100 steps, raw:
  {"; ".join(samplers)}. The table of best settings says which k went with how many steps.
- **Look at the spread of your samples first.** The gain makes ε̂ smaller and so the samples more
  spread: there must be spread missing for it to put back. Judge by what you will use: where many
  pixels lie at an end of the range and samples are clamped, the improvement can vanish or turn
  round, as on the digits.
- **τ and k do nearly one thing together.** What counts is the gain s(t); a smaller τ acts as a
  larger k. Leave τ at 0.99 and move k.
- **Too much is far worse than none.** See k = 149 and 199, and τ = 0.9, in the table of methods.
- **Use `estimator="expected"`** unless you must reproduce the released code draw for draw.
"""

    # The other runs.

    def _readme_run(self) -> Iterable[str]:
        record = self.records.get("digits")
        yield "## The run of the README"
        if record is None:
            yield MISSING
            return
        results = Results(record)
        cells = results.cells("plain")
        yield "One seed, so no intervals; `python -m benchmarks.quality run digits`. Raw:"
        yield distance_table(results, results.methods, cells, RAW)
        yield "Clamped:"
        yield distance_table(results, results.methods, cells, IMAGES)

    def _textures(self) -> Iterable[str]:
        yield "## Does it hold where clamping changes nothing?"
        yield (
            "`textures`: 8 x 8 grey crops of two photographs, with the digits' network, budget "
            "and samplers. Hardly one of their pixels is at either end of the range, so clamping "
            "can change little but samples that left it. Read the first table before the second: "
            "where more steps bring samples no closer to the data, the network's own error "
            "dominates, and there is no discretisation error for a gain to mend."
        )
        record = self.records.get("textures")
        if record is None:
            yield MISSING
            return
        results = Results(record)
        rows = []
        for sampler in CORE:
            row = [TITLES[sampler]]
            for steps in STEPS:
                cell = Cell(sampler, steps)
                raw, images, spread = (
                    np.mean(list(results.values("plain", cell, measure).values()))
                    for measure in (RAW, IMAGES, "spread")
                )
                row.append(f"{raw:.3f} / {images:.3f} / {spread:.3f}")
            rows.append(row)
        yield (
            "Plain training: Fréchet distance raw / clamped / spread of the samples over the "
            f"data's ({record['floor']['features']}; two halves of the data are "
            f"{record['floor']['frechet']:.3f} apart).\n\n"
            + markdown_table(["", *(f"{steps} steps" for steps in STEPS)], rows)
        )
        yield _methods_table(results)

    def _other_data(self) -> Iterable[str]:
        yield "## Other data"
        rows = []
        for name in ("patches", "cifar10", "celeba"):
            preset, record = PRESETS[name], self.records.get(name)
            paper = "; ".join(f"{what}: {value}" for what, value in preset.paper.items()) or "none"
            if record is None:
                rows.append([name, MISSING, paper])
                continue
            results = Results(record)
            for method in results.methods[1:]:
                found = results.improvement(method, results.cells("plain"))
                rows.append([f"{name}, {results.title(method)}", percent(found), paper])
        yield markdown_table(["preset", "mean improvement over plain", "the paper reports"], rows)

    def _lab(self) -> Iterable[str]:
        if self.sources.lab.is_dir():
            for fragment in sorted(self.sources.lab.glob("*.md")):
                yield fragment.read_text(encoding="utf-8")

    def _commands(self) -> str:
        lines = []
        for name, preset in PRESETS.items():
            local = " --data FOLDER" if name in ("cifar10", "celeba") else ""
            lines.append(f"python -m benchmarks.quality run {name}{local}".ljust(62) + preset.about)
        listing = "\n".join(f"{line[:62]}# {line[62:]}" for line in lines)
        return f"""
## Every command

```sh
pip install -e ".[quality]"
{listing}
python -m benchmarks.quality keep digits-full                 # its results, into the repository
python -m benchmarks.quality page                             # this page
```

`--dry-run` says what a run would cost, `--workers` shares it among processes, and a run that was
killed goes on where it was when it is started again. On several GPUs:
`torchrun --nproc_per_node 4 -m benchmarks.quality run cifar10 --data FOLDER`.
"""


def _methods_table(results: Results) -> str:
    """Return the mean improvement of every method that has the whole grid of cells."""
    rows = []
    for name in in_order(results.methods):
        if name == "plain":
            continue
        raw, images = (results.improvement(name, GRID, measure) for measure in (RAW, IMAGES))
        if raw is None:
            continue
        ten = results.improvement(name, [cell for cell in GRID if cell.steps == 10])
        ddim = results.improvement(name, [Cell("ddim", 10)])
        rows.append(
            [results.title(name), with_bootstrap(raw), percent(images), percent(ten), percent(ddim)]
        )
    header = ["method", "raw", "clamped", "10 steps only, raw", "DDIM, 10 steps, raw"]
    return markdown_table(header, rows)


def _errorbars(
    axes: Axes,
    positions: Sequence[float] | np.ndarray[Any, Any],
    found: Sequence[Interval | None],
    *,
    color: str,
    label: str,
    across: bool = False,
    line: bool = False,
) -> None:
    """Draw means with their t intervals, leaving out what was not measured."""
    kept = [(place, i) for place, i in zip(positions, found, strict=True) if i is not None]
    if not kept:
        return
    places = [place for place, _ in kept]
    means = [i.mean for _, i in kept]
    half = [i.high - i.mean if np.isfinite(i.high) else 0.0 for _, i in kept]
    style: dict[str, Any] = {
        "color": color,
        "label": label,
        "markersize": 4,
        "capsize": 2,
        "linewidth": 1.2,
    }
    if across:
        axes.errorbar(means, places, xerr=half, fmt="o", **style)
    else:
        axes.errorbar(places, means, yerr=half, fmt="o-" if line else "o", **style)


def _grouped(
    groups: Sequence[Sequence[Interval | None]], labels: Sequence[str], names: Sequence[str]
) -> Figure:
    """Return means with intervals, several side by side at each name."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.0), layout="constrained")
        axes = figure.subplots()
        for position, label in enumerate(labels):
            shift = 0.16 * (position - (len(labels) - 1) / 2)
            found = [group[position] for group in groups]
            _errorbars(
                axes, np.arange(len(groups)) + shift, found, color=COLORS[position + 1], label=label
            )
        axes.set_xticks(range(len(names)), names)
        axes.axhline(0, color=COLORS[0], linewidth=1)
        axes.set_ylabel("improvement over plain, %")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def write_page(path: Path, sources: Sources | None = None) -> None:
    """Write the page and its figures."""
    Page(sources or Sources(assets=path.parent / "assets/evidence")).write(path)
