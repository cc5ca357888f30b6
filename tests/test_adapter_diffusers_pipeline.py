"""Corrections on diffusers' own pipelines, and the timesteps that its schedulers visit."""

import contextlib
import copy
import functools
import itertools
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet
from s2dm_loss.adapters.diffusers_pipeline import correct_pipeline, shrink_pipeline
from s2dm_loss.adapters.diffusers_scheduler import schedule_of
from s2dm_loss.sampling import (
    Candidate,
    Correction,
    EpsilonScaling,
    Recommendation,
    ScoreRescaling,
    SearchCost,
    SkipGain,
    StartScaling,
)
from s2dm_loss.sampling.corrections import NONE
from s2dm_loss.sampling.scaled_model import ScaledModel
from tests.helpers import oracle
from tests.helpers.diffusers_parts import (
    OF_FLOW,
    Clipped,
    FlowPipeline,
    diffusers,
    make_scheduler,
    tiny_pipeline,
)
from tests.helpers.patches import PAGES
from tests.helpers.small import Network, refuses
from tests.strategies import pickled

LINEAR = NoiseSchedule.linear(1000)
BAR = LINEAR.alphas_cumprod

# What a scheduler visits.
SOLVERS = {"DDIM": "DDIM", "PNDM": "PNDM", "DEIS": "DEISMultistep", "UniPC": "UniPCMultistep"}
SOLVERS["DPM++"] = "DPMSolverMultistep"
SPACINGS = ("leading", "trailing", "linspace")
# The page's table of distances: the schedulers' names and three formulas in each row.
ROWS = re.findall(
    r"^\| (D[^|]+) \| (T[^|]+) \| (T[^|]+) \| (\(T[^|]+) \|$",
    (PAGES / "diffusers.md").read_text(encoding="utf-8"),
    re.M,
)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("steps", "offset"), [(10, 0), (10, 1), (30, 0), (100, 0)])
def test_from_timesteps_pairs_what_the_scheduler_visits(name, spacing, steps, offset):
    options = {"skip_prk_steps": True} if name == "PNDM" else {}
    options |= {"timestep_spacing": spacing, "steps_offset": offset}
    scheduler = make_scheduler(f"{SOLVERS[name]}Scheduler", **options)
    scheduler.set_timesteps(steps)
    visited = scheduler.timesteps.unique()  # ascending; PNDM repeats one
    earlier, valid = SkipSet.from_timesteps(scheduler.timesteps).earlier(visited, LINEAR)
    assert valid.tolist() == [[False] + [True] * (len(visited) - 1)]
    assert torch.equal(earlier[0, 1:], visited[:-1])

    ((_, *formulas),) = (row for row in ROWS if name in row[0].split(", "))
    formula = formulas[SPACINGS.index(spacing)]
    distance = eval(formula, {"T": 1000, "S": steps})  # noqa: S307 - of our own page
    jumps = visited.diff().double()
    assert jumps.mean().item() == pytest.approx(distance, rel=1 / len(visited))
    assert (jumps - distance).abs().max() <= 1
    if spacing == "leading":
        assert set(jumps.tolist()) == {distance}


# A correction on a pipeline whose scheduler has timesteps.
SAMPLERS = {
    **{name: {} for name in ("DDPM", "DEISMultistep", "DPMSolverSinglestep", "UniPCMultistep")},
    **{name: {} for name in ("SASolver", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete")},
    "DDIM": {"clip_sample": False},
    "PNDM": {"skip_prk_steps": True},
    "DPMSolverMultistep": {"use_karras_sigmas": True},
    "LCM": {"beta_schedule": "linear"},
    "EulerDiscrete": {"timestep_spacing": "linspace"},
}


@torch.no_grad()
def sample(denoiser, scheduler, steps=5):
    """A plain sampling loop, as each diffusers pipeline has it."""
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x * scheduler.init_noise_sigma
    torch.manual_seed(2)  # for samplers that draw
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(denoiser(scaled, t), t, x, return_dict=False)[0]
    return x


@pytest.fixture
def pipe():
    return tiny_pipeline()


def with_scheduler(pipe, *args, **options):
    pipe.scheduler = make_scheduler(*args, **options)
    return pipe


# Where diffusers has no step for an x_0.
NO_SAMPLE = {"PNDM", "EulerAncestralDiscrete", "HeunDiscrete"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in SAMPLERS for kind in ("epsilon", "v_prediction")),
        *((name, "sample") for name in SAMPLERS if name not in NO_SAMPLE),
    ],
)
def test_gain_in_every_sampler(name, kind, pipe):
    network = Network(1).eval()
    options = {"beta_start": 1e-4, "beta_end": 0.02, "prediction_type": kind, **SAMPLERS[name]}
    scheduler = with_scheduler(pipe, f"{name}Scheduler", **options).scheduler

    def by_hand(x, t):
        output = network(x, t).double()
        return oracle.at(round(float(t)), kind, BAR).scaled(output, x.double()).float()

    plain, expected = sample(network, scheduler), sample(by_hand, scheduler)
    before = set(vars(scheduler))
    with shrink_pipeline(pipe, skip_set=99):
        torch.testing.assert_close(sample(network, scheduler), expected, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-3)
    assert torch.equal(sample(network, scheduler), plain)
    assert set(vars(scheduler)) == before


@pytest.mark.parametrize("name", ["Euler", "EulerAncestral", "LMS", "Heun"])
def test_a_pipeline_that_does_not_scale_the_input_is_refused(name, pipe):
    """DDIMPipeline: diffusers makes grey images of it in silence, or ends in a TypeError."""
    with_scheduler(pipe, f"{name}DiscreteScheduler")
    with shrink_pipeline(pipe, skip_set=49):
        for _ in range(2):
            said = f"call scale_model_input, as a {name}Disc"
            refuses(ValueError, said, pipe, num_inference_steps=3)


def test_a_learned_variance_is_left_alone(pipe):
    scheduler = with_scheduler(pipe, "DDPMScheduler", variance_type="learned_range").scheduler
    seen = []
    step = scheduler.step
    scheduler.step = lambda model_output, timestep, sample: seen.append(model_output)
    output, x = torch.randn(2, 4, 8, 8), torch.randn(2, 2, 8, 8)
    with shrink_pipeline(pipe, skip_set=99):
        scheduler.step(output, 700, x)
    torch.testing.assert_close(seen[0][:, :2], oracle.at(700, "epsilon", BAR).gain * output[:, :2])
    assert torch.equal(seen[0][:, 2:], output[:, 2:])
    scheduler.step(output, 700, x)  # what stood at `step` before stands there again
    assert torch.equal(seen[1], output)
    assert scheduler.step is not step


def images_of(pipe, handle=None):
    with handle or contextlib.nullcontext():
        generator = torch.Generator().manual_seed(0)
        return pipe(2, generator, num_inference_steps=3, output_type="np", return_dict=False)[0]


def test_a_whole_pipeline(pipe):
    plain = images_of(pipe)
    handle = shrink_pipeline(pipe, skip_set=99)
    assert re.search(r"\(1000\), gain\(SkipSet\(99\),.*DDIMScheduler, active\)", repr(handle))
    shrunk = images_of(pipe)
    for _ in range(2):
        handle.remove()
        assert repr(handle).endswith("DDIMScheduler, removed)")
        assert not handle.active
    assert (images_of(pipe) == plain).all()
    assert abs(shrunk - plain).max() > 1e-3
    # A correction made by hand, and a table that differs by rounding, are the same.
    theirs = NoiseSchedule.from_alphas_cumprod(pipe.scheduler.alphas_cumprod)  # float32
    for schedule in (LINEAR, theirs, schedule_of(pipe.scheduler)):
        corrected = images_of(pipe, correct_pipeline(pipe, SkipGain(schedule), 99))
        assert corrected == pytest.approx(shrunk, abs=1e-5)


def test_half_precision_frames_before_channels_and_arguments_in_another_order():
    """CogVideoX: [B, F, C, H, W], and a `step` that takes two more arguments in between."""
    pipe = diffusers.DiffusionPipeline()
    scheduler = diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction")
    pipe.register_modules(scheduler=scheduler)
    scheduler.set_timesteps(10)
    t, back = scheduler.timesteps[2], scheduler.timesteps[1]
    x, output, old = torch.randn(3, 2, 3, 2, 4, 4).bfloat16()
    by_hand = oracle.at(int(t), "v_prediction", scheduler.alphas_cumprod)
    changed = by_hand.scaled(output.double(), x.double()).bfloat16()
    draw = {"generator": torch.Generator().manual_seed(0), "return_dict": False}
    expected = scheduler.step(changed, old, t, back, x, **draw)[0]
    draw["generator"].manual_seed(0)
    with shrink_pipeline(pipe, skip_set=99):
        found = scheduler.step(output, old, t, back, x, **draw)[0]
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=1e-2)
    assert found.dtype == expected.dtype


# Flow matching: each scheduler with latents in the shape of one pipeline's.
FLUX, SD3, WAN = (2, 16, 4), (2, 2, 8, 8), (2, 2, 1, 8, 8)
EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
FLOWS = {
    "shift 0.2": (FLUX, EULER, {"shift": 0.2}),  # its σ begin past 1, by 6e-7
    "shift 3": (SD3, EULER, {"shift": 3.0}),
    "dynamic": (WAN, EULER, {"use_dynamic_shifting": True}),
    "heun": (FLUX, HEUN, {"shift": 3.0}),
    "unipc": (SD3, "UniPCMultistepScheduler", OF_FLOW),
    "dpm++": (WAN, "DPMSolverMultistepScheduler", OF_FLOW),
    # Mochi: x = σ x_0 + (1-σ) ε, and the output x_0 - ε.
    "data at 1": (SD3, EULER, {"invert_sigmas": True}),
}


def flow_pipeline(name):
    shape, scheduler, options = FLOWS[name]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return FlowPipeline(make_scheduler(scheduler, **options)), noise


def flow_at(sigma):
    """The oracle's view of a time on the straight path."""
    pairs = [oracle.continuous_pair("flow", t) for t in (sigma, sigma - 0.1) if t >= 0]
    return oracle.scales(pairs[0], pairs[1:], 0.99, kind="flow")


@contextlib.contextmanager
def scaled_by_hand(pipe, scale=None, begin=0):
    """Scale the ε̂ in each output of the transformer, by the gain if not said, before guidance."""
    turned = pipe.scheduler.config.get("invert_sigmas")
    count = itertools.count(2 * begin)

    def hook(module, args, output):
        sigma = min(float(pipe.scheduler.sigmas[next(count) // 2]), 1.0)
        noise, sign = (1 - sigma, -1) if turned else (sigma, 1)
        x, u = args[0].double(), sign * output.double()
        factor = None if scale is None else scale(noise)
        return (sign * flow_at(noise).scaled(u, x, factor)).float()

    with pipe.transformer.register_forward_hook(hook):
        yield


@pytest.mark.parametrize("name", FLOWS)
def test_flow_pipelines(name):
    pipe, x = flow_pipeline(name)
    plain = pipe(x)
    with scaled_by_hand(pipe):
        expected = pipe(x)
    with shrink_pipeline(pipe, skip_set=0.1):
        torch.testing.assert_close(pipe(x), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-3
    assert torch.equal(pipe(x), plain)
    # The other corrections scale the ε̂ in a velocity, and not the velocity.
    turned = name == "data at 1"
    kind = "velocity" if turned else "flow"
    for correction, strength, scale in (
        (EpsilonScaling, 1.02, lambda s: 1 - 0.02 / 1.02 * min(1, (1 - s) / 0.01) ** 2),
        (ScoreRescaling, 0.8, lambda s: ((1 - s) ** 2 + s**2) / ((1 - s) ** 2 / 0.8 + s**2)),
    ):
        with scaled_by_hand(pipe, scale):
            expected = pipe(x)
        of_path = correction(ContinuousSchedule.flow(data_at=int(turned)), prediction_type=kind)
        with correct_pipeline(pipe, of_path, strength):
            torch.testing.assert_close(pipe(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["shift 3", "dynamic", "heun", "unipc"])
def test_image_to_image_and_the_callback(name):
    pipe, x = flow_pipeline(name)
    image, seen = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), []

    def callback(pipe, index, t, given):
        seen.append((index, float(t)))
        return {"latents": 0.9 * given["latents"]}

    options = {"steps": 6, "image": image, "strength": 0.7, "callback_on_step_end": callback}
    begin = (6 - int(6 * 0.7)) * getattr(pipe.scheduler, "order", 1)
    with scaled_by_hand(pipe, begin=begin):
        expected = pipe(x, **options)
    by_hand, seen[:] = seen.copy(), []
    with shrink_pipeline(pipe, skip_set=0.1):
        torch.testing.assert_close(pipe(x, **options), expected, rtol=1e-4, atol=1e-4)
    assert seen == by_hand


def test_two_pipelines_with_one_transformer_are_two():
    first, x = flow_pipeline("shift 3")
    second, _ = flow_pipeline("shift 3")
    shared = FlowPipeline(first.scheduler)
    shared.transformer = second.transformer = first.transformer
    plain = first(x)
    with shrink_pipeline(first, skip_set=0.1):
        once = first(x)
        assert torch.equal(second(x), plain)
        with shrink_pipeline(second, skip_set=0.1):  # each has its own, and none is scaled twice
            assert torch.equal(second(x), once)
            assert torch.equal(first(x), once)
        step = first.scheduler.step
        for put in (step, functools.wraps(step)(lambda *args, **call: step(*args, **call))):
            first.scheduler.step = put
            said = r"has a correction already.*shares the sched"
            refuses(ValueError, said, shrink_pipeline, shared, skip_set=0.1)
        first.scheduler.step = step
    assert torch.equal(shared(x), plain)


def test_an_exception_inside_the_block_leaves_nothing():
    pipe, x = flow_pipeline("shift 3")
    plain = pipe(x)

    def stop(*_):
        refuses(ValueError, "on already: leave the first", handle.__enter__)
        assert handle.active
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), shrink_pipeline(pipe, skip_set=0.1) as handle:
        pipe(x, callback_on_step_end=stop)
    assert not handle.active
    assert torch.equal(pipe(x), plain)
    refuses(ValueError, "correction has been removed", handle.__enter__)
    with pytest.raises(RuntimeError, match="boom"), shrink_pipeline(pipe, skip_set=0.1) as handle:
        stop()  # before any step: no warning of that


def test_a_copy_of_the_scheduler_in_the_block_is_corrected_with_its_own_state():
    """LTX-2 copies its scheduler for the sound."""
    pipe, x = flow_pipeline("shift 3")
    scheduler, u = pipe.scheduler, torch.randn(SD3)
    scheduler.set_timesteps(sigmas=[0.9, 0.5])
    t = scheduler.timesteps[0]
    plain = scheduler.step(u, t, x).prev_sample
    scheduler.set_timesteps(sigmas=[0.9, 0.5])
    with shrink_pipeline(pipe, skip_set=0.1):
        copied, loaded = copy.deepcopy(scheduler), pickled(scheduler)
        corrected = copied.step(u, t, x).prev_sample
        assert scheduler.step_index is None
        assert torch.equal(scheduler.step(u, t, x).prev_sample, corrected)
        assert not torch.equal(corrected, plain)
        assert torch.equal(loaded.step(u, t, x).prev_sample, plain)
    copied.set_timesteps(sigmas=[0.9, 0.5])
    assert torch.equal(copied.step(u, t, x).prev_sample, plain)


class Together(EpsilonScaling):
    barrier = threading.Barrier(1)

    def scale(self, t, strength):
        self.barrier.wait(10)
        return super().scale(t, strength)


def test_copies_of_the_scheduler_step_in_threads():
    """diffusers' examples/server-async serves requests so."""
    pipe, x = flow_pipeline("shift 3")
    pipe.scheduler.set_timesteps(4)
    correction = Together(ContinuousSchedule.flow(), prediction_type="flow")

    def step(output):
        scheduler = copy.deepcopy(pipe.scheduler)
        return scheduler.step(output, scheduler.timesteps[1], x).prev_sample

    with correct_pipeline(pipe, correction, 1.05), ThreadPoolExecutor(2) as pool:
        alone = [step(x), step(-x)]
        correction.barrier = threading.Barrier(2)
        assert all(map(torch.equal, pool.map(step, (x, -x)), alone))


@pytest.mark.parametrize("name", ["DDIMScheduler", "UniPCMultistepScheduler"])
def test_the_schedulers_attributes_are_copied_and_put_back(name, pipe):
    """StableDiffusionPanorama keeps them for each of its views."""
    scheduler, noise = with_scheduler(pipe, name).scheduler, torch.randn(1, 1, 8, 8)

    def views(steps):
        scheduler.set_timesteps(steps)
        latents, kept = [noise, noise], [copy.deepcopy(vars(scheduler))] * 2
        for t in scheduler.timesteps:
            for i, x in enumerate(latents):
                vars(scheduler).update(kept[i])
                latents[i] = scheduler.step(0.9 * x, t, x).prev_sample
                kept[i] = copy.deepcopy(vars(scheduler))
        assert torch.equal(*latents)
        return latents[0]

    plain, longer = views(3), views(5)
    with shrink_pipeline(pipe, skip_set=99):
        scheduler.set_timesteps(3)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(0.9 * x, t, x).prev_sample
        assert torch.equal(views(3), x)
        assert not torch.allclose(x, plain, atol=1e-3)
    assert "step" not in vars(scheduler)
    assert torch.equal(views(5), longer)


def test_a_scheduler_that_is_exchanged_in_the_block_is_told(pipe):
    said = "scheduler was exchanged while the correction was on"
    with pytest.warns(UserWarning, match=said), shrink_pipeline(pipe, 99):
        pipe.scheduler = make_scheduler("UniPCMultistepScheduler")
    handle = shrink_pipeline(pipe, 99)
    pipe.scheduler = make_scheduler("DDIMScheduler")
    with pytest.warns(UserWarning, match=said):
        handle.remove()
    with shrink_pipeline(pipe, 99):  # TextToVideoZero puts a copy on, which is corrected
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        images_of(pipe)
    with shrink_pipeline(pipe, 99) as handle:
        images_of(pipe)
        handle.remove()  # what happens from here on is not its business
        pipe.scheduler = make_scheduler("DDIMScheduler")
    with shrink_pipeline(pipe, 99):
        pipe.scheduler.register_to_config(prediction_type="v_prediction")
        refuses(ValueError, r"was 'epsilon' and is 'v_prediction'.*anew", images_of, pipe)


class Own(Correction):
    def __init__(self, make):
        self.correct_model = lambda model, strength: make(model)


def with_gain(model):
    return ScaledModel.with_gain(model, LINEAR, 49)


@pytest.mark.parametrize(
    ("correction", "strength", "said"),
    [
        (None, 1.0, "correction must be a Correction with a strength.*`with found:`"),
        (SkipGain(LINEAR), None, "strength must be given"),
        (SkipGain(LINEAR), "49", "strength must be a real number"),
        (SkipGain(LINEAR, prediction_type="v_prediction"), 49, "is for prediction_type 'v_pred"),
        (SkipGain(NoiseSchedule.scaled_linear(1000)), 49, r"is for NoiseSchedule.scaled_linear"),
        (SkipGain(NoiseSchedule.linear(999)), 49, r"linear\(999\).*schedule_of"),
        (SkipGain(ContinuousSchedule.vp()), 0.1, "is for ContinuousSchedule.vp"),
        (StartScaling(), 1.2, "draw the latents, and pass `latents=correction.correct_noise"),
        (Clipped(), 3.0, "draw the latents, and pass `latents=correction.correct_noise"),
        (Own(nn.Sequential), 0.5, "makes a Sequential of the network"),
        (Own(lambda model: with_gain(with_gain(model))), 1, "a ScaledModel of a ScaledModel of"),
    ],
)
def test_a_correction_that_is_none_for_the_pipeline_is_refused(correction, strength, said, pipe):
    refuses((TypeError, ValueError), said, correct_pipeline, pipe, correction, strength)
    assert "step" not in pipe.scheduler.__dict__


@pytest.mark.filterwarnings("ignore:scheduler.step was not called")
def test_a_table_of_sigmas_is_for_networks_that_predict_the_noise(pipe):
    """There x_t is x_0 + σ ε, and the noise that is in an x_0 another."""
    sigmas = NoiseSchedule.from_sigmas((1 / BAR - 1).sqrt())
    correct_pipeline(pipe, EpsilonScaling(sigmas), 1.05).remove()
    with_scheduler(pipe, "DDIMScheduler", prediction_type="sample")
    said, of_x_0 = r"is for NoiseSchedule.from_sigmas.*pipeline's is", {"prediction_type": "sample"}
    refuses(ValueError, said, correct_pipeline, pipe, EpsilonScaling(sigmas, **of_x_0), 1.05)


@pytest.mark.filterwarnings("ignore:scheduler.step was not called")
def test_a_flow_scheduler_with_the_sigmas_of_edm_is_refused(pipe):
    """Cosmos-Predict2 writes them into its config, as here, and samples x_0 + σ ε."""
    with_scheduler(pipe, "FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True)
    pipe.scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0)
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 5, dtype=torch.float64))
    assert pipe.scheduler.sigmas[0] == pytest.approx(80)
    said = r"from 0 to 1, got .* with sigma_max 80.0: .*Cosmos"
    refuses(ValueError, said, shrink_pipeline, pipe, skip_set=0.05)
    # Cosmos-Predict2.5's is of σ / (1 - σ), and its scheduler's σ are those of flow matching.
    ours = {**OF_FLOW, "use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
    scheduler = with_scheduler(pipe, "UniPCMultistepScheduler", **ours).scheduler
    scheduler.set_timesteps(5)
    assert scheduler.sigmas[0] == pytest.approx(200 / 201)
    shrink_pipeline(pipe, skip_set=0.05).remove()


@pytest.mark.parametrize(
    ("own", "option"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0), "snr_shift_scale=3.0"),
    ],
)
def test_a_scheduler_that_ignores_what_its_config_says_of_the_path_is_refused(own, option, pipe):
    """Mochi's and CogVideoX's, by README's line for a better solver."""
    pipe.scheduler, skips = own, SkipSet.for_sampling_steps(20)
    shrink_pipeline(pipe, skips)  # their own do it
    flow = OF_FLOW if "invert" in option else {}
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(own.config, **flow)
    refuses(ValueError, rf"got {option} of a UniPC.*ignores it", shrink_pipeline, pipe, skips)
    if not flow:
        refuses(ValueError, "ignores it", schedule_of, pipe.scheduler)


@pytest.mark.parametrize("made", ["beta", "exponential", "karras"])
def test_sigmas_that_are_none_of_a_flow_are_refused(made, pipe):
    """As diffusers' UniPC makes them of a flow's with these options: up to 157, or rising."""
    options, x = {**OF_FLOW, f"use_{made}_sigmas": True}, torch.randn(2, 1, 8, 8)
    scheduler = with_scheduler(pipe, "UniPCMultistepScheduler", **options).scheduler
    scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25] if made == "karras" else None)
    with shrink_pipeline(pipe, 0.05), pytest.raises(ValueError, match="must have the σ of flow"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_pipeline_that_does_not_call_step_is_told(pipe):
    """StableDiffusionParadigms calls `batch_step_no_noise`."""
    with_scheduler(pipe, "DDIMParallelScheduler").scheduler.set_timesteps(5)
    x, t = torch.randn(5, 1, 8, 8), pipe.scheduler.timesteps
    with pytest.warns(UserWarning, match="step was not called"), shrink_pipeline(pipe, 99):
        pipe.scheduler.batch_step_no_noise(x, t, x)


class Logged(diffusers.DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output, timestep, sample, **options)


def test_a_step_of_ones_own_gets_all_that_the_pipeline_hands_it(pipe):
    pipe.scheduler = Logged(clip_sample=False)
    with correct_pipeline(pipe, EpsilonScaling(LINEAR), 1 + 1e-6):
        images = [pipe(1, torch.Generator().manual_seed(0), eta, 3, output_type="np").images
                  for eta in (0.0, 1.0)]  # fmt: skip
    assert abs(images[0] - images[1]).max() > 0.01
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **options: step(*args, **options)
    said = r"step must name model_output.*functools\.wraps"
    refuses(ValueError, said, shrink_pipeline, pipe, skip_set=99)


def test_what_is_refused(pipe):
    refuses(TypeError, "pipe must be a diffusers pipeline", shrink_pipeline, pipe.unet, 9)
    refuses(ValueError, "tau must lie in", shrink_pipeline, pipe, 9, tau=math.nan)
    said = "is for prediction_type 'sample'"
    refuses(ValueError, said, shrink_pipeline, pipe, 9, prediction_type="sample")
    # Stable Video Diffusion's: t is a quarter of log σ, below 0 at the end.
    video = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    with_scheduler(pipe, "EulerDiscreteScheduler", **video)
    refuses(ValueError, "timestep_type 'continuous'", shrink_pipeline, pipe, 0.1)
    with_scheduler(pipe, EULER).scheduler.set_timesteps(4)
    x, t = torch.ones(1, 2, 3), torch.ones(1, 2)
    with shrink_pipeline(pipe, skip_set=0.1):
        refuses(ValueError, "per_token", pipe.scheduler.step, x, 1000.0, x, per_token_timesteps=t)


def recommending(correction=None, strength=0.0, samplers=("sample",)):
    """What a search returns that has found one correction to be surely better, or none."""
    none = Candidate(samplers[0], NONE, 0.0, 1.0)
    better = Candidate(samplers[-1], correction, strength, 0.5, 1.0, -0.5, -0.6, -0.4, -0.4)
    found = (none, better)[: 1 if correction is None else 2]
    return Recommendation(found, (), SearchCost(((1, 1),), dict.fromkeys(samplers, 1), 1, 1))


def test_what_a_search_recommends_on_a_pipeline(pipe):
    plain = images_of(pipe)
    found = recommending(SkipGain(LINEAR, [99]), 99)
    corrected = images_of(pipe, correct_pipeline(pipe, found))
    assert (corrected == images_of(pipe, shrink_pipeline(pipe, 99))).all()
    refuses(TypeError, "strength must be left out", correct_pipeline, pipe, found, 99)
    # None is nothing, and stands in nobody's way.
    nothing = correct_pipeline(pipe, recommending())
    assert (images_of(pipe) == plain).all()
    with shrink_pipeline(pipe, skip_set=99):
        with correct_pipeline(pipe, recommending()), nothing:
            pass
        assert (images_of(pipe) == corrected).all()
    # It has tried the scheduler in use, and recommends another.
    other = recommending(SkipGain(LINEAR, [99]), 99, ("DDIM", "UniPC"))
    with pytest.warns(UserWarning, match="found for UniPC, and the pipeline's scheduler is DDIM"):
        handle = correct_pipeline(pipe, other)
    images_of(pipe, handle)
