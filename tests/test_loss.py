"""The loss against the two-term formula, its reductions and its public face."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss, skip_step_loss
from tests.strategies import (
    normal,
    schedules,
    schedules_with_skip,
    seeds,
    shapes,
    targets_of,
    taus,
    timesteps,
)

ESTIMATORS = ["expected", "fresh", "shared"]
LINEAR = NoiseSchedule.linear(1000)


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(schedules_with_skip(), taus, shapes, seeds)
def test_completed_square_is_the_two_term_formula(estimator, schedule_and_skip, tau, shape, seed):
    schedule, k = schedule_and_skip
    if float(schedule.log_alphas_cumprod[-1]) < -500:
        return
    t = timesteps(schedule.num_train_timesteps, shape[0], seed)
    eps_hat = normal(*shape, seed=seed).requires_grad_()
    noise, zeta = normal(*shape, seed=seed + 1), normal(*shape, seed=seed + 2)
    options = {"tau": tau, "estimator": estimator, "max_c2": math.inf, "reduction": "none"}
    given_zeta = {"skip_noise": zeta} if estimator == "fresh" else {}
    loss = SkipStepLoss(schedule, k, **options).from_prediction(eps_hat, noise, t, **given_zeta)
    (grad,) = torch.autograd.grad(loss.sum(), eps_hat)

    target = {"expected": None, "fresh": zeta, "shared": noise}[estimator]
    expected = two_terms(eps_hat, noise, t, target, schedule, [k], tau)
    (expected_grad,) = torch.autograd.grad(expected.sum(), eps_hat)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)
    as_function = skip_step_loss(
        eps_hat, noise, t, schedule=schedule, skip_set=k, **options, **given_zeta
    )
    torch.testing.assert_close(as_function, loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(schedules(min_size=5, max_size=300), seeds)
def test_several_skips_equal_the_mean_of_each(estimator, schedule, seed):
    count = schedule.num_train_timesteps
    skips = sorted(set((timesteps(count - 1, 3, seed) + 1).tolist()))
    t = timesteps(count, 6, seed + 1)
    t[0], t[1] = 0, count - 1
    eps_hat, noise, zeta = (normal(6, 3, seed=seed + i) for i in range(3))
    given_zeta = {"skip_noise": zeta} if estimator == "fresh" else {}
    loss = SkipStepLoss(
        schedule, skips, estimator=estimator, reduction="none", max_c2=math.inf
    ).from_prediction(eps_hat, noise, t, **given_zeta)
    target = {"expected": None, "fresh": zeta, "shared": noise}[estimator]
    expected = two_terms(eps_hat, noise, t, target, schedule, skips, 0.99)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k", [9, 99])
def test_fresh_averaged_over_its_noise_is_expected(k):
    t = torch.tensor([0, k - 1, k, 500, 999])
    eps_hat = normal(5, 4, seed=0).requires_grad_()
    noise = normal(5, 4, seed=1)
    draws = 4000
    fresh = SkipStepLoss(LINEAR, k, tau=0.9, estimator="fresh", reduction="none")
    generator = torch.Generator().manual_seed(2)
    values, grads = [], []
    for _ in range(draws):
        loss = fresh.from_prediction(eps_hat, noise, t, generator=generator)
        values.append(loss.detach())
        grads.append(torch.autograd.grad(loss.sum(), eps_hat)[0])
    expected = SkipStepLoss(LINEAR, k, tau=0.9, reduction="none").from_prediction(eps_hat, noise, t)
    (expected_grad,) = torch.autograd.grad(expected.sum(), eps_hat)
    for samples, mean in ((values, expected), (grads, expected_grad)):
        stacked = torch.stack(samples)
        error = stacked.std(0) / draws**0.5
        # Below t = k there is no draw: the error is 0 and the values are equal to rounding.
        assert ((stacked.mean(0) - mean).abs() <= 4 * error + 1e-12).all()
        assert (error[2:] > 1e-6).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(schedules_with_skip(), shapes, seeds)
def test_tau_one_is_mse_loss_through_the_same_path(
    estimator, dtype, schedule_and_skip, shape, seed
):
    schedule, k = schedule_and_skip
    t = timesteps(schedule.num_train_timesteps, shape[0], seed)
    eps_hat = normal(*shape, seed=seed, dtype=dtype).requires_grad_()
    noise = normal(*shape, seed=seed + 1, dtype=dtype)
    loss = SkipStepLoss(schedule, k, tau=1.0, estimator=estimator).from_prediction(
        eps_hat, noise, t
    )
    (grad,) = torch.autograd.grad(loss, eps_hat)
    plain = F.mse_loss(eps_hat, noise)
    (plain_grad,) = torch.autograd.grad(plain, eps_hat)
    rounding = 4e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(loss, plain, rtol=rounding, atol=0)
    torch.testing.assert_close(grad, plain_grad, rtol=rounding, atol=1e-30)


@given(st.integers(2, 6), seeds, st.sampled_from(ESTIMATORS))
def test_times_meet_only_the_batch_axis(size, seed, estimator):
    """With every axis as long as the batch, a wrong broadcast would pass unseen."""
    noise, eps_hat, zeta = (normal(size, size, size, size, seed=seed + i) for i in range(3))
    t = timesteps(1000, size, seed)
    given_zeta = {"skip_noise": zeta} if estimator == "fresh" else {}
    criterion = SkipStepLoss(LINEAR, 49, estimator=estimator, reduction="none")
    loss = criterion.from_prediction(eps_hat, noise, t, **given_zeta)
    one_by_one = [
        criterion.from_prediction(
            eps_hat[i : i + 1],
            noise[i : i + 1],
            t[i : i + 1],
            **{name: value[i : i + 1] for name, value in given_zeta.items()},
        )
        for i in range(size)
    ]
    torch.testing.assert_close(loss, torch.cat(one_by_one), rtol=1e-13, atol=0)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    permuted = criterion.from_prediction(
        eps_hat[order],
        noise[order],
        t[order],
        **{name: value[order] for name, value in given_zeta.items()},
    )
    torch.testing.assert_close(permuted, loss[order], rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 3, 8, 8), (6, 4, 2, 3, 3), (6, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_any_rank_and_any_float_dtype(shape, dtype):
    eps_hat, noise = normal(*shape, seed=0, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    t = torch.tensor([0, 8, 9, 300, 700, 999])
    eps_hat.requires_grad_()
    loss = SkipStepLoss(LINEAR, 9).from_prediction(eps_hat, noise, t)
    loss.backward()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    assert eps_hat.grad.dtype == dtype
    exact = two_terms(eps_hat.double(), noise.double(), t, None, LINEAR, [9], 0.99).mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_mixed_dtypes_are_lifted():
    """float32 noise against a half output, a mix that trainers under autocast have."""
    eps_hat, noise = normal(4, 3, seed=0, dtype=torch.bfloat16), normal(4, 3, seed=1).float()
    t = torch.tensor([0, 20, 500, 999])
    loss = SkipStepLoss(LINEAR, 9).from_prediction(eps_hat, noise, t)
    assert loss.dtype == torch.float32
    again = SkipStepLoss(LINEAR, 9).from_prediction(eps_hat.float(), noise, t)
    assert torch.equal(loss, again)


def test_reductions_and_weights():
    eps_hat, noise = normal(5, 3, 2, seed=0), normal(5, 3, 2, seed=1)
    t, weights = torch.tensor([0, 9, 100, 500, 999]), torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    per_sample = two_terms(eps_hat, noise, t, None, LINEAR, [9], 0.99)

    def loss(reduction, weights=None):
        criterion = SkipStepLoss(LINEAR, 9, reduction=reduction)
        return criterion.from_prediction(eps_hat, noise, t, weights=weights)

    torch.testing.assert_close(loss("none"), per_sample)
    torch.testing.assert_close(loss("sum"), per_sample.sum())
    torch.testing.assert_close(loss("mean"), per_sample.mean())
    weighted = per_sample * weights.double()
    torch.testing.assert_close(loss("none", weights), weighted)
    torch.testing.assert_close(loss("sum", weights), weighted.sum())
    torch.testing.assert_close(loss("mean", weights), weighted.mean())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_two_terms_add_up_to_the_loss(estimator):
    eps_hat, noise, zeta = (normal(5, 3, 2, seed=i) for i in range(3))
    t = torch.tensor([0, 48, 49, 500, 999])
    given_zeta = {"skip_noise": zeta} if estimator == "fresh" else {}
    criterion = SkipStepLoss(LINEAR, 49, tau=0.7, estimator=estimator, reduction="none")
    eps_hat.requires_grad_()
    terms = criterion.terms(eps_hat, noise, t, **given_zeta)
    torch.testing.assert_close(terms.simple, (eps_hat - noise).square().mean((1, 2)))
    assert terms.tau.tolist() == [1, 1, 0.7, 0.7, 0.7]
    assert terms.skip[:2].tolist() == [0, 0]
    loss = criterion.from_prediction(eps_hat, noise, t, **given_zeta)
    total = terms.tau * terms.simple + (1 - terms.tau) * terms.skip
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value.sum(), eps_hat)[0] for value in (total, loss)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_normalized_form_is_mse_to_the_target(estimator):
    """The loss over A, without the constant: the gradient is 1/A times the loss's."""
    eps_hat, noise, zeta = (normal(4, 3, seed=i) for i in range(3))
    eps_hat.requires_grad_()
    t = torch.tensor([3, 99, 600, 999])
    given_zeta = {"skip_noise": zeta} if estimator == "fresh" else {}
    loss, normalized = (
        SkipStepLoss(
            LINEAR, 99, estimator=estimator, reduction="none", normalize=normalize
        ).from_prediction(eps_hat, noise, t, **given_zeta)
        for normalize in (False, True)
    )
    (grad,) = torch.autograd.grad(loss.sum(), eps_hat)
    (normalized_grad,) = torch.autograd.grad(normalized.sum(), eps_hat)
    bar = LINEAR.alphas_cumprod
    c2 = torch.stack([bar[max(s - 99, 0)] / bar[s] - 1 if s >= 99 else bar[0] * 0 for s in t])
    a = torch.where(t >= 99, 0.99 + 0.01 * c2, 1.0)
    torch.testing.assert_close(normalized_grad, grad / a[:, None], rtol=1e-10, atol=1e-14)
    # mse(ε̂, target) with target = ε̂ - gradient · D / 2
    torch.testing.assert_close(normalized, (normalized_grad * 3 / 2).square().mean(1))


class TestForward:
    def test_draws_what_is_not_given_in_order(self):
        x0 = normal(4, 3, 2, seed=0, dtype=torch.float32)
        seen = []

        def model(x_t, t, scale):
            seen.append((x_t, t))
            return x_t * scale

        criterion = SkipStepLoss(LINEAR, 9, estimator="fresh")
        loss = criterion(
            model, x0, model_kwargs={"scale": 0.5}, generator=torch.Generator().manual_seed(7)
        )
        generator = torch.Generator().manual_seed(7)
        t = torch.randint(1000, (4,), generator=generator)
        noise = torch.randn(4, 3, 2, generator=generator)
        zeta = torch.randn(4, 3, 2, generator=generator)
        bar = LINEAR.alphas_cumprod[t].float()[:, None, None]
        x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        assert len(seen) == 1
        assert torch.equal(seen[0][1], t)
        torch.testing.assert_close(seen[0][0], x_t)
        expected = two_terms(
            (x_t * 0.5).double(), noise.double(), t, zeta.double(), LINEAR, [9], 0.99
        ).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_everything_given(self):
        x0, noise, t = normal(3, 2, seed=0), normal(3, 2, seed=1), torch.tensor([0, 50, 999])
        state = torch.get_rng_state()
        criterion = SkipStepLoss(LINEAR, 9)
        loss = criterion(lambda x_t, t: x_t, x0, t=t, noise=noise)
        assert torch.equal(torch.get_rng_state(), state)
        bar = LINEAR.alphas_cumprod[t][:, None]
        x_t = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        assert torch.allclose(loss, criterion.from_prediction(x_t, noise, t), rtol=1e-12)

    @pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "sample"])
    def test_model_outputs(self, kind):
        x0, noise, t = normal(3, 2, seed=0), normal(3, 2, seed=1), torch.tensor([0, 50, 999])

        class Output:
            def __init__(self, sample):
                self.sample = sample

        wrap = {"tensor": lambda x: x, "tuple": lambda x: (x, None), "list": lambda x: [x]}

        def model(x_t, t):
            return wrap.get(kind, Output)(x_t * 0.3)

        criterion = SkipStepLoss(LINEAR, 9)
        loss = criterion(model, x0, t=t, noise=noise)
        plain = criterion(lambda x_t, t: x_t * 0.3, x0, t=t, noise=noise)
        assert torch.equal(loss, plain)

    @pytest.mark.parametrize(
        "schedule", [ContinuousSchedule.vp(), ContinuousSchedule.flow()], ids=repr
    )
    def test_continuous_time(self, schedule):
        x0, noise = normal(64, 3, seed=0, dtype=torch.float32), normal(64, 3, seed=1).float()
        seen = []

        def model(x_t, t):
            seen.append(t)
            return torch.zeros_like(x_t)

        criterion = SkipStepLoss(schedule, 0.05, tau=0.9, reduction="none")
        loss = criterion(model, x0, noise=noise, generator=torch.Generator().manual_seed(0))
        t = seen[0]
        assert t.dtype == torch.float32
        assert ((t >= 0) & (t <= 1)).all()
        # ε̂ = 0: τ mean ε² + (1-τ), or mean ε² where t < δ
        tau = torch.where(t >= 0.05, 0.9, 1.0)
        assert (t < 0.05).any()
        expected = tau * noise.square().mean(1) + (1 - tau)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_half_data_gives_the_model_half_inputs(self, dtype):
        x0 = normal(4, 3, seed=0, dtype=dtype)
        seen = []
        loss = SkipStepLoss(LINEAR, 9)(lambda x, t: seen.append(x) or x, x0)
        assert seen[0].dtype == dtype
        assert loss.dtype == torch.float32

    def test_prediction_types_reach_the_same_loss(self):
        x0, noise, t = normal(3, 2, seed=0), normal(3, 2, seed=1), torch.tensor([9, 50, 750])
        bar = LINEAR.alphas_cumprod[t][:, None]
        a, b = bar.sqrt(), (1 - bar).sqrt()
        eps_hat = normal(3, 2, seed=2)
        x0_hat = (a * x0 + b * noise - b * eps_hat) / a
        outputs = targets_of(x0_hat, eps_hat, a, b)
        # "uniform" is the loss of the noise; only the constant, which ε̂ does not touch, is left out
        # where the output is something else, and from t = 799 on c² is bounded for v.
        losses = {
            kind: SkipStepLoss(LINEAR, 9, prediction_type=kind, weighting="uniform")(
                lambda x_t, t, out=output: out,
                x0,
                t=t,
                noise=noise,
            ).item()
            for kind, output in outputs.items()
        }
        c2 = (LINEAR.alphas_cumprod[t - 9] / LINEAR.alphas_cumprod[t] - 1)[:, None]
        weight = 0.99 + 0.01 * c2
        expected = (weight * (eps_hat - 0.99 / weight * noise).square()).mean().item()
        constant = 0.01 + (0.99 - 0.99**2 / weight) * noise.square()
        assert losses.pop("epsilon") == pytest.approx(expected + constant.mean().item(), rel=1e-12)
        assert losses == pytest.approx(dict.fromkeys(losses, expected), rel=1e-9)


class TestModule:
    def test_leaves_no_trace_in_a_state_dict(self):
        criterion = SkipStepLoss(LINEAR, 9)
        assert criterion.state_dict() == {}
        assert list(criterion.parameters()) == []
        assert list(criterion.buffers()) == []

    def test_half_does_not_round_the_tables(self):
        eps_hat, noise = normal(4, 3, seed=0).float(), normal(4, 3, seed=1).float()
        t = torch.tensor([0, 20, 500, 999])
        expected = SkipStepLoss(LINEAR, 9).from_prediction(eps_hat, noise, t)
        for convert in ("half", "bfloat16", "double"):
            criterion = getattr(SkipStepLoss(LINEAR, 9), convert)()
            assert torch.equal(criterion.from_prediction(eps_hat, noise, t), expected)

    def test_float64_after_float32_is_exact(self):
        criterion = SkipStepLoss(LINEAR, 9)
        eps_hat, noise, t = normal(4, 3, seed=0), normal(4, 3, seed=1), torch.tensor([0, 9, 5, 999])
        criterion.from_prediction(eps_hat.float(), noise.float(), t)
        loss = criterion.from_prediction(eps_hat, noise, t)
        exact = two_terms(eps_hat, noise, t, None, LINEAR, [9], 0.99).mean()
        assert loss.item() == pytest.approx(exact.item(), rel=1e-13)

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
            assert torch.equal(
                again.from_prediction(eps_hat, noise, t),
                criterion.from_prediction(eps_hat, noise, t),
            )

    def test_repr_says_what_it_is(self):
        assert repr(SkipStepLoss(LINEAR)) == (
            "SkipStepLoss(NoiseSchedule.linear(1000), SkipSet(9), tau=0.99, estimator='expected')"
        )
        assert repr(
            SkipStepLoss(
                LINEAR,
                [1, 9],
                tau=0.5,
                estimator="fresh",
                reduction="sum",
                prediction_type="flow",
                normalize=True,
                max_c2=4.0,
            )
        ) == (
            "SkipStepLoss(NoiseSchedule.linear(1000), SkipSet([1, 9]), tau=0.5, estimator='fresh',"
            " reduction='sum', prediction_type='flow', normalize=True, max_c2=4.0)"
        )

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_tables_follow_the_tensors_to_a_gpu(self):
        criterion = SkipStepLoss(LINEAR, 9)
        eps_hat, noise, t = normal(4, 3, seed=0), normal(4, 3, seed=1), torch.tensor([0, 9, 5, 999])
        on_gpu = criterion.from_prediction(eps_hat.cuda(), noise.cuda(), t.cuda())
        torch.testing.assert_close(on_gpu.cpu(), criterion.from_prediction(eps_hat, noise, t))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nan_outputs_are_passed_on(estimator):
    eps_hat = normal(4, 3, seed=0)
    eps_hat[2, 1] = math.nan
    t = torch.tensor([0, 20, 500, 999])
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, reduction="none")
    loss = criterion.from_prediction(eps_hat, normal(4, 3, seed=1), t)
    assert loss.isnan().tolist() == [False, False, True, False]


def test_fresh_draws_from_its_generator_alone():
    eps_hat, noise, t = normal(4, 3, seed=0), normal(4, 3, seed=1), torch.tensor([0, 20, 500, 999])
    criterion = SkipStepLoss(LINEAR, 9, estimator="fresh")
    state = torch.get_rng_state()
    losses = [
        criterion.from_prediction(eps_hat, noise, t, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1] != losses[2]


def test_the_function_has_the_classs_defaults():
    of_class = inspect.signature(SkipStepLoss.__init__).parameters
    for name, parameter in inspect.signature(skip_step_loss).parameters.items():
        if name in of_class and parameter.default is not inspect.Parameter.empty:
            assert parameter.default == of_class[name].default, name
    eps_hat, noise, t = normal(4, 3, seed=0), normal(4, 3, seed=1), torch.tensor([0, 20, 500, 999])
    loss = skip_step_loss(eps_hat, noise, t, schedule=LINEAR)
    torch.testing.assert_close(loss, SkipStepLoss(LINEAR).from_prediction(eps_hat, noise, t))


def test_the_functions_own_draw():
    eps_hat, noise, t = normal(4, 3, seed=0), normal(4, 3, seed=1), torch.tensor([0, 20, 500, 999])
    drawn = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    found = skip_step_loss(
        eps_hat,
        noise,
        t,
        schedule=LINEAR,
        estimator="fresh",
        generator=torch.Generator().manual_seed(3),
    )
    assert torch.equal(torch.get_rng_state(), state)
    given = skip_step_loss(eps_hat, noise, t, schedule=LINEAR, estimator="fresh", skip_noise=drawn)
    assert found == given


def test_one_float64_input_is_enough():
    eps_hat, noise, t = normal(4, 3, seed=0).float(), normal(4, 3, seed=1), torch.tensor([0, 9] * 2)
    loss = SkipStepLoss(LINEAR, 9).from_prediction(eps_hat, noise, t)
    assert loss.dtype == torch.float64
    assert loss == SkipStepLoss(LINEAR, 9).from_prediction(eps_hat.double(), noise, t)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_terms_of_half_types_are_lifted(estimator):
    halves = [normal(4, 3, seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    t = torch.tensor([0, 20, 500, 999])
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator)

    def terms(eps_hat, noise, zeta):
        given_zeta = {"skip_noise": zeta} if estimator == "fresh" else {}
        return criterion.terms(eps_hat, noise, t, **given_zeta)

    for found, expected in zip(
        terms(*halves), terms(*(half.float() for half in halves)), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_switch_is_true_or_false(value):
    with pytest.raises(TypeError, match="normalize must be True or False, got"):
        SkipStepLoss(LINEAR, normalize=value)
    with pytest.raises(TypeError, match="tau must be a real number, got True"):
        SkipStepLoss(LINEAR, tau=True)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_model_may_overwrite_its_times(kind):
    criterion = SkipStepLoss(LINEAR, 99, prediction_type=kind, reduction="none", tau=0.5)
    x0, noise = normal(3, 5, seed=0), normal(3, 5, seed=1)
    t = torch.tensor([300, 500, 999])

    def spoils(x_t, t):
        t.sub_(200)
        return torch.ones_like(x_t)

    found = criterion(spoils, x0, t, noise=noise)
    assert t.tolist() == [300, 500, 999]
    expected = criterion(lambda x_t, _: torch.ones_like(x_t), x0, t, noise=noise)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(
        found, criterion(lambda x, _: torch.ones_like(x), x0, t - 200, noise=noise)
    )


def test_the_switch_is_checked_in_continuous_time_too():
    with pytest.raises(TypeError, match="normalize"):
        SkipStepLoss(ContinuousSchedule.flow(), 0.1, normalize="yes")
