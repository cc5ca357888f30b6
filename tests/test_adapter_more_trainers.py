"""The snippets of docs/adapters/more_trainers.md, on the trainers' own code.

`S2DM_STABLE_DIFFUSION_ROOT` and `S2DM_ONETRAINER_ROOT` name checkouts; Lightning is stubbed.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s2dm_loss import NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.diffusers import schedule_of
from s2dm_loss.testing import check_swap
from tests.helpers.checkouts import checkout_on_path
from tests.helpers.diffusers_parts import make_scheduler
from tests.helpers.upstream import load, root_of, stub, stubs
from tests.test_docs_blocks import blocks_of

PAGE = Path(__file__).parents[1] / "docs" / "adapters" / "more_trainers.md"


def snippet(requires):
    """The namespace of the page's block that needs this module."""
    namespace = {}
    for line, needs, code in blocks_of(PAGE):
        if needs == requires:
            exec(compile("\n" * line + code, str(PAGE), "exec"), namespace)  # noqa: S102
    return namespace


class Unet(nn.Module):
    """What the config of a test names as its network: hands on to the one that is set here."""

    inner = None

    def forward(self, x, t, *args, **kwargs):
        return Unet.inner(x, t)


class FirstStage(nn.Identity):
    pass


@pytest.fixture
def latent_diffusion():
    """The page's class, made by the trainer's own `__init__` from a config."""
    lightning = stubs(
        "pytorch_lightning",
        "pytorch_lightning.utilities",
        "pytorch_lightning.utilities.distributed",
        "taming",
        "taming.modules",
        "taming.modules.vqvae",
        "taming.modules.vqvae.quantize",
        "torchvision",
        "torchvision.utils",
        "omegaconf",
    )
    lightning["pytorch_lightning"].LightningModule = type(
        "LightningModule", (nn.Module,), {"device": torch.device("cpu")}
    )
    lightning["pytorch_lightning.utilities.distributed"].rank_zero_only = lambda f: f
    with checkout_on_path(root_of("S2DM_STABLE_DIFFUSION_ROOT"), lightning):
        made = snippet("ldm")
        plain, ours = made["LatentDiffusion"], made["SkipStepLatentDiffusion"]

        def make(kind=ours, **options):
            return kind(
                first_stage_config={"target": f"{__name__}.FirstStage"},
                cond_stage_config="__is_unconditional__",
                unet_config={"target": f"{__name__}.Unet"},
                timesteps=1000,
                use_ema=False,
                **{"linear_start": 0.00085, "linear_end": 0.012, **options},
            )

        yield plain, ours, make


@pytest.mark.parametrize("parameterization", ["eps", "x0"])
@pytest.mark.parametrize(
    "options",
    [{}, {"original_elbo_weight": 0.1, "l_simple_weight": 0.7, "logvar_init": 0.3}],
    ids=["plain", "logvar and vlb"],
)
# The trainer's own tables for x0 take NumPy roots of torch tensors.
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_compvis(latent_diffusion, parameterization, options):
    plain, ours, make = latent_diffusion
    options = {"parameterization": parameterization, **options}
    x, t = torch.randn(6, 3, 8, 8), torch.tensor([0, 48, 49, 300, 700, 999])

    def loss(model, tau=None):
        Unet.inner = model
        diffusion = make(plain, **options) if tau is None else make(ours, tau=tau, **options)
        return diffusion.train().p_losses(x, None, t)[0]

    report = check_swap(loss, loss, rtol=0.0)
    assert report.calls == 1

    # Below τ = 1: `from_output` on what the model returned, with the trainer's own weights.
    seen = []
    torch.manual_seed(1)
    conv = nn.Conv2d(3, 3, 1)
    Unet.inner = lambda x_t, t: seen.append((x_t, conv(x_t))) or seen[-1][1]
    diffusion = make(**options).train()
    torch.manual_seed(2)
    found, logged = diffusion.p_losses(x, None, t)
    torch.manual_seed(2)
    noise = torch.randn_like(x)
    ((x_t, output),) = seen
    criterion = SkipStepLoss(
        NoiseSchedule.scaled_linear(1000),
        49,
        prediction_type="epsilon" if parameterization == "eps" else "sample",
        reduction="none",
    )
    target = noise if parameterization == "eps" else x
    simple = criterion.from_output(output, target, t, x_t)
    logvar = options.get("logvar_init", 0.0)
    expected = (simple / torch.tensor(logvar).exp() + logvar).mean()
    expected = options.get("l_simple_weight", 1.0) * expected
    bound = (diffusion.lvlb_weights[t] * simple).mean()
    expected = expected + options.get("original_elbo_weight", 0.0) * bound
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(logged["train/loss_simple"], simple.mean(), rtol=1e-4, atol=0)


def test_compvis_validates_and_samples_as_it_did(latent_diffusion):
    plain, ours, make = latent_diffusion
    conv = nn.Conv2d(3, 3, 1)
    Unet.inner = lambda x_t, t: conv(x_t)
    x, t = torch.randn(4, 3, 8, 8), torch.tensor([3, 9, 500, 999])
    results = []
    for kind in (plain, ours):
        diffusion = make(kind).eval()
        torch.manual_seed(0)
        loss, _ = diffusion.p_losses(x, None, t)
        results.append((loss, diffusion.train().apply_model(x, t, None)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


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


def test_compvis_refuses_l1(latent_diffusion):
    with pytest.raises(ValueError, match="loss_type must be 'l2', got 'l1'"):
        latent_diffusion[2](loss_type="l1")


@pytest.fixture
def onetrainer():
    root = root_of("S2DM_ONETRAINER_ROOT")
    stubbed = stubs("modules.util.config.TrainConfig")
    (module,) = load(root, "modules.modelSetup.mixin.ModelSetupDiffusionLossMixin", stubbed=stubbed)
    return module


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strength", ["mse_strength", "huber_strength"])
@pytest.mark.parametrize("weight", ["CONSTANT", "MIN_SNR_GAMMA", "P2"])
def test_onetrainer(onetrainer, prediction_type, masked, strength, weight):
    scheduler = make_scheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
    )
    latents, t = torch.randn(6, 4, 8, 8), torch.tensor([0, 8, 9, 300, 700, 999])
    mask, given = torch.rand(6, 1, 8, 8), torch.rand(6) + 0.5
    strengths = dict.fromkeys(
        ("mse_strength", "mae_strength", "log_cosh_strength", "huber_strength", "vb_loss_strength"),
        0.0,
    )
    config = SimpleNamespace(
        **{**strengths, strength: 1.0},
        batch_size=1,
        gradient_accumulation_steps=1,
        huber_delta=1.0,
        loss_scaler=SimpleNamespace(get_scale=lambda *_, **__: 1.0),
        loss_weight_fn=onetrainer.LossWeight[weight],
        loss_weight_strength=5.0 if weight == "MIN_SNR_GAMMA" else 1.0,
        masked_prior_preservation_weight=0.0,
        masked_training=masked,
        model_type=SimpleNamespace(has_conditioning_image_input=lambda: False),
        normalize_masked_area_loss=False,
        unmasked_weight=0.1,
    )

    def loss(model, tau=None):
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents, noise, t)
        v = scheduler.get_velocity(latents, noise, t)
        data = {
            "loss_type": "target",
            "timestep": t,
            "predicted": model(noisy, t),
            "target": noise if prediction_type == "epsilon" else v,
            "prediction_type": prediction_type,
        }
        batch = {"loss_weight": given.clone(), "latent_mask": mask}
        if tau is not None:
            page = snippet("diffusers")
            page["TAU"] = tau
            page["skip_step"](data, batch, noisy, scheduler)
        mixin = onetrainer.ModelSetupDiffusionLossMixin()
        return mixin._diffusion_losses(
            batch, data, config, torch.device("cpu"), betas=scheduler.betas
        )

    report = check_swap(loss, loss, rtol=0.0)
    assert report.calls == 1


@pytest.mark.parametrize("weight", ["CONSTANT", "SIGMA"])
@pytest.mark.parametrize("strength", ["mse_strength", "huber_strength"])
def test_onetrainers_flow(onetrainer, weight, strength):
    """The page's call in `BaseFluxSetup`, and the trainer's own flow-matching losses."""
    latents, t = torch.randn(6, 4, 8, 8), torch.tensor([0, 20, 200, 500, 900, 999])
    given, sigma = torch.rand(6) + 0.5, ((t + 1) / 1000).reshape(-1, 1, 1, 1)
    strengths = ("mse_strength", "mae_strength", "log_cosh_strength", "huber_strength")
    config = SimpleNamespace(
        **{**dict.fromkeys(strengths, 0.0), strength: 1.0},
        batch_size=1,
        gradient_accumulation_steps=1,
        huber_delta=1.0,
        loss_scaler=SimpleNamespace(get_scale=lambda *_, **__: 1.0),
        loss_weight_fn=onetrainer.LossWeight[weight],
        masked_training=False,
        vb_loss_strength=0.0,
    )

    def loss(model, tau=None):
        noise = torch.randn_like(latents)
        noisy = (1 - sigma) * latents + sigma * noise
        data = {
            "loss_type": "target",
            "timestep": t,
            "predicted": model(noisy, t),
            "target": noise - latents,
        }
        batch = {"loss_weight": given.clone()}
        if tau is not None:
            page = snippet("diffusers")
            page["FLOW_LOSS"] = SkipStepLoss(
                page["FLOW_LOSS"].schedule,
                page["FLOW_LOSS"].skip_set,
                tau=tau,
                prediction_type="flow",
            )
            page["skip_step_of_flow"](data, batch, noisy, sigma)
        mixin = onetrainer.ModelSetupDiffusionLossMixin()
        return mixin._flow_matching_losses(
            batch, data, config, torch.device("cpu"), sigmas=torch.arange(1000.0)
        )

    assert check_swap(loss, loss, rtol=0.0).calls == 1


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


def test_denoising_diffusion_pytorch(monkeypatch):
    from tests.doubles import denoising_diffusion_pytorch_double as double

    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", double)
    diffusion = snippet("denoising_diffusion_pytorch")["diffusion"]
    assert diffusion.skip_step_loss.skip_set.offsets == (49,)
    assert all(p.grad is not None for p in diffusion.model.parameters())


def test_lightning(monkeypatch):
    class LightningModule(nn.Module):
        def log(self, name, value, **_):
            self.__dict__.setdefault("logged", {})[name] = value

    monkeypatch.setitem(
        sys.modules, "lightning", stub("lightning", LightningModule=LightningModule)
    )
    made = snippet("lightning")["Diffusion"]
    conv = nn.Conv2d(1, 1, 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x_t, t):
            return self.conv(x_t)

    module = made(Model())
    assert module.state_dict().keys() == {"model.conv.weight", "model.conv.bias"}
    x0 = torch.randn(8, 1, 4, 4)
    torch.manual_seed(0)
    loss = module.training_step(x0, 0)
    torch.manual_seed(0)
    assert torch.equal(loss, SkipStepLoss(NoiseSchedule.linear(1000), 49)(module.model, x0))
    torch.manual_seed(0)
    module.validation_step(x0, 0)
    torch.manual_seed(0)
    t, noise = torch.randint(1000, (8,)), torch.randn_like(x0)
    alpha, sigma = (s.float().view(-1, 1, 1, 1) for s in NoiseSchedule.linear(1000).alpha_sigma(t))
    plain = F.mse_loss(conv(alpha * x0 + sigma * noise), noise)
    torch.testing.assert_close(module.logged["val/loss"], plain)
    assert module.configure_optimizers().param_groups[0]["params"][0] is conv.weight
