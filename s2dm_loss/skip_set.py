"""Skip sets: which earlier time each timestep t is paired with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from s2dm_loss._torch import real_tensors, wide_dtype
from s2dm_loss.checks import as_float64, check_count, describe
from s2dm_loss.schedule import Schedule, data_at_of, since_data, wide_times
from s2dm_loss.tables import DeviceCopies


class SkipSet:
    """The skips of the loss: t is paired with t - k for every offset k.

    Where data lie at t = 1 (`ContinuousSchedule.flow(data_at=1)`) it is t + k.

    >>> from s2dm_loss import SkipSet
    >>> SkipSet(9)                                 # the released code's default
    SkipSet(9)
    >>> SkipSet([1, 9, 49])                        # several, and their mean
    SkipSet([1, 9, 49])
    >>> SkipSet(0.01)                              # in units of continuous time
    SkipSet(0.01)
    >>> SkipSet.for_sampling_steps(50)             # as a sampler with 50 steps
    SkipSet.for_sampling_steps(50)
    >>> SkipSet.from_timesteps([0, 250, 500, 750]) # a sampler's own timesteps
    SkipSet.from_timesteps([0, 250, 500, 750])

    A pair is valid where its earlier time, the one nearer to the data, exists (t >= k). Where none
    is, the loss is the plain one. Skip sets that say the same in the same way are equal.
    """

    offsets: tuple[float, ...]

    def __init__(self, offsets: int | float | Iterable[int] | Iterable[float]) -> None:
        """Pair t with t - k for each k.

        Args:
            offsets: One skip or several distinct ones: positive ints, in timesteps, for a discrete
                schedule, or floats in (0, 1), in units of time, for a continuous one.

        Raises:
            TypeError: if an offset is neither int nor float, or ints and floats are mixed.
            ValueError: if there is none, or one is not positive or comes twice.
        """
        if isinstance(offsets, (str, bytes, Tensor)) or not isinstance(offsets, (Real, Iterable)):
            cure = ": a sampler's timesteps go to SkipSet.from_timesteps"
            raise TypeError(
                "skip_set must be an int, a float, several of them or a SkipSet, got "
                f"{describe(offsets)}{cure if isinstance(offsets, Tensor) else ''}"
            )
        given = tuple(offsets) if isinstance(offsets, Iterable) else (offsets,)
        if not given:
            raise ValueError("skip_set must hold at least one skip, got none")
        values = tuple(_offset(value) for value in given)
        if len({type(value) for value in values}) > 1:
            raise TypeError(
                f"skips must be all ints (timesteps) or all floats (units of time), got {values!r}"
            )
        if len(set(values)) < len(values):
            raise ValueError(f"skips must be distinct, got {values!r}")
        self.offsets = tuple(sorted(values))

    @staticmethod
    def for_sampling_steps(num_inference_steps: int) -> SkipSet:
        """Pair t with t - T // S, the jump of DDIM and PNDM with S sampling steps.

        In continuous time the skip is 1 / S.
        """
        return _SamplingStride(num_inference_steps)

    @staticmethod
    @real_tensors()
    def from_timesteps(timesteps: Any) -> SkipSet:
        """Pair each t with the latest sampled timestep before it, on the side of the data.

        Args:
            timesteps: What a sampler visits, e.g. a diffusers `scheduler.timesteps` after
                `set_timesteps`: in any order, with repeats (PNDM) and offsets as they are. On a
                discrete schedule fractional values (Euler's) are rounded to the trained ones. In
                continuous time a t that is a sampled one but for rounding, or up to a sixteenth of
                the way to the next, is paired with the one before that.
        """
        return _SampledTimesteps(torch.unique(as_float64("timesteps", timesteps)))

    @staticmethod
    def wrap(skip_set: Skips) -> SkipSet:
        """Return a SkipSet as it is, and anything else as `SkipSet(skip_set)`."""
        return skip_set if isinstance(skip_set, SkipSet) else SkipSet(skip_set)

    def check(self, schedule: Schedule) -> None:
        """Raise TypeError or ValueError unless these skips fit `schedule`."""
        steps = schedule.timesteps
        for offset in self.offsets:
            if steps is None and not isinstance(offset, float):
                raise TypeError(
                    "a continuous schedule takes skips as floats in units of time, such as 0.01, "
                    f"got {offset!r}"
                )
            if steps is not None and not isinstance(offset, int):
                near, unit = int(min(offset, steps.numel() - 1)), ""
                if offset < 1:
                    near, unit = max(1, round(offset * steps.numel())), ", a skip in units of time"
                raise TypeError(
                    f"a discrete schedule takes int skips, in timesteps, got {offset!r}{unit}: on "
                    f"{steps.numel()} timesteps that is {near}"
                )
            limit = 1 if steps is None else steps.numel()
            if offset >= limit:
                raise ValueError(
                    f"a skip must be below {limit}, the length of the schedule, got {offset!r}"
                )

    def earlier(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Return the earlier times that t is paired with, and which of the pairs are valid.

        Args:
            t: Times of the schedule, of any shape.
            schedule: The schedule.

        Returns:
            Two tensors of shape [J, *t.shape], J being the number of skips: the earlier times in
            int64 or, in continuous time, float64, t itself where the pair is not valid, and a bool
            mask.
        """
        self.check(schedule)
        times = wide_times(t)
        distance = since_data(schedule, times)
        rounding = None
        if t.is_floating_point():
            # That of t, also for a small 1 - t.
            rounding = torch.finfo(t.dtype).eps * torch.maximum(times, distance)
        earlier, valid = self._earlier(distance, rounding, schedule)
        return torch.where(valid, since_data(schedule, earlier), times), valid

    def _earlier(
        self,
        t: Tensor,
        rounding: Tensor | None,
        schedule: Schedule,  # noqa: ARG002 - subclasses read it
    ) -> tuple[Tensor, Tensor]:
        """Return `earlier` in time from the data, with anything where a pair is not valid.

        Args:
            t: Times from the data, int64 or float64.
            rounding: By how much each may be off in continuous time.
            schedule: The schedule.
        """
        earlier = torch.stack([t - offset for offset in self.offsets])
        if rounding is None:
            return earlier, earlier >= 0
        slack = torch.stack([rounding.clamp(max=offset / 2) for offset in self.offsets])
        return earlier.clamp(min=0), earlier >= -slack

    def _key(self) -> tuple[object, ...]:
        """Return what makes two skip sets equal."""
        return tuple((type(offset), offset) for offset in self.offsets)

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SkipSet):
            return NotImplemented
        return type(self) is type(other) and self._key() == other._key()

    @override
    def __hash__(self) -> int:
        return hash((type(self), self._key()))

    def copy_to(self, device: torch.device) -> None:
        """Copy what is looked up to a device, which compiled code cannot do."""

    @override
    def __repr__(self) -> str:
        offsets = self.offsets
        return f"SkipSet({offsets[0] if len(offsets) == 1 else list(offsets)!r})"


Skips: TypeAlias = SkipSet | int | float | Iterable[int] | Iterable[float]
"""What every `skip_set` argument takes."""


def _offset(value: object) -> float:
    """Return a skip as a Python int or float; NumPy's numbers count as both."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"a skip must be an int or a float, got {describe(value)}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if not number > 0:
        raise ValueError(
            f"a skip must be positive, got {value!r}; a sampler's timesteps go to "
            "SkipSet.from_timesteps"
        )
    return number


class _SamplingStride(SkipSet):
    """t - T // S, resolved when the schedule is known."""

    offsets = ()

    def __init__(self, num_inference_steps: int) -> None:
        self.num_inference_steps = check_count("num_inference_steps", num_inference_steps, low=2)

    @override
    def check(self, schedule: Schedule) -> None:
        self._resolve(schedule).check(schedule)

    @override
    def earlier(self, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return self._resolve(schedule).earlier(t, schedule)

    @override
    def _key(self) -> tuple[object, ...]:
        return (self.num_inference_steps,)

    def _resolve(self, schedule: Schedule) -> SkipSet:
        steps = schedule.timesteps
        if steps is None:
            return SkipSet(1 / self.num_inference_steps)
        if self.num_inference_steps > steps.numel():
            raise ValueError(
                f"num_inference_steps must be at most the schedule's {steps.numel()} timesteps, "
                f"got {self.num_inference_steps}"
            )
        return SkipSet(steps.numel() // self.num_inference_steps)

    @override
    def __repr__(self) -> str:
        return f"SkipSet.for_sampling_steps({self.num_inference_steps})"


def warn_if_sampled_early(skip_set: SkipSet, schedule: Schedule, *, stacklevel: int) -> None:
    """Warn where all sampled timesteps are early ones: they may be of something else."""
    steps = schedule.timesteps
    if not isinstance(skip_set, _SampledTimesteps) or steps is None:
        return
    first, last = skip_set.timesteps[0], skip_set.timesteps[-1]
    if 2 * last < steps.numel() - 1:
        warnings.warn(
            f"the sampled timesteps go from {first:g} to {last:g}, on a schedule whose last is "
            f"{steps.numel() - 1}, and all later t are paired with {last:g}. Right for a sampler "
            "that starts there, such as img2img; not for σ, indices or another schedule's "
            "timesteps, in place of which give `scheduler.timesteps` on this one",
            stacklevel=stacklevel + 1,
        )


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Return `values[index]`, which fake tensors of a GPU that is not there cannot do."""
    return values.index_select(0, index.reshape(-1)).reshape(index.shape)


def _with_gaps(times: Tensor) -> DeviceCopies:
    """Return sorted times and, for each, the gap to the next."""
    gaps = times.diff()
    gaps = torch.cat([gaps, gaps[-1:] if len(gaps) else torch.zeros_like(times)])
    return DeviceCopies(torch.stack([times, gaps]))


_SAME_TIME = 1 / 16
"""Up to this share of the way to the next sampled time, a time is that sampled one."""


class _SampledTimesteps(SkipSet):
    """The latest sampled timestep before t.

    In continuous time a sampler's own time need not be the one in the list to the last digit: it
    is rounded to another type, or is what a loop of t -= dt has come to. A little above the one in
    the list, it would be paired with that, itself, and have no skip.
    """

    offsets = ()

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps: tuple[float, ...] = tuple(timesteps.tolist())
        self._rounded = DeviceCopies(torch.unique(timesteps.round().long()))
        # In continuous time, as distances from data at 0 and at 1.
        self._distances = [_with_gaps(timesteps), _with_gaps((1 - timesteps).flip(0))]

    @override
    def check(self, schedule: Schedule) -> None:
        steps = schedule.timesteps
        limit = 1.0 if steps is None else steps.numel() - 1
        if self.timesteps[0] < 0 or self.timesteps[-1] > limit:
            raise ValueError(
                f"timesteps must lie in [0, {limit}], got values from {self.timesteps[0]:g} "
                f"to {self.timesteps[-1]:g}"
            )
        if (
            steps is not None
            and self.timesteps[-1] <= 1 < limit
            and any(t % 1 for t in self.timesteps)
        ):
            raise ValueError(
                f"timesteps of a discrete schedule must lie in [0, {limit}], got fractions up to "
                f"{self.timesteps[-1]:g}, which look like continuous times: give the timesteps, "
                f"such as `{limit} * timesteps`"
            )

    @override
    def _earlier(
        self, t: Tensor, rounding: Tensor | None, schedule: Schedule
    ) -> tuple[Tensor, Tensor]:
        if rounding is None:
            sampled = self._rounded.on(t.device, t.dtype)
            index = torch.searchsorted(sampled, t.contiguous()) - 1
        else:
            sampled, gaps = self._distances[data_at_of(schedule)].on(t.device, t.dtype)
            index = torch.searchsorted(sampled, t.contiguous()) - 1
            before = index.clamp(min=0)
            gap = _pick(gaps, before)
            near = rounding.clamp(min=_SAME_TIME * gap, max=gap / 2)
            index = index - (t - _pick(sampled, before) <= near).long()
        return _pick(sampled, index.clamp(min=0)).unsqueeze(0), (index >= 0).unsqueeze(0)

    @override
    def _key(self) -> tuple[object, ...]:
        return self.timesteps

    @override
    def copy_to(self, device: torch.device) -> None:
        for distances in self._distances:
            distances.on(device, wide_dtype(device))

    @override
    def __repr__(self) -> str:
        values = [f"{value:g}" for value in self.timesteps]
        if len(values) > 6:
            values = [*values[:3], "...", *values[-2:]]
        return f"SkipSet.from_timesteps([{', '.join(values)}])"
