"""Corrections of a trained model without training, each with one strength.

A correction turns what a sampler is given, a model and its start noise, into another model and
noise. What is here multiplies the noise prediction ε̂ by a factor s(t), or the start noise:

    SkipGain        s(t) of S²-DM with the skip k; for -k its inverse
    EpsilonScaling  1 / λ (Ning et al., arXiv 2308.15321)
    ScoreRescaling  (ψ + σ²) / (ψ/r + σ²) (Temporal, arXiv 2510.01184)
    StartScaling    the start noise times a constant

All of them change how far the samples lie apart, and all work in both directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss.checks import check_number, describe, plain_value, read_plain_value
from s2dm_loss.coefficients import DEFAULT_MAX_C2, DEFAULT_TAU, gain
from s2dm_loss.prediction import PathPoint, PredictionType, output_scales, read_prediction_type
from s2dm_loss.sampling.scaled_model import ScaledModel
from s2dm_loss.schedule import Schedule, check_schedule

# Shares of the schedule for the coarse scan. On T = 1000 timesteps they are the skips 19, 49, …
GAIN_SHARES = (-0.1, -0.05, -0.02, 0.02, 0.05, 0.1, 0.15, 0.2)
_FULL_REACH = 0.01  # ratio from which on Epsilon Scaling is not bounded


class Correction:
    """A change of (model, noise) with one strength. A subclass overrides one method or both.

    >>> from s2dm_loss.sampling import Correction
    >>> class Shift(Correction):
    ...     name, none, strengths = "start noise plus", 0.0, (-0.2, -0.1, 0.1, 0.2)
    ...     def correct_noise(self, noise, strength):
    ...         return noise + strength
    >>> Shift()(torch.nn.Identity(), torch.zeros(2), 0.1)
    (Identity(), tensor([0.1000, 0.1000]))

    Attributes:
        name: How it is called in a table, followed by the strength.
        none: The strength at which nothing is changed.
        strengths: Those of a coarse scan, ascending, without `none`.
    """

    name: str = "correction"
    none: float = 1.0
    strengths: tuple[float, ...] = ()
    options: tuple[str, ...] = ()  # attributes that `to_dict` keeps besides the strengths

    def __call__(
        self, model: nn.Module, noise: Tensor, strength: float
    ) -> tuple[nn.Module, Tensor]:
        """Return the model and the start noise for a sampler."""
        return self.correct_model(model, strength), self.correct_noise(noise, strength)

    def correct_model(self, model: nn.Module, strength: float) -> nn.Module:
        """Return the model for a sampler, here unchanged."""
        del strength
        return model

    def correct_noise(self, noise: Tensor, strength: float) -> Tensor:
        """Return the start noise for a sampler, here unchanged."""
        del strength
        return noise

    @property
    def changes_noise(self) -> bool:
        """Whether it has a `correct_noise` of its own."""
        return type(self).correct_noise is not Correction.correct_noise

    def between(self, low: float, high: float) -> float:
        """Return a strength between two, for the finer scan; one of them if there is none."""
        return (low + high) / 2

    def label(self, strength: float) -> str:
        """Return how the correction with a strength is called in a table."""
        return f"{self.name} {strength:g}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON's own types, less its schedule."""
        options = {name: getattr(self, name) for name in self.options}
        kept = {"type": type(self).__name__, "name": self.name, "none": self.none}
        return dict(plain_value({**kept, "strengths": [*self.strengths], **options}))

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{s:g}' for s in self.strengths)})"


class NoCorrection(Correction):
    """The model and the noise as they are."""

    name: str = "none"
    none: float = 0.0

    @override
    def label(self, strength: float) -> str:
        return self.name


NONE = NoCorrection()


class PredictionScaling(Correction):
    """Multiplies ε̂ by a factor s(t): a subclass says which, in `scale`."""

    options: tuple[str, ...] = ("prediction_type",)

    def __init__(
        self,
        schedule: Schedule,
        strengths: Sequence[float],
        *,
        prediction_type: PredictionType | None = None,
    ) -> None:
        """Take the schedule that the model was trained on.

        Args:
            schedule: The schedule.
            strengths: Strengths of the coarse scan.
            prediction_type: What the model predicts, as for `SkipStepLoss`.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        self.schedule: Schedule = check_schedule(schedule)
        self.prediction_type: PredictionType = read_prediction_type(prediction_type, self.schedule)
        self.strengths: tuple[float, ...] = _ascending(strengths, self.none)

    def scale(self, t: Tensor, strength: float) -> Tensor:
        """Return s(t), float64, of the shape of t."""
        raise NotImplementedError

    @override
    def correct_model(self, model: nn.Module, strength: float) -> nn.Module:
        if strength == self.none:
            return model
        scale = partial(self.scale, strength=strength)
        return ScaledModel(model, self.schedule, scale, prediction_type=self.prediction_type)


class SkipGain(PredictionScaling):
    """The gain s(t) that S²-DM's loss with the skip k teaches; for a strength of -k its inverse.

    1 / s(t) = 1 + (1-τ)/τ c²(t) grows with k almost alike at all t, so k and τ are nearly one
    parameter: τ is held, and k is the strength.
    """

    name: str = "gain k ="
    none: float = 0
    options: tuple[str, ...] = ("prediction_type", "tau", "max_c2")

    def __init__(
        self,
        schedule: Schedule,
        strengths: Sequence[float] | None = None,
        *,
        tau: float = DEFAULT_TAU,
        prediction_type: PredictionType | None = None,
        max_c2: float = DEFAULT_MAX_C2,
    ) -> None:
        """Take the schedule that the model was trained on.

        Args:
            schedule: The schedule.
            strengths: The skips: ints on a discrete schedule, floats in continuous time, below 0
                for the inverse. By default eight, from -10 % to 20 % of the schedule.
            tau: τ in (0, 1).
            prediction_type: What the model predicts, as for `SkipStepLoss`.
            max_c2: Upper bound on c²; see `coefficients`.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        # 1 is no gain and 0 no model.
        self.tau: float = check_number("tau", tau, 0.0, 1.0, open_ends=True)
        if strengths is None:
            strengths = _default_skips(check_schedule(schedule))
        super().__init__(schedule, strengths, prediction_type=prediction_type)
        self.max_c2: float = check_number("max_c2", max_c2, 0.0, torch.inf)
        # Checks max_c2 and the skips.
        dtype = torch.long if schedule.timesteps is not None else None
        for skip in self.strengths:
            self.scale(torch.zeros(1, dtype=dtype, device="cpu"), skip)

    @override
    def scale(self, t: Tensor, strength: float) -> Tensor:
        kind, most = self.prediction_type, self.max_c2
        s = gain(self.schedule, abs(strength), t=t, tau=self.tau, prediction_type=kind, max_c2=most)
        return s if strength > 0 else 1 / s

    @override
    def between(self, low: float, high: float) -> float:
        middle = (low + high) / 2
        return middle if self.schedule.timesteps is None else round(middle)


class EpsilonScaling(PredictionScaling):
    """ε̂ / λ with one λ: Epsilon Scaling (Ning et al., arXiv 2308.15321).

    An output with data in it changes by (s-1) ε̂ / ratio (see `coefficients`), which has no bound.
    So where ratio < 0.01 (σ > 0.99 on flow matching), s - 1 is multiplied by (ratio / 0.01)².
    """

    name: str = "epsilon scaling λ ="

    def __init__(
        self,
        schedule: Schedule,
        strengths: Sequence[float] = (0.97, 0.985, 0.995, 1.005, 1.015, 1.03, 1.06),
        *,
        prediction_type: PredictionType | None = None,
    ) -> None:
        """Arguments as for `PredictionScaling`; a strength is λ."""
        super().__init__(schedule, strengths, prediction_type=prediction_type)
        _check_positive(self.strengths)

    @override
    def scale(self, t: Tensor, strength: float) -> Tensor:
        scales = output_scales(self.prediction_type, PathPoint.at(self.schedule, t))
        change = torch.full_like(t, 1 / strength - 1, dtype=torch.float64)
        if scales.shift is not None:
            change = change * (scales.ratio / _FULL_REACH).square().clamp(max=1)
        return 1 + change


class ScoreRescaling(PredictionScaling):
    """ε̂ (ψ + σ²) / (ψ/r + σ²): Temporal Score Rescaling (arXiv 2510.01184), whose k is our r.

    It acts at small t, where σ² = (1-ᾱ)/ᾱ is below ψ, and there by the factor r.
    """

    name: str = "score rescaling r ="
    options: tuple[str, ...] = ("prediction_type", "psi")

    def __init__(
        self,
        schedule: Schedule,
        strengths: Sequence[float] = (0.75, 0.9, 0.97, 1.03, 1.15, 1.4, 2.0),
        *,
        psi: float = 1.0,
        prediction_type: PredictionType | None = None,
    ) -> None:
        """Arguments as for `PredictionScaling`; a strength is r, and psi is ψ."""
        super().__init__(schedule, strengths, prediction_type=prediction_type)
        _check_positive(self.strengths)
        self.psi: float = check_number("psi", psi, 0.0, float("inf"), open_ends=True)

    @override
    def scale(self, t: Tensor, strength: float) -> Tensor:
        a, b = self.schedule.alpha_sigma(t)
        signal, noise = self.psi * a.square(), b.square()
        return (signal + noise) / (signal / strength + noise)


class StartScaling(Correction):
    """The start noise times a constant."""

    name: str = "start noise times"

    def __init__(
        self, strengths: Sequence[float] = (0.9, 0.95, 0.98, 1.03, 1.1, 1.2, 1.35)
    ) -> None:
        """Take the constants of the coarse scan."""
        self.strengths: tuple[float, ...] = _ascending(strengths, self.none)
        _check_positive(self.strengths)

    @override
    def correct_noise(self, noise: Tensor, strength: float) -> Tensor:
        return noise * strength


def standard_corrections(
    schedule: Schedule, *, prediction_type: PredictionType | None = None
) -> tuple[Correction, ...]:
    """Return the corrections of this module with their default strengths.

    >>> from s2dm_loss import NoiseSchedule
    >>> from s2dm_loss.sampling import standard_corrections
    >>> for correction in standard_corrections(NoiseSchedule.linear(1000)):
    ...     print(correction)
    SkipGain(-99, -49, -19, 19, 49, 99, 149, 199)
    EpsilonScaling(0.97, 0.985, 0.995, 1.005, 1.015, 1.03, 1.06)
    StartScaling(0.9, 0.95, 0.98, 1.03, 1.1, 1.2, 1.35)
    ScoreRescaling(0.75, 0.9, 0.97, 1.03, 1.15, 1.4, 2)
    """
    return (
        SkipGain(schedule, prediction_type=prediction_type),
        EpsilonScaling(schedule, prediction_type=prediction_type),
        StartScaling(),
        ScoreRescaling(schedule, prediction_type=prediction_type),
    )


class StoredCorrection(Correction):
    """A correction as a file has it, without its schedule or its code: to be read, not applied."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Take what `Correction.to_dict` returned."""
        self.values = values
        self.name: str = values["name"]
        self.none: float = float(values["none"])
        self.strengths: tuple[float, ...] = tuple(values["strengths"])

    def on(self, schedule: Schedule) -> Correction:
        """Return the correction itself, for a schedule; one of the user's own stays as it is."""
        kind = _KINDS.get(self.values["type"])
        if kind is None:
            return self
        options = read_plain_value({n: self.values[n] for n in ("strengths", *kind.options)})
        return kind(**options) if kind is StartScaling else kind(schedule, **options)  # type: ignore[call-arg]

    @override
    def correct_model(self, model: nn.Module, strength: float) -> nn.Module:
        raise self._refusal(strength)

    @override
    def correct_noise(self, noise: Tensor, strength: float) -> Tensor:
        raise self._refusal(strength)

    def _refusal(self, strength: float) -> ValueError:
        if self.values["type"] not in _KINDS:
            return ValueError(
                f"{self.name!r} is no correction of s2dm_loss.sampling and cannot be applied from "
                f"a file: make your {self.values['type']} and call it with the strength "
                f"{strength:g}"
            )
        return ValueError(
            f"{self.name!r} was loaded without its schedule and cannot be applied: "
            "Recommendation.from_dict(values, schedule) loads it with one"
        )

    @property
    @override
    def changes_noise(self) -> bool:
        return False  # a pipeline, which asks this first, is told by `correct_model`

    @override
    def to_dict(self) -> dict[str, Any]:
        return self.values


_KINDS: dict[str, type[Correction]] = {
    kind.__name__: kind for kind in (SkipGain, EpsilonScaling, ScoreRescaling, StartScaling)
}


def _ascending(strengths: Sequence[float], none: float) -> tuple[float, ...]:
    if not isinstance(strengths, Iterable):
        raise TypeError(f"strengths must be a sequence of numbers, got {describe(strengths)}")
    strengths = tuple(strengths)  # an iterator is empty the second time
    for strength in strengths:
        check_number("strengths", strength, -torch.inf, torch.inf, open_ends=True)
    found = tuple(sorted(strengths))
    if not found or len(set(found)) < len(found) or none in found:
        raise ValueError(
            f"strengths must be at least one, distinct, and without {none:g}, which is no "
            f"correction, got {strengths!r}"
        )
    return found


def _check_positive(strengths: tuple[float, ...]) -> None:
    if strengths[0] <= 0:
        raise ValueError(f"strengths must be positive, got {strengths[0]!r}")


def _default_skips(schedule: Schedule) -> tuple[float, ...]:
    if schedule.timesteps is None:
        return GAIN_SHARES
    count = schedule.timesteps.numel()
    # A set, since on few timesteps several shares are one skip.
    return tuple({(1 if s > 0 else -1) * max(1, round(abs(s) * count) - 1) for s in GAIN_SHARES})
