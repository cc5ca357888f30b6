from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from quality_tools import TINY
from torch import Tensor, nn

from benchmarks.quality.data import load_digits
from benchmarks.quality.files import load_json
from benchmarks.quality.objectives import Loss, Objective, Plain, SkipStep
from benchmarks.quality.streams import Purpose, Stream, generator
from benchmarks.quality.training import train
from s2dm_loss import NoiseSchedule


class KilledError(Exception):
    """Stands for a kill: nothing is tidied up."""


def a_run(folder: Path, objective: Objective, **changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "data": load_digits(),
        "schedule": NoiseSchedule.linear(1000),
        "network": TINY.network,
        "budget": TINY.budget,
        "folder": folder,
        "accelerator": Accelerator(cpu=True),
    }
    return train(objective, 3, **{**settings, **changes})


@pytest.mark.parametrize("killed_at", [3, 5, 8, 11])
@pytest.mark.parametrize("objective", [Plain(), SkipStep(9, "fresh")], ids=lambda o: o.name)
def test_a_killed_run_ends_as_if_it_had_not_been(
    objective: Objective, killed_at: int, tmp_path: Path
) -> None:
    budget = replace(TINY.budget, anneal=True, grad_clip=1.0, flip=True)
    whole = a_run(tmp_path / "whole", objective, budget=budget).state_dict()
    done = 0

    def kill(steps: int) -> None:
        nonlocal done
        done += steps
        if done == killed_at:
            raise KilledError

    with pytest.raises(KilledError):
        a_run(tmp_path / "killed", objective, budget=budget, progress=kill)
    assert not (tmp_path / "killed/weights.pt").exists()

    told: list[int] = []
    resumed = a_run(tmp_path / "killed", objective, budget=budget, progress=told.append)
    assert sum(told) == budget.steps - killed_at // 5 * 5  # nothing before the checkpoint again
    for name, weights in resumed.state_dict().items():
        assert torch.equal(weights, whole[name])
    curves = [load_json(tmp_path / n / "training.json")["curve"] for n in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert [point["step"] for point in curves[0]] == [4, 8, 12]
    assert not (tmp_path / "killed/checkpoint.pt").exists()


def test_a_finished_run_is_loaded(tmp_path: Path) -> None:
    first = a_run(tmp_path, Plain())
    told: list[int] = []
    again = a_run(tmp_path, Plain(), progress=told.append)
    assert told == []
    assert torch.equal(first.state_dict()["inlet.weight"], again.state_dict()["inlet.weight"])


def test_training_learns(tmp_path: Path) -> None:
    budget = replace(TINY.budget, steps=120, log_every=20, learning_rate=5e-3)
    a_run(tmp_path, Plain(), budget=budget)
    curve = load_json(tmp_path / "training.json")["curve"]
    assert curve[-1]["epsilon_mse"] < 0.8 * curve[0]["epsilon_mse"]


class Broken(Plain):
    def build(self, schedule: NoiseSchedule) -> Loss:
        loss = super().build(schedule)
        loss.compare = lambda predicted, batch: predicted.mean() * float("nan")  # type: ignore[method-assign]
        return loss


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="plain: the loss is nan at 4"):
        a_run(tmp_path, Broken())


def test_the_rows_of_processes_make_up_the_whole_batch() -> None:
    def draws(rows: slice) -> tuple[Tensor, Tensor]:
        stream = Stream(generator(0, Purpose.TRAINING), 6, rows, torch.device("cpu"))
        return stream.integers(1000), stream.normal((2, 3))

    whole, first, second = draws(slice(0, 6)), draws(slice(0, 3)), draws(slice(3, 6))
    for part in range(2):
        assert torch.equal(torch.cat([first[part], second[part]]), whole[part])


def test_streams_are_different() -> None:
    seeds = [
        generator(seed, purpose, part).initial_seed()
        for seed in range(3)
        for purpose in Purpose
        for part in range(3)
    ]
    assert len(set(seeds)) == len(seeds)
