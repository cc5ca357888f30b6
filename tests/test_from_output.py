"""The loss on a network's own output, against Eq. 13 on the noise in it, written out by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from s2dm_loss import (
    Coefficients,
    ContinuousSchedule,
    NoiseSchedule,
    SkipStepLoss,
    epsilon_from_output,
)
from s2dm_loss.output import bound_on_c2, output_square
from tests.strategies import normal, targets_of

TYPES = ["epsilon", "v_prediction", "sample", "flow", "score"]
LINEAR = NoiseSchedule.linear(1000)
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
SIGMAS = NoiseSchedule.from_sigmas(torch.linspace(0.01, 80, 200, dtype=torch.float64))
FLOW = ContinuousSchedule.flow()
VE = ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 0.002 + 80 * t))
SCHEDULES = {
    "linear": (LINEAR, 9),
    "linear, k = 49": (LINEAR, 49),
    "cosine": (NoiseSchedule.cosine(1000), 9),
    "zero terminal SNR": (ZERO_SNR, 9),
    "σ": (SIGMAS, 9),
    "vp": (ContinuousSchedule.vp(), 0.01),
    "sub-vp": (ContinuousSchedule.sub_vp(), 0.01),
    "flow": (FLOW, 0.01),
    "cosine path": (ContinuousSchedule.cosine(), 0.01),
    "VE": (VE, 0.01),
}


def times_of(schedule):
    if schedule.timesteps is not None:
        return schedule.timesteps
    return torch.linspace(0, 1, 41, dtype=torch.float64)


def batch(schedule, t, kind, seed=0):
    x0, eps, output = (normal(len(t), 3, 2, seed=seed + i) for i in range(3))
    a, b = (scale.double()[:, None, None] for scale in schedule.alpha_sigma(t))
    return output, targets_of(x0, eps, a, b)[kind], a * x0 + b * eps, x0, eps


def loss_and_gradient(function, output):
    leaf = output.clone().requires_grad_()
    loss = function(leaf)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_tau_one_is_the_plain_loss_of_the_output(name, kind):
    schedule, skip = SCHEDULES[name]
    t = times_of(schedule)[1:]  # at time 0 of a path without noise the score is infinite
    output, target, x_t, x0, eps = batch(schedule, t, kind)
    criterion = SkipStepLoss(schedule, skip, tau=1.0, prediction_type=kind)
    plain = loss_and_gradient(lambda o: F.mse_loss(o, target), output)
    for found in (
        loss_and_gradient(lambda o: criterion.from_output(o, target, x_t, t), output),
        loss_and_gradient(
            lambda o: criterion(lambda x_t, t, **_: o, x0, t, noise=eps),
            output,
        ),
    ):
        assert abs(found[0] - plain[0]) <= 1e-12 * plain[0]
        # Each sample's gradient against its own size, since a score's grows without end.
        error = (found[1] - plain[1]).flatten(1).norm(dim=1)
        assert (error <= 1e-12 * plain[1].flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_finite_at_every_time_and_near_the_plain_gradient(name, kind):
    """At τ = 0.99 A is at most 1.99 and s at least 0.49, whatever the schedule's end."""
    schedule, skip = SCHEDULES[name]
    t = times_of(schedule)[1:]
    output, target, x_t, *_ = batch(schedule, t, kind)
    criterion = SkipStepLoss(schedule, skip, prediction_type=kind, reduction="none")
    loss, gradient = loss_and_gradient(lambda o: criterion.from_output(o, target, x_t, t), output)
    _, plain = loss_and_gradient(lambda o: (o - target).square().mean((1, 2)), output)
    assert loss.isfinite().all()
    ratio = gradient.flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
    assert ratio.isfinite().all()
    assert ratio.min() > 0.8
    assert ratio.max() < 2.0
    if name == "linear":  # where the released loss's is as near
        assert ratio.min() > 0.9
        assert ratio.max() < 1.1
        assert 0.98 < gradient.norm() / plain.norm() < 1.02


@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
@pytest.mark.parametrize("kind", TYPES)
def test_gradient_is_that_of_eq_13_at_the_trainers_own_weight(kind, estimator):
    """mse(output, target) = w mse(ε̂, ε), and the skip term gets the same w."""
    t = torch.tensor([0, 8, 9, 150, 400, 600])  # where the bound on c² w does not act
    output, target, x_t, _, eps = batch(LINEAR, t, kind)
    zeta = {"expected": None, "shared": eps, "fresh": normal(6, 3, 2, seed=9)}[estimator]
    bar = LINEAR.alphas_cumprod
    a, b = bar[t].sqrt()[:, None, None], (1 - bar[t]).sqrt()[:, None, None]
    c2 = torch.where(t >= 9, bar[(t - 9).clamp(min=0)] / bar[t] - 1, 0.0)[:, None, None]
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
        paper = torch.where((t >= 9)[:, None, None], 0.99 * simple + 0.01 * skip, simple)
        return (paper / ratio**2).mean()

    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, prediction_type=kind)
    given = {"skip_noise": zeta} if estimator == "fresh" else {}
    _, expected = loss_and_gradient(by_hand, output)
    _, found = loss_and_gradient(
        lambda o: criterion.from_output(o, target, x_t, t, **given), output
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
@pytest.mark.parametrize("kind", TYPES)
def test_target_and_weight_by_themselves(kind, estimator):
    t = torch.tensor([0, 9, 150, 600, 980, 999])
    output, target, x_t, *_ = batch(ZERO_SNR, t, kind)
    criterion = SkipStepLoss(
        ZERO_SNR, 9, estimator=estimator, prediction_type=kind, reduction="none"
    )
    given = {"skip_noise": normal(6, 3, 2, seed=9)} if estimator == "fresh" else {}
    changed = criterion.regression_target(target, x_t, t, **given)
    assert changed.target.shape == target.shape
    assert changed.weight.shape == (6,)
    _, expected = loss_and_gradient(
        lambda o: criterion.from_output(o, target, x_t, t, **given), output
    )
    _, found = loss_and_gradient(
        lambda o: changed.weight * (o - changed.target).square().mean((1, 2)), output
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    single = criterion.regression_target(target.float(), x_t.float(), t, **given)
    assert single.target.dtype == torch.float32


@pytest.mark.parametrize("kind", TYPES)
def test_tau_one_returns_the_target_bit_for_bit(kind):
    t = torch.tensor([1, 9, 500, 999])
    _, target, x_t, *_ = batch(ZERO_SNR, t, kind)
    criterion = SkipStepLoss(ZERO_SNR, 9, tau=1.0, prediction_type=kind)
    changed = criterion.regression_target(target.float(), x_t.float(), t)
    assert torch.equal(changed.target, target.float())
    assert torch.equal(changed.weight, torch.ones(4))


@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
@pytest.mark.parametrize("kind", TYPES[1:])
@pytest.mark.parametrize("name", ["linear", "zero terminal SNR", "flow"])
def test_the_whole_step_is_from_output_on_what_it_made(name, kind, estimator):
    schedule, skip = SCHEDULES[name]
    t = times_of(schedule)[1:][::37]
    output, target, x_t, x0, eps = batch(schedule, t, kind)
    criterion = SkipStepLoss(
        schedule, skip, estimator=estimator, prediction_type=kind, reduction="none"
    )
    given = {"skip_noise": normal(*x0.shape, seed=9)} if estimator == "fresh" else {}
    torch.testing.assert_close(
        criterion(lambda x_t, t: output, x0, t, noise=eps, **given),
        criterion.from_output(output, target, x_t, t, **given),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", TYPES)
def test_a_model_may_overwrite_its_input(kind):
    x0, eps, t = normal(4, 3, seed=0), normal(4, 3, seed=1), torch.tensor([9, 200, 500, 900])
    criterion = SkipStepLoss(LINEAR, 49, prediction_type=kind)
    expected = criterion(lambda x, t: 0.3 * x, x0, t, noise=eps)
    assert torch.equal(criterion(lambda x, t: x.mul_(0.3), x0, t, noise=eps), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_weights_and_reductions(kind):
    t = torch.tensor([0, 9, 500])
    output, target, x_t, *_ = batch(LINEAR, t + 1, kind)
    weights = torch.tensor([0.0, 2.0, 3.0], dtype=torch.float64)
    each, total, mean = (
        SkipStepLoss(LINEAR, prediction_type=kind, reduction=reduction).from_output(
            output, target, x_t, t + 1, weights=weights
        )
        for reduction in ("none", "sum", "mean")
    )
    assert each[0] == 0
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(total / 3, mean)


def test_a_perfect_network_is_at_the_minimum():
    """The minimiser on the output's scale stands for s(t) ε: the gain that the loss teaches."""
    t = torch.tensor([100, 400, 600])
    bar = LINEAR.alphas_cumprod
    c2 = bar[t - 49] / bar[t] - 1
    s = (0.99 / (0.99 + 0.01 * c2))[:, None, None]
    for kind in TYPES:
        _, target, x_t, _, eps = batch(LINEAR, t, kind)
        changed = SkipStepLoss(LINEAR, 49, prediction_type=kind).regression_target(target, x_t, t)
        eps_hat = epsilon_from_output(changed.target, x_t, t, LINEAR, kind)
        torch.testing.assert_close(eps_hat, s * eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighting", [None, "min_snr", "truncated_snr"])
@pytest.mark.parametrize("kind", TYPES)
def test_the_gain_that_is_reported_is_the_one_that_is_taught(kind, weighting):
    """Late times too, where the bound on c² w acts: the ε̂ at which the gradient is 0, over ε."""
    options = {"prediction_type": kind, "weighting": weighting, "reduction": "none"}
    criterion = SkipStepLoss(LINEAR, 99, **options)
    t = torch.tensor([50, 300, 700, 900, 999])
    output, target, x_t, _, eps = batch(LINEAR, t, kind)
    at_0, at_1 = (
        loss_and_gradient(lambda leaf: criterion.from_output(leaf, target, x_t, t), values)[1]
        for values in (torch.zeros_like(output), torch.ones_like(output))
    )
    best = at_0 / (at_0 - at_1)  # the gradient is linear in the output
    found = epsilon_from_output(best, x_t, t, LINEAR, kind)
    gain = criterion.coefficients_at(t).gain[:, None, None]
    torch.testing.assert_close(found, gain * eps, rtol=1e-8, atol=1e-8)


def test_a_prediction_is_not_taken_for_another():
    x = normal(2, 3, seed=0)
    criterion = SkipStepLoss(LINEAR, prediction_type="v_prediction")
    for call in (criterion.from_prediction, criterion.terms):
        with pytest.raises(
            ValueError, match=r"v_prediction.*from_output\(output, target, x_t, t\)"
        ):
            call(x, x, torch.tensor([1, 2]))


def test_where_the_recipe_of_weights_exploded():
    """`weights = 1 / ratio²` on ε̂ gave the cosine schedule 2000 times the plain gradient."""
    schedule = NoiseSchedule.cosine(1000)
    t = schedule.timesteps
    output, target, x_t, *_ = batch(schedule, t, "v_prediction")
    criterion = SkipStepLoss(schedule, 9, prediction_type="v_prediction", reduction="none")
    _, gradient = loss_and_gradient(lambda o: criterion.from_output(o, target, x_t, t), output)
    _, plain = loss_and_gradient(lambda o: (o - target).square().mean((1, 2)), output)
    assert 0.98 < float(gradient.norm() / plain.norm()) < 1.02
    assert math.isclose(float(gradient[-1].norm() / plain[-1].norm()), 0.99, rel_tol=1e-2)


def scalars(*values):
    return (torch.tensor([value], dtype=torch.float64) for value in values)


@pytest.mark.parametrize("max_c2", [0.0, 0.5, 4.0, math.inf])
@pytest.mark.parametrize(
    ("kind", "ratio"), [("sample", -0.75), ("score", -0.8), ("flow", 0.6 / 1.4)]
)
def test_the_bound_on_c2_and_the_quadratic_it_leaves(kind, ratio, max_c2):
    """c² <= max_c2 · ratio², and the output's target has s ε̂ in it, written out at one number."""
    tau, c, c2 = 0.9, 2.0, 5.0
    a, b = scalars(0.6, 0.8)
    at_t = Coefficients(*scalars(tau, c, c2), "fresh")
    at_t = at_t.bounded(bound_on_c2(kind, None, a, b, max_c2))
    square = output_square(at_t, kind, a, b)
    bounded = min(c2, max_c2 * ratio**2)
    weight = tau + (1 - tau) * bounded
    s, g = tau / weight, (1 - tau) * min(c, math.sqrt(max_c2) * abs(ratio)) / weight
    assert square.weight.item() == pytest.approx(weight, rel=1e-14)
    assert square.on_target.item() == pytest.approx(s, rel=1e-14)
    assert square.on_skip_noise.item() == pytest.approx(g / ratio, rel=1e-14, abs=1e-16)
    # From x_0 and ε: the output that stands for s ε̂ on x_t = a x_0 + b ε.
    x0, eps = 0.3, -1.1
    x_t = 0.6 * x0 + 0.8 * eps
    meant = {
        "sample": (x_t - 0.8 * s * eps) / 0.6,
        "score": -s * eps / 0.8,
        "flow": s * eps - (x_t - 0.8 * s * eps) / 0.6,
    }[kind]
    on_data = 0.0 if square.on_data is None else square.on_data.item()
    assert on_data * x0 + square.on_noise.item() * eps == pytest.approx(meant, rel=1e-13)


def test_where_an_output_says_nothing_of_the_noise_or_all_of_it():
    def square_at(kind, a, b, max_c2):
        a, b = scalars(a, b)
        at_t = Coefficients(*scalars(0.9, 2.0, 5.0), "fresh")
        return output_square(at_t.bounded(bound_on_c2(kind, None, a, b, max_c2)), kind, a, b)

    silent = square_at("v_prediction", 0.0, 1.0, max_c2=100.0)
    assert (silent.on_target, silent.on_input, silent.on_skip_noise) == (1, 0, 0)
    assert (silent.on_data, silent.on_noise, silent.weight) == (-1, 0, 0.9)
    # Without noise in x_t the ratio of x_0 is infinite, and 0 · ∞ is still no bound but 0.
    plain = square_at("sample", 1.0, 0.0, max_c2=0.0)
    assert (plain.weight, plain.on_target) == (0.9, 1)


@pytest.mark.parametrize(("weight", "bound"), [(0.25, 3.0), (1.5, 2.0), (6.0, 0.5)])
def test_the_bound_of_a_weighting(weight, bound):
    """Neither c² nor c² w is above max_c2 = 3."""
    a, b = scalars(0.6, 0.8)
    found = bound_on_c2("epsilon", lambda log_snr: log_snr * 0 + weight, a, b, 3.0)
    assert found.item() == bound


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_a_score_without_noise(weighting):
    """It is infinite there: refused, but with a weighting, which leaves nothing of its error."""
    bars = torch.cat([torch.ones(1, dtype=torch.float64), LINEAR.alphas_cumprod[:-1]])
    schedule = NoiseSchedule.from_alphas_cumprod(bars)
    with pytest.raises(ValueError, match=r"'score' must have noise.*none at t = 0, .*a weighting"):
        SkipStepLoss(schedule, 9, prediction_type="score")
    options = {"weighting": weighting, "reduction": "none"}
    criterion = SkipStepLoss(schedule, 9, prediction_type="score", **options)
    t, x0, noise = torch.tensor([0, 300, 999]), normal(3, 4, seed=0), normal(3, 4, seed=1)
    b = schedule.alpha_sigma(t)[1][:, None]
    output = normal(3, 4, seed=2).requires_grad_()
    loss = criterion(lambda x_t, t: output, x0, t=t, noise=noise)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    assert bool(loss.isfinite().all())
    assert bool(gradient.isfinite().all())
    of_noise = SkipStepLoss(schedule, 9, **options)
    found = of_noise(lambda x_t, t: -b * output, x0, t=t, noise=noise)
    wanted = torch.autograd.grad(found.sum(), output)[0]
    torch.testing.assert_close(gradient[1:], wanted[1:], rtol=1e-5, atol=1e-7)
    assert gradient[0].abs().max() < 1e-6


def test_no_bound_on_c2_where_nothing_is_left_of_the_data():
    """0 · ∞ is no number: at zero terminal SNR c² is infinite, and the output's weight is 0."""
    schedule = LINEAR.rescale_zero_terminal_snr()
    t = torch.tensor([500, 999])
    output, target, x_t = torch.randn(3, 2, 4, dtype=torch.float64)
    plain = (output - target).square().mean()
    for estimator in ("expected", "fresh", "shared"):
        options = {"tau": 1.0, "max_c2": math.inf, "estimator": estimator}
        unbounded = SkipStepLoss(schedule, 9, **options)
        torch.testing.assert_close(unbounded.from_prediction(output, target, t), plain)
        of_score = SkipStepLoss(schedule, 9, prediction_type="score", **options)
        b = schedule.alpha_sigma(t)[1][:, None]
        found = of_score(lambda x_t, t, b=b: -output / b, x_t, t=t, noise=target)
        torch.testing.assert_close(found, ((output - target) / b).square().mean())
    for kind in ("v_prediction", "sample"):
        options = {"prediction_type": kind, "reduction": "none"}
        loss = SkipStepLoss(schedule, 9, max_c2=math.inf, **options)
        bounded = SkipStepLoss(schedule, 9, **options)
        found = loss.from_output(output, target, x_t, t)
        torch.testing.assert_close(found, bounded.from_output(output, target, x_t, t))
