"""The patches beside the pages: `git apply` takes them, and the pages show what they change."""

import itertools
import re
import shutil
import subprocess
import textwrap
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from s2dm_loss.testing import check_swap
from tests.helpers import trainers_of_today as today
from tests.helpers.diffusers_parts import diffusers, make_scheduler
from tests.helpers.patches import PAGES, PATCHES, TRAINERS, patched
from tests.helpers.small import refuses
from tests.helpers.trainers_of_today import Anything, made
from tests.helpers.upstream import root_of
from tests.test_docs_blocks import COLUMNS, columns_of

BLOCK = re.compile(
    r'^(?P<indent> *)```diff title="(?P<title>[^"]*)"\n(?P<diff>.*?)^(?P=indent)```$', re.S | re.M
)
# The page, the title and the lines of each diff block.
SHOWN = [
    (page.name, block["title"], textwrap.dedent(block["diff"]).splitlines())
    for page in sorted(PAGES.glob("*.md"))
    for block in BLOCK.finditer(page.read_text(encoding="utf-8"))
]


each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.file.stem)


def changes(lines):
    """What is taken away and what is added, without indentation and what is in both."""
    removed, added = (Counter(x[1:].strip() for x in lines if x[:1] == sign) for sign in "-+")
    return removed - added, added - removed


@each_patch
def test_a_patch_names_its_commit_and_its_page_links_to_it(patch):
    trainer = TRAINERS[patch.trainer]
    head = patch.file.read_text(encoding="utf-8").splitlines()[0]
    assert head == f"s2dm-loss for {trainer.repository} at {trainer.commit}"
    page = (PAGES / patch.page).read_text(encoding="utf-8")
    assert trainer.commit[:7] in page
    assert f"](patches/{patch.file.name})" in page


@pytest.mark.parametrize(("page", "title", "lines"), SHOWN, ids=[each[1] for each in SHOWN])
def test_a_diff_of_a_page_is_its_patch(page, title, lines):
    """But for indentation; and a long line of the trainer's own may be cut short with "…"."""
    (patch,) = (p for p in PATCHES if title in p.titles and p.page == page)
    removed, added = changes(lines)
    whole, new = changes([*itertools.chain(*patch.hunks)])
    assert added == new
    assert removed.total() == whole.total()
    for line in removed:
        cut = line.removesuffix("…")
        assert any(theirs.startswith(cut) if cut != line else theirs == line for theirs in whole)
    # It shows its payload without scrolling, and its import first.
    assert max(map(columns_of, lines)) <= COLUMNS
    assert next(line for line in lines if line[:1] == "+").startswith("+from ")


@each_patch
def test_git_applies_a_patch_to_the_trainers_file(patch, tmp_path):
    root = root_of(TRAINERS[patch.trainer].variable)
    source = (root / patch.path).read_text(encoding="utf-8")
    file = tmp_path / patch.path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source, encoding="utf-8")
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    command = [git, "apply", "--verbose", str(patch.file)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)  # noqa: S603 - git
    result = file.read_text(encoding="utf-8")
    compile(result, patch.path, "exec")
    assert result == patched(patch.trainer, patch.path, source)
    for page, title, lines in SHOWN:
        if title in patch.titles and page == patch.page:
            place = 0
            for line in lines:
                if line[1:].strip() and line[0] in " -":  # what stands there, in its order
                    place = source.index(line[1:].strip().removesuffix("…"), place) + 1


# The loss lines of diffusers' scripts, as they are and after the patch.
SNR = {"snr_gamma": [None, 5.0], "prediction_type": ["epsilon", "v_prediction"]}
SECOND_STAGE = {"enlarges": [False, True]}  # of DeepFloyd IF; no option of the scripts
PRIOR, SD3 = {"with_prior_preservation": [False, True]}, {"precondition_outputs": [0, 1]}
SCRIPTS = {
    **{f"text_to_image/train_text_to_image{kind}": SNR for kind in ("", "_lora", "_lora_sdxl")},
    "dreambooth/train_dreambooth": SNR | PRIOR | SECOND_STAGE,
    "dreambooth/train_dreambooth_lora_sdxl": SNR | PRIOR,
    "dreambooth/train_dreambooth_lora": {
        "prediction_type": SNR["prediction_type"],
        **PRIOR,
        **SECOND_STAGE,
    },
    **{f"dreambooth/train_dreambooth{kind}_sd3": SD3 | PRIOR for kind in ("", "_lora")},
    **{f"dreambooth/train_dreambooth{kind}_flux": PRIOR for kind in ("", "_lora")},
    "controlnet/train_controlnet_sd3": SD3,
    "unconditional_image_generation/train_unconditional": {
        "prediction_type": ["epsilon", "sample"]
    },
}
COMBINATIONS = [
    (script, options)
    for script, choices in SCRIPTS.items()
    for options in (
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    )
    # The weights of the scripts have the length of both halves, the loss of one.
    if not (options.get("with_prior_preservation") and options.get("snr_gamma"))
]


def block(source, first, last):
    """The lines of a script from the last one that begins so to the next that ends it."""
    start = source.rindex(first, 0, source.index(last))
    start = source.rindex("\n", 0, start) + 1
    return textwrap.dedent(source[start : source.rindex("\n", 0, source.index(last))])


@pytest.mark.parametrize(("script", "options"), COMBINATIONS)
def test_the_loss_lines_of_a_script(script, options):
    """At τ = 1 the script's own value and gradient; below it, finite and near at every sample."""
    path = f"examples/{script}.py"
    plain = (root_of("S2DM_DIFFUSERS_ROOT") / path).read_text(encoding="utf-8")
    swapped = patched("diffusers", path, plain)
    flow = "flux" in script or "sd3" in script
    given = {"precondition_outputs": 0, "prior_loss_weight": 0.7, "weighting_scheme": "sigma_sqrt"}
    given |= {"gradient_accumulation_steps": 1, "train_batch_size": 6}
    args = Anything(**{**given, **options})
    if flow:
        scheduler = make_scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
        times = torch.tensor([0.05, 0.4, 0.9, 0.7, 0.999, 0.3])
        first = "# these weighting schemes" if "flux" in script else "# Follow: Section 5"
    else:
        scheduler = make_scheduler(prediction_type=args.prediction_type or "epsilon")
        times = torch.tensor([3, 400, 999, 700, 60, 999])
        first = "# Get the target for"
        if "unconditional" in script:
            first = 'if args.prediction_type == "epsilon":'
    if args.with_prior_preservation and flow and "lora" not in script:
        # It cuts all but its weights in two, and fails or broadcasts; the LoRA script cuts them.
        lora = path.replace("dreambooth_", "dreambooth_lora_")
        plain = (root_of("S2DM_DIFFUSERS_ROOT") / lora).read_text(encoding="utf-8")
    plain, swapped = (block(text, first, "accelerator.backward(loss)") for text in (plain, swapped))

    def loss(model, tau=None):
        images, noise = torch.randn(2, len(times), 4, 8, 8)
        if flow:
            sigmas = times.reshape(-1, 1, 1, 1)
            noisy = (1 - sigmas) * images + sigmas * noise
        else:
            sigmas, noisy = None, scheduler.add_noise(images, noise, times)
        output = model(noisy, times)
        names = {"noise_scheduler": scheduler, "args": args}
        namespace = {**vars(diffusers.training_utils), "F": F, **names}
        namespace |= {"noise": noise, "sigmas": sigmas, "timesteps": times, "train_loss": 0.0}
        namespace |= dict.fromkeys(("model_input", "latents", "clean_images"), images)
        namespace |= dict.fromkeys(("model_pred", "model_output"), output)
        namespace |= dict.fromkeys(("noisy_model_input", "noisy_latents", "noisy_images"), noisy)
        if args.enlarges:  # it sees beside x_t what it enlarges
            namespace["noisy_model_input"] = torch.cat([noisy, images], dim=1)
        namespace |= {"encoder_hidden_states": None, "unet": lambda *_, **__: (output,)}
        namespace |= {"accelerator": SimpleNamespace(gather=lambda loss: loss), "weighting": None}
        namespace["_extract_into_tensor"] = lambda table, t, shape: table[t].reshape(shape)
        if tau is not None:
            namespace["skip_loss"] = made("diffusers", path, tau, **names)
        exec(compile(plain if tau is None else swapped, path, "exec"), namespace)  # noqa: S102 - a trainer's
        return namespace["loss"]

    check_swap(loss, loss, rtol=1e-5)


def test_the_edm_style_of_the_sdxl_script_is_refused():
    """It weighs an x_0 loss by σ, in lines that the patch leaves alone."""
    script = "diffusers", "examples/dreambooth/train_dreambooth_lora_sdxl.py", 1.0
    said = "--do_edm_style_training would keep its plain loss"
    refuses(ValueError, said, made, *script, args=Anything(do_edm_style_training=True))


def loss_of(file, run, tau=0.5, model=lambda x_t, _: 0 * x_t, **given):
    """The loss of one of today's trainers, or that of its patch."""
    source = today.source_of(*file)
    torch.manual_seed(0)
    return run(source if tau is None else patched(*file, source), model, {}, tau, **given)


AI_TOOLKIT = today.AI_TOOLKIT, today.ai_toolkit
SIMPLE_TUNER = today.SIMPLE_TUNER, today.simple_tuner


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("own_target", [False, True])
def test_ai_toolkit_changes_the_target_of_models_that_make_it_themselves(own_target, control):
    """Wan, Qwen, Z-Image, Flux 2 and most others have a `get_loss_target`; edit models control."""
    given = {"own_target": own_target, "control": control}
    plain, same, other = (loss_of(*AI_TOOLKIT, tau, **given).item() for tau in (None, 1.0, 0.5))
    assert same == pytest.approx(plain, rel=1e-5)
    assert abs(other / plain - 1) > 0.05


@pytest.mark.parametrize("config", [{"do_guidance_loss": True}, {"loss_type": "mae"}])
def test_ai_toolkit_keeps_the_plain_loss_where_its_target_is_extrapolated_or_its_loss_l1(config):
    """Guidance would multiply the change of the target; L1 has no squared part."""
    assert torch.equal(*(loss_of(*AI_TOOLKIT, tau, **config) for tau in (None, 0.5)))


@pytest.mark.parametrize("arranged", [torch.negative, lambda flow: flow.movedim(1, 2)])
def test_musubi_tuner_refuses_a_target_of_another_sign_or_shape(arranged):
    """Z-Image's has the other sign; Kandinsky 5's and layered Qwen-Image's axes stand elsewhere."""
    musubi = today.MUSUBI, today.musubi_tuner
    refuses(ValueError, "the target must be noise - latents", loss_of, *musubi, arranged=arranged)


def test_simple_tuner_refuses_a_rollout():
    """It tells another σ than that of x_t."""
    said, plan = "scheduled_sampling_max_step_offset must be 0", object()
    refuses(ValueError, said, loss_of, *SIMPLE_TUNER, scheduled_sampling_plan=plan)


@pytest.mark.parametrize("mixflow", [False, True])
def test_simple_tuner_reads_the_sigma_that_is_in_x_t(mixflow):
    """x_t = latents + σ flow, also where MixFlow tells the network another σ."""
    seen = []
    loss = loss_of(*SIMPLE_TUNER, model=lambda x_t, _: seen.append(x_t) or 0 * x_t, mixflow=mixflow)
    torch.manual_seed(0)
    latents, noise, *_ = today.straight()
    (x_t,), flow = seen, noise - latents
    sigma = ((x_t - latents) * flow).flatten(1).sum(1) / flow.square().flatten(1).sum(1)
    target, _ = today.made(*today.SIMPLE_TUNER, 0.5).regression_target(flow, sigma, x_t)
    torch.testing.assert_close(loss, target.square().mean(), rtol=1e-4, atol=0)
