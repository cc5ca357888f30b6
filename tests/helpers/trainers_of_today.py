"""The losses of today's flow and robotics trainers, by their own code from checkouts.

Their modules import much that the loss does not use, so its functions are taken out of the source.
Each trainer is a function of the (patched) text of a file, a model, `seen` and τ: it draws a batch,
calls `model(x_t, t)`, says in `seen` what target and weights are, and returns the loss.
"""

import __future__

import ast
import functools
import importlib
import itertools
import random
import textwrap
import types
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import einops
import torch
from torch import Tensor
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.adapters.diffusers import SkipLoss
from s2dm_loss.adapters.sd_scripts import skip_step
from tests.helpers.diffusers_parts import make_scheduler
from tests.helpers.patches import PAGES, TRAINERS, patch_of
from tests.helpers.sd_scripts_parts import ACCELERATOR, load_sd_scripts
from tests.helpers.upstream import Anything, checkout_on_path, load, root_of, stubs
from tests.test_docs_blocks import snippets_of

IMAGES, ACTIONS = (8, 4, 8, 8), (8, 6, 4)


def source_of(trainer, path):
    return (root_of(TRAINERS[trainer].variable) / path).read_text(encoding="utf-8")


def taken(source, name, namespace):
    """A function or class of a source, by its name or as `Class.name`, defined in a namespace."""
    node, kinds = _parsed(source), (ast.FunctionDef, ast.ClassDef)
    for part in name.split("."):
        node = next(n for n in ast.walk(node) if isinstance(n, kinds) and n.name == part)
    node.decorator_list = []
    unread = __future__.annotations.compiler_flag  # they name what is not here
    exec(compile(ast.Module([node], []), name, "exec", unread), namespace)  # noqa: S102 - a trainer's
    return namespace[node.name]


_parsed = functools.lru_cache(maxsize=32)(ast.parse)


def made(trainer, path, tau, **names):
    """The loss that a patch makes, at this τ."""
    owner = SimpleNamespace(**names)
    namespace = {**names, "self": owner, "torch": torch, "SkipSet": SkipSet}
    namespace["ContinuousSchedule"] = ContinuousSchedule
    namespace["SkipStepLoss"] = partial(SkipStepLoss, tau=tau)
    from_scheduler = partial(SkipLoss.from_scheduler, tau=tau)
    namespace["SkipLoss"] = SimpleNamespace(from_scheduler=from_scheduler)
    hunks = patch_of(trainer, path).hunks
    added = ("\n".join(line[1:] for line in hunk if line[0] == "+") for hunk in hunks)
    maker = next(lines for lines in added if "skip_loss = " in lines.lower())
    exec(textwrap.dedent(maker), namespace)  # noqa: S102 - of our own page
    found = {**vars(owner), **namespace}
    return found.get("SKIP_LOSS") or found["skip_loss"]


def names_of(file, tau, **names):
    """What a trainer's module has at hand, and the loss that its patch makes at this τ."""
    return {"F": F, "torch": torch, "SKIP_LOSS": tau is not None and made(*file, tau), **names}


def bound(source, owner, methods, namespace, trainer):
    """Methods of a class of the source, on a trainer of ours."""
    for name in methods:
        function = taken(source, f"{owner}.{name}", namespace)
        setattr(trainer, name, types.MethodType(function, trainer))
    return trainer


def straight():
    """Latents and noise, and x_t between them at σ."""
    latents, noise = torch.randn(2, *IMAGES).unbind(0)
    sigmas = torch.rand(len(latents)).reshape(-1, 1, 1, 1)
    return latents, noise, sigmas, (1 - sigmas) * latents + sigmas * noise


def next_noise(shape):
    """What the trainer will draw next, if that is noise."""
    with torch.random.fork_rng():
        return torch.randn(shape)


MUSUBI = ("musubi-tuner", "src/musubi_tuner/training/trainer_base.py")
AI_TOOLKIT = ("ai-toolkit", "extensions_built_in/sd_trainer/SDTrainer.py")
SIMPLE_TUNER = ("SimpleTuner", "simpletuner/helpers/models/common.py")
KOHYA_FLUX, KOHYA_SD3 = (("sd-scripts", f"{name}_train_network.py") for name in ("flux", "sd3"))
LEROBOT = "src/lerobot/policies/"
PI0 = ("lerobot", LEROBOT + "pi0/modeling_pi0.py")
SMOLVLA = ("lerobot", LEROBOT + "smolvla/modeling_smolvla.py")
LEROBOT_DIFFUSION = ("lerobot", LEROBOT + "diffusion/modeling_diffusion.py")
POLICY_LOWDIM, POLICY_IMAGE = (
    ("diffusion_policy", f"diffusion_policy/policy/diffusion_unet_{name}_policy.py")
    for name in ("lowdim", "image")
)
SIT, REPA = ("SiT", "transport/transport.py"), ("REPA", "loss.py")
TORCHCFM = ("conditional-flow-matching", "torchcfm/conditional_flow_matching.py")
FLOW_MATCHING = ("flow_matching", "flow_matching/path/scheduler/scheduler.py")


def kohya_settings(sampling, scheme):
    """The arguments that both of kohya-ss' trainers know."""
    settings = {"timestep_sampling": sampling, "weighting_scheme": scheme, "guidance_scale": 1.0}
    settings |= {"discrete_flow_shift": 3.0, "training_shift": 3.0, "sigmoid_scale": 1.0}
    return Anything(**settings, model_prediction_type="raw")


def musubi_tuner(source, model, seen, tau=None, sampling="shift", arranged=lambda flow: flow):
    """`process_batch`: the draw of t, the call and the loss."""
    root = root_of(TRAINERS["musubi-tuner"].variable)
    (times,) = load(root / "src", "musubi_tuner.training.timesteps")
    methods = ("process_batch", "compute_loss", "get_noisy_model_input_and_timesteps")
    namespace = names_of(MUSUBI, tau, **vars(times))
    trainer = bound(source, "NetworkTrainer", methods, namespace, Anything())
    latents, noise = torch.randn(2, *IMAGES).unbind(0)

    def call_dit(args, accelerator, dit, latents, batch, noise, x_t, timesteps, _):
        # The network is called with timesteps / 1000 in some architectures, past 1 by 0.001.
        return SimpleNamespace(pred=dit(x_t, timesteps), target=arranged(noise - latents))

    trainer.call_dit = call_dit
    sigmas = torch.linspace(1, 0.001, 1000)
    config = SimpleNamespace(num_train_timesteps=1000)
    scheduler = SimpleNamespace(sigmas=sigmas, timesteps=sigmas * 1000, config=config)
    settings = kohya_settings(sampling, "none")
    rest = scheduler, torch.float32, torch.float32, None, 0
    given = settings, ACCELERATOR, model, None, {"timesteps": None}, latents, noise
    loss, _ = trainer.process_batch(*given, *rest)
    sigmas = seen["t"] / 1000 if sampling == "sigma" else (seen["t"] - 1) / 1000
    seen.update(t=sigmas.clamp(0, 1), target=noise - latents)
    return loss


def ai_toolkit(
    source, model, seen, tau=None, masked=False, own_target=False, control=False, **config
):
    """`calculate_loss`, given a prediction and all that it was made of."""
    namespace = names_of(AI_TOOLKIT, tau, get_torch_dtype=lambda _: torch.float32)
    namespace["concat_prompt_embeds"] = lambda embeds: embeds
    function = taken(source, "calculate_loss", namespace)
    latents, noise, sigmas, x_t = straight()
    timesteps = 1000 * sigmas.flatten()
    foundation = SimpleNamespace(is_flow_matching=True, prediction_type="flow")
    foundation.scale_loss = lambda loss: loss
    if own_target:
        foundation.get_loss_target = lambda noise, batch, **_: (noise - batch.latents).detach()
    scales = {"pred_scaler": 1.0, "target_noise_multiplier": 1.0}
    settings = Anything(**{**scales, "loss_type": "mse", **config})
    trainer = Anything(train_config=settings, sd=foundation, device_torch="cpu", additional_logs={})
    trainer.predict_noise, trainer._guidance_loss_target_batch = lambda **_: 0 * noise, 3.0
    batch = Anything(get_is_reg_list=list, latents=latents, loss_multiplier_list=[1.0])
    mask = torch.rand(len(latents), 1, *latents.shape[2:]) if masked else torch.ones(1, 1, 1, 1)
    output = model(x_t, timesteps)
    if control:
        x_t = torch.cat([x_t, torch.randn_like(x_t)], dim=1)
    loss = function(trainer, output, noise, x_t, timesteps, batch, mask_multiplier=mask)
    seen.update(t=timesteps / 1000, target=noise - latents, weight=mask.expand(latents.shape))
    return loss


def simple_tuner(source, model, seen, tau=None, mixflow=False, **given):
    """x_t and `loss` of the foundation that all its flow models extend."""
    namespace = names_of(SIMPLE_TUNER, tau, Enum=Enum, random=random)
    types_ = taken(source, "PredictionTypes", namespace)
    foundation = Anything(config=Anything(loss_type="l2"), PREDICTION_TYPE=types_.FLOW_MATCHING)
    methods = (
        *("loss", "get_prediction_target", "get_flow_matching_target", "flow_matching_target"),
        *("noiseward_flow_to_prediction", "prediction_to_noiseward_flow"),
        *("_prepare_flow_noisy_latents", "_mixflow_interpolation_sigmas"),
    )
    bound(source, "ModelFoundation", methods, namespace, foundation)
    foundation.flow_matching_target_direction = lambda: 1.0
    foundation._mixflow_enabled, foundation._mixflow_gamma = lambda: mixflow, lambda: 0.4
    foundation.expand_sigmas = lambda batch: None
    foundation._expand_sigma_values = lambda sigmas, _: sigmas.view(-1, 1, 1, 1)
    latents, noise, sigmas, _ = straight()
    batch = {"latents": latents, "noise": noise, "input_noise": noise, "sigmas": sigmas}
    batch |= {"timesteps": 1000 * sigmas.flatten(), **given}
    foundation._prepare_flow_noisy_latents(batch)
    output = model(batch["noisy_latents"], sigmas.flatten())
    seen.update(target=noise - latents)
    return foundation.loss(batch, {"model_prediction": output})


def kohya(source, model, seen, tau=None, kind=KOHYA_FLUX, scheme="none"):
    """`get_noise_pred_and_target` and the loss lines of `process_batch`; the patch wraps it."""
    flux = kind == KOHYA_FLUX
    (module,) = load_sd_scripts(Path(kind[1]).stem)
    strategy = module.strategy_base.TextEncodingStrategy
    strategy.set_strategy(SimpleNamespace(concat_encodings=lambda *_: (None, None)))
    trainer = module.FluxNetworkTrainer() if flux else module.Sd3NetworkTrainer()
    if tau is not None:
        trainer = skip_step(trainer, SkipSet.for_sampling_steps(20), tau=tau)
    latents = torch.randn(*IMAGES)

    def unet(*given, img=None, timesteps=None, **_):
        if not flux:
            return model(*given)
        x_t = module.flux_utils.unpack_latents(img, *(size // 2 for size in IMAGES[2:]))
        return module.flux_utils.pack_latents(model(x_t, timesteps))

    unet.get_mod_vectors = lambda **_: None
    settings = kohya_settings("shift", scheme)
    scheduler = trainer.get_noise_scheduler(settings, "cpu")
    noise = next_noise(IMAGES)
    conds = (None,) * (4 if flux else 6)
    given = (settings, ACCELERATOR, scheduler, latents, {}, conds, unet, None, torch.float32, True)
    output, target, timesteps, weighting = trainer.get_noise_pred_and_target(*given, is_train=True)
    loss = (output - target).square() * (1 if weighting is None else weighting)
    if scheme == "sigma_sqrt":
        seen.update(weight=(timesteps / 1000).reshape(-1, 1, 1, 1).expand(IMAGES) ** -2)
    seen.update(t=timesteps / 1000, target=noise - latents if flux else latents, output=output)
    return loss.mean([1, 2, 3]).mean()


def policy_scheduler(prediction_type):
    return make_scheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type
    )


def policy(source, model, seen, tau=None, *, kind, prediction_type, masked=True):
    """`compute_loss` of the diffusion policies of lerobot and diffusion_policy.

    lerobot's mask is of padded actions, diffusion_policy's of observations, which it inpaints.
    """
    namespace = {"F": F, "reduce": einops.reduce, "torch": torch}
    namespace |= {"ACTION": "action", "OBS_STATE": "obs", "OBS_IMAGES": "images"}
    namespace["dict_apply"] = lambda data, function: {k: function(v) for k, v in data.items()}
    function = taken(source, "compute_loss", namespace)
    normalizer = MagicMock()
    normalizer.normalize = normalizer["action"].normalize = lambda data: data
    config = Anything(prediction_type=prediction_type, do_mask_loss_for_padding=masked)
    config.horizon, config.n_obs_steps = ACTIONS[1], 2
    settings = {"config": config, "noise_scheduler": policy_scheduler(prediction_type)}
    trainer = Anything(**settings, n_obs_steps=2, normalizer=normalizer)
    trainer._prepare_global_conditioning = lambda _: None
    trainer.mask_generator = lambda _: ~kept
    trainer.obs_encoder = lambda data: data["state"]
    trainer.model = trainer.unet = lambda x_t, t, **_: model(x_t, t)
    if tau is not None:
        trainer.skip_loss = made(*kind, tau, **settings)
    kept = torch.ones(ACTIONS, dtype=torch.bool)
    if kind == LEROBOT_DIFFUSION:
        actions = whole = torch.randn(ACTIONS)
        kept[::2, 3:] = False
        observed = torch.zeros(len(actions), 2, 1)
    else:
        actions, observed = torch.randn(2, *ACTIONS[:2], ACTIONS[2] // 2).unbind(0)
        whole = torch.cat([actions, observed], dim=-1)
        kept[:, :2, actions.shape[2] :] = False
    noise = next_noise(ACTIONS)
    batch = {"action": actions, "action_is_pad": ~kept[..., 0], "images": None}
    batch["obs"] = {"state": observed} if kind == POLICY_IMAGE else observed
    loss = function(trainer, batch)
    weight = kept.float() if masked else torch.ones(ACTIONS)
    if kind == LEROBOT_DIFFUSION:
        weight = weight / weight.mean()
    seen.update(target=noise if prediction_type == "epsilon" else whole, weight=weight)
    return loss


def vla(source, model, seen, tau=None, kind=SMOLVLA):
    """`forward` of π0's and SmolVLA's flow-matching model; the network is ours."""
    masks = dict.fromkeys(("make_att_2d_masks", "prepare_attention_masks_4d"), lambda *_: None)
    owner, more = ("VLAFlowMatching", ()) if kind == SMOLVLA else ("PI0Pytorch", (None,))
    function = taken(source, f"{owner}.forward", names_of(kind, tau, **masks))
    actions, noise = torch.randn(2, *ACTIONS).unbind(0)
    time, mask = torch.rand(len(actions)), torch.ones(len(actions), ACTIONS[1])

    def embed_suffix(*inputs):
        return (model(*inputs[-2:]), mask, mask, *more)

    expert = MagicMock(forward=lambda inputs_embeds, **_: ((None, inputs_embeds[1]), None))
    policy = SimpleNamespace(
        _apply_checkpoint=lambda function, *inputs: function(*inputs),
        action_out_proj=lambda x: x,
        config=SimpleNamespace(chunk_size=ACTIONS[1]),
        embed_prefix=lambda *_, **__: (mask, mask, mask),
        embed_suffix=embed_suffix,
        paligemma_with_expert=expert,
        vlm_with_expert=expert,
    )
    seen.update(target=noise - actions)
    return function(policy, None, None, None, None, None, actions, noise, time).mean()


def sit(source, model, seen, tau=None, path_type="LINEAR", model_type="VELOCITY"):
    """`Transport.training_losses`."""
    with checkout_on_path(root_of("S2DM_SIT_ROOT"), stubs("torchdiffeq")):
        module = importlib.import_module("transport.transport")
        exec(compile(source, "transport.py", "exec"), vars(module))  # noqa: S102 - theirs
    if tau is not None:
        module.SkipStepLoss = partial(SkipStepLoss, tau=tau)
    away = 0.0 if model_type == "VELOCITY" and path_type != "VP" else 1e-3
    kinds = {"model_type": module.ModelType[model_type], "path_type": module.PathType[path_type]}
    kinds["loss_type"] = module.WeightType["NONE"]
    transport = module.Transport(**kinds, train_eps=away, sample_eps=away)
    x1, x0 = torch.randn(IMAGES), next_noise(IMAGES)
    loss = transport.training_losses(model, x1)["loss"].mean()
    plan = transport.path_sampler
    t, _, ut = plan.plan(seen["t"], x0, x1)
    sigma = plan.compute_sigma_t(t.reshape(-1, 1, 1, 1))[0]
    targets = {"VELOCITY": ut, "NOISE": x0, "SCORE": -x0 / sigma}
    seen.update(target=targets[model_type])
    if model_type == "SCORE":
        seen.update(weight=(sigma**2).expand(IMAGES))
    return loss


def repa(source, model, seen, tau=None, path_type="linear"):
    """`SILoss`: its denoising loss; the projection loss is another term."""
    namespace = {}
    exec(compile(source, "loss.py", "exec"), namespace)  # noqa: S102 - a trainer's
    if tau is not None:
        namespace["SkipStepLoss"] = partial(SkipStepLoss, tau=tau)
    loss = namespace["SILoss"](path_type=path_type, encoders=[None])
    images = torch.randn(IMAGES)
    with torch.random.fork_rng():
        _, _, d_alpha, d_sigma = loss.interpolant(torch.rand(len(images), 1, 1, 1))
        seen.update(target=d_alpha * images + d_sigma * torch.randn_like(images))
    features = [torch.ones(len(images), 3, 5)]
    denoising, _ = loss(lambda x_t, t: (model(x_t, t), features), images, zs=features)
    return denoising.mean()


def torchcfm(source, model, seen, tau=None):
    """The loop of the library's examples, and the page's."""
    with checkout_on_path(root_of("S2DM_TORCHCFM_ROOT"), stubs("ot")):
        page = snippets_of(PAGES / "flow.md", None, "torchcfm")
    x0, x1 = torch.randn(2, *IMAGES).unbind(0)
    with torch.random.fork_rng():
        t, xt, ut = page["matcher"].sample_location_and_conditional_flow(x0, x1)
    seen.update(target=ut)
    if tau is None:
        return (model(xt, t) - ut).square().mean()
    schedule, skips = page["turned"].schedule, page["turned"].skip_set
    turned = SkipStepLoss(schedule, skips, tau=tau, prediction_type="velocity")
    return page["loss_of"](lambda t, x_t: model(x_t, t), x0, x1, turned)


SCHEDULERS = {
    "CondOTScheduler": lambda t: (t, 1 - t),
    "PolynomialConvexScheduler": lambda t: (t**2, 1 - t**2),
    "VPScheduler": lambda t: (
        torch.exp(-0.25 * (1 - t) ** 2 * 19.9 - 0.05 * (1 - t)),
        (-torch.expm1(-0.5 * (1 - t) ** 2 * 19.9 - 0.1 * (1 - t))).sqrt(),
    ),
    "LinearVPScheduler": lambda t: (t, (1 - t**2).sqrt()),
    "CosineScheduler": lambda t: (torch.sin(torch.pi / 2 * t), torch.cos(torch.pi / 2 * t)),
}
"""flow_matching's schedulers, in our words: α and σ, with data at t = 1."""


def flow_matching(source, model, seen, tau=None, scheduler="CondOTScheduler"):
    """The loop of the library's image example, and the page's."""
    with checkout_on_path(root_of("S2DM_FLOW_MATCHING_ROOT"), stubs("torchdiffeq")):
        page = snippets_of(PAGES / "flow.md", None, "flow_matching")
        schedulers = importlib.import_module("flow_matching.path.scheduler.scheduler")
    kind = getattr(schedulers, scheduler)
    path = kind(2) if scheduler == "PolynomialConvexScheduler" else kind()
    affine = page["AffineProbPath"](path)
    x_0, x_1 = torch.randn(2, *IMAGES).unbind(0)
    t = 0.001 + 0.998 * torch.rand(len(x_0))
    sample = affine.sample(t=t, x_0=x_0, x_1=x_1)
    seen.update(target=sample.dx_t)
    if tau is None:
        return (model(sample.x_t, t) - sample.dx_t).square().mean()
    return page["loss_of"](model, x_0, x_1, t, affine, page["make_criterion"](path, tau=tau))


class Case(NamedTuple):
    """A trainer's loss with some of its options, and what our loss on it has to be."""

    file: tuple[str, str]
    run: Callable[..., Tensor]
    options: dict[str, Any]
    schedule: Any
    """Said without the patch, as is the prediction type."""
    predicts: str

    @property
    def name(self):
        label = f"{self.file[0]} {Path(self.file[1]).stem}"
        return " ".join([label, *(f"{k}={v}" for k, v in self.options.items() if k != "kind")])

    def loss(self, source, model, seen, tau=None, **options):
        """The loss on a (patched) source; `seen` keeps the last call of the model."""

        def watched(x_t, t):
            seen.update(x_t=x_t.detach().clone(), t=t.detach().clone())
            seen["output"] = model(x_t, t)
            return seen["output"]

        return self.run(source, watched, seen, tau, **options)


def _cases():
    turned = functools.partial(ContinuousSchedule.from_alpha_sigma, data_at=1)
    linear, cosine = (turned(SCHEDULERS[kind]) for kind in ("CondOTScheduler", "CosineScheduler"))
    flow = ContinuousSchedule.flow()
    from_data = ContinuousSchedule.from_alpha_sigma(
        lambda t: (torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t))
    )
    for kind, path in {"linear": flow, "cosine": from_data}.items():
        yield Case(REPA, repa, {"path_type": kind}, path, "velocity")
    paths = {"LINEAR": linear, "GVP": cosine, "VP": ContinuousSchedule.vp(data_at=1)}
    types_ = {"VELOCITY": "velocity", "NOISE": "epsilon", "SCORE": "score"}
    for path_type, model_type in itertools.product(paths, types_):
        options = {"path_type": path_type, "model_type": model_type}
        yield Case(SIT, sit, options, paths[path_type], types_[model_type])
    yield Case(TORCHCFM, torchcfm, {}, linear, "velocity")
    for kind, path in SCHEDULERS.items():
        schedule = turned(path, min_time=1e-5)
        yield Case(FLOW_MATCHING, flow_matching, {"scheduler": kind}, schedule, "velocity")
    for sampling in ("shift", "uniform", "sigma"):
        yield Case(MUSUBI, musubi_tuner, {"sampling": sampling}, flow, "flow")
    for masked in (False, True):
        yield Case(AI_TOOLKIT, ai_toolkit, {"masked": masked}, flow, "flow")
    yield Case(SIMPLE_TUNER, simple_tuner, {}, flow, "flow")
    yield Case(KOHYA_FLUX, kohya, {"kind": KOHYA_FLUX}, flow, "flow")
    yield Case(KOHYA_SD3, kohya, {"kind": KOHYA_SD3, "scheme": "sigma_sqrt"}, flow, "sample")
    path = NoiseSchedule.from_betas(policy_scheduler("epsilon").betas.double())
    for predicts in ("epsilon", "sample"):
        options = {"prediction_type": predicts}
        for masked in (False, True):
            given = {"kind": LEROBOT_DIFFUSION, **options, "masked": masked}
            yield Case(LEROBOT_DIFFUSION, policy, given, path, predicts)
        for kind in (POLICY_LOWDIM, POLICY_IMAGE):
            yield Case(kind, policy, {"kind": kind, **options}, path, predicts)
    for kind in (PI0, SMOLVLA):
        yield Case(kind, vla, {"kind": kind}, flow, "flow")


CASES = list(_cases())
