"""What a search says while it runs: a bar, or a line for each candidate."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

Progress = bool | Callable[[list[Any]], Iterable[Any]]
"""True, False, or a wrapper of a list, such as `tqdm.tqdm`, that shows how far it has come."""


class Reporter:
    """Shows the progress of a known number of sampler runs, on the standard error stream.

    On a terminal that is tqdm's bar if tqdm is installed, and elsewhere a line for each candidate.
    """

    def __init__(self, progress: Progress, runs: int, cost: str) -> None:
        """Say what the runs will cost; False says nothing."""
        self._runs, self._done, self._start = runs, 0, time.monotonic()
        self._speaks = progress is True
        self._ticks: Iterator[Any] = iter(())
        self.say(cost)
        if progress is True and sys.stderr.isatty():
            progress = _bar() or True
        if not isinstance(progress, bool):
            self._speaks = False
            self._ticks = iter(progress(list(range(runs))))
            next(self._ticks, None)

    def say(self, line: str) -> None:
        """Print a line, if no bar is shown."""
        if self._speaks:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 - what it is for

    def ran(self) -> None:
        """Count one sampler run, and say after the first how long all will take."""
        self._done += 1
        next(self._ticks, None)
        if self._done == 1:
            seconds = (time.monotonic() - self._start) * self._runs
            self.say(f"about {seconds / 60:.0f} min" if seconds > 90 else f"about {seconds:.0f} s")

    def close(self) -> None:
        """Bring a bar to its end: a search may need fewer runs than stated."""
        for _ in islice(self._ticks, self._runs):
            pass


def _bar() -> Callable[[list[Any]], Iterable[Any]] | None:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    bar: Callable[[list[Any]], Iterable[Any]] = tqdm
    return bar
