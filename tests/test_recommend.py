"""The search for a gain.

Most tests use a sampler whose best gain is known by construction: one model call at t = 999 with a
model that returns its input, so that the samples are s(999) times the noise.  Data of standard
deviation s(999) at k = 99 then make k = 99 the exact answer, and unit data make "no gain" the one.
"""

import math
import pickle

import pytest
import torch
from torch import nn

from s2dm_loss import (
    ContinuousSchedule,
    GainRecommendation,
    GainSearch,
    NoiseSchedule,
    ShrunkModel,
    gain,
    recommend,
)
from s2dm_loss.recommend import DEFAULT_SHARES

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


def one_call(model, noise):
    return model(noise, torch.full((len(noise),), 999))


def s_of(skip):
    return float(gain(LINEAR, skip, t=LAST, tau=TAU))


def data_for(skip, shape=(3,), count=2000, seed=1):
    """Data that samples of `one_call` with this skip match."""
    normal = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return normal * s_of(skip) if skip else normal


def search_for(skip, **settings):
    settings = {"sample": one_call, "skips": [49, 99, 149], "num_samples": 1000} | settings
    settings = {"data": data_for(skip), "tau": TAU} | settings
    return GainSearch(Echo(), LINEAR, **settings)


@pytest.mark.parametrize("skip", [49, 99, 149])
def test_it_finds_the_skip_that_made_the_data(skip):
    result = search_for(skip).recommend()
    assert result.skip == skip == result.best.skip
    assert result.best.high < 0
    assert result.skip_interval[0] <= skip <= result.skip_interval[1]
    assert result.at_edge == (skip == 149)


def test_it_recommends_no_gain_where_none_helps():
    result = search_for(0).recommend()
    assert result.skip is None
    assert result.best.skip == 0
    assert [c.skip for c in result.candidates] == [0, 49, 99, 149]
    model = Echo()
    assert result.apply(model) is model
    assert "skip=None" in repr(result)


def test_a_better_gain_within_the_noise_is_not_recommended():
    # 9 is the truth, but it shrinks by 2 % only, which 40 samples cannot tell from nothing.
    result = search_for(9, skips=[9], num_samples=40, seed=0).recommend()
    assert result.best.skip == 9
    assert result.best.high >= 0
    assert result.skip is None


def test_the_distance_is_the_frechet_distance_of_two_gaussians():
    data = data_for(0, shape=(2,)) * torch.tensor([1.0, 3.0]) + torch.tensor([0.0, 5.0])
    search = GainSearch(Echo(), LINEAR, one_call, data, skips=[99], num_samples=4000)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).double()
    plain = search.recommend().candidates[0]
    data = data.double()
    # The axes of both are those of the data but for sampling noise, so tr (C_x C_y)^½ = Σ √(λλ').
    product = noise.T.cov() @ data.T.cov()
    trace = torch.linalg.eigvals(product).real.sqrt().sum()
    expected = (noise.mean(0) - data.mean(0)).square().sum() + noise.T.cov().trace()
    expected = expected + data.T.cov().trace() - 2 * trace
    assert plain.distance == pytest.approx(float(expected), rel=1e-9)
    assert plain.distance == pytest.approx(25 + 4, rel=0.05)


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

    def deviation(skip):
        x = 1.0
        for t in times:
            at = torch.tensor([t])
            s = float(gain(LINEAR, skip, t=at)) if skip else 1.0
            x = step(x, s * float(LINEAR.alpha_sigma(at)[1]) * x, t)
        return x

    data = torch.randn(2000, 2, generator=torch.Generator().manual_seed(3))
    result = GainSearch(Exact(), LINEAR, ddim, data, num_samples=1024, batch_size=1024).recommend()
    loss = {c.skip: (deviation(c.skip) - 1) ** 2 for c in result.candidates}
    assert deviation(0) == pytest.approx(0.832, abs=0.001)  # too little spread
    assert loss[result.skip] < 0.1 * loss[0]
    assert min(loss, key=loss.get) in (99, 124)
    assert result.skip in (99, 124)


def test_more_dimensions_than_axes(monkeypatch):
    # The spread is in a few directions, as it is for images, and so is what the search follows.
    monkeypatch.setattr(recommend, "MAX_AXES", 8)
    scale = torch.linspace(0, -6, 40).exp()
    turn = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0))).Q
    data = (data_for(99, shape=(40,), count=500) * scale) @ turn

    def sample(model, noise):
        return (one_call(model, noise) * scale) @ turn

    result = search_for(99, sample=sample, data=data, num_samples=256).recommend()
    assert result.skip == 99
    # All but the eight axes is in the distance too: nothing of the spread is lost.
    plain = result.candidates[0].distance
    assert plain == pytest.approx((1 - s_of(99)) ** 2 * float(scale.square().sum()), rel=0.2)


def test_the_same_seed_gives_the_same_answer():
    first, again = (search_for(99, seed=3).recommend() for _ in range(2))
    other = search_for(99, seed=4).recommend()
    assert first.candidates == again.candidates
    assert first.candidates != other.candidates


def test_intervals_hold_the_truth():
    s = s_of(99)
    truth = {k: 2 * (s_of(k) - s) ** 2 - 2 * (1 - s) ** 2 for k in (49, 149)}
    held = 0
    for seed in range(20):
        data = data_for(99, shape=(2,), count=500, seed=100 + seed)
        search = search_for(99, data=data, skips=list(truth), num_samples=500, seed=seed)
        plain, *others = search.recommend().candidates
        assert (plain.low, plain.high) == (0, 0)
        held += all(c.low <= truth[c.skip] <= c.high for c in others)
    assert held >= 17  # of 20, where 95 % are promised


@pytest.mark.parametrize(("num_samples", "batch_size", "batches"), [(100, 64, 2), (64, 64, 1)])
def test_the_stated_cost_is_the_cost(num_samples, batch_size, batches):
    model = Echo()

    def three_calls(model, noise):
        for _ in range(3):
            x = one_call(model, noise)
        return x

    search = GainSearch(
        model,
        LINEAR,
        three_calls,
        data_for(0),
        skips=[9, 99],
        num_samples=num_samples,
        batch_size=batch_size,
    )
    assert model.calls == 0
    cost = search.cost
    assert model.calls == cost.calls_per_run == 3
    assert (cost.candidates, cost.runs) == (3, 3 * batches)
    assert cost.model_calls == 9 * batches
    assert cost.sample_evaluations == 9 * num_samples
    assert f"{9 * batches} model calls" in str(cost)
    model.calls = 0
    shown = []

    def progress(runs):
        shown.append(len(runs))
        return runs

    result = search.recommend(progress)
    assert model.calls == cost.model_calls
    assert shown == [cost.runs]
    assert result.cost == cost


def test_stochastic_samplers_meet_the_same_numbers_and_the_global_state_is_kept():
    draws = []

    def stochastic(model, noise):
        draws.append(torch.randn(2))
        return one_call(model, noise)

    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    search = GainSearch(
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


def test_a_candidate_that_overflows_loses_and_says_so():
    def fragile(model, noise):
        x = one_call(model, noise)
        return x * math.inf if float(x.std() / noise.std()) < 0.5 else x

    result = search_for(99, sample=fragile, skips=[99, 199]).recommend()
    assert result.skip == 99
    assert result.candidates[-1].distance == math.inf
    assert result.candidates[-1].best_share == 0
    assert "inf" in str(result)


def test_the_recommended_model():
    result = search_for(99).recommend()
    shrunk = result.apply(Echo())
    assert isinstance(shrunk, ShrunkModel)
    x = torch.randn(4, 3)
    t = torch.tensor([999] * 4)
    assert torch.allclose(shrunk(x, t), s_of(99) * x)


def test_a_smaller_tau_wants_a_smaller_skip():
    # (1-τ)/τ is 9 times larger at 0.5 than at 0.9, so a much smaller k does the same.
    result = search_for(99, skips=[9, 29, 99], tau=0.5).recommend()
    assert result.skip == 29
    assert float(gain(LINEAR, 29, t=LAST, tau=0.5)) == pytest.approx(s_of(99), abs=0.1)


def test_default_skips_scale_with_the_schedule():
    assert search_for(0, skips=None).skips == (9, 29, 49, 69, 99, 124, 149, 199, 249)
    short = GainSearch(Echo(), NoiseSchedule.linear(20), one_call, data_for(0))
    assert short.skips == (1, 2, 3, 4)
    flow = GainSearch(Echo(), ContinuousSchedule.flow(), one_call, data_for(0))
    assert flow.skips == DEFAULT_SHARES


def test_continuous_time():
    flow = ContinuousSchedule.flow()
    at = torch.tensor([0.5])
    s = float(gain(flow, 0.25, t=at, tau=TAU))

    def sample(model, noise):
        return model(noise, torch.full((len(noise),), 0.5))

    result = GainSearch(
        Echo(), flow, sample, data_for(0) * s, skips=[0.1, 0.25, 0.4], tau=TAU
    ).recommend()
    assert result.skip == 0.25


def test_noise_of_another_shape_than_the_data():
    def decode(model, noise):
        return one_call(model, noise).flatten(1)

    result = search_for(
        99, sample=decode, data=data_for(99, (4,)), skips=[99], noise_shape=(2, 2)
    ).recommend()
    assert result.skip == 99


def test_large_data_are_subsampled():
    search = search_for(99, data=data_for(99, count=5000), skips=[99], num_samples=500)
    assert len(search._drawn_data()) == 2000
    assert search.recommend().candidates == search.recommend().candidates


def test_what_it_says():
    result = search_for(99).recommend()
    assert repr(result).startswith("GainRecommendation(skip=99, tau=0.9: Fréchet distance ")
    assert "best skip within [" in repr(result)
    table = str(result).splitlines()
    assert len(table) == 2 + 4
    assert [line.endswith("<- recommended") for line in table[2:]] == [False, False, True, False]
    assert isinstance(pickle.loads(pickle.dumps(result)), GainRecommendation)  # noqa: S301


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"model": 3}, TypeError, "model must be an nn.Module, got 3"),
        ({"schedule": "linear"}, TypeError, "schedule must be"),
        ({"sample": None}, TypeError, "sample must be callable"),
        ({"data": [1.0]}, TypeError, "data must be a tensor"),
        ({"data": torch.ones(3, 2, dtype=torch.long)}, TypeError, "data must be a floating"),
        ({"data": torch.ones(8)}, ValueError, r"data must have shape \[N, ...\]"),
        ({"data": torch.ones(1, 8)}, ValueError, r"data must have shape \[N, ...\]"),
        ({"data": torch.full((8, 2), math.nan)}, ValueError, "data must be finite"),
        ({"skips": []}, ValueError, "at least one"),
        ({"skips": [0]}, ValueError, "positive"),
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
        GainSearch(**given)


def test_what_the_sampler_returns_is_checked():
    def with_sampler(sample):
        return GainSearch(Echo(), LINEAR, sample, data_for(0), skips=[9], num_samples=32)

    with pytest.raises(ValueError, match=r"sample must return a tensor of shape \(1, 3\)"):
        with_sampler(lambda model, noise: noise[:, :2]).cost  # noqa: B018
    with pytest.raises(ValueError, match="sample must return a tensor"):
        with_sampler(lambda model, noise: None).recommend()
    with pytest.raises(ValueError, match="finite"):
        with_sampler(lambda model, noise: noise * math.nan).recommend()
