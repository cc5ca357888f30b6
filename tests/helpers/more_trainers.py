"""k-diffusion, CompVis' and OneTrainer, with the snippets of docs/adapters/more_trainers.md."""

import contextlib
import functools
import itertools
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from tests.doubles import k_diffusion_double
from tests.helpers import upstream
from tests.helpers.diffusers_parts import STABLE_DIFFUSION, make_scheduler
from tests.helpers.patches import PAGES
from tests.helpers.small import every_pair
from tests.helpers.trainers import Case, column, of_each, ramp, reference_of
from tests.test_docs_blocks import snippets_of

PAGE = PAGES / "more_trainers.md"
PATH = NoiseSchedule.scaled_linear(1000)
snippet = functools.partial(snippets_of, PAGE)


class Unet(nn.Module):
    """What CompVis' config names as its network: hands on to the one that is set here."""

    inner = None

    def forward(self, x, t, *args, **kwargs):
        return Unet.inner(x, t)


@contextlib.contextmanager
def latent_diffusion(double=False):
    """What makes the trainer's class or its double (τ is None), and the page's class of it."""
    name = "ldm.models.diffusion.ddpm"
    lightning = upstream.stubs(
        *("pytorch_lightning", "pytorch_lightning.utilities", "omegaconf", "torchvision"),
        *("pytorch_lightning.utilities.distributed", "torchvision.utils"),
        *("taming", "taming.modules", "taming.modules.vqvae", "taming.modules.vqvae.quantize"),
    )
    lightning["pytorch_lightning"].LightningModule = type(
        "LightningModule", (nn.Module,), {"device": torch.device("cpu")}
    )
    lightning["pytorch_lightning.utilities.distributed"].rank_zero_only = lambda f: f
    if double:
        stub = upstream.stub(name, LatentDiffusion=LatentDouble)
        where = mock.patch.dict(sys.modules, {name: stub})
    else:
        where = upstream.checkout_on_path(upstream.root_of("S2DM_STABLE_DIFFUSION_ROOT"), lightning)
    with where:
        page = snippet("ldm")

        def make(tau=None, **options):
            config = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000, **options}
            config |= {"use_ema": False, "cond_stage_config": "__is_unconditional__"}
            config |= {"unet_config": {"target": f"{__name__}.Unet"}}
            config |= {"first_stage_config": {"target": "torch.nn.Identity"}}
            if tau is None:
                return page["LatentDiffusion"](**config)
            return page["SkipStepLatentDiffusion"](tau=tau, **config)

        yield make


class LatentDouble(nn.Module):
    """What the page's class asks of CompVis' `LatentDiffusion`, for where there is no checkout."""

    parameterization, betas = "eps", torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2

    def __init__(self, loss_type="l2", **config):
        super().__init__()
        self.loss_type = loss_type

    def apply_model(self, x_noisy, t, cond, return_ids=False):
        return Unet.inner(x_noisy, t)

    def get_loss(self, pred, target, mean=True):
        return F.mse_loss(pred, target, reduction="mean" if mean else "none")

    def p_losses(self, x_start, cond, t, noise=None):
        a, b = (column(each).float() for each in PATH.alpha_sigma(t))
        output = self.apply_model(a * x_start + b * noise, t, cond)
        loss = self.get_loss(output, noise, mean=False).mean()
        return loss, {"train/loss_simple": loss.detach()}


def compvis(parameterization, **options):
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([0, 48, 49, 300, 700, 999])

    def loss(model, tau=None):
        with latent_diffusion() as make, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its tables for x0 take NumPy roots of torch tensors
            Unet.inner = model
            diffusion = make(tau, parameterization=parameterization, **options)
            return diffusion.train().p_losses(x, None, t)[0]

    predicts = "epsilon" if parameterization == "eps" else "sample"
    name = " ".join(("CompVis", parameterization, *options))
    reference = reference_of(PATH, predicts, x, t)
    return Case(name, loss, PATH, 49, predicts, reference, channels=3, options={})


def onetrainer():
    stubbed = upstream.stubs("modules.util.config.TrainConfig", "modules.util.loss.vb_loss")
    name = "modules.modelSetup.mixin.ModelSetupDiffusionLossMixin"
    return upstream.load(upstream.root_of("S2DM_ONETRAINER_ROOT"), name, stubbed=stubbed)[0]


def settings_of(module, weight, strength="mse_strength", **more):
    """OneTrainer's config, as far as its losses read it."""
    names = ("mse", "mae", "log_cosh", "huber", "vb_loss")
    return upstream.Anything(
        **{**dict.fromkeys((f"{name}_strength" for name in names), 0.0), strength: 1.0},
        batch_size=1,
        gradient_accumulation_steps=1,
        huber_delta=1.0,
        loss_scaler=SimpleNamespace(get_scale=lambda *_, **__: 1.0),
        loss_weight_fn=module.LossWeight[weight],
        model_type=SimpleNamespace(has_conditioning_image_input=lambda: False),
        **more,
    )


def of_onetrainer(prediction_type, weight, strength="mse_strength", masked=False):
    drawn = torch.Generator().manual_seed(5)
    latents, given = torch.randn(6, 4, 8, 8, generator=drawn), torch.rand(6, generator=drawn) + 0.5
    mask = torch.rand(6, 1, 8, 8, generator=drawn)
    flow = prediction_type == "flow"
    t = torch.tensor([0, 20, 200, 500, 900, 999] if flow else [0, 8, 9, 300, 700, 999])
    sigma = column((t + 1) / 1000)
    kind = "epsilon" if flow else prediction_type
    scheduler = make_scheduler(prediction_type=kind, **STABLE_DIFFUSION)

    def loss(model, tau=None):
        module = onetrainer()
        if flow:
            noise = torch.randn_like(latents)
            noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        else:
            noise = torch.randn_like(latents)
            noisy, target = scheduler.add_noise(latents, noise, t), noise
            if prediction_type == "v_prediction":
                target = scheduler.get_velocity(latents, noise, t)
        data = {"loss_type": "target", "timestep": t, "target": target}
        data |= {"prediction_type": prediction_type, "predicted": model(noisy, t)}
        batch = {"loss_weight": given.clone(), "latent_mask": mask}
        if tau is not None:
            page = snippet("diffusers")
            page["TAU"], plain = tau, page["FLOW_LOSS"]
            page["FLOW_LOSS"] = SkipStepLoss(
                plain.schedule, plain.skip_set, tau=tau, prediction_type="flow"
            )
            name, last = ("skip_step_of_flow", sigma) if flow else ("skip_step", scheduler)
            page[name](data, batch, noisy, last)
        options = {"masked_training": masked, "masked_prior_preservation_weight": 0.0}
        options["loss_weight_strength"] = 5.0 if weight == "MIN_SNR_GAMMA" else 1.0
        config = settings_of(module, weight, strength, unmasked_weight=0.1, **options)
        mixin = module.ModelSetupDiffusionLossMixin()
        arguments = batch, data, config, torch.device("cpu")
        if flow:
            return mixin._flow_matching_losses(*arguments, sigmas=torch.arange(1000.0))
        return mixin._diffusion_losses(*arguments, betas=scheduler.betas)

    path, times = (ContinuousSchedule.flow(), sigma.flatten()) if flow else (PATH, t)
    squared = strength == "mse_strength" and not masked
    name = f"OneTrainer {prediction_type} {weight} {strength} masked={masked}"
    skips = SkipSet.for_sampling_steps(20) if flow else 49
    reference = reference_of(path, prediction_type, latents, times) if squared else None
    return Case(name, loss, path, skips, prediction_type, reference, channels=4, options={})


def k_diffusions(package):
    """The names of the page's block on k-diffusion, with this package in its place."""
    with mock.patch.dict(sys.modules, {"k_diffusion": package}):
        return snippet("k_diffusion")


K_DIFFUSION = of_each("k-diffusion", upstream.k_diffusion_layers, k_diffusion_double)


def k_diffusion(label, package, weighting, sigma_data):
    """The loss is on F in D = c_skip x + c_out F, and the network sees c_in x."""
    drawn, sigma = torch.Generator().manual_seed(5), torch.tensor([0.011, 0.3, 2.0, 11.0, 80.0])
    x0, noise = torch.randn(2, 5, 2, 6, 6, generator=drawn, dtype=torch.float64).unbind(0)
    sigma = sigma.double()
    total = column((sigma**2 + sigma_data**2).sqrt())
    path, time_of = ramp(0.01)

    def loss(model, tau=None):
        def network(x_t, t, gain=1.0):
            return gain * model(x_t, t)

        denoiser = package().Denoiser(network, sigma_data=sigma_data, weighting=weighting)
        if tau is None:
            return denoiser.loss(x0, noise, sigma, gain=1.5)
        names = k_diffusions(package())
        names["criterion"] = names["make_criterion"](tau=tau)
        return names["skip_loss"](denoiser, x0, noise, sigma, gain=1.5)

    def reference(x_t, _, output):
        c_out = column(sigma) * sigma_data / total
        return c_out * 1.5 * output + (sigma_data / total) ** 2 * x_t, x0, time_of(sigma)

    name, skips = f"{label} {weighting} {sigma_data}", SkipSet.for_sampling_steps(20)
    case = Case(name, loss, path, skips, "sample", reference, 1e-9, dtype=torch.float64)
    return case._replace(options={}, unscaled=lambda x, _: x * total)


def _cases():
    strengths = ("mse_strength", "huber_strength")
    for which in K_DIFFUSION:
        yield k_diffusion(*which, "karras", 0.5)
        yield k_diffusion(*which, "snr", 1.0)
        yield k_diffusion(*which, "soft-min-snr", 0.5)
    for parameterization in ("eps", "x0"):
        yield compvis(parameterization)
        weights = {"original_elbo_weight": 0.1, "l_simple_weight": 0.7, "logvar_init": 0.3}
        yield compvis(parameterization, **weights)
    for case in every_pair(
        prediction_type=("epsilon", "v_prediction"),
        weight=("CONSTANT", "MIN_SNR_GAMMA", "P2"),
        strength=strengths,
        masked=(False, True),
    ):
        yield of_onetrainer(**case)
    for weight, strength in itertools.product(("CONSTANT", "SIGMA"), strengths):
        yield of_onetrainer("flow", weight, strength)


CASES = list(_cases())
