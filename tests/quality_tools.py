"""A tiny run for the tests of the quality bench."""

from dataclasses import replace

import torch

from benchmarks.quality.budget import Budget
from benchmarks.quality.corrections import Gain
from benchmarks.quality.data import load_digits
from benchmarks.quality.features import ClassifierFeatures
from benchmarks.quality.networks import MLPSpec
from benchmarks.quality.objectives import Plain, SkipStep
from benchmarks.quality.paths import EpsilonPath
from benchmarks.quality.presets import DIGITS, arm
from benchmarks.quality.training import train

TINY = replace(
    DIGITS,
    name="tiny",
    network=MLPSpec(width=16, blocks=1),
    budget=Budget(
        steps=12, batch_size=8, learning_rate=1e-3, anneal=False, log_every=4, checkpoint_every=5
    ),
    features=ClassifierFeatures(num_features=8, epochs=1),
    samples=64,
    sample_batch=64,
    arms=(
        arm(Plain(), samplers=("ddim", "deis"), steps=(2, 3)),
        arm(SkipStep(9), samplers=("ddim", "deis"), steps=(2, 3)),
        arm(Plain(), Gain(99), samplers=("ddim",), steps=(2,)),
    ),
    seeds=(0, 1),
    workers=1,
    columns=("plain", "skip9-expected"),
)

ONE_ARM = replace(TINY, arms=TINY.arms[:1], seeds=(0,))

# Long enough for kills to find it training, sampling and measuring; checkpoints and batches often.
KILLED = replace(
    TINY,
    budget=replace(TINY.budget, steps=40, checkpoint_every=7, flip=True, anneal=True),
    samples=64,
    sample_batch=16,
    arms=(
        arm(SkipStep(9, "fresh"), samplers=("ddim", "ddpm"), steps=(4,)),
        arm(Plain(), samplers=("ddim", "ddpm"), steps=(4,)),
    ),
    seeds=(0,),
    columns=("skip9-fresh", "plain"),
)


def a_run(folder, objective, seed=3, **changes):
    """Train the tiny network."""
    settings = {
        "data": load_digits(),
        "path": EpsilonPath(),
        "network": TINY.network,
        "budget": TINY.budget,
        "folder": folder,
        "device": torch.device("cpu"),
    }
    return train(objective, seed, **{**settings, **changes})
