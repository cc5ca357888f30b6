"""Paths in continuous time as functions: the library's own, their checks and derivatives.

A path maps float64 times of any shape to (log alpha, log sigma). If it has a method `alpha_sigma`,
that gives the coefficients themselves.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from s2dm_loss.checks import check_number, describe
from s2dm_loss.schedule import log_one_minus_exp

PathFunction = Callable[[Tensor], tuple[Tensor, Tensor]]

PROBES = 65
_NAMES = ("alpha", "sigma")
_NEAR_ONE = 0.01
_NO_VELOCITY = (
    "write it with differentiable operators, or use another prediction_type than 'velocity'"
)


class Path:
    """A path as a class, so that a schedule pickles where its path does."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at float64 times."""
        raise NotImplementedError

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return their logarithms, which keep the digits of a coefficient near 0."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha.log(), sigma.log()


class OwnPath(Path):
    """The path of a user's function that returns alpha and sigma."""

    def __init__(self, alpha_sigma: PathFunction) -> None:
        """Take the function, or say what is wrong with what it returns."""
        if not callable(alpha_sigma):
            raise TypeError(f"alpha_sigma must be callable, got {describe(alpha_sigma)}")
        what = "alpha and sigma, such as torch.ones_like(t) and t"
        smallest = min(float(v.min()) for v in _probed(alpha_sigma, "alpha_sigma", what))
        if smallest < 0:
            raise ValueError(
                f"alpha_sigma must return values of at least 0, got {smallest:.3g} for t from 0 to "
                "1: ContinuousSchedule itself takes logarithms"
            )
        self._alpha_sigma = alpha_sigma

    @override
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._alpha_sigma(t)
        return alpha, sigma


class TurnedPath(Path):
    """A path with data at 0 in the clock that has them at 1."""

    def __init__(self, path: Path) -> None:
        """Take the path with data at 0."""
        self._path = path

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._path(1 - t)

    @override
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._path.alpha_sigma(1 - t)


class VpPath(Path):
    """The VP and the sub-VP SDE."""

    def __init__(self, beta_min: float, beta_max: float, *, sub: bool) -> None:
        """Take β at both ends; `sub` for the sub-VP SDE."""
        self.beta_min: float = check_number("beta_min", beta_min, 0.0, math.inf, open_ends=True)
        self.beta_max: float = check_number("beta_max", beta_max, beta_min, sys.float_info.max)
        self.sub: bool = sub

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        log_variance = log_one_minus_exp(2 * log_alpha)
        return log_alpha, log_variance if self.sub else 0.5 * log_variance

    @override
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = self._log_alpha(t)
        variance = -(2 * log_alpha).expm1()
        return log_alpha.exp(), variance if self.sub else variance.sqrt()


class CosinePath(Path):
    """alpha = cos(u) / cos(u_0), u = π/2 (t + 0.008) / 1.008 and u_0 = u(0)."""

    @override
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start, turned = math.pi / 2 * 0.008 / 1.008, math.pi / 2 / 1.008 * t
        alpha = torch.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(start)
        # 1 - alpha² = sin(u - u_0) sin(u + u_0) / cos²(u_0), without cancellation.
        variance = turned.sin() * (turned + 2 * start).sin()
        return alpha, variance.sqrt() / math.cos(start)


class FlowPath(Path):
    """alpha = 1 - t, sigma = t."""

    @override
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.log1p(-t), t.log()

    @override
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t.clone()


def _probed(path: Callable[[Tensor], Any], name: str, what: str) -> list[Tensor]:
    """Return the two values of a path at times from 0 to 1, float64, or say what is wrong."""
    t = torch.linspace(0, 1, PROBES, dtype=torch.float64)
    values = path(t)
    pair = isinstance(values, (tuple, list)) and len(values) == 2
    if not pair or not all(isinstance(value, Tensor) for value in values):
        came = " and ".join(map(describe, values)) if pair else describe(values)
        raise TypeError(f"{name} must return two tensors, {what}, got {came}")
    for value in values:
        if value.shape != t.shape or bool(value.isnan().any()):
            came = "NaN" if value.shape == t.shape else describe(value)
            raise ValueError(
                f"{name} must return two tensors of the shape of t, without NaN, got {came} for t "
                f"of shape ({PROBES},) from 0 to 1"
            )
        if value.requires_grad:
            raise ValueError(
                f"{name} must be fixed, got values that require a gradient: no gradient flows "
                "through a schedule. Detach them; what the path is made of trains with its own loss"
            )
    return [value.to("cpu", torch.float64) for value in values]


def check_path(path: Callable[[Tensor], Any], data_at: int) -> None:
    """Raise unless a path gives log alpha and log sigma, and an SNR that falls from the data on."""
    log_alpha, log_sigma = _probed(path, "log_alpha_sigma", "log alpha and log sigma")
    if data_at:
        log_alpha, log_sigma = log_alpha.flip(0), log_sigma.flip(0)
    smallest = torch.minimum(log_alpha.min(), log_sigma.min())
    if smallest >= 0 and abs(float(log_alpha[0]) - 1) < _NEAR_ONE:
        raise ValueError(
            "log_alpha_sigma must return logarithms, got values from alpha = 1 on and none below "
            "0, which look like alpha and sigma: ContinuousSchedule.from_alpha_sigma takes them"
        )
    log_snr = 2 * (log_alpha - log_sigma)
    rises = log_snr[1:] > log_snr[:-1]
    if bool(rises.any()) or not bool(log_snr[-1] < log_snr[0]):
        way = f"rises from t = {data_at} on" if bool(rises.any()) else "is the same at every t"
        raise ValueError(
            f"log_alpha_sigma must give a signal-to-noise ratio that falls from the data at t = "
            f"{data_at} to the noise at t = {1 - data_at}, got one that {way}. Where the data lie "
            f"at t = {1 - data_at}, say data_at={1 - data_at}"
        )


def derivatives_of(path: PathFunction, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return dalpha/dt and dsigma/dt at times in [0, 1], with the one-sided limits at the ends."""

    def of_logarithms(t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha, log_sigma = path(t)
        return log_alpha.exp(), log_sigma.exp()

    eps = torch.finfo(times.dtype).eps
    near, far = (times.clamp(eps**share, 1 - eps**share) for share in (0.75, 0.375))
    function: PathFunction = getattr(path, "alpha_sigma", of_logarithms)
    alpha_rates, sigma_rates = _derivatives(function, torch.stack([times, near, far]))
    return _with_limits(alpha_rates), _with_limits(sigma_rates)


def _derivatives(path: PathFunction, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives of a path's two values, each a function of its own time alone."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        # Where torch 2.4 returns 0.
        with torch.inference_mode(False):
            return _derivatives(path, times.clone())
    # Not `jvp`: forward mode cannot be nested, and its levels are those of all threads together.
    pull: Any = torch.func.vjp(path, times)[1]
    one, zero = torch.ones_like(times), torch.zeros_like(times)
    return pull((one, zero))[0].detach(), pull((zero, one))[0].detach()


def _with_limits(rates: Tensor) -> Tensor:
    """Return a derivative at some times, given there, near there and a little farther inside.

    Where it is NaN, 0 times infinity at an end, it is the limit; infinite where the other two do
    not agree.
    """
    exact, near, far = rates.unbind(0)
    agree = (near - far).abs() <= 1e-3 * (1 + near.abs())
    limit = torch.where(agree, near, near.sign() * math.inf)
    return torch.where(exact.isnan(), limit, exact)


def _quadrature(start: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return edges of intervals from `start` to 1, four times in each and their weights.

    Gauss's rule in a variable x with t = start + (1 - start) x² (3 - 2x), which also integrates a
    slope that is infinite at an end as an inverse square root.
    """
    x = torch.linspace(0, 1, PROBES, dtype=torch.float64)
    root = math.sqrt(6 / 5)
    places = [sign * math.sqrt(3 / 7 + way * 2 / 7 * root) for way in (-1, 1) for sign in (-1, 1)]
    shares = [(18 - way * math.sqrt(30)) / 36 for way in (-1, 1) for _ in (0, 1)]
    half = 0.5 / (PROBES - 1)
    nodes = x[:-1, None] + half + half * torch.tensor(places, dtype=torch.float64)
    weights = half * torch.tensor(shares, dtype=torch.float64) * 6 * nodes * (1 - nodes)

    def time(x: Tensor) -> Tensor:
        return start + (1 - start) * x.square() * (3 - 2 * x)

    return time(x), time(nodes), (1 - start) * weights


def check_finite(schedule: str, times: Tensor, rates: Sequence[Tensor]) -> None:
    """Raise ValueError where a derivative is infinite or NaN."""
    for name, rate in zip(_NAMES, rates, strict=True):
        bad = ~rate.isfinite()
        if bool(bad.any()):
            raise ValueError(
                f"d{name}/dt must be finite, got {rate[bad][0].item()} at t = "
                f"{times[bad][0].item():.6g} on {schedule}: a min_time above 0 keeps clear of the "
                "data, and `lambda t: path((1 - 1e-5) * t)` of the noise end"
            )


def check_derivatives(schedule: str, path: PathFunction, min_time: float, data_at: int) -> None:
    """Raise ValueError unless a path's derivatives are finite and the slopes of its coefficients.

    Args:
        schedule: What an error calls the path's schedule.
        path: The path.
        min_time: Least distance from the data at which they have to be.
        data_at: The time at which the data lie, 0 or 1.
    """
    edges, nodes, weights = _quadrature(min_time)
    if data_at:
        edges, nodes, weights = 1 - edges, 1 - nodes, -weights
    try:
        ends, rates = derivatives_of(path, edges), derivatives_of(path, nodes)
    except Exception as error:
        raise ValueError(
            f"the path of {schedule} must be made of operators that PyTorch can differentiate, got "
            f"{type(error).__name__}: {_NO_VELOCITY}"
        ) from error
    for times, there in ((edges, ends), (nodes, rates)):
        check_finite(schedule, times, there)
    for name, logarithm, rate in zip(_NAMES, path(edges), rates, strict=True):
        found, true = (rate * weights).sum(-1), logarithm.exp().diff()
        wrong = (found - true).abs() > 0.05 * true.abs() + 1e-3 * true.abs().max()
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"d{name}/dt on {schedule} must be the slope of {name}, got a change of "
                f"{float(found[at]):.3g} for {float(true[at]):.3g} between t = "
                f"{float(edges[at]):.3g} and {float(edges[at + 1]):.3g}. A path that looks up a "
                f"table or rounds has the derivative 0: {_NO_VELOCITY}"
            )
