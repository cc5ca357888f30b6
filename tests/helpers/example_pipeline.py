"""A tiny pipeline with random weights and a folder of pictures, for the example of the docs."""

import numpy as np
import torch
from PIL import Image

from tests.helpers.diffusers_parts import diffusers, make_scheduler, tiny_unet
from tests.helpers.small import digits


def make(pipeline: str, pictures: str, count: int = 200) -> None:
    """Write both into the working directory."""
    from pathlib import Path

    torch.manual_seed(0)
    pipe = diffusers.DDIMPipeline(unet=tiny_unet(), scheduler=make_scheduler("DDIMScheduler"))
    pipe.save_pretrained(pipeline)
    Path(pictures).mkdir()
    for number, image in enumerate(digits(count)):
        values = ((image[0] + 1) * 127.5).round().numpy().astype(np.uint8)
        Image.fromarray(values).save(Path(pictures) / f"{number:03}.png")
