from __future__ import annotations

import pytest
import torch

from benchmarks.quality.networks import MLPSpec, NetworkSpec, UNetSpec
from benchmarks.quality.presets import PRESETS

SMALL = [MLPSpec(16, 2), UNetSpec(channels=8, multipliers=(1, 2), blocks=1, attention_at=(8,))]


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
