"""A real checkout of ermongroup/ddim behind the names of its double, and its own loop."""

import importlib
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.patches import patched
from tests.helpers.small import tree
from tests.helpers.upstream import checkout_on_path, stub, stubs

# The fields of the trainer's configuration that its own code reads.
CONFIG = tree({
    "data": {"image_size": 8, "channels": 1, "num_workers": 0},
    "model": {
        "type": "simple", "in_channels": 1, "out_ch": 1, "ch": 32, "ch_mult": [1],
        "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "var_type": "fixedlarge",
        "ema": True, "ema_rate": 0.5, "resamp_with_conv": True,
    },
    "diffusion": {
        "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02,
        "num_diffusion_timesteps": 1000,
    },
    "training": {"batch_size": 32, "n_epochs": 1, "snapshot_freq": 20},
    "optim": {
        "optimizer": "Adam", "lr": 3e-3, "weight_decay": 0.0, "beta1": 0.9, "amsgrad": False,
        "eps": 1e-8, "grad_clip": 1.0,
    },
    "device": torch.device("cpu"),
})  # fmt: skip


@contextmanager
def _runner_module(root, *, images=None, swap=False):
    """The runner's module, fed with `images`."""
    stubbed = stubs("torchvision", "torchvision.utils", "requests")
    stubbed["datasets"] = stub(
        "datasets", get_dataset=lambda *_: (images, images), data_transform=lambda _, x: 2 * x - 1
    )
    with checkout_on_path(root, stubbed):
        if swap:
            losses = importlib.import_module("functions.losses")
            source = (root / "functions" / "losses.py").read_text()
            source = patched("ddim", "functions/losses.py", source)
            exec(compile(source, "functions/losses.py", "exec"), vars(losses))  # noqa: S102 - theirs
        yield importlib.import_module("runners.diffusion")


def load_ddim(root):
    """The checkout's loss and schedules, and its own runner with the documented swap."""
    with _runner_module(root) as module:
        registry = importlib.import_module("functions.losses").loss_registry
        get_beta_schedule = module.get_beta_schedule

    def runner(module, config, **args):
        return module.Diffusion(SimpleNamespace(**args), config, device=config.device)

    def train(config, directory, images, *, swap=False):
        losses = []
        logger = SimpleNamespace(add_scalar=lambda _, loss, **__: losses.append(loss.item()))
        config = SimpleNamespace(**vars(config), tb_logger=logger)
        pairs = torch.utils.data.TensorDataset(images, torch.zeros(len(images)))
        with _runner_module(root, images=pairs, swap=swap) as module:
            runner(module, config, resume_training=False, log_path=str(directory)).train()
        return losses

    def sample_image(config, model, x, skip_type, timesteps):
        options = {"sample_type": "generalized", "eta": 0.0}
        with _runner_module(root) as module, pytest.MonkeyPatch.context() as patch:
            drawn = runner(module, config, skip_type=skip_type, timesteps=timesteps, **options)
            # The sampler moves its tensors to "cuda" by name.
            patch.setattr(torch.Tensor, "to", lambda tensor, _: tensor)
            return drawn.sample_image(x, model)

    return SimpleNamespace(
        noise_estimation_loss=registry["simple"],
        get_beta_schedule=get_beta_schedule,
        train=train,
        sample_image=sample_image,
    )
