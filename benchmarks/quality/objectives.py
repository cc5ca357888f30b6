"""What a network is trained on, and what can be put on a trained one.

An objective is a small record; ``build`` turns it into a function from a batch to a scalar loss.
All of them see the same images, timesteps and noise, and average over pixels and batch alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.quality.samplers import visited
from benchmarks.quality.streams import Stream
from s2dm_loss import NoiseSchedule, ShrunkModel, SkipStepLoss

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """One training batch.

    Attributes:
        x0: Images in [-1, 1], ``[B, C, H, W]``.
        t: Timesteps, int64 ``[B]``.
        noise: ε, shaped as ``x0``.
        extra: Where an objective draws whatever it needs besides.
    """

    x0: Tensor
    t: Tensor
    noise: Tensor
    extra: Stream

    def more_noise(self) -> Tensor:
        """Return standard normal noise of the batch's shape from the extra stream."""
        return self.extra.normal(tuple(self.x0.shape[1:]))


class ForwardProcess(nn.Module):
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε, from float32 tables."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        """Make the two tables of a schedule."""
        super().__init__()
        alphas_cumprod = schedule.alphas_cumprod.double()
        self.register_buffer("signal", alphas_cumprod.sqrt().float()[:, None, None, None])
        self.register_buffer("spread", (1 - alphas_cumprod).sqrt().float()[:, None, None, None])

    @override
    def forward(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.get_buffer("signal")[t] * x0 + self.get_buffer("spread")[t] * noise


class Loss(nn.Module):
    """A built objective: ``loss(model, batch)`` is a scalar."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        """Make the forward process of a schedule."""
        super().__init__()
        self.path = ForwardProcess(schedule)

    @override
    def forward(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss, and mse(ε, ε̂) for the loss curves, where all are comparable."""
        predicted = model(self.path(batch.x0, batch.noise, batch.t), batch.t)
        return self.compare(predicted, batch), F.mse_loss(predicted.detach(), batch.noise)

    def compare(self, predicted: Tensor, batch: Batch) -> Tensor:
        """Return the loss of a prediction; what most objectives differ in."""
        return F.mse_loss(predicted, batch.noise)


class Objective(ABC):
    """What a network is trained on."""

    model_calls = 1
    """Network evaluations per training step."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A name that says all the settings and can be a folder."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The name in tables."""

    @abstractmethod
    def build(self, schedule: NoiseSchedule) -> Loss:
        """Return the loss on a schedule."""


@dataclass(frozen=True)
class Plain(Objective):
    """L_simple of Ho et al. (2020): mse(ε, ε̂)."""

    @property
    @override
    def name(self) -> str:
        return "plain"

    @property
    @override
    def title(self) -> str:
        return "plain L_simple"

    @override
    def build(self, schedule: NoiseSchedule) -> Loss:
        return Loss(schedule)


@dataclass(frozen=True)
class SkipStep(Objective):
    """This library's loss."""

    skip: int
    estimator: Literal["expected", "fresh", "shared"] = "expected"
    tau: float = 0.99

    @property
    @override
    def name(self) -> str:
        suffix = "" if self.tau == 0.99 else f"-tau{self.tau:g}"
        return f"skip{self.skip}-{self.estimator}{suffix}"

    @property
    @override
    def title(self) -> str:
        suffix = "" if self.tau == 0.99 else f", τ = {self.tau:g}"
        return f"S²-DM k = {self.skip}, {self.estimator}{suffix}"

    @override
    def build(self, schedule: NoiseSchedule) -> Loss:
        return SkipStepComparison(schedule, self)


class SkipStepComparison(Loss):
    """:class:`SkipStep`, built."""

    def __init__(self, schedule: NoiseSchedule, objective: SkipStep) -> None:
        """Build the criterion with an objective's settings."""
        super().__init__(schedule)
        self.fresh = objective.estimator == "fresh"
        self.criterion = SkipStepLoss(
            schedule, objective.skip, tau=objective.tau, estimator=objective.estimator
        )

    @override
    def compare(self, predicted: Tensor, batch: Batch) -> Tensor:
        skip_noise = batch.more_noise() if self.fresh else None
        return self.criterion.from_prediction(
            predicted, batch.noise, batch.t, skip_noise=skip_noise
        )


@dataclass(frozen=True)
class MinSNR(Objective):
    """Min-SNR-γ (arXiv 2303.09556): weight min(snr, γ) / snr."""

    gamma: float = 5.0

    @property
    @override
    def name(self) -> str:
        return f"min-snr-{self.gamma:g}"

    @property
    @override
    def title(self) -> str:
        return f"Min-SNR-{self.gamma:g}"

    @override
    def build(self, schedule: NoiseSchedule) -> Loss:
        return MinSNRComparison(schedule, self.gamma)


class MinSNRComparison(Loss):
    """:class:`MinSNR`, built."""

    def __init__(self, schedule: NoiseSchedule, gamma: float) -> None:
        """Make the table of weights."""
        super().__init__(schedule)
        alphas_cumprod = schedule.alphas_cumprod.double()
        snr = alphas_cumprod / (1 - alphas_cumprod)
        self.register_buffer("weight", (snr.clamp(max=gamma) / snr).float())

    @override
    def compare(self, predicted: Tensor, batch: Batch) -> Tensor:
        per_sample = (predicted - batch.noise).square().flatten(1).mean(1)
        return (self.get_buffer("weight")[batch.t] * per_sample).mean()


@dataclass(frozen=True)
class InputPerturbation(Objective):
    """DDPM-IP (arXiv 2301.11706): x_t is made with ε + γ ξ, and the target stays ε."""

    gamma: float = 0.1

    @property
    @override
    def name(self) -> str:
        return f"ddpm-ip-{self.gamma:g}"

    @property
    @override
    def title(self) -> str:
        return f"DDPM-IP {self.gamma:g}"

    @override
    def build(self, schedule: NoiseSchedule) -> Loss:
        return PerturbedInput(schedule, self.gamma)


class PerturbedInput(Loss):
    """:class:`InputPerturbation`, built."""

    def __init__(self, schedule: NoiseSchedule, gamma: float) -> None:
        """Keep the perturbation's size."""
        super().__init__(schedule)
        self.gamma = gamma

    @override
    def forward(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        perturbed = batch.noise + self.gamma * batch.more_noise()
        predicted = model(self.path(batch.x0, perturbed, batch.t), batch.t)
        return self.compare(predicted, batch), F.mse_loss(predicted.detach(), batch.noise)


@dataclass(frozen=True)
class SequenceAware(Objective):
    """SA-DPM (arXiv 2312.12431): residuals of K consecutive timesteps should also cancel in sum.

    mean‖r_t‖² + (λ/K²) mean‖Σ_{j<K} 1[t ≥ j] r_{t−j}‖², with r_s = e_s − ε_θ(x_s, s) and noise
    e_s that is fresh for j ≥ 1.
    """

    window: int = 2
    strength: float = 1.0

    @property
    @override
    def model_calls(self) -> int:  # type: ignore[override]
        return self.window

    @property
    @override
    def name(self) -> str:
        return f"sa-dpm-{self.window}"

    @property
    @override
    def title(self) -> str:
        return f"SA-DPM K = {self.window}"

    @override
    def build(self, schedule: NoiseSchedule) -> Loss:
        return ResidualSum(schedule, self)


class ResidualSum(Loss):
    """:class:`SequenceAware`, built."""

    def __init__(self, schedule: NoiseSchedule, objective: SequenceAware) -> None:
        """Keep the window and the strength."""
        super().__init__(schedule)
        self.window = objective.window
        self.strength = objective.strength

    @override
    def forward(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        # One call on the stacked timesteps, so that a distributed model is called once per step.
        offsets = range(self.window)
        noise = [batch.noise] + [batch.more_noise() for _ in offsets[1:]]
        times = [(batch.t - j).clamp(min=0) for j in offsets]
        inputs = [self.path(batch.x0, e, s) for e, s in zip(noise, times, strict=True)]
        predicted = model(torch.cat(inputs), torch.cat(times))
        residuals = torch.cat(noise) - predicted
        first = residuals[: len(batch.t)]
        valid = [(batch.t >= j)[:, None, None, None] for j in offsets]
        pairs = zip(valid, residuals.split(len(batch.t)), strict=True)
        total = torch.stack([torch.where(keep, r, 0.0) for keep, r in pairs]).sum(0)
        loss = first.square().mean() + self.strength / self.window**2 * total.square().mean()
        return loss, first.detach().square().mean()


@dataclass(frozen=True)
class SampledTimesteps(Objective):
    """L_simple on the timesteps that one sampler visits, and on no others."""

    steps: int
    sampler: str = "ddim"

    @property
    @override
    def name(self) -> str:
        return f"only-{self.sampler}-{self.steps}"

    @property
    @override
    def title(self) -> str:
        return f"only {self.sampler.upper()}'s {self.steps} timesteps"

    @override
    def build(self, schedule: NoiseSchedule) -> Loss:
        return SampledOnly(schedule, self)


class SampledOnly(Loss):
    """:class:`SampledTimesteps`, built."""

    def __init__(self, schedule: NoiseSchedule, objective: SampledTimesteps) -> None:
        """Find the timesteps that the sampler visits."""
        super().__init__(schedule)
        self.num_train_timesteps = len(schedule.alphas_cumprod)
        times = visited(objective.sampler, schedule, objective.steps)
        self.register_buffer("times", times)

    @override
    def forward(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        # The common draw of t chooses among the visited ones: the stream stays in step.
        times = self.get_buffer("times")
        t = times[batch.t * len(times) // self.num_train_timesteps]
        predicted = model(self.path(batch.x0, batch.noise, t), t)
        return self.compare(predicted, batch), F.mse_loss(predicted.detach(), batch.noise)


class Correction(ABC):
    """What is put on a trained network, without training."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A name that says all the settings and can be a folder."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The name in tables."""

    @abstractmethod
    def apply(self, model: nn.Module, schedule: NoiseSchedule) -> nn.Module:
        """Return the corrected network."""


@dataclass(frozen=True)
class Gain(Correction):
    """s(t)·ε̂, with the gain s(t) that :class:`SkipStep` would have taught the network."""

    skip: int
    tau: float = 0.99

    @property
    @override
    def name(self) -> str:
        suffix = "" if self.tau == 0.99 else f"-tau{self.tau:g}"
        return f"gain{self.skip}{suffix}"

    @property
    @override
    def title(self) -> str:
        suffix = "" if self.tau == 0.99 else f", τ = {self.tau:g}"
        return f"gain k = {self.skip}{suffix}"

    @override
    def apply(self, model: nn.Module, schedule: NoiseSchedule) -> nn.Module:
        return ShrunkModel(model, schedule, self.skip, tau=self.tau)


@dataclass(frozen=True)
class EpsilonScaling(Correction):
    """ε̂ / λ with a constant λ (arXiv 2308.15321)."""

    factor: float

    @property
    @override
    def name(self) -> str:
        return f"scaling{self.factor:g}"

    @property
    @override
    def title(self) -> str:
        return f"Epsilon Scaling λ = {self.factor:g}"

    @override
    def apply(self, model: nn.Module, schedule: NoiseSchedule) -> nn.Module:
        return Scaled(model, self.factor)


class Scaled(nn.Module):
    """A network whose answer is divided by a constant."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        """Wrap a network."""
        super().__init__()
        self.model = model
        self.factor = factor

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise: Tensor = self.model(x, t) / self.factor
        return noise


@dataclass(frozen=True)
class Method:
    """A row of the tables: an objective, and a correction where there is one."""

    objective: Objective
    correction: Correction | None = None

    @property
    def name(self) -> str:
        """A name that can be a folder."""
        if self.correction is None:
            return self.objective.name
        return f"{self.objective.name}+{self.correction.name}"

    @property
    def title(self) -> str:
        """The name in tables."""
        if self.correction is None:
            return self.objective.title
        return f"{self.objective.title} + {self.correction.title}"
