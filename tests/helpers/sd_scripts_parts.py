"""sd-scripts' own trainers from a checkout, and one step of a trainer, theirs or the double."""

import contextlib
import random
import warnings
from types import SimpleNamespace

import torch

from tests.helpers.diffusers_parts import diffusers  # its imports, before the stubs below
from tests.helpers.upstream import Anything, load, root_of, stubs

# What only reads data and models, or makes pictures while training.
STUBS = (
    *("cv2", "ftfy", "imagesize", "toml", "voluptuous"),
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional"),
    *("transformers", "transformers.models", "transformers.models.clip", "transformers.utils"),
    *("transformers.models.clip.modeling_clip", "transformers.modeling_outputs"),
    *("transformers.models.t5", "transformers.models.t5.modeling_t5", "transformers.optimization"),
    *("library.lpw_stable_diffusion", "library.sdxl_lpw_stable_diffusion"),
)
V = {"v_parameterization": True}
OPTIONS = {
    "plain": {},
    "noise offset": {"noise_offset": 0.1},
    "ip noise": {"ip_noise_gamma": 0.1},
    "min snr": {"min_snr_gamma": 5},
    "debiased": {"debiased_estimation_loss": True},
    "huber": {"loss_type": "huber"},
    "masked": {"masked_loss": True},
    "zero terminal snr, v": {**V, "zero_terminal_snr": True},
    "v": V,
    "v, scaled": {**V, "scale_v_pred_loss_like_noise_pred": True, "v_pred_like_loss": 0.1},
    "v, min snr": {**V, "min_snr_gamma": 5, "debiased_estimation_loss": True},
}
AT_THE_END = {**OPTIONS["zero terminal snr, v"], "min_timestep": 996}
# The double has none of these.
REAL_OPTIONS = {
    "multires noise": {"multires_noise_iterations": 2},
    "huber of the snr": {"loss_type": "huber", "huber_schedule": "snr"},
    "smooth l1": {"loss_type": "smooth_l1", "huber_schedule": "constant"},
    "checkpointing": {"gradient_checkpointing": True},
}
ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)


def arguments(**options):
    """The scripts' arguments, those without an option as they are without being given."""
    plain = {"huber_c": 0.1, "huber_scale": 1.0, "huber_schedule": "exponential"}
    plain |= {"loss_type": "l2", "max_timestep": 1000, "min_timestep": 0}
    return Anything(**{**plain, "multires_noise_discount": 0.3, **options})


def load_sd_scripts(*names):
    assert diffusers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(root_of("S2DM_SD_SCRIPTS_ROOT"), *names, stubbed=stubs(*STUBS))


def is_sdxl(kind):
    return "Sdxl" in kind.__name__


def make_batch(kind, *, masked=False, preserved=False):
    torch.manual_seed(5)
    batch = {"latents": 5 * torch.randn(8, 4, 8, 8), "loss_weights": torch.rand(8)}
    text = [torch.randn(8, 3, 8) for _ in range(1 + is_sdxl(kind))]
    if is_sdxl(kind):
        text.append(torch.randn(8, 8))
        sizes = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
        batch |= dict.fromkeys(sizes, torch.full((8, 2), 8.0))
    batch["text_encoder_outputs_list"] = text
    if masked:
        batch["alpha_masks"] = torch.rand(8, 16, 16)
    if preserved:
        batch["custom_attributes"] = [{"diff_output_preservation": True}] * 2 + [{}] * 6
    return batch


class LoRA:
    """The network that is trained; with a multiplier of 0 the model is the one before training."""

    multiplier = 1.0

    def set_multiplier(self, value):
        self.multiplier = value


def step(trainer, kind, model, options, *, preserved=False, is_train=True):
    """The loss of the trainer's own step."""
    args = arguments(**options)
    random.seed(0)
    lora = LoRA()

    def unet(noisy_latents, timesteps, *_):
        output = model(noisy_latents, timesteps)
        if lora.multiplier == 0.0:
            output = output.detach() + 1
        return output if is_sdxl(kind) else SimpleNamespace(sample=output)

    batch = make_batch(kind, masked=args.masked_loss, preserved=preserved)
    scheduler = trainer.get_noise_scheduler(args, torch.device("cpu"))
    rest = (None, scheduler, torch.float32, torch.float32, ACCELERATOR, args, None, None)
    options = {"is_train": is_train, "train_text_encoder": False}
    return trainer.process_batch(batch, [], unet, lora, *rest, **options)
