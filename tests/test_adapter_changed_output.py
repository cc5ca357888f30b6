"""The changed output: a trainer's own squared error of it, times its weight, is the S²-DM loss."""

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.changed_output import changed_output
from s2dm_loss.prediction import PREDICTION_TYPES

SCHEDULES = {
    "zero terminal snr": NoiseSchedule.linear(1000).rescale_zero_terminal_snr(),
    "cosine": NoiseSchedule.cosine(1000),
    "flow": ContinuousSchedule.flow(),
}
CASES = [
    (name, prediction_type)
    for name in SCHEDULES
    for prediction_type in PREDICTION_TYPES
    if name == "flow" or prediction_type != "velocity"  # which is for continuous time
]


def make_batch(schedule):
    t = torch.tensor([0, 8, 9, 300, 999])
    if schedule.timesteps is None:
        t = torch.tensor([0.001, 0.01, 0.02, 0.5, 1.0], dtype=torch.float64)
    output, target, x_t, zeta = torch.randn(4, 5, 2, 4, 4, dtype=torch.float64)
    return output.requires_grad_(), target, x_t, zeta, t


@pytest.mark.parametrize(("name", "prediction_type"), CASES)
@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
@pytest.mark.parametrize("tau", [0.1, 0.99])
def test_value_and_gradient_are_those_of_from_output(prediction_type, estimator, name, tau):
    output, target, x_t, _, t = make_batch(SCHEDULES[name])
    criterion = SkipStepLoss(
        SCHEDULES[name],
        0.01 if name == "flow" else 9,
        tau=tau,
        estimator=estimator,
        prediction_type=prediction_type,
        reduction="none",
    )
    torch.manual_seed(0)
    expected = criterion.from_output(output, target, t, x_t)
    torch.manual_seed(0)  # the estimator "fresh" draws once
    changed, weight = changed_output(criterion, output, t, x_t)
    found = weight * (changed - target).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss.sum(), output)[0] for loss in (found, expected)),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize(("name", "prediction_type"), CASES)
def test_at_tau_one_nothing_is_changed(name, prediction_type):
    schedule = SCHEDULES[name]
    output, _, x_t, _, t = make_batch(schedule)
    skips = 0.01 if name == "flow" else 9
    criterion = SkipStepLoss(schedule, skips, tau=1.0, prediction_type=prediction_type)
    changed, weight = changed_output(criterion, output, t, x_t)
    assert torch.equal(changed, output)
    assert torch.equal(weight, torch.ones_like(weight))


def test_half_precision_is_lifted():
    schedule = NoiseSchedule.linear(1000)
    output, _, x_t, _, t = make_batch(schedule)
    criterion = SkipStepLoss(schedule, 9, prediction_type="v_prediction")
    changed, weight = changed_output(criterion, output.half(), t, x_t.half())
    assert changed.dtype == weight.dtype == torch.float32


def test_refuses_tau_zero():
    schedule = NoiseSchedule.linear(1000)
    output, _, x_t, _, t = make_batch(schedule)
    with pytest.raises(ValueError, match=r"tau must be above 0 .* got 0"):
        changed_output(SkipStepLoss(schedule, 9, tau=0.0), output, t, x_t)
