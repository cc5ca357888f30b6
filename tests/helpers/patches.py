"""The diffs of docs/adapters as files that `git apply` takes.

    python -m tests.helpers.patches

writes them again from the pages, where the environment variables name checkouts of the trainers.
"""

import difflib
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.helpers.docs_diff import PAGES, apply_docs_diff

FOLDER = PAGES / "patches"


class Trainer(NamedTuple):
    repository: str
    commit: str
    variable: str


TRAINERS = {
    "guided-diffusion": Trainer(
        "openai/guided-diffusion",
        "22e0df8183507e13a7813f8d38d51b072ca1e67c",
        "S2DM_GUIDED_DIFFUSION_ROOT",
    ),
    "improved-diffusion": Trainer(
        "openai/improved-diffusion",
        "1bc7bbbdc414d83d4abf2ad8cc1446dc36c4e4d5",
        "S2DM_IMPROVED_DIFFUSION_ROOT",
    ),
    "DiT": Trainer(
        "facebookresearch/DiT", "ed81ce2229091fd4ecc9a223645f95cf379d582b", "S2DM_DIT_ROOT"
    ),
    "diffusers": Trainer(
        "huggingface/diffusers", "58eb52c0803ea9af3abec60841c2a093bdf1f951", "S2DM_DIFFUSERS_ROOT"
    ),
    "sd-scripts": Trainer(
        "kohya-ss/sd-scripts", "48d368fa557731ad0488c07304dfeba8c07910eb", "S2DM_SD_SCRIPTS_ROOT"
    ),
    "edm": Trainer("NVlabs/edm", "008a4e5316c8e3bfe61a62f874bddba254295afb", "S2DM_EDM_ROOT"),
    "edm2": Trainer("NVlabs/edm2", "4bf8162f601bcc09472ce8a32dd0cbe8889dc8fc", "S2DM_EDM2_ROOT"),
    "score_sde_pytorch": Trainer(
        "yang-song/score_sde_pytorch",
        "cb1f359f4aadf0ff9a5e122fe8fffc9451fd6e44",
        "S2DM_SCORE_SDE_ROOT",
    ),
    "ddim": Trainer(
        "ermongroup/ddim", "e8df66cf02e457719930748b5c26e37e3126dfdd", "S2DM_DDIM_ROOT"
    ),
    "OneTrainer": Trainer(
        "Nerogar/OneTrainer", "23df3832e8f213d64c337e39f9365ba46e99fed0", "S2DM_ONETRAINER_ROOT"
    ),
}


class Patch(NamedTuple):
    """One file of one trainer, changed by the diffs of a page with these titles, in order."""

    trainer: str
    page: str
    titles: tuple[str, ...]

    @property
    def path(self) -> str:
        """The file's path in its repository: a title without what stands around it."""
        return self.titles[0].rpartition(": ")[2].split()[0]

    @property
    def file(self) -> Path:
        stem = Path(self.path).stem
        return FOLDER / f"{self.trainer}-{stem}.patch"


def _diffusers(*titles: str) -> Patch:
    return Patch("diffusers", "diffusers.md", titles)


_TEXT_TO_IMAGE = "examples/text_to_image/train_text_to_image.py"
PATCHES = [
    Patch("guided-diffusion", "guided_diffusion.md", ("scripts/image_train.py",)),
    Patch("guided-diffusion", "guided_diffusion.md", ("scripts/super_res_train.py",)),
    Patch(
        "improved-diffusion",
        "guided_diffusion.md",
        ("improved-diffusion: scripts/image_train.py",),
    ),
    Patch("DiT", "guided_diffusion.md", ("DiT: train.py",)),
    _diffusers(_TEXT_TO_IMAGE, f"{_TEXT_TO_IMAGE} --snr_gamma"),
    _diffusers("examples/unconditional_image_generation/train_unconditional.py"),
    _diffusers("examples/dreambooth/train_dreambooth.py --with_prior_preservation"),
    _diffusers("examples/dreambooth/train_dreambooth_sd3.py"),
    _diffusers("examples/dreambooth/train_dreambooth_flux.py"),
    _diffusers("examples/controlnet/train_controlnet_sd3.py"),
    *(
        Patch("sd-scripts", "sd_scripts.md", (f"{name}.py",))
        for name in (
            "train_network",
            "sdxl_train_network",
            "sdxl_train",
            "train_db",
            "fine_tune",
        )
    ),
    Patch("edm", "edm.md", ("edm: training/training_loop.py",)),
    Patch("edm2", "edm.md", ("edm2: training/training_loop.py",)),
    Patch("score_sde_pytorch", "score_sde.md", ("run_lib.py",)),
    *(
        Patch("OneTrainer", "more_trainers.md", (f"OneTrainer: modules/modelSetup/{name}.py",))
        for name in ("BaseStableDiffusionSetup", "BaseStableDiffusionXLSetup")
    ),
    Patch("ddim", "ddim.md", ("functions/losses.py",)),
]


def changed(patch: Patch, source: str) -> str:
    """The trainer's file after the page's diffs."""
    for title in patch.titles:
        source = apply_docs_diff(patch.page, title, source)
    return source


def make(patch: Patch, root: Path) -> str:
    """The patch, against the trainer's file in a checkout."""
    old = (root / patch.path).read_text(encoding="utf-8")
    lines = difflib.unified_diff(
        old.splitlines(keepends=True),
        changed(patch, old).splitlines(keepends=True),
        f"a/{patch.path}",
        f"b/{patch.path}",
        n=1,  # as little of the trainer's own text as `git apply` can do with
    )
    trainer = TRAINERS[patch.trainer]
    head = f"s2dm-loss for {trainer.repository} at {trainer.commit}\n"
    return head + f"docs/adapters/{patch.page} says what it does.\n\n" + "".join(lines)


def lines_of_page(patch: Patch) -> Counter[str]:
    """What the page takes away and adds."""
    text = (PAGES / patch.page).read_text(encoding="utf-8")
    found: Counter[str] = Counter()
    for title in patch.titles:
        (block,) = re.findall(rf'```diff title="{re.escape(title)}"\n(.*?)```', text, re.S)
        found.update(line for line in block.splitlines() if line[:1] in ("+", "-"))
    return found


def lines_of_file(patch: Patch) -> Counter[str]:
    """What the patch takes away and adds."""
    text = patch.file.read_text(encoding="utf-8")
    body = text[text.index("@@") :]
    return Counter(line for line in body.splitlines() if line[:1] in ("+", "-"))


def main() -> None:
    """Write every patch whose checkout is at hand."""
    FOLDER.mkdir(exist_ok=True)
    for patch in PATCHES:
        root = os.environ.get(TRAINERS[patch.trainer].variable)
        if root is not None:
            patch.file.write_text(make(patch, Path(root)), encoding="utf-8")


if __name__ == "__main__":
    main()
