"""Bases of images: octaves of frequencies and principal axes, and what a sampler leaves in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.quality.data import ImageSet, to_model_range
from benchmarks.quality.paths import Path
from benchmarks.quality.samplers import sample


class Frequencies(nn.Module):
    """An orthonormal basis of images: the discrete cosine transform of each channel.

    Attributes:
        bands: Which band of frequencies each coordinate belongs to, int64 `[H, W]`: 0 is the mean
            of a channel alone, and each band above is an octave.
    """

    bands: Tensor

    def __init__(self, size: int) -> None:
        """Make the transform of images with sides of `size` pixels."""
        super().__init__()
        place = torch.arange(size, dtype=torch.float64)
        cosines = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
        cosines[0] /= math.sqrt(2)
        self.register_buffer("cosines", cosines.float(), persistent=False)
        frequency = torch.maximum(place[:, None], place)
        octave = frequency.clamp(min=0.5).log2().floor().long() + 1
        self.register_buffer("bands", octave, persistent=False)

    @property
    def count(self) -> int:
        """How many bands there are."""
        return int(self.bands.max()) + 1

    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates of images, `[B, C, H, W]`."""
        cosines = self.get_buffer("cosines")
        return cosines @ x @ cosines.T

    def images(self, coordinates: Tensor) -> Tensor:
        """Return the images of coordinates, `[B, C, H, W]`."""
        cosines = self.get_buffer("cosines")
        return cosines.T @ coordinates @ cosines


def principal_axes(data: ImageSet) -> tuple[Tensor, Tensor]:
    """Return the data's variance along each principal axis, float64 `[D]`, and the axes.

    These are an orthonormal basis of images, float64 `[D, C, H, W]`.
    """
    values = torch.cat([to_model_range(part).flatten(1) for part in data.images.split(4096)])
    centred = values - values.mean(0)
    covariance = centred.T @ centred / (len(centred) - 1)
    variances, axes = torch.linalg.eigh(covariance.double())
    return variances.clamp(min=0), axes.T.reshape(-1, *data.shape)


def gaussian_variances(sampler: str, path: Path, steps: int, variances: Tensor) -> Tensor:
    """Return the variances of a deterministic sampler's samples of Gaussian data, float64 `[D]`.

    With the exact prediction along an axis of variance v, E[x_0 | x_t] = α v x_t / (α² v + σ²) and
    E[ε | x_t] = σ x_t / (α² v + σ²), each sample is proportional to its start. So this is what a
    sampler alone leaves, with nothing left to learn.
    """

    def exact(x: Tensor, t: Tensor) -> Tensor:
        signal, noise = path.schedule.alpha_sigma(path.time(t.double()))
        total = signal.square() * variances + noise.square()
        expected = noise - signal * variances if path.prediction_type == "flow" else noise
        return expected / total * x

    start = torch.ones_like(variances)[None]
    return sample(exact, sampler, path.schedule, steps, start, torch.Generator())[0].square()
