"""The loss in NVlabs/edm and edm2: one line in `training/training_loop.py`.

         loss_fn = dnnlib.util.construct_class_by_name(**loss_kwargs)
    +    loss_fn = skip_step(loss_fn, SkipSet.for_sampling_steps(20))

The trainer's own loss runs, on a changed output of the denoiser; EDM2's log-variance head keeps its
place in it. The trainers are not imported.

Their x_t is x_0 + σ ε. Time is the sampler's own ramp, on which its steps are even,
t = (σ^(1/ρ) - σ_min^(1/ρ)) / (σ_max^(1/ρ) - σ_min^(1/ρ)) (arXiv 2206.00364, Eq. 5).
"""

from __future__ import annotations

import copy
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from s2dm_loss.adapters import SETTLED, changed_copy, check_options, check_plain, reduce_changed
from s2dm_loss.adapters.changed_output import changed_output, check_tau
from s2dm_loss.checks import describe
from s2dm_loss.continuous import ContinuousSchedule
from s2dm_loss.head import along
from s2dm_loss.loss import LossOptions, SkipStepLoss
from s2dm_loss.skip_set import Skips

__all__ = ["SkipStepMixin", "skip_step"]

Loss = TypeVar("Loss")

_REFUSED = {**SETTLED, "weighting": "the trainer's own λ(σ) weighs its loss"}


def skip_step(
    loss_fn: Loss,
    skip_set: Skips,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    **options: Unpack[LossOptions],
) -> Loss:
    """Return a copy of a trainer's `loss_fn` that has the S²-DM loss, called as the trainer's is.

    A snapshot that pickles it holds the trainer's own loss, so that no reader of it needs this
    library; a checkpoint has the same keys.

    Args:
        loss_fn: An `EDMLoss`, `VPLoss`, `VELoss` or `EDM2Loss`, or another squared error of
            `net(x_0 + σ ε, σ, ...)`.
        skip_set: The skips, in units of the ramp: `SkipSet.for_sampling_steps(20)` is 1/20 of it.
        sigma_min: The sampler's smallest σ; one below it is held there, where no skip is valid.
        sigma_max: The sampler's largest σ; one above it is held there.
        rho: The sampler's ρ.
        options: Those of `SkipStepLoss`, without `weighting` and what the trainer settles itself. τ
            lies in (0, 1]; 1 is the trainer's own loss, bit for bit.

    Raises:
        TypeError, ValueError: if an argument is not as said.
    """
    check_plain("loss_fn", loss_fn, SkipStepMixin)
    call = getattr(type(loss_fn), "__call__", None)  # noqa: B004 - of a class of its own
    if not isinstance(call, FunctionType):
        raise TypeError(
            "loss_fn must be an object with a __call__, as the trainers' are, such as EDMLoss(), "
            f"got {describe(loss_fn)}"
        )
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
        **check_options(options, _REFUSED),
        prediction_type="sample",
    )
    check_tau(criterion.tau)
    return changed_copy(loss_fn, SkipStepMixin, skip_step_loss=criterion, skip_step_ramp=ramp)


_OURS = ("skip_step_loss", "skip_step_ramp")


class SkipStepMixin:
    """What `skip_step` puts in front of a loss's class."""

    skip_step_loss: SkipStepLoss
    skip_step_ramp: _Ramp

    def __call__(self, net: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of each element; the arguments are those of the trainer's loss.

        Args:
            net: The denoiser, called once; returns D or, with a log-variance head, (D, log σ²).
            args: Further arguments of the trainer's loss, the images among them.
            kwargs: The same by name.
        """
        plain: Any = super()
        weights: list[Tensor] = []
        log_variances: list[Tensor] = []

        def changed(x_t: Tensor, sigma: Tensor, *more: Any, **options: Any) -> Any:
            output = net(x_t, sigma, *more, **options)
            denoised, *log_variance = output if isinstance(output, tuple) else (output,)
            if weights or len(log_variance) > 1:
                raise ValueError(
                    "loss_fn must call net once, for D or (D, log σ²), got "
                    + ("a second call" if weights else f"{1 + len(log_variance)} outputs")
                )
            t = self.skip_step_ramp.time_of(sigma.reshape(-1).float().expand(len(x_t)))
            denoised, weight = changed_output(self.skip_step_loss, denoised, t, x_t)
            weights.append(weight)
            log_variances.extend(log_variance)
            return (denoised, *log_variance) if log_variance else denoised

        loss: Tensor = plain.__call__(changed, *args, **kwargs)
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
        return {name: value for name, value in vars(self).items() if name not in _OURS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the state of the trainer's own loss."""
        vars(self).update(state)

    def __copy__(self) -> Any:
        restore, parts = reduce_changed(self)
        return restore(*parts)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        restore, (*classes, state) = reduce_changed(self)
        return restore(*classes, copy.deepcopy(state, memo))

    @override
    def __reduce__(self) -> Any:
        plain: Any = object.__new__(type(self).__bases__[1])
        vars(plain).update(self.state_dict())
        return copy.copy, (plain,)  # the standard library's, as a reader has nothing else

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.skip_step_loss!r})"


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
