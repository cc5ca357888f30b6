"""Every trainer that has an adapter or a patch, as one loss of `(model, tau)`, and what it must be.

`tests/test_adapters.py` holds each to that. A real trainer comes from a checkout, or is skipped.
"""

import contextlib
import functools
import importlib
import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet
from s2dm_loss.adapters import denoising_diffusion_pytorch as lucid_adapter
from s2dm_loss.adapters import edm as edm_adapter
from s2dm_loss.adapters import guided_diffusion as guided_adapter
from s2dm_loss.adapters import score_sde as score_sde_adapter
from s2dm_loss.adapters import sd_scripts as sd_scripts_adapter
from s2dm_loss.adapters.ddim import ddim_loss
from tests.doubles import ddim_double, edm_double, score_sde_double, sd_scripts_double
from tests.doubles import denoising_diffusion_pytorch_double as lucid_double
from tests.helpers import sd_scripts_parts as parts
from tests.helpers import trainers_of_today, upstream
from tests.helpers.checkouts import load_ddim, load_score_sde
from tests.helpers.guided_diffusion_parts import KIN, make_diffusion, modules_of
from tests.helpers.patches import patched
from tests.helpers.sd_scripts_parts import AT_THE_END, OPTIONS, REAL_OPTIONS
from tests.helpers.small import every_pair
from tests.helpers.upstream import checkout_on_path, root_of, stubs

SEED = 3  # of all random numbers in one call of a loss
BOTH = (True, False)


class Case(NamedTuple):
    """A trainer's loss with some of its options."""

    name: str
    loss: Callable[..., Any]
    """Of the model, τ (None: the trainer's own) and options of `SkipStepLoss`."""
    schedule: Any = None  # what x_t is made with, as the papers say it
    skips: Any = 9
    predicts: str = "epsilon"
    reference: Callable[..., Any] | None = None
    """Of x_t, t and the output: the core's output, target and t, and a weight of each element.
    None: no squared error of the output alone."""
    rtol: float = 0.0  # of the comparison at τ = 1; 0 is bit for bit
    channels: int = 2  # of x_t; 0 where the network is not called with images
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] | None = None
    """Those of `SkipStepLoss` that a patch sets itself: it takes no other but τ."""
    unscaled: Callable[..., Any] = lambda x, _: x
    """x_t itself, of what the network sees of it and t."""


def column(values):
    return values.reshape(-1, 1, 1, 1)


def reference_of(path, predicts, x0_of, times=None):
    """The reference of a trainer that makes x_t of x_0 and noise at its times, or the network's."""

    def reference(x_t, seen, output):
        x0, t = x0_of() if callable(x0_of) else x0_of, seen if times is None else times
        a, b = map(column, path.alpha_sigma(t))
        noise = (x_t - a * x0) / b
        targets = {"epsilon": noise, "sample": x0, "flow": noise - x0}
        return output, {**targets, "v_prediction": a * noise - b * x0}[predicts], t

    return reference


def of_each(name, real, double):
    """A trainer's double, and its own code: (label, what returns it)."""
    return [(f"{name} double", lambda: double), (f"{name} real", functools.cache(real))]


# ermongroup/ddim: the noise and t are given.
DDIM = of_each("ddim", lambda: load_ddim(root_of("S2DM_DDIM_ROOT")), ddim_double)
DDIM_OPTIONS = (
    *(("linear", 1000, "sum", False), ("quad", 50, "mean", True), ("const", 1000, "sum", True)),
    *(("jsd", 1000, "mean", False), ("sigmoid", 50, "sum", False)),
)


def ddim_betas(trainer, schedule, steps):
    return trainer.get_beta_schedule(
        schedule, beta_start=1e-4, beta_end=0.02, num_diffusion_timesteps=steps
    )


def ddim(label, trainer, schedule, steps, reduction, keepdim):
    x0, e = torch.randn(2, 6, 2, 5, 5, generator=torch.Generator().manual_seed(5)).unbind(0)
    t = torch.tensor([steps - 1, 3, steps // 2, 0, 9, 8])  # both sides of the skip, interleaved

    def loss(model, tau=None, **options):
        b = torch.from_numpy(ddim_betas(trainer(), schedule, steps)).float()
        if tau is None:
            summed = trainer().noise_estimation_loss(model, x0, t, e, b, keepdim)
            return summed if reduction == "sum" else summed / x0[0].numel()
        ours = ddim_loss(9, tau=tau, data_reduction=reduction, **options)
        return ours(model, x0, t, e, b, keepdim)

    path = NoiseSchedule.from_betas(ddim_betas(ddim_double, schedule, steps))
    name, predicts = f"{label} {schedule} {reduction}", "epsilon"
    return Case(name, loss, path, 9, predicts, lambda _, __, output: (output, e, t), rtol=2e-6)


# lucidrains/denoising-diffusion-pytorch: the noise is drawn, with an offset.
PYTORCH = "denoising-diffusion-pytorch"
LUCID = of_each(PYTORCH, lambda: upstream.denoising_diffusion_pytorch()[0], lucid_double)
TIMES = torch.tensor([0, 8, 9, 300, 700, 999])
OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def lucid(name, package, made, path=None, size=(8, 8), self_condition=False, **given):
    """Without a path only the value at τ = 1 is known."""
    x0 = 2 * torch.rand(6, 3, *size, generator=torch.Generator().manual_seed(5)) - 1
    kind, side = "GaussianDiffusion", "image_size"
    if len(size) == 1:
        kind, side = "GaussianDiffusion1D", "seq_length"
    made = {"timesteps": 1000, side: size[0], **made}

    def loss(model, tau=None, **options):
        vars(model).update(channels=3, out_dim=3, self_condition=self_condition)
        model.random_or_learned_sinusoidal_cond = False
        diffusion = getattr(package(), kind)(model, **made)
        if tau is not None:
            diffusion = lucid_adapter.skip_step(diffusion, 9, tau=tau, **options)
        return diffusion.p_losses(x0, TIMES, **given)

    predicts = OBJECTIVES.get(made.get("objective"))
    reference = reference_of(path, predicts, x0, TIMES) if path else None
    return Case(name, loss, path, 9, predicts, reference, channels=3 * (len(size) == 2))


def lucid_cases():
    grid = every_pair(
        objective=OBJECTIVES, beta_schedule=lucid_double.SCHEDULES, min_snr_loss_weight=BOTH
    )
    for (label, package), case in itertools.product(LUCID, grid):
        betas = lucid_double.SCHEDULES[case["beta_schedule"]](1000).float()
        name = " ".join(map(str, (label, *case.values())))
        made = {**case, "offset_noise_strength": 0.1}
        yield lucid(name, package, made, NoiseSchedule.from_betas(betas), loss_reduction="none")
    # Options of the trainer's own alone, and files with a class of the same name or of 1D.
    for file, options in {
        "classifier_free_guidance": {"classes": torch.arange(6)},
        "repaint": {},
        "guided_diffusion": {},
        "denoising_diffusion_pytorch_1d": {"size": (16,)},
    }.items():
        yield lucid(f"{PYTORCH} real {file}", functools.partial(lucid_file, file), {}, **options)
    package = functools.partial(lucid_file, "denoising_diffusion_pytorch")
    for objective in OBJECTIVES:
        name, made = f"{PYTORCH} real {objective}", {"objective": objective}
        yield lucid(f"{name} self_condition", package, made, self_condition=True)
        yield lucid(f"{name} immiscible", package, {**made, "immiscible": True})


def lucid_file(file):
    return upstream.denoising_diffusion_pytorch(file)[1]


def ramp(sigma_min):
    """The path of the sampler's steps from σ_min to 80, and the time of a σ on it."""
    low, high = sigma_min ** (1 / 7), 80 ** (1 / 7)
    path = ContinuousSchedule.from_alpha_sigma(
        lambda t: (torch.ones_like(t), (low + t * (high - low)) ** 7)
    )
    return path, lambda sigma: ((sigma.double() ** (1 / 7) - low) / (high - low)).clamp(0, 1)


@contextlib.contextmanager
def edms_own(variable, module, name):
    """A class of a checkout, while it can be pickled: each pickles itself where it is made."""
    with checkout_on_path(root_of(variable), stubs("psutil", "requests")):
        yield getattr(importlib.import_module(module), name)


EDM = {
    "double EDMLoss": lambda: contextlib.nullcontext(edm_double.EDMLoss),
    "double EDM2Loss": lambda: contextlib.nullcontext(edm_double.EDM2Loss),
    **{
        name: functools.partial(edms_own, "S2DM_EDM_ROOT", "training.loss", name)
        for name in ("EDMLoss", "VPLoss", "VELoss")
    },
    "EDM2Loss": functools.partial(edms_own, "S2DM_EDM2_ROOT", "training.training_loop", "EDM2Loss"),
}


def as_net(model, log_u=None):
    """The model behind the call of a denoiser."""

    def net(x_t, sigma, labels=None, augment_labels=None, return_logvar=False):
        output = model(x_t, sigma)
        head = torch.linspace(-1, 1, len(x_t)) if log_u is None else log_u
        return (output, column(head)) if return_logvar else output

    return net


def edm(name, kind):
    """NVlabs/edm and edm2: σ and the noise are drawn."""
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(5)) / 2

    def loss(model, tau=None, **options):
        with kind() as made:
            plain = made(-1.2, 3.0) if "EDM" in name else made()  # reaches both ends
            if tau is not None:
                plain = edm_adapter.skip_step(plain, 1 / 17, tau=tau, **options)
            return plain(net=as_net(model), images=images, labels=None)

    path, time_of = ramp(0.002)

    return Case(
        name, loss, path, 1 / 17, "sample", channels=3,
        reference=lambda _, sigma, output: (output, images, time_of(sigma.flatten())),
    )  # fmt: skip


def guided(trainer, **config):
    """openai/guided-diffusion and its kin."""
    gd, respace = modules_of()
    levels = (1 - gd.get_named_beta_schedule(config["schedule"], 1000)).cumprod(0)
    kept = sorted(respace.space_timesteps(1000, config["respacing"] or [1000]))
    path = NoiseSchedule.from_alphas_cumprod(torch.from_numpy(levels[kept]))
    x, more = torch.randn(2, 6, 2, 6, 6, generator=torch.Generator().manual_seed(5)).unbind(0)
    last = len(kept) - 1
    t = torch.tensor([0, 8, 9, 10, last // 2, last])

    def loss(model, tau=None, **options):
        def with_variance(x_t, t):  # whose channels are given
            return torch.cat([model(x_t, t), more], 1)

        network = with_variance if config["variance"].startswith("LEARNED") else model
        diffusion = make_diffusion(trainer=trainer, **config)
        if tau is not None:
            diffusion = guided_adapter.skip_step(diffusion, 9, tau=tau, **options)
        return diffusion.training_losses(network, x, t, {})["loss"]

    predicts = {"EPSILON": "epsilon", "START_X": "sample"}[config["mean"]]
    name = " ".join(str(value) for value in (trainer, *config.values()) if value is not None)
    return Case(name, loss, path, 9, predicts, reference_of(path, predicts, x, t))


GUIDED = every_pair(
    lambda each: each["spaced"] or each["respacing"] is None,
    mean=("EPSILON", "START_X"),
    variance=("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"),
    loss=("MSE", "RESCALED_MSE"),
    schedule=("linear", "cosine"),
    respacing=(None, "ddim50", "250", [10, 15, 20]),
    rescale=BOTH,
    spaced=BOTH,
)
GUIDED_KIN = every_pair(
    mean=("EPSILON", "START_X"),
    variance=("FIXED_LARGE", "LEARNED_RANGE"),
    loss=("MSE", "RESCALED_MSE"),
    schedule=("linear",),
    respacing=(None, "ddim50"),
)


# yang-song/score_sde_pytorch: t and the noise are drawn, t first.
SCORE_SDE = of_each(
    "score_sde", lambda: load_score_sde(root_of("S2DM_SCORE_SDE_ROOT")), score_sde_double
)
DISCRETE = {"VPSDE": "get_ddpm_loss_fn", "VESDE": "get_smld_loss_fn"}


def vp(t):
    return torch.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)


SDE_PATHS = {
    "VPSDE": lambda t: (vp(t), (1 - vp(t) ** 2).sqrt()),
    "subVPSDE": lambda t: (vp(t), 1 - vp(t) ** 2),
    "VESDE": lambda t: (torch.ones_like(t), 0.01 * 5000**t),
}
DDPM = NoiseSchedule.linear(1000)


def score_sde(label, trainer, kind, discrete, *flags):
    """In continuous time the flags are train, reduce_mean, continuous and likelihood_weighting."""
    data = torch.Generator().manual_seed(5)
    batch = torch.randn(32, 2, 5, 5, generator=data, dtype=torch.float64)
    name = DISCRETE[kind] if discrete else "get_sde_loss_fn"

    def loss(model, tau=None, **options):
        sde = getattr(trainer(), kind)()
        if tau is None:
            return getattr(trainer(), name)(sde, *flags)(model, batch)
        if not discrete:
            options["allow_ve"] = kind == "VESDE"
        make = getattr(score_sde_adapter, name)
        return make(sde, *flags, skip_set=300, tau=tau, **options)(model, batch)

    path = ContinuousSchedule.from_alpha_sigma(SDE_PATHS[kind])
    if discrete:
        steps = torch.linspace(0, 1, 1000, dtype=torch.float64)
        path = DDPM if kind == "VPSDE" else NoiseSchedule.from_sigmas(0.01 * 5000**steps)

    def reference(x_t, labels, output):
        torch.manual_seed(SEED)
        t = torch.randint(1000, (32,)) if discrete else torch.rand(32) * (1 - 1e-5) + 1e-5
        if discrete and kind == "VESDE":
            t = 999 - t  # its σ descend
        noise, sigma = torch.randn_like(batch), column(path.alpha_sigma(t)[1])
        scale = -sigma if kind == "VESDE" else 1
        if kind == "VPSDE" and not discrete and not flags[2]:
            # The noise has σ(t), the score a table's.
            scale = sigma / column(DDPM.alpha_sigma((999 * t).long())[1])
        return scale * output, noise, t if discrete else t.double()

    skips = 300 if discrete else 0.3
    label = " ".join(map(str, (label, kind, name, *flags)))
    return Case(label, loss, path, skips, "epsilon", reference, 1e-6, dtype=torch.float64)


FLAGS = every_pair(train=BOTH, reduce_mean=BOTH, continuous=BOTH, likelihood=BOTH)


# kohya-ss/sd-scripts: the noise and t are drawn.
SD_SCRIPTS = dict(
    of_each(
        "sd-scripts",
        lambda: parts.load_sd_scripts("train_network")[0].NetworkTrainer,
        sd_scripts_double.NetworkTrainer,
    )
)
SD_SCRIPTS["sd-scripts real sdxl"] = functools.cache(
    lambda: parts.load_sd_scripts("sdxl_train_network")[0].SdxlNetworkTrainer
)
LOOPED = ("plain", "zero terminal snr, v", "min snr", "huber", "masked")
NO_SQUARE = ("ip noise", "huber", "masked", *REAL_OPTIONS)


def of_stable_diffusion(options):
    """The path that sd-scripts noises on, and what its network predicts."""
    path = NoiseSchedule.scaled_linear(1000)
    if options.get("zero_terminal_snr"):
        path = path.rescale_zero_terminal_snr()
    return path, "v_prediction" if options.get("v_parameterization") else "epsilon"


def sd_scripts(label, kind, name):
    options = {**OPTIONS, **REAL_OPTIONS, "at the end": AT_THE_END}[name]
    path, predicts = of_stable_diffusion(options)

    def loss(model, tau=None, **ours):
        trainer = kind()()
        if tau is not None:
            trainer = sd_scripts_adapter.skip_step(trainer, 9, tau=tau, **ours)
        return parts.step(trainer, kind(), model, options)

    def latents():
        return (0.13025 if parts.is_sdxl(kind()) else 0.18215) * parts.make_batch(kind())["latents"]

    reference = None if name in NO_SQUARE else reference_of(path, predicts, latents)
    return Case(f"{label} {name}", loss, path, 9, predicts, reference, channels=4)


def sd_scripts_loop(script, name):
    """What a script with a loop of its own does from the noise to the loss, or its patch."""
    path, predicts = of_stable_diffusion(OPTIONS[name])
    module = functools.cache(lambda: parts.load_sd_scripts(script)[0])

    def make_batch(**options):
        batch = parts.make_batch(sd_scripts_double.NetworkTrainer, **options)
        return batch | {"latents": 0.18215 * batch["latents"]}

    def loss(model, tau=None):
        source = Path(module().__file__).read_text()
        if tau is not None:
            source = patched("sd-scripts", f"{script}.py", source)
        args = parts.arguments(**OPTIONS[name])
        batch = make_batch(masked=args.masked_loss)

        def unet(x, t, *_):
            output = model(x, t)
            return output if script == "sdxl_train" else SimpleNamespace(sample=output)

        namespace = {**vars(module()), "args": args, "accelerator": parts.ACCELERATOR}
        namespace |= {"batch": batch, "latents": batch["latents"], "unet": unet}
        namespace |= dict.fromkeys(("text_embedding", "vector_embedding", "encoder_hidden_states"))
        namespace["loss_of"] = functools.partial(sd_scripts_adapter.loss_of, tau=tau)
        namespace["weight_dtype"] = torch.float32
        for start, end in (
            ("noise_scheduler = DDPMScheduler(", "if accelerator.is_main"),
            ("noise, noisy_latents, timesteps =", "accelerator.backward(loss)"),
        ):
            first = source.rindex("\n", 0, source.index(start)) + 1
            last = source.rindex("\n", 0, source.index(end, first))
            exec(textwrap.dedent(source[first:last]), namespace)  # noqa: S102 - the trainer's
        return namespace["loss"]

    reference = reference_of(path, predicts, lambda: make_batch()["latents"])
    reference = None if name in NO_SQUARE else reference
    case = Case(f"sd-scripts {script} {name}", loss, path, 49, predicts, reference, 1e-6)
    return case._replace(channels=4, options={})


def of_today(case):
    """The flow and robotics trainers, by their patches: docs/adapters/flow.md and robotics.md."""
    today, seen = trainers_of_today, {}
    # The libraries have no loop of their own to patch: the page's stands for it.
    library = case.file in (today.TORCHCFM, today.FLOW_MATCHING)

    def loss(model, tau=None):
        source = today.source_of(*case.file)
        if tau is not None and not library:
            source = patched(*case.file, source)
        return case.loss(source, model, seen, tau, **case.options)

    def reference(x_t, _, output):
        if case.file == today.KOHYA_SD3:  # it preconditions
            output = output * -column(seen["t"]) + x_t
        return output, seen["target"], seen["t"], seen.get("weight", 1.0)

    normalizes = case.file in (today.MUSUBI, today.AI_TOOLKIT, today.SIMPLE_TUNER)
    of_case = case.name, loss, case.schedule, SkipSet.for_sampling_steps(20), case.predicts
    return Case(*of_case, reference, 1e-4, channels=0, options={"normalize": normalizes})


def _cases():
    for which, case in itertools.product(DDIM, DDIM_OPTIONS):
        yield ddim(*which, *case)
    yield from lucid_cases()
    yield from (edm(name, kind) for name, kind in EDM.items())
    yield from (guided("guided-diffusion", **config) for config in GUIDED)
    yield from (guided(trainer, **config) for trainer in KIN for config in GUIDED_KIN)
    for label, trainer in SCORE_SDE:
        for kind, flags in itertools.product(SDE_PATHS, FLAGS):
            yield score_sde(label, trainer, kind, False, *flags.values())
        for kind, train in itertools.product(DISCRETE, (True, False)):
            yield score_sde(label, trainer, kind, True, train, train)
    for label, kind in SD_SCRIPTS.items():
        names = () if "double" in label else REAL_OPTIONS
        yield from (sd_scripts(label, kind, name) for name in (*OPTIONS, "at the end", *names))
    for script, name in itertools.product(("sdxl_train", "train_db", "fine_tune"), LOOPED):
        if (script, name) != ("fine_tune", "masked"):  # which has no masks
            yield sd_scripts_loop(script, name)
    yield from map(of_today, trainers_of_today.CASES)


CASES = list(_cases())
