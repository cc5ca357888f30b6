"""The changed output: a trainer's own squared error of it, times its weight, is the S²-DM loss."""

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.changed_output import changed_output
from s2dm_loss.prediction import PREDICTION_TYPES
from tests.helpers.small import every_pair

SCHEDULES = {
    "zero terminal snr": NoiseSchedule.linear(1000).rescale_zero_terminal_snr(),
    "cosine": NoiseSchedule.cosine(1000),
    "flow": ContinuousSchedule.flow(),
}
CASES = every_pair(
    lambda each: each["name"] == "flow" or each["prediction_type"] != "velocity",
    name=SCHEDULES,
    prediction_type=PREDICTION_TYPES,
    estimator=("expected", "shared", "fresh"),
    tau=(0.1, 0.99, 1.0),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.values())))
def test_value_and_gradient_are_those_of_from_output(case):
    name, prediction_type, estimator, tau = case.values()
    t, skips = torch.tensor([0, 8, 9, 300, 999]), 9
    if name == "flow":
        t, skips = torch.tensor([0.001, 0.01, 0.02, 0.5, 1.0], dtype=torch.float64), 0.01
    output, target, x_t = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    output.requires_grad_()
    options = {"tau": tau, "estimator": estimator, "prediction_type": prediction_type}
    criterion = SkipStepLoss(SCHEDULES[name], skips, **options, reduction="none")
    torch.manual_seed(0)
    expected = criterion.from_output(output, target, t, x_t)
    torch.manual_seed(0)  # the estimator "fresh" draws once
    changed, weight = changed_output(criterion, output, t, x_t)
    found = weight * (changed - target).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), output)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    if tau == 1:
        assert torch.equal(changed, output)
        assert torch.equal(weight, torch.ones_like(weight))


def test_half_precision_is_lifted_and_tau_zero_refused():
    t, output = torch.tensor([3, 300]), torch.randn(2, 2, 4, 4).half()
    criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9, prediction_type="v_prediction")
    changed, weight = changed_output(criterion, output, t, output)
    assert changed.dtype == weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"tau must be above 0 .* got 0"):
        changed_output(SkipStepLoss(NoiseSchedule.linear(1000), 9, tau=0.0), output, t, output)
