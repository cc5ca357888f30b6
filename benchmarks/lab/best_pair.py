"""Every pair of sampler and correction, and what the search recommends of them.

Each sampler is tried with no correction and with each strength of each correction's coarse scan,
judged on held-out noise against the mean and the covariance of all data. Of the exact
models these are the law's own; of the digits, whose network is trained, those of all images. What a
search recommends from a finite draw of data, in repeats with new data and new noise, is judged on
the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lab.linear import SCHEDULE, recommend, run
from benchmarks.lab.mixtures import ExactModel, Mixture
from benchmarks.quality.data import to_model_range
from benchmarks.quality.layout import claimed
from benchmarks.quality.objectives import Plain
from benchmarks.quality.presets import DIGITS
from benchmarks.quality.runner import Bench
from benchmarks.quality.samplers import TITLES
from s2dm_loss.sampling import Correction, Recommendation, standard_corrections
from s2dm_loss.sampling.corrections import NONE

SAMPLERS = ("ddim", "pndm", "deis", "dpm++2m", "unipc")
REPEATS = 20
HELD_OUT = 8192
DATA = 4096
DIGITS_DATA = 1000
NUM_SAMPLES = 1024
VARIANCES = torch.tensor([1.0, 0.5, 0.2, 0.1], dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A network, and what its samples should be.

    Attributes:
        model: The network, which predicts noise.
        mean: The data's mean, of shape [D].
        covariance: Their covariance, of shape [D, D].
        draw: Draws data for a search.
        shape: The shape of one of them, of D values.
    """

    model: nn.Module
    mean: Tensor
    covariance: Tensor
    draw: Callable[[torch.Generator], Tensor]
    shape: tuple[int, ...]


def exact(law: Mixture, temperature: float = 1.0) -> Case:
    """Return a law's exact model; below temperature 1 it is too sure of the mode."""
    model, draw = ExactModel(law, SCHEDULE, temperature), partial(law.draw, DATA)
    return Case(model, law.mean, law.covariance, draw, law.means.shape[1:])


def digits(root: Path) -> Case:
    """Return the plain network of the digits, trained in a run's folder if it is not yet."""
    with claimed(DIGITS, root):
        bench = Bench(DIGITS, root)
        model = bench.model(Plain(), 0)
    images = to_model_range(torch.cat([bench.data.images, bench.data.reference]).unique(dim=0))
    flat = images.flatten(1).double()

    def draw(generator: torch.Generator) -> Tensor:
        return images[torch.randperm(len(images), generator=generator)[:DIGITS_DATA]]

    return Case(model, flat.mean(0), flat.T.cov(), draw, bench.data.shape)


CASES: dict[str, Case] = {
    "Gaussian, 10 steps": exact(Mixture.gaussian(VARIANCES)),
    "ring of eight, 10 steps": exact(Mixture.ring()),
    "ring of eight, model too sure, 10 steps": exact(Mixture.ring(), 0.9),
}


class Judge:
    """The Fréchet distance of a pair's samples of held-out noise from the data's law."""

    def __init__(self, case: Case) -> None:
        """Draw the noise."""
        self.case = case
        draw = torch.Generator().manual_seed(99)
        noise = torch.randn(HELD_OUT // 2, len(case.mean), generator=draw, dtype=torch.float64)
        noise = torch.cat([noise, -noise])
        # Of mean 0 and covariance 1, so that what is linear in it has its moments exactly.
        noise = torch.linalg.solve_triangular(
            torch.linalg.cholesky(noise.T.cov()), noise.T, upper=False
        ).T
        kept = next((p.dtype for p in case.model.parameters()), torch.float64)
        self.noise = noise.to(kept).reshape(-1, *case.shape)
        values, vectors = torch.linalg.eigh(case.covariance)
        self.root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def __call__(self, name: str, correction: Correction, strength: float) -> float:
        """Return the distance."""
        model, noise = correction(self.case.model, self.noise, strength)
        x = run(model, noise, name).flatten(1).double()
        if not bool(x.isfinite().all()):
            return float("inf")
        overlap = torch.linalg.eigvalsh(self.root @ x.T.cov() @ self.root).clamp(min=0).sqrt().sum()
        trace = x.T.cov().trace() + self.case.covariance.trace()
        return float((x.mean(0) - self.case.mean).square().sum() + trace - 2 * overlap)

    def all_pairs(self) -> dict[str, float]:
        """Return the distance of every pair of the coarse scans."""
        found = {}
        for name in SAMPLERS:
            found[f"{TITLES[name]}, none"] = self(name, NONE, 0)
            for correction in standard_corrections(SCHEDULE):
                for strength in correction.strengths:
                    label = f"{TITLES[name]}, {correction.label(strength)}"
                    found[label] = self(name, correction, strength)
        return found


def study(case: Case, repeats: int = REPEATS) -> dict[str, Any]:
    """Return what every pair does, and what the searches recommended."""
    judge = Judge(case)
    pairs = judge.all_pairs()
    use, best = pairs["DDIM, none"], min(pairs, key=pairs.__getitem__)
    rows: dict[str, list[Any]] = {"several": [], "one": []}
    for seed in range(repeats):
        data = case.draw(torch.Generator().manual_seed(10_000 + seed))
        for kind in rows:
            names = SAMPLERS if kind == "several" else SAMPLERS[:1]
            samplers = {name: partial(run, sampler=name) for name in names}
            found = recommend(case.model, samplers, data, NUM_SAMPLES, seed)
            rows[kind].append(_judged(found, judge, use, pairs[best]))
    return {
        "in use": use,
        "best pair": [best, pairs[best]],
        "best with DDIM": min((d, n) for n, d in pairs.items() if n.startswith("DDIM"))[::-1],
        "cost": {kind: of_kind[0]["samples"] for kind, of_kind in rows.items()},
        "searches": rows,
    }


def _judged(found: Recommendation, judge: Judge, use: float, best: float) -> dict[str, Any]:
    chosen = found.recommended
    distance = judge(chosen.sampler, chosen.correction, chosen.strength)
    truths = [judge(c.sampler, c.correction, c.strength) for c in found.candidates]
    return {
        "recommended": f"{TITLES[chosen.sampler]}, {chosen.label}",
        "distance": distance,
        # 0 is the best pair, 1 the sampler in use with no correction.
        "left": (distance - best) / (use - best),
        "holds": all(
            c.low <= truth - truths[0] <= c.high
            for c, truth in zip(found.candidates, truths, strict=True)
        ),
        "samples": found.cost.samples,
    }
