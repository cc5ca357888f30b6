"""Everything that is worth measuring on a GPU, within minutes.

The parts run in the order of their worth, each in a process of its own, which writes after every
result: one that fails, hangs or compiles for too long loses what it had not finished, and no time
of the parts after it. What a part does not use goes to the next.

This plan was rehearsed on a CPU and with a pretended GPU. No GPU has run it yet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Levels that are measured in one process.

    Attributes:
        levels: Their names.
        seconds: Their time, start-up included, of `SECONDS` in all.
    """

    levels: tuple[str, ...]
    seconds: float


PARTS = (
    Part(("bandwidth", "float32"), 75),
    Part(("bfloat16",), 55),
    Part(("compiled",), 110),
    Part(("step",), 45),
    Part(("step-compiled",), 110),
    Part(("step-graph",), 40),
    Part(("counts",), 40),
)
SECONDS = sum(part.seconds for part in PARTS)
START_UP = 10.0
"""Seconds of a part that are not for measuring: imports, and an end before it is ended."""


def follow(
    command: Callable[[Part, float], Sequence[str]],
    seconds: float,
    say: Callable[[str], object],
    parts: Sequence[Part] = PARTS,
) -> None:
    """Run the parts, all of them together within `seconds`.

    Args:
        command: Returns the command of a part that is to stop by itself after the given seconds.
        seconds: Time for all parts, divided as theirs are.
        say: Told what begins, and what did not end well.
        parts: What to run.
    """
    end, scale = time.monotonic() + seconds, seconds / sum(part.seconds for part in parts)
    for number, part in enumerate(parts):
        names = ", ".join(part.levels)
        reserved = scale * sum(later.seconds for later in parts[number + 1 :])
        limit = end - time.monotonic() - reserved
        say(f"{names}: at most {limit:.0f} s")
        began = time.monotonic()
        status = _run(command(part, max(limit - START_UP, limit / 2)), limit)
        if status is None:
            say(f"{names}: ended after {limit:.0f} s; what it had written is kept")
        elif status:
            say(f"{names}: failed with exit status {status}; what it had written is kept")
        else:
            say(f"{names}: done in {time.monotonic() - began:.0f} s")


def _run(command: Sequence[str], seconds: float) -> int | None:
    """Return a command's exit status, or end it with all that it started and return None."""
    process = subprocess.Popen(command, start_new_session=True)  # noqa: S603 - our own command
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # What compiles for it stays behind when the process itself is gone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_command(options: Sequence[str]) -> Callable[[Part, float], list[str]]:
    """Return what `follow` needs: `python -m benchmarks.overhead run` with these options."""

    def command(part: Part, seconds: float) -> list[str]:
        levels = [word for level in part.levels for word in ("--level", level)]
        program = [sys.executable, "-m", "benchmarks.overhead", "run"]
        return [*program, *levels, "--budget", f"{seconds:.0f}", *options]

    return command
