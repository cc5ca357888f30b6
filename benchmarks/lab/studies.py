"""The experiments.  Each returns one JSON document, and none needs another's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.files import load_json, save_json
from benchmarks.lab.coverage import coverage, whole_search
from benchmarks.lab.criteria import (
    NormRecorder,
    accumulated_norm_line,
    energy_distance,
    norm_mismatch,
    norm_ratio_line,
    training_norms,
)
from benchmarks.lab.linear import Imperfection, frechet, output_variances
from benchmarks.lab.mixtures import ExactModel, Mixture
from benchmarks.quality import data as datasets
from benchmarks.quality.objectives import Plain
from benchmarks.quality.presets import DIGITS_FULL
from benchmarks.quality.runner import Bench
from benchmarks.quality.samplers import sample
from s2dm_loss import (
    CorrectionSearch,
    NoiseSchedule,
    ScaledModel,
    SkipGain,
    gain,
    standard_corrections,
)

Json = dict[str, Any]
Bar = Callable[[list[Any]], Iterable[Any]]

SCHEDULE = NoiseSchedule.linear(1000)
SAMPLERS = ("ddim", "pndm", "deis", "dpm++2m")
CORE = ("ddim", "pndm", "deis")
STEPS = (5, 10, 20, 50, 100)
SHOWN = (9, 29, 49, 69, 99, 124, 149, 199, 249)
"""The skips that the searches of the studies compare."""
TAUS = (0.9, 0.95, 0.99, 0.995, 0.999)


def digit_values() -> Tensor:
    """Return the digits in [-1, 1], float64 ``[1797, 64]``."""
    return datasets.to_model_range(datasets.load_digits().images).flatten(1).double()


def digit_variances() -> Tensor:
    """Return the variances of the digits along their principal axes, largest last, ``[64]``."""
    return torch.linalg.eigvalsh(digit_values().T.cov()).clamp(min=0)


def gains(skips: Iterable[int], tau: float = 0.99) -> Tensor:
    """Return s(t) for each skip, ``[K, 1000]``; skip 0 is no gain."""
    plain = torch.ones(SCHEDULE.num_train_timesteps, dtype=torch.float64)
    return torch.stack([gain(SCHEDULE, k, tau=tau) if k else plain for k in skips])


def gaussian(bar: Bar) -> Json:
    """One Gaussian with the digits' covariance, and the exact ε-model: every skip up to 499."""
    variances = digit_variances()
    skips = range(500)
    table = gains(skips)
    cells = [(s, n) for s in SAMPLERS for n in STEPS] + [("ddim", 1000)]
    rows = []
    for sampler, steps in bar(cells):
        output = output_variances(variances, table, SCHEDULE, sampler, steps)
        distance = frechet(output, variances)
        best = int(distance.argmin())
        rows.append(
            {
                "sampler": sampler,
                "steps": steps,
                "plain": float(distance[0]),
                "plain_spread": float((output[0].sum() / variances.sum()).sqrt()),
                "best_skip": best,
                "best": float(distance[best]),
                "relative": {k: float(distance[k] / distance[0]) - 1 for k in SHOWN},
                "curve": [float(f"{d:.4g}") for d in distance[:300:5]],
            }
        )
    return {"distance": "Frechet over total variance", "curve_skips": [0, 300, 5], "rows": rows}


def strength(bar: Bar) -> Json:
    """Whether k and τ are one parameter: the best τ of each k, and the same k at several τ."""
    variances = digit_variances()
    taus = [1 - 10 ** (-e / 20) for e in range(4, 100)]
    cells = [(s, n) for s in ("ddim", "deis") for n in (5, 10, 20, 50)]
    rows = []
    for sampler, steps in bar(cells):
        tuned = {}
        for skip in (1, 9, 49, 99, 199):
            table = torch.cat([gains([skip], tau) for tau in taus])
            distance = frechet(
                output_variances(variances, table, SCHEDULE, sampler, steps), variances
            )
            best = int(distance.argmin())
            tuned[skip] = {"tau": taus[best], "distance": float(distance[best])}
        at_tau = {}
        for tau in TAUS:
            table = gains(range(500), tau)
            distance = frechet(
                output_variances(variances, table, SCHEDULE, sampler, steps), variances
            )
            best = int(distance.argmin())
            at_tau[tau] = {"skip": best, "distance": float(distance[best])}
        plain = frechet(
            output_variances(variances, gains([0]), SCHEDULE, sampler, steps), variances
        )
        rows.append(
            {
                "sampler": sampler,
                "steps": steps,
                "plain": float(plain),
                "best_tau_of_skip": tuned,
                "best_skip_of_tau": at_tau,
            }
        )
    return {"rows": rows}


def _keep_largest(count: int) -> Callable[[Tensor], Tensor]:
    def believed(variances: Tensor) -> Tensor:
        threshold = variances.sort(descending=True).values[count - 1]
        return torch.where(variances >= threshold, variances, 0.0)

    return believed


IMPERFECTIONS = (
    Imperfection(),
    Imperfection("ε̂ 1 % too large", scale=1.01),
    Imperfection("ε̂ 1 % too small", scale=0.99),
    Imperfection("ε̂ 1 % too large where ᾱ < 0.05", late_scale=1.01),
    Imperfection("ε̂ 1 % too small where ᾱ < 0.05", late_scale=0.99),
    Imperfection("independent error of 0.05 a call", noise=0.05),
    Imperfection("independent error of 0.2 a call", noise=0.2),
    Imperfection("blurred: variances taken 0.03 too large", believed=lambda v: v + 0.03),
    Imperfection("coarse: only the 16 largest axes known", believed=_keep_largest(16)),
    Imperfection("timid: variances taken 10 % too small", believed=lambda v: 0.9 * v),
)


def imperfect(bar: Bar) -> Json:
    """The same Gaussian with an ε-model that is wrong in a known way."""
    variances = digit_variances()
    skips = range(500)
    table = gains(skips)
    cells = [(w, s, n) for w in IMPERFECTIONS for s in CORE for n in (10, 20, 50, 100)]
    rows = []
    for wrong, sampler, steps in bar(cells):
        output = output_variances(variances, table, SCHEDULE, sampler, steps, wrong)
        distance = frechet(output, variances)
        best = int(distance.argmin())
        rows.append(
            {
                "model": wrong.title,
                "sampler": sampler,
                "steps": steps,
                "plain": float(distance[0]),
                "plain_spread": float((output[0].sum() / variances.sum()).sqrt()),
                "best_skip": best,
                "relative": float(distance[best] / distance[0]) - 1,
            }
        )
    return {"rows": rows}


def sliced_distance(samples: Tensor, reference: Tensor, directions: Tensor) -> float:
    """Return the mean over directions of the squared 2-Wasserstein distance of projections.

    Both sets are float64 ``[N, D]`` of one size; directions are unit columns ``[D, P]``.
    """
    projected = [(values @ directions).sort(dim=0).values for values in (samples, reference)]
    return float((projected[0] - projected[1]).square().mean())


def mixtures(bar: Bar, count: int = 1024, seed: int = 0) -> Json:
    """Two mixtures, whose ε-model is no longer linear: ten Gaussians of digits, and a ring."""
    digits = datasets.load_digits()
    if digits.labels is None:
        raise ValueError("labels: expected the digits to have them, got None")
    laws = {
        "ten Gaussians fitted to the digits' classes": Mixture.fitted(
            digit_values(), digits.labels
        ),
        "ring of eight Gaussians in the plane": Mixture.ring(),
    }
    skips = (0, 9, 29, 69, 99, 149, 199)
    rows = []
    cells = [
        (law, temperature, sampler, steps)
        for law in laws
        for temperature in ((1.0,) if law.startswith("ten") else (1.0, 2.0))
        for sampler in CORE
        for steps in (5, 10, 20, 50)
    ]
    for law, temperature, sampler, steps in bar(cells):
        mixture = laws[law]
        size = mixture.means.shape[1]
        draw = torch.Generator().manual_seed(seed)
        start = torch.randn(count, size, generator=draw, dtype=torch.float64)
        reference, again = mixture.draw(count, draw), mixture.draw(count, draw)
        directions = torch.randn(size, 128, generator=draw, dtype=torch.float64)
        directions = directions / directions.norm(dim=0)
        total = float(mixture.covariance.trace()) / size
        model = ExactModel(mixture, SCHEDULE, temperature)
        distances = []
        for skip in skips:
            shrunk = ScaledModel.with_gain(model, SCHEDULE, skip) if skip else model
            samples = sample(shrunk, sampler, SCHEDULE, steps, start, draw)
            distances.append(sliced_distance(samples, reference, directions) / total)
        best = min(range(len(skips)), key=distances.__getitem__)
        rows.append(
            {
                "law": law,
                "temperature": temperature,
                "sampler": sampler,
                "steps": steps,
                "plain": distances[0],
                "best_skip": skips[best],
                "relative": {
                    k: d / distances[0] - 1 for k, d in zip(skips, distances, strict=True)
                },
                "floor": sliced_distance(again, reference, directions) / total,
            }
        )
    return {
        "distance": "squared sliced 2-Wasserstein over mean variance",
        "samples": count,
        "seed": seed,
        "rows": rows,
    }


LINES = {"norm line": norm_ratio_line, "accumulated norm line": accumulated_norm_line}
"""Ways to a λ(t) from one plain run, with no search."""


class Chosen:
    """One :class:`CorrectionSearch` over gains, and what other criteria choose from its samples."""

    def __init__(
        self,
        model: nn.Module,
        data: Tensor,
        sampler: str,
        steps: int,
        *,
        num_samples: int,
        seed: int,
    ) -> None:
        """Run the search over ``SHOWN``."""
        recorder = NormRecorder(model)
        norms: list[dict[int, float]] = []
        kept: list[Tensor] = []

        def run(shrunk: nn.Module, noise: Tensor) -> Tensor:
            recorder.reset()
            draw = torch.Generator().manual_seed(seed)
            kept.append(sample(shrunk, sampler, SCHEDULE, steps, noise, draw).clone())
            norms.append(recorder.reset())
            return kept[-1]

        search = CorrectionSearch(
            recorder,
            run,
            data,
            [SkipGain(SCHEDULE, SHOWN)],
            scan=False,
            num_samples=num_samples,
            batch_size=num_samples,
            seed=seed,
        )
        skips = (0, *SHOWN)
        self.cost = search.cost
        # Asking for the cost runs the sampler once, on a single sample that is not compared.
        kept.clear()
        norms.clear()
        self.recommendation = search.recommend()
        self.skips = {
            "fréchet": int(self.recommendation.best.strength),
            "recommended": int(self.recommendation.strength or 0),
        }
        values = data.flatten(1).double()
        energies = [energy_distance(x.flatten(1).double(), values) for x in kept]
        self.skips["energy"] = skips[min(range(len(skips)), key=energies.__getitem__)]
        true = training_norms(
            model, SCHEDULE, data, list(norms[0]), torch.Generator().manual_seed(seed)
        )
        mismatches = [norm_mismatch(n, true) for n in norms]
        self.skips["norm"] = skips[min(range(len(skips)), key=mismatches.__getitem__)]
        self.lines = {
            name: fit(norms[0], true, SCHEDULE.num_train_timesteps) for name, fit in LINES.items()
        }


def search(bar: Bar, num_samples: int = 1024, seeds: int = 2) -> Json:
    """The criteria on the Gaussian, where what each choice costs is known exactly."""
    variances = digit_variances()
    model = ExactModel(Mixture.gaussian(variances), SCHEDULE)
    cells = [(s, n, seed) for s in CORE for n in (5, 10, 20, 50) for seed in range(seeds)]
    rows = []
    for sampler, steps, seed in bar(cells):
        draw = torch.Generator().manual_seed(1000 + seed)
        data = Mixture.gaussian(variances).draw(num_samples, draw).float()
        chosen = Chosen(model, data, sampler, steps, num_samples=num_samples, seed=seed)
        table = torch.cat([gains((0, *SHOWN)), *(1 / line[None] for line in chosen.lines.values())])
        distance = frechet(output_variances(variances, table, SCHEDULE, sampler, steps), variances)
        named = dict(zip((0, *SHOWN), distance.tolist(), strict=False))
        rows.append(
            {
                "sampler": sampler,
                "steps": steps,
                "seed": seed,
                "plain": named[0],
                "best_skip": min(named, key=named.__getitem__),
                "best": min(named.values()),
                "chosen": {
                    name: {"skip": skip, "distance": named[int(skip)]}
                    for name, skip in chosen.skips.items()
                }
                | {
                    name: {"lambda": [float(line[0]), float(line[-1])], "distance": float(d)}
                    for (name, line), d in zip(
                        chosen.lines.items(), distance[-len(LINES) :], strict=True
                    )
                },
            }
        )
    return {"num_samples": num_samples, "rows": rows}


@torch.inference_mode()
def feature_distance(bench: Bench, samples: Tensor) -> float:
    """Return the Fréchet distance of classifier features, without the slower kernel distance."""
    metric = bench.distances.frechet
    metric.update(bench.distances.network(samples).float(), real=False)
    distance = float(metric.compute())
    metric.reset()
    return distance


def digits(
    bar: Bar,
    root: Path = Path("runs/digits-full"),
    seeds: tuple[int, ...] = (0,),
    num_samples: int = 1024,
) -> Json:
    """The criteria on trained networks, judged by a classifier's features on fresh noise.

    Each cell is kept in a file, so that a killed run loses one cell at most.
    """
    bench = Bench(DIGITS_FULL, root)
    rows = []
    for seed, sampler, steps in bar([(r, s, n) for r in seeds for s in CORE for n in (10, 20, 50)]):
        path = root / "lab" / f"seed{seed}-{sampler}-{steps}-{num_samples}.json"
        if not path.exists():
            save_json(path, _digits_cell(bench, seed, sampler, steps, num_samples))
        rows.append(load_json(path))
    return {
        "seconds": None,  # the cells may be of several runs
        "network": repr(DIGITS_FULL.network),
        "features": bench.features.description,
        "floor": bench.floor()["frechet"],
        "num_samples": num_samples,
        "judged_on": num_samples,
        "rows": rows,
    }


def _digits_cell(bench: Bench, seed: int, sampler: str, steps: int, num_samples: int) -> Json:
    images = datasets.to_model_range(bench.data.images)
    model = bench.model(Plain(), seed, lambda _: None)
    chosen = Chosen(model, images, sampler, steps, num_samples=num_samples, seed=seed)
    fresh = torch.Generator().manual_seed(77 + seed)
    start = torch.randn(num_samples, *images.shape[1:], generator=fresh)

    def judge(
        shrunk: nn.Module, noise: Callable[[Tensor], Tensor] = torch.clone
    ) -> dict[str, float]:
        samples = sample(shrunk, sampler, SCHEDULE, steps, noise(start), torch.Generator())
        return {
            "raw": feature_distance(bench, samples),
            "images": feature_distance(bench, datasets.to_uint8(samples)),
        }

    def bench_features(samples: Tensor) -> Tensor:
        return bench.distances.network(datasets.to_uint8(samples))

    return {
        "seed": seed,
        "sampler": sampler,
        "steps": steps,
        "judged": {
            skip: judge(ScaledModel.with_gain(model, SCHEDULE, skip) if skip else model)
            for skip in (0, *SHOWN)
        },
        "chosen": chosen.skips,
        "lines": {
            name: {
                "lambda": [float(line[0]), float(line[-1])],
                **judge(ScaledModel(model, SCHEDULE, line.__getitem__)),
            }
            for name, line in chosen.lines.items()
        },
        "grid": {
            f"{c.name} {s:g}": judge(
                c.correct_model(model, s), partial(c.correct_noise, strength=s)
            )
            for c in standard_corrections(SCHEDULE)
            for s in c.strengths
        },
        "searches": {
            name: _searched(model, images, features, judge, sampler, steps, num_samples, seed)
            for name, features in (
                ("raw values", None),
                ("classifier features of 8-bit images", bench_features),
            )
        },
    }


def _searched(
    model: nn.Module,
    images: Tensor,
    features: Callable[[Tensor], Tensor] | None,
    judge: Callable[[nn.Module, Callable[[Tensor], Tensor]], dict[str, float]],
    sampler: str,
    steps: int,
    num_samples: int,
    seed: int,
) -> Json:
    """Return what the search over all corrections recommends, and how that is judged."""
    found = CorrectionSearch(
        model,
        lambda m, noise: sample(m, sampler, SCHEDULE, steps, noise, torch.Generator()),
        images,
        standard_corrections(SCHEDULE),
        features=features,
        num_samples=num_samples,
        batch_size=num_samples,
        seed=seed,
    ).recommend()
    plain, best = found.candidates[0].distance, found.best
    return {
        "recommended": "none" if found.recommended is None else found.recommended.label,
        "relative": [best.difference / plain, best.low / plain, best.high / plain],
        "judged": judge(found.correct_model(model), found.correct_noise),
    }


STUDIES: dict[str, Callable[[Bar], Json]] = {
    "gaussian": gaussian,
    "strength": strength,
    "imperfect": imperfect,
    "mixtures": mixtures,
    "search": search,
    "coverage_gaussian": partial(coverage, law="gaussian"),
    "coverage_mixture": partial(coverage, law="mixture"),
    "whole_search": whole_search,
    "digits": digits,
}
