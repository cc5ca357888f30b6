"""The adapter for NVlabs/edm and edm2, on losses of their form and on the trainers' own.

`S2DM_EDM_ROOT` and `S2DM_EDM2_ROOT` name checkouts.
"""

import copy
import importlib
import pickle

import pytest
import torch
from torch import nn

from s2dm_loss.adapters.edm import skip_step
from s2dm_loss.testing import check_swap
from tests.doubles.edm_double import EDM2Loss, EDMLoss
from tests.helpers.checkouts import checkout_on_path
from tests.helpers.upstream import root_of, stubs

DOUBLES = {"double EDMLoss": EDMLoss, "double EDM2Loss": EDM2Loss}
REAL = {
    "EDMLoss": ("S2DM_EDM_ROOT", "training.loss"),
    "VPLoss": ("S2DM_EDM_ROOT", "training.loss"),
    "VELoss": ("S2DM_EDM_ROOT", "training.loss"),
    "EDM2Loss": ("S2DM_EDM2_ROOT", "training.training_loop"),
}


@pytest.fixture(params=[*DOUBLES, *REAL])
def kind(request):
    """The class of a loss. The trainers' own pickle themselves, with what they are made of."""
    if request.param in DOUBLES:
        yield DOUBLES[request.param]
        return
    variable, module = REAL[request.param]
    with checkout_on_path(root_of(variable), stubs("psutil", "requests")):
        yield getattr(importlib.import_module(module), request.param)


def as_net(model, kind, log_u=None):
    """The model behind the call of each trainer's denoiser."""

    def net(x_t, sigma, labels=None, augment_labels=None, return_logvar=False):
        output = model(x_t, sigma)
        if not return_logvar:
            return output
        head = torch.linspace(-1, 1, len(x_t)) if log_u is None else log_u
        return output, head.reshape(-1, 1, 1, 1)

    return net


def loss_of(kind, model, images, tau=None, skip_set=1 / 17, log_u=None, **options):
    plain = kind() if "EDM" not in kind.__name__ else kind(-1.2, 2.0)  # reaches both ends
    loss_fn = plain if tau is None else skip_step(plain, skip_set, tau=tau, **options)
    return loss_fn(net=as_net(model, kind, log_u), images=images, labels=None)


def test_the_swap(kind):
    """Bit for bit at τ = 1, and at 0.99 near the plain gradient at every σ."""
    images = torch.randn(64, 3, 8, 8) / 2
    report = check_swap(
        lambda model: loss_of(kind, model, images),
        lambda model, tau: loss_of(kind, model, images, tau),
        rtol=0.0,
    )
    assert report.calls == 1
    assert report.times.max() / report.times.min() > 100


@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
def test_against_eq_13_by_hand(kind, estimator):
    """In float64, on the error that the trainer weighs: both terms, less what no gradient sees."""
    images = torch.randn(32, 3, 8, 8, dtype=torch.float64) / 2
    torch.manual_seed(1)
    model, seen = nn.Conv2d(3, 3, 1).double(), []

    def remember(x_t, sigma):
        output = model(x_t / (1 + sigma))
        seen.append((x_t, sigma, output))
        return output

    torch.manual_seed(2)
    plain = loss_of(kind, remember, images)
    zeta = torch.randn_like(images) if estimator == "fresh" else None  # drawn last
    torch.manual_seed(2)
    ours = loss_of(kind, remember, images, 0.9, estimator=estimator)
    x_t, sigma, output = seen[0]
    log_u = torch.linspace(-1, 1, 32).reshape(-1, 1, 1, 1) if "EDM2" in kind.__name__ else 0.0
    weight = ((plain - log_u) / (output - images) ** 2).mean((1, 2, 3))  # of (D - x_0)²

    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    ramp = ((sigma.double() ** (1 / 7) - low) / (high - low)).clamp(0, 1).flatten()
    s_t, s_s = ((low + t * (high - low)) ** 7 for t in (ramp, (ramp - 1 / 17).clamp(min=0)))
    c2 = ((1 + s_t**2) / (1 + s_s**2) - 1).clamp(max=100).minimum(100 / s_t**2)
    c2 = torch.where(ramp >= 1 / 17, c2, 0.0).reshape(-1, 1, 1, 1)
    c = c2.sqrt().minimum(10 * (s_t**-2).clamp(max=1).reshape(-1, 1, 1, 1))
    tau = torch.where(ramp >= 1 / 17, 0.9, 1.0).reshape(-1, 1, 1, 1)
    s_t = s_t.reshape(-1, 1, 1, 1)
    eps_hat, noise = (x_t - output) / s_t, (x_t - images) / s_t
    target = {"expected": 0.0, "shared": noise, "fresh": zeta}[estimator]

    def eq_13(eps_hat):
        skip = c2 * eps_hat.square() - 2 * c * eps_hat * target
        return (tau * (eps_hat - noise).square() + (1 - tau) * skip).mean((1, 2, 3))

    best = (tau * noise + (1 - tau) * c * target) / (tau + (1 - tau) * c2)
    expected = weight * s_t.flatten() ** 2 * (eq_13(eps_hat) - eq_13(best))
    found = (ours - log_u).mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_log_variance_head_learns_from_the_changed_error():
    """Its minimum is at log u = log of the weighed error, as without the adapter."""
    images = torch.randn(8, 3, 8, 8) / 2
    log_u = torch.zeros(8, requires_grad=True)

    def gradient(tau):
        torch.manual_seed(3)
        loss = loss_of(EDM2Loss, lambda x_t, _: 0.5 * x_t, images, tau, log_u=log_u)
        (grad,) = torch.autograd.grad(loss.mean((1, 2, 3)).sum(), log_u)
        return grad, loss.mean((1, 2, 3))

    grad, loss = gradient(0.9)
    # d/dx (e exp(-x) + x) at x = 0 is 1 - e, and the loss there is e.
    torch.testing.assert_close(grad, 1 - loss.detach())


def test_a_snapshot_holds_the_trainers_own_loss(kind):
    plain = kind()
    adapted = skip_step(plain, 1 / 17)
    loaded = pickle.loads(pickle.dumps(adapted))  # noqa: S301
    assert type(loaded).__name__ == type(plain).__name__
    assert adapted.state_dict() == vars(plain)
    before = dict(vars(plain))
    adapted.load_state_dict({**vars(plain), "sigma_data": 0.7})
    assert adapted.sigma_data == 0.7
    assert vars(plain) == before


def test_a_copy_is_the_same_loss(kind):
    adapted = skip_step(kind(), 1 / 17)
    for copied in (copy.copy(adapted), copy.deepcopy(adapted)):
        assert repr(copied) == repr(adapted)
        assert isinstance(copied, kind)
    copied.std_data = 0
    assert not hasattr(adapted, "std_data")


def test_says_what_it_is():
    text = repr(skip_step(EDMLoss(), 1 / 17))
    assert text.startswith("SkipStepEDMLoss(SkipStepLoss(EDM(0.002, 80.0, rho=7.0)")


def test_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="must have its plain loss, got a SkipStepEDMLoss"):
        skip_step(skip_step(EDMLoss(), 1 / 17), 1 / 17)
    for wrong in ({}, lambda net, images: images):
        with pytest.raises(TypeError, match=r"an object with a __call__, .* EDMLoss\(\), got"):
            skip_step(wrong, 1 / 17)
    with pytest.raises(ValueError, match=r"tau must be above 0 .* got 0"):
        skip_step(EDMLoss(), 1 / 17, tau=0.0)
    with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max .* got 3, 2 and 7\.0"):
        skip_step(EDMLoss(), 1 / 17, sigma_min=3, sigma_max=2)
    with pytest.raises((TypeError, ValueError), match="skip"):
        skip_step(EDMLoss(), 9)


def test_half_precision_outputs_are_lifted():
    images = torch.randn(8, 3, 8, 8) / 2
    loss = loss_of(EDMLoss, lambda x_t, _: x_t.half(), images, 0.99)
    assert loss.dtype == torch.float32


def test_a_loss_that_is_a_mean_over_the_batch_is_refused():
    class Mean(EDMLoss):
        def __call__(self, net, images, labels=None, augment_pipe=None):
            return super().__call__(net, images, labels, augment_pipe).mean()

    loss_fn = skip_step(Mean(), 1 / 17, tau=1.0)
    with pytest.raises(ValueError, match=r"squared error of each sample, of shape \[4, ...\]"):
        loss_fn(net=as_net(lambda x_t, sigma: x_t, Mean), images=torch.randn(4, 3, 8, 8))
