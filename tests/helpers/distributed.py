"""Run a function in several processes that share a gloo process group."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_distributed(worker, directory, *, world_size):
    """Return what `worker(rank)` returns, tensors in plain containers, in each of the processes.

    They are spawned, so `worker` must be importable by name from a module in tests/helpers. They
    meet through a file in `directory`: no port is taken, so tests may run side by side.
    """
    mp.spawn(_run, (worker, str(directory), world_size), nprocs=world_size)
    return [torch.load(directory / f"rank{rank}.pt") for rank in range(world_size)]


def _run(rank, worker, directory, world_size):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=240),  # a hang is a failure
    )
    try:
        torch.save(worker(rank), f"{directory}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()
    # Without Python's own end, in which a thread of gloo that still holds a tensor may ask for the
    # interpreter's lock and aborts the process: one run in twenty on a busy machine
    # (pytorch/pytorch#179291). An error above does not come here.
    os._exit(0)
