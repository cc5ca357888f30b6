"""What a run has to do, and what is done of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.checkpoint import newest_state
from benchmarks.quality.layout import Layout
from benchmarks.quality.objectives import Objective
from benchmarks.quality.presets import Arm, Preset

BACKWARD_COST = 2
"""A backward pass costs about two forward passes; progress is counted in forward passes."""


@dataclass(frozen=True)
class Job:
    """One arm at one seed: a training, unless it is done, and its cells."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """What it says of itself while it is done."""
        return f"{self.arm.method.name}, seed {self.seed}"

    def cells(self) -> Iterator[tuple[str, int]]:
        """Yield (sampler, steps)."""
        yield from itertools.product(self.arm.samplers, self.arm.steps)


def jobs(preset: Preset) -> list[Job]:
    """Return all jobs, the most important first: every seed of an arm before the next arm."""
    return [Job(arm, seed) for arm in preset.arms for seed in preset.seeds]


def branching(preset: Preset, objective: Objective) -> float | None:
    """Return the share of the plain run's steps at which a training starts; None for none."""
    return preset.budget.branch_at if objective.branches else None


def training_steps(preset: Preset, objective: Objective) -> int:
    """Return how many steps a training takes itself."""
    budget = preset.budget
    return budget.steps - round(budget.steps * (branching(preset, objective) or 0))


def training_cost(preset: Preset, objective: Objective) -> float:
    """Return a training's cost in forward passes of one image."""
    images = training_steps(preset, objective) * preset.budget.batch_size
    return images * objective.model_calls * (1 + BACKWARD_COST)


@dataclass
class Plan:
    """What is left to do.

    Attributes:
        trainings: Networks to train, those that are under way included.
        network_steps: Steps of a network left, forward and backward.
        cells: Results to make.
        sampling_calls: Calls of a network for a batch of `samples`.
        cost: Everything, in forward passes of one image.
        done: What is done already, in the same unit.
    """

    trainings: int = 0
    network_steps: int = 0
    cells: int = 0
    sampling_calls: int = 0
    cost: float = 0.0
    done: float = 0.0


def plan(preset: Preset, root: Path) -> Plan:
    """Return what a run would have to do; reads the folder and starts nothing."""
    layout, todo = Layout.of(preset, root), Plan()
    trainings = dict.fromkeys((job.arm.method.objective, job.seed) for job in jobs(preset))
    for objective, seed in trainings:
        folder = layout.model(objective, seed)
        whole, steps = training_cost(preset, objective), training_steps(preset, objective)
        left = 0 if (folder / "training.json").exists() else steps
        if left and (state := newest_state(folder)) is not None:
            left = preset.budget.steps - state["step"]
        todo.trainings += left > 0
        todo.network_steps += left * objective.model_calls
        todo.cost += whole * left / steps
        todo.done += whole * (steps - left) / steps
    for job in jobs(preset):
        for sampler, steps in job.cells():
            if layout.cell(job.arm.method, job.seed, sampler, steps).exists():
                todo.done += preset.samples * steps
            else:
                todo.cells += 1
                todo.sampling_calls += steps
                todo.cost += preset.samples * steps
    return todo
