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
from tests.helpers.trainers import column
from tests.helpers.upstream import denoising_diffusion_pytorch, stub


@pytest.mark.parametrize("double", [True, False])
def test_compvis_validates_samples_and_logs_as_it_did(double):
    """Validation comes first, as in Lightning's sanity check."""
    conv = nn.Conv2d(3, 3, 1)
    Unet.inner = lambda x_t, t: conv(x_t)
    (x, noise), t = torch.randn(2, 4, 3, 8, 8), torch.tensor([3, 9, 500, 999])
    with latent_diffusion(double) as make:
        with pytest.raises(ValueError, match="loss_type must be 'l2', got 'l1'"):
            make(tau=0.5, loss_type="l1")
        expected = make().eval().p_losses(x, None, t, noise)[0]
        diffusion = make(tau=0.5)
        assert torch.equal(diffusion.eval().p_losses(x, None, t, noise)[0], expected)
        loss, logged = diffusion.train().p_losses(x, None, t, noise)
        assert not torch.allclose(loss, expected, rtol=0.01)
        torch.testing.assert_close(logged["train/loss_simple"], loss.detach())
        assert torch.equal(diffusion.apply_model(x, t, None), conv(x))
        assert torch.equal(diffusion.eval().p_losses(x, None, t, noise)[0], expected)


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
    logged = {}
    with_log = {"log": lambda _, name, value, **__: logged.update({name: value})}
    lightning = stub("lightning", LightningModule=type("Module", (nn.Module,), with_log))
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    model = Network(1, dropout=0.0)
    module = snippet("lightning")["Diffusion"](model)
    assert module.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
    x0, linear = torch.randn(8, 1, 4, 4), NoiseSchedule.linear(1000)
    torch.manual_seed(0)
    loss = module.training_step(x0, 0)
    torch.manual_seed(0)
    assert torch.equal(loss, SkipStepLoss(linear, 49)(model, x0))
    torch.manual_seed(0)
    module.validation_step(x0, 0)
    torch.manual_seed(0)
    t, noise = torch.randint(1000, (8,)), torch.randn_like(x0)
    alpha, sigma = (column(each).float() for each in linear.alpha_sigma(t))
    plain = F.mse_loss(model(alpha * x0 + sigma * noise, t), noise)
    torch.testing.assert_close(logged["val/loss"], plain)
    assert module.configure_optimizers().param_groups[0]["params"][0] is model.conv.weight


@pytest.mark.parametrize("which", K_DIFFUSION, ids=["double", "real"])
def test_k_diffusions_recipe_refuses_the_losses_that_are_not_this_one(which):
    package = which[1]()
    other = type("SimpleLossDenoiser", (package.Denoiser,), {})
    for denoiser in (package.Denoiser(Network(), scales=2), other(Network())):
        with pytest.raises(ValueError, match=r"must be a K\.Denoiser with scales=1"):
            k_diffusions(package)["skip_loss"](denoiser, *torch.ones(3, 1))
