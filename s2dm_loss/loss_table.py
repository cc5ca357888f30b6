"""All that one loss looks up by t: its rows (`coefficients.LossRows`), packed into tables."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from s2dm_loss._torch import drawn_by, full_tensor, real_tensors, wide_dtype
from s2dm_loss.checks import check_batch, check_like, check_per_sample, describe
from s2dm_loss.coefficients import (
    ESTIMATORS,
    Coefficients,
    Estimator,
    GainOptions,
    LossRows,
    coefficients,
    loss_rows,
    output_weights,
    warn_if_the_start_fails,
)
from s2dm_loss.head import REDUCTIONS, Reduction, along, weighted_square
from s2dm_loss.prediction import PathPoint, PredictionType
from s2dm_loss.schedule import Schedule
from s2dm_loss.skip_set import SkipSet, warn_if_sampled_early
from s2dm_loss.tables import TimeTable
from s2dm_loss.terms import LossTerms, loss_terms
from s2dm_loss.timesteps import times_at
from s2dm_loss.weighting import check_weights, read_weighting

Form = Literal["target", "data"]

# The two ways to write a regression target: of a trainer's target, x_t and ξ, or of ε, x_0 and ξ.
_FORMS: dict[Form, tuple[str, str, str]] = {
    "target": ("on_target", "on_input", "on_skip_noise"),
    "data": ("on_noise", "on_data", "on_skip_noise"),
}
_PROBES = 17
_NOT_TRAINED = 1e-6


class LossTable:
    """The table of a loss; the settings are those of `SkipStepLoss`."""

    def __init__(
        self,
        schedule: Schedule,
        skip_set: SkipSet,
        *,
        reduction: Reduction,
        normalize: bool,
        **options: Unpack[GainOptions],
    ) -> None:
        """Make the table, or say which of tau, estimator, max_c2, skips and weighting is wrong."""
        self._schedule, self._skip_set, self._options = schedule, skip_set, options
        self._reduction, self._normalize = REDUCTIONS[reduction], normalize
        self._estimator: Estimator = options["estimator"]
        self._prediction_type: PredictionType = options["prediction_type"]
        self._weighting = weighting = read_weighting(options["weighting"])
        with real_tensors():
            timesteps = schedule.timesteps
            times = times_at(schedule, torch.linspace(0, 1, _PROBES))
            row = self._rows_at(times[:1])
            if weighting is not None:
                self._check_weighting(weighting, times if timesteps is None else timesteps)
        warn_if_sampled_early(skip_set, schedule, stacklevel=3)
        warn_if_the_start_fails(schedule, lambda t: self._coefficients(t).gain, stacklevel=3)
        self._reads_input, self._draws = row.on_input is not None, row.on_skip_noise is not None
        # Of a form's three parts: where a target holds no x_t it holds no x_0 either.
        self._has = (True, self._reads_input, self._draws)
        self._forms = {
            form: TimeTable(partial(self._form_at, names), timesteps, shares=2)
            for form, names in _FORMS.items()
        }
        self._path = TimeTable(schedule.alpha_sigma, timesteps)
        self._terms = TimeTable(self._terms_at, timesteps)

    def loss(
        self,
        form: Form,
        output: Tensor,
        t: Tensor,
        data: Sequence[Tensor | None],
        weights: Tensor | None,
    ) -> Tensor:
        """Return the loss of an output [B, ...] at times [B], with weights [B] if given.

        The data are those of the form, of the output's shape; what this loss has no use for may be
        None.
        """
        # Not `numel`, which makes a constant of a size that an export leaves open.
        values = math.prod(output.shape[self._reduction.first_axis :])
        # ξ, the third, follows the type of the others.
        dtype = _result_dtype(output, *data[:2])
        share, slope, *scales = self._forms[form].at(t, dtype, values, output.ndim)
        if weights is not None:
            weights = along(full_tensor(weights).to(dtype), output)
            share, slope = share * weights, slope * weights
        return weighted_square(
            output, share, slope, scales, self._held(data), per_sample=self._reduction.per_sample
        )

    def parts(
        self, t: Tensor, data: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the weight [B], and scale [B] and data of each part of the form "target"."""
        weight, _, *scales = self._forms["target"].at(t, _result_dtype(*data[:2]))
        return weight, scales, self._held(data)

    def _held(self, data: Sequence[Tensor | None]) -> list[Tensor]:
        return [part for part, has in zip(data, self._has, strict=True) if has and part is not None]

    def path(self, t: Tensor, *data: Tensor) -> Sequence[Tensor]:
        """Return a and b of the path at times [B], of shape [B, 1, ...] as the data."""
        return self._path.at(t, _result_dtype(*data), rank=data[0].ndim)

    def terms(
        self, eps_hat: Tensor, noise: Tensor, t: Tensor, skip_noise: Tensor | None
    ) -> LossTerms:
        """Return the paper's terms of a noise prediction; see `SkipStepLoss.terms`."""
        if self._prediction_type != "epsilon":
            raise ValueError(
                "terms takes a noise prediction, and this loss was made for prediction_type "
                f"{self._prediction_type!r}"
            )
        self.check_data(noise, t, None, eps_hat, names=("noise", "eps_hat"))
        if self._draws and skip_noise is None:
            raise ValueError(f"skip_noise must be given with the estimator {self._estimator!r}")
        xi = self.skip_noise(skip_noise, "noise", noise, None)
        at_t = self._terms.at(t, _result_dtype(eps_hat, noise))
        return loss_terms(eps_hat, noise, xi, at_t, ESTIMATORS[self._estimator])

    def coefficients_at(self, t: Tensor) -> Coefficients:
        """Return the `Coefficients` at times of any shape, in float64."""
        tau, c, c2, _ = self._terms.at(t, wide_dtype(t.device))
        return Coefficients(tau, c, c2, self._estimator)

    def copy_to(self, device: torch.device) -> None:
        """Have copies ready on a device."""
        for table in (*self._forms.values(), self._path, self._terms):
            table.copy_to(device)
        self._skip_set.copy_to(device)

    def check_data(
        self,
        like: Tensor,
        t: Tensor,
        x_t: Tensor | None,
        output: Tensor,
        names: tuple[str, str] = ("target", "output"),
    ) -> None:
        """Raise unless t, x_t and the output [B, ...] fit `like`, and x_t is there if it is needed.

        Where all is well nothing is called but the schedule: this is part of every step.
        """
        if not (isinstance(like, Tensor) and like.is_floating_point() and like.ndim):
            check_batch(names[0], like)
        shape, device = like.shape, like.device
        if not (isinstance(t, Tensor) and t.shape == shape[:1] and t.device == device):
            if isinstance(t, Tensor) and t.shape == shape and t.ndim > 1:
                raise ValueError(
                    f"t must have shape ({len(like)},), got {describe(t)}: t comes before x_t, "
                    "from_output(output, target, t, x_t)"
                )
            check_per_sample("t", t, names[0], like)
        self._schedule.check_timesteps(t)
        others = [(names[1], output)]
        if x_t is not None:
            others.append(("x_t", x_t))
        elif self._reads_input:
            raise ValueError(
                f"x_t must be given for prediction_type {self._prediction_type!r}, whose target "
                "holds data, got None: from_output(output, target, t, x_t)"
            )
        for name, value in others:
            if not (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.shape == shape
                and value.device == device
            ):
                check_like(name, value, names[0], like)
        # Without gradients at all nothing is the wrong way round: an evaluation.
        if like.requires_grad and not output.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{names[0]} requires grad and {names[1]} does not: the output comes first"
            )

    def skip_noise(
        self,
        skip_noise: Tensor | None,
        like_name: str,
        like: Tensor,
        generator: torch.Generator | None,
    ) -> Tensor | None:
        """Return ξ where the estimator draws one, drawn if it is not given, and None elsewhere."""
        if self._draws:
            if skip_noise is None:
                return draw_like(like, generator)
            return check_like("skip_noise", skip_noise, like_name, like)
        if skip_noise is not None:
            raise ValueError(
                "skip_noise belongs to an estimator that draws it, 'fresh', got it with "
                f"{self._estimator!r}"
            )
        return None

    def _coefficients(self, t: Tensor) -> Coefficients:
        return coefficients(self._schedule, self._skip_set, t=t, **self._options)

    def _rows_at(self, t: Tensor) -> LossRows:
        return loss_rows(
            self._coefficients(t),
            self._prediction_type,
            PathPoint.at(self._schedule, t),
            weighting=self._weighting,
            normalize=self._normalize,
        )

    def _form_at(self, names: tuple[str, ...], t: Tensor) -> list[Tensor]:
        rows = self._rows_at(t)
        scales = (getattr(rows, name) for name in names)
        return [rows.weight, rows.slope, *(scale for scale in scales if scale is not None)]

    def _terms_at(self, t: Tensor) -> tuple[Tensor, ...]:
        at_t = self._coefficients(t)
        weight = torch.ones_like(at_t.c2)
        if self._weighting is not None:
            weight = output_weights(self._weighting, "epsilon", PathPoint.at(self._schedule, t))
        return at_t.tau, at_t.c, at_t.c2, weight

    def _check_weighting(self, weighting: Callable[[Tensor], Tensor], times: Tensor) -> None:
        """Raise on weights that cannot train; warn of a last timestep that they leave out."""
        path = PathPoint.at(self._schedule, times)
        weights = output_weights(weighting, self._prediction_type, path)
        check_weights(weights)
        left_out = (path.a == 0) & (weights < _NOT_TRAINED)
        if self._schedule.timesteps is not None and bool(left_out.any()):
            warnings.warn(
                f"weighting {weighting!r} is below {_NOT_TRAINED:g} at the last timestep of "
                f"{self._schedule!r}, which has no signal: it is never trained, and samplers start "
                "there. weighting=None and weighting='truncated_snr' train it",
                stacklevel=4,
            )


def _result_dtype(*data: Tensor | None) -> torch.dtype:
    """Return float64 if any data are, else float32: half types are lifted."""
    for tensor in data:
        if tensor is not None and tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def draw_like(noise: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw Gaussian noise of the shape, dtype and device of `noise`."""
    if type(noise) is not Tensor and hasattr(noise, "device_mesh"):
        raise ValueError(
            "noise and, where the estimator draws one, skip_noise must be given for a DTensor, "
            "whose parts would each draw their own"
        )
    return torch.randn(noise.shape, dtype=noise.dtype, device=noise.device, **drawn_by(generator))
