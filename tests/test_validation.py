"""The validation loss: the same inputs every time, whatever the batches and the processes."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.monitor import validation_loss
from s2dm_loss.validation_result import Comparison, ValidationLoss, t_quantile
from tests.helpers import monitor_workers
from tests.helpers.distributed import run_distributed
from tests.helpers.monitor_workers import small_model

LINEAR, FLOW = NoiseSchedule.linear(1000), ContinuousSchedule.flow()
X0 = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class Recorder:
    """A model that keeps what it is given."""

    def __init__(self, scale=0.5):
        self.scale, self.calls = scale, []

    def __call__(self, x_t, t, **kwargs):
        self.calls.append((x_t.clone(), t, kwargs))
        return self.scale * x_t


def by_level(model, schedule):
    """The calls of a model from noise to data, as levels are counted."""
    return sorted(model.calls, key=lambda call: schedule.log_alphas_cumprod_at(call[1])[0])


class Network(nn.Module):
    """With dropout, a part that is frozen, and random numbers of its own."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.frozen = nn.BatchNorm1d(16).eval()
        self.dropout = nn.Dropout(0.5)
        self.scale = scale
        self.seen = []

    def forward(self, x_t, t):
        self.seen.append((self.training, torch.is_grad_enabled()))
        hidden = self.dropout(self.layer(self.frozen(x_t.flatten(1))))
        return self.scale * hidden.reshape(x_t.shape) + 0.01 * torch.rand(x_t.shape)


def losses_of(result):
    return {"index": result.index, **result.losses}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("schedule", [LINEAR, FLOW])
def test_each_sample_has_a_time_in_each_level(schedule):
    model = Recorder()
    validation_loss(model, [X0], schedule, levels=8)
    length = 1000 if schedule is LINEAR else 1
    assert len(model.calls) == 8
    times = torch.stack([t for _, t, _ in model.calls]).double() / length
    edges = torch.arange(9)[:, None] / 8
    slack = 1e-3 if schedule is LINEAR else 0
    assert (times >= edges[:-1] - slack).all()
    assert (times < edges[1:]).all()
    # Over the samples, too, they are spread evenly: no two of ten nearer than a twentieth.
    within = (times - edges[:-1]) * 8
    assert (within.sort(1).values.diff() > 1 / 20 - 8 * slack).all()


def test_the_values_are_those_of_the_criterion():
    """From x_t and t that the model was given, with ε solved for."""
    model = Recorder()
    result = validation_loss(model, [X0], LINEAR, levels=4, skip_set=49, tau=0.9)
    for level, (x_t, t, _) in enumerate(by_level(model, LINEAR)):
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in LINEAR.alpha_sigma(t))
        noise = (x_t - alpha * X0) / sigma
        plain = (0.5 * x_t - noise).square().flatten(1).mean(1)
        torch.testing.assert_close(result.losses["plain"][:, level], plain, rtol=1e-4, atol=1e-5)
        criterion = SkipStepLoss(LINEAR, 49, tau=0.9, reduction="none")
        skip = criterion(lambda x_t, t: 0.5 * x_t, X0.double(), t, noise=noise)
        torch.testing.assert_close(result.losses["skip_step"][:, level], skip, rtol=1e-4, atol=1e-5)
    assert len(model.calls) == 4  # one for both losses


def test_noise_is_standard_and_another_for_each_sample_level_and_seed():
    many = torch.zeros(200, 4, 4)
    drawn = []
    for seed in (0, 1):
        model = Recorder()
        validation_loss(model, [many], LINEAR, levels=4, seed=seed)
        drawn += [x_t / LINEAR.alpha_sigma(t)[1].reshape(-1, 1, 1) for x_t, t, _ in model.calls]
    noise = torch.stack(drawn).reshape(8 * 200, 16)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    correlations = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlations.abs().max() < 0.97  # of 1.3 million pairs of 16 values
    assert abs(correlations.mean()) < 1e-3


def test_two_calls_are_equal_bit_for_bit_and_leave_random_numbers_alone():
    model = Network()
    loader = DataLoader(TensorDataset(X0), batch_size=4, shuffle=True)
    results = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(validation_loss(model, loader, LINEAR, levels=4, skip_set=9))
        assert torch.equal(torch.get_rng_state(), before)
    assert_equal(losses_of(results[0]), losses_of(results[1]))
    other = validation_loss(model, [X0], LINEAR, levels=4, skip_set=9, seed=1)
    assert not torch.equal(other.losses["plain"], results[0].losses["plain"])


@pytest.mark.parametrize("schedule", [LINEAR, FLOW])
def test_the_batch_size_changes_nothing(schedule):
    whole = validation_loss(small_model, [X0], schedule)
    for size in (1, 3, 4):
        parts = validation_loss(small_model, X0.split(size), schedule)
        torch.testing.assert_close(losses_of(parts), losses_of(whole), rtol=1e-6, atol=1e-7)


def test_a_given_index_says_which_sample_it_is():
    whole = validation_loss(small_model, [X0], LINEAR)
    order = torch.tensor([7, 0, 3, 9])
    some = validation_loss(small_model, [(X0[order], {}, order)], LINEAR)
    assert some.index.tolist() == [0, 3, 7, 9]
    assert torch.equal(some.losses["plain"], whole.losses["plain"][some.index])


def test_processes_give_the_result_of_one(tmp_path):
    alone = validation_loss(small_model, [X0], LINEAR, skip_set=49)
    ranks = run_distributed(monitor_workers.validated, tmp_path, 2, X0, world_size=2)
    for rank in ranks:
        for found in rank.values():
            torch.testing.assert_close(found, losses_of(alone), rtol=1e-6, atol=1e-7)


def test_the_model_is_in_evaluation_mode_and_back_as_it_was():
    model = Network().train()
    model.frozen.eval()
    validation_loss(model, [X0], LINEAR, levels=2)
    assert model.seen == [(False, False)] * 2
    assert [m.training for m in model.modules()] == [True, True, False, True]
    model.forward = lambda x_t, t: x_t[:, 0]
    with pytest.raises(ValueError, match="shape of x0"):
        validation_loss(model, [X0], LINEAR, levels=2)
    assert model.training
    assert torch.is_grad_enabled()


def test_arguments_of_the_model_go_with_their_batch():
    model = Recorder()
    labels = torch.arange(10)
    batches = [(X0[:6], {"y": labels[:6]}), [X0[6:], {"y": labels[6:], "scale": 2}]]
    validation_loss(model, batches, LINEAR, levels=2)
    assert [kwargs["y"].tolist() for _, _, kwargs in model.calls] == [
        *[list(range(6))] * 2,
        *[list(range(6, 10))] * 2,
    ]
    assert model.calls[-1][2]["scale"] == 2


def test_other_outputs_and_weightings():
    turned = ContinuousSchedule.flow(data_at=1)
    for kind, schedule in (
        ("v_prediction", LINEAR),
        ("sample", LINEAR),
        ("flow", FLOW),
        ("velocity", turned),
    ):
        model = Recorder()
        found = validation_loss(
            model, [X0], schedule, levels=4, prediction_type=kind, skip_set=None
        ).losses["plain"]
        for level, (x_t, t, _) in enumerate(by_level(model, schedule)):
            a, b = (c.reshape(-1, 1, 1, 1) for c in schedule.alpha_sigma(t))
            noise = (x_t - a * X0) / b
            target = {
                "v_prediction": a * noise - b * X0,
                "sample": X0.double(),
                "flow": noise - X0,
                "velocity": X0 - noise,
            }[kind]
            expected = (0.5 * x_t - target).square().flatten(1).mean(1)
            torch.testing.assert_close(found[:, level], expected, rtol=1e-3, atol=1e-4)
    weighted = validation_loss(small_model, [X0], LINEAR, weighting="min_snr")
    assert weighted.settings["weighting"] == "min_snr(5)"
    assert weighted.overall().mean < validation_loss(small_model, [X0], LINEAR).overall().mean


def test_means_and_errors():
    result = validation_loss(small_model, [X0], LINEAR, levels=4, skip_set=9)
    losses = result.losses["plain"].numpy()
    levels = result.by_level()
    assert [e.mean for e in levels] == pytest.approx(losses.mean(0), rel=1e-12)
    assert [e.error for e in levels] == pytest.approx(stats.sem(losses, axis=0), rel=1e-12)
    assert result.overall() == pytest.approx((losses.mean(), stats.sem(losses.mean(1))), rel=1e-12)
    log_snr = LINEAR.log_snr[[875, 625, 375, 125]]
    assert result.log_snr == pytest.approx(log_snr.tolist())
    one = validation_loss(small_model, [X0[:1]], LINEAR, levels=4)
    assert math.isnan(one.overall().error)
    with pytest.raises(ValueError, match="kind must be one of 'plain'"):
        one.overall("skip_step")


def test_a_comparison_is_paired():
    first, second = (
        validation_loss(lambda x_t, t, s=s: s * x_t, [X0], LINEAR, levels=4, skip_set=9)
        for s in (0.50, 0.51)
    )
    compared = first.compare(second)
    for kind in ("plain", "skip_step"):
        per_sample = (first.losses[kind] - second.losses[kind]).mean(1).numpy()
        expected = stats.ttest_1samp(per_sample, 0).confidence_interval(0.95)
        assert compared.interval(kind) == pytest.approx((expected.low, expected.high), rel=1e-3)
    half = (compared.interval()[1] - compared.interval()[0]) / 2
    assert half < 0.1 * 2 * first.overall().error  # what two separate means would have
    percent = 100 * (first.overall().mean / second.overall().mean - 1)
    assert f"({percent:+.2f} %)" in str(compared)
    assert "not told apart" in str(first.compare(first))
    wide, narrow = first.compare(second, confidence=0.99), first.compare(second, confidence=0.5)
    assert wide.interval()[0] < compared.interval()[0] < narrow.interval()[0]


def test_only_the_same_is_compared():
    result = validation_loss(small_model, [X0], LINEAR, levels=4)

    def other(x0=X0, schedule=LINEAR, **changed):
        return validation_loss(small_model, [x0], schedule, **{"levels": 4, **changed})

    for changed, name in (
        ({"seed": 1}, "seed"),
        ({"levels": 5}, "levels"),
        ({"skip_set": 9}, "skip_set"),
        ({"schedule": NoiseSchedule.cosine(1000)}, "schedule"),
        ({"weighting": "min_snr"}, "weighting"),
    ):
        with pytest.raises(ValueError, match=f"other must have the same {name}"):
            result.compare(other(**changed))
    assert result.compare(other(prediction_type="epsilon", tau=0.5)).overall().mean == 0
    for x0 in (X0[:9], X0.flip(0), X0 * 1.1):
        with pytest.raises(ValueError, match="same samples, in the same order"):
            result.compare(other(x0=x0))
    with pytest.raises(TypeError, match="must be a ValidationLoss"):
        result.compare(0.3)


def test_it_goes_through_json_and_back():
    result = validation_loss(small_model, [X0], LINEAR, skip_set=9, weighting="min_snr")
    state = json.loads(json.dumps(result.to_dict()))
    again = ValidationLoss.from_dict(state)
    assert_equal(losses_of(again), losses_of(result))
    assert again.settings == result.settings
    assert again.compare(result).overall().mean == 0
    assert state["overall"]["plain"]["mean"] == result.overall().mean
    assert state["by_level"]["skip_step"][3]["error"] == result.by_level("skip_step")[3].error


def test_metrics_are_flat_floats():
    result = validation_loss(small_model, [X0], LINEAR, levels=3, skip_set=9)
    metrics = result.metrics("valid")
    assert all(type(value) is float for value in metrics.values())
    assert (metrics["valid/plain"], metrics["valid/plain_error"]) == result.overall()
    name = f"valid_skip_step/02_log_snr_{result.log_snr[2]:.1f}"
    assert metrics[name] == result.by_level("skip_step")[2].mean
    assert len(metrics) == 2 * (2 + 3)


def test_it_prints_a_table():
    result = validation_loss(small_model, [X0], LINEAR, levels=3, skip_set=9)
    lines = str(result).splitlines()
    assert lines[0].startswith("validation loss of 10 samples at 3 levels")
    assert lines[1].split() == ["log", "SNR", "plain", "S²-DM"]
    assert lines[-1].split()[:2] == ["all", f"{result.overall().mean:.5g}"]
    assert len(lines) == 6


def test_figures(tmp_path):
    result = validation_loss(small_model, [X0], LINEAR, levels=3, skip_set=9)
    figure = result.plot()
    axes = figure.axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["plain", "S²-DM"]
    drawn = axes.containers[1].lines[0].get_xydata()
    means = [estimate.mean for estimate in result.by_level("skip_step")]
    assert np.allclose(drawn, np.c_[result.log_snr, means])
    assert axes.get_yscale() == "log"
    figure.savefig(tmp_path / "loss.png")
    other = validation_loss(Recorder(), [X0], LINEAR, levels=3, skip_set=9)
    figure = result.compare(other).plot()
    first, second = (found.losses["plain"].mean(0).numpy() for found in (result, other))
    drawn = figure.axes[0].containers[0].lines[0].get_ydata()
    assert np.allclose(drawn, 100 * (first / second - 1))


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"s2dm-loss\[plot\]"):
        validation_loss(small_model, [X0], LINEAR).plot()


@pytest.mark.parametrize("installed", [True, False])
def test_a_bar_is_shown_on_a_terminal(monkeypatch, capsys, installed):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    validation_loss(small_model, X0.split(2), LINEAR, progress=False)
    assert capsys.readouterr().err == ""
    validation_loss(small_model, X0.split(2), LINEAR)
    assert ("validation loss" in capsys.readouterr().err) is installed
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    validation_loss(small_model, X0.split(2), LINEAR)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((X0, torch.arange(10)), TypeError, r"labels give `\(\(x, \{"),
        ({"x": X0}, TypeError, "batches must hold x_0"),
        ((X0, {}, [1], 2), TypeError, "batches must hold x_0"),
        ((X0, {}, [1, 2]), ValueError, "one int for each of 10 samples, got 2"),
        ((X0, {}, [3] * 10), ValueError, "index must differ between samples, got 3"),
        ((X0.long(),), TypeError, "x0 must be a floating-point"),
    ],
)
def test_wrong_batches_are_named(batch, error, message):
    with pytest.raises(error, match=message):
        validation_loss(small_model, [batch], LINEAR)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="batches must hold at least one sample"):
        validation_loss(small_model, iter([]), LINEAR)
    with pytest.raises(ValueError, match="estimator must not be 'fresh'"):
        validation_loss(small_model, [X0], LINEAR, skip_set=9, estimator="fresh")
    with pytest.raises(ValueError, match="reduction must be left out"):
        validation_loss(small_model, [X0], LINEAR, reduction="mean")
    with pytest.raises(ValueError, match="levels must be at least 2"):
        validation_loss(small_model, [X0], LINEAR, levels=1)
    with pytest.raises(TypeError, match="schedule must be"):
        validation_loss(small_model, [X0], 1000)


@pytest.mark.parametrize("degrees", [3, 4, 9, 30, 999])
@pytest.mark.parametrize("probability", [0.95, 0.975, 0.995])
def test_quantiles_of_students_t(degrees, probability):
    expected = stats.t.ppf(probability, degrees)
    tolerance = 0.005 if degrees >= 9 or (degrees, probability) == (4, 0.975) else 0.08
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=tolerance)
    assert math.isnan(t_quantile(probability, 0))


def test_the_interval_of_a_comparison_covers():
    """Of two models that are equally good on average, 95 % of the intervals hold zero."""
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        difference = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        compared = Comparison({"plain": difference}, {"plain": [1.0] * 3}, [0.0] * 3, 0.95)
        low, high = compared.interval()
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_fixed_times_and_noise_vary_less_than_random_ones():
    """At equal network calls, over seeds, with the data fixed: at least ten times."""

    def ideal(x_t, t):  # for standard normal data
        return LINEAR.alpha_sigma(t)[1].to(x_t).reshape(-1, 1, 1) * x_t

    x0, levels = torch.randn(32, 16, 16, generator=torch.Generator().manual_seed(0)), 8
    fixed = [
        validation_loss(ideal, [x0], LINEAR, levels=levels, seed=seed).overall().mean
        for seed in range(60)
    ]
    generator = torch.Generator().manual_seed(1)
    criterion = SkipStepLoss(LINEAR, 1, tau=1.0)
    random = [
        criterion(ideal, x0.repeat(levels, 1, 1), generator=generator).item() for _ in range(200)
    ]
    error = np.std(random) / 200**0.5 + np.std(fixed) / 60**0.5
    assert np.mean(fixed) == pytest.approx(np.mean(random), abs=4 * error)
    # E (ε - σ x_t)² = ᾱ² + ᾱ (1 - ᾱ) x_0².
    alpha_bar, data = LINEAR.alphas_cumprod, x0.double().square().mean()
    expected = (alpha_bar.square() + alpha_bar * (1 - alpha_bar) * data).mean()
    assert abs(np.mean(fixed) - expected) < 4 * np.std(fixed) / 60**0.5
    assert np.var(random) > 10 * np.var(fixed)
