"""The exact lab: its formulas against other ways to the same numbers."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from benchmarks.lab import best_pair as pairs
from benchmarks.lab import coverage, flow, holes, studies
from benchmarks.lab.linear import Imperfection, frechet, gains, output_variances
from benchmarks.lab.mixtures import ExactModel, Mixture
from benchmarks.quality.samplers import sample
from s2dm_loss import CorrectionSearch, ScaledModel
from s2dm_loss.sampling import EpsilonScaling, SkipGain, StartScaling, standard_corrections
from tests.helpers import recursions
from tests.strategies import LINEAR, Same, normal


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def some_mixture(size, count):
    weights = torch.arange(1, count + 1, dtype=torch.float64)
    means, variances = 1 + 2 * normal(count, size, seed=1), normal(count, size, seed=0).square()
    return Mixture(weights / weights.sum(), means, variances)


@pytest.mark.parametrize("alphas_cumprod", [0.0, 0.3, 0.99])
def test_epsilon_is_the_score_of_the_density(alphas_cumprod):
    mixture = some_mixture(size=3, count=2)
    noisy = alphas_cumprod * mixture.variances + (1 - alphas_cumprod)
    each = MultivariateNormal(math.sqrt(alphas_cumprod) * mixture.means, noisy.diag_embed())
    law = MixtureSameFamily(Categorical(mixture.weights), each)  # of √ᾱ x_0 + √(1-ᾱ) ε
    x = normal(20, 3, seed=3).requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    expected = -math.sqrt(1 - alphas_cumprod) * score
    torch.testing.assert_close(mixture.epsilon(x.detach(), alphas_cumprod), expected)


def test_a_warmer_posterior_tells_the_components_apart_less():
    ring = Mixture.ring()
    x = ring.means[:1] * 0.8
    exact, warm = ring.epsilon(x, 0.5), ring.epsilon(x, 0.5, temperature=50.0)
    # Without telling apart, the model points from the middle of the ring.
    single = ring.epsilon(x, 0.5, temperature=1e9)
    torch.testing.assert_close(single, math.sqrt(0.5) * x / (0.5 * 0.01 + 0.5))
    assert (warm - single).norm() < (exact - single).norm()


def test_draws_have_the_stated_moments():
    mixture = some_mixture(size=2, count=3)
    samples = mixture.draw(40_000, draw())
    torch.testing.assert_close(samples.mean(0), mixture.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(samples.T.cov(), mixture.covariance, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("skip", [0, 99])
def test_ddim_on_a_gaussian_is_its_recursion(skip):
    variances = torch.tensor([2.0, 0.3, 0.01], dtype=torch.float64)
    table = gains([skip])
    output = output_variances(variances, table, "ddim", 10)
    expected = recursions.ddim(variances, LINEAR.alphas_cumprod, 10, table[0]).square()
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "deis", "dpm++2m"])
def test_the_linear_push_is_what_sampling_gives(sampler):
    variances = torch.tensor([1.5, 0.2], dtype=torch.float64)
    model = ExactModel(Mixture.gaussian(variances), LINEAR)
    start = normal(4, 2, seed=0)
    samples = sample(ScaledModel.with_gain(model, LINEAR, 49), sampler, LINEAR, 8, start, draw())
    output = output_variances(variances, gains([49]), sampler, 8)[0]
    torch.testing.assert_close((samples / start).square(), output.expand(4, 2), rtol=1e-3, atol=0)


def test_many_steps_of_the_exact_model_are_exact():
    variances = torch.tensor([1.0, 0.1], dtype=torch.float64)
    output = output_variances(variances, gains([0]), "ddim", 1000)
    assert float(frechet(output, variances)) < 1e-4
    assert float(frechet(torch.zeros(1, 2).double(), variances)) == 1


@pytest.mark.parametrize("steps", [1, 4])
def test_an_independent_error_adds_its_variance(steps):
    # A DDIM step takes x to on_x · x + on_error · error; variances of independent errors add up.
    variances, added = torch.tensor([0.5], dtype=torch.float64), 0.0
    plain, noisy = (
        output_variances(variances, gains([0]), "ddim", steps, Imperfection(noise=noise))
        for noise in (0.0, 3.0)
    )
    levels = [*LINEAR.alphas_cumprod[:: 1000 // steps].flip(0).tolist(), 1.0]
    for a, b in pairwise(levels):
        on_error = (1 - b) ** 0.5 - (b * (1 - a) / a) ** 0.5
        on_x = (b / a) ** 0.5 + on_error * (1 - a) ** 0.5 / (a * 0.5 + 1 - a)
        added = on_x**2 * added + 9 * on_error**2
    assert float(noisy - plain) == pytest.approx(added, rel=1e-3)


def test_what_the_page_says_of_the_exact_model():
    """DDIM's few steps leave too little spread, which a gain mends; from 20 on PNDM needs none."""
    variances, best = studies.digit_variances(), []
    for sampler, steps in [("ddim", 10), ("ddim", 20), ("ddim", 50), ("pndm", 20)]:
        output = output_variances(variances, gains(range(0, 300, 5)), sampler, steps)
        distance = frechet(output, variances)
        best.append(int(distance.argmin()))
        if sampler == "ddim":
            assert output[0].sum() < variances.sum()
            assert distance.min() < 0.25 * distance[0]
    assert best[0] > best[1] > best[2] > best[3] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("variance", [1.0, 0.25])
@pytest.mark.parametrize("skip", [0.0, 0.05, 0.3])
def test_euler_on_the_straight_path_is_its_recursion(shift, variance, skip):
    found = flow.spread(variance, 10, skip=skip, shift=shift)
    assert found == pytest.approx(recursions.euler(variance, 10, skip, shift), rel=1e-6)


def test_more_steps_are_nearer_and_heun_is_nearer_still():
    euler = [1 - flow.spread(1.0, steps) for steps in (50, 100)]
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.05)  # first order
    heun = [1 - flow.spread(1.0, calls, method="heun") for calls in (50, 100)]
    assert heun[0] / heun[1] == pytest.approx(4, rel=0.1)  # second order
    assert heun[0] < 0.1 * euler[0]
    assert flow.spread(1.0, 2, method="heun") == 0  # its last step, here the only one, is Euler's


def test_what_the_page_says_of_euler():
    rows = holes.study("flow")["rows"]
    for row in rows:
        gained = list(row["gain"].values())
        assert row["plain"] < gained[0] < gained[-1]
        euler = recursions.euler(row["variance"], row["steps"], 0, row["shift"])
        unshifted = recursions.euler(row["variance"], row["steps"])
        assert row["plain"] == pytest.approx(euler, abs=1e-6)
        assert row["plain"] <= unshifted + 1e-6 < 1
    assert max(row["gain"]["0.3"] for row in rows if row["steps"] == 50) > 1.03


@pytest.mark.parametrize(("pooled", "degrees"), [(0, None), (4096, None), (0, 9)])
def test_the_truth_of_the_coverage_study(pooled, degrees):
    pool = coverage.ring_pool(5, pooled) if pooled else None
    drawn = replace(coverage.population(4, 5, pool), degrees=degrees)
    data, samples = (values[..., :-1] for values in drawn.draw(200_000, draw()))
    for rows, expected in zip(samples, drawn.distances(), strict=True):
        covariances = rows.T.cov(), data.T.cov()
        overlap = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.sqrt().sum()
        distance = (rows.mean(0) - data.mean(0)).square().sum() - 2 * overlap
        distance = distance + sum(c.trace() for c in covariances)
        assert float(distance) == pytest.approx(float(expected), rel=0.05 if degrees else 0.02)


def test_the_boundary_is_where_the_smallest_gain_changes_nothing():
    smallest = 1 + coverage.STRENGTHS.index(9)
    for pool in (None, coverage.ring_pool(5, 4096)):
        drawn = coverage.population(4, 5, pool).at_the_boundary(smallest)
        distances = drawn.distances() - drawn.distances()[0]
        assert float(distances[smallest]) == pytest.approx(0, abs=1e-12)
        assert all(float(d) > 1e-6 for k, d in enumerate(distances) if k not in (0, smallest))


def test_the_pool_is_what_the_sampler_returns():
    pool = coverage.ring_pool(5, 64)
    noise = normal(64, 2, seed=5)
    model = ScaledModel.with_gain(ExactModel(Mixture.ring(), LINEAR), LINEAR, 99)
    expected = sample(model, "ddim", LINEAR, 5, noise, draw())
    torch.testing.assert_close(pool[1 + coverage.STRENGTHS.index(99)], expected)


def test_repeats_are_counted():
    drawn = coverage.population(2, 10)
    found = coverage.repeated(drawn, 512, 20)
    truth = drawn.distances()[1:] - drawn.distances()[0]
    assert found["truth"] == pytest.approx(truth.tolist(), rel=1e-3)
    assert 15 <= found["joint"] <= 20
    assert (found["alarms"], sum(found["recommended"].values())) == (0, 20)
    assert found["recommended"][99] > 10  # the best of the four


def test_the_committed_results_are_complete():
    for name in studies.STUDIES:
        document = holes.study(name)
        assert (document["study"], document["command"].split()[-1]) == (name, name)
        assert len(document["versions"]["commit"]) == 40


def test_coverage_is_pooled_over_cells():
    rows = [{"joint": 90, "repeats": 100}, {"joint": 300, "repeats": 300}]
    assert holes.pooled(rows, "joint") == "97.5%"
    assert holes.shares(rows, "joint") == [0.9, 1.0]
    assert holes.pooled([], "joint") == ""
    law = holes.Law("x", [{"steps": 10, "boundary": {"joint": 1}, "joint": 2}, {"steps": 20}])
    assert law.boundary == [{"steps": 10, "boundary": {"joint": 1}, "joint": 1}]


def test_what_the_tables_say():
    rows = dict(holes.best_gains())
    found = holes.gaussian("ddim", 50)
    change = 100 * (found["best"] / found["plain"] - 1)
    assert rows["DDIM"][3] == f"{found['best_skip']}: {change:.0f} %"
    assert rows["PNDM"][1:] == ["none"] * 4

    row = holes.study("digits")["rows"][0]
    judged = row["searches"]["raw values"]["judged"]["images"]
    assert holes.searched("raw")[0] == judged / row["plain"]["images"] - 1
    assert 0 < holes.strength_gap(least=9) < holes.strength_gap(least=1)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_the_judge_is_exact_on_a_gaussian(name):
    judge, scaling = pairs.Judge(pairs.CASES["Gaussian, 10 steps"]), EpsilonScaling(pairs.SCHEDULE)
    for correction, strength, table, start in (
        (SkipGain(pairs.SCHEDULE), 99, gains([99]), 1),
        (scaling, 1.02, scaling.scale(torch.arange(1000), 1.02)[None], 1),
        (StartScaling(), 1.1, gains([0]), 1.1),
    ):
        outputs = start**2 * output_variances(pairs.VARIANCES, table, name, 10)[0]
        expected = float((outputs.sqrt() - pairs.VARIANCES.sqrt()).square().sum())
        assert judge(name, correction, strength) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_study_of_pairs(monkeypatch):
    for name, few in {"SAMPLERS": ("ddim", "pndm"), "HELD_OUT": 1024, "NUM_SAMPLES": 512}.items():
        monkeypatch.setattr(pairs, name, few)
    found = pairs.study(pairs.CASES["Gaussian, 10 steps"], repeats=2)
    assert found["best pair"][0].startswith("PNDM")
    assert found["best with DDIM"][0].startswith("DDIM")
    for rows in found["searches"].values():
        assert len(rows) == 2
        assert all(-0.01 <= row["left"] < 0.3 for row in rows)
    assert found["cost"]["several"] <= 2 * found["cost"]["one"]


def test_how_many_samples_a_search_draws():
    data = torch.randn(64, 2)
    for count in (1, 6):
        samplers = {str(n): lambda model, noise: model(noise, 0) for n in range(count)}
        search = CorrectionSearch(Same(), samplers, data, standard_corrections(LINEAR))
        drawn = sum(number * samples for number, samples in search.cost.stages)
        assert holes.search_samples(count) == f"{drawn:,}"
