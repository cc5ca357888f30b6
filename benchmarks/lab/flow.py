"""Euler's method on the straight path, for Gaussian data: the spread of its samples, exactly.

On x_t = (1-t) x_0 + t ε with data N(0, v) the exact velocity is linear in x_t,
E[ε - x_0 | x_t] = (t - (1-t) v) / ((1-t)² v + t²) · x_t, and so is every step. One axis of standard
deviation 1 at t = 1, pushed through the steps, is the standard deviation of the samples.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.quality.samplers import flow_times, heun
from s2dm_loss import ContinuousSchedule, ScaledModel

FLOW = ContinuousSchedule.flow()


class ExactVelocity(nn.Module):
    """E[ε - x_0 | x_t] for data N(0, v), called `(x_t, t)`."""

    def __init__(self, variance: float) -> None:
        """Keep v."""
        super().__init__()
        self.variance = variance

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity for x_t of shape [B] and one t."""
        data, noise = (1 - t) ** 2 * self.variance, t**2
        return (t - (1 - t) * self.variance) / (data + noise) * x_t


def spread(
    variance: float, steps: int, *, skip: float = 0.0, shift: float = 1.0, method: str = "euler"
) -> float:
    """Return the samples' standard deviation over the data's.

    Args:
        variance: The data's.
        steps: Euler's steps; Heun takes half as many, so that it calls the model no more often.
        skip: δ of the gain, at τ = 0.99; 0 for none.
        shift: Of the times.
        method: "euler" or "heun".
    """
    model: nn.Module = ExactVelocity(variance)
    if skip:
        model = ScaledModel.with_gain(model, FLOW, skip, prediction_type="flow")
    x = torch.ones(1, dtype=torch.float64)
    if method == "heun":
        x = heun(lambda x, t: model(x, t / 1000), shift, steps, x)
    else:
        for t, after in pairwise(flow_times(steps, shift)):
            x = x + (after - t) * model(x, t)
    return float(x) / variance**0.5
