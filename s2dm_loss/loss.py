"""`SkipStepLoss`: the loss as a module, with its tables made once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss._checks import check_batch, check_choice, check_like, check_per_sample
from s2dm_loss._head import REDUCTIONS, Reduction
from s2dm_loss.coefficients import (
    DEFAULT_MAX_C2,
    DEFAULT_TAU,
    ESTIMATORS,
    Coefficients,
    CompletedSquare,
    Estimator,
    coefficients,
)
from s2dm_loss.functional import (
    LossTerms,
    along,
    check_prediction,
    completed_square_loss,
    draw_like,
    loss_dtype,
    loss_terms,
)
from s2dm_loss.prediction import (
    PREDICTION_TYPES,
    PredictionType,
    epsilon_from_output,
    read_output,
)
from s2dm_loss.schedule import Schedule, read_table
from s2dm_loss.skip_set import Skips, SkipSet


class SkipStepLoss(nn.Module):
    """The training loss of Skip-Step Diffusion Models (arXiv 2401.01520) for any ε-model.

    >>> from s2dm_loss import NoiseSchedule, SkipStepLoss
    >>> criterion = SkipStepLoss(NoiseSchedule.linear(1000), skip_set=9)
    >>> criterion
    SkipStepLoss(NoiseSchedule.linear(1000), SkipSet(9), tau=0.99, estimator='expected')
    >>> model = lambda x_t, t: torch.zeros_like(x_t)
    >>> loss = criterion(model, torch.randn(8, 3, 32, 32))  # draws t, noise; one model call
    >>> loss.shape
    torch.Size([])

    It has no parameters and leaves no keys in a `state_dict`. Its tables follow the tensors it is
    given, so `.to(device)` is never needed; call it all the same before `torch.compile`, which
    should not trace the move.
    """

    def __init__(
        self,
        schedule: Schedule,
        skip_set: Skips = 9,
        *,
        tau: float = DEFAULT_TAU,
        estimator: Estimator = "expected",
        reduction: Reduction = "mean",
        prediction_type: PredictionType = "epsilon",
        normalize: bool = False,
        max_c2: float = DEFAULT_MAX_C2,
    ) -> None:
        """Make the loss's tables.

        Args:
            schedule: The noise schedule that the model trains on.
            skip_set: Which earlier time each t is paired with: an int or several (timesteps), a
                float or several (continuous time), or a `SkipSet`. The released code's default is
                9; the paper's S²-DMⁿ has n = skip + 1.
            tau: τ in [0, 1], the share of the plain loss; 1 is the plain loss.
            estimator: What the skip term is compared with: "expected", the exact expectation over
                fresh noise (no second draw, the least variance); "fresh", the released code draw
                for draw; "shared", the equation as printed.
            reduction: "mean" or "sum" over the batch, or "none" for a loss of shape [B]. The data
                axes are always averaged.
            prediction_type: What `model` predicts: "epsilon", "v_prediction", "sample", "flow" or
                "score". The loss is on ε̂, whichever it is.
            normalize: Drop the weight A(t) and the constant, leaving mse(ε̂, target), which has the
                same minimiser and weighs every timestep alike.
            max_c2: Upper bound on c²; see `coefficients`.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        super().__init__()
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule or another Schedule, got {schedule!r}"
            )
        self.schedule = schedule
        self.skip_set: SkipSet = SkipSet.wrap(skip_set)
        self.tau = tau
        self.estimator: Estimator = estimator
        self.reduction: Reduction = reduction
        self.prediction_type: PredictionType = prediction_type
        self.normalize = normalize
        self.max_c2 = max_c2
        # Checks tau, max_c2 and the skips; in continuous time there is no table to make.
        timesteps = schedule.timesteps
        at_t = self.coefficients_at(torch.full((1,), 0.5) if timesteps is None else timesteps)
        self._discrete = timesteps is not None
        self._tables: dict[str, Tensor] = {}
        if timesteps is not None:
            square = at_t.complete_square(normalize=normalize)
            # The column of the table that holds each field; -1 where the field is None.
            column = itertools.count()
            self._columns = [-1 if field is None else next(column) for field in square]
            self._tables = {
                "square_table": torch.stack([f for f in square if f is not None], dim=-1),
                "terms_table": torch.stack([at_t.tau, at_t.c, at_t.c2], dim=-1),
                "path_table": torch.stack(schedule.alpha_sigma(timesteps), dim=-1),
            }
        for name, table in self._tables.items():
            self.register_buffer(name, table.float(), persistent=False)

    @override
    def forward(
        self,
        model: Callable[..., Any],
        x0: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        skip_noise: Tensor | None = None,
        weights: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Noise `x0`, call `model(x_t, t, **model_kwargs)` once, and return the loss.

        What is not given is drawn, in the order t, noise, skip_noise.

        Args:
            model: Returns its prediction of shape [B, ...] as a tensor, as the first of a tuple, or
                as `.sample`.
            x0: Clean data of shape [B, ...].
            t: Times of shape [B]; uniform if not given.
            noise: ε of the shape of `x0`.
            skip_noise: ζ of the estimator "fresh", of the shape of `x0`.
            weights: Per-sample weights of shape [B], multiplied in before the reduction.
            model_kwargs: Further arguments of the model.
            generator: Random stream of what is drawn.

        Returns:
            A scalar, or shape [B] with reduction "none"; float32, or float64 for float64 data.

        Raises:
            TypeError, ValueError: if an argument or the model's output is not as said.
        """
        check_batch("x0", x0)
        if t is None:
            t = self.schedule.draw_timesteps(x0.shape[0], device=x0.device, generator=generator)
        check_per_sample("t", t, "x0", x0)
        noise = draw_like(x0, generator) if noise is None else check_like("noise", noise, "x0", x0)
        x_t = self._add_noise(x0, noise, t)
        output = read_output(model(x_t, t, **(model_kwargs or {})))
        check_like("model output", output, "x0", x0)
        eps_hat = epsilon_from_output(output, x_t, t, self.schedule, self.prediction_type)
        return self.from_prediction(
            eps_hat, noise, t, skip_noise=skip_noise, weights=weights, generator=generator
        )

    def from_prediction(
        self,
        eps_hat: Tensor,
        noise: Tensor,
        t: Tensor,
        *,
        skip_noise: Tensor | None = None,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss of a noise prediction that the trainer has made already.

        Args:
            eps_hat: Predicted noise ε̂ of shape [B, ...]; see `epsilon_from_output` for models that
                predict something else.
            noise: The noise ε in x_t, of the same shape.
            t: Times of shape [B].
            skip_noise: ζ of the estimator "fresh", of the same shape; drawn if not given.
            weights: Per-sample weights of shape [B], multiplied in before the reduction.
            generator: Random stream of the drawn ζ.

        Returns:
            A scalar, or shape [B] with reduction "none"; float32, or float64 for float64 input.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        check_prediction(eps_hat, noise, t, skip_noise, weights, self.estimator)
        if self.estimator == "fresh" and skip_noise is None:
            skip_noise = draw_like(noise, generator)
        square = self._square_at(t, loss_dtype(eps_hat, noise))
        return completed_square_loss(eps_hat, noise, square, skip_noise, self.reduction, weights)

    def terms(
        self, eps_hat: Tensor, noise: Tensor, t: Tensor, *, skip_noise: Tensor | None = None
    ) -> LossTerms:
        """Return the paper's two terms, each of shape [B].

        They serve logging, and trainers whose plain loss is not mse(ε̂, ε): the gradient flows, so
        that such a trainer can add τ times its own loss and (1-τ) times the skip term. With the
        estimator "fresh" the noise ζ has to be given: the terms are those of one draw.
        """
        check_prediction(eps_hat, noise, t, skip_noise, None, self.estimator)
        if self.estimator == "fresh" and skip_noise is None:
            raise ValueError("skip_noise must be given with the estimator 'fresh', got None")
        if self._discrete:
            tau, c, c2 = self._rows("terms_table", t, loss_dtype(eps_hat, noise)).unbind(-1)
            at_t = Coefficients(tau, c, c2, self.estimator)
        else:
            at_t = self.coefficients_at(t)
        return loss_terms(eps_hat, noise, at_t, skip_noise)

    def _add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        dtype = loss_dtype(x0, noise)
        if self._discrete:
            a, b = self._rows("path_table", t, dtype).unbind(-1)
        else:
            a, b = (scale.to(dtype) for scale in self.schedule.alpha_sigma(t))
        return (along(a, x0) * x0 + along(b, x0) * noise).to(x0.dtype)

    def _square_at(self, t: Tensor, dtype: torch.dtype) -> CompletedSquare:
        if self._discrete:
            fields: tuple[Any, ...] = (*self._rows("square_table", t, dtype).unbind(-1), None)
            return CompletedSquare(*[fields[column] for column in self._columns])
        return self.coefficients_at(t).complete_square(normalize=self.normalize).to(dtype)

    def coefficients_at(self, t: Tensor) -> Coefficients:
        """Return the loss's `Coefficients` (Eq. 13) at times of any shape, computed in float64."""
        return coefficients(
            self.schedule,
            self.skip_set,
            t=t,
            tau=self.tau,
            estimator=self.estimator,
            max_c2=self.max_c2,
        )

    def _rows(self, name: str, t: Tensor, dtype: torch.dtype) -> Tensor:
        self.schedule.check_timesteps(t)
        table = getattr(self, name)
        if table.device != t.device or table.dtype != dtype:
            # The first call on another device or in float64, or after `.half()` rounded the table.
            table = self._tables[name].to(t.device, dtype)
            setattr(self, name, table)
        return read_table(table, t)

    @override
    def __repr__(self) -> str:
        options = [f"tau={self.tau}", f"estimator={self.estimator!r}"]
        if self.reduction != "mean":
            options.append(f"reduction={self.reduction!r}")
        if self.prediction_type != "epsilon":
            options.append(f"prediction_type={self.prediction_type!r}")
        if self.normalize:
            options.append("normalize=True")
        if self.max_c2 != DEFAULT_MAX_C2:
            options.append(f"max_c2={self.max_c2}")
        return f"SkipStepLoss({self.schedule!r}, {self.skip_set!r}, {', '.join(options)})"
