"""The gain on diffusers' own pipelines, and the timesteps that its schedulers visit."""

import contextlib
import copy
import dataclasses
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from s2dm_loss import (
    Candidate,
    ContinuousSchedule,
    Correction,
    EpsilonScaling,
    NoiseSchedule,
    Recommendation,
    SearchCost,
    SkipGain,
    SkipSet,
    StartScaling,
    gain,
)
from s2dm_loss.adapters.diffusers import SkipLoss, correct_pipeline, shrink_pipeline
from tests.helpers.diffusers_parts import (
    diffusers,
    make_scheduler,
    tiny_conditional_unet,
    tiny_unet,
)

# What a scheduler visits (INTEGRATION.md, measured).

FAMILIES = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DEISMultistepScheduler": "multistep",
    "DPMSolverMultistepScheduler": "multistep",
    "UniPCMultistepScheduler": "multistep",
}
DISTANCES = {
    ("ddim", "leading"): lambda steps: 1000 // steps,
    ("ddim", "trailing"): lambda steps: 1000 / steps,
    ("ddim", "linspace"): lambda steps: 999 / (steps - 1),
    ("multistep", "leading"): lambda steps: 1000 // (steps + 1),
    ("multistep", "trailing"): lambda steps: 1000 / steps,
    ("multistep", "linspace"): lambda steps: 999 / steps,
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100])
def test_from_timesteps_pairs_what_the_scheduler_visits(name, spacing, steps):
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = make_scheduler(name, timestep_spacing=spacing, **options)
    scheduler.set_timesteps(steps)
    visited = scheduler.timesteps.unique()  # ascending; PNDM repeats one
    # DEIS, DPM++ and UniPC leave out the last interval, which ends at x_0 itself.
    schedule = NoiseSchedule.linear(1000)
    earlier, valid = SkipSet.from_timesteps(scheduler.timesteps).earlier(visited, schedule)
    assert valid.tolist() == [[False] + [True] * (len(visited) - 1)]
    assert torch.equal(earlier[0, 1:], visited[:-1])

    distance = DISTANCES[FAMILIES[name], spacing](steps)
    jumps = visited.diff().double()
    assert jumps.mean().item() == pytest.approx(distance, rel=1 / len(visited))
    assert (jumps - distance).abs().max() <= 1
    if spacing == "leading":
        assert set(jumps.tolist()) == {distance}
        # The skip by the number of steps is what DDIM and PNDM jump; the others jump less.
        by_steps, _ = SkipSet.for_sampling_steps(steps).earlier(torch.tensor([999]), schedule)
        exact = FAMILIES[name] == "ddim"
        assert (999 - by_steps.item() == distance) == (exact or 1000 // steps == distance)


@pytest.mark.parametrize("offset", [0, 1])
def test_steps_offset_is_followed(offset):
    scheduler = make_scheduler("DDIMScheduler", steps_offset=offset)
    scheduler.set_timesteps(10)
    skip_set = SkipSet.from_timesteps(scheduler.timesteps)
    earlier, valid = skip_set.earlier(torch.tensor([offset, 150, 999]), NoiseSchedule.linear(1000))
    assert valid.tolist() == [[False, True, True]]
    assert earlier[0, 1:].tolist() == [100 + offset, 900 + offset]
    assert SkipLoss.from_scheduler(scheduler, skip_set).criterion.skip_set is skip_set


# The gain on a pipeline.

SAMPLERS = {
    "DDIMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {"timestep_spacing": "linspace"},
}


class Spy(nn.Module):
    """A denoiser that remembers its calls; `shrunk` multiplies in s(t) by hand."""

    def __init__(self, unet, shrunk=None):
        super().__init__()
        self.unet, self.shrunk, self.times, self.inputs = unet, shrunk, [], []
        self.config, self.dtype = unet.config, torch.float32

    def forward(self, sample, timestep, *args, return_dict=True, **kwargs):
        self.times.append(float(timestep))
        self.inputs.append(sample)
        prediction = self.unet(sample, timestep, *args, return_dict=False, **kwargs)[0]
        if self.shrunk is not None:
            prediction = self.shrunk[round(float(timestep))].float() * prediction
        output = diffusers.models.unets.unet_2d.UNet2DOutput(sample=prediction)
        return output if return_dict else (prediction,)


def sample(denoiser, scheduler, steps=5):
    """A plain sampling loop, as each diffusers pipeline has it."""
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    x = x * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, t)
            prediction = denoiser(scaled, t, return_dict=False)[0]
            x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return tiny_unet().eval()


@pytest.mark.parametrize("name", SAMPLERS)
def test_gain_in_every_sampler(name, unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    scheduler = make_scheduler(name, **SAMPLERS[name])
    pipe.scheduler = scheduler
    plain = sample(unet, scheduler)
    by_hand = Spy(unet, gain(NoiseSchedule.linear(1000), 99))
    expected = sample(by_hand, scheduler)
    with shrink_pipeline(pipe, skip_set=99) as handle:
        assert handle.active
        torch.testing.assert_close(sample(unet, scheduler), expected)
    assert torch.equal(sample(unet, scheduler), plain)
    assert not torch.allclose(plain, expected, rtol=1e-2)
    fractional = any(t != round(t) for t in by_hand.times)
    assert fractional == (name == "EulerDiscreteScheduler")
    if fractional:
        # Euler carries x_0 + σ ε; the network sees it scaled back to unit variance.
        assert by_hand.inputs[0].std() < 2


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_a_whole_pipeline(kind, unet, monkeypatch):
    scheduler = make_scheduler("DDPMScheduler" if kind == "DDPMPipeline" else "DDIMScheduler")
    pipe = getattr(diffusers, kind)(unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)

    def images(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe(generator=generator, num_inference_steps=4, output_type="np").images

    plain = images(pipe)
    handle = shrink_pipeline(pipe, skip_set=99)
    shrunk = images(pipe)
    handle.remove()
    handle.remove()
    assert not handle.active
    assert (images(pipe) == plain).all()
    s = gain(NoiseSchedule.linear(1000), 99).float()
    forward = unet.forward

    def by_hand(x, t, **kwargs):
        return diffusers.models.unets.unet_2d.UNet2DOutput(
            sample=s[int(t)] * forward(x, t, **kwargs).sample
        )

    monkeypatch.setattr(unet, "forward", by_hand)
    assert shrunk == pytest.approx(images(pipe), abs=1e-5)
    assert abs(shrunk - plain).max() > 1e-3
    assert "unet" in dict(pipe.components)
    assert not [key for key in unet.state_dict() if "hook" in key]


def test_a_scheduler_that_is_exchanged_has_to_be_of_the_same_schedule(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    with shrink_pipeline(pipe, skip_set=99), torch.no_grad():
        pipe.scheduler = make_scheduler("UniPCMultistepScheduler")
        unet(torch.zeros(1, 1, 8, 8), 500)
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match="alphas_cumprod"):
            unet(torch.zeros(1, 1, 8, 8), 500)
        pipe.scheduler = make_scheduler("DDIMScheduler", beta_end=0.03)
        with pytest.raises(ValueError, match="remove the gain"):
            unet(torch.zeros(1, 1, 8, 8), 500)
        pipe.scheduler = make_scheduler("DDIMScheduler")
        unet(torch.zeros(1, 1, 8, 8), 500)


@pytest.mark.parametrize("return_dict", [True, False])
def test_guidance_on_a_doubled_batch(return_dict):
    """One 0-d timestep, a batch of unconditional and conditional halves, and text."""
    torch.manual_seed(0)
    unet = tiny_conditional_unet().eval()
    pipe = diffusers.DiffusionPipeline()
    pipe.register_modules(
        unet=unet, scheduler=make_scheduler("DDIMScheduler", beta_schedule="scaled_linear")
    )
    x, text = torch.randn(2, 1, 8, 8), torch.randn(4, 3, 8)
    t = torch.tensor(801)

    def guided():
        with torch.no_grad():
            output = unet(torch.cat([x, x]), t, encoder_hidden_states=text, return_dict=return_dict)
        prediction = output.sample if return_dict else output[0]
        if return_dict:
            assert type(output).__name__ == "UNet2DConditionOutput"
            assert output["sample"] is output.sample
        uncond, cond = prediction.chunk(2)
        return uncond + 7.5 * (cond - uncond)

    plain = guided()
    with shrink_pipeline(pipe, skip_set=99, tau=0.9):
        shrunk = guided()
    config = pipe.scheduler.config
    schedule = NoiseSchedule.scaled_linear(1000, config.beta_start, config.beta_end)
    s = gain(schedule, 99, tau=0.9)[801].float()
    torch.testing.assert_close(shrunk, s * plain)
    assert s < 0.99


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_other_outputs_shrink_their_noise(prediction_type, zero_snr, unet):
    scheduler = make_scheduler("DDIMScheduler", rescale_betas_zero_snr=zero_snr)
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
    scheduler = pipe.scheduler  # a DDIMPipeline makes a copy
    handle = shrink_pipeline(pipe, skip_set=99)
    scheduler.register_to_config(prediction_type=prediction_type)  # read at each call
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    timesteps = torch.tensor([50, 400, 999])
    with torch.no_grad():
        shrunk = unet(x, timesteps).sample.double()
        handle.remove()
        output = unet(x, timesteps).sample.double()
    alphas_cumprod = scheduler.alphas_cumprod.double()[timesteps].reshape(-1, 1, 1, 1)
    a, b, x = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), x.double()

    def eps_hat(out):
        return a * out + b * x if prediction_type == "v_prediction" else (x - a * out) / b

    s = gain(NoiseSchedule.linear(1000), 99, prediction_type=prediction_type)[timesteps]
    s = s.reshape(-1, 1, 1, 1)
    if zero_snr:  # at ᾱ = 0 the output says nothing of ε̂, and stays
        assert torch.equal(shrunk[2], output[2])
    else:
        torch.testing.assert_close(eps_hat(shrunk), s * eps_hat(output), rtol=1e-4, atol=1e-5)
    assert torch.equal(shrunk[0], output[0])  # t < k


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_learned_variance_is_left_alone(variance_type):
    """8 channels for 4; or, as in super-resolution, 6 in and 6 out, said by `variance_type`."""
    torch.manual_seed(0)
    in_channels = 2 if variance_type == "fixed_small" else 4
    unet = tiny_unet(in_channels=in_channels, out_channels=4).eval()
    scheduler = make_scheduler("DDPMScheduler", variance_type=variance_type)
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
    x = torch.randn(2, in_channels, 8, 8)
    with torch.no_grad():
        plain = unet(x, 700).sample
        with shrink_pipeline(pipe, skip_set=99):
            shrunk = unet(x, 700).sample
    assert torch.equal(shrunk[:, 2:], plain[:, 2:])
    s = gain(NoiseSchedule.linear(1000), 99)[700].float()
    torch.testing.assert_close(shrunk[:, :2], s * plain[:, :2])


def assert_v_has_the_gain(shrunk, plain, x_t, alpha_bar, s):
    """ε̂ = a v̂ + b x_t of one is s times that of the other."""
    a, b = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    torch.testing.assert_close(
        a * shrunk + b * x_t, s.float() * (a * plain + b * x_t), rtol=1e-4, atol=1e-5
    )


def test_conditions_behind_the_noisy_channels():
    """Inpainting: the mask and the masked image follow x_t."""
    torch.manual_seed(0)
    unet = tiny_unet(in_channels=5, out_channels=2).eval()
    scheduler = make_scheduler("DDIMScheduler", prediction_type="v_prediction")
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
    x = torch.randn(2, 5, 8, 8)
    with torch.no_grad():
        plain = unet(x, 400).sample
        with shrink_pipeline(pipe, skip_set=99, noisy_channels="first"):
            shrunk = unet(x, 400).sample
    s = gain(NoiseSchedule.linear(1000), 99)[400]
    assert_v_has_the_gain(
        shrunk, plain, x[:, :2], NoiseSchedule.linear(1000).alphas_cumprod[400], s
    )


def test_an_image_condition_before_the_noisy_channels():
    """Marigold: only the caller knows on which side x_t is, and all but ε̂ need it."""
    torch.manual_seed(0)
    unet = tiny_unet(in_channels=4, out_channels=2).eval()
    scheduler = make_scheduler("DDIMScheduler", prediction_type="v_prediction")
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        plain = unet(x, 400).sample
        with shrink_pipeline(pipe, skip_set=99, noisy_channels="last"):
            shrunk = unet(x, 400).sample
        with (
            shrink_pipeline(pipe, skip_set=99),
            pytest.raises(ValueError, match="noisy_channels must be 'first' or 'last'"),
        ):
            unet(x, 400)
        correction = SkipGain(NoiseSchedule.linear(1000), [99], prediction_type="v_prediction")
        with correct_pipeline(pipe, recommending(correction, 99), noisy_channels="last"):
            assert torch.equal(unet(x, 400).sample, shrunk)
        pipe.scheduler = make_scheduler("DDIMScheduler")
        with shrink_pipeline(pipe, skip_set=99):  # ε̂ is scaled, whatever x_t is
            s = gain(NoiseSchedule.linear(1000), 99)[400].float()
            torch.testing.assert_close(unet(x, 400).sample, s * plain)
    assert_v_has_the_gain(
        shrunk, plain, x[:, 2:], NoiseSchedule.linear(1000).alphas_cumprod[400], s
    )


def test_a_copy_of_the_denoiser_has_no_gain(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    x = torch.randn(2, unet.config.in_channels, 8, 8)
    with torch.no_grad():
        plain = unet(x, 900).sample
        with shrink_pipeline(pipe, skip_set=99):
            copied = copy.deepcopy(unet)
            assert not torch.equal(unet(x, 900).sample, plain)
            assert torch.equal(copied(x, 900).sample, plain)
        assert torch.equal(copied(x, 900).sample, plain)


def test_an_image_condition_behind_a_videos_noisy_channels():
    """CogVideoX has the frames before the channels, and concatenates the latter."""
    torch.manual_seed(0)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=2,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=4,
    ).eval()
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    pipe = diffusers.DiffusionPipeline()
    pipe.register_modules(transformer=transformer, scheduler=scheduler)
    x, text, t = torch.randn(2, 3, 4, 8, 8), torch.randn(2, 4, 8), torch.tensor([700, 700])
    with torch.no_grad():
        plain = transformer(x, text, t).sample
        with shrink_pipeline(pipe, skip_set=99, noisy_channels="first"):
            shrunk = transformer(x, text, t).sample
    alphas_cumprod = scheduler.alphas_cumprod.double()
    c2 = alphas_cumprod[601] / alphas_cumprod[700] - 1
    assert (shrunk - plain).abs().max() > 1e-3
    s = 0.99 / (0.99 + 0.01 * c2)
    assert_v_has_the_gain(shrunk, plain, x[:, :, :2], alphas_cumprod[700], s)


def test_a_transformer_and_half_precision():
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        norm_num_groups=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    pipe = diffusers.DiffusionPipeline()
    pipe.register_modules(transformer=transformer, scheduler=make_scheduler("DDIMScheduler"))
    x, labels = torch.randn(2, 2, 8, 8), torch.tensor([1, 2])
    t = torch.tensor([700, 700])
    for dtype in (torch.float32, torch.bfloat16):
        transformer.to(dtype)
        with torch.no_grad():
            plain = transformer(x.to(dtype), timestep=t, class_labels=labels).sample
            with shrink_pipeline(pipe, skip_set=99):
                shrunk = transformer(x.to(dtype), timestep=t, class_labels=labels).sample
        s = gain(NoiseSchedule.linear(1000), 99)[700].float()
        assert shrunk.dtype == dtype
        assert torch.equal(shrunk[:, 2:], plain[:, 2:])
        torch.testing.assert_close(shrunk[:, :2], (s * plain[:, :2].float()).to(dtype))


def test_it_says_whether_it_is_active(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    handle = shrink_pipeline(pipe, skip_set=99)
    assert repr(handle) == (
        "PipelineGain(NoiseSchedule.linear(1000), gain(SkipSet(99), tau=0.99, "
        "estimator='expected', max_c2=100.0, prediction_type='epsilon'), "
        "prediction_type='epsilon', UNet2DModel, active)"
    )
    with pytest.raises(ValueError, match="a gain on its UNet2DModel already"):
        shrink_pipeline(pipe, skip_set=9)
    handle.remove()
    assert repr(handle).endswith("UNet2DModel, removed)")
    shrink_pipeline(pipe, skip_set=9).remove()
    with pytest.raises(RuntimeError, match="boom"), shrink_pipeline(pipe, skip_set=9) as handle:
        raise RuntimeError("boom")
    assert not handle.active


def test_what_is_refused(unet):
    scheduler = make_scheduler("DDIMScheduler")
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline"):
        shrink_pipeline(unet, skip_set=9)
    with pytest.raises(ValueError, match="a skip must be below 1000"):
        shrink_pipeline(pipe, skip_set=1000)
    with pytest.raises(ValueError, match="tau must lie in"):
        shrink_pipeline(pipe, skip_set=9, tau=math.nan)
    with pytest.raises(ValueError, match="denoiser named decoder"):
        shrink_pipeline(pipe, skip_set=9, component="decoder")
    flow = diffusers.DiffusionPipeline()
    flow.register_modules(unet=unet, scheduler=make_scheduler("FlowMatchEulerDiscreteScheduler"))
    with pytest.raises(ValueError, match="not offered for flow matching"):
        shrink_pipeline(flow, skip_set=9)
    edm = diffusers.DiffusionPipeline()
    edm.register_modules(unet=unet, scheduler=make_scheduler("EDMEulerScheduler"))
    with pytest.raises(ValueError, match="EDM trains on σ"):
        shrink_pipeline(edm, skip_set=9)
    with pytest.raises(ValueError, match="noisy_channels must be one of"):
        shrink_pipeline(pipe, skip_set=9, noisy_channels="middle")
    for wrong in (None, SkipGain(NoiseSchedule.linear(1000))):
        with pytest.raises(TypeError, match="recommendation must be a Recommendation"):
            correct_pipeline(pipe, wrong)
    # Stable Video Diffusion's: t is a quarter of log σ, below 0 at the end.
    options = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    video = diffusers.DDIMPipeline(unet=unet, scheduler=scheduler)
    video.scheduler = make_scheduler("EulerDiscreteScheduler", **options)
    with pytest.raises(ValueError, match="timestep_type 'continuous'"):
        shrink_pipeline(video, skip_set=9)
    shrink_pipeline(pipe, skip_set=9).remove()  # none of the above left a gain behind


def test_a_compiled_denoiser_has_its_gain_already(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    with shrink_pipeline(pipe, skip_set=99):
        pipe.unet = torch.compile(unet, backend="eager")
        with pytest.raises(ValueError, match="a gain on its UNet2DModel already"):
            shrink_pipeline(pipe, skip_set=99)
    shrink_pipeline(pipe, skip_set=99).remove()


def test_a_recommendation_of_none_is_no_gain(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    none = Recommendation(
        (Candidate(None, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0),), (), SearchCost(*[1] * COST_FIELDS)
    )
    nothing = correct_pipeline(pipe, none)
    with shrink_pipeline(pipe, skip_set=99):
        correct_pipeline(pipe, none).remove()
        nothing.remove()
        with pytest.raises(ValueError, match="a gain on its UNet2DModel already"):
            shrink_pipeline(pipe, skip_set=9)


def test_skips_from_an_iterator_outlast_a_change_of_the_prediction_type(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([900])
    outputs = []
    for skips in (iter([9, 99]), [9, 99]):
        pipe.scheduler = make_scheduler("DDIMScheduler")
        with torch.no_grad(), shrink_pipeline(pipe, skip_set=skips):
            unet(x, t)
            pipe.scheduler = make_scheduler("DDIMScheduler", prediction_type="v_prediction")
            outputs.append(unet(x, t).sample)
    assert torch.equal(*outputs)


def test_a_recommendation_on_a_table_of_sigmas_is_for_networks_that_predict_the_noise(unet):
    """There x_t is x_0 + σ ε, and the noise that is in an x_0 another."""
    vp = NoiseSchedule.linear(1000)
    sigmas = NoiseSchedule.from_sigmas((1 / vp.alphas_cumprod - 1).sqrt())
    for kind in ("epsilon", "sample"):
        pipe = diffusers.DDIMPipeline(
            unet=unet, scheduler=make_scheduler("DDIMScheduler", prediction_type=kind)
        )
        on_vp, on_sigmas = (
            recommending(EpsilonScaling(one, [1.05], prediction_type=kind), 1.05)
            for one in (vp, sigmas)
        )
        correct_pipeline(pipe, on_vp).remove()
        if kind == "epsilon":
            correct_pipeline(pipe, on_sigmas).remove()
        else:
            with pytest.raises(ValueError, match=r"is for NoiseSchedule.from_sigmas.*pipeline's"):
                correct_pipeline(pipe, on_sigmas)


def recommending(correction, strength):
    """What a search returns that has found one correction to be surely better."""
    none = Candidate(None, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    better = Candidate(correction, strength, 0.5, -0.5, -0.6, -0.4, 1.0)
    return Recommendation((none, better), (), SearchCost(*[1] * COST_FIELDS))


COST_FIELDS = len(dataclasses.fields(SearchCost))


def images_of(pipe, handle=None):
    with handle or contextlib.nullcontext():
        generator = torch.Generator().manual_seed(0)
        return pipe(2, generator, num_inference_steps=3, output_type="np", return_dict=False)[0]


def test_what_a_search_recommends_on_a_pipeline(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    pipe.set_progress_bar_config(disable=True)
    found = recommending(SkipGain(NoiseSchedule.linear(1000), [99]), 99)
    corrected = images_of(pipe, correct_pipeline(pipe, found))
    assert (corrected == images_of(pipe, shrink_pipeline(pipe, 99))).all()
    plain = images_of(pipe)
    assert not (corrected == plain).all()
    # The start noise is the caller's to correct: through `latents`.
    start = recommending(StartScaling([1.2]), 1.2)
    assert (images_of(pipe, correct_pipeline(pipe, start)) == plain).all()
    assert torch.equal(start.correct_noise(torch.ones(2)), torch.full((2,), 1.2))
    other = recommending(
        SkipGain(NoiseSchedule.linear(1000), [99], prediction_type="v_prediction"), 99
    )
    with pytest.raises(ValueError, match="is for prediction_type 'v_prediction'"):
        correct_pipeline(pipe, other)
    for schedule, skip in (
        (NoiseSchedule.scaled_linear(1000), 99),
        (NoiseSchedule.linear(999), 99),
        (ContinuousSchedule.vp(), 0.1),
    ):
        with pytest.raises(ValueError, match=r"is for NoiseSchedule|is for ContinuousSchedule"):
            correct_pipeline(pipe, recommending(SkipGain(schedule, [skip]), skip))
    assert (images_of(pipe) == plain).all()  # no hook is left behind


def test_a_wrapper_that_hides_the_names_is_refused(unet):
    class Wrapper(nn.Module):
        config = unet.config

        def forward(self, *args, **kwargs):
            return unet(*args, **kwargs)

    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    pipe.unet = Wrapper()
    with pytest.raises(ValueError, match=r"forward of pipe's Wrapper must name timestep"):
        shrink_pipeline(pipe, 99)
    # What changes nothing needs no names.
    correct_pipeline(pipe, recommending(StartScaling([1.2]), 1.2)).remove()


def test_a_table_that_differs_by_rounding_is_the_same_schedule(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    theirs = NoiseSchedule.from_alphas_cumprod(pipe.scheduler.alphas_cumprod)  # float32
    with correct_pipeline(pipe, recommending(SkipGain(theirs, [99]), 99)) as handle:
        assert handle.active


def test_a_correction_of_a_users_own_on_a_pipeline_is_refused(unet):
    class Halved(Correction):
        name, strengths = "halved", (0.5,)

        def correct_model(self, model, strength):
            return torch.nn.Sequential(model)

    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    with pytest.raises(ValueError, match="recommendation makes a Sequential of the denoiser"):
        correct_pipeline(pipe, recommending(Halved(), 0.5))


class Composed(Correction):
    """Two corrections of the library's own, one on the other."""

    name, strengths = "gain and scaling", (1.05,)

    def correct_model(self, model, strength):
        scaled = EpsilonScaling(NoiseSchedule.linear(1000)).correct_model(model, strength)
        return SkipGain(NoiseSchedule.linear(1000)).correct_model(scaled, 49)


def test_a_correction_on_a_correction_is_refused(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    with pytest.raises(ValueError, match="of a ScaledModel, and not of the denoiser itself"):
        correct_pipeline(pipe, recommending(Composed(), 1.05))


def test_a_handle_is_for_one_context(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    handle = shrink_pipeline(pipe, 99)
    with handle:
        pass
    with pytest.raises(ValueError, match="gain has been removed"), handle:
        pass


def test_a_pickled_denoiser_has_no_gain(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    x = torch.randn(2, unet.config.in_channels, 8, 8)
    with torch.no_grad():
        plain = unet(x, 900).sample
        with shrink_pipeline(pipe, 99) as handle:
            shrunk = unet(x, 900).sample
            loaded, removed = pickle.loads(pickle.dumps((unet, handle)))  # noqa: S301 - our own
        assert torch.equal(loaded(x, 900).sample, plain)
        assert repr(removed) == "PipelineGain(nothing, NoneType, removed)"
        removed.remove()
        other = diffusers.DDIMPipeline(unet=loaded, scheduler=make_scheduler("DDIMScheduler"))
        with shrink_pipeline(other, 99):
            torch.testing.assert_close(loaded(x, 900).sample, shrunk)


def test_a_denoiser_that_is_exchanged_is_told(unet):
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=make_scheduler("DDIMScheduler"))
    said = "unet was exchanged while the gain was on"
    with pytest.warns(UserWarning, match=said), shrink_pipeline(pipe, 99):
        pipe.unet = copy.deepcopy(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.unet = unet
        with shrink_pipeline(pipe, 99):
            pipe.unet = torch.compile(unet, backend="eager")  # which calls it, gain and all
        pipe.unet = unet
        with shrink_pipeline(pipe, 99):
            pipe.unet = None  # to have its memory back
