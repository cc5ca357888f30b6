"""The recipes of docs/adapters/write_your_own.md, against the trainers they are for.

Both packages need torchvision, which has no CPU build for every torch: the tests run on the real
ones where they import, and always on doubles of what the page uses.
"""

import importlib
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from s2dm_loss import NoiseSchedule, SkipStepLoss
from tests.test_docs_blocks import blocks_of

PAGE = Path(__file__).parents[1] / "docs" / "adapters" / "write_your_own.md"


@pytest.fixture(params=["double", "real"])
def recipes(request, monkeypatch):
    """A function from a package's name to (the package, the namespace of its blocks)."""

    def run(package):
        if request.param == "double":
            module = importlib.import_module(f"tests.doubles.{package}_double")
            monkeypatch.setitem(sys.modules, package, module)
        else:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # its dependencies' own
                    module = importlib.import_module(package)
            except Exception as error:  # torchvision for another torch raises RuntimeError
                pytest.skip(f"{package} does not import here: {error!r}")
        torch.manual_seed(0)
        namespace = {}
        for line, requires, code in blocks_of(PAGE):
            if requires == package:
                exec(compile("\n" * line + code, str(PAGE), "exec"), namespace)  # noqa: S102
        return module, namespace

    return run


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.calls = 0

    def forward(self, x, sigma, gain=1.0):
        self.calls += 1
        return gain * self.conv(x) / (1 + sigma.reshape(-1, 1, 1, 1))


SIGMA = torch.tensor([0.02, 0.3, 2.0, 11.0, 70.0])


def with_criterion(namespace, monkeypatch, name, **options):
    """Change the options of a recipe's criterion, keeping its schedule and skips."""
    old = namespace[name]
    new = SkipStepLoss(
        old.schedule,
        old.skip_set,
        prediction_type=old.prediction_type,
        reduction=old.reduction,
        **options,
    )
    monkeypatch.setitem(namespace, name, new)


@pytest.mark.parametrize("weighting", ["karras", "snr"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_k_diffusion_at_tau_one_is_its_own_loss(recipes, monkeypatch, weighting, sigma_data):
    package, namespace = recipes("k_diffusion")
    with_criterion(namespace, monkeypatch, "criterion", tau=1.0)
    denoiser = package.Denoiser(Inner().double(), sigma_data=sigma_data, weighting=weighting)
    x0, noise = torch.randn(2, 5, 2, 6, 6, dtype=torch.float64).unbind(0)
    sigma = SIGMA.double()
    ours = namespace["skip_loss"](denoiser, x0, noise, sigma, gain=1.5)
    theirs = denoiser.loss(x0, noise, sigma, gain=1.5)
    assert ours.shape == (5,)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(x.sum(), list(denoiser.parameters())) for x in (ours, theirs)),
        rtol=1e-6,
        atol=1e-9,
    )
    assert denoiser.inner_model.calls == 2  # one each


def test_k_diffusion_skip_term(recipes):
    """τ < 1, against Eq. 13 by hand: c² on σ and on the σ of one sampler step before it."""
    package, namespace = recipes("k_diffusion")
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
        if ramp >= 1 / 49:
            earlier = (low + (ramp - 1 / 49) * (high - low)) ** 7
            c2 = (1 + s**2) / (1 + earlier**2) - 1
            loss = 0.99 * simple + 0.01 * (c2 * eps_hat.square().mean() + 1)
        # D - x_0 is -σ times the error of ε̂, and c_out times that of the network's output.
        c_out = s * 0.5 / math.sqrt(s**2 + 0.25)
        torch.testing.assert_close(ours[i], (s / c_out) ** 2 * loss, rtol=1e-6, atol=0)


def test_k_diffusion_both_forms_agree(recipes):
    package, namespace = recipes("k_diffusion")
    denoiser = package.Denoiser(Inner(), sigma_data=0.5)
    x0 = torch.randn(64, 2, 6, 6)
    torch.manual_seed(3)
    by_library = namespace["skip_loss_of_clean"](denoiser, x0)
    torch.manual_seed(3)
    sigma = namespace["sigma_of"](torch.rand(64))
    by_trainer = namespace["skip_loss"](denoiser, x0, torch.randn_like(x0), sigma)
    torch.testing.assert_close(by_library, by_trainer, rtol=1e-3, atol=1e-4)
    assert denoiser.inner_model.calls == 2


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("beta_schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("min_snr_loss_weight", [False, True])
def test_denoising_diffusion_pytorch(recipes, objective, beta_schedule, min_snr_loss_weight):
    package, namespace = recipes("denoising_diffusion_pytorch")
    torch.manual_seed(0)
    model = package.Unet(dim=8, dim_mults=(1, 2), channels=3, flash_attn=False)
    options = {
        "image_size": 8,
        "objective": objective,
        "beta_schedule": beta_schedule,
        "min_snr_loss_weight": min_snr_loss_weight,
    }
    theirs = package.GaussianDiffusion(model, **options)
    ours = namespace["SkipStepDiffusion"](model, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    images, times = torch.rand(6, 3, 8, 8), torch.tensor([0, 8, 9, 300, 700, 980])

    def losses(diffusion):
        torch.manual_seed(1)
        loss = diffusion(images, times=times, loss_reduction="none")
        return loss, torch.get_rng_state()

    ours.criterion = SkipStepLoss(ours.criterion.schedule, 9, tau=1.0, reduction="none")
    (loss, rng), (expected, expected_rng) = losses(ours), losses(theirs)
    # At t = 0 the trainer's float32 buffers give 1 - ᾱ, and so the weight, to three digits.
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
    assert torch.equal(rng, expected_rng)

    # τ < 1: the core's loss on the same ε̂, times the weight of mse(ε̂, ε) that Min-SNR leaves.
    ours.criterion = SkipStepLoss(ours.criterion.schedule, 9, reduction="none")
    loss, _ = losses(ours)
    torch.manual_seed(1)
    noise = torch.randn_like(images)
    x_t = ours.q_sample(x_start=2 * images - 1, t=times, noise=noise)
    eps_hat = ours.model_predictions(x_t, times).pred_noise
    core = SkipStepLoss(NoiseSchedule.from_betas(theirs.betas), 9, reduction="none")
    snr = theirs.alphas_cumprod[times] / (1 - theirs.alphas_cumprod[times])
    weights = snr.clamp(max=5) / snr if min_snr_loss_weight else torch.ones(6)
    expected = weights * core.from_prediction(eps_hat, noise, times)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)


def test_denoising_diffusion_pytorch_by_the_library(recipes):
    """The page's second form is its first with the same draws."""
    _, namespace = recipes("denoising_diffusion_pytorch")
    diffusion, by_library = namespace["diffusion"], namespace["by_library"]
    x_start, t = namespace["x_start"], torch.tensor([40, 600])
    noise = torch.randn_like(x_start)
    weights = namespace["weights_of_noise"](diffusion)[t]
    torch.testing.assert_close(
        by_library(diffusion.model, x_start, t=t, noise=noise, weights=weights),
        diffusion.p_losses(x_start, t, noise),
        rtol=1e-4,
        atol=1e-6,
    )
