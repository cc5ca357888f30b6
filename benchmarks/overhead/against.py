"""The loss of another version beside this one, in one process and on the same tensors."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.overhead.contenders import SKIP, Loss

PACKAGE = "s2dm_loss"


def other_loss(folder: Path, device: torch.device) -> dict[str, Loss]:
    """Return the loss of a checkout, `expected`, of (ε̂, ε, t), by its version.

    Raises:
        ValueError: If there is no package in the folder.
    """
    if not (folder / PACKAGE / "__init__.py").exists():
        raise ValueError(f"against: expected a checkout with a folder {PACKAGE}, got {folder}")
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    sys.path.insert(0, str(folder))
    try:
        other: Any = importlib.import_module(PACKAGE)
        criterion = other.SkipStepLoss(other.NoiseSchedule.linear(), SKIP).to(device)
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(ours)
    # Until 0.2 a trainer that had called its model used `from_prediction`.
    loss: Loss = getattr(criterion, "from_prediction", None) or criterion.from_output
    return {f"version {other.__version__}": loss}


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")
