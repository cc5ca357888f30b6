"""The loss by noise level: what is in each bin, and what it costs the training loop."""

import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.monitor import LossByNoise
from tests.helpers import monitor_workers
from tests.helpers.distributed import run_distributed
from tests.test_tracing import needs_compiler

LINEAR, FLOW = NoiseSchedule.linear(1000), ContinuousSchedule.flow()
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
EDM = NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 40))
TURNED = ContinuousSchedule.flow(data_at=1)
SCHEDULES = pytest.mark.parametrize(
    "schedule",
    [TURNED, LINEAR, NoiseSchedule.cosine(100), ZERO_SNR, EDM, FLOW, ContinuousSchedule.vp()],
)


def random_times(schedule, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return schedule.draw_timesteps(count, device=torch.device("cpu"), generator=generator)


def log_snr_of(schedule, t):
    """From the path's coefficients, in NumPy."""
    alpha, sigma = (np.asarray(value) for value in schedule.alpha_sigma(t))
    with np.errstate(divide="ignore"):
        return 2 * (np.log(alpha) - np.log(sigma))


@SCHEDULES
def test_each_bin_has_mean_count_and_standard_error(schedule):
    t = torch.cat([random_times(schedule, 500), random_times(schedule, 500, 1)])
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    by_noise = LossByNoise(schedule, bins=7)
    for part in range(0, 1000, 100):
        by_noise.update(t[part : part + 100], losses[part : part + 100])
    found, values = by_noise.compute(), losses.double().numpy()

    edges = np.array(by_noise.edges)
    assert np.allclose(np.diff(edges), (edges[-1] - edges[0]) / 7)
    rows = np.searchsorted(edges[1:-1], log_snr_of(schedule, t), side="right")
    assert found["loss_count/all"] == 1000
    assert found["loss/all"] == pytest.approx(values.mean(), rel=1e-12)
    assert found["loss_error/all"] == pytest.approx(values.std(ddof=1) / 1000**0.5, rel=1e-9)
    means = [value for key, value in found.items() if key.startswith("loss/")][1:]
    counts = [value for key, value in found.items() if key.startswith("loss_count/")][1:]
    errors = [value for key, value in found.items() if key.startswith("loss_error/")][1:]
    assert counts == [(rows == row).sum() for row in range(7)]
    inside = [values[rows == row] for row in range(7)]
    assert means == pytest.approx([v.mean() for v in inside if len(v)], rel=1e-12)
    expected = [v.std(ddof=1) / len(v) ** 0.5 for v in inside if len(v) > 1]
    assert errors == pytest.approx(expected, rel=1e-9)


def test_the_bins_lie_between_the_ends_and_within_ten():
    def ends(schedule):
        edges = LossByNoise(schedule).edges
        return edges[0], edges[-1]

    # log(ᾱ_0 / (1 - ᾱ_0)) with β_0 = 1e-4; the other end is at -10.1.
    assert ends(LINEAR) == pytest.approx((-10, math.log(0.9999 / 1e-4)))
    assert ends(FLOW) == (-10, 10)
    assert ends(ZERO_SNR)[0] == -10
    assert ends(EDM) == pytest.approx((-2 * math.log(80), 10))
    few = NoiseSchedule.from_log_snr([3.0, 1.0, -2.0])
    assert ends(few) == pytest.approx((-2, 3))


def test_times_without_noise_or_signal_are_in_the_outer_bins():
    by_noise = LossByNoise(FLOW, bins=4)
    by_noise.update(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([2.0, 3.0, 5.0]))
    assert by_noise.compute() == {
        "loss/all": pytest.approx(10 / 3),
        "loss/0_log_snr_below_-5.0": 4.0,
        "loss/3_log_snr_above_5.0": 2.0,
        "loss_error/all": pytest.approx(np.std([2, 3, 5], ddof=1) / 3**0.5),
        "loss_error/0_log_snr_below_-5.0": 1.0,
        "loss_count/all": 3.0,
        "loss_count/0_log_snr_below_-5.0": 2.0,
        "loss_count/1_log_snr_-5.0_to_0.0": 0.0,
        "loss_count/2_log_snr_0.0_to_5.0": 0.0,
        "loss_count/3_log_snr_above_5.0": 1.0,
    }
    by_noise = LossByNoise(ZERO_SNR, bins=4)
    by_noise.update(torch.tensor([999]), torch.tensor([2.0]))
    assert by_noise.compute()["loss/0_log_snr_below_" + f"{by_noise.edges[1]:.1f}"] == 2.0


def test_a_level_is_the_same_noise_in_either_direction_of_time():
    t, losses = random_times(FLOW, 100), torch.rand(100)
    forward, backward = LossByNoise(FLOW), LossByNoise(TURNED)
    forward.update(t.double(), losses)
    backward.update(1 - t.double(), losses)
    assert forward.compute() == backward.compute()


def test_names_sort_by_noise_and_serve_every_logger():
    names = list(LossByNoise(LINEAR, bins=12, name="train").compute())
    levels = [name for name in names if name.startswith("train_count/")][1:]
    assert levels == sorted(levels)
    assert len(levels) == 12
    for name in names:
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-./")  # MLflow's, too


def test_calling_it_returns_the_losses_with_their_gradient():
    by_noise, losses = LossByNoise(LINEAR), torch.rand(4, requires_grad=True)
    t = torch.tensor([1, 2, 3, 999])
    returned = by_noise(t, losses)
    returned.mean().backward()
    assert returned is losses
    assert losses.grad.tolist() == [0.25] * 4
    assert not by_noise.state_dict()["sums"].requires_grad


def test_half_types_are_summed_in_float64():
    by_noise = LossByNoise(LINEAR)
    losses = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    for _ in range(10):
        by_noise.update(torch.full((1000,), 5), losses)
    assert by_noise.compute()["loss/all"] == pytest.approx(losses[0].item(), rel=1e-12)
    assert by_noise.compute()["loss_error/all"] == pytest.approx(0, abs=1e-9)


def test_a_loss_that_is_not_finite_shows_in_its_bin_alone():
    by_noise = LossByNoise(LINEAR, bins=2)
    by_noise.update(torch.tensor([0, 999]), torch.tensor([math.nan, 1.0]))
    found = by_noise.compute()
    assert math.isnan(found["loss/all"])
    assert math.isnan(found["loss/1_log_snr_above_-0.4"])
    assert found["loss/0_log_snr_below_-0.4"] == 1.0


def test_reset_starts_anew():
    by_noise = LossByNoise(LINEAR)
    empty = by_noise.compute()
    by_noise.reset()
    by_noise.update(torch.tensor([3]), torch.tensor([1.0]))
    assert by_noise.compute() != empty
    by_noise.reset()
    assert by_noise.compute() == empty
    assert empty["loss_count/all"] == 0
    assert "loss/all" not in empty


def test_sums_begun_in_inference_mode_go_on_outside():
    by_noise = LossByNoise(LINEAR)
    with torch.inference_mode():
        by_noise.update(torch.tensor([3]), torch.tensor([1.0]))
    by_noise.update(torch.tensor([3]), torch.tensor([2.0], requires_grad=True))
    assert by_noise.compute()["loss/all"] == 1.5


@pytest.mark.parametrize(
    ("t", "losses", "error", "message"),
    [
        (torch.ones(4), torch.ones(4), TypeError, "t must hold integer timesteps"),
        (torch.ones(4).long(), torch.tensor(1.0), ValueError, 'reduction="none"'),
        (torch.ones(4).long(), torch.ones(4, 1), ValueError, r"shape \(4,\), one loss for each t"),
        (torch.ones(4, 1).long(), torch.ones(4, 1), ValueError, r"t must .* shape \(B,\)"),
        (torch.ones(4).long(), torch.ones(4).long(), TypeError, "floating-point"),
        (torch.ones(4).long(), 0.3, TypeError, "floating-point"),
        (torch.ones(4, requires_grad=True), torch.ones(4), ValueError, "the times come first"),
        (torch.tensor([1000]), torch.ones(1), ValueError, r"t must lie in \[0, 1000\)"),
    ],
)
def test_wrong_arguments_are_named(t, losses, error, message):
    with pytest.raises(error, match=message):
        LossByNoise(LINEAR).update(t, losses)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="bins must be at least 2"):
        LossByNoise(LINEAR, bins=1)
    with pytest.raises(TypeError, match="schedule must be"):
        LossByNoise(1000)
    with pytest.raises(ValueError, match="two noise levels"):
        LossByNoise(NoiseSchedule.from_log_snr([3.0]))


def test_a_checkpoint_restores_the_sums():
    by_noise = LossByNoise(LINEAR)
    by_noise.update(random_times(LINEAR, 50), torch.rand(50))
    file = io.BytesIO()
    torch.save(by_noise.state_dict(), file)
    file.seek(0)
    restored = LossByNoise(LINEAR)
    restored.update(torch.tensor([0]), torch.tensor([9.0]))  # which the checkpoint replaces
    state = torch.load(file, weights_only=True)
    restored.load_state_dict(state)
    assert restored.compute() == by_noise.compute()
    restored.update(torch.tensor([0]), torch.tensor([9.0]))
    assert restored.compute() != by_noise.compute()
    assert torch.equal(state["sums"], by_noise.state_dict()["sums"])  # a copy was taken
    with pytest.raises(ValueError, match="schedule and the bins"):
        LossByNoise(LINEAR, bins=9).load_state_dict(state)


def test_it_is_no_part_of_a_models_checkpoint_and_copies():
    model = torch.nn.Linear(2, 2)
    keys = list(model.state_dict())
    model.by_noise = LossByNoise(LINEAR)
    model.by_noise.update(torch.tensor([3]), torch.tensor([1.0]))
    assert list(model.state_dict()) == keys
    model.to(torch.float16)
    for copied in (copy.deepcopy(model.by_noise), pickle.loads(pickle.dumps(model.by_noise))):  # noqa: S301
        assert copied.compute() == model.by_noise.compute()
        copied.update(torch.tensor([3]), torch.tensor([1.0]))
        assert model.by_noise.compute()["loss_count/all"] == 1


@SCHEDULES
def test_no_value_is_read(schedule):
    """Meta and fake tensors have no values; see tests/test_no_sync.py."""
    by_noise = LossByNoise(schedule)
    t = random_times(schedule, 4)
    by_noise.update(t.to("meta"), torch.rand(4, device="meta"))
    assert by_noise._sums.device.type == "meta"
    by_noise = LossByNoise(schedule)
    with FakeTensorMode(allow_non_fake_inputs=True):
        t = schedule.draw_timesteps(4, device=torch.device("cuda"))
        by_noise.update(t, torch.rand(4, device="cuda"))
        assert by_noise._sums.device.type == "cuda"
        assert by_noise._sums.dtype == torch.float64


def test_the_sums_follow_the_losses_to_another_device():
    by_noise = LossByNoise(LINEAR)
    by_noise.update(torch.tensor([3]), torch.tensor([1.0]))
    by_noise.update(torch.tensor([3]), torch.rand(1, device="meta"))
    assert by_noise._sums.device.type == "meta"
    assert LossByNoise(LINEAR).to("meta")._sums.device.type == "meta"


@needs_compiler
@pytest.mark.parametrize("schedule", [LINEAR, FLOW])
@pytest.mark.parametrize("moved", [True, False])
def test_it_compiles_in_a_step_without_a_graph_break(schedule, moved):
    by_noise, plain = LossByNoise(schedule), LossByNoise(schedule)
    if moved:
        by_noise.to("cpu")

    def step(output, target, t):
        losses = F.mse_loss(output, target, reduction="none").flatten(1).mean(1)
        return by_noise(t, losses).mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for size in (4, 4, 6):
        output, target = torch.rand(2, size, 3, generator=torch.Generator().manual_seed(size))
        output.requires_grad_()
        t = random_times(schedule, size)
        compiled(output, target, t).backward()
        losses = (output - target).square().mean(1)
        plain.update(t, losses)
        assert output.grad is not None
    for name, value in plain.compute().items():
        assert by_noise.compute()[name] == pytest.approx(value, rel=1e-6)


@needs_compiler
def test_a_time_outside_the_schedule_shows_in_compiled_code():
    by_noise = LossByNoise(LINEAR)
    torch.compile(by_noise.update, fullgraph=True, backend="aot_eager")(
        torch.tensor([1000, 0]), torch.tensor([1.0, 2.0])
    )
    found = by_noise.compute()
    assert math.isnan(found["loss/all"])
    assert found["loss/9_log_snr_above_7.3"] == 2.0


def test_processes_add_up_to_one(tmp_path):
    t = random_times(LINEAR, 60)
    losses = torch.rand(60, generator=torch.Generator().manual_seed(3))
    ranks = run_distributed(monitor_workers.by_noise, tmp_path, 3, t, losses, world_size=3)
    seen = [i for i in range(60) if i % 3 < 2]
    alone = LossByNoise(LINEAR)
    alone.update(t[seen], losses[seen])
    first = alone.compute()
    alone.update(t, losses)
    second = alone.compute()
    for rank in ranks:
        assert rank["first"] == pytest.approx(first)
        assert rank["second"] == pytest.approx(second)
        assert rank["state"]["sums"][0].sum() == len(seen)


def test_the_losses_of_the_criterion_go_in():
    criterion = SkipStepLoss(LINEAR, 49, reduction="none")
    by_noise = LossByNoise(LINEAR)
    x0, t = torch.rand(32, 1, 4, 4), random_times(LINEAR, 32)
    loss = by_noise(t, criterion(lambda x_t, t: 0.5 * x_t, x0, t)).mean()
    assert by_noise.compute()["loss/all"] == pytest.approx(loss.item())
    assert json.loads(json.dumps(by_noise.compute())) == by_noise.compute()
