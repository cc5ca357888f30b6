"""The gain without training, in a model of any kind."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from s2dm_loss import NoiseSchedule, SkipStepLoss, gain
from s2dm_loss.sampling import ScaledModel
from tests.helpers import oracle
from tests.strategies import COSINE, LINEAR, TYPES, VP, ZERO_SNR, normal

shrink = ScaledModel.with_gain


def s_of(t, k=99, tau=0.99):
    """1/s = 1 + ((1-τ)/τ) c², from the table of ᾱ."""
    bar = LINEAR.alphas_cumprod
    return 1.0 if t < k else 1 / (1 + (1 - tau) / tau * (float(bar[t - k] / bar[t]) - 1))


class Returning(nn.Module):
    """Returns what a function makes of its input; 0.7 times that if not said."""

    def __init__(self, make=None):
        super().__init__()
        self.make = make or (lambda x: self.weight * x)
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.seen = []

    def forward(self, x_t, t, label=None):
        self.seen.append((t, label))
        return self.make(x_t)


@dataclass(frozen=True)
class Frozen:
    sample: torch.Tensor
    other: str = "kept"


class Fields(NamedTuple):
    logits: torch.Tensor
    sample: torch.Tensor


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda x: x, lambda o: (o, None)),
        (lambda x: (x, "kept"), lambda o: o),
        (lambda x: [x, "kept"], lambda o: o),
        (lambda x: SimpleNamespace(sample=x, other="kept"), lambda o: (o.sample, o.other)),
        (Frozen, lambda o: (o.sample, o.other)),
        (lambda x: Fields(5 * x, x), lambda o: (o.sample, o.logits)),
        (lambda x: torch.cat([x, 2 * x], 1), lambda o: o.chunk(2, 1)),  # a learned variance
    ],
)
def test_scales_the_prediction_and_nothing_else(make, parts):
    model, x_t, t = Returning(make), normal(3, 2, 4, seed=0), torch.tensor([0, 500, 999])
    before, after = make(x_t), shrink(model, LINEAR, 99)(x_t, t, label="y")
    assert model.seen == [(t, "y")]
    assert type(after) is type(before)
    (prediction, rest), (_, other) = parts(after), parts(before)
    s = torch.tensor([s_of(0), s_of(500), s_of(999)]).double()[:, None, None]
    torch.testing.assert_close(prediction, s * x_t, rtol=1e-6, atol=0)
    assert rest is other or torch.equal(rest, other)


def test_an_output_that_cannot_be_set_is_refused():
    class ReadOnly:
        sample = property(lambda self: torch.ones(2, 3))

    with pytest.raises(TypeError, match=r"model output must have a `sample` that can be set.*Read"):
        shrink(Returning(lambda _: ReadOnly()), LINEAR, 99)(torch.ones(2, 3), 999)


@pytest.mark.parametrize(
    "t", [500, torch.tensor(500), torch.tensor([500]), 500.3, torch.tensor(499.6)], ids=repr
)
def test_one_time_for_all_and_fractional_times(t):
    x_t = normal(3, 2, seed=0)
    output = shrink(Returning(), LINEAR, 99)(x_t, t)
    torch.testing.assert_close(output, 0.7 * s_of(500) * x_t, rtol=1e-12, atol=0)
    # In continuous time a whole number is a time too.
    output, s = shrink(Returning(), VP, 0.1)(x_t, 1), gain(VP, 0.1, t=torch.ones(1))
    torch.testing.assert_close(output, 0.7 * s * x_t, rtol=1e-12, atol=0)
    at = torch.tensor([[3, 500], [99, 999]])
    assert torch.equal(gain(LINEAR, 99, t=at), gain(LINEAR, 99)[at])


def test_a_timestep_that_bfloat16_rounds_up_is_the_last_one():
    """Pipelines cast t to the network's dtype, and bfloat16 has no 999 but 1000."""
    x_t, shrunk = normal(3, 2, seed=0), shrink(Returning(), LINEAR, 99)
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
    model = Returning()
    with pytest.raises(ValueError, match=r"t must hold timesteps from 0 to 999.*t / T.*rescale"):
        shrink(model, LINEAR, 99)(normal(3, 2, seed=0), t)
    assert not model.seen


@pytest.mark.parametrize("seen", [[998.4, 1.6, 0.7, 0.2, 0.0], [0.0, 1.0]])
def test_the_last_fractional_timesteps_of_euler_are_right(seen):
    """Below 1 as well once a larger one was seen; where nothing was, 0 and 1 are timesteps."""
    shrunk, x_t = shrink(Returning(), LINEAR, 1, tau=0.01), normal(3, 2, seed=0)
    for t in seen:
        expected = 0.7 * s_of(round(t), k=1, tau=0.01) * x_t
        torch.testing.assert_close(shrunk(x_t, t), expected, rtol=1e-12, atol=0)


def test_a_sigma_is_no_timestep_of_a_table_of_sigmas():
    """Else σ = 3.7 would be rounded to the row 4 of the table, without a word."""
    sigmas = torch.logspace(-2, 1.9, 100, dtype=torch.float64)
    x_t, model, row = normal(3, 2, seed=0), Returning(), 60
    shrunk = shrink(model, NoiseSchedule.from_sigmas(sigmas), 9)
    for sigma in (3.7, 5.0, torch.tensor(80.0), torch.full((3,), 0.5, dtype=torch.float64)):
        with pytest.raises(TypeError, match=r"integer timesteps.*rescale"):
            shrunk(x_t, sigma)
    # What the message says: σ for the network, its row for the gain.
    c2 = (1 + sigmas[row] ** 2) / (1 + sigmas[row - 9] ** 2) - 1
    output = shrunk.rescale(model(x_t, sigmas[row]), x_t, row)
    torch.testing.assert_close(output, 0.7 / (1 + 0.01 / 0.99 * c2) * x_t, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    "schedule",
    [LINEAR, COSINE, ZERO_SNR, NoiseSchedule.scaled_linear(1000).rescale_zero_terminal_snr()],
    ids=repr,
)
def test_every_timestep_is_finite_and_has_the_gain_while_there_is_signal(schedule, kind):
    t, x_t = schedule.timesteps, normal(1000, 4, seed=0)
    found = gain(schedule, 99, prediction_type=kind)
    output = shrink(Returning(), schedule, 99, prediction_type=kind)(x_t, t)
    assert output.isfinite().all()
    # What the loss trains a network to, whose plain answer this is.
    criterion = SkipStepLoss(schedule, 99, prediction_type=kind)
    taught = criterion.regression_target(0.7 * x_t, t, x_t).target
    torch.testing.assert_close(output, taught, rtol=1e-9, atol=1e-9)
    for t in [98, *range(0, 1000, 9)]:
        if schedule.alphas_cumprod[t] > 1e-6:  # conversions lose digits below
            at = oracle.at(t, kind, schedule.alphas_cumprod)
            assert float(found[t]) == pytest.approx(at.gain, rel=1e-9)
            wanted = at.scaled(0.7 * x_t[t], x_t[t])
            torch.testing.assert_close(output[t], wanted, rtol=1e-7, atol=1e-7)
    if schedule.alphas_cumprod[-1] == 0 and kind in ("v_prediction", "sample", "flow"):
        assert torch.equal(output[-1], 0.7 * x_t[-1])


def test_computes_its_scale_once_however_many_sampling_steps():
    calls = []
    scaled = ScaledModel(Returning(), LINEAR, lambda t: calls.append(t) or t.double())
    made = len(calls)
    for t in (999, 500, 0):
        scaled(torch.ones(2, 3), t)
        scaled(torch.ones(2, 3).double(), t)
    assert len(calls) == made


def test_keeps_dtype_and_gradient_and_weights():
    model = Returning().to(torch.bfloat16)
    shrunk = shrink(model, LINEAR, 99)
    output = shrunk(normal(3, 2, seed=0, dtype=torch.bfloat16), torch.tensor([0, 500, 999]))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model.weight.grad is not None
    assert list(shrunk.state_dict()) == ["model.weight"]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_model_may_overwrite_its_input(kind):
    x_t, t = normal(2, 3, seed=0), torch.tensor([500, 900])
    kept, overwritten = (
        shrink(Returning(make), LINEAR, 99, prediction_type=kind)(x_t.clone(), t)
        for make in (lambda x: 0.5 * x, lambda x: x.mul_(0.5))
    )
    assert torch.equal(kept, overwritten)


def test_its_repr_says_what_it_does_and_its_errors_where_to_go():
    shrunk = shrink(nn.Identity(), LINEAR, 99)
    assert "NoiseSchedule.linear(1000), gain(SkipSet(99)), prediction" in repr(shrunk)
    with pytest.raises(AttributeError, match=r"no 'config'.*shrink_pipeline"):
        shrunk.config  # noqa: B018 - a pipeline's first question


@pytest.mark.parametrize("training", [True, False])
def test_a_sampler_that_asks_for_the_mode_and_restores_it_leaves_it(training):
    wrapped = shrink(Returning().train(training), LINEAR, 9)
    before = wrapped.training
    wrapped.eval().train(before)
    assert wrapped.model.training is training
