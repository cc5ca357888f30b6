"""The basis of frequencies, in octaves."""

from __future__ import annotations

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor, nn


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
        cosines = torch.from_numpy(dct(np.eye(size), axis=0, norm="ortho"))
        self.register_buffer("cosines", cosines.float(), persistent=False)
        place = torch.arange(size, dtype=torch.float64)
        frequency = torch.maximum(place[:, None], place)
        octave = frequency.clamp(min=0.5).log2().floor().long() + 1
        self.register_buffer("bands", octave, persistent=False)

    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates of images, `[B, C, H, W]`."""
        cosines = self.get_buffer("cosines")
        return cosines @ x @ cosines.T

    def images(self, coordinates: Tensor) -> Tensor:
        """Return the images of coordinates, `[B, C, H, W]`."""
        cosines = self.get_buffer("cosines")
        return cosines.T @ coordinates @ cosines
