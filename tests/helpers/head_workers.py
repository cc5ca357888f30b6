"""What each process of tests/test_head_dtensor.py does."""

from typing import Any

import torch
import torch.distributed as dist

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.loss import RegressionTarget

CASES = [
    (estimator, reduction, weigh)
    for estimator in ("expected", "shared", "fresh")
    for reduction in ("mean", "sum", "none")
    for weigh in (False, True)
]


def losses_in_every_placement(_rank: int, batch: dict[str, torch.Tensor]) -> dict[Any, Any]:
    """Return loss and gradient, in whole, by placement and case; "whole" has plain tensors."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"replicated": Replicate(), "batch": Shard(0), "channels": Shard(1)}
    results: dict[Any, Any] = {}
    for case in CASES:
        results["whole", case] = loss_and_gradient(case, batch, lambda tensor: tensor)
        for name, placement in placements.items():
            loss, gradient = loss_and_gradient(
                case, batch, lambda tensor, at=placement: distribute_tensor(tensor, mesh, [at])
            )
            results[name, case] = loss.full_tensor(), gradient.full_tensor()
    return results


def loss_and_gradient(case: Any, batch: dict[str, torch.Tensor], place: Any) -> Any:
    estimator, reduction, weigh = case
    criterion = SkipStepLoss(
        NoiseSchedule.linear(1000), 9, estimator=estimator, reduction=reduction
    )
    eps_hat = place(batch["eps_hat"].clone()).requires_grad_()
    weights = batch["weights"] if weigh else None
    noise, zeta = place(batch["noise"]), None
    if estimator == "fresh":
        zeta = place(batch["noise"].flip(0).clone())
    loss = criterion.from_output(eps_hat, noise, batch["t"], weights=weights, skip_noise=zeta)
    loss.sum().backward()
    return loss.detach(), eps_hat.grad


def losses_of_placed_times(_rank: int, batch: dict[str, torch.Tensor]) -> dict[Any, Any]:
    """Return each way's losses, in whole, by where t and the data lie: plain, or a DTensor."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = {"replicated": [Replicate()], "batch": [Shard(0)]}
    results: dict[Any, Any] = {}
    for way, losses in WAYS.items():
        for times in ("plain", *placements):
            for data in ("plain", *placements):
                placed = {
                    name: value
                    if (where := times if name in ("t", "time") else data) == "plain"
                    else distribute_tensor(value, mesh, placements[where])
                    for name, value in batch.items()
                }
                loss = losses(**placed)
                loss = loss if data == "plain" else loss.full_tensor()
                results[way, times, data] = loss
    return results


LINEAR = NoiseSchedule.linear(1000)
PLAIN = {"skip_set": 9, "reduction": "none"}
CRITERION, OF_V = (
    SkipStepLoss(LINEAR, prediction_type=kind, **PLAIN) for kind in ("epsilon", "v_prediction")
)
CONTINUOUS = SkipStepLoss(ContinuousSchedule.cosine(), 0.05, reduction="none")
WAYS = {
    "noise": lambda x, y, t, **_: CRITERION.from_output(x, y, t),
    "terms": lambda x, y, t, **_: CRITERION.terms(x, y, t).total,
    "output": lambda x, y, t, **_: OF_V.from_output(x, y, t, x + y),
    "target": lambda x, y, t, **_: mse_to(x, OF_V.regression_target(y, t, x + y)),
    "step": lambda x, y, t, **_: CRITERION(lambda x_t, t: x_t, x, t, noise=y),
    "continuous": lambda x, y, time, **_: CONTINUOUS.from_output(x, y, time),
}


def mse_to(output: torch.Tensor, changed: RegressionTarget) -> torch.Tensor:
    return changed.weight * (output - changed.target).square().mean((1, 2))
