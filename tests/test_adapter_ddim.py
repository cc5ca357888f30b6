"""The ddim adapter on a double of the trainer, or on a checkout in S2DM_DDIM_ROOT."""

import inspect
import itertools
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from s2dm_loss import NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.adapters.ddim import ddim_loss, ddim_timesteps
from s2dm_loss.coefficients import coefficients
from s2dm_loss.testing import check_swap
from tests.doubles import ddim_double
from tests.helpers.ddim_checkout import load_ddim
from tests.helpers.released_loss import CASES, released_constant

ROOT = os.environ.get("S2DM_DDIM_ROOT")
SCHEDULES = ("linear", "quad", "const", "jsd", "sigmoid")
ESTIMATORS = ("expected", "shared", "fresh")


@pytest.fixture(scope="module")
def trainer():
    return ddim_double if ROOT is None else load_ddim(Path(ROOT))


class TinyModel(nn.Module):
    """A small network that depends on t, draws random numbers, and keeps its calls."""

    def __init__(self, dropout=0.1):
        super().__init__()
        torch.manual_seed(7)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.dropout = dropout
        self.seen = []

    def forward(self, x, t):
        self.seen.append((x.detach(), t))
        return self.conv(nn.functional.dropout(x, self.dropout)) * (1 + t.view(-1, 1, 1, 1) / 1000)


def make_betas(trainer, schedule="linear", steps=1000):
    betas = trainer.get_beta_schedule(
        schedule, beta_start=1e-4, beta_end=0.02, num_diffusion_timesteps=steps
    )
    return torch.from_numpy(betas).float()


def make_batch(steps=1000):
    generator = torch.Generator().manual_seed(5)
    x0, e = torch.randn(2, 6, 2, 5, 5, generator=generator)
    t = torch.tensor([steps - 1, 3, steps // 2, 0, 9, 8])  # both sides of the skip, interleaved
    return x0, t, e


def run(loss_fn, model, *arguments, seed=3):
    """The loss, the gradients of its sum, and the state of the random stream after it."""
    torch.manual_seed(seed)
    loss = loss_fn(model, *arguments)
    gradients = torch.autograd.grad(loss.sum(), list(model.parameters()))
    return loss.detach(), gradients, torch.get_rng_state()


@pytest.mark.parametrize("estimator", ["expected", "shared"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tau_one_is_the_trainers_loss_over_the_full_grid(trainer, schedule, estimator, normalize):
    for steps, reduction, keepdim in itertools.product((1000, 50), ("sum", "mean"), (True, False)):
        b = make_betas(trainer, schedule, steps)
        x0, t, e = make_batch(steps)
        model = TinyModel()
        ours = ddim_loss(
            9, tau=1.0, data_reduction=reduction, estimator=estimator, normalize=normalize
        )
        loss, gradients, state = run(ours, model, x0, t, e, b, keepdim)
        expected, references, expected_state = run(
            trainer.noise_estimation_loss, model, x0, t, e, b, keepdim
        )
        scale = 1 if reduction == "sum" else 1 / x0[0].numel()
        torch.testing.assert_close(loss, expected * scale, rtol=2e-6, atol=0)
        for gradient, reference in zip(gradients, references, strict=True):
            assert (gradient - scale * reference).norm() <= 2e-6 * scale * reference.norm()
        assert torch.equal(state, expected_state)
        (x_ours, t_ours), (x_theirs, t_theirs) = model.seen
        assert torch.equal(x_ours, x_theirs)
        assert torch.equal(t_ours, t_theirs)
        assert t_ours.dtype == t_theirs.dtype == torch.float32


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_swap(trainer, schedule):
    """Gradients at τ = 0.99 are near the plain ones, also at the end of "jsd", where ᾱ is 0."""
    x0, t, e = make_batch()
    b = make_betas(trainer, schedule)
    report = check_swap(
        lambda model: trainer.noise_estimation_loss(model, x0, t, e, b),
        lambda model, tau: ddim_loss(9, tau=tau)(model, x0, t, e, b),
        rtol=2e-6,
    )
    assert report.calls == 1
    assert report.times.tolist() == t.tolist()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("schedule", ["linear", "quad", "sigmoid"])
def test_loss_and_gradient_are_the_cores(trainer, schedule, estimator):
    b = make_betas(trainer, schedule)
    x0, t, e = make_batch()
    torch.manual_seed(3)
    zeta = {"skip_noise": torch.randn_like(e)} if estimator == "fresh" else {}
    core = SkipStepLoss(NoiseSchedule.from_betas(b), 9, estimator=estimator, reduction="none")
    for reduction, keepdim in itertools.product(("sum", "mean"), (True, False)):
        model = TinyModel(dropout=0.0)
        ours = ddim_loss(9, data_reduction=reduction, estimator=estimator)
        loss, gradients, _ = run(ours, model, x0, t, e, b, keepdim)
        expected = core.from_output(model(*model.seen[0]), e, t, **zeta)
        expected = expected * (50 if reduction == "sum" else 1)
        expected = expected if keepdim else expected.mean()
        assert torch.equal(loss, expected.detach())
        torch.testing.assert_close(
            gradients, torch.autograd.grad(expected.sum(), list(model.parameters()))
        )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"k{c['skip']}-{c['dtype']}")
def test_replays_the_released_loss(trainer, case, monkeypatch):
    dtype = getattr(torch, case["dtype"])

    def tensor(name):
        return torch.tensor(case[name], dtype=dtype).reshape(case["shape"])

    seen = []

    def model(x_t, t):
        seen.extend((x_t, t))
        return output

    # The fresh noise is drawn inside the loss, so the case's comes in by way of the drawing.
    monkeypatch.setattr(torch, "randn", lambda *_, **__: tensor("skip_noise"))
    output = tensor("model_output").requires_grad_()
    loss_fn = ddim_loss(case["skip"], tau=case["tau"], estimator="fresh", data_reduction="mean")
    t = torch.tensor(case["timesteps"])
    loss = loss_fn(model, tensor("x0"), t, tensor("noise"), make_betas(trainer))
    (gradient,) = torch.autograd.grad(loss, output)
    expected = tensor("grad_model_output")
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    assert loss.item() == pytest.approx(case["loss"] - released_constant(case), rel=1e-6)
    torch.testing.assert_close(seen[0], tensor("x_t"), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[1], t.float())


def test_arguments_are_the_trainers(trainer):
    ours = inspect.signature(ddim_loss(9)).parameters.values()
    theirs = inspect.signature(trainer.noise_estimation_loss).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_sums_like_the_trainer_unless_told_to_average(trainer):
    """At a gradient clipping of 1 the two train very differently."""
    b = make_betas(trainer)
    x0, t, e = make_batch()
    model = TinyModel(dropout=0.0)
    summed = ddim_loss(9)(model, x0, t, e, b)
    averaged = ddim_loss(9, data_reduction="mean")(model, x0, t, e, b)
    torch.testing.assert_close(summed, 50 * averaged)


def test_the_table_follows_the_betas_it_is_given(trainer):
    x0, t, e = make_batch(50)
    model = TinyModel(dropout=0.0)
    kept = ddim_loss(9)
    for schedule, steps in (("linear", 50), ("quad", 50), ("linear", 1000), ("linear", 50)):
        b = make_betas(trainer, schedule, steps)
        assert torch.equal(kept(model, x0, t, e, b), ddim_loss(9)(model, x0, t, e, b))


def test_tables_are_made_once_for_the_trainers_betas(trainer, monkeypatch):
    """Making them reads β on the host, which would make every step wait for the device."""
    made = []
    original = SkipStepLoss.__init__
    monkeypatch.setattr(
        SkipStepLoss, "__init__", lambda *a, **k: (made.append(1), original(*a, **k))[1]
    )
    loss_fn = ddim_loss(9)
    b = make_betas(trainer)
    x0, t, e = make_batch()
    made.clear()
    for _ in range(3):
        loss_fn(TinyModel(), x0, t, e, b)
    assert len(made) == 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_follows_its_tensors_to_another_device_without_reading_values(trainer, estimator):
    """The device "meta" holds no values: what would make a GPU wait, or stays behind, fails."""
    loss_fn = ddim_loss(9, estimator=estimator)
    b = make_betas(trainer)
    arguments = make_batch()
    loss_fn(TinyModel(), *arguments, b)  # β has values for the first call, which makes the tables
    loss_fn._betas = b.to("meta")
    moved = [tensor.to("meta") for tensor in arguments]
    assert loss_fn(TinyModel().to("meta"), *moved, loss_fn._betas).device.type == "meta"


def test_c_is_exact_though_beta_is_float32(trainer):
    """A float32 ᾱ, which the trainer makes on the way, would be off by more than 1e-4 at k = 1."""
    b = make_betas(trainer)
    exact = coefficients(NoiseSchedule.linear(1000), 1).c[1:]
    a = (1 - b).cumprod(0).double()
    assert ((a[:-1] / a[1:] - 1).sqrt() / exact - 1).abs().max() > 1e-4
    loss_fn = ddim_loss(1)
    x0, t, e = make_batch()
    loss_fn(TinyModel(), x0, t, e, b)
    used = coefficients(loss_fn._criterion.schedule, 1).c[1:]
    assert (used / exact - 1).abs().max() < 1e-6


def test_a_schedule_that_ends_without_signal_stays_finite(trainer):
    """The trainer's "jsd" ends with β = 1: c would be infinite there."""
    b = make_betas(trainer, "jsd")
    assert b[-1] == 1
    x0, t, e = make_batch()
    model = TinyModel(dropout=0.0)
    for estimator in ESTIMATORS:
        loss, gradients, _ = run(ddim_loss(9, estimator=estimator), model, x0, t, e, b, True)
        assert loss.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("skip_type", ["uniform", "quad"])
@pytest.mark.parametrize("steps", [10, 30, 50, 100])
def test_sampled_timesteps_are_those_the_sampler_visits(trainer, skip_type, steps):
    visited = []

    def model(x, t):
        visited.append(int(t[0]))
        return torch.zeros_like(x)

    trainer.sample_image(make_config(), model, torch.randn(1, 1, 8, 8), skip_type, steps)
    assert ddim_timesteps(1000, steps, skip_type) == visited[::-1]
    assert (len(set(visited)) < len(visited)) == (skip_type == "quad" and steps >= 30)


@pytest.mark.parametrize("steps", [10, 30, 50, 100])
def test_skips_follow_the_samplers_jumps(steps):
    schedule = NoiseSchedule.linear(1000)
    t = schedule.timesteps
    for skip_type in ("uniform", "quad"):
        sampled = ddim_timesteps(1000, steps, skip_type)
        earlier, valid = SkipSet.from_timesteps(sampled).earlier(t, schedule)
        for i, j in zip(sampled[1:], sampled, strict=False):
            if i != j:
                assert earlier[0, i] == j
        assert valid[0].tolist() == [step > 0 for step in range(1000)]
    strides, _ = SkipSet.for_sampling_steps(steps).earlier(t, schedule)
    sampled = ddim_timesteps(1000, steps)
    assert strides[0, sampled[1:]].tolist() == sampled[:-1]


def test_wrong_arguments_are_named(trainer):
    b = make_betas(trainer)
    x0, t, e = make_batch()
    model = TinyModel()
    with pytest.raises(ValueError, match="data_reduction must be one of 'sum', 'mean', got 'none'"):
        ddim_loss(9, data_reduction="none")
    with pytest.raises(ValueError, match="tau must lie in"):
        ddim_loss(9, tau=1.5)
    with pytest.raises(ValueError, match="estimator must be one of"):
        ddim_loss(9, estimator="exact")
    with pytest.raises(TypeError, match="skip_set must be"):
        ddim_loss("9")
    with pytest.raises(ValueError, match="a skip must be below 1000"):
        ddim_loss(1000)(model, x0, t, e, b)
    with pytest.raises(ValueError, match=r"b must lie in \(0, 1\], got -1.0 at index 0"):
        ddim_loss(9)(model, x0, t, e, -torch.ones(1000))
    with pytest.raises(ValueError, match="output must have the shape of target"):
        ddim_loss(9)(lambda x, _: x[:, :1], x0, t, e, b)
    with pytest.raises(ValueError, match="skip_type must be one of 'uniform', 'quad'"):
        ddim_timesteps(1000, 10, "cubic")
    with pytest.raises(ValueError, match="num_sampling_steps must be at most num_timesteps, 10"):
        ddim_timesteps(10, 11)


def test_says_what_it_is_and_pickles(trainer):
    loss_fn = ddim_loss(SkipSet.for_sampling_steps(50), data_reduction="mean", tau=0.9)
    assert repr(loss_fn) == (
        "ddim_loss(SkipSet.for_sampling_steps(50), data_reduction='mean', tau=0.9)"
    )
    b = make_betas(trainer)
    x0, t, e = make_batch()
    model = TinyModel(dropout=0.0)
    again = pickle.loads(pickle.dumps(loss_fn))  # noqa: S301 - our own bytes
    assert torch.equal(again(model, x0, t, e, b), loss_fn(model, x0, t, e, b))


def make_config():
    """The fields of the trainer's configuration that its own code reads."""
    return SimpleNamespace(
        data=SimpleNamespace(image_size=8, channels=1, num_workers=0),
        model=SimpleNamespace(
            type="simple",
            in_channels=1,
            out_ch=1,
            ch=32,
            ch_mult=[1],
            num_res_blocks=1,
            attn_resolutions=[],
            dropout=0.0,
            var_type="fixedlarge",
            ema=True,
            ema_rate=0.5,
            resamp_with_conv=True,
        ),
        diffusion=SimpleNamespace(
            beta_schedule="linear", beta_start=1e-4, beta_end=0.02, num_diffusion_timesteps=1000
        ),
        training=SimpleNamespace(batch_size=32, n_epochs=1, snapshot_freq=20),
        optim=SimpleNamespace(
            optimizer="Adam",
            lr=3e-3,
            weight_decay=0.0,
            beta1=0.9,
            amsgrad=False,
            eps=1e-8,
            grad_clip=1.0,
        ),
        sampling=SimpleNamespace(batch_size=8),
        device=torch.device("cpu"),
    )


def test_the_trainers_own_loop(trainer, tmp_path):
    digits = torch.tensor(load_digits().images[: 20 * 32], dtype=torch.float32)[:, None] / 16
    config = make_config()
    runs = {}
    for name in ("plain", "adapted"):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        runs[name] = trainer.train(config, tmp_path / name, digits, swap=name == "adapted")
    losses = runs["adapted"]
    assert len(losses) == 20
    assert losses != runs["plain"]
    assert losses[0] == pytest.approx(runs["plain"][0], rel=0.05)  # the same draws, the same scale
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

    saved, plain = (torch.load(tmp_path / name / "ckpt.pth") for name in ("adapted", "plain"))
    assert len(saved) == len(plain) == 5
    assert saved[0].keys() == plain[0].keys()
    assert saved[4].keys() == plain[4].keys()
    sample = trainer.sample(config, tmp_path / "adapted")
    assert sample.shape == (8, 1, 8, 8)
    assert sample.isfinite().all()
