"""The search for a correction.

Most tests use a sampler whose best gain is known by construction: one model call at t = 999 with a
model that returns its input, so that the samples are s(999) times the noise.  Data of standard
deviation s(999) at k = 99 then make k = 99 the exact answer, and unit data make "none" the one.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, gain
from s2dm_loss.sampling import (
    Correction,
    CorrectionSearch,
    EpsilonScaling,
    ScaledModel,
    SkipGain,
    StartScaling,
    standard_corrections,
)
from s2dm_loss.sampling.corrections import NONE
from s2dm_loss.sampling.frechet import MAX_AXES, Axes, FrechetComparison

LINEAR = NoiseSchedule.linear(1000)
LAST = torch.tensor([999])
TAU = 0.9  # a strong gain, which a thousand samples can tell from none


class Echo(nn.Module):
    """Returns its input, and counts."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x_t, t):
        self.calls += 1
        return x_t


class Linear(nn.Module):
    """The same with weights, which take inputs of their own dtype alone."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3, dtype=dtype))

    def forward(self, x_t, t):
        return x_t @ self.weight


def one_call(model, noise):
    return model(noise, torch.full((len(noise),), 999, device=noise.device))


def s_of(skip):
    return float(gain(LINEAR, skip, t=LAST, tau=TAU))


def data_for(skip, shape=(3,), count=2000, seed=1):
    """Data that samples of `one_call` with this skip match; below 0 with the inverse."""
    normal = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    if not skip:
        return normal
    return normal * s_of(skip) if skip > 0 else normal / s_of(-skip)


def gain_search(model, schedule, sample, data, *, skips=None, **settings):
    """A search over gains alone; the strengths given are all reported."""
    names = {"tau", "prediction_type", "max_c2"} & settings.keys()
    options = {name: settings.pop(name) for name in names}
    correction = SkipGain(schedule, skips, **options)
    return CorrectionSearch(model, sample, data, [correction], scan=skips is None, **settings)


def search_for(skip, **settings):
    settings = {"sample": one_call, "skips": [49, 99, 149], "num_samples": 1000} | settings
    settings = {"data": data_for(skip), "tau": TAU} | settings
    return gain_search(Echo(), LINEAR, **settings)


@pytest.mark.parametrize("skip", [-99, 49, 99, 149])
def test_it_finds_the_skip_that_made_the_data(skip):
    result = search_for(skip, skips=[-99, 49, 99, 149]).recommend()
    assert result.strength == skip == result.best.strength
    assert isinstance(result.correction, SkipGain)
    assert result.best.high < 0
    assert result.at_edge == (skip in (-99, 149))
    assert not result.scan


def test_it_recommends_none_where_none_helps():
    result = search_for(0).recommend()
    assert not result.improves
    assert result.correction is NONE
    assert result.best.correction is NONE
    assert [c.strength for c in result.candidates] == [0, 49, 99, 149]
    assert not result.at_edge
    model, noise = Echo(), torch.randn(2, 3)
    assert result(model, noise) == (model, noise)


def test_a_better_gain_within_the_noise_is_not_recommended():
    # 9 is the truth, but it shrinks by 2 % only, which 40 samples cannot tell from nothing.
    result = search_for(9, skips=[9], num_samples=40, seed=1).recommend()
    assert result.best.strength == 9
    assert result.best.high >= 0
    assert not result.improves


def test_the_sure_one_is_recommended_where_the_best_is_not_sure():
    # Seen with large gains: the best of all has the widest interval.
    result = search_for(99).recommend()
    plain, sure, best, _ = result.candidates
    result = replace(result, candidates=(plain, sure, replace(best, high=0.1)))
    assert result.best.strength == 99
    assert result.strength == 49


@pytest.mark.parametrize("skip", [-34, 124])
def test_the_scan_goes_both_ways_and_refines(skip):
    # The coarse scan has -49, -19, 99, 149, …; what lies halfway is tried about the best of it.
    data = data_for(skip, count=12_000)
    result = search_for(skip, data=data, skips=None, num_samples=4000).recommend()
    assert result.strength == skip
    assert [point.strength for point in result.scan[1:9]] == list(SkipGain(LINEAR).strengths)
    below, above = (point.strength for point in result.scan[9:])
    assert skip in (below, above)
    assert below < min(result.scan[1:9], key=lambda point: point.distance).strength < above
    # Half of it is the surer one, and is reported too.
    assert [c.strength for c in result.candidates] == [0, skip / 2, skip]


def test_the_best_of_several_corrections():
    data = data_for(0) * 1.2
    corrections = [
        SkipGain(LINEAR, [9, 49], tau=TAU),
        EpsilonScaling(LINEAR, [0.99, 1.01]),
        StartScaling([0.8, 1.2]),
    ]
    result = CorrectionSearch(Echo(), one_call, data, corrections).recommend()
    assert (result.correction, result.strength) == (corrections[2], 1.2)
    assert {c.correction for c in result.candidates} == {NONE, *corrections}
    assert "start noise times 1.2" in repr(result)
    model, noise = Echo(), torch.ones(2, 3)
    assert result.correct_model(model) is model
    assert torch.equal(result.correct_noise(noise), 1.2 * noise)


def test_a_correction_of_a_users_own():
    class Shift(Correction):
        name, none, strengths = "plus", 0.0, (-0.5, 0.5)

        def correct_noise(self, noise, strength):
            return noise + strength

    result = CorrectionSearch(Echo(), one_call, data_for(0) - 0.5, [Shift()]).recommend()
    assert result.strength == -0.5


def test_the_scan_and_the_report_share_neither_noise_nor_data():
    seen = []

    def recorded(model, noise):
        seen.append(noise.clone())
        return one_call(model, noise)

    numbers = torch.arange(200.0)[:, None]
    compared = []

    def features(values):
        compared.append(values.clone())
        return values

    search = CorrectionSearch(
        Echo(),
        recorded,
        numbers,
        [EpsilonScaling(LINEAR, [0.9, 1.1])],
        features=features,
        num_samples=64,
        batch_size=64,
    )
    search.recommend()
    scanned = {float(n) for noise in seen if len(noise) == 32 for n in noise}
    reported = {float(n) for noise in seen if len(noise) == 64 for n in noise}
    assert len(scanned) == 32
    assert len(reported) == 64
    assert not scanned & reported
    # After the axes' look come the chooser's third and the judge's rest, in batches.
    numbers = set(numbers.flatten().tolist())
    rows = [set(part.flatten().tolist()) for part in compared]
    *_, first, second, third, fourth, fifth = [part for part in rows if part <= numbers]
    assert (len(first | second), len(third | fourth | fifth)) == (66, 134)
    assert not (first | second) & (third | fourth | fifth)


@pytest.mark.parametrize(
    ("num_samples", "counts"), [(32, [4, 4]), (64, [4, 8]), (400, [8, 16])], ids=str
)
def test_axes_are_found_on_the_part_that_is_not_compared(num_samples, counts, monkeypatch):
    """Data vary most along axes that were found on themselves."""
    found = []

    class Recorded(Axes):
        def __init__(self, data, count, seed):
            found.append((set(data.flatten().tolist()), count))
            super().__init__(data, count, seed)

    compared = []

    class Compared(FrechetComparison):
        def __init__(self, data, num_samples, seed):
            compared.append(data)
            super().__init__(data, num_samples, seed)

    monkeypatch.setattr("s2dm_loss.sampling.search.Axes", Recorded)
    monkeypatch.setattr("s2dm_loss.sampling.trials.FrechetComparison", Compared)
    numbers = torch.arange(200.0)[:, None]
    search = CorrectionSearch(
        Echo(), one_call, numbers, [StartScaling([0.9, 1.1])], num_samples=num_samples
    )
    search.recommend()
    # An eighth of the smaller of samples and data: 66 to choose, 134 to judge.
    assert [count for _, count in found] == counts
    assert [len(seen) for seen, _ in found] == [134, 66]
    for (seen, _), data in zip(found, compared, strict=True):
        center = torch.tensor(sorted(seen)).double().mean()
        judged = {float(value) for value in (data[:, 0] + center).round()}
        assert len(judged) == 200 - len(seen)
        assert not judged & seen


def test_a_scan_in_many_dimensions_finds_the_strength():
    """Along axes of the compared data's own, 1.065 seemed best where 1 / 0.88 is."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(1500, 768, generator=generator)
    search = CorrectionSearch(
        Echo(),
        lambda model, noise: 0.88 * one_call(model, noise),
        data,
        [StartScaling()],
        num_samples=1024,
    )
    found = search.recommend()
    chosen = min(found.scan, key=lambda point: point.distance).strength
    assert abs(chosen - 1 / 0.88) < 0.03


def test_a_sampler_may_read_the_attributes_of_its_model():
    """As far as a correction leaves the model in its place, which one of the start noise does."""
    model = Echo()
    model.register_buffer("weight", torch.ones(1))

    def sample(model, noise):
        return one_call(model, noise.to(model.weight.dtype))

    data = 1.2 * torch.randn(400, 3, generator=torch.Generator().manual_seed(1))
    search = CorrectionSearch(model, sample, data, [StartScaling([1.2])], num_samples=400)
    assert search.recommend().strength is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        CorrectionSearch(
            model, lambda model, noise: model.nothing, data, [StartScaling([1.2])]
        ).recommend()


@pytest.mark.parametrize(
    ("skips", "most", "used"), [([99], 128, 700), ([99], 2, 467), (None, 128, 467)], ids=str
)
def test_all_data_are_used_where_nothing_is_chosen(skips, most, used, monkeypatch):
    sizes = []
    monkeypatch.setattr("s2dm_loss.sampling.search.MAX_AXES", most)  # 2 are found on a third

    class Recorded(FrechetComparison):
        def __init__(self, data, num_samples, seed):
            sizes.append(len(data))
            super().__init__(data, num_samples, seed)

    monkeypatch.setattr("s2dm_loss.sampling.trials.FrechetComparison", Recorded)
    search_for(99, data=data_for(99, count=700), skips=skips, num_samples=64).recommend()
    assert sizes[-1] == used


def test_exact_model_of_a_gaussian_under_ddim():
    """Ten DDIM steps on a unit Gaussian: the samples' deviation is a product that we can form."""

    class Exact(nn.Module):
        def forward(self, x_t, t):
            return LINEAR.alpha_sigma(t)[1][:, None].float() * x_t

    times = range(900, -1, -100)

    def step(x, eps, t):
        a, b = (float(c) for c in LINEAR.alpha_sigma(torch.tensor(t)))
        before = LINEAR.alpha_sigma(torch.tensor(t - 100)) if t else (1.0, 0.0)
        return float(before[0]) * (x - b * eps) / a + float(before[1]) * eps

    def ddim(model, noise):
        x = noise
        for t in times:
            x = step(x, model(x, torch.full((len(x),), t)), t)
        return x

    def loss(correction, strength):
        """(Deviation of the samples - 1)² with one correction."""
        x = strength if isinstance(correction, StartScaling) else 1.0
        for t in times:
            at = torch.tensor([t])
            s = 1.0
            if isinstance(correction, (SkipGain, EpsilonScaling)):
                s = float(correction.scale(at, strength))
            x = step(x, s * float(LINEAR.alpha_sigma(at)[1]) * x, t)
        return (x - 1) ** 2

    assert loss(None, 0) == pytest.approx((0.832 - 1) ** 2, abs=0.001)  # too little spread
    data = torch.randn(4000, 2, generator=torch.Generator().manual_seed(3))
    result = gain_search(Exact(), LINEAR, ddim, data, num_samples=1024).recommend()
    assert loss(result.correction, result.strength) < 0.1 * loss(None, 0)
    assert result.strength in range(80, 150)
    corrections = [SkipGain(LINEAR), EpsilonScaling(LINEAR), StartScaling()]
    result = CorrectionSearch(Exact(), ddim, data, corrections, num_samples=1024).recommend()
    assert loss(result.correction, result.strength) < 0.1 * loss(None, 0)
    for candidate in result.candidates[1:]:
        truth = 2 * (loss(candidate.correction, candidate.strength) - loss(None, 0))
        assert candidate.low <= truth <= candidate.high


def test_images_are_compared_along_their_leading_axes(monkeypatch):
    # 3072 values, whose spread is in a few directions: no 3072² eigenproblem.
    scale = 0.8 ** torch.arange(3072.0)
    turn = torch.linalg.qr(torch.randn(3072, 64, generator=torch.Generator().manual_seed(0))).Q.T
    data = ((data_for(99, (3072,), 1600) * scale)[:, :64] @ turn).reshape(-1, 3, 32, 32)

    def sample(model, noise):
        return ((one_call(model, noise).flatten(1) * scale)[:, :64] @ turn).reshape(-1, 3, 32, 32)

    search = search_for(99, sample=sample, data=data, num_samples=1100, batch_size=200)
    compared = []

    class Recorded(FrechetComparison):
        def add(self, samples):
            compared.append(tuple(samples.shape))
            return super().add(samples)

    monkeypatch.setattr("s2dm_loss.sampling.trials.FrechetComparison", Recorded)
    result = search.recommend()
    assert compared == [(1100, MAX_AXES + 1)] * 4
    assert result.strength == 99
    expected = (1 - s_of(99)) ** 2 * float(scale.square().sum())
    assert result.candidates[0].distance == pytest.approx(expected, rel=0.2)


def test_features():
    sizes = []

    def features(images):
        sizes.append(len(images))
        return images.flatten(1)[:, :2] * 10

    # Enough of both that any draw will do: torch's own differ between versions.
    data = data_for(99, (2, 2), count=8000)
    search = search_for(99, data=data, features=features, batch_size=300, num_samples=4000)
    result = search.recommend()
    assert result.strength == 99
    assert result.candidates[0].distance == pytest.approx(200 * (1 - s_of(99)) ** 2, rel=0.15)
    assert max(sizes) == 300


def test_the_same_seed_gives_the_same_answer():
    first, again = (search_for(99, seed=3).recommend() for _ in range(2))
    other = search_for(99, seed=4).recommend()
    rows = [[replace(c, correction=None) for c in r.candidates] for r in (first, again, other)]
    assert rows[0] == rows[1] != rows[2]


def test_intervals_hold_the_truth():
    s = s_of(99)
    truth = {k: 2 * (s_of(k) - s) ** 2 - 2 * (1 - s) ** 2 for k in (49, 149)}
    held = 0
    for seed in range(40):
        data = data_for(99, shape=(2,), count=500, seed=100 + seed)
        search = search_for(99, data=data, skips=list(truth), num_samples=500, seed=seed)
        plain, *others = search.recommend().candidates
        assert (plain.low, plain.high) == (0, 0)
        held += all(c.low <= truth[c.strength] <= c.high for c in others)
    assert held >= 35  # of 40, where 95 % are promised


@pytest.mark.parametrize(("num_samples", "batch_size", "batches"), [(100, 64, 2), (64, 64, 1)])
def test_the_stated_cost_is_the_cost(num_samples, batch_size, batches):
    model = Echo()

    def three_calls(model, noise):
        for _ in range(3):
            x = one_call(model, noise)
        return x

    settings = {"skips": [9, 99], "num_samples": num_samples, "batch_size": batch_size}
    search = gain_search(model, LINEAR, three_calls, data_for(0), **settings)
    assert model.calls == 0
    cost = search.cost
    assert model.calls == 3
    assert cost.calls == {"sample": 3}
    assert (cost.stages, cost.runs) == (((3, num_samples),), 3 * batches)
    assert cost.samples == 3 * num_samples
    assert cost.network_calls == 9 * num_samples
    assert str(cost) == (
        f"3 x {num_samples} samples to compare: at most {3 * batches} sampler runs of 3 network "
        f"calls each, {3 * num_samples} samples in all"
    )
    model.calls = 0
    result = search.recommend()
    assert model.calls == 9 * batches
    assert result.cost == cost


def test_the_cost_of_a_scan():
    sizes = []

    def sample(model, noise):
        sizes.append(len(noise))
        return one_call(model, noise)

    corrections = standard_corrections(LINEAR)
    search = CorrectionSearch(
        Echo(), sample, data_for(0), corrections, num_samples=100, batch_size=64
    )
    cost = search.cost
    strengths = sum(len(c.strengths) for c in corrections)
    assert cost.stages == ((1 + strengths + 8, 50), (9, 100))
    assert cost.runs == 1 + strengths + 8 + 2 * 9
    sizes.clear()
    search.recommend()
    # At an end of the scan there is one neighbour only.
    assert cost.samples - 4 * (50 + 100) <= sum(sizes) <= cost.samples
    assert max(sizes) == 64


@pytest.mark.parametrize("skips", [[49, 99], None])
def test_progress_only_shows(skips):
    shown = []

    def progress(runs):
        for run in runs:
            shown.append(run)
            yield run

    search = search_for(99, skips=skips, num_samples=64, batch_size=50)
    result = search.recommend(progress)
    assert len(shown) == search.cost.runs
    for drops in (lambda runs: runs[::2], lambda runs: [], lambda runs: reversed(runs)):
        assert search.recommend(drops).candidates == result.candidates


def test_stochastic_samplers_meet_the_same_numbers_and_the_global_state_is_kept():
    draws = []

    def stochastic(model, noise):
        draws.append(torch.randn(2))
        return one_call(model, noise)

    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    search = gain_search(
        Echo(), LINEAR, stochastic, data_for(0), skips=[9, 99], num_samples=64, batch_size=32
    )
    search.recommend()
    assert torch.equal(torch.randn(3), expected)
    _, *runs = draws  # the first is the count of the cost
    batches = list(zip(runs[::2], runs[1::2], strict=True))
    assert len(batches) == 3
    for first, second in batches:
        assert torch.equal(first, batches[0][0])
        assert torch.equal(second, batches[0][1])
    assert not torch.equal(*batches[0])


@pytest.mark.parametrize("seed", [0, 3])
def test_what_a_sampler_draws_is_not_the_noise_that_it_starts_from(seed):
    """Ancestral sampling that meets x_T again as its first draw goes astray."""
    starts, draws = [], []

    def stochastic(model, noise):
        starts.append(noise)
        draws.append(torch.randn(noise.shape))
        return one_call(model, noise)

    gain_search(
        *(Echo(), LINEAR, stochastic, data_for(0)),
        **{"skips": [9, 99], "num_samples": 96, "batch_size": 32, "seed": seed},
    ).recommend()
    for start in starts:
        for draw in draws:
            assert not (draw == start).any()


def test_another_default_device_changes_nothing():
    search = CorrectionSearch(
        Echo(),
        one_call,
        data_for(0) * 1.2,
        [StartScaling([0.8, 1.2])],
        num_samples=200,
    )
    expected = search.recommend()
    with torch.device("meta"):
        assert search.recommend() == expected


def test_a_candidate_that_overflows_loses_and_says_so():
    def fragile(model, noise):
        x = one_call(model, noise)
        return x * math.inf if float(x.std() / noise.std()) < 0.5 else x

    result = search_for(99, sample=fragile, skips=[99, 199]).recommend()
    assert result.strength == 99
    assert result.candidates[-1].distance == math.inf
    assert result.candidates[-1].best_share == 0
    assert "inf" in str(result)


def test_the_recommended_model():
    result = search_for(99).recommend()
    x = torch.randn(4, 3)
    t = torch.tensor([999] * 4)
    scaled, noise = result(Echo(), x)
    assert isinstance(scaled, ScaledModel)
    assert noise is x
    assert torch.allclose(scaled(x, t), s_of(99) * x)


def test_a_smaller_tau_wants_a_smaller_skip():
    # (1-τ)/τ is 9 times larger at 0.5 than at 0.9, so a much smaller k does the same.
    result = search_for(99, skips=[9, 29, 99], tau=0.5).recommend()
    assert result.strength == 29
    assert float(gain(LINEAR, 29, t=LAST, tau=0.5)) == pytest.approx(s_of(99), abs=0.1)


def test_continuous_time():
    flow = ContinuousSchedule.flow()
    at = torch.tensor([0.5])
    s = float(gain(flow, 0.25, t=at, tau=TAU))

    def sample(model, noise):
        return model(noise, torch.full((len(noise),), 0.5))

    data = data_for(0, count=8000) * s
    settings = {"skips": [0.05, 0.25, 0.45], "num_samples": 4000, "tau": TAU}
    result = gain_search(Echo(), flow, sample, data, **settings).recommend()
    assert result.strength == 0.25


def test_noise_of_another_shape_than_the_data():
    def decode(model, noise):
        return one_call(model, noise).flatten(1)

    result = search_for(
        99, sample=decode, data=data_for(99, (4,)), skips=[99], noise_shape=(2, 2)
    ).recommend()
    assert result.strength == 99


def test_its_repr():
    assert repr(search_for(99)) == (
        "CorrectionSearch(Echo, [SkipGain(49, 99, 149)], scan=False, num_samples=1000, "
        "batch_size=256, seed=0)"
    )


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module, got 3"),
        ({"schedule": "linear"}, TypeError, "schedule must be"),
        ({"sample": None}, TypeError, "sample must be callable"),
        ({"data": [1.0]}, TypeError, "data must be a tensor"),
        ({"data": torch.ones(3, 2, dtype=torch.long)}, TypeError, "data must be a floating"),
        ({"data": torch.ones(40)}, ValueError, r"data must have shape \[N, ...\]"),
        ({"data": torch.ones(31, 8)}, ValueError, r"data must have shape \[N, ...\]"),
        ({"data": torch.full((40, 2), math.nan)}, ValueError, "data must be finite"),
        ({"features": 3}, TypeError, "features must be callable"),
        ({"skips": []}, ValueError, "at least one"),
        ({"skips": 99}, TypeError, "strengths must be a sequence of numbers, got 99"),
        ({"skips": [0]}, ValueError, "without 0"),
        ({"skips": [9, 9]}, ValueError, "distinct"),
        ({"skips": [1000]}, ValueError, "below 1000"),
        ({"skips": [0.1]}, TypeError, "int skips"),
        ({"tau": 1.0}, ValueError, "tau must lie in"),
        ({"tau": 0}, ValueError, "tau must lie in"),
        ({"tau": 2.0}, ValueError, "tau must lie in"),
        ({"tau": "0.99"}, TypeError, "tau must be a real number"),
        ({"prediction_type": "eps"}, ValueError, "prediction_type must be one of"),
        ({"max_c2": -1.0}, ValueError, "max_c2 must lie in"),
        ({"num_samples": 31}, ValueError, "num_samples must be at least 32, got 31"),
        ({"num_samples": 64.0}, TypeError, "num_samples must be an int"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"noise_shape": (0,)}, ValueError, "noise_shape must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_a_bad_argument_is_named(settings, error, said):
    given = {"model": Echo(), "schedule": LINEAR, "sample": one_call, "data": data_for(0)}
    given |= settings
    with pytest.raises(error, match=said):
        gain_search(**given)


@pytest.mark.parametrize("corrections", [[], [3], [StartScaling], 3, StartScaling()])
def test_corrections_must_be_some(corrections):
    with pytest.raises(TypeError, match="corrections must be at least one Correction"):
        CorrectionSearch(Echo(), one_call, data_for(0), corrections)


def test_corrections_must_have_strengths():
    with pytest.raises(ValueError, match="corrections must each have strengths to try, got Corr"):
        CorrectionSearch(Echo(), one_call, data_for(0), [StartScaling(), Correction()])


def test_what_the_sampler_and_the_features_return_is_checked():
    def with_sampler(sample, **settings):
        return search_for(0, sample=sample, skips=[9], num_samples=32, **settings)

    with pytest.raises(ValueError, match=r"sample must return a tensor of shape \(1, 3\)"):
        with_sampler(lambda model, noise: noise[:, :2]).cost  # noqa: B018
    with pytest.raises(ValueError, match="sample must return a tensor"):
        with_sampler(lambda model, noise: None).recommend()
    with pytest.raises(ValueError, match="sample must call the model that it is given"):
        with_sampler(lambda model, noise: one_call(Echo(), noise)).recommend()
    with pytest.raises(ValueError, match="finite"):
        with_sampler(lambda model, noise: one_call(model, noise) * math.nan).recommend()
    with pytest.raises(ValueError, match=r"features must return a tensor of shape \[256, D\]"):
        with_sampler(one_call, features=lambda values: values.mean()).recommend()
    with pytest.raises(ValueError, match="features must return finite values for the data"):
        with_sampler(one_call, features=lambda values: values.log()).recommend()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_noise_is_of_the_models_dtype(dtype):
    search = search_for(99, data=data_for(99, count=200).to(dtype), num_samples=64)
    search.model = Linear(dtype)
    kinds = set()
    search.samplers["sample"] = lambda m, noise: kinds.add(noise.dtype) or one_call(m, noise)
    search.recommend()
    assert kinds == {dtype}
    half = torch.float32 if dtype == torch.float64 else dtype
    expected = next(search_for(99)._trials.noises(8, 0)).to(half).to(dtype)
    assert torch.equal(
        next(search._trials.noises(8, 0)), expected
    )  # the same numbers in every precision


def test_another_default_dtype_changes_nothing():
    search = search_for(99)
    search.model = Linear(torch.float32)
    expected = search.recommend()
    torch.set_default_dtype(torch.float64)
    try:
        assert str(search.recommend()) == str(expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_whose_weights_are_elsewhere():
    """Offloaded weights are on "meta" until they are called."""
    model, kinds = Echo(), set()
    model.weight = nn.Parameter(torch.zeros(1, device="meta", dtype=torch.bfloat16))

    def sample(model, noise):
        kinds.add((noise.dtype, noise.device.type))
        return one_call(model, noise.float())

    settings = {"tau": TAU, "skips": [49, 99], "num_samples": 500}
    search = gain_search(model, LINEAR, sample, data_for(99), **settings)
    assert search.recommend().strength == 99
    assert kinds == {(torch.bfloat16, "cpu")}
    # Without weights there is nothing to know it from: float32, whatever the data are.
    search = gain_search(Echo(), LINEAR, one_call, data_for(99).double(), **settings)
    assert next(search._trials.noises(4, 0)).dtype == torch.float32


def test_plain_samples_too_large_to_be_squared_are_an_error():
    def sample(model, noise):
        return one_call(model, noise).double() * 1e200

    with pytest.raises(ValueError, match="sample must return finite samples"):
        search_for(99, sample=sample).recommend()


def test_strengths_may_be_an_array():
    class Louder(Correction):
        name, none, strengths = "output times", 1.0, np.array([0.9, 1.1])

        def correct_model(self, model, strength):
            return ScaledModel(model, LINEAR, lambda t: torch.full_like(t, strength, dtype=float))

    search = CorrectionSearch(Echo(), one_call, data_for(0), [Louder()], num_samples=64)
    assert not search.recommend().improves


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_and_its_parts_left_in_their_modes(training, capsys):
    """Active dropout is noise that no sampler of a trained model has."""
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    model.train(training)
    model[1].eval()
    seen = set()

    def sample(model, noise):
        seen.add(tuple(module.training for module in model.modules()))
        return model(noise)

    class TakesTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x_t, t=None):
            return self.parts(x_t)

    whole = TakesTime().train(training)
    whole.parts[1].eval()
    search = CorrectionSearch(
        whole, sample, data_for(0), [StartScaling([1.2])], scan=False, num_samples=64
    )
    assert search.cost.calls == {"sample": 1}
    search.recommend()
    assert not any(mode for modes in seen for mode in modes)
    assert [m.training for m in model.modules()] == [training, training, False]
    assert whole.training is training
    assert ("into evaluation mode" in capsys.readouterr().err) is training
    with pytest.raises(ValueError, match="made no call"):
        CorrectionSearch(whole, lambda m, noise: noise, data_for(0), [StartScaling()]).recommend()
    assert whole.training is training
