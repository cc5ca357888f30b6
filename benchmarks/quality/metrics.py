"""Distances between samples and data in a feature space: Fréchet's and the kernel's.

The Fréchet distance is torchmetrics', whose feature network is the identity, since features are
computed once. The kernel distance is unbiased and over all samples: one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from benchmarks.files import load_tensors, save_tensors
from benchmarks.quality.features import FeatureNetwork

ROWS = 2048
"""Rows of a kernel matrix at once."""


class _Identity(nn.Identity):
    """What torchmetrics takes for a network of features that are made already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


@dataclass(frozen=True)
class Distances:
    """How far the features of a set of images are from the reference's.

    By the Fréchet and the kernel distance: the unbiased squared MMD with the cubic kernel
    (x·y / d + 1)³ (Bińkowski et al., arXiv 1801.01401).
    """

    frechet: float
    kernel: float


def kernel_mean(x: Tensor, y: Tensor | None = None) -> float:
    """Return the mean of (x·y / d + 1)³ over pairs of rows; without y over pairs of different x."""
    other = x if y is None else y
    total = 0.0
    for rows in x.split(ROWS):
        kernel = (rows @ other.T / x.shape[1] + 1) ** 3
        total += float(kernel.sum(dtype=torch.float64))
    if y is not None:
        return total / (len(x) * len(y))
    own = (x.square().sum(1).double() / x.shape[1] + 1) ** 3
    return (total - float(own.sum())) / (len(x) * (len(x) - 1))


class FeatureDistances:
    """Compares sets of images with a reference, whose features `cache` keeps."""

    def __init__(
        self,
        network: FeatureNetwork,
        reference: Tensor,
        batch_size: int = 1024,
        *,
        cache: Path | None = None,
    ) -> None:
        """Compute the reference's features."""
        self.network, self.batch_size, self.device = network, batch_size, network.device
        identity = _Identity(network.num_features)
        self.frechet = FrechetInceptionDistance(identity, reset_real_features=False)
        self.frechet.to(self.device)
        if cache is not None and cache.exists():
            features = load_tensors(cache)["features"]
        else:
            features = self._features(reference)
            if cache is not None:
                save_tensors(cache, {"features": features})
        self.reference = features.to(self.device)
        self.frechet.update(self.reference, real=True)
        self.within_reference = kernel_mean(self.reference)

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Tensor:
        parts = images.split(self.batch_size)
        return torch.cat([self.network(part.to(self.device)).float() for part in parts])

    def compare(self, images: Tensor) -> Distances:
        """Return the distances of images `[N, C, H, W]` from the reference."""
        features = self._features(images)
        self.frechet.update(features, real=False)
        frechet = float(self.frechet.compute())
        self.frechet.reset()
        between = kernel_mean(features, self.reference)
        return Distances(frechet, kernel_mean(features) + self.within_reference - 2 * between)


def noise_floor(
    network: FeatureNetwork,
    data: Tensor,
    held_out: Tensor | None = None,
    images: int | None = None,
    repeats: int = 5,
    cache: Path | None = None,
) -> dict[str, float]:
    """Return how far real images are from real images, averaged over random choices.

    What no set of samples of that size can be expected to beat: so many `images` of the training
    data from the images held out, or else one half of the data from the other. `cache` keeps the
    features of what is held out.
    """
    drawn = len(data) // 2 if held_out is None else min(images or len(data), len(data))
    fixed = None if held_out is None else FeatureDistances(network, held_out, cache=cache)
    results = []
    for repeat in range(repeats):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(repeat))
        some, rest = data[order[:drawn]], data[order[drawn:]]
        here, there = (FeatureDistances(network, some), rest) if fixed is None else (fixed, some)
        results.append(here.compare(there))
    return {
        "frechet": sum(r.frechet for r in results) / repeats,
        "kernel": sum(r.kernel for r in results) / repeats,
        "repeats": repeats,
        "images_each": drawn,
        **({} if held_out is None else {"reference": len(held_out)}),
    }
