"""Trainers that are on PyPI, from a checkout or an unpacked package.

They need no more than torch and einops for their losses; what else they import is stubbed.

    pip install --no-deps --target FOLDER -r .ci/trainers.txt

makes a folder that both of the variables below can name, as `.ci/run` and `nox -s trainers` do.
"""

from types import ModuleType

from tests.helpers.upstream import load, load_below, root_of, stubs

DENOISING_DIFFUSION_PYTORCH = "S2DM_DENOISING_DIFFUSION_PYTORCH_ROOT"
K_DIFFUSION = "S2DM_K_DIFFUSION_ROOT"
_VISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def denoising_diffusion_pytorch(*names: str) -> list[ModuleType]:
    """The package and modules of it."""
    package = "denoising_diffusion_pytorch"
    stubbed = stubs(
        *("torchvision", "torchvision.transforms", "torchvision.utils"),
        *("ema_pytorch", "pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"),
    )
    wanted = [package, *(f"{package}.{name}" for name in names)]
    return load(root_of(DENOISING_DIFFUSION_PYTORCH), *wanted, stubbed=stubbed)


def k_diffusion_layers() -> ModuleType:
    """`k_diffusion.layers`, without the rest of the package."""
    stubbed = stubs(
        *("dctorch", "dctorch.functional", "safetensors", "torchdiffeq", "torchsde"),
        *_VISION,
    )
    (layers,) = load_below(root_of(K_DIFFUSION), "k_diffusion", "layers", stubbed=stubbed)
    return layers
