"""What can be put on a trained network, without training it on: the library's own corrections.

A correction is one small class, as an objective is: its settings, its name, and what it makes of a
network on a path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from benchmarks.quality.named import Named
from benchmarks.quality.paths import Path
from s2dm_loss import sampling


class Correction(Named, ABC):
    """What is put on a trained network, without training."""

    @abstractmethod
    def apply(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the corrected network, called as the network is."""


class OfTheLibrary(Correction):
    """A correction that the library has."""

    @abstractmethod
    def library(self, path: Path) -> tuple[sampling.Correction, float]:
        """Return the library's correction, and its strength."""

    @override
    def apply(self, model: nn.Module, path: Path) -> nn.Module:
        correction, strength = self.library(path)
        corrected = correction.correct_model(path.on_schedule(model), strength)
        return path.on_sampler(corrected)


@dataclass(frozen=True)
class Gain(OfTheLibrary):
    """s(t)·ε̂, with the gain s(t) that `SkipStep` would have taught; its inverse for k < 0."""

    label = "gain{skip:g}"
    heading = "gain k = {skip:g}"
    ours = True

    skip: float
    tau: float = 0.99

    @override
    def library(self, path: Path) -> tuple[sampling.Correction, float]:
        skip, kind = (self.skip,), path.prediction_type
        return sampling.SkipGain(path.schedule, skip, tau=self.tau, prediction_type=kind), self.skip


@dataclass(frozen=True)
class EpsilonScaling(OfTheLibrary):
    """ε̂ / λ (arXiv 2308.15321)."""

    label = "scaling{factor:g}"
    heading = "Epsilon Scaling λ = {factor:g}"

    factor: float

    @override
    def library(self, path: Path) -> tuple[sampling.Correction, float]:
        factor, kind = (self.factor,), path.prediction_type
        return sampling.EpsilonScaling(path.schedule, factor, prediction_type=kind), self.factor


@dataclass(frozen=True)
class ScoreRescaling(OfTheLibrary):
    """Temporal Score Rescaling (arXiv 2510.01184) with ψ = 1."""

    label = "rescaling{strength:g}"
    heading = "Temporal Score Rescaling k = {strength:g}"

    strength: float

    @override
    def library(self, path: Path) -> tuple[sampling.Correction, float]:
        strength, kind = (self.strength,), path.prediction_type
        return sampling.ScoreRescaling(path.schedule, strength, prediction_type=kind), self.strength


@dataclass(frozen=True)
class StepPush(Correction):
    """DCW (arXiv 2604.16044) on pixels: each step ends at x' + c (x' - x̂_0).

    With Euler on a flow, from t to t', that is a factor 1 - c t' / (t - t') on the velocity: a gain
    that depends on the sampler. So it is made for n equal steps, t' = t - 1 / n.
    """

    label = "dcw{strength:g}-{steps}"
    heading = "DCW c = {strength:g}, {steps} steps"

    strength: float
    steps: int

    @override
    def apply(self, model: nn.Module, path: Path) -> nn.Module:
        return path.on_sampler(_Pushed(path.on_schedule(model), self.strength, self.steps))


class _Pushed(nn.Module):
    def __init__(self, model: nn.Module, strength: float, steps: int) -> None:
        super().__init__()
        self.model, self.strength, self.steps = model, strength, steps

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = self.model(x, t)
        return velocity * (1 - self.strength * (self.steps * t - 1))
