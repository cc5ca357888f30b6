"""The levels of the benchmark; each returns what goes into the JSON under its name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.overhead.contenders import Loss, attempts, contenders, gradient_first_loss
from benchmarks.overhead.measure import (
    OperatorCount,
    copy_bandwidth,
    gradient_error,
    inductor_bytes,
    kernels,
    peak_memory,
    summarise,
    syncs_forbidden,
)
from benchmarks.overhead.settings import ALLOCATIONS, PAIRS, Settings, say
from benchmarks.overhead.step import step

REAL_SHAPES = {
    "CIFAR10": (128, 3, 32, 32),
    "CelebA": (128, 3, 64, 64),
    "ADM-256": (16, 3, 256, 256),
    "video latents": (4, 16, 13, 60, 90),
}
# Stable Diffusion's latents; measured as the size that they are.
LATENTS = (64, 4, 64, 64)
# The losses that compute in the type they are given and draw nothing.
SAME_IN_FLOAT64 = ("mse", "expected", "shared")


def flat_shape(log2: int) -> tuple[int, ...]:
    """Return 64 samples of 4 channels, square, of 2^log2 elements in all; log2 is even."""
    side = 2 ** ((log2 - 8) // 2)
    return (64, 4, side, side)


def head(settings: Settings) -> list[dict[str, Any]]:
    """Forward and backward of the loss alone, over sizes and real shapes."""
    sizes = {
        f"2^{log2}": flat_shape(log2) for log2 in range(settings.smallest, settings.largest + 1, 2)
    }
    in_full_shapes = [flat_shape(log2) for log2 in settings.in_full]
    cells = []
    for name, shape in (sizes | REAL_SHAPES).items():
        in_full = shape in in_full_shapes
        for dtype in (torch.float32, torch.bfloat16)[: 1 + in_full]:
            eager = contenders(settings.device, dtype)
            for mode in ("eager", "compiled")[: 1 + in_full]:
                losses = eager if mode == "eager" else compiled(eager)
                # Compiled, the drawing of noise is slow on a CPU and takes most of the time.
                slow = mode == "compiled" and settings.device.type == "cpu"
                seconds = (4 if slow else 1) * settings.seconds
                times = settings.interleave_heads(losses, shape, dtype, seconds)
                cell = {
                    "name": f"{name}, SD latents" if shape == LATENTS else name,
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "mode": mode,
                    "allocations": ALLOCATIONS,
                    "rounds": len(times["mse"]),
                    **summarise(times, PAIRS),
                }
                cells.append(cell)
                say(cell)
            torch.compiler.reset()
    return cells


def attempted(settings: Settings) -> list[dict[str, Any]]:
    """The steps that the head of `expected` went through."""
    cells = []
    for log2 in (20, 24):
        shape = flat_shape(log2)
        eager = attempts(settings.device)
        expected, mse = eager["shipped"], eager["mse"]
        pairs = [(name, "mse") for name in eager]
        fused: dict[str, Loss] = {
            "mse": torch.compile(mse, dynamic=False),
            "shipped": torch.compile(expected, dynamic=False, fullgraph=True),
            "gradient_first": gradient_first_loss(settings.device),
        }
        for mode, losses in (("eager", eager), ("compiled", fused)):
            times = settings.interleave_heads(losses, shape, torch.float32, settings.seconds)
            memory = {
                key: _head_memory(loss, shape, torch.float32, settings.device)
                for key, loss in losses.items()
            }
            cell = {
                "name": f"2^{log2}",
                "shape": shape,
                "mode": mode,
                "rounds": len(times["mse"]),
                "peak_bytes": memory,
                **summarise(times, [*pairs, ("gradient_first", "mse")]),
            }
            cells.append(cell)
            say(cell)
        torch.compiler.reset()
    return cells


def counts(settings: Settings) -> list[dict[str, Any]]:
    """Peak memory, operators, bytes, kernels, syncs, graph breaks, gradients: exact, no clock."""
    rows = []
    for shape in (LATENTS, *REAL_SHAPES.values()):
        for dtype in (torch.float32, torch.bfloat16):
            for name, loss in contenders(settings.device, dtype).items():
                row = {
                    "contender": name,
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "data_bytes": torch.Size(shape).numel() * dtype.itemsize,
                    **_count(loss, shape, dtype, settings.device, compile_too=shape == LATENTS),
                }
                if name in SAME_IN_FLOAT64:
                    arguments = _arguments(shape, dtype, settings.device)
                    row["gradient_error"] = gradient_error(loss, arguments)
                rows.append(row)
                say(row)
    return rows


def bandwidth(settings: Settings) -> dict[str, Any]:
    """What a copy reaches on this machine."""
    mebibytes = 1024 if settings.device.type == "cuda" else 128
    rates = copy_bandwidth(settings.device, mebibytes, max(settings.seconds, 1.0), settings.clock)
    return {"mebibytes": mebibytes, "copy_bytes_per_second": [round(rate) for rate in rates]}


LEVELS: dict[str, Callable[[Settings], Any]] = {
    "counts": counts,
    "bandwidth": bandwidth,
    "head": head,
    "attempts": attempted,
    "step": step,
}


def compiled(losses: dict[str, Loss]) -> dict[str, Loss]:
    """Compile each loss for one shape; only the released formula is let break the graph.

    And only it is compiled for all sizes: its masks have another one in each batch.
    """
    return {
        name: torch.compile(loss, dynamic=name == "released", fullgraph=name != "released")
        for name, loss in losses.items()
    }


def _arguments(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    eps_hat = torch.randn(shape, device=device).to(dtype).requires_grad_()
    noise = torch.randn(shape, device=device).to(dtype)
    # Some timesteps on either side of the skip, so that the released formula takes both branches.
    t = torch.arange(shape[0], device=device) * 7 % 1000
    return eps_hat, noise, t


def _head_memory(
    loss: Loss, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> int:
    arguments = _arguments(shape, dtype, device)

    def work() -> None:
        loss(*arguments).backward()

    work()
    arguments[0].grad = None
    return peak_memory(work, device)


def _count(
    loss: Loss,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    compile_too: bool,
) -> dict[str, Any]:
    arguments = _arguments(shape, dtype, device)
    eps_hat, noise, _ = arguments

    def work() -> None:
        eps_hat.grad = None
        loss(*arguments).backward()

    work()  # what happens once only, such as the first read of a table
    result: dict[str, Any] = {"peak_bytes": _head_memory(loss, shape, dtype, device)}
    with OperatorCount(large=min(eps_hat.nbytes, noise.nbytes)) as count:
        work()
    result |= {
        "operators": count.operators,
        "data_operators": count.data_operators,
        "bytes": count.bytes,
        "sync_operators": count.syncs,
    }
    if device.type == "cuda":
        result["kernels"] = kernels(work)
        try:
            with syncs_forbidden():
                work()
            result["sync"] = None
        except RuntimeError as error:
            result["sync"] = str(error).splitlines()[0]
    if compile_too:
        torch.compiler.reset()
        explained = torch._dynamo.explain(loss)(*arguments)
        result["graph_breaks"] = explained.graph_break_count
        if explained.graph_break_count == 0:
            result["compiled_bytes"] = inductor_bytes(loss, arguments)
    return result
