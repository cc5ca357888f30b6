"""k-diffusion, CompVis' and OneTrainer, with the snippets of docs/adapters/more_trainers.md."""

import contextlib
import functools
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from tests.doubles import k_diffusion_double
from tests.helpers.diffusers_parts import make_scheduler
from tests.helpers.patches import PAGES
from tests.helpers.small import every_pair
from tests.helpers.trainers import SEED, Case, column, noise_in, of_each
from tests.helpers.trainers_of_today import Anything
from tests.helpers.upstream import checkout_on_path, k_diffusion_layers, load, root_of, stubs
from tests.test_docs_blocks import snippets_of

PAGE = PAGES / "more_trainers.md"
PATH = NoiseSchedule.scaled_linear(1000)
snippet = functools.partial(snippets_of, PAGE)


class Unet(nn.Module):
    """What CompVis' config names as its network: hands on to the one that is set here."""

    inner = None

    def forward(self, x, t, *args, **kwargs):
        return Unet.inner(x, t)


class FirstStage(nn.Identity):
    pass


@contextlib.contextmanager
def latent_diffusion():
    """The trainer's class, the page's, and one made by the trainer's own `__init__`."""
    lightning = stubs(
        *("pytorch_lightning", "pytorch_lightning.utilities", "omegaconf", "torchvision"),
        *("pytorch_lightning.utilities.distributed", "torchvision.utils"),
        *("taming", "taming.modules", "taming.modules.vqvae", "taming.modules.vqvae.quantize"),
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


def compvis(parameterization, **options):
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    t = torch.tensor([0, 48, 49, 300, 700, 999])

    def loss(model, tau=None):
        given = {"parameterization": parameterization, **options}
        with latent_diffusion() as (plain, ours, make), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its tables for x0 take NumPy roots of torch tensors
            Unet.inner = model
            diffusion = make(plain, **given) if tau is None else make(ours, tau=tau, **given)
            return diffusion.train().p_losses(x, None, t)[0]

    def reference(x_t, _, output):
        return output, noise_in(PATH, x_t, x, t) if parameterization == "eps" else x, t

    predicts = "epsilon" if parameterization == "eps" else "sample"
    name = " ".join(("CompVis", parameterization, *options))
    return Case(name, loss, PATH, 49, predicts, reference, channels=3, options={})


def onetrainer():
    stubbed = stubs("modules.util.config.TrainConfig", "modules.util.loss.vb_loss")
    name = "modules.modelSetup.mixin.ModelSetupDiffusionLossMixin"
    return load(root_of("S2DM_ONETRAINER_ROOT"), name, stubbed=stubbed)[0]


def settings_of(module, weight, strength="mse_strength", **more):
    """OneTrainer's config, as far as its losses read it."""
    names = ("mse", "mae", "log_cosh", "huber", "vb_loss")
    return Anything(
        **{**dict.fromkeys((f"{name}_strength" for name in names), 0.0), strength: 1.0},
        batch_size=1,
        gradient_accumulation_steps=1,
        huber_delta=1.0,
        loss_scaler=SimpleNamespace(get_scale=lambda *_, **__: 1.0),
        loss_weight_fn=module.LossWeight[weight],
        model_type=SimpleNamespace(has_conditioning_image_input=lambda: False),
        **{"masked_training": False, **more},
    )


def of_onetrainer(prediction_type, weight, strength="mse_strength", masked=False):
    drawn = torch.Generator().manual_seed(5)
    latents, given = torch.randn(6, 4, 8, 8, generator=drawn), torch.rand(6, generator=drawn) + 0.5
    mask = torch.rand(6, 1, 8, 8, generator=drawn)
    flow = prediction_type == "flow"
    t = torch.tensor([0, 20, 200, 500, 900, 999] if flow else [0, 8, 9, 300, 700, 999])
    sigma = column((t + 1) / 1000)
    scheduler = make_scheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="epsilon" if flow else prediction_type,
    )

    def made(model):
        noise = torch.randn_like(latents)
        if flow:
            noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        else:
            noisy, v = (
                make(latents, noise, t) for make in (scheduler.add_noise, scheduler.get_velocity)
            )
            target = noise if prediction_type == "epsilon" else v
        data = {"loss_type": "target", "timestep": t, "target": target}
        data |= {"prediction_type": prediction_type, "predicted": model(noisy, t)}
        return data, noisy

    def loss(model, tau=None):
        module = onetrainer()
        data, noisy = made(model)
        batch = {"loss_weight": given.clone(), "latent_mask": mask}
        if tau is not None:
            page = snippet("diffusers")
            page["TAU"] = tau
            flow_loss, of_flow = page["FLOW_LOSS"], {"prediction_type": "flow"}
            page["FLOW_LOSS"] = SkipStepLoss(
                flow_loss.schedule, flow_loss.skip_set, tau=tau, **of_flow
            )
            name, last = ("skip_step_of_flow", sigma) if flow else ("skip_step", scheduler)
            page[name](data, batch, noisy, last)
        config = settings_of(
            module,
            weight,
            strength,
            loss_weight_strength=5.0 if weight == "MIN_SNR_GAMMA" else 1.0,
            masked_training=masked,
            masked_prior_preservation_weight=0.0,
            normalize_masked_area_loss=False,
            unmasked_weight=0.1,
        )
        mixin = module.ModelSetupDiffusionLossMixin()
        arguments = batch, data, config, torch.device("cpu")
        if flow:
            return mixin._flow_matching_losses(*arguments, sigmas=torch.arange(1000.0))
        return mixin._diffusion_losses(*arguments, betas=scheduler.betas)

    def reference(x_t, _, output):
        torch.manual_seed(SEED)
        data, _ = made(lambda *_: None)
        return output, data["target"], sigma.flatten() if flow else t

    squared = strength == "mse_strength" and not masked
    return Case(
        f"OneTrainer {prediction_type} {weight} {strength} masked={masked}",
        loss,
        ContinuousSchedule.flow() if flow else PATH,
        SkipSet.for_sampling_steps(20) if flow else 49,
        prediction_type,
        reference if squared else None,
        channels=4,
        options={},
    )


def k_diffusions(package):
    """The names of the page's block on k-diffusion, with this package in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "k_diffusion", package)
        return snippet("k_diffusion")


K_DIFFUSION = of_each("k-diffusion", lambda: _with_layers(k_diffusion_layers()), k_diffusion_double)


def _with_layers(layers):
    package = ModuleType("k_diffusion")
    package.layers, package.Denoiser = layers, layers.Denoiser
    return package


def k_diffusion(label, package, weighting, sigma_data):
    """The loss is on F in D = c_skip x + c_out F, and the network sees c_in x."""
    drawn, sigma = torch.Generator().manual_seed(5), torch.tensor([0.011, 0.3, 2.0, 11.0, 80.0])
    x0, noise = torch.randn(2, 5, 2, 6, 6, generator=drawn, dtype=torch.float64).unbind(0)
    sigma = sigma.double()
    total = column((sigma**2 + sigma_data**2).sqrt())
    low, high = 0.01 ** (1 / 7), 80 ** (1 / 7)

    def loss(model, tau=None):
        denoiser = package().Denoiser(model, sigma_data=sigma_data, weighting=weighting)
        if tau is None:
            return denoiser.loss(x0, noise, sigma)
        names = k_diffusions(package())
        names["criterion"] = names["make_criterion"](tau=tau)
        return names["skip_loss"](denoiser, x0, noise, sigma)

    def reference(x_t, _, output):
        ramp = (sigma ** (1 / 7) - low) / (high - low)
        c_out = column(sigma) * sigma_data / total
        return c_out * output + (sigma_data / total) ** 2 * x_t, x0, ramp.clamp(0, 1)

    return Case(
        f"{label} {weighting} {sigma_data}",
        loss,
        ContinuousSchedule.from_alpha_sigma(
            lambda t: (torch.ones_like(t), (low + t * (high - low)) ** 7)
        ),
        SkipSet.for_sampling_steps(20),
        "sample",
        reference,
        rtol=1e-9,
        dtype=torch.float64,
        options={},
        unscaled=lambda x, _: x * total,
    )


CASES = [
    k_diffusion(*which, weighting, sigma_data)
    for which in K_DIFFUSION
    for weighting, sigma_data in (("karras", 0.5), ("snr", 1.0), ("soft-min-snr", 0.5))
]
CASES += [
    compvis(parameterization, **options)
    for parameterization in ("eps", "x0")
    for options in ({}, {"original_elbo_weight": 0.1, "l_simple_weight": 0.7, "logvar_init": 0.3})
]
STRENGTHS = ("mse_strength", "huber_strength")
CASES += [
    of_onetrainer(**case)
    for case in every_pair(
        prediction_type=("epsilon", "v_prediction"),
        weight=("CONSTANT", "MIN_SNR_GAMMA", "P2"),
        strength=STRENGTHS,
        masked=(False, True),
    )
]
CASES += [
    of_onetrainer("flow", weight, strength)
    for weight in ("CONSTANT", "SIGMA")
    for strength in STRENGTHS
]
