"""The released code's loss, value and gradient, on inputs of its own (shared golden values)."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CASES = json.loads((Path(__file__).parents[1] / "data" / "released_loss.json").read_text())["cases"]


def released_tensor(case: dict[str, Any], name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """One of a case's tensors, of the shape of its data."""
    return torch.tensor(case[name], dtype=dtype).reshape(case["shape"])


def released_constant(case: dict[str, Any]) -> float:
    """What the released loss is at its best prediction, by METHOD.md's formula in float64.

    τ ε² + (1-τ) ζ² - A target², with A = τ + (1-τ) c² and A target = τ ε + (1-τ) c ζ.
    """
    t, skip = torch.tensor(case["timesteps"]), case["skip"]
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    shape = (-1, *[1] * (len(case["shape"]) - 1))
    c2 = (alphas_cumprod[(t - skip).clamp(min=0)] / alphas_cumprod[t] - 1).view(shape)
    share = torch.where(t >= skip, 1 - case["tau"], 0.0).view(shape)  # 1-τ
    noise, zeta = (released_tensor(case, name) for name in ("noise", "skip_noise"))
    summed = (1 - share) * noise + share * c2.sqrt() * zeta
    least = (1 - share) * noise**2 + share * zeta**2 - summed**2 / (1 - share + share * c2)
    return float(least.mean())
