"""Noise schedules: how much of x_0 and how much noise x_t holds at each time t.

The loss needs one thing of a schedule, log ᾱ(t). It is kept in float64 and in log space, because
c² = ᾱ_{t-k} / ᾱ_t - 1 is a small difference of nearly equal numbers: a float32 ᾱ gives c a relative
error of 1.7e-4 at k = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, override

from s2dm_loss._checks import as_float64, check_all, check_count, check_number, describe


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


@runtime_checkable
class Schedule(Protocol):
    """A Gaussian path x_t = alpha(t) x_0 + sigma(t) ε, with noise that grows with t.

    `NoiseSchedule` (discrete) and `ContinuousSchedule` implement it; any object that does is
    accepted wherever a schedule is.
    """

    @property
    def timesteps(self) -> Tensor | None:
        """All times of a discrete schedule, int64 of shape [T]; None in continuous time."""

    def check_timesteps(self, t: Tensor, name: str = "t") -> None:
        """Raise TypeError or ValueError unless `t` holds times of this schedule."""

    def log_alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """Return log ᾱ(t) in float64, of the shape of `t`, with ᾱ = alpha² / (alpha² + sigma²)."""
        ...

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two coefficients of the path in float64, of the shape of `t`."""
        ...

    def draw_timesteps(
        self, batch_size: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return uniformly drawn training times of shape [batch_size]."""
        ...


class NoiseSchedule:
    """A discrete schedule of T training timesteps 0 … T-1, as in DDPM (Ho et al., 2020).

    Build it with one of the class methods:

    >>> from s2dm_loss import NoiseSchedule
    >>> NoiseSchedule.linear(1000)
    NoiseSchedule.linear(1000)
    >>> float(NoiseSchedule.linear(1000).alphas_cumprod[-1])  # doctest: +ELLIPSIS
    4.0358...e-05
    """

    def __init__(self, log_alphas_cumprod: Any, *, name: str | None = None) -> None:
        """Build the schedule from its log ᾱ.

        Args:
            log_alphas_cumprod: log ᾱ_t for t = 0 … T-1, of shape [T]: at most 0 and never
                increasing; its last value may be -inf (zero terminal SNR).
            name: What `repr` prints.

        Raises:
            TypeError, ValueError: if the table is not as said.
        """
        table = as_float64("log_alphas_cumprod", log_alphas_cumprod)
        check_all("log_alphas_cumprod", table, table <= 0, "be at most 0")
        check_all(
            "log_alphas_cumprod", table[:-1], table[:-1].isfinite(), "be finite before its end"
        )
        rises = F.pad(table.diff() > 0, (1, 0))
        check_all("log_alphas_cumprod", table, ~rises, "never increase")
        self.log_alphas_cumprod = table
        self._name = name or f"NoiseSchedule([{table.numel()} values])"

    @classmethod
    def linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> Self:
        """β from `beta_start` to `beta_end` in equal steps (Ho et al., arXiv 2006.11239).

        Args:
            num_train_timesteps: T. The two β are used as given; guided-diffusion's own `linear`
                scales them by 1000 / T.
            beta_start: First β, in (0, 1).
            beta_end: Last β, in (0, 1).
        """
        start, end, count = _beta_range(num_train_timesteps, beta_start, beta_end)
        betas = torch.linspace(start, end, count, dtype=torch.float64)
        name = _call_repr("linear", count, (start, 1e-4, "beta_start"), (end, 0.02, "beta_end"))
        return cls(_log_alphas_cumprod(betas), name=name)

    @classmethod
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> Self:
        """√β in equal steps, as in latent diffusion; the defaults are Stable Diffusion's."""
        start, end, count = _beta_range(num_train_timesteps, beta_start, beta_end)
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
        name = _call_repr(
            "scaled_linear", count, (start, 0.00085, "beta_start"), (end, 0.012, "beta_end")
        )
        return cls(_log_alphas_cumprod(betas), name=name)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, *, max_beta: float = 0.999) -> Self:
        """The cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, Eq. 17).

        β is cut at `max_beta` as in the authors' code. diffusers calls this `squaredcos_cap_v2`.
        """
        count = check_count("num_train_timesteps", num_train_timesteps)
        max_beta = check_number("max_beta", max_beta, 0.0, 1.0, open_ends=True)
        edges = torch.arange(count + 1, dtype=torch.float64) / count
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)
        name = _call_repr("cosine", count, (max_beta, 0.999, "max_beta"))
        return cls(_log_alphas_cumprod(betas), name=name)

    @classmethod
    def from_betas(cls, betas: Any) -> Self:
        """Build from β_t, a sequence of shape [T] with every value in (0, 1)."""
        table = as_float64("betas", betas)
        check_all("betas", table, (table > 0) & (table < 1), "lie in (0, 1)")
        return cls(_log_alphas_cumprod(table), name=f"NoiseSchedule.from_betas([{len(table)}])")

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> Self:
        """Build from ᾱ_t, a strictly decreasing sequence of shape [T] with values in [0, 1].

        A float32 table is accepted, and its rounding kept: where the β are at hand,
        `from_betas` in float64 is more exact.
        """
        table = as_float64("alphas_cumprod", alphas_cumprod)
        check_all("alphas_cumprod", table, (table >= 0) & (table <= 1), "lie in [0, 1]")
        falls = F.pad(table.diff() < 0, (1, 0), value=True)
        check_all("alphas_cumprod", table, falls, "decrease strictly with t")
        return cls(table.log(), name=f"NoiseSchedule.from_alphas_cumprod([{len(table)}])")

    @classmethod
    def from_log_snr(cls, log_snr: Any) -> Self:
        """Build from log(ᾱ_t / (1 - ᾱ_t)), a strictly decreasing sequence of shape [T]."""
        table = as_float64("log_snr", log_snr)
        falls = F.pad(table.diff() < 0, (1, 0), value=True)
        check_all("log_snr", table, falls, "decrease strictly with t")
        return cls(F.logsigmoid(table), name=f"NoiseSchedule.from_log_snr([{len(table)}])")

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule shifted and scaled in √ᾱ so that ᾱ is 0 at its end.

        Lin et al., arXiv 2305.08891, Algorithm 1.
        """
        root = (0.5 * self.log_alphas_cumprod).exp()
        if root.numel() < 2:
            raise ValueError("a schedule of one timestep cannot be rescaled to zero terminal SNR")
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return NoiseSchedule(2 * root.log(), name=f"{self._name}.rescale_zero_terminal_snr()")

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return self.log_alphas_cumprod.numel()

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ_t, float64 of shape [T]."""
        return self.log_alphas_cumprod.exp()

    @property
    def log_snr(self) -> Tensor:
        """log(ᾱ_t / (1 - ᾱ_t)), float64 of shape [T]."""
        return self.log_alphas_cumprod - _log_one_minus_exp(self.log_alphas_cumprod)

    @property
    def timesteps(self) -> Tensor:
        """0 … T-1, int64 of shape [T]."""
        return torch.arange(self.num_train_timesteps)

    def check_timesteps(self, t: Tensor, name: str = "t") -> None:
        """Raise TypeError unless `t` is an integer tensor.

        Its values are checked where the table is read, since reading them here would make the
        host wait for the device.
        """
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(
                f"{name} must hold integer timesteps in [0, {self.num_train_timesteps}), got "
                f"{describe(t)}"
            )

    def log_alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """Return log ᾱ_t, float64, of the shape of the integer tensor `t`."""
        self.check_timesteps(t)
        return read_table(self.log_alphas_cumprod.to(t.device, wide_dtype(t.device)), t)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return √ᾱ_t and √(1 - ᾱ_t), float64, of the shape of the integer tensor `t`."""
        return _variance_preserving(self.log_alphas_cumprod_at(t))

    def draw_timesteps(
        self, batch_size: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return `batch_size` timesteps, int64, uniform on 0 … T-1."""
        return torch.randint(
            self.num_train_timesteps, (batch_size,), device=device, generator=generator
        )

    @override
    def __repr__(self) -> str:
        return self._name


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
        """
        if not callable(log_alpha_sigma):
            raise TypeError(f"log_alpha_sigma must be callable, got {describe(log_alpha_sigma)}")
        self._log_alpha_sigma = log_alpha_sigma
        self.min_time: float = check_number("min_time", min_time, 0.0, 1.0)
        self._name = name or "ContinuousSchedule(...)"

    @classmethod
    def vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> Self:
        """The variance-preserving SDE (Song et al., arXiv 2011.13456, Eq. 33)."""
        check_number("beta_min", beta_min, 0.0, math.inf, open_ends=True)
        check_number("beta_max", beta_max, beta_min, math.inf)
        name = f"ContinuousSchedule.vp({beta_min}, {beta_max})"
        return cls(_VpPath(beta_min, beta_max, sub=False), min_time=1e-5, name=name)

    @classmethod
    def sub_vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> Self:
        """The sub-variance-preserving SDE (Song et al., arXiv 2011.13456, Eq. 35)."""
        check_number("beta_min", beta_min, 0.0, math.inf, open_ends=True)
        check_number("beta_max", beta_max, beta_min, math.inf)
        name = f"ContinuousSchedule.sub_vp({beta_min}, {beta_max})"
        return cls(_VpPath(beta_min, beta_max, sub=True), min_time=1e-5, name=name)

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

    def check_timesteps(self, t: Tensor, name: str = "t") -> None:
        """Raise unless `t` is a floating-point tensor and, where reading it is free, in [0, 1]."""
        if not t.is_floating_point():
            raise TypeError(f"{name} must hold floating-point times in [0, 1], got {describe(t)}")
        if _reading_is_free(t) and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(
                f"{name} must lie in [0, 1], got values from {t.min().item()} to {t.max().item()}"
            )

    def log_alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """Return log ᾱ(t) = log(alpha² / (alpha² + sigma²)), float64, of the shape of `t`.

        A time outside [0, 1] gives NaN where `check_timesteps` could not read it.
        """
        self.check_timesteps(t)
        t = t.to(wide_dtype(t.device))
        log_alpha, log_sigma = self._log_alpha_sigma(t)
        log_alphas_cumprod = F.logsigmoid(2 * (log_alpha - log_sigma))
        return torch.where((t >= 0) & (t <= 1), log_alphas_cumprod, math.nan)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha(t) and sigma(t), float64, of the shape of `t`."""
        self.check_timesteps(t)
        log_alpha, log_sigma = self._log_alpha_sigma(t.to(wide_dtype(t.device)))
        return log_alpha.exp(), log_sigma.exp()

    def draw_timesteps(
        self, batch_size: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return `batch_size` times, float32, uniform on [min_time, 1)."""
        uniform = torch.rand(batch_size, device=device, generator=generator)
        return self.min_time + (1 - self.min_time) * uniform

    @override
    def __repr__(self) -> str:
        return self._name


def read_table(table: Tensor, t: Tensor) -> Tensor:
    """Return the rows `table[t]`, of shape t.shape + table.shape[1:].

    Raises:
        ValueError: if a timestep lies outside the table. On a GPU, where the host cannot know
            without waiting, it is the device's own assertion instead.
    """
    if t.ndim != 1:
        return read_table(table, t.reshape(-1)).reshape(t.shape + table.shape[1:])
    if t.dtype not in (torch.int32, torch.int64):
        t = t.long()
    try:
        # index_select, unlike table[t], refuses a negative index instead of counting from the end.
        return table.index_select(0, t)
    except (IndexError, RuntimeError) as error:
        outside = t[(t < 0) | (t >= table.shape[0])]
        if outside.numel() == 0:
            raise
        raise ValueError(f"t must lie in [0, {table.shape[0]}), got {outside[0].item()}") from error


class TableCache:
    """Functions of t, each as a table over a schedule's timesteps once it has been asked for.

    In continuous time there is nothing to keep, and the function is called.
    """

    def __init__(self, schedule: Schedule) -> None:
        """Begin with no table."""
        self._schedule = schedule
        self._tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def read(
        self,
        name: str,
        t: Tensor,
        dtype: torch.dtype,
        function: Callable[[Tensor], tuple[Tensor, ...]],
        t_name: str = "t",
    ) -> tuple[Tensor, ...]:
        """Return `function(t)` in `dtype`; `name` stands for the function.

        Raises:
            TypeError, ValueError: if `t` does not hold times of the schedule.
        """
        self._schedule.check_timesteps(t, t_name)
        timesteps = self._schedule.timesteps
        if timesteps is None:
            return tuple(column.to(dtype) for column in function(t))
        key = (name, t.device, dtype)
        if key not in self._tables:
            self._tables[key] = torch.stack(function(timesteps), dim=-1).to(t.device, dtype)
        return read_table(self._tables[key], t).unbind(-1)


class _VpPath:
    """(log alpha, log sigma) of the VP and sub-VP SDE; a class, so that a schedule pickles."""

    def __init__(self, beta_min: float, beta_max: float, *, sub: bool) -> None:
        self.beta_min, self.beta_max, self.sub = beta_min, beta_max, sub

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        log_variance = _log_one_minus_exp(2 * log_alpha)
        return log_alpha, log_variance if self.sub else 0.5 * log_variance


def _cosine_path(t: Tensor) -> tuple[Tensor, Tensor]:
    def log_cos(t: Tensor) -> Tensor:
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2).log()

    log_alpha = (log_cos(t) - log_cos(torch.zeros_like(t))).clamp(max=0.0)
    return log_alpha, 0.5 * _log_one_minus_exp(2 * log_alpha)


def _flow_path(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log1p(-t), t.log()


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact to rounding at both ends."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def _variance_preserving(log_alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    return (0.5 * log_alphas_cumprod).exp(), (-log_alphas_cumprod.expm1()).sqrt()


def _log_alphas_cumprod(betas: Tensor) -> Tensor:
    return torch.log1p(-betas).cumsum(0)


def _beta_range(count: int, start: float, end: float) -> tuple[float, float, int]:
    return (
        check_number("beta_start", start, 0.0, 1.0, open_ends=True),
        check_number("beta_end", end, 0.0, 1.0, open_ends=True),
        check_count("num_train_timesteps", count),
    )


def _call_repr(method: str, count: int, *options: tuple[float, float, str]) -> str:
    """`NoiseSchedule.linear(1000)`, with only those options that are not at their default."""
    given = [f"{name}={value}" for value, default, name in options if value != default]
    return f"NoiseSchedule.{method}({', '.join([str(count), *given])})"


def _reading_is_free(t: Tensor) -> bool:
    """Whether values can be read without a device sync and outside any tracer."""
    return type(t) is Tensor and t.device.type == "cpu" and not torch.compiler.is_compiling()
