"""The score_sde adapter on a double of the trainer, or on a checkout in S2DM_SCORE_SDE_ROOT."""

import functools
import importlib.util
import inspect
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from s2dm_loss import NoiseSchedule, SkipSet
from s2dm_loss.adapters import score_sde
from s2dm_loss.coefficients import coefficients
from s2dm_loss.testing import check_swap
from tests.doubles import score_sde_double
from tests.helpers.released_loss import CASES, released_constant
from tests.helpers.score_sde_checkout import load_score_sde

ROOT = os.environ.get("S2DM_SCORE_SDE_ROOT")
KINDS = ("VPSDE", "subVPSDE", "VESDE")

# The adapter, with the skip that most tests take.
adapter = SimpleNamespace(
    **{
        name: functools.partial(getattr(score_sde, name), skip_set=9)
        for name in ("get_sde_loss_fn", "get_ddpm_loss_fn", "get_smld_loss_fn", "get_step_fn")
    }
)

# A skip so long that a batch holds times on both sides of it.
SKIP = 300


@pytest.fixture(scope="module")
def trainer():
    return score_sde_double if ROOT is None else load_score_sde(Path(ROOT))


class TinyModel(nn.Module):
    """A small network that depends on its labels, draws random numbers, and keeps its calls."""

    def __init__(self, dropout=0.1):
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
        self.dropout = dropout
        self.seen = []

    def forward(self, x, labels):
        self.seen.append((x.detach(), labels, self.training))
        hidden = nn.functional.dropout(x, self.dropout, training=self.training)
        return self.conv(hidden) * (1 + labels.reshape(-1, 1, 1, 1) / 1000)


def data(size=32):
    return torch.randn(size, 2, 5, 5, dtype=torch.float64, generator=torch.manual_seed(5))


def run(loss_fn, model, batch, seed=3):
    """The loss, its gradients, and the state of the random stream after it."""
    torch.manual_seed(seed)
    loss = loss_fn(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), gradients, torch.get_rng_state()


def assert_same_run(ours, theirs, model):
    """Values to the rounding of the trainer's float32 tables; the random stream bit for bit."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    for gradient, expected in zip(ours[1], theirs[1], strict=True):
        assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(ours[2], theirs[2])
    (x_ours, labels_ours, mode_ours), (x_theirs, labels_theirs, mode_theirs) = model.seen
    assert torch.equal(x_ours, x_theirs)
    assert torch.equal(labels_ours, labels_theirs)
    assert labels_ours.dtype == labels_theirs.dtype
    assert mode_ours == mode_theirs


FLAGS = list(itertools.product((True, False), repeat=2))


@pytest.mark.parametrize("estimator", ["expected", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_tau_one_is_the_trainers_sde_loss_over_the_full_grid(trainer, kind, estimator):
    sde = getattr(trainer, kind)()
    ve = {"allow_ve": True} if kind == "VESDE" else {}
    for reduce_mean, continuous, likelihood, train in itertools.product((True, False), repeat=4):
        model = TinyModel()
        arguments = (sde, train, reduce_mean, continuous, likelihood)
        ours = adapter.get_sde_loss_fn(
            *arguments, skip_set=SKIP, tau=1.0, estimator=estimator, **ve
        )
        theirs = trainer.get_sde_loss_fn(*arguments)
        assert_same_run(run(ours, model, data()), run(theirs, model, data()), model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["get_sde_loss_fn", "discrete"])
def test_the_swap(trainer, kind, name):
    """Gradients at τ = 0.99 are near the plain ones from the first time to the last."""
    sde = getattr(trainer, kind)()
    options = {"allow_ve": True} if kind == "VESDE" else {}
    if name == "discrete":
        if kind == "subVPSDE":
            pytest.skip("it has no discrete form")
        name, options = f"get_{'smld' if kind == 'VESDE' else 'ddpm'}_loss_fn", {}
    report = check_swap(
        lambda model: getattr(trainer, name)(sde, True)(model, data(128)),
        lambda model, tau: getattr(adapter, name)(sde, True, tau=tau, **options)(model, data(128)),
        rtol=1e-6,
    )
    assert report.calls == 1
    assert report.ratio.min() > 0.97
    assert report.ratio.max() < 1.02


@pytest.mark.parametrize("estimator", ["expected", "shared"])
@pytest.mark.parametrize(("reduce_mean", "train"), FLAGS)
@pytest.mark.parametrize("name", ["get_ddpm_loss_fn", "get_smld_loss_fn"])
def test_tau_one_is_the_trainers_discrete_loss(trainer, name, reduce_mean, train, estimator):
    sde = trainer.VPSDE() if "ddpm" in name else trainer.VESDE()
    model = TinyModel()
    ours = getattr(adapter, name)(
        sde, train, reduce_mean, skip_set=SKIP, tau=1.0, estimator=estimator
    )
    theirs = getattr(trainer, name)(sde, train, reduce_mean)
    assert_same_run(run(ours, model, data()), run(theirs, model, data()), model)


def make_config(sde="vpsde", *, continuous=True, steps=20, reduce_mean=True, likelihood=False):
    """The fields of the trainer's configuration that its own code reads."""
    return SimpleNamespace(
        training=SimpleNamespace(
            sde=sde,
            continuous=continuous,
            reduce_mean=reduce_mean,
            likelihood_weighting=likelihood,
            n_iters=steps,
            batch_size=32,
            log_freq=1,
            eval_freq=10,
            snapshot_freq=10**6,
            snapshot_freq_for_preemption=10**6,
            snapshot_sampling=False,
        ),
        sampling=SimpleNamespace(
            method="pc",
            predictor="euler_maruyama",
            corrector="none",
            snr=0.16,
            n_steps_each=1,
            probability_flow=False,
            noise_removal=True,
        ),
        data=SimpleNamespace(
            image_size=8, num_channels=1, centered=True, uniform_dequantization=False
        ),
        model=SimpleNamespace(
            name="ddpm",
            beta_min=0.1,
            beta_max=20.0,
            sigma_min=0.01,
            sigma_max=50.0,
            num_scales=50,
            ema_rate=0.999,
            scale_by_sigma=False,
            nonlinearity="swish",
            normalization="GroupNorm",
            nf=32,
            ch_mult=(1,),
            num_res_blocks=1,
            attn_resolutions=(),
            resamp_with_conv=True,
            conditional=True,
            dropout=0.0,
        ),
        optim=SimpleNamespace(
            optimizer="Adam",
            lr=3e-3,
            beta1=0.9,
            eps=1e-8,
            weight_decay=0.0,
            warmup=5,
            grad_clip=1.0,
        ),
        device=torch.device("cpu"),
    )


def make_state(trainer, config):
    torch.manual_seed(0)
    model = trainer.create_model(config)
    return {
        "model": model,
        "optimizer": trainer.get_optimizer(config, model.parameters()),
        "ema": trainer.ExponentialMovingAverage(model.parameters(), decay=0.9),
        "step": 0,
    }


@pytest.mark.parametrize(
    ("kind", "continuous", "reduce_mean", "likelihood"),
    [
        *((kind, True, *flags) for kind in ("vpsde", "subvpsde", "vesde") for flags in FLAGS),
        *((kind, False, mean, False) for kind in ("vpsde", "vesde") for mean in (True, False)),
    ],
)
def test_tau_one_steps_are_the_trainers(trainer, kind, continuous, reduce_mean, likelihood):
    """Optimizer, warm-up from a learning rate of 0, averaged weights, evaluation: step by step."""
    config = make_config(kind)
    sde = trainer.make_sde(config)
    batch = torch.randn(8, 1, 8, 8, generator=torch.manual_seed(1))
    ends = []
    for make, extra in (
        (trainer.get_step_fn, {}),
        (adapter.get_step_fn, {"skip_set": 15, "tau": 1.0, "allow_ve": kind == "vesde"}),
    ):
        state = make_state(trainer, config)
        options = {
            "optimize_fn": trainer.optimization_manager(config),
            "reduce_mean": reduce_mean,
            "continuous": continuous,
            "likelihood_weighting": likelihood,
            **extra,
        }
        train_step = make(sde, train=True, **options)
        eval_step = make(sde, train=False, **options)
        torch.manual_seed(4)
        losses = [train_step(state, batch).item() for _ in range(3)]
        losses.append(eval_step(state, batch).item())
        weights = [p.detach().clone() for p in state["model"].parameters()]
        ends.append((losses, weights, state["ema"].shadow_params, state["step"]))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-3)
    assert ends[1][0][0] == pytest.approx(ends[0][0][0], rel=1e-5)
    # Adam divides by the gradient's own size, so rounding shows at the scale of the step.
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=1e-2, atol=2e-4)
    torch.testing.assert_close(ends[1][2], ends[0][2], rtol=1e-2, atol=2e-4)
    assert ends[1][3] == ends[0][3] == 3


def test_step_zero_learns_nothing_and_each_step_updates_the_average(trainer):
    config = make_config()
    state = make_state(trainer, config)
    step = adapter.get_step_fn(
        trainer.make_sde(config), True, trainer.optimization_manager(config), reduce_mean=True
    )
    start = [p.detach().clone() for p in state["model"].parameters()]
    batch = torch.randn(8, 1, 8, 8)
    step(state, batch)
    assert all(map(torch.equal, start, state["model"].parameters()))
    assert state["ema"].num_updates == 1
    step(state, batch)
    assert not all(map(torch.equal, start, state["model"].parameters()))
    assert state["ema"].num_updates == 2


def test_evaluation_uses_the_averaged_weights_and_puts_the_others_back(trainer):
    config = make_config()
    state = make_state(trainer, config)
    for shadow in state["ema"].shadow_params:
        shadow.zero_()
    evaluate = adapter.get_step_fn(trainer.make_sde(config), False, reduce_mean=True, tau=1.0)
    before = [p.detach().clone() for p in state["model"].parameters()]
    torch.manual_seed(0)
    loss = evaluate(state, torch.zeros(64, 1, 8, 8))
    torch.manual_seed(0)
    torch.rand(64)
    # All-zero weights predict 0, so the loss is the mean square of the noise.
    torch.testing.assert_close(loss, torch.randn(64, 1, 8, 8).square().mean())
    assert not loss.requires_grad
    assert all(map(torch.equal, before, state["model"].parameters()))


@pytest.mark.parametrize(
    "name", ["get_step_fn", "get_sde_loss_fn", "get_ddpm_loss_fn", "get_smld_loss_fn"]
)
def test_names_arguments_and_defaults_are_the_trainers(trainer, name):
    ours = inspect.signature(getattr(score_sde, name)).parameters.values()
    theirs = inspect.signature(getattr(trainer, name)).parameters.values()
    positional = [p for p in ours if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]


def draws(sde, batch, seed=3):
    """t and z as the trainer draws them: t first."""
    torch.manual_seed(seed)
    t = torch.rand(len(batch)) * (1 - 1e-5) + 1e-5
    return t, torch.randn_like(batch)


def path(kind, t):
    """alpha and sigma in float64, from the papers' formulas."""
    t = t.double()
    if kind == "VESDE":
        return torch.ones_like(t), 0.01 * 5000**t
    log_mean = -(t**2) * 19.9 / 4 - t * 0.1 / 2
    variance = 1 - (2 * log_mean).exp()
    return log_mean.exp(), variance if kind == "subVPSDE" else variance.sqrt()


def skip_coefficient(kind, t, delta):
    """c² of the variance-preserving process of equal signal-to-noise ratio."""
    (a, b), (a_s, b_s) = path(kind, t), path(kind, (t.double() - delta).clamp(min=0))
    snr, snr_s = (a / b) ** 2, (a_s / b_s) ** 2
    c2 = (1 / (1 + 1 / snr_s)) / (snr / (1 + snr)) - 1
    return torch.where(t.double() >= delta, c2.clamp(max=100), 0.0)


def eq_13(eps_hat, noise, c2, zeta=None):
    """The paper's two terms at τ = 0.99, less what they are at their least; shape [B].

    Without ζ its expectation is taken. c² is 0 where no skip is valid.
    """
    c2 = c2.view(-1, 1, 1, 1)
    tau, target = torch.where(c2 > 0, 0.99, 1.0), 0.0 if zeta is None else c2.sqrt() * zeta

    def terms(eps_hat):
        skip = c2 * eps_hat.square() - 2 * eps_hat * target
        return (tau * (eps_hat - noise).square() + (1 - tau) * skip).mean((1, 2, 3))

    best = (tau * noise + (1 - tau) * target) / (tau + (1 - tau) * c2)
    return terms(eps_hat) - terms(best)


@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_formula(trainer, kind, estimator):
    sde, batch = getattr(trainer, kind)(), data()
    t, z = draws(sde, batch)
    zeta = torch.randn_like(batch) if estimator == "fresh" else z
    a, b = (values.view(-1, 1, 1, 1) for values in path(kind, t))
    c2 = skip_coefficient(kind, t, SKIP / 1000)
    assert 0 < (c2 == 0).sum() < len(t)
    for reduce_mean, likelihood in FLAGS:
        model = TinyModel(dropout=0.0)
        ours = adapter.get_sde_loss_fn(
            sde,
            True,
            reduce_mean=reduce_mean,
            likelihood_weighting=likelihood,
            skip_set=SKIP,
            estimator=estimator,
            **({"allow_ve": True} if kind == "VESDE" else {}),
        )
        loss, gradients, _ = run(ours, model, batch)

        labels = b.flatten() if kind == "VESDE" else 999 * t
        output = model(a * batch + b * z, labels)
        eps_hat = -b * output if kind == "VESDE" else output
        losses = eq_13(eps_hat, z, c2, None if estimator == "expected" else zeta)
        if not reduce_mean:
            losses = losses * 50 / 2
        if likelihood:
            losses = losses * sde.sde(batch, t)[1].double() ** 2 / b.flatten() ** 2
        expected = losses.mean()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=0)
        for gradient, reference in zip(
            gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True
        ):
            assert (gradient - reference).norm() <= 1e-3 * reference.norm()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"k{c['skip']}-{c['dtype']}")
def test_replays_the_released_loss(trainer, case, monkeypatch):
    dtype = getattr(torch, case["dtype"])

    def tensor(name):
        return torch.tensor(case[name], dtype=dtype).reshape(case["shape"])

    class Model(nn.Module):
        def forward(self, x_t, labels):
            torch.testing.assert_close(x_t, tensor("x_t"), rtol=1e-5, atol=1e-5)
            assert labels.tolist() == case["timesteps"]
            return output

    # The trainer draws inside the loss, so the case's numbers come in by way of the drawing.
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(case["timesteps"]))
    monkeypatch.setattr(torch, "randn_like", lambda _: tensor("noise"))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: tensor("skip_noise"))
    output = tensor("model_output").requires_grad_()
    loss_fn = adapter.get_ddpm_loss_fn(
        trainer.VPSDE(), True, skip_set=case["skip"], tau=case["tau"], estimator="fresh"
    )
    loss = loss_fn(Model(), tensor("x0"))
    (gradient,) = torch.autograd.grad(loss, output)
    expected = tensor("grad_model_output")
    # The SDE's β are float32.
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    assert loss.item() == pytest.approx(case["loss"] - released_constant(case), rel=1e-6)


def test_smld_pairs_a_label_with_label_plus_k(trainer):
    """Its σ descend: the earlier time, with less noise, has the larger label."""
    sde, batch = trainer.VESDE(), data()
    model = TinyModel(dropout=0.0)
    loss, _, _ = run(
        adapter.get_smld_loss_fn(sde, True, reduce_mean=True, skip_set=SKIP), model, batch
    )
    torch.manual_seed(3)
    labels, z = torch.randint(1000, (len(batch),)), torch.randn_like(batch)
    sigmas = torch.exp(torch.linspace(0, 1, 1000).double() * torch.log(torch.tensor(1 / 5000))) * 50
    sigma, earlier = sigmas[labels], sigmas[(labels + SKIP).clamp(max=999)]
    valid = labels + SKIP <= 999
    assert 0 < valid.sum() < len(labels)
    c2 = torch.where(valid, ((1 + sigma**2) / (1 + earlier**2) - 1).clamp(max=100), 0.0)
    x_t, seen, _ = model.seen[0]
    assert torch.equal(seen, labels)
    expected = eq_13(-sigma.view(-1, 1, 1, 1) * model(x_t, labels), z, c2)
    torch.testing.assert_close(loss, expected.mean().detach(), rtol=1e-4, atol=0)


def test_times_below_delta_have_the_plain_loss(trainer, monkeypatch):
    sde, model, batch = trainer.VPSDE(), TinyModel(dropout=0.0), data(4)

    def loss_at(time, **options):
        uniform = torch.tensor([(time - 1e-5) / (1 - 1e-5)] * 4)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, **__: uniform)
            return run(adapter.get_sde_loss_fn(sde, True, **options), model, batch)[0].item()

    for time, differs in ((0.0089, False), (0.0092, True)):
        plain = loss_at(time, skip_set=9, tau=1.0)
        assert (loss_at(time, skip_set=9) != plain) is differs


def test_int_skips_are_steps_of_n_and_floats_are_times(trainer):
    model, batch = TinyModel(dropout=0.0), data()
    sde = trainer.VPSDE(N=500)
    losses = [
        run(adapter.get_sde_loss_fn(sde, True, skip_set=skips), model, batch)[0]
        for skips in (50, 0.1, SkipSet(50), SkipSet.for_sampling_steps(10), [50])
    ]
    assert all(loss == losses[0] for loss in losses)
    assert run(adapter.get_sde_loss_fn(sde, True, skip_set=100), model, batch)[0] != losses[0]


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
        adapter.get_step_fn(trainer.VESDE(), True, **options)
    assert callable(adapter.get_step_fn(trainer.VESDE(), True, allow_ve=True, **options))


def test_wrong_arguments_are_named(trainer):
    vp = trainer.VPSDE()
    with pytest.raises(TypeError, match="sde must be a VPSDE or subVPSDE or VESDE, got a TinyM"):
        adapter.get_sde_loss_fn(TinyModel(), True)
    with pytest.raises(TypeError, match="vpsde must be a VPSDE, got a subVPSDE"):
        adapter.get_ddpm_loss_fn(trainer.subVPSDE(), True)
    with pytest.raises(TypeError, match="vesde must be a VESDE, got a VPSDE"):
        adapter.get_smld_loss_fn(vp, True)
    with pytest.raises(ValueError, match="optimize_fn must be callable for training, got None"):
        adapter.get_step_fn(vp, True)
    with pytest.raises(ValueError, match="likelihood_weighting must be False with continuous="):
        adapter.get_step_fn(vp, True, print, continuous=False, likelihood_weighting=True)
    with pytest.raises(ValueError, match="continuous must be True for a subVPSDE"):
        adapter.get_step_fn(trainer.subVPSDE(), True, print, continuous=False)
    with pytest.raises(ValueError, match="tau must lie in"):
        adapter.get_step_fn(vp, True, print, tau=2.0)
    with pytest.raises(ValueError, match=r"likelihood_weighting must be False with a weighting"):
        adapter.get_sde_loss_fn(vp, True, weighting="min_snr")
    with pytest.raises(ValueError, match="a skip must be below 1"):
        adapter.get_sde_loss_fn(vp, True, skip_set=1000)
    with pytest.raises(TypeError, match="discrete schedule takes int skips"):
        adapter.get_ddpm_loss_fn(vp, True, skip_set=0.1)


@pytest.mark.parametrize("estimator", ["expected", "fresh"])
def test_follows_its_tensors_to_another_device_without_reading_values(trainer, estimator):
    """The device "meta" holds no values: what would make a GPU wait, or stays behind, fails."""
    model, batch = TinyModel().to("meta"), data().to("meta")
    vp, ve = trainer.VPSDE(), trainer.VESDE()
    loss_fns = [
        adapter.get_sde_loss_fn(sde, True, True, continuous, allow_ve=True, estimator=estimator)
        for sde in (vp, ve, trainer.subVPSDE())
        for continuous in (True, False)
    ]
    loss_fns.append(adapter.get_ddpm_loss_fn(vp, True, estimator=estimator))
    loss_fns.append(adapter.get_smld_loss_fn(ve, True, estimator=estimator))
    for loss_fn in loss_fns:
        assert loss_fn(model, batch).device.type == "meta"


def test_subclasses_of_the_sdes_are_known(trainer):
    mine = type("MyOwn", (trainer.subVPSDE,), {})
    model, batch = TinyModel(dropout=0.0), data()
    one = run(adapter.get_sde_loss_fn(mine(), True), model, batch)[0]
    assert one == run(adapter.get_sde_loss_fn(trainer.subVPSDE(), True), model, batch)[0]


def test_nothing_is_imported_by_a_name_that_other_trainers_have(monkeypatch):
    for name in ("losses", "models", "utils", "sde_lib", "sampling", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    spec = importlib.util.spec_from_file_location("fresh_copy", score_sde.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = TinyModel()
    loss_fn = module.get_sde_loss_fn(score_sde_double.VPSDE(), True, skip_set=9)
    assert loss_fn(model, data()).isfinite()


def digits(batch_size=32):
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    generator = torch.Generator().manual_seed(0)
    while True:
        yield images[torch.randint(len(images), (batch_size,), generator=generator)]


@pytest.mark.parametrize(
    ("kind", "continuous"), [("vpsde", True), ("subvpsde", True), ("vpsde", False)]
)
def test_the_trainers_own_loop(trainer, tmp_path, kind, continuous, monkeypatch):
    # Its checkpoints hold the learning rate as a NumPy number, which torch >= 2.6 refuses to load
    # unless told to trust the file; the trainer's own torch.load is older than that.
    monkeypatch.setattr(torch, "load", functools.partial(torch.load, weights_only=False))
    config = make_config(kind, continuous=continuous)
    runs = {}
    for name in ("plain", "adapted"):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        runs[name] = trainer.train(config, tmp_path / name, digits(), swap=name == "adapted")
    losses, checkpoint = runs["adapted"]
    assert len(losses) == 21
    assert losses != runs["plain"][0]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    saved, plain = (torch.load(path) for path in (checkpoint, runs["plain"][1]))
    assert saved["model"].keys() == plain["model"].keys()
    assert saved.keys() == plain.keys()
    untouched = trainer.restore_checkpoint(
        str(checkpoint), make_state(trainer, config), torch.device("cpu")
    )
    assert untouched["step"] == 21
    assert all(
        torch.equal(value, saved["model"][key])
        for key, value in untouched["model"].state_dict().items()
    )
    sde = trainer.make_sde(config)
    step = trainer.get_step_fn(sde, True, trainer.optimization_manager(config), True, continuous)
    assert step(untouched, next(digits())).isfinite()
    sample = trainer.sample(config, sde, untouched["model"])
    assert sample.shape == (2, 1, 8, 8)
    assert sample.isfinite().all()


@pytest.mark.parametrize("kind", ["VPSDE", "subVPSDE", "VESDE"])
def test_a_subclass_with_a_path_of_its_own_is_refused(trainer, kind):
    class Other(getattr(trainer, kind)):
        def marginal_prob(self, x, t):
            mean, std = super().marginal_prob(x, t)
            return mean, std * (1 + t / 10)

    with pytest.raises(ValueError, match=r"sde must have the path of .*got a Other whose"):
        adapter.get_sde_loss_fn(Other(), True, skip_set=9, allow_ve=True)

    class Named(getattr(trainer, kind)):
        """Another name for the same path."""

    adapter.get_sde_loss_fn(
        Named(beta_max=10.0) if kind != "VESDE" else Named(), True, skip_set=9, allow_ve=True
    )
