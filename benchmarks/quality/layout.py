"""The folder of a run: where each file lies, whose it is, and who is at work in it.

    settings.json                              what all cells depend on
    lock                                       held while a run is at work
    features.pt                                the feature network
    reference.pt                               the features of what samples are compared with
    floor.json                                 distances between sets of real images
    models/<objective>/seed<n>/                weights.pt, training.json; checkpoints meanwhile
    cells/<method>/seed<n>/<sampler>-<steps>.json    one result, and .pt with its first samples
    results.json, table.md, *.png              the report

Each file appears whole or not at all, and whatever is there is not done again; so a run that was
killed goes on where it was by being started again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from benchmarks.files import load_json, save_json
from benchmarks.quality.objectives import Method, Objective
from benchmarks.quality.presets import Preset

SETTINGS, REFERENCE, FLOOR = "settings.json", "reference.pt", "floor.json"


@dataclass(frozen=True)
class Layout:
    """Where a run keeps its files; its networks may be another run's, in that run's folder."""

    root: Path
    networks: Path

    @classmethod
    def of(cls, preset: Preset, root: Path) -> Layout:
        """Return a preset's, in a folder beside that of the preset whose networks it has."""
        other = preset.networks_of
        return cls(root, root if other is None else root.resolve().parent / other.name)

    def model(self, objective: Objective, seed: int) -> Path:
        """Return the folder of one training run."""
        return self.networks / "models" / objective.name / f"seed{seed}"

    def cell(self, method: Method, seed: int, sampler: str, steps: int) -> Path:
        """Return the file of one result."""
        return self.root / "cells" / method.name / f"seed{seed}" / f"{sampler}-{steps}.json"


@contextmanager
def claimed(preset: Preset, root: Path) -> Iterator[None]:
    """Hold a folder for a preset; a run that leaves nothing behind leaves no folder either.

    Raises:
        ValueError: If the folder is a file, holds results made with other settings, or another run
            is at work in it.
        OSError: If the folder cannot be written.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"out: expected a folder, and {root} is a file")
    folders = dict.fromkeys((root, Layout.of(preset, root).networks))
    paths = [path for folder in folders for path in (folder, *folder.parents)]
    made = [path for path in dict.fromkeys(paths) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"out: another run is at work in {root}; wait for it, or choose another folder"
        ) from error
    try:
        check_settings(preset, root)
        for one, layout in _with_networks(preset, root):
            if not (layout.root / SETTINGS).exists():
                save_json(layout.root / SETTINGS, one.settings)
        yield
    finally:
        _remove_what_is_empty(made)
        lock.release()


def check_settings(preset: Preset, root: Path) -> None:
    """Raise ValueError if a preset's folder, or its networks', holds results of other settings."""
    for one, layout in _with_networks(preset, root):
        if not (layout.root / SETTINGS).exists():
            continue
        stored = load_json(layout.root / SETTINGS)
        if differing := [key for key, value in one.settings.items() if stored.get(key) != value]:
            key = differing[0]
            raise ValueError(
                f"out: {layout.root} holds results of other settings ({', '.join(differing)}): "
                f"{key} is {stored.get(key)!r} there and {one.settings[key]!r} here; choose "
                "another folder"
            )


def _with_networks(preset: Preset, root: Path) -> Iterator[tuple[Preset, Layout]]:
    """Yield a preset and its folder, after those whose networks it has."""
    layout = Layout.of(preset, root)
    if preset.networks_of is not None:
        yield from _with_networks(preset.networks_of, layout.networks)
    yield preset, layout


def _remove_what_is_empty(made: list[Path]) -> None:
    """Remove the folders that this run made, if nothing but its claim is in them."""
    for folder in sorted(made, reverse=True):  # what lies in a folder before the folder
        if not folder.is_dir():
            continue
        content = list(folder.iterdir())
        if {path.name for path in content} <= {"lock", SETTINGS}:
            for path in content:
                path.unlink()
            folder.rmdir()
