"""Train the networks of `cifar10-16`, one after the other, resumable.

    python -m benchmarks.quality.train16 --data FOLDER --out FOLDER [--seed 0]

A plain pixel-level U-Net (4.24 million parameters) on CIFAR10 at 16 x 16 pixels. Each objective is
trained from the start, on the same images, times and noise.
"""

from __future__ import annotations

from pathlib import Path

import click
from accelerate import Accelerator

from benchmarks.quality import data as datasets
from benchmarks.quality.budget import Budget
from benchmarks.quality.networks import PixelUNetSpec, UNetSpec
from benchmarks.quality.objectives import Flow, Plain, SkipStep
from benchmarks.quality.training import train
from s2dm_loss import NoiseSchedule

NETWORK = PixelUNetSpec(UNetSpec(channels=64, multipliers=(1, 2, 2), blocks=1, attention_at=()))
# 600,064 images.
BUDGET = Budget(
    steps=4_688,
    batch_size=128,
    learning_rate=1e-3,
    warmup=200,
    flip=True,
    ema_decay=0.999,
    ema_power=0.9,
    checkpoint_every=200,
)
OBJECTIVES = (Plain(), Flow(), SkipStep(49), Flow(0.05))


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path), help="CIFAR10's folder.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--seed", default=0, show_default=True)
def main(data: Path, out: Path, seed: int) -> None:
    """Train what is not trained yet."""
    images = datasets.load("cifar10-16", data)
    for objective in OBJECTIVES:
        folder = out / "models" / objective.name / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        click.echo(f"{objective.name}, seed {seed}")
        train(
            objective,
            seed,
            data=images,
            schedule=NoiseSchedule.linear(1000),
            network=NETWORK,
            budget=BUDGET,
            folder=folder,
            accelerator=Accelerator(cpu=True),
        )


if __name__ == "__main__":
    main()
