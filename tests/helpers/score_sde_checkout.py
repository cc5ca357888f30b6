"""A real checkout of score_sde_pytorch behind the names of its double."""

import importlib
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import torch

from tests.helpers.patches import patched
from tests.helpers.small import tree
from tests.helpers.upstream import checkout_on_path

# The fields of the trainer's configuration that its own code reads.
CONFIG = {
    "training": {
        "sde": "vpsde", "continuous": True, "reduce_mean": True, "likelihood_weighting": False,
        "n_iters": 20, "batch_size": 32, "log_freq": 1, "eval_freq": 10, "snapshot_freq": 10**6,
        "snapshot_freq_for_preemption": 10**6, "snapshot_sampling": False,
    },
    "sampling": {
        "method": "pc", "predictor": "euler_maruyama", "corrector": "none", "snr": 0.16,
        "n_steps_each": 1, "probability_flow": False, "noise_removal": True,
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


def make_config(sde="vpsde", *, continuous=True):
    training = {**CONFIG["training"], "sde": sde, "continuous": continuous}
    return tree({**CONFIG, "training": training})


class _Writer:
    """TensorBoard's writer, as far as the loop uses it; it keeps the training losses."""

    losses: ClassVar[list[float]] = []

    def __init__(self, _):
        _Writer.losses = []

    def add_scalar(self, name, value, _):
        if name == "training_loss":
            self.losses.append(value.item())


def _module(name, **attributes):
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def _stubs():
    """What the trainer imports and these tests do not need: TensorFlow reads data and files."""
    gfile = SimpleNamespace(
        makedirs=lambda path: os.makedirs(path, exist_ok=True),  # noqa: PTH103
        exists=os.path.exists,
        GFile=open,
    )
    flags = _module("absl.flags", FLAGS=None)
    vision = _module(
        "torchvision.utils", make_grid=lambda x, *_, **__: x, save_image=lambda *_: None
    )
    return {
        "tensorflow": _module("tensorflow", io=SimpleNamespace(gfile=gfile)),
        "tensorflow_gan": _module("tensorflow_gan"),
        "absl": _module("absl", flags=flags),
        "absl.flags": flags,
        "evaluation": _module("evaluation"),
        "datasets": _module("datasets"),
        "op": _module("op", upfirdn2d=None),  # compiles a CUDA extension when imported
        "torchvision": _module("torchvision", utils=vision),
        "torchvision.utils": vision,
    }


def load_score_sde(root: Path) -> SimpleNamespace:
    """The checkout's own classes and functions, and its own loop with the documented swap."""
    names = ("losses", "sde_lib", "sampling", "utils", "models.utils", "models.ema", "models.ddpm")
    # The stubs leave again after the imports: torch looks whether TensorFlow is there.
    with checkout_on_path(root, _stubs()):
        losses, sde_lib, sampling, utils, models, ema, _ = map(importlib.import_module, names)

    def make_sde(config):
        model = config.model
        if config.training.sde == "vesde":
            return sde_lib.VESDE(model.sigma_min, model.sigma_max, model.num_scales)
        kind = {"vpsde": sde_lib.VPSDE, "subvpsde": sde_lib.subVPSDE}[config.training.sde]
        return kind(model.beta_min, model.beta_max, model.num_scales)

    def train(config, workdir, images, *, swap=False):
        source = (root / "run_lib.py").read_text()
        if swap:
            source = patched("score_sde_pytorch", "run_lib.py", source)
        run_lib = ModuleType("run_lib")
        stubs = _stubs()
        torch.utils.tensorboard = SimpleNamespace(SummaryWriter=_Writer)
        try:
            with checkout_on_path(root, stubs):
                exec(compile(source, "run_lib.py", "exec"), vars(run_lib))  # noqa: S102
        finally:
            del torch.utils.tensorboard

        def batches():
            for batch in images:
                array = batch.permute(0, 2, 3, 1).numpy()
                yield {"image": SimpleNamespace(_numpy=lambda array=array: array)}

        vars(stubs["datasets"]).update(
            get_dataset=lambda *_, **__: (batches(), batches(), None),
            get_data_scaler=lambda _: lambda x: x,
            get_data_inverse_scaler=lambda _: lambda x: x,
        )
        run_lib.train(config, str(workdir))
        saved = sorted((Path(workdir) / "checkpoints").glob("*.pth"))
        return _Writer.losses, saved[-1]

    def sample(config, sde, model):
        data = config.data
        shape = (2, data.num_channels, data.image_size, data.image_size)
        return sampling.get_sampling_fn(config, sde, shape, lambda x: x, 1e-3)(model)[0]

    return SimpleNamespace(
        VPSDE=sde_lib.VPSDE,
        subVPSDE=sde_lib.subVPSDE,
        VESDE=sde_lib.VESDE,
        get_sde_loss_fn=losses.get_sde_loss_fn,
        get_ddpm_loss_fn=losses.get_ddpm_loss_fn,
        get_smld_loss_fn=losses.get_smld_loss_fn,
        get_step_fn=losses.get_step_fn,
        get_optimizer=losses.get_optimizer,
        optimization_manager=losses.optimization_manager,
        ExponentialMovingAverage=ema.ExponentialMovingAverage,
        create_model=models.create_model,
        restore_checkpoint=utils.restore_checkpoint,
        make_sde=make_sde,
        train=train,
        sample=sample,
    )
