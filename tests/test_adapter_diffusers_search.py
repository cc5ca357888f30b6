"""The search over solvers and corrections for a diffusers pipeline.

The pipelines are tiny and their networks exact: for Gaussian data E[ε | x_t] is linear in x_t, so
what each solver with each correction makes of the start noise is a factor that one run tells.
"""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from torch import nn

from s2dm_loss.adapters.diffusers import PipelineRecommendation, correct_pipeline, search_pipeline
from s2dm_loss.adapters.diffusers_scheduler import path_of
from s2dm_loss.adapters.diffusers_solvers import solvers_of
from s2dm_loss.sampling import Recommendation, SkipGain, StartScaling
from tests.helpers.diffusers_parts import (
    OF_FLOW,
    STABLE_DIFFUSION,
    Clipped,
    diffusers,
    make_scheduler,
    tiny_pipeline,
)
from tests.strategies import COSINE, LINEAR

DEVIATION, SHAPE = 0.8, (1, 2, 2)
DDIM, EULER = "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"
UNIPC, DEIS = "UniPCMultistepScheduler", "DEISMultistepScheduler"
OPTIONS = {"clip_sample": False, "timestep_spacing": "trailing"}
QUICK = {"steps": 2, "num_samples": 32, "batch_size": 32, "progress": False}


class Exact(nn.Linear):
    """E[output | x_t] for data N(mean, DEVIATION²) of a pipeline's prediction type."""

    def __init__(self):
        super().__init__(1, 1)  # a parameter, which pipelines ask for the device

    def forward(self, x, a, b, kind, mean):
        variance = a**2 * DEVIATION**2 + b**2
        x0 = mean + a * DEVIATION**2 / variance * (x - a * mean)
        eps = b / variance * (x - a * mean)
        return {"epsilon": eps, "v_prediction": a * eps - b * x0, "flow": eps - x0}[kind]


class Pipeline(diffusers.DiffusionPipeline):
    """Of ε, v or flow; the mean of the data is the prompt."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt_embeds=None, batch_size=1, num_inference_steps=10, generator=None, eta=0.0,
        output_type="pt", return_dict=True,
    ):  # fmt: skip
        mean = torch.zeros(batch_size) if prompt_embeds is None else prompt_embeds
        x = diffusers.utils.torch_utils.randn_tensor((len(mean), *SHAPE), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        schedule, kind = path_of(self.scheduler)
        for t in self.progress_bar(self.scheduler.timesteps):
            time = t.long() if schedule.timesteps is not None else (t.double() / 1000).clamp(0, 1)
            a, b = (float(value) for value in schedule.alpha_sigma(time))
            output = self.unet(x, a, b, kind, mean.reshape(-1, 1, 1, 1))
            # As DDIMPipeline does, whatever the scheduler.
            given = {} if kind == "flow" else {"eta": eta, "generator": generator}
            x = self.scheduler.step(output, t, x, return_dict=False, **given)[0]
        return (x,)


def pipeline_of(kind="epsilon"):
    if kind == "flow":
        return Pipeline(Exact(), make_scheduler(EULER, shift=3.0))
    return Pipeline(Exact(), make_scheduler(DDIM, prediction_type=kind, **OPTIONS))


AT_ZERO = torch.zeros(1)


def images_for(means=AT_ZERO):
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(len(means), (1200, 1, 1, 1), generator=generator)
    return means[chosen] + DEVIATION * torch.randn(1200, *SHAPE, generator=generator)


def deviation(pipe, steps):
    """The factor on the start noise, for a mean of 0."""
    draws = [[torch.Generator().manual_seed(i) for i in range(64)] for _ in range(2)]
    start = torch.cat([torch.randn(1, *SHAPE, generator=one) for one in draws[0]])
    images = pipe(batch_size=64, num_inference_steps=steps, generator=draws[1])[0]
    return float((images * start).sum() / start.square().sum())


def searched(pipe=None, schedulers=(), **options):
    """A quick search, with the scheduler in use alone if not said."""
    given = {"images": images_for(), **QUICK, **options}
    return search_pipeline(pipe or pipeline_of(), schedulers=schedulers, **given)


def of_json(pipe, found):
    """What strict JSON holds, and what is read from it for a pipeline."""
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    return values, PipelineRecommendation.from_dict(pipe, values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "prompted"), [("epsilon", False), ("v_prediction", True), ("flow", True)]
)
def test_it_finds_a_good_pair(kind, prompted, capsys):
    pipe = pipeline_of(kind)
    pipe.set_progress_bar_config(desc="mine", disable=True)
    scheduler, config = pipe.scheduler, pipe._progress_bar_config
    drawn = []
    pipe.unet.register_forward_pre_hook(lambda module, args: drawn.append(args[4].flatten()))
    before = abs(deviation(pipe, 5) - DEVIATION)
    means = torch.tensor([-0.5, 0.5]) if prompted else AT_ZERO
    call = {"prompt_embeds": means} if prompted else {}
    sizes = {"steps": 5, "num_samples": 256, "batch_size": 256}
    found = searched(pipe, None, images=images_for(means), **sizes, **call)
    assert not capsys.readouterr().out
    # Each prompt is drawn as often, and each candidate's first batch draws the same.
    batches = [mean for mean in drawn if len(mean) == 256]
    assert torch.cat(batches).mean().abs() < 0.1 * means.std(correction=0) + 1e-6
    assert all(torch.equal(batch, batches[0]) for batch in batches)
    assert pipe.scheduler is scheduler
    assert "step" not in scheduler.__dict__
    assert pipe._progress_bar_config == config
    calls = found.recommendation.cost.calls
    if kind == "flow":  # the scheduler in use comes first
        assert list(calls) == ["FlowMatchEuler", "FlowMatchHeun", "DPMSolver", "UniPC"]
    assert set(calls.values()) <= {5, 6}
    with found:
        assert pipe.scheduler is found.scheduler
        after = abs(deviation(pipe, found.steps) - DEVIATION)
    assert pipe.scheduler is scheduler
    assert "step" not in found.scheduler.__dict__
    assert after < 0.35 * before
    # It can be kept, and put on a pipeline of the same network.
    values, again = of_json(pipe, found)
    assert str(again) == str(found)
    assert again.to_dict() == values
    with again:
        assert abs(deviation(pipe, again.steps) - DEVIATION) == pytest.approx(after, abs=1e-5)
    # Loaded without the schedulers, the correction alone takes the pipeline's schedule.
    loaded = Recommendation.from_dict(values)
    pipe.scheduler = again.scheduler
    with correct_pipeline(pipe, loaded):
        if loaded.recommended.is_corrected:
            assert abs(deviation(pipe, again.steps) - DEVIATION) == pytest.approx(after, abs=1e-5)


def test_it_says_what_it_does(capsys):
    pipe = pipeline_of()
    pipe.unet.train()
    schedulers = [make_scheduler(UNIPC), make_scheduler("IPNDMScheduler")]
    result = searched(pipe, schedulers, progress=True)
    said = capsys.readouterr()
    assert said.out.splitlines()[: len(str(result).splitlines())] == str(result).splitlines()
    assert said.err.count("into evaluation mode") == 1
    for text in ("unet: put into evaluation", "left out: IPNDM (", "DDIM, none: distance"):
        assert text in said.err
    assert pipe.unet.training
    assert repr(result).startswith("PipelineRecommendation(Recommendation(")


def in_use(name, *args, **changed):
    """A scheduler whose settings were changed after it was made."""
    scheduler = make_scheduler(name, *args)
    scheduler.register_to_config(**changed)
    return scheduler


def test_a_scheduler_is_kept_as_it_is():
    """Also one that was changed later, as StableDiffusionPipeline changes its own."""
    betas, flow = np.linspace(1e-4, 0.05, 1000), make_scheduler(EULER)
    flow.set_shift(6.0)
    changed = in_use(DDIM, steps_offset=1, clip_sample=False)
    trained = [make_scheduler(DDIM, trained_betas=b) for b in (betas, betas.tolist())]
    for scheduler in (changed, flow, *trained):
        pipe = Pipeline(Exact(), scheduler)
        _, again = of_json(pipe, searched(pipe))
        for one in (scheduler, again.scheduler):
            one.set_timesteps(4)
        for name in ("timesteps", "alphas_cumprod", "sigmas"):
            kept, own = (getattr(one, name, AT_ZERO) for one in (again.scheduler, scheduler))
            assert torch.equal(kept, own)
        assert again.scheduler.config.get("clip_sample") == scheduler.config.get("clip_sample")


NOT_CLIPPED = {"clip_sample": False}


@pytest.mark.parametrize(
    ("scheduler", "kept"),
    [
        (make_scheduler(DDIM), {}),
        (make_scheduler("PNDMScheduler"), NOT_CLIPPED),
        (in_use(DDIM, steps_offset=1), {"steps_offset": 1}),
        (make_scheduler("LCMScheduler"), {**STABLE_DIFFUSION, **NOT_CLIPPED}),
    ],
)
def test_a_solver_is_what_from_config_makes(scheduler, kept):
    for name, make in [*solvers_of(scheduler, None).items()][1:]:
        solver = make()
        takes = inspect.signature(type(solver).__init__).parameters
        options = {"skip_prk_steps": True} if name == "PNDM" else {}
        line = type(solver).from_config(scheduler.config, **options)
        expected = {n: v for n, v in {**line.config, **kept}.items() if n in takes}
        assert {n: v for n, v in solver.config.items() if n in takes} == expected


@pytest.mark.parametrize("shift", [None, 6.0])
def test_the_shift_of_other_solvers_is_that_of_the_one_in_use(shift):
    config = make_scheduler(UNIPC, **OF_FLOW).config
    scheduler = type(make_scheduler(EULER)).from_config(config, shift=5.0)  # hides a flow_shift
    before = copy.deepcopy(scheduler)
    if shift is not None:
        scheduler.set_shift(shift)
    # Of one class there are as many solvers as there are settings.
    others = [] if shift is None else ["FlowMatchEuler 2"]
    assert [*solvers_of(before, [before, scheduler, scheduler])] == ["FlowMatchEuler", *others]
    solvers = [make() for make in solvers_of(scheduler, None).values()][1:]
    found = [one.config.get("shift", one.config.get("flow_shift")) for one in solvers]
    assert found == 3 * [shift or 5.0]
    assert solvers_of(solvers[-1], None)["FlowMatchEuler"]().shift == (shift or 5.0)


def test_what_was_found_for_another_pipeline_is_refused():
    values = searched().to_dict()
    cosine = make_scheduler(DDIM, beta_schedule="squaredcos_cap_v2", **OPTIONS)
    for other in (pipeline_of("v_prediction"), pipeline_of("flow"), Pipeline(Exact(), cosine)):
        with pytest.raises(ValueError, match=r"values are of a pipeline of .*'epsilon', and"):
            PipelineRecommendation.from_dict(other, values)
    other = pipeline_of()
    other.scheduler = make_scheduler(UNIPC)
    with PipelineRecommendation.from_dict(other, values):
        deviation(other, 2)


class Texts(Pipeline):
    """As strict about its call as StableDiffusion(XL)Pipeline, which these lines are from."""

    def __call__(self, prompt, negative_prompt=None, original_size=(8, 8), **call):
        if negative_prompt is not None and type(prompt) is not type(negative_prompt):
            raise TypeError("`negative_prompt` should be the same type to `prompt`")
        assert (*original_size, 0, 0) == (8, 8, 0, 0)
        assert call.pop("callback_on_step_end_tensor_inputs", ["latents"]) == ["latents"]
        assert call.pop("skip_guidance_layers", [7, 8, 9]) == [7, 8, 9]
        prompts = [prompt] if isinstance(prompt, str) else prompt
        assert negative_prompt in (None, "ugly", len(prompts) * ["ugly"])
        return super().__call__(torch.tensor([float(len(p) > 1) for p in prompts]), **call)


TENSORS = {"callback_on_step_end_tensor_inputs": ["latents"]}
LAYERS = {"skip_guidance_layers": [7, 8, 9]}  # StableDiffusion3Pipeline's


@pytest.mark.parametrize("prompt", ["a", ["a", "bb"], ["a", "bb", "c"]])
@pytest.mark.parametrize(
    "given", [{"negative_prompt": "ugly"}, {"original_size": (8, 8)}, TENSORS, LAYERS]
)
def test_what_is_one_for_all_prompts(prompt, given):
    pipe = Texts(Exact(), make_scheduler(DDIM, **OPTIONS))
    pipe(prompt="a", **given)
    searched(pipe, prompt=prompt, **given)


V = {"prediction_type": "v_prediction"}
BY_HAND, OF_V, ZERO_SNR = (
    make_scheduler(DDIM, **options)
    for options in (OPTIONS, V, {"rescale_betas_zero_snr": True, **V, **OPTIONS})
)
BY_HAND.alphas_cumprod = BY_HAND.alphas_cumprod**0.9
SDE = make_scheduler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++")
ON_LINEAR = "(ValueError: it is on NoiseSchedule.linear(1000), and"
TAKES_NOISE = "(ValueError: it takes the output for 'epsilon', and it is"


@pytest.mark.parametrize(
    ("scheduler", "given", "tried", "said"),
    [
        (OF_V, (make_scheduler(UNIPC), make_scheduler(DEIS, **V)), "DEIS", f"UniPC {TAKES_NOISE}"),
        (BY_HAND, None, "", f"UniPC {ON_LINEAR}"),
        (ZERO_SNR, None, "DPMSolver UniPC", f"PNDM {ON_LINEAR}"),
        (SDE, None, "DDIM PNDM UniPC", "DEIS (NotImplementedError: sde-dpmsolver++"),
    ],
    ids=["output", "by hand", "zero snr", "sde"],
)
def test_solvers_that_are_none_for_the_pipeline_are_left_out(scheduler, given, tried, said, capsys):
    found = searched(Pipeline(Exact(), scheduler), given, steps=4, progress=True)
    assert list(found.recommendation.cost.calls)[1:] == tried.split()
    assert f"left out: {said}" in capsys.readouterr().err


def test_diffusers_own_pipeline_which_hands_eta_to_every_scheduler():
    """And returns NumPy's images, with the channels last."""
    pipe = tiny_pipeline()
    corrections = [SkipGain(LINEAR, [-99, 99])]
    options = {"images": torch.rand(64, 1, 8, 8), "corrections": corrections}
    found = searched(pipe, None, output_type="np", **options)
    assert list(found.recommendation.cost.calls) == ["DDIM", "PNDM", "DEIS", "DPMSolver", "UniPC"]
    with found:
        pipe(num_inference_steps=found.steps, output_type="np")


def test_an_exception_leaves_the_pipeline_as_it_was():
    pipe = pipeline_of()
    scheduler = pipe.scheduler

    def broken(images):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        searched(pipe, features=broken)
    assert pipe.scheduler is scheduler
    assert "step" not in scheduler.__dict__
    found = searched(pipe)
    with pytest.raises(RuntimeError, match="boom"), found:
        raise RuntimeError("boom")
    assert pipe.scheduler is scheduler
    again = pytest.raises(ValueError, match="is on already")
    with pytest.warns(UserWarning, match="step was not called"), found, again, found:
        pass
    with pytest.warns(UserWarning, match="was exchanged"), found:
        pipe.scheduler = scheduler
    with pytest.raises(TypeError, match="by `with found:`"):
        correct_pipeline(pipe, found)


CHECKED, STEPPED = pipeline_of(), pipeline_of()
CHECKED.safety_checker = STEPPED.scheduler.step = lambda *args: None
GAIN_OF_V = SkipGain(LINEAR, prediction_type="v_prediction")
GAIN_OF_COSINE, SCALED = SkipGain(COSINE), r"images must lie in \[0, 1\] .* images / 255"


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"images": torch.ones(40, 4)}, ValueError, r"images must have shape \[N, C, H, W\]"),
        ({"images": torch.ones(40, 1, 3, 3)}, ValueError, r"size that the pipeline .*\(1, 2, 2\)"),
        ({"images": 3}, TypeError, "images must be a tensor"),
        ({"pipe": tiny_pipeline(), "images": 2 * torch.rand(999, 1, 8, 8) - 1}, ValueError, SCALED),
        ({"pipe": tiny_pipeline(), "images": 255 * torch.rand(999, 1, 8, 8)}, ValueError, SCALED),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"pipe": nn.Identity()}, TypeError, "pipe must be a diffusers pipeline"),
        ({"corrections": [StartScaling()]}, ValueError, "must leave the start noise"),
        ({"corrections": [Clipped()]}, ValueError, "must leave the start noise"),
        ({"corrections": [GAIN_OF_V]}, ValueError, "is for prediction_type 'v_prediction', and"),
        ({"corrections": [GAIN_OF_COSINE]}, ValueError, "is for NoiseSchedule.cosine"),
        ({"pipe": CHECKED}, ValueError, "must have no safety_checker"),
        ({"pipe": STEPPED}, ValueError, "del scheduler.step"),
        ({"prompt_embeds": torch.ones(2), "labels": [1]}, ValueError, "one entry a prompt"),
        ({"prompt": "a cat"}, TypeError, "unexpected keyword argument 'prompt'"),
        ({"sigmas": [1.0, 0.5]}, ValueError, "call must leave sigmas to the search"),
        ({"generator": None}, ValueError, "call must leave generator to the search"),
        ({"schedulers": [diffusers.DDIMScheduler]}, TypeError, "must be a list of schedulers"),
        ({"schedulers": make_scheduler(DDIM)}, TypeError, "schedulers must be a list"),
    ],
)
def test_what_is_refused(given, error, said):
    with pytest.raises(error, match=said):
        searched(**{"schedulers": None, **given})
