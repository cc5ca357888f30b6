"""c², A and s over random schedules, against formulas that the code does not use."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet
from s2dm_loss.coefficients import Coefficients, coefficients
from tests.strategies import betas, schedules, schedules_with_skip, seeds, taus, timesteps


def c2_of(schedule, skip, **options):
    return coefficients(schedule, skip, max_c2=math.inf, **options).c2


def rounding(schedule):
    """Bound on the error of c² per unit of 1 + c²: cumsum's rounding of log ᾱ."""
    size = float(schedule.log_alphas_cumprod[-1].abs())
    return 1e-15 * (1 + size) * (4 + schedule.num_train_timesteps**0.5)


@pytest.mark.parametrize("estimator", ["expected", "fresh", "shared"])
def test_the_one_quadratic_is_the_two_terms(estimator):
    """At numbers ε̂, ε and ζ, of which a mean over one element is the number itself."""
    tau, c, c2 = 0.7, 0.5, 0.3  # c² is a mean of its own where there are several skips
    at_t = Coefficients(*(torch.tensor(x, dtype=torch.float64) for x in (tau, c, c2)), estimator)
    weight, s, g = (float(x) for x in (at_t.weight, at_t.gain, at_t.skip_gain))
    for eps, zeta in ((0.0, 0.0), (-0.5, 0.25), (3.0, -2.0)):
        z = {"fresh": zeta, "expected": 0.0, "shared": eps}[estimator]
        # What ε̂ does not touch, left out: a parabola is known by its values at three places.
        values = [
            tau * (x - eps) ** 2 + (1 - tau) * (c2 * x**2 - 2 * c * x * z) for x in (-1, 0, 1)
        ]
        a, b = (values[0] + values[2]) / 2 - values[1], (values[2] - values[0]) / 2
        assert weight == pytest.approx(a, rel=1e-14)
        assert s * eps + g * zeta == pytest.approx(-b / (2 * a), rel=1e-14, abs=1e-15)
    assert float(at_t.gain_excess) == pytest.approx(s - 1, rel=1e-13)


@given(betas(min_size=2, max_size=60), st.data())
def test_c2_from_beta_products_and_from_snr_agree(values, data):
    schedule = NoiseSchedule.from_betas(values)
    k = data.draw(st.integers(1, len(values) - 1))
    t = data.draw(st.integers(k, len(values) - 1))
    with mpmath.workdps(50):
        alphas = [1 - mpmath.mpf(beta) for beta in values]
        from_betas = 1 / mpmath.fprod(alphas[t - k + 1 : t + 1]) - 1
        bars = [mpmath.fprod(alphas[: s + 1]) for s in (t, t - k)]
        snr_t, snr_s = (bar / (1 - bar) for bar in bars)
        from_snr = (snr_s / (1 + snr_s)) / (snr_t / (1 + snr_t)) - 1
        assert abs(from_betas / from_snr - 1) < 1e-30
        expected = float(from_betas)
    c2 = float(c2_of(schedule, k)[t])
    assert c2 == pytest.approx(expected, rel=1e-9, abs=rounding(schedule) * (1 + expected))
    # and from the float64 table of ᾱ, by the formula as printed
    bar = schedule.alphas_cumprod
    alpha_skip = float(bar[t] / bar[t - k])
    if alpha_skip > 1e-300:
        printed = (1 - alpha_skip) / alpha_skip
        assert c2 == pytest.approx(printed, rel=1e-9, abs=1e-12 * (1 + printed))


@given(schedules())
def test_c2_grows_with_k_from_zero(schedule):
    count = schedule.num_train_timesteps
    table = schedule.log_alphas_cumprod
    assume(float(table[-1]) > -300)
    previous = torch.zeros(count, dtype=torch.float64)
    for k in sorted({1, 2, count // 3, count - 1} & set(range(1, count))):
        c2 = c2_of(schedule, k)
        assert (c2[:k] == 0).all()
        assert (c2[k:] >= previous[k:]).all()
        assert (c2[k:] > 0).all() or (table.diff() == 0).any()
        previous = c2


@given(schedules(min_size=3), st.data())
def test_alpha_skip_composes(schedule, data):
    count = schedule.num_train_timesteps
    assume(float(schedule.log_alphas_cumprod[-1]) > -300)
    a = data.draw(st.integers(1, count - 2))
    b = data.draw(st.integers(1, count - 1 - a))
    t = data.draw(st.integers(a + b, count - 1))
    # 1 + c² = 1 / α_skip, so t-a-b → t is the product of t-a-b → t-b and t-b → t.
    whole = 1 + float(c2_of(schedule, a + b)[t])
    parts = (1 + float(c2_of(schedule, a)[t - b])) * (1 + float(c2_of(schedule, b)[t]))
    assert whole == pytest.approx(parts, rel=1e-12)


@given(schedules_with_skip(), taus)
def test_weight_and_gain_of_fresh(schedule_and_skip, tau):
    schedule, k = schedule_and_skip
    table = coefficients(schedule, k, tau=tau)
    assert (table.weight >= tau * (1 - 1e-15)).all()
    assert (table.gain > 0).all()
    assert (table.gain <= 1).all()
    assert (table.weight[:k] == 1).all()
    assert (table.gain[:k] == 1).all()
    np.testing.assert_allclose((table.weight * table.gain)[k:].numpy(), tau, rtol=1e-14)
    if tau == 1:
        assert (table.weight == 1).all()


@given(schedules_with_skip(), taus)
def test_gain_of_shared_is_above_one_exactly_where_c_is_below(schedule_and_skip, tau):
    schedule, k = schedule_and_skip
    table = coefficients(schedule, k, tau=tau, estimator="shared")
    c, s = table.c[k:], table.gain[k:]
    weighs = (1 - tau) * c * (1 - c)  # s - 1 = (1-τ) c (1-c) / A
    np.testing.assert_allclose((s - 1).numpy(), (weighs / table.weight[k:]).numpy(), atol=1e-14)


@given(schedules(min_size=4), seeds)
def test_several_skips_average_c_and_c2_over_the_valid_ones(schedule, seed):
    count = schedule.num_train_timesteps
    skips = sorted(set((timesteps(count - 1, 3, seed) + 1).tolist()))
    several = coefficients(schedule, skips)
    each = [coefficients(schedule, k) for k in skips]
    for t in {0, 1, skips[0], skips[-1], count // 2, count - 1}:
        valid = [one for one, k in zip(each, skips, strict=True) if t >= k]
        mean_c2 = float(np.mean([float(one.c2[t]) for one in valid])) if valid else 0.0
        mean_c = float(np.mean([float(one.c[t]) for one in valid])) if valid else 0.0
        assert float(several.c2[t]) == pytest.approx(mean_c2, rel=1e-13)
        assert float(several.c[t]) == pytest.approx(mean_c, rel=1e-13)
        assert (float(several.tau[t]) < 1) == bool(valid)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_default_bound_leaves_the_published_schedules_bit_for_bit(name):
    schedule = getattr(NoiseSchedule, name)(1000)
    for k in range(1, 101):
        assert torch.equal(coefficients(schedule, k).c2, c2_of(schedule, k))
        assert coefficients(schedule, k).c2.max() < 7


def test_published_figures():
    # METHOD: λ at its largest on the linear schedule with τ = 0.99.
    schedule = NoiseSchedule.linear(1000)
    for k, largest in {1: 1.0002, 9: 1.0020, 49: 1.0164, 99: 1.058}.items():
        assert float(1 / coefficients(schedule, k).gain.min()) == pytest.approx(
            largest, abs=5e-5 if k < 99 else 5e-4
        )


def test_the_bound_where_the_schedule_ends_in_noise():
    cosine = NoiseSchedule.cosine(1000)
    assert c2_of(cosine, 10).max() > 9e4
    assert coefficients(cosine, 10).c2.max() == 100
    zero_snr = NoiseSchedule.linear(1000).rescale_zero_terminal_snr()
    assert c2_of(zero_snr, 9)[-1] == math.inf
    table = coefficients(zero_snr, 9)
    assert table.c2[-1] == 100
    assert table.weight.max() == pytest.approx(1.99)
    assert table.gain.min() == pytest.approx(0.99 / 1.99)
    assert coefficients(zero_snr, 9, max_c2=4.0).weight.max() == pytest.approx(0.99 + 0.01 * 4)


def test_continuous_c_is_the_discrete_one_in_the_limit():
    """The VP-SDE's β(t) dt is the linear schedule's β (Song et al., arXiv 2011.13456)."""
    k, count = 9, 1000
    discrete = coefficients(NoiseSchedule.linear(count), k).c[k:]
    t = torch.arange(k + 1, count + 1, dtype=torch.float64) / count  # β_i acts up to (i+1)/N
    continuous = coefficients(ContinuousSchedule.vp(), k / count, t=t).c
    assert (continuous / discrete - 1).abs().median() < 3.5e-3


def test_sub_vp_c_spans_what_was_measured():
    t = torch.linspace(0.009, 1, 10_000, dtype=torch.float64)
    c = coefficients(ContinuousSchedule.sub_vp(), 0.009, t=t).c[1:]
    assert float(c.min()) == pytest.approx(0.002, abs=3e-4)
    assert float(c.max()) == pytest.approx(0.443, abs=1e-3)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.95])
def test_flow_c_from_the_transition_of_its_own_path(t):
    """x_t = r x_s + noise of variance b_t² - r² b_s², from any Gaussian path."""
    delta = 0.1
    c2 = float(coefficients(ContinuousSchedule.flow(), delta, t=torch.tensor([t]).double()).c2)
    snr = [((1 - u) / u) ** 2 for u in (t, t - delta)]
    bar = [x / (1 + x) for x in snr]
    assert c2 == pytest.approx(bar[1] / bar[0] - 1, rel=1e-6)


def test_skip_sets_of_a_sampler():
    schedule = NoiseSchedule.linear(1000)
    by_steps = coefficients(schedule, SkipSet.for_sampling_steps(50))
    assert torch.equal(by_steps.c2, coefficients(schedule, 20).c2)
    visited = coefficients(schedule, SkipSet.from_timesteps(range(0, 1000, 20)))
    bar = schedule.alphas_cumprod
    for t in (1, 19, 20, 21, 40, 41, 999):
        before = (t - 1) // 20 * 20
        assert float(visited.c2[t]) == pytest.approx(float(bar[before] / bar[t]) - 1, rel=1e-9)
    assert visited.c2[0] == 0
    assert visited.tau[0] == 1


def test_tau_zero_and_a_flat_schedule_are_finite():
    table = coefficients(NoiseSchedule([-1.0, -1.0, -2.0]), 1, tau=0.0)
    assert table.weight.tolist() == [1.0, 0.0, pytest.approx(math.e - 1)]
    # Where nothing weighs, any s will do; it is that of no skip, in every form.
    assert (table.gain[1], table.gain_excess[1], table.skip_gain[1]) == (1, 0, 0)
    assert table.gain[2] == 0


def test_a_path_that_rises_by_its_rounding_skips_nothing():
    class Flat(NoiseSchedule):
        def log_alphas_cumprod_at(self, t):
            return 1e-16 * t.double() - 1

    schedule = Flat([-1.0] * 9)
    assert schedule.log_alphas_cumprod_at(torch.arange(9)).unique().numel() > 1
    at_t = coefficients(schedule, 3)
    assert at_t.c.tolist() == at_t.c2.tolist() == [0.0] * 9


def test_coefficients_stay_as_they_were_made():
    with pytest.raises(AttributeError, match="cannot assign to field 'tau'"):
        coefficients(NoiseSchedule.linear(1000), 9).tau = 1.0


@pytest.mark.parametrize("estimator", ["expected", "fresh", "shared"])
def test_the_limit_without_a_bound_where_there_is_no_signal(estimator):
    """As c grows, (τ + (1-τ) c) / (τ + (1-τ) c²) and (1-τ) c / A fall to 0."""
    schedule = NoiseSchedule.linear(1000).rescale_zero_terminal_snr()
    at_t = coefficients(schedule, 9, estimator=estimator, max_c2=math.inf)
    assert at_t.c2[-1] == math.inf
    assert (at_t.gain[-1], at_t.gain_excess[-1], at_t.skip_gain[-1]) == (0, -1, 0)


@pytest.mark.parametrize(("weight", "bound"), [(0.25, 3.0), (1.5, 2.0), (6.0, 0.5)])
def test_the_bound_of_a_weighting(weight, bound):
    """Neither c² nor c² w is above max_c2 = 3."""
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.1])
    found = coefficients(schedule, 1, max_c2=3.0, weighting=lambda log_snr: log_snr * 0 + weight)
    assert found.c2[1].item() == pytest.approx(bound, rel=1e-15)
    assert found.c[1].item() == pytest.approx(math.sqrt(bound), rel=1e-15)
