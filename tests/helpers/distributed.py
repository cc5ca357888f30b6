"""Run a function in several processes that share a gloo process group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(worker, directory, *args, world_size=2):
    """Return what `worker(rank, *args)` returns in each of `world_size` processes, by rank.

    The processes are spawned, so `worker` must be importable by name (a function of a module in
    tests/helpers, not of a test file), and what it returns must be tensors and plain containers.
    They meet through a file in `directory`: no port is taken, so tests may run side by side.
    """
    mp.spawn(_run, (worker, str(directory), world_size, args), nprocs=world_size)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(world_size)]


def _run(rank, worker, directory, world_size, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=240),  # a hang is a failure
    )
    try:
        torch.save(worker(rank, *args), f"{directory}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()
    # Without Python's own end, in which a thread of gloo that still holds a tensor may ask for the
    # interpreter's lock and aborts the process: one run in twenty on a busy machine
    # (pytorch/pytorch#179291). An error above does not come here.
    os._exit(0)
