"""The losses of today's flow and robotics trainers, by their own code from checkouts.

Their modules import much that the loss does not use, so its functions are taken out of the source.
Each trainer here is a function `loss(source, model, seen)` of the (patched) text of a file: it
draws a batch from the global random state, calls `model(x_t, t)`, keeps the last call in `seen`
and returns the loss.
"""

import ast
import functools
import importlib
import random
import textwrap
import types
from collections.abc import Callable
from enum import Enum
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import einops
import torch
from torch import Tensor
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, SkipSet, SkipStepLoss
from s2dm_loss.adapters.diffusers import SkipLoss
from s2dm_loss.adapters.sd_scripts import skip_step
from tests.helpers.diffusers_parts import make_scheduler
from tests.helpers.patches import PAGES, TRAINERS, patch_of
from tests.helpers.sd_scripts_parts import ACCELERATOR, load_sd_scripts
from tests.helpers.upstream import checkout_on_path, load, root_of, stubs
from tests.test_docs_blocks import snippets_of

IMAGES, ACTIONS = (8, 4, 8, 8), (8, 6, 4)


class Anything:
    """Settings that are off unless said."""

    def __init__(self, **settings):
        vars(self).update(settings)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return


def source_of(trainer, path):
    return (root_of(TRAINERS[trainer].variable) / path).read_text(encoding="utf-8")


def taken(source, name, namespace):
    """A function or class of a source, by its name or as `Class.name`, defined in a namespace."""
    within, _, name = name.rpartition(".")
    places = _nodes(source)
    if within:
        (place,) = (n for n in places if isinstance(n, ast.ClassDef) and n.name == within)
        places = place.body
    kinds = (ast.FunctionDef, ast.ClassDef)
    node = next(n for n in places if isinstance(n, kinds) and n.name == name)
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    text = "from __future__ import annotations\n" + textwrap.dedent("\n".join(lines))
    exec(compile(text, name, "exec"), namespace)  # noqa: S102
    return namespace[name]


@lru_cache(maxsize=32)
def _nodes(source):
    return list(ast.walk(ast.parse(source)))


def maker(trainer, path):
    """The lines of a patch that make the loss."""
    for hunk in patch_of(trainer, path).hunks:
        added = [line[1:] for line in hunk if line[0] == "+"]
        if any("skip_loss = " in line.lower() for line in added):
            return textwrap.dedent("\n".join(added))
    raise LookupError(f"{path} makes no loss")


def made(trainer, path, tau, **names):
    """The loss that a patch makes, at this τ."""
    owner = SimpleNamespace(**names)
    namespace = {
        **names,
        "ContinuousSchedule": ContinuousSchedule,
        "SkipSet": SkipSet,
        "SkipStepLoss": partial(SkipStepLoss, tau=tau),
        "SkipLoss": SimpleNamespace(from_scheduler=partial(SkipLoss.from_scheduler, tau=tau)),
        "self": owner,
        "torch": torch,
    }
    exec(maker(trainer, path), namespace)  # noqa: S102
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


def drawn_again(state, draw):
    """What came first from a state of the random stream, which stays where it is."""
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        return draw()


def watched(model, seen):
    def call(x_t, t):
        seen.update(x_t=x_t.detach().clone(), t=t.detach().clone())
        seen["output"] = model(x_t, t)
        return seen["output"]

    return call


MUSUBI = ("musubi-tuner", "src/musubi_tuner/training/trainer_base.py")
AI_TOOLKIT = ("ai-toolkit", "extensions_built_in/sd_trainer/SDTrainer.py")
SIMPLE_TUNER = ("SimpleTuner", "simpletuner/helpers/models/common.py")
KOHYA_FLUX, KOHYA_SD3 = (("sd-scripts", f"{name}_train_network.py") for name in ("flux", "sd3"))
LEROBOT = "src/lerobot/policies/"
LEROBOT_DIFFUSION = ("lerobot", LEROBOT + "diffusion/modeling_diffusion.py")
PI0 = ("lerobot", LEROBOT + "pi0/modeling_pi0.py")
SMOLVLA = ("lerobot", LEROBOT + "smolvla/modeling_smolvla.py")
DIFFUSION_POLICY = "diffusion_policy/policy/diffusion_unet_{}_policy.py"
POLICY_LOWDIM, POLICY_IMAGE = (
    ("diffusion_policy", DIFFUSION_POLICY.format(name)) for name in ("lowdim", "image")
)


def musubi_tuner(source, model, seen, tau=None, sampling="shift"):
    """`process_batch`: the draw of t, the call and the loss."""
    root = root_of(TRAINERS["musubi-tuner"].variable)
    (times,) = load(root / "src", "musubi_tuner.training.timesteps")
    methods = ("process_batch", "compute_loss", "get_noisy_model_input_and_timesteps")
    namespace = names_of(MUSUBI, tau, **vars(times))
    trainer = bound(source, "NetworkTrainer", methods, namespace, Anything())
    latents, noise = torch.randn(2, *IMAGES).unbind(0)

    def call_dit(args, accelerator, dit, latents, batch, noise, x_t, timesteps, _):
        # The network is called with timesteps / 1000 in some architectures, past 1 by 0.001.
        return SimpleNamespace(pred=dit(x_t, timesteps), target=noise - latents)

    trainer.call_dit = call_dit
    settings = Anything(
        timestep_sampling=sampling,
        weighting_scheme="none",
        discrete_flow_shift=3.0,
        sigmoid_scale=1.0,
    )
    scheduler = SimpleNamespace(sigmas=torch.linspace(1, 0.001, 1000))
    scheduler.timesteps = scheduler.sigmas * 1000
    scheduler.config = SimpleNamespace(num_train_timesteps=1000)
    dit, given = watched(model, seen), {"timesteps": None}
    rest = scheduler, torch.float32, torch.float32, None, 0
    accelerator = SimpleNamespace(device="cpu")
    loss, _ = trainer.process_batch(settings, accelerator, dit, None, given, latents, noise, *rest)
    sigmas = seen["t"] / 1000 if sampling == "sigma" else (seen["t"] - 1) / 1000
    seen.update(t=sigmas.clamp(0, 1), target=noise - latents)
    return loss


def ai_toolkit(source, model, seen, tau=None, masked=False):
    """`calculate_loss`, given a prediction and all that it was made of."""
    namespace = names_of(
        AI_TOOLKIT, tau, F=torch.functional, get_torch_dtype=lambda _: torch.float32
    )
    function = taken(source, "SDTrainer.calculate_loss", namespace)
    latents, noise, sigmas, x_t = straight()
    timesteps = 1000 * sigmas.flatten()
    trainer = Anything(
        train_config=Anything(pred_scaler=1.0, target_noise_multiplier=1.0, loss_type="mse"),
        sd=SimpleNamespace(
            is_flow_matching=True, prediction_type="flow", scale_loss=lambda loss: loss
        ),
        device_torch="cpu",
        additional_logs={},
    )
    batch = Anything(
        get_is_reg_list=lambda: [False] * len(latents),
        latents=latents,
        loss_multiplier_list=[1.0] * len(latents),
    )
    mask = torch.rand(len(latents), 1, *latents.shape[2:]) if masked else torch.ones(1, 1, 1, 1)
    output = watched(model, seen)(x_t, timesteps)
    loss = function(trainer, output, noise, x_t, timesteps, batch, mask_multiplier=mask)
    seen.update(t=timesteps / 1000, target=noise - latents, weight=mask.expand(latents.shape))
    return loss


def simple_tuner(source, model, seen, tau=None):
    """`loss` of the foundation that all its flow models extend."""
    namespace = names_of(SIMPLE_TUNER, tau, Enum=Enum, random=random)
    types_ = taken(source, "PredictionTypes", namespace)
    foundation = Anything(config=Anything(loss_type="l2"), PREDICTION_TYPE=types_.FLOW_MATCHING)
    methods = (
        *("loss", "get_prediction_target", "get_flow_matching_target", "flow_matching_target"),
        *("noiseward_flow_to_prediction", "prediction_to_noiseward_flow"),
    )
    bound(source, "ModelFoundation", methods, namespace, foundation)
    foundation.flow_matching_target_direction = lambda: 1.0
    latents, noise, sigmas, x_t = straight()
    batch = {
        "latents": latents,
        "noise": noise,
        "noisy_latents": x_t,
        "sigmas": sigmas,
        "timesteps": 1000 * sigmas.flatten(),
    }
    output = watched(model, seen)(x_t, sigmas.flatten())
    seen.update(target=noise - latents)
    return foundation.loss(batch, {"model_prediction": output})


def kohya(source, model, seen, tau=None, kind=KOHYA_FLUX, scheme="none"):
    """`get_noise_pred_and_target`, and the loss lines of `process_batch` for it.

    The patch wraps the trainer.
    """
    flux = kind == KOHYA_FLUX
    (module,) = load_sd_scripts(Path(kind[1]).stem)
    encodings = SimpleNamespace(concat_encodings=lambda *_: (None, None))
    module.strategy_base.TextEncodingStrategy.set_strategy(encodings)
    trainer = module.FluxNetworkTrainer() if flux else module.Sd3NetworkTrainer()
    if tau is not None:
        trainer = skip_step(trainer, SkipSet.for_sampling_steps(20), tau=tau)
    latents = torch.randn(*IMAGES)
    call = watched(model, seen)
    height, width = latents.shape[2] // 2, latents.shape[3] // 2

    class Unet:
        def get_mod_vectors(self, **_):
            return None

        def __call__(self, *args, **kwargs):
            if not flux:
                return call(*args)
            x_t = module.flux_utils.unpack_latents(kwargs["img"], height, width)
            return module.flux_utils.pack_latents(call(x_t, kwargs["timesteps"]))

    settings = Anything(
        timestep_sampling="shift",
        discrete_flow_shift=3.0,
        sigmoid_scale=1.0,
        training_shift=3.0,
        guidance_scale=1.0,
        model_prediction_type="raw",
        weighting_scheme=scheme,
        logit_mean=0.0,
        logit_std=1.0,
        mode_scale=1.29,
    )
    scheduler = trainer.get_noise_scheduler(settings, "cpu")
    before = torch.get_rng_state()
    conds, rest = (None,) * (4 if flux else 6), (Unet(), None, torch.float32, True)
    given = (settings, ACCELERATOR, scheduler, latents, {}, conds, *rest)
    output, target, timesteps, weighting = trainer.get_noise_pred_and_target(*given, is_train=True)
    noise = drawn_again(before, lambda: torch.randn_like(latents))
    loss = F.mse_loss(output.float(), target.float(), reduction="none")
    if weighting is not None:
        loss = loss * weighting
    if not flux:
        sigmas = (timesteps / 1000).reshape(-1, 1, 1, 1)
        weigh = module.sd3_train_utils.compute_loss_weighting_for_sd3
        weighting = weigh(weighting_scheme=scheme, sigmas=sigmas)
        seen.update(weight=weighting.expand(latents.shape))
    seen.update(t=timesteps / 1000, target=noise - latents if flux else latents, output=output)
    return loss.mean([1, 2, 3]).mean()


def lerobot_diffusion(source, model, seen, tau=None, prediction_type="epsilon", masked=False):
    """`compute_loss` of the diffusion policy, on its own scheduler: T = 100, cosine."""
    names = ("ACTION", "OBS_STATE", "OBS_IMAGES", "OBS_ENV_STATE")
    namespace = {"F": F, "torch": torch, **dict(zip(names, names, strict=True)), "ACTION": "action"}
    function = taken(source, "DiffusionModel.compute_loss", namespace)
    scheduler = policy_scheduler(prediction_type)
    config = SimpleNamespace(
        do_mask_loss_for_padding=masked,
        horizon=ACTIONS[1],
        n_obs_steps=2,
        prediction_type=prediction_type,
    )
    policy = SimpleNamespace(
        _prepare_global_conditioning=lambda _: None,
        config=config,
        noise_scheduler=scheduler,
        unet=lambda x_t, t, **_: watched(model, seen)(x_t, t),
    )
    if tau is not None:
        names_ = {"noise_scheduler": scheduler, "config": config}
        policy.skip_loss = made(*LEROBOT_DIFFUSION, tau, **names_)
    actions, state = torch.randn(ACTIONS), torch.get_rng_state()
    is_pad = torch.zeros(ACTIONS[:2], dtype=torch.bool)
    is_pad[::2, 3:] = True
    batch = {
        "OBS_STATE": torch.zeros(len(actions), 2, 1),
        "OBS_ENV_STATE": None,
        "action": actions,
        "action_is_pad": is_pad,
    }
    loss = function(policy, batch)
    noise = drawn_again(state, lambda: torch.randn(ACTIONS))
    seen.update(target=noise if prediction_type == "epsilon" else actions)
    if masked:
        weight = (~is_pad).float()[..., None].expand(ACTIONS)
        seen.update(weight=weight / weight.mean())
    return loss


def policy_scheduler(prediction_type):
    return make_scheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
    )


def vla(source, model, seen, tau=None, kind=SMOLVLA):
    """`forward` of π0's and SmolVLA's flow-matching model; the network is ours."""
    masks = dict.fromkeys(("make_att_2d_masks", "prepare_attention_masks_4d"), lambda *_: None)
    namespace = names_of(kind, tau, **masks)
    owner = "VLAFlowMatching" if kind == SMOLVLA else "PI0Pytorch"
    function = taken(source, f"{owner}.forward", namespace)
    actions, noise = torch.randn(2, *ACTIONS).unbind(0)
    time = torch.rand(len(actions))
    mask = torch.ones(len(actions), ACTIONS[1])
    call = watched(model, seen)

    def embed_suffix(*inputs):
        x_t, t = inputs[-2:]
        more = () if kind == SMOLVLA else (None,)
        return (call(x_t, t), mask, mask, *more)

    def forward(inputs_embeds, **_):
        return (None, inputs_embeds[1]), None

    layer = SimpleNamespace(
        self_attn=SimpleNamespace(q_proj=SimpleNamespace(weight=torch.zeros(1)))
    )
    language = SimpleNamespace(language_model=SimpleNamespace(layers=[layer]))
    expert = SimpleNamespace(forward=forward, paligemma=SimpleNamespace(model=language))
    policy = SimpleNamespace(
        _apply_checkpoint=lambda function, *inputs: function(*inputs),
        action_out_proj=lambda x: x,
        config=SimpleNamespace(chunk_size=ACTIONS[1]),
        embed_prefix=lambda *_, **__: (mask, mask, mask),
        embed_suffix=embed_suffix,
        paligemma_with_expert=expert,
        vlm_with_expert=expert,
    )
    each = function(policy, None, None, None, None, None, actions, noise, time)
    seen.update(target=noise - actions)
    return each.mean()


def diffusion_policy(source, model, seen, tau=None, kind=POLICY_LOWDIM, prediction_type="epsilon"):
    """`compute_loss` of diffusion_policy, with observations inpainted: their part is masked."""
    namespace = {"F": F, "reduce": einops.reduce, "torch": torch}
    namespace["dict_apply"] = lambda data, function: {k: function(v) for k, v in data.items()}
    lowdim = kind == POLICY_LOWDIM
    owner = "DiffusionUnetLowdimPolicy" if lowdim else "DiffusionUnetImagePolicy"
    function = taken(source, f"{owner}.compute_loss", namespace)
    scheduler = policy_scheduler(prediction_type)
    half = (*ACTIONS[:2], ACTIONS[2] // 2)
    actions, observed = torch.randn(2, *half).unbind(0)
    mask = torch.zeros(ACTIONS, dtype=torch.bool)
    mask[:, :2, half[2] :] = True

    class Normalizer:
        normalize = staticmethod(lambda data: data)

        def __getitem__(self, _):
            return self

    policy = Anything(
        mask_generator=lambda _: mask,
        model=lambda x_t, t, **_: watched(model, seen)(x_t, t),
        n_obs_steps=2,
        noise_scheduler=scheduler,
        normalizer=Normalizer(),
        obs_encoder=lambda data: data["state"],
    )
    if tau is not None:
        policy.skip_loss = made(*kind, tau, noise_scheduler=scheduler)
    state = torch.get_rng_state()
    batch = {"action": actions, "obs": observed if lowdim else {"state": observed}}
    loss = function(policy, batch)
    noise = drawn_again(state, lambda: torch.randn(ACTIONS))
    whole = torch.cat([actions, observed], dim=-1)
    seen.update(target=noise if prediction_type == "epsilon" else whole, weight=(~mask).float())
    return loss


SIT, REPA = ("SiT", "transport/transport.py"), ("REPA", "loss.py")


def sit(source, model, seen, tau=None, path_type="LINEAR", model_type="VELOCITY"):
    """`Transport.training_losses`."""
    with checkout_on_path(root_of("S2DM_SIT_ROOT"), stubs("torchdiffeq")):
        module = importlib.import_module("transport.transport")
        exec(compile(source, "transport.py", "exec"), vars(module))  # noqa: S102
    if tau is not None:
        module.SkipStepLoss = partial(SkipStepLoss, tau=tau)
    away = 0.0 if model_type == "VELOCITY" and path_type != "VP" else 1e-3
    transport = module.Transport(
        model_type=module.ModelType[model_type],
        path_type=module.PathType[path_type],
        loss_type=module.WeightType["NONE"],
        train_eps=away,
        sample_eps=away,
    )
    x1, before = torch.randn(IMAGES), torch.get_rng_state()
    loss = transport.training_losses(watched(model, seen), x1)["loss"].mean()
    x0 = drawn_again(before, lambda: torch.randn_like(x1))
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
    exec(compile(source, "loss.py", "exec"), namespace)  # noqa: S102
    if tau is not None:
        namespace["SkipStepLoss"] = partial(SkipStepLoss, tau=tau)
    loss = namespace["SILoss"](path_type=path_type, encoders=[None])
    images, before = torch.randn(IMAGES), torch.get_rng_state()
    features = [torch.ones(len(images), 3, 5)]

    def network(x_t, t):
        return watched(model, seen)(x_t, t), features

    denoising, _ = loss(network, images, zs=features)
    torch.set_rng_state(before)
    t = torch.rand(len(images), 1, 1, 1)
    _, _, d_alpha, d_sigma = loss.interpolant(t)
    seen.update(target=d_alpha * images + d_sigma * torch.randn_like(images))
    return denoising.mean()


TORCHCFM = ("conditional-flow-matching", "torchcfm/conditional_flow_matching.py")
FLOW_MATCHING = ("flow_matching", "flow_matching/path/scheduler/scheduler.py")
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


flow_snippets = functools.partial(snippets_of, PAGES / "flow.md", None)


def torchcfm(source, model, seen, tau=None):
    """The loop of the library's examples, and the page's."""
    with checkout_on_path(root_of("S2DM_TORCHCFM_ROOT"), stubs("ot")):
        page = flow_snippets("torchcfm")
    x0, x1 = torch.randn(2, *IMAGES).unbind(0)
    before = torch.get_rng_state()
    call = watched(model, seen)

    def network(t, x_t):
        return call(x_t, t)

    t, xt, ut = page["matcher"].sample_location_and_conditional_flow(x0, x1)
    seen.update(target=ut)
    if tau is not None:
        turned = SkipStepLoss(
            page["turned"].schedule, page["turned"].skip_set, tau=tau, prediction_type="velocity"
        )
        torch.set_rng_state(before)
        return page["loss_of"](network, x0, x1, turned)
    return (network(t, xt) - ut).square().mean()


def flow_matching(source, model, seen, tau=None, scheduler="CondOTScheduler"):
    """The loop of the library's image example, and the page's."""
    with checkout_on_path(root_of("S2DM_FLOW_MATCHING_ROOT"), stubs("torchdiffeq")):
        page = flow_snippets("flow_matching")
        schedulers = importlib.import_module("flow_matching.path.scheduler.scheduler")
    kind = getattr(schedulers, scheduler)
    made_ = kind(2) if scheduler == "PolynomialConvexScheduler" else kind()
    affine = page["AffineProbPath"](made_)
    x_0, x_1 = torch.randn(2, *IMAGES).unbind(0)
    t = 0.001 + 0.998 * torch.rand(len(x_0))
    call = watched(model, seen)
    sample = affine.sample(t=t, x_0=x_0, x_1=x_1)
    seen.update(target=sample.dx_t)
    if tau is not None:
        criterion = page["make_criterion"](made_, tau=tau)
        return page["loss_of"](call, x_0, x_1, t, affine, criterion)
    return (call(sample.x_t, t) - sample.dx_t).square().mean()


class Case(NamedTuple):
    """A trainer's loss with some of its options, and what our loss on it is made for."""

    file: tuple[str, str]
    loss: Callable[..., Tensor]
    options: dict[str, Any]

    @property
    def name(self):
        label = f"{self.file[0]} {Path(self.file[1]).stem}"
        return " ".join([label, *(f"{k}={v}" for k, v in self.options.items() if k != "kind")])


def _cases():
    cases = [Case(REPA, repa, {"path_type": kind}) for kind in ("linear", "cosine")]
    for path_type in ("LINEAR", "GVP", "VP"):
        for model_type in ("VELOCITY", "NOISE", "SCORE"):
            cases.append(Case(SIT, sit, {"path_type": path_type, "model_type": model_type}))
    cases += [Case(TORCHCFM, torchcfm, {})]
    cases += [Case(FLOW_MATCHING, flow_matching, {"scheduler": kind}) for kind in SCHEDULERS]
    cases += [Case(MUSUBI, musubi_tuner, {"sampling": s}) for s in ("shift", "uniform", "sigma")]
    cases += [Case(AI_TOOLKIT, ai_toolkit, {"masked": on}) for on in (False, True)]
    cases += [Case(SIMPLE_TUNER, simple_tuner, {})]
    cases += [Case(KOHYA_FLUX, kohya, {"kind": KOHYA_FLUX})]
    cases += [Case(KOHYA_SD3, kohya, {"kind": KOHYA_SD3, "scheme": "sigma_sqrt"})]
    for prediction_type in ("epsilon", "sample"):
        options = {"prediction_type": prediction_type}
        for masked in (False, True):
            cases.append(Case(LEROBOT_DIFFUSION, lerobot_diffusion, {**options, "masked": masked}))
        for kind in (POLICY_LOWDIM, POLICY_IMAGE):
            cases.append(Case(kind, diffusion_policy, {"kind": kind, **options}))
    cases += [Case(kind, vla, {"kind": kind}) for kind in (PI0, SMOLVLA)]
    return cases


CASES = _cases()
