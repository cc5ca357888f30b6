"""A whole training step: forward, loss, backward, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.overhead.contenders import Loss, contenders
from benchmarks.overhead.measure import peak_memory, summarise
from benchmarks.overhead.settings import PAIRS, Settings, say
from s2dm_loss import NoiseSchedule


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
    say(result)
    # The head alone at this shape: what the whole step can gain or lose, without the step's noise.
    heads = settings.interleave_heads(contenders(device), shape, torch.float32, settings.seconds)
    result["head"] = summarise(heads, PAIRS)
    if device.type == "cuda":
        result["cuda_graph"] = {
            name: _capture(model, objectives[name], x0)
            for name in ("mse", "expected", "fresh", "shared")
        }
    return result


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
        losses.append(loss.item())
    return {
        "captured": True,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "falls": math.isfinite(losses[-1]) and losses[-1] < losses[0],
    }
