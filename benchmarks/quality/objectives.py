"""What a network is trained on.

An objective is one small class: its settings, its name in files and in tables, and the mathematics
of its loss.  All of them see the same images, timesteps and noise, and average over pixels and
batch alike.  A new one needs an arm of a preset on the digits besides, which puts it on an evidence
page; a test fails as long as it has none.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from benchmarks.quality.corrections import Correction
from benchmarks.quality.named import Named
from benchmarks.quality.paths import STEPS, Noisy, Path
from benchmarks.quality.samplers import Model
from benchmarks.quality.streams import Stream
from s2dm_loss import SkipStepLoss
from s2dm_loss.coefficients import Estimator


@dataclass(frozen=True)
class Batch:
    """One training batch: images in [-1, 1], timesteps, ε, and where else an objective draws."""

    x0: Tensor
    t: Tensor
    noise: Tensor
    extra: Stream

    def more_noise(self) -> Tensor:
        """Return standard normal noise of the batch's shape from the extra stream."""
        return self.extra.normal(tuple(self.x0.shape[1:]))


Step = tuple[Tensor, Tensor]
"""The loss, and for the curves each sample's squared error, by which all compare."""


class Loss(nn.Module):
    """An objective on a path: `loss(model, batch)`, with what it makes once of the path."""

    def __init__(self, objective: Objective, path: Path) -> None:
        """Make the tables of a path.

        Raises:
            ValueError: If the objective is one of ε alone and the path is not.
        """
        super().__init__()
        if not (objective.any_path or path.prediction_type == "epsilon"):
            raise ValueError(
                f"objective: {objective.name} is one of networks that predict ε, and these predict "
                f"{path.prediction_type}"
            )
        self.objective, self.path, self.parts = objective, path, objective.parts(path)

    @override
    def forward(self, model: Model, batch: Batch) -> Step:
        return self.objective.step(model, batch, self)


class Objective(Named, ABC):
    """What a network is trained on; a subclass overrides what it does differently.

    Attributes:
        model_calls: Network evaluations per training step.
        any_path: Whether it means something for other networks than those that predict ε.
        branches: Whether it may start from the plain run's state, where a budget says when; a
            weighting, which works from the first step on, may not.
    """

    model_calls: ClassVar[int] = 1
    any_path: ClassVar[bool] = False
    branches: ClassVar[bool] = True

    def parts(self, _path: Path) -> nn.Module:
        """Return what is made once of a path."""
        return nn.Module()

    def times(self, batch: Batch, _loss: Loss) -> Tensor:
        """Return the timesteps to train on."""
        return batch.t

    def input_noise(self, batch: Batch) -> Tensor:
        """Return the noise that x_t is made with."""
        return batch.noise

    def compare(self, predicted: Tensor, noisy: Noisy, _batch: Batch, _loss: Loss) -> Tensor:
        """Return the loss of a prediction."""
        return F.mse_loss(predicted, noisy.target)

    def step(self, model: Model, batch: Batch, loss: Loss) -> Step:
        """Return the loss of a batch and what the curves show of it."""
        n = self.times(batch, loss)
        noisy = loss.path.noisy(batch.x0, self.input_noise(batch), n)
        # The target is of the batch's noise, also where an objective perturbs the input.
        target = loss.path.noisy(batch.x0, batch.noise, n).target
        noisy = noisy._replace(target=target)
        predicted = model(noisy.x_t, noisy.called)
        value = self.compare(predicted, noisy, batch, loss)
        errors = F.mse_loss(predicted.detach(), target, reduction="none").flatten(1).mean(1)
        return value, errors


@dataclass(frozen=True)
class Plain(Objective):
    """L_simple of Ho et al. (2020), mse(ε, ε̂), or flow matching: mse(ε − x_0, û)."""

    label = "plain"
    heading = "plain L_simple"
    any_path = True
    branches = False


@dataclass(frozen=True)
class SkipStep(Objective):
    """This library's loss."""

    label = "skip{skip:g}-{estimator}"
    heading = "S²-DM k = {skip:g}, {estimator}"
    any_path = True

    skip: float
    estimator: Estimator = "expected"
    tau: float = 0.99

    @property
    @override
    def name(self) -> str:
        return super().name + (f"-tau{self.tau:g}" if self.tau != SkipStep.tau else "")

    @property
    @override
    def title(self) -> str:
        return super().title + (f", τ = {self.tau:g}" if self.tau != SkipStep.tau else "")

    @override
    def parts(self, path: Path) -> SkipStepLoss:
        return SkipStepLoss(
            path.schedule,
            self.skip,
            tau=self.tau,
            estimator=self.estimator,
            prediction_type=path.prediction_type,
        )

    @override
    def compare(self, predicted: Tensor, noisy: Noisy, batch: Batch, loss: Loss) -> Tensor:
        zeta = batch.more_noise() if self.estimator == "fresh" else None
        criterion: SkipStepLoss = loss.parts  # type: ignore[assignment]
        x_t = None if loss.path.prediction_type == "epsilon" else noisy.x_t
        return criterion.from_output(predicted, noisy.target, noisy.t, x_t, skip_noise=zeta)


@dataclass(frozen=True)
class MinSNR(Objective):
    """Min-SNR-γ (arXiv 2303.09556): weight min(snr, γ) / snr."""

    label = "min-snr-{gamma:g}"
    heading = "Min-SNR-{gamma:g}"
    branches = False

    gamma: float = 5.0

    @override
    def parts(self, path: Path) -> nn.Module:
        signal, spread = path.schedule.alpha_sigma(torch.arange(STEPS))
        tables = nn.Module()
        tables.register_buffer("snr", (signal / spread).square())
        return tables

    @override
    def compare(self, predicted: Tensor, noisy: Noisy, batch: Batch, loss: Loss) -> Tensor:
        snr = loss.parts.get_buffer("snr")[noisy.t]
        per_sample = (predicted - batch.noise).square().flatten(1).mean(1)
        return ((snr.clamp(max=self.gamma) / snr).float() * per_sample).mean()


@dataclass(frozen=True)
class InputPerturbation(Objective):
    """DDPM-IP (arXiv 2301.11706): x_t is made with ε + γ ξ, and the target stays ε."""

    label = "ddpm-ip-{gamma:g}"
    heading = "DDPM-IP {gamma:g}"

    gamma: float = 0.1

    @override
    def input_noise(self, batch: Batch) -> Tensor:
        return batch.noise + self.gamma * batch.more_noise()


@dataclass(frozen=True)
class SequenceAware(Objective):
    """SA-DPM (arXiv 2312.12431): residuals of K consecutive timesteps should also cancel in sum.

    mean‖r_t‖² + (1/K²) mean‖Σ_{j<K} 1[t ≥ j] r_{t−j}‖², with r_s = e_s − ε_θ(x_s, s) and noise
    e_s that is fresh for j ≥ 1.
    """

    label = "sa-dpm-{window}"
    heading = "SA-DPM K = {window}"

    window: int = 2

    @property
    @override
    def model_calls(self) -> int:  # type: ignore[override]
        return self.window

    @override
    def step(self, model: Model, batch: Batch, loss: Loss) -> Step:
        window = self.window
        noise = [batch.noise] + [batch.more_noise() for _ in range(1, window)]
        times = [(batch.t - j).clamp(min=0) for j in range(window)]
        inputs = [loss.path.noisy(batch.x0, e, s).x_t for e, s in zip(noise, times, strict=True)]
        residuals = torch.cat(noise) - model(torch.cat(inputs), torch.cat(times))
        parts = residuals.unflatten(0, (window, len(batch.t)))
        valid = torch.stack([batch.t >= j for j in range(window)])[..., None, None, None]
        total = torch.where(valid, parts, 0.0).sum(0)
        value = parts[0].square().mean() + total.square().mean() / window**2
        return value, parts[0].detach().square().flatten(1).mean(1)


@dataclass(frozen=True)
class SampledTimesteps(Objective):
    """L_simple on the timesteps that DDIM visits, and on no others."""

    label = "only-ddim-{steps}"
    heading = "only DDIM's {steps} timesteps"

    steps: int

    @override
    def times(self, batch: Batch, _loss: Loss) -> Tensor:
        # The common draw of t chooses among the visited ones: the stream stays in step.
        return batch.t * self.steps // STEPS * (STEPS // self.steps)


@dataclass(frozen=True)
class Method:
    """A row of the tables: an objective, and the correction put on its network, if there is one."""

    objective: Objective
    correction: Correction | None = None

    @property
    def name(self) -> str:
        """A name that can be a folder."""
        return "+".join(part.name for part in self._parts)

    @property
    def title(self) -> str:
        """The name in tables."""
        return " + ".join(part.title for part in self._parts)

    @property
    def _parts(self) -> tuple[Named, ...]:
        return (self.objective,) if self.correction is None else (self.objective, self.correction)
