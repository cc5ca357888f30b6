"""What DDIM and Euler leave of the deviation of Gaussian data, their steps written out."""

import math
from itertools import pairwise

import torch


def ddim(variances, levels, steps, gains=None):
    """Return the samples' deviation along each axis; ε̂ is exact, times a gain for each t."""
    x = torch.ones_like(variances)
    times = range(1000 - 1000 // steps, -1, -1000 // steps)
    for t, before in pairwise([*times, None]):
        a = levels[t]
        b = torch.ones_like(a) if before is None else levels[before]
        epsilon = (1 - a).sqrt() * x / (a * variances + 1 - a)
        if gains is not None:
            epsilon = gains[t] * epsilon
        x = b.sqrt() * (x - (1 - a).sqrt() * epsilon) / a.sqrt() + (1 - b).sqrt() * epsilon
    return x


def euler(variance, steps, delta=0.0, shift=1.0):
    """Return the samples' deviation over the data's, with the gain of δ on ε̂ = x + (1-t) u.

    At τ = 0.99, and with c² at most 100 on what a network's own output is asked to change.
    """
    equal = [1 - i / steps for i in range(steps)] + [0.0]
    x = 1.0
    for t, after in pairwise(shift * e / (1 + (shift - 1) * e) for e in equal):
        noise = t * x / ((1 - t) ** 2 * variance + t**2)
        velocity = noise - (1 - t) * variance * x / ((1 - t) ** 2 * variance + t**2)
        if delta and delta <= t < 1:
            early, late = ((1 - u) ** 2 / ((1 - u) ** 2 + u**2) for u in (t - delta, t))
            c2 = min(early / late - 1, 100 * (1 - t) ** 2)
            velocity = (0.99 / (0.99 + 0.01 * c2) * noise - x) / (1 - t)
        x += (after - t) * velocity
    return x / math.sqrt(variance)
