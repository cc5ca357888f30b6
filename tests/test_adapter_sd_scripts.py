"""What the adapter for kohya-ss/sd-scripts alone has, on a double and on the trainer's own code."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import s2dm_loss
from s2dm_loss import NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.sd_scripts import loss_of, skip_step
from tests import strategies
from tests.doubles import sd_scripts_double as double
from tests.helpers import sd_scripts_parts as parts
from tests.helpers.small import refuses
from tests.helpers.trainers import SD_SCRIPTS

CPU = torch.device("cpu")


@pytest.fixture(params=SD_SCRIPTS.values(), ids=SD_SCRIPTS)
def kind(request):
    """A trainer's class: the double's, Stable Diffusion's or SDXL's."""
    return request.param()


def both_steps(kind, *given, **how):
    """The loss of a step of the trainer's own, and of ours."""
    trainers = kind(), skip_step(kind(), 99, tau=0.5)
    return [parts.step(trainer, kind, *given, **how) for trainer in trainers]


def test_samples_that_preserve_the_networks_output_keep_the_plain_loss(kind):
    """Their target is the network's own output before training, and holds no noise to shrink."""
    if kind is not double.NetworkTrainer and not parts.is_sdxl(kind):
        pytest.skip("the trainer's call_unet of Stable Diffusion ignores which samples")

    output = torch.randn(8, 4, 8, 8, requires_grad=True)

    def unet(x, t):
        return output if len(x) == 8 else output[:2].detach()

    plain, ours = both_steps(kind, unet, {"min_timestep": 500}, preserved=True)
    plain, ours = (torch.autograd.grad(loss, output)[0] for loss in (plain, ours))
    assert torch.equal(ours[:2], plain[:2])
    assert not torch.allclose(ours[2:], plain[2:], rtol=1e-3)


def test_validation_is_the_plain_loss(kind):
    assert torch.equal(*both_steps(kind, lambda x, _: torch.sin(x), {}, is_train=False))


@pytest.mark.parametrize("zero", [False, True])
def test_makes_the_loss_in_float64_and_says_so(kind, zero, caplog):
    """The skips from an iterator, which outlast the first look at them."""
    trainer = skip_step(kind(), map(int, ["1", "9"]), tau=0.9)
    assert repr(trainer).startswith(f"SkipStep{kind.__name__}({{'skip_set': SkipSet([1, 9]), 'tau'")
    with caplog.at_level(logging.INFO):
        trainer.get_noise_scheduler(parts.arguments(zero_terminal_snr=zero), CPU)
    schedule = NoiseSchedule.scaled_linear(1000)
    schedule = schedule.rescale_zero_terminal_snr() if zero else schedule
    found = trainer.skip_step_loss.schedule
    assert torch.equal(found.log_alphas_cumprod, schedule.log_alphas_cumprod)
    assert f"SkipStepLoss({schedule!r}, SkipSet([1, 9]), tau=0.9" in caplog.text


def test_refuses_what_it_cannot_serve(kind):
    l1, perturbed = parts.arguments(loss_type="l1"), parts.arguments(ip_noise_gamma=0.1)
    check = skip_step(kind(), 9).assert_extra_args
    refuses(ValueError, r"'huber' or 'smooth_l1', got 'l1'", check, l1, None, None)
    said = r"takes `loss_of`\), got a LoRA without get_noise_sch"
    refuses(TypeError, said, skip_step, parts.LoRA(), 9)
    # Flux's x_t is rebuilt from latents and target, which hold no second noise.
    check = skip_step(double.FluxNetworkTrainer(), 0.05).assert_extra_args
    said = r"ip_noise_gamma must be 0 for Flux, got 0\.1: "
    refuses(ValueError, said, check, perturbed, None, None)
    flow = parts.arguments(), FlowMatchEulerDiscreteScheduler(), 0.05
    refuses(ValueError, r"given for a FlowMatchEuler.*'flow' where .*got None", loss_of, *flow)
    assert loss_of(*flow, prediction_type="flow").schedule.timesteps is None


FLOW = {"flow": double.FluxNetworkTrainer, "sample": double.Sd3NetworkTrainer}


@pytest.mark.parametrize("tau", [1.0, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prediction_type", FLOW)
def test_flux_and_sd3(prediction_type, weighted, tau):
    """At τ = 1 nothing changes; below it is the core's loss of what the model was given."""
    args = SimpleNamespace(weighting_scheme=weighted)
    trainer = skip_step(FLOW[prediction_type](), 0.05, tau=tau)
    scheduler = trainer.get_noise_scheduler(args, CPU)
    latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def unet(x=None, t=None, img=None, timesteps=None):
        return torch.sin(3 * (x if img is None else img))

    def step(*preserved, **options):
        torch.manual_seed(1)
        batch = {"custom_attributes": list(preserved)} if preserved else {}
        given = args, None, scheduler, latents, batch, None, unet, None, torch.float32, True
        return trainer.get_noise_pred_and_target(*given, **options)

    prediction, target, _timesteps, weighting = step()
    torch.manual_seed(1)
    noise, sigma = torch.randn_like(latents), torch.rand(8, 1, 1, 1)
    x_t = (1 - sigma) * latents + sigma * noise
    plain = noise - latents if prediction_type == "flow" else latents
    weight = 1 / (sigma + 1) if weighted else torch.ones_like(sigma)
    criterion = SkipStepLoss(strategies.FLOW, 0.05, tau=tau, prediction_type=prediction_type)
    changed, factor = criterion.regression_target(plain, sigma.flatten(), x_t)
    expected = changed, factor.reshape(-1, 1, 1, 1) * weight
    if tau == 1.0:
        torch.testing.assert_close((target, weighting), (plain, weight), rtol=0, atol=0)
    torch.testing.assert_close((target, weighting), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(step(is_train=False)[1], plain)

    _, kept, _, kept_weighting = step({"diff_output_preservation": True}, *[{}] * 7)
    torch.testing.assert_close(kept[0], prediction[0])  # the double's network has no adapter
    torch.testing.assert_close(kept_weighting[0], weight[0])
    torch.testing.assert_close(kept[1:], target[1:])


@pytest.mark.parametrize(
    ("script", "name"),
    [("lumina", "Lumina"), ("hunyuan_image", "HunyuanImage"), ("anima", "Anima")],
)
def test_refuses_other_networks_by_name_and_says_what_to_do(script, name):
    """The line that it says changes the trainer's own target; Lumina's is latents - noise."""
    (module,) = parts.load_sd_scripts(f"{script}_train_network")
    trainer = getattr(module, f"{name}NetworkTrainer")()
    with pytest.raises(ValueError, match=f"got a {name}NetworkTrainer ") as refused:
        skip_step(trainer, 0.05)
    ((made, line),) = re.findall(r"skip_loss = (.*) once .* target = (.*)$", str(refused.value))
    latents, noise = torch.randn(2, 8, 4, 4, 4).unbind(0)
    sigmas, sign = torch.linspace(0.1, 0.9, 8).reshape(8, 1, 1, 1), -1 if name == "Lumina" else 1
    x_t, target = (1 - sigmas) * latents + sigmas * noise, sign * (noise - latents)
    names = {"target": target, "sigmas": sigmas, "noisy_model_input": x_t, **vars(s2dm_loss)}
    # Run as it stands, since a user copies it.
    names["skip_loss"] = eval(made, names)  # noqa: S307 - ours
    criterion = SkipStepLoss(strategies.FLOW, 0.05, prediction_type="flow")
    changed, _ = criterion.regression_target(noise - latents, sigmas.flatten(), x_t)
    torch.testing.assert_close(eval(line, names), sign * changed)  # noqa: S307 - ours
