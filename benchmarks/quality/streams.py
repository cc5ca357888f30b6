"""Random numbers, split so that every objective of a seed meets the same ones.

The differences under test are of a few percent, and a seed's own noise is larger.  So the data
order, the timesteps and the training noise come from one stream, whatever an objective draws
besides from another, and sampling starts from the same noise for everybody.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a stream is for; part of its seed."""

    INITIALISATION = 0
    TRAINING = 1
    EXTRA = 2
    START = 3
    SAMPLER = 4


def generator(seed: int, purpose: Purpose, part: int = 0) -> torch.Generator:
    """Return a CPU generator of its own for one seed, purpose and part.

    CPU whatever the device, so that a run meets the same numbers everywhere.
    """
    return torch.Generator().manual_seed((seed * 100 + purpose) * 1_000_000 + part)


class Stream:
    """Draws for a batch."""

    def __init__(self, source: torch.Generator, batch_size: int, device: torch.device) -> None:
        """Keep where numbers come from and go to."""
        self.source, self.batch_size, self.device = source, batch_size, device

    def integers(self, high: int) -> Tensor:
        """Return uniform integers in `[0, high)`, shape `[B]`."""
        return self._placed(torch.randint(high, (self.batch_size,), generator=self.source))

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Return standard normal numbers, shape `[B, *shape]`."""
        return self._placed(torch.randn(self.batch_size, *shape, generator=self.source))

    def _placed(self, drawn: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return drawn.to(self.device)
        # From pinned memory the copy makes nobody wait, and the next step is drawn meanwhile.
        return drawn.pin_memory().to(self.device, non_blocking=True)
