"""The tables that a discrete schedule is made from: read, checked, and told from one another."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from s2dm_loss.checks import as_float64, check_all

# From this length on, numbers in (0, 1) that fall from above one half are taken for ᾱ.
_TELLING_LENGTH = 10
# From this length on, β that fall all the way are turned round.
_TURNED = 20
# From this length on a table is a whole schedule, which goes on to noise.
_WHOLE = 100
# What else a table that runs the wrong way may be, which turning it round would not mend.
_ALSO = {
    "alphas_cumprod": ", or, if it holds β, use from_betas, or, if 1 - ᾱ, `1 - alphas_cumprod`",
    "log_snr": ", or, if it holds γ = -log SNR, negate it, `-log_snr`",
}


def read_betas(betas: Any) -> Tensor:
    """Return β_t, every value in (0, 1), the last in (0, 1]."""
    table = _read("betas", betas)
    if len(table) >= _TELLING_LENGTH and table[0] > 0.5 and bool((table.diff() < 0).all()):
        raise ValueError(
            f"betas must be the β of each timestep, got values that fall from {table[0]:.3g} "
            f"to {table[-1]:.3g}, which look like ᾱ: from_alphas_cumprod takes them"
        )
    if len(table) >= _TURNED and table[0] > table[-1] and bool((table.diff() <= 0).all()):
        raise ValueError(
            "betas must be the β of each timestep, which grow with the noise, got values that fall "
            f"from {table[0]:.3g} to {table[-1]:.3g}: turn the table round, `betas.flip(0)`"
        )
    if len(table) >= _WHOLE and table.median() > 0.5 and bool((table <= 1).all()):
        raise ValueError(
            "betas must be the β of each timestep, got a table of which most exceed 0.5, which "
            "looks like 1 - ᾱ or its root: from_alphas_cumprod takes ᾱ"
        )
    good = (table > 0) & (table < 1)
    good[-1] |= table[-1] == 1
    check_all("betas", table, good, "lie in (0, 1), the last in (0, 1]")
    return table


def read_alphas_cumprod(alphas_cumprod: Any) -> Tensor:
    """Return ᾱ_t, strictly decreasing in [0, 1]."""
    table = _read("alphas_cumprod", alphas_cumprod)
    check_all("alphas_cumprod", table, (table >= 0) & (table <= 1), "lie in [0, 1]")
    _check_direction("alphas_cumprod", table, falls=True)
    if len(table) >= _WHOLE and table[-1] > 0.9:
        raise ValueError(
            "alphas_cumprod must fall towards 0, got a table that ends at "
            f"{table[-1]:.3g}, which looks like 1 - β of each timestep: its `cumprod(0)` is ᾱ"
        )
    return table


def read_log_snr(log_snr: Any) -> Tensor:
    """Return log(ᾱ_t / (1 - ᾱ_t)), strictly decreasing."""
    table = as_float64("log_snr", log_snr)
    _check_direction("log_snr", table, falls=True)
    if len(table) >= _WHOLE and table[-1] >= 0:
        raise ValueError(
            "log_snr must fall below 0, where there is more noise than signal, got a table that "
            f"ends at {table[-1]:.3g}, which looks like an SNR or ᾱ: `snr.log()` is its logarithm, "
            "and from_alphas_cumprod takes ᾱ"
        )
    return table


def read_sigmas(sigmas: Any) -> Tensor:
    """Return the σ_t of x_0 + σ_t ε, positive and strictly increasing."""
    table = as_float64("sigmas", sigmas)
    check_all("sigmas", table, (table > 0) & table.isfinite(), "be positive and finite")
    _check_direction("sigmas", table, falls=False)
    if len(table) >= _WHOLE and table[-1] <= 1:
        raise ValueError(
            "sigmas must be those of x_0 + σ ε, got a table of values that never exceed 1, "
            "which look like √(1-ᾱ), or like the times of flow matching: from_alphas_cumprod "
            "takes ᾱ, and ContinuousSchedule.flow() has no table"
        )
    return table


def _read(name: str, values: Any) -> Tensor:
    """Return a table of shares, or send a number of timesteps to its constructor."""
    table = as_float64(name, [values] if isinstance(values, Real) and float(values) > 1 else values)
    if len(table) == 1 and table[0] > 1:
        count = float(table[0])
        raise ValueError(
            f"{name} must hold a value for each timestep, got {count:g}, which looks like the "
            f"number of timesteps: NoiseSchedule.linear({count:g}), scaled_linear and cosine take "
            "it"
        )
    return table


def _check_direction(name: str, table: Tensor, *, falls: bool) -> None:
    """Raise ValueError unless a table falls, or rises, strictly with t."""
    steps = table.diff() if falls else -table.diff()
    verb = "decrease" if falls else "increase"
    if len(table) > 1 and bool((steps > 0).all()):
        other = "increases" if falls else "decreases"
        raise ValueError(
            f"{name} must {verb} strictly with t, got a table that {other}: turn it round, "
            f"`{name}.flip(0)`{_ALSO.get(name, '')}"
        )
    check_all(name, table, F.pad(steps < 0, (1, 0), value=True), f"{verb} strictly with t")
