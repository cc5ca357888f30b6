"""A real checkout of score_sde_pytorch behind the names of its double."""

import importlib
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.helpers.patches import patched
from tests.helpers.small import tree
from tests.helpers.upstream import checkout_on_path, stubs

# The fields of the trainer's configuration that its own code reads.
CONFIG = {
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


def make_config(sde, *, continuous):
    training = {**CONFIG["training"], "sde": sde.lower(), "continuous": continuous}
    return tree({**CONFIG, "training": training})


def _stubs():
    """What the trainer imports and these tests do not need: TensorFlow reads data and files."""
    gfile = SimpleNamespace(
        makedirs=lambda path: os.makedirs(path, exist_ok=True),  # noqa: PTH103
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
