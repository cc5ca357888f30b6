"""The exact lab: its formulas against other ways to the same numbers."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from benchmarks.lab import coverage, flow, holes, studies
from benchmarks.lab.linear import Imperfection, frechet, gains, output_variances
from benchmarks.lab.mixtures import ExactModel, Mixture
from benchmarks.quality.samplers import sample
from s2dm_loss import NoiseSchedule, ScaledModel, gain
from tests.helpers import recursions

LINEAR = NoiseSchedule.linear(1000)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def some_mixture(seed=0, size=3, count=2):
    variances = torch.rand(count, size, generator=draw(seed), dtype=torch.float64)
    means = 2 * torch.randn(count, size, generator=draw(seed + 1), dtype=torch.float64)
    weights = torch.arange(1, count + 1, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, variances)


def density(mixture, alphas_cumprod):
    """The law of √ᾱ x_0 + √(1-ᾱ) ε."""
    noisy = alphas_cumprod * mixture.variances + (1 - alphas_cumprod)
    means = math.sqrt(alphas_cumprod) * mixture.means
    each = MultivariateNormal(means, noisy.diag_embed())
    return MixtureSameFamily(Categorical(mixture.weights), each)


@pytest.mark.parametrize("alphas_cumprod", [0.0, 0.3, 0.99])
def test_epsilon_is_the_score_of_the_density(alphas_cumprod):
    mixture = some_mixture()
    x = torch.randn(20, 3, generator=draw(3), dtype=torch.float64).requires_grad_()
    (score,) = torch.autograd.grad(density(mixture, alphas_cumprod).log_prob(x).sum(), x)
    expected = -math.sqrt(1 - alphas_cumprod) * score
    torch.testing.assert_close(mixture.epsilon(x.detach(), alphas_cumprod), expected)


def test_a_warmer_posterior_tells_the_components_apart_less():
    ring = Mixture.ring()
    x = ring.means[:1] * 0.8
    exact, warm = ring.epsilon(x, 0.5), ring.epsilon(x, 0.5, temperature=50.0)
    # Without telling apart, the model points from the middle of the ring.
    single = math.sqrt(0.5) * x / (0.5 * 0.01 + 0.5)
    torch.testing.assert_close(ring.epsilon(x, 0.5, temperature=1e9), single)
    assert (warm - single).norm() < (exact - single).norm()


def test_draws_have_the_stated_moments():
    mixture = some_mixture(size=2, count=3)
    samples = mixture.draw(40_000, draw())
    spread = mixture.covariance.diagonal().sqrt()
    assert ((samples.mean(0) - mixture.mean).abs() < 5 * spread / 200).all()
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
    start = torch.randn(4, 2, generator=draw(), dtype=torch.float64)
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
    times = [1000 // steps * n for n in reversed(range(steps))]
    for t, before in zip(times, [*times[1:], None], strict=True):
        a = float(LINEAR.alphas_cumprod[t])
        b = 1.0 if before is None else float(LINEAR.alphas_cumprod[before])
        on_error = (1 - b) ** 0.5 - (b * (1 - a) / a) ** 0.5
        on_x = (b / a) ** 0.5 + on_error * (1 - a) ** 0.5 / (a * 0.5 + 1 - a)
        added = on_x**2 * added + 9 * on_error**2
    assert float(noisy - plain) == pytest.approx(added, rel=1e-3)


def test_what_the_page_says_of_the_exact_model():
    """DDIM's few steps leave too little spread, which a gain mends; from 20 on PNDM needs none."""
    variances = studies.digit_variances()
    table = gains(range(0, 300, 5))
    best = {}
    for sampler, steps in [("ddim", 10), ("ddim", 20), ("ddim", 50), ("pndm", 20)]:
        output = output_variances(variances, table, sampler, steps)
        distance = frechet(output, variances)
        best[sampler, steps] = 5 * int(distance.argmin())
        if sampler == "ddim":
            assert output[0].sum() < variances.sum()
            assert distance.min() < 0.25 * distance[0]
    assert best["ddim", 10] > best["ddim", 20] > best["ddim", 50] > 0
    assert best["pndm", 20] == 0


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("variance", [1.0, 0.25])
@pytest.mark.parametrize("skip", [0.0, 0.05, 0.3])
def test_euler_on_the_straight_path_is_its_recursion(shift, variance, skip):
    found = flow.spread(variance, 10, skip=skip, shift=shift)
    assert found == pytest.approx(recursions.euler(variance, 10, skip, shift), rel=1e-6)


def test_more_steps_are_nearer_and_heun_is_nearer_still():
    euler = [1 - flow.spread(1.0, steps) for steps in (50, 100)]
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.05)  # first order
    assert abs(1 - flow.spread(1.0, 50, method="heun")) < 0.01 * euler[0]


def test_what_the_page_says_of_euler():
    rows = holes.study("flow")["rows"]
    plain = {(row["shift"], row["variance"], row["steps"]): row["plain"] for row in rows}
    for (shift, variance, steps), spread in plain.items():
        assert spread < 1
        assert shift == 1 or spread < plain[1.0, variance, steps]
        assert spread == pytest.approx(recursions.euler(variance, steps, 0, shift), abs=1e-6)
    for row in rows:
        gained = list(row["gain"].values())
        assert row["plain"] < gained[0] < gained[-1]
    assert max(row["gain"]["0.3"] for row in rows if row["steps"] == 50) > 1.03


@pytest.mark.parametrize(("pooled", "degrees"), [(0, None), (4096, None), (0, 9)])
def test_the_truth_of_the_coverage_study(pooled, degrees):
    pool = coverage.ring_pool(5, pooled) if pooled else None
    drawn = replace(coverage.population(4, 5, pool), degrees=degrees)
    truth = drawn.distances()
    data, samples = drawn.draw(200_000, draw())
    assert samples.shape == (1 + len(coverage.STRENGTHS), 200_000, 5)
    for rows, expected in zip(samples[..., :-1], truth, strict=True):
        covariances = rows.T.cov(), data[:, :-1].T.cov()
        overlap = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.sqrt().sum()
        distance = (rows.mean(0) - data[:, :-1].mean(0)).square().sum() - 2 * overlap
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
    noise = torch.randn(64, 2, generator=draw(5), dtype=torch.float64)
    model = ScaledModel.with_gain(ExactModel(Mixture.ring(), LINEAR), LINEAR, 99)
    expected = sample(model, "ddim", LINEAR, 5, noise, draw())
    torch.testing.assert_close(pool[1 + coverage.STRENGTHS.index(99)], expected)


def test_repeats_are_counted():
    drawn = coverage.population(2, 10)
    found = coverage.repeated(drawn, 512, 20)
    assert found["truth"] == [
        float(f"{d:.4g}") for d in (drawn.distances()[1:] - drawn.distances()[0])
    ]
    assert 15 <= found["joint"] <= 20
    assert found["alarms"] == 0
    assert sum(found["recommended"].values()) == 20
    assert found["recommended"][99] > 10  # the best of the four


def test_gains_hold_the_librarys_gain():
    plain, gained, inverse = gains((0, 99, -99))
    assert torch.equal(plain, torch.ones(1000).double())
    assert torch.equal(gained, gain(LINEAR, 99))
    assert torch.equal(inverse, 1 / gained)


def test_the_committed_results_are_complete():
    for name in studies.STUDIES:
        document = json.loads((holes.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert document["study"] == name
        assert document["command"].endswith(name)
        assert len(document["versions"]["commit"]) == 40


def test_coverage_is_pooled_over_cells():
    rows = [{"joint": 90, "repeats": 100}, {"joint": 300, "repeats": 300}]
    assert holes.pooled(rows, "joint") == "97.5%"
    assert holes.shares(rows, "joint") == [0.9, 1.0]
    assert holes.pooled([], "joint") == ""
    law = holes.Law("x", [{"steps": 10, "boundary": {"joint": 1}, "joint": 2}, {"steps": 20}])
    assert law.boundary == [{"steps": 10, "boundary": {"joint": 1}, "joint": 1}]


def test_rows_of_the_table_of_best_gains():
    rows = dict(holes.best_gains())
    assert [len(cells) for cells in rows.values()] == [5] * len(studies.SAMPLERS)
    found = holes.gaussian("ddim", 50)
    change = 100 * (found["best"] / found["plain"] - 1)
    assert rows["DDIM"][3] == f"{found['best_skip']}: {change:.0f} %"
    assert rows["PNDM"][1:] == ["none"] * 4


def test_what_a_search_changed_is_over_the_plain_model():
    row = holes.study("digits")["rows"][0]
    judged = row["searches"]["raw values"]["judged"]["images"]
    assert holes.searched("raw")[0] == judged / row["plain"]["images"] - 1
    assert len(holes.searched("features")) == 9


def test_skips_at_their_best_tau_differ_little():
    rows = holes.study("strength")["rows"]
    assert {len(row["best_tau_of_skip"]) for row in rows} == {5}
    assert 0 < holes.strength_gap(least=9) < holes.strength_gap(least=1)
