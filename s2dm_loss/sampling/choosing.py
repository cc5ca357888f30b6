"""How a search chooses what it then compares on the held-out part of the data.

One sampler: every strength of every correction is tried, then those halfway from the best of each
to its neighbours. Several: pairs of sampler and correction are halved in three rounds (successive
halving, Jamieson and Talwalkar, arXiv 1502.07943), with more samples and finer strengths in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from s2dm_loss.sampling.corrections import NONE, Correction
from s2dm_loss.sampling.result import ScanPoint
from s2dm_loss.sampling.trials import Pair, Stage

# A search over several samplers draws at most so many times the samples of one over one sampler.
MOST_SAMPLES = 2
# How many pairs of sampler and correction each round of halving keeps, widest first.
WIDTHS = ((12, 6, 3), (8, 4, 3), (8, 4, 2), (4, 2, 2), (4, 2, 1), (2, 1, 1))
FEWEST = 32


class Plan(NamedTuple):
    """Candidates and samples of each stage at most, and how many pairs each round keeps."""

    stages: tuple[tuple[int, int], ...]
    widths: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        """Samples that are drawn at most."""
        return sum(number * samples for number, samples in self.stages)


def plan_of(samplers: int, corrections: Sequence[Correction], num_samples: int) -> Plan:
    """Return the plan of a search that scans."""
    # The finer scan tries two strengths of each correction; it and half of it are reported.
    count = len(corrections)
    strengths = sum(len(correction.strengths) for correction in corrections)
    tried = (1 + strengths + 2 * count, max(FEWEST, num_samples // 2))
    single = Plan((tried, (1 + 2 * count, num_samples)))
    if samplers == 1:
        return single
    return _halving_plan(samplers, corrections, num_samples, MOST_SAMPLES * single.samples)


def _halving_plan(
    samplers: int, corrections: Sequence[Correction], num_samples: int, most: int
) -> Plan:
    """Return the widest rounds of halving that draw at most so many samples."""
    pairs = samplers * (1 + len(corrections))
    tries = samplers * (1 + sum(len(_few(correction)) for correction in corrections))
    counts = [max(FEWEST, num_samples // share) for share in (8, 4, 2)]
    for widths in WIDTHS:
        first, second, third = (min(width, pairs) for width in widths)
        # A pair has three strengths in the later rounds; at the end two and its sampler alone.
        later = (3 * first, counts[1]), (3 * second, counts[2]), (3 * third + 1, num_samples)
        left = most - sum(number * count for number, count in later)
        few = min(counts[0], left // tries)
        if few >= min(counts[0], 2 * FEWEST):
            break
    return Plan(((tries, max(FEWEST, few)), *later), (first, second, third))


def scanned(
    samplers: Sequence[str],
    corrections: Sequence[Correction],
    plan: Plan,
    make: Callable[[int, int], Stage],
    seeds: Sequence[int],
) -> tuple[tuple[ScanPoint, ...], list[Pair]]:
    """Try all strengths, then those halfway from each correction's best to its neighbours."""
    (name,) = samplers
    stage = make(plan.stages[0][1], seeds[0])
    plain = _tried(stage, alone(name))
    scan, chosen = [plain], [alone(name)]
    for correction in corrections:
        points = [_tried(stage, Pair(name, correction, s)) for s in correction.strengths]
        line = {correction.none: plain.distance} | {p.strength: p.distance for p in points}
        best = min(line, key=line.__getitem__)
        for strength in _halfway(correction, line, best):
            points.append(_tried(stage, Pair(name, correction, strength)))
        scan += points
        chosen += _with_half(min(points, key=lambda point: point.distance))
    return tuple(scan), chosen


def halved(
    samplers: Sequence[str],
    corrections: Sequence[Correction],
    plan: Plan,
    make: Callable[[int, int], Stage],
    seeds: Sequence[int],
) -> tuple[tuple[ScanPoint, ...], list[Pair]]:
    """Keep the best pairs of sampler and correction, in rounds of ever more samples."""
    pairs = every_pair(samplers, corrections, _few)
    scan: list[ScanPoint] = []
    for number, ((_, count), width) in enumerate(zip(plan.stages[:-1], plan.widths, strict=True)):
        stage = make(count, seeds[number])
        points = [_tried(stage, pair) for pair in pairs]
        scan += points
        kept = _nearest(points, width)
        if number < len(plan.widths) - 1:
            halve = number == len(plan.widths) - 2
            pairs = [pair for point in kept for pair in _finer(point, points, halve=halve)]
    names = dict.fromkeys([samplers[0], *(point.sampler for point in kept)])
    finalists = [alone(name) for name in names]
    for point in kept:
        if point.correction is not NONE:
            finalists += _with_half(point)
    return tuple(scan), finalists


def alone(sampler: str) -> Pair:
    """Return a sampler with no correction."""
    return Pair(sampler, NONE, NONE.none)


def every_pair(
    samplers: Iterable[str],
    corrections: Sequence[Correction],
    strengths_of: Callable[[Correction], Sequence[float]] = lambda correction: correction.strengths,
) -> list[Pair]:
    """Return each sampler alone, and with each correction at each of its strengths."""
    of_none = [(NONE, NONE.none)]
    tried = of_none + [(c, strength) for c in corrections for strength in strengths_of(c)]
    return [Pair(name, *each) for name in samplers for each in tried]


def _tried(stage: Stage, pair: Pair) -> ScanPoint:
    return ScanPoint(*pair, stage.count, stage.add(pair))


def _few(correction: Correction) -> Sequence[float]:
    """Return every other strength, for a first look."""
    strengths = correction.strengths
    return strengths[1::2] if len(strengths) > 2 else strengths


def _nearest(points: Sequence[ScanPoint], width: int) -> list[ScanPoint]:
    """Return the best point of each of the best pairs of sampler and correction."""
    best: dict[tuple[str, int], ScanPoint] = {}
    for point in sorted(points, key=lambda point: point.distance):
        best.setdefault((point.sampler, id(point.correction)), point)
    return list(best.values())[:width]


def _finer(point: ScanPoint, points: Sequence[ScanPoint], *, halve: bool) -> list[Pair]:
    """Return a point again, and the strengths about it that the next round tries."""
    sampler, correction = point.sampler, point.correction
    if correction is NONE:
        return [alone(sampler)]
    if halve:
        tried = [p.strength for p in points if p[:2] == (sampler, correction)]
        around = _halfway(correction, [correction.none, *tried], point.strength)
    else:
        line = sorted([correction.none, *correction.strengths])
        at = line.index(point.strength)
        around = [*line[max(0, at - 1) : at], *line[at + 1 : at + 2]]
    strengths = [point.strength, *(s for s in around if s != correction.none)]
    return [Pair(sampler, correction, strength) for strength in strengths]


def _halfway(correction: Correction, tried: Iterable[float], best: float) -> list[float]:
    """Return the strengths between the best one and its two neighbours."""
    line = sorted(set(tried))
    at = line.index(best)
    halves = [
        correction.between(line[i], line[i + 1]) for i in (at - 1, at) if 0 <= i < len(line) - 1
    ]
    return [strength for strength in halves if strength not in line]


def _with_half(point: ScanPoint) -> list[Pair]:
    """Return half of a strength, which is the safer one, and the strength."""
    sampler, correction, best = point[:3]
    half = correction.between(*sorted((correction.none, best)))
    strengths = [best] if half in (correction.none, best) else [half, best]
    return [Pair(sampler, correction, strength) for strength in strengths]
