"""The loss by noise level, and the validation loss: the same inputs every time."""

import copy
import functools
import io
import json
import math
import re
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.monitor import LossByNoise, validation_loss
from s2dm_loss.prediction import evaluating
from s2dm_loss.validation_result import ValidationLoss, t_quantile
from tests.helpers.distributed_workers import small_model
from tests.strategies import COSINE, FLOW, LINEAR, VP, ZERO_SNR, beside, normal, pickled

EDM = NoiseSchedule.from_sigmas(np.geomspace(0.002, 80, 40))
TURNED = ContinuousSchedule.flow(data_at=1)
SCHEDULES = pytest.mark.parametrize(
    "schedule", [TURNED, LINEAR, NoiseSchedule.cosine(100), ZERO_SNR, EDM, FLOW, VP], ids=repr
)
X0 = normal(10, 1, 4, 4, seed=0, dtype=torch.float32)
FOUR, ONES = torch.ones(4).long(), torch.ones(4)


def random_times(schedule, count):
    return schedule.draw_timesteps(count, device=torch.device("cpu"))


def filled(t=(3,), losses=(1.0,), schedule=LINEAR, **options):
    by_noise = LossByNoise(schedule, **options)
    by_noise.update(torch.as_tensor(t), torch.as_tensor(losses))
    return by_noise


def through_json(result):
    return ValidationLoss.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


@SCHEDULES
def test_each_bin_has_mean_count_and_standard_error(schedule):
    t, losses = random_times(schedule, 1000), torch.rand(1000)
    by_noise = LossByNoise(schedule, bins=7)
    for part in zip(t.split(100), losses.split(100), strict=True):
        by_noise.update(*part)
    values, edges = losses.double().numpy(), np.array(by_noise.edges)
    assert np.allclose(np.diff(edges), (edges[-1] - edges[0]) / 7)
    alpha, sigma = (np.asarray(value) for value in schedule.alpha_sigma(t))
    with np.errstate(divide="ignore"):
        log_snr = 2 * (np.log(alpha) - np.log(sigma))
    rows = np.searchsorted(edges[1:-1], log_snr, side="right")
    inside = [values, *(values[rows == row] for row in range(7))]
    means = [v.mean() for v in inside if len(v)]
    expected = [*means, *(stats.sem(v) for v in inside if len(v) > 1), *map(len, inside)]
    assert [*by_noise.compute().values()] == pytest.approx(expected, rel=1e-9)


def test_the_bins_lie_between_the_ends_and_within_ten():
    three = NoiseSchedule.from_log_snr([3.0, 1.0, -2.0]), (-2, 3)
    start = math.log(0.9999 / 1e-4)  # log(ᾱ_0 / (1 - ᾱ_0)) with β_0 = 1e-4
    ends = (FLOW, (-10, 10)), (ZERO_SNR, (-10, start)), (EDM, (-2 * math.log(80), 10)), three
    for schedule, expected in ends:
        edges = LossByNoise(schedule).edges
        assert (edges[0], edges[-1]) == pytest.approx(expected)


def test_times_without_noise_or_signal_are_in_the_outer_bins():
    losses = torch.tensor([2.0, 3.0, 5.0], dtype=torch.bfloat16)
    found = filled([0.0, 1.0, 1.0], losses, FLOW, bins=4).compute()
    errors = np.std([2, 3, 5], ddof=1) / 3**0.5, 1.0  # over all, and of the bin with two
    assert [*found.values()] == pytest.approx([10 / 3, 4, 2, *errors, 3, 2, 0, 0, 1])
    assert [*found][1:3] == ["loss/0_log_snr_below_-5.0", "loss/3_log_snr_above_5.0"]


def test_names_sort_by_noise_and_serve_every_logger():
    names = list(LossByNoise(LINEAR, bins=12, name="train").compute())
    levels = [name for name in names if name.startswith("train_count/")][1:]
    assert levels == sorted(levels)
    assert len(levels) == 12
    assert re.fullmatch(r"[a-z0-9_./-]*", "".join(names))  # MLflow's, too


def test_losses_at_the_edge_of_their_type():
    def found(t, losses):
        return filled(t, torch.tensor(losses, dtype=torch.float64), bins=2).compute()

    # Rounding may leave a variance below 0, and the squares of large losses overflow.
    assert found([5] * 1000, [0.3] * 1000)["loss_error/all"] == 0
    assert found([1, 500], [1e160, 1.0])["loss/all"] == pytest.approx(5e159, rel=1e-15, abs=0)
    over_all_late_early = [*found([0, 999], [math.nan, 1.0]).values()][:3]
    assert over_all_late_early == pytest.approx([math.nan, 1, math.nan], nan_ok=True)


def test_sums_begun_loaded_or_moved_in_inference_mode_go_on_outside():
    loaded, moved, state = filled(), filled(), filled().state_dict()
    with torch.inference_mode():
        begun = filled()
        loaded.load_state_dict(state)
        moved.to("meta")
    for by_noise in (begun, loaded):
        by_noise.update(torch.tensor([3]), torch.tensor([2.0], requires_grad=True))
        assert by_noise.compute()["loss/all"] == 1.5
    moved.reset()  # in place


def test_before_the_first_batch_there_is_nothing_whatever_the_default_device():
    with torch.device("meta"):
        monitor = LossByNoise(LINEAR)
        assert monitor.compute()["loss_count/all"] == 0
        monitor.load_state_dict(monitor.state_dict())


def test_a_checkpoint_restores_the_sums_and_reset_starts_anew():
    by_noise, file = filled(random_times(LINEAR, 50), torch.rand(50)), io.BytesIO()
    torch.save(by_noise.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    # As of another machine, whose logarithms may differ in their last digit.
    state["edges"] = [math.nextafter(edge, math.inf) for edge in state["edges"]]
    restored = filled([0], [9.0])  # which the checkpoint replaces
    restored.load_state_dict(state)
    by_noise.state_dict()["sums"].zero_()  # a copy
    assert restored.compute() == by_noise.compute()
    restored.update(torch.tensor([0]), torch.tensor([9.0]))
    assert restored.compute() != by_noise.compute()
    assert torch.equal(state["sums"], by_noise.state_dict()["sums"])  # a copy was taken
    with pytest.raises(ValueError, match="schedule and the bins"):
        LossByNoise(LINEAR, bins=9).load_state_dict(state)
    restored.reset()
    assert restored.compute() == LossByNoise(LINEAR).compute()


def test_it_is_no_part_of_a_models_checkpoint_and_copies():
    model = nn.Linear(2, 2)
    keys, model.by_noise = list(model.state_dict()), filled()
    assert list(model.to(torch.float16).state_dict()) == keys
    for copied in (copy.deepcopy(model.by_noise), pickled(model.by_noise)):
        assert copied.compute() == model.by_noise.compute()
        copied.update(torch.tensor([3]), torch.tensor([1.0]))
        assert model.by_noise.compute()["loss_count/all"] == 1


@SCHEDULES
def test_no_value_is_read(schedule):
    """Meta and fake tensors have no values, which `compute` reads."""
    t, by_noise = random_times(schedule, 4), LossByNoise(schedule)
    by_noise.update(t.to("meta"), torch.rand(4, device="meta"))
    for on_meta in (by_noise, LossByNoise(LINEAR).to("meta")):
        with pytest.raises(NotImplementedError, match="meta"):
            on_meta.compute()
    by_noise = LossByNoise(schedule)
    with FakeTensorMode(allow_non_fake_inputs=True):
        t = schedule.draw_timesteps(4, device=torch.device("cuda"))
        by_noise.update(t, torch.rand(4, device="cuda"))


@pytest.mark.parametrize(
    ("schedule", "moved"),
    [
        (LINEAR, True),
        pytest.param(LINEAR, False, marks=pytest.mark.slow),
        pytest.param(FLOW, True, marks=pytest.mark.slow),
    ],
)
def test_it_compiles_in_a_step_without_a_graph_break(schedule, moved):
    by_noise, plain = LossByNoise(schedule), LossByNoise(schedule)
    if moved:
        by_noise.to("cpu")
    torch.compiler.reset()
    step = torch.compile(
        lambda t, error: by_noise(t, error.square()).sum(), fullgraph=True, backend="aot_eager"
    )
    for size in (4, 4, 6):
        t, error = random_times(schedule, size), torch.rand(size, requires_grad=True)
        step(t, error).backward()
        plain.update(t, error.square())
        torch.testing.assert_close(error.grad, 2 * error.detach())
    assert by_noise.compute() == pytest.approx(plain.compute(), rel=1e-6)
    if schedule is LINEAR and not moved:  # where compiled code cannot refuse a time outside
        by_noise.reset()
        update = torch.compile(by_noise.update, fullgraph=True, backend="aot_eager")
        update(torch.tensor([1000, 0]), torch.tensor([1.0, 2.0]))
        found = by_noise.compute()
        assert math.isnan(found["loss/all"])
        assert found["loss/9_log_snr_above_7.3"] == 2.0


def test_the_losses_come_out_as_they_went_in_and_the_means_are_plain_numbers():
    losses, by_noise = torch.rand(4, requires_grad=True), LossByNoise(LINEAR)
    assert by_noise(FOUR, losses) is losses
    assert not by_noise.state_dict()["sums"].requires_grad
    assert json.loads(json.dumps(by_noise.compute())) == by_noise.compute()


class Recorder:
    def __init__(self, scale=0.5):
        self.scale, self.calls = scale, []

    def __call__(self, x_t, t, **kwargs):
        self.calls.append((x_t.clone(), t, kwargs))
        return self.scale * x_t


class Network(nn.Module):
    """With dropout, a part that is frozen, and random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.frozen, self.dropout, self.seen = nn.Dropout(0.5).eval(), nn.Dropout(0.5), []

    def forward(self, x_t, t):
        self.seen.append((self.training, torch.is_grad_enabled()))
        return self.dropout(self.frozen(x_t)) + 0.01 * torch.rand_like(x_t)


def validated(model=small_model, batches=X0, schedule=LINEAR, **options):
    batches = [batches] if isinstance(batches, torch.Tensor) else batches
    return validation_loss(model, batches, schedule, **options)


def losses_of(result):
    return {"index": result.index, **result.losses}


@pytest.mark.parametrize("schedule", [LINEAR, VP])
def test_each_sample_has_a_time_in_each_level(schedule):
    length, slack = (1000, 1e-3) if schedule is LINEAR else (1, 0)
    validated(model := Recorder(), schedule=schedule, levels=8)
    times = torch.stack([t for _, t, _ in model.calls]).double() / length
    edges = torch.arange(9)[:, None] / 8
    assert (times >= edges[:-1] - slack).all()
    assert (times < edges[1:]).all()
    # Over the samples, too, they are spread evenly: no two of ten nearer than a twentieth.
    within = (times - edges[:-1]) * 8
    assert (within.sort(1).values.diff() > 1 / 20 - 8 * slack).all()


@pytest.mark.parametrize(
    ("kind", "schedule", "skip", "target"),
    [
        ("epsilon", LINEAR, 49, lambda a, b, noise: noise),
        ("v_prediction", LINEAR, 49, lambda a, b, noise: a * noise - b * X0),
        ("sample", LINEAR, 49, lambda a, b, noise: X0.double()),
        ("flow", FLOW, 0.05, lambda a, b, noise: noise - X0),
        ("velocity", TURNED, 0.05, lambda a, b, noise: X0 - noise),
    ],
)
def test_the_values_are_those_of_the_criterion(kind, schedule, skip, target):
    """From x_t and t that the model was given, with ε solved for."""
    model, options = Recorder(), {"tau": 0.9, "prediction_type": kind}
    found = validated(model, schedule=schedule, levels=4, skip_set=skip, **options).losses
    criterion = SkipStepLoss(schedule, skip, reduction="none", **options)
    # Levels count from noise to data.
    calls = sorted(model.calls, key=lambda call: schedule.log_alphas_cumprod_at(call[1])[0])
    for level, (x_t, t, _) in enumerate(calls):
        a, b = (beside(scale, x_t) for scale in schedule.alpha_sigma(t))
        noise = (x_t - a * X0) / b
        expected = {
            "plain": (0.5 * x_t - target(a, b, noise)).square().flatten(1).mean(1),
            "skip_step": criterion(lambda x_t, t: 0.5 * x_t, X0.double(), t, noise=noise),
        }
        of_level = {name: losses[:, level] for name, losses in found.items()}
        torch.testing.assert_close(of_level, expected, rtol=1e-4, atol=1e-5)
    assert len(model.calls) == 4  # one for both losses


def test_noise_is_standard_and_another_for_each_sample_level_and_seed():
    drawn = []
    for seed in (0, 1):
        validated(model := Recorder(), torch.zeros(200, 4, 4), levels=4, seed=seed)
        drawn += [x_t / beside(LINEAR.alpha_sigma(t)[1], x_t) for x_t, t, _ in model.calls]
    noise = torch.stack(drawn).reshape(8 * 200, 16)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    correlations = torch.corrcoef(noise).fill_diagonal_(0)
    assert correlations.abs().max() < 0.97  # of 1.3 million pairs of 16 values
    assert abs(correlations.mean()) < 1e-3


def test_two_calls_are_equal_bit_for_bit_and_leave_random_numbers_alone():
    model, results = Network(), []
    loader = DataLoader(TensorDataset(X0), batch_size=4, shuffle=True)
    for seed, default in ((5, torch.float32), (6, torch.float64)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        torch.set_default_dtype(default)
        results.append(losses_of(validated(model, loader, levels=4, skip_set=9)))
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    other = validated(model, levels=4, skip_set=9, seed=1)
    assert not torch.equal(other.losses["plain"], results[0]["plain"])


@pytest.mark.parametrize("schedule", [LINEAR, VP])
def test_the_batch_size_changes_nothing(schedule):
    whole = losses_of(validated(schedule=schedule))
    for size in (1, 4):
        parts = losses_of(validated(batches=X0.split(size), schedule=schedule))
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


def test_a_schedule_of_one_timestep_has_a_validation_loss():
    model, one = Recorder(), NoiseSchedule.from_betas([0.5])
    assert validated(model, schedule=one, levels=2).overall().mean > 0
    assert all((t == 0).all() for _, t, _ in model.calls)


def test_batches_may_be_empty_and_samples_numbers():
    numbers = torch.randn(6)
    shapes = [numbers[:0], numbers, numbers[:0]], numbers, numbers[:, None]
    first, *others = (losses_of(validated(Recorder(), batches)) for batches in shapes)
    torch.testing.assert_close(others, [first, first], rtol=0, atol=0)


def test_a_given_index_says_which_sample_it_is():
    whole, order = validated(), torch.tensor([7, 0, 3, 9])
    some = validated(batches=[(X0[order], {}, order)])
    assert some.index.tolist() == [0, 3, 7, 9]
    assert torch.equal(some.losses["plain"], whole.losses["plain"][some.index])


def test_the_model_is_in_evaluation_mode_and_back_as_it_was():
    model = Network()
    validated(model, levels=2)
    assert model.seen == [(False, False)] * 2
    assert [m.training for m in model.modules()] == [True, False, True]
    model.forward = lambda x_t, t: x_t[:, 0]
    with pytest.raises(ValueError, match="shape of x0"):
        validated(model, levels=2)
    assert model.training
    assert torch.is_grad_enabled()


NAMED = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))


def ways_to_call(network):
    holder = types.SimpleNamespace(parts={"network": network})
    yield types.MethodType(lambda self, x_t, t: self.parts["network"](x_t), holder)
    yield lambda x_t, t, net=network: net(x_t)
    yield functools.wraps(len)(lambda x_t, t: network(x_t))
    # Compiled, no hook is called, and the network has to be named.
    compiled = functools.partial(torch.compile, backend="eager")
    network.guided = types.MethodType(lambda self, x_t, t: self(x_t), network)
    yield compiled(network.guided)
    yield compiled(functools.wraps(network)(lambda x_t, t: network(x_t)))
    yield compiled(torch.no_grad()(lambda x_t, t: network(x_t)))
    yield functools.partial(compiled(lambda net, x_t, t: net(x_t)), network)
    yield compiled(lambda x_t, t: NAMED(x_t))


def test_evaluating_within_itself_and_in_two_threads():
    network, other, first = nn.Dropout(0.5), ThreadPoolExecutor(1), evaluating(len)
    other.submit(first.__enter__).result()
    with evaluating(len), evaluating(len):
        other.submit(first.__exit__, None, None, None).result()
        assert torch.equal(network(X0), X0)
    assert network.training


def test_a_function_that_calls_a_network_evaluates_it():
    for model in ways_to_call(NAMED):
        seen = set()
        hook = NAMED.register_forward_pre_hook(lambda net, _, seen=seen: seen.add(net[0].training))
        validated(model, [torch.randn(6, 2)], levels=2)
        hook.remove()
        assert seen == {False}
        assert all(part.training for part in NAMED.modules())
    assert NAMED[1].num_batches_tracked == 0


def test_evaluating_leaves_other_threads_and_compiled_code_alone():
    torch.compiler.reset()
    trained, networks, graphs, counts = [nn.Dropout(0.5)], [nn.Dropout(0.5)], [], []
    options = {"backend": lambda graph, _: graphs.append(graph) or graph, "fullgraph": True}
    networks[0].compile(**options)
    networks.append(torch.compile(networks[0], **options))

    def model(x_t, t):
        ThreadPoolExecutor(1).submit(trained[0], x_t).result()
        assert trained[0].training
        return networks[1](networks[0](x_t))

    for _ in range(3):
        validated(model, levels=2)
        assert networks[0].training
        counts.append(len(graphs))
    assert counts[0] == counts[2] > 0


def test_arguments_of_the_model_go_with_their_batch():
    labels = torch.arange(10)
    batches = [(X0[:6], {"y": labels[:6]}), [X0[6:], {"y": labels[6:], "scale": 2}]]
    validated(model := Recorder(), batches, levels=2)
    seen = [kwargs for _, _, kwargs in model.calls]
    assert [each["y"].tolist() for each in seen] == [[*range(6)]] * 2 + [[*range(6, 10)]] * 2
    assert seen[-1]["scale"] == 2


def test_means_and_errors_metrics_and_table():
    result = validated(levels=4, skip_set=9)
    losses, levels = result.losses["plain"].numpy(), result.by_level()
    assert [e.mean for e in levels] == pytest.approx(losses.mean(0), rel=1e-12)
    assert [e.error for e in levels] == pytest.approx(stats.sem(losses, axis=0), rel=1e-12)
    assert result.overall() == pytest.approx((losses.mean(), stats.sem(losses.mean(1))), rel=1e-12)
    assert result.log_snr == pytest.approx(LINEAR.log_snr[[875, 625, 375, 125]].tolist())
    with pytest.raises(ValueError, match="kind must be one of 'plain'"):
        validated(levels=2).overall("skip_step")
    metrics = result.metrics("valid")
    assert all(type(value) is float for value in metrics.values())
    assert (metrics["valid/plain"], metrics["valid/plain_error"]) == result.overall()
    name = f"valid_skip_step/02_log_snr_{result.log_snr[2]:.1f}"
    assert metrics[name] == result.by_level("skip_step")[2].mean
    assert len(metrics) == 2 * (2 + 4)
    head, _, *levels, last = str(result).splitlines()
    assert head.startswith("validation loss of 10 samples at 4 levels")
    assert (len(levels), last.split()[1]) == (4, f"{result.overall().mean:.5g}")


def test_a_comparison_is_paired():
    first, second = (validated(Recorder(s), levels=4, skip_set=9) for s in (0.50, 0.51))
    compared = first.compare(second)
    for kind, confidence in (("plain", 0.95), ("skip_step", 0.95), ("plain", 0.99)):
        found = first.compare(second, confidence=confidence).interval(kind)
        per_sample = (first.losses[kind] - second.losses[kind]).mean(1).numpy()
        expected = stats.ttest_1samp(per_sample, 0).confidence_interval(confidence)
        assert found == pytest.approx((expected.low, expected.high), rel=1e-3)
    half = (compared.interval()[1] - compared.interval()[0]) / 2
    assert half < 0.1 * 2 * first.overall().error  # what two separate means would have
    percent = 100 * (first.overall().mean / second.overall().mean - 1)
    assert f"({percent:+.2f} %)" in str(compared)
    assert f"loss {'lower' if percent < 0 else 'higher'}: " in str(compared)
    assert "not told apart" in str(first.compare(first))
    for scale in (math.nan, math.inf):
        broken = validated(Recorder(scale), levels=4, skip_set=9).compare(first)
        assert str(broken).startswith("plain loss not finite: ")


def test_only_the_same_is_compared():
    result = validated(levels=4)
    changes = {"seed": 1, "levels": 5, "skip_set": 9, "schedule": COSINE, "weighting": "min_snr"}
    for name, value in changes.items():
        with pytest.raises(ValueError, match=f"other must have the same {name}"):
            result.compare(validated(**{"levels": 4, name: value}))
    same = validated(levels=4, prediction_type="epsilon", tau=0.5)
    assert result.compare(same).overall().mean == 0
    for x0 in (X0[:9], X0.flip(0), X0 * 1.1):
        with pytest.raises(ValueError, match="same samples, in the same order"):
            result.compare(validated(batches=x0, levels=4))
    with pytest.raises(TypeError, match="must be a ValidationLoss"):
        result.compare(0.3)


def test_samples_are_told_apart_whatever_their_mean_and_type():
    """Each of mean 0, as standardised data are; and some much larger than others."""
    ours, theirs = (x0 - x0.mean(1, keepdim=True) for x0 in torch.randn(2, 500, 192))
    ours *= torch.logspace(-3, 3, 500)[:, None]
    result, same, *others = (
        validated(Recorder(), x0, levels=2)
        for x0 in (ours, ours.bfloat16(), theirs, 1.1 * ours, ours.flip(1))
    )
    assert result.compare(same).differences
    for other in others:
        with pytest.raises(ValueError, match="same samples"):
            result.compare(other)


def test_a_result_of_another_machine_is_compared():
    """Whose logarithms may differ in their last digit, as those of CPUs without AVX2 do."""
    result = validated(levels=4)
    other = replace(result, log_snr=[math.nextafter(x, math.inf) for x in result.log_snr])
    assert result.compare(other).overall().mean == 0
    moved = replace(result, log_snr=[x + 1e-6 for x in result.log_snr])
    with pytest.raises(ValueError, match="the same schedule"):
        result.compare(moved)


def constant(value):
    """A weighting whose name does not show its value."""
    module = nn.Module()
    module.forward = lambda log_snr: torch.full_like(log_snr, value)
    return module


def a_path(power):
    """Of one SNR, and of another scale for each power."""
    return ContinuousSchedule.from_alpha_sigma(
        lambda t: [(1 + 100 * t * t) ** power * part for part in (1, 10 * t)]
    )


@pytest.mark.parametrize(
    ("option", "kept", "of_value"),
    [
        ("weighting", "weighting", constant),
        ("weighting", "weighting", lambda x: lambda log_snr: (x / 400 - log_snr).sigmoid()),
        ("skip_set", "timesteps", lambda t: SkipSet.from_timesteps([0, 1, 2, t, 400, 500, 600])),
        ("schedule", "alpha", lambda t: a_path(-t / 400)),
    ],
)
def test_what_a_name_does_not_show_is_kept(option, kept, of_value):
    """But no address in memory, which is another in the next process."""
    first, again, second = (validated(levels=4, **{option: of_value(x)}) for x in (200, 200, 300))
    assert first.log_snr == pytest.approx(second.log_snr)
    assert " at 0x" not in str(first.settings)
    assert first.settings[option] == second.settings[option] or kept == option
    first = through_json(first)
    assert first.compare(again).overall().mean == 0
    with pytest.raises(ValueError, match=f"must have the same {kept}"):
        first.compare(second)


def test_it_goes_through_json_and_back():
    """With infinity and NaN, which JSON has no number for, and NumPy's integers."""
    result = validated(skip_set=9, weighting="min_snr", max_c2=math.inf)
    assert result.overall().mean < validated().overall().mean  # of weights of at most 1
    one = {"batches": X0[:1], "levels": np.int64(4), "seed": np.int64(3)}
    for kept, other in (
        (result, result),
        (validated(**one), validated(batches=X0[:1], levels=4, seed=3)),
    ):
        again = through_json(kept)
        torch.testing.assert_close(losses_of(again), losses_of(kept), rtol=0, atol=0)
        assert again.settings == kept.settings
        assert again.compare(other).overall().mean == 0
    assert math.isnan(again.overall().error)
    assert (result.settings["weighting"], result.settings["max_c2"]) == ("min_snr(5)", math.inf)
    state = result.to_dict()
    assert state["overall"]["plain"]["mean"] == result.overall().mean
    assert state["by_level"]["skip_step"][3]["error"] == result.by_level("skip_step")[3].error


def test_figures(tmp_path, monkeypatch):
    result, other = (validated(model, levels=3, skip_set=9) for model in (small_model, Recorder()))
    figure = result.plot()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["plain", "S²-DM"]
    drawn = axes.containers[1].lines[0].get_xydata()
    means = [estimate.mean for estimate in result.by_level("skip_step")]
    assert np.allclose(drawn, np.c_[result.log_snr, means])
    assert axes.get_yscale() == "log"
    figure.savefig(tmp_path / "loss.png")
    first, second = (found.losses["plain"].mean(0).numpy() for found in (result, other))
    drawn = result.compare(other).plot().axes[0].containers[0].lines[0].get_ydata()
    assert np.allclose(drawn, 100 * (first / second - 1))
    perfect = replace(other, losses={kind: 0 * losses for kind, losses in other.losses.items()})
    drawn = result.compare(perfect).plot().axes[0].containers[0].lines[0].get_ydata()
    assert np.isnan(drawn.astype(float)).all()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        result.plot()


@pytest.mark.parametrize("installed", [True, False])
def test_a_bar_is_shown_on_a_terminal(monkeypatch, capsys, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    for terminal, progress in ((True, False), (True, True), (False, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        validated(progress=progress)
        shown = capsys.readouterr().err
        expected = terminal and progress and installed
        assert ("validation loss" in shown, bool(shown)) == (expected, expected)


update = LossByNoise(LINEAR).update


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: update(ONES, ONES), TypeError, "t must hold integer timesteps"),
        (lambda: update(FOUR, ONES.sum()), ValueError, 'reduction="none"'),
        (lambda: update(FOUR, ONES[:, None]), ValueError, r"shape \(4,\), one loss for each t"),
        (lambda: update(FOUR[:, None], ONES[:, None]), ValueError, r"t must .* shape \(B,\)"),
        (lambda: update(FOUR, FOUR), TypeError, "floating-point"),
        (lambda: update(FOUR, 0.3), TypeError, "floating-point"),
        (lambda: update(ONES.clone().requires_grad_(), ONES), ValueError, "times come first"),
        (lambda: update(1000 * FOUR, ONES), ValueError, r"t must lie in \[0, 1000\)"),
        (lambda: LossByNoise(LINEAR, bins=1), ValueError, "bins must be at least 2"),
        (lambda: LossByNoise(1000), TypeError, "schedule must be"),
        (lambda: LossByNoise(NoiseSchedule.from_log_snr([3.0])), ValueError, "two noise levels"),
        (lambda: validated(batches=[(X0, torch.arange(10))]), TypeError, r"labels give `\(\(x, \{"),
        (lambda: validated(batches=[{"x": X0}]), TypeError, "batches must hold x_0"),
        (lambda: validated(batches=[(X0, {}, [1], 2)]), TypeError, "batches must hold x_0"),
        (lambda: validated(batches=[(X0, {}, [1, 2])]), ValueError, "for each of 10 .*, got 2"),
        (lambda: validated(batches=[(X0, {}, [3] * 10)]), ValueError, "index must differ .*got 3"),
        (lambda: validated(batches=[(X0.long(),)]), TypeError, "x0 must be a floating-point"),
        (lambda: validation_loss(small_model, X0, LINEAR), TypeError, r"give `x0.split\(64\)`"),
        (lambda: validated(batches=[X0[:0]]), ValueError, "batches must hold at least one sample"),
        (lambda: validated(batches=iter([])), ValueError, "batches must hold at least one sample"),
        (lambda: validated(skip_set=9, estimator="fresh"), ValueError, "must not be 'fresh'"),
        (lambda: validated(reduction="mean"), ValueError, "reduction must be left out"),
        (lambda: validated(seed="a"), TypeError, "seed must be an int"),
        (lambda: validated(levels=1), ValueError, "levels must be at least 2"),
        (lambda: validated(schedule=1000), TypeError, "schedule must be"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("degrees", [3, 4, 9, 30, 999])
@pytest.mark.parametrize("probability", [0.95, 0.975, 0.995])
def test_quantiles_of_students_t(degrees, probability):
    expected = stats.t.ppf(probability, degrees)
    tolerance = 0.005 if degrees >= 9 or (degrees, probability) == (4, 0.975) else 0.08
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=tolerance)
    assert math.isnan(t_quantile(probability, 0))
    for few in (1, 2):
        assert t_quantile(probability, few) == pytest.approx(stats.t.ppf(probability, few))
