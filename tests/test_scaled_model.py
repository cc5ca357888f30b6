"""The gain without training."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss, gain
from s2dm_loss.prediction import epsilon_from_output
from s2dm_loss.sampling import ScaledModel
from tests.strategies import normal, targets_of

LINEAR = NoiseSchedule.linear(1000)


def s_of(t, k=99, tau=0.99):
    """1/s = 1 + ((1-τ)/τ) c², from the table of ᾱ."""
    bar = LINEAR.alphas_cumprod
    return 1.0 if t < k else 1 / (1 + (1 - tau) / tau * (float(bar[t - k] / bar[t]) - 1))


class Model(nn.Module):
    def __init__(self, kind="tensor"):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.seen = []

    def forward(self, x_t, t, label=None):
        self.seen.append((t, label))
        out = self.weight * x_t
        if self.kind == "tuple":
            return out, "extra"
        if self.kind == "sample":
            return Output(out)
        if self.kind == "learned variance":
            return torch.cat([out, out * 2], dim=1)
        return out


class Output:
    def __init__(self, sample):
        self.sample = sample
        self.other = "kept"


def test_gain():
    s = gain(LINEAR, 99)
    for t in (0, 98, 99, 500, 999):
        assert float(s[t]) == pytest.approx(s_of(t), rel=1e-12)
    at = torch.tensor([[3, 500], [99, 999]])
    assert torch.equal(gain(LINEAR, 99, t=at), s[at])


@pytest.mark.parametrize("kind", ["tensor", "tuple", "sample", "learned variance"])
def test_scales_the_prediction_and_nothing_else(kind):
    model, x_t, t = Model(kind), normal(3, 2, 4, seed=0), torch.tensor([0, 500, 999])
    output = ScaledModel.with_gain(model, LINEAR, 99)(x_t, t, label="y")
    assert model.seen == [(t, "y")]
    expected = 0.7 * x_t * torch.tensor([s_of(0), s_of(500), s_of(999)]).double()[:, None, None]
    if kind == "tuple":
        assert output[1] == "extra"
        output = output[0]
    elif kind == "sample":
        assert output.other == "kept"
        output = output.sample
    elif kind == "learned variance":
        torch.testing.assert_close(output[:, 2:], 1.4 * x_t)
        output = output[:, :2]
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "t", [500, torch.tensor(500), torch.tensor([500]), 500.3, torch.tensor(499.6)], ids=repr
)
def test_one_time_for_all_and_fractional_times(t):
    x_t = normal(3, 2, seed=0)
    output = ScaledModel.with_gain(Model(), LINEAR, 99)(x_t, t)
    torch.testing.assert_close(output, 0.7 * s_of(500) * x_t, rtol=1e-12, atol=0)


def test_a_timestep_that_bfloat16_rounds_up_is_the_last_one():
    """Pipelines cast t to the network's dtype, and bfloat16 has no 999 but 1000."""
    x_t = normal(3, 2, seed=0)
    shrunk = ScaledModel.with_gain(Model(), LINEAR, 99)
    output = shrunk(x_t, torch.tensor([999, 501, 3]).bfloat16())
    wanted = torch.tensor([s_of(999), s_of(500), s_of(3)], dtype=torch.float64)[:, None]
    torch.testing.assert_close(output, 0.7 * wanted * x_t, rtol=1e-12, atol=0)
    for outside in (torch.tensor(1000.0), torch.tensor(1200.0).bfloat16(), -4.0):
        with pytest.raises(ValueError, match="must lie in"):
            shrunk(x_t, outside)


@pytest.mark.parametrize(
    "t", [0.999, 0.5, torch.tensor(0.25), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.5]).half()]
)
def test_t_over_the_number_of_timesteps_is_no_timestep(t):
    """Else it would be rounded to row 0, where s = 1, without a word."""
    model = Model()
    with pytest.raises(ValueError, match=r"t must hold timesteps from 0 to 999.*t / T.*rescale"):
        ScaledModel.with_gain(model, LINEAR, 99)(normal(3, 2, seed=0), t)
    assert not model.seen


def test_the_last_fractional_timesteps_of_euler_are_right():
    """Below 1 as well, as of a sampler with more steps than T / 2, once a larger one was seen."""
    shrunk, x_t = ScaledModel.with_gain(Model(), LINEAR, 1, tau=0.01), normal(3, 2, seed=0)
    for t in (998.4, 1.6, 0.7, 0.2, 0.0):
        expected = 0.7 * s_of(round(t), k=1, tau=0.01) * x_t
        torch.testing.assert_close(shrunk(x_t, t), expected, rtol=1e-12, atol=0)
    # And where nothing was seen: 0 and 1 are timesteps.
    fresh = ScaledModel.with_gain(Model(), LINEAR, 1, tau=0.01)
    for t in (0.0, 1.0):
        expected = 0.7 * s_of(round(t), k=1, tau=0.01) * x_t
        torch.testing.assert_close(fresh(x_t, t), expected, rtol=1e-12, atol=0)


def test_a_sigma_is_no_timestep_of_a_table_of_sigmas():
    """Else σ = 3.7 would be rounded to the row 4 of the table, without a word."""
    sigmas = torch.logspace(-2, 1.9, 100, dtype=torch.float64)
    x_t = normal(3, 2, seed=0)
    model = Model()
    shrunk = ScaledModel.with_gain(model, NoiseSchedule.from_sigmas(sigmas), 9)
    for sigma in (3.7, 5.0, torch.tensor(80.0), torch.full((3,), 0.5, dtype=torch.float64)):
        with pytest.raises(TypeError, match=r"integer timesteps.*rescale"):
            shrunk(x_t, sigma)
    # What the message says: σ for the network, its row for the gain.
    row = 60
    c2 = (1 + sigmas[row] ** 2) / (1 + sigmas[row - 9] ** 2) - 1
    output = shrunk.rescale(model(x_t, sigmas[row]), x_t, row)
    s = 1 / (1 + 0.01 / 0.99 * c2)
    torch.testing.assert_close(output, 0.7 * s * x_t, rtol=1e-12, atol=0)


# ∂ε̂/∂output squared, on a path with a² = ᾱ: what c² may be at most, over max_c2.
RATIO_SQUARED = {
    "epsilon": torch.ones_like,
    "v_prediction": lambda bar: bar,
    "sample": lambda bar: bar / (1 - bar),
    "flow": lambda bar: bar / (bar.sqrt() + (1 - bar).sqrt()) ** 2,
    "score": lambda bar: 1 - bar,
}


def taught(schedule, kind, k=99, tau=0.99, max_c2=100.0):
    """The gain that the loss teaches a network of this type: c² has a bound of the output's too."""
    bar = schedule.alphas_cumprod
    before = torch.cat([bar.new_full((k,), torch.nan), bar[:-k]])
    c2 = (before / bar - 1).clamp(max=max_c2).minimum(max_c2 * RATIO_SQUARED[kind](bar))
    return torch.where(torch.arange(len(bar)) < k, 1.0, 1 / (1 + (1 - tau) / tau * c2))


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow", "score"])
def test_other_prediction_types_have_the_gain_on_epsilon(kind):
    """While the bound of the output does not act it is the same for all; later it is weaker."""
    model, x_t, t = Model(), normal(4, 2, seed=0), torch.tensor([200, 500, 700, 900])
    shrunk = ScaledModel.with_gain(model, LINEAR, 99, prediction_type=kind)
    before = epsilon_from_output(model(x_t, t), x_t, t, LINEAR, kind)
    after = epsilon_from_output(shrunk(x_t, t), x_t, t, LINEAR, kind)
    s = taught(LINEAR, kind)[t]
    assert s[:2].tolist() == pytest.approx([s_of(200), s_of(500)], rel=1e-12)
    torch.testing.assert_close(after, s[:, None] * before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gain(LINEAR, 99, t=t, prediction_type=kind), s)


@pytest.mark.parametrize("kind", list(RATIO_SQUARED))
@pytest.mark.parametrize("weak", [False, True])
def test_a_trained_network_and_a_shrunk_one_are_the_same(kind, weak):
    """Output for output: the target of the loss is what a perfect plain network becomes."""
    schedule = LINEAR.rescale_zero_terminal_snr() if weak else LINEAR
    t, x0, noise = torch.arange(0, 1000, 37), normal(28, 3, seed=1), normal(28, 3, seed=2)
    a, b = (scale[:, None] for scale in schedule.alpha_sigma(t))
    x_t = a * x0 + b * noise
    target = targets_of(x0, noise, a, b)[kind]

    class Perfect(nn.Module):
        def forward(self, x_t, t):
            return target

    for k in (9, 99):
        shrunk = ScaledModel.with_gain(Perfect(), schedule, k, prediction_type=kind)
        criterion = SkipStepLoss(schedule, k, prediction_type=kind)
        taught = criterion.regression_target(target, t, x_t).target
        torch.testing.assert_close(shrunk(x_t, t), taught, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow", "score"])
@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.cosine(1000),
        NoiseSchedule.linear(1000).rescale_zero_terminal_snr(),
        NoiseSchedule.scaled_linear(1000).rescale_zero_terminal_snr(),
    ],
    ids=repr,
)
def test_every_timestep_is_finite_and_has_the_gain_while_there_is_signal(schedule, kind):
    t, x_t, model = torch.arange(1000), normal(1000, 4, seed=0), Model()
    output = ScaledModel.with_gain(model, schedule, 99, prediction_type=kind)(x_t, t)
    assert output.isfinite().all()
    signal = schedule.alphas_cumprod > 1e-6  # conversions lose digits below
    before, after = (
        epsilon_from_output(out, x_t, t, schedule, kind)[signal] for out in (model(x_t, t), output)
    )
    s = taught(schedule, kind)[signal, None]
    torch.testing.assert_close(after, s * before, rtol=1e-7, atol=1e-7)
    if schedule.alphas_cumprod[-1] == 0 and kind in ("v_prediction", "sample", "flow"):
        assert torch.equal(output[-1], model(x_t, t)[-1])


def test_continuous_time():
    schedule = ContinuousSchedule.vp()
    x_t, t = normal(3, 2, seed=0), torch.tensor([0.01, 0.5, 1.0])
    output = ScaledModel.with_gain(Model(), schedule, 0.05)(x_t, t)
    s = gain(schedule, 0.05, t=t)
    torch.testing.assert_close(output, 0.7 * s[:, None] * x_t, rtol=1e-12, atol=0)
    assert s[0] == 1
    assert s[2] < s[1] < 1


@pytest.mark.parametrize("kind", ["epsilon", "velocity", "sample"])
def test_data_at_1_is_the_path_turned(kind):
    """The clock is the schedule's: t for 1 - t, and a velocity of the other sign."""
    ahead, turned = ContinuousSchedule.flow(), ContinuousSchedule.flow(data_at=1)
    x_t, output = normal(4, 2, seed=0), normal(4, 2, seed=1)
    t = torch.tensor([0.05, 0.3, 0.625, 0.99], dtype=torch.float64)
    sign = -1 if kind == "velocity" else 1
    one, other = (
        ScaledModel.with_gain(nn.Identity(), path, 0.1, prediction_type=kind)
        for path in (ahead, turned)
    )
    expected = one.rescale(output, x_t, t)
    found = sign * other.rescale(sign * output, x_t, 1 - t)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(expected, output)
    assert torch.equal(expected[0], output[0])  # too near the data for a skip


def test_computes_the_gain_once_however_many_sampling_steps(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "s2dm_loss.sampling.scaled_model.gain",
        lambda *a, **k: calls.append(k["t"]) or gain(*a, **k),
    )
    shrunk, x_t = ScaledModel.with_gain(Model(), LINEAR, 99), torch.ones(2, 3, dtype=torch.float64)
    checked_at_construction = len(calls)

    for t in (999, 500, 0):
        assert shrunk(x_t, t)[0, 0].item() == pytest.approx(0.7 * s_of(t), rel=1e-12)
    assert shrunk(x_t.float(), 500)[0, 0].item() == pytest.approx(0.7 * s_of(500), rel=1e-6)
    assert len(calls) == checked_at_construction


def test_keeps_dtype_and_gradient_and_weights():
    model = Model().to(torch.bfloat16)
    shrunk = ScaledModel.with_gain(model, LINEAR, 99)
    output = shrunk(normal(3, 2, seed=0, dtype=torch.bfloat16), torch.tensor([0, 500, 999]))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model.weight.grad is not None
    assert list(shrunk.state_dict()) == ["model.weight"]


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "PNDMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
    ],
)
def test_in_any_sampler_of_diffusers(name):
    """With the gain of a skip of 1 the sampler's result moves a little, and is finite."""
    diffusers = pytest.importorskip("diffusers")

    def sample(model):
        scheduler = getattr(diffusers, name)(num_train_timesteps=1000)
        scheduler.set_timesteps(10)
        x = normal(4, 2, seed=0) * scheduler.init_noise_sigma
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        return x

    plain, shrunk = sample(Model()), sample(ScaledModel.with_gain(Model(), LINEAR, 99))
    assert shrunk.isfinite().all()
    assert not torch.equal(plain, shrunk)
    # ε̂ = 0.7 x says the same as ε̂ = 0.7 s x with the scaling put into the model by hand.
    by_hand = Model()
    forward = by_hand.forward
    by_hand.forward = lambda x, t: forward(x, t) * s_of(round(float(t)))
    torch.testing.assert_close(shrunk, sample(by_hand), rtol=1e-9, atol=1e-9)


class Pair(NamedTuple):
    first: torch.Tensor
    second: str


class Fields(NamedTuple):
    logits: torch.Tensor
    sample: torch.Tensor


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x_t, t):
        return self.make(x_t)


@pytest.mark.parametrize(
    ("make", "which"),
    [(lambda x: Pair(x, "kept"), 0), (lambda x: Fields(5 * x, x), 1), (lambda x: [x, 7], 0)],
    ids=["namedtuple", "a field named sample", "list"],
)
def test_outputs_keep_their_type_and_all_else_in_them(make, which):
    x_t = normal(2, 3, seed=0)
    before = make(x_t)
    after = ScaledModel.with_gain(Returning(make), LINEAR, 99)(x_t, 999)
    assert type(after) is type(before)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        if i == which:
            torch.testing.assert_close(new, s_of(999) * x_t, rtol=1e-12, atol=0)
        else:
            assert new is old or torch.equal(new, old)


@pytest.mark.parametrize(
    ("x_t", "t", "output", "message"),
    [
        (torch.ones(1, 3), torch.tensor([1, 2]), None, r"t must have shape \(1,\)"),
        (torch.ones(2, 3), torch.tensor([[1], [2]]), None, r"t must have shape \(2,\).*\(2, 1\)"),
        (torch.ones(2, 3, 4), 5, torch.ones(2, 4, 4), r"model output must have the shape of x_t"),
        (torch.ones(2, 3, 4), 5, torch.ones(2, 6, 1), r"model output must have the shape of x_t"),
        (torch.ones(2, 3), 5, torch.ones(1, 3), r"model output must have the shape of x_t"),
        (torch.ones(2), 5, torch.ones(4), r"model output must have the shape of x_t"),
    ],
)
def test_nothing_broadcasts(x_t, t, output, message):
    model = Returning(lambda x: x if output is None else output)
    with pytest.raises(ValueError, match=message):
        ScaledModel.with_gain(model, LINEAR, 99)(x_t, t)


@pytest.mark.parametrize(
    ("scale", "error", "said"),
    [
        (0.9, TypeError, r"scale must be callable as scale\(t\), got"),
        (lambda t: 0.9, ValueError, "scale must return a floating-point tensor of shape"),
        (lambda t: torch.ones(3).double(), ValueError, "scale must return .* that of t"),
        (torch.ones_like, ValueError, "scale must return a floating-point tensor"),
    ],
)
def test_a_scale_that_is_none_is_named(scale, error, said):
    with pytest.raises(error, match=said):
        ScaledModel(nn.Identity(), LINEAR, scale)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_model_may_overwrite_its_input(kind):
    x_t, t = normal(2, 3, seed=0), torch.tensor([500, 900])
    kept, overwritten = (
        ScaledModel.with_gain(Returning(make), LINEAR, 99, prediction_type=kind)(x_t.clone(), t)
        for make in (lambda x: 0.5 * x, lambda x: x.mul_(0.5))
    )
    assert torch.equal(kept, overwritten)


def test_its_repr_says_what_it_does_and_its_errors_where_to_go():
    shrunk = ScaledModel.with_gain(nn.Identity(), LINEAR, 99)
    assert "NoiseSchedule.linear(1000), gain(SkipSet(99)), prediction" in repr(shrunk)
    with pytest.raises(AttributeError, match=r"no 'config'.*shrink_pipeline"):
        shrunk.config  # noqa: B018 - a pipeline's first question


@pytest.mark.parametrize("training", [True, False])
def test_a_sampler_that_asks_for_the_mode_and_restores_it_leaves_it(training):
    model = Model().train(training)
    wrapped = ScaledModel.with_gain(model, LINEAR, 9)
    before = wrapped.training
    wrapped.eval()
    wrapped.train(before)
    assert model.training is training


def test_a_frozen_output_is_made_anew():
    @dataclass(frozen=True)
    class Frozen:
        sample: torch.Tensor
        other: str = "kept"

    class ReadOnly:
        sample = property(lambda self: torch.ones(2, 3))

    output = ScaledModel.with_gain(Returning(Frozen), LINEAR, 99)(torch.ones(2, 3), 999)
    assert type(output) is Frozen
    assert output.other == "kept"
    torch.testing.assert_close(output.sample, torch.full((2, 3), s_of(999)))
    with pytest.raises(TypeError, match=r"model output must have a `sample` that can be set.*Read"):
        ScaledModel.with_gain(Returning(lambda _: ReadOnly()), LINEAR, 99)(torch.ones(2, 3), 999)


def test_a_whole_number_is_a_time_in_continuous_time():
    shrunk = ScaledModel.with_gain(Model(), ContinuousSchedule.vp(), 0.1)
    x_t = normal(2, 3, seed=0)
    assert torch.equal(shrunk(x_t, 1), shrunk(x_t, 1.0))
