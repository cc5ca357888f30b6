"""Weightings against the formulas of their papers, on the signal-to-noise ratio itself."""

import math

import pytest
import torch
from mpmath import mpf

from s2dm_loss import SkipStepLoss
from s2dm_loss.weighting import WEIGHTINGS, check_weights, min_snr, p2, sigmoid, soft_min_snr
from tests.helpers import oracle
from tests.strategies import (
    COSINE,
    ESTIMATORS,
    FLOW,
    LINEAR,
    TYPES,
    VP,
    ZERO_SNR,
    batch,
    drawn,
    loss_and_gradient,
    normal,
    normals,
    pickled,
    same,
)

pytestmark = pytest.mark.filterwarnings("ignore:weighting .* is below 1e-06 at the last timestep")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_formula_on_every_output(name, kind):
    """Each paper's, in the oracle."""
    t = torch.tensor([0, 5, 100, 300, 500, 700])
    output, target, x_t, x0, eps = batch(LINEAR, t, kind)
    loss = SkipStepLoss(LINEAR, 9, tau=1.0, prediction_type=kind, weighting=name, reduction="none")
    found = loss.from_output(output, target, t, x_t)
    for i, bar in enumerate(LINEAR.alphas_cumprod[t].tolist()):
        at = oracle.scales(oracle.vp_pair(mpf(bar)), [], 1.0, weighting=name, kind=kind)
        expected = at.loss(output[i], x0[i], eps[i], None, "expected")
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("schedule", [COSINE, ZERO_SNR], ids=repr)
def test_the_gradient_of_an_output_stays_near_the_plain_one(schedule):
    """At late t the ε̂ that was asked of v was 1e4 times the plain target away."""
    t = schedule.timesteps[-200:]
    output, target, x_t, *_ = batch(schedule, t, "v_prediction")
    norms = []
    for tau in (1.0, 0.99):
        options = {"tau": tau, "prediction_type": "v_prediction", "weighting": "min_snr"}
        loss = SkipStepLoss(schedule, 9, **options).from_output
        _, gradient = loss_and_gradient(lambda o, loss=loss: loss(o, target, t, x_t), output)
        norms.append(gradient.flatten(1).norm(dim=1))
    ratio = (norms[1] / norms[0])[norms[0] > 0]
    assert len(ratio) >= 199
    assert 0.5 < ratio.min() <= ratio.max() < 2.5


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_it_multiplies_the_loss_and_the_papers_terms(estimator):
    t, (eps_hat, noise, xi) = torch.tensor([0, 9, 500, 999]), normals(3, 4, 3)
    bar = LINEAR.alphas_cumprod[t]
    weights = (bar / (1 - bar)).clamp(max=3) / (bar / (1 - bar))
    plain, weighted = (
        SkipStepLoss(LINEAR, 9, weighting=weighting, estimator=estimator, reduction="none")
        for weighting in (None, min_snr(3))
    )

    def values(criterion, weights):
        data = eps_hat, noise, t
        terms = criterion.terms(*data, **drawn(estimator, xi))
        loss = criterion.from_output(*data, **drawn(estimator, xi))
        weighed = terms.simple, terms.skip, terms.total, loss
        return [terms.tau, *(weights * value for value in weighed)]

    same(values(weighted, 1), values(plain, weights), rtol=1e-12, atol=0)


def test_a_function_of_ones_own_and_weights_beside_it():
    data, weights = (*normals(2, 3, 2), torch.tensor([3, 500, 999])), torch.tensor([1.0, 0.0, 2.0])
    found, expected = (
        SkipStepLoss(LINEAR, 9, weighting=weighting).from_output(*data, weights=weights)
        for weighting in (lambda log_snr: 5 / (5 + log_snr.exp()), soft_min_snr(5))
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_weight_without_bound_where_no_time_is_drawn():
    """√snr of x_0 where β ∫ is 0.1 t: 1e3 at the smallest t that is drawn, without bound at 0."""
    options = {"prediction_type": "sample", "weighting": "debiased", "tau": 1.0}
    criterion = SkipStepLoss(VP, 0.01, **options)
    output, target, x_t = normal(3, 1, 5, seed=0).unbind(0)
    found = criterion.from_output(output, target, torch.tensor([1e-5], dtype=torch.float64), x_t)
    integral = 0.1 * 1e-5 + 0.5 * (20 - 0.1) * 1e-10
    snr = math.exp(-integral) / -math.expm1(-integral)
    expected = math.sqrt(snr) * (output - target).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert math.sqrt(snr) > 900


@pytest.mark.parametrize("name", ["uniform", "min_snr", "soft_min_snr", "p2", "sigmoid"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("schedule", "skip", "t"),
    [(ZERO_SNR, 9, torch.tensor([1, 998, 999])), (FLOW, 0.01, torch.tensor([1e-6, 0.5, 1.0]))],
    ids=["zero terminal SNR", "flow"],
)
def test_finite_at_both_ends(schedule, skip, t, kind, name):
    if schedule is FLOW and (kind, name) == ("sample", "uniform"):
        pytest.skip("the noise's error is 1 / σ² times that of x_0, which is refused; see errors")
    output, target, x_t, *_ = batch(schedule, t, kind)
    options = {"prediction_type": kind, "weighting": name, "reduction": "none"}
    criterion = SkipStepLoss(schedule, skip, **options)
    loss, gradient = loss_and_gradient(lambda o: criterion.from_output(o, target, t, x_t), output)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "weighting"),
    [
        ("v_prediction", "min_snr"),
        ("flow", "uniform"),
        ("sample", min_snr(3)),
        ("v_prediction", torch.ones_like),
    ],
)
def test_a_last_timestep_that_is_never_trained_is_said_once(kind, weighting):
    options = {"prediction_type": kind, "weighting": weighting}
    with pytest.warns(UserWarning, match="samplers start there") as caught:
        SkipStepLoss(ZERO_SNR, 9, **options)(lambda x_t, t: x_t, torch.ones(2, 3))
    assert [warning.filename for warning in caught] == [__file__]  # the line that made the loss


def test_a_last_timestep_that_is_trained_is_no_warning(recwarn):
    for schedule, kind, weighting in (
        *((ZERO_SNR, "v_prediction", weighting) for weighting in ("truncated_snr", None)),
        *((schedule, "v_prediction", "min_snr") for schedule in (LINEAR, COSINE)),
        (ZERO_SNR, "epsilon", "min_snr"),
    ):
        SkipStepLoss(schedule, 9, prediction_type=kind, weighting=weighting)
    # Its end is drawn by nobody.
    SkipStepLoss(FLOW, 0.01, prediction_type="flow", weighting="min_snr")
    assert not recwarn.list


def test_the_largest_weight_and_the_smallest():
    check_weights(torch.tensor([0.0, 1.0, 1e6]))
    with pytest.raises(ValueError, match=r"got 1e\+06 at index 1 of 4 times"):
        check_weights(torch.tensor([1.0, 1e6 + 0.25, 2e6, 1.0]))
    with pytest.raises(ValueError, match="got -1e-30 at index 1 of 2 times"):
        check_weights(torch.tensor([0.0, -1e-30]))
    for index, absent in ((4, "noise, snr"), (5, "signal, 1 / snr")):
        weights = torch.ones(10)
        weights[index] = math.inf
        with pytest.raises(ValueError, match=f"where there is no {absent} has no bound"):
            check_weights(weights)


def test_numbers_at_the_edge_of_what_is_allowed():
    snr = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert p2(3, 0)(snr.log()).tolist() == [1, 1]
    torch.testing.assert_close(p2(0.5, 2)(snr.log()), 1 / (0.5 + snr) ** 2)
    torch.testing.assert_close(sigmoid(-1)(snr.log()), 1 / (1 + snr * math.e))


def test_a_weighting_is_a_value():
    """The one of a name is shared by all losses of that name: nobody may change it."""
    criterion = SkipStepLoss(LINEAR, 9, weighting=min_snr(3))
    assert "weighting=min_snr(3)" in repr(criterion)
    assert repr(pickled(criterion)) == repr(criterion)
    assert SkipStepLoss(LINEAR, 9, weighting="p2").weighting == p2(1, 1)
    assert len({min_snr(3), min_snr(3.0), soft_min_snr(3), min_snr(4)}) == 3
    with pytest.raises(AttributeError, match="cannot assign to field 'numbers'"):
        min_snr().numbers = (1.0,)
