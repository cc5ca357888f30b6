"""A tiny run for the tests of the quality bench."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.files import load_json, load_tensors
from benchmarks.quality import training
from benchmarks.quality.budget import Budget
from benchmarks.quality.checkpoint import save_state
from benchmarks.quality.corrections import Gain
from benchmarks.quality.data import load_digits
from benchmarks.quality.features import ClassifierFeatures
from benchmarks.quality.layout import Layout
from benchmarks.quality.networks import MLPSpec
from benchmarks.quality.objectives import Plain, SkipStep
from benchmarks.quality.paths import EpsilonPath
from benchmarks.quality.presets import DIGITS, arm
from benchmarks.quality.record import collect
from benchmarks.quality.runner import run

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
    sample_batch=16,
    arms=tuple(
        arm(one, samplers=("ddim", "ddpm"), steps=(4,)) for one in (SkipStep(9, "fresh"), Plain())
    ),
    seeds=(0,),
    columns=("skip9-fresh", "plain"),
)


def a_run(folder, objective, seed=3, **changes):
    settings = {"network": TINY.network, "budget": TINY.budget, "device": torch.device("cpu")}
    settings |= {"data": load_digits(), "path": EpsilonPath(), **changes}
    return training.train(objective, seed, folder=folder, **settings)


def stopped_at(preset, root, step):
    """Run until the checkpoint of a step is written; return the folder of the first network."""

    def stopping(folder, state):
        save_state(folder, state)
        if state["step"] == step:
            raise KeyboardInterrupt

    with mock.patch.object(training, "save_state", stopping), pytest.raises(KeyboardInterrupt):
        run(preset, root)
    return Layout(root, root).model(preset.arms[0].method.objective, preset.seeds[0])


def what_was_made(preset, root):
    """Every weight, sample and result of a run, less what depends on the clock."""
    made = {"record": collect(preset, root)}
    for runs in made["record"]["trainings"].values():
        for one in runs.values():
            del one["seconds"]
    for path in [*root.glob("models/**/*.pt"), *root.glob("cells/**/*.pt")]:
        tensors = load_tensors(path)
        made[str(path.relative_to(root))] = {k: v.numpy().tobytes() for k, v in tensors.items()}
    for path in root.glob("cells/**/*.json"):
        made[str(path.relative_to(root))] = load_json(path)
    return made
