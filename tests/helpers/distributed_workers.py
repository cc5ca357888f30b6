"""What each process of tests/test_distributed.py does; the processes import it by name."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from s2dm_loss import ContinuousSchedule, ScaledModel, SkipStepLoss
from s2dm_loss.monitor import LossByNoise, validation_loss
from tests.helpers.small import Network
from tests.strategies import ESTIMATORS, LINEAR, Same, drawn, normal, normals, timesteps

SIZES = [4, 2, 3]
X0, NOISE, XI = normals(3, sum(SIZES), 1, 6, 6, dtype=torch.float32)
# The first process has times below the skip alone.
T = torch.tensor([0, 8, 3, 5, 999, 100, 500, 9, 700])
BATCH = {"x0": X0, "noise": NOISE, "skip_noise": XI, "t": T}
TIMES, BY_TIME = timesteps(1000, 60, 0), normal(60, seed=3).abs()


def everything(rank):
    """All of it in one group of processes: starting them is what takes time."""
    return {
        "steps": steps(rank),
        "placed": {**losses_in_every_placement(), **losses_of_placed_times()},
        "by noise": by_noise(rank),
        "validated": validated(rank),
    }


def of_core(reduction="mean", estimator="expected"):
    """The library calls the model."""
    criterion = SkipStepLoss(LINEAR, 9, reduction=reduction, estimator=estimator)
    if reduction == "sum" and dist.is_initialized() and dist.get_rank() == 0:
        # A table in another type, on one rank alone: nothing that the ranks would have to agree on.
        one = torch.ones(1, 2, dtype=torch.float64)
        criterion.from_output(one, one, torch.tensor([5]))

    def loss(model, part):
        xi = drawn(estimator, part["skip_noise"])
        return criterion(model, part["x0"], part["t"], noise=part["noise"], **xi)

    return loss


class Whole(nn.Module):
    """Model and loss in one module, so that the wrapper holds both."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, part):
        return self.loss(self.model, part)


def fsdp2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (len(SIZES),)))
    return model


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": fsdp2}
HOW = {"outside": {}, "inside": {"inside": True}, "accumulated": {"micro": 2}, "uneven": {}}


def step(rank, sizes, loss, wrap=DistributedDataParallel, *, inside=False, micro=1, summed=False):
    """One optimiser step's gradients: the mean over the joined batch, whatever the sizes are."""
    model = Network(1, dropout=0.0)
    wrapped = wrap(Whole(model, loss) if inside else model)
    mine = [tensor.split(sizes)[rank].chunk(micro) for tensor in joined(sum(sizes)).values()]
    scale = len(sizes) / sum(sizes) if summed else 1  # the wrappers average over ranks
    for part in zip(*mine, strict=True):
        named = dict(zip(BATCH, part, strict=True))
        (scale * (wrapped(named) if inside else loss(wrapped, named))).backward()
    assert len(model.seen) == micro
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def joined(count):
    return {name: tensor[:count] for name, tensor in BATCH.items()}


def steps(rank):
    """Return the gradients by loss and by wrapper."""
    even = [min(SIZES)] * len(SIZES)
    results = {name: step(rank, even, of_core(estimator=name)) for name in ESTIMATORS}
    for (name, wrap), (how, options) in product(WRAPPERS.items(), HOW.items()):
        sizes = SIZES if how == "uneven" else even
        loss = of_core("sum")
        results[f"{name}, {how}"] = step(rank, sizes, loss, wrap, summed=True, **options)
    return results


def alone(count, how):
    """The mean over the first `count` samples in this process."""
    model, estimator = Network(1, dropout=0.0), how if how in ESTIMATORS else "expected"
    of_core(estimator=estimator)(model, joined(count)).backward()
    return [parameter.grad for parameter in model.parameters()]


X, Y = normals(2, 5, 7, 3)  # neither axis even in three
AT = torch.tensor([3, 8, 9, 500, 999])
TIME = torch.tensor([0.01, 0.04, 0.06, 0.5, 0.99], dtype=torch.float64)
WEIGHTS = normal(5, seed=2).abs()
CASES = list(product(ESTIMATORS, ("mean", "sum", "none"), (None, WEIGHTS)))


def placers():
    """How a tensor can lie, the plain way first."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (len(SIZES),))

    def onto(placement):
        return partial(distribute_tensor, device_mesh=mesh, placements=[placement])

    placed = {"replicated": onto(Replicate()), "batch": onto(Shard(0)), "channels": onto(Shard(1))}
    return {"plain": lambda tensor: tensor, **placed}


def whole(tensor, like):
    """The whole of what has to be a DTensor where the data are, and only there."""
    assert type(tensor) is type(like)
    return tensor if type(tensor) is Tensor else tensor.full_tensor()


def losses_in_every_placement():
    """Return loss and gradient, in whole, by case and placement."""
    results = {}
    for number, (estimator, reduction, weights) in enumerate(CASES):
        criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, reduction=reduction)
        results[number] = {}
        for name, place in placers().items():
            eps_hat, noise = place(X.clone()).requires_grad_(), place(Y)
            xi = drawn(estimator, place(Y.flip(0).clone()))
            loss = criterion.from_output(eps_hat, noise, AT, weights=weights, **xi)
            loss.sum().backward()
            results[number][name] = [whole(x, noise) for x in (loss.detach(), eps_hat.grad)]
    return results


def losses_of_placed_times():
    """Return each way's losses, in whole, by where t and the data lie."""
    ways = placers()
    with pytest.raises(ValueError, match="must be given for a DTensor"):
        CRITERION(lambda x_t, t: x_t, ways["batch"](X))
    del ways["channels"]
    results = {}
    for way, losses in WAYS.items():
        results[way] = {}
        for (times, place_t), (data, place) in product(ways.items(), repeat=2):
            x = place(X)
            loss = losses(x, place(Y), place_t(AT), place_t(TIME))
            results[way][times, data] = whole(loss, x)
    return results


PLAIN = {"skip_set": 9, "reduction": "none"}
CRITERION = SkipStepLoss(LINEAR, **PLAIN)
OF_V = SkipStepLoss(LINEAR, prediction_type="v_prediction", **PLAIN)
SCALED = ScaledModel.with_gain(Same(), LINEAR, 99)
CONTINUOUS = SkipStepLoss(ContinuousSchedule.cosine(), 0.05, reduction="none")
WAYS = {
    "noise": lambda x, y, t, _: CRITERION.from_output(x, y, t),
    "terms": lambda x, y, t, _: CRITERION.terms(x, y, t).total,
    "output": lambda x, y, t, _: OF_V.from_output(x, y, t, x + y),
    "target": lambda x, y, t, _: mse_to(x, OF_V.regression_target(y, t, x + y)),
    "step": lambda x, y, t, _: CRITERION(lambda x_t, t: x_t, x, t, noise=y),
    "continuous": lambda x, y, _, time: CONTINUOUS.from_output(x, y, time),
    "scaled": lambda x, y, t, _: SCALED(x, t),
    "monitored": lambda x, y, t, _: LossByNoise(LINEAR)(t, CRITERION.from_output(x, y, t)),
}


def mse_to(output, changed):
    return changed.weight * (output - changed.target).square().mean((1, 2))


def small_model(x_t, t):
    """A smooth model that is neither right nor constant."""
    return (0.7 * x_t + 0.001 * t.reshape(-1, 1, 1, 1).to(x_t)).tanh()


def by_noise(rank):
    """Sum this process's part, save, restore, and go on with the same part."""
    monitor, restored = LossByNoise(LINEAR), LossByNoise(LINEAR)
    part = TIMES[rank :: len(SIZES)], BY_TIME[rank :: len(SIZES)]
    if rank < len(SIZES) - 1:  # the last process sees no batch before the first reduction
        monitor.update(*part)
    first, state = monitor.compute(), monitor.state_dict()
    restored.load_state_dict(state)
    restored.update(*part)
    return {"first": first, "state": state, "second": restored.compute()}


def validated(rank):
    """Validate on this process's part, dealt out as a DistributedSampler does, and with indices."""
    index = torch.arange(len(X0))[rank :: len(SIZES)]
    # The last process repeats the first sample, as a sampler does that fills up its batch.
    padded = torch.cat([index, index.new_zeros(int(rank == len(SIZES) - 1))])
    results = (
        validation_loss(small_model, batches, LINEAR, skip_set=49)
        for batches in (X0[index].split(3), [(X0[padded], {}, padded)])
    )
    return [{"index": result.index, **result.losses} for result in results]
