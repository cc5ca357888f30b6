"""Weightings of the loss over t: functions of the signal-to-noise ratio.

w(t) multiplies the squared error of the *noise*, w mse(ε̂, ε), whatever the network predicts; on the
scale of another output it becomes w · ratio² (`s2dm_loss.prediction`). So a name means the same for
every prediction type, on every schedule:

    name             w of snr = α² / σ²        source
    "uniform"        1                         Ho et al., arXiv 2006.11239
    "min_snr"        min(snr, γ) / snr         Hang et al., arXiv 2303.09556
    "soft_min_snr"   γ / (snr + γ)             Crowson et al., arXiv 2401.11605
    "truncated_snr"  max(1 / snr, 1)           Salimans and Ho, arXiv 2202.00512
    "p2"             1 / (k + snr)^γ           Choi et al., arXiv 2204.00227
    "debiased"       1 / √snr                  Yu et al., arXiv 2310.08442
    "sigmoid"        sigmoid(bias - log snr)   Kingma and Gao, arXiv 2303.00848
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from s2dm_loss.checks import check_choice, check_number, check_rows, describe
from s2dm_loss.prediction import PathPoint

WeightingName = Literal[
    "uniform", "min_snr", "soft_min_snr", "truncated_snr", "p2", "debiased", "sigmoid"
]

Weighting: TypeAlias = WeightingName | Callable[[Tensor], Tensor]
"""What every `weighting` argument takes: a name, or a function of log SNR."""

_LARGEST_WEIGHT = 1e6


@dataclass(frozen=True)
class _Named:
    """A weighting with its numbers; compares, pickles and prints as the call that made it."""

    name: WeightingName
    numbers: tuple[float, ...] = ()

    def __call__(self, log_snr: Tensor) -> Tensor:
        return WEIGHTINGS[self.name].formula(log_snr, *self.numbers)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{number:g}' for number in self.numbers)})"


def min_snr(gamma: float = 5.0) -> Callable[[Tensor], Tensor]:
    """Min-SNR-γ, min(snr, γ) / snr (Hang et al., arXiv 2303.09556)."""
    return _Named("min_snr", (check_number("gamma", gamma, 0.0, math.inf, open_ends=True),))


def soft_min_snr(gamma: float = 4.0) -> Callable[[Tensor], Tensor]:
    """Soft Min-SNR, γ / (snr + γ) (Crowson et al., arXiv 2401.11605).

    k-diffusion's `soft-min-snr` is this with γ = 1 / σ_data², 4 by default.
    """
    return _Named("soft_min_snr", (check_number("gamma", gamma, 0.0, math.inf, open_ends=True),))


def p2(k: float = 1.0, gamma: float = 1.0) -> Callable[[Tensor], Tensor]:
    """P2, 1 / (k + snr)^γ (Choi et al., arXiv 2204.00227)."""
    return _Named(
        "p2",
        (
            check_number("k", k, 0.0, math.inf, open_ends=True),
            check_number("gamma", gamma, 0.0, math.inf),
        ),
    )


def sigmoid(bias: float = 2.0) -> Callable[[Tensor], Tensor]:
    """The sigmoid of bias - log snr (Kingma and Gao, arXiv 2303.00848)."""
    return _Named("sigmoid", (check_number("bias", bias, -math.inf, math.inf, open_ends=True),))


class WeightingRow(NamedTuple):
    """A named weighting.

    Attributes:
        formula: w of log SNR and the weighting's numbers; in log space, so that neither end
            overflows.
        default: What the name alone means.
    """

    formula: Callable[..., Tensor]
    default: Callable[[Tensor], Tensor]


WEIGHTINGS: dict[WeightingName, WeightingRow] = {
    "uniform": WeightingRow(torch.ones_like, _Named("uniform")),
    "min_snr": WeightingRow(
        lambda log_snr, gamma: (math.log(gamma) - log_snr).clamp(max=0.0).exp(), min_snr()
    ),
    "soft_min_snr": WeightingRow(
        lambda log_snr, gamma: (math.log(gamma) - log_snr).sigmoid(), soft_min_snr()
    ),
    "truncated_snr": WeightingRow(
        lambda log_snr: (-log_snr).clamp(min=0.0).exp(), _Named("truncated_snr")
    ),
    "p2": WeightingRow(lambda log_snr, k, gamma: (k + log_snr.exp()) ** -gamma, p2()),
    "debiased": WeightingRow(lambda log_snr: (-0.5 * log_snr).exp(), _Named("debiased")),
    "sigmoid": WeightingRow(lambda log_snr, bias: (bias - log_snr).sigmoid(), sigmoid()),
}
check_rows("WEIGHTINGS", WEIGHTINGS, WeightingName)


def read_weighting(weighting: Weighting | None) -> Callable[[Tensor], Tensor] | None:
    """Return a weighting as a function of log SNR; None, the trainer's own scale, stays None.

    Raises:
        TypeError, ValueError: if it is neither a known name nor a function.
    """
    if isinstance(weighting, nn.Module) and any(w.requires_grad for w in weighting.parameters()):
        raise ValueError(
            f"weighting must be fixed, got {weighting!r} with parameters to train: multiply what "
            'the loss returns with reduction="none" by it'
        )
    known: Any = weighting
    if any(known is family for family in (min_snr, soft_min_snr, p2, sigmoid)):
        raise TypeError(f"weighting must be called, {known.__name__}(), got the function itself")
    if weighting is None or (callable(weighting) and not isinstance(weighting, type)):
        return weighting
    if isinstance(weighting, str):
        check_choice("weighting", weighting, WEIGHTINGS)
        return WEIGHTINGS[weighting].default
    raise TypeError(
        f"weighting must be None, one of {', '.join(map(repr, WEIGHTINGS))}, or a function of log "
        f"SNR, got {describe(weighting)}"
    )


def weights_at(weighting: Callable[[Tensor], Tensor], path: PathPoint) -> Tensor:
    """Return w on the squared error of the noise, at some times of a path.

    Raises:
        TypeError, ValueError: if a function of the user's returns anything but one weight for each.
    """
    path = path.within_the_ends()
    log_snr = 2 * (path.a.log() - path.b.log())
    weights: Any = weighting(log_snr)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weighting must return a tensor, got {describe(weights)}")
    if weights.shape != log_snr.shape:
        raise ValueError(
            f"weighting must return a tensor of the shape of log SNR, {tuple(log_snr.shape)}, got "
            f"{describe(weights)}"
        )
    return weights.to(log_snr.dtype)


def check_weights(weights: Tensor) -> None:
    """Raise ValueError unless all weights are finite, not negative and of a size to train with."""
    good = (weights >= 0) & (weights <= _LARGEST_WEIGHT)
    if not good.all():
        index = int((~good).nonzero()[0])
        early = index < weights.numel() / 2
        what, unbounded = ("noise", "snr") if early else ("signal", "1 / snr")
        raise ValueError(
            f"weighting must lie in [0, {_LARGEST_WEIGHT:g}] on the scale of the model's output, "
            f"got {weights[index].item():.3g} at index {index} of {weights.numel()} times: where "
            f"there is no {what}, {unbounded} has no bound"
        )
