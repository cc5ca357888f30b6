"""`SkipStepLoss`: the loss as a module, with its tables made once.

    L = A mse(output, regression target)

A and the regression target are functions of t (`coefficients`), looked up in tables (`tables`)
and put on the data by `head`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from s2dm_loss._torch import replicated_like, typed_as
from s2dm_loss.checks import (
    FixedSettings,
    check_batch,
    check_choice,
    check_like,
    check_per_sample,
    check_switch,
    describe,
)
from s2dm_loss.coefficients import (
    DEFAULT_MAX_C2,
    DEFAULT_TAU,
    Coefficients,
    Estimator,
    GainOptions,
)
from s2dm_loss.head import REDUCTIONS, Reduction, along
from s2dm_loss.loss_table import LossTable, draw_like
from s2dm_loss.prediction import (
    PredictionType,
    check_prediction_type,
    read_output,
    read_prediction_type,
)
from s2dm_loss.schedule import Schedule, check_schedule
from s2dm_loss.skip_set import Skips, SkipSet
from s2dm_loss.tables import TabledModule
from s2dm_loss.terms import LossTerms
from s2dm_loss.timesteps import Timesteps, draw, read_timesteps
from s2dm_loss.weighting import Weighting, read_weighting


class LossOptions(GainOptions, total=False):
    """The options of `SkipStepLoss`, which says what they are, for functions that hand them on."""

    reduction: Reduction
    normalize: bool
    timesteps: Timesteps


class RegressionTarget(NamedTuple):
    """What a trainer's own loss has to regress on, and be multiplied by, to be this loss.

    Attributes:
        target: The changed target, of shape [B, ...]; float32, or float64 for float64 input.
        weight: What each sample's loss is multiplied by, of shape [B].
    """

    target: Tensor
    weight: Tensor


class SkipStepLoss(FixedSettings, TabledModule):
    """The training loss of Skip-Step Diffusion Models (arXiv 2401.01520) for any network.

    >>> from s2dm_loss import NoiseSchedule, SkipStepLoss
    >>> criterion = SkipStepLoss(NoiseSchedule.linear(1000), skip_set=49)
    >>> criterion  # doctest: +ELLIPSIS
    SkipStepLoss(NoiseSchedule.linear(1000), SkipSet(49), tau=0.99, ...)
    >>> model = lambda x_t, t: torch.zeros_like(x_t)
    >>> x0 = torch.randn(8, 3, 32, 32)
    >>> loss = criterion(model, x0)  # draws t and noise; one model call
    >>> loss.shape
    torch.Size([])

    `criterion(model, x0)` does the whole step; `from_output` takes the output that a trainer has
    made. Both are A · mse(output, regression target): 0 where the two are equal.

    It has no parameters, no buffers and no keys in a `state_dict`. Its table follows the tensors it
    is given; call `.to(device)` before `torch.compile`, which should not trace the move. Its
    settings are fixed once it is made.
    """

    def __init__(
        self,
        schedule: Schedule,
        skip_set: Skips,
        *,
        tau: float = DEFAULT_TAU,
        estimator: Estimator = "expected",
        reduction: Reduction = "mean",
        prediction_type: PredictionType | None = None,
        weighting: Weighting | None = None,
        normalize: bool = False,
        max_c2: float = DEFAULT_MAX_C2,
        timesteps: Timesteps = "uniform",
    ) -> None:
        """Make the loss.

        Args:
            schedule: The noise schedule that the model trains on.
            skip_set: Which earlier time each t is paired with: an int or several (timesteps), a
                float or several (continuous time), or a `SkipSet`. On 1,000 timesteps take 49;
                elsewhere `SkipSet.for_sampling_steps(20)` means about the same. The paper's S²-DMⁿ
                has n = skip + 1, and its code 9 by default.
            tau: τ in [0, 1], the share of the plain loss; 1 is the plain loss.
            estimator: What the skip term is compared with: "expected", the exact expectation over
                fresh noise (no second draw, the least variance); "fresh", the released code draw
                for draw; "shared", the equation as printed.
            reduction: "mean" or "sum" over the batch, or "none" for a loss of shape [B]. The data
                axes are always averaged.
            prediction_type: What `model` predicts: "epsilon", "v_prediction", "sample", "flow",
                "velocity" or "score". "epsilon" if not given; flow matching has to give it.
            weighting: w(t) on the squared error of the noise: a name such as "min_snr" or a fixed
                function of log SNR, see `s2dm_loss.weighting`. None is that of mse(output, target).
            normalize: Drop the weight A(t): the same minimiser, every timestep weighed alike.
            max_c2: Upper bound on c², in ε and on the scale of the output. For ε the default
                changes nothing on the linear and scaled-linear schedules for k <= 100, where
                c² < 7. Where ᾱ comes near 0 (cosine, zero terminal SNR, flow matching) c² would
                reach 1e5 or infinity: bounded, no timestep weighs more than 1.99 and no gain is
                below 0.497 at τ = 0.99. `math.inf` takes the bound away.
            timesteps: How `criterion(model, x0)` draws t: "uniform", "stratified" (the same
                expectation, less variance) or a function; see `s2dm_loss.timesteps`.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        check_switch("normalize", normalize)
        self.schedule: Schedule = check_schedule(schedule)
        prediction_type = read_prediction_type(prediction_type, self.schedule)
        check_prediction_type(prediction_type, self.schedule, weighted=weighting is not None)
        self.skip_set: SkipSet = SkipSet.wrap(skip_set)
        self.tau = tau
        self.estimator: Estimator = estimator
        self.reduction: Reduction = reduction
        self.prediction_type: PredictionType = prediction_type
        self.weighting: Callable[[Tensor], Tensor] | None = read_weighting(weighting)
        self.normalize = normalize
        self.max_c2 = max_c2
        self.timesteps: Timesteps = read_timesteps(timesteps)
        # Checks tau, the estimator, max_c2, the skips and the weighting.
        self._table = LossTable(
            self.schedule,
            self.skip_set,
            tau=tau,
            estimator=estimator,
            reduction=reduction,
            prediction_type=prediction_type,
            weighting=self.weighting,
            normalize=normalize,
            max_c2=max_c2,
        )

    _fixed = frozenset(inspect.signature(__init__).parameters)

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

        What is not given is drawn, in the order t, noise, skip_noise.

        Args:
            model: Returns its output, of shape [B, ...], alone, first in a tuple, or as `.sample`.
            x0: Clean data of shape [B, ...].
            t: Times of shape [B]; drawn as `timesteps` says if not given.
            noise: ε of the shape of `x0`.
            skip_noise: ξ of the estimator "fresh", of the shape of `x0`.
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
                "goes to `from_output(output, target, t, x_t)`"
            )
        check_batch("x0", x0)
        if weights is not None:
            check_per_sample("weights", weights, "x0", x0)
        if t is None:
            t, drawn_weights = draw(
                self.timesteps, self.schedule, len(x0), device=x0.device, generator=generator
            )
            if drawn_weights is not None:
                weights = drawn_weights if weights is None else weights * drawn_weights
        check_per_sample("t", t, "x0", x0)
        self.schedule.check_timesteps(t)
        noise = draw_like(x0, generator) if noise is None else check_like("noise", noise, "x0", x0)
        a, b = replicated_like(x0, *self._table.path(t, x0, noise))
        x_t = (a * x0 + b * noise).to(x0.dtype)
        # A copy, since it is the model's to overwrite, as x_t is.
        output = read_output(model(x_t, t.clone(), **(model_kwargs or {})))
        check_like("model output", output, "x0", x0)
        xi = self._table.skip_noise(skip_noise, "x0", x0, generator)
        # From x_0 and ε, not from x_t, which is the model's to overwrite.
        return self._table.loss("data", output, t, (noise, x0, xi), weights)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self) -> None: ...  # noqa: D102 - that of `forward`

    def from_output(
        self,
        output: Tensor,
        target: Tensor,
        t: Tensor,
        x_t: Tensor | None = None,
        *,
        skip_noise: Tensor | None = None,
        weights: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss of an output that the trainer has made, in place of its `mse_loss`.

        A · mse(output, regression target) on the output's own scale, whatever it predicts: at τ = 1
        it is mse(output, target).

        Args:
            output: The network's output, of shape [B, ...].
            target: What the plain loss compares it with, of the same shape.
            t: Times of shape [B].
            x_t: The noisy input that the network was given, of the same shape. Required where the
                target holds data ("v_prediction", "sample", "flow", "velocity").
            skip_noise: ξ of the estimator "fresh", of the same shape; drawn if not given.
            weights: Per-sample weights of shape [B], multiplied in before the reduction.
            generator: Random stream of the drawn ξ.

        Returns:
            A scalar, or shape [B] with reduction "none"; float32, or float64 for float64 input.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        self._table.check_data(target, t, x_t, output)
        if weights is not None:
            check_per_sample("weights", weights, "target", target)
        xi = self._table.skip_noise(skip_noise, "target", target, generator)
        return self._table.loss("target", output, t, (target, x_t, xi), weights)

    def regression_target(
        self,
        target: Tensor,
        t: Tensor,
        x_t: Tensor | None = None,
        *,
        skip_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> RegressionTarget:
        """Return target and weight of `from_output`, for a trainer that keeps its own loss.

        `weight * trainers_loss(output, target)` has the gradient of `from_output` if the trainer's
        loss is a squared one. Masks, Huber losses and the trainer's weights stay as they are.

        Args:
            target: What the trainer compares the output with, of shape [B, ...].
            t: Times of shape [B].
            x_t: The noisy input that the network was given, as for `from_output`.
            skip_noise: ξ of the estimator "fresh", of the same shape; drawn if not given.
            generator: Random stream of the drawn ξ.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        self._table.check_data(target, t, x_t, target)  # there is no output yet
        xi = self._table.skip_noise(skip_noise, "target", target, generator)
        weight, scales, data = self._table.parts(t, (target, x_t, xi))
        weight, *scales = replicated_like(target, weight, *scales)
        terms = [along(scale, part) * part for scale, part in zip(scales, data, strict=True)]
        return RegressionTarget(sum(terms[1:], start=terms[0]).to(weight.dtype), weight)

    def terms(
        self, eps_hat: Tensor, noise: Tensor, t: Tensor, *, skip_noise: Tensor | None = None
    ) -> LossTerms:
        """Return the paper's own two terms and their sum (Eq. 13), each of shape [B].

        For logging, and for trainers that add (1-τ) times the skip term to τ times a loss of their
        own: the gradient flows.

        Args:
            eps_hat: Predicted noise ε̂, of shape [B, ...].
            noise: The noise ε in x_t, of the same shape.
            t: Times of shape [B].
            skip_noise: ξ of the estimator "fresh", which has to be given.

        Raises:
            TypeError, ValueError: if an argument is not as said, or the loss was made for a network
                that predicts something else.
        """
        return self._table.terms(eps_hat, noise, t, skip_noise)

    def coefficients_at(self, t: Tensor) -> Coefficients:
        """Return the loss's `Coefficients` (Eq. 13) at times of any shape, in float64.

        With the bounds that the prediction type and the weighting put on c², so that `gain` is the
        s(t) that the network learns.
        """
        self.schedule.check_timesteps(t)
        return self._table.coefficients_at(t)

    @override
    def _copy_tables(self, device: torch.device) -> None:
        self._table.copy_to(device)

    @override
    def __repr__(self) -> str:
        options = ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name, option in inspect.signature(SkipStepLoss).parameters.items()
            if option.kind is option.KEYWORD_ONLY
            # The last by its value, since its default is None.
            and (
                name in ("tau", "estimator", "prediction_type")
                or getattr(self, name) != option.default
            )
        )
        return f"{type(self).__name__}({self.schedule!r}, {self.skip_set!r}, {options})"
