"""That the host never waits for the device, shown without a device.

Meta tensors have no values: whatever would need one, and with it a host sync, raises. They take the
same way through the code as CUDA's: all that asks for a device asks whether it is the CPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2dm_loss import ScaledModel, SkipSet, SkipStepLoss
from s2dm_loss.adapters.diffusers import SkipLoss
from tests.strategies import ESTIMATORS, FLOW, LINEAR

SCHEDULES = {
    "discrete": (LINEAR, 49),
    "continuous": (FLOW, 0.1),
    "sampled": (FLOW, SkipSet.from_timesteps([0.0, 0.5, 1.0])),
}
KINDS = ("epsilon", "v_prediction", "score")
SHAPE = (4, 3, 8, 8)
# Every two of schedule, estimator and prediction type together, and every three once in three.
CASES = pytest.mark.parametrize(
    ("name", "estimator", "kind"),
    [
        pytest.param(name, estimator, KINDS[(i + j) % 3], marks=[pytest.mark.slow] if i else [])
        for i, name in enumerate(SCHEDULES)
        for j, estimator in enumerate(ESTIMATORS)
    ],
)


def calls_of(criterion, scaled, skip_loss, x, t, leaf):
    """Each way into the loss, and the gain in a model."""
    weights = torch.ones(4, device=x.device)
    yield criterion(lambda x_t, t: leaf, x, weights=weights)
    if criterion.prediction_type == "epsilon":
        yield criterion.from_output(leaf, x, t)
        zeta = {"skip_noise": x} if criterion.estimator == "fresh" else {}
        terms = criterion.terms(leaf, x, t, **zeta)
        yield (terms.simple + terms.skip).mean()
    yield criterion.from_output(leaf, x, t, x, weights=weights)
    changed = criterion.regression_target(x, t, x)
    yield (changed.weight * (leaf - changed.target).square().mean((1, 2, 3))).mean()
    yield scaled.rescale(leaf, x, t).mean()
    if skip_loss is not None:
        yield skip_loss(leaf, x, t, x)


class CopiesToDevice(TorchDispatchMode):
    """Which operators take a tensor of the CPU and return one of the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        of_cpu = any(tensor.device.type == "cpu" and tensor.ndim > 0 for tensor in tensors)
        if of_cpu and isinstance(result, torch.Tensor) and result.device.type == "meta":
            self.found.append(str(function))
        return result


@CASES
def test_a_step_reads_no_value_and_copies_nothing_to_the_device_twice(name, estimator, kind):
    """A copy from memory that is not pinned is a wait, and a CUDA graph cannot hold one."""
    (schedule, skip), options = SCHEDULES[name], {"prediction_type": kind, "estimator": estimator}
    criterion = SkipStepLoss(schedule, skip, weighting="min_snr", **options)
    scaled = ScaledModel.with_gain(torch.nn.Identity(), schedule, skip, prediction_type=kind)
    trainers = schedule is LINEAR and kind != "score"
    losses = criterion, scaled, SkipLoss(LINEAR, skip, **options) if trainers else None
    t = torch.zeros(4, dtype=torch.long if schedule is LINEAR else None, device="meta")
    x, leaf = torch.empty(2, *SHAPE, device="meta")
    leaf.requires_grad_()
    for loss in calls_of(*losses, x, t, leaf):
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.device.type == gradient.device.type == "meta"
    with CopiesToDevice() as copies:
        list(calls_of(*losses, x, t, x))
    assert copies.found == []


def test_a_value_or_a_copy_would_be_noticed():
    with pytest.raises(RuntimeError, match="meta"):
        bool((torch.empty(2, device="meta") > 0).any())
    with CopiesToDevice() as copies:
        torch.ones(3).to("meta")
    assert len(copies.found) == 1
