"""Noise schedules: how much of x_0 and how much noise x_t holds at each time t.

All that c² needs of a schedule is log ᾱ(t). It is kept in float64 and in log space, because
c² = ᾱ_{t-k} / ᾱ_t - 1 is a small difference of nearly equal numbers: a float32 ᾱ gives c a relative
error of 1.7e-4 at k = 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self, get_protocol_members, override

from s2dm_loss._torch import drawn_by, real_tensors, wide_dtype
from s2dm_loss.checks import as_float64, check_all, check_count, check_number, describe
from s2dm_loss.noise_tables import read_alphas_cumprod, read_betas, read_log_snr, read_sigmas
from s2dm_loss.tables import read_table


def is_inside(t: Tensor) -> Tensor:
    """Return where continuous times lie in [0, 1], to the rounding of their type or of float32."""
    rounding = 2 * max(torch.finfo(t.dtype).eps, torch.finfo(torch.float32).eps)
    return (t >= -rounding) & (t <= 1 + rounding)


def wide_times(t: Tensor) -> Tensor:
    """Return times in a type that holds their differences: small integers would wrap around.

    A half type may round a time to just beyond an end; such a time becomes the end. `is_inside`
    allows for the rounding of the type that it is given, and would refuse the wide value.
    """
    if not t.is_floating_point():
        return t.long()
    wide = t.to(wide_dtype(t.device))
    if torch.finfo(t.dtype).eps <= torch.finfo(torch.float32).eps:
        return wide
    return torch.where(is_inside(t), wide.clamp(0, 1), wide)


@runtime_checkable
class Schedule(Protocol):
    """A Gaussian path x_t = alpha(t) x_0 + sigma(t) ε, with noise that grows with t.

    `NoiseSchedule` (discrete) and `ContinuousSchedule` implement it; any object that has its
    methods is accepted wherever a schedule is. One in continuous time may say more:

    - `data_at`, 0 or 1: the time at which its data lie. 0 if it does not say. With 1 the noise
      grows from t = 1 to t = 0.
    - `min_time`: the least distance of a drawn time from the data. Weights may be infinite nearer.
    - `derivatives(t)`: dalpha/dt and dsigma/dt, for the prediction type "velocity".
    """

    @property
    def timesteps(self) -> Tensor | None:
        """0 … T-1 of a discrete schedule, int64 of shape [T]; None in continuous time."""

    def check_timesteps(self, t: Tensor) -> None:
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


_METHODS = get_protocol_members(Schedule)


class NoiseSchedule:
    """A discrete schedule of T training timesteps 0 … T-1, as in DDPM (Ho et al., 2020).

    Build it with one of the class methods:

    >>> from s2dm_loss import NoiseSchedule
    >>> NoiseSchedule.linear(1000)
    NoiseSchedule.linear(1000)
    >>> float(NoiseSchedule.linear(1000).alphas_cumprod[-1])  # doctest: +ELLIPSIS
    4.0358...e-05
    """

    @real_tensors()
    def __init__(
        self, log_alphas_cumprod: Any, *, unit_alpha: bool = False, name: str | None = None
    ) -> None:
        """Build the schedule from its log ᾱ.

        Args:
            log_alphas_cumprod: log ᾱ_t for t = 0 … T-1, of shape [T]: at most 0 and never
                increasing; its last value may be -inf (zero terminal SNR).
            unit_alpha: Whether x_t is x_0 + σ ε, with ᾱ = 1 / (1 + σ²), in place of
                √ᾱ x_0 + √(1-ᾱ) ε.
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
        self._timesteps = torch.arange(table.numel())
        self._unit_alpha = unit_alpha
        self._name = name or f"NoiseSchedule([{table.numel()} values])"

    @classmethod
    @real_tensors()
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
        betas = _betas(num_train_timesteps, beta_start, beta_end, root=1)
        name = call_repr(NoiseSchedule.linear, len(betas), beta_start=beta_start, beta_end=beta_end)
        return cls(_log_alphas_cumprod(betas), name=name)

    @classmethod
    @real_tensors()
    def scaled_linear(
        cls, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> Self:
        """√β in equal steps, as in latent diffusion; the defaults are Stable Diffusion's."""
        betas = _betas(num_train_timesteps, beta_start, beta_end, root=2)
        name = call_repr(
            NoiseSchedule.scaled_linear, len(betas), beta_start=beta_start, beta_end=beta_end
        )
        return cls(_log_alphas_cumprod(betas), name=name)

    @classmethod
    @real_tensors()
    def cosine(cls, num_train_timesteps: int = 1000, *, max_beta: float = 0.999) -> Self:
        """The cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, Eq. 17).

        β is cut at `max_beta` as in the authors' code. diffusers calls this `squaredcos_cap_v2`.
        """
        count = check_count("num_train_timesteps", num_train_timesteps)
        max_beta = check_number("max_beta", max_beta, 0.0, 1.0, open_ends=True)
        edges = torch.arange(count + 1, dtype=torch.float64) / count
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)
        name = call_repr(NoiseSchedule.cosine, count, max_beta=max_beta)
        return cls(_log_alphas_cumprod(betas), name=name)

    @classmethod
    @real_tensors()
    def from_betas(cls, betas: Any) -> Self:
        """Build from β_t, a sequence of shape [T] with every value in (0, 1).

        The last may be 1, which leaves no signal (zero terminal SNR).
        """
        table = read_betas(betas)
        return cls(_log_alphas_cumprod(table), name=f"NoiseSchedule.from_betas([{len(table)}])")

    @classmethod
    @real_tensors()
    def from_alphas_cumprod(cls, alphas_cumprod: Any) -> Self:
        """Build from ᾱ_t, a strictly decreasing sequence of shape [T] with values in [0, 1].

        A float32 table is accepted, and its rounding kept: where the β are at hand,
        `from_betas` in float64 is more exact.
        """
        table = read_alphas_cumprod(alphas_cumprod)
        return cls(table.log(), name=f"NoiseSchedule.from_alphas_cumprod([{len(table)}])")

    @classmethod
    @real_tensors()
    def from_log_snr(cls, log_snr: Any) -> Self:
        """Build from log(ᾱ_t / (1 - ᾱ_t)), a strictly decreasing sequence of shape [T]."""
        table = read_log_snr(log_snr)
        return cls(F.logsigmoid(table), name=f"NoiseSchedule.from_log_snr([{len(table)}])")

    @classmethod
    @real_tensors()
    def from_sigmas(cls, sigmas: Any) -> Self:
        """Build from the σ_t of x_t = x_0 + σ_t ε, a strictly increasing sequence of shape [T].

        The form of EDM (Karras et al., arXiv 2206.00364), k-diffusion and the VE SDE. Its ᾱ is
        that of the variance-preserving process of equal signal-to-noise ratio, 1 / (1 + σ²). A
        sampler's own list runs the other way and ends in 0: `sigmas[:-1].flip(0)`.
        """
        table = read_sigmas(sigmas)
        return cls(
            F.logsigmoid(-2 * table.log()),
            unit_alpha=True,
            name=f"NoiseSchedule.from_sigmas([{len(table)}])",
        )

    @real_tensors()
    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """Return the schedule shifted and scaled in √ᾱ so that ᾱ is 0 at its end.

        Lin et al., arXiv 2305.08891, Algorithm 1.
        """
        if self.num_train_timesteps < 2 or self._unit_alpha:
            raise ValueError(
                "only a variance-preserving schedule of two timesteps or more can be rescaled to "
                f"zero terminal SNR, got {self!r}"
            )
        # √ᾱ' = √ᾱ_0 (√ᾱ - √ᾱ_end) / (√ᾱ_0 - √ᾱ_end), in log space: small differences again.
        log_root = 0.5 * self.log_alphas_cumprod
        fall = (log_root - log_root[0]).expm1() / -(log_root[-1] - log_root[0]).expm1()
        return NoiseSchedule(
            2 * (log_root[0] + fall.log1p()), name=f"{self._name}.rescale_zero_terminal_snr()"
        )

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
        return log_snr_at(self, self.timesteps)

    @property
    def timesteps(self) -> Tensor:
        """0 … T-1, int64 of shape [T]."""
        return self._timesteps

    def check_timesteps(self, t: Tensor) -> None:
        """Raise TypeError unless `t` is an integer tensor.

        Its values are checked where the table is read, since reading them here would make the
        host wait for the device.
        """
        dtype = t.dtype  # a third of the time that asking the tensor takes, at every step
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise TypeError(
                f"t must hold integer timesteps in [0, {self.num_train_timesteps}), got "
                f"{describe(t)}: whole numbers go in as `t.long()`, and a trainer's "
                f"t / {self.num_train_timesteps} as `({self.num_train_timesteps} * "
                "t).round().long()`"
            )

    def log_alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """Return log ᾱ_t, float64, of the shape of the integer tensor `t`."""
        self.check_timesteps(t)
        return read_table(self.log_alphas_cumprod.to(t.device, wide_dtype(t.device)), t)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return √ᾱ_t and √(1 - ᾱ_t), float64, of the shape of the integer tensor `t`.

        For a schedule from σ they are 1 and σ_t.
        """
        log_alphas_cumprod = self.log_alphas_cumprod_at(t)
        if self._unit_alpha:
            log_sigma = 0.5 * (log_one_minus_exp(log_alphas_cumprod) - log_alphas_cumprod)
            return torch.ones_like(log_sigma), log_sigma.exp()
        return (0.5 * log_alphas_cumprod).exp(), (-log_alphas_cumprod.expm1()).sqrt()

    def draw_timesteps(
        self, batch_size: int, *, device: torch.device, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return `batch_size` timesteps, int64, uniform on 0 … T-1."""
        return torch.randint(
            self.num_train_timesteps, (batch_size,), device=device, **drawn_by(generator)
        )

    @override
    def __repr__(self) -> str:
        return self._name


def data_at_of(schedule: object) -> Literal[0, 1]:
    """Return the time at which a schedule's data lie; 0 if it does not say."""
    return 1 if getattr(schedule, "data_at", 0) == 1 else 0


def since_data(schedule: object, t: Tensor) -> Tensor:
    """Return how far times lie from the data: t, or 1 - t where the data lie at t = 1.

    It turns such a distance back into a time as well.
    """
    return 1 - t if data_at_of(schedule) else t


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact to rounding at both ends."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def log_snr_at(schedule: Schedule, t: Tensor) -> Tensor:
    """Return log(ᾱ / (1 - ᾱ)) at times of any shape; infinite without noise or without signal."""
    log_alphas_cumprod = schedule.log_alphas_cumprod_at(t)
    return log_alphas_cumprod - log_one_minus_exp(log_alphas_cumprod)


def check_schedule(schedule: object) -> Schedule:
    """Return a schedule, or say which constructor takes what came.

    Raises:
        TypeError: if it is no schedule.
    """
    # From Python 3.12 on `isinstance` does not see what `__getattr__` gives.
    if not isinstance(schedule, type) and all(hasattr(schedule, name) for name in _METHODS):
        known = cast("Schedule", schedule)
        if known.timesteps is not None and data_at_of(known):
            raise ValueError(
                f"data_at=1 is for continuous time, got {known!r} with timesteps, which count "
                "from the data: turn its tables, `.flip(0)`, and give the loss T - 1 - t"
            )
        return known
    came = f"a {type(schedule).__name__}"
    cure = "see NoiseSchedule and ContinuousSchedule"
    if hasattr(schedule, "__array__"):  # a tensor has it as well
        cure = "NoiseSchedule.from_betas takes β, from_alphas_cumprod ᾱ and from_sigmas σ"
    elif isinstance(schedule, (int, str)):
        came = describe(schedule)
        cure = "NoiseSchedule.linear(1000), scaled_linear(1000) and cosine(1000) go by name"
    elif hasattr(schedule, "alphas_cumprod"):
        cure = (
            "NoiseSchedule.from_alphas_cumprod takes its alphas_cumprod, and for a diffusers "
            "scheduler s2dm_loss.adapters.diffusers.schedule_of gives it in float64"
        )
    raise TypeError(f"schedule must be a NoiseSchedule or another Schedule, got {came}: {cure}")


def _log_alphas_cumprod(betas: Tensor) -> Tensor:
    return torch.log1p(-betas).cumsum(0)


def _betas(count: int, start: float, end: float, *, root: int) -> Tensor:
    """Return β whose square roots (root 2), or which themselves (root 1), go in equal steps."""
    start = check_number("beta_start", start, 0.0, 1.0, open_ends=True)
    end = check_number("beta_end", end, 0.0, 1.0, open_ends=True)
    count = check_count("num_train_timesteps", count)
    if start > end:
        raise ValueError(
            f"beta_start must be at most beta_end, got {start:g} and {end:g}: β grows with noise"
        )
    return (
        torch.linspace(start ** (1 / root), end ** (1 / root), count, dtype=torch.float64) ** root
    )


def call_repr(made_by: Callable[..., object], *numbers: object, **options: object) -> str:
    """`NoiseSchedule.linear(1000)`, with only those options that are not at their default."""
    usual = inspect.signature(made_by).parameters
    given = [f"{name}={value}" for name, value in options.items() if value != usual[name].default]
    return f"{made_by.__qualname__}({', '.join([*map(str, numbers), *given])})"
