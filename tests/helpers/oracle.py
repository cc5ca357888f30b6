"""The loss by another way, sharing no code with the library.

Coefficients in mpmath with 40 digits, from the definitions of each schedule; the loss in float64,
as the two terms that the paper writes and as the plain squared error of a changed target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mpmath import mp, mpf
from torch import Tensor

mp.dps = 40
Pair = tuple[Any, Any]


def vp_pair(abar: Any) -> Pair:
    return mp.sqrt(abar), mp.sqrt(1 - abar)


def discrete_path(kind: str, table: list[float]) -> list[Pair]:
    """(a, b) of every timestep, from β, ᾱ, log SNR or σ as Python floats."""
    if kind == "sigmas":
        return [(mpf(1), mpf(sigma)) for sigma in table]
    if kind == "alphas_cumprod":
        return [vp_pair(mpf(value)) for value in table]
    if kind == "log_snr":
        return [vp_pair(1 / (1 + mp.exp(-mpf(value)))) for value in table]
    pairs, abar = [], mpf(1)
    for beta in table:
        abar *= 1 - mpf(beta)
        pairs.append(vp_pair(abar))
    if kind == "zero_snr":
        root = [a for a, _ in pairs]
        scale = root[0] / (root[0] - root[-1])
        pairs = [vp_pair(((value - root[-1]) * scale) ** 2) for value in root]
    return pairs


def continuous_pair(kind: str, t: float) -> Pair:
    t = mpf(t)
    if kind == "flow":
        return 1 - t, t
    if kind == "ve":
        return mpf(1), mpf("0.002") + 80 * t
    if kind == "cosine":
        shift = mpf("0.008")
        angles = [(time + shift) / (1 + shift) * mp.pi / 2 for time in (t, mpf(0))]
        a = mp.cos(angles[0]) / mp.cos(angles[1])
        return a, mp.sqrt(1 - a**2)
    a = mp.exp(-(t**2) * (mpf(20) - mpf("0.1")) / 4 - t * mpf("0.1") / 2)
    return a, (1 - a**2 if kind == "sub_vp" else mp.sqrt(1 - a**2))


def abar_of(pair: Pair) -> Any:
    return pair[0] ** 2 / (pair[0] ** 2 + pair[1] ** 2)


def weight_of(name: str | None, pair: Pair) -> Any:
    """What the noise's error counts; None where the trainer's own scale is kept."""
    a, b = pair
    if name is None:
        return None
    snr = (a / b) ** 2 if b else mpf(10) ** 26
    snr = min(max(snr, mp.exp(-60)), mp.exp(60))
    return {
        "uniform": mpf(1),
        "min_snr": min(snr, 5) / snr,
        "soft_min_snr": 4 / (4 + snr),
        "p2": 1 / (1 + snr),
        "sigmoid": 1 / (1 + snr / mp.exp(2)),
    }[name]


@dataclass(frozen=True)
class Scales:
    """The loss at one time, in exact numbers turned to floats."""

    tau: float
    cs: tuple[float, ...]
    c: float
    c2: float
    a: float
    b: float
    weight: float


def scales(
    pair: Pair,
    earlier: list[Pair],
    tau: float,
    max_c2: float,
    weighting: str | None,
    ratio: Any = None,
) -> Scales:
    """Return the scales at a time with these earlier ones; `ratio` where an output's bound acts."""
    weight = weight_of(weighting, pair)
    abar = abar_of(pair)
    squares = []
    for other in earlier:
        c2 = abar_of(other) / abar - 1 if abar else mp.inf
        squares.append(min(max(c2, mpf(0)), mpf(max_c2)))
    count = max(len(squares), 1)
    c, c2 = sum(map(mp.sqrt, squares)) / count, sum(squares) / count
    bound = mp.inf
    if weight is not None:
        bound = mpf(max_c2) / max(weight, 1)
    if ratio is not None:
        bound = min(bound, mpf(max_c2) * ratio**2)
    c, c2 = min(c, mp.sqrt(bound)), min(c2, bound)
    return Scales(
        tau if squares else 1.0,
        tuple(float(mp.sqrt(each)) for each in squares),
        float(c),
        float(c2),
        float(pair[0]),
        float(pair[1]),
        1.0 if weight is None else float(weight),
    )


def two_terms(
    at: Scales, eps_hat: Tensor, eps: Tensor, zeta: Tensor | None, estimator: str
) -> Tensor:
    """τ mse(ε̂, ε) + (1-τ) mse(c ε̂, ζ) of one sample, times its weight (Eq. 13)."""
    simple = (eps_hat - eps).square().mean()
    if estimator == "expected":
        skip = at.c2 * eps_hat.square().mean() + 1
    else:
        other = eps if estimator == "shared" else zeta
        assert other is not None
        skip = at.c2 * eps_hat.square() - 2 * at.c * eps_hat * other + other.square()
        skip = skip.mean()
    return at.weight * (at.tau * simple + (1 - at.tau) * skip if at.tau < 1 else simple)


def minimiser(at: Scales, eps: Tensor, zeta: Tensor | None, estimator: str) -> Tensor:
    """The ε̂ at which the two terms are least."""
    a = at.tau + (1 - at.tau) * at.c2
    if a == 0:
        return 0 * eps
    best = at.tau / a * eps
    if estimator != "expected":
        other = eps if estimator == "shared" else zeta
        assert other is not None
        best = best + (1 - at.tau) * at.c / a * other
    return best


def parts(kind: str, a: float, b: float) -> tuple[float, float]:
    """p and q of an output p x_0 + q ε."""
    return {
        "epsilon": (0.0, 1.0),
        "v_prediction": (-b, a),
        "sample": (1.0, 0.0),
        "flow": (-1.0, 1.0),
        "score": (0.0, -1 / b if b else -math.inf),
    }[kind]


def ratio_of(kind: str, pair: Pair) -> Any:
    """An error of ε̂ over one of the output."""
    a, b = pair
    return {
        "epsilon": mpf(1),
        "v_prediction": a / (a**2 + b**2),
        "sample": a / b if b else mp.inf,
        "flow": a / (a + b),
        "score": b,
    }[kind]
