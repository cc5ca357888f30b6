"""That the host never waits for the device, shown without a device.

Meta tensors and fake CUDA tensors have no values: whatever would need one, and with it a host
sync, raises. Autograd has no CUDA tensors on a build without CUDA, so backward runs on meta
tensors, which take the same way through the code: all that asks for a device asks whether it is the
CPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from s2dm_loss import ContinuousSchedule, NoiseSchedule, ScaledModel, SkipSet, SkipStepLoss
from s2dm_loss.adapters.diffusers import SkipLoss

LINEAR, FLOW = NoiseSchedule.linear(1000), ContinuousSchedule.flow()
SCHEDULES = {
    "discrete": (LINEAR, 49),
    "continuous": (FLOW, 0.1),
    "sampled": (FLOW, SkipSet.from_timesteps([0.0, 0.5, 1.0])),
}
ESTIMATORS = ["expected", "fresh", "shared"]
SHAPE = (4, 3, 8, 8)


def times(schedule, device):
    if schedule is LINEAR:
        return torch.zeros(4, dtype=torch.long, device=device)
    return torch.zeros(4, device=device)


def losses_of(kind, schedule, skip, estimator):
    options = {"estimator": estimator, "prediction_type": kind, "weighting": "min_snr"}
    criterion = SkipStepLoss(schedule, skip, **options)
    if schedule is FLOW or kind == "score":
        return criterion, None
    return criterion, SkipLoss(LINEAR, skip, prediction_type=kind, estimator=estimator)


def calls_of(losses, x, t, leaf):
    """Each way into the loss."""
    criterion, skip_loss = losses
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
    if skip_loss is not None:
        yield skip_loss(leaf, x, t, x)


CASES = pytest.mark.parametrize(
    ("name", "estimator", "kind"),
    [
        (name, estimator, kind)
        for name in SCHEDULES
        for estimator in ESTIMATORS
        for kind in ("epsilon", "v_prediction", "score")
    ],
)


@CASES
def test_forward_and_backward_read_no_value(name, estimator, kind):
    schedule, skip = SCHEDULES[name]
    x = torch.empty(SHAPE, device="meta")
    leaf = torch.empty(SHAPE, device="meta", requires_grad=True)
    count = 0
    losses = losses_of(kind, schedule, skip, estimator)
    for loss in calls_of(losses, x, times(schedule, "meta"), leaf):
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.device.type == gradient.device.type == "meta"
        assert gradient.shape == SHAPE
        count += 1
    assert count >= 3


@CASES
def test_forward_stays_on_a_fake_gpu(name, estimator, kind):
    schedule, skip = SCHEDULES[name]
    losses = losses_of(kind, schedule, skip, estimator)
    shrunk = ScaledModel.with_gain(torch.nn.Identity(), LINEAR, 9, prediction_type=kind)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(SHAPE, device="cuda")
        for loss in calls_of(losses, x, times(schedule, "cuda"), x):
            assert loss.device.type == "cuda"
        assert shrunk.rescale(x, x, times(LINEAR, "cuda")).device.type == "cuda"


class CopiesToDevice(TorchDispatchMode):
    """Which operators take a tensor of the CPU and return one of the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        of_cpu = any(
            tensor.device.type == "cpu" and tensor.ndim > 0
            for tensor in args
            if isinstance(tensor, torch.Tensor)
        )
        if of_cpu and isinstance(result, torch.Tensor) and result.device.type == "meta":
            self.found.append(str(function))
        return result


@CASES
def test_nothing_is_copied_to_the_device_twice(name, estimator, kind):
    """A copy from memory that is not pinned is a wait, and a CUDA graph cannot hold one."""
    schedule, skip = SCHEDULES[name]
    losses = losses_of(kind, schedule, skip, estimator)
    x = torch.empty(SHAPE, device="meta")
    t = times(schedule, "meta")
    list(calls_of(losses, x, t, x))
    with CopiesToDevice() as copies:
        list(calls_of(losses, x, t, x))
    assert copies.found == []
    with CopiesToDevice() as copies:
        torch.ones(3).to("meta")
    assert len(copies.found) == 1


def test_a_value_would_be_noticed():
    """The same tensors, in a loss that does ask for one."""
    with pytest.raises(RuntimeError, match="meta"):
        bool((torch.empty(2, device="meta") > 0).any())
    with FakeTensorMode(), pytest.raises(RuntimeError, match="local_scalar"):
        torch.empty(2, device="cuda").sum().item()
