from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality import networks
from benchmarks.quality.networks import (
    MLPSpec,
    NetworkSpec,
    PreconditionedUNet,
    PreconditionedUNetSpec,
    SpectralUNet,
    SpectralUNetSpec,
    UNetSpec,
)
from benchmarks.quality.presets import PRESETS
from s2dm_loss import NoiseSchedule

UNET = UNetSpec(channels=8, multipliers=(1, 2), blocks=1, attention_at=(8,))
SMALL = [
    *(MLPSpec(16, 2), UNET),
    *(PreconditionedUNetSpec(UNET, fast=False), SpectralUNetSpec(UNET, fast=False)),
]


@pytest.mark.parametrize("spec", SMALL, ids=lambda s: type(s).__name__)
def test_one_time_for_all_is_the_same_as_one_for_each(spec: NetworkSpec) -> None:
    torch.manual_seed(0)
    network = spec.build((3, 16, 16)).eval()
    x = torch.randn(4, 3, 16, 16)
    shared = network(x, torch.tensor(321))
    assert shared.shape == x.shape
    torch.testing.assert_close(shared, network(x, torch.full((4,), 321)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shared, network(x, torch.tensor(322)))


@pytest.mark.parametrize(("preset", "millions"), [("cifar10", 35.7), ("celeba", 78.7)])
def test_the_papers_networks_have_the_papers_size(preset: str, millions: float) -> None:
    """The published U-Nets of DDPM and DDIM have 35.7 and 78.7 million parameters."""
    size = {"cifar10": 32, "celeba": 64}[preset]
    with torch.device("meta"):
        network = PRESETS[preset].network.build((3, size, size))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_attention_stands_where_it_is_asked_for() -> None:
    unet = UNetSpec(8, (1, 1, 2), blocks=1, attention_at=(8,)).build((3, 16, 16))
    kinds = [type(block).__name__ for block in unet.unet.down_blocks]  # type: ignore[union-attr]
    assert kinds == ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"]
    kinds = [type(block).__name__ for block in unet.unet.up_blocks]  # type: ignore[union-attr]
    assert kinds == ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]


def preconditioned(data_std: float = 0.5, patch: int = 2, fast: bool = False) -> PreconditionedUNet:
    torch.manual_seed(0)
    network = PreconditionedUNetSpec(UNET, patch, data_std, fast=False).build((3, 16, 16)).eval()
    assert isinstance(network, PreconditionedUNet)
    network.fast = fast  # autocast alone: compiling would take most of a minute
    return network


@pytest.mark.parametrize("data_std", [0.3, 1.0])
def test_with_nothing_learned_a_preconditioned_network_predicts_white_data_best(
    data_std: float,
) -> None:
    """The slope of a regression of ε on x_t, over draws of white data: no linear ε̂ does better."""
    network = preconditioned(data_std)
    for weights in network.unet.conv_out.parameters():
        torch.nn.init.zeros_(weights)
    alphas_cumprod = NoiseSchedule.linear(1000).alphas_cumprod
    draw = torch.Generator().manual_seed(0)
    x0 = data_std * torch.randn(1000, 3, 16, 16, generator=draw, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
    for t in (0, 100, 300, 999):
        a = float(alphas_cumprod[t])
        x = a**0.5 * x0 + (1 - a) ** 0.5 * noise
        slope = (x * noise).mean() / x.square().mean()
        with torch.no_grad():
            predicted = network(x[:2].float(), torch.tensor(t)).double()
        ratio = (predicted * x[:2]).sum() / x[:2].square().sum()
        assert float(ratio) == pytest.approx(float(slope), abs=0.015)
        torch.testing.assert_close(predicted, ratio * x[:2], rtol=1e-4, atol=1e-6)


def test_an_error_of_the_unet_counts_for_at_most_its_share_in_x0() -> None:
    """x̂_0 = (x_t − √(1−ᾱ) ε̂) / √ᾱ moves by at most σ times a change of F, at every t."""
    network = preconditioned(data_std=0.5)
    alphas_cumprod = NoiseSchedule.linear(1000).alphas_cumprod
    bias = network.unet.conv_out.bias
    assert bias is not None
    network.requires_grad_(False)
    x = torch.randn(1, 3, 16, 16)
    for t in (0, 10, 200, 700, 999):
        time, a = torch.tensor(t), float(alphas_cumprod[t])
        before = network(x, time)
        bias.add_(1.0)
        moved = (1 - a) ** 0.5 / a**0.5 * (network(x, time) - before).abs()
        assert float(moved.max()) <= 0.5 * (1 + 1e-3)
        # Towards late t, where x_t says nothing of x_0, F alone says what x_0 is.
        assert t < 999 or float(moved.min()) == pytest.approx(0.5, rel=0.02)


def coloured(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian images with power that falls with frequency and two colours tied together.

    Returns them, `[N, 2, 8, 8]`, and their mean `[128]` and covariance.
    """
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


def spectral() -> SpectralUNet:
    torch.manual_seed(0)
    network = SpectralUNetSpec(UNetSpec(8, (1, 1), blocks=1), fast=False).build((2, 8, 8)).eval()
    assert isinstance(network, SpectralUNet)
    network.measure(coloured(100_000)[0].float())
    return network.requires_grad_(False)


@pytest.mark.parametrize("t", [0, 100, 400, 999])
def test_with_nothing_learned_a_spectral_network_is_exact_for_gaussian_data(t: int) -> None:
    """ε̂ = √(1−ᾱ) (ᾱ Σ + (1−ᾱ) I)⁻¹ (x_t − √ᾱ μ), from μ and Σ themselves."""
    network = spectral()
    for weights in network.unet.conv_out.parameters():
        torch.nn.init.zeros_(weights)
    images, mean, covariance = coloured(64)
    a = NoiseSchedule.linear(1000).alphas_cumprod.double()[t]
    noise = torch.randn(images.shape, dtype=torch.float64)
    x = a.sqrt() * images + (1 - a).sqrt() * noise
    total = a * covariance + (1 - a) * torch.eye(128, dtype=torch.float64)
    centred = (x.flatten(1) - a.sqrt() * mean).T
    wanted = (1 - a).sqrt() * torch.linalg.solve(total, centred).T
    found = network(x.float(), torch.tensor(t)).flatten(1).double()
    assert float((found - wanted).norm() / wanted.norm()) < 0.01


def test_what_a_spectral_network_learns_has_the_size_of_what_is_unknown() -> None:
    """With F of variance 1, as white noise, ε̂ moves by √(ᾱ Σ (ᾱ Σ + 1 − ᾱ)⁻¹) of it."""
    network = spectral()
    shape = (500, 2, 8, 8)
    noise = torch.randn(shape)
    given = torch.nn.functional.pixel_unshuffle(noise, 2)
    _, _, covariance = coloured(1)
    for t in (0, 300, 999):
        a = NoiseSchedule.linear(1000).alphas_cumprod.double()[t]
        outputs = []
        for answer in (torch.zeros_like(given), given):
            network.unet.forward = lambda x, t, return_dict, answer=answer: (answer,)  # type: ignore[method-assign]
            outputs.append(network(torch.zeros(shape), torch.tensor(t)))
        moved = (outputs[1] - outputs[0]).flatten(1).double()
        total = a * covariance + (1 - a) * torch.eye(128, dtype=torch.float64)
        wanted = torch.trace(torch.linalg.solve(total, a * covariance)) / 128
        assert float(moved.square().mean()) == pytest.approx(float(wanted), rel=0.05)


def test_a_spectral_network_keeps_what_it_measured() -> None:
    network = spectral()
    again = SpectralUNetSpec(UNetSpec(8, (1, 1), blocks=1), fast=False).build((2, 8, 8)).eval()
    again.requires_grad_(False).load_state_dict(network.state_dict())
    x = torch.randn(2, 2, 8, 8)
    assert torch.equal(again(x, torch.tensor(500)), network(x, torch.tensor(500)))


@pytest.mark.parametrize("patch", [2, 4])
def test_a_preconditioned_network_answers_in_float32(
    patch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = preconditioned(patch=patch)
    x = torch.randn(2, 3, 16, 16)
    assert network.unet.config["in_channels"] == 3 * patch**2
    whole = network(x, torch.tensor([5, 900]))
    assert (whole.shape, whole.dtype) == (x.shape, torch.float32)
    network.fast = network.compiled = True  # and eager all the same
    monkeypatch.setattr(networks, "has_bfloat16", lambda _: False)
    assert torch.equal(network(x, torch.tensor([5, 900])), whole)
    monkeypatch.setattr(networks, "has_bfloat16", lambda _: True)
    rounded = network(x, torch.tensor([5, 900]))
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, whole)  # the U-Net ran in bfloat16
    torch.testing.assert_close(rounded, whole, rtol=0, atol=0.05)


def test_a_preconditioned_network_unshuffles_and_shuffles_back() -> None:
    """A U-Net that returns its input: the image comes back, pixel for pixel."""
    network = preconditioned(data_std=0.5)
    network.unet.forward = lambda x, t, return_dict: (x,)  # type: ignore[method-assign]
    x = torch.randn(2, 3, 16, 16)
    scale = network(x, torch.tensor(500)) / x
    torch.testing.assert_close(scale, scale[:1, :1, :1, :1].expand_as(scale), rtol=1e-4, atol=0)


@pytest.mark.parametrize("t", [0, 400, 999])
def test_the_unet_sees_unit_variance_at_every_time(t: int) -> None:
    seen = []
    network = preconditioned(data_std=0.3)
    network.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, 3, 16, 16, generator=draw)
    level = NoiseSchedule.linear(1000).alphas_cumprod[t].float()
    network(level.sqrt() * 0.3 * x0 + (1 - level).sqrt() * noise, torch.tensor(t))
    assert seen[0].shape == (64, 12, 8, 8)
    assert float(seen[0].std()) == pytest.approx(1, abs=0.01)


def test_the_small_networks_have_the_size_that_their_presets_say() -> None:
    for preset, millions in (("cifar10-tiny", 2.6), ("cifar10-small", 4.4)):
        network = PRESETS[preset].network.build((3, 32, 32))
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(
            millions, abs=0.06
        )
        assert f"{millions} M parameters" in PRESETS[preset].about
