"""ε-models: a residual MLP for tiny images and diffusers' U-Net for the rest."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.quality.spectra import Frequencies
from s2dm_loss import NoiseSchedule

if TYPE_CHECKING:  # the pages are written without diffusers, which takes seconds to import
    from diffusers import UNet2DModel


Shape = tuple[int, int, int]
"""`(C, H, W)`."""


class NetworkSpec(Protocol):
    """A network's hyperparameters, which know how to build it."""

    def build(self, image_shape: Shape) -> nn.Module:
        """Return a freshly initialised network, called `(x, t)`."""
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
        return hidden + self.outer(inner)


class ResidualMLP(nn.Module):
    """An ε-model on flattened images `[B, C, H, W]`.

    With t `[B]`, or `[]` for one time shared by the batch, as a sampler's: embedded once.
    """

    def __init__(self, image_shape: Shape, width: int, blocks: int) -> None:
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
        return (self.outlet(hidden) + self.gate(time) * values).view_as(x)


@dataclass(frozen=True)
class MLPSpec(NetworkSpec):
    """Hyperparameters of `ResidualMLP`."""

    width: int
    blocks: int

    @override
    def build(self, image_shape: Shape) -> nn.Module:
        return ResidualMLP(image_shape, self.width, self.blocks)


@dataclass(frozen=True)
class UNetSpec:
    """Hyperparameters of diffusers' `UNet2DModel` in the words of Ho et al. (2020).

    Attributes:
        channels: Channels at full resolution.
        multipliers: Channels of each level over `channels`; each level halves the resolution.
        blocks: Residual blocks of a level.
        attention_at: Resolutions at which a level has self-attention (the middle always has it).
        dropout: Dropout inside the residual blocks.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int = 2
    attention_at: tuple[int, ...] = (16,)
    dropout: float = 0.0

    def diffusers_unet(
        self, image_shape: Shape, inputs: int | None = None, **options: Any
    ) -> UNet2DModel:
        """Return diffusers' own module, with as many input channels as images have or `inputs`."""
        from diffusers import UNet2DModel

        image_channels, size, _ = image_shape
        attends = [size // 2**level in self.attention_at for level in range(len(self.multipliers))]
        return UNet2DModel(
            sample_size=size,
            in_channels=inputs or image_channels,
            out_channels=image_channels,
            block_out_channels=tuple(self.channels * m for m in self.multipliers),
            layers_per_block=self.blocks,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            attention_head_dim=None,
            norm_num_groups=math.gcd(32, self.channels),
            dropout=self.dropout,
            freq_shift=1,
            flip_sin_to_cos=False,
            norm_eps=1e-6,
            **options,
        )


def default_device() -> torch.device:
    """Return a GPU where there is one, or what the variable S2DM_DEVICE says."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("S2DM_DEVICE", found))


def has_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 saves time: a processor without it takes 4 to 9 times as long."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PixelUNet(nn.Module):
    """A U-Net that sees blocks of pixels as channels, which is fast on a CPU.

    Its output is whatever it is trained on. `fast` is `torch.compile` and, where the processor has
    it, bfloat16 autocast for the U-Net; all else stays in float32.
    """

    def __init__(self, unet: UNet2DModel, *, patch: int, fast: bool) -> None:
        """Wrap a U-Net."""
        super().__init__()
        self.unet = unet.to(memory_format=torch.channels_last)
        self.patch, self.fast, self.compiled = patch, fast, False

    def on_blocks(self, images: Tensor, t: Tensor) -> Tensor:
        """Return what the U-Net makes of images `[B, C, H, W]`, at full size again."""
        if self.fast and not self.compiled:
            # On a GPU as CUDA graphs: launched one by one, the kernels of a step of the paper's
            # U-Net take longer to launch than to run.
            self.unet.compile(dynamic=False, mode="reduce-overhead" if images.is_cuda else None)
            self.compiled = True
        inputs = F.pixel_unshuffle(images, self.patch)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        rounded = self.fast and has_bfloat16(images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=rounded):
            outputs = self.unet(inputs, t, return_dict=False)[0]
        return F.pixel_shuffle(outputs.float(), self.patch)

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.on_blocks(x, t.expand(len(x)))


@dataclass(frozen=True)
class PixelUNetSpec(NetworkSpec):
    """Hyperparameters of `PixelUNet` on the image as it is."""

    unet: UNetSpec
    fast: bool = True

    @override
    def build(self, image_shape: Shape) -> nn.Module:
        return PixelUNet(self.unet.diffusers_unet(image_shape), patch=1, fast=self.fast)


class SpectralUNet(PixelUNet):
    """An ε-model around a U-Net, right from the start for Gaussian data of the images' spectrum.

    With y and F' the coordinates of x_t and of the U-Net's output in an orthonormal basis (colours
    x cosines), m and λ the data's mean and variance along each axis, and v = 1 − ᾱ + ᾱ λ,

        ε̂' = √(1−ᾱ)/v · (y − √ᾱ m) − √(ᾱ λ/v) · F',

    which with F = 0 is exact for Gaussian data of that mean and these variances, at every t.  So
    the colour and the coarse shape of a sample, which hang on late timesteps where ε tells little
    about x_0, have the right spread before any training.  The U-Net sees x_t and, beside it, the
    image m + √ᾱ λ/v · (y − √ᾱ m) that this linear estimate expects: from 2 C to C channels.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        image_shape: Shape,
        alphas_cumprod: Tensor,
        *,
        patch: int,
        fast: bool,
    ) -> None:
        """Wrap a U-Net; the spectrum is white until `measure`."""
        super().__init__(unet, patch=patch, fast=fast)
        self.register_buffer("alphas_cumprod", alphas_cumprod.float(), persistent=False)
        self.frequencies = Frequencies(image_shape[-1])
        # Saved with the weights, since a network is of use with these alone.
        self.register_buffer("colours", torch.eye(image_shape[0]))
        self.register_buffer("mean", torch.zeros(image_shape))
        self.register_buffer("variance", torch.full(image_shape, 0.25))

    def measure(self, images: Tensor) -> None:
        """Take colours, mean and variances from images `[N, C, H, W]` in [-1, 1]."""
        centred = images - images.mean(0)
        covariance = torch.einsum("bihw,bjhw->ij", centred, centred)
        self.get_buffer("colours").copy_(torch.linalg.eigh(covariance).eigenvectors.T)
        coordinates = self._coordinates(images)
        self.get_buffer("mean").copy_(coordinates.mean(0))
        self.get_buffer("variance").copy_(coordinates.var(0))

    def _coordinates(self, x: Tensor) -> Tensor:
        colours = self.get_buffer("colours")
        return self.frequencies.coordinates(torch.einsum("kc,bchw->bkhw", colours, x))

    def _images(self, coordinates: Tensor) -> Tensor:
        images = self.frequencies.images(coordinates)
        return torch.einsum("kc,bkhw->bchw", self.get_buffer("colours"), images)

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        mean, variance = self.get_buffer("mean"), self.get_buffer("variance")
        t = t.expand(len(x))
        signal = self.get_buffer("alphas_cumprod")[t, None, None, None]
        total = 1 - signal + signal * variance
        centred = (self._coordinates(x) - signal.sqrt() * mean) / total
        expected = self._images(mean + signal.sqrt() * variance * centred)
        scale = total.mean((1, 2, 3), keepdim=True).rsqrt()
        learned = self._coordinates(self.on_blocks(torch.cat([scale * x, 2 * expected], 1), t))
        rest = (signal * variance / total).sqrt() * learned
        return self._images((1 - signal).sqrt() * centred - rest)


@dataclass(frozen=True)
class SpectralUNetSpec(NetworkSpec):
    """Hyperparameters of `SpectralUNet` on the linear schedule of the presets."""

    unet: UNetSpec
    patch: int = 2
    fast: bool = True

    @override
    def build(self, image_shape: Shape) -> nn.Module:
        channels, height, width = image_shape
        inner = (channels * self.patch**2, height // self.patch, width // self.patch)
        return SpectralUNet(
            self.unet.diffusers_unet(inner, inputs=2 * inner[0]),
            image_shape,
            NoiseSchedule.linear(1000).alphas_cumprod,
            patch=self.patch,
            fast=self.fast,
        )
