"""What the score_sde adapter alone has, on a double of the trainer and on its own code."""

import functools
import inspect
import os
from pathlib import Path

import pytest
import torch

from s2dm_loss import NoiseSchedule, SkipSet
from s2dm_loss.adapters import score_sde
from s2dm_loss.coefficients import coefficients
from tests.doubles import score_sde_double
from tests.helpers.score_sde_checkout import load_score_sde, make_config, make_sde
from tests.helpers.small import Network, digits, every_pair
from tests.helpers.upstream import root_of

ROOT = os.environ.get("S2DM_SCORE_SDE_ROOT")
NAMES = ("get_sde_loss_fn", "get_ddpm_loss_fn", "get_smld_loss_fn", "get_step_fn")
get_sde_loss_fn, get_ddpm_loss_fn, get_smld_loss_fn, get_step_fn = (
    functools.partial(getattr(score_sde, name), skip_set=9) for name in NAMES
)


@pytest.fixture(scope="module")
def trainer():
    return score_sde_double if ROOT is None else load_score_sde(Path(ROOT))


def loss_of(loss_fn):
    torch.manual_seed(3)
    return loss_fn(Network(dropout=0.0), torch.randn(32, 2, 5, 5)).item()


def make_state(trainer, config):
    torch.manual_seed(0)
    model = trainer.create_model(config)
    return {
        "model": model,
        "optimizer": trainer.get_optimizer(config, model.parameters()),
        "ema": trainer.ExponentialMovingAverage(model.parameters(), decay=0.5),
        "step": 0,
    }


STEPS = every_pair(
    lambda each: each["continuous"] or not (each["likelihood"] or each["kind"] == "subvpsde"),
    kind=("vpsde", "subvpsde", "vesde"),
    continuous=(True, False),
    reduce_mean=(True, False),
    likelihood=(True, False),
)


@pytest.mark.parametrize("case", STEPS, ids=lambda case: " ".join(map(str, case.values())))
def test_tau_one_steps_are_the_trainers(trainer, case):
    """Optimizer, warm-up from a learning rate of 0, averaged weights, evaluation: step by step."""
    config = make_config(case["kind"])
    sde = make_sde(trainer, config)
    batch = torch.randn(8, 1, 8, 8, generator=torch.manual_seed(1))
    ours = {"skip_set": 15, "tau": 1.0, "allow_ve": case["kind"] == "vesde"}
    ends = []
    for make, extra in ((trainer.get_step_fn, {}), (get_step_fn, ours)):
        state = make_state(trainer, config)
        options = {
            "optimize_fn": trainer.optimization_manager(config),
            "reduce_mean": case["reduce_mean"],
            "continuous": case["continuous"],
            "likelihood_weighting": case["likelihood"],
            **extra,
        }
        train_step, eval_step = (make(sde, train=train, **options) for train in (True, False))
        torch.manual_seed(4)
        losses = [train_step(state, batch).item() for _ in range(3)]
        losses.append(eval_step(state, batch).item())
        weights = [p.detach().clone() for p in state["model"].parameters()]
        ends.append((losses, weights, state["ema"].shadow_params, state["step"]))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-3)
    assert ends[1][0][0] == pytest.approx(ends[0][0][0], rel=1e-5)
    # Adam divides by the gradient's own size, so rounding shows at the scale of the step.
    torch.testing.assert_close(ends[1][1:3], ends[0][1:3], rtol=1e-2, atol=2e-4)
    assert ends[1][3] == ends[0][3] == 3


def test_evaluation_uses_the_averaged_weights_and_puts_the_others_back(trainer):
    config = make_config()
    state = make_state(trainer, config)
    for shadow in state["ema"].shadow_params:
        shadow.zero_()
    evaluate = get_step_fn(make_sde(trainer, config), False, reduce_mean=True, tau=1.0)
    before = [p.detach().clone() for p in state["model"].parameters()]
    torch.manual_seed(0)
    loss = evaluate(state, torch.zeros(64, 1, 8, 8))
    torch.manual_seed(0)
    torch.rand(64)
    # All-zero weights predict 0, so the loss is the mean square of the noise.
    torch.testing.assert_close(loss, torch.randn(64, 1, 8, 8).square().mean())
    assert not loss.requires_grad
    assert all(map(torch.equal, before, state["model"].parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_names_arguments_and_defaults_are_the_trainers(trainer, name):
    ours = inspect.signature(getattr(score_sde, name)).parameters.values()
    theirs = inspect.signature(getattr(trainer, name)).parameters.values()
    positional = [p for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]


def test_int_skips_are_steps_of_n_and_floats_are_times(trainer):
    sde = trainer.VPSDE(N=500)
    losses = [
        loss_of(get_sde_loss_fn(sde, True, skip_set=skips))
        for skips in (50, 0.1, SkipSet(50), SkipSet.for_sampling_steps(10), [50])
    ]
    assert len(set(losses)) == 1
    assert loss_of(get_sde_loss_fn(sde, True, skip_set=100)) != losses[0]


def test_c_comes_from_beta_not_from_the_float32_table(trainer, monkeypatch):
    """At k = 1 the trainer's own ᾱ table would be off by more than 1e-4."""
    sde = trainer.VPSDE()
    exact = coefficients(NoiseSchedule.linear(1000), 1).c[1:]
    table = sde.alphas_cumprod.double()
    assert ((table[:-1] / table[1:] - 1).sqrt() / exact - 1).abs().max() > 1e-4
    made = []
    monkeypatch.setattr(score_sde, "SkipStepLoss", lambda schedule, *_, **__: made.append(schedule))
    score_sde.get_ddpm_loss_fn(sde, True, skip_set=1)
    used = coefficients(made[0], 1).c[1:]
    assert (used / exact - 1).abs().max() < 1e-6


@pytest.mark.parametrize("continuous", [True, False])
def test_ve_is_refused_unless_asked_for_by_name(trainer, continuous):
    options = {"optimize_fn": print, "continuous": continuous}
    with pytest.raises(ValueError, match=r"got a VESDE.*allow_ve=True"):
        get_step_fn(trainer.VESDE(), True, **options)
    assert callable(get_step_fn(trainer.VESDE(), True, allow_ve=True, **options))


def test_wrong_arguments_are_named(trainer):
    vp = trainer.VPSDE()
    with pytest.raises(TypeError, match="sde must be a VPSDE or subVPSDE or VESDE, got a Network"):
        get_sde_loss_fn(Network(), True)
    with pytest.raises(TypeError, match="vpsde must be a VPSDE, got a subVPSDE"):
        get_ddpm_loss_fn(trainer.subVPSDE(), True)
    with pytest.raises(TypeError, match="vesde must be a VESDE, got a VPSDE"):
        get_smld_loss_fn(vp, True)
    with pytest.raises(ValueError, match="optimize_fn must be callable for training, got None"):
        get_step_fn(vp, True)
    with pytest.raises(ValueError, match="likelihood_weighting must be False with continuous="):
        get_step_fn(vp, True, print, continuous=False, likelihood_weighting=True)
    with pytest.raises(ValueError, match="continuous must be True for a subVPSDE"):
        get_step_fn(trainer.subVPSDE(), True, print, continuous=False)
    with pytest.raises(ValueError, match="tau must lie in"):
        get_step_fn(vp, True, print, tau=2.0)
    with pytest.raises(ValueError, match=r"likelihood_weighting must be False with a weighting"):
        get_sde_loss_fn(vp, True, weighting="min_snr")
    with pytest.raises(TypeError, match="discrete schedule takes int skips"):
        get_ddpm_loss_fn(vp, True, skip_set=0.1)


@pytest.mark.parametrize("kind", ["VPSDE", "subVPSDE", "VESDE"])
def test_a_subclass_is_known_and_one_with_a_path_of_its_own_is_refused(trainer, kind):
    class Other(getattr(trainer, kind)):
        def marginal_prob(self, x, t):
            mean, std = super().marginal_prob(x, t)
            return mean, std * (1 + t / 10)

    with pytest.raises(ValueError, match=r"sde must have the path of .*got a Other whose"):
        get_sde_loss_fn(Other(), True, allow_ve=True)

    class Named(getattr(trainer, kind)):
        """Another name for the same path."""

    options = {"sigma_max": 40} if kind == "VESDE" else {"beta_max": 10.0}
    one, other = (made(**options) for made in (Named, getattr(trainer, kind)))
    assert loss_of(get_sde_loss_fn(one, True, allow_ve=True)) == loss_of(
        get_sde_loss_fn(other, True, allow_ve=True)
    )


def batches(batch_size=32):
    images, generator = digits(), torch.Generator().manual_seed(0)
    while True:
        yield images[torch.randint(len(images), (batch_size,), generator=generator)]


@pytest.mark.parametrize(
    ("kind", "continuous"), [("vpsde", True), ("subvpsde", True), ("vpsde", False)]
)
def test_the_trainers_own_loop(tmp_path, kind, continuous, monkeypatch):
    """It learns, and the untouched trainer restores, trains on and samples."""
    trainer = load_score_sde(root_of("S2DM_SCORE_SDE_ROOT"))
    # Its checkpoints hold the learning rate as a NumPy number, which torch >= 2.6 refuses to load
    # unless told to trust the file; the trainer's own torch.load is older than that.
    monkeypatch.setattr(torch, "load", functools.partial(torch.load, weights_only=False))
    config = make_config(kind, continuous=continuous)
    runs = {}
    for name in ("plain", "adapted"):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        runs[name] = trainer.train(config, tmp_path / name, batches(), swap=name == "adapted")
    losses, checkpoint = runs["adapted"]
    assert len(losses) == 21
    assert losses != runs["plain"][0]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    saved, plain = (torch.load(path) for path in (checkpoint, runs["plain"][1]))
    assert saved["model"].keys() == plain["model"].keys()
    assert saved.keys() == plain.keys()
    untouched = make_state(trainer, config)
    trainer.restore_checkpoint(str(checkpoint), untouched, torch.device("cpu"))
    assert untouched["step"] == 21
    sde = make_sde(trainer, config)
    step = trainer.get_step_fn(sde, True, trainer.optimization_manager(config), True, continuous)
    assert step(untouched, next(batches())).isfinite()
    sample = trainer.sample(config, sde, untouched["model"])
    assert sample.shape == (2, 1, 8, 8)
    assert sample.isfinite().all()
