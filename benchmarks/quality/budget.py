"""How a network is trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """How a network is trained; the same for every objective.

    Attributes:
        steps: Optimiser steps.
        batch_size: Images per step.
        learning_rate: Adam's.
        anneal: Let the learning rate fall to zero along a cosine.
        ema_decay: Largest decay of the averaged weights, which are the ones that sample.
        ema_power: After n steps that decay is at most 1 - (1 + n)^-power, so that the average spans
            about n^power of them; None for (1 + n) / (10 + n), a ninth of them.
        grad_clip: Bound of the gradient's norm; None for none.
        flip: Mirror images at random.
        log_every: Steps per point of the loss curve.
        checkpoint_every: Steps between checkpoints.
        warmup: Steps over which the learning rate rises from zero.
        keep_at: Shares of the steps after which the whole state is kept for good, as
            `state-<percent>.pt`, to branch from.
        branch_at: The one of these shares at which an objective that branches starts, from the
            plain run's state of its seed; None to train each from the start.
    """

    steps: int
    batch_size: int
    learning_rate: float
    anneal: bool = True
    ema_decay: float = 0.999
    grad_clip: float | None = None
    flip: bool = False
    log_every: int = 100
    checkpoint_every: int = 1000
    warmup: int = 0
    keep_at: tuple[float, ...] = ()
    branch_at: float | None = None
    ema_power: float | None = None
