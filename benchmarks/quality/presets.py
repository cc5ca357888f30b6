"""The experiments, as data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from benchmarks.quality.budget import Budget
from benchmarks.quality.corrections import (
    AxisGains,
    BandGains,
    Correction,
    EpsilonScaling,
    Gain,
    ScoreRescaling,
    StartScaling,
    StepGains,
)
from benchmarks.quality.features import (
    ClassifierFeatures,
    EfficientNetFeatures,
    FeatureSpec,
    InceptionFeatures,
)
from benchmarks.quality.networks import (
    MLPSpec,
    NetworkSpec,
    PreconditionedUNetSpec,
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
    Summed,
)

CORE = ("ddim", "pndm", "deis")
EVERY = (*CORE, "ddpm", "dpm++2m")
STEPS = (10, 20, 50, 100)
LONG = (200, 500, 1000)


@dataclass(frozen=True)
class Arm:
    """One method, and the samplers and step counts that it is measured with."""

    method: Method
    samplers: tuple[str, ...] = CORE
    steps: tuple[int, ...] = STEPS


def arm(
    objective: Objective,
    correction: Correction | None = None,
    samplers: tuple[str, ...] = CORE,
    steps: tuple[int, ...] = STEPS,
    *,
    percent: int = 100,
) -> Arm:
    """Return an arm, said briefly."""
    return Arm(Method(objective, correction, percent), samplers, steps)


@dataclass(frozen=True)
class Preset:
    """An experiment.

    Attributes:
        name: What the command line calls it.
        about: One line for `--help`.
        data: The data set.
        network: The ε-model.
        budget: The training budget, the same for every objective.
        features: The feature space of the distances.
        samples: Images per cell.
        sample_batch: Images sampled at once.
        arms: What is measured, the most important first.
        seeds: Repetitions.
        workers: Processes, where nobody says otherwise.
        columns: The methods of the picture and of the short table, by name.
        paper: The paper's numbers for this data set, to be printed beside ours.
        networks_of: The preset whose networks it samples, in a folder beside its own; None for
            networks of its own.
    """

    name: str
    about: str
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
    paper: dict[str, str] = field(default_factory=dict)
    networks_of: Preset | None = None

    @property
    def settings(self) -> dict[str, str | int]:
        """What a cell's value depends on besides its own coordinates."""
        return {
            "data": self.data,
            "schedule": "linear, T = 1000, beta 1e-4 to 0.02",
            "network": repr(self.network),
            "budget": repr(self.budget),
            "features": repr(self.features),
            "samples": self.samples,
        }

    def seeded(self, seeds: tuple[int, ...]) -> Preset:
        """Return the preset with other seeds."""
        return replace(self, seeds=seeds)


DIGITS = Preset(
    name="digits",
    about="the README's run: handwritten digits, minutes on 2 cores",
    data="digits",
    network=MLPSpec(width=128, blocks=3),
    budget=Budget(
        steps=6_000, batch_size=128, learning_rate=2e-3, anneal=False, checkpoint_every=1_000
    ),
    features=ClassifierFeatures(),
    samples=4096,
    sample_batch=4096,
    arms=tuple(
        arm(objective, steps=(10, 20, 50)) for objective in (Plain(), SkipStep(9), SkipStep(99))
    ),
    seeds=(0,),
    workers=2,
    columns=("plain", "skip9-expected", "skip99-expected"),
)

DIGITS_FULL = replace(
    DIGITS,
    name="digits-full",
    about="the whole grid on the digits, five seeds; an hour or two on 2 cores",
    seeds=(0, 1, 2, 3, 4),
    arms=(
        arm(Plain(), samplers=EVERY),
        *(arm(SkipStep(k), samplers=EVERY) for k in (9, 49, 99)),
        *(arm(Plain(), Gain(k), samplers=EVERY) for k in (9, 49, 99)),
        arm(SkipStep(9, "fresh")),
        arm(SkipStep(49, "fresh")),
        arm(SkipStep(49, "shared")),
        arm(SequenceAware()),
        arm(MinSNR()),
        arm(InputPerturbation()),
        arm(SampledTimesteps(10), samplers=("ddim", "pndm"), steps=(10,)),
        arm(SampledTimesteps(20), samplers=("ddim", "pndm"), steps=(20,)),
        arm(SampledTimesteps(50), samplers=("ddim", "pndm"), steps=(50,)),
        arm(SkipStep(1)),
        arm(SkipStep(9, "shared")),
        *(arm(Plain(), EpsilonScaling(factor)) for factor in (1.017, 1.04)),
        *(arm(Plain(), Gain(k)) for k in (1, 149, 199)),
        *(arm(SkipStep(49, tau=tau)) for tau in (0.9, 0.95, 0.995)),
        arm(SkipStep(149)),
        arm(SkipStep(1, "fresh")),
        arm(SkipStep(1, "shared")),
        arm(SkipStep(99, "fresh")),
        arm(SkipStep(99, "shared")),
        # Does the gain add to what a better objective gives?
        *(arm(MinSNR(), Gain(k)) for k in (49, 99)),
        arm(Plain(), samplers=("ddim",), steps=LONG),
        *(
            arm(objective, correction, samplers=("ddim",), steps=LONG)
            for k in (49, 9, 99)
            for objective, correction in ((SkipStep(k), None), (Plain(), Gain(k)))
        ),
    ),
)

TEXTURES = replace(
    DIGITS,
    name="textures",
    about="8 x 8 grey crops of photographs, which 8 bits hardly change; an hour on 2 cores",
    data="textures",
    seeds=(0, 1, 2, 3, 4),
    arms=(
        arm(Plain()),
        *(arm(Plain(), Gain(k)) for k in (49, 99)),
        *(arm(SkipStep(k)) for k in (49, 99)),
        *(arm(Plain(), Gain(k)) for k in (9, 149)),
        arm(SkipStep(9)),
    ),
    columns=("plain", "skip9-expected", "skip49-expected", "skip99-expected"),
)

# Corrections with one strength, each at strengths on both sides of none.
SINGLE: tuple[Correction, ...] = (
    *(Gain(k) for k in (-49, -19, -9, 9, 19, 49, 99, 149, 199)),
    *(EpsilonScaling(factor) for factor in (0.97, 0.985, 0.995, 1.005, 1.015, 1.03, 1.06)),
    *(StartScaling(factor) for factor in (0.9, 0.95, 0.98, 1.03, 1.05, 1.12, 1.2, 1.3, 1.4)),
    *(ScoreRescaling(k) for k in (0.75, 0.9, 0.97, 1.03, 1.15, 1.4, 2.0)),
)
FITTED: tuple[Correction, ...] = (AxisGains(), StepGains(), BandGains())
CORRECTION_ARMS = (
    arm(Plain(), samplers=("ddim", "deis", "pndm", "dpm++2m", "unipc"), steps=(10, 20)),
    *(arm(Plain(), one, ("ddim", "deis"), (10, 20)) for one in (*FITTED, *SINGLE)),
    arm(Plain(), samplers=("ddim",), steps=(50, 100)),
)
DIGITS_CORRECTIONS = replace(
    DIGITS,
    name="digits-corrections",
    about="corrections of a trained network on the digits, three seeds; half an hour on 2 cores",
    seeds=(0, 1, 2),
    arms=CORRECTION_ARMS,
    columns=("plain",),
)
TEXTURES_CORRECTIONS = replace(
    DIGITS_CORRECTIONS,
    name="textures-corrections",
    about="the same on the textures",
    data="textures",
)
DIGITS_REDUCTION = replace(
    DIGITS,
    name="digits-reduction",
    about="a sum in place of a mean, with a clipped gradient; half an hour on 2 cores",
    budget=replace(DIGITS.budget, grad_clip=1.0),
    seeds=(0, 1, 2),
    arms=(arm(Plain()), arm(Summed()), arm(SkipStep(9, "fresh"))),
    columns=("plain", "plain-sum", "skip9-fresh"),
)

PATCHES = Preset(
    name="patches",
    about="32 x 32 colour crops of shipped photographs, diffusers' U-Net; for a GPU",
    data="patches",
    network=UNetSpec(channels=64, multipliers=(1, 2, 2), dropout=0.0),
    budget=Budget(
        steps=20_000,
        batch_size=128,
        learning_rate=2e-4,
        anneal=False,
        grad_clip=1.0,
        ema_decay=0.9995,
        checkpoint_every=1_000,
    ),
    features=ClassifierFeatures(epochs=6, batch_size=256),
    samples=8192,
    sample_batch=1024,
    arms=(
        arm(Plain(), steps=(10, 20, 50)),
        *(arm(SkipStep(k), steps=(10, 20, 50)) for k in (9, 49, 99)),
        *(arm(Plain(), Gain(k), steps=(10, 20, 50)) for k in (9, 49, 99)),
    ),
    seeds=(0, 1, 2),
    columns=("plain", "skip9-expected", "skip49-expected", "skip99-expected"),
)

PAPER_ARMS = (
    arm(Plain(), steps=(*STEPS, *LONG)),
    *(arm(SkipStep(k, "fresh"), steps=(*STEPS, *LONG)) for k in (1, 9, 49)),
    *(arm(Plain(), Gain(k), steps=(*STEPS, *LONG)) for k in (1, 9, 49)),
)
PAPER_BUDGET = Budget(
    steps=500_000,
    batch_size=128,
    learning_rate=2e-4,
    anneal=False,
    ema_decay=0.9999,
    grad_clip=1.0,
    flip=True,
    log_every=1_000,
    checkpoint_every=5_000,
)
CIFAR10 = Preset(
    name="cifar10",
    about="the paper's CIFAR10 run; data from a local folder, GPUs, Inception FID",
    data="cifar10",
    network=UNetSpec(channels=128, multipliers=(1, 2, 2, 2), dropout=0.1),
    budget=PAPER_BUDGET,
    features=InceptionFeatures(),
    samples=50_000,
    sample_batch=500,
    arms=PAPER_ARMS,
    seeds=(0,),
    columns=("plain", "skip1-fresh", "skip9-fresh", "skip49-fresh"),
    paper={
        "FID, DDIM, 10 steps (an earlier version of the paper)": "8.01",
        "relative improvement over plain, range over samplers and steps": "3.27 % to 14.06 %",
    },
)
TEN = (10,)
# The most important first: a run that is stopped has those.
SMALL_ARMS = (
    arm(Plain(), samplers=(*CORE, "dpm++2m", "unipc"), steps=(10, 20)),
    arm(SkipStep(9), samplers=("ddim",), steps=(10, 20)),
    arm(Plain(), Gain(9), ("ddim",), (10, 20)),
    *(
        arm(Plain(), one, ("ddim",), TEN)
        for one in (
            *map(Gain, (49, 99, -9)),
            *map(EpsilonScaling, (0.99, 0.995, 1.005, 1.01, 0.98, 0.97)),
            *map(StartScaling, (0.98, 1.03)),
        )
    ),
    *(arm(Plain(), samplers=("ddim",), steps=TEN, percent=part) for part in (50, 25)),
    *(arm(Plain(), Gain(49), ("ddim",), TEN, percent=part) for part in (50, 25)),
    arm(Plain(), samplers=("ddim",), steps=(50,)),
    *(
        arm(Plain(), one, ("ddim",), TEN)
        for one in (BandGains(), *map(ScoreRescaling, (0.9, 1.15)))
    ),
    arm(SkipStep(9), samplers=("deis", "pndm"), steps=TEN),
    arm(Plain(), Gain(49), ("deis", "pndm"), TEN),
    *(arm(Plain(), EpsilonScaling(factor), ("deis",), TEN) for factor in (0.995, 1.005, 1.01)),
    arm(SkipStep(49), samplers=("ddim", "deis"), steps=TEN),
    *(arm(objective, samplers=("ddim-quad",), steps=TEN) for objective in (Plain(), SkipStep(9))),
    *(arm(Plain(), samplers=("ddim",), steps=(50,), percent=part) for part in (50, 25)),
    *(arm(Plain(), one, ("ddim",), (20,)) for one in (Gain(49), EpsilonScaling(1.01))),
    arm(Plain(), samplers=("ddim",), steps=(100,)),
)
CIFAR10_SMALL = Preset(
    name="cifar10-small",
    about="CIFAR10 with a network of 4.4 M parameters; data from a local folder, a day on 2 cores",
    data="cifar10",
    network=PreconditionedUNetSpec(
        UNetSpec(channels=64, multipliers=(1, 2, 2), blocks=1, attention_at=(8,))
    ),
    budget=Budget(
        steps=16_000,
        batch_size=128,
        learning_rate=5e-4,
        ema_decay=0.9995,
        grad_clip=1.0,
        flip=True,
        checkpoint_every=500,
        warmup=500,
        keep_at=(0.25, 0.5, 0.75),
        branch_at=0.75,
    ),
    features=EfficientNetFeatures(),
    samples=10_000,
    sample_batch=500,
    arms=SMALL_ARMS,
    seeds=(0, 1),
    workers=2,
    columns=("plain", "skip9-expected", "skip49-expected"),
)
CIFAR10_TINY = replace(
    CIFAR10_SMALL,
    name="cifar10-tiny",
    about="CIFAR10 with a network of 2.6 M parameters; data from a local folder, hours on 2 cores",
    network=PreconditionedUNetSpec(
        UNetSpec(channels=32, multipliers=(1, 2, 4), blocks=1, attention_at=(8,))
    ),
    budget=replace(
        CIFAR10_SMALL.budget, steps=4_000, learning_rate=1e-3, ema_decay=0.999, warmup=200
    ),
    samples=2_048,
    sample_batch=512,
)
SPECTRAL_ARMS = (
    arm(Plain(), samplers=("ddim",), steps=(10, 50)),
    *(arm(Plain(), Gain(k), ("ddim",), TEN) for k in (9, 49, 99, -9)),
    *(arm(Plain(), EpsilonScaling(factor), ("ddim",), TEN) for factor in (0.99, 1.01)),
    arm(Plain(), samplers=("unipc", "dpm++2m", "deis", "pndm"), steps=TEN),
    *(arm(Plain(), ScoreRescaling(k), ("ddim",), TEN) for k in (1.4, 0.9, 1.1, 1.05)),
    *(arm(Plain(), EpsilonScaling(factor), ("ddim",), TEN) for factor in (0.98, 1.02)),
    *(arm(Plain(), StartScaling(factor), ("ddim",), TEN) for factor in (0.98, 1.03)),
    *(arm(Plain(), EpsilonScaling(1.0, slope), ("ddim",), TEN) for slope in (-0.02, 0.02)),
    arm(Plain(), BandGains(), ("ddim",), TEN),
    arm(SkipStep(9), samplers=("ddim",), steps=(10, 20)),
    *(arm(Plain(), one, ("ddim",), (20,)) for one in (None, Gain(9), Gain(49))),
    *(arm(Plain(), samplers=("ddim",), steps=TEN, percent=part) for part in (50, 25)),
    *(arm(Plain(), Gain(49), ("ddim",), TEN, percent=part) for part in (50, 25)),
    arm(SkipStep(9), samplers=("deis", "pndm"), steps=TEN),
    arm(Plain(), Gain(49), ("deis", "pndm"), TEN),
    arm(Plain(), samplers=("unipc",), steps=(20, 50)),
    arm(Plain(), samplers=("ddim",), steps=(100,)),
    arm(SkipStep(49), samplers=("ddim",), steps=TEN),
    *(arm(Plain(), EpsilonScaling(factor), ("deis",), TEN) for factor in (0.99, 1.01)),
    arm(Plain(), Gain(149), ("ddim",), TEN),
    *(arm(objective, samplers=("ddim-quad",), steps=TEN) for objective in (Plain(), SkipStep(9))),
    arm(Plain(), samplers=("dpm++2m", "deis", "pndm"), steps=(20,)),
    arm(MinSNR(), samplers=("ddim",), steps=TEN),
    arm(SkipStep(9, "fresh"), samplers=("ddim",), steps=TEN),
)
CIFAR10_SPECTRAL = replace(
    CIFAR10_SMALL,
    name="cifar10-spectral",
    about="CIFAR10, a network right at late times; data from a local folder, hours on 2 cores",
    network=SpectralUNetSpec(
        UNetSpec(channels=16, multipliers=(1, 2, 4), blocks=1, attention_at=())
    ),
    budget=replace(CIFAR10_SMALL.budget, learning_rate=1e-3, warmup=200),
    arms=SPECTRAL_ARMS,
    samples=5_000,
)
# As before, but a network that is wide where an image is coarse: the loss against its gain first,
# then the cells that say whether the network is sound.
WIDE_ARMS = (
    arm(Plain(), samplers=("ddim",), steps=TEN),
    *(arm(Plain(), Gain(k), ("ddim",), TEN) for k in (9, 49)),
    *(arm(SkipStep(k), samplers=("ddim",), steps=TEN) for k in (9, 49)),
    arm(Plain(), samplers=("unipc",), steps=TEN),
    arm(Plain(), samplers=("ddim",), steps=(50,)),
    arm(Plain(), ScoreRescaling(1.05), ("ddim",), TEN),
    arm(Plain(), Gain(49), ("unipc",), TEN),
    arm(SkipStep(49), samplers=("unipc",), steps=TEN),
    *(arm(Plain(), samplers=("ddim",), steps=TEN, percent=part) for part in (50, 25)),
    *(arm(Plain(), Gain(49), ("ddim",), TEN, percent=part) for part in (50, 25)),
    *(arm(Plain(), EpsilonScaling(factor), ("ddim",), TEN) for factor in (0.99, 1.01)),
    *(arm(Plain(), one, ("ddim",), (20,)) for one in (None, Gain(9), Gain(49))),
    *(arm(SkipStep(k), samplers=("ddim",), steps=(20,)) for k in (9, 49)),
    arm(Plain(), samplers=("unipc",), steps=(50,)),
    *(arm(Plain(), StartScaling(factor), ("ddim",), TEN) for factor in (0.98, 1.03)),
    arm(Plain(), samplers=("dpm++2m", "deis", "pndm"), steps=TEN),
    arm(SkipStep(9), samplers=("deis",), steps=TEN),
    *(arm(Plain(), Gain(k), ("ddim",), TEN) for k in (99, -9)),
    *(arm(Plain(), ScoreRescaling(k), ("ddim",), TEN) for k in (1.1, 0.9)),
    arm(Plain(), samplers=("ddim",), steps=(100,)),
    arm(Plain(), BandGains(), ("ddim",), TEN),
    arm(Plain(), samplers=("unipc",), steps=(20,)),
    *(arm(Plain(), EpsilonScaling(factor), ("ddim",), TEN) for factor in (0.98, 1.02)),
    arm(Plain(), Gain(49), ("deis", "pndm"), TEN),
    *(arm(objective, samplers=("ddim-quad",), steps=TEN) for objective in (Plain(), SkipStep(9))),
    *(arm(Plain(), EpsilonScaling(1.0, slope), ("ddim",), TEN) for slope in (-0.02, 0.02)),
    arm(Plain(), ScoreRescaling(1.05), ("ddim",), (20, 50)),
    arm(SkipStep(49), samplers=("deis", "pndm"), steps=TEN),
    arm(SkipStep(9), samplers=("pndm",), steps=TEN),
    arm(Plain(), ScoreRescaling(1.05), ("unipc", "deis", "pndm"), TEN),
    *(arm(SkipStep(k), samplers=("ddim",), steps=(50,)) for k in (9, 49)),
    arm(Plain(), Gain(49), ("ddim",), (50,)),
    arm(Plain(), samplers=("dpm++2m", "deis", "pndm"), steps=(20,)),
    arm(SkipStep(49), samplers=("ddim-quad",), steps=TEN),
    arm(Plain(), Gain(149), ("ddim",), TEN),
    *(arm(SkipStep(k), samplers=("ddim",), steps=(100,)) for k in (9, 49)),
    arm(Plain(), ScoreRescaling(1.05), ("ddim",), (100,)),
    *(arm(SkipStep(k), samplers=("deis", "pndm"), steps=(20,)) for k in (9, 49)),
    arm(Plain(), ScoreRescaling(1.05), ("deis", "pndm"), (20,)),
    *(arm(one, samplers=("deis", "pndm"), steps=(50,)) for one in (Plain(), SkipStep(49))),
    arm(Plain(), ScoreRescaling(1.05), ("deis", "pndm"), (50,)),
    arm(SkipStep(9), samplers=("deis", "pndm"), steps=(50,)),
    arm(SkipStep(9, "fresh"), samplers=("ddim",), steps=TEN),
    *(arm(one, samplers=("deis", "pndm"), steps=(100,)) for one in (Plain(), SkipStep(49))),
    arm(Plain(), ScoreRescaling(1.05), ("deis", "pndm"), (100,)),
    arm(SkipStep(9), samplers=("deis", "pndm"), steps=(100,)),
)
CIFAR10_WIDE = replace(
    CIFAR10_SPECTRAL,
    name="cifar10-wide",
    about="CIFAR10, the same with a wider network; data from a local folder, hours on 2 cores",
    network=SpectralUNetSpec(
        UNetSpec(channels=64, multipliers=(1, 2), blocks=1, attention_at=()), patch=4
    ),
    arms=WIDE_ARMS,
    seeds=(0, 1, 2),
)
# The cells that the answer is of.
ANSWER_ARMS = (
    arm(Plain(), samplers=("ddim", "unipc"), steps=TEN),
    *(arm(Plain(), one, ("ddim",), TEN) for one in (Gain(9), Gain(49), ScoreRescaling(1.05))),
    *(arm(SkipStep(k), samplers=("ddim",), steps=TEN) for k in (9, 49)),
)
# They with as many samples as there are test images; then Min-SNR.
CIFAR10_WIDE_10K = replace(
    CIFAR10_WIDE,
    name="cifar10-wide-10k",
    about="the main cells of cifar10-wide with 10,000 samples, and Min-SNR from the start",
    samples=10_000,
    arms=(
        *ANSWER_ARMS,
        arm(MinSNR(), samplers=("ddim", "unipc"), steps=TEN),
        *(arm(MinSNR(), Gain(k), ("ddim",), TEN) for k in (9, 49)),
    ),
    networks_of=CIFAR10_WIDE,
)
# The same cells before the samples are clamped and rounded.
CIFAR10_WIDE_RAW = replace(
    CIFAR10_WIDE,
    name="cifar10-wide-raw",
    about="the main cells of cifar10-wide, of the samples as the sampler returns them too",
    features=EfficientNetFeatures(raw=True),
    arms=ANSWER_ARMS,
    networks_of=CIFAR10_WIDE,
)
# Down to where a sampler's own error is nothing; few samples, so the kernel distance is the one
# to read: it has no bias.
CIFAR10_WIDE_LONG = replace(
    CIFAR10_WIDE,
    name="cifar10-wide-long",
    about="up to 1000 steps of DDIM with the networks of cifar10-wide, and fewer samples",
    samples=1_000,
    arms=tuple(
        arm(objective, samplers=("ddim",), steps=(steps,))
        for steps in (10, 200, 1000)
        for objective in (Plain(), SkipStep(9))
    ),
    columns=("plain", "skip9-expected"),
    networks_of=CIFAR10_WIDE,
)
# The same network for longer; one seed, the nearest to a sound one.
LONGER_ARMS = (
    arm(Plain(), samplers=("ddim",), steps=TEN),
    *(arm(Plain(), Gain(k), ("ddim",), TEN) for k in (9, 49)),
    *(arm(SkipStep(k), samplers=("ddim",), steps=TEN) for k in (9, 49)),
    arm(Plain(), samplers=("ddim",), steps=(50, 100)),
    arm(Plain(), samplers=("unipc",), steps=(10, 50)),
    arm(Plain(), BandGains(), ("ddim",), TEN),
    arm(Plain(), ScoreRescaling(1.05), ("ddim",), (10, 20)),
    arm(Plain(), StartScaling(1.03), ("ddim",), TEN),
    arm(Plain(), samplers=("dpm++2m", "deis", "pndm"), steps=TEN),
    *(arm(one, samplers=("ddim",), steps=(20,)) for one in (Plain(), SkipStep(9), SkipStep(49))),
    arm(Plain(), Gain(49), ("ddim",), (20,)),
    arm(SkipStep(49), samplers=("unipc",), steps=TEN),
    *(arm(SkipStep(k), samplers=("ddim",), steps=(50,)) for k in (9, 49)),
)
CIFAR10_LONGER = replace(
    CIFAR10_WIDE,
    name="cifar10-longer",
    about="CIFAR10, cifar10-wide's network for longer; data from a local folder, 2 hours",
    budget=replace(CIFAR10_WIDE.budget, steps=28_000),
    arms=LONGER_ARMS,
    seeds=(2,),
)
# A larger network of the same kind, to have one that is sound: what soundness asks first, and the
# loss with k = 49, which branches off as soon as the plain network is there.
WIDER_ARMS = (
    arm(Plain(), samplers=("ddim",), steps=TEN),
    arm(SkipStep(49), samplers=("ddim",), steps=TEN),
    arm(Plain(), samplers=("ddim",), steps=(50,)),
    arm(Plain(), samplers=("unipc",), steps=(10, 50)),
    *(arm(Plain(), Gain(k), ("ddim",), TEN) for k in (9, 49)),
    arm(Plain(), ScoreRescaling(1.05), ("ddim",), TEN),
    arm(Plain(), samplers=("ddim",), steps=(100,)),
    arm(Plain(), BandGains(), ("ddim",), TEN),
    arm(SkipStep(49), samplers=("unipc",), steps=TEN),
    arm(Plain(), Gain(49), ("unipc",), TEN),
    *(arm(one, samplers=("ddim",), steps=(20,)) for one in (Plain(), SkipStep(49))),
    *(arm(Plain(), one, ("ddim",), (20,)) for one in (Gain(49), ScoreRescaling(1.05))),
    arm(Plain(), StartScaling(1.03), ("ddim",), TEN),
    arm(Plain(), samplers=("dpm++2m", "deis", "pndm"), steps=TEN),
    *(arm(Plain(), samplers=("ddim",), steps=TEN, percent=part) for part in (50, 25)),
    *(arm(Plain(), Gain(49), ("ddim",), TEN, percent=part) for part in (50, 25)),
    arm(SkipStep(49), samplers=("ddim",), steps=(50,)),
    arm(SkipStep(9), samplers=("ddim",), steps=(10, 20, 50)),
)
CIFAR10_WIDER = replace(
    CIFAR10_WIDE,
    name="cifar10-wider",
    about="CIFAR10, twice as large a network; data from a local folder, 3 hours for a seed",
    network=SpectralUNetSpec(
        UNetSpec(channels=96, multipliers=(1, 2), blocks=1, attention_at=()), patch=4
    ),
    arms=WIDER_ARMS,
    seeds=(0, 1),
)
# The two other ways to a better plain network: gradients of twice as many images, and weights
# averaged over more of them.
SOUND_ARMS = (
    arm(Plain(), samplers=("ddim",), steps=(10, 50, 100)),
    arm(Plain(), samplers=("unipc",), steps=(10, 50)),
    *(arm(Plain(), one, ("ddim",), TEN) for one in (BandGains(), Gain(9), Gain(49))),
    arm(Plain(), ScoreRescaling(1.05), ("ddim",), TEN),
    *(arm(SkipStep(k), samplers=("ddim",), steps=TEN) for k in (9, 49)),
)
CIFAR10_BATCH = replace(
    CIFAR10_WIDE,
    name="cifar10-batch",
    about="CIFAR10, cifar10-wide's network in batches of 256; data from a local folder, 2 hours",
    budget=replace(CIFAR10_WIDE.budget, steps=10_000, batch_size=256),
    arms=SOUND_ARMS,
    seeds=(2,),
)
CIFAR10_AVERAGED = replace(
    CIFAR10_WIDE,
    name="cifar10-averaged",
    about="CIFAR10, cifar10-wide's network averaged for longer; data from a local folder, 2 hours",
    budget=replace(CIFAR10_WIDE.budget, ema_decay=0.9998, ema_power=0.9),
    arms=SOUND_ARMS,
    seeds=(2,),
)
# The paper's U-Net on as many images as `cifar10-wide`: what soundness asks, the answer, then what
# is left of it elsewhere.
UNET_ARMS = (
    *SOUND_ARMS,
    *(arm(Plain(), samplers=("ddim",), steps=TEN, percent=part) for part in (50, 25)),
    *(arm(Plain(), Gain(49), ("ddim",), TEN, percent=part) for part in (50, 25)),
    arm(Plain(), Gain(49), ("unipc",), TEN),
    arm(SkipStep(49), samplers=("unipc",), steps=TEN),
    *(arm(one, samplers=("ddim",), steps=(20,)) for one in (Plain(), SkipStep(9), SkipStep(49))),
    *(arm(Plain(), one, ("ddim",), (20,)) for one in (Gain(49), ScoreRescaling(1.05))),
    arm(Plain(), samplers=("dpm++2m", "deis", "pndm"), steps=TEN),
    arm(Plain(), StartScaling(1.03), ("ddim",), TEN),
    *(arm(Plain(), EpsilonScaling(factor), ("ddim",), TEN) for factor in (0.99, 1.01)),
    *(arm(SkipStep(k), samplers=("deis", "pndm"), steps=TEN) for k in (9, 49)),
    *(arm(SkipStep(k), samplers=("ddim",), steps=(50,)) for k in (9, 49)),
    *(arm(one, samplers=("deis", "pndm"), steps=(20,)) for one in (Plain(), SkipStep(9))),
    arm(SkipStep(9), samplers=("ddim",), steps=(100,)),
)
CIFAR10_UNET = replace(
    CIFAR10_WIDE,
    name="cifar10-unet",
    about="CIFAR10, the paper's U-Net for 2 million images; data from a local folder, for a GPU",
    network=SpectralUNetSpec(
        UNetSpec(channels=128, multipliers=(1, 2, 2, 2), attention_at=(16,)), patch=1
    ),
    budget=replace(CIFAR10_WIDE.budget, learning_rate=5e-4, warmup=500, checkpoint_every=4_000),
    samples=5_120,
    sample_batch=256,  # as many as a fit takes at once: one shape to compile for
    arms=UNET_ARMS,
    seeds=(0,),
    workers=1,
)
# As `cifar10-wide`, with a budget that an older processor trains and samples in two hours: the loss
# against its gain first.
BRIEF_ARMS = (
    *(arm(Plain(), one, ("ddim",), TEN) for one in (None, Gain(49))),
    arm(SkipStep(49), samplers=("ddim",), steps=TEN),
    arm(Plain(), Gain(9), ("ddim",), TEN),
    arm(SkipStep(9), samplers=("ddim",), steps=TEN),
    arm(Plain(), samplers=("unipc",), steps=TEN),
    arm(Plain(), ScoreRescaling(1.05), ("ddim",), TEN),
    arm(Plain(), Gain(49), ("unipc",), TEN),
    arm(SkipStep(49), samplers=("unipc",), steps=TEN),
    arm(Plain(), samplers=("ddim",), steps=(50,)),
)
CIFAR10_BRIEF = replace(
    CIFAR10_WIDE,
    name="cifar10-brief",
    about="CIFAR10, cifar10-wide's network for a fifth as long; data from a local folder, 2 hours",
    budget=replace(CIFAR10_WIDE.budget, steps=3_000, ema_decay=0.999),
    arms=BRIEF_ARMS,
    seeds=(0, 1),
)
CIFAR10_REDUCTION = replace(
    CIFAR10_BRIEF,
    name="cifar10-reduction",
    about="CIFAR10, a sum in place of a mean with a clip; data from a local folder, an hour",
    budget=replace(CIFAR10_BRIEF.budget, branch_at=None, keep_at=()),
    arms=(
        *(arm(objective, samplers=("ddim",), steps=(10, 20)) for objective in (Plain(), Summed())),
        *(arm(objective, samplers=("unipc",), steps=TEN) for objective in (Plain(), Summed())),
    ),
    columns=("plain", "plain-sum"),
)
CELEBA = replace(
    CIFAR10,
    name="celeba",
    about="the paper's CelebA 64 x 64 run; data from a local folder, GPUs, Inception FID",
    data="celeba",
    network=UNetSpec(channels=128, multipliers=(1, 2, 2, 2, 4), dropout=0.1),
    sample_batch=250,
    paper={
        "FID, DDIM, 10 steps (an earlier version of the paper)": "6.41",
        "relative improvement over plain, range over samplers and steps": "8.97 % to 27.08 %",
    },
)

PRESETS = {
    p.name: p
    for p in (
        *(DIGITS, DIGITS_FULL, TEXTURES, PATCHES),
        *(DIGITS_CORRECTIONS, TEXTURES_CORRECTIONS, DIGITS_REDUCTION),
        *(CIFAR10_TINY, CIFAR10_SMALL, CIFAR10_SPECTRAL, CIFAR10_WIDE, CIFAR10_BRIEF),
        *(CIFAR10_WIDE_10K, CIFAR10_WIDE_RAW, CIFAR10_WIDE_LONG),
        *(CIFAR10_LONGER, CIFAR10_WIDER, CIFAR10_BATCH, CIFAR10_AVERAGED, CIFAR10_UNET),
        *(CIFAR10_REDUCTION, CIFAR10, CELEBA),
    )
}
