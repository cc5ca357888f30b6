"""The loss in openai/guided-diffusion: one line in `image_train.py` or `super_res_train.py`.

    -        diffusion=diffusion,
    +        diffusion=skip_step(diffusion, skip_set=49),

The trainer is not imported: a diffusion object is known by its attributes, so a vendored copy of
the package works as the installed one does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from s2dm_loss import NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.adapters import SETTLED, changed_copy, check_options, check_plain, reduce_changed
from s2dm_loss.checks import describe
from s2dm_loss.loss import LossOptions
from s2dm_loss.prediction import PredictionType
from s2dm_loss.schedule import Schedule
from s2dm_loss.skip_set import Skips

__all__ = ["SkipStepMixin", "skip_step"]

Diffusion = TypeVar("Diffusion")


def skip_step(
    diffusion: Diffusion,
    skip_set: Skips,
    *,
    original_timesteps: bool = False,
    **options: Unpack[LossOptions],
) -> Diffusion:
    """Return a copy of `diffusion` whose `training_losses` is the S²-DM loss.

    Everything else of it, the samplers among it, is inherited unchanged. Its terms, each of shape
    [N], are those of the plain loss and one more:

        mse    the plain loss: in ε, or in x_0 with `predict_xstart`
        vb     the variance's own loss, untouched, where the variance is learned
        skip   what S²-DM adds to the plain loss; 0 where no skip is valid
        loss   mse + skip (+ vb)

    mse + skip is the loss of `SkipStepLoss.from_output`. The model is called once, and with the
    estimators "expected" and "shared" no further random number is drawn.

    Args:
        diffusion: A `GaussianDiffusion` or `SpacedDiffusion` of guided-diffusion.
        skip_set: The skips, as for `SkipStepLoss`; by default in timesteps of `diffusion`, which
            are respaced ones after `--timestep_respacing`.
        original_timesteps: Read the skips in timesteps of the schedule before respacing. An
            earlier timestep that respacing left out stands for the latest one kept before it.
        options: Those of `SkipStepLoss`, without `weighting` and what the trainer settles itself.

    Raises:
        TypeError: if `diffusion` is not a diffusion of guided-diffusion.
        ValueError: if its loss is a variational bound (`use_kl`) or its model predicts x_{t-1}, or
            if it has the S²-DM loss already.
    """
    _check_diffusion(diffusion)
    plain: Any = diffusion
    if original_timesteps:
        skip_set = _OriginalTimesteps(skip_set, plain)
    criterion = SkipStepLoss(
        NoiseSchedule.from_alphas_cumprod(plain.alphas_cumprod),
        skip_set,
        **check_options(options, _REFUSED),
        reduction="none",
        prediction_type=_PREDICTS[plain.model_mean_type.name],
    )
    return changed_copy(diffusion, SkipStepMixin, skip_step_loss=criterion)


class SkipStepMixin:
    """What `skip_step` puts in front of a diffusion's class."""

    skip_step_loss: SkipStepLoss
    _calls_to_check: int = 100

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Tensor | None = None,
        *,
        skip_noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss and its terms, each of shape [N]; see `skip_step`.

        Args:
            model: The model, called once.
            x_start: Clean data of shape [N, C, ...].
            t: Integer timesteps of this diffusion, of shape [N].
            model_kwargs: Further arguments of the model.
            noise: ε of the shape of `x_start`; drawn if not given.
            skip_noise: ξ of the estimator "fresh", of the same shape; drawn if not given.
        """
        this: Any = self
        plain: Any = super()
        criterion = self.skip_step_loss
        criterion.schedule.check_timesteps(t)
        if noise is None:
            noise = torch.randn_like(x_start)

        recorder = _Recorder(model)
        called: Any = recorder
        if hasattr(this, "_wrap_model") and this._wrap_model(model) is model:
            # It maps t already. SpacedDiffusion would not know it behind the recorder and map t
            # a second time, so the recorder goes inside.
            called = copy.copy(model)
            recorder.model, called.model = called.model, recorder
        terms = plain.training_losses(called, x_start, t, model_kwargs=model_kwargs, noise=noise)

        output = recorder.output
        if this.model_var_type.name in _LEARNED_VARIANCES:
            output = output[:, : x_start.shape[1]]
        target = noise if criterion.prediction_type == "epsilon" else x_start
        if not torch.compiler.is_compiling() and not output.is_meta and self._calls_to_check:
            self._calls_to_check -= 1
            _check_terms(type(self).__name__, terms, output.detach(), target)
        squared = criterion.from_output(output, target, t, recorder.x_t, skip_noise=skip_noise)
        # Elsewhere, and at τ = 1, the loss stays the trainer's own, bit for bit.
        acts = criterion.coefficients_at(t).tau < 1
        loss = torch.where(acts, squared, terms["mse"])
        skip = loss - terms["mse"]
        if "vb" in terms:
            loss = loss + terms["vb"]
        return {**terms, "skip": skip, "loss": loss}

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.skip_step_loss!r})"

    # The class is made at run time, so pickle would not find it by name.
    __reduce__ = reduce_changed


class _Recorder:
    """Calls the model for the trainer's loss and keeps what went in and what came out."""

    x_t: Tensor
    output: Tensor

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model = model

    def __call__(self, x_t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.x_t = x_t
        self.output = self.model(x_t, *args, **kwargs)
        return self.output


def _check_terms(name: str, terms: Mapping[str, Tensor], output: Tensor, target: Tensor) -> None:
    """Raise ValueError if a copy of the trainer weighs its squared error, or adds to it.

    Asked in the first calls, since a weight may be 1 at most timesteps, and not in all, since the
    host waits for the answer.
    """
    plain = (target - output).float().square().flatten(1).mean(1)
    for what, found, expected in (
        ("terms['mse']", terms["mse"], plain),
        ("terms['loss']", terms["loss"], terms["mse"] + terms.get("vb", 0.0)),
    ):
        found, expected = found.detach().float(), torch.as_tensor(expected).detach().float()
        if not torch.allclose(found, expected, rtol=0.01, equal_nan=True):
            raise ValueError(
                f"diffusion must have the plain mse, and the variational bound beside it, got a "
                f"{name} whose {what} is {found.tolist()[:4]} where that is "
                f"{expected.tolist()[:4]}: its weights, masks or further terms would be lost; "
                "`SkipStepLoss.regression_target` puts the loss into its own training_losses"
            )


class _OriginalTimesteps(SkipSet):
    """Skips of the schedule before respacing, between the timesteps that respacing kept."""

    offsets = ()

    def __init__(self, skip_set: Skips, diffusion: Any) -> None:
        self.skip_set = SkipSet.wrap(skip_set)
        num_timesteps: int = diffusion.num_timesteps
        kept: Sequence[int] = getattr(diffusion, "timestep_map", range(num_timesteps))
        self.kept = torch.tensor(kept, device="cpu")
        # Only the length of this schedule is read: ᾱ at the timesteps left out is not known.
        original_num_steps: int = getattr(diffusion, "original_num_steps", num_timesteps)
        self.original = NoiseSchedule(torch.zeros(original_num_steps))

    @override
    def check(self, schedule: Schedule) -> None:
        self.skip_set.check(self.original)

    @override
    def earlier(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        kept = self.kept.to(t.device)
        earlier, valid = self.skip_set.earlier(kept[t], self.original)
        index = torch.searchsorted(kept, earlier, right=True) - 1
        valid = valid & (index >= 0)
        return torch.where(valid, index, t), valid

    @override
    def _key(self) -> tuple[object, ...]:
        return (self.skip_set, len(self.original.timesteps), *self.kept.tolist())

    @override
    def __repr__(self) -> str:
        return f"{self.skip_set!r} in original timesteps"


_PREDICTS: dict[str, PredictionType] = {"EPSILON": "epsilon", "START_X": "sample"}
_REFUSED = {
    **SETTLED,
    "weighting": (
        "where no skip is valid the loss is the trainer's own mse, which has no weighting; "
        "`SkipStepLoss.regression_target` puts a weighted loss into its training_losses"
    ),
}
_LEARNED_VARIANCES = ("LEARNED", "LEARNED_RANGE")
_ENUMS = ("loss_type", "model_mean_type", "model_var_type")
_ATTRIBUTES = ("training_losses", "alphas_cumprod", "num_timesteps", *_ENUMS)


def _check_diffusion(diffusion: Any) -> None:
    kind = "a GaussianDiffusion or SpacedDiffusion of guided-diffusion"
    check_plain("diffusion", diffusion, SkipStepMixin, kind, _ATTRIBUTES)
    if unnamed := [name for name in _ENUMS if not hasattr(getattr(diffusion, name), "name")]:
        raise TypeError(
            f"diffusion must have a {unnamed[0]} of guided-diffusion's, an Enum, got "
            f"{describe(getattr(diffusion, unnamed[0]))}"
        )
    if diffusion.loss_type.name not in ("MSE", "RESCALED_MSE"):
        raise ValueError(
            "diffusion must train on MSE or RESCALED_MSE (use_kl=False), got loss_type "
            f"{diffusion.loss_type.name}: a variational bound has no squared error to put the "
            "skip term beside"
        )
    if diffusion.model_mean_type.name not in _PREDICTS:
        raise ValueError(
            "the model of diffusion must predict EPSILON or START_X, got model_mean_type "
            f"{diffusion.model_mean_type.name}: to read ε̂ from it would divide by β_t"
        )
