"""Files that are either whole or absent, however a run ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a neighbour of ``path``, then move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since writers such as matplotlib's read the format from it.
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    write(partial)
    partial.replace(path)


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary of tensors and plain values."""
    write_whole(path, lambda partial: torch.save(content, partial))


def load_tensors(path: Path) -> dict[str, Any]:
    """Read what :func:`save_tensors` wrote, onto the CPU."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def save_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def load_json(path: Path) -> Any:
    """Read JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a run's record: JSON, one result to a line, so that a difference can be read."""
    rows = record["rows"]
    shell = json.dumps({**record, "rows": []}, indent=1, ensure_ascii=False)
    listed = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    text = shell.replace('"rows": []', f'"rows": [\n{listed}\n ]' if rows else '"rows": []')
    write_whole(path, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
