"""Files that are either whole or absent, however a run ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_whole(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Let `write` fill a neighbour of `path`, then move it there in one step.

    A file that is there already moves to `keep`, if that is given.

    Raises:
        OSError: If it cannot be written, as on a full disk; what was at `path` is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since writers such as matplotlib's read the format from it. A killed process
    # may leave this file; the next writer overwrites it.
    partial = path.with_name(f".partial.{path.name}")
    try:
        write(partial)
        # Onto the disk before the name: else a power cut can leave the name and half the content.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        partial.replace(path)
    except OSError as error:
        kept = "the one that was there is kept" if path.exists() else "nothing was written"
        raise OSError(f"cannot write {path}: {error.strerror or error}; {kept}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def save_tensors(path: Path, content: dict[str, Any], keep: Path | None = None) -> None:
    """Write a dictionary of tensors and plain values."""

    def write(partial: Path) -> None:
        try:
            torch.save(content, partial)
        except RuntimeError as error:  # torch's writer says so of any trouble with the disk
            raise OSError(str(error).splitlines()[0]) from error

    write_whole(path, write, keep)


def load_tensors(path: Path) -> dict[str, Any]:
    """Read what `save_tensors` wrote, onto the CPU.

    Raises:
        ValueError: If the file is damaged, or holds anything but tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file fails in many ways
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read ({cause}); remove it to have it made again"
        ) from error


def save_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def load_json(path: Path) -> Any:
    """Read JSON, or raise ValueError if the file is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); remove it to have it made again"
        ) from error


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a run's record: JSON, one result to a line, so that a difference can be read."""
    rows = record["rows"]
    shell = json.dumps({**record, "rows": []}, indent=1, ensure_ascii=False)
    listed = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    text = shell.replace('"rows": []', f'"rows": [\n{listed}\n ]' if rows else '"rows": []')
    write_text(path, text + "\n")
