"""The state of a training that is under way, and the one before it.

A checkpoint holds everything that the next step depends on.  Two are kept, so that one damaged file
costs the steps since the other and not the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.files import load_tensors, save_tensors

NEWEST, BEFORE = "checkpoint.pt", "checkpoint-before.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the one that was there becomes the one before."""
    save_tensors(folder / NEWEST, state, keep=folder / BEFORE)


def newest_state(folder: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint that can be read, or None where there is none at all.

    Raises:
        ValueError: If there are checkpoints and none can be read.
    """
    there = [path for path in (folder / NEWEST, folder / BEFORE) if path.exists()]
    for path in there:
        try:
            state = load_tensors(path)
        except ValueError as error:
            if path == there[-1]:
                raise
            tqdm.write(f"{error}.")
        else:
            if path != there[0]:
                tqdm.write(f"Going on from {path}, step {state['step']:,}.")
            return state
    return None


def remove_states(folder: Path) -> None:
    """Remove the checkpoints of a finished training."""
    for name in (NEWEST, BEFORE):
        (folder / name).unlink(missing_ok=True)
