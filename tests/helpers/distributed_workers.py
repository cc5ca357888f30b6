"""One training step in several processes, which import this by name, against one process alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from s2dm_loss import NoiseSchedule, SkipStepLoss

Batch = dict[str, Tensor]
LINEAR = NoiseSchedule.linear(1000)


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


def of_core(reduction: Any = "mean", estimator: Any = "expected") -> Callable[..., Tensor]:
    """The library calls the model."""
    criterion = SkipStepLoss(LINEAR, 9, reduction=reduction, estimator=estimator)
    if reduction == "sum" and os.environ.get("RANK") == "0":
        # A table in another type, on one rank alone: nothing that the ranks would have to agree on.
        one = torch.ones(1, 2, dtype=torch.float64)
        criterion.from_output(one, one, torch.tensor([5]))

    def loss(model: nn.Module, part: Batch) -> Tensor:
        xi = part["skip_noise"] if estimator == "fresh" else None
        return criterion(model, part["x0"], part["t"], noise=part["noise"], skip_noise=xi)

    return loss


def of_script(prediction_type: Any) -> Callable[..., Tensor]:
    """A diffusers script calls the model."""
    from s2dm_loss.adapters.diffusers import SkipLoss
    from tests.helpers.diffusers_parts import make_scheduler

    scheduler = make_scheduler(prediction_type=prediction_type)
    skip_loss = SkipLoss.from_scheduler(scheduler, skip_set=9)

    def loss(model: nn.Module, part: Batch) -> Tensor:
        x0, noise, t = part["x0"], part["noise"], part["t"]
        noisy = scheduler.add_noise(x0, noise, t)
        is_v = prediction_type == "v_prediction"
        target = scheduler.get_velocity(x0, noise, t) if is_v else noise
        return skip_loss(model(noisy, t), target, t, noisy)

    return loss


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    **{name: lambda name=name: of_core(estimator=name) for name in ("expected", "fresh", "shared")},
    **{
        f"diffusers, {name}": lambda name=name: of_script(name)
        for name in ("epsilon", "v_prediction")
    },
}


class Whole(nn.Module):
    """Model and loss in one module, so that the wrapper holds both."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, part: Batch) -> Tensor:
        return self.loss(self.model, part)


def fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    fully_shard(model, mesh=mesh)
    return model


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": fsdp2}


def step(
    rank: int,
    sizes: list[int],
    batch: Batch,
    loss: Callable[..., Tensor],
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
    *,
    inside: bool = False,
    micro: int = 1,
    summed: bool = False,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> list[Tensor]:
    """One optimiser step's gradients: the mean over the joined batch, whatever the sizes are."""
    model = CountingModel()
    wrapped = wrap(Whole(model, loss) if inside else model)
    first = sum(sizes[:rank])
    mine = {name: tensor[first : first + sizes[rank]] for name, tensor in batch.items()}
    scale = len(sizes) / sum(sizes) if summed else 1  # the wrappers average over ranks
    for part in zip(*[tensor.chunk(micro) for tensor in mine.values()], strict=True):
        named = dict(zip(mine, part, strict=True))
        backward(scale * (wrapped(named) if inside else loss(wrapped, named)))
    assert model.calls == micro
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def everything(rank: int, batch: Batch, sizes: list[int]) -> dict[str, list[Tensor]]:
    """All of it in one group of processes: starting them is what takes time."""
    # accelerate finds the process group by these.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(sizes)))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    even = [min(sizes)] * len(sizes)
    results = {name: step(rank, even, batch, make()) for name, make in LOSSES.items()}
    for name, wrap in WRAPPERS.items():
        for how, options in {
            "outside": {},
            "inside": {"inside": True},
            "accumulated": {"micro": 2},
            "uneven": {},
        }.items():
            each = sizes if how == "uneven" else even
            loss = of_core("sum")
            results[f"{name}, {how}"] = step(rank, each, batch, loss, wrap, summed=True, **options)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == len(sizes)

    def prepare(model: nn.Module) -> nn.Module:
        wrapped = accelerator.prepare(model)
        assert isinstance(wrapped, DistributedDataParallel)
        return wrapped

    results["accelerate"] = step(
        rank, even, batch, of_core(), prepare, backward=accelerator.backward
    )
    return results


def alone(batch: Batch, count: int, how: str) -> list[Tensor]:
    """The mean over the first `count` samples in this process."""
    model, loss = CountingModel(), LOSSES.get(how, of_core)()
    loss(model, {name: tensor[:count] for name, tensor in batch.items()}).backward()
    return [parameter.grad for parameter in model.parameters()]
