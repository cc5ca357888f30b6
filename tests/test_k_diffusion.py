"""The recipe of docs/adapters/more_trainers.md for k-diffusion, against the trainer it is for.

`S2DM_K_DIFFUSION_ROOT` names a checkout or an unpacked package (`.ci/trainers.txt`), whose
`layers.py` is run with stubs of what its loss does not use. A double of it is run always.
"""

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from s2dm_loss.testing import check_swap
from tests.helpers.packages import k_diffusion_layers
from tests.test_docs_blocks import blocks_of

PAGE = Path(__file__).parents[1] / "docs" / "adapters" / "more_trainers.md"


@pytest.fixture(params=["double", "real"])
def recipe(request, monkeypatch):
    """k-diffusion, and the namespace of the page's block on it."""
    if request.param == "double":
        package = importlib.import_module("tests.doubles.k_diffusion_double")
    else:
        package = ModuleType("k_diffusion")
        package.layers = k_diffusion_layers()
        package.Denoiser = package.layers.Denoiser
    monkeypatch.setitem(sys.modules, "k_diffusion", package)
    torch.manual_seed(0)
    namespace = {}
    for line, requires, code in blocks_of(PAGE):
        if requires == "k_diffusion":
            exec(compile("\n" * line + code, str(PAGE), "exec"), namespace)  # noqa: S102
    return package, namespace


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.calls = 0

    def forward(self, x, sigma, gain=1.0):
        self.calls += 1
        return gain * self.conv(x) / (1 + sigma.reshape(-1, 1, 1, 1))


SIGMA = torch.tensor([0.011, 0.3, 2.0, 11.0, 80.0])


@pytest.mark.parametrize("weighting", ["karras", "snr", "soft-min-snr"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_k_diffusion_the_swap(recipe, monkeypatch, weighting, sigma_data):
    """At τ = 1 the loss of `Denoiser`, and below it gradients near its own at every σ."""
    package, namespace = recipe
    x0, noise = torch.randn(2, 5, 2, 6, 6, dtype=torch.float64).unbind(0)

    def denoiser(inner):
        return package.Denoiser(inner, sigma_data=sigma_data, weighting=weighting)

    def swapped(inner, tau):
        monkeypatch.setitem(namespace, "criterion", namespace["make_criterion"](tau=tau))
        return namespace["skip_loss"](denoiser(inner), x0, noise, SIGMA.double())

    report = check_swap(
        lambda inner: denoiser(inner).loss(x0, noise, SIGMA.double()), swapped, rtol=1e-9
    )
    assert report.ratio.max() < 1.02
    assert report.calls == 1


def test_k_diffusion_passes_on_what_the_model_is_given(recipe):
    package, namespace = recipe
    inner = Inner().double()
    denoiser = package.Denoiser(inner, sigma_data=0.5)
    x0, noise = torch.randn(2, 5, 2, 6, 6, dtype=torch.float64).unbind(0)
    namespace["criterion"] = namespace["make_criterion"](tau=1.0)
    ours = namespace["skip_loss"](denoiser, x0, noise, SIGMA.double(), gain=1.5)
    theirs = denoiser.loss(x0, noise, SIGMA.double(), gain=1.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    assert inner.calls == 2


def test_k_diffusion_skip_term(recipe):
    """τ < 1, against Eq. 13 by hand: c² on σ and on the σ of one sampler step before it.

    The loss leaves out the constant: what Eq. 13 is at its least, as a quadratic in ε̂.
    """
    package, namespace = recipe
    denoiser = package.Denoiser(Inner().double(), sigma_data=0.5)
    x0, noise = torch.randn(2, 5, 2, 6, 6, dtype=torch.float64).unbind(0)
    sigma = SIGMA.double()
    ours = namespace["skip_loss"](denoiser, x0, noise, sigma)
    for i, s in enumerate(sigma.tolist()):
        x_t = x0[i] + s * noise[i]
        eps_hat = (x_t - denoiser(x_t[None], sigma[i : i + 1])[0]) / s
        simple, low, high = (eps_hat - noise[i]).square().mean(), 0.01 ** (1 / 7), 80 ** (1 / 7)
        ramp = (s ** (1 / 7) - low) / (high - low)
        loss = simple
        if ramp >= 1 / 20:
            earlier = (low + (ramp - 1 / 20) * (high - low)) ** 7
            c2 = (1 + s**2) / (1 + earlier**2) - 1
            c2 = min(c2, 100, 100 / s**2)  # no more than D can express: ε̂ - ε is -(D - x_0) / σ
            loss = 0.99 * simple + 0.01 * (c2 * eps_hat.square().mean() + 1)
            factor = 0.99 / (0.99 + 0.01 * c2)
            least = 0.99 * (1 - factor) * noise[i].square().mean() + 0.01
            loss = loss - least
        # D - x_0 is -σ times the error of ε̂, and c_out times that of the network's output.
        c_out = s * 0.5 / math.sqrt(s**2 + 0.25)
        torch.testing.assert_close(ours[i], (s / c_out) ** 2 * loss, rtol=1e-6, atol=0)


def test_k_diffusion_refuses_the_losses_that_are_not_this_one(recipe):
    package, namespace = recipe
    frequencies = package.Denoiser(Inner(), scales=2)
    other = type("SimpleLossDenoiser", (package.Denoiser,), {})(Inner())
    for denoiser in (frequencies, other):
        with pytest.raises(ValueError, match=r"must be a K\.Denoiser with scales=1"):
            namespace["skip_loss"](denoiser, torch.ones(1), torch.ones(1), torch.ones(1))


def test_the_double_is_the_trainer():
    from tests.doubles import k_diffusion_double as double

    real = k_diffusion_layers()
    inner = Inner().double()
    x0, noise = torch.randn(2, 5, 2, 6, 6, dtype=torch.float64).unbind(0)
    for weighting in ("karras", "snr", "soft-min-snr"):
        ours, theirs = (
            kind(inner, sigma_data=0.7, weighting=weighting)
            for kind in (double.Denoiser, real.Denoiser)
        )
        arguments = (x0, noise, SIGMA.double())
        torch.testing.assert_close(ours.loss(*arguments), theirs.loss(*arguments))
        torch.testing.assert_close(ours(x0, SIGMA.double()), theirs(x0, SIGMA.double()))
