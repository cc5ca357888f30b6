"""What else the snippets of docs/adapters/more_trainers.md have to do."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s2dm_loss import NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.diffusers import schedule_of
from tests.helpers.diffusers_parts import make_scheduler
from tests.helpers.more_trainers import K_DIFFUSION, Unet, k_diffusions, latent_diffusion, snippet
from tests.helpers.small import Network
from tests.helpers.upstream import denoising_diffusion_pytorch, stub


def test_compvis_validates_samples_and_logs_as_it_did():
    conv = nn.Conv2d(3, 3, 1)
    Unet.inner = lambda x_t, t: conv(x_t)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([3, 9, 500, 999])
    results = []
    with latent_diffusion() as (plain, ours, make):
        for kind in (plain, ours):
            diffusion = make(kind).eval()
            torch.manual_seed(0)
            loss, _ = diffusion.p_losses(x, None, t)
            results.append((loss, diffusion.train().apply_model(x, t, None)))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
        loss, logged = diffusion.p_losses(x, None, t)
        torch.testing.assert_close(logged["train/loss_simple"], loss.detach())
        with pytest.raises(ValueError, match="loss_type must be 'l2', got 'l1'"):
            make(loss_type="l1")


class LatentDouble(nn.Module):
    """What the page's class asks of CompVis' `LatentDiffusion`, for where there is no checkout."""

    loss_type, parameterization = "l2", "eps"

    def __init__(self):
        super().__init__()
        self.model = nn.Conv2d(3, 3, 1)
        self.betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2

    def apply_model(self, x_noisy, t, cond, return_ids=False):
        return self.model(x_noisy)

    def get_loss(self, pred, target, mean=True):
        return F.mse_loss(pred, target, reduction="mean" if mean else "none")

    def p_losses(self, x_start, cond, t, noise=None):
        alpha, sigma = NoiseSchedule.from_betas(self.betas).alpha_sigma(t)
        x_t = alpha.float()[:, None, None, None] * x_start
        x_t = x_t + sigma.float()[:, None, None, None] * noise
        return self.get_loss(self.apply_model(x_t, t, cond), noise, mean=False).mean(), {}


def test_compvis_validates_before_it_trains(monkeypatch):
    """As Lightning does, its sanity check."""
    module = stub("ldm.models.diffusion.ddpm", LatentDiffusion=LatentDouble)
    monkeypatch.setitem(sys.modules, "ldm.models.diffusion.ddpm", module)
    diffusion = snippet("ldm")["SkipStepLatentDiffusion"](tau=0.5)
    x, noise = torch.randn(2, 4, 3, 8, 8)
    t = torch.tensor([3, 9, 500, 999])
    plain = LatentDouble.p_losses(diffusion, x, None, t, noise)[0]
    assert torch.equal(diffusion.eval().p_losses(x, None, t, noise)[0], plain)
    trained = diffusion.train().p_losses(x, None, t, noise)[0]
    assert not torch.allclose(trained, plain, rtol=0.01)
    assert torch.equal(diffusion.eval().p_losses(x, None, t, noise)[0], plain)


def test_onetrainers_recipe_knows_its_scheduler_and_weighs_a_batch_once():
    """A prior prediction comes twice with one batch; a process may train on two schedules."""
    skip_step = snippet("diffusers")["skip_step"]
    x_t, target, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([900, 980])
    for rescaled in (False, True):
        scheduler = make_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=rescaled)
        criterion = SkipStepLoss(schedule_of(scheduler), 49, prediction_type="v_prediction")
        wanted = criterion.regression_target(target, t, x_t)
        batch = {"loss_weight": torch.tensor([0.5, 2.0])}
        for _ in range(2):
            data = {"prediction_type": "v_prediction", "target": target, "timestep": t}
            skip_step(data, batch, x_t, scheduler)
            assert torch.equal(data["target"], wanted.target)
            torch.testing.assert_close(batch["loss_weight"] / wanted.weight, torch.tensor([0.5, 2]))


def test_the_line_for_denoising_diffusion_pytorch(monkeypatch):
    package = denoising_diffusion_pytorch()[0]
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", package)
    diffusion = snippet("denoising_diffusion_pytorch")["diffusion"]
    assert diffusion.skip_step_loss.skip_set.offsets == (49,)
    assert all(p.grad is not None for p in diffusion.model.parameters())


def test_lightning(monkeypatch):
    class LightningModule(nn.Module):
        def log(self, name, value, **_):
            self.__dict__.setdefault("logged", {})[name] = value

    lightning = stub("lightning", LightningModule=LightningModule)
    monkeypatch.setitem(sys.modules, "lightning", lightning)

    class Model(nn.Conv2d):
        def forward(self, x_t, t):
            return super().forward(x_t)

    module = snippet("lightning")["Diffusion"](Model(1, 1, 1))
    assert module.state_dict().keys() == {"model.weight", "model.bias"}
    x0, linear = torch.randn(8, 1, 4, 4), NoiseSchedule.linear(1000)
    torch.manual_seed(0)
    loss = module.training_step(x0, 0)
    torch.manual_seed(0)
    assert torch.equal(loss, SkipStepLoss(linear, 49)(module.model, x0))
    torch.manual_seed(0)
    module.validation_step(x0, 0)
    torch.manual_seed(0)
    t, noise = torch.randint(1000, (8,)), torch.randn_like(x0)
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in linear.alpha_sigma(t))
    plain = F.mse_loss(module.model(alpha * x0 + sigma * noise, t), noise)
    torch.testing.assert_close(module.logged["val/loss"], plain)
    assert module.configure_optimizers().param_groups[0]["params"][0] is module.model.weight


# k-diffusion


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
    sigma = torch.tensor([0.011, 0.3, 2.0, 11.0, 80.0], dtype=torch.float64)
    ours = names["skip_loss"](denoiser, x0, noise, sigma, gain=1.5)
    theirs = denoiser.loss(x0, noise, sigma, gain=1.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_it_refuses_the_losses_that_are_not_this_one(recipe):
    package, names = recipe
    other = type("SimpleLossDenoiser", (package.Denoiser,), {})
    for denoiser in (package.Denoiser(Network(), scales=2), other(Network())):
        with pytest.raises(ValueError, match=r"must be a K\.Denoiser with scales=1"):
            names["skip_loss"](denoiser, torch.ones(1), torch.ones(1), torch.ones(1))
