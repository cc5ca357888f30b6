"""What each process of tests/test_distributed.py does; the processes import it by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.monitor import LossByNoise, validation_loss

Batch = dict[str, Tensor]
LINEAR = NoiseSchedule.linear(1000)


def everything(
    rank: int, batch: Batch, sizes: list[int], of_head: Batch, times: Tensor, losses: Tensor
) -> dict[str, Any]:
    """All of it in one group of processes: starting them is what takes time."""
    # accelerate finds the process group by these.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(sizes)))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
    return {
        "steps": steps(rank, batch, sizes),
        "placed": losses_in_every_placement(of_head),
        "times": losses_of_placed_times(of_head),
        "by noise": by_noise(rank, len(sizes), times, losses),
        "validated": validated(rank, len(sizes), batch["x0"]),
    }


# One training step, against one process alone


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

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": fsdp2}
HOW: dict[str, dict[str, Any]] = {
    "outside": {},
    "inside": {"inside": True},
    "accumulated": {"micro": 2},
    "uneven": {},
}


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


def steps(rank: int, batch: Batch, sizes: list[int]) -> dict[str, list[Tensor]]:
    """Return the gradients by loss and by wrapper."""
    even = [min(sizes)] * len(sizes)
    results = {name: step(rank, even, batch, make()) for name, make in LOSSES.items()}
    for name, wrap in WRAPPERS.items():
        for how, options in HOW.items():
            each, loss = sizes if how == "uneven" else even, of_core("sum")
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


# The loss of a DTensor, which tensor-parallel training makes

CASES = [
    (estimator, reduction, weigh)
    for estimator in ("expected", "shared", "fresh")
    for reduction in ("mean", "sum", "none")
    for weigh in (False, True)
]


def _placer() -> tuple[Callable[..., Tensor], dict[str, Any]]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(tensor: Tensor, placement: Any) -> Tensor:
        return tensor if placement is None else distribute_tensor(tensor, mesh, [placement])

    return place, {
        "plain": None,
        "replicated": Replicate(),
        "batch": Shard(0),
        "channels": Shard(1),
    }


def losses_in_every_placement(batch: Batch) -> dict[Any, Any]:
    """Return loss and gradient, in whole, by placement and case."""
    place, placements = _placer()
    results: dict[Any, Any] = {}
    for case in CASES:
        estimator, reduction, weigh = case
        criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, reduction=reduction)
        for name, where in placements.items():
            eps_hat = place(batch["x"].clone(), where).requires_grad_()
            noise, xi = (place(x, where) for x in (batch["y"], batch["y"].flip(0).clone()))
            given = {"skip_noise": xi} if estimator == "fresh" else {}
            weights = batch["weights"] if weigh else None
            loss = criterion.from_output(eps_hat, noise, batch["t"], weights=weights, **given)
            loss.sum().backward()
            found = loss.detach(), eps_hat.grad
            results[name, case] = found if where is None else [x.full_tensor() for x in found]
    return results


def losses_of_placed_times(batch: Batch) -> dict[Any, Any]:
    """Return each way's losses, in whole, by where t and the data lie: plain, or a DTensor."""
    place, placements = _placer()
    del placements["channels"]
    results: dict[Any, Any] = {}
    for way, losses in WAYS.items():
        for times, there in placements.items():
            for data, where in placements.items():
                loss = losses(
                    *(place(batch[name], where) for name in ("x", "y")),
                    *(place(batch[name], there) for name in ("t", "time")),
                )
                results[way, times, data] = loss if where is None else loss.full_tensor()
    return results


PLAIN: Any = {"skip_set": 9, "reduction": "none"}
CRITERION, OF_V = (
    SkipStepLoss(LINEAR, **PLAIN),
    SkipStepLoss(LINEAR, prediction_type="v_prediction", **PLAIN),
)
CONTINUOUS = SkipStepLoss(ContinuousSchedule.cosine(), 0.05, reduction="none")
WAYS = {
    "noise": lambda x, y, t, _: CRITERION.from_output(x, y, t),
    "terms": lambda x, y, t, _: CRITERION.terms(x, y, t).total,
    "output": lambda x, y, t, _: OF_V.from_output(x, y, t, x + y),
    "target": lambda x, y, t, _: mse_to(x, OF_V.regression_target(y, t, x + y)),
    "step": lambda x, y, t, _: CRITERION(lambda x_t, t: x_t, x, t, noise=y),
    "continuous": lambda x, y, _, time: CONTINUOUS.from_output(x, y, time),
}


def mse_to(output: Tensor, changed: Any) -> Tensor:
    return changed.weight * (output - changed.target).square().mean((1, 2))


# Monitors


def small_model(x_t: Tensor, t: Tensor) -> Tensor:
    """A smooth model that is neither right nor constant."""
    return (0.7 * x_t + 0.001 * t.reshape(-1, 1, 1, 1).to(x_t)).tanh()


def by_noise(rank: int, world_size: int, t: Tensor, losses: Tensor) -> dict[str, object]:
    """Sum this process's part, save, restore, and go on with the same part."""
    monitor, restored = LossByNoise(LINEAR), LossByNoise(LINEAR)
    part = slice(rank, None, world_size)
    if rank < world_size - 1:  # the last process sees no batch before the first reduction
        monitor.update(t[part], losses[part])
    first, state = monitor.compute(), monitor.state_dict()
    restored.load_state_dict(state)
    restored.update(t[part], losses[part])
    return {"first": first, "state": state, "second": restored.compute()}


def validated(rank: int, world_size: int, x0: Tensor) -> list[dict[str, Tensor]]:
    """Validate on this process's part, dealt out as a DistributedSampler does, and with indices."""
    index = torch.arange(len(x0))[rank::world_size]
    # The last process repeats the first sample, as a sampler does that fills up its batch.
    padded = torch.cat([index, index.new_zeros(int(rank == world_size - 1))])
    results = (
        validation_loss(small_model, batches, LINEAR, skip_set=49)
        for batches in (x0[index].split(3), [(x0[padded], {}, padded)])
    )
    return [{"index": result.index, **result.losses} for result in results]
