"""Corrections: their factors from the papers' formulas."""

import copy
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule
from s2dm_loss.prediction import output_from_epsilon
from s2dm_loss.sampling import (
    EpsilonScaling,
    ScaledModel,
    ScoreRescaling,
    SkipGain,
    StartScaling,
    standard_corrections,
)
from tests.strategies import FLOW, LINEAR, VP, ZERO_SNR, normals, pickled

BAR, TIMES = LINEAR.alphas_cumprod, torch.tensor([0, 99, 500, 999])


def half(t):
    return torch.full_like(t, 0.5, dtype=torch.float64)


def test_the_gain_and_its_inverse():
    correction = SkipGain(LINEAR, [-99, 49], tau=0.9)
    lam = [1 + 1 / 9 * (float(BAR[t - 99] / BAR[t]) - 1) if t >= 99 else 1.0 for t in TIMES]
    assert correction.scale(TIMES, -99).tolist() == pytest.approx(lam)
    assert (1 / correction.scale(TIMES, 99)).tolist() == pytest.approx(lam)


@pytest.mark.parametrize(
    ("schedule", "kind", "t", "ratio"),
    [
        *((FLOW, "flow", 1 - a, a) for a in (0.0, 1e-6, 3e-4, 0.01, 0.1, 1.0)),
        (ContinuousSchedule.flow(data_at=1), "velocity", 1e-6, 1e-6),
        (LINEAR, "v_prediction", 999, BAR[999].sqrt()),
        (LINEAR, "sample", 999, (BAR / (1 - BAR))[999].sqrt()),
        (LINEAR, "epsilon", 999, 1.0),
        (LINEAR, "score", 0, 1.0),
    ],
)
def test_epsilon_scaling_is_bounded_where_outputs_say_nothing_of_noise(schedule, kind, t, ratio):
    """The output changes by (s-1) ε̂ / ratio: UniPC and DPM++ begin a flow next to ratio 0."""
    t = torch.tensor([t], dtype=torch.int64 if schedule is LINEAR else torch.float64)
    s = EpsilonScaling(schedule, [1.25], prediction_type=kind).scale(t, 1.25)
    assert s.item() - 1 == pytest.approx(-0.2 * min(1, (float(ratio) / 0.01) ** 2), rel=1e-6)


@pytest.mark.parametrize(("psi", "options"), [(0.1, {"psi": 0.1}), (1.0, {})])
def test_score_rescaling(psi, options):
    squared = (1 - BAR[TIMES]) / BAR[TIMES]  # σ²
    scale = ScoreRescaling(LINEAR, [0.7], **options).scale(TIMES, 0.7)
    torch.testing.assert_close(scale, (psi + squared) / (psi / 0.7 + squared))
    pure_noise = ScoreRescaling(ZERO_SNR, [0.7], **options).scale(TIMES[3:], 0.7)
    assert pure_noise.tolist() == [1.0]


def test_a_correction_is_of_the_model_or_of_the_start_noise_and_can_be_kept():
    model, noise = nn.Linear(3, 3), torch.randn(4, 3)
    for correction in standard_corrections(LINEAR):
        strength = correction.strengths[0]
        corrected, start = correction(model, noise, strength)
        if isinstance(correction, StartScaling):
            assert corrected is model
            assert torch.equal(start, strength * noise)
            continue
        assert start is noise
        assert correction.correct_model(model, correction.none) is model
        scaled = corrected.rescale(noise, noise, TIMES)
        for again in (copy.deepcopy(corrected), pickled(corrected)):
            assert torch.equal(again.rescale(noise, noise, TIMES), scaled)


@pytest.mark.parametrize("schedule", [LINEAR, FLOW], ids=repr)
def test_the_standard_ones_go_both_ways(schedule):
    for correction in standard_corrections(schedule, prediction_type="sample"):
        assert min(correction.strengths) < correction.none < max(correction.strengths)
        if not isinstance(correction, StartScaling):
            assert correction.prediction_type == "sample"
            assert correction.schedule is schedule


def test_the_skips_of_a_scan_and_those_between_are_integers_where_skips_are():
    assert SkipGain(NoiseSchedule.linear(20)).strengths == (-1, 1, 2, 3)
    assert SkipGain(VP).strengths[-1] == 0.2
    assert repr(SkipGain(LINEAR).between(19, 52)) == "36"
    assert SkipGain(VP).between(0.1, 0.2) == pytest.approx(0.15)
    assert StartScaling().between(1.0, 1.1) == pytest.approx(1.05)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, Fraction])
def test_strengths_of_any_kind_of_number_in_any_order_are_kept(kind):
    """Also of an iterator, which is empty the second time."""
    kept = StartScaling(kind(s) for s in (1.25, 0.5, 1.75)).to_dict()
    assert kept["strengths"] == [0.5, 1.25, 1.75]
    assert json.loads(json.dumps(kept)) == kept


@pytest.mark.parametrize(("kind", "data_at"), [("flow", 0), ("sample", 0), ("velocity", 1)])
def test_a_scaled_model_scales_the_noise_in_continuous_time(kind, data_at):
    t, path = (TIMES + 1) / 1001.0, ContinuousSchedule.flow(data_at=data_at)
    x_t, epsilon = normals(2, 4, 3)
    output, expected = (output_from_epsilon(e, x_t, t, path, kind) for e in (epsilon, epsilon / 2))
    model = ScaledModel(nn.Identity(), path, half, prediction_type=kind)
    torch.testing.assert_close(model.rescale(output, x_t, t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "score"])
def test_the_gain_is_that_of_a_shrunk_model(kind):
    x_t, output = normals(2, 4, 3)
    corrected = SkipGain(LINEAR, [99], prediction_type=kind).correct_model(nn.Identity(), 99)
    shrunk = ScaledModel.with_gain(nn.Identity(), LINEAR, 99, prediction_type=kind)
    found, expected = (each.rescale(output, x_t, TIMES) for each in (corrected, shrunk))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: StartScaling([]), ValueError, "strengths must be at least one"),
        (lambda: StartScaling([1.0]), ValueError, "without 1, which is no correction"),
        (lambda: StartScaling([1.1, 1.1]), ValueError, "distinct"),
        (lambda: StartScaling([-0.9, 1.1]), ValueError, "strengths must be positive, got -0.9"),
        (lambda: StartScaling([float("nan")]), ValueError, "strengths must lie in"),
        (lambda: StartScaling(["1"]), TypeError, "strengths must be a real number"),
        (lambda: SkipGain(LINEAR, 99), TypeError, "strengths must be a sequence of numbers, got"),
        (lambda: EpsilonScaling(LINEAR, [0.0]), ValueError, "strengths must be positive"),
        (lambda: EpsilonScaling(LINEAR, prediction_type="eps"), ValueError, "prediction_type"),
        (lambda: ScoreRescaling(LINEAR, psi=0.0), ValueError, "psi must lie in"),
        (lambda: ScoreRescaling(LINEAR, [-1.0]), ValueError, "strengths must be positive"),
        (lambda: SkipGain(LINEAR, [0]), ValueError, "without 0"),
        (lambda: SkipGain(LINEAR, [-1000]), ValueError, "below 1000"),
        (lambda: SkipGain(LINEAR, [0.1]), TypeError, "int skips"),
        (lambda: SkipGain(LINEAR, tau=1), ValueError, "tau must lie in"),
        (lambda: SkipGain(LINEAR, tau=0), ValueError, "tau must lie in"),
        (lambda: SkipGain(LINEAR, max_c2=-1.0), ValueError, "max_c2 must lie in"),
        (lambda: SkipGain("linear"), TypeError, "schedule must be"),
        (lambda: ScaledModel(nn.Identity(), LINEAR, half, prediction_type="e"), ValueError, "'e'"),
    ],
)
def test_a_bad_argument_is_named(make, error, said):
    with pytest.raises(error, match=said):
        make()
