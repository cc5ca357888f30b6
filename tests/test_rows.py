"""Closed lists are rows that say everything: one new row is right everywhere, or refused."""

import math
from typing import Literal

import pytest
import torch

from s2dm_loss import NoiseSchedule, SkipStepLoss, gain
from s2dm_loss.checks import check_rows
from s2dm_loss.coefficients import ESTIMATORS, Zeta
from s2dm_loss.head import REDUCTIONS, ReductionRow
from s2dm_loss.prediction import PREDICTION_TYPES, epsilon_from_output, output_from_epsilon
from s2dm_loss.weighting import WEIGHTINGS, WeightingRow
from tests.strategies import (
    LINEAR,
    batch,
    beside,
    excess_over_least,
    loss_and_gradient,
    normal,
    same,
    ways_in,
)

T = torch.tensor([0, 49, 300, 450])
# What each type's output says of the noise, from x_t and a and b of a variance-preserving path.
TO_EPSILON = {
    "epsilon": lambda o, x_t, a, b: o,
    "v_prediction": lambda o, x_t, a, b: a * o + b * x_t,
    "sample": lambda o, x_t, a, b: (x_t - a * o) / b,
    "flow": lambda o, x_t, a, b: (x_t + a * o) / (a + b),
    "score": lambda o, x_t, a, b: -b * o,
    "mine": lambda o, x_t, a, b: (a * o + 3 * x_t) / (2 * a + 3 * b),
}


@pytest.fixture(autouse=True)
def _a_prediction_type_of_ones_own(monkeypatch):
    """2 ε - 3 x_0."""
    monkeypatch.setitem(
        PREDICTION_TYPES,
        "mine",
        lambda path: (-3 * torch.ones_like(path.a), 2 * torch.ones_like(path.b)),
    )


@pytest.fixture
def data():
    """x_0, ε, x_t, an output, and a and b of the linear schedule."""
    output, _, x_t, x0, eps = batch(LINEAR, T, "epsilon")
    return x0, eps, x_t, output, *(beside(scale, x0) for scale in LINEAR.alpha_sigma(T))


@pytest.mark.parametrize("kind", TO_EPSILON)
@pytest.mark.parametrize(
    ("row", "skip_term"),
    [
        # As correlated as DREAM's or a shared batch's noise, and of the other sign.
        (Zeta(-0.6, 0.8, 0), lambda x, eps, xi: (x + 0.6 * eps - 0.8 * xi).square()),
        (Zeta(0.5, 0, 0.75), lambda x, eps, xi: (x - 0.5 * eps).square() + 0.75),
    ],
    ids=["correlated", "half"],
)
def test_an_estimator_is_one_row(monkeypatch, data, kind, row, skip_term):
    """Eq. 13 on ε̂, at the weight that the trainer's own loss has: mse(output, target)."""
    monkeypatch.setitem(ESTIMATORS, "mine", row)
    (x0, eps, x_t, output, a, b), xi = data, normal(4, 3, 2, seed=9)
    target = 2 * eps - 3 * x0 if kind == "mine" else batch(LINEAR, T, kind)[1]
    bar = LINEAR.alphas_cumprod
    c = beside(torch.where(T >= 49, bar[(T - 49).clamp(min=0)] / bar[T] - 1, 0.0).sqrt(), eps)

    def paper(eps_hat):
        simple, skip = (eps_hat - eps).square(), skip_term(c * eps_hat, eps, xi)
        return torch.where(c > 0, 0.9 * simple + 0.1 * skip, simple).mean((1, 2))

    options = {"tau": 0.9, "estimator": "mine", "prediction_type": kind, "max_c2": math.inf}
    criterion = SkipStepLoss(LINEAR, 49, reduction="none", **options)
    given = {"skip_noise": xi} if row.on_skip_noise else {}
    slope = TO_EPSILON[kind](output + 1, x_t, a, b) - TO_EPSILON[kind](output, x_t, a, b)
    weight = slope[:, 0, 0] ** -2  # mse(output, target) = mse(ε̂, ε) / slope²
    *expected, _ = excess_over_least(
        lambda o: weight * paper(TO_EPSILON[kind](o, x_t, a, b)), output
    )
    for way in ways_in(criterion, T, target, x_t, x0, eps, **given):
        same(loss_and_gradient(way, output), expected, rtol=1e-9, atol=1e-11)
    # What is learned, and what is logged.
    if not given:
        at_0, at_1 = (loss_and_gradient(paper, 0 * eps + x)[1] for x in (0, 1))
        s = gain(LINEAR, 49, t=T, **options)
        torch.testing.assert_close(at_0 / (at_0 - at_1) / eps, beside(s, eps).expand_as(eps))
    if kind == "epsilon":
        torch.testing.assert_close(criterion.terms(output, eps, T, **given).total, paper(output))


def test_a_prediction_type_is_one_row(data):
    """Its losses are those of `test_an_estimator_is_one_row`."""
    x0, eps, x_t, output, _, _ = data
    target = 2 * eps - 3 * x0
    torch.testing.assert_close(epsilon_from_output(target, x_t, T, LINEAR, "mine"), eps)
    torch.testing.assert_close(output_from_epsilon(eps, x_t, T, LINEAR, "mine"), target)
    criterion = SkipStepLoss(LINEAR, 49, prediction_type="mine")
    with pytest.raises(ValueError, match=r"x_t must be given for prediction_type 'mine'"):
        criterion.from_output(output, target, T)


def test_an_infinite_prediction_type_is_refused(monkeypatch):
    """As the score is: ε / σ³ at a timestep without noise."""
    monkeypatch.setitem(PREDICTION_TYPES, "mine", lambda path: (None, path.b**-3))
    schedule = NoiseSchedule.from_alphas_cumprod([1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match=r"'mine' must have noise .* none at t = 0, .*a weighting"):
        SkipStepLoss(schedule, 1, prediction_type="mine")
    SkipStepLoss(LINEAR, 1, prediction_type="mine")


def test_a_reduction_is_one_row(monkeypatch, data):
    """The sum over everything, such as DDPM's."""
    monkeypatch.setitem(REDUCTIONS, "total", ReductionRow(first_axis=3, per_sample=False))
    x0, eps, _, output, *_ = data
    each, total = (SkipStepLoss(LINEAR, 49, reduction=name) for name in ("none", "total"))
    for weights in (None, torch.tensor([1.0, 0.0, 2.0, 3.0])):
        found, expected = (
            loss_and_gradient(
                lambda o, of=of, w=weights: of.from_output(o, eps, T, weights=w).sum(), output
            )
            for of in (total, each)
        )
        same(found, [6 * value for value in expected])
    assert total.from_output(output, eps, T).ndim == 0
    step = total(lambda x_t, t: output, x0, T, noise=eps)
    torch.testing.assert_close(step, total.from_output(output, eps, T))


def test_a_weighting_is_one_row(monkeypatch, data):
    """2 / (1 + snr) on the noise's error, which on v is 2 in all."""
    row = WeightingRow(lambda log_snr, height: height / (1 + log_snr.exp()), None)
    named = type(WEIGHTINGS["min_snr"].default)("mine", (2.0,))
    monkeypatch.setitem(WEIGHTINGS, "mine", row._replace(default=named))
    x0, eps, _, output, a, b = data
    plain, weighted = (
        SkipStepLoss(LINEAR, 49, prediction_type="v_prediction", reduction="none", weighting=name)
        for name in (None, "mine")
    )
    losses = (of(lambda x_t, t: output, x0, T, noise=eps) for of in (plain, weighted))
    snr = (a / b).square().flatten()
    torch.testing.assert_close(
        next(losses) * 2 / (1 + snr) * a.flatten() ** 2, next(losses), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(("rows", "odd"), [(["one"], "two"), (["one", "two", "mine"], "mine")])
def test_a_row_that_is_forgotten_is_named(rows, odd):
    """As each table is checked when it is imported."""
    with pytest.raises(RuntimeError, match=rf"^ROWS and .*differ in \['{odd}'\]"):
        check_rows("ROWS", rows, Literal["one", "two"])
