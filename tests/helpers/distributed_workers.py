"""The workers of the two-process tests, which the spawned processes import by name."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from s2dm_loss import NoiseSchedule, SkipStepLoss

Batch = dict[str, Tensor]


class CountingModel(nn.Module):
    """A small network that depends on t and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.calls = 0

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x_t) * (1 + t.reshape(-1, 1, 1, 1) / 1000)


def share(batch: Batch, rank: int, world_size: int) -> Batch:
    """This process's part of the joined batch."""
    return {name: tensor.chunk(world_size)[rank] for name, tensor in batch.items()}


def core_gradients(rank: int, world_size: int, batch: Batch, estimator: Any) -> dict[str, Any]:
    """One step of SkipStepLoss: the library calls the model."""
    model = CountingModel()
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9, estimator=estimator)
    part = share(batch, rank, world_size)
    zeta = part["skip_noise"] if estimator == "fresh" else None
    loss = criterion(wrapped, part["x0"], t=part["t"], noise=part["noise"], skip_noise=zeta)
    loss.backward()
    return result(model, loss)


def adapter_gradients(
    rank: int, world_size: int, batch: Batch, prediction_type: Any
) -> dict[str, Any]:
    """One step of a diffusers script: the script calls the model."""
    from tests.helpers.diffusers_parts import make_scheduler

    model = CountingModel()
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    scheduler = make_scheduler(prediction_type=prediction_type)
    loss = script_loss(scheduler, wrapped, share(batch, rank, world_size))
    loss.backward()
    return result(model, loss)


def accelerate_gradients(rank: int, world_size: int, batch: Batch) -> dict[str, Any]:
    """The same under accelerate, which finds the process group by these variables."""
    from accelerate import Accelerator

    from tests.helpers.diffusers_parts import make_scheduler

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    accelerator = Accelerator(cpu=True)
    model = CountingModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    with accelerator.accumulate(wrapped):
        loss = script_loss(make_scheduler(), wrapped, share(batch, rank, world_size))
        accelerator.backward(loss)
    kind = type(wrapped).__name__
    return {**result(model, loss), "wrapper": kind, "processes": accelerator.num_processes}


def script_loss(scheduler: Any, model: nn.Module, part: Batch) -> Tensor:
    from s2dm_loss.adapters.diffusers import SkipLoss

    skip_loss = SkipLoss.from_scheduler(scheduler, skip_set=9)
    x0, noise, t = part["x0"], part["noise"], part["t"]
    noisy = scheduler.add_noise(x0, noise, t)
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(x0, noise, t)
    return skip_loss(model(noisy, t), target, t, noisy)


def result(model: CountingModel, loss: Tensor) -> dict[str, Any]:
    return {
        "calls": model.calls,
        "loss": loss.detach(),
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


def everything(rank: int, world_size: int, batch: Batch) -> dict[str, Any]:
    """All of the above in one pair of processes: starting one is what takes time."""
    results: dict[str, Any] = {
        estimator: core_gradients(rank, world_size, batch, estimator)
        for estimator in ("expected", "fresh", "shared")
    }
    for prediction_type in ("epsilon", "v_prediction"):
        results[prediction_type] = adapter_gradients(rank, world_size, batch, prediction_type)
    if world_size > 1:
        results["accelerate"] = accelerate_gradients(rank, world_size, batch)
    return results
