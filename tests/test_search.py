"""The search for a sampler and a correction, and what it says, keeps, draws and shows.

Most tests use a sampler whose best gain is known by construction: one model call at t = 999 with a
model that returns its input, so that the samples are s(999) times the noise. Data of standard
deviation s(999) at k = 99 then make k = 99 the exact answer, and unit data make "none" the one.
"""

import json
import math
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from s2dm_loss import gain
from s2dm_loss.sampling import (
    Candidate,
    Correction,
    CorrectionSearch,
    EpsilonScaling,
    Recommendation,
    ScaledModel,
    ScanPoint,
    ScoreRescaling,
    SearchCost,
    SkipGain,
    StartScaling,
    standard_corrections,
)
from s2dm_loss.sampling.choosing import plan_of
from s2dm_loss.sampling.corrections import NONE
from s2dm_loss.sampling.frechet import Axes, FrechetComparison
from s2dm_loss.sampling.progress import Reporter
from tests.strategies import LINEAR, VP, pickled

TAU = 0.9  # a strong gain, which a thousand samples can tell from none
INF = math.inf


class Echo(nn.Module):
    """Returns its input, and counts."""

    calls = drawn = 0

    def forward(self, x_t, t):
        self.calls += 1
        self.drawn += len(x_t)
        return x_t


def times(factor, calls=1, seen=None):
    """A sampler that returns its noise times a factor, and the gain's; `seen` keeps the noise."""

    def sample(model, noise):
        if seen is not None:
            seen.append(noise.clone())
        for _ in range(calls):
            x = model(noise, torch.full((len(noise),), 999, device=noise.device))
        return factor * x

    return sample


one_call = times(1.0)


def s_of(skip):
    """What a strength does to the samples: below 0 the inverse."""
    s = float(gain(LINEAR, abs(skip), t=torch.tensor([999]), tau=TAU)) if skip else 1.0
    return s if skip >= 0 else 1 / s


def data_of(deviation, shape=(3,), count=2000, seed=1):
    return deviation * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def data_for(skip, *args, **kwargs):
    """Data that samples of `one_call` with this skip match."""
    return data_of(s_of(skip), *args, **kwargs)


def search_of(sample=one_call, data=None, corrections=None, *, skips=None, model=None, **settings):
    """A search over gains alone if not said; the skips given are all reported."""
    data = data_for(99) if data is None else data
    corrections = [SkipGain(LINEAR, skips, tau=TAU)] if corrections is None else corrections
    settings = {"num_samples": 1000, "scan": skips is None, **settings}
    return CorrectionSearch(model or Echo(), sample, data, corrections, **settings)


def found_by(*arguments, **settings):
    return search_of(*arguments, **settings).recommend()


@pytest.mark.parametrize("skip", [-99, 0, 49, 99, 149])
def test_it_finds_the_skip_that_made_the_data_and_none_where_none_helps(skip):
    result = found_by(data=data_for(skip), skips=[-99, 49, 99, 149])
    assert result.strength == skip == result.best.strength
    assert (result.improves, result.at_edge) == (skip != 0, skip in (-99, 149))
    assert not result.scan
    assert [c.strength for c in result.candidates] == [0, -99, 49, 99, 149]
    model, x = Echo(), torch.randn(4, 3)
    scaled, noise = result(model, x)
    assert noise is x
    assert (scaled is model) == (skip == 0)
    torch.testing.assert_close(scaled(x, torch.tensor([999] * 4)), s_of(skip) * x)


@pytest.mark.parametrize("skip", [-34, 124])
def test_the_scan_goes_both_ways_and_refines(skip):
    # The coarse scan has -49, -19, 99, 149, …; what lies halfway is tried about the best of it.
    result = found_by(data=data_for(skip, count=12_000), num_samples=4000)
    assert result.strength == skip
    coarse, (below, above) = result.scan[1:9], (point.strength for point in result.scan[9:])
    assert [point.strength for point in coarse] == list(SkipGain(LINEAR).strengths)
    assert skip in (below, above)
    assert below < min(coarse, key=lambda point: point.distance).strength < above
    assert [c.strength for c in result.candidates] == [0, skip / 2, skip]


def test_the_best_of_several_corrections():
    gains, start = SkipGain(LINEAR, [9, 49], tau=TAU), StartScaling()
    start.strengths = np.array([0.8, 1.2])  # as a correction of the user's own may have them
    corrections = [gains, EpsilonScaling(LINEAR, [0.99, 1.01]), start]
    result = found_by(data=data_of(1.2), corrections=corrections)
    assert (result.correction, result.strength) == (start, 1.2)
    assert {c.correction for c in result.candidates} == {NONE, *corrections}
    assert "start noise times 1.2" in repr(result)
    model, noise = Echo(), torch.ones(2, 3)
    assert result.correct_model(model) is model
    assert torch.equal(result.correct_noise(noise), 1.2 * noise)


@pytest.fixture
def compared(monkeypatch):
    """What each comparison and each set of axes is made of, the data first."""
    given = {Axes: [], FrechetComparison: []}

    def kept(kind):
        return lambda *arguments: given[kind].append(arguments) or kind(*arguments)

    monkeypatch.setattr("s2dm_loss.sampling.search.Axes", kept(Axes))
    monkeypatch.setattr("s2dm_loss.sampling.trials.FrechetComparison", kept(FrechetComparison))
    return given


@pytest.mark.parametrize(("count", "axes"), [(32, [4, 4]), (64, [4, 8]), (400, [8, 16])], ids=str)
def test_a_third_of_the_data_chooses_and_the_rest_judges(count, axes, compared):
    """Each along axes found on the other part: data vary most along axes of their own."""
    numbers = torch.arange(200.0)[:, None]
    found_by(data=numbers, corrections=[StartScaling([0.9, 1.1])], num_samples=count)
    # An eighth of the smaller of samples and data: 66 to choose, 134 to judge.
    assert [number for _, number, _ in compared[Axes]] == axes
    parts = []
    for (seen, *_), (data, *_) in zip(compared[Axes], compared[FrechetComparison], strict=True):
        parts.append({*(data[:, 0] + seen.mean()).round().tolist()})
        assert not parts[-1] & {*seen.flatten().tolist()}
        assert len(parts[-1]) == 200 - len(seen)
    assert [len(part) for part in parts] == [66, 134]
    assert not parts[0] & parts[1]


@pytest.mark.parametrize(
    ("skips", "most", "used"), [([99], 128, 700), ([99], 2, 467), (None, 128, 467)], ids=str
)
def test_all_data_are_used_where_nothing_is_chosen(skips, most, used, monkeypatch, compared):
    monkeypatch.setattr("s2dm_loss.sampling.search.MAX_AXES", most)  # 2 are found on a third
    found_by(data=data_for(99, count=700), skips=skips, num_samples=64)
    assert len(compared[FrechetComparison][-1][0]) == used


def test_a_scan_in_many_dimensions_finds_the_strength():
    """Along axes of the compared data's own, 1.065 seemed best where 1 / 0.88 is."""
    data = data_of(1, (768,), 1500, seed=0)
    found = found_by(times(0.88), data, [StartScaling()], num_samples=1024)
    chosen = min(found.scan, key=lambda point: point.distance).strength
    assert abs(chosen - 1 / 0.88) < 0.03


def test_a_sampler_may_read_the_attributes_of_its_model():
    """As far as a correction leaves the model in its place, which one of the start noise does."""
    model = Echo()
    model.weight = torch.ones(1)
    options = {"corrections": [StartScaling([1.2])], "model": model, "num_samples": 64}
    found_by(lambda model, noise: one_call(model, noise * model.weight), **options)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        found_by(lambda model, noise: model.nothing, **options)


def test_the_stated_cost_is_the_cost():
    model = Echo()
    options = {"skips": [9, 99], "num_samples": 100, "batch_size": 64}
    search = search_of(times(1, calls=3), model=model, **options)
    assert model.calls == 0
    cost = search.cost
    assert (model.calls, cost.calls) == (3, {"sample": 3})
    assert (cost.stages, cost.runs) == (((3, 100),), 3 * 2)
    assert cost.samples == 300
    assert search.recommend().cost == cost
    assert model.calls == 3 + 3 * cost.runs


def test_the_cost_of_a_scan():
    corrections, model = standard_corrections(LINEAR), Echo()
    search = search_of(corrections=corrections, model=model, num_samples=100, batch_size=64)
    tried, cost = 1 + sum(len(c.strengths) for c in corrections) + 8, search.cost
    assert (cost.stages, cost.runs) == (((tried, 50), (9, 100)), tried + 2 * 9)
    model.drawn = 0
    search.recommend()
    assert cost.samples - 4 * (50 + 100) <= model.drawn <= cost.samples


@pytest.mark.parametrize("skips", [[49, 99], None])
def test_progress_only_shows(skips):
    shown, search = [], search_of(skips=skips, num_samples=64, batch_size=50)
    result = search.recommend(lambda runs: (shown.append(run) for run in runs))
    assert len(shown) == search.cost.runs
    for drops in (lambda runs: runs[::2], lambda runs: [], lambda runs: reversed(runs)):
        assert search.recommend(drops).candidates == result.candidates


@pytest.mark.parametrize("seed", [0, 3])
def test_stochastic_samplers_meet_the_same_numbers_and_the_global_state_is_kept(seed):
    """Not the noise that they start from: ancestral sampling that meets x_T again goes astray."""
    starts, draws = [], []

    def stochastic(model, noise):
        starts.append(noise)
        draws.append(torch.randn(noise.shape))
        return one_call(model, noise)

    state = torch.get_rng_state()
    options = {"skips": [9, 99], "num_samples": 96, "batch_size": 32, "seed": seed}
    found_by(stochastic, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any((draw == start).any() for draw in draws for start in starts)
    # Three batches of each of three candidates; the first draw is the count of the cost.
    runs = torch.stack(draws[1:]).unflatten(0, (3, 3))
    assert (runs == runs[0]).all()
    assert not torch.equal(runs[0, 0], runs[0, 1])


def test_the_seed_changes_the_answer_and_another_default_device_or_dtype_does_not():
    seen, corrections = [], [StartScaling([0.8, 1.2])]
    search = search_of(times(1.0, seen=seen), data_of(1.2), corrections, num_samples=200)
    expected = search.recommend()
    with torch.device("meta"):
        assert search.recommend() == expected
    torch.set_default_dtype(torch.float64)
    assert str(search.recommend()) == str(expected)
    assert {noise.dtype for noise in seen} == {torch.float32}
    search.seed = 1
    assert search.recommend().candidates != expected.candidates


def test_a_candidate_that_overflows_loses_and_says_so():
    def fragile(model, noise):
        x = one_call(model, noise)
        return x * INF if float(x.std() / noise.std()) < 0.5 else x

    result = found_by(fragile, skips=[99, 199])
    lost = result.candidates[-1]
    assert (result.strength, lost.distance, lost.best_share) == (99, INF, 0)
    assert "inf" in str(result)


ELSEWHERE = {"sample": lambda _, noise: one_call(Echo(), noise)}
LARGE = {"sample": lambda model, noise: 1e200 * one_call(model, noise).double()}
OTHERS = {"sample": {"a": one_call, "b": lambda model, noise: model(noise, 9)[0]}}


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module, got 3"),
        ({"sample": {}}, ValueError, "sample must hold at least one sampler"),
        ({"sample": {"a": 3}}, TypeError, r"sample must be callable .* got 'a': 3"),
        ({"sample": {1: one_call}}, TypeError, "by their names, got 1"),
        ({"data": torch.ones(3, 2, dtype=torch.long)}, TypeError, "data must be a floating"),
        ({"data": torch.ones(40)}, ValueError, r"data must have shape \[N, ...\]"),
        ({"data": torch.ones(31, 8)}, ValueError, r"data must have shape \[N, ...\]"),
        ({"data": torch.full((40, 2), math.nan)}, ValueError, "data must be finite"),
        ({"features": 3}, TypeError, "features must be callable"),
        ({"num_samples": 31}, ValueError, "num_samples must be at least 32, got 31"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"noise_shape": (0,)}, ValueError, "noise_shape must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"corrections": [StartScaling(), Correction()]}, ValueError, "have strengths .* got Corr"),
        ({"corrections": []}, TypeError, "corrections must be at least one Correction"),
        ({"corrections": [StartScaling]}, TypeError, "corrections must be at least one"),
        ({"corrections": StartScaling()}, TypeError, "corrections must be at least one"),
        ({"sample": lambda model, noise: noise[:, :2]}, ValueError, r"of shape \(1, 3\)"),
        ({"sample": lambda model, noise: None}, ValueError, "sample must return a tensor"),
        (ELSEWHERE, ValueError, "sample must call the model that it is"),
        ({"sample": times(math.nan)}, ValueError, "sample must return finite samples"),
        (LARGE, ValueError, "too large to square"),
        (OTHERS, ValueError, r"sample\['b'\] must return"),
        ({"features": torch.mean}, ValueError, r"features must return .* shape \[256, D\]"),
        ({"features": torch.log}, ValueError, "features must return finite values for the data"),
    ],
)
def test_a_bad_argument_and_what_a_sampler_or_features_return_are_named(settings, error, said):
    with pytest.raises(error, match=said):
        found_by(**{"skips": [9], "num_samples": 32, **settings})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_noise_is_of_the_models_dtype(dtype, device):
    """Of offloaded weights, which are on "meta" until they are called, it is where the data are."""
    found = []
    for weight in (torch.zeros(1, device=device, dtype=dtype), torch.zeros(1)):
        model, seen, data = Echo(), [], data_for(99, count=200).to(dtype)
        model.weight = nn.Parameter(weight)
        options = {"skips": [99], "num_samples": 64, "model": model}
        found_by(times(1.0, seen=seen), data, **options)
        assert {noise.dtype for noise in seen} == {weight.dtype}
        found.append(seen[-1])
    assert torch.equal(found[0], found[1].to(dtype))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_and_its_parts_left_in_their_modes(training, capsys):
    """Active dropout is noise that no sampler of a trained model has."""
    model, seen = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).train(training), set()
    model[1].eval()

    def sample(model, noise):
        seen.update(module.training for module in model.modules())
        return model(noise)

    options = {"corrections": [StartScaling([1.2])], "scan": False, "num_samples": 64}
    found_by(sample, model=model, **options)
    assert seen == {False}
    assert ("into evaluation mode" in capsys.readouterr().err) is training
    with pytest.raises(ValueError, match="made no call"):
        found_by(lambda m, noise: noise, model=model, **options)
    assert [m.training for m in model.modules()] == [training, training, False]


def test_features_are_what_is_compared_and_a_network_of_them_is_evaluated():
    """Else batch normalisation makes samples and data alike, and dropout hides what is left."""
    features = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5))
    nn.init.constant_(features[1].weight, 10.0)
    seen, sizes = set(), []
    features.register_forward_hook(lambda module, _, out: seen.add(module[1].training))
    features.register_forward_hook(lambda *call: sizes.append(len(call[2])))
    # Enough of both that any draw will do: torch's own differ between versions.
    data, options = data_for(99, (2, 2), 8000), {"batch_size": 300, "num_samples": 4000}
    result = found_by(data=data, skips=[49, 99, 149], features=features, **options)
    assert result.strength == 99
    assert result.candidates[0].distance == pytest.approx(400 * (1 - s_of(99)) ** 2, rel=0.15)
    assert (seen, max(sizes)) == ({False}, 300)
    assert torch.equal(features[1].running_mean, torch.zeros(4))
    assert all(module.training for module in features.modules())


def test_it_finds_the_pair():
    """Neither of the two alone, nor with any correction the other: 1.3 s(99) is the data's."""
    factors = {"one": 1.0, "far": 3.0, "louder": 1.3, "low": 0.2}
    samplers = {name: times(factor) for name, factor in factors.items()}
    truth = 1.3 * s_of(99)
    result = found_by(samplers, data_of(truth, count=3000), num_samples=1024)

    def deviation(candidate):
        return factors[candidate.sampler] * s_of(candidate.strength)

    assert abs(deviation(result.recommended) - truth) < 0.03
    first, *others = result.candidates  # of the sampler in use
    assert (first.sampler, first.correction) == ("one", NONE)
    names = {candidate.sampler for candidate in result.candidates}
    assert names == {c.sampler for c in result.candidates if not c.is_corrected}
    assert {point.sampler for point in result.scan} == set(samplers)
    # Round by round more samples and finer strengths: every other, the rest, and those halfway.
    strengths = SkipGain(LINEAR).strengths
    few, more, finer = (
        {point.strength for point in result.scan if point.samples == count} - {0}
        for count in (128, 256, 512)
    )
    assert few == set(strengths[1::2]) < few | more <= set(strengths)
    assert finer - set(strengths)
    assert "low" not in names
    for candidate in others:
        difference = 3 * ((deviation(candidate) - truth) ** 2 - (1 - truth) ** 2)
        assert candidate.low <= difference <= candidate.high


def test_a_sampler_alone_and_the_one_in_use():
    """A better sampler needs no correction; the best one already in use is kept."""
    samplers = {"used": times(1.0), "good": times(1.2), "bad": times(0.7)}
    for corrections in (None, []):  # or samplers alone, with no correction at all
        result = found_by(samplers, data_of(1.2), corrections, num_samples=1024)
        assert (result.sampler, result.correction) == ("good", NONE)
    result = found_by(samplers, data_of(1.0), num_samples=1024)
    assert "Keep used with no correction" in str(result)


def test_all_pairs_are_compared_without_a_scan():
    samplers, corrections = {"used": times(1.0), "other": times(1.2)}, [StartScaling([0.9, 1.1])]
    search = search_of(samplers, data_of(1.2), corrections, scan=False)
    assert (search.cost.stages, search.cost.single_samples) == (((6, 1000),), 3 * 1000)
    result = search.recommend()
    assert not result.scan
    labels = ["none", "start noise times 0.9", "start noise times 1.1"]
    assert [(c.sampler, c.label) for c in result.candidates] == [*product(samplers, labels)]
    assert result.best is result.candidates[3]
    # 1.32 is nearer to 1.2 than 1 is, and farther than its own sampler alone.
    assert result.candidates[5].high < 0 < result.candidates[5].own_high


def test_the_samplers_make_as_many_calls_and_what_differs_is_said():
    samplers = {"DDIM": times(1.0, 10), "PNDM": times(1.2, 11), "Heun": times(1.1, 9)}
    cost = search_of(samplers, data_of(1.2)).cost
    assert cost.calls == {"DDIM": 10, "PNDM": 11, "Heun": 9}
    with pytest.raises(ValueError, match=r"one more or less, got {'slow': 20}"):
        search_of(samplers | {"slow": times(1.0, 20)}, data_of(1.2)).cost  # noqa: B018


@pytest.mark.parametrize("corrections", [standard_corrections(LINEAR), [SkipGain(LINEAR)]], ids=len)
def test_it_draws_at_most_twice_the_samples_of_one_sampler(corrections):
    """And no more than it says, with noise of its own in each round."""
    single = plan_of(1, corrections, 512).samples
    for count in range(2, 21):
        plan = plan_of(count, corrections, 512)
        assert plan.samples <= 2 * single
        assert [samples for _, samples in plan.stages[1:]] == [128, 256, 512]
    model, seen = Echo(), []
    samplers = {f"{i}": times(1 + 0.01 * i, seen=None if i else seen) for i in range(6)}
    options = {"num_samples": 512, "model": model, "batch_size": 512}
    search = search_of(samplers, data_of(1.1, count=400), corrections, **options)
    cost = search.cost
    assert cost.single_samples == single
    model.drawn = 0
    search.recommend(progress=False)
    assert model.drawn <= cost.samples
    rounds = {(len(noise), float(noise[0, 0])) for noise in seen}
    assert len({first for _, first in rounds}) == len(rounds)


GAIN = SkipGain(LINEAR, tau=0.98)
ONE = SearchCost(((3, 64),), {"sample": 10}, 3, 192)
TWO = SearchCost(((9, 32), (3, 64)), {"DDIM": 10, "PNDM": 11}, 12, 192)
NO = Candidate("sample", NONE, 0, 2.0)
# distance, best_share, difference, low, high, own_high
SURE = Candidate("sample", GAIN, 49, 1.5, 0.4, -0.5, -0.8, -0.2, -0.2)
NEARER = Candidate("sample", GAIN, 99, 1.0, 0.6, -1.0, -2.5, 0.5, 0.5)


def found(*candidates, cost=ONE, scan=()):
    return Recommendation(candidates, scan, cost)


def test_what_it_says():
    """The nearest may have the widest interval; the sure one is recommended."""
    said, _, _, *rows = str(found(NO, SURE, NEARER)).splitlines()
    assert said == "Use gain k = 49: 25 % [10, 40] nearer to the data."
    assert [row.endswith("<- use this") for row in rows] == [False, True, False]
    assert " ".join(rows[2].split()) == "gain k = 99 1 50 % [-25, 125] 60%"
    assert found(NO, SURE, NEARER).best is NEARER
    assert "(the nearest, gain k = 99, by 50 % [-25, 125])." in str(found(NO, NEARER))
    assert str(found(NO)).startswith("No correction is better than none.")
    assert "outermost strength tried" in repr(found(NO, SURE))
    # A distance may come out at 0 or below, of which there is no share.
    none, near = Candidate("sample", NONE, 0, -0.01), replace(NEARER, distance=-1.01)
    assert "by 1 [-0.5, 2.5])" in str(found(none, near))


def test_with_several_samplers_the_correction_must_be_better_than_its_sampler_alone():
    use = Candidate("DDIM", NONE, 0, 2.0)
    alone = Candidate("PNDM", NONE, 0, 1.0, 0.2, -1.0, -1.2, -0.8, -0.8)
    sure = Candidate("PNDM", GAIN, 49, 0.9, 0.8, -1.1, -1.3, -0.9, -0.05)
    unsure = replace(sure, own_high=0.05)
    result = found(use, alone, sure, cost=TWO)
    assert result.recommended is sure
    said, *_, last = str(result).splitlines()
    assert said.startswith("Use PNDM with gain k = 49: 55 % [45, 65] nearer to the data than DDIM")
    assert last.split()[:5] == ["PNDM", "11", "gain", "k", "="]
    assert found(use, alone, unsure, cost=TWO).recommended is alone
    # Where the sampler alone is no better than the one in use, the pair is.
    worse = Candidate("PNDM", NONE, 0, 2.5, 0.2, 0.5, 0.1, 0.9, 0.9)
    assert found(use, worse, unsure, cost=TWO).recommended is unsure
    assert str(found(use, worse, cost=TWO)).startswith("Keep DDIM with no correction: nothing is")
    for part in ("9 x 32 samples to choose, then 3 x 64", "12 sampler runs of 10", "480 samples"):
        assert part in str(TWO)
    assert str(TWO).endswith("(PNDM makes 11); over one sampler alone it would be 192")


def small_search(**options):
    corrections = [GAIN, StartScaling(), ScoreRescaling(LINEAR, psi=2.0)]
    return search_of(data=data_of(0.9, count=600, seed=0), corrections=corrections, **options)


@pytest.fixture(scope="module")
def result():
    return small_search(num_samples=128).recommend(progress=False)


def kept(result, *schedule):
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    return values, Recommendation.from_dict(values, *schedule)


def test_what_it_keeps_can_be_read_without_the_data(result):
    (values, loaded), (_, whole) = kept(result), kept(result, LINEAR)
    assert str(loaded) == str(result)
    assert loaded.cost == result.cost
    assert loaded.to_dict() == whole.to_dict() == values
    assert (values["searched"]["seed"], values["searched"]["data"]) == (0, [600, 3])
    assert values["torch"] == torch.__version__
    assert values["recommended"] == [result.sampler, result.recommended.label]
    # With its schedule it does what the search's own does, options and all.
    x, t = torch.randn(4, 3), torch.tensor([0, 99, 500, 999])
    for ours, theirs in zip(result.candidates, whole.candidates, strict=True):
        (a, b), (c, d) = (one.correction(Echo(), x, one.strength) for one in (ours, theirs))
        assert torch.equal(b, d)
        assert torch.equal(a(x, t), c(x, t))
    assert isinstance(pickled(result), Recommendation)
    stored = next(c for c in loaded.candidates if c.label.startswith("gain"))
    for apply in (stored.correction.correct_model, stored.correction.correct_noise):
        with pytest.raises(ValueError, match=r"was loaded without its schedule.*from_dict"):
            apply(nn.Identity(), stored.strength)


def test_what_has_no_number_and_what_is_a_users_own_is_kept_too():
    class Mine(Correction):
        name, strengths, options, way = "mine", (2.0,), ("way",), [True, None]

    far = Candidate("inf", Mine(), 2.0, INF, 0.0, INF, INF, math.nan)
    unbounded = SkipGain(LINEAR, (9, 49), max_c2=np.float32("inf"))
    values, loaded = kept(found(NO, far, replace(SURE, correction=unbounded)), LINEAR)
    assert loaded.to_dict() == values
    mine = loaded.candidates[1]
    assert (mine.sampler, mine.distance, mine.label) == ("inf", INF, "mine 2")
    assert math.isnan(mine.high)
    for apply in (mine.correction.correct_model, mine.correction.correct_noise):
        with pytest.raises(ValueError, match="make your Mine and call it with the strength 2"):
            apply(torch.zeros(2), mine.strength)
    assert loaded.correction.max_c2 == INF
    assert isinstance(loaded(Echo(), torch.randn(4, 3))[0], ScaledModel)


@pytest.mark.parametrize("none", [0.0, INF, -INF])
def test_without_its_schedule_a_correction_still_has_the_strength_that_is_none(none):
    """The outermost strength, and the figure, are told by it."""

    mine, gains = Correction(), SkipGain(VP, (0.1, 0.2))
    mine.none, mine.strengths = none, (0.1, 0.2)
    for correction, strength in product((mine, gains), (0.1, 0.2)):
        chosen = replace(SURE, correction=correction, strength=strength)
        points = tuple(ScanPoint("sample", correction, s, 64, 0.5) for s in correction.strengths)
        whole = found(NO, chosen, scan=points)
        _, loaded = kept(whole)
        assert loaded.correction.none == correction.none
        assert (loaded.at_edge, str(loaded)) == (whole.at_edge, str(whole))


def test_its_figure(result, monkeypatch):
    pytest.importorskip("matplotlib")
    compared, *scans = result.plot().axes
    assert [axis.get_xlabel()[:4] for axis in scans] == ["gain", "star", "scor"]
    ticks = [label.get_text() for label in compared.get_yticklabels()]
    assert ticks == [candidate.label for candidate in result.candidates]
    assert len(compared.containers) == len(result.candidates)
    assert set(GAIN.strengths) | {0} <= set(scans[0].lines[0].get_xdata())
    far = Candidate("sample", GAIN, 9, INF, 0.0, INF, INF, INF)
    found(NO, far).plot().canvas.draw()  # without a scan, and without a distance
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if not installed
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result.plot()


@pytest.mark.parametrize(("terminal", "tqdm"), [(True, True), (True, False), (False, True)])
def test_progress_is_a_bar_on_a_terminal_and_else_a_line_for_each_candidate(
    terminal, tqdm, monkeypatch, capsys
):
    if not tqdm:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    elif terminal:
        pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    search = small_search(num_samples=64, batch_size=64)
    result, runs, bar = search.recommend(), search.cost.runs, terminal and tqdm
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if ": distance " in line]
    assert said.startswith(f"{search.cost}\n")
    assert (f"{runs}/{runs}" in said) is bar
    assert ("\nabout " in said) is not bar
    assert len(lines) == (0 if bar else len(result.scan) + len(result.candidates))
    assert bar or lines[1].startswith("gain k = -99: distance ")
    search.recommend(progress=False)
    assert not capsys.readouterr().err


def test_it_says_how_long_it_will_take(monkeypatch, capsys):
    monkeypatch.setattr("time.monotonic", iter([0.0, 3.0]).__next__)
    reporter = Reporter(True, 100, "cost")
    reporter.ran()
    reporter.ran()
    assert capsys.readouterr().err == "cost\nabout 5 min\n"
