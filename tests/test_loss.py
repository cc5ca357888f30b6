"""The loss, A · mse(output, regression target), against the paper's two terms on every output."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mpf
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.prediction import epsilon_from_output
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
    beside,
    drawn,
    excess_over_least,
    loss_and_gradient,
    normal,
    normals,
    same,
    schedules_with_skips,
    seeds,
    shapes,
    taus,
    timesteps,
)

pytestmark = pytest.mark.filterwarnings("ignore:prediction_type 'flow' is noise minus data")
T = torch.tensor([0, 20, 500, 999])
KINDS = pytest.mark.parametrize("kind", TYPES)
EACH_ESTIMATOR = pytest.mark.parametrize("estimator", ESTIMATORS)
SCHEDULES = {
    "linear": (LINEAR, 9),
    "linear, k = 49": (LINEAR, 49),
    "cosine": (COSINE, 9),
    "zero terminal SNR": (ZERO_SNR, 9),
    "σ": (NoiseSchedule.from_sigmas(torch.linspace(0.01, 80, 200, dtype=torch.float64)), 9),
    "vp": (VP, 0.01),
    "sub-vp": (ContinuousSchedule.sub_vp(), 0.01),
    "flow": (FLOW, 0.01),
    "cosine path": (ContinuousSchedule.cosine(), 0.01),
    "VE": (
        ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 0.002 + 80 * t)),
        0.01,
    ),
}


def c2_of(t, k):
    """c² and where a skip is valid, from ᾱ in float64."""
    bar = LINEAR.alphas_cumprod
    return torch.where(t >= k, bar[(t - k).clamp(min=0)] / bar[t] - 1, 0.0), t >= k


def two_terms(eps_hat, noise, t, zeta, schedule, skips, tau):
    """The loss as the paper prints it, sample by sample, in Python floats and float64 tensors.

    `zeta` is None for the expectation: E mse(ζ, c ε̂) = c² mean ε̂² + 1.
    """
    bar = schedule.log_alphas_cumprod
    losses = []
    for i, step in enumerate(t.tolist()):
        plain = (noise[i] - eps_hat[i]).square().mean()
        terms = []
        for k in skips:
            if step < k:
                continue
            c = math.sqrt(math.expm1(float(bar[step - k] - bar[step])))
            if zeta is None:
                terms.append(c**2 * eps_hat[i].square().mean() + 1)
            else:
                terms.append((zeta[i] - c * eps_hat[i]).square().mean())
        losses.append(tau * plain + (1 - tau) * sum(terms) / len(terms) if terms else plain)
    return torch.stack(losses)


@given(schedules_with_skips(), taus, shapes, seeds, st.sampled_from(ESTIMATORS), st.booleans())
def test_loss_gradient_and_terms_are_the_papers(given_skips, tau, shape, seed, how, normalize):
    """Of which the loss leaves out the least, and the normalised one the weight A."""
    schedule, skips = given_skips
    if float(schedule.log_alphas_cumprod[-1]) < -25:
        return  # no digits are left in the least of the two terms
    t = timesteps(schedule.num_train_timesteps, shape[0], seed)
    eps_hat, noise, xi = (normal(*shape, seed=seed + i) for i in range(3))
    options = {"tau": tau, "estimator": how, "max_c2": math.inf, "normalize": normalize}
    criterion = SkipStepLoss(schedule, skips, reduction="none", **options)
    zeta = {"expected": None, "fresh": xi, "shared": noise}[how]

    def paper(x):
        return two_terms(x, noise, t, zeta, schedule, skips, tau)

    *expected, big_a = excess_over_least(paper, eps_hat)
    if normalize:
        expected = expected[0] / big_a, expected[1] / beside(big_a, eps_hat)
    given = drawn(how, xi)
    found = loss_and_gradient(lambda x: criterion.from_output(x, noise, t, **given), eps_hat)
    same(found, expected, rtol=1e-9, atol=1e-11)
    terms = criterion.terms(eps_hat, noise, t, **given)
    torch.testing.assert_close(terms.total, paper(eps_hat), rtol=1e-10, atol=1e-12)
    skipped = t >= min(skips)
    assert terms.tau.tolist() == [tau if some else 1.0 for some in skipped]
    assert (terms.skip[~skipped] == 0).all()
    total = terms.tau * terms.simple + (1 - terms.tau) * terms.skip
    torch.testing.assert_close(total, terms.total, rtol=1e-14, atol=0)


@given(st.integers(2, 6), seeds, st.sampled_from(ESTIMATORS))
def test_times_meet_only_the_batch_axis(size, seed, estimator):
    """With every axis as long as the batch, a wrong broadcast would pass unseen."""
    data = [normal(size, size, size, size, seed=seed + i) for i in range(3)]
    t = timesteps(1000, size, seed)
    criterion = SkipStepLoss(LINEAR, 49, estimator=estimator, reduction="none")

    def loss_of(index):
        eps_hat, noise, zeta = (values[index] for values in data)
        return criterion.from_output(eps_hat, noise, t[index], **drawn(estimator, zeta))

    loss = loss_of(slice(None))
    one_by_one = torch.cat([loss_of(slice(i, i + 1)) for i in range(size)])
    torch.testing.assert_close(loss, one_by_one, rtol=1e-13, atol=0)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss_of(order), loss[order], rtol=1e-13, atol=0)


def least_zero(eps_hat, noise, t, k=9):
    """A mse(ε̂, s ε) of each sample with the estimator "expected", from ᾱ in float64."""
    c2, valid = c2_of(t, k)
    weight = torch.where(valid, 0.99 + 0.01 * c2, 1.0)
    s = beside(torch.where(valid, 0.99 / weight, 1.0), noise)
    return weight * (eps_hat.double() - s * noise.double()).square().flatten(1).mean(1)


@pytest.mark.parametrize("shape", [(6, 1), (6, 2), (6, 3, 8, 8), (6, 4, 2, 3, 3), (6,) + (2,) * 5])
@pytest.mark.parametrize(
    "dtypes",
    [
        *((dtype, dtype) for dtype in (torch.half, torch.bfloat16, torch.float32, torch.float64)),
        (torch.bfloat16, torch.float32),  # as trainers under autocast have
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_any_rank_and_any_float_type(shape, dtypes):
    eps_hat, noise = (normal(*shape, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes))
    t = torch.tensor([0, 8, 9, 300, 700, 999])
    criterion = SkipStepLoss(LINEAR, 9)
    loss, gradient = loss_and_gradient(lambda x: criterion.from_output(x, noise, t), eps_hat)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    assert (loss.dtype, gradient.dtype) == (wide, eps_hat.dtype)
    assert criterion.terms(eps_hat, noise, t).total.dtype == wide
    exact = least_zero(eps_hat, noise, t).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12 if wide == torch.float64 else 1e-6)


@pytest.mark.parametrize("weights", [None, [0.0, 1.0, 2.0, 0.5, 3.0]])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_weights(reduction, weights):
    eps_hat, noise = normals(2, 5, 3, 2)
    t, criterion = torch.tensor([0, 9, 100, 500, 999]), SkipStepLoss(LINEAR, 9, reduction=reduction)
    weights = None if weights is None else torch.tensor(weights)

    def expected(x):
        losses = least_zero(x, noise, t) * (1 if weights is None else weights.double())
        return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]

    def found(x):
        return criterion.from_output(x, noise, t, weights=weights)

    same(loss_and_gradient(found, eps_hat), loss_and_gradient(expected, eps_hat))


def test_fresh_draws_from_its_generator_alone():
    eps_hat, noise = normals(2, 4, 3)
    criterion = SkipStepLoss(LINEAR, 9, estimator="fresh")
    state = torch.get_rng_state()
    losses = [
        criterion.from_output(eps_hat, noise, T, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 1)
    ]
    xi = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1] != losses[2]
    assert losses[0] == criterion.from_output(eps_hat, noise, T, skip_noise=xi)


@EACH_ESTIMATOR
def test_terms_of_half_types_are_lifted(estimator):
    halves = normals(3, 4, 3, dtype=torch.bfloat16)
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator)
    lifted, exact = (
        criterion.terms(eps_hat, noise, T, **drawn(estimator, xi))
        for eps_hat, noise, xi in (halves, [half.float() for half in halves])
    )
    assert all(torch.equal(*pair) for pair in zip(lifted, exact, strict=True))


class TestStep:
    """`criterion(model, x0)`, which does the whole step."""

    def test_draws_what_is_not_given_in_order(self):
        x0, seen = normal(4, 3, 2, seed=0, dtype=torch.float32), []

        def model(x_t, t, scale):
            seen.append((x_t, t))
            return x_t * scale

        criterion = SkipStepLoss(LINEAR, 9, estimator="fresh")
        generator = torch.Generator().manual_seed(7)
        loss = criterion(model, x0, model_kwargs={"scale": 0.5}, generator=generator)
        generator.manual_seed(7)
        t = torch.randint(1000, (4,), generator=generator)
        noise, zeta = (torch.randn(4, 3, 2, generator=generator) for _ in range(2))
        bar = LINEAR.alphas_cumprod[t].float()[:, None, None]
        x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        assert len(seen) == 1
        assert torch.equal(seen[0][1], t)
        torch.testing.assert_close(seen[0][0], x_t)
        expected = criterion.from_output(x_t * 0.5, noise, t, skip_noise=zeta)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)

    def test_everything_given_and_what_models_return(self):
        (x0, noise), t = normals(2, 3, 2), torch.tensor([0, 50, 999])

        class Output:
            def __init__(self, sample):
                self.sample = sample

        state, criterion = torch.get_rng_state(), SkipStepLoss(LINEAR, 9)
        bar = LINEAR.alphas_cumprod[t][:, None]
        x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        expected = criterion.from_output(0.3 * x_t, noise, t)
        for wrap in (lambda x: x, lambda x: (x, None), lambda x: [x], Output):
            loss = criterion(lambda x_t, t, wrap=wrap: wrap(0.3 * x_t), x0, t=t, noise=noise)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_data_gives_the_model_half_inputs(self, dtype):
        x0, seen = normal(4, 3, seed=0, dtype=dtype), []
        loss = SkipStepLoss(LINEAR, 9)(lambda x, t: seen.append(x) or x, x0)
        assert (seen[0].dtype, loss.dtype) == (dtype, torch.float32)

    @KINDS
    def test_a_model_may_overwrite_what_it_is_given(self, kind):
        criterion = SkipStepLoss(LINEAR, 99, prediction_type=kind, reduction="none", tau=0.5)
        (x0, noise), t = normals(2, 3, 5), torch.tensor([300, 500, 999])

        def spoils(x_t, t):
            t.sub_(200)
            return x_t.mul_(0.3)

        found = criterion(spoils, x0, t, noise=noise)
        assert t.tolist() == [300, 500, 999]
        assert torch.equal(found, criterion(lambda x_t, _: 0.3 * x_t, x0, t, noise=noise))
        earlier = criterion(lambda x_t, _: 0.3 * x_t, x0, t - 200, noise=noise)
        assert not torch.allclose(found, earlier)

    def test_weights_that_a_draw_returns_are_multiplied_by_the_callers(self):
        (x0, noise), t = normals(2, 4, 3), torch.tensor([0, 9, 500, 999])
        of_draw, of_caller = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 0.0, 1.0, 1.0])
        criterion = SkipStepLoss(LINEAR, 9, timesteps=lambda count, **_: (t, of_draw))
        each = SkipStepLoss(LINEAR, 9, reduction="none")(lambda x, t: 0 * x, x0, t, noise=noise)
        for given_weights, weights in ((None, of_draw), (of_caller, of_draw * of_caller)):
            found = criterion(lambda x, t: 0 * x, x0, weights=given_weights, noise=noise)
            torch.testing.assert_close(found, (each * weights).mean())
        torch.testing.assert_close(criterion(lambda x, t: 0 * x, x0, t, noise=noise), each.mean())


def test_repr_says_what_it_is():
    assert repr(SkipStepLoss(LINEAR, 49)) == (
        "SkipStepLoss(NoiseSchedule.linear(1000), SkipSet(49), tau=0.99, estimator='expected')"
    )
    options = {"reduction": "sum", "prediction_type": "flow", "normalize": True, "max_c2": 4.0}
    options |= {"tau": 0.5, "estimator": "fresh", "timesteps": "stratified"}
    assert repr(SkipStepLoss(LINEAR, [1, 9], **options)) == (
        "SkipStepLoss(NoiseSchedule.linear(1000), SkipSet([1, 9]), tau=0.5, estimator='fresh',"
        " reduction='sum', prediction_type='flow', normalize=True, max_c2=4.0,"
        " timesteps='stratified')"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_follow_the_tensors_to_a_gpu():
    criterion, data = SkipStepLoss(LINEAR, 9), (*normals(2, 4, 3), T)
    on_gpu = criterion.from_output(*(x.cuda() for x in data))
    torch.testing.assert_close(on_gpu.cpu(), criterion.from_output(*data))


# On every output


def times_of(schedule):
    """Every time, but the first: there, on a path without noise, the score is infinite."""
    if schedule.timesteps is not None:
        return schedule.timesteps[1:]
    return torch.linspace(0, 1, 41, dtype=torch.float64)[1:]


def sizes(gradient):
    return gradient.flatten(1).norm(dim=1)


@KINDS
@pytest.mark.parametrize("name", SCHEDULES)
def test_tau_one_is_the_plain_loss_of_the_output(name, kind):
    schedule, skip = SCHEDULES[name]
    t = times_of(schedule)
    output, target, x_t, x0, eps = batch(schedule, t, kind)
    options = {"tau": 1.0, "prediction_type": kind, "estimator": ESTIMATORS[TYPES.index(kind) % 3]}
    criterion = SkipStepLoss(schedule, skip, **options)
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
    low, high = (0.9, 1.1) if name == "linear" else (0.8, 2.0)  # the released loss's is as near
    ratio = sizes(gradient) / sizes(plain)
    assert low < ratio.min() <= ratio.max() < high
    if name == "linear" or (name, kind) == ("cosine", "v_prediction"):
        # As weights of 1 / ratio² on ε̂ the latter had 2,000 times the plain gradient.
        assert 0.98 < gradient.norm() / plain.norm() < 1.02


@EACH_ESTIMATOR
@KINDS
@pytest.mark.parametrize("name", ["linear", "zero terminal SNR", "flow"])
def test_every_way_in_is_the_same_loss(name, kind, estimator):
    """The whole step and a trainer's own loss of the changed target; 0 where the two are equal."""
    schedule, skip = SCHEDULES[name]
    t = times_of(schedule)[::37] if schedule.timesteps is None else torch.tensor([1, 9, 400, 999])
    output, target, x_t, x0, eps = batch(schedule, t, kind)
    options = {"estimator": estimator, "prediction_type": kind, "reduction": "none"}
    criterion = SkipStepLoss(schedule, skip, **options)
    given = drawn(estimator, normal(*x0.shape, seed=9))
    changed = criterion.regression_target(target, t, x_t, **given)
    assert changed.weight.shape == t.shape
    expected, *others = (
        loss_and_gradient(way, output)
        for way in (
            lambda o: criterion.from_output(o, target, t, x_t, **given),
            lambda o: criterion(lambda x_t, t: o, x0, t, noise=eps, **given),
            lambda o: changed.weight * (o - changed.target).square().mean((1, 2)),
        )
    )
    for found in others:
        same(found, expected, rtol=1e-9, atol=1e-12)
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
    c2 = float(c2_of(t, 99)[0][1])  # where no bound acts
    assert s[:2].tolist() == pytest.approx([1, 0.99 / (0.99 + 0.01 * c2)], rel=1e-12)


@EACH_ESTIMATOR
@pytest.mark.parametrize(
    ("bars", "max_c2"),
    [
        *(([0.9, 0.36, 0.01], max_c2) for max_c2 in (0.0, 0.5, 4.0, math.inf)),
        # The end of a schedule, where a bound of √max_c2 on c / ratio moved the target of v by 0.1.
        (COSINE.alphas_cumprod[[981, 990, 999]].tolist(), 100.0),
    ],
    ids=["max_c2 0", "0.5", "4", "none", "end of cosine"],
)
@KINDS
def test_the_bounds_on_c_and_c2(kind, bars, max_c2, estimator):
    """c² <= max_c2 · min(1, ratio²) and c <= √max_c2 · min(1, ratio²), against 40 digits."""
    pairs = [oracle.vp_pair(mpf(bar)) for bar in bars]
    t, xi = torch.tensor([1, 2]), normal(2, 3, 2, seed=9)
    options = {"tau": 0.9, "max_c2": max_c2, "prediction_type": kind, "estimator": estimator}
    schedule = NoiseSchedule.from_alphas_cumprod(bars)
    criterion = SkipStepLoss(schedule, 1, reduction="none", **options)
    output, target, x_t, x0, eps = batch(schedule, t, kind)
    found = criterion.from_output(output, target, t, x_t, **drawn(estimator, xi))
    for i in range(2):
        at = oracle.scales(pairs[i + 1], [pairs[i]], 0.9, max_c2, kind=kind)
        expected = at.loss(output[i], x0[i], eps[i], xi[i], estimator)
        torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=0)


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
        plain = loss_and_gradient(lambda o: 0.99 * (o - target).square().mean((1, 2)), output)
        same((loss[1], gradient[1]), (plain[0][1], plain[1][1]))
    if kind == "epsilon" and max_c2 == math.inf:
        assert criterion.terms(output, target, t, **given).total[1] == math.inf
    unbounded = SkipStepLoss(ZERO_SNR, 9, tau=1.0, **options)
    found = unbounded.from_output(output, target, t, x_t, **given)
    torch.testing.assert_close(found, (output - target).square().mean())


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_a_score_without_noise(weighting):
    """It is infinite there: refused, but with a weighting, which leaves nothing of its error."""
    bars = torch.cat([torch.ones(1, dtype=torch.float64), LINEAR.alphas_cumprod[:-1]])
    schedule = NoiseSchedule.from_alphas_cumprod(bars)
    with pytest.raises(ValueError, match=r"'score' must have noise.*none at t = 0, .*a weighting"):
        SkipStepLoss(schedule, 9, prediction_type="score")
    t, (x0, noise, output) = torch.tensor([0, 300, 999]), normals(3, 3, 4)
    b = schedule.alpha_sigma(t)[1][:, None]
    (loss, gradient), (_, wanted) = (
        loss_and_gradient(
            lambda o, kind=kind, scale=scale: SkipStepLoss(
                schedule, 9, prediction_type=kind, weighting=weighting, reduction="none"
            )(lambda x_t, t: scale * o, x0, t=t, noise=noise),
            output,
        )
        for kind, scale in (("score", 1), ("epsilon", -b))
    )
    assert loss.isfinite().all()
    torch.testing.assert_close(gradient[1:], wanted[1:], rtol=1e-5, atol=1e-7)
    assert gradient[0].abs().max() < 1e-6


@KINDS
def test_x_t_is_asked_for_where_the_target_holds_data(kind):
    t, criterion = torch.tensor([9, 500]), SkipStepLoss(LINEAR, 9, prediction_type=kind)
    output, target, x_t, *_ = batch(LINEAR, t, kind)
    for call in (
        lambda *x_t: criterion.from_output(output, target, t, *x_t),
        lambda *x_t: criterion.regression_target(target, t, *x_t).target,
    ):
        if kind in ("epsilon", "score"):
            assert torch.equal(call(), call(x_t))
        else:
            with pytest.raises(ValueError, match=rf"x_t must be given for .*{kind}.*holds data"):
                call()
        with pytest.raises(ValueError, match="x_t must have the shape of target"):
            call(x_t[:, :1])


# What a network learns


@pytest.mark.parametrize("normalize", [False, True])
@EACH_ESTIMATOR
def test_a_network_learns_s_times_the_conditional_mean(estimator, normalize):
    """On x_0 ~ N(0, v) E[ε | x_t] = b x_t / (a² v + b²): one weight for each t holds it exactly."""
    times, k, tau, variance, count = torch.tensor([5, 98, 99, 400, 700, 999]), 99, 0.9, 0.6, 64
    # Moments exact in the sample, so that no sampling error is left.
    q, _ = torch.linalg.qr(normal(count, 3, seed=0))
    x0, noise, zeta = ((x * count**0.5).repeat(len(times))[:, None] for x in q.unbind(1))
    x0, t = x0 * variance**0.5, times.repeat_interleave(count)
    bar = LINEAR.alphas_cumprod[t][:, None]
    x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    criterion = SkipStepLoss(LINEAR, k, tau=tau, estimator=estimator, normalize=normalize)
    slopes = [
        loss_and_gradient(
            lambda weights: criterion.from_output(
                weights.repeat_interleave(count)[:, None] * x_t, noise, t, **drawn(estimator, zeta)
            ),
            torch.full((len(times),), start, dtype=torch.float64),
        )[1]
        for start in (0.0, 1.0)
    ]
    learned = slopes[0] / (slopes[0] - slopes[1])  # where the slope is 0

    c2, valid = c2_of(times, k)
    share = (1 - tau) * valid.double()
    s = 1 - share + (share * c2.sqrt() if estimator == "shared" else 0)
    s = s / (1 - share + share * c2)
    assert s[:2].tolist() == [1, 1]
    assert (s[2:] - 1).abs().min() > 1e-3  # far above the tolerance below
    bar = LINEAR.alphas_cumprod[times]
    mean = (1 - bar).sqrt() / (bar * variance + 1 - bar)
    torch.testing.assert_close(learned, s * mean, rtol=1e-9, atol=0)
