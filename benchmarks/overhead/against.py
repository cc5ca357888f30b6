"""The loss of another version beside this one, in one process and on the same tensors."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.overhead.contenders import SKIP, Loss, contenders
from benchmarks.overhead.levels import Cell, Settings, some_arguments
from benchmarks.overhead.measure import OperatorCount, summarise

PACKAGE = "s2dm_loss"


def other_loss(folder: Path) -> tuple[str, Loss]:
    """Return the version in a checkout and its loss, `expected`, of (ε̂, ε, t).

    Raises:
        ValueError: If there is no package in the folder.
    """
    if not (folder / PACKAGE / "__init__.py").exists():
        raise ValueError(f"against: expected a checkout with a folder {PACKAGE}, got {folder}")
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    sys.path.insert(0, str(folder))
    try:
        other: Any = importlib.import_module(PACKAGE)
        criterion = other.SkipStepLoss(other.NoiseSchedule.linear(), SKIP)
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(ours)
    # Until 0.2 a trainer that had called its model used `from_prediction`.
    loss = getattr(criterion, "from_prediction", None) or criterion.from_output
    return str(other.__version__), loss


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def against(settings: Settings, other: Loss) -> Iterator[Cell]:
    """Yield times and operators of `F.mse_loss`, the other version and this one, by size.

    Samples of 4 x 32 x 32; in bfloat16 the yardstick is `F.mse_loss` on float32 copies.
    """
    sizes = range(settings.smallest, settings.largest + 1, 2)
    cells = [(dtype, log2) for dtype in (torch.float32, torch.bfloat16) for log2 in sizes]
    for (dtype, log2), seconds in settings.in_time(cells):
        shape = (2 ** (log2 - 12), 4, 32, 32)
        losses = {"mse": plain, "old": other, "new": contenders(settings.device)["expected"]}
        counted = {name: _cost(loss, shape, dtype, settings) for name, loss in losses.items()}
        times = settings.interleave_heads(losses, shape, dtype, seconds)
        yield {
            "name": f"2^{log2}",
            "shape": shape,
            "dtype": str(dtype).removeprefix("torch."),
            "rounds": len(times["mse"]),
            "operators": {name: count.operators for name, count in counted.items()},
            "new_bytes": {name: count.new_bytes for name, count in counted.items()},
            **summarise(times),
        }


def plain(eps_hat: Tensor, noise: Tensor, _t: Tensor) -> Tensor:
    """Return the mean squared error, of half types in float32."""
    return F.mse_loss(eps_hat.float(), noise.float())


def _cost(
    loss: Loss, shape: tuple[int, ...], dtype: torch.dtype, settings: Settings
) -> OperatorCount:
    arguments = some_arguments(shape, dtype, settings.device)
    for _ in range(2):  # the first call also reads tables
        arguments[0].grad = None
        with OperatorCount(large=arguments[0].nbytes) as count:
            loss(*arguments).backward()
    return count
