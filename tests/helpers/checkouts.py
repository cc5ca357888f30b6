"""Real checkouts of ddim and score_sde_pytorch behind the names of their doubles."""

import importlib
import os
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.helpers.patches import patched
from tests.helpers.small import tree
from tests.helpers.upstream import checkout_on_path, stub, stubs


def plain_and_swapped(train, config, directory, make_images):
    """What the trainer's own loop gives as it is, and with the documented swap."""
    for swap in (False, True):
        folder = directory / f"swap={swap}"
        folder.mkdir()
        torch.manual_seed(0)
        yield train(config, folder, make_images(), swap=swap)


# The fields of the trainers' configurations that their own code reads.
DDIM_CONFIG = tree({
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


SCORE_SDE_CONFIG = {
    "training": {
        "reduce_mean": True, "likelihood_weighting": False,
        "n_iters": 20, "batch_size": 32, "log_freq": 1, "eval_freq": 10, "snapshot_freq": 10**6,
        "snapshot_freq_for_preemption": 10**6, "snapshot_sampling": False,
    },
    "data": {
        "image_size": 8, "num_channels": 1, "centered": True, "uniform_dequantization": False,
    },
    "model": {
        "name": "ddpm", "beta_min": 0.1, "beta_max": 20.0, "sigma_min": 0.01, "sigma_max": 50.0,
        "num_scales": 50, "ema_rate": 0.999, "scale_by_sigma": False, "nonlinearity": "swish",
        "normalization": "GroupNorm", "nf": 32, "ch_mult": (1,), "num_res_blocks": 1,
        "attn_resolutions": (), "resamp_with_conv": True, "conditional": True, "dropout": 0.0,
    },
    "optim": {
        "optimizer": "Adam", "lr": 3e-3, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0,
        "warmup": 5, "grad_clip": 1.0,
    },
    "device": torch.device("cpu"),
}  # fmt: skip


def score_sde_config(sde, *, continuous):
    training = {**SCORE_SDE_CONFIG["training"], "sde": sde.lower(), "continuous": continuous}
    return tree({**SCORE_SDE_CONFIG, "training": training})


def _stubs():
    """What the trainer imports and these tests do not need: TensorFlow reads data and files."""
    gfile = SimpleNamespace(
        makedirs=lambda path: Path(path).mkdir(parents=True, exist_ok=True),
        exists=os.path.exists,
    )
    stubbed = stubs(
        *("absl", "absl.flags", "datasets", "evaluation", "tensorflow", "tensorflow_gan"),
        *("op", "torchvision", "torchvision.utils"),  # `op` compiles a CUDA extension
    )
    stubbed["tensorflow"].io = SimpleNamespace(gfile=gfile)
    return stubbed


def load_score_sde(root):
    """The checkout's own classes and functions, and its own loop with the documented swap."""
    names = ("losses", "sde_lib", "utils", "models.utils", "models.ema", "models.ddpm")
    # The stubs leave again after the imports: torch looks whether TensorFlow is there.
    with checkout_on_path(root, _stubs()):
        modules = [importlib.import_module(name) for name in names]

    def train(config, workdir, images, *, swap=False):
        source = (root / "run_lib.py").read_text()
        if swap:
            source = patched("score_sde_pytorch", "run_lib.py", source)
        run_lib, stubbed, losses = ModuleType("run_lib"), _stubs(), []

        def add_scalar(name, value, _):
            if name == "training_loss":
                losses.append(value.item())

        writer = SimpleNamespace(add_scalar=add_scalar)
        tensorboard = SimpleNamespace(SummaryWriter=lambda _: writer)
        with pytest.MonkeyPatch.context() as patch, checkout_on_path(root, stubbed):
            patch.setattr(torch.utils, "tensorboard", tensorboard, raising=False)
            exec(compile(source, "run_lib.py", "exec"), vars(run_lib))  # noqa: S102 - theirs

        def batches():
            for batch in images:
                array = batch.permute(0, 2, 3, 1).numpy()
                yield {"image": SimpleNamespace(_numpy=lambda array=array: array)}

        vars(stubbed["datasets"]).update(
            get_dataset=lambda *_, **__: (batches(), batches(), None),
            get_data_scaler=lambda _: lambda x: x,
            get_data_inverse_scaler=lambda _: lambda x: x,
        )
        run_lib.train(config, str(workdir))
        saved = sorted((Path(workdir) / "checkpoints").glob("*.pth"))
        return losses, saved[-1]

    own = {name: value for module in modules for name, value in vars(module).items()}
    return SimpleNamespace(**{**own, "train": train})
