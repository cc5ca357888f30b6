"""`SkipStepLoss`: the loss as a module, with its tables made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from s2dm_loss._head import REDUCTIONS, Reduction, completed_square, placed_like
from s2dm_loss._loss_tables import LossTables
from s2dm_loss._tables import TabledModule
from s2dm_loss.checks import (
    FixedSettings,
    check_batch,
    check_choice,
    check_like,
    check_per_sample,
    describe,
)
from s2dm_loss.coefficients import (
    DEFAULT_MAX_C2,
    DEFAULT_TAU,
    ESTIMATORS,
    Coefficients,
    CompletedSquare,
    Estimator,
)
from s2dm_loss.functional import (
    LossTerms,
    along,
    check_prediction,
    completed_square_loss,
    draw_like,
    loss_dtype,
    loss_terms,
    read_skip_noise,
)
from s2dm_loss.output import (
    OutputSquare,
    RegressionTarget,
)
from s2dm_loss.prediction import PREDICTION_TYPES, PredictionType, read_output
from s2dm_loss.schedule import Schedule, check_schedule
from s2dm_loss.skip_set import Skips, SkipSet
from s2dm_loss.weighting import Weighting, read_weighting


class SkipStepLoss(FixedSettings, TabledModule):
    """The training loss of Skip-Step Diffusion Models (arXiv 2401.01520) for any network.

    >>> from s2dm_loss import NoiseSchedule, SkipStepLoss
    >>> criterion = SkipStepLoss(NoiseSchedule.linear(1000), skip_set=9)
    >>> criterion  # doctest: +ELLIPSIS
    SkipStepLoss(NoiseSchedule.linear(1000), SkipSet(9), tau=0.99, ...)
    >>> model = lambda x_t, t: torch.zeros_like(x_t)
    >>> x0 = torch.randn(8, 3, 32, 32)
    >>> loss = criterion(model, x0)  # draws t and noise; one model call
    >>> loss.shape
    torch.Size([])

    Three ways in: `criterion(model, x0)` does the whole step; `from_prediction` takes an ε̂ that a
    trainer has made, and `from_output` the output of a network that predicts anything else.

    It has no parameters, no buffers and no keys in a `state_dict`. Its tables follow the tensors it
    is given, so `.to(device)` is never needed; call it all the same before `torch.compile`, which
    should not trace the move. Its settings are fixed once it is made.
    """

    _fixed = frozenset(
        {"schedule", "skip_set", "tau", "estimator", "reduction", "prediction_type"}
        | {"weighting", "normalize", "max_c2"}
    )

    def __init__(
        self,
        schedule: Schedule,
        skip_set: Skips = 9,
        *,
        tau: float = DEFAULT_TAU,
        estimator: Estimator = "expected",
        reduction: Reduction = "mean",
        prediction_type: PredictionType = "epsilon",
        weighting: Weighting | None = None,
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
                "score".
            weighting: What the error of the noise counts at each t: a name such as "min_snr" or a
                fixed function of log SNR, see `s2dm_loss.weighting`. None is the paper's loss, and
                for a network that predicts something else the plain mean squared error of its
                output.
            normalize: Drop the weight A(t) and the constant, leaving mse(ε̂, target), which has the
                same minimiser and weighs every timestep alike.
            max_c2: Upper bound on c², on c² times what an error of the output counts the noise's
                (more than 1 for one other than the noise, at late t), and on c² times a weighting;
                see `coefficients` and `from_output`.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        super().__init__()
        check_choice("estimator", estimator, ESTIMATORS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        self.schedule: Schedule = check_schedule(schedule)
        self.skip_set: SkipSet = SkipSet.wrap(skip_set)
        self.tau = tau
        self.estimator: Estimator = estimator
        self.reduction: Reduction = reduction
        self.prediction_type: PredictionType = prediction_type
        self.weighting: Callable[[Tensor], Tensor] | None = read_weighting(weighting)
        self.normalize = normalize
        self.max_c2 = max_c2
        # Checks tau, max_c2, the skips and the weighting.
        self._tables = LossTables(
            self.schedule,
            self.skip_set,
            tau=tau,
            estimator=estimator,
            prediction_type=prediction_type,
            weighting=self.weighting,
            normalize=normalize,
            max_c2=max_c2,
        )

    @override
    def forward(
        self,
        model: Callable[..., Any],
        x0: Tensor,
        t: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        skip_noise: Tensor | None = None,
        weights: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Noise `x0`, call `model(x_t, t, **model_kwargs)` once, and return the loss.

        What is not given is drawn, in the order t, noise, skip_noise. For a network that predicts
        the noise it is the loss of `from_prediction`, for any other that of `from_output`.

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
        # torch 2.4's compiler cannot ask it of a function.
        if not torch.compiler.is_compiling() and isinstance(model, Tensor):
            raise TypeError(
                f"model must be callable, got {describe(model)}: a prediction that is made already "
                "goes to `from_prediction(eps_hat, noise, t)`"
            )
        check_batch("x0", x0)
        if t is None:
            t = self.schedule.draw_timesteps(x0.shape[0], device=x0.device, generator=generator)
        check_per_sample("t", t, "x0", x0)
        self.schedule.check_timesteps(t)
        noise = draw_like(x0, generator) if noise is None else check_like("noise", noise, "x0", x0)
        x_t = self._add_noise(x0, noise, t)
        # A copy, since it is the model's to overwrite, as x_t is.
        output = read_output(model(x_t, t.clone(), **(model_kwargs or {})))
        check_like("model output", output, "x0", x0)
        if weights is not None:
            check_per_sample("weights", weights, "x0", x0)
        zeta = read_skip_noise(self.estimator, skip_noise, "x0", x0, generator)
        if self.prediction_type == "epsilon":
            return self._loss_of_prediction(output, noise, t, zeta, weights)
        # From x_0 and ε, not from x_t, which is the model's to overwrite.
        square = self._output_square_at(t, loss_dtype(output, x0, noise))
        target = [square.on_noise, noise]
        if square.on_data is not None:
            target += [square.on_data, x0]
        return self._loss_of_output(output, square, target, zeta, weights)

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
            eps_hat: Predicted noise ε̂ of shape [B, ...].
            noise: The noise ε in x_t, of the same shape.
            t: Times of shape [B].
            skip_noise: ζ of the estimator "fresh", of the same shape; drawn if not given.
            weights: Per-sample weights of shape [B], multiplied in before the reduction.
            generator: Random stream of the drawn ζ.

        Returns:
            A scalar, or shape [B] with reduction "none"; float32, or float64 for float64 input.

        Raises:
            TypeError, ValueError: if an argument is not as said, or the loss was made for a network
                that predicts something else.
        """
        self._check_predicts_noise("from_prediction")
        check_prediction(eps_hat, noise, t, weights)
        zeta = read_skip_noise(self.estimator, skip_noise, "noise", noise, generator)
        return self._loss_of_prediction(eps_hat, noise, t, zeta, weights)

    def from_output(
        self,
        output: Tensor,
        target: Tensor,
        x_t: Tensor,
        t: Tensor,
        *,
        skip_noise: Tensor | None = None,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss on the scale of the network's own output, whatever it predicts.

        In the place of `mse(output, target)`, which it is at τ = 1. A squared error of another
        output is one of ε̂ = ratio · output + lift · x_t times a weight, mse(output, target) =
        mse(ε̂, ε) / ratio², and S²-DM keeps that weight. The constant of the loss, which no
        gradient sees, is left out.

        At a time without signal (ᾱ = 0) x_t is all noise, ε̂ = x_t, and no output can express a gain
        on it, so that c² <= max_c2 · ratio² holds besides c² <= max_c2: the loss goes smoothly to
        the plain one there.

        Args:
            output: The network's output, of shape [B, ...].
            target: What the plain loss compares it with, of the same shape.
            x_t: The noisy input that the network was given, of the same shape.
            t: Times of shape [B].
            skip_noise: ζ of the estimator "fresh", of the same shape; drawn if not given.
            weights: Per-sample weights of shape [B], multiplied in before the reduction.
            generator: Random stream of the drawn ζ.

        Returns:
            A scalar, or shape [B] with reduction "none"; float32, or float64 for float64 input.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        check_prediction(output, target, t, weights, ("output", "target"))
        square, regressed, zeta = self._regression(target, x_t, t, skip_noise, generator, output)
        return self._loss_of_output(output, square, regressed, zeta, weights)

    def regression_target(
        self,
        target: Tensor,
        x_t: Tensor,
        t: Tensor,
        *,
        skip_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RegressionTarget:
        """Return target and weight of `from_output`, for a trainer that keeps its own loss.

        `weight * trainers_loss(output, target)` has the gradient of `from_output` where the
        trainer's loss is a squared one; masks, Huber losses and the trainer's weights stay as they
        are, and the equivalence to S²-DM is then that of the squared part.

        Args:
            target: What the trainer compares the output with, of shape [B, ...].
            x_t: The noisy input that the network was given, of the same shape.
            t: Times of shape [B].
            skip_noise: ζ of the estimator "fresh", of the same shape; drawn if not given.
            generator: Random stream of the drawn ζ.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        check_batch("target", target)
        check_per_sample("t", t, "target", target)
        square, regressed, zeta = self._regression(target, x_t, t, skip_noise, generator)
        if zeta is not None:
            regressed += [square.on_skip_noise, zeta]
        terms = [
            along(scale, data) * data.to(scale.dtype)
            for scale, data in zip(regressed[::2], regressed[1::2], strict=True)
        ]
        return RegressionTarget(sum(terms[1:], start=terms[0]), square.weight)

    def terms(
        self, eps_hat: Tensor, noise: Tensor, t: Tensor, *, skip_noise: Tensor | None = None
    ) -> LossTerms:
        """Return the paper's two terms, each of shape [B].

        Both have the weighting in them, if there is one. They serve logging, and trainers whose
        plain loss is not mse(ε̂, ε): the gradient flows, so that such a trainer can add τ times its
        own loss and (1-τ) times the skip term. With the estimator "fresh" the noise ζ has to be
        given: the terms are those of one draw.

        Raises:
            TypeError, ValueError: as for `from_prediction`.
        """
        self._check_predicts_noise("terms")
        check_prediction(eps_hat, noise, t)
        self.schedule.check_timesteps(t)
        if self.estimator == "fresh" and skip_noise is None:
            raise ValueError("skip_noise must be given with the estimator 'fresh', got None")
        zeta = read_skip_noise(self.estimator, skip_noise, "noise", noise, None)
        tau, c, c2, weight = self._tables.terms.at(t, loss_dtype(eps_hat, noise))
        simple, skip, _ = loss_terms(eps_hat, noise, Coefficients(tau, c, c2, self.estimator), zeta)
        return LossTerms(weight * simple, weight * skip, tau)

    def coefficients_at(self, t: Tensor) -> Coefficients:
        """Return the loss's `Coefficients` (Eq. 13) at times of any shape, computed in float64.

        With the bounds that the prediction type and the weighting put on c², so that `gain` is the
        s(t) that the network learns.
        """
        self.schedule.check_timesteps(t)
        return self._tables.coefficients_at(t)

    def _add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        a, b = placed_like(x0, *self._tables.path.at(t, loss_dtype(x0, noise)))
        return (along(a, x0) * x0 + along(b, x0) * noise).to(x0.dtype)

    def _loss_of_prediction(
        self, eps_hat: Tensor, noise: Tensor, t: Tensor, zeta: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        self.schedule.check_timesteps(t)
        square = CompletedSquare(*self._tables.square.at(t, loss_dtype(eps_hat, noise)))
        return completed_square_loss(eps_hat, noise, square, zeta, self.reduction, weights)

    def _regression(
        self,
        target: Tensor,
        x_t: Tensor,
        t: Tensor,
        skip_noise: Tensor | None,
        generator: torch.Generator | None,
        *more: Tensor,
    ) -> tuple[OutputSquare, list[Tensor], Tensor | None]:
        """Return what `from_output` and `regression_target` share."""
        check_like("x_t", x_t, "target", target)
        self.schedule.check_timesteps(t)
        zeta = read_skip_noise(self.estimator, skip_noise, "target", target, generator)
        square = self._output_square_at(t, loss_dtype(target, x_t, *more))
        regressed = [square.on_target, target]
        if square.on_input is not None:
            regressed += [square.on_input, x_t]
        return square, regressed, zeta

    def _loss_of_output(
        self,
        output: Tensor,
        square: OutputSquare,
        regressed: list[Tensor],
        zeta: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        if zeta is not None:
            regressed = [*regressed, square.on_skip_noise, zeta]
        return completed_square(
            output,
            square.weight,
            None,
            None,
            *regressed,
            reduction=self.reduction,
            weights=weights,
        )

    def _output_square_at(self, t: Tensor, dtype: torch.dtype) -> OutputSquare:
        return OutputSquare(*self._tables.output.at(t, dtype))

    def _check_predicts_noise(self, method: str) -> None:
        if self.prediction_type != "epsilon":
            raise ValueError(
                f"{method} takes a noise prediction, and this loss was made for prediction_type "
                f"{self.prediction_type!r}: give the network's output to `from_output(output, "
                "target, x_t, t)`"
            )

    @override
    def _copy_tables(self, device: torch.device) -> None:
        self._tables.copy_to(device)

    @override
    def __repr__(self) -> str:
        options = [f"tau={self.tau}", f"estimator={self.estimator!r}"]
        if self.reduction != "mean":
            options.append(f"reduction={self.reduction!r}")
        if self.prediction_type != "epsilon":
            options.append(f"prediction_type={self.prediction_type!r}")
        if self.weighting is not None:
            options.append(f"weighting={self.weighting!r}")
        if self.normalize:
            options.append("normalize=True")
        if self.max_c2 != DEFAULT_MAX_C2:
            options.append(f"max_c2={self.max_c2}")
        return f"SkipStepLoss({self.schedule!r}, {self.skip_set!r}, {', '.join(options)})"
