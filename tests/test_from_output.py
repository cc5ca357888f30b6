"""The loss on a network's own output: A · mse(output, regression target)."""

import math

import pytest
import torch
from mpmath import mpf
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from s2dm_loss.prediction import epsilon_from_output
from tests.helpers import oracle
from tests.strategies import beside, drawn, loss_and_gradient, normal, targets_of

TYPES = ["epsilon", "v_prediction", "sample", "flow", "score"]
ESTIMATORS = ["expected", "fresh", "shared"]
LINEAR = NoiseSchedule.linear(1000)
COSINE = NoiseSchedule.cosine(1000)
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
SCHEDULES = {
    "linear": (LINEAR, 9),
    "linear, k = 49": (LINEAR, 49),
    "cosine": (COSINE, 9),
    "zero terminal SNR": (ZERO_SNR, 9),
    "σ": (NoiseSchedule.from_sigmas(torch.linspace(0.01, 80, 200, dtype=torch.float64)), 9),
    "vp": (ContinuousSchedule.vp(), 0.01),
    "sub-vp": (ContinuousSchedule.sub_vp(), 0.01),
    "flow": (ContinuousSchedule.flow(), 0.01),
    "cosine path": (ContinuousSchedule.cosine(), 0.01),
    "VE": (
        ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 0.002 + 80 * t)),
        0.01,
    ),
}
KINDS = pytest.mark.parametrize("kind", TYPES)
pytestmark = pytest.mark.filterwarnings("ignore:prediction_type 'flow' is noise minus data")
EACH_ESTIMATOR = pytest.mark.parametrize("estimator", ESTIMATORS)


def times_of(schedule):
    """Every time, but the first: there, on a path without noise, the score is infinite."""
    if schedule.timesteps is not None:
        return schedule.timesteps[1:]
    return torch.linspace(0, 1, 41, dtype=torch.float64)[1:]


def batch(schedule, t, kind, seed=0):
    """An output, and the target and x_t that a trainer makes of x_0 and ε."""
    x0, eps, output = (normal(len(t), 3, 2, seed=seed + i) for i in range(3))
    a, b = (beside(scale.double(), x0) for scale in schedule.alpha_sigma(t))
    return output, targets_of(x0, eps, a, b)[kind], a * x0 + b * eps, x0, eps


def sizes(gradient):
    return gradient.flatten(1).norm(dim=1)


@KINDS
@pytest.mark.parametrize("name", SCHEDULES)
def test_tau_one_is_the_plain_loss_of_the_output(name, kind):
    schedule, skip = SCHEDULES[name]
    t = times_of(schedule)
    output, target, x_t, x0, eps = batch(schedule, t, kind)
    criterion = SkipStepLoss(schedule, skip, tau=1.0, prediction_type=kind)
    plain, plain_gradient = loss_and_gradient(lambda o: F.mse_loss(o, target), output)
    for way in (
        lambda o: criterion.from_output(o, target, t, x_t),
        lambda o: criterion(lambda x_t, t, **_: o, x0, t, noise=eps),
    ):
        loss, gradient = loss_and_gradient(way, output)
        assert abs(loss - plain) <= 1e-12 * plain
        # Each sample's gradient against its own size, since a score's grows without end.
        assert (sizes(gradient - plain_gradient) <= 1e-12 * sizes(plain_gradient)).all()
    target, x_t = target.float(), x_t.float()
    changed = criterion.regression_target(target, t, x_t)
    assert torch.equal(changed.target, target)
    assert torch.equal(changed.weight, torch.ones(len(t)))


@KINDS
@pytest.mark.parametrize("name", SCHEDULES)
def test_finite_at_every_time_and_near_the_plain_gradient(name, kind):
    """At τ = 0.99 A is at most 1.99 and s at least 0.49, whatever the schedule's end."""
    schedule, skip = SCHEDULES[name]
    t = times_of(schedule)
    output, target, x_t, *_ = batch(schedule, t, kind)
    criterion = SkipStepLoss(schedule, skip, prediction_type=kind, reduction="none")
    loss, gradient = loss_and_gradient(lambda o: criterion.from_output(o, target, t, x_t), output)
    _, plain = loss_and_gradient(lambda o: (o - target).square().mean((1, 2)), output)
    assert loss.isfinite().all()
    ratio = sizes(gradient) / sizes(plain)
    assert ratio.min() > 0.8
    assert ratio.max() < 2.0
    if name == "linear":  # where the released loss's is as near
        assert ratio.min() > 0.9
        assert ratio.max() < 1.1
    if name == "linear" or (name, kind) == ("cosine", "v_prediction"):
        # As weights of 1 / ratio² on ε̂ the latter had 2,000 times the plain gradient.
        assert 0.98 < gradient.norm() / plain.norm() < 1.02


@EACH_ESTIMATOR
@KINDS
def test_gradient_is_that_of_eq_13_at_the_trainers_own_weight(kind, estimator):
    """mse(output, target) = w mse(ε̂, ε), and the skip term gets the same w."""
    t = torch.tensor([0, 8, 60, 150, 300, 450])  # where no bound on c acts
    output, target, x_t, _, eps = batch(LINEAR, t, kind)
    xi = normal(6, 3, 2, seed=9)
    zeta = {"expected": None, "shared": eps, "fresh": xi}[estimator]
    bar = LINEAR.alphas_cumprod
    a, b = beside(bar[t].sqrt(), eps), beside((1 - bar[t]).sqrt(), eps)
    c2 = beside(torch.where(t >= 9, bar[(t - 9).clamp(min=0)] / bar[t] - 1, 0.0), eps)
    ratio = {
        "epsilon": torch.ones_like(a),
        "v_prediction": a,
        "sample": a / b,
        "flow": a / (a + b),
        "score": b,
    }[kind]

    def by_hand(o):
        eps_hat = {
            "epsilon": o,
            "v_prediction": a * o + b * x_t,
            "sample": (x_t - a * o) / b,
            "flow": (x_t + a * o) / (a + b),
            "score": -b * o,
        }[kind]
        simple = (eps_hat - eps).square()
        skip = c2 * eps_hat.square()
        if zeta is not None:
            skip = (c2.sqrt() * eps_hat - zeta).square()
        paper = torch.where(beside(t >= 9, eps), 0.99 * simple + 0.01 * skip, simple)
        return (paper / ratio**2).mean()

    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, prediction_type=kind)
    given = drawn(estimator, xi)
    _, expected = loss_and_gradient(by_hand, output)
    _, found = loss_and_gradient(
        lambda o: criterion.from_output(o, target, t, x_t, **given), output
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@EACH_ESTIMATOR
@KINDS
@pytest.mark.parametrize("name", ["linear", "zero terminal SNR", "flow"])
def test_every_way_in_is_the_same_loss(name, kind, estimator):
    """The whole step and a trainer's own loss of the changed target; 0 where the two are equal."""
    schedule, skip = SCHEDULES[name]
    t = times_of(schedule)[::37] if schedule.timesteps is None else torch.tensor([1, 9, 400, 999])
    output, target, x_t, x0, eps = batch(schedule, t, kind)
    options = {"estimator": estimator, "prediction_type": kind, "reduction": "none"}
    criterion, given = (
        SkipStepLoss(schedule, skip, **options),
        drawn(estimator, normal(*x0.shape, seed=9)),
    )
    expected = loss_and_gradient(
        lambda o: criterion.from_output(o, target, t, x_t, **given), output
    )
    changed = criterion.regression_target(target, t, x_t, **given)
    assert changed.weight.shape == t.shape
    for way in (
        lambda o: criterion(lambda x_t, t: o, x0, t, noise=eps, **given),
        lambda o: changed.weight * (o - changed.target).square().mean((1, 2)),
    ):
        for value, wanted in zip(loss_and_gradient(way, output), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    at_target = criterion.from_output(changed.target, target, t, x_t, **given)
    assert (at_target <= 1e-24 * changed.target.square().mean((1, 2))).all()
    lifted = criterion.regression_target(target.bfloat16(), t, x_t.bfloat16(), **given)
    assert lifted.target.dtype == lifted.weight.dtype == torch.float32


@pytest.mark.parametrize("weighting", [None, "min_snr", "truncated_snr"])
@KINDS
def test_the_gain_that_is_reported_is_the_one_that_is_taught(kind, weighting):
    """Late times too, where the bound on c² w acts: the ε̂ at which the gradient is 0, over ε."""
    options = {"prediction_type": kind, "weighting": weighting, "reduction": "none"}
    criterion = SkipStepLoss(LINEAR, 99, **options)
    t = torch.tensor([50, 300, 700, 900, 999])
    output, target, x_t, _, eps = batch(LINEAR, t, kind)
    at_0, at_1 = (
        loss_and_gradient(lambda leaf: criterion.from_output(leaf, target, t, x_t), values)[1]
        for values in (torch.zeros_like(output), torch.ones_like(output))
    )
    best = at_0 / (at_0 - at_1)  # the gradient is linear in the output
    found = epsilon_from_output(best, x_t, t, LINEAR, kind)
    s = criterion.coefficients_at(t).gain
    torch.testing.assert_close(found, beside(s, eps) * eps, rtol=1e-8, atol=1e-8)
    bar = LINEAR.alphas_cumprod
    c2 = float(bar[300 - 99] / bar[300] - 1)  # where no bound acts
    assert s[:2].tolist() == pytest.approx([1, 0.99 / (0.99 + 0.01 * c2)], rel=1e-12)


@EACH_ESTIMATOR
@pytest.mark.parametrize("max_c2", [0.0, 0.5, 4.0, math.inf])
@pytest.mark.parametrize("kind", TYPES)
def test_the_bounds_on_c_and_c2(kind, max_c2, estimator):
    """c² <= max_c2 · min(1, ratio²) and c <= √max_c2 · min(1, ratio²), against 40 digits."""
    bars = [0.9, 0.36, 0.01]
    pairs = [oracle.vp_pair(mpf(bar)) for bar in bars]
    t = torch.tensor([1, 2])
    options = {"tau": 0.9, "max_c2": max_c2, "prediction_type": kind, "estimator": estimator}
    criterion = SkipStepLoss(
        NoiseSchedule.from_alphas_cumprod(bars), 1, reduction="none", **options
    )
    output, target, x_t, x0, eps = batch(criterion.schedule, t, kind)
    xi = normal(2, 3, 2, seed=9)
    found = criterion.from_output(output, target, t, x_t, **drawn(estimator, xi))
    for i in range(2):
        at = oracle.scales(pairs[i + 1], [pairs[i]], 0.9, max_c2, kind=kind)
        expected = at.loss(output[i], x0[i], eps[i], xi[i], estimator)
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow"])
def test_where_the_schedule_ends_in_noise_every_target_goes_to_the_trainers_own(kind):
    """At the last t of a cosine schedule "shared" and "fresh" kept c / ratio = √max_c2.

    The target of v was moved by (1-τ) √max_c2 / τ = 0.101 ε there; that of "expected" is not moved
    by the bound on c alone, and stays the mean of "fresh".
    """
    t = torch.tensor([999])
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    a, b = (scale[:, None] for scale in COSINE.alpha_sigma(t))
    moved = {}
    for estimator in ESTIMATORS:
        criterion = SkipStepLoss(COSINE, 9, estimator=estimator, prediction_type=kind)
        target = targets_of(zero, one, a, b)[kind]  # of ε = 1 and x_0 = 0
        given = drawn(estimator, zero)
        found = criterion.regression_target(target, t, b * one, **given).target
        moved[estimator] = (found - target).item()
    ratio = abs(float(oracle.scales((mpf(float(a)), mpf(float(b))), [], 1, kind=kind).ratio))
    assert moved["fresh"] == moved["expected"]
    # s - 1 = -(1-τ) c² / A with c² = 100 ratio², over ratio
    assert abs(moved["expected"]) == pytest.approx(ratio / 0.99, rel=1e-5)
    assert abs(moved["shared"]) == pytest.approx(0.9 * ratio / 0.99, rel=1e-5)
    assert ratio < 5e-5
    of_xi = SkipStepLoss(COSINE, 9, estimator="fresh", prediction_type=kind).regression_target(
        zero, t, zero, skip_noise=one
    )
    assert abs(of_xi.target.item()) == pytest.approx(0.1 * ratio / 0.99, rel=1e-5)
    both = [
        coefficients(COSINE, 9, estimator=name, prediction_type=kind)
        for name in ("expected", "fresh")
    ]
    assert torch.equal(both[0].weight, both[1].weight)
    assert torch.equal(both[0].gain, both[1].gain)


@EACH_ESTIMATOR
@pytest.mark.parametrize("max_c2", [100.0, math.inf])
@KINDS
def test_where_nothing_is_left_of_the_data(kind, max_c2, estimator):
    """An output other than ε and score is compared with its own target, at the weight τ.

    Without a bound the loss of ε and score is infinite there (c² is), and not NaN, which 0 · ∞ is.
    """
    t = torch.tensor([500, 999])
    output, target, x_t, *_ = batch(ZERO_SNR, t, kind)
    options = {"estimator": estimator, "prediction_type": kind, "max_c2": max_c2}
    criterion = SkipStepLoss(ZERO_SNR, 9, reduction="none", **options)
    given = drawn(estimator, normal(2, 3, 2, seed=9))
    loss, gradient = loss_and_gradient(
        lambda o: criterion.from_output(o, target, t, x_t, **given), output
    )
    assert loss[0].isfinite()
    assert gradient[0].isfinite().all()
    if kind in ("epsilon", "score"):
        assert (loss[1] == math.inf) == (max_c2 == math.inf)
        assert not gradient.isnan().any()
    else:
        plain, plain_gradient = loss_and_gradient(
            lambda o: 0.99 * (o - target).square().mean((1, 2)), output
        )
        torch.testing.assert_close(loss[1], plain[1])
        torch.testing.assert_close(gradient[1], plain_gradient[1])
    if kind == "epsilon" and max_c2 == math.inf:
        assert criterion.terms(output, target, t, **given).total[1] == math.inf
    unbounded = SkipStepLoss(ZERO_SNR, 9, tau=1.0, **options)
    torch.testing.assert_close(
        unbounded.from_output(output, target, t, x_t, **given), (output - target).square().mean()
    )


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_a_score_without_noise(weighting):
    """It is infinite there: refused, but with a weighting, which leaves nothing of its error."""
    bars = torch.cat([torch.ones(1, dtype=torch.float64), LINEAR.alphas_cumprod[:-1]])
    schedule = NoiseSchedule.from_alphas_cumprod(bars)
    with pytest.raises(ValueError, match=r"'score' must have noise.*none at t = 0, .*a weighting"):
        SkipStepLoss(schedule, 9, prediction_type="score")
    options = {"weighting": weighting, "reduction": "none"}
    criterion = SkipStepLoss(schedule, 9, prediction_type="score", **options)
    of_noise = SkipStepLoss(schedule, 9, **options)
    t, x0, noise = torch.tensor([0, 300, 999]), normal(3, 4, seed=0), normal(3, 4, seed=1)
    b = schedule.alpha_sigma(t)[1][:, None]
    (loss, gradient), (_, wanted) = (
        loss_and_gradient(lambda o, of=of: of(x0, t, noise, o), normal(3, 4, seed=2))
        for of in (
            lambda x0, t, noise, o: criterion(lambda x_t, t: o, x0, t=t, noise=noise),
            lambda x0, t, noise, o: of_noise(lambda x_t, t: -b * o, x0, t=t, noise=noise),
        )
    )
    assert loss.isfinite().all()
    torch.testing.assert_close(gradient[1:], wanted[1:], rtol=1e-5, atol=1e-7)
    assert gradient[0].abs().max() < 1e-6


@KINDS
def test_x_t_is_asked_for_where_the_target_holds_data(kind):
    output, target, x_t, *_ = batch(LINEAR, torch.tensor([9, 500]), kind)
    t, criterion = torch.tensor([9, 500]), SkipStepLoss(LINEAR, 9, prediction_type=kind)
    if kind in ("epsilon", "score"):
        loss = criterion.from_output(output, target, t)
        assert torch.equal(loss, criterion.from_output(output, target, t, x_t))
        assert torch.equal(
            criterion.regression_target(target, t).target,
            criterion.regression_target(target, t, x_t).target,
        )
    for call in (
        lambda x_t: criterion.from_output(output, target, t, x_t),
        lambda x_t: criterion.regression_target(target, t, x_t),
    ):
        if kind not in ("epsilon", "score"):
            with pytest.raises(ValueError, match=rf"x_t must be given for .*{kind}.*holds data"):
                call(None)
        with pytest.raises(ValueError, match="x_t must have the shape of target"):
            call(x_t[:, :1])


def test_terms_take_a_noise_prediction():
    x = normal(2, 3, seed=0)
    with pytest.raises(ValueError, match=r"terms takes a noise prediction.*'v_prediction'"):
        SkipStepLoss(LINEAR, 9, prediction_type="v_prediction").terms(x, x, torch.tensor([1, 2]))
