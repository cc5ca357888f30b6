"""Everything that is worth measuring on a GPU, within minutes.

The parts run in the order of their worth, each in a process of its own, which writes after every
result: one that fails, hangs or compiles for too long loses what it had not finished, and no time
of the parts after it. What a part does not use goes to these.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

Levels = tuple[str, ...]

PARTS: dict[Levels, float] = {
    ("bandwidth", "float32"): 75,
    ("bfloat16",): 55,
    ("compiled",): 110,
    ("step",): 45,
    ("step-compiled",): 110,
    ("step-graph",): 40,
    ("counts",): 40,
}
"""Levels that are measured in one process, and its seconds, start-up included."""
LEVELS = [level for part in PARTS for level in part]
START_UP = 10.0
"""Seconds of a part that are not for measuring: imports, and an end before it is ended."""


def follow(options: Sequence[str], seconds: float, say: Callable[[str], object]) -> None:
    """Run the parts, with options that all share, and say what became of each.

    They have `seconds` together, divided as theirs are.
    """
    end, later = time.monotonic() + seconds, sum(PARTS.values())
    for levels, share in PARTS.items():
        names = ", ".join(levels)
        began = time.monotonic()
        limit = (end - began) * share / later
        later -= share
        say(f"{names}: at most {limit:.0f} s")
        program = [*command(levels, max(limit - START_UP, limit / 2)), *options]
        process = subprocess.Popen(program, start_new_session=True)  # noqa: S603 - our own command
        try:
            status = process.wait(limit)
            outcome = f"failed with exit status {status}; what it had written is kept"
            if status == 0:
                outcome = f"done in {time.monotonic() - began:.0f} s"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {limit:.0f} s; what it had written is kept"
        finally:
            # What compiles for it stays behind when the process itself is gone.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        say(f"{names}: {outcome}")


def command(levels: Levels, seconds: float) -> list[str]:
    """Return what measures some levels, and stops by itself after so many seconds."""
    program = [sys.executable, "-m", "benchmarks.overhead", "run", "--budget", f"{seconds:.0f}"]
    return [*program, *(word for level in levels for word in ("--level", level))]
