"""guided-diffusion's own parts for the tests, and the worker of its two-process test."""

import sys
import types

import guided_diffusion.gaussian_diffusion as gd
import torch
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.parallel import DistributedDataParallel

from s2dm_loss.adapters.guided_diffusion import skip_step


class _SingleProcess:
    """What guided-diffusion asks of MPI, as one process answers it."""

    def Get_rank(self) -> int:  # noqa: N802 - MPI's name
        return 0

    def Get_size(self) -> int:  # noqa: N802 - MPI's name
        return 1

    def bcast(self, value, root=0):
        return value


def stub_mpi4py(monkeypatch) -> None:
    """Let `train_util` import where mpi4py is not installed.

    mpi4py needs an MPI on the machine to build. It only finds ranks, and shares a checkpoint
    between them: with one process both are trivial, and the training itself uses torch.distributed.
    """
    try:
        import mpi4py  # noqa: F401
    except ModuleNotFoundError:
        module = types.ModuleType("mpi4py")
        module.MPI = types.SimpleNamespace(COMM_WORLD=_SingleProcess())
        monkeypatch.setitem(sys.modules, "mpi4py", module)


class TinyModel(nn.Module):
    """A small network that depends on t, draws random numbers, and remembers its calls."""

    def __init__(self, channels: int, out_channels: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.dropout = dropout
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(t)
        hidden = dropout(x, self.dropout)
        return self.conv(hidden) * (1 + t.reshape(-1, 1, 1, 1) / 1000)


def make_diffusion(
    *,
    steps=1000,
    schedule="linear",
    mean="EPSILON",
    variance="FIXED_LARGE",
    loss="MSE",
    respacing=None,
    rescale=False,
    spaced=True,
):
    """Return one of guided-diffusion's diffusions, chosen by its own names."""
    options = {
        "betas": gd.get_named_beta_schedule(schedule, steps),
        "model_mean_type": gd.ModelMeanType[mean],
        "model_var_type": gd.ModelVarType[variance],
        "loss_type": gd.LossType[loss],
        "rescale_timesteps": rescale,
    }
    if not spaced:
        return gd.GaussianDiffusion(**options)
    return SpacedDiffusion(use_timesteps=space_timesteps(steps, respacing or [steps]), **options)


def ddp_gradients(rank: int, world_size: int, batch: dict[str, Tensor]) -> dict[str, object]:
    """Gradients of one rank's share of a batch, and how often the wrapped model was called."""
    torch.manual_seed(0)
    model = TinyModel(1, 2, dropout=0.0)
    diffusion = skip_step(make_diffusion(variance="LEARNED_RANGE"), 9)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    calls = []
    wrapped.register_forward_hook(lambda *_: calls.append(1))
    share = {name: values.chunk(world_size)[rank] for name, values in batch.items()}
    losses = diffusion.training_losses(wrapped, share["x"], share["t"], noise=share["noise"])
    losses["loss"].mean().backward()
    return {
        "gradients": [parameter.grad for parameter in model.parameters()],
        "loss": losses["loss"].detach(),
        "calls": len(calls),
    }
