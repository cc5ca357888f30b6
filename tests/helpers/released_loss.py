"""The released code's loss, value and gradient, on inputs of its own (shared golden values)."""

import json
from pathlib import Path

import torch

CASES = json.loads((Path(__file__).parents[1] / "data" / "released_loss.json").read_text())["cases"]


def released_tensor(case, name, dtype=torch.float64):
    """One of a case's tensors, of the shape of its data."""
    return torch.tensor(case[name], dtype=dtype).reshape(case["shape"])
