"""docs/adapters/flow.md and robotics.md: their patches on the trainers' own losses."""

import math

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.testing import check_swap
from tests.helpers import trainers_of_today as today
from tests.helpers.patches import patched
from tests.helpers.records import Probe
from tests.helpers.trainers_of_today import CASES, source_of


def sources(case):
    """The trainer's file, as it is and patched."""
    plain = source_of(*case.file)
    # The libraries have no loop of their own to patch: the page's stands for it.
    loop = case.file in (today.TORCHCFM, today.FLOW_MATCHING)
    return plain, plain if loop else patched(*case.file, plain)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_patched_trainer(case):
    """At τ = 1 the trainer's own value and gradient; below it, finite and near at every sample."""
    plain, swapped = sources(case)

    def loss(model, tau=None):
        source = plain if tau is None else swapped
        return case.loss(source, model, {}, tau, **case.options)

    report = check_swap(loss, loss, rtol=1e-4)
    assert report.calls == 1


def reference(case):
    """What a trainer's loss has to be, said without its patch: schedule and prediction type."""
    options, half_pi = case.options, math.pi / 2
    turned = ContinuousSchedule.from_alpha_sigma(lambda t: (t, 1 - t), data_at=1)
    gvp = ContinuousSchedule.from_alpha_sigma(
        lambda t: (torch.sin(half_pi * t), torch.cos(half_pi * t)), data_at=1
    )
    if "prediction_type" in options:  # the policies, on the scheduler's own β
        betas = today.policy_scheduler("epsilon").betas
        return NoiseSchedule.from_betas(betas.double()), options["prediction_type"]
    if case.file == today.SIT:
        kind = {"NOISE": "epsilon"}.get(options["model_type"], options["model_type"].lower())
        paths = {"LINEAR": turned, "GVP": gvp, "VP": ContinuousSchedule.vp(data_at=1)}
        return paths[options["path_type"]], kind
    if case.file == today.FLOW_MATCHING:
        path = today.SCHEDULERS[options["scheduler"]]
        return ContinuousSchedule.from_alpha_sigma(path, data_at=1, min_time=1e-5), "velocity"
    if case.file == today.TORCHCFM:
        return turned, "velocity"
    if options.get("path_type") == "cosine":
        cosine = ContinuousSchedule.from_alpha_sigma(
            lambda t: (torch.cos(half_pi * t), torch.sin(half_pi * t))
        )
        return cosine, "velocity"
    return ContinuousSchedule.flow(), "sample" if case.file == today.KOHYA_SD3 else "flow"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_patched_trainer_has_our_loss(case):
    """At τ = 0.9, far from the plain one: value and gradient of A · mse(output, changed target)."""
    _, swapped = sources(case)
    torch.manual_seed(0)
    seen = {}
    loss = case.loss(swapped, Probe(), seen, 0.9, **case.options)
    (gradient,) = torch.autograd.grad(loss, seen["output"])
    schedule, prediction_type = reference(case)
    criterion = SkipStepLoss(
        schedule,
        SkipSet.for_sampling_steps(20),
        tau=0.9,
        prediction_type=prediction_type,
        normalize=case.file in (today.MUSUBI, today.AI_TOOLKIT, today.SIMPLE_TUNER),
    )
    output = seen["output"].detach().requires_grad_()
    target, weight = criterion.regression_target(seen["target"], seen["t"], seen["x_t"])
    weight = weight.reshape(-1, *[1] * (output.ndim - 1)) * seen.get("weight", 1.0)
    wanted = (weight * (output - target).square()).mean()
    (expected,) = torch.autograd.grad(wanted, output)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
    scale = expected.abs().max().item()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * scale)
