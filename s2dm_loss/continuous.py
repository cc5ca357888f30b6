"""Schedules in continuous time: a path given by its two coefficients."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, override

from s2dm_loss._torch import is_traced
from s2dm_loss.checks import check_number, describe
from s2dm_loss.schedule import drawn_by, log_one_minus_exp, wide_dtype


class ContinuousSchedule:
    """A path x_t = alpha(t) x_0 + sigma(t) ε in continuous time, t in [0, 1].

    Flow matching counts as well: its σ is the time, alpha = 1 - σ and sigma = σ.

    >>> from s2dm_loss import ContinuousSchedule
    >>> ContinuousSchedule.flow()
    ContinuousSchedule.flow()
    """

    def __init__(
        self,
        log_alpha_sigma: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        min_time: float = 0.0,
        name: str | None = None,
    ) -> None:
        """Build the path from its coefficients in log space.

        Args:
            log_alpha_sigma: Maps float64 times of any shape to (log alpha, log sigma) of that
                shape. The ratio alpha / sigma must fall with t.
            min_time: Smallest time that `draw_timesteps` draws, in [0, 1).
            name: What `repr` prints.

        Raises:
            TypeError: if the path is no function that returns two tensors.
            ValueError: if they have another shape, hold NaN, are no logarithms, or if their ratio
                does not fall with t.
        """
        if not callable(log_alpha_sigma):
            raise TypeError(f"log_alpha_sigma must be callable, got {describe(log_alpha_sigma)}")
        _check_path(log_alpha_sigma)
        self._log_alpha_sigma = log_alpha_sigma
        self.min_time: float = check_number("min_time", min_time, 0.0, 1.0)
        if self.min_time == 1:
            raise ValueError("min_time must lie in [0, 1), got 1.0: no time would be left to draw")
        self._name = name or "ContinuousSchedule(...)"

    @classmethod
    def vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> Self:
        """The variance-preserving SDE (Song et al., arXiv 2011.13456, Eq. 33)."""
        return cls._sde("vp", beta_min, beta_max)

    @classmethod
    def sub_vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> Self:
        """The sub-variance-preserving SDE (Song et al., arXiv 2011.13456, Eq. 35)."""
        return cls._sde("sub_vp", beta_min, beta_max)

    @classmethod
    def _sde(cls, kind: Literal["vp", "sub_vp"], beta_min: float, beta_max: float) -> Self:
        check_number("beta_min", beta_min, 0.0, math.inf, open_ends=True)
        check_number("beta_max", beta_max, beta_min, sys.float_info.max)
        path = _VpPath(beta_min, beta_max, sub=kind == "sub_vp")
        return cls(path, min_time=1e-5, name=f"ContinuousSchedule.{kind}({beta_min}, {beta_max})")

    @classmethod
    def from_alpha_sigma(
        cls,
        alpha_sigma: Callable[[Tensor], tuple[Tensor, Tensor]],
        *,
        min_time: float = 0.0,
        name: str | None = None,
    ) -> Self:
        """Build the path from its coefficients themselves; the other arguments are the class's.

        >>> ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 80 * t))
        ContinuousSchedule.from_alpha_sigma(...)

        Args:
            alpha_sigma: Maps float64 times of any shape to (alpha, sigma) of that shape, none
                negative. Where one comes near 0 it loses digits there, which the logarithms keep.
            min_time: Smallest time that `draw_timesteps` draws, in [0, 1).
            name: What `repr` prints.

        Raises:
            TypeError, ValueError: as the class does, and if a value is negative.
        """
        if not callable(alpha_sigma):
            raise TypeError(f"alpha_sigma must be callable, got {describe(alpha_sigma)}")
        smallest = min(float(v.min()) for v in _probed(alpha_sigma, "alpha_sigma", _COEFFICIENTS))
        if smallest < 0:
            raise ValueError(
                f"alpha_sigma must return values of at least 0, got {smallest:.3g} for t from 0 to "
                "1: ContinuousSchedule itself takes logarithms"
            )
        name = name or "ContinuousSchedule.from_alpha_sigma(...)"
        return cls(_LogPath(alpha_sigma), min_time=min_time, name=name)

    @classmethod
    def cosine(cls) -> Self:
        """The cosine path without its cut at the end (arXiv 2102.09672, Eq. 17)."""
        return cls(_cosine_path, name="ContinuousSchedule.cosine()")

    @classmethod
    def flow(cls) -> Self:
        """The straight path of flow matching: alpha = 1 - t, sigma = t (arXiv 2210.02747)."""
        return cls(_flow_path, name="ContinuousSchedule.flow()")

    @property
    def timesteps(self) -> None:
        """None: the times are a continuum."""
        return None

    def check_timesteps(self, t: Tensor) -> None:
        """Raise unless `t` is a floating-point tensor and, where reading it is free, in [0, 1]."""
        if not t.is_floating_point():
            raise TypeError(f"t must hold floating-point times in [0, 1], got {describe(t)}")
        if _reading_is_free(t) and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(
                f"t must lie in [0, 1], got values from {t.min().item()} to {t.max().item()}"
            )

    def log_alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """Return log ᾱ(t) = log(alpha² / (alpha² + sigma²)), float64, of the shape of `t`.

        A time outside [0, 1] gives NaN where `check_timesteps` could not read it.
        """
        log_alpha, log_sigma = self._log_alpha_sigma_at(t)
        return F.logsigmoid(2 * (log_alpha - log_sigma))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha(t) and sigma(t), float64, of the shape of `t`.

        A time outside [0, 1] gives NaN where `check_timesteps` could not read it.
        """
        log_alpha, log_sigma = self._log_alpha_sigma_at(t)
        return log_alpha.exp(), log_sigma.exp()

    def _log_alpha_sigma_at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        self.check_timesteps(t)
        t = t.to(wide_dtype(t.device))
        t = torch.where((t >= 0) & (t <= 1), t, math.nan)
        log_alpha, log_sigma = self._log_alpha_sigma(t)
        return log_alpha, log_sigma

    def draw_timesteps(
        self, batch_size: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return `batch_size` times, float32, uniform on [min_time, 1)."""
        # Said, since a half type as the default would have a few hundred values only.
        uniform = torch.rand(batch_size, dtype=torch.float32, device=device, **drawn_by(generator))
        return self.min_time + (1 - self.min_time) * uniform

    @override
    def __repr__(self) -> str:
        return self._name


def _probed(path: Callable[[Tensor], Any], name: str, what: str) -> list[Tensor]:
    """Return the two values of a path at times from 0 to 1, float64, or say what is wrong."""
    with torch.device("cpu"), torch.no_grad():
        t = torch.linspace(0, 1, _PROBES, dtype=torch.float64)
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
                f"of shape ({_PROBES},) from 0 to 1"
            )
    return [value.to("cpu", torch.float64) for value in values]


def _check_path(path: Callable[[Tensor], Any]) -> None:
    """Raise unless a path gives log alpha and log sigma, and an SNR that falls with t."""
    log_alpha, log_sigma = _probed(path, "log_alpha_sigma", "log alpha and log sigma")
    smallest = torch.minimum(log_alpha.min(), log_sigma.min())
    if smallest >= 0 and abs(float(log_alpha[0]) - 1) < _NEAR_ONE:
        raise ValueError(
            "log_alpha_sigma must return logarithms, got values from alpha = 1 on and none below "
            "0, which look like alpha and sigma: ContinuousSchedule.from_alpha_sigma takes them"
        )
    log_snr = 2 * (log_alpha - log_sigma)
    rises = log_snr[1:] > log_snr[:-1]
    if bool(rises.any()) or not bool(log_snr[-1] < log_snr[0]):
        way = "rises with t" if bool(rises.any()) else "is the same at every t"
        raise ValueError(
            "log_alpha_sigma must give a signal-to-noise ratio that falls with t, from data at 0 "
            f"to noise at 1, got one that {way}. Where time runs the other way, turn it round, "
            "`lambda t: path(1 - t)`, and give the loss 1 - t; and where the network predicts "
            "data minus noise, the output and the target with the other sign"
        )


_PROBES = 65
_COEFFICIENTS = "alpha and sigma, such as torch.ones_like(t) and t"
_NEAR_ONE = 0.01


class _LogPath:
    """The logarithms of a path; a class, so that a schedule pickles where its path does."""

    def __init__(self, alpha_sigma: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.alpha_sigma = alpha_sigma

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t)
        return alpha.log(), sigma.log()


class _VpPath:
    """(log alpha, log sigma) of the VP and sub-VP SDE; a class, so that a schedule pickles."""

    def __init__(self, beta_min: float, beta_max: float, *, sub: bool) -> None:
        self.beta_min, self.beta_max, self.sub = beta_min, beta_max, sub

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        log_variance = log_one_minus_exp(2 * log_alpha)
        return log_alpha, log_variance if self.sub else 0.5 * log_variance


def _cosine_path(t: Tensor) -> tuple[Tensor, Tensor]:
    def log_cos(t: Tensor) -> Tensor:
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2).log()

    log_alpha = (log_cos(t) - log_cos(torch.zeros_like(t))).clamp(max=0.0)
    return log_alpha, 0.5 * log_one_minus_exp(2 * log_alpha)


def _flow_path(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log1p(-t), t.log()


def _reading_is_free(t: Tensor) -> bool:
    """Whether values can be read without a device sync and outside any tracer."""
    return type(t) is Tensor and t.device.type == "cpu" and not is_traced()
