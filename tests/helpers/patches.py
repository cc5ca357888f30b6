"""The patches of docs/adapters/patches, and the trainers that they change."""

import re
from pathlib import Path
from typing import NamedTuple

PAGES = Path(__file__).parents[2] / "docs" / "adapters"
FOLDER = PAGES / "patches"


class Trainer(NamedTuple):
    repository: str
    commit: str
    variable: str


_KNOWN = """
openai/guided-diffusion 22e0df8183507e13a7813f8d38d51b072ca1e67c S2DM_GUIDED_DIFFUSION_ROOT
openai/improved-diffusion 1bc7bbbdc414d83d4abf2ad8cc1446dc36c4e4d5 S2DM_IMPROVED_DIFFUSION_ROOT
facebookresearch/DiT ed81ce2229091fd4ecc9a223645f95cf379d582b S2DM_DIT_ROOT
huggingface/diffusers 58eb52c0803ea9af3abec60841c2a093bdf1f951 S2DM_DIFFUSERS_ROOT
kohya-ss/sd-scripts 48d368fa557731ad0488c07304dfeba8c07910eb S2DM_SD_SCRIPTS_ROOT
NVlabs/edm 008a4e5316c8e3bfe61a62f874bddba254295afb S2DM_EDM_ROOT
NVlabs/edm2 4bf8162f601bcc09472ce8a32dd0cbe8889dc8fc S2DM_EDM2_ROOT
yang-song/score_sde_pytorch cb1f359f4aadf0ff9a5e122fe8fffc9451fd6e44 S2DM_SCORE_SDE_ROOT
ermongroup/ddim e8df66cf02e457719930748b5c26e37e3126dfdd S2DM_DDIM_ROOT
Nerogar/OneTrainer 23df3832e8f213d64c337e39f9365ba46e99fed0 S2DM_ONETRAINER_ROOT
willisma/SiT 947f95bd3a510e9af441d38c1e9f72e0eee873c5 S2DM_SIT_ROOT
sihyun-yu/REPA 67f714503e3892f993844aab088ffc5791c92613 S2DM_REPA_ROOT
atong01/conditional-flow-matching cacd4dc8a5b6f50de63780e8f73754c9371f15db S2DM_TORCHCFM_ROOT
facebookresearch/flow_matching 11568d37f8d5a080e12aa7b5305d9c35ae07d136 S2DM_FLOW_MATCHING_ROOT
kohya-ss/musubi-tuner 30c658c4f4b0bf05038b3346eff9670259b10fc7 S2DM_MUSUBI_TUNER_ROOT
ostris/ai-toolkit 27a03a91f23eb1b757d5ec2e80ee3e129cfcc350 S2DM_AI_TOOLKIT_ROOT
bghira/SimpleTuner bc8e6ab7738ce457a2ed8eb2d26cadd91c6442cb S2DM_SIMPLETUNER_ROOT
huggingface/lerobot 7427f31801f944f5ec9ce53cda02862ce7d1638b S2DM_LEROBOT_ROOT
real-stanford/diffusion_policy 5ba07ac6661db573af695b419a7947ecb704690f S2DM_DIFFUSION_POLICY_ROOT
"""
TRAINERS = {
    line.split()[0].partition("/")[2]: Trainer(*line.split()) for line in _KNOWN.split("\n")[1:-1]
}


class Patch(NamedTuple):
    """One file of one trainer, changed."""

    file: Path
    trainer: str
    page: str
    path: str
    """The file's path in its repository."""
    hunks: list[list[str]]

    @property
    def titles(self):
        """What the diff block of a page is called where it shows this patch."""
        return self.path, f"{self.trainer}: {self.path}"


def read(file):
    """The patch of a file: a head of two lines and an empty one, then a unified diff."""
    text = file.read_text(encoding="utf-8")
    page = re.search(r"^docs/adapters/(\S+) says what it does\.$", text, re.M)
    path = re.search(r"^\+\+\+ b/(\S+)$", text, re.M)
    assert page, file
    assert path, file
    trainer = file.stem.removesuffix(f"-{Path(path[1]).stem}")
    body = re.split(r"^@@.*\n", text, flags=re.M)[1:]
    return Patch(file, trainer, page[1], path[1], [part.splitlines() for part in body])


PATCHES = [read(file) for file in sorted(FOLDER.glob("*.patch"))]


def patch_of(trainer, path):
    """The patch of a trainer's file."""
    (found,) = (p for p in PATCHES if (p.trainer, p.path) == (trainer, path))
    return found


def patched(trainer, path, source):
    """The trainer's file after its patch."""
    for hunk in patch_of(trainer, path).hunks:
        old = "".join(line[1:] + "\n" for line in hunk if line[:1] != "+")
        new = "".join(line[1:] + "\n" for line in hunk if line[:1] != "-")
        if source.count(old) != 1:
            raise LookupError(f"{path} has {source.count(old)} times:\n{old}")
        source = source.replace(old, new)
    return source
