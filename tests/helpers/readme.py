"""What the README's pipeline block has at hand: a tiny pipeline and a few pictures."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.helpers.diffusers_parts import diffusers

torch.manual_seed(0)
_unet = diffusers.UNet2DModel(
    sample_size=8,
    block_out_channels=(8,),
    norm_num_groups=4,
    layers_per_block=1,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
)
pipe = diffusers.DDIMPipeline(_unet, diffusers.DDIMScheduler())
pipe.set_progress_bar_config(disable=True)
photographs: Tensor = torch.rand(64, 3, 8, 8)


def few(search: Callable[..., Any]) -> Callable[..., Any]:
    """Return a search with as few samples as it takes."""
    return partial(search, num_samples=32, batch_size=32, schedulers=[], progress=False)
