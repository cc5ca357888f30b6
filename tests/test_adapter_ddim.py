"""What the ddim adapter alone has, on a double of the trainer and on its own code."""

import inspect

import pytest
import torch

from s2dm_loss import NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.adapters.ddim import ddim_loss, ddim_timesteps
from s2dm_loss.coefficients import coefficients
from tests.doubles import ddim_double
from tests.helpers.checkouts import DDIM_CONFIG, plain_and_swapped
from tests.helpers.small import Network, digits, refuses
from tests.helpers.trainers import DDIM, ddim_betas
from tests.strategies import pickled


@pytest.fixture(params=DDIM, ids=["double", "real"])
def trainer(request):
    return request.param[1]()


def betas(schedule="linear", steps=1000):
    return torch.from_numpy(ddim_betas(ddim_double, schedule, steps)).float()


def batch(steps=1000):
    x0, e = torch.randn(2, 6, 2, 5, 5, generator=torch.Generator().manual_seed(5))
    return x0, torch.tensor([steps - 1, 3, steps // 2, 0, 9, 8]), e


def test_arguments_are_the_trainers(trainer):
    ours = inspect.signature(ddim_loss(9)).parameters.values()
    theirs = inspect.signature(trainer.noise_estimation_loss).parameters.values()
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_the_tables_follow_the_betas_and_are_made_once_for_them(monkeypatch):
    """Making them reads β on the host, which would make every step wait for the device."""
    made, init = [], SkipStepLoss.__init__
    monkeypatch.setattr(SkipStepLoss, "__init__", lambda *a, **k: made.append(1) or init(*a, **k))
    model, kept = Network(dropout=0.0), ddim_loss(9)
    for schedule, steps in (("linear", 50), ("quad", 50), ("linear", 1000), ("linear", 50)):
        b, arguments = betas(schedule, steps), batch(50)
        expected = ddim_loss(9)(model, *arguments, b)
        made.clear()
        assert all(torch.equal(kept(model, *arguments, b), expected) for _ in range(3))
        assert len(made) == 1


def test_c_is_exact_though_beta_is_float32():
    """A float32 ᾱ, which the trainer makes on the way, would be off by more than 1e-4 at k = 1."""
    t, x = torch.arange(1, 1000), torch.ones(999, 1, 2, 1, dtype=torch.float64)
    # At τ = 0 the loss of an output of ones is c², times the weighting; summed over two values.
    exact = coefficients(NoiseSchedule.linear(1000), 1, weighting="p2").c2[1:]
    for weighting in (None, "p2"):
        loss_fn = ddim_loss(1, tau=0.0, weighting=weighting)
        found = loss_fn(lambda *_: x, x, t, x, betas(), keepdim=True)
        weight = 1 if weighting is None else 1 - NoiseSchedule.linear(1000).alphas_cumprod[1:]
        torch.testing.assert_close(found, 2 * weight * exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("skip_type", ["uniform", "quad"])
@pytest.mark.parametrize("steps", [10, 30, 50, 100])
def test_sampled_timesteps_are_those_the_sampler_visits(trainer, skip_type, steps):
    model = Network(1)
    with torch.no_grad():
        trainer.sample_image(DDIM_CONFIG, model, torch.randn(1, 1, 8, 8), skip_type, steps)
    visited = [int(t) for _, t, _ in model.seen]
    assert ddim_timesteps(1000, steps, skip_type) == visited[::-1]
    assert (len(set(visited)) < len(visited)) == (skip_type == "quad" and steps >= 30)


def test_wrong_arguments_are_named():
    loss_fn = ddim_loss(9)
    for message, call, *arguments in (
        ("a skip must be below 1000", ddim_loss(1000), Network(), *batch(), betas()),
        (r"b must lie in \(0, 1\], got -", loss_fn, Network(), *batch(), -betas()),
        ("the shape of target", loss_fn, lambda x, _: x[:, :1], *batch(), betas()),
        ("skip_type must be one of 'uniform', 'quad'", ddim_timesteps, 1000, 10, "cubic"),
        ("num_sampling_steps must be at most num_timesteps, 10", ddim_timesteps, 10, 11),
    ):
        refuses(ValueError, message, call, *arguments)
    refuses(ValueError, "'sum', 'mean', got 'none'", ddim_loss, 9, data_reduction="none")


def test_says_what_it_is_and_pickles():
    loss_fn = ddim_loss(SkipSet.for_sampling_steps(50), data_reduction="mean", tau=0.9)
    text = "ddim_loss(SkipSet.for_sampling_steps(50), data_reduction='mean', tau=0.9)"
    assert repr(loss_fn) == text
    again = pickled(loss_fn)
    model = Network(dropout=0.0)
    assert torch.equal(again(model, *batch(), betas()), loss_fn(model, *batch(), betas()))


def test_the_trainers_own_loop(tmp_path):
    """It learns, and its checkpoint is one of the trainer's."""
    trainer, images = DDIM[1][1](), (digits(20 * 32) + 1) / 2
    plain, losses = plain_and_swapped(trainer.train, DDIM_CONFIG, tmp_path, lambda: images)
    assert len(losses) == 20
    assert losses != plain
    assert losses[0] == pytest.approx(plain[0], rel=0.05)  # the same draws, the same scale
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    plain, saved = map(torch.load, sorted(tmp_path.glob("*/ckpt.pth")))
    assert len(saved) == len(plain) == 5
    assert all(saved[part].keys() == plain[part].keys() for part in (0, 4))
