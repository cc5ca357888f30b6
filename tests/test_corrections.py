"""Corrections: their factors from the papers' formulas, and a scaled model of every kind."""

import copy
import pickle

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon
from s2dm_loss.sampling import (
    Correction,
    EpsilonScaling,
    PredictionScaling,
    ScaledModel,
    ScoreRescaling,
    SkipGain,
    StartScaling,
    standard_corrections,
)

LINEAR = NoiseSchedule.linear(1000)
BAR = LINEAR.alphas_cumprod
TIMES = torch.tensor([0, 99, 500, 999])


class Fixed(nn.Module):
    """Returns what it was made with."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x_t, t):
        return self.output


def half(t):
    return torch.full_like(t, 0.5, dtype=torch.float64)


def test_the_gain_and_its_inverse():
    correction = SkipGain(LINEAR, [-99, 49], tau=0.9)
    lam = torch.tensor(
        [1 + 1 / 9 * (float(BAR[t - 99] / BAR[t]) - 1) if t >= 99 else 1.0 for t in TIMES]
    )
    torch.testing.assert_close(correction.scale(TIMES, 99), 1 / lam.double())
    torch.testing.assert_close(correction.scale(TIMES, -99), lam.double())


def test_constant_scaling_divides():
    scale = EpsilonScaling(LINEAR, [1.25]).scale(TIMES, 1.25)
    assert scale.tolist() == [0.8] * 4


@pytest.mark.parametrize("psi", [0.1, 1.0])
def test_score_rescaling(psi):
    squared = (1 - BAR[TIMES]) / BAR[TIMES]  # σ²
    expected = (psi + squared) / (psi / 0.7 + squared)
    scale = ScoreRescaling(LINEAR, [0.7], psi=psi).scale(TIMES, 0.7)
    torch.testing.assert_close(scale, expected)
    assert ScoreRescaling(LINEAR).psi == 1.0
    # It acts where there is little noise, by the factor k, and not at all in pure noise.
    assert float(scale[0]) == pytest.approx(0.7, abs=0.01)
    silent = NoiseSchedule.linear(1000).rescale_zero_terminal_snr()
    assert ScoreRescaling(silent, [0.7]).scale(torch.tensor([999]), 0.7).tolist() == [1.0]


def test_start_scaling_leaves_the_model():
    model, noise = nn.Identity(), torch.randn(3, 2)
    corrected, scaled = StartScaling([1.5])(model, noise, 1.5)
    assert corrected is model
    assert torch.equal(scaled, 1.5 * noise)


def test_corrections_of_the_model_leave_the_noise():
    model, noise = nn.Identity(), torch.randn(3, 2)
    for correction in standard_corrections(LINEAR):
        if isinstance(correction, PredictionScaling):
            corrected, same = correction(model, noise, correction.strengths[0])
            assert same is noise
            assert isinstance(corrected, ScaledModel)
            assert correction.correct_model(model, correction.none) is model


def test_the_standard_ones_go_both_ways():
    for schedule in (LINEAR, ContinuousSchedule.flow()):
        for correction in standard_corrections(schedule, prediction_type="sample"):
            assert min(correction.strengths) < correction.none < max(correction.strengths)
            assert list(correction.strengths) == sorted(correction.strengths)
            if not isinstance(correction, StartScaling):
                assert correction.prediction_type == "sample"
                assert correction.schedule is schedule
    gains = SkipGain(LINEAR).strengths
    assert gains == (-99, -49, -19, 19, 49, 99, 149, 199)
    assert SkipGain(NoiseSchedule.linear(20)).strengths == (-1, 1, 2, 3)
    assert SkipGain(ContinuousSchedule.flow()).strengths[-1] == 0.2


def test_between_is_a_skip_where_skips_are_integers():
    between = SkipGain(LINEAR).between(19, 50)
    assert between == 34
    assert isinstance(between, int)
    assert SkipGain(LINEAR).between(19, 52) == 36
    assert SkipGain(ContinuousSchedule.flow()).between(0.1, 0.2) == pytest.approx(0.15)
    assert StartScaling().between(1.0, 1.1) == pytest.approx(1.05)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "score"])
def test_a_scaled_model_scales_the_noise(prediction_type):
    x_t, epsilon = torch.randn(2, 4, 3, dtype=torch.float64)
    output = output_from_epsilon(epsilon, x_t, TIMES, LINEAR, prediction_type)
    model = ScaledModel(Fixed(output), LINEAR, half, prediction_type=prediction_type)
    scaled = epsilon_from_output(model(x_t, TIMES), x_t, TIMES, LINEAR, prediction_type)
    torch.testing.assert_close(scaled, 0.5 * epsilon, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["flow", "sample"])
def test_a_scaled_model_in_continuous_time(prediction_type):
    flow = ContinuousSchedule.flow()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_t, epsilon = torch.randn(2, 3, 2, dtype=torch.float64)
    output = output_from_epsilon(epsilon, x_t, t, flow, prediction_type)
    model = ScaledModel(Fixed(output), flow, half, prediction_type=prediction_type)
    scaled = epsilon_from_output(model(x_t, t), x_t, t, flow, prediction_type)
    torch.testing.assert_close(scaled, 0.5 * epsilon, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "score"])
def test_the_gain_is_that_of_shrunk_model(prediction_type):
    x_t, output = torch.randn(2, 4, 3)
    correction = SkipGain(LINEAR, [99], prediction_type=prediction_type)
    scaled = correction.correct_model(Fixed(output), 99)
    shrunk = ScaledModel.with_gain(Fixed(output), LINEAR, 99, prediction_type=prediction_type)
    torch.testing.assert_close(scaled(x_t, TIMES), shrunk(x_t, TIMES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_pure_noise_stays_as_it_is(prediction_type):
    silent = LINEAR.rescale_zero_terminal_snr()
    output = torch.randn(2, 3)
    model = ScaledModel(Fixed(output), silent, half, prediction_type=prediction_type)
    scaled = model(torch.randn(2, 3), torch.tensor([999, 500]))
    assert torch.equal(scaled[0], output[0])
    assert scaled.isfinite().all()
    assert not torch.equal(scaled[1], output[1])


def test_models_and_corrections_can_be_copied_and_kept():
    x_t = torch.randn(4, 3)
    for correction in standard_corrections(LINEAR):
        strength = correction.strengths[0]
        model, noise = correction(Fixed(x_t), x_t, strength)
        for again in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):  # noqa: S301
            assert torch.equal(again(model)(x_t, TIMES), model(x_t, TIMES))
            assert torch.equal(again(correction).correct_noise(x_t, strength), noise)


def test_one_of_a_users_own():
    class Clipped(Correction):
        name, none, strengths = "clipped at", float("inf"), (1.0, 2.0)

        def correct_noise(self, noise, strength):
            return noise.clamp(-strength, strength)

    model, noise = Clipped()(nn.Identity(), torch.tensor([3.0, -0.5]), 1.0)
    assert isinstance(model, nn.Identity)
    assert noise.tolist() == [1.0, -0.5]
    assert repr(Clipped()) == "Clipped(1, 2)"


def test_strengths_may_come_from_an_iterator():
    assert EpsilonScaling(LINEAR, (s for s in (1.1, 0.9))).strengths == (0.9, 1.1)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: StartScaling([]), ValueError, "strengths must be at least one"),
        (lambda: StartScaling([1.0]), ValueError, "without 1, which is no correction"),
        (lambda: StartScaling([1.1, 1.1]), ValueError, "distinct"),
        (lambda: StartScaling([-1.1]), ValueError, "strengths must be positive, got -1.1"),
        (lambda: StartScaling([-0.9, 1.1]), ValueError, "strengths must be positive, got -0.9"),
        (lambda: StartScaling([float("nan")]), ValueError, "strengths must lie in"),
        (lambda: StartScaling(["1"]), TypeError, "strengths must be a real number"),
        (lambda: StartScaling(1.1), TypeError, "strengths must be a sequence of numbers, got 1.1"),
        (lambda: SkipGain(LINEAR, 99), TypeError, "strengths must be a sequence of numbers, got"),
        (lambda: EpsilonScaling(LINEAR, [0.0]), ValueError, "strengths must be positive"),
        (lambda: EpsilonScaling("linear"), TypeError, "schedule must be"),
        (lambda: EpsilonScaling(LINEAR, prediction_type="eps"), ValueError, "prediction_type"),
        (lambda: ScoreRescaling(LINEAR, psi=0.0), ValueError, "psi must lie in"),
        (lambda: ScoreRescaling(LINEAR, [-1.0]), ValueError, "strengths must be positive"),
        (lambda: SkipGain(LINEAR, [0]), ValueError, "without 0"),
        (lambda: SkipGain(LINEAR, [-1000]), ValueError, "below 1000"),
        (lambda: SkipGain(LINEAR, [0.1]), TypeError, "int skips"),
        (lambda: SkipGain(LINEAR, tau=1), ValueError, "tau must lie in"),
        (lambda: SkipGain(LINEAR, tau=2.0), ValueError, "tau must lie in"),
        (lambda: SkipGain(LINEAR, max_c2=-1.0), ValueError, "max_c2 must lie in"),
        (lambda: SkipGain("linear"), TypeError, "schedule must be"),
        (lambda: ScaledModel(3, LINEAR, half), TypeError, "model must be an nn.Module"),
        (
            lambda: ScaledModel(nn.Identity(), LINEAR, half, prediction_type="eps"),
            ValueError,
            "prediction_type",
        ),
    ],
)
def test_a_bad_argument_is_named(make, error, said):
    with pytest.raises(error, match=said):
        make()
