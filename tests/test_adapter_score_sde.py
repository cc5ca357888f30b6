"""What the score_sde adapter alone has, on a double of the trainer and on its own code."""

import functools
import inspect

import pytest
import torch

from s2dm_loss import NoiseSchedule, SkipSet
from s2dm_loss.adapters import score_sde
from s2dm_loss.coefficients import coefficients
from tests.helpers.checkouts import plain_and_swapped, score_sde_config
from tests.helpers.small import Network, digits, every_pair, refuses
from tests.helpers.trainers import SCORE_SDE

NAMES = ("get_sde_loss_fn", "get_ddpm_loss_fn", "get_smld_loss_fn", "get_step_fn")
get_sde_loss_fn, get_ddpm_loss_fn, get_smld_loss_fn, get_step_fn = (
    functools.partial(getattr(score_sde, name), skip_set=9) for name in NAMES
)


@pytest.fixture(params=SCORE_SDE, ids=["double", "real"])
def trainer(request):
    return request.param[1]()


def loss_of(loss_fn):
    torch.manual_seed(3)
    return loss_fn(Network(dropout=0.0), torch.randn(32, 2, 5, 5)).item()


def make_state(trainer, model):
    average = trainer.ExponentialMovingAverage(model.parameters(), decay=0.5)
    optimizer = torch.optim.Adam(model.parameters())
    return {"model": model, "optimizer": optimizer, "ema": average, "step": 0}


def warm_up(optimizer, params, step):
    """From a learning rate of 0, as the trainer's."""
    optimizer.param_groups[0]["lr"] = 3e-3 * min(step / 5, 1.0)
    optimizer.step()


SDES = ("VPSDE", "subVPSDE", "VESDE")
STEPS = every_pair(
    lambda of: of["continuous"] or not (of["likelihood_weighting"] or of["kind"] == "subVPSDE"),
    kind=SDES,
    **dict.fromkeys(("continuous", "reduce_mean", "likelihood_weighting"), (True, False)),
)


@pytest.mark.parametrize("case", STEPS, ids=lambda case: " ".join(map(str, case.values())))
def test_tau_one_steps_are_the_trainers(trainer, case):
    """Optimizer, warm-up from a learning rate of 0, averaged weights, evaluation: step by step."""
    kind, flags = case["kind"], {name: value for name, value in case.items() if name != "kind"}
    sde, batch = getattr(trainer, kind)(N=50), torch.randn(8, 1, 8, 8)
    ours = {"skip_set": 15, "tau": 1.0, "allow_ve": kind == "VESDE"}
    ends = []
    for make, extra in ((trainer.get_step_fn, {}), (get_step_fn, ours)):
        state = make_state(trainer, torch.nn.DataParallel(Network(1)))
        options = {"optimize_fn": warm_up, **flags, **extra}
        train_step, eval_step = (make(sde, train=train, **options) for train in (True, False))
        torch.manual_seed(4)
        losses = [train_step(state, batch).item() for _ in range(3)]
        state["ema"].shadow_params[0].mul_(2)  # to tell which weights it evaluates
        evaluated = eval_step(state, batch)
        assert not evaluated.requires_grad
        losses.append(evaluated.item())
        weights = [p.detach().clone() for p in state["model"].parameters()]
        ends.append((losses, weights, state["ema"].shadow_params, state["step"]))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-3)
    assert ends[1][0][0] == pytest.approx(ends[0][0][0], rel=1e-5)
    # Adam divides by the gradient's own size, so rounding shows at the scale of the step.
    torch.testing.assert_close(ends[1][1:3], ends[0][1:3], rtol=1e-2, atol=2e-4)
    assert ends[1][3] == ends[0][3] == 3


@pytest.mark.parametrize("name", NAMES)
def test_names_arguments_and_defaults_are_the_trainers(trainer, name):
    ours = inspect.signature(getattr(score_sde, name)).parameters.values()
    theirs = inspect.signature(getattr(trainer, name)).parameters.values()
    positional = [p for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]


def test_int_skips_are_steps_of_n_and_floats_are_times(trainer):
    sde = trainer.VPSDE(N=500)
    first, *others, longer = (
        loss_of(get_sde_loss_fn(sde, True, skip_set=skips))
        for skips in (50, 0.1, SkipSet(50), SkipSet.for_sampling_steps(10), [50], 100)
    )
    assert {*others} == {first} != {longer}


def test_c_comes_from_beta_not_from_the_float32_table(trainer, monkeypatch):
    """At k = 1 the trainer's own ᾱ table would be off by more than 1e-4."""
    made = []
    monkeypatch.setattr(score_sde, "SkipStepLoss", lambda schedule, *_, **__: made.append(schedule))
    get_ddpm_loss_fn(trainer.VPSDE(), True)
    used, exact = (coefficients(each, 1).c[1:] for each in (*made, NoiseSchedule.linear(1000)))
    assert (used / exact - 1).abs().max() < 1e-6


def test_wrong_arguments_are_named(trainer):
    vp, sub_vp, ve = trainer.VPSDE(), trainer.subVPSDE(), trainer.VESDE()
    step_fn = functools.partial(get_step_fn, optimize_fn=print)
    discrete = functools.partial(step_fn, continuous=False)
    for make, sde, options, error, said in (
        (get_sde_loss_fn, Network(), {}, TypeError, "VPSDE or subVPSDE or VESDE, got a Network"),
        (get_ddpm_loss_fn, sub_vp, {}, TypeError, "vpsde must be a VPSDE, got a subVPSDE"),
        (get_ddpm_loss_fn, vp, {"skip_set": 0.1}, TypeError, "schedule takes int skips"),
        (get_smld_loss_fn, vp, {}, TypeError, "vesde must be a VESDE, got a VPSDE"),
        (get_sde_loss_fn, vp, {"weighting": "p2"}, ValueError, "must be False with a weighting"),
        (get_step_fn, vp, {}, ValueError, "optimize_fn must be callable for training, got None"),
        (step_fn, vp, {"tau": 2.0}, ValueError, "tau must lie in"),
        (step_fn, ve, {}, ValueError, "got a VESDE.*allow_ve=True"),
        (discrete, ve, {}, ValueError, "got a VESDE.*allow_ve=True"),
        (discrete, sub_vp, {}, ValueError, "continuous must be True for a subVPSDE"),
        (discrete, vp, {"likelihood_weighting": True}, ValueError, "False with continuous="),
    ):
        refuses(error, said, make, sde, True, **options)


@pytest.mark.parametrize("kind", SDES)
def test_a_subclass_is_known_and_one_with_a_path_of_its_own_is_refused(trainer, kind):
    class Other(getattr(trainer, kind)):
        def marginal_prob(self, x, t):
            mean, std = super().marginal_prob(x, t)
            return mean, std * (1 + t / 10)

    said = r"sde must have the path of .*got a Other whose"
    refuses(ValueError, said, get_sde_loss_fn, Other(), True, allow_ve=True)

    class Named(getattr(trainer, kind)):
        """Another name for the same path."""

    options = {"sigma_max": 40} if kind == "VESDE" else {"beta_max": 10.0}
    one, other = (
        loss_of(get_sde_loss_fn(made(**options), True, allow_ve=True))
        for made in (Named, getattr(trainer, kind))
    )
    assert one == other


def batches():
    images, generator = digits(), torch.Generator().manual_seed(0)
    while True:
        yield images[torch.randint(len(images), (32,), generator=generator)]


@pytest.mark.parametrize("case", [("VPSDE", True), ("subVPSDE", True), ("VPSDE", False)], ids=str)
def test_the_trainers_own_loop(tmp_path, case, monkeypatch):
    """It learns, and the untouched trainer restores and trains on."""
    trainer, (kind, continuous) = SCORE_SDE[1][1](), case
    # Its checkpoints hold the learning rate as a NumPy number, which torch >= 2.6 refuses to load
    # unless told to trust the file; the trainer's own torch.load is older than that.
    monkeypatch.setattr(torch, "load", functools.partial(torch.load, weights_only=False))
    config = score_sde_config(kind, continuous=continuous)
    runs = plain_and_swapped(trainer.train, config, tmp_path, batches)
    (plain_losses, plain), (losses, checkpoint) = runs
    assert len(losses) == 21
    assert losses != plain_losses
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    saved, plain = torch.load(checkpoint), torch.load(plain)
    assert saved["model"].keys() == plain["model"].keys()
    assert saved.keys() == plain.keys()
    untouched = make_state(trainer, trainer.create_model(config))
    trainer.restore_checkpoint(str(checkpoint), untouched, torch.device("cpu"))
    assert untouched["step"] == 21
    optimize = trainer.optimization_manager(config)
    step = trainer.get_step_fn(getattr(trainer, kind)(N=50), True, optimize, True, continuous)
    assert step(untouched, next(batches())).isfinite()
