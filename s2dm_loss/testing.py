"""For authors of adapters: is the swap right?

    report = check_swap(
        lambda model: trainer.loss(model, batch),  # the trainer's own
        lambda model, tau: adapted(trainer, tau).loss(model, batch),  # the swapped
    )

Both are called with a stand-in for the network, under the same random numbers. At τ = 1 the loss
is the trainer's own, in value and gradient; at the τ to be trained with it may change each sample's
gradient a little, and must change it somewhere.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss._target import TargetReport, check_target
from s2dm_loss.checks import check_number, describe
from s2dm_loss.coefficients import DEFAULT_TAU

__all__ = ["SwapReport", "TargetReport", "check_swap", "check_target"]

# A τ at which even a small skip moves the target by much more than float32 rounding.
_STRONG_TAU = 0.5
_STRONG_EFFECT = 1e-5


@dataclass(frozen=True)
class SwapReport:
    """What `check_swap` has measured.

    Attributes:
        times: The second argument of the model call, of shape [B]; as the trainer gives it.
        plain: The trainer's own loss.
        swapped: The swapped loss at τ = 1.
        ratio: Norm of each sample's gradient at the chosen τ over that of the trainer's own loss,
            of shape [B].
        moved: Largest change of a gradient's direction at τ = 0.5, from 0 to 2; 0 if the skip acts
            on no sample.
        calls: Calls of the model in the swapped loss.
    """

    times: Tensor
    plain: float
    swapped: float
    ratio: Tensor
    moved: float
    calls: int

    @override
    def __str__(self) -> str:
        lines = [
            f"trainer's own loss {self.plain:.6g}, swapped at tau = 1 {self.swapped:.6g}; model "
            f"calls {self.calls}",
            "      time   gradient at tau over plain",
        ]
        count = len(self.ratio)
        one_each = len(self.times) in (1, count)
        times = self.times.expand(count) if one_each else torch.full((count,), torch.nan)
        lines += [f"{float(times[i]):10.4g}   {float(self.ratio[i]):.4f}" for i in times.argsort()]
        return "\n".join(lines)


def check_swap(
    trainers_loss: Callable[[nn.Module], Tensor],
    swapped_loss: Callable[[nn.Module, float], Tensor],
    *,
    tau: float = DEFAULT_TAU,
    rtol: float = 1e-4,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
    output_of: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> SwapReport:
    """Raise AssertionError unless a swap does what it should, and return what was measured.

    It finds a scale or a target that is not the trainer's, a wrong order of arguments, a loss that
    explodes or dies at an end of the schedule, a schedule that does not act, and a model that is
    called more often than before. It cannot detect a wrong prediction type or x_t (x_0 in its
    place, say), nor reliably a reversed time: at τ = 1 the loss is the trainer's own squared error
    whatever it is told. `check_target`, given what the swap gives to the loss, detects them.

    Args:
        trainers_loss: Calls the model it is given, once, and returns the trainer's own loss: a
            scalar or one value for each sample. The global generators of PyTorch, NumPy and Python
            start from `seed` in every call, and get their state back after it; a generator of
            the trainer's own it has to reset itself.
        swapped_loss: The same with this library's loss, at the τ it is given.
        tau: The τ that will be trained with.
        rtol: Tolerance of the comparison at τ = 1, relative to the largest entry.
        ratio_low: Smallest ratio of gradients at `tau` that is accepted.
        ratio_high: Largest. The defaults hold for every built-in schedule at τ = 0.99.
        output_of: Makes the stand-in's output from Gaussian noise of the shape of x_t, which is the
            output if not given. For networks with more or fewer channels out than in, such as
            `lambda x: torch.cat([x, x], 1)` for a learned variance. Of zeros no skip can be seen.
        seed: Seed of all random numbers.

    Raises:
        AssertionError: if the swap is wrong; the message says how it shows and what it may be.
    """
    check_number("tau", tau, 0.0, 1.0)
    plain, plain_grad, probe = _run(trainers_loss, output_of, seed)
    if not bool((plain != 0).any() and (plain_grad != 0).any()):
        raise AssertionError(
            "the trainer's own loss must not be 0, nor its gradient: it shows nothing"
        )
    calls = probe.calls
    swapped, grad, probe = _run(lambda m: swapped_loss(m, 1.0), output_of, seed)
    if probe.calls != calls:
        raise AssertionError(
            f"the model must be called as often as before, {calls} times, got {probe.calls}"
        )
    _check_close("the loss at tau = 1", swapped, plain, rtol)
    _check_close("the gradient at tau = 1", grad, plain_grad, rtol)

    value, grad, _ = _run(lambda m: swapped_loss(m, tau), output_of, seed)
    norm, plain_norm = (_rows(each).norm(dim=1) for each in (grad, plain_grad))
    ratio = torch.where(plain_norm > 0, norm / plain_norm, norm + 1)
    bad = ~((ratio >= ratio_low) & (ratio <= ratio_high)) | ~value.isfinite().all()
    with warnings.catch_warnings():  # of a τ that nobody trains with
        warnings.filterwarnings("ignore", "the gain at the last timestep")
        _, strong, _ = _run(lambda m: swapped_loss(m, _STRONG_TAU), output_of, seed)
    report = SwapReport(
        times=probe.times,
        plain=float(plain.sum()),
        swapped=float(swapped.sum()),
        ratio=ratio,
        moved=_turned(strong, plain_grad),
        calls=calls,
    )
    if bool(bad.any()):
        raise AssertionError(
            f"at tau = {tau} the gradients must be {ratio_low} to {ratio_high} times the plain "
            "ones and the loss finite: a loss on the network's own output, "
            f"`SkipStepLoss.from_output`, stays so on every schedule. Got\n{report}"
        )
    if tau < 1 and not report.moved >= _STRONG_EFFECT:  # NaN too
        raise AssertionError(
            "the skip must act somewhere: got the plain gradient's direction for every sample even "
            f"at tau = {_STRONG_TAU}. Does the schedule's time run the wrong way, or are all times "
            f"of this batch below the skip?\n{report}"
        )
    return report


class _Probe(nn.Module):
    """Stands for the network: remembers its times, and puts out a leaf that takes gradients."""

    def __init__(self, output_of: Callable[[Tensor], Tensor] | None, seed: int) -> None:
        super().__init__()
        self.output_of = output_of
        self.seed = seed
        self.calls = 0
        self.times = torch.empty(0)
        self.output = torch.empty(0)
        self.weight = nn.Parameter(torch.zeros(()))  # for whoever asks a model for its device

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x_t, t = _read_call(args, kwargs)
        self.calls += 1
        self.times = torch.as_tensor(t).detach().flatten()
        # Not the trainer's own numbers, nor x_t: they hold its noise, and the output may be right.
        source = torch.Generator("cpu").manual_seed(self.seed + 1)
        drawn = torch.randn(x_t.shape, generator=source, dtype=torch.float64, device="cpu")
        output = drawn.to(x_t)
        if self.output_of is not None:
            output = self.output_of(output).detach().clone()
        self.output = output.requires_grad_()
        vars(output)["sample"] = output  # as diffusers' networks return it
        return (output,) if kwargs.get("return_dict") is False else output


_INPUTS = ("x_t", "x", "sample", "hidden_states", "noisy_latents", "xt", "input", "inputs")
_TIMES = ("t", "timestep", "timesteps", "time", "sigma", "noise_labels")


def _read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Return x_t and t from a call of a network, by place or by the names that networks use."""
    places = list(args[:2])
    places += [_named(kwargs, names) for names in (_INPUTS, _TIMES)[len(places) :]]
    x_t, t = places
    if not isinstance(x_t, Tensor) or t is None:
        raise TypeError(
            f"the model must be called with x_t, a tensor, and t, got {len(args)} arguments and "
            f"{', '.join(kwargs) or 'none'} by name: call it through a function that hands both on "
            f"by place. It knows {', '.join(_INPUTS)} and {', '.join(_TIMES)} by name"
        )
    return x_t, t


def _named(kwargs: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((kwargs[name] for name in names if kwargs.get(name) is not None), None)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of PyTorch, Python and NumPy, and give their states back."""
    numpy: Any = sys.modules.get("numpy")  # a trainer that uses it has imported it
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        # Named, since PyTorch warns where there are several GPUs and none is named.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed)
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])


def _run(
    loss_of: Callable[[nn.Module], Tensor],
    output_of: Callable[[Tensor], Tensor] | None,
    seed: int,
) -> tuple[Tensor, Tensor, _Probe]:
    """Return a loss, its gradient with respect to the model's output, and the model."""
    probe = _Probe(output_of, seed)
    with _seeded(seed), torch.enable_grad():
        loss = loss_of(probe)
        if not isinstance(loss, Tensor):
            raise TypeError(f"a loss must be a tensor, got {describe(loss)}")
        if not loss.requires_grad or probe.calls == 0:
            raise AssertionError("the loss must depend on what the model returns")
        (grad,) = torch.autograd.grad(loss.sum(), probe.output, allow_unused=True)
    if grad is None:
        raise AssertionError("the loss must depend on what the model returns last")
    return loss.detach().double(), grad.double(), probe


def _check_close(what: str, found: Tensor, expected: Tensor, rtol: float) -> None:
    if found.shape != expected.shape:
        raise AssertionError(
            f"{what} must have the shape of the trainer's own, {tuple(expected.shape)}, got "
            f"{tuple(found.shape)}"
        )
    error = (found - expected).abs().max() / expected.abs().max()
    if not bool(error <= rtol):
        raise AssertionError(
            f"{what} must be the trainer's own to {rtol:g}, got a relative difference of "
            f"{float(error):.3g}: the prediction type, the schedule, the order of the arguments or "
            "a weight of the trainer's is not what the swap takes it for"
        )


def _rows(values: Tensor) -> Tensor:
    """Return values of shape [B, ...] as [B, D]."""
    return values.reshape(len(values), -1)


def _turned(grad: Tensor, plain: Tensor) -> float:
    """Return the largest distance of two gradients' directions over the samples."""
    directions = [torch.nn.functional.normalize(_rows(each), dim=1) for each in (grad, plain)]
    return float((directions[0] - directions[1]).norm(dim=1).max())
