"""The experiments, as data. Those that nobody runs again are results/quality/archive.json."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.quality.budget import Budget
from benchmarks.quality.corrections import (
    Correction,
    EpsilonScaling,
    Gain,
    ScoreRescaling,
    StepPush,
)
from benchmarks.quality.features import ClassifierFeatures, EfficientNetFeatures, FeatureSpec
from benchmarks.quality.networks import (
    MLPSpec,
    NetworkSpec,
    PixelUNetSpec,
    SpectralUNetSpec,
    UNetSpec,
)
from benchmarks.quality.objectives import (
    InputPerturbation,
    Method,
    MinSNR,
    Objective,
    Plain,
    SampledTimesteps,
    SequenceAware,
    SkipStep,
)
from benchmarks.quality.paths import PATHS

CORE = ("ddim", "pndm", "deis")
EVERY = (*CORE, "ddpm", "dpm++2m")
STEPS = (10, 20, 50, 100)
LONG = (200, 500, 1000)
TEN, SHORT = (10,), (10, 20)


@dataclass(frozen=True)
class Arm:
    """One method, and the samplers and step counts that it is measured with."""

    method: Method
    samplers: tuple[str, ...]
    steps: tuple[int, ...]


def arm(
    objective: Objective,
    correction: Correction | None = None,
    samplers: tuple[str, ...] = CORE,
    steps: tuple[int, ...] = STEPS,
) -> Arm:
    """Return an arm, said briefly."""
    return Arm(Method(objective, correction), samplers, steps)


@dataclass(frozen=True)
class Preset:
    """An experiment.

    Attributes:
        name: What the command line calls it.
        data: The data set, a key of `data.SETS`.
        network: What is trained.
        budget: How, the same for every objective.
        features: The feature space of the distances.
        samples: Images per cell.
        sample_batch: Images sampled at once.
        arms: What is measured, the most important first.
        seeds: Repetitions.
        workers: Processes, where nobody says otherwise.
        columns: The methods of the picture and of the short table, by name.
        path: What its networks are trained on, a key of `PATHS`.
        networks_of: The preset whose networks it samples, in a folder beside its own; None for
            networks of its own.
    """

    name: str
    data: str
    network: NetworkSpec
    budget: Budget
    features: FeatureSpec
    samples: int
    sample_batch: int
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    workers: int = 1
    columns: tuple[str, ...] = ()
    path: str = "epsilon"
    networks_of: Preset | None = None

    @property
    def settings(self) -> dict[str, str | int]:
        """What a cell's value depends on besides its own coordinates."""
        return {
            "data": self.data,
            "schedule": PATHS[self.path].about,
            "network": repr(self.network),
            "budget": repr(self.budget),
            "features": repr(self.features),
            "samples": self.samples,
        }


DIGITS = Preset(
    name="digits",
    data="digits",
    network=MLPSpec(width=128, blocks=3),
    budget=Budget(
        steps=6_000, batch_size=128, learning_rate=2e-3, anneal=False, checkpoint_every=1_000
    ),
    features=ClassifierFeatures(),
    samples=4096,
    sample_batch=4096,
    arms=tuple(arm(one, steps=(10, 20, 50)) for one in (Plain(), SkipStep(9), SkipStep(49))),
    seeds=(0,),
    workers=2,
    columns=("plain", "skip9-expected", "skip49-expected"),
)
DIGITS_FULL = replace(
    DIGITS,
    name="digits-full",
    seeds=(0, 1, 2, 3, 4),
    arms=(
        arm(Plain(), samplers=EVERY),
        *(arm(SkipStep(k), samplers=EVERY) for k in (9, 49, 99)),
        *(arm(Plain(), Gain(k), samplers=EVERY) for k in (9, 49, 99)),
        *(arm(SkipStep(k, "fresh")) for k in (9, 49, 1, 99)),
        *(arm(SkipStep(k, "shared")) for k in (49, 9, 1, 99)),
        *(arm(one) for one in (SequenceAware(), MinSNR(), InputPerturbation())),
        *(arm(SampledTimesteps(n), samplers=("ddim", "pndm"), steps=(n,)) for n in (10, 20, 50)),
        *(arm(SkipStep(k)) for k in (1, 149)),
        *(arm(SkipStep(49, tau=tau)) for tau in (0.9, 0.95, 0.995)),
        *(arm(Plain(), EpsilonScaling(factor)) for factor in (1.017, 1.04)),
        *(arm(Plain(), Gain(k)) for k in (1, 149, 199)),
        *(arm(MinSNR(), Gain(k)) for k in (49, 99)),
        arm(Plain(), samplers=("ddim",), steps=LONG),
        *(arm(SkipStep(k), samplers=("ddim",), steps=LONG) for k in (49, 9, 99)),
        *(arm(Plain(), Gain(k), ("ddim",), LONG) for k in (49, 9, 99)),
    ),
)
TEXTURES = replace(
    DIGITS,
    name="textures",
    data="textures",
    seeds=(0, 1, 2, 3, 4),
    arms=(
        arm(Plain()),
        *(arm(Plain(), Gain(k)) for k in (49, 99, 9, 149)),
        *(arm(SkipStep(k)) for k in (49, 99, 9)),
    ),
)

# Near the data: a plain U-Net on CIFAR10 at 16 x 16 pixels, trained from the start with each loss.
MAIN: tuple[tuple[Objective, Correction | None], ...] = (
    (Plain(), None),
    (Plain(), Gain(49)),
    (SkipStep(49), None),
)
CIFAR10_16 = Preset(
    name="cifar10-16",
    data="cifar10-16",
    network=PixelUNetSpec(UNetSpec(channels=64, multipliers=(1, 2, 2), blocks=1, attention_at=())),
    budget=Budget(
        steps=4_000,
        batch_size=128,
        learning_rate=1e-3,
        warmup=200,
        flip=True,
        ema_power=0.9,
        checkpoint_every=200,
    ),
    features=EfficientNetFeatures(),
    samples=1_024,
    sample_batch=256,
    arms=(
        *(arm(*one, ("ddim", "unipc"), (steps,)) for steps in SHORT for one in MAIN),
        *(arm(Plain(), one, ("pndm", "deis", "dpm++2m"), TEN) for one in (None, Gain(49))),
        *(arm(Plain(), Gain(k), ("ddim",), TEN) for k in (99, -49, 9)),
        arm(Plain(), samplers=("ddim",), steps=(50, 100)),
        *(arm(Plain(), ScoreRescaling(k), ("ddim",), TEN) for k in (0.97, 1.03)),
        *(arm(Plain(), EpsilonScaling(factor), ("ddim",), TEN) for factor in (0.99, 1.01)),
        arm(SkipStep(49), Gain(49), ("ddim",), TEN),
        *(arm(*one, ("ddim",), (50,)) for one in MAIN[1:]),
        *(arm(Plain(), one, ("pndm", "deis", "dpm++2m"), (20,)) for one in (None, Gain(49))),
        *(arm(one, samplers=("ddim", "unipc"), steps=SHORT) for one in (SkipStep(9), MinSNR())),
        *(arm(MinSNR(), Gain(k), ("ddim",), TEN) for k in (49, -49)),
        *(arm(Plain(), Gain(k), ("ddim",), (20,)) for k in (99, -49, 9)),
        arm(SkipStep(49), samplers=("pndm", "deis", "dpm++2m"), steps=TEN),
        *(arm(Plain(), ScoreRescaling(k), ("ddim",), (20,)) for k in (0.97, 1.03)),
        *(arm(Plain(), EpsilonScaling(factor), ("ddim",), (20,)) for factor in (0.99, 1.01)),
        arm(SkipStep(49), Gain(49), ("ddim",), (20,)),
        *(arm(Plain(), one, ("unipc",), (50,)) for one in (None, Gain(49))),
    ),
    seeds=(0, 1),
    columns=("plain", "plain+gain49", "skip49-expected"),
)
CIFAR10_16_10K = replace(
    CIFAR10_16,
    name="cifar10-16-10k",
    samples=10_000,
    sample_batch=250,
    arms=tuple(arm(*one, (sampler,), TEN) for sampler in ("ddim", "unipc") for one in MAIN),
    networks_of=CIFAR10_16,
)
CIFAR10_16_FLOW = replace(
    CIFAR10_16,
    name="cifar10-16-flow",
    path="flow",
    arms=(
        arm(Plain(), samplers=("euler", "heun", "unipc-flow"), steps=SHORT),
        arm(Plain(), Gain(0.05), ("euler",), SHORT),
        arm(SkipStep(0.05), samplers=("euler",), steps=SHORT),
        *(arm(Plain(), one, ("euler",), (28, 50)) for one in (None, Gain(0.05))),
        *(arm(Plain(), Gain(delta), ("euler",), SHORT) for delta in (0.1, -0.05)),
        *(arm(Plain(), Gain(0.05), (one,), TEN) for one in ("heun", "unipc-flow")),
        *(arm(Plain(), one, ("euler-shift3",), SHORT) for one in (None, Gain(0.05))),
        arm(SkipStep(0.05), samplers=("euler",), steps=(28, 50)),
        arm(Plain(), samplers=("heun-shift3",), steps=SHORT),
        *(arm(Plain(), ScoreRescaling(k), ("euler",), TEN) for k in (0.97, 1.03)),
        arm(SkipStep(0.05), Gain(0.05), ("euler",), TEN),
        *(arm(Plain(), StepPush(c, n), ("euler",), (n,)) for n in SHORT for c in (0.005, -0.005)),
        arm(Plain(), samplers=("euler",), steps=(5,)),
        arm(SkipStep(0.1), samplers=("euler",), steps=SHORT),
        *(arm(Plain(), EpsilonScaling(factor), ("euler",), TEN) for factor in (0.99, 1.01)),
        *(arm(Plain(), Gain(0.05), (one,), (20,)) for one in ("heun", "unipc-flow")),
        *(arm(Plain(), EpsilonScaling(factor), ("euler",), (20,)) for factor in (0.99, 1.01)),
        *(arm(Plain(), ScoreRescaling(k), ("euler",), (20,)) for k in (0.97, 1.03)),
        arm(SkipStep(0.05), Gain(0.05), ("euler",), (20,)),
        arm(SkipStep(0.05), samplers=("heun", "unipc-flow"), steps=SHORT),
    ),
    columns=("plain", "plain+gain0.05", "skip0.05-expected"),
)
CIFAR10_16_FLOW_10K = replace(
    CIFAR10_16_FLOW,
    name="cifar10-16-flow-10k",
    samples=10_000,
    sample_batch=250,
    arms=tuple(arm(Plain(), one, ("euler",), (20,)) for one in (None, Gain(0.05))),
    columns=("plain", "plain+gain0.05"),
    networks_of=CIFAR10_16_FLOW,
)

# Twice the training: does the harm of gain and loss pass?
MILLION = replace(CIFAR10_16.budget, steps=8_000)
CIFAR10_16_MILLION = replace(
    CIFAR10_16,
    name="cifar10-16-million",
    budget=MILLION,
    arms=(
        *(arm(*one, ("ddim", "unipc"), (steps,)) for steps in SHORT for one in MAIN[:2]),
        arm(Plain(), samplers=("ddim",), steps=(50, 100)),
        arm(Plain(), Gain(49), ("ddim",), (50,)),
        *(arm(Plain(), Gain(k), ("ddim",), TEN) for k in (-49, 9)),
        arm(Plain(), samplers=("pndm", "deis", "dpm++2m"), steps=TEN),
        *(arm(Plain(), ScoreRescaling(1.03), (one,), TEN) for one in ("unipc", "ddim")),
        arm(Plain(), samplers=("pndm", "deis", "dpm++2m"), steps=(20, 50)),
        *(arm(Plain(), one, ("unipc",), (50,)) for one in (None, Gain(49))),
        arm(Plain(), samplers=("ddim",), steps=(200,)),
        *(arm(SkipStep(49), samplers=("ddim", "unipc"), steps=(steps,)) for steps in SHORT),
        arm(SkipStep(49), samplers=("ddim",), steps=(50,)),
    ),
    seeds=(0,),
    columns=("plain", "plain+gain49", "skip49-expected"),
)
CIFAR10_16_FLOW_MILLION = replace(
    CIFAR10_16_FLOW,
    name="cifar10-16-flow-million",
    budget=MILLION,
    arms=(
        *(arm(Plain(), one, ("euler",), (*SHORT, 28, 50)) for one in (None, Gain(0.05))),
        arm(Plain(), samplers=("heun", "unipc-flow"), steps=SHORT),
        arm(Plain(), Gain(0.05), ("unipc-flow",), SHORT),
        *(arm(Plain(), Gain(delta), ("euler",), SHORT) for delta in (-0.05, 0.1)),
        *(arm(Plain(), one, ("euler",), (5,)) for one in (None, Gain(0.05))),
        *(arm(Plain(), one, ("euler-shift3",), SHORT) for one in (None, Gain(0.05))),
        arm(Plain(), ScoreRescaling(1.03), ("euler", "unipc-flow"), TEN),
        arm(Plain(), samplers=("heun", "unipc-flow", "euler-shift3"), steps=(28, 50)),
        arm(Plain(), samplers=("unipc-flow", "euler-shift3"), steps=(5,)),
        arm(SkipStep(0.05), samplers=("euler",), steps=(*SHORT, 28, 50)),
        arm(SkipStep(0.05), samplers=("unipc-flow",), steps=SHORT),
    ),
    seeds=(0,),
    columns=("plain", "plain+gain0.05", "skip0.05-expected"),
)

# Real photographs at 32 x 32. Losses branch off the plain run's state at 75 % of its steps.
ANSWER_ARMS = (
    arm(Plain(), samplers=("ddim", "unipc"), steps=TEN),
    *(arm(Plain(), one, ("ddim",), TEN) for one in (Gain(9), Gain(49), ScoreRescaling(1.05))),
    *(arm(SkipStep(k), samplers=("ddim",), steps=TEN) for k in (9, 49)),
)
CIFAR10_WIDE = Preset(
    name="cifar10-wide",
    data="cifar10",
    network=SpectralUNetSpec(
        UNetSpec(channels=64, multipliers=(1, 2), blocks=1, attention_at=()), patch=4
    ),
    budget=Budget(
        steps=16_000,
        batch_size=128,
        learning_rate=1e-3,
        ema_decay=0.9995,
        grad_clip=1.0,
        flip=True,
        checkpoint_every=500,
        warmup=200,
        keep_at=(0.25, 0.5, 0.75),
        branch_at=0.75,
    ),
    features=EfficientNetFeatures(),
    samples=5_000,
    sample_batch=500,
    arms=(
        *ANSWER_ARMS,
        *(arm(*one, ("unipc",), TEN) for one in MAIN[1:]),
        arm(Plain(), samplers=("deis", "pndm", "dpm++2m"), steps=TEN),
        *(arm(Plain(), Gain(49), (sampler,), TEN) for sampler in ("deis", "pndm")),
        *(arm(Plain(), one, ("ddim",), TEN) for one in (Gain(99), Gain(-9), Gain(149))),
        *(arm(Plain(), ScoreRescaling(k), ("ddim",), TEN) for k in (0.9, 1.1)),
        *(arm(Plain(), EpsilonScaling(x), ("ddim",), TEN) for x in (0.98, 0.99, 1.01, 1.02)),
        *(arm(one, steps=(20, 50, 100)) for one in (Plain(), SkipStep(9), SkipStep(49))),
        arm(Plain(), Gain(49), ("ddim",), (20, 50)),
        arm(Plain(), samplers=("unipc",), steps=(20, 50)),
        arm(Plain(), samplers=("dpm++2m",), steps=(20,)),
        *(arm(Plain(), one, ("ddim",), (20,)) for one in (Gain(9), ScoreRescaling(1.05))),
    ),
    seeds=(0, 1, 2),
    workers=2,
    columns=DIGITS.columns,
)
CIFAR10_WIDE_10K = replace(
    CIFAR10_WIDE,
    name="cifar10-wide-10k",
    samples=10_000,
    arms=(
        *ANSWER_ARMS,
        arm(MinSNR(), samplers=("ddim", "unipc"), steps=TEN),
        *(arm(MinSNR(), Gain(k), ("ddim",), TEN) for k in (9, 49)),
    ),
    networks_of=CIFAR10_WIDE,
)
CIFAR10_UNET = replace(
    CIFAR10_WIDE,
    name="cifar10-unet",
    network=SpectralUNetSpec(
        UNetSpec(channels=128, multipliers=(1, 2, 2, 2), attention_at=(16,)), patch=1
    ),
    budget=replace(CIFAR10_WIDE.budget, learning_rate=5e-4, warmup=500, checkpoint_every=4_000),
    samples=5_120,
    sample_batch=256,
    arms=(
        *ANSWER_ARMS,
        arm(Plain(), samplers=("ddim",), steps=(20, 50, 100)),
        arm(Plain(), samplers=("deis", "pndm", "dpm++2m"), steps=TEN),
        arm(Plain(), samplers=("unipc",), steps=(50,)),
        arm(Plain(), Gain(49), ("unipc",), TEN),
        arm(SkipStep(49), samplers=("unipc", "deis", "pndm"), steps=TEN),
        arm(SkipStep(9), samplers=("deis", "pndm"), steps=TEN),
        *(arm(Plain(), one, ("ddim",), (20,)) for one in (Gain(49), ScoreRescaling(1.05))),
        *(arm(SkipStep(k), samplers=("ddim",), steps=(20,)) for k in (9, 49)),
        *(arm(Plain(), EpsilonScaling(factor), ("ddim",), TEN) for factor in (0.99, 1.01)),
    ),
    seeds=(0,),
    workers=1,
)

PRESETS = {
    preset.name: preset
    for preset in (
        *(DIGITS, DIGITS_FULL, TEXTURES),
        *(CIFAR10_16, CIFAR10_16_10K, CIFAR10_16_MILLION),
        *(CIFAR10_16_FLOW, CIFAR10_16_FLOW_10K, CIFAR10_16_FLOW_MILLION),
        *(CIFAR10_WIDE, CIFAR10_WIDE_10K, CIFAR10_UNET),
    )
}
