"""Wrappers around model and loss, in several processes, each against one process by itself."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from s2dm_loss import NoiseSchedule, SkipStepLoss
from tests.helpers.distributed_workers import Batch, CountingModel

Wrap = Callable[[nn.Module], nn.Module]


class Whole(nn.Module):
    """Model and criterion in one module, so that the wrapper holds both."""

    def __init__(self, model: nn.Module, criterion: SkipStepLoss) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, part: Batch) -> Tensor:
        return loss_of(self.model, self.criterion, part)


def loss_of(model: nn.Module, criterion: SkipStepLoss, part: Batch) -> Tensor:
    return criterion(model, part["x0"], part["t"], noise=part["noise"])


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS: dict[str, Wrap] = {"ddp": DistributedDataParallel, "fsdp2": fsdp2}


def gradients(model: nn.Module) -> list[Tensor]:
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def parts_of(batch: Batch, rank: int, sizes: list[int]) -> Batch:
    first = sum(sizes[:rank])
    return {name: tensor[first : first + sizes[rank]] for name, tensor in batch.items()}


def step(
    rank: int, sizes: list[int], batch: Batch, wrapper: str, *, inside: bool, micro: int
) -> list[Tensor]:
    """One optimiser step's gradients: the mean over the joined batch, whatever the sizes are."""
    torch.manual_seed(0)
    model = CountingModel()
    criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9, reduction="sum")
    whole = Whole(model, criterion)
    wrapped = WRAPPERS[wrapper](whole if inside else model)
    if rank == 0:
        # A table in another type, on one rank alone: nothing that the ranks would have to agree on.
        one = torch.ones(1, 2, dtype=torch.float64)
        criterion.from_output(one, one, torch.tensor([5]))
    mine = parts_of(batch, rank, sizes)
    scale = len(sizes) / sum(sizes)  # the wrappers average over ranks
    for part in zip(*[tensor.chunk(micro) for tensor in mine.values()], strict=True):
        named = dict(zip(mine, part, strict=True))
        loss = wrapped(named) if inside else loss_of(wrapped, criterion, named)
        (scale * loss).backward()
    return gradients(model)


def accelerate_step(rank: int, sizes: list[int], batch: Batch) -> list[Tensor]:
    """One step as accelerate wraps it, which finds the process group by these variables."""
    from accelerate import Accelerator

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(sizes)))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == len(sizes)
    model = CountingModel()
    wrapped = accelerator.prepare(model)
    assert isinstance(wrapped, DistributedDataParallel)
    criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9)
    accelerator.backward(loss_of(wrapped, criterion, parts_of(batch, rank, sizes)))
    return gradients(model)


def everything(rank: int, batch: Batch, sizes: list[int]) -> dict[str, list[Tensor]]:
    """All of it in one group of processes: starting them is what takes time."""
    size = min(sizes)
    even = [size] * len(sizes)
    results = {}
    for wrapper in WRAPPERS:
        for inside in (False, True):
            where = "inside" if inside else "outside"
            results[f"{wrapper}, {where}"] = step(
                rank, even, batch, wrapper, inside=inside, micro=1
            )
        results[f"{wrapper}, accumulated"] = step(rank, even, batch, wrapper, inside=False, micro=2)
        results[f"{wrapper}, uneven"] = step(rank, sizes, batch, wrapper, inside=False, micro=1)
    results["accelerate"] = accelerate_step(rank, even, batch)
    return results


def alone(batch: Batch, count: int) -> list[Tensor]:
    """The mean over the first `count` samples in this process."""
    torch.manual_seed(0)
    model = CountingModel()
    criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9)
    loss_of(model, criterion, {name: tensor[:count] for name, tensor in batch.items()}).backward()
    return gradients(model)
