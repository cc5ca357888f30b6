import itertools
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from quality_tools import TINY, a_run

from benchmarks.files import load_json, load_tensors
from benchmarks.quality import training
from benchmarks.quality.layout import Layout
from benchmarks.quality.objectives import (
    Batch,
    InputPerturbation,
    Loss,
    MinSNR,
    Plain,
    SampledTimesteps,
    SequenceAware,
    SkipStep,
)
from benchmarks.quality.paths import EpsilonPath, FlowPath
from benchmarks.quality.plan import jobs
from benchmarks.quality.presets import CIFAR10_16, CIFAR10_WIDE, PRESETS
from benchmarks.quality.streams import Purpose, Stream, generator
from benchmarks.quality.training import averaged_as_in, kept_state
from s2dm_loss import NoiseSchedule, ScoreRescaling


def same(weights, others):
    return all(torch.equal(weights[name], others[name]) for name in others)


@pytest.mark.parametrize("killed_at", [3, 5, 8, 11])
def test_a_killed_run_ends_as_if_it_had_not_been(killed_at, tmp_path):
    objective = SkipStep(9, "fresh")  # draws all that there is to draw
    budget = replace(TINY.budget, anneal=True, grad_clip=1.0, flip=True)
    whole = a_run(tmp_path / "whole", objective, budget=budget).state_dict()
    kill = Mock(side_effect=[None] * (killed_at - 1) + [KeyboardInterrupt])
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
        assert same(found.state_dict(), whole)
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
        told = []
        branch = kept_state(tmp_path / "whole", percent)
        options = {"budget": budget, "branch": branch, "progress": told.append}
        ended = a_run(tmp_path / f"branch-{percent}", Plain(), **options).state_dict()
        assert sum(told) == 12 - step
        assert same(ended, whole)
        other = a_run(tmp_path / f"other-{percent}", SkipStep(99, tau=0.5), **options).state_dict()
        assert not same(other, whole)


def test_training_learns(tmp_path):
    budget = replace(TINY.budget, steps=120, log_every=20, learning_rate=5e-3)
    a_run(tmp_path, Plain(), budget=budget)
    curve = load_json(tmp_path / "training.json")["curve"]
    assert curve[-1]["epsilon_mse"] < 0.8 * curve[0]["epsilon_mse"]


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


SCHEDULE = NoiseSchedule.linear(1000)
PATH = EpsilonPath()
ESTIMATORS = ("expected", "fresh", "shared")
ALL = (
    *(Plain(), MinSNR(), InputPerturbation(), SequenceAware(), SampledTimesteps(10)),
    *(SkipStep(9, estimator) for estimator in ESTIMATORS),
)


def a_batch(size=24):
    draw = torch.Generator().manual_seed(1)
    x0 = torch.randn(size, 1, 4, 4, generator=draw)
    # Both ends of the schedule and t < k are among the times.
    t = torch.cat([torch.tensor([0, 1, 8, 9, 999]), torch.arange(size - 5) * 50 + 3])
    extra = Stream(torch.Generator().manual_seed(2), size, torch.device("cpu"))
    return Batch(x0, t, torch.randn(size, 1, 4, 4, generator=draw), extra)


def more_noise(like, draws=1):
    """What the extra stream of `a_batch` will draw."""
    draw = torch.Generator().manual_seed(2)
    return [torch.randn(like.shape, generator=draw) for _ in range(draws)]


def model(x, t):
    return torch.tanh(x) * (1 + t[:, None, None, None] / 1000) - 0.1 * x


def noisy(x0, noise, t):
    alphas_cumprod = SCHEDULE.alphas_cumprod[t][:, None, None, None]
    return (alphas_cumprod.sqrt() * x0 + (1 - alphas_cumprod).sqrt() * noise).float()


def per_sample(error):
    return error.square().flatten(1).mean(1)


@pytest.mark.parametrize("estimator", ["fresh", "shared"])
@pytest.mark.parametrize("skip", [1, 9, 99])
def test_skip_step_is_the_two_term_formula(estimator, skip):
    batch = a_batch()
    predicted = model(noisy(batch.x0, batch.noise, batch.t), batch.t).requires_grad_()
    zeta = more_noise(batch.x0)[0] if estimator == "fresh" else batch.noise
    alphas_cumprod = SCHEDULE.alphas_cumprod
    earlier = alphas_cumprod[(batch.t - skip).clamp(min=0)]
    c = (earlier / alphas_cumprod[batch.t] - 1).sqrt()[:, None, None, None]
    plain, skipped = per_sample(batch.noise - predicted), per_sample(zeta - c * predicted)
    terms = torch.where(batch.t < skip, plain, 0.99 * plain + 0.01 * skipped).mean()
    loss, errors = Loss(SkipStep(skip, estimator), PATH)(lambda *_: predicted, batch)
    # Up to what the network cannot change.
    wanted, found = (torch.autograd.grad(value, predicted)[0] for value in (terms, loss))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(errors, plain.detach())


@pytest.mark.parametrize("skip", [None, 0.05, 0.2])
def test_a_flow_is_trained_on_the_velocity_and_its_loss_on_the_noise_in_it(skip):
    """The two-term formula on ε̂ = x_t + (1 - t) û: its minimiser, û with s ε̂ in place of ε̂."""
    batch = a_batch()
    t = ((batch.t + 0.5) / 1000).double()[:, None, None, None]
    x_t = (1 - t) * batch.x0 + t * batch.noise
    velocity = (batch.noise - batch.x0).double()
    output = model(x_t.float(), 1000 * t.flatten().float()).double().requires_grad_()
    network = Mock(return_value=output.float())
    loss = Loss(Plain() if skip is None else SkipStep(skip), FlowPath())
    value, errors = loss(network, batch)
    x, time = (given.double() for given in network.call_args.args)
    torch.testing.assert_close(x, x_t, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(time, 1000 * t.flatten())
    plain = (output - velocity).square().mean()
    assert float(errors.mean()) == pytest.approx(float(plain.detach()), rel=1e-5)
    if skip is None:
        assert float(value.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
        return
    (gradient,) = torch.autograd.grad(value, output)
    # c² = ᾱ(t - δ) / ᾱ(t) - 1, at most 100 (1 - t)², as an error of û counts in ε̂; no skip below δ.
    early = (t - skip).clamp(min=0)
    levels = [(1 - x) ** 2 / ((1 - x) ** 2 + x**2) for x in (early, t)]
    c2 = (levels[0] / levels[1] - 1).minimum(100 * (1 - t) ** 2)
    s = torch.where(t < skip, 1.0, 0.99 / (0.99 + 0.01 * c2))
    wanted = output - (s * velocity - (1 - s) * x_t / (1 - t))
    cosine = torch.cosine_similarity(gradient.flatten(1), wanted.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-5)


def test_an_objective_of_noise_alone_is_refused_on_a_flow():
    with pytest.raises(ValueError, match=r"objective: min-snr-5 is one of networks that predict ε"):
        Loss(MinSNR(), FlowPath())


def test_min_snr_weighs_by_the_clipped_snr():
    batch = a_batch()
    snr = 1 / (1 / SCHEDULE.alphas_cumprod[batch.t] - 1)
    error = per_sample(batch.noise - model(noisy(batch.x0, batch.noise, batch.t), batch.t))
    wanted = (snr.clamp(max=5) / snr * error).mean()
    assert float(Loss(MinSNR(5.0), PATH)(model, batch)[0]) == pytest.approx(float(wanted))


@pytest.mark.parametrize("window", [2, 3])
def test_sequence_aware_sums_the_residuals_of_consecutive_timesteps(window):
    batch = a_batch()
    noise = [batch.noise, *more_noise(batch.x0, window - 1)]
    total = torch.zeros_like(batch.x0)
    for row, t in enumerate(batch.t.tolist()):
        for j in range(min(window, t + 1)):
            s = torch.tensor([t - j])
            x = noisy(batch.x0[row : row + 1], noise[j][row : row + 1], s)
            total[row] += noise[j][row] - model(x, s)[0]
    first = per_sample(batch.noise - model(noisy(batch.x0, batch.noise, batch.t), batch.t))
    wanted = first.mean() + per_sample(total).mean() / window**2
    loss = Loss(SequenceAware(window), PATH)(model, batch)[0]
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_sampled_timesteps_are_the_samplers_and_all_of_them():
    zeros = torch.zeros(1000, 1, 2, 2)
    batch = Batch(zeros, torch.arange(1000), zeros, a_batch().extra)
    network = Mock(side_effect=lambda x, _: x)
    Loss(SampledTimesteps(20), PATH)(network, batch)
    assert set(network.call_args[0][1].tolist()) == set(range(0, 1000, 50))


@pytest.mark.parametrize("t", [300, 800])
@pytest.mark.parametrize("objective", [Plain(), InputPerturbation(0.5), SequenceAware()])
def test_the_minimisers_of_peers_are_gains(objective, t):
    """On Gaussian data of variance v, in closed form."""
    v, size = 0.3, 100_000
    draw = torch.Generator().manual_seed(4)
    x0, noise = torch.randn(2, size, 1, 1, 1, generator=draw)
    extra = Stream(draw, size, torch.device("cpu"))
    times = torch.full((size,), t)
    losses = []
    for slope in (0.0, 0.5, 1.0):  # a linear model's loss is a parabola in its slope
        extra.source.manual_seed(5)
        batch = Batch(v**0.5 * x0, times, noise, extra)
        loss = Loss(objective, PATH)
        losses.append(float(loss(lambda x, _, slope=slope: slope * x, batch)[0]))
    low, middle, high = losses
    best = 0.5 - 0.25 * (high - low) / (high - 2 * middle + low)
    level = float(SCHEDULE.alphas_cumprod[t])
    exact = (1 - level) ** 0.5 / (level * v + 1 - level)
    variance = {
        Plain(): level * v + 1 - level,
        InputPerturbation(0.5): level * v + (1 - level) * 1.25,
        SequenceAware(): level * v * 4 / 3 + 1 - level,
    }[objective]
    assert best == pytest.approx(exact * (level * v + 1 - level) / variance, rel=0.01)
    if objective == SequenceAware():  # as that page says, on these data another correction's gain
        same = ScoreRescaling(SCHEDULE, (0.75,), psi=v).scale(times[:1], 0.75)
        assert best == pytest.approx(exact * float(same), rel=0.01)


def test_random_numbers_are_common_to_all_objectives(tmp_path, monkeypatch):
    batches = Mock(wraps=Batch)
    monkeypatch.setattr(training, "Batch", batches)
    for objective in ALL:
        a_run(tmp_path / objective.name, objective)
    seen = [call.args[:3] for call in batches.call_args_list]
    steps = TINY.budget.steps
    torch.testing.assert_close(seen, seen[:steps] * len(ALL), rtol=0, atol=0)
    assert not torch.equal(seen[0][2], seen[1][2])


def test_tau_one_trains_as_plain_does(tmp_path):
    objectives = (Plain(), SkipStep(9, "fresh", tau=1.0), SkipStep(99, "fresh", tau=0.5))
    plain, skip, different = (a_run(tmp_path / one.name, one).state_dict() for one in objectives)
    torch.testing.assert_close(skip, plain, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(different[n], w, rtol=1e-4, atol=1e-6) for n, w in plain.items())
    other_seed = a_run(tmp_path / "other", Plain(), 4).state_dict()
    assert not torch.equal(other_seed["inlet.weight"], plain["inlet.weight"])


def test_names_are_different_and_can_be_folders():
    for preset in PRESETS.values():
        cells = [(job.arm.method, job.seed, *cell) for job in jobs(preset) for cell in job.cells()]
        assert len({Layout.of(preset, Path()).cell(*cell) for cell in cells}) == len(cells)
        titles = {arm.method.name: arm.method.title for arm in preset.arms}
        assert len(set(titles.values())) == len(titles)
        assert not set("/\\ :*?") & set("".join(titles))
        assert set(preset.columns) <= set(titles)
