"""A trained model whose noise prediction is s(t) ε̂ in place of ε̂, with no training.

A network trained with S²-DM's loss converges to s(t) E[ε | x_t], one trained with the plain loss to
E[ε | x_t]. So s(t) times the plain network's ε̂ is what the loss would have taught it:
`ScaledModel.with_gain`. Dividing ε̂ by a constant λ is Epsilon Scaling (Ning et al., arXiv
2308.15321); here λ(t) = 1 / s(t). `ScaledModel` itself takes any s(t).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, Unpack, override

from s2dm_loss._torch import replicated_like
from s2dm_loss.checks import FixedSettings, check_batch, check_per_sample, describe
from s2dm_loss.coefficients import GainOptions, coefficients, warn_if_the_start_fails
from s2dm_loss.head import along
from s2dm_loss.prediction import (
    PathPoint,
    PredictionType,
    check_prediction_type,
    output_scales,
    read_output,
    read_prediction_type,
)
from s2dm_loss.schedule import Schedule, check_schedule
from s2dm_loss.skip_set import Skips, SkipSet, warn_if_sampled_early
from s2dm_loss.tables import TabledModule, TimeTable


class ScaledModel(FixedSettings, TabledModule):
    """A trained model whose noise prediction is s(t) ε̂ in place of ε̂.

    It is called as the model is, `scaled(x_t, t, ...)`, and returns what the model returns, so it
    takes the model's place in any sampling loop. A learned variance beside the prediction (2C
    channels) is left as it is. In another prediction than the noise it is the ε̂ in it that is
    scaled.

    >>> from s2dm_loss import NoiseSchedule, ScaledModel
    >>> class Model(nn.Module):
    ...     def forward(self, x_t, t):
    ...         return torch.ones_like(x_t)
    >>> schedule = NoiseSchedule.linear(1000)
    >>> scaled = ScaledModel.with_gain(Model(), schedule, skip_set=99)
    >>> scaled(torch.zeros(2, 1), torch.tensor([0, 999])).flatten()
    tensor([1.0000, 0.9456])
    """

    _fixed = frozenset({"schedule", "prediction_type", "scale"})

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        scale: Callable[[Tensor], Tensor],
        *,
        prediction_type: PredictionType | None = None,
    ) -> None:
        """Wrap `model`.

        Args:
            model: The trained network, called `model(x_t, t, ...)`.
            schedule: The schedule that it was trained on.
            scale: s, called `scale(t)`: returns float64 of the shape of t.
            prediction_type: What the model predicts, as for `SkipStepLoss`.

        Raises:
            TypeError, ValueError: if an argument is not as said.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {describe(model)}")
        if not callable(scale):
            raise TypeError(f"scale must be callable as scale(t), got {describe(scale)}")
        self.schedule: Schedule = check_schedule(schedule)
        prediction_type = read_prediction_type(prediction_type, self.schedule)
        check_prediction_type(prediction_type, self.schedule, weighted=True)
        self.model = model
        self.training: bool = model.training  # for samplers that ask for the mode, and restore it
        self.scale = scale
        self.prediction_type: PredictionType = prediction_type
        timesteps = self.schedule.timesteps
        self._last = None if timesteps is None else timesteps.numel() - 1
        # A network on x_0 + σ ε is often called with σ, which must not pass for a row.
        self._of_sigmas = timesteps is not None and bool(
            self.schedule.alpha_sigma(timesteps[-1:])[0] == 1
        )
        self._counts_timesteps = False
        # Checks what `scale` returns.
        inside = torch.full((1,), 0.5, dtype=torch.float64, device="cpu")
        self._scales_at(inside if timesteps is None else timesteps[:1])
        self._scales = TimeTable(self._scales_at, timesteps)

    @classmethod
    def with_gain(
        cls, model: nn.Module, schedule: Schedule, skip_set: Skips, **options: Unpack[GainOptions]
    ) -> Self:
        """Wrap `model` with the gain s(t) that S²-DM's loss teaches.

        Args:
            model: The trained network, called `model(x_t, t, ...)`.
            schedule: The schedule that it was trained on.
            skip_set: The skips, as for `SkipStepLoss`.
            options: tau, estimator, prediction_type, weighting and max_c2, as for `SkipStepLoss`.

        Raises:
            TypeError, ValueError: if an argument is not as said.
        """
        skip_set = SkipSet.wrap(skip_set)
        scale = _Gain(check_schedule(schedule), skip_set, options)
        scaled = cls(model, schedule, scale, prediction_type=options.get("prediction_type"))
        warn_if_sampled_early(skip_set, schedule, stacklevel=2)
        warn_if_the_start_fails(schedule, scale, stacklevel=2)
        return scaled

    @override
    def _copy_tables(self, device: torch.device) -> None:
        self._scales.copy_to(device)
        if isinstance(self.scale, _Gain):
            self.scale.skip_set.copy_to(device)

    @override
    def forward(self, x_t: Tensor, t: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        """Call the model and scale its prediction.

        Args:
            x_t: The model's input, of shape [B, ...].
            t: Times of shape [B], or one for all, on the schedule's own clock. On a discrete
                schedule a fractional timestep (Euler's) takes the gain of the nearest one; on a
                table of σ they are its rows. If your network is called with anything else (σ,
                t / T, timesteps rescaled to 1000), call it yourself and use `rescale`.
            args: Further arguments of the model.
            kwargs: Further arguments of the model.

        Returns:
            What the model returns, with its prediction scaled.

        Raises:
            TypeError, ValueError: if an argument or the model's output is not as said.
        """
        scale, shift = self._at(x_t, t)
        return _scaled(self.model(x_t, t, *args, **kwargs), x_t, scale, shift)

    def rescale(self, output: Any, x_t: Tensor, t: Tensor | float) -> Any:
        """Scale the prediction in an output that the model has given for x_t at time t.

        For a network that takes σ, say, and not the schedule's t.
        """
        return _scaled(output, x_t, *self._at(x_t, t))

    def _at(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor | None]:
        """Return the factor on the output and what is added to it.

        Computed before the model is called, which may change x_t in place.
        """
        check_batch("x_t", x_t)
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        times = self._batch_of_times(t, x_t)
        self.schedule.check_timesteps(times)
        scale, *on_input = replicated_like(x_t, *self._scales.at(times, dtype))
        shift = along(on_input[0], x_t) * x_t.to(dtype) if on_input else None
        return along(scale, x_t), shift

    def _scales_at(self, t: Tensor) -> tuple[Tensor, ...]:
        """Return s and a factor on x_t, such that s · output + factor · x_t has s ε̂ in it.

        With ε̂ = ratio · output + lift · x_t the factor is (s-1) lift / ratio; there is none if the
        output is noise alone. At ᾱ = 0 ratio is 0: x_t is all noise, and no x_0 or v can express a
        smaller ε̂, so the output stays as it is.
        """
        s = self.scale(t)
        if not isinstance(s, Tensor) or s.shape != t.shape or not s.is_floating_point():
            raise ValueError(
                f"scale must return a floating-point tensor of shape {tuple(t.shape)}, that of t, "
                f"got {describe(s)}"
            )
        scales = output_scales(self.prediction_type, PathPoint.at(self.schedule, t))
        if scales.shift is None:
            return (s,)
        no_signal = scales.ratio == 0
        on_input = torch.where(no_signal, 0.0, (s - 1) * scales.shift)
        return torch.where(no_signal, 1.0, s), on_input

    def _batch_of_times(self, t: Tensor | float, x_t: Tensor) -> Tensor:
        if not isinstance(t, (Tensor, Real)):
            raise TypeError(f"t must be a tensor or a number, got {describe(t)}")
        if isinstance(t, Tensor) and t.is_meta != x_t.is_meta:
            raise ValueError(f"t must be on the device of x_t, {x_t.device}, got {describe(t)}")
        if self._last is None and not isinstance(t, Tensor):
            t = float(t)
        t = torch.as_tensor(t, device=x_t.device)
        if self._last is not None and t.is_floating_point():
            t = self._rounded(t, self._last)
        if t.numel() == 1:
            return t.reshape(1).expand(x_t.shape[0])
        return check_per_sample("t", t, "x_t", x_t)

    def _rounded(self, t: Tensor, last: int) -> Tensor:
        """Return the timesteps next to fractional ones; refuse σ and t / T, which are none."""
        if self._of_sigmas:
            raise TypeError(
                f"t must hold integer timesteps, rows of {self.schedule!r}, got {describe(t)}. "
                "If your network is called with σ, `rescale(model(x_t, sigma), x_t, row)` scales "
                "its output"
            )
        # Euler ends between 0 and 1, after larger timesteps; t / T never leaves [0, 1]. Once a
        # larger one was seen nothing is read, so on a GPU one call waits.
        if not (self._counts_timesteps or t.is_meta or torch.compiler.is_compiling()):
            self._counts_timesteps = bool((t > 1).any())
            if not self._counts_timesteps and bool(((t > 0) & (t < 1)).any()):
                raise ValueError(
                    f"t must hold timesteps from 0 to {last}, got fractions such as "
                    f"{t.max().item():.4g}, which look like t / T. If your network is called with "
                    "t / T, `rescale(model(x_t, t / T), x_t, t)` scales its output"
                )
        # A half type may round the last timestep up: bfloat16 has no 999 but 1000.
        at_end = t == torch.full_like(t, last)
        return torch.where(at_end, last, t.round().long())

    @override
    def extra_repr(self) -> str:
        return f"{self.schedule!r}, {self.scale!r}, prediction_type={self.prediction_type!r}"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"a {type(self).__name__} has no {name!r}: it takes the model's place in a "
                "sampling loop. For a diffusers pipeline, which asks for more, there is "
                "s2dm_loss.adapters.diffusers.shrink_pipeline"
            ) from error


class _Gain:
    """s(t) of S²-DM for fixed skips and options; a class, so that a model with it pickles."""

    def __init__(self, schedule: Schedule, skip_set: SkipSet, options: GainOptions) -> None:
        self.schedule, self.skip_set, self.options = schedule, skip_set, options

    def __call__(self, t: Tensor) -> Tensor:
        return coefficients(self.schedule, self.skip_set, t=t, **self.options).gain

    @override
    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        return f"gain({', '.join([repr(self.skip_set), *options])})"


def _scaled(output: Any, x_t: Tensor, scale: Tensor, shift: Tensor | None) -> Any:
    """Return an output with its prediction scaled and shifted, of the type it came in."""
    prediction = read_output(output)
    plain = prediction.shape == x_t.shape or prediction.ndim < 2
    mean, *variance = (prediction,) if plain else prediction.chunk(2, dim=1)
    if any(part.shape != x_t.shape for part in (mean, *variance)):
        raise ValueError(
            f"model output must have the shape of x_t, {tuple(x_t.shape)}, or twice its channels "
            f"with a learned variance, got {describe(prediction)}"
        )
    shrunk = scale * mean.to(torch.promote_types(mean.dtype, scale.dtype))
    if shift is not None:
        shrunk = shrunk + shift
    mean = shrunk.to(prediction.dtype)
    return _replace(output, prediction, torch.cat([mean, *variance], dim=1) if variance else mean)


def _replace(output: Any, old: Tensor, new: Tensor) -> Any:
    """Return `output` with its prediction replaced, of the type it came in."""
    if isinstance(output, Tensor):
        return new
    if isinstance(output, (tuple, list)):
        # The one that was read, which need not be the first; a namedtuple takes its fields singly.
        fields = [new if field is old else field for field in output]
        return type(output)(*fields) if hasattr(output, "_fields") else type(output)(fields)
    changed = copy.copy(output)
    try:
        changed.sample = new
    except AttributeError as error:
        if not is_dataclass(output) or isinstance(output, type):
            raise TypeError(
                f"model output must have a `sample` that can be set, got {describe(output)}"
            ) from error
        return replace(output, sample=new)
    return changed
