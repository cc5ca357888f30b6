"""What a search for a correction returns: its cost, its candidates, its recommendation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from s2dm_loss._version import __version__
from s2dm_loss.checks import plain_value, read_plain_value
from s2dm_loss.sampling.corrections import NONE, Correction, NoCorrection, StoredCorrection
from s2dm_loss.sampling.figure import draw
from s2dm_loss.schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SearchCost:
    """What a search will cost at most, known before it starts.

    Attributes:
        stages: For each stage the number of candidates and of samples for each of them. The last
            stage is the one that is reported, on data that the others have not seen.
        calls: Network calls of one run of each sampler.
        runs: Runs of a sampler, on a batch each.
        single_samples: Samples that the search over one sampler alone would draw.
    """

    stages: tuple[tuple[int, int], ...]
    calls: dict[str, int]
    runs: int
    single_samples: int

    @property
    def samples(self) -> int:
        """Samples that are drawn."""
        return sum(candidates * samples for candidates, samples in self.stages)

    @override
    def __str__(self) -> str:
        *choosing, last = (f"{candidates} x {samples}" for candidates, samples in self.stages)
        chosen = f"{', '.join(choosing)} samples to choose, then " if choosing else ""
        counts = list(self.calls.values())
        usual = max(counts, key=counts.count)
        said = (
            f"{chosen}{last} samples to compare: at most {self.runs} sampler runs of {usual} "
            f"network calls each, {self.samples} samples in all"
        )
        other = [f"{name} makes {n}" for name, n in self.calls.items() if n != usual]
        if other:
            said += f" ({', '.join(other)})"
        if len(self.calls) > 1:
            said += f"; over one sampler alone it would be {self.single_samples}"
        return said


@dataclass(frozen=True)
class Candidate:
    """One sampler with one correction, and how its samples compare with the data.

    Attributes:
        sampler: The sampler's name.
        correction: The correction; a `NoCorrection` for none.
        strength: Its strength; 0 for none.
        distance: Fréchet distance between samples and data, in squared units of the data, without
            the bias that finitely many samples give it; it can come out below 0.
        best_share: How probable it is that this candidate is the best.
        difference: `distance` less that of the first candidate, the sampler in use with no
            correction; below 0 is better.
        low: Lower end of the interval of `difference`.
        high: Upper end. The intervals hold together for all candidates, with 95 % confidence, so
            that choosing the best of them is allowed for.
        own_high: Upper end of the interval of the difference from the same sampler with no
            correction.
    """

    sampler: str
    correction: Correction
    strength: float
    distance: float
    best_share: float = 0.0
    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0
    own_high: float = 0.0

    @property
    def label(self) -> str:
        """The name of its correction in a table."""
        return self.correction.label(self.strength)

    @property
    def is_corrected(self) -> bool:
        """Whether there is a correction."""
        return not isinstance(self.correction, NoCorrection)


class ScanPoint(NamedTuple):
    """A candidate that was tried to choose those that are compared.

    Attributes:
        sampler: The sampler's name.
        correction: The correction; a `NoCorrection` for none.
        strength: Its strength; 0 for none.
        samples: With how many samples it was tried.
        distance: Fréchet distance from the part of the data that chooses.
    """

    sampler: str
    correction: Correction
    strength: float
    samples: int
    distance: float


@dataclass(frozen=True)
class Recommendation:
    """The recommended sampler and correction, and how sure that is.

    It is called as a correction is, `model, noise = recommendation(model, noise)`, and changes
    nothing where no correction is recommended.

    Attributes:
        candidates: What was compared; the first is the sampler in use with no correction.
        scan: What was tried to choose them, in that order.
        cost: What the search cost at most.
        searched: The corrections, seed and sizes of the search, and the versions that it ran with.
    """

    candidates: tuple[Candidate, ...]
    scan: tuple[ScanPoint, ...]
    cost: SearchCost
    searched: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Candidate:
        """The candidate of least distance, recommended or not."""
        return min(self.candidates, key=lambda candidate: candidate.distance)

    @property
    def recommended(self) -> Candidate:
        """The candidate to use; the first, the sampler in use alone, if none is better.

        Of the candidates that are better than the first with 95 % confidence it is the one of least
        distance. If its correction is not so surely better than its sampler alone, it is the
        sampler alone, where that is better than the first.
        """
        sure = [candidate for candidate in self.candidates if candidate.high < 0]
        if not sure:
            return self.candidates[0]
        nearest = min(sure, key=lambda candidate: candidate.distance)
        alone = [c for c in sure if c.sampler == nearest.sampler and not c.is_corrected]
        return alone[0] if alone and nearest.own_high >= 0 else nearest

    @property
    def improves(self) -> bool:
        """Whether something is better than the sampler in use with no correction."""
        return self.recommended is not self.candidates[0]

    @property
    def sampler(self) -> str:
        """The recommended sampler's name."""
        return self.recommended.sampler

    @property
    def correction(self) -> Correction:
        """The recommended correction; a `NoCorrection` for none."""
        return self.recommended.correction

    @property
    def strength(self) -> float:
        """Its strength, such as the skip k of a gain; 0 for no correction."""
        return self.recommended.strength

    @property
    def at_edge(self) -> bool:
        """True if the recommended strength is the smallest or largest tried."""
        chosen = self.recommended
        if not chosen.is_corrected:
            return False
        entries: list[ScanPoint | Candidate] = [*self.scan, *self.candidates]
        tried = [
            entry.strength
            for entry in entries
            if (entry.sampler, entry.correction) == (chosen.sampler, chosen.correction)
        ]
        ends = (min(*tried, chosen.correction.none), max(*tried, chosen.correction.none))
        return chosen.strength in ends

    def __call__(self, model: nn.Module, noise: Tensor) -> tuple[nn.Module, Tensor]:
        """Return the model and the start noise for the recommended sampler."""
        return self.correct_model(model), self.correct_noise(noise)

    def correct_model(self, model: nn.Module) -> nn.Module:
        """Return the model for a sampler; its noise may need `correct_noise` too."""
        return self.correction.correct_model(model, self.strength)

    def correct_noise(self, noise: Tensor) -> Tensor:
        """Return the start noise for a sampler, the `latents` of a pipeline."""
        return self.correction.correct_noise(noise, self.strength)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in JSON's own types; `from_dict` reads it back."""
        corrections = self._corrections
        number = {id(correction): i for i, correction in enumerate(corrections)}

        def row(entry: Candidate | ScanPoint) -> dict[str, Any]:
            values = entry._asdict() if isinstance(entry, ScanPoint) else vars(entry)
            plain = {
                name: plain_value(value) for name, value in values.items() if name != "correction"
            }
            return {**plain, "correction": number.get(id(entry.correction), 0)}

        values = {
            "s2dm_loss": __version__,
            "torch": str(torch.__version__),
            "recommended": [self.sampler, self.recommended.label],
            "corrections": [correction.to_dict() for correction in corrections],
            "candidates": [row(candidate) for candidate in self.candidates],
            "scan": [row(point) for point in self.scan],
            "cost": asdict(self.cost),
            "searched": self.searched,
        }
        # Lists for tuples, as JSON has them; an error for what it has not.
        loaded: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
        return loaded

    @classmethod
    def from_dict(cls, values: dict[str, Any], schedule: Schedule | None = None) -> Self:
        """Read what `to_dict` returned; neither the model nor the data are needed.

        Args:
            values: The values, from JSON say.
            schedule: The schedule that the model was trained on: with it the corrections of this
                library can be applied. Without it they can be read, shown and plotted, and
                `correct_pipeline` takes the pipeline's.
        """
        corrections: list[Correction] = [NONE]
        for stored in (StoredCorrection(one) for one in values["corrections"][1:]):
            corrections.append(stored if schedule is None else stored.on(schedule))

        def read(kind: Any, row: dict[str, Any]) -> Any:
            entry = {n: v if n == "sampler" else read_plain_value(v) for n, v in row.items()}
            return kind(**{**entry, "correction": corrections[row["correction"]]})

        cost = values["cost"]
        return cls(
            candidates=tuple(read(Candidate, row) for row in values["candidates"]),
            scan=tuple(read(ScanPoint, row) for row in values["scan"]),
            cost=SearchCost(**{**cost, "stages": tuple(map(tuple, cost["stages"]))}),
            searched=values["searched"],
        )

    @property
    def _corrections(self) -> list[Correction]:
        """Every correction once, none first."""
        entries: list[ScanPoint | Candidate] = [*self.scan, *self.candidates]
        found = {id(e.correction): e.correction for e in entries}
        return [NONE, *(c for c in found.values() if not isinstance(c, NoCorrection))]

    def plot(self) -> Figure:
        """Return a matplotlib figure: the candidates with their intervals, and the scans."""
        return draw(self)

    @override
    def __repr__(self) -> str:
        return f"Recommendation({_sentence(self)})"

    @override
    def __str__(self) -> str:
        return _table(self)


def _name(found: Recommendation, candidate: Candidate) -> str:
    """Say what a candidate is, with its sampler where there are several."""
    if len(found.cost.calls) == 1:
        return candidate.label
    label = candidate.label if candidate.is_corrected else "no correction"
    return f"{candidate.sampler} with {label}"


def _nearer(found: Recommendation, candidate: Candidate) -> str:
    """Say how much nearer a candidate is than the first, and the interval."""
    plain = found.candidates[0].distance
    if not 0 < plain < math.inf:  # of so small a distance there is no share
        return f"{-candidate.difference:.3g} [{-candidate.high:.3g}, {-candidate.low:.3g}]"
    middle, low, high = (
        -100 * value / plain for value in (candidate.difference, candidate.high, candidate.low)
    )
    return f"{middle:.3g} % [{low:.3g}, {high:.3g}]"


def _sentence(found: Recommendation) -> str:
    """Say what to do."""
    first, chosen, best = found.candidates[0], found.recommended, found.best
    several = len(found.cost.calls) > 1
    if found.improves:
        than = f" than {first.sampler} with no correction" if several else ""
        edge = "; it is the outermost strength tried, so try more" if found.at_edge else ""
        return (
            f"use {_name(found, chosen)}: {_nearer(found, chosen)} nearer to the data{than}{edge}"
        )
    kept = "no correction is better than none"
    if several:
        kept = f"keep {_name(found, first)}: nothing is surely better"
    if best is first:
        return kept
    return f"{kept} (the nearest, {_name(found, best)}, by {_nearer(found, best)})"


def _table(found: Recommendation) -> str:
    first, several = found.candidates[0], len(found.cost.calls) > 1
    titles = ["correction", "distance", "nearer [95 %]", "probably the best"]
    rows = [["sampler", "network calls", *titles] if several else titles]
    for c in found.candidates:
        lead = [c.sampler, str(found.cost.calls[c.sampler])] if several else []
        nearer = "" if c is first else _nearer(found, c)
        rows.append([*lead, c.label, f"{c.distance:.4g}", nearer, f"{c.best_share:.0%}"])
    marks = ["", *("  <- use this" if c is found.recommended else "" for c in found.candidates)]
    columns = [
        [f"{cell:{side}{max(map(len, column))}}" for cell in column]
        for side, column in zip("<><>>>"[-len(rows[0]) :], zip(*rows, strict=True), strict=True)
    ]
    lines = ["  ".join(row) for row in zip(*columns, strict=True)]
    sentence = _sentence(found)
    table = [line + mark for line, mark in zip(lines, marks, strict=True)]
    return "\n".join([f"{sentence[0].upper()}{sentence[1:]}.", "", *table])
