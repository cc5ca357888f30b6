"""What the pages' pipeline blocks have at hand: a tiny pipeline and a few pictures."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.helpers.diffusers_parts import tiny_pipeline
from tests.helpers.small import digits

pipe = tiny_pipeline()
photographs = torch.rand(64, 1, 8, 8)


def few(search):
    """Return a search with as few samples as it takes."""
    return partial(search, num_samples=32, batch_size=32, schedulers=[], progress=False)


def make(pipeline, pictures):
    """Write a pipeline and a folder of pictures into the working directory."""
    tiny_pipeline().save_pretrained(pipeline)
    Path(pictures).mkdir()
    for number, image in enumerate(digits(200)):
        values = ((image[0] + 1) * 127.5).round().numpy().astype(np.uint8)
        Image.fromarray(values).save(Path(pictures) / f"{number:03}.png")
