"""ε-models: a residual MLP for tiny images and diffusers' U-Net for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class NetworkSpec(Protocol):
    """A network's hyperparameters, which know how to build it."""

    def build(self, image_shape: tuple[int, int, int]) -> nn.Module:
        """Return a freshly initialised network, called ``(x, t)``."""
        ...


class ResidualBlock(nn.Module):
    """A pre-norm residual block whose hidden layer is shifted by the time embedding."""

    def __init__(self, width: int) -> None:
        """Make the layers."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)
        self.time = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    @override
    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        inner = F.silu(self.inner(self.norm(hidden)) + self.time(time))
        result: Tensor = hidden + self.outer(inner)
        return result


class ResidualMLP(nn.Module):
    """An ε-model on flattened images.

    Args:
        image_shape: ``(C, H, W)``.
        width: Features of every hidden layer.
        blocks: Residual blocks.

    Shape:
        x ``[B, C, H, W]``; t ``[B]``, or ``[]`` for one time shared by the batch (a sampler's
        case, in which the time embedding is computed once); returns ``[B, C, H, W]``.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int, blocks: int) -> None:
        """Make the layers."""
        super().__init__()
        values = math.prod(image_shape)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * (width // 2), width), nn.SiLU())
        self.inlet = nn.Linear(values, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.outlet = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, values))
        # At late timesteps x_t is almost all noise, so ε̂ must be x_t to within a percent, which
        # a narrow trunk cannot carry; a U-Net has its long skip connections for that.
        self.gate = nn.Linear(width, values)

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = self.get_buffer("frequencies")
        angles = t.to(frequencies).unsqueeze(-1) * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        values = x.flatten(1)
        hidden = self.inlet(values)
        for block in self.blocks:
            hidden = block(hidden, time)
        noise: Tensor = self.outlet(hidden) + self.gate(time) * values
        return noise.view_as(x)


@dataclass(frozen=True)
class MLPSpec(NetworkSpec):
    """Hyperparameters of :class:`ResidualMLP`."""

    width: int
    blocks: int

    @override
    def build(self, image_shape: tuple[int, int, int]) -> nn.Module:
        return ResidualMLP(image_shape, self.width, self.blocks)


class UNetTensor(nn.Module):
    """diffusers' U-Net with a tensor for an answer, as the other networks give."""

    def __init__(self, unet: UNet2DModel) -> None:
        """Wrap a U-Net."""
        super().__init__()
        self.unet = unet

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise: Tensor = self.unet(x, t, return_dict=False)[0]
        return noise


@dataclass(frozen=True)
class UNetSpec(NetworkSpec):
    """Hyperparameters of diffusers' ``UNet2DModel`` in the words of Ho et al. (2020).

    Attributes:
        channels: Channels at full resolution.
        multipliers: Channels of each level over ``channels``; each level halves the resolution.
        blocks: Residual blocks of a level.
        attention_at: Resolutions at which a level has self-attention (the middle always has it).
        dropout: Dropout inside the residual blocks.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int = 2
    attention_at: tuple[int, ...] = (16,)
    dropout: float = 0.0

    @override
    def build(self, image_shape: tuple[int, int, int]) -> nn.Module:
        image_channels, size, _ = image_shape
        attends = [size // 2**level in self.attention_at for level in range(len(self.multipliers))]
        return UNetTensor(
            UNet2DModel(
                sample_size=size,
                in_channels=image_channels,
                out_channels=image_channels,
                block_out_channels=tuple(self.channels * m for m in self.multipliers),
                layers_per_block=self.blocks,
                down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
                up_block_types=tuple(
                    "AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)
                ),
                attention_head_dim=None,
                norm_num_groups=math.gcd(32, self.channels),
                dropout=self.dropout,
                freq_shift=1,
                flip_sin_to_cos=False,
                norm_eps=1e-6,
            )
        )
