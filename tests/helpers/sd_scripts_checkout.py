"""sd-scripts' own trainers from a checkout, without what only reads data and models."""

import warnings
from types import ModuleType

from tests.helpers.diffusers_parts import diffusers  # its imports, before the stubs below
from tests.helpers.upstream import load, root_of, stubs

ROOT = "S2DM_SD_SCRIPTS_ROOT"
STUBS = (
    *("cv2", "ftfy", "imagesize", "toml", "voluptuous"),
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
    *("transformers", "transformers.models", "transformers.models.clip", "transformers.utils"),
    *("transformers.models.clip.modeling_clip", "transformers.modeling_outputs"),
    *("transformers.models.t5", "transformers.models.t5.modeling_t5", "transformers.optimization"),
    # Pipelines for pictures while training.
    *("library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion"),
)


def load_sd_scripts(*names: str) -> list[ModuleType]:
    assert diffusers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(root_of(ROOT), *names, stubbed=stubs(*STUBS))
