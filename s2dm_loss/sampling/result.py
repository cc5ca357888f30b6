"""What a search for a correction returns: its cost, its candidates, its recommendation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss.sampling.corrections import Correction


@dataclass(frozen=True)
class SearchCost:
    """What a search will cost at most, known before it starts.

    Attributes:
        scanned: Strengths in the coarse and the finer scan, "none" included; 0 without a scan.
        scan_samples: Samples for each of them.
        candidates: Candidates that are reported, "none" included.
        num_samples: Samples for each of them.
        runs: Calls of the sampler.
        calls_per_run: Model calls in one of them.
    """

    scanned: int
    scan_samples: int
    candidates: int
    num_samples: int
    runs: int
    calls_per_run: int

    @property
    def samples(self) -> int:
        """Samples that are drawn."""
        return self.scanned * self.scan_samples + self.candidates * self.num_samples

    @property
    def model_calls(self) -> int:
        """Calls of the model, on a batch each."""
        return self.runs * self.calls_per_run

    @property
    def sample_evaluations(self) -> int:
        """Evaluations of the network counted sample by sample."""
        return self.samples * self.calls_per_run

    @override
    def __str__(self) -> str:
        scan = f"{self.scanned} x {self.scan_samples} to choose, then " if self.scanned else ""
        return (
            f"{scan}{self.candidates} candidates x {self.num_samples} samples: {self.runs} sampler "
            f"runs of {self.calls_per_run} model calls each, {self.model_calls} model calls and "
            f"{self.samples} samples in all"
        )


@dataclass(frozen=True)
class Candidate:
    """One correction at one strength, and how its samples compare with the data.

    Attributes:
        correction: The correction; None stands for none.
        strength: Its strength.
        distance: Fréchet distance between samples and data, in squared units of the data, without
            the bias that finitely many samples give it; it can come out below 0.
        difference: `distance` less that without a correction; below 0 is better.
        low: Lower end of the interval of `difference`.
        high: Upper end. The intervals hold together for all candidates, with 95 % confidence, so
            that choosing the best of them is allowed for.
        best_share: How probable it is that this candidate is the best.
    """

    correction: Correction | None
    strength: float
    distance: float
    difference: float
    low: float
    high: float
    best_share: float

    @property
    def label(self) -> str:
        """Its name in a table."""
        if self.correction is None:
            return "none"
        return f"{self.correction.name} {self.strength:g}"


class ScanPoint(NamedTuple):
    """A strength that the scan tried; None as its correction stands for none."""

    correction: Correction | None
    strength: float
    distance: float


@dataclass(frozen=True)
class Recommendation:
    """The recommended correction, and how sure that is.

    It is called as a correction is, `model, noise = recommendation(model, noise)`, and changes
    nothing where none is recommended.

    Attributes:
        candidates: What was compared; the first is no correction.
        scan: What was tried to choose them, in that order.
        cost: What the search cost at most.
    """

    candidates: tuple[Candidate, ...]
    scan: tuple[ScanPoint, ...]
    cost: SearchCost

    @property
    def best(self) -> Candidate:
        """The candidate of least distance, recommended or not."""
        return min(self.candidates, key=lambda candidate: candidate.distance)

    @property
    def recommended(self) -> Candidate | None:
        """Of the candidates that are better than none beyond doubt the one of least distance."""
        sure = [candidate for candidate in self.candidates if candidate.high < 0]
        return min(sure, key=lambda candidate: candidate.distance, default=None)

    @property
    def correction(self) -> Correction | None:
        """The recommended correction; None where none is better than none beyond doubt."""
        return None if self.recommended is None else self.recommended.correction

    @property
    def strength(self) -> float | None:
        """Its strength: the skip k of a gain, say."""
        return None if self.recommended is None else self.recommended.strength

    @property
    def at_edge(self) -> bool:
        """Whether no strength beyond the recommended one was tried, which may do better."""
        chosen = self.correction
        if chosen is None:
            return False
        tried = [point.strength for point in self.scan if point.correction is chosen]
        tried += [c.strength for c in self.candidates if c.correction is chosen]
        return self.strength in (min(*tried, chosen.none), max(*tried, chosen.none))

    def __call__(self, model: nn.Module, noise: Tensor) -> tuple[nn.Module, Tensor]:
        """Return the model and the start noise for a sampler."""
        return self.correct_model(model), self.correct_noise(noise)

    def correct_model(self, model: nn.Module) -> nn.Module:
        """Return the model for a sampler; its noise may need `correct_noise` too."""
        chosen = self.recommended
        if chosen is None or chosen.correction is None:
            return model
        return chosen.correction.correct_model(model, chosen.strength)

    def correct_noise(self, noise: Tensor) -> Tensor:
        """Return the start noise for a sampler, the `latents` of a pipeline."""
        chosen = self.recommended
        if chosen is None or chosen.correction is None:
            return noise
        return chosen.correction.correct_noise(noise, chosen.strength)

    @override
    def __repr__(self) -> str:
        plain, chosen = self.candidates[0].distance, self.recommended
        shown = chosen or self.best
        said = f"Recommendation({chosen.label if chosen else 'none'}: Fréchet distance {plain:.4g}"
        if shown.correction is None:
            return f"{said} without a correction, more with any)"
        label = "" if chosen else f" with {shown.label}"
        share = "" if plain <= 0 else f", {shown.difference / plain:+.1%}"
        ends = "" if plain <= 0 else f" [{shown.low / plain:+.1%}, {shown.high / plain:+.1%}]"
        edge = ", the outermost tried" if self.at_edge else ""
        return f"{said} -> {shown.distance:.4g}{label}{share}{ends}{edge})"

    @override
    def __str__(self) -> str:
        width = max(len(candidate.label) for candidate in self.candidates)
        rows = [f"{'':{width}}  {'distance':>10}  {'difference [95 %]':>34}  best with"]
        for c in self.candidates:
            compared = c.correction is not None
            interval = f"{c.difference:+.4g} [{c.low:+.4g}, {c.high:+.4g}]" if compared else ""
            mark = " <- recommended" if c is (self.recommended or self.candidates[0]) else ""
            row = f"{c.label:{width}}  {c.distance:>10.4g}  {interval:>34}  {c.best_share:>8.0%}"
            rows.append(row + mark)
        return "\n".join([repr(self), *rows])
