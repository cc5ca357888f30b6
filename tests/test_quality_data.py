import io
import pickle
import re

import numpy as np
import pytest
import torch
from numpy.testing._private.utils import runstring
from PIL import Image

from benchmarks.quality import data
from benchmarks.quality.data import load, to_model_range, to_uint8


def test_digits():
    digits = load("digits")
    assert (len(digits), digits.shape) == (1797, (1, 8, 8))
    assert len(digits.images.unique()) == 17
    assert digits.labels.unique().tolist() == list(range(10))
    values = to_model_range(digits.images)
    assert (float(values.min()), float(values.max())) == (-1, 1)


def test_uint8_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(levels)), levels)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def write_cifar10(folder, suffix=""):
    """Each image's reds, then greens, then blues; or as a row of a picture, which is npm's."""
    folder.mkdir(parents=True)
    every = np.random.default_rng(0).integers(256, size=(6, 4, 3, 1024), dtype=np.uint8)
    for name, batch in zip(data.CIFAR10_FILES, every, strict=True):
        if suffix:
            rows = np.ascontiguousarray(batch.swapaxes(1, 2))
            Image.fromarray(rows).save(folder / f"{name}{suffix}")
            continue
        content = {b"data": batch.reshape(4, 3072), b"labels": [7] * 4, b"batch_label": b"made"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return every.reshape(6, 4, 3, 32, 32)


@pytest.mark.parametrize(
    ("suffix", "folder", "named"),
    [
        ("", "cifar-10-batches-py", "cifar-10-batches-py"),
        ("", "cifar-10-batches-py", "."),
        (".png", "package", "package"),
    ],
)
def test_cifar10(tmp_path, suffix, folder, named):
    *batches, held_out = torch.from_numpy(write_cifar10(tmp_path / folder, suffix))
    images = load("cifar10", tmp_path / named)
    assert images.images.dtype == torch.uint8
    assert torch.equal(images.images, torch.cat(batches))
    assert torch.equal(images.held_out, held_out)
    halved = load("cifar10-16", tmp_path / named)
    for small, large in ((halved.images, images.images), (halved.held_out, held_out)):
        means = sum(large[..., y::2, x::2].double() for y in (0, 1) for x in (0, 1)) / 4
        assert (small - means).abs().max() <= 0.5  # rounded


@pytest.mark.parametrize("suffix", ["", ".png"])
def test_cifar10_says_what_is_missing(tmp_path, suffix):
    write_cifar10(tmp_path / "made", suffix)
    gone = [f"{name}{suffix}" for name in ("data_batch_3", "test_batch")]
    for name in gone:
        (tmp_path / "made" / name).unlink()
    said = f"lacks {', '.join(gone)}; expected the folder cifar-10"
    with pytest.raises(FileNotFoundError, match=re.escape(said)):
        load("cifar10", tmp_path / "made")


class Harmful:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call, ("open('ran', 'w')", {})


def test_an_unknown_set_is_refused():
    with pytest.raises(ValueError, match=r"expected one of digits, textures, .*, got 'mnist'"):
        load("mnist")


def test_textures_have_hardly_a_pixel_to_clamp():
    textures = load("textures")
    assert textures.images.shape == (8192, 1, 8, 8)
    assert textures.labels.unique().tolist() == list(range(18))
    at_an_end = (textures.images == 0) | (textures.images == 255)
    assert float(at_an_end.float().mean()) < 0.001


def png(*size):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(size, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


NO_BATCHES = [
    ({b"data": np.zeros((2, 9), np.uint8)}, r"\(N, 3072\), got uint8"),
    ({b"data": np.zeros((2, 3072))}, "uint8 array.*got float64"),
    ({b"labels": [0, 0]}, "got no array"),
    ([1, 2], "got no array"),
    ({b"data": Harmful(exec)}, r"found builtins\.exec"),
    ({b"data": Harmful(runstring)}, r"found numpy\.testing.*runstring"),
]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        *(("data_batch_2", pickle.dumps(content), said) for content, said in NO_BATCHES),
        ("data_batch_2.png", png(4, 96, 3), "expected RGB with 1024 .* with 96"),
        ("data_batch_2.png", png(4, 1024), "got L with 1024"),
        *(
            (name, content, "")
            for name in ("data_batch_4", "data_batch_4.png")
            for content in (b"", b"<html>", "half of it")
        ),
    ],
)
def test_a_damaged_file_of_cifar10_is_named_and_runs_no_code(
    tmp_path, monkeypatch, name, content, said
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "made" / name
    write_cifar10(path.parent, path.suffix)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half of it" else content)
    with pytest.raises(ValueError, match=rf"data: .*{name}: .*{said}"):
        load("cifar10", tmp_path / "made")
    assert not (tmp_path / "ran").exists()
