"""What is planned for minutes on a GPU: `python -m benchmarks.quality gpu`.

Each part is a preset that stops after `LIMIT` seconds, keeps what it has, goes on when it is
started again, and writes its record before the next begins.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.files import save_record
from benchmarks.quality.corrections import Gain, ScoreRescaling
from benchmarks.quality.networks import PixelUNetSpec
from benchmarks.quality.objectives import Plain, SkipStep
from benchmarks.quality.presets import CIFAR10_UNET, TEN, Preset, arm
from benchmarks.quality.record import collect
from benchmarks.quality.runner import run
from benchmarks.quality.search import search
from benchmarks.quality.statistics import Cell

LIMIT = 480
SOLVERS = ("ddim", "unipc", "pndm", "deis")


@dataclass(frozen=True)
class Part:
    """A part of the plan.

    Attributes:
        name: What it is called, and its folder.
        about: What it asks.
        preset: What is trained and measured.
        searches: The cells in which the search is asked.
    """

    name: str
    about: str
    preset: Preset
    searches: tuple[Cell, ...] = ()


_UNET = replace(CIFAR10_UNET, budget=replace(CIFAR10_UNET.budget, checkpoint_every=2_000))
_FROM_START = replace(_UNET.budget, branch_at=None, keep_at=())
PARTS = (
    Part(
        "unet-seed1",
        "seed 1 of the U-Net: gains and score rescaling on both sides, with four solvers",
        replace(
            _UNET,
            seeds=(1,),
            arms=(
                *(arm(Plain(), one, SOLVERS, TEN) for one in (None, Gain(49), Gain(9), Gain(99))),
                *(arm(Plain(), ScoreRescaling(k), ("ddim",), TEN) for k in (0.97, 1.03, 1.05)),
            ),
        ),
    ),
    Part(
        "unet-loss49",
        "k = 49 from the start, seed 0, beside the recorded plain network",
        replace(_UNET, budget=_FROM_START, arms=(arm(SkipStep(49), samplers=SOLVERS, steps=TEN),)),
    ),
    Part(
        "unet-loss9",
        "k = 9 from the start, seed 0",
        replace(_UNET, budget=_FROM_START, arms=(arm(SkipStep(9), samplers=SOLVERS, steps=TEN),)),
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
    ),
    Part(
        "search",
        "what the search recommends for seed 1 of the U-Net, with DDIM and with UniPC",
        replace(_UNET, seeds=(1,), arms=(arm(Plain(), samplers=("ddim",), steps=TEN),)),
        searches=(Cell("ddim", 10), Cell("unipc", 10)),
    ),
)


def do(part: Part, out: Path, data: Path | None, seconds: int = LIMIT) -> str:
    """Do a part, or go on with it, for so many seconds; return what came of it.

    Args:
        part: The part.
        out: The folder of all parts.
        data: Where the data lie.
        seconds: After these it stops.
    """
    # The search has the networks of the first part.
    root = out / (PARTS[0].name if part.searches else part.name)
    ended = "complete"
    try:
        with _limited(seconds):
            run(part.preset, root, data_folder=data)
            for cell in part.searches:
                for seed in part.preset.seeds:
                    search(part.preset, root, seed, cell, data)
    except TimeoutError:
        ended = f"stopped after {seconds} seconds; the same command goes on"
    record = collect(part.preset, root)
    path = out / f"{part.name}.json"
    save_record(path, record)
    return f"{part.name}: {ended}; {len(record['rows'])} cells in {path}"


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
