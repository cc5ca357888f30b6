import math
from unittest.mock import Mock

import pytest
import torch

from benchmarks.quality import networks
from benchmarks.quality.catalogue import CATALOGUE
from benchmarks.quality.data import SETS
from benchmarks.quality.networks import MLPSpec, PixelUNetSpec, SpectralUNetSpec, UNetSpec
from benchmarks.quality.presets import PRESETS
from s2dm_loss import NoiseSchedule

UNET = UNetSpec(channels=8, multipliers=(1, 2), blocks=1, attention_at=(8,))
SMALL = [MLPSpec(16, 2), PixelUNetSpec(UNET, fast=False), SpectralUNetSpec(UNET, fast=False)]


@pytest.mark.parametrize("spec", SMALL, ids=lambda s: type(s).__name__)
def test_one_time_for_all_is_the_same_as_one_for_each(spec):
    torch.manual_seed(0)
    network = spec.build((3, 16, 16)).eval()
    x = torch.randn(4, 3, 16, 16)
    shared = network(x, torch.tensor(321))
    assert shared.shape == x.shape
    torch.testing.assert_close(shared, network(x, torch.full((4,), 321)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shared, network(x, torch.tensor(322)))


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("cifar10-16", "4.24"), ("cifar10-wide", "2.68"), ("cifar10-unet", "35.75")],  # the paper's
)
def test_networks_have_the_size_that_their_presets_say(preset, millions):
    with torch.device("meta"):
        network = PRESETS[preset].network.build(SETS[PRESETS[preset].data].shape)
    assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}" == millions
    assert preset == "cifar10-unet" or f"{millions} M" in CATALOGUE[preset].about


def test_attention_stands_where_it_is_asked_for():
    unet = UNetSpec(8, (1, 1, 2), blocks=1, attention_at=(16, 8)).diffusers_unet((3, 16, 16))
    sides = ([type(one).__name__[:2] for one in s] for s in (unet.down_blocks, unet.up_blocks))
    assert list(sides) == [["At", "At", "Do"], ["Up", "At", "At"]]


def coloured(count):
    """Gaussian images of two colours, with less power at higher frequencies; mean, covariance."""
    place = torch.arange(8, dtype=torch.float64)
    cosines = (math.pi / 8 * (place[:, None] + 0.5) * place).cos()
    cosines /= cosines.norm(dim=0)
    waves = torch.kron(cosines, cosines)
    power = (1 + place[:, None].square() + place.square()).flatten().pow(-1.5)
    space = waves @ power.diag() @ waves.T
    covariance = torch.kron(torch.tensor([[4.0, 1.5], [1.5, 1.0]], dtype=torch.float64), space)
    mean = torch.linspace(-0.5, 0.5, 128, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 128, generator=draw, dtype=torch.float64)
    images = mean + noise @ torch.linalg.cholesky(covariance).T
    return images.view(-1, 2, 8, 8), mean, covariance


def white():
    network = SpectralUNetSpec(UNetSpec(8, (1, 1), blocks=1), fast=False).build((2, 8, 8))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def spectral():
    network = white()
    network.measure(coloured(100_000)[0].float())
    return network


@pytest.mark.parametrize("t", [0, 100, 400, 999])
def test_with_nothing_learned_a_spectral_network_is_exact(t, spectral, monkeypatch):
    """ε̂ = √(1−ᾱ) (ᾱ Σ + (1−ᾱ) I)⁻¹ (x_t − √ᾱ μ), from μ and Σ themselves."""
    monkeypatch.setattr(spectral.unet, "forward", Mock(return_value=[torch.zeros(64, 8, 4, 4)]))
    images, mean, covariance = coloured(64)
    a = NoiseSchedule.linear(1000).alphas_cumprod.double()[t]
    noise = torch.randn(images.shape, dtype=torch.float64)
    x = a.sqrt() * images + (1 - a).sqrt() * noise
    total = a * covariance + (1 - a) * torch.eye(128, dtype=torch.float64)
    centred = (x.flatten(1) - a.sqrt() * mean).T
    wanted = (1 - a).sqrt() * torch.linalg.solve(total, centred).T
    found = spectral(x.float(), torch.tensor(t)).flatten(1).double()
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_what_a_spectral_network_learns_has_the_size_of_what_is_unknown(spectral, monkeypatch):
    """With F of variance 1, as white noise, ε̂ moves by √(ᾱ Σ (ᾱ Σ + 1 − ᾱ)⁻¹) of it."""
    zeros = torch.zeros(2000, 2, 8, 8)
    given = torch.nn.functional.pixel_unshuffle(torch.randn(zeros.shape), 2)
    _, _, covariance = coloured(1)
    for t in (0, 300, 999):
        a = NoiseSchedule.linear(1000).alphas_cumprod.double()[t]
        answers = Mock(side_effect=[(torch.zeros_like(given),), (given,)])
        monkeypatch.setattr(spectral.unet, "forward", answers)
        without, with_it = (spectral(zeros, torch.tensor(t)) for _ in range(2))
        moved = (with_it - without).flatten(1).double()
        total = a * covariance + (1 - a) * torch.eye(128, dtype=torch.float64)
        wanted = torch.trace(torch.linalg.solve(total, a * covariance)) / 128
        assert float(moved.square().mean()) == pytest.approx(float(wanted), rel=0.05)


def test_a_spectral_network_keeps_what_it_measured(spectral):
    again, x, t = white(), torch.randn(2, 2, 8, 8), torch.tensor(500)
    again.load_state_dict(spectral.state_dict())
    assert torch.equal(again(x, t), spectral(x, t))


def pixel_unet(fast=False):
    torch.manual_seed(0)
    network = PixelUNetSpec(UNET, fast=False).build((3, 16, 16)).eval()
    network.fast = network.compiled = fast  # autocast alone: compiling would take most of a minute
    return network


def test_a_fast_network_answers_in_float32(monkeypatch):
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    whole = pixel_unet()(x, t)
    assert (whole.shape, whole.dtype) == (x.shape, torch.float32)
    monkeypatch.setattr(networks, "has_bfloat16", lambda _: False)
    assert torch.equal(pixel_unet(fast=True)(x, t), whole)
    monkeypatch.setattr(networks, "has_bfloat16", lambda _: True)
    rounded = pixel_unet(fast=True)(x, t)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, whole)  # the U-Net ran in bfloat16
    torch.testing.assert_close(rounded, whole, rtol=0, atol=0.05)


def test_blocks_of_pixels_are_channels_and_come_back():
    """A U-Net that returns its input: the image comes back, pixel for pixel."""
    x, network = torch.randn(2, 3, 16, 16), pixel_unet()
    network.patch, network.unet.forward = 2, lambda x, t, return_dict: (x,)
    torch.testing.assert_close(network(x, torch.tensor(500)), x, rtol=0, atol=0)
