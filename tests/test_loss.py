"""The loss of a noise prediction against the two-term formula; reductions, the step, the module."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from tests.strategies import (
    drawn,
    excess_over_least,
    loss_and_gradient,
    normal,
    schedules,
    schedules_with_skip,
    seeds,
    shapes,
    taus,
    timesteps,
)

ESTIMATORS = ["expected", "fresh", "shared"]
LINEAR = NoiseSchedule.linear(1000)
T = torch.tensor([0, 20, 500, 999])


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


def check(criterion, eps_hat, noise, t, zeta, skips):
    """Loss, gradient and terms against the two terms, of which the loss leaves out the least."""
    given_zeta = drawn(criterion.estimator, zeta)
    target = {"expected": None, "fresh": zeta, "shared": noise}[criterion.estimator]

    def paper(x):
        return two_terms(x, noise, t, target, criterion.schedule, skips, criterion.tau)

    found = loss_and_gradient(lambda x: criterion.from_output(x, noise, t, **given_zeta), eps_hat)
    for value, expected in zip(found, excess_over_least(paper, eps_hat), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    terms = criterion.terms(eps_hat, noise, t, **given_zeta)
    torch.testing.assert_close(terms.total, paper(eps_hat), rtol=1e-10, atol=1e-12)
    skipped = t >= min(skips)
    assert terms.tau.tolist() == [criterion.tau if some else 1.0 for some in skipped]
    assert (terms.skip[~skipped] == 0).all()
    total = terms.tau * terms.simple + (1 - terms.tau) * terms.skip
    torch.testing.assert_close(total, terms.total, rtol=1e-14, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(schedules_with_skip(), taus, shapes, seeds)
def test_one_skip(estimator, schedule_and_skip, tau, shape, seed):
    schedule, k = schedule_and_skip
    if float(schedule.log_alphas_cumprod[-1]) < -25:
        return  # no digits are left in the least of the two terms
    t = timesteps(schedule.num_train_timesteps, shape[0], seed)
    options = {"tau": tau, "estimator": estimator, "max_c2": math.inf, "reduction": "none"}
    criterion = SkipStepLoss(schedule, k, **options)
    check(
        criterion,
        *(normal(*shape, seed=seed + i) for i in range(2)),
        t,
        normal(*shape, seed=seed + 2),
        [k],
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(schedules(min_size=5, max_size=300), seeds)
def test_several_skips_are_the_mean_of_each(estimator, schedule, seed):
    count = schedule.num_train_timesteps
    if float(schedule.log_alphas_cumprod[-1]) < -25:
        return
    skips = sorted(set((timesteps(count - 1, 3, seed) + 1).tolist()))
    t = timesteps(count, 6, seed + 1)
    t[0], t[1] = 0, count - 1
    criterion = SkipStepLoss(
        schedule, skips, estimator=estimator, reduction="none", max_c2=math.inf
    )
    eps_hat, noise, zeta = (normal(6, 3, seed=seed + i) for i in range(3))
    check(criterion, eps_hat, noise, t, zeta, skips)


@pytest.mark.parametrize("k", [9, 99])
def test_fresh_averaged_over_its_noise_is_expected(k):
    t = torch.tensor([0, k - 1, k, 500, 999])
    eps_hat, noise = normal(5, 4, seed=0), normal(5, 4, seed=1)
    count, generator = 4000, torch.Generator().manual_seed(2)
    fresh, expected = (
        SkipStepLoss(LINEAR, k, tau=0.9, estimator=name, reduction="none")
        for name in ("fresh", "expected")
    )
    samples = []
    for _ in range(count):
        zeta = torch.randn(noise.shape, dtype=noise.dtype, generator=generator)
        _, gradient = loss_and_gradient(
            lambda x, zeta=zeta: fresh.from_output(x, noise, t, skip_noise=zeta), eps_hat
        )
        samples.append((fresh.terms(eps_hat, noise, t, skip_noise=zeta).total, gradient))
    means = (
        expected.terms(eps_hat, noise, t).total,
        loss_and_gradient(lambda x: expected.from_output(x, noise, t), eps_hat)[1],
    )
    for values, mean in zip(zip(*samples, strict=True), means, strict=True):
        stacked = torch.stack(values)
        error = stacked.std(0) / count**0.5
        # Below t = k there is no draw: the error is 0 and the values are equal to rounding.
        assert ((stacked.mean(0) - mean).abs() <= 4 * error + 1e-12).all()
        assert (error[2:] > 1e-6).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(schedules_with_skip(), shapes, seeds)
def test_tau_one_is_mse_loss(estimator, dtype, schedule_and_skip, shape, seed):
    schedule, k = schedule_and_skip
    t = timesteps(schedule.num_train_timesteps, shape[0], seed)
    eps_hat, noise = (normal(*shape, seed=seed + i, dtype=dtype) for i in range(2))
    criterion = SkipStepLoss(schedule, k, tau=1.0, estimator=estimator)
    loss, gradient = loss_and_gradient(lambda x: criterion.from_output(x, noise, t), eps_hat)
    plain, plain_gradient = loss_and_gradient(lambda x: F.mse_loss(x, noise), eps_hat)
    rounding = 4e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(loss, plain, rtol=rounding, atol=0)
    torch.testing.assert_close(gradient, plain_gradient, rtol=rounding, atol=1e-30)


@given(st.integers(2, 6), seeds, st.sampled_from(ESTIMATORS))
def test_times_meet_only_the_batch_axis(size, seed, estimator):
    """With every axis as long as the batch, a wrong broadcast would pass unseen."""
    batch = [normal(size, size, size, size, seed=seed + i) for i in range(3)]
    t = timesteps(1000, size, seed)
    criterion = SkipStepLoss(LINEAR, 49, estimator=estimator, reduction="none")

    def loss_of(index):
        eps_hat, noise, zeta = (values[index] for values in batch)
        return criterion.from_output(eps_hat, noise, t[index], **drawn(estimator, zeta))

    loss = loss_of(slice(None))
    one_by_one = torch.cat([loss_of(slice(i, i + 1)) for i in range(size)])
    torch.testing.assert_close(loss, one_by_one, rtol=1e-13, atol=0)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss_of(order), loss[order], rtol=1e-13, atol=0)


def least_zero(eps_hat, noise, t, k=9):
    """A mse(ε̂, s ε) of each sample with the estimator "expected", from ᾱ in float64."""
    bar = LINEAR.alphas_cumprod
    c2 = torch.where(t >= k, bar[(t - k).clamp(min=0)] / bar[t] - 1, 0.0)
    weight = torch.where(t >= k, 0.99 + 0.01 * c2, 1.0)
    s = torch.where(t >= k, 0.99 / weight, 1.0).reshape(-1, *[1] * (noise.ndim - 1))
    return weight * (eps_hat.double() - s * noise.double()).square().flatten(1).mean(1)


@pytest.mark.parametrize("shape", [(6, 1), (6, 2), (6, 3, 8, 8), (6, 4, 2, 3, 3), (6,) + (2,) * 5])
@pytest.mark.parametrize(
    "dtypes",
    [
        *(
            (dtype, dtype)
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        ),
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
    assert loss.dtype == wide
    assert gradient.dtype == eps_hat.dtype
    exact = least_zero(eps_hat, noise, t).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12 if wide == torch.float64 else 1e-6)


@pytest.mark.parametrize("weights", [None, [0.0, 1.0, 2.0, 0.5, 3.0]])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_and_weights(reduction, weights):
    eps_hat, noise = normal(5, 3, 2, seed=0), normal(5, 3, 2, seed=1)
    t, criterion = torch.tensor([0, 9, 100, 500, 999]), SkipStepLoss(LINEAR, 9, reduction=reduction)
    weights = None if weights is None else torch.tensor(weights)

    def expected(x):
        losses = least_zero(x, noise, t) * (1 if weights is None else weights.double())
        return {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]

    found = loss_and_gradient(
        lambda x: criterion.from_output(x, noise, t, weights=weights), eps_hat
    )
    for value, wanted in zip(found, loss_and_gradient(expected, eps_hat), strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_normalized_it_is_mse_to_the_target(estimator):
    """The loss over A: the gradient is 1/A times the loss's."""
    eps_hat, noise, zeta = (normal(4, 3, seed=i) for i in range(3))
    t = torch.tensor([3, 99, 600, 999])
    (_, gradient), (normalized, normalized_gradient) = (
        loss_and_gradient(
            lambda x, normalize=normalize: SkipStepLoss(
                LINEAR, 99, estimator=estimator, reduction="none", normalize=normalize
            ).from_output(x, noise, t, **drawn(estimator, zeta)),
            eps_hat,
        )
        for normalize in (False, True)
    )
    bar = LINEAR.alphas_cumprod
    c2 = torch.where(t >= 99, bar[(t - 99).clamp(min=0)] / bar[t] - 1, 0.0)
    a = torch.where(t >= 99, 0.99 + 0.01 * c2, 1.0)
    torch.testing.assert_close(normalized_gradient, gradient / a[:, None], rtol=1e-10, atol=1e-14)
    # mse(ε̂, target) with target = ε̂ - gradient · D / 2
    torch.testing.assert_close(normalized, (normalized_gradient * 3 / 2).square().mean(1))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_not_a_number_stays_one(estimator):
    eps_hat = normal(4, 3, seed=0)
    eps_hat[2, 1] = math.nan
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, reduction="none")
    loss = criterion.from_output(eps_hat, normal(4, 3, seed=1), T)
    assert loss.isnan().tolist() == [False, False, True, False]


def test_fresh_draws_from_its_generator_alone():
    eps_hat, noise = normal(4, 3, seed=0), normal(4, 3, seed=1)
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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_terms_of_half_types_are_lifted(estimator):
    halves = [normal(4, 3, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator)
    lifted, exact = (
        criterion.terms(eps_hat, noise, T, **drawn(estimator, xi))
        for eps_hat, noise, xi in (halves, [half.float() for half in halves])
    )
    for found, expected in zip(lifted, exact, strict=True):
        assert torch.equal(found, expected)


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

    @pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "sample"])
    def test_everything_given_and_what_models_return(self, kind):
        x0, noise, t = normal(3, 2, seed=0), normal(3, 2, seed=1), torch.tensor([0, 50, 999])

        class Output:
            def __init__(self, sample):
                self.sample = sample

        wrap = {"tensor": lambda x: x, "tuple": lambda x: (x, None), "list": lambda x: [x]}
        state = torch.get_rng_state()
        criterion = SkipStepLoss(LINEAR, 9)
        loss = criterion(lambda x_t, t: wrap.get(kind, Output)(0.3 * x_t), x0, t=t, noise=noise)
        assert torch.equal(torch.get_rng_state(), state)
        bar = LINEAR.alphas_cumprod[t][:, None]
        x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        assert torch.allclose(loss, criterion.from_output(0.3 * x_t, noise, t), rtol=1e-12)

    @pytest.mark.parametrize(
        "schedule", [ContinuousSchedule.vp(), ContinuousSchedule.flow()], ids=repr
    )
    def test_continuous_time(self, schedule):
        x0, noise, seen = normal(64, 3, seed=0).float(), normal(64, 3, seed=1).float(), []
        criterion = SkipStepLoss(schedule, 0.05, tau=0.9, reduction="none", normalize=True)
        loss = criterion(
            lambda x_t, t: seen.append(t) or torch.zeros_like(x_t),
            x0,
            noise=noise,
            generator=torch.Generator().manual_seed(0),
        )
        t = seen[0]
        assert t.dtype == torch.float32
        assert ((t >= 0) & (t <= 1)).all()
        assert (t < 0.05).any()
        # ε̂ = 0: s² mean ε², with c² = snr(t-δ) (1 + 1/snr(t)) / (1 + snr(t-δ)) - 1 from a and b
        (a, b), (a_then, b_then) = (schedule.alpha_sigma(x) for x in (t, (t - 0.05).clamp(min=0)))
        bar, bar_then = a**2 / (a**2 + b**2), a_then**2 / (a_then**2 + b_then**2)
        c2 = (bar_then / bar - 1).clamp(max=100)
        s = torch.where(t >= 0.05, 0.9 / (0.9 + 0.1 * c2), 1.0)
        expected = (s.square() * noise.square().mean(1)).float()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_data_gives_the_model_half_inputs(self, dtype):
        x0, seen = normal(4, 3, seed=0, dtype=dtype), []
        loss = SkipStepLoss(LINEAR, 9)(lambda x, t: seen.append(x) or x, x0)
        assert seen[0].dtype == dtype
        assert loss.dtype == torch.float32

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow", "score"])
    def test_a_model_may_overwrite_what_it_is_given(self, kind):
        criterion = SkipStepLoss(LINEAR, 99, prediction_type=kind, reduction="none", tau=0.5)
        x0, noise, t = normal(3, 5, seed=0), normal(3, 5, seed=1), torch.tensor([300, 500, 999])

        def spoils(x_t, t):
            t.sub_(200)
            return x_t.mul_(0.3)

        found = criterion(spoils, x0, t, noise=noise)
        assert t.tolist() == [300, 500, 999]
        assert torch.equal(found, criterion(lambda x_t, _: 0.3 * x_t, x0, t, noise=noise))
        earlier = criterion(lambda x_t, _: 0.3 * x_t, x0, t - 200, noise=noise)
        assert not torch.allclose(found, earlier)

    def test_weights_that_a_draw_returns_are_multiplied_by_the_callers(self):
        x0, t = normal(4, 3, seed=0), torch.tensor([0, 9, 500, 999])
        of_draw, of_caller = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 0.0, 1.0, 1.0])
        options = {"noise": normal(4, 3, seed=1)}
        criterion = SkipStepLoss(LINEAR, 9, timesteps=lambda count, **_: (t, of_draw))
        plain = SkipStepLoss(LINEAR, 9, reduction="none")(lambda x, t: 0 * x, x0, t, **options)
        for given_weights, weights in ((None, of_draw), (of_caller, of_draw * of_caller)):
            found = criterion(lambda x, t: 0 * x, x0, weights=given_weights, **options)
            torch.testing.assert_close(found, (plain * weights).mean())
        torch.testing.assert_close(criterion(lambda x, t: 0 * x, x0, t, **options), plain.mean())


class TestModule:
    def test_leaves_no_trace_in_a_state_dict(self):
        criterion = SkipStepLoss(LINEAR, 9)
        assert criterion.state_dict() == {}
        assert list(criterion.parameters()) == list(criterion.buffers()) == []

    @pytest.mark.parametrize("schedule", [LINEAR, ContinuousSchedule.sub_vp()], ids=repr)
    def test_copies_and_pickles(self, schedule):
        skip = 9 if schedule is LINEAR else 0.01
        criterion = SkipStepLoss(schedule, skip, tau=0.9, estimator="shared", reduction="none")
        eps_hat, noise = normal(4, 3, seed=0), normal(4, 3, seed=1)
        t = schedule.draw_timesteps(4, device=torch.device("cpu"))
        stream = io.BytesIO()
        torch.save(criterion, stream)
        stream.seek(0)
        for again in (
            copy.deepcopy(criterion),
            pickle.loads(pickle.dumps(criterion)),  # noqa: S301 - our own bytes
            torch.load(stream, weights_only=False),
        ):
            assert repr(again) == repr(criterion)
            losses = (loss.from_output(eps_hat, noise, t) for loss in (again, criterion))
            assert torch.equal(*losses)

    def test_repr_says_what_it_is(self):
        assert repr(SkipStepLoss(LINEAR, 49)) == (
            "SkipStepLoss(NoiseSchedule.linear(1000), SkipSet(49), tau=0.99, estimator='expected')"
        )
        options = {"reduction": "sum", "prediction_type": "flow", "normalize": True, "max_c2": 4.0}
        criterion = SkipStepLoss(
            LINEAR, [1, 9], tau=0.5, estimator="fresh", timesteps="stratified", **options
        )
        assert repr(criterion) == (
            "SkipStepLoss(NoiseSchedule.linear(1000), SkipSet([1, 9]), tau=0.5, estimator='fresh',"
            " reduction='sum', prediction_type='flow', normalize=True, max_c2=4.0,"
            " timesteps='stratified')"
        )

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_tables_follow_the_tensors_to_a_gpu(self):
        criterion = SkipStepLoss(LINEAR, 9)
        eps_hat, noise = normal(4, 3, seed=0), normal(4, 3, seed=1)
        on_gpu = criterion.from_output(eps_hat.cuda(), noise.cuda(), T.cuda())
        torch.testing.assert_close(on_gpu.cpu(), criterion.from_output(eps_hat, noise, T))
