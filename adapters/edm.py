"""The loss in NVlabs/edm and edm2: one line in `training/training_loop.py`.

         loss_fn = dnnlib.util.construct_class_by_name(**loss_kwargs)
    +    loss_fn = skip_step(loss_fn, skip_set=1/17)

The trainer's own loss runs, on a changed output of the denoiser; EDM2's log-variance head keeps its
place in it. The trainers are not imported.

Their x_t is x_0 + σ ε. Time is the sampler's own ramp, on which its steps are even,
t = (σ^(1/ρ) - σ_min^(1/ρ)) / (σ_max^(1/ρ) - σ_min^(1/ρ)) (arXiv 2206.00364, Eq. 5).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from s2dm_loss.adapters.changed_output import changed_output, check_tau
from s2dm_loss.checks import describe
from s2dm_loss.coefficients import DEFAULT_MAX_C2, DEFAULT_TAU, Estimator
from s2dm_loss.continuous import ContinuousSchedule
from s2dm_loss.functional import along
from s2dm_loss.loss import SkipStepLoss
from s2dm_loss.skip_set import Skips

__all__ = ["SkipStepDenoiserLoss", "skip_step"]


def skip_step(
    loss_fn: Any,
    skip_set: Skips,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    tau: float = DEFAULT_TAU,
    estimator: Estimator = "expected",
    max_c2: float = DEFAULT_MAX_C2,
) -> SkipStepDenoiserLoss:
    """Return the S²-DM loss in the place of a trainer's `loss_fn`, called as it is.

    A snapshot that pickles it holds the trainer's own loss, so that no reader of it needs this
    library; a checkpoint has the same keys.

    Args:
        loss_fn: An `EDMLoss`, `VPLoss`, `VELoss` or `EDM2Loss`, or another squared error of
            `net(x_0 + σ ε, σ, ...)`.
        skip_set: The skips, in units of the ramp: 1 / (S-1) is a jump of a sampler with S steps.
        sigma_min: The sampler's smallest σ; one below it is held there, where no skip is valid.
        sigma_max: The sampler's largest σ; one above it is held there.
        rho: The sampler's ρ.
        tau: τ in (0, 1]; 1 is the trainer's own loss, bit for bit.
        estimator: "expected", "fresh" or "shared".
        max_c2: Upper bound on c²; see `SkipStepLoss.from_output`.

    Raises:
        TypeError, ValueError: if an argument is not as said.
    """
    if isinstance(loss_fn, SkipStepDenoiserLoss) or not callable(loss_fn):
        raise TypeError(f"loss_fn must be the trainer's own loss, got a {type(loss_fn).__name__}")
    check_tau(tau)
    if not 0 < sigma_min < sigma_max or not rho > 0:
        raise ValueError(
            "sigma_min, sigma_max and rho must satisfy 0 < sigma_min < sigma_max and rho > 0, got "
            f"{sigma_min}, {sigma_max} and {rho}"
        )
    ramp = _Ramp(sigma_min, sigma_max, rho)
    name = f"EDM({sigma_min}, {sigma_max}, rho={rho})"
    criterion = SkipStepLoss(
        ContinuousSchedule.from_alpha_sigma(ramp, name=name),
        skip_set,
        tau=tau,
        estimator=estimator,
        prediction_type="sample",
        max_c2=max_c2,
    )
    return SkipStepDenoiserLoss(loss_fn, criterion, ramp)


class SkipStepDenoiserLoss:
    """What `skip_step` returns: the trainer's loss with a changed output of the denoiser."""

    def __init__(self, plain: Any, criterion: SkipStepLoss, ramp: _Ramp) -> None:
        """Keep the trainer's loss, the criterion, and the ramp that gives the time of a σ."""
        self.plain: Any = plain
        self.criterion: SkipStepLoss = criterion
        self.ramp: _Ramp = ramp

    def __call__(self, net: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of each element; the arguments are those of the trainer's loss.

        Args:
            net: The denoiser, called once; returns D or, with a log-variance head, (D, log σ²).
            args: Further arguments of the trainer's loss, the images among them.
            kwargs: The same by name.
        """
        weights: list[Tensor] = []
        log_variances: list[Tensor] = []

        def changed(x_t: Tensor, sigma: Tensor, *more: Any, **options: Any) -> Any:
            output = net(x_t, sigma, *more, **options)
            denoised, *log_variance = output if isinstance(output, tuple) else (output,)
            t = self.ramp.time_of(sigma.reshape(-1).float().expand(len(x_t)))
            denoised, weight = changed_output(self.criterion, denoised, x_t, t)
            weights.append(weight)
            log_variances.extend(log_variance)
            return (denoised, *log_variance) if log_variance else denoised

        loss: Tensor = self.plain(changed, *args, **kwargs)
        if loss.shape[:1] != weights[-1].shape:
            raise ValueError(
                "loss_fn must return the squared error of each sample, of shape "
                f"[{len(weights[-1])}, ...], got {describe(loss)}: each has a weight of its own"
            )
        weight = along(weights[-1], loss)
        if not log_variances:
            return weight * loss
        # EDM2: error / exp(log σ²) + log σ², of which the error alone is weighed.
        return weight * loss + (1 - weight) * log_variances[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the trainer's own loss, which is all that a checkpoint holds."""
        return dict(vars(self.plain))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the state of the trainer's own loss."""
        vars(self.plain).update(state)

    def __copy__(self) -> SkipStepDenoiserLoss:
        return type(self)(self.plain, self.criterion, self.ramp)

    def __deepcopy__(self, memo: dict[int, Any]) -> SkipStepDenoiserLoss:
        parts = (self.plain, self.criterion, self.ramp)
        return type(self)(*copy.deepcopy(parts, memo))

    @override
    def __reduce__(self) -> Any:
        return copy.copy, (self.plain,)  # the standard library's, as a reader has nothing else

    @override
    def __repr__(self) -> str:
        return f"SkipStepDenoiserLoss({type(self.plain).__name__}, {self.criterion!r})"


class _Ramp:
    """The sampler's σ as a path in t, and back."""

    def __init__(self, sigma_min: float, sigma_max: float, rho: float) -> None:
        self.low: float = sigma_min ** (1 / rho)
        self.high: float = sigma_max ** (1 / rho)
        self.rho: float = rho

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), (self.low + t * (self.high - self.low)) ** self.rho

    def time_of(self, sigma: Tensor) -> Tensor:
        t: Tensor = (sigma ** (1 / self.rho) - self.low) / (self.high - self.low)
        return t.clamp(0, 1)
