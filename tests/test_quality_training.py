import itertools
import math
from dataclasses import replace

import pytest
import torch
from quality_tools import TINY, a_run

from benchmarks.files import load_json, load_tensors
from benchmarks.quality.objectives import Plain, SkipStep
from benchmarks.quality.presets import CIFAR10_16, CIFAR10_WIDE
from benchmarks.quality.streams import Purpose, generator
from benchmarks.quality.training import averaged_as_in, kept_state


@pytest.mark.parametrize("killed_at", [3, 5, 8, 11])
@pytest.mark.parametrize("objective", [Plain(), SkipStep(9, "fresh")], ids=lambda o: o.name)
def test_a_killed_run_ends_as_if_it_had_not_been(objective, killed_at, tmp_path):
    budget = replace(TINY.budget, anneal=True, grad_clip=1.0, flip=True)
    whole = a_run(tmp_path / "whole", objective, budget=budget).state_dict()
    steps = itertools.count(1)

    def kill(_):
        if next(steps) == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        a_run(tmp_path / "killed", objective, budget=budget, progress=kill)
    assert not (tmp_path / "killed/weights.pt").exists()

    told = []
    resumed = a_run(tmp_path / "killed", objective, budget=budget, progress=told.append)
    assert sum(told) == budget.steps - killed_at // 5 * 5  # nothing before the checkpoint again
    told.clear()  # and what is finished is loaded
    loaded = a_run(tmp_path / "killed", objective, budget=budget, progress=told.append)
    assert told == []
    for found in (resumed, loaded):
        assert all(torch.equal(found.state_dict()[name], whole[name]) for name in whole)
    curves = [load_json(tmp_path / n / "training.json")["curve"] for n in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert [point["step"] for point in curves[0]] == [4, 8, 12]
    assert not (tmp_path / "killed/checkpoint.pt").exists()


@pytest.mark.parametrize("anneal", [False, True])
def test_the_learning_rate_rises_over_the_warm_up(anneal, tmp_path, monkeypatch):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            super().step(*arguments)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    budget = replace(TINY.budget, warmup=4, anneal=anneal, learning_rate=1e-3)
    a_run(tmp_path, Plain(), budget=budget)
    ramp = [0.2, 0.4, 0.6, 0.8] + 8 * [1.0]
    cosine = [(1 + math.cos(math.pi * i / 12)) / 2 if anneal else 1.0 for i in range(12)]
    wanted = [1e-3 * r * c for r, c in zip(ramp, cosine, strict=True)]
    assert rates == pytest.approx(wanted)


def test_states_are_kept_on_the_way_and_can_be_branched_from(tmp_path):
    """Weights, averages, optimiser and random streams all go on from the branching point."""
    budget = replace(TINY.budget, keep_at=(0.25, 0.75), flip=True, anneal=True)
    whole = a_run(tmp_path / "whole", Plain(), budget=budget).state_dict()
    kept = {path.name: path for path in (tmp_path / "whole").glob("*.pt")}
    assert set(kept) == {"weights.pt", "state-25.pt", "state-75.pt"}
    for percent, step in ((25, 3), (75, 9)):
        assert load_tensors(kept[f"state-{percent}.pt"])["step"] == step
        # Whoever goes on from it ends where the run that it was taken from did.
        told = []
        branch = kept_state(tmp_path / "whole", percent)
        options = {"budget": budget, "branch": branch, "progress": told.append}
        ended = a_run(tmp_path / f"branch-{percent}", Plain(), **options).state_dict()
        assert sum(told) == 12 - step
        assert all(torch.equal(ended[name], whole[name]) for name in whole)
        other = a_run(tmp_path / f"other-{percent}", SkipStep(99, tau=0.5), **options).state_dict()
        assert any(not torch.equal(other[name], whole[name]) for name in whole)


def test_training_learns(tmp_path):
    budget = replace(TINY.budget, steps=120, log_every=20, learning_rate=5e-3)
    a_run(tmp_path, Plain(), budget=budget)
    curve = load_json(tmp_path / "training.json")["curve"]
    assert curve[-1]["epsilon_mse"] < 0.8 * curve[0]["epsilon_mse"]
    assert curve[-1]["mse/all"] == pytest.approx(curve[-1]["epsilon_mse"], rel=1e-4)
    assert curve[-1]["mse/0_log_snr_below_-8.1"] < 0.5 * curve[0]["mse/0_log_snr_below_-8.1"]


class Broken(Plain):
    def compare(self, predicted, noisy, batch, loss):
        return predicted.mean() * float("nan")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="plain: the loss is nan at 4"):
        a_run(tmp_path, Broken())


def test_streams_are_different():
    each = list(itertools.product(range(3), Purpose, range(3)))
    assert len({generator(*one).initial_seed() for one in each}) == len(each)


@pytest.mark.parametrize("budget", [CIFAR10_WIDE.budget, CIFAR10_16.budget])
def test_the_average_spans_what_the_budget_says(budget):
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    average = averaged_as_in(budget, [weight])
    wanted = 1.0
    for n in range(400):
        weight.data.fill_(float(n % 7))
        average.step([weight])
        ramp = (1 + n) / (10 + n) if budget.ema_power is None else 1 - (1 + n) ** -budget.ema_power
        decay = min(ramp, budget.ema_decay) if n else 0.0
        wanted = decay * wanted + (1 - decay) * (n % 7)
    assert float(average.shadow_params[0]) == pytest.approx(wanted, rel=1e-9)
