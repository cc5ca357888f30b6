"""c², A and s over random schedules, against formulas that the code does not use."""

import math
import re

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2dm_loss import ContinuousSchedule, NoiseSchedule, ScaledModel, SkipSet, SkipStepLoss
from s2dm_loss.coefficients import Coefficients, coefficients
from tests.strategies import COSINE, ESTIMATORS, FLOW, LINEAR, VP, ZERO_SNR, betas


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_one_quadratic_is_the_two_terms(estimator):
    """At numbers ε̂, ε and ζ, of which a mean over one element is the number itself."""
    tau, c, c2 = 0.7, 0.5, 0.3  # c² is a mean of its own where there are several skips
    at_t = Coefficients(*(torch.tensor(x, dtype=torch.float64) for x in (tau, c, c2)), estimator)
    weight, s, g = (float(x) for x in (at_t.weight, at_t.gain, at_t.skip_gain))
    for eps, zeta in ((0.0, 0.0), (-0.5, 0.25), (3.0, -2.0)):
        z = {"fresh": zeta, "expected": 0.0, "shared": eps}[estimator]
        # What ε̂ does not touch, left out: a parabola is known by its values at three places.
        values = [tau * (x - eps) ** 2 + (1 - tau) * x * (c2 * x - 2 * c * z) for x in (-1, 0, 1)]
        a, b = (values[0] + values[2]) / 2 - values[1], (values[2] - values[0]) / 2
        assert weight == pytest.approx(a, rel=1e-14)
        assert s * eps + g * zeta == pytest.approx(-b / (2 * a), rel=1e-14, abs=1e-15)
    assert float(at_t.gain_minus_one) == pytest.approx(s - 1, rel=1e-13)


@given(betas(min_size=2, max_size=60), st.data())
def test_c2_from_products_of_betas(values, data):
    schedule = NoiseSchedule.from_betas(values)
    k = data.draw(st.integers(1, len(values) - 1))
    t = data.draw(st.integers(k, len(values) - 1))
    with mpmath.workdps(50):
        alphas = [1 - mpmath.mpf(beta) for beta in values[t - k + 1 : t + 1]]
        expected = float(1 / mpmath.fprod(alphas) - 1)
    size = float(schedule.log_alphas_cumprod[-1].abs())
    rounding = 1e-15 * (1 + size) * (4 + len(values) ** 0.5)  # cumsum's of log ᾱ
    c2 = coefficients(schedule, k, max_c2=math.inf).c2
    assert float(c2[t]) == pytest.approx(expected, rel=1e-9, abs=rounding * (1 + expected))
    assert (c2[:k] == 0).all()


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_default_bound_leaves_the_published_schedules_bit_for_bit(name):
    schedule = getattr(NoiseSchedule, name)(1000)
    for k in range(1, 101):
        found = coefficients(schedule, k).c2
        assert torch.equal(found, coefficients(schedule, k, max_c2=math.inf).c2)
        assert found.max() < 7


def test_published_figures():
    """λ at its largest on the linear schedule with τ = 0.99 (METHOD)."""
    for k, largest in {1: 1.0002, 9: 1.0020, 49: 1.0164, 99: 1.058}.items():
        found = float(1 / coefficients(LINEAR, k).gain.min())
        assert found == pytest.approx(largest, abs=5e-5 if k < 99 else 5e-4)


def test_the_bound_where_the_schedule_ends_in_noise():
    table = coefficients(ZERO_SNR, 9)
    assert table.c2[-1] == 100
    assert table.weight.max() == pytest.approx(1.99)
    assert table.gain.min() == pytest.approx(0.99 / 1.99)


def test_continuous_c_is_the_discrete_one_in_the_limit():
    """The VP-SDE's β(t) dt is the linear schedule's β (Song et al., arXiv 2011.13456)."""
    k, count = 9, 1000
    t = torch.arange(k + 1, count + 1, dtype=torch.float64) / count  # β_i acts up to (i+1)/N
    continuous = coefficients(VP, k / count, t=t).c
    assert (continuous / coefficients(LINEAR, k).c[k:] - 1).abs().median() < 3.5e-3


def test_tau_zero_and_a_flat_schedule_are_finite():
    table = coefficients(NoiseSchedule([-1.0, -1.0, -2.0]), 1, tau=0.0)
    assert table.weight.tolist() == [1.0, 0.0, pytest.approx(math.e - 1)]
    # Where nothing weighs, any s will do; it is that of no skip, in every form.
    assert (table.gain[1], table.gain_minus_one[1], table.skip_gain[1]) == (1, 0, 0)
    assert table.gain[2] == 0


def test_a_path_that_rises_by_its_rounding_skips_nothing():
    class Flat(NoiseSchedule):
        def log_alphas_cumprod_at(self, t):
            return 1e-16 * t.double() - 1

    schedule = Flat([-1.0] * 9)
    assert schedule.log_alphas_cumprod_at(torch.arange(9)).unique().numel() > 1
    at_t = coefficients(schedule, 3)
    assert at_t.c.tolist() == at_t.c2.tolist() == [0.0] * 9


def test_a_skip_that_rounding_swallows_is_none():
    """Also at σ = 1, where two infinite logarithms would differ by NaN."""
    at_t = coefficients(FLOW, 1e-17, t=torch.tensor([0.5, 1.0], dtype=torch.float64))
    assert at_t.c2.tolist() == [0.0, 0.0]


def test_coefficients_stay_as_they_were_made():
    with pytest.raises(AttributeError, match="cannot assign to field 'tau'"):
        coefficients(LINEAR, 9).tau = 1.0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_limit_without_a_bound_where_there_is_no_signal(estimator):
    """As c grows, (τ + (1-τ) c) / (τ + (1-τ) c²) and (1-τ) c / A fall to 0."""
    at_t = coefficients(ZERO_SNR, 9, estimator=estimator, max_c2=math.inf)
    assert at_t.c2[-1] == math.inf
    assert (at_t.gain[-1], at_t.gain_minus_one[-1], at_t.skip_gain[-1]) == (0, -1, 0)


@pytest.mark.parametrize(
    ("weight", "max_c2", "bound"), [(0.25, 3.0, 3.0), (1.5, 3.0, 2.0), (6.0, 3.0, 0.5), (0, 0, 0)]
)
def test_the_bound_of_a_weighting(weight, max_c2, bound):
    """Neither c² nor c² w is above max_c2."""
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.1])
    options = {"max_c2": max_c2, "weighting": lambda log_snr: log_snr * 0 + weight}
    found = coefficients(schedule, 1, **options)
    assert found.c2[1].item() == pytest.approx(bound, rel=1e-15)
    assert found.c[1].item() == pytest.approx(math.sqrt(bound), rel=1e-15)


STRAIGHT = ContinuousSchedule.from_alpha_sigma(lambda t: (1 - t, t))
MAKERS = {
    "loss": SkipStepLoss,
    "scaled": lambda *args, **options: ScaledModel.with_gain(torch.nn.Identity(), *args, **options),
}


@pytest.mark.parametrize("kind", ["epsilon", "score"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_gain_that_ruins_a_start_at_the_last_timestep_is_warned_of(make, kind):
    """By as much as a first step of DDIM leaves of data that are 0: x_t = b ε, and ε̂ = s ε."""
    with pytest.warns(UserWarning, match="cosine.*is 0.497.*network of v") as caught:
        make(COSINE, 49, prediction_type=kind)
    (a, next_a), (b, next_b) = COSINE.alpha_sigma(torch.tensor([999, 899]))
    s = 0.99 / (0.99 + 0.01 * 100)  # c² is bounded by 100
    x_next = next_a * (b - b * s) / a + next_b * s
    (said,) = re.findall(r"with ([\d,]+) times", str(caught[0].message))
    assert float(said.replace(",", "")) == pytest.approx(float(x_next / next_b - s), rel=1e-3)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("schedule", "skip", "options"),
    [
        (LINEAR, 99, {}),
        (NoiseSchedule.scaled_linear(1000), 99, {}),
        *((COSINE, 49, {"prediction_type": kind}) for kind in ("v_prediction", "sample")),
        (COSINE, 49, {"tau": 1.0}),
        (ZERO_SNR, 49, {}),
        (NoiseSchedule.linear(1), SkipSet.from_timesteps([0]), {}),
        (VP, 0.05, {}),
        (LINEAR, 49, {"prediction_type": "flow"}),
        *((path, 0.01, {"prediction_type": "flow"}) for path in (FLOW, STRAIGHT)),
    ],
)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.filterwarnings("error")
def test_elsewhere_nothing_is_warned_of(make, schedule, skip, options):
    make(schedule, skip, **options)
