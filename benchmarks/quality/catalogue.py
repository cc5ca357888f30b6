"""The presets' names, in an order to read, with what each is and what it takes.

Without torch, so that the command line's help is there at once.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """What a preset is, and what it takes, in a few words."""

    about: str
    cost: str


CATALOGUE = {
    "digits": Entry("the README's run: handwritten digits", "minutes on 2 cores"),
    "digits-full": Entry("the whole grid on the digits, five seeds", "an hour or two on 2 cores"),
    "textures": Entry(
        "8 x 8 grey crops of two photographs, which 8 bits hardly change, five seeds",
        "an hour on 2 cores",
    ),
    "cifar10-16": Entry(
        "CIFAR10 at 16 x 16 pixels, a U-Net of 4.24 M parameters on ε",
        "4 hours a seed on 2 cores, --data FOLDER",
    ),
    "cifar10-16-10k": Entry(
        "its main cells with 10,000 samples",
        "half an hour on 2 cores after cifar10-16, --data FOLDER",
    ),
    "cifar10-16-million": Entry(
        "plain and with its loss of k = 49, twice the training, a million images, one seed",
        "2 hours a network on 2 cores, --data FOLDER",
    ),
    "cifar10-16-flow": Entry(
        "the same network on a flow, x_t = (1 - t) x_0 + t ε",
        "3 hours a seed on 2 cores, --data FOLDER",
    ),
    "cifar10-16-flow-10k": Entry(
        "whether its gain helps, with 10,000 samples",
        "a quarter of an hour a seed on 2 cores after cifar10-16-flow, --data FOLDER",
    ),
    "cifar10-16-flow-million": Entry(
        "plain and with its loss of δ = 0.05, twice the training, a million images, one seed",
        "2 hours a network on 2 cores, --data FOLDER",
    ),
    "cifar10-wide": Entry(
        "CIFAR10, a U-Net of 2.68 M parameters on blocks of 4 x 4 pixels, three seeds",
        "2 hours a seed on 2 cores, --data FOLDER",
    ),
    "cifar10-wide-10k": Entry(
        "its main cells with 10,000 samples, and Min-SNR from the start",
        "an hour on 2 cores after cifar10-wide, --data FOLDER",
    ),
    "cifar10-unet": Entry(
        "CIFAR10, a U-Net of the paper's size for 2 million images",
        "half an hour on a GPU, --data FOLDER",
    ),
}


def listed() -> str:
    """Return the presets, each on a line with its cost."""
    width = max(map(len, CATALOGUE))
    lines = (f"  {name:{width}}  {one.about} ({one.cost})" for name, one in CATALOGUE.items())
    return "\n".join(lines)
