"""What is compared: losses of (ε̂, ε, t) that return a scalar, on the linear schedule."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from s2dm_loss import NoiseSchedule, SkipStepLoss
from s2dm_loss.coefficients import Estimator, coefficients

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

SKIP, TAU = 49, 0.99
LABELS = {
    "mse": "`F.mse_loss`",
    "mse_lifted": "`F.mse_loss` in float32",
    "min_snr": "Min-SNR",
    "expected": "ours, `expected`",
    "shared": "ours, `shared`",
    "fresh": "ours, `fresh`",
    "released": "released formula",
    "sa_dpm": "SA-DPM, K = 2",
}
"""How tables name them, in this order."""


def contenders(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Loss]:
    """Return the losses by name, with their tables on `device`; "mse" is the yardstick."""
    losses: dict[str, Loss] = {"mse": lambda eps_hat, noise, _t: F.mse_loss(eps_hat, noise)}
    if dtype != torch.float32:
        losses["mse_lifted"] = lambda e, n, _t: F.mse_loss(e.float(), n.float())
    losses["min_snr"] = min_snr_loss(device)
    for estimator in get_args(Estimator):
        criterion = SkipStepLoss(NoiseSchedule.linear(), SKIP, tau=TAU, estimator=estimator)
        losses[estimator] = criterion.to(device).from_output
    losses["released"] = released_loss(device)
    return losses


def compiled(losses: dict[str, Loss]) -> dict[str, Loss]:
    """Compile what is asked about, `F.mse_loss` and ours, for one shape: each takes seconds."""
    torch.compiler.reset()
    return {
        name: torch.compile(losses[name], dynamic=False, fullgraph=True)
        for name in ("mse", "mse_lifted", "expected")
        if name in losses
    }


def other_loss(folder: Path, device: torch.device) -> dict[str, Loss]:
    """Return the loss of a checkout of another version, `expected`, by its version."""
    if not (folder / "s2dm_loss" / "__init__.py").exists():
        raise ValueError(f"against: expected a checkout with a folder s2dm_loss, got {folder}")
    ours = _forget_modules()
    sys.path.insert(0, str(folder))
    try:
        other: Any = importlib.import_module("s2dm_loss")
        criterion = other.SkipStepLoss(other.NoiseSchedule.linear(), SKIP).to(device)
    finally:
        sys.path.remove(str(folder))
        _forget_modules()
        sys.modules.update(ours)
    # Until 0.2 a trainer that had called its model used `from_prediction`.
    loss: Loss = getattr(criterion, "from_prediction", None) or criterion.from_output
    return {f"version {other.__version__}": loss}


def _forget_modules() -> dict[str, Any]:
    """Take the loss's modules out of those that Python knows, and return them."""
    ours = [name for name in sys.modules if name.partition(".")[0] == "s2dm_loss"]
    return {name: sys.modules.pop(name) for name in ours}


def min_snr_loss(device: torch.device) -> Loss:
    """Min-SNR-5 (arXiv 2303.09556) in the steps that the training scripts of diffusers take."""
    alphas_cumprod = NoiseSchedule.linear().alphas_cumprod.float().to(device)

    def loss(eps_hat: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = alphas_cumprod.sqrt()[t]
        sigma = (1.0 - alphas_cumprod).sqrt()[t]
        snr = (alpha / sigma) ** 2
        weight = torch.stack([snr, 5.0 * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
        error = F.mse_loss(eps_hat.float(), noise.float(), reduction="none")
        return (error.mean(dim=list(range(1, error.ndim))) * weight).mean()

    return loss


def released_loss(device: torch.device, skip: int = SKIP, tau: float = TAU) -> Loss:
    """Eq. 13 with a fresh target, written out as the released code has it.

    A second noise tensor, two squared errors, a boolean mask for each branch, and the two branches
    concatenated.
    """
    c_table = coefficients(NoiseSchedule.linear(), skip).c.float().to(device)

    def loss(eps_hat: Tensor, noise: Tensor, t: Tensor, skip_noise: Tensor | None = None) -> Tensor:
        zeta = torch.randn_like(noise) if skip_noise is None else skip_noise
        axes = list(range(1, noise.ndim))
        early, late = t < skip, t >= skip
        plain = (noise[early] - eps_hat[early]).square().mean(dim=axes)
        c = c_table[t[late]].view(-1, *[1] * len(axes))
        simple = (noise[late] - eps_hat[late]).square().mean(dim=axes)
        skipped = (zeta[late] - c * eps_hat[late]).square().mean(dim=axes)
        return torch.cat([plain, tau * simple + (1 - tau) * skipped]).mean()

    return loss
