"""What can be put on a trained network, without training it on: the library's own corrections.

A correction is one small class, as an objective is: its settings, its name, and what it makes of a
network on a path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from typing_extensions import override

from benchmarks.quality.named import Named
from benchmarks.quality.paths import Called, Path
from s2dm_loss import sampling


class Correction(Named, ABC):
    """What is put on a trained network, without training."""

    def apply(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the corrected network, called as the network is."""
        return path.on_sampler(self.correct(path.on_schedule(model), path))

    @abstractmethod
    def correct(self, model: nn.Module, path: Path) -> nn.Module:
        """Return the same of a network that is called with the schedule's time."""


class Standard(Correction):
    """One of the library's corrections: its strength is the one field."""

    of_library: ClassVar[type[Any]]

    @override
    def correct(self, model: nn.Module, path: Path) -> nn.Module:
        (strength,) = vars(self).values()
        kind = path.prediction_type
        correction = self.of_library(path.schedule, (strength,), prediction_type=kind)
        return correction.correct_model(model, strength)


@dataclass(frozen=True)
class Gain(Standard):
    """s(t)·ε̂, with the gain s(t) that `SkipStep` would have taught; its inverse for k < 0."""

    of_library = sampling.SkipGain
    label = "gain{skip:g}"
    heading = "gain k = {skip:g}"

    skip: float


@dataclass(frozen=True)
class EpsilonScaling(Standard):
    """ε̂ / λ (arXiv 2308.15321)."""

    of_library = sampling.EpsilonScaling
    label = "scaling{factor:g}"
    heading = "Epsilon Scaling λ = {factor:g}"

    factor: float


@dataclass(frozen=True)
class ScoreRescaling(Standard):
    """Temporal Score Rescaling (arXiv 2510.01184) with ψ = 1."""

    of_library = sampling.ScoreRescaling
    label = "rescaling{strength:g}"
    heading = "Temporal Score Rescaling k = {strength:g}"

    strength: float


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
        return Called(
            model, lambda net, x, t: net(x, t) * (1 - self.strength * (self.steps * t - 1))
        )
