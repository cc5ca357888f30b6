"""The loss in the place of a diffusers script's own, on diffusers' own schedulers."""

import copy
import itertools
import math
import os
import pickle

import pytest
import torch
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.diffusers import SkipLoss, schedule_of
from s2dm_loss.testing import check_swap
from tests.helpers.diffusers_parts import (
    SCHEDULERS,
    Script,
    TinyModel,
    add_noise,
    make_scheduler,
    min_snr_weights,
    script_step,
    velocity,
)
from tests.helpers.released_loss import CASES, released_constant

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
ROOT = os.environ.get("S2DM_DIFFUSERS_ROOT")


def by_name(prediction_type):
    """The prediction type where it has to be said by name, as "sample" has."""
    return "sample" if prediction_type == "sample" else None


def make_loss(scheduler, skip_set=9, **options):
    return SkipLoss.from_scheduler(scheduler, skip_set, **options)


def batch(prediction_type="epsilon", *, scheduler=None, timesteps=(3, 9, 200, 640, 999), seed=0):
    """What a script has at its loss line: float64 model_pred, target, timesteps, noisy; and ε."""
    scheduler = scheduler or make_scheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(timesteps), 2, 4, 4)
    latents, noise, model_pred = torch.randn(
        3, *shape, generator=generator, dtype=torch.float64
    ).unbind(0)
    timesteps = torch.tensor(timesteps)
    alphas_cumprod = schedule_of(scheduler).alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    a, b = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    target = {"epsilon": noise, "v_prediction": a * noise - b * latents, "sample": latents}
    return model_pred, target[prediction_type], timesteps, a * latents + b * noise, noise


# τ = 1: the script's own loss.

CONFIGS = [
    (name, beta_schedule, zero_snr)
    for name in SCHEDULERS
    for beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    for zero_snr in (False, True)
    if not zero_snr or "rescale_betas_zero_snr" in make_scheduler(name).config
]


@pytest.mark.parametrize(("name", "beta_schedule", "zero_snr"), CONFIGS)
def test_tau_one_is_the_untouched_script(name, beta_schedule, zero_snr):
    config = {"rescale_betas_zero_snr": True} if zero_snr else {}
    latents = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler(name, beta_schedule=beta_schedule, **config)
    skip_losses = {
        (prediction_type, estimator): make_loss(
            scheduler,
            skip_set=9,
            tau=1.0,
            estimator=estimator,
            reduction="none",
            prediction_type=by_name(prediction_type),
        )
        for prediction_type in PREDICTION_TYPES
        for estimator in ("expected", "shared")
    }
    grid = itertools.product(
        skip_losses.items(),
        ({}, {"noise_offset": 0.1}, {"input_perturbation": 0.1}, {"dtype": torch.bfloat16}),
        (None, 5.0),
    )
    for ((prediction_type, _), skip_loss), options, snr_gamma in grid:
        script = Script(prediction_type, snr_gamma=snr_gamma, **options)
        results = []
        for ours in (None, skip_loss):
            torch.manual_seed(1)
            model = TinyModel()
            loss = script_step(script, model, scheduler, latents, ours)
            loss.backward()
            results.append((loss.detach(), model, torch.get_rng_state()))
        (loss, model, rng), (our_loss, our_model, our_rng) = results
        assert loss.isfinite()
        torch.testing.assert_close(our_loss, loss, rtol=2e-6, atol=0)
        for theirs, mine in zip(model.parameters(), our_model.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(our_rng, rng)
        assert our_model.calls == 1


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_swap(prediction_type, beta_schedule, zero_snr):
    """A script's step at the ends of every schedule, at τ = 1 and at τ = 0.99."""
    scheduler = make_scheduler(
        beta_schedule=beta_schedule,
        rescale_betas_zero_snr=zero_snr,
        prediction_type=prediction_type,
    )
    timesteps = torch.tensor([0, 8, 9, 300, 700, 998, 999])
    latents = torch.randn(7, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def step(model, tau=None):
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        v = velocity(scheduler, latents, noise, timesteps)
        target = {"epsilon": noise, "v_prediction": v, "sample": latents}[prediction_type]
        model_pred = model(noisy, timesteps)
        if tau is None:
            return F.mse_loss(model_pred.float(), target.float(), reduction="mean")
        skip_loss = make_loss(
            scheduler, skip_set=9, tau=tau, prediction_type=by_name(prediction_type)
        )
        return skip_loss(model_pred, target, timesteps, noisy)

    report = check_swap(step, step, rtol=1e-6)
    assert report.calls == 1
    if prediction_type != "epsilon":
        assert report.ratio.min() > 0.97
        assert report.ratio.max() < 1.03


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_tau_one_mean_is_the_one_line_of_the_scripts(prediction_type):
    model_pred, target, timesteps, noisy, _ = batch(prediction_type)
    model_pred, target, noisy = (x.float() for x in (model_pred, target, noisy))
    model_pred.requires_grad_()
    scheduler = make_scheduler(prediction_type=prediction_type)
    skip_loss = make_loss(scheduler, tau=1.0, prediction_type=by_name(prediction_type))
    loss = skip_loss(model_pred, target, timesteps, noisy)
    expected = F.mse_loss(model_pred.float(), target.float(), reduction="mean")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, model_pred)[0] for value in (loss, expected)),
        rtol=1e-6,
        atol=1e-9,
    )


def test_tau_one_fresh_draws_only_its_own_noise():
    model_pred, target, timesteps, noisy, _ = batch()
    skip_loss = make_loss(make_scheduler(), tau=1.0, estimator="fresh")
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    loss = skip_loss(model_pred, target, timesteps, noisy, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(loss, F.mse_loss(model_pred, target))


# τ < 1: the core's loss, at the script's weight.


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"k{c['skip']}-{c['dtype']}")
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_released_loss_replayed(case, prediction_type):
    def tensor(name):
        return torch.tensor(case[name], dtype=torch.float64).reshape(case["shape"])

    timesteps = torch.tensor(case["timesteps"])
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    alphas_cumprod = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
    a, b = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    noise, x0 = tensor("noise"), tensor("x0")
    x_t = a * x0 + b * noise
    # output = (ε̂ - lift x_t) / ratio, so the script weighs by 1 / ratio² and d output = dε̂ / ratio.
    ratio, lift, target = {
        "epsilon": (torch.ones_like(a), torch.zeros_like(a), noise),
        "v_prediction": (a, b, a * noise - b * x0),
        "sample": (-a / b, 1 / b, x0),
    }[prediction_type]
    model_pred = ((tensor("model_output") - lift * x_t) / ratio).requires_grad_()
    skip_loss = make_loss(
        make_scheduler(prediction_type=prediction_type),
        case["skip"],
        tau=case["tau"],
        estimator="fresh",
        prediction_type=by_name(prediction_type),
        max_c2=math.inf,
    )
    loss = skip_loss(model_pred, target, timesteps, x_t, skip_noise=tensor("skip_noise"))
    (grad,) = torch.autograd.grad(loss, model_pred)
    expected = tensor("grad_model_output") / ratio
    tolerance = 1e-9 if case["dtype"] == "float64" else 1e-5
    assert (grad - expected).norm() <= tolerance * expected.norm()
    if prediction_type == "epsilon":
        assert loss.item() == pytest.approx(case["loss"] - released_constant(case), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        *(("DDPMScheduler", prediction_type) for prediction_type in PREDICTION_TYPES),
        *(("FlowMatchEulerDiscreteScheduler", name) for name in ("flow", "sample")),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"estimator": "fresh", "tau": 0.5, "reduction": "sum"},
        {"estimator": "shared", "normalize": True, "max_c2": 0.01},
        {"weighting": "min_snr", "reduction": "none"},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_below_tau_one_it_is_the_cores_loss(name, prediction_type, options, dtype):
    """Bit for bit, with all that a call takes."""
    flow = name.startswith("FlowMatch")
    scheduler = make_scheduler(name, **({} if flow else {"prediction_type": prediction_type}))
    schedule = ContinuousSchedule.flow() if flow else NoiseSchedule.linear(1000)
    skips = 0.02 if flow else [1, 9, 49]
    given = prediction_type if flow else by_name(prediction_type)
    skip_loss = make_loss(scheduler, skips, prediction_type=given, **options)
    criterion = SkipStepLoss(schedule, skips, prediction_type=prediction_type, **options)

    timesteps = torch.tensor([3, 9, 200, 640, 999])
    if flow:
        timesteps = torch.tensor([0.005, 0.2, 0.7, 0.9, 1.0])
    output, target, noisy, xi = torch.randn(4, 5, 2, 4, 4, dtype=dtype)
    call = {"weights": torch.rand(5), "skip_noise": xi if "fresh" in options.values() else None}
    found = skip_loss(output, target, timesteps, noisy, **call)
    assert torch.equal(found, criterion.from_output(output, target, timesteps, noisy, **call))
    del call["weights"]
    for ours, cores in zip(
        skip_loss.regression_target(target, timesteps, noisy, **call),
        criterion.regression_target(target, timesteps, noisy, **call),
        strict=True,
    ):
        assert torch.equal(ours, cores)


# The traps.


def test_prediction_type_is_read_at_each_call():
    scheduler = make_scheduler()
    skip_loss = make_loss(scheduler, reduction="none")
    model_pred, target, timesteps, noisy, _ = batch("v_prediction")
    scheduler.register_to_config(prediction_type="v_prediction")
    built_after = make_loss(make_scheduler(prediction_type="v_prediction"), reduction="none")
    inputs = model_pred, target, timesteps, noisy
    assert torch.equal(skip_loss(*inputs), built_after(*inputs))
    scheduler.register_to_config(prediction_type="epsilon")
    assert not torch.allclose(skip_loss(*inputs), built_after(*inputs))


def test_skips_from_an_iterator_outlast_the_first_prediction_type():
    scheduler = make_scheduler()
    losses = [make_loss(scheduler, skip_set=s) for s in (iter([1, 9]), [1, 9])]
    model_pred, target, timesteps, noisy, _ = batch("v_prediction")
    for kind in ("epsilon", "v_prediction"):
        scheduler.register_to_config(prediction_type=kind)
        one, other = (loss(model_pred, target, timesteps, noisy) for loss in losses)
        assert torch.equal(one, other)


def test_add_noise_moves_the_schedulers_table_but_not_ours():
    scheduler = make_scheduler(beta_schedule="sigmoid")  # the one whose table is taken as it is
    skip_loss = make_loss(scheduler, reduction="none")
    inputs = batch(scheduler=scheduler)[:4]
    before = skip_loss(*inputs)
    table = skip_loss.criterion.schedule.log_alphas_cumprod.clone()
    scheduler.add_noise(
        torch.ones(1, device="meta"), torch.ones(1, device="meta"), torch.zeros(1).long()
    )
    assert scheduler.alphas_cumprod.device.type == "meta"
    assert torch.equal(skip_loss(*inputs), before)
    # Nor does writing into the scheduler's table, which a float64 one would share.
    scheduler.alphas_cumprod = make_scheduler(beta_schedule="sigmoid").alphas_cumprod.double()
    skip_loss = make_loss(scheduler, reduction="none")
    scheduler.alphas_cumprod.fill_(0.5)
    assert torch.equal(skip_loss.criterion.schedule.log_alphas_cumprod, table)


def test_the_schedulers_own_table_is_not_written():
    """Zero terminal SNR is ᾱ = 0 to the loss; the scheduler keeps its 2^-24, also in float64."""
    scheduler = make_scheduler("DPMSolverMultistepScheduler", rescale_betas_zero_snr=True)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    assert schedule_of(scheduler).alphas_cumprod[-1] == 0
    assert scheduler.alphas_cumprod[-1] == 2**-24


@pytest.mark.parametrize("tau", [1.0, 0.99])
def test_dream(tau):
    """DREAM changes noise and input, with a model call of its own that it makes itself."""
    latents = torch.randn(4, 2, 4, 4)
    skip_loss = make_loss(make_scheduler(), tau=tau, reduction="none")
    losses = []
    for ours in (None, skip_loss):
        torch.manual_seed(1)
        model = TinyModel()
        script = Script(dream_training=True)
        losses.append(script_step(script, model, make_scheduler(), latents, ours).item())
        assert model.calls == 2
    if tau == 1:
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    else:
        assert losses[0] != pytest.approx(losses[1], rel=1e-6)


def test_sample_has_to_be_said_by_name():
    scheduler = make_scheduler(prediction_type="sample")
    inputs = batch("sample")[:4]
    said = r"prediction_type 'sample' must be given by name.*SDXL"
    with pytest.raises(ValueError, match=said):
        make_loss(scheduler)
    set_later = make_scheduler()
    unnamed = make_loss(set_later)
    set_later.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match=said):
        unnamed(*inputs)
    named = make_loss(scheduler, prediction_type="sample")
    assert named(*inputs).isfinite()
    assert "prediction_type='sample'" in repr(named)


def test_a_given_prediction_type_must_be_the_configs():
    skip_loss = make_loss(make_scheduler(), prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"'v_prediction' was given, but .* says 'epsilon'"):
        skip_loss(*batch()[:4])


def test_prior_preservation():
    """The script chunks model_pred and target, not the timesteps: two of them at batch size 1."""
    model_pred, target, timesteps, noisy, _ = batch(timesteps=(500, 900))
    skip_loss = make_loss(make_scheduler(), reduction="none")
    whole = skip_loss(model_pred, target, timesteps, noisy)
    pred, pred_prior = model_pred.chunk(2)
    tgt, tgt_prior = target.chunk(2)
    x, x_prior = noisy.chunk(2)
    t, t_prior = timesteps.chunk(2)
    with pytest.raises(ValueError, match=r"timesteps must have shape \(1,\).*prior preservation"):
        skip_loss(pred, tgt, timesteps, x)
    with pytest.raises(ValueError, match="noisy_latents must have the shape of target"):
        skip_loss(pred, tgt, t, noisy)
    torch.testing.assert_close(skip_loss(pred, tgt, t, x), whole[:1])
    torch.testing.assert_close(skip_loss(pred_prior, tgt_prior, t_prior, x_prior), whole[1:])


@pytest.mark.parametrize("channels", [3, 4])
def test_learned_variance_channels(channels):
    target = torch.randn(2, channels, 4, 4)
    model_pred = torch.randn(2, 2 * channels, 4, 4)
    skip_loss = make_loss(make_scheduler())
    with pytest.raises(ValueError, match=r"model_pred must have the shape.*learned variance"):
        skip_loss(model_pred, target, torch.tensor([5, 500]), target)
    mean, _ = model_pred.chunk(2, dim=1)
    assert skip_loss(mean, target, torch.tensor([5, 500]), target).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_float_timesteps_are_refused(dtype):
    model_pred, target, timesteps, noisy, _ = batch()
    skip_loss = make_loss(make_scheduler())
    with pytest.raises(TypeError, match=r"must be integers.*bfloat16 turns 999 into 1000"):
        skip_loss(model_pred, target, timesteps.to(dtype), noisy)
    assert torch.tensor(999).bfloat16() == 1000  # what the refusal is for
    for integer in (torch.int16, torch.int32):
        torch.testing.assert_close(
            skip_loss(model_pred, target, timesteps.to(integer), noisy),
            skip_loss(model_pred, target, timesteps, noisy),
        )


def test_timesteps_beyond_the_schedule():
    model_pred, target, timesteps, noisy, _ = batch()
    for prediction_type in ("epsilon", "v_prediction"):
        scheduler = make_scheduler(prediction_type=prediction_type)
        with pytest.raises(ValueError, match=r"must lie in \[0, 1000\), got 1000"):
            make_loss(scheduler)(model_pred, target, timesteps + 1, noisy)


ZERO_SNR = [name for name, schedule, zero in CONFIGS if zero and schedule == "linear"]


@pytest.mark.parametrize("name", ZERO_SNR)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
def test_zero_terminal_snr(name, beta_schedule, prediction_type, estimator):
    scheduler = make_scheduler(
        name,
        beta_schedule=beta_schedule,
        rescale_betas_zero_snr=True,
        prediction_type=prediction_type,
    )
    assert scheduler.alphas_cumprod[-1] in (0.0, 2**-24)
    schedule = schedule_of(scheduler)
    assert schedule.alphas_cumprod[-1] == 0
    skip_loss = make_loss(
        scheduler, estimator=estimator, reduction="none", prediction_type=by_name(prediction_type)
    )
    timesteps = torch.tensor([500, 990, 998, 999])
    latents, noise, model_pred = torch.randn(3, 4, 1, 4, 4).unbind(0)
    noisy = add_noise(scheduler, latents, noise, timesteps)
    target = velocity(scheduler, latents, noise, timesteps)
    target = {"epsilon": noise, "v_prediction": target, "sample": latents}[prediction_type]
    model_pred.requires_grad_()
    loss = skip_loss(model_pred, target, timesteps, noisy)
    (grad,) = torch.autograd.grad(loss.sum(), model_pred)
    plain = 2 * (model_pred - target).detach() / 16
    assert loss.isfinite().all()
    # No sample pulls more than about twice as hard as in the script's own loss.
    assert (grad.flatten(1).norm(dim=1) < 2.5 * plain.flatten(1).norm(dim=1) + 1).all()
    if prediction_type != "epsilon":
        torch.testing.assert_close(loss[-1], 0.99 * (model_pred - target)[-1].square().mean())


def test_min_snr_at_zero_terminal_snr():
    """The script's own weight is NaN there for ε (0 / 0): ours stays finite, and takes a cure."""
    scheduler = make_scheduler(rescale_betas_zero_snr=True)
    timesteps = torch.tensor([500, 999])
    output, target, noisy = torch.randn(3, 2, 1, 4, 4).unbind(0)
    inputs = output, target, timesteps, noisy
    skip_loss = make_loss(scheduler, reduction="none")
    weights = min_snr_weights(scheduler, timesteps, 5.0)
    assert weights[0].isfinite()
    assert weights[1].isnan()
    assert skip_loss(*inputs, weights=weights.nan_to_num(1.0)).isfinite().all()
    scheduler.register_to_config(prediction_type="v_prediction")
    weights = min_snr_weights(scheduler, timesteps, 5.0)
    assert skip_loss(*inputs, weights=weights).isfinite().all()


# Which schedulers, and with which table.


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_table_is_rebuilt_in_float64(name, beta_schedule):
    scheduler = make_scheduler(name, beta_schedule=beta_schedule)
    config = scheduler.config
    exact = {
        "linear": lambda: torch.linspace(
            config.beta_start, config.beta_end, 1000, dtype=torch.float64
        ),
        "scaled_linear": lambda: torch.linspace(
            config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64
        ).square(),
        "squaredcos_cap_v2": lambda: torch.tensor(
            [
                min(1 - f(i + 1) / f(i), 0.999)
                for f in [lambda s: math.cos((s / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2]
                for i in range(1000)
            ],
            dtype=torch.float64,
        ),
    }[beta_schedule]()
    alphas_cumprod = (1 - exact).cumprod(0)
    schedule = schedule_of(scheduler)
    torch.testing.assert_close(schedule.alphas_cumprod, alphas_cumprod, rtol=1e-11, atol=0)
    torch.testing.assert_close(
        schedule.alphas_cumprod.float(), scheduler.alphas_cumprod.float(), rtol=1e-4, atol=1e-7
    )


def test_a_table_that_is_not_the_configs_is_taken_as_it_is():
    scheduler = make_scheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    expected = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(schedule_of(scheduler).alphas_cumprod, expected)
    ended = make_scheduler()
    ended.alphas_cumprod[-1] = 0.0  # zero terminal SNR by hand
    assert schedule_of(ended).alphas_cumprod[-1] == 0
    sigmoid = make_scheduler(beta_schedule="sigmoid")
    expected = sigmoid.alphas_cumprod.double()
    torch.testing.assert_close(schedule_of(sigmoid).alphas_cumprod, expected)


def test_trained_betas_and_short_schedules():
    betas = [0.01, 0.02, 0.05, 0.1]
    schedule = schedule_of(make_scheduler(trained_betas=betas))
    expected = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-14, atol=0)
    skip_loss = make_loss(make_scheduler(num_train_timesteps=20), skip_set=9)
    assert repr(skip_loss.criterion.schedule) == "NoiseSchedule.linear(20)"


@pytest.mark.parametrize("betas", [[0.01, 0.02, 0.5, 1.0], [0.0, 0.01, 0.02, 0.05]])
def test_betas_of_no_signal_and_of_no_noise(betas):
    """β = 1 at the end is zero terminal SNR, as in Algorithm 1 of arXiv 2305.08891."""
    schedule = schedule_of(make_scheduler(trained_betas=betas))
    expected = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["RePaintScheduler", "UnCLIPScheduler"])
def test_schedulers_that_say_less(name):
    scheduler = make_scheduler(name)
    skip_loss = make_loss(scheduler)
    assert skip_loss(*batch()[:4]).isfinite()
    known = "linear(1000)" if name == "RePaintScheduler" else "cosine(1000)"
    assert repr(skip_loss.criterion.schedule) == f"NoiseSchedule.{known}"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("EDMEulerScheduler", "EDM trains on σ and float timesteps"),
        ("EDMDPMSolverMultistepScheduler", "EDM trains on σ and float timesteps"),
        ("ScoreSdeVeScheduler", "without ᾱ"),
        ("CMStochasticIterativeScheduler", "without ᾱ"),
        ("DDPMWuerstchenScheduler", "without ᾱ"),
        ("IPNDMScheduler", "without ᾱ"),
    ],
)
def test_schedulers_without_a_table_are_refused(name, reason):
    with pytest.raises(ValueError, match=f"alphas_cumprod.*got a {name}: {reason}"):
        make_loss(make_scheduler(name))


@pytest.mark.parametrize(
    "config", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}]
)
def test_flow_sigmas_on_a_diffusion_scheduler_are_refused(config):
    scheduler = make_scheduler("UniPCMultistepScheduler", **config)
    with pytest.raises(ValueError, match="set to flow matching"):
        make_loss(scheduler)


@pytest.mark.parametrize("scheduler", [None, 9, NoiseSchedule.linear(1000)])
def test_what_is_no_scheduler_is_refused(scheduler):
    with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler, got"):
        make_loss(scheduler)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"skip_set": 1000}, ValueError, "skip must be below 1000"),
        ({"tau": 2}, ValueError, "tau must lie in"),
        ({"estimator": "none"}, ValueError, "estimator must be one of"),
        ({"reduction": "batch"}, ValueError, "reduction must be one of"),
        ({"prediction_type": "score"}, ValueError, "prediction_type must be one of 'epsilon', "),
        ({"prediction_type": "flow"}, ValueError, "belongs to a FlowMatch scheduler"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        make_loss(make_scheduler(), **options)


def test_wrong_calls():
    model_pred, target, timesteps, noisy, _ = batch()
    skip_loss = make_loss(make_scheduler())
    whole = skip_loss(model_pred, target, timesteps, noisy)
    assert torch.equal(skip_loss(model_pred, target, timesteps), whole)
    with pytest.raises(ValueError, match="they come before noisy_latents, skip_loss"):
        skip_loss(model_pred, target, noisy, timesteps)
    with pytest.raises(ValueError, match="they come before noisy_latents, skip_loss"):
        skip_loss.regression_target(target, noisy, timesteps)
    of_v = make_loss(make_scheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match=r"noisy_latents must be given .*'v_pred.*got None"):
        of_v(model_pred, target, timesteps)
    with pytest.raises(TypeError, match="timesteps must be a tensor, got 3"):
        skip_loss(model_pred, target, 3, noisy)
    with pytest.raises(ValueError, match=r"timesteps must have shape \(5,\)"):
        skip_loss(model_pred, target, timesteps[:, None], noisy)
    with pytest.raises(ValueError, match="the noisy channels alone"):
        skip_loss(model_pred, target, timesteps, torch.cat([noisy, noisy], dim=1))
    with pytest.raises(ValueError, match=r"weights must have shape \(5,\)"):
        skip_loss(model_pred, target, timesteps, noisy, weights=torch.ones(5, 1, 1, 1))
    with pytest.raises(ValueError, match="skip_noise belongs to an estimator that draws"):
        skip_loss(model_pred, target, timesteps, noisy, skip_noise=noisy)
    with pytest.raises(ValueError, match="prediction_type must be given"):
        SkipLoss(NoiseSchedule.linear(1000), 9)
    with pytest.raises(TypeError, match=r"got a DDPMScheduler: .*diffusers.schedule_of"):
        SkipLoss(make_scheduler("DDPMScheduler"), 9)
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        SkipLoss(1000, 9, scheduler=make_scheduler("DDPMScheduler"))


# Flow matching, in the form of SD3's and Flux's scripts.


@pytest.mark.parametrize("prediction_type", ["flow", "sample"])
def test_the_swap_of_flow_matching(prediction_type):
    """SD3 preconditions by default: the output becomes a prediction of x_0, and so the target."""
    scheduler = make_scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
    sigmas = torch.tensor([0.0, 0.005, 0.2, 0.7, 0.9, 0.999]).reshape(-1, 1, 1, 1)
    latents, weighting = torch.randn(6, 2, 4, 4), torch.rand(6, 1, 1, 1)

    def step(model, tau=None):
        noise = torch.randn_like(latents)
        noisy = (1 - sigmas) * latents + sigmas * noise
        model_pred = model(noisy, 1000 * sigmas.flatten())
        target = noise - latents
        if prediction_type == "sample":
            model_pred, target = model_pred * (-sigmas) + noisy, latents
        if tau is None:
            return torch.mean((weighting * (model_pred - target) ** 2).reshape(6, -1), 1).mean()
        skip_loss = make_loss(scheduler, 0.05, tau=tau, prediction_type=prediction_type)
        weights = weighting.flatten()
        return skip_loss(model_pred, target, sigmas.flatten(), noisy, weights=weights)

    check_swap(step, step, rtol=1e-6)


def test_flow_matching_errors():
    scheduler = make_scheduler("FlowMatchEulerDiscreteScheduler")
    with pytest.raises(ValueError, match="prediction_type must be given for a FlowMatch"):
        make_loss(scheduler, skip_set=0.02)
    with pytest.raises(TypeError, match="takes skips as floats"):
        make_loss(scheduler, skip_set=9, prediction_type="flow")
    skip_loss = make_loss(scheduler, skip_set=0.02, prediction_type="flow")
    output, target, noisy = torch.randn(3, 2, 1, 4, 4).unbind(0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        skip_loss(output, target, torch.tensor([20.0, 999.0]), noisy)
    with pytest.raises(TypeError, match="the σ of each sample"):
        skip_loss(output, target, torch.tensor([20, 999]), noisy)
    with pytest.raises(ValueError, match=r"`sigmas.flatten\(\)`"):
        skip_loss(output, target, torch.rand(2, 1, 1, 1), noisy)


# As a module.


def test_it_leaves_no_trace_in_a_checkpoint_and_copies():
    scheduler = make_scheduler(prediction_type="v_prediction")
    skip_loss = make_loss(scheduler, skip_set=[9, 49])
    inputs = batch("v_prediction")[:4]
    expected = skip_loss(*inputs)
    assert not skip_loss.state_dict()
    assert not list(skip_loss.parameters())
    for twin in (copy.deepcopy(skip_loss), pickle.loads(pickle.dumps(skip_loss))):  # noqa: S301
        assert torch.equal(twin(*inputs), expected)
        assert repr(twin) == repr(skip_loss)
    text = "SkipLoss(NoiseSchedule.linear(1000), SkipSet([9, 49]), tau=0.99, estimator='expected')"
    assert repr(skip_loss) == text


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_compiles_without_a_graph_break(prediction_type):
    scheduler = make_scheduler(prediction_type=prediction_type)
    skip_loss = make_loss(scheduler)
    model_pred, target, timesteps, noisy, _ = batch(prediction_type)
    inputs = model_pred.float(), target.float(), timesteps, noisy.float()
    expected = skip_loss(*inputs)  # makes the table, which a compiler should not trace
    compiled = torch.compile(skip_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)


@pytest.mark.parametrize(
    "name", ["DEISMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler"]
)
def test_a_config_that_names_what_its_scheduler_does_not_do(name):
    """`from_config` keeps the key of zero terminal SNR where the scheduler knows no such thing."""
    zero = make_scheduler("DDIMScheduler", rescale_betas_zero_snr=True)
    scheduler = type(make_scheduler(name)).from_config(zero.config)
    table = scheduler.alphas_cumprod
    assert table[-1] > 1e-6
    torch.testing.assert_close(
        schedule_of(scheduler).alphas_cumprod, table.double(), rtol=1e-4, atol=0
    )
    assert schedule_of(zero).alphas_cumprod[-1] == 0
