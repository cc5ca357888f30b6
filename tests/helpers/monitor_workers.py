"""What one of several processes does with a monitor; see `tests.helpers.distributed`."""

import torch
from torch import Tensor

from s2dm_loss import NoiseSchedule
from s2dm_loss.monitor import LossByNoise, validation_loss


def small_model(x_t: Tensor, t: Tensor) -> Tensor:
    """A smooth model that is neither right nor constant."""
    return (0.7 * x_t + 0.001 * t.reshape(-1, 1, 1, 1).to(x_t)).tanh()


def by_noise(rank: int, world_size: int, t: Tensor, losses: Tensor) -> dict[str, object]:
    """Sum this process's part, save, restore, and go on with the same part."""
    monitor = LossByNoise(NoiseSchedule.linear(1000))
    part = slice(rank, None, world_size)
    if rank < world_size - 1:  # the last process sees no batch before the first reduction
        monitor.update(t[part], losses[part])
    first = monitor.compute()
    state = monitor.state_dict()
    restored = LossByNoise(NoiseSchedule.linear(1000))
    restored.load_state_dict(state)
    restored.update(t[part], losses[part])
    return {"first": first, "state": state, "second": restored.compute()}


def validated(rank: int, world_size: int, x0: Tensor) -> dict[str, object]:
    """Validate on this process's part, dealt out as a DistributedSampler does, and with indices."""
    schedule, part = NoiseSchedule.linear(1000), slice(rank, None, world_size)
    index = torch.arange(len(x0))
    # The last process repeats the first sample, as a sampler does that fills up its batch.
    padded = torch.cat([x0[part], x0[:1]]) if rank == world_size - 1 else x0[part]
    padded_index = torch.cat([index[part], index[:1]]) if rank == world_size - 1 else index[part]
    results = {
        "in order": validation_loss(small_model, x0[part].split(3), schedule, skip_set=49),
        "by index": validation_loss(
            small_model, [(padded, {}, padded_index)], schedule, skip_set=49
        ),
    }
    return {name: {"index": result.index, **result.losses} for name, result in results.items()}
