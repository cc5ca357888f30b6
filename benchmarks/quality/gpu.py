"""What is planned for minutes on a GPU: `python -m benchmarks.quality gpu`.

Each part is a preset that stops after its time, keeps what it has, goes on when it is
started again, and writes its record before the next begins.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.files import load_tensors, save_record, save_tensors
from benchmarks.quality.corrections import Gain, ScoreRescaling
from benchmarks.quality.layout import Layout
from benchmarks.quality.networks import PixelUNetSpec
from benchmarks.quality.objectives import Plain, SkipStep
from benchmarks.quality.presets import CIFAR10_UNET, TEN, Preset, arm
from benchmarks.quality.record import collect
from benchmarks.quality.runner import run
from benchmarks.quality.search import search

LIMIT = 480
PART_BYTES = 15 * 2**20
"""Of one file of kept weights."""
SOLVERS = ("ddim", "unipc", "pndm", "deis")


@dataclass(frozen=True)
class Part:
    """A part of the plan: what is trained and measured, and what samplers the search is asked of.

    The plain network's averaged weights may be kept, in bfloat16.
    """

    name: str
    about: str
    preset: Preset
    keep_weights: bool = False
    searched: tuple[str, ...] = ()


# A state takes half a gigabyte and a second, and nothing branches off here.
_UNET = replace(
    CIFAR10_UNET, budget=replace(CIFAR10_UNET.budget, checkpoint_every=8_000, keep_at=())
)
_FROM_START = replace(_UNET.budget, branch_at=None)
PARTS = (
    Part(
        "unet-seed1",
        "seed 1 of the U-Net: gains and score rescaling on both sides, with four solvers",
        replace(
            _UNET,
            seeds=(1,),
            arms=tuple(  # in the order of their worth, should time run out
                arm(Plain(), one, solvers, TEN)
                for solvers, corrections in (
                    (("ddim",), (None, Gain(49))),
                    (("unipc",), (None, Gain(49))),
                    (("ddim",), (ScoreRescaling(1.05), Gain(9), Gain(99))),
                    (("ddim",), (ScoreRescaling(0.97), ScoreRescaling(1.03))),
                    (("unipc",), (Gain(9), Gain(99))),
                    (("pndm", "deis"), (None, Gain(49), Gain(9), Gain(99))),
                    (SOLVERS[1:], tuple(map(ScoreRescaling, (1.05, 0.97, 1.03)))),
                )
                for one in corrections
            ),
        ),
        keep_weights=True,
    ),
    *(
        Part(
            f"unet-loss{k}",
            f"k = {k} from the start, seed 0, beside the recorded plain network",
            replace(_UNET, budget=_FROM_START, arms=(arm(SkipStep(k), None, SOLVERS, TEN),)),
        )
        for k in (49, 9)
    ),
    Part(
        "flow-unet",
        "a flow U-Net of the same size: its gain with Euler",
        replace(
            _UNET,
            path="flow",
            network=PixelUNetSpec(_UNET.network.unet),  # type: ignore[attr-defined]
            budget=_FROM_START,
            arms=tuple(
                arm(Plain(), one, ("euler",), (10, 20, 28, 50))
                for one in (None, Gain(0.05), Gain(0.1))
            ),
        ),
        keep_weights=True,
    ),
    Part(
        "search",
        "which pair of solver and correction the search recommends for seed 1 of the U-Net",
        replace(_UNET, seeds=(1,), arms=(arm(Plain(), samplers=("ddim",), steps=TEN),)),
        searched=SOLVERS,
    ),
)


def do(part: Part, out: Path, data: Path | None, seconds: int = LIMIT) -> str:
    """Do a part in `out`, or go on with it, for so many seconds; return what came of it."""
    # The search has the networks of the first part.
    root = out / (PARTS[0].name if part.searched else part.name)
    layout, ended = Layout.of(part.preset, root), "complete"
    models = {layout.model(Plain(), seed): f"{root.name}-seed{seed}" for seed in part.preset.seeds}
    try:
        with _limited(seconds):
            for model, name in models.items():
                bring_back(out / "weights" / name, model)
            run(part.preset, root, data_folder=data)
            for seed in part.preset.seeds if part.searched else ():
                search(part.preset, root, seed, part.searched, TEN[0], data)
    except _OutOfTimeError:
        ended = f"stopped after {seconds} seconds; the same command goes on"
    record = collect(part.preset, root)
    path = out / f"{part.name}.json"
    save_record(path, record)
    if part.keep_weights and ended == "complete":
        for model, name in models.items():
            save_in_parts(model / "weights.pt", out / "weights" / name)
            shutil.copy(model / "training.json", out / "weights" / name)
    return f"{part.name}: {ended}; {len(record['rows'])} cells in {path}"


def save_in_parts(weights: Path, folder: Path, size: int = PART_BYTES) -> None:
    """Write a network's weights, the large in bfloat16, in files of `size` bytes or one tensor."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in load_tensors(weights).items():
        # What is measured of the data is small, and stays exact.
        large = tensor.is_floating_point() and tensor.numel() > 4096
        small = tensor.bfloat16() if large else tensor
        if parts[-1] and filled + small.nbytes > size:
            parts.append({})
            filled = 0
        parts[-1][name] = small
        filled += small.nbytes
    for number, part in enumerate(parts):
        save_tensors(folder / f"{number}.pt", part)


def load_from_parts(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that `save_in_parts` wrote, in float32."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.pt"):
        found |= load_tensors(path)
    return {name: x.float() if x.is_floating_point() else x for name, x in found.items()}


def bring_back(kept: Path, model: Path) -> None:
    """Put weights that were kept to where a run looks for them, unless it has some."""
    if (kept / "training.json").exists() and not (model / "weights.pt").exists():
        save_tensors(model / "weights.pt", load_from_parts(kept))
        shutil.copy(kept / "training.json", model)


class _OutOfTimeError(BaseException):
    """No Exception, since whoever reads or writes a file would take it for the file's fault."""


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise _OutOfTimeError after so many seconds."""

    def stop(*_: object) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
