"""Which times a batch is trained at: uniform, stratified, or a function of your own.

"uniform" draws each time on its own, as every trainer does. "stratified" draws one time in each of
B equal parts of the schedule: each time is still uniform, so the expected loss is unchanged, and
the batch loss varies less (the idea of the low-discrepancy sampler of Kingma et al.,
arXiv 2107.00630, Appendix I.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from s2dm_loss._torch import drawn_by, reading_is_free, wide_dtype
from s2dm_loss.checks import check_rows, describe
from s2dm_loss.schedule import Schedule, since_data

TimestepsName = Literal["uniform", "stratified"]

Timesteps: TypeAlias = TimestepsName | Callable[..., Tensor | tuple[Tensor, Tensor]]
"""A name, or a function called as `f(batch_size, device=device, generator=generator)`.

It returns times t of shape [B], or (t, weights) with weights of shape [B]. With
weights = p_uniform(t) / p(t), where p is the density that the times are drawn from, the mean loss
is that of uniform times. Without weights the loss counts each time as often as it is drawn.
"""


def read_timesteps(timesteps: object) -> Timesteps:
    """Return a setting of `timesteps`, or say what it may be.

    Raises:
        TypeError, ValueError: if it is neither a known name nor a function.
    """
    known: Any = timesteps
    if known in _NAMED if isinstance(known, str) else callable(known):
        return known  # type: ignore[no-any-return]
    error = ValueError if isinstance(timesteps, str) else TypeError
    raise error(
        f"timesteps must be one of {', '.join(map(repr, _NAMED))}, or a function "
        f"f(batch_size, device=..., generator=...) that returns t or (t, weights), got "
        f"{describe(timesteps)}"
    )


def draw(
    timesteps: Timesteps,
    schedule: Schedule,
    batch_size: int,
    *,
    device: torch.device | str,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Draw training times.

    >>> from s2dm_loss import NoiseSchedule
    >>> t, weights = draw("stratified", NoiseSchedule.linear(1000), 4, device="cpu")
    >>> sorted((t // 250).tolist()), weights
    ([0, 1, 2, 3], None)

    Args:
        timesteps: "uniform", "stratified" or a function, see `Timesteps`.
        schedule: The noise schedule.
        batch_size: B.
        device: Where the times are drawn.
        generator: Random stream.

    Returns:
        Times of shape [B], and the weights of shape [B] that a function gave, else None.

    Raises:
        TypeError, ValueError: if `timesteps` is not as said, or a function's result is not.
    """
    device, timesteps = torch.device(device), read_timesteps(timesteps)
    if isinstance(timesteps, str):
        return _NAMED[timesteps](schedule, batch_size, device, generator), None
    drawn = timesteps(batch_size, device=device, generator=generator)
    t, weights = drawn if isinstance(drawn, tuple) and len(drawn) == 2 else (drawn, None)
    given = {"t": t} if weights is None else {"t": t, "weights": weights}
    for name, value in given.items():
        if not (
            isinstance(value, Tensor) and value.shape == (batch_size,) and value.device == t.device
        ):
            raise ValueError(
                f"timesteps must return t or (t, weights), tensors of shape ({batch_size},) on "
                f"one device, got {name} = {describe(value)}"
            )
    schedule.check_timesteps(t)
    if weights is not None and reading_is_free(weights) and not bool((weights >= 0).all()):
        raise ValueError(
            "timesteps must return weights of at least 0 in (t, weights), got values from "
            f"{weights.min().item()} to {weights.max().item()}: p_uniform(t) / p(t) is never less"
        )
    return t, weights


def times_at(schedule: Schedule, u: Tensor) -> Tensor:
    """Map u in [0, 1), uniform there, to times that are uniform on what the schedule draws.

    A small u is near the data, at whichever end of time they lie.

    Returns:
        Times of the shape of u: int64 on a discrete schedule, else float32.
    """
    steps = schedule.timesteps
    if steps is not None:
        count = steps.numel()
        return (u * count).long().clamp(max=count - 1)
    first: float = getattr(schedule, "min_time", 0.0)
    # The largest float32 below 1, which rounding would exceed.
    u = u.to(torch.float32).clamp(max=1 - 2**-24)
    return since_data(schedule, first + (1 - first) * u)


def _stratified(
    schedule: Schedule, batch_size: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Return one time in each of B strata, which a shift hands to the batch's samples.

    Without the shift the batch's first sample would always have the earliest stratum.
    """
    drawn = torch.rand(
        batch_size + 1, dtype=wide_dtype(device), device=device, **drawn_by(generator)
    )
    shift = (drawn[batch_size] * batch_size).floor()
    strata = (torch.arange(batch_size, device=device) + shift) % batch_size
    return times_at(schedule, (strata + drawn[:batch_size]) / batch_size)


_Draw: TypeAlias = Callable[[Schedule, int, torch.device, torch.Generator | None], Tensor]
_NAMED: dict[TimestepsName, _Draw] = {
    "uniform": lambda schedule, batch_size, device, generator: schedule.draw_timesteps(
        batch_size, device=device, generator=generator
    ),
    "stratified": _stratified,
}
check_rows("_NAMED", _NAMED, TimestepsName)
