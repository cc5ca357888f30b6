"""The loss in yang-song/score_sde_pytorch: one call in `run_lib.py`, the training one.

    -  train_step_fn = losses.get_step_fn(sde, train=True, ...
    +  train_step_fn = get_step_fn(sde, train=True, skip_set=49, ...

The functions have the names, arguments and defaults of the trainer's `losses.py`. Nothing of the
trainer is imported: its module names (`losses`, `models`, `utils`) are those of other trainers as
well, so an SDE is known by the name of its class.

What the trainer's networks put out, and the ε̂ in it, with σ the standard deviation of x_t:

    VPSDE, subVPSDE   out = ε̂        labels 999 t
    VESDE             out = -ε̂ / σ   labels σ
    DDPM loss         out = ε̂        integer labels
    SMLD loss         out = -ε̂ / σ   integer labels, σ descending

With continuous=False a VPSDE's labels are (N-1) t, and a VESDE's the index of σ, descending.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.adapters import SETTLED, check_options
from s2dm_loss.head import along
from s2dm_loss.loss import LossOptions
from s2dm_loss.schedule import Schedule
from s2dm_loss.skip_set import Skips

__all__ = ["get_ddpm_loss_fn", "get_sde_loss_fn", "get_smld_loss_fn", "get_step_fn"]

LossFn = Callable[[nn.Module, Tensor], Tensor]

_REFUSED = {**SETTLED, "reduction": "the trainer's reduce_mean says it"}


def get_sde_loss_fn(
    sde: Any,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
    *,
    skip_set: Skips,
    allow_ve: bool = False,
    **options: Unpack[LossOptions],
) -> LossFn:
    """Return a loss of `(model, batch)` in continuous time (arXiv 2011.13456, Eq. 7).

    Args:
        sde: A `VPSDE` or `subVPSDE` of the trainer; a `VESDE` with `allow_ve`.
        train: Put the model in training mode, else in evaluation mode.
        reduce_mean: Average over the data axes; else half their sum.
        continuous: Labels in continuous time; see the top of this module.
        likelihood_weighting: Weigh each sample by g²/σ² (arXiv 2101.09258).
        eps: The smallest time drawn.
        skip_set: Ints are skips in steps of the SDE's `N`, so that k means δ = k / N; floats are
            skips in units of time. A time t below δ has the plain loss.
        allow_ve: Accept a `VESDE`. S²-DM is defined on processes that preserve variance; here its
            c is that of the process of equal signal-to-noise ratio that does, x_t / √(1 + σ²).
        options: Those of `SkipStepLoss`, without what the trainer settles itself.

    Raises:
        TypeError, ValueError: if an argument is not as said.
    """
    kind = _kind_of(sde, allow_ve)
    if likelihood_weighting and options.get("weighting") is not None:
        raise ValueError(
            f"likelihood_weighting must be False with a weighting, got True and "
            f"{options['weighting']!r}: both weigh the error of the noise"
        )
    skips = _in_units_of_time(skip_set, sde.N)
    criterion = _criterion(_continuous_schedule(sde, kind), skips, options)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        model.train(train)
        t = torch.rand(batch.shape[0], device=batch.device) * (sde.T - eps) + eps
        noise = torch.randn_like(batch)
        mean, std = sde.marginal_prob(batch, t)
        x_t = mean + along(std, noise) * noise
        eps_hat = _predict(model, x_t, t, std, sde, kind, continuous)
        weights = None
        if likelihood_weighting:
            weights = sde.sde(torch.zeros_like(batch), t)[1] ** 2 / std**2
        losses = criterion.from_output(eps_hat, noise, t, weights=weights)
        return _reduce(losses, batch, reduce_mean)

    return loss_fn


def get_ddpm_loss_fn(
    vpsde: Any,
    train: bool,
    reduce_mean: bool = True,
    *,
    skip_set: Skips,
    **options: Unpack[LossOptions],
) -> LossFn:
    """Return a loss of `(model, batch)` on the discrete timesteps of a `VPSDE`.

    The skips are in timesteps; the arguments are otherwise those of `get_sde_loss_fn`.
    """
    _check_kind("vpsde", vpsde, "VPSDE")
    # From β and in float64: the SDE's own ᾱ is float32, too coarse for its small differences.
    schedule = NoiseSchedule.from_betas(vpsde.discrete_betas)
    criterion = _criterion(schedule, skip_set, options)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        model.train(train)
        labels = torch.randint(0, vpsde.N, (batch.shape[0],), device=batch.device)
        noise = torch.randn_like(batch)
        a = vpsde.sqrt_alphas_cumprod.to(batch.device)[labels]
        b = vpsde.sqrt_1m_alphas_cumprod.to(batch.device)[labels]
        eps_hat = model(along(a, batch) * batch + along(b, noise) * noise, labels)
        return _reduce(criterion.from_output(eps_hat, noise, labels), batch, reduce_mean)

    return loss_fn


def get_smld_loss_fn(
    vesde: Any,
    train: bool,
    reduce_mean: bool = False,
    *,
    skip_set: Skips,
    **options: Unpack[LossOptions],
) -> LossFn:
    """Return a loss of `(model, batch)` on the discrete noise levels of a `VESDE`.

    Its labels count σ from the largest down, so a skip of k noise levels pairs a label with label
    + k. The arguments are otherwise those of `get_sde_loss_fn`, whose `allow_ve` calling this
    function implies.
    """
    _check_kind("vesde", vesde, "VESDE")
    ascending = vesde.discrete_sigmas
    schedule = NoiseSchedule.from_sigmas(ascending)
    criterion = _criterion(schedule, skip_set, options)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        model.train(train)
        labels = torch.randint(0, vesde.N, (batch.shape[0],), device=batch.device)
        t = vesde.N - 1 - labels
        sigma = along(ascending.to(batch.device)[t], batch)
        noise = torch.randn_like(batch)
        eps_hat = -sigma * model(batch + sigma * noise, labels)
        return _reduce(criterion.from_output(eps_hat, noise, t), batch, reduce_mean)

    return loss_fn


def get_step_fn(
    sde: Any,
    train: bool,
    optimize_fn: Callable[..., None] | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
    *,
    skip_set: Skips,
    allow_ve: bool = False,
    **options: Unpack[LossOptions],
) -> Callable[[dict[str, Any], Tensor], Tensor]:
    """Return one step of training, or of evaluation, with the S²-DM loss.

    Args:
        sde: The SDE, as for `get_sde_loss_fn`.
        train: Train; else evaluate with the averaged weights.
        optimize_fn: What the trainer's `optimization_manager` returns; needed for training.
        reduce_mean: Average over the data axes; else half their sum.
        continuous: Train in continuous time, else on the DDPM loss (or, with `allow_ve`, SMLD's).
        likelihood_weighting: Weigh each sample by g²/σ²; in continuous time only.
        skip_set: The skips, as the loss takes them.
        allow_ve: Accept a `VESDE`.
        options: Those of `SkipStepLoss`, without what the trainer settles itself.

    Returns:
        A function of `(state, batch)` that returns the scalar loss. The state's `model`,
        `optimizer`, `ema` and `step` are those of the trainer.

    Raises:
        TypeError, ValueError: if an argument is not as said.
    """
    if train and not callable(optimize_fn):
        raise ValueError(f"optimize_fn must be callable for training, got {optimize_fn!r}")
    if continuous:
        loss_fn = get_sde_loss_fn(
            sde,
            train,
            reduce_mean=reduce_mean,
            likelihood_weighting=likelihood_weighting,
            skip_set=skip_set,
            allow_ve=allow_ve,
            **options,
        )
    elif likelihood_weighting:
        raise ValueError("likelihood_weighting must be False with continuous=False, got True")
    else:
        kind = _kind_of(sde, allow_ve)
        if kind == "subVPSDE":
            raise ValueError(
                "continuous must be True for a subVPSDE, which has no discrete form, got False"
            )
        make: Callable[..., LossFn] = get_ddpm_loss_fn if kind == "VPSDE" else get_smld_loss_fn
        loss_fn = make(sde, train, reduce_mean, skip_set=skip_set, **options)

    def step_fn(state: dict[str, Any], batch: Tensor) -> Tensor:
        model, ema = state["model"], state["ema"]
        if train and optimize_fn is not None:
            state["optimizer"].zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimize_fn(state["optimizer"], model.parameters(), step=state["step"])
            state["step"] += 1
            ema.update(model.parameters())
            return loss
        with torch.no_grad():
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            loss = loss_fn(model, batch)
            ema.restore(model.parameters())
        return loss

    return step_fn


def _predict(
    model: nn.Module, x_t: Tensor, t: Tensor, std: Tensor, sde: Any, kind: str, continuous: bool
) -> Tensor:
    """Call the model with its labels and return ε̂, that is -score · std."""
    output: Tensor
    if kind == "VESDE":
        labels = std if continuous else ((sde.T - t) * (sde.N - 1)).round().long()
        output = model(x_t, labels)
        return -output * along(std, output)
    if continuous or kind == "subVPSDE":
        output = model(x_t, t * 999)
        return output
    # The score is -out over the *table's* σ at the label below t, the noise has σ(t) itself.
    labels = t * (sde.N - 1)
    output = model(x_t, labels)
    table = sde.sqrt_1m_alphas_cumprod.to(labels.device)
    return output * along(std / table[labels.long()], output)


def _reduce(losses: Tensor, batch: Tensor, reduce_mean: bool) -> Tensor:
    """Average losses of shape [B] that are means over the data axes, or half their sums."""
    return losses.mean() if reduce_mean else 0.5 * batch[0].numel() * losses.mean()


def _criterion(schedule: Schedule, skips: Skips, options: LossOptions) -> SkipStepLoss:
    return SkipStepLoss(schedule, skips, **check_options(options, _REFUSED), reduction="none")


def _in_units_of_time(skip_set: Skips, num_steps: int) -> SkipSet:
    skips = SkipSet.wrap(skip_set)
    if skips.offsets and all(isinstance(offset, int) for offset in skips.offsets):
        return SkipSet([offset / num_steps for offset in skips.offsets])
    return skips


def _continuous_schedule(sde: Any, kind: str) -> ContinuousSchedule:
    if kind == "VPSDE":
        schedule = ContinuousSchedule.vp(sde.beta_0, sde.beta_1)
    elif kind == "subVPSDE":
        schedule = ContinuousSchedule.sub_vp(sde.beta_0, sde.beta_1)
    else:
        low, high = math.log(sde.sigma_min), math.log(sde.sigma_max)
        schedule = ContinuousSchedule(  # log alpha and log sigma
            lambda t: (torch.zeros_like(t), low + t * (high - low)),
            name=f"VE({sde.sigma_min}, {sde.sigma_max})",
        )
    _check_path(sde, schedule)
    return schedule


def _check_path(sde: Any, schedule: ContinuousSchedule) -> None:
    """Raise ValueError if a subclass has another path than the parameters that it inherits."""
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64, device="cpu")
    mean, std = sde.marginal_prob(torch.ones(len(t), 1, 1, 1, dtype=t.dtype, device="cpu"), t)
    alpha, sigma = schedule.alpha_sigma(t)
    ratio = std.flatten() / mean.flatten()
    if not torch.allclose(ratio, sigma / alpha, rtol=1e-3):
        raise ValueError(
            f"sde must have the path of {schedule!r}, got a {type(sde).__name__} whose "
            "marginal_prob is another: a SkipStepLoss of a ContinuousSchedule of its own has it"
        )


def _kind_of(sde: Any, allow_ve: bool) -> str:
    kind = _check_kind("sde", sde, "VPSDE", "subVPSDE", "VESDE")
    if kind == "VESDE" and not allow_ve:
        raise ValueError(
            "sde must be a VPSDE or subVPSDE, got a VESDE: S²-DM is defined on processes that "
            "preserve variance. With allow_ve=True its c is that of the variance-preserving "
            "process of equal signal-to-noise ratio"
        )
    return kind


def _check_kind(name: str, sde: Any, *kinds: str) -> str:
    """Return which of the trainer's SDEs it is, known by the name of its class or of a base."""
    for base in type(sde).__mro__:
        if base.__name__ in kinds:
            return base.__name__
    raise TypeError(f"{name} must be a {' or '.join(kinds)}, got a {type(sde).__name__}")
