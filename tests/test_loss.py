"""The loss, A · mse(output, regression target), against the paper's two terms on every output."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpmath import mp, mpf

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
    ways_in,
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
    "VE": (ContinuousSchedule.from_alpha_sigma(lambda t: (0 * t + 1, 0.002 + 80 * t)), 0.01),
}


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
    pairs = [oracle.vp_pair(mp.exp(mpf(x))) for x in schedule.log_alphas_cumprod.tolist()]
    exact = [
        oracle.scales(pairs[i], [pairs[i - k] for k in skips if i >= k], tau, math.inf) for i in t
    ]

    def paper(x):
        each = zip(exact, x, noise, xi, strict=True)
        return torch.stack([at.two_terms(*values, how)[2] for at, *values in each])

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


def least_zero(eps_hat, noise, t, k=9):
    """A mse(ε̂, s ε) of each sample with the estimator "expected", from ᾱ in float64."""
    bar, valid = LINEAR.alphas_cumprod, t >= k
    c2 = bar[(t - k).clamp(min=0)] / bar[t] - 1
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
    changed = criterion.regression_target(noise, t)
    lifted = torch.promote_types(noise.dtype, torch.float32)
    assert changed.target.dtype == changed.weight.dtype == lifted
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


@EACH_ESTIMATOR
def test_terms_of_half_types_are_lifted(estimator):
    halves = normals(3, 4, 3, dtype=torch.bfloat16)
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator)
    lifted, exact = (
        criterion.terms(eps_hat, noise, T, **drawn(estimator, xi))
        for eps_hat, noise, xi in (halves, [half.float() for half in halves])
    )
    assert all(torch.equal(*pair) for pair in zip(lifted, exact, strict=True))


def test_the_skip_noise_follows_the_type_of_the_data():
    eps_hat, noise, xi = normals(3, 4, 3, dtype=torch.float32)
    criterion = SkipStepLoss(LINEAR, 9, estimator="fresh", reduction="none")
    found, expected = (
        criterion.from_output(eps_hat, noise, T, skip_noise=each) for each in (xi.double(), xi)
    )
    assert criterion.regression_target(noise, T, skip_noise=xi.double()).weight.dtype == found.dtype
    torch.testing.assert_close(found, expected)  # in float32


class TestStep:
    """`criterion(model, x0)`, which does the whole step."""

    def test_draws_what_is_not_given_in_order_from_its_generator_alone(self):
        state, seen = torch.get_rng_state(), []
        x0 = normal(4, 3, 2, seed=0, dtype=torch.float32)

        def model(x_t, t, scale):
            seen.append((x_t, t))
            return x_t * scale

        criterion = SkipStepLoss(LINEAR, 9, estimator="fresh")
        generator = torch.Generator().manual_seed(7)
        loss = criterion(model, x0, model_kwargs={"scale": 0.5}, generator=generator)
        generator.manual_seed(7)
        t = torch.randint(1000, (4,), generator=generator)
        noise = torch.randn(4, 3, 2, generator=generator)
        before_xi = generator.get_state()
        xi = torch.randn(4, 3, 2, generator=generator)
        bar = LINEAR.alphas_cumprod[t].float()[:, None, None]
        x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        ((found_x_t, found_t),) = seen
        assert torch.equal(found_t, t)
        torch.testing.assert_close(found_x_t, x_t)
        expected = criterion.from_output(x_t * 0.5, noise, t, skip_noise=xi)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        generator.set_state(before_xi)
        assert criterion.from_output(x_t * 0.5, noise, t, generator=generator) == expected
        all_given = criterion(lambda x_t, t: x_t * 0.5, x0, t, noise=noise, skip_noise=xi)
        assert all_given == loss
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
    """τ, estimator and prediction type always, the rest where it is not the default."""

    class Mine(SkipStepLoss):
        """With an option of its own."""

        def __init__(self, *args, extra=1, **options):
            super().__init__(*args, **options)

    always = {"tau": 0.99, "estimator": "expected", "prediction_type": "epsilon"}
    every = {"tau": 0.5, "estimator": "fresh", "reduction": "sum", "prediction_type": "flow"}
    every |= {"normalize": True, "max_c2": 4.0, "timesteps": "stratified"}
    for own, said in (({}, always), (every, every)):
        options = ", ".join(f"{name}={value!r}" for name, value in said.items())
        expected = f"Mine(NoiseSchedule.linear(1000), SkipSet(9), {options})"
        assert repr(Mine(LINEAR, 9, **own)) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_follow_the_tensors_to_a_gpu():
    criterion, data = SkipStepLoss(LINEAR, 9), (*normals(2, 4, 3), T)
    on_gpu = criterion.from_output(*(x.cuda() for x in data))
    torch.testing.assert_close(on_gpu.cpu(), criterion.from_output(*data))


def sizes(gradient):
    return gradient.flatten(1).norm(dim=1)


@KINDS
@pytest.mark.parametrize("name", SCHEDULES)
def test_tau_one_is_the_plain_loss_of_the_output_and_the_default_is_near(name, kind):
    schedule, skip = SCHEDULES[name]
    times, steps = torch.linspace(0, 1, 41, dtype=torch.float64), schedule.timesteps
    t = (times if steps is None else steps)[1:]  # at the first a score may be infinite
    output, *data = batch(schedule, t, kind)
    target, x_t = data[:2]
    options = {"tau": 1.0, "prediction_type": kind, "estimator": ESTIMATORS[TYPES.index(kind) % 3]}
    criterion = SkipStepLoss(schedule, skip, reduction="none", **options)
    plain, plain_gradient = loss_and_gradient(lambda o: (o - target).square().mean((1, 2)), output)
    for way in ways_in(criterion, t, *data):
        loss, gradient = loss_and_gradient(way, output)
        assert ((loss - plain).abs() <= 1e-12 * plain).all()
        # Each sample's gradient against its own size, since a score's grows without end.
        assert (sizes(gradient - plain_gradient) <= 1e-12 * sizes(plain_gradient)).all()
    changed = criterion.regression_target(target.float(), t, x_t.float())
    assert torch.equal(changed.target, target.float())
    assert torch.equal(changed.weight, torch.ones(len(t)))
    # At τ = 0.99 A is at most 1.99 and s at least 0.49, whatever the schedule's end.
    criterion = SkipStepLoss(schedule, skip, prediction_type=kind, reduction="none")
    loss, gradient = loss_and_gradient(lambda o: criterion.from_output(o, target, t, x_t), output)
    assert loss.isfinite().all()
    low, high = (0.9, 1.1) if name == "linear" else (0.8, 2.0)  # the released loss's is as near
    ratio = sizes(gradient) / sizes(plain_gradient)
    assert low < ratio.min() <= ratio.max() < high
    if name == "linear" or (name, kind) == ("cosine", "v_prediction"):
        # As weights of 1 / ratio² on ε̂ the latter had 2,000 times the plain gradient.
        assert 0.98 < gradient.norm() / plain_gradient.norm() < 1.02


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
    c2 = float(LINEAR.alphas_cumprod[201] / LINEAR.alphas_cumprod[300]) - 1  # where no bound acts
    assert s[:2].tolist() == pytest.approx([1, 0.99 / (0.99 + 0.01 * c2)], rel=1e-12)


def vp_case(bars, max_c2):
    schedule = NoiseSchedule.from_alphas_cumprod(bars)
    return schedule, 1, torch.tensor([1, 2]), [oracle.vp_pair(mpf(bar)) for bar in bars], max_c2


HALVES = torch.tensor([0.0, 0.5, 1.0])
BOUNDS = {
    **{f"max_c2 {bound}": vp_case([0.9, 0.36, 0.01], bound) for bound in (0.0, 0.5, 4.0, math.inf)},
    # Where a bound of √max_c2 on c / ratio moved the target of v by 0.1.
    "end of cosine": vp_case(COSINE.alphas_cumprod[[981, 990, 999]].tolist(), 100.0),
    "zero terminal SNR": vp_case([0.9, 0.36, 0.0], 100.0),
    "flow": (FLOW, 0.5, HALVES[1:], [(1 - mpf(t), mpf(t)) for t in HALVES.tolist()], 100.0),
}


@EACH_ESTIMATOR
@pytest.mark.parametrize("case", BOUNDS)
@KINDS
def test_every_way_in_and_the_bounds_on_c_and_c2(kind, case, estimator):
    """c² <= max_c2 · min(1, ratio²) and c <= √max_c2 · min(1, ratio²), against 40 digits."""
    schedule, skip, t, pairs, max_c2 = BOUNDS[case]
    output, *data = batch(schedule, t, kind)
    x0, eps, xi = *data[2:], normal(2, 3, 2, seed=9)
    options = {"tau": 0.9, "max_c2": max_c2, "prediction_type": kind, "estimator": estimator}
    criterion = SkipStepLoss(schedule, skip, reduction="none", **options)
    exact = [
        oracle.scales(pair, [earlier], 0.9, max_c2, kind=kind)
        for earlier, pair in itertools.pairwise(pairs)
    ]

    def by_the_oracle(o):
        each = zip(exact, o, x0, eps, xi, strict=True)
        return torch.stack([at.loss(*values, estimator) for at, *values in each])

    expected = loss_and_gradient(by_the_oracle, output)
    for way in ways_in(criterion, t, *data, **drawn(estimator, xi)):
        same(loss_and_gradient(way, output), expected, rtol=1e-9, atol=0)


@EACH_ESTIMATOR
@KINDS
def test_without_a_bound_where_nothing_is_left_of_the_data(kind, estimator):
    """Infinite for ε and score, and not NaN; any other output has its own target, at weight τ."""
    t = torch.tensor([500, 999])
    output, target, x_t, *_ = batch(ZERO_SNR, t, kind)
    options = {"estimator": estimator, "prediction_type": kind, "max_c2": math.inf}
    criterion = SkipStepLoss(ZERO_SNR, 9, reduction="none", **options)
    given = drawn(estimator, normal(2, 3, 2, seed=9))
    loss, gradient = loss_and_gradient(
        lambda o: criterion.from_output(o, target, t, x_t, **given), output
    )
    assert loss[0].isfinite()
    assert gradient[0].isfinite().all()
    if kind in ("epsilon", "score"):
        assert loss[1] == math.inf
        assert not gradient.isnan().any()
    else:
        plain = loss_and_gradient(lambda o: 0.99 * (o - target).square().mean((1, 2)), output)
        same((loss[1], gradient[1]), (plain[0][1], plain[1][1]))
    if kind == "epsilon":
        assert criterion.terms(output, target, t, **given).total[1] == math.inf
    of_tau_one = SkipStepLoss(ZERO_SNR, 9, tau=1.0, **options)
    found = of_tau_one.from_output(output, target, t, x_t, **given)
    torch.testing.assert_close(found, (output - target).square().mean())


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_a_score_without_noise(weighting):
    """It is infinite there; a weighting leaves nothing of its error."""
    bars = torch.cat([torch.ones(1, dtype=torch.float64), LINEAR.alphas_cumprod[:-1]])
    schedule = NoiseSchedule.from_alphas_cumprod(bars)
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
