"""What else the recipe of docs/adapters/more_trainers.md for k-diffusion has to do."""

import pytest
import torch

from tests.helpers.more_trainers import K_DIFFUSION, k_diffusions
from tests.helpers.small import Network

SIGMA = torch.tensor([0.011, 0.3, 2.0, 11.0, 80.0], dtype=torch.float64)


@pytest.fixture(params=K_DIFFUSION, ids=["double", "real"])
def recipe(request):
    """k-diffusion, and the namespace of the page's block on it."""
    package = request.param[1]()
    return package, k_diffusions(package)


class Scaled(Network):
    def forward(self, x, sigma, gain=1.0):
        return gain * super().forward(x, sigma)


def test_it_passes_on_what_the_model_is_given(recipe):
    package, names = recipe
    denoiser = package.Denoiser(Scaled(dropout=0.0, dtype=torch.float64), sigma_data=0.5)
    x0, noise = torch.randn(2, 5, 2, 6, 6, dtype=torch.float64).unbind(0)
    names["criterion"] = names["make_criterion"](tau=1.0)
    ours = names["skip_loss"](denoiser, x0, noise, SIGMA, gain=1.5)
    theirs = denoiser.loss(x0, noise, SIGMA, gain=1.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_it_refuses_the_losses_that_are_not_this_one(recipe):
    package, names = recipe
    other = type("SimpleLossDenoiser", (package.Denoiser,), {})
    for denoiser in (package.Denoiser(Network(), scales=2), other(Network())):
        with pytest.raises(ValueError, match=r"must be a K\.Denoiser with scales=1"):
            names["skip_loss"](denoiser, torch.ones(1), torch.ones(1), torch.ones(1))
