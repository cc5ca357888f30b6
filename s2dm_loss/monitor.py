"""Is my training going well? The loss by noise level, and a validation loss that repeats itself.

The mean training loss is dominated by the noise levels that happened to be drawn. `LossByNoise`
splits it by log SNR while training; `validation_loss` evaluates a model at fixed times and noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, distributed
from typing_extensions import Self, override

from s2dm_loss._torch import full_tensor, is_traced, real_tensors, wide_dtype
from s2dm_loss.checks import check_count, describe
from s2dm_loss.schedule import Schedule, check_schedule, log_snr_at
from s2dm_loss.tables import TimeTable
from s2dm_loss.timesteps import times_at
from s2dm_loss.validation import rank_and_size
from s2dm_loss.validation import validation_loss as validation_loss
from s2dm_loss.validation_result import same_log_snr

# Beyond it lie, for flow matching, 1.3 % of uniform times; the outer bins take them.
_LARGEST_LOG_SNR = 10.0


class LossByNoise:
    """Sums of a per-sample loss in bins of log SNR = log(alpha² / sigma²).

    >>> from s2dm_loss import NoiseSchedule
    >>> by_noise = LossByNoise(NoiseSchedule.linear(1000), bins=2)
    >>> by_noise.update(torch.tensor([0, 10, 900]), torch.tensor([0.9, 0.7, 0.1]))
    >>> for name, value in by_noise.compute().items():
    ...     print(f"{name:32} {value:.4f}")
    loss/all                         0.5667
    loss/0_log_snr_below_-0.4        0.1000
    loss/1_log_snr_above_-0.4        0.8000
    loss_error/all                   0.2404
    loss_error/1_log_snr_above_-0.4  0.1000
    loss_count/all                   3.0000
    loss_count/0_log_snr_below_-0.4  1.0000
    loss_count/1_log_snr_above_-0.4  2.0000

    The bins are equally wide in log SNR, between the schedule's ends and within ±10; the two outer
    bins take all beyond, also times without signal or without noise. So a bin means the same noise
    level for every way of drawing times; across schedules compare bins by `edges`, not by number.
    Bins of equal probability would change with the drawing, and would put all of the early times,
    where the loss changes most, into one bin.

    It is no `nn.Module`: a model that holds it keeps its checkpoint's keys.
    """

    def __init__(self, schedule: Schedule, bins: int = 10, *, name: str = "loss") -> None:
        """Make the bins.

        Args:
            schedule: The noise schedule that the times belong to.
            bins: Number of bins, at least 2.
            name: Prefix of the keys that `compute` returns.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        self.schedule: Schedule = check_schedule(schedule)
        self.bins: int = check_count("bins", bins, 2)
        self.name = name
        ends = times_at(self.schedule, torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu"))
        log_snr = log_snr_at(self.schedule, ends).clamp(-_LARGEST_LOG_SNR, _LARGEST_LOG_SNR)
        low, high = sorted(log_snr.tolist())
        if not low < high:
            raise ValueError(
                "schedule must have two noise levels with a log SNR within ±10 or more, got "
                f"{self.schedule!r}, whose ends are both at {low:g}"
            )
        self._low, self._width = low, (high - low) / self.bins
        self._bin = TimeTable(self._rows, self.schedule.timesteps)
        with real_tensors():
            # Count, sum and sum of squares.
            self._sums = torch.zeros(3, self.bins, dtype=torch.float64)

    @property
    def edges(self) -> list[float]:
        """The bins' edges in log SNR, rising; the first and the last are open in `update`."""
        return [self._low + i * self._width for i in range(self.bins + 1)]

    def update(self, t: Tensor, per_sample_loss: Tensor) -> None:
        """Add one batch. The host does not wait for the device, and no gradient is recorded.

        Args:
            t: Times of shape [B], of the schedule.
            per_sample_loss: One loss for each sample, of shape [B]. A loss that is not finite shows
                in its own bin and in the mean over all.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        per_sample_loss = full_tensor(per_sample_loss)
        _check_losses(t, per_sample_loss)
        self.schedule.check_timesteps(t)
        loss = per_sample_loss.detach()
        loss = loss.to(wide_dtype(loss.device))
        t = t if t.device == loss.device else t.to(loss.device)
        row = self._bin.at(t, torch.float32)[0]
        # Compiled code and a GPU do not refuse a time outside the schedule; its row is NaN.
        loss = torch.where(row.isnan(), math.nan, loss)
        row = torch.where(row.isnan(), 0.0, row).long()
        sums = self._sums_on(loss.device)
        sums.index_add_(1, row, torch.stack([torch.ones_like(loss), loss, loss.square()]))

    def __call__(self, t: Tensor, per_sample_loss: Tensor) -> Tensor:
        """Add one batch and return its losses: `by_noise(t, losses).mean().backward()`."""
        self.update(t, per_sample_loss)
        return per_sample_loss

    def compute(self) -> dict[str, float]:
        """Return mean, standard error and count, for each bin and over all, as plain floats.

        With several processes it is over all of them, and every process has to call it: the sums
        are added up in one all-reduce. A bin without losses has no mean, and one with a single loss
        no standard error; their keys are left out. The standard errors are those of times drawn
        independently: with stratified times they are too large, several times over.
        """
        sums = self._reduced()
        rows = torch.cat([sums.sum(1, keepdim=True), sums], dim=1).T.tolist()
        found: dict[str, dict[str, float]] = {"": {}, "_error": {}, "_count": {}}
        for label, (count, total, squares) in zip(["all", *self._labels()], rows, strict=True):
            found["_count"][label] = count
            if count > 0:
                found[""][label] = mean = total / count
            if count > 1:
                variance = (squares - count * mean * mean) / (count - 1)
                # Rounding may leave less than 0; NaN stays NaN.
                found["_error"][label] = math.sqrt(0.0 if variance < 0 else variance / count)
        return {
            f"{self.name}{kind}/{label}": value
            for kind, values in found.items()
            for label, value in values.items()
        }

    def reset(self) -> None:
        """Start anew."""
        self._sums.zero_()

    def to(self, device: torch.device | str) -> Self:
        """Move the sums to a device. `update` does so by itself; call it before `torch.compile`."""
        self._sums_on(torch.device(device))
        self._bin.copy_to(torch.device(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return the sums over all processes, for a checkpoint; every process has to call it."""
        return {"edges": self.edges, "sums": self._reduced()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the sums of a checkpoint: the first process all of them, the others none.

        Raises:
            ValueError: if they belong to other bins.
        """
        if not same_log_snr(state["edges"], self.edges):
            raise ValueError(
                f"state must have this monitor's edges, {self.edges}, got {state['edges']}: make "
                "the monitor with the schedule and the bins that it was saved with"
            )
        device = self._sums.device
        mine = state["sums"] if rank_and_size()[0] == 0 else torch.zeros_like(state["sums"])
        with torch.inference_mode(False):
            self._sums = mine.to(device, wide_dtype(device), copy=True)

    def _rows(self, t: Tensor) -> list[Tensor]:
        position = (log_snr_at(self.schedule, t) - self._low) / self._width
        return [position.clamp(0, self.bins - 1).floor()]

    def _sums_on(self, device: torch.device) -> Tensor:
        if self._sums.device != device:
            # What inference mode makes could not be added to outside of it.
            with nullcontext() if is_traced() else torch.inference_mode(False):
                self._sums = self._sums.to(device, wide_dtype(device))
        return self._sums

    def _reduced(self) -> Tensor:
        sums = self._sums
        if rank_and_size()[1] == 1:
            return sums.to("cpu", torch.float64, copy=True)
        # The same device in each process, also in one that has seen no batch yet.
        if distributed.get_backend() == "gloo":
            device = torch.device("cpu")
        elif sums.device.type == "cpu" and torch.cuda.is_available():
            device = torch.device("cuda")
        else:
            device = sums.device
        sums = sums.to(device, wide_dtype(device), copy=True)
        distributed.all_reduce(sums)
        return sums.to("cpu", torch.float64)

    def _labels(self) -> list[str]:
        digits = len(str(self.bins - 1))
        edges = [f"{edge:.1f}" for edge in self.edges]
        between = [f"{low}_to_{high}" for low, high in pairwise(edges)][1:-1]
        names = [f"below_{edges[1]}", *between, f"above_{edges[-2]}"]
        return [f"{i:0{digits}}_log_snr_{name}" for i, name in enumerate(names)]

    @override
    def __repr__(self) -> str:
        return f"LossByNoise({self.schedule!r}, bins={self.bins})"


def _check_losses(t: Tensor, per_sample_loss: Tensor) -> None:
    if not isinstance(per_sample_loss, Tensor) or not per_sample_loss.is_floating_point():
        raise TypeError(
            f"per_sample_loss must be a floating-point tensor, got {describe(per_sample_loss)}"
        )
    if not isinstance(t, Tensor) or t.ndim != 1:
        raise ValueError(f"t must be a tensor of shape (B,), got {describe(t)}")
    if per_sample_loss.shape != t.shape:
        raise ValueError(
            f"per_sample_loss must have shape ({len(t)},), one loss for each t, got "
            f'{describe(per_sample_loss)}: take reduction="none", and the mean over the data axes, '
            "`loss.flatten(1).mean(1)`"
        )
    if t.requires_grad:
        raise ValueError("t requires grad: the times come first, update(t, per_sample_loss)")
