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

    def apply(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the corrected network, called as the network is."""
        return path.on_sampler(self.correct(path.on_schedule(model), path))

    @abstractmethod
    def correct(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the same of a network that is called with the schedule's time."""


@dataclass(frozen=True)
class Gain(Correction):
    """s(t)·ε̂, with the gain s(t) that `SkipStep` would have taught; its inverse for k < 0."""

    label = "gain{skip:g}"
    heading = "gain k = {skip:g}"
    ours = True

    skip: float
    tau: float = 0.99

    @override
    def correct(self, model: nn.Module, path: Path) -> nn.Module:
        kind = path.prediction_type
        ours = sampling.SkipGain(path.schedule, (self.skip,), tau=self.tau, prediction_type=kind)
        return ours.correct_model(model, self.skip)


@dataclass(frozen=True)
class EpsilonScaling(Correction):
    """ε̂ / λ (arXiv 2308.15321)."""

    label = "scaling{factor:g}"
    heading = "Epsilon Scaling λ = {factor:g}"

    factor: float

    @override
    def correct(self, model: nn.Module, path: Path) -> nn.Module:
        kind = path.prediction_type
        theirs = sampling.EpsilonScaling(path.schedule, (self.factor,), prediction_type=kind)
        return theirs.correct_model(model, self.factor)


@dataclass(frozen=True)
class ScoreRescaling(Correction):
    """Temporal Score Rescaling (arXiv 2510.01184) with ψ = 1."""

    label = "rescaling{strength:g}"
    heading = "Temporal Score Rescaling k = {strength:g}"

    strength: float

    @override
    def correct(self, model: nn.Module, path: Path) -> nn.Module:
        kind = path.prediction_type
        theirs = sampling.ScoreRescaling(path.schedule, (self.strength,), prediction_type=kind)
        return theirs.correct_model(model, self.strength)


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
    def correct(self, model: nn.Module, path: Path) -> nn.Module:
        return _Pushed(model, self.strength, self.steps)


class _Pushed(nn.Module):
    def __init__(self, model: nn.Module, strength: float, steps: int) -> None:
        super().__init__()
        self.model, self.strength, self.steps = model, strength, steps

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity: Tensor = self.model(x, t)
        return velocity * (1 - self.strength * (self.steps * t - 1))
