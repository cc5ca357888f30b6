"""Schedules in continuous time: a path given by its two coefficients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, override

from s2dm_loss._torch import drawn_by, reading_is_free, real_tensors, wide_dtype
from s2dm_loss.checks import check_number, describe
from s2dm_loss.paths import (
    PROBES,
    CosinePath,
    FlowPath,
    OwnPath,
    Path,
    PathFunction,
    TurnedPath,
    VpPath,
    check_derivatives,
    check_finite,
    check_path,
    derivatives_of,
)
from s2dm_loss.schedule import Schedule, call_repr, is_inside, since_data

DataAt = Literal[0, 1]


class ContinuousSchedule:
    """A path x_t = alpha(t) x_0 + sigma(t) ε in continuous time, t in [0, 1].

    Times, skips and derivatives are in the trainer's own clock. Data lie at t = 0, or with
    `data_at=1` at t = 1, as in SiT, torchcfm and flow_matching. The σ of flow-matching trainers is
    the time from the data: alpha = 1 - σ and sigma = σ.

    >>> from s2dm_loss import ContinuousSchedule
    >>> ContinuousSchedule.flow(data_at=1)
    ContinuousSchedule.flow(data_at=1)

    A path is fixed: no gradient flows to t or to what the path is made of.

    Attributes:
        data_at: The time at which the data lie, 0 or 1.
        min_time: Least distance of a drawn time from the data.
    """

    @real_tensors()
    def __init__(
        self,
        log_alpha_sigma: PathFunction,
        *,
        data_at: DataAt = 0,
        min_time: float = 0.0,
        name: str | None = None,
    ) -> None:
        """Build the path from its coefficients in log space.

        Args:
            log_alpha_sigma: Maps float64 times of any shape to (log alpha, log sigma) of that
                shape. The ratio alpha / sigma must fall from the data on. If it has a method
                `alpha_sigma` that returns the coefficients themselves, derivatives are taken of
                that.
            data_at: The time at which the data lie, 0 or 1. The path is in that clock.
            min_time: Least distance from the data of the times that `draw_timesteps` draws, in
                [0, 1).
            name: What `repr` prints.

        Raises:
            TypeError: if the path is no function that returns two tensors.
            ValueError: if they have another shape, hold NaN, are no logarithms, have parameters to
                train, or if their ratio does not fall from the data on.
        """
        if not callable(log_alpha_sigma):
            raise TypeError(f"log_alpha_sigma must be callable, got {describe(log_alpha_sigma)}")
        self.data_at: DataAt = _read_data_at(data_at)
        check_path(log_alpha_sigma, self.data_at)
        self._log_alpha_sigma = log_alpha_sigma
        self.min_time: float = check_number("min_time", min_time, 0.0, 1.0)
        if self.min_time == 1:
            raise ValueError("min_time must lie in [0, 1), got 1.0: no time would be left to draw")
        self._name = name or call_repr(
            ContinuousSchedule, "...", data_at=data_at, min_time=min_time
        )

    @classmethod
    def vp(
        cls,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        *,
        data_at: DataAt = 0,
        min_time: float = 1e-5,
    ) -> Self:
        """The variance-preserving SDE (Song et al., arXiv 2011.13456, Eq. 33)."""
        path = VpPath(beta_min, beta_max, sub=False)
        return cls._named(path, cls.vp, beta_min, beta_max, data_at=data_at, min_time=min_time)

    @classmethod
    def sub_vp(
        cls,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        *,
        data_at: DataAt = 0,
        min_time: float = 1e-5,
    ) -> Self:
        """The sub-variance-preserving SDE (Song et al., arXiv 2011.13456, Eq. 35)."""
        path = VpPath(beta_min, beta_max, sub=True)
        return cls._named(path, cls.sub_vp, beta_min, beta_max, data_at=data_at, min_time=min_time)

    @classmethod
    def cosine(cls, *, data_at: DataAt = 0, min_time: float = 0.0) -> Self:
        """The cosine path without its cut at the end (arXiv 2102.09672, Eq. 17).

        TrigFlow's path, alpha = cos(π t / 2) and sigma = sin(π t / 2), and SiT's GVP, the same with
        the data at t = 1, have no offset at the data: give them to `from_alpha_sigma`.
        """
        return cls._named(CosinePath(), cls.cosine, data_at=data_at, min_time=min_time)

    @classmethod
    def flow(cls, *, data_at: DataAt = 0, min_time: float = 0.0) -> Self:
        """The straight path of flow matching (arXiv 2210.02747): alpha = 1 - t, sigma = t.

        With `data_at=1`, alpha = t and sigma = 1 - t.
        """
        return cls._named(FlowPath(), cls.flow, data_at=data_at, min_time=min_time)

    @classmethod
    def _named(
        cls,
        path: Path,
        made_by: Callable[..., object],
        *numbers: float,
        data_at: DataAt,
        min_time: float,
    ) -> Self:
        """Return one of the library's own paths, which are written with data at 0."""
        path = TurnedPath(path) if _read_data_at(data_at) else path
        name = call_repr(made_by, *numbers, data_at=data_at, min_time=min_time)
        return cls(path, data_at=data_at, min_time=min_time, name=name)

    @classmethod
    @real_tensors()
    def from_alpha_sigma(
        cls,
        alpha_sigma: PathFunction,
        *,
        data_at: DataAt = 0,
        min_time: float = 0.0,
        name: str | None = None,
    ) -> Self:
        """Build the path from its coefficients themselves, in place of their logarithms.

        >>> ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 80 * t))
        ContinuousSchedule.from_alpha_sigma(...)

        Args:
            alpha_sigma: Maps float64 times of any shape to (alpha, sigma) of that shape, none
                negative. Where one comes near 0 it loses digits there, which the logarithms keep.
            data_at: The time at which the data lie, 0 or 1. The path is in that clock.
            min_time: Least distance from the data of the times that `draw_timesteps` draws.
            name: What `repr` prints.

        Raises:
            TypeError, ValueError: as the class does, and if a value is negative.
        """
        name = name or call_repr(cls.from_alpha_sigma, "...", data_at=data_at, min_time=min_time)
        return cls(OwnPath(alpha_sigma), data_at=data_at, min_time=min_time, name=name)

    @property
    def timesteps(self) -> None:
        """None: the times are a continuum."""
        return None

    def check_timesteps(self, t: Tensor) -> None:
        """Raise unless `t` is a floating-point tensor and, where reading it is free, in [0, 1].

        A time that rounding has put beyond an end, by 2 ulp of its type or of float32, is the end.
        """
        if not t.is_floating_point():
            raise TypeError(f"t must hold floating-point times in [0, 1], got {describe(t)}")
        if reading_is_free(t) and not bool(is_inside(t).all()):
            raise ValueError(
                f"t must lie in [0, 1], got values from {t.min().item()} to {t.max().item()}: "
                "a trainer's timesteps are divided by their number first"
            )

    def log_alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """Return log ᾱ(t) = log(alpha² / (alpha² + sigma²)), float64, of the shape of `t`.

        A time outside [0, 1] gives NaN where `check_timesteps` could not read it.
        """
        log_alpha, log_sigma = self._log_alpha_sigma(self._times(t))
        return F.logsigmoid(2 * (log_alpha - log_sigma)).detach()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha(t) and sigma(t), float64, of the shape of `t`.

        A time outside [0, 1] gives NaN where `check_timesteps` could not read it.
        """
        log_alpha, log_sigma = self._log_alpha_sigma(self._times(t))
        return log_alpha.exp().detach(), log_sigma.exp().detach()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return dalpha/dt and dsigma/dt in the trainer's clock, float64, of the shape of `t`.

        With them the velocity of the path, dx_t/dt, is (dalpha/dt) x_0 + (dsigma/dt) ε. At an end
        of the path they are the one-sided limits.

        Raises:
            ValueError: if one is infinite at a time of `t`, as dsigma/dt of the VP path is at the
                data. Where values cannot be read (compiled, on a GPU) it is infinite.
        """
        rates = derivatives_of(self._log_alpha_sigma, self._times(t))
        if reading_is_free(t):
            check_finite(repr(self), t, rates)
        return rates

    def check_derivatives(self) -> None:
        """Raise ValueError unless the path has derivatives at all times that are drawn.

        Each must be finite from `min_time` to the noise end, and its integral must be the change of
        the coefficient: a path that looks up a table has the derivative 0 and no error.
        """
        with real_tensors():
            check_derivatives(repr(self), self._log_alpha_sigma, self.min_time, self.data_at)

    def _times(self, t: Tensor) -> Tensor:
        """Return times as float64 in [0, 1], NaN for one outside."""
        self.check_timesteps(t)
        wide = t.to(wide_dtype(t.device))
        return torch.where(is_inside(t), wide.clamp(0, 1), math.nan)

    def draw_timesteps(
        self, batch_size: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return `batch_size` times, float32, uniform and at least `min_time` from the data."""
        # Said, since a half type as the default would have a few hundred values only.
        uniform = torch.rand(batch_size, dtype=torch.float32, device=device, **drawn_by(generator))
        return since_data(self, self.min_time + (1 - self.min_time) * uniform)

    @override
    def __repr__(self) -> str:
        return self._name


def check_velocity(schedule: Schedule) -> None:
    """Raise ValueError unless a schedule has the derivatives that "velocity" is made of."""
    if not hasattr(schedule, "derivatives"):
        cure = (
            "a discrete schedule has no time to differentiate by. ContinuousSchedule has, and "
            '"v_prediction" or "flow" are defined on both'
            if schedule.timesteps is not None
            else "give it a method `derivatives(t)`, see ContinuousSchedule"
        )
        raise ValueError(
            "prediction_type 'velocity' takes a schedule with derivatives, got "
            f"{schedule!r}: {cure}"
        )
    check: Callable[[], None] = getattr(schedule, "check_derivatives", lambda: None)
    check()


def is_flow(schedule: Schedule) -> bool:
    """Return whether a path is that of flow matching, alpha + sigma = 1, in continuous time."""
    if schedule.timesteps is not None:
        return False
    with real_tensors():
        alpha, sigma = schedule.alpha_sigma(torch.linspace(0, 1, PROBES, dtype=torch.float64))
        return bool(((alpha + sigma - 1).abs() < 1e-6).all())


def warn_if_not_straight(schedule: Schedule) -> None:
    """Warn if "flow", ε - x_0, is not the velocity of a continuous path.

    It is where the path is straight and data lie at t = 0.
    """
    if schedule.timesteps is not None:
        return
    with real_tensors():
        time = torch.linspace(0, 1, PROBES, dtype=torch.float64)[1:-1]
        alpha, sigma = schedule.alpha_sigma(time)
        off = torch.maximum((alpha + time - 1).abs(), (sigma - time).abs())
        straight = bool((off < 1e-6).all())
    if not straight:
        warnings.warn(
            f"prediction_type 'flow' is noise minus data, which on {schedule!r} is not the "
            "velocity dx_t/dt: if the network predicts that, use prediction_type='velocity'",
            UserWarning,
            stacklevel=4,  # whoever made the loss
        )


def _read_data_at(data_at: object) -> DataAt:
    if isinstance(data_at, bool) or data_at not in (0, 1):
        raise ValueError(
            f"data_at must be 0 or 1, the time at which the data lie, got {describe(data_at)}"
        )
    return 1 if data_at == 1 else 0
