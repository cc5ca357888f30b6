"""The levels of the benchmark; each returns what goes into the JSON under its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks._overhead.contenders import (
    Loss,
    attempts,
    contenders,
    gradient_first_loss,
)
from benchmarks._overhead.measure import (
    Inputs,
    OperatorCount,
    copy_bandwidth,
    forward_backward,
    inductor_bytes,
    interleave,
    kernels,
    peak_memory,
    summarise,
    syncs_forbidden,
)
from s2dm_loss import NoiseSchedule

PAIRS = [
    ("mse_lifted", "mse"),
    ("min_snr", "mse"),
    ("expected", "mse"),
    ("fresh", "mse"),
    ("shared", "mse"),
    ("released", "mse"),
    ("expected", "mse_lifted"),
    ("expected", "min_snr"),
    ("released", "expected"),
    ("sa_dpm", "mse"),
    ("sa_dpm", "expected"),
]
REAL_SHAPES = {
    "CIFAR10": (128, 3, 32, 32),
    "CelebA": (128, 3, 64, 64),
    "ADM-256": (16, 3, 256, 256),
    "video latents": (4, 16, 13, 60, 90),
}
# Stable Diffusion's latents; measured as the size that they are.
LATENTS = (64, 4, 64, 64)
# On a CPU, where each compilation takes many seconds, only the sizes of these log2 are compiled and
# taken in bfloat16.
IN_FULL_ON_CPU = (20, 22)
ALLOCATIONS = 5


@dataclass(frozen=True)
class Settings:
    """How large and how long.

    Attributes:
        device: Where.
        seconds: Time for each cell, compilation not counted.
        smallest: log2 of the smallest size.
        largest: log2 of the largest size.
        step_batch: Batch of the training step.
        step_seconds: Time for the training step.
        cache_bytes: What the input sets have to fill before they take turns again.
        clock: What times a CPU: the wall's clock, or the process's own CPU time.
    """

    device: torch.device
    seconds: float
    smallest: int
    largest: int
    step_batch: int
    step_seconds: float
    cache_bytes: int
    clock: Callable[[], float]

    def interleave(
        self, prepare: Mapping[str, Callable[[], Callable[[], None]]], seconds: float
    ) -> dict[str, list[float]]:
        """Time contenders in turn, as `measure.interleave` does."""
        return interleave(prepare, self.device, seconds, clock=self.clock)

    def interleave_heads(
        self, losses: Mapping[str, Loss], shape: tuple[int, ...], dtype: torch.dtype, seconds: float
    ) -> dict[str, list[float]]:
        """Time losses, forward and backward, on inputs that are allocated anew now and then.

        Where the inputs happen to lie in memory moves a ratio by 5 % and more.
        """
        times: dict[str, list[float]] = {name: [] for name in losses}
        for _ in range(ALLOCATIONS):
            inputs = Inputs(shape, dtype, self.device, self.cache_bytes)
            calls = {name: forward_backward(loss, inputs) for name, loss in losses.items()}
            part = interleave(
                calls,
                self.device,
                seconds / ALLOCATIONS,
                clock=self.clock,
                least_rounds=20 // ALLOCATIONS,
            )
            for name, values in part.items():
                times[name] += values
        return times


def flat_shape(log2: int) -> tuple[int, ...]:
    """Return 64 samples of 4 channels, square, of 2^log2 elements in all; log2 is even."""
    side = 2 ** ((log2 - 8) // 2)
    return (64, 4, side, side)


def head(settings: Settings) -> list[dict[str, Any]]:
    """Forward and backward of the loss alone, over sizes and real shapes."""
    sizes = {
        f"2^{log2}": flat_shape(log2) for log2 in range(settings.smallest, settings.largest + 1, 2)
    }
    on_cpu_in_full = [flat_shape(log2) for log2 in IN_FULL_ON_CPU]
    cells = []
    for name, shape in (sizes | REAL_SHAPES).items():
        in_full = settings.device.type != "cpu" or shape in on_cpu_in_full
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
                _say(cell)
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
            _say(cell)
        torch.compiler.reset()
    return cells


def counts(settings: Settings) -> list[dict[str, Any]]:
    """Peak memory, operators, bytes, kernels, syncs and graph breaks: exact, no clock."""
    rows = []
    for shape in (REAL_SHAPES["CIFAR10"], LATENTS):
        for dtype in (torch.float32, torch.bfloat16):
            for name, loss in contenders(settings.device, dtype).items():
                row = {
                    "contender": name,
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "data_bytes": torch.Size(shape).numel() * dtype.itemsize,
                    **_count(loss, shape, dtype, settings.device, compile_too=shape == LATENTS),
                }
                rows.append(row)
                _say(row)
    return rows


def step(settings: Settings) -> dict[str, Any]:
    """A whole training step of the CIFAR10 U-Net: forward, loss, backward, optimizer."""
    device = settings.device
    model = cifar10_unet().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = NoiseSchedule.linear()
    alpha, sigma = (scale.float().to(device) for scale in schedule.alpha_sigma(schedule.timesteps))
    shape = (settings.step_batch, 3, 32, 32)
    x0 = torch.randn(shape, device=device)

    def predict(noise: Tensor, t: Tensor) -> Tensor:
        x_t = alpha[t].view(-1, 1, 1, 1) * x0 + sigma[t].view(-1, 1, 1, 1) * noise
        return model(x_t, t).sample

    def one_call(loss: Loss) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda noise, t: loss(predict(noise, t), noise, t)

    def sa_dpm(noise: Tensor, t: Tensor) -> Tensor:
        # arXiv 2312.12431 with K = 2 and λ = 1: the residual at t, and its sum with that at t - 1.
        residual = noise - predict(noise, t)
        earlier_noise = torch.randn_like(noise)
        earlier = earlier_noise - predict(earlier_noise, (t - 1).clamp(min=0))
        both = residual + (t >= 1).view(-1, 1, 1, 1) * earlier
        return residual.square().mean() + both.square().mean() / 4

    objectives = {name: one_call(loss) for name, loss in contenders(device).items()}
    objectives["sa_dpm"] = sa_dpm

    def training_step(objective: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def prepare() -> Callable[[], None]:
            noise = torch.randn_like(x0)
            t = torch.randint(1000, shape[:1], device=device)

            def work() -> None:
                optimizer.zero_grad(set_to_none=True)
                objective(noise, t).backward()
                optimizer.step()

            return work

        return prepare()

    steps = {
        name: (lambda objective=objective: training_step(objective))
        for name, objective in objectives.items()
    }
    times = settings.interleave(steps, settings.step_seconds)
    result: dict[str, Any] = {
        "model": "UNet2DModel of google/ddpm-cifar10-32, random weights, float32, AdamW",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shape": shape,
        "rounds": len(times["mse"]),
        **summarise(times, PAIRS),
    }
    result["peak_bytes"] = {}
    for name, call in steps.items():
        work = call()
        optimizer.zero_grad(set_to_none=True)  # each begins with no gradients held
        result["peak_bytes"][name] = peak_memory(work, device)
    _say(result)
    # The head alone at this shape: what the whole step can gain or lose, without the step's noise.
    heads = settings.interleave_heads(contenders(device), shape, torch.float32, settings.seconds)
    result["head"] = summarise(heads, PAIRS)
    if device.type == "cuda":
        result["cuda_graph"] = {
            name: _capture(model, objectives[name], x0)
            for name in ("mse", "expected", "fresh", "shared")
        }
    return result


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


def cifar10_unet() -> nn.Module:
    """The ε-model of google/ddpm-cifar10-32: DDPM's for CIFAR10, 35.7 M parameters."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        center_input_sample=False,
        time_embedding_type="positional",
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        mid_block_scale_factor=1,
        downsample_padding=0,
        act_fn="silu",
        attention_head_dim=None,
        norm_num_groups=32,
        norm_eps=1e-6,
    )


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


def _capture(
    model: nn.Module, objective: Callable[[Tensor, Tensor], Tensor], x0: Tensor
) -> dict[str, Any]:
    """Capture one training step in a CUDA graph, replay it, and say whether it trains."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=True)
    noise = torch.randn_like(x0)
    t = torch.arange(x0.shape[0], device=x0.device) * 7 % 1000

    def work() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = objective(noise, t)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = work()
    losses = []
    for _ in range(10):
        graph.replay()
        losses.append(float(loss))
    return {
        "captured": True,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "falls": math.isfinite(losses[-1]) and losses[-1] < losses[0],
    }


def _say(cell: dict[str, Any]) -> None:
    label = " ".join(
        str(cell[key]) for key in ("name", "contender", "dtype", "mode") if key in cell
    )
    ratios = {name: values[1] for name, values in cell.get("ratios", {}).items()}
    rest = {
        key: cell[key]
        for key in ("peak_bytes", "operators", "data_operators", "bytes", "compiled_bytes")
        if key in cell
    }
    click.echo(f"{label}: {ratios or rest}", err=True)
