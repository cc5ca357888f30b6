"""The loss in a diffusers script is the core's, on the schedule of diffusers' own schedulers."""

import copy
from functools import partial

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.diffusers import SkipLoss, schedule_of
from tests import strategies
from tests.doubles.denoising_diffusion_pytorch_double import SCHEDULES
from tests.helpers.diffusers_parts import diffusers, make_scheduler
from tests.helpers.small import refuses
from tests.strategies import pickled

# Schedulers with alphas_cumprod, less UnCLIP, which takes no beta_schedule.
SCHEDULERS = (
    *("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"),
    *("LMSDiscreteScheduler", "HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler"),
    *("SASolverScheduler", "RePaintScheduler"),
)
BETAS = {
    "linear": lambda start, end: torch.linspace(start, end, 1000, dtype=torch.float64),
    "scaled_linear": lambda start, end: BETAS["linear"](start**0.5, end**0.5) ** 2,
    "squaredcos_cap_v2": lambda *_: SCHEDULES["cosine"](1000),
}


def make_loss(scheduler, skip_set=9, **options):
    return SkipLoss.from_scheduler(scheduler, skip_set, **options)


def batch(prediction_type="epsilon", *, scheduler=None, timesteps=(3, 9, 200, 640, 999)):
    """What a script has at its loss line: float64 model_pred, target, timesteps, noisy."""
    scheduler, t = scheduler or make_scheduler(), torch.tensor(timesteps)
    output, target, x_t, *_ = strategies.batch(schedule_of(scheduler), t, prediction_type)
    return output, target, t, x_t


UNIPC, FLOW = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
ON_TIMESTEPS = NoiseSchedule.linear(1000), [1, 9, 49], [3, 9, 200, 640, 999]
ON_SIGMAS = ContinuousSchedule.flow(), 0.02, [0.005, 0.2, 0.7, 0.9, 1.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow", "x_0"])
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
def test_it_is_the_cores_loss(prediction_type, options):
    """Bit for bit, with all that a call takes; whose loss is the plain one at τ = 1."""
    flow = prediction_type in ("flow", "x_0")  # that of SD3
    named = {"prediction_type": "sample" if prediction_type == "x_0" else prediction_type}
    scheduler = make_scheduler(FLOW) if flow else make_scheduler(**named)
    schedule, skips, t = ON_SIGMAS if flow else ON_TIMESTEPS
    told = flow or prediction_type == "sample"  # by name, and not by the config
    skip_loss = make_loss(scheduler, skips, **(named if told else {}), **options)
    criterion = SkipStepLoss(schedule, skips, **named, **options)

    output, target, noisy, xi = torch.randn(4, 5, 2, 4, 4, dtype=torch.bfloat16)
    inputs = target, torch.tensor(t), noisy
    draws = [lambda: strategies.drawn(criterion.estimator, xi)]
    draws.append(lambda: {"generator": torch.Generator().manual_seed(0)})
    weights = torch.rand(5)
    for draw in draws:
        found, expected = (
            [loss(output, *inputs, weights=weights, **draw()), *target(*inputs, **draw())]
            for loss, target in (
                (skip_loss, skip_loss.regression_target),
                (criterion.from_output, criterion.regression_target),
            )
        )
        assert all(map(torch.equal, found, expected))


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
    refuses(ValueError, r"'v_prediction' was given, but .* says 'epsilon'", given, *batch())


def test_the_schedulers_own_table_is_neither_written_nor_read_again():
    """Zero terminal SNR is ᾱ = 0 to the loss; the scheduler keeps its 2^-24, also in float64."""
    scheduler = make_scheduler("DPMSolverMultistepScheduler", rescale_betas_zero_snr=True)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    skip_loss, inputs = make_loss(scheduler), batch()
    before = skip_loss(*inputs)
    assert scheduler.alphas_cumprod[-1] == 2**-24
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("meta")  # as its add_noise moves it
    assert torch.equal(skip_loss(*inputs), before)


def test_sample_has_to_be_said_by_name():
    scheduler, set_later = make_scheduler(prediction_type="sample"), make_scheduler()
    said = r"prediction_type 'sample' must be given by name.*SDXL"
    refuses(ValueError, said, make_loss, scheduler)
    unnamed = make_loss(set_later)
    set_later.register_to_config(prediction_type="sample")
    refuses(ValueError, said, unnamed, *batch("sample"))
    assert "prediction_type='sample'" in repr(make_loss(scheduler, prediction_type="sample"))


def test_prior_preservation():
    """The script chunks model_pred and target, not the timesteps: two of them at batch size 1."""
    inputs = batch(timesteps=(500, 900))
    skip_loss = make_loss(make_scheduler(), reduction="none")
    whole = skip_loss(*inputs)
    (pred, _), (tgt, _), (t, _), (x, _) = (each.chunk(2) for each in inputs)
    said = r"timesteps must have shape \(1,\).*prior preservation"
    refuses(ValueError, said, skip_loss, pred, tgt, inputs[2], x)
    said = "noisy_latents must have the shape of target"
    refuses(ValueError, said, skip_loss, pred, tgt, t, inputs[3])
    torch.testing.assert_close(skip_loss(pred, tgt, t, x), whole[:1])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("beta_schedule", BETAS)
def test_the_table_is_rebuilt_in_float64(name, beta_schedule):
    scheduler = make_scheduler(name, beta_schedule=beta_schedule)
    config = scheduler.config
    betas = BETAS[beta_schedule](config.beta_start, config.beta_end)
    exact = NoiseSchedule.from_betas(betas)
    found = make_loss(scheduler).criterion.schedule.alphas_cumprod
    torch.testing.assert_close(found, exact.alphas_cumprod, rtol=1e-11, atol=0)
    theirs = scheduler.alphas_cumprod.float()
    torch.testing.assert_close(found.float(), theirs, rtol=1e-4, atol=1e-7)
    if "rescale_betas_zero_snr" in config:
        zero = make_scheduler(name, beta_schedule=beta_schedule, rescale_betas_zero_snr=True)
        assert zero.alphas_cumprod[-1] in (0.0, 2**-24)
        found, exact = schedule_of(zero), exact.rescale_zero_terminal_snr()
        torch.testing.assert_close(found.alphas_cumprod, exact.alphas_cumprod, rtol=1e-11, atol=0)


def test_a_table_that_is_not_the_configs_is_taken_as_it_is():
    squared, ended = make_scheduler(), make_scheduler()
    squared.alphas_cumprod **= 2
    # `from_config` keeps the key of zero terminal SNR, and DEIS knows no such thing.
    zero = make_scheduler(rescale_betas_zero_snr=True)
    without_it = diffusers.DEISMultistepScheduler.from_config(zero.config)
    for scheduler in (squared, make_scheduler(beta_schedule="sigmoid"), without_it):
        expected = scheduler.alphas_cumprod.double()
        found = schedule_of(scheduler).alphas_cumprod
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    ended.alphas_cumprod[-1] = 0.0  # zero terminal SNR by hand
    assert schedule_of(ended).alphas_cumprod[-1] == 0


def test_trained_betas():
    for betas, rtol in (
        ([0.01, 0.02, 0.05, 0.1], 1e-14),
        ([0.01, 0.02, 0.5, 1.0], 1e-6),  # no signal at the end: zero terminal SNR
        ([0.0, 0.01, 0.02, 0.05], 1e-6),
    ):
        schedule = schedule_of(make_scheduler(trained_betas=betas))
        expected = (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
        torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=rtol, atol=0)


def test_a_scheduler_that_names_no_betas_and_a_short_one():
    assert repr(schedule_of(make_scheduler("UnCLIPScheduler"))) == "NoiseSchedule.cosine(1000)"
    assert repr(schedule_of(make_scheduler(num_train_timesteps=20))) == "NoiseSchedule.linear(20)"


def test_a_loss_that_cannot_be_made():
    for scheduler, said in (
        (make_scheduler("EDMEulerScheduler"), "got a EDMEulerScheduler: EDM trains"),
        *(
            (make_scheduler(name), f"alphas_cumprod.*got a {name}: without ᾱ")
            for name in ("IPNDMScheduler", "ScoreSdeVeScheduler", "DDPMWuerstchenScheduler")
        ),
        (make_scheduler(UNIPC, use_flow_sigmas=True), "set to flow match"),
        (make_scheduler(UNIPC, prediction_type="flow_prediction"), "set to flow match"),
        (make_scheduler(prediction_type="flow"), "config.prediction_type must be one"),
        (make_scheduler(FLOW), "prediction_type must be given for a FlowMatch"),
    ):
        refuses(ValueError, said, make_loss, scheduler)
    for kind, said in (("score", "one of 'epsilon', "), ("flow", "a FlowMatch sch")):
        refuses(ValueError, said, make_loss, make_scheduler(), prediction_type=kind)


@pytest.mark.filterwarnings("ignore:prediction_type .flow. is noise minus data")
@pytest.mark.parametrize("kind", ["flow", "velocity"])
def test_sigmas_that_count_the_data(kind):
    """Mochi: x_t = σ x_0 + (1-σ) ε, so that an upright scheduler at 1 - σ has the same loss."""
    options = {"skip_set": 0.02, "prediction_type": kind}
    upright, inverted = (
        make_loss(make_scheduler(FLOW, **o), **options) for o in ({}, {"invert_sigmas": True})
    )
    pred, target, _, noisy = batch()
    t, sign = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]), 1 if kind == "flow" else -1
    found = inverted(sign * pred, sign * target, 1 - t, noisy)
    torch.testing.assert_close(found, upright(pred, target, t, noisy))


def test_wrong_calls():
    pred, target, t, noisy = batch()
    wide = torch.cat([noisy, noisy], 1)
    skip_loss = make_loss(make_scheduler())
    of_v = make_loss(make_scheduler(prediction_type="v_prediction"))
    of_flow = make_loss(make_scheduler(FLOW), skip_set=0.02, prediction_type="flow")
    of_another = partial(SkipLoss, NoiseSchedule.cosine(1000), 9, scheduler=make_scheduler())
    assert torch.equal(skip_loss(pred, target, t.short()), skip_loss(pred, target, t, noisy))
    for call, *wrong, error, said in (
        (skip_loss, pred, target, noisy, t, ValueError, "they come before noisy_latents"),
        (skip_loss.regression_target, target, noisy, t, ValueError, "they come before noisy_lat"),
        (skip_loss, pred, target, t[:, None], noisy, ValueError, r"must have shape \(5,\)"),
        (skip_loss, pred, target, 3, noisy, TypeError, "timesteps must be a tensor, got 3"),
        (skip_loss, pred, target, t.bfloat16(), noisy, TypeError, "integers.*turns 999 into 1000"),
        (skip_loss, pred, target, t, wide, ValueError, "the noisy channels alone"),
        (skip_loss, wide, target, t, noisy, ValueError, "model_pred .*learned variance"),
        (of_v, pred, target, t, ValueError, "noisy_latents must be given .*'v_pred.*got None"),
        (make_loss, None, TypeError, "scheduler must be a diffusers scheduler, got"),
        (make_loss, NoiseSchedule.linear(9), TypeError, "must be a diffusers scheduler, got"),
        (SkipLoss, make_scheduler(), 9, TypeError, "a DDPMScheduler: .*diffusers.schedule_of"),
        (SkipLoss, NoiseSchedule.linear(9), 1, ValueError, "prediction_type must be given"),
        (of_another, ValueError, "schedule must be that of scheduler, .*linear"),
        (of_flow, pred, target, t, noisy, TypeError, "the σ of each sample"),
        (of_flow, pred, target, torch.rand(5, 1, 1), noisy, ValueError, r"`sigmas.flatten\(\)`"),
    ):
        refuses(error, said, call, *wrong)


def test_it_leaves_no_trace_in_a_checkpoint_and_copies():
    skip_loss = make_loss(make_scheduler(prediction_type="v_prediction"), skip_set=[9, 49])
    inputs = batch("v_prediction")
    assert not skip_loss.state_dict()
    assert not list(skip_loss.parameters())
    for twin in (copy.deepcopy(skip_loss), pickled(skip_loss)):
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
