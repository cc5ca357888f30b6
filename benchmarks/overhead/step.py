"""A whole training step: forward, loss, backward, optimizer; and all levels by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead import levels, measure
from benchmarks.overhead.contenders import Loss, compiled, contenders
from benchmarks.overhead.levels import Cell, Settings, interleave_heads
from benchmarks.quality.networks import UNetSpec
from benchmarks.quality.paths import EpsilonPath

LEAST_ROUNDS = 5  # a step of a slow card is long


class Training:
    """A model, an optimizer and a batch of images.

    If "eager" in float32; in any other mode in bfloat16 under autocast, "compiled" if it says so.
    """

    def __init__(self, settings: Settings, mode: str) -> None:
        """Build the model with random weights."""
        self.settings, self.device = settings, settings.device
        self.dtype = torch.float32 if mode == "eager" else torch.bfloat16
        self.model = cifar10_unet(settings.small).to(self.device)
        self.network: Any = torch.compile(self.model) if "compiled" in mode else self.model
        self.path = EpsilonPath().to(self.device)
        side = 8 if settings.small else 32
        self.x0 = torch.randn(settings.step_batch, 3, side, side, device=self.device)
        fast = mode != "eager" and self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, fused=fast, capturable=fast
        )

    def predict(self, noise: Tensor, t: Tensor) -> Tensor:
        """Return the model's answer to x_t."""
        return self.network(self.path.noisy(self.x0, noise, t).x_t, t).sample

    def sa_dpm(self, eps_hat: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """SA-DPM (arXiv 2312.12431), K = 2, λ = 1: the residual at t, and its sum with t - 1's."""
        residual = noise - eps_hat
        earlier_noise = torch.randn_like(noise)
        earlier = earlier_noise - self.predict(earlier_noise, (t - 1).clamp(min=0))
        both = residual + (t >= 1).view(-1, 1, 1, 1) * earlier
        return residual.square().mean() + both.square().mean() / 4

    def work(self, loss: Loss) -> Callable[[], Tensor]:
        """Draw a batch, and return the training step on it."""
        noise = torch.randn_like(self.x0)
        t = torch.randint(1000, self.x0.shape[:1], device=self.device)
        mixed: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self.dtype == torch.bfloat16:
            # A CUDA graph cannot hold what autocast keeps between calls.
            mixed = torch.autocast(self.device.type, self.dtype, cache_enabled=False)

        def step() -> Tensor:
            self.optimizer.zero_grad()
            with mixed:
                value = loss(self.predict(noise, t), noise, t)
            value.backward()
            self.optimizer.step()
            return value

        return step


def step(settings: Settings, modes: Sequence[str]) -> Iterator[Cell]:
    """A training step of the CIFAR10 U-Net: "eager", "compiled", or either in a CUDA "graph"."""
    if settings.device.type != "cuda":
        modes = [mode for mode in modes if "graph" not in mode]
    for mode, seconds in settings.in_time(modes, settings.step_seconds):
        training, losses = Training(settings, mode), contenders(settings.device)
        if "compiled" in mode:
            losses = compiled(losses)
        measured = _captured if "graph" in mode else _launched
        yield {
            "mode": mode,
            "dtype": str(training.dtype).removeprefix("torch."),
            "model": "UNet2DModel of google/ddpm-cifar10-32, random weights, AdamW",
            "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
            "shape": tuple(training.x0.shape),
            **measured(training, losses, seconds),
        }


def _launched(training: Training, losses: Mapping[str, Loss], seconds: float) -> Cell:
    """Return times and memory of steps that the host launches."""
    settings, shape = training.settings, tuple(training.x0.shape)
    steps = {name: partial(training.work, loss) for name, loss in losses.items()}
    if training.dtype == torch.float32:
        steps["sa_dpm"] = partial(training.work, training.sa_dpm)
    times = measure.interleave(steps, training.device, seconds, LEAST_ROUNDS)
    memory = {}
    for name, prepare in steps.items():
        training.optimizer.zero_grad()  # each begins with no gradients held
        memory[name] = measure.peak_memory(prepare(), training.device)
    training.optimizer.zero_grad()
    # The head alone at this shape: what a step can gain or lose, without the step's noise.
    least = min(seconds / 5, settings.seconds)
    heads = measure.summarise(interleave_heads(settings, losses, shape, training.dtype, least))
    return {**measure.summarise(times), "peak_bytes": memory, "head": heads}


def _captured(training: Training, losses: Mapping[str, Loss], seconds: float) -> Cell:
    """Return times of steps that are captured in a CUDA graph, and whether their loss falls."""
    steps, heads, falls = {}, {}, {}
    device, shape = training.device, tuple(training.x0.shape)
    for name, loss in losses.items():
        if name == "released":  # its masks make the host wait, which a graph cannot hold
            continue
        replay, value = capture(training.work(loss))
        steps[name] = lambda replay=replay: replay
        values = [(replay(), value.item())[1] for _ in range(10)]
        falls[name] = math.isfinite(values[-1]) and values[-1] < values[0]
        arguments = measure.some_arguments(shape, training.dtype, device)
        alone, _ = capture(measure.gradient_of(loss, arguments))
        heads[name] = lambda alone=alone: alone
    times = measure.interleave(steps, device, seconds, LEAST_ROUNDS)
    least = min(seconds / 5, training.settings.seconds)
    head = measure.summarise(measure.interleave(heads, device, least))
    return {**measure.summarise(times), "loss_falls": falls, "head": head}


def capture(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture work in a CUDA graph, and return its replay and what it writes its result into."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay(_held: object = work) -> None:
        """Replay; the graph reads the work's tensors where they lie, so these are held."""
        graph.replay()

    return replay, result


def cifar10_unet(small: bool) -> nn.Module:
    """The ε-model of google/ddpm-cifar10-32: DDPM's for CIFAR10, 35.7 M parameters; or smaller."""
    spec = UNetSpec(32, (1, 1), blocks=1) if small else UNetSpec(128, (1, 2, 2, 2))
    return spec.diffusers_unet((3, 32, 32), downsample_padding=0)


MEASURE: dict[str, Callable[[Settings], Iterator[Cell]]] = {
    "bandwidth": levels.bandwidth,
    "float32": partial(levels.heads, mode="eager", dtypes=[torch.float32]),
    "bfloat16": partial(levels.heads, mode="eager", dtypes=[torch.bfloat16]),
    "compiled": partial(levels.heads, mode="compiled", dtypes=[torch.float32, torch.bfloat16]),
    "step": partial(step, modes=["eager"]),
    "step-compiled": partial(step, modes=["compiled"]),
    "step-graph": partial(step, modes=["graph", "compiled graph"]),
    "counts": levels.counts,
}
"""What measures each of `plan.LEVELS`."""
