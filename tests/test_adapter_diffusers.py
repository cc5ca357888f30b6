"""The loss in the place of a diffusers script's own, on diffusers' own schedulers.

`tests/test_adapters.py` holds it to a script's step at the ends of every schedule.
"""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.diffusers import SkipLoss, schedule_of
from tests import strategies
from tests.helpers.diffusers_parts import (
    SCHEDULERS,
    Script,
    make_scheduler,
    script_step,
)
from tests.helpers.small import Network, every_pair
from tests.helpers.trainers import DIFFUSERS_BETAS

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
ZERO_SNR = [name for name in SCHEDULERS if "rescale_betas_zero_snr" in make_scheduler(name).config]


def make_loss(scheduler, skip_set=9, **options):
    return SkipLoss.from_scheduler(scheduler, skip_set, **options)


def by_name(prediction_type):
    """The prediction type where it has to be said by name, as "sample" has."""
    return "sample" if prediction_type == "sample" else None


def batch(prediction_type="epsilon", *, scheduler=None, timesteps=(3, 9, 200, 640, 999)):
    """What a script has at its loss line: float64 model_pred, target, timesteps, noisy."""
    scheduler, t = scheduler or make_scheduler(), torch.tensor(timesteps)
    output, target, x_t, *_ = strategies.batch(schedule_of(scheduler), t, prediction_type)
    return output, target, t, x_t


SCRIPTS = every_pair(
    lambda each: (
        (not each["zero_snr"] or each["name"] in ZERO_SNR)
        and ("dream_training" not in each["options"] or each["prediction_type"] == "epsilon")
    ),
    name=SCHEDULERS,
    beta_schedule=DIFFUSERS_BETAS,
    zero_snr=(False, True),
    prediction_type=PREDICTION_TYPES,
    estimator=("expected", "shared"),
    options=(
        *({}, {"noise_offset": 0.1}, {"input_perturbation": 0.1}),
        *({"dtype": torch.bfloat16}, {"dream_training": True}),
    ),
    snr_gamma=(None, 5.0),
)


@pytest.mark.parametrize("case", SCRIPTS, ids=lambda case: " ".join(map(str, case.values())))
def test_tau_one_is_the_untouched_script(case):
    """DREAM changes noise and input, with a model call of its own that it makes itself."""
    config = {"rescale_betas_zero_snr": True} if case["zero_snr"] else {}
    scheduler = make_scheduler(case["name"], beta_schedule=case["beta_schedule"], **config)
    latents = torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    kind = case["prediction_type"]
    script = Script(kind, snr_gamma=case["snr_gamma"], **case["options"])
    options = {"estimator": case["estimator"], "reduction": "none"}
    skip_loss = make_loss(scheduler, tau=1.0, prediction_type=by_name(kind), **options)
    results = []
    for ours in (None, skip_loss):
        model = Network(dropout=0.0)
        torch.manual_seed(1)
        loss = script_step(script, model, scheduler, latents, ours)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss.detach(), gradients, len(model.seen), torch.get_rng_state()))
    (loss, gradients, calls, rng), (our_loss, our_gradients, our_calls, our_rng) = results
    assert loss.isfinite()
    torch.testing.assert_close(our_loss, loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(our_gradients, gradients, rtol=1e-5, atol=1e-6)
    assert torch.equal(our_rng, rng)
    assert our_calls == calls == 1 + ("dream_training" in case["options"])


def test_tau_one_fresh_draws_only_its_own_noise():
    model_pred, target, timesteps, noisy = batch()
    skip_loss = make_loss(make_scheduler(), tau=1.0, estimator="fresh")
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    loss = skip_loss(model_pred, target, timesteps, noisy, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(loss, F.mse_loss(model_pred, target))


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
    call = {"skip_noise": xi if "fresh" in options.values() else None}
    more = {"weights": torch.rand(5), **call}
    found = skip_loss(output, target, timesteps, noisy, **more)
    assert torch.equal(found, criterion.from_output(output, target, timesteps, noisy, **more))
    ours, cores = (
        loss.regression_target(target, timesteps, noisy, **call) for loss in (skip_loss, criterion)
    )
    assert all(map(torch.equal, ours, cores))


# The traps.


def test_prediction_type_is_read_at_each_call():
    """And skips from an iterator outlast the first one."""
    scheduler = make_scheduler()
    skip_loss = make_loss(scheduler, iter([1, 9]), reduction="none")
    inputs = batch("v_prediction")
    scheduler.register_to_config(prediction_type="v_prediction")
    of_v = make_scheduler(prediction_type="v_prediction")
    built_after = make_loss(of_v, [1, 9], reduction="none")
    assert torch.equal(skip_loss(*inputs), built_after(*inputs))
    scheduler.register_to_config(prediction_type="epsilon")
    assert not torch.allclose(skip_loss(*inputs), built_after(*inputs))
    given = make_loss(make_scheduler(), prediction_type="v_prediction")
    with pytest.raises(ValueError, match=r"'v_prediction' was given, but .* says 'epsilon'"):
        given(*batch())


def test_add_noise_moves_the_schedulers_table_but_not_ours():
    scheduler = make_scheduler(beta_schedule="sigmoid")  # the one whose table is taken as it is
    skip_loss = make_loss(scheduler, reduction="none")
    inputs = batch(scheduler=scheduler)
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


def test_sample_has_to_be_said_by_name():
    scheduler, set_later = make_scheduler(prediction_type="sample"), make_scheduler()
    said = r"prediction_type 'sample' must be given by name.*SDXL"
    with pytest.raises(ValueError, match=said):
        make_loss(scheduler)
    unnamed = make_loss(set_later)
    set_later.register_to_config(prediction_type="sample")
    with pytest.raises(ValueError, match=said):
        unnamed(*batch("sample"))
    named = make_loss(scheduler, prediction_type="sample")
    assert named(*batch("sample")).isfinite()
    assert "prediction_type='sample'" in repr(named)


def test_prior_preservation():
    """The script chunks model_pred and target, not the timesteps: two of them at batch size 1."""
    inputs = batch(timesteps=(500, 900))
    skip_loss = make_loss(make_scheduler(), reduction="none")
    whole = skip_loss(*inputs)
    (pred, _), (tgt, _), (t, _), (x, _) = (each.chunk(2) for each in inputs)
    with pytest.raises(ValueError, match=r"timesteps must have shape \(1,\).*prior preservation"):
        skip_loss(pred, tgt, inputs[2], x)
    with pytest.raises(ValueError, match="noisy_latents must have the shape of target"):
        skip_loss(pred, tgt, t, inputs[3])
    torch.testing.assert_close(skip_loss(pred, tgt, t, x), whole[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_float_timesteps_are_refused(dtype):
    model_pred, target, timesteps, noisy = batch()
    skip_loss = make_loss(make_scheduler())
    with pytest.raises(TypeError, match=r"must be integers.*bfloat16 turns 999 into 1000"):
        skip_loss(model_pred, target, timesteps.to(dtype), noisy)
    expected = skip_loss(model_pred, target, timesteps, noisy)
    for integer in (torch.int16, torch.int32):
        assert skip_loss(model_pred, target, timesteps.to(integer), noisy) == expected


# Which schedulers, and with which table.


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("beta_schedule", DIFFUSERS_BETAS)
def test_the_table_is_rebuilt_in_float64(name, beta_schedule):
    scheduler = make_scheduler(name, beta_schedule=beta_schedule)
    config = scheduler.config
    betas = DIFFUSERS_BETAS[beta_schedule](config.beta_start, config.beta_end)
    found = schedule_of(scheduler).alphas_cumprod
    torch.testing.assert_close(found, (1 - betas).cumprod(0), rtol=1e-11, atol=0)
    theirs = scheduler.alphas_cumprod.float()
    torch.testing.assert_close(found.float(), theirs, rtol=1e-4, atol=1e-7)
    if name in ZERO_SNR:
        zero = make_scheduler(name, beta_schedule=beta_schedule, rescale_betas_zero_snr=True)
        assert zero.alphas_cumprod[-1] in (0.0, 2**-24)
        assert schedule_of(zero).alphas_cumprod[-1] == 0


def test_a_table_that_is_not_the_configs_is_taken_as_it_is():
    squared, ended = make_scheduler(), make_scheduler()
    squared.alphas_cumprod = squared.alphas_cumprod**2
    for scheduler in (squared, make_scheduler(beta_schedule="sigmoid")):
        expected = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(schedule_of(scheduler).alphas_cumprod, expected)
    ended.alphas_cumprod[-1] = 0.0  # zero terminal SNR by hand
    assert schedule_of(ended).alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("betas", "rtol"),
    [
        ([0.01, 0.02, 0.05, 0.1], 1e-14),
        ([0.01, 0.02, 0.5, 1.0], 1e-6),  # no signal at the end: zero terminal SNR
        ([0.0, 0.01, 0.02, 0.05], 1e-6),
    ],
)
def test_trained_betas(betas, rtol):
    schedule = schedule_of(make_scheduler(trained_betas=betas))
    expected = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("name", "config", "known"),
    [
        ("RePaintScheduler", {}, "linear(1000)"),
        ("UnCLIPScheduler", {}, "cosine(1000)"),
        ("DDPMScheduler", {"num_train_timesteps": 20}, "linear(20)"),
    ],
)
def test_schedulers_that_say_less_and_a_short_one(name, config, known):
    skip_loss = make_loss(make_scheduler(name, **config))
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


def test_what_is_no_scheduler_or_is_set_to_flow_matching_is_refused():
    for config in ({"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}):
        with pytest.raises(ValueError, match="set to flow matching"):
            make_loss(make_scheduler("UniPCMultistepScheduler", **config))
    for scheduler in (None, 9, NoiseSchedule.linear(1000)):
        with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler, got"):
            make_loss(scheduler)


@pytest.mark.parametrize(
    "name", ["DEISMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler"]
)
def test_a_config_that_names_what_its_scheduler_does_not_do(name):
    """`from_config` keeps the key of zero terminal SNR where the scheduler knows no such thing."""
    zero = make_scheduler("DDIMScheduler", rescale_betas_zero_snr=True)
    scheduler = type(make_scheduler(name)).from_config(zero.config)
    table = scheduler.alphas_cumprod.double()
    assert table[-1] > 1e-6
    torch.testing.assert_close(schedule_of(scheduler).alphas_cumprod, table, rtol=1e-4, atol=0)
    assert schedule_of(zero).alphas_cumprod[-1] == 0


def test_wrong_calls():
    model_pred, target, timesteps, noisy = batch()
    skip_loss = make_loss(make_scheduler())
    whole = skip_loss(model_pred, target, timesteps, noisy)
    assert torch.equal(skip_loss(model_pred, target, timesteps), whole)
    for wrong, said in {
        (model_pred, target, noisy, timesteps): "they come before noisy_latents, skip_loss",
        (model_pred, target, timesteps[:, None], noisy): r"timesteps must have shape \(5,\)",
        (model_pred, target, timesteps, torch.cat([noisy] * 2, 1)): "the noisy channels alone",
        (model_pred, target, timesteps + 1, noisy): r"must lie in \[0, 1000\), got 1000",
        (torch.cat([model_pred] * 2, 1), target, timesteps, noisy): "model_pred .*learned variance",
    }.items():
        with pytest.raises(ValueError, match=said):
            skip_loss(*wrong)
    with pytest.raises(ValueError, match="they come before noisy_latents, skip_loss"):
        skip_loss.regression_target(target, noisy, timesteps)
    with pytest.raises(TypeError, match="timesteps must be a tensor, got 3"):
        skip_loss(model_pred, target, 3, noisy)
    of_v = make_loss(make_scheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match=r"noisy_latents must be given .*'v_pred.*got None"):
        of_v(model_pred, target, timesteps)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1000\), got 1000"):
        of_v(model_pred, target, timesteps + 1, noisy)
    with pytest.raises(ValueError, match=r"weights must have shape \(5,\)"):
        skip_loss(model_pred, target, timesteps, noisy, weights=torch.ones(5, 1, 1, 1))
    with pytest.raises(ValueError, match="skip_noise belongs to an estimator that draws"):
        skip_loss(model_pred, target, timesteps, noisy, skip_noise=noisy)
    for prediction_type, said in {"score": "one of 'epsilon', ", "flow": "a FlowMatch sch"}.items():
        with pytest.raises(ValueError, match=f"prediction_type .*{said}"):
            make_loss(make_scheduler(), prediction_type=prediction_type)
    with pytest.raises(ValueError, match="prediction_type must be given"):
        SkipLoss(NoiseSchedule.linear(1000), 9)
    with pytest.raises(TypeError, match=r"got a DDPMScheduler: .*diffusers.schedule_of"):
        SkipLoss(make_scheduler("DDPMScheduler"), 9)
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        SkipLoss(1000, 9, scheduler=make_scheduler("DDPMScheduler"))


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
    skip_loss = make_loss(make_scheduler(prediction_type="v_prediction"), skip_set=[9, 49])
    inputs = batch("v_prediction")
    assert not skip_loss.state_dict()
    assert not list(skip_loss.parameters())
    for twin in (copy.deepcopy(skip_loss), pickle.loads(pickle.dumps(skip_loss))):  # noqa: S301
        assert torch.equal(twin(*inputs), skip_loss(*inputs))
        assert repr(twin) == repr(skip_loss)
    text = "SkipLoss(NoiseSchedule.linear(1000), SkipSet([9, 49]), tau=0.99, estimator='expected')"
    assert repr(skip_loss) == text


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_it_compiles_without_a_graph_break(prediction_type):
    skip_loss = make_loss(make_scheduler(prediction_type=prediction_type))
    model_pred, target, timesteps, noisy = batch(prediction_type)
    inputs = model_pred.float(), target.float(), timesteps, noisy.float()
    expected = skip_loss(*inputs)  # makes the table, which a compiler should not trace
    compiled = torch.compile(skip_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), expected)
