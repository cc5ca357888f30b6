"""All that a loss with given settings looks up by t, as tables."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from s2dm_loss._tables import TimeTable
from s2dm_loss.checks import check_switch
from s2dm_loss.coefficients import Coefficients, CompletedSquare, Estimator
from s2dm_loss.output import OutputSquare, output_coefficients, output_square, output_weights
from s2dm_loss.prediction import PredictionType
from s2dm_loss.schedule import Schedule, wide_dtype
from s2dm_loss.skip_set import SkipSet
from s2dm_loss.weighting import check_weights

_PROBES = 17


class LossTables:
    """The tables of a loss; the settings are those of `SkipStepLoss`.

    Attributes:
        square: The fields of a `CompletedSquare`, the quadratic in ε̂.
        output: The fields of an `OutputSquare`, the same in the network's output.
        terms: τ, c and c² of the paper's two terms, and the weighting of both.
        path: The two coefficients of x_t.
        coefficients: τ, c and c².
    """

    def __init__(
        self,
        schedule: Schedule,
        skip_set: SkipSet,
        *,
        tau: float,
        estimator: Estimator,
        prediction_type: PredictionType,
        weighting: Callable[[Tensor], Tensor] | None,
        normalize: bool,
        max_c2: float,
    ) -> None:
        """Make the tables.

        Raises:
            TypeError, ValueError: if tau, max_c2, the skips or the weighting are not as they
                should be.
        """
        check_switch("normalize", normalize)
        self._schedule, self._skip_set = schedule, skip_set
        self._tau, self._estimator, self._max_c2 = tau, estimator, max_c2
        self._prediction_type, self._weighting = prediction_type, weighting
        self._normalize = normalize
        timesteps = schedule.timesteps
        # A weight may have no bound at a time that is never drawn.
        first: float = getattr(schedule, "min_time", 0.0)
        times = torch.linspace(first, 1, _PROBES, device="cpu") if timesteps is None else timesteps
        if prediction_type == "score" and weighting is None and timesteps is not None:
            self._check_noise(timesteps)
        self._tau_c_c2_at(times[:1])
        self.coefficients = TimeTable(self._tau_c_c2_at, timesteps)
        check_weights(self._weights_at(times, prediction_type))
        self.square = TimeTable(self._square_at, timesteps)
        self.output = TimeTable(self._output_at, timesteps)
        self.terms = TimeTable(self._terms_at, timesteps)
        self.path = TimeTable(schedule.alpha_sigma, timesteps)

    def _check_noise(self, timesteps: Tensor) -> None:
        """Raise ValueError where a timestep has no noise, and so an infinite score."""
        without = self._schedule.alpha_sigma(timesteps)[1] == 0
        if without.any():
            raise ValueError(
                "prediction_type 'score' must have noise at every timestep, got none at t = "
                f"{timesteps[without][0].item()}, where the score is infinite: a weighting, such "
                "as 'uniform', counts the error of the noise instead"
            )

    def copy_to(self, device: torch.device) -> None:
        """Have copies ready on a device."""
        for table in (self.coefficients, self.square, self.output, self.terms, self.path):
            table.copy_to(device)
        self._skip_set.copy_to(device)

    def coefficients_at(self, t: Tensor) -> Coefficients:
        """Return the `Coefficients` at times of any shape, in float64."""
        tau, c, c2 = self.coefficients.at(t, wide_dtype(t.device))
        return Coefficients(tau, c, c2, self._estimator)

    def _tau_c_c2_at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_t = output_coefficients(
            self._schedule,
            self._skip_set,
            t,
            tau=self._tau,
            estimator=self._estimator,
            prediction_type=self._prediction_type,
            weighting=self._weighting,
            max_c2=self._max_c2,
        )
        return at_t.tau, at_t.c, at_t.c2

    def _square_at(self, t: Tensor) -> CompletedSquare:
        square = self.coefficients_at(t).complete_square(normalize=self._normalize)
        return square if self._weighting is None else square.times(self._weights_at(t, "epsilon"))

    def _output_at(self, t: Tensor) -> OutputSquare:
        return output_square(
            self.coefficients_at(t),
            self._prediction_type,
            *self._schedule.alpha_sigma(t),
            weighting=self._weighting,
            normalize=self._normalize,
        )

    def _terms_at(self, t: Tensor) -> tuple[Tensor, ...]:
        at_t = self.coefficients_at(t)
        return at_t.tau, at_t.c, at_t.c2, self._weights_at(t, "epsilon")

    def _weights_at(self, t: Tensor, prediction_type: PredictionType) -> Tensor:
        a, b = self._schedule.alpha_sigma(t)
        if self._weighting is None:
            return torch.ones_like(a)
        return output_weights(self._weighting, prediction_type, a, b)
