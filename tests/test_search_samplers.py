"""The search over samplers and corrections together.

Samplers of one call at t = 999 of a model that returns its input, so that what they make of unit
noise is known: its standard deviation is the sampler's own factor times s(999) of a gain.
"""

import pytest
import torch
from torch import nn

from s2dm_loss import NoiseSchedule, gain
from s2dm_loss.sampling import CorrectionSearch, SkipGain, StartScaling, standard_corrections
from s2dm_loss.sampling.choosing import plan_of
from s2dm_loss.sampling.corrections import NONE

LINEAR = NoiseSchedule.linear(1000)
LAST = torch.tensor([999])


class Echo(nn.Module):
    def __init__(self):
        super().__init__()
        self.drawn = 0

    def forward(self, x_t, t):
        self.drawn += len(x_t)
        return x_t


def times(factor, calls=1, seen=None):
    """A sampler that returns its noise times a factor, and the gain's."""

    def sample(model, noise):
        if seen is not None:
            seen.append(noise)
        for _ in range(calls):
            x = model(noise, torch.full((len(noise),), 999))
        return factor * x

    return sample


def data_of(deviation, count=3000, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return deviation * torch.randn(count, 3, generator=generator)


def search_of(samplers, data, corrections=None, model=None, **settings):
    corrections = [SkipGain(LINEAR, tau=0.9)] if corrections is None else corrections
    settings = {"num_samples": 1024, **settings}
    return CorrectionSearch(model or Echo(), samplers, data, corrections, **settings)


def s_of(skip):
    return float(gain(LINEAR, abs(skip), t=LAST, tau=0.9)) ** (1 if skip > 0 else -1)


def test_it_finds_the_pair():
    """Neither of the two alone, nor with any correction the other: 1.3 s(99) is the data's."""
    samplers = {"one": times(1.0), "far": times(3.0), "louder": times(1.3), "low": times(0.2)}
    data = data_of(1.3 * s_of(99))
    result = search_of(samplers, data).recommend()
    chosen = result.recommended
    factor = {"one": 1.0, "far": 3.0, "louder": 1.3, "low": 0.2}[chosen.sampler]
    best = abs(factor * (s_of(chosen.strength) if chosen.is_corrected else 1) - 1.3 * s_of(99))
    assert best < 0.03
    assert result.improves
    # The finalists, each one's sampler with no correction, and the sampler in use, which is first.
    first, *others = result.candidates
    assert (first.sampler, first.correction) == ("one", NONE)
    names = {candidate.sampler for candidate in result.candidates}
    alone = {c.sampler for c in result.candidates if not c.is_corrected}
    assert names == alone
    assert {point.sampler for point in result.scan} == set(samplers)
    # Round by round more samples and finer strengths: every other, the rest, and those halfway.
    strengths = SkipGain(LINEAR).strengths
    tried = {
        count: {point.strength for point in result.scan if point.samples == count} - {0}
        for count in (128, 256, 512)
    }
    assert tried[128] == set(strengths[1::2])
    assert tried[256] <= set(strengths)
    assert tried[256] - tried[128]
    assert tried[512] - set(strengths)
    # What was dropped has no interval.
    assert "low" not in names
    for candidate in others:
        deviation = {"one": 1.0, "far": 3.0, "louder": 1.3}[candidate.sampler]
        deviation *= s_of(candidate.strength) if candidate.is_corrected else 1
        truth = 3 * ((deviation - 1.3 * s_of(99)) ** 2 - (1 - 1.3 * s_of(99)) ** 2)
        assert candidate.low <= truth <= candidate.high


def test_a_sampler_alone_and_the_one_in_use():
    """A better sampler needs no correction; the best one already in use is kept."""
    samplers = {"used": times(1.0), "good": times(1.2), "bad": times(0.7)}
    result = search_of(samplers, data_of(1.2)).recommend()
    assert (result.sampler, result.correction) == ("good", NONE)
    result = search_of(samplers, data_of(1.0)).recommend()
    assert not result.improves
    assert (result.sampler, result.correction, result.strength) == ("used", NONE, 0)
    assert "Keep used with no correction" in str(result)
    # Samplers alone, with no correction at all.
    result = search_of(samplers, data_of(1.2), corrections=[]).recommend()
    assert result.sampler == "good"


def test_all_pairs_are_compared_without_a_scan():
    samplers = {"used": times(1.0), "other": times(1.2)}
    search = search_of(samplers, data_of(1.2), [StartScaling([0.9, 1.1])], scan=False)
    assert search.cost.stages == ((6, 1024),)
    result = search.recommend()
    assert not result.scan
    assert [(c.sampler, c.label) for c in result.candidates] == [
        ("used", "none"),
        ("used", "start noise times 0.9"),
        ("used", "start noise times 1.1"),
        ("other", "none"),
        ("other", "start noise times 0.9"),
        ("other", "start noise times 1.1"),
    ]
    assert result.best is result.candidates[3]
    # Each against its own sampler with no correction, too: 1.32 is nearer to 1.2 than 1 is, and
    # farther than 1.2.
    assert result.candidates[5].high < 0 < result.candidates[5].own_high


def test_the_samplers_make_as_many_calls_and_what_differs_is_said():
    samplers = {"DDIM": times(1.0, 10), "PNDM": times(1.2, 11), "Heun": times(1.1, 9)}
    cost = search_of(samplers, data_of(1.2)).cost
    assert cost.calls == {"DDIM": 10, "PNDM": 11, "Heun": 9}
    assert cost.network_calls == 11 * cost.samples
    with pytest.raises(ValueError, match=r"one more or less, got {'slow': 20}"):
        search_of(samplers | {"slow": times(1.0, 20)}, data_of(1.2)).cost  # noqa: B018
    result = search_of(samplers, data_of(1.2), num_samples=64).recommend()
    assert "PNDM makes 11" in str(result.cost)


@pytest.mark.parametrize("count", [2, 6, 12, 20])
@pytest.mark.parametrize("corrections", [standard_corrections(LINEAR), [SkipGain(LINEAR)]], ids=len)
def test_it_draws_at_most_twice_the_samples_of_one_sampler(count, corrections):
    """And no more than it says."""
    samplers = {f"{i}": times(1 + 0.01 * i) for i in range(count)}
    model = Echo()
    search = search_of(samplers, data_of(1.1, count=400), corrections, model, num_samples=512)
    cost = search.cost
    single = search_of(times(1.0), data_of(1.1, count=400), corrections, num_samples=512).cost
    assert cost.single_samples == single.samples
    assert cost.samples <= 2 * single.samples
    model.drawn = 0
    search.recommend(progress=False)
    assert model.drawn <= cost.samples
    assert len(cost.stages) == 4
    assert [samples for _, samples in cost.stages[1:]] == [128, 256, 512]


def test_the_plan_at_its_default():
    """57,344 samples over one sampler, as before; the rest in the docs."""
    corrections = standard_corrections(LINEAR)
    assert plan_of(1, corrections, 2048).samples == 57_344
    assert plan_of(6, corrections, 2048).samples == 78_848
    assert plan_of(12, corrections, 2048).samples <= 2 * 57_344


def test_what_chooses_is_not_what_compares():
    seen = []
    numbers = torch.arange(300.0)[:, None].expand(300, 3) / 300

    compared = []

    def features(values):
        compared.append(values.clone())
        return values

    samplers = {"a": times(1.0, seen=seen), "b": times(0.5, seen=seen)}
    search_of(
        samplers, numbers.clone(), [StartScaling()], features=features, num_samples=256
    ).recommend()
    sizes = sorted({len(noise) for noise in seen if len(noise) > 1})
    assert sizes == [32, 64, 128, 256]
    values = {size: {float(n[0, 0]) for n in seen if len(n) == size} for size in sizes}
    # Each stage has noise of its own (of the start scaling, a multiple).
    firsts = [values[size] for size in sizes]
    for i, one in enumerate(firsts):
        assert not any(one & other for other in firsts[i + 1 :])


@pytest.mark.parametrize(
    ("sample", "error", "said"),
    [
        ({}, ValueError, "sample must hold at least one sampler"),
        ({"a": 3}, TypeError, r"sample must be callable .* got 'a': 3"),
        ({1: times(1.0)}, TypeError, "by their names, got 1"),
    ],
)
def test_bad_samplers_are_named(sample, error, said):
    with pytest.raises(error, match=said):
        search_of(sample, data_of(1.0))


def test_a_sampler_of_another_shape_is_named():
    samplers = {"good": times(1.0), "flat": lambda model, noise: model(noise, 999).flatten()}
    with pytest.raises(ValueError, match=r"sample\['flat'\] must return a tensor of shape"):
        search_of(samplers, data_of(1.0)).recommend()


def test_the_same_seed_gives_the_same_answer():
    samplers = {"used": times(1.0), "other": times(1.2)}
    first, again, other = (
        search_of(samplers, data_of(1.1), seed=seed).recommend(progress=False) for seed in (3, 3, 4)
    )
    assert str(first) == str(again) != str(other)
