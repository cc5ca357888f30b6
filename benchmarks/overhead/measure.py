"""How it is measured: interleaved times, peak memory, operators, bytes, host syncs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import truediv
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # as torch's own pages do
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Shape = tuple[int, ...]
Arguments = tuple[Tensor, Tensor, Tensor]
"""ε̂, ε and t."""
Prepare = Callable[[], Callable[[], object]]
"""Picks inputs, untimed, and returns the work to be timed."""


def quartiles(values: Iterable[float], digits: int | None) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    return [round(x, digits) for x in statistics.quantiles(values, n=4, method="inclusive")]


def some_arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """Return arguments of a loss, the timesteps evenly over all 1,000."""
    eps_hat = torch.randn(shape, device=device).to(dtype).requires_grad_()
    noise = torch.randn(shape, device=device).to(dtype)
    return eps_hat, noise, torch.arange(shape[0], device=device) * 1000 // shape[0]


def inputs_in_turn(
    shape: Shape, dtype: torch.dtype, device: torch.device, least_bytes: int
) -> Iterator[Arguments]:
    """Yield sets of arguments in turn for ever, and free the gradient of the last one.

    So many sets, from 3 to 256, that they fill `least_bytes` and none is found in a cache.
    """
    size = 2 * dtype.itemsize * torch.Size(shape).numel()
    count = min(max(least_bytes // size, 3), 256)
    for arguments in itertools.cycle([some_arguments(shape, dtype, device) for _ in range(count)]):
        yield arguments
        arguments[0].grad = None


def gradient_of(loss: Callable[..., Tensor], arguments: Arguments) -> Callable[[], Tensor]:
    """Return the work of a forward and a backward, which begins with no gradient of ε̂ held."""

    def work() -> Tensor:
        arguments[0].grad = None
        value = loss(*arguments)
        value.backward()
        return value

    return work


def interleave(
    prepare: Mapping[str, Prepare], device: torch.device, seconds: float, least_rounds: int = 20
) -> dict[str, list[float]]:
    """Time each contender once a round, for `seconds` or 400 rounds; return seconds by name.

    Each round has an order of its own: what ran just before leaves caches and the allocator in a
    state that must not be the same contender's luck every time.
    """
    times: dict[str, list[float]] = {name: [] for name in prepare}
    began, warm = time.perf_counter(), False
    while not warm:
        for call in prepare.values():
            call()()  # compiles, and reads tables
        warm = time.perf_counter() - began >= seconds / 10
    names, order = list(prepare), random.Random(0)  # noqa: S311
    began, rounds = time.perf_counter(), 0
    while rounds < least_rounds or (time.perf_counter() - began < seconds and rounds < 400):
        order.shuffle(names)
        for name in names:
            times[name].append(_time(prepare[name](), device))
        rounds += 1
    return times


def _time(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    # From an idle GPU, so that the host's time to launch is part of what is measured.
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def summarise(times: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Return quartiles of the times, in microseconds, and of ratios to `F.mse_loss` in a round."""
    return {
        "microseconds": {
            name: quartiles((1e6 * value for value in values), 2) for name, values in times.items()
        },
        "ratios": {
            f"{name}/mse": quartiles(map(truediv, values, times["mse"]), 4)
            for name, values in times.items()
            if name != "mse"
        },
    }


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes held at once above what was held before, temporaries included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    kineto = profiler.profiler
    if kineto is None or kineto.kineto_results is None:
        raise RuntimeError("this build of torch has no profiler to read allocations from")
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


# What the host can do only when the device has answered.
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class OperatorCount(TorchDispatchMode):
    """Counts operators and the bytes they read and write, below autograd; the same on every run.

    Views and allocations move nothing and are left out. What an operator does inside is not seen:
    `mse_loss` counts as one operator that writes a scalar. Those of `data_operators` read or write
    a tensor of at least `large` bytes, `new_bytes` are of new outputs of that size, and `syncs`
    make the host wait for the device.
    """

    def __init__(self, large: int) -> None:
        """Keep the size in bytes from which an operator counts as one on data."""
        super().__init__()
        self.large = large
        self.operators = self.data_operators = self.bytes = self.new_bytes = self.syncs = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and count it."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        reads = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        writes = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        # A boolean index is a `nonzero` in disguise.
        masked = name.startswith("index") and any(leaf.dtype == torch.bool for leaf in reads)
        self.syncs += masked or name in SYNCS
        if func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            return result
        sizes = [_bytes(leaf) for leaf in (*reads, *writes)]
        self.names.append(name)
        self.operators += 1
        self.data_operators += max(sizes, default=0) >= self.large
        self.bytes += sum(sizes)
        read = {leaf.untyped_storage().data_ptr() for leaf in reads}
        new = [_bytes(x) for x in writes if x.untyped_storage().data_ptr() not in read]
        self.new_bytes += sum(size for size in new if size >= self.large)
        return result


def _bytes(tensor: Tensor) -> int:
    """Bytes that lie in memory: an expanded axis is there once."""
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(n if stride else min(n, 1) for n, stride in axes)


def gradient_error(loss: Callable[..., Tensor], arguments: Arguments) -> float:
    """Return how far the gradient of ε̂ is from float64's, over the largest entry of that."""
    eps_hat, noise, t = arguments
    gradients = []
    for dtype in (eps_hat.dtype, torch.float64):
        leaf = eps_hat.detach().to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, noise.to(dtype), t), leaf)
        gradients.append(gradient.double())
    return float((gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max())


def kernels(work: Callable[[], object]) -> int:
    """Return how many kernels, copies and fills the GPU ran for `work`."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events() or [])


@contextlib.contextmanager
def syncs_forbidden() -> Iterator[None]:
    """Raise where the host would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            # The mode is set by then: it warns once that it does not see all that waits.
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def inductor_bytes(loss: Callable[..., Tensor], arguments: Arguments) -> int:
    """Return the bytes that Inductor's kernels move, forward and backward, by its own count."""
    from torch._functorch import config as autograd_config
    from torch._inductor import config, metrics

    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    level, propagate = log.level, log.propagate
    # Inductor counts only for whoever reads its log, and only what it compiles anew.
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        torch.compiler.reset()
        metrics.reset()
        with config.patch(fx_graph_cache=False), autograd_config.patch(enable_autograd_cache=False):
            torch.compile(loss, dynamic=False)(*arguments).backward()
        return int(metrics.num_bytes_accessed)
    finally:
        log.setLevel(level)
        log.propagate = propagate


def copy_bandwidth(device: torch.device, mebibytes: int, seconds: float) -> list[float]:
    """Return bytes a second of `copy_` between tensors that exist already, read plus write."""
    count = mebibytes * 2**20 // 4
    # Written once, so that no page is touched first inside the measurement.
    pairs = [[torch.ones(count, device=device) for _ in range(2)] for _ in range(3)]
    copies = itertools.cycle([partial(target.copy_, source) for target, source in pairs])
    times = interleave({"copy": partial(next, copies)}, device, seconds)["copy"]
    return quartiles((8 * count / value for value in times), None)
