"""The adapter for kohya-ss/sd-scripts, on a double and on the trainer's own `process_batch`.

`S2DM_SD_SCRIPTS_ROOT` names a checkout; what it imports to read data and models is stubbed.
"""

import contextlib
import functools
import logging
import random
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.sd_scripts import loss_of, skip_step
from s2dm_loss.testing import check_swap
from tests.doubles import sd_scripts_double as double
from tests.helpers.patches import patched
from tests.helpers.sd_scripts_checkout import load_sd_scripts

PLAIN = {
    "adaptive_noise_scale": None,
    "debiased_estimation_loss": False,
    "gradient_checkpointing": False,
    "huber_c": 0.1,
    "huber_scale": 1.0,
    "huber_schedule": "exponential",
    "ip_noise_gamma": None,
    "ip_noise_gamma_random_strength": False,
    "loss_type": "l2",
    "masked_loss": False,
    "max_timestep": 1000,
    "min_snr_gamma": None,
    "min_timestep": 0,
    "multires_noise_discount": 0.3,
    "multires_noise_iterations": None,
    "noise_offset": None,
    "noise_offset_random_strength": False,
    "scale_v_pred_loss_like_noise_pred": False,
    "v_parameterization": False,
    "v_pred_like_loss": None,
    "zero_terminal_snr": False,
}
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
REAL_OPTIONS = {
    "multires noise": {"multires_noise_iterations": 2},
    "huber of the snr": {"loss_type": "huber", "huber_schedule": "snr"},
    "smooth l1": {"loss_type": "smooth_l1", "huber_schedule": "constant"},
    "checkpointing": {"gradient_checkpointing": True},
}


class Accelerator:
    device = torch.device("cpu")

    def autocast(self):
        return contextlib.nullcontext()


@pytest.fixture(scope="module")
def real():
    return load_sd_scripts("train_network", "sdxl_train_network")


@pytest.fixture(params=["double", "real", "real sdxl"])
def kind(request):
    """A trainer's class: the double's, Stable Diffusion's or SDXL's."""
    if request.param == "double":
        return double.NetworkTrainer
    modules = request.getfixturevalue("real")
    if request.param == "real":
        return modules[0].NetworkTrainer
    return modules[1].SdxlNetworkTrainer


def make_batch(kind, size=8, *, masked=False, preserved=()):
    torch.manual_seed(5)
    batch = {"latents": 5 * torch.randn(size, 4, 8, 8), "loss_weights": torch.rand(size)}
    if "Sdxl" in kind.__name__:
        text = [torch.randn(size, 3, width) for width in (8, 8)]
        batch["text_encoder_outputs_list"] = [*text, torch.randn(size, 8)]
        for name in ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw"):
            batch[name] = torch.full((size, 2), 8.0)
    else:
        batch["text_encoder_outputs_list"] = [torch.randn(size, 3, 8)]
    if masked:
        batch["alpha_masks"] = torch.rand(size, 16, 16)
    if preserved:
        batch["custom_attributes"] = [
            {"diff_output_preservation": True} if index in preserved else {}
            for index in range(size)
        ]
    return batch


class Network:
    """The LoRA network; with a multiplier of 0 the model is the one before training."""

    multiplier = 1.0

    def set_multiplier(self, value):
        self.multiplier = value


def as_unet(model, kind, network):
    """The model behind the call of each trainer's U-Net."""

    def unet(noisy_latents, timesteps, *_):
        output = model(noisy_latents, timesteps)
        if network.multiplier == 0.0:
            output = output.detach() + 1
        return output if "Sdxl" in kind.__name__ else SimpleNamespace(sample=output)

    return unet


def step(trainer, kind, model, options, *, preserved=(), is_train=True):
    """The loss of the trainer's own step."""
    args = SimpleNamespace(**{**PLAIN, **options})
    random.seed(0)
    network = Network()
    batch = make_batch(kind, masked=args.masked_loss, preserved=preserved)
    return trainer.process_batch(
        batch,
        [],
        as_unet(model, kind, network),
        network,
        None,
        trainer.get_noise_scheduler(args, torch.device("cpu")),
        torch.float32,
        torch.float32,
        Accelerator(),
        args,
        None,
        None,
        is_train=is_train,
        train_text_encoder=False,
    )


def adapted(kind, tau=0.99, skip_set=9, **options):
    return skip_step(kind(), skip_set, tau=tau, **options)


@pytest.mark.parametrize("name", [*OPTIONS, *REAL_OPTIONS])
def test_the_swap(kind, name):
    if kind is double.NetworkTrainer and name in REAL_OPTIONS:
        pytest.skip("the double has no such option")
    options = {**OPTIONS, **REAL_OPTIONS}[name]
    report = check_swap(
        lambda model: step(kind(), kind, model, options),
        lambda model, tau: step(adapted(kind, tau), kind, model, options),
        rtol=0.0,  # bit for bit at τ = 1
    )
    assert report.calls == 1
    assert len(set(report.times.tolist())) > 4


@pytest.mark.parametrize("time", [0, 8, 9, 500, 998, 999])
def test_zero_terminal_snr_at_its_ends(kind, time):
    """The trainer's own weight is 0 / 0 at neither end for v, and its gradient stays the plain."""
    ends = {**V, "zero_terminal_snr": True, "min_timestep": time, "max_timestep": time + 1}
    moved = {"tau": 0.99, "ratio_low": 0.95, "ratio_high": 1.05}
    if time < 9:
        with pytest.raises(AssertionError, match="the skip must act somewhere"):
            check_swap(
                lambda model: step(kind(), kind, model, ends),
                lambda model, tau: step(adapted(kind, tau), kind, model, ends),
                **moved,
            )
        return
    loss = {}
    for tau in (None, 0.99):
        torch.manual_seed(0)
        model = nn.Conv2d(4, 4, 1)
        trainer = kind() if tau is None else adapted(kind, tau)
        value = step(trainer, kind, lambda x, _, model=model: model(x), ends)
        value.backward()
        loss[tau] = model.weight.grad
    assert loss[0.99].isfinite().all()
    assert (loss[0.99] - loss[None]).norm() < 0.05 * loss[None].norm()


@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
@pytest.mark.parametrize("v", [False, True])
def test_below_tau_one_it_is_the_cores_loss(kind, estimator, v):
    """`from_output` in float64 on what went in and came out, times the trainer's own weights."""
    options = {"v_parameterization": v, "min_snr_gamma": 5}
    model, seen = nn.Conv2d(4, 4, 1), []

    def remember(x, t):
        output = model(x)
        seen.append((x.detach(), t, output))
        return output

    loss = step(adapted(kind, estimator=estimator), kind, remember, options)
    ((x_t, t, output),) = seen

    batch = make_batch(kind)  # seeds the stream that the step then draws from
    latents = (0.13025 if "Sdxl" in kind.__name__ else 0.18215) * batch["latents"]
    noise = torch.randn_like(latents)
    torch.randint(0, 1000, (len(latents),))
    zeta = {"skip_noise": torch.randn_like(latents)} if estimator == "fresh" else {}
    schedule = NoiseSchedule.scaled_linear(1000)
    alpha, sigma = (scale.reshape(-1, 1, 1, 1) for scale in schedule.alpha_sigma(t))
    criterion = SkipStepLoss(
        schedule,
        9,
        estimator=estimator,
        prediction_type="v_prediction" if v else "epsilon",
        reduction="none",
    )
    snr = schedule.log_snr.exp()[t]
    weights = batch["loss_weights"] * snr.clamp(max=5) / (snr + v)
    target = alpha * noise - sigma * latents if v else noise.double()
    expected = criterion.from_output(
        output.double(), target, t, x_t.double(), weights=weights, **zeta
    )
    torch.testing.assert_close(loss.double(), expected.mean(), rtol=1e-5, atol=0)


def test_samples_that_preserve_the_networks_output_keep_the_plain_loss(kind):
    """Their target is the network's own output before training, and holds no noise to shrink."""
    if kind is not double.NetworkTrainer and "Sdxl" not in kind.__name__:
        pytest.skip("the trainer's call_unet of Stable Diffusion ignores which samples")

    def gradient(trainer):
        torch.manual_seed(2)
        output = torch.randn(8, 4, 8, 8, requires_grad=True)
        unet = lambda x, t: output if len(x) == 8 else output[:2].detach()  # noqa: E731
        torch.manual_seed(3)
        loss = step(trainer, kind, unet, {"min_timestep": 500}, preserved=(0, 1))
        return torch.autograd.grad(loss, output)[0]

    plain, ours = gradient(kind()), gradient(adapted(kind, 0.5, 99))
    assert torch.equal(ours[:2], plain[:2])
    assert not torch.allclose(ours[2:], plain[2:], rtol=1e-3)


def test_validation_is_the_plain_loss(kind):
    torch.manual_seed(0)
    model = nn.Conv2d(4, 4, 1)
    losses = []
    for trainer in (kind(), adapted(kind, 0.5, 99)):
        torch.manual_seed(1)
        losses.append(step(trainer, kind, lambda x, _: model(x), {}, is_train=False))
    assert torch.equal(*losses)


def test_the_schedule_is_rebuilt_in_float64(kind):
    for zero, schedule in (
        (False, NoiseSchedule.scaled_linear(1000)),
        (True, NoiseSchedule.scaled_linear(1000).rescale_zero_terminal_snr()),
    ):
        args = SimpleNamespace(**{**PLAIN, "zero_terminal_snr": zero})
        scheduler = kind().get_noise_scheduler(args, torch.device("cpu"))
        found = loss_of(args, scheduler, 9).schedule
        assert torch.equal(found.log_alphas_cumprod, schedule.log_alphas_cumprod)


def loop_of(source, start, end):
    """The lines of a script's loop from `start` up to `end`, as a program of their own."""
    lines = source.splitlines()
    first = next(index for index, line in enumerate(lines) if line.strip().startswith(start))
    last = next(index for index in range(first, len(lines)) if lines[index].strip().startswith(end))
    return textwrap.dedent("\n".join(lines[first:last]))


@pytest.mark.parametrize("script", ["sdxl_train", "train_db", "fine_tune"])
@pytest.mark.parametrize("name", ["plain", "zero terminal snr, v", "min snr", "huber", "masked"])
def test_the_pages_diff_in_the_scripts_with_a_loop(script, name):
    """The scripts' own lines from the noise to the loss, as they are and after the diff."""
    (module,) = load_sd_scripts(script)
    if name == "masked" and script == "fine_tune":
        pytest.skip("the script has no masks")
    args = SimpleNamespace(**{**PLAIN, **OPTIONS[name]})
    plain = Path(module.__file__).read_text()
    swapped = patched("sd-scripts", f"{script}.py", plain)

    def loss(model, tau=None):
        batch = make_batch(double.NetworkTrainer, masked=args.masked_loss)
        namespace = {
            **vars(module),
            "args": args,
            "accelerator": Accelerator(),
            "batch": batch,
            "latents": 0.18215 * batch["latents"],
            "weight_dtype": torch.float32,
            "unet": lambda x, t, *more: (
                model(x, t) if script == "sdxl_train" else SimpleNamespace(sample=model(x, t))
            ),
            **dict.fromkeys(("text_embedding", "vector_embedding", "encoder_hidden_states")),
            "loss_of": functools.partial(loss_of, tau=tau),
        }
        source = plain if tau is None else swapped
        made = loop_of(source, "noise_scheduler = DDPMScheduler(", "if accelerator.is_main")
        step = loop_of(source, "noise, noisy_latents, timesteps =", "accelerator.backward(loss)")
        exec(compile(f"{made}\n{step}", script, "exec"), namespace)  # noqa: S102
        return namespace["loss"]

    check_swap(loss, loss, rtol=1e-6)


def test_skips_from_an_iterator_outlast_the_first_look(kind, caplog):
    with caplog.at_level(logging.INFO):
        trainer = skip_step(kind(), skip_set=map(int, ["1", "9"]))
        trainer.get_noise_scheduler(SimpleNamespace(**PLAIN), torch.device("cpu"))
    assert "SkipSet([1, 9])" in caplog.text


def test_says_what_it_does(kind, caplog):
    trainer = adapted(kind)
    assert repr(trainer).startswith(
        f"SkipStep{kind.__name__}({{'skip_set': SkipSet(9), 'tau': 0.99"
    )
    with caplog.at_level(logging.INFO):
        trainer.get_noise_scheduler(SimpleNamespace(**PLAIN), torch.device("cpu"))
    assert "SkipStepLoss(NoiseSchedule.scaled_linear(1000), SkipSet(9), tau=0.99" in caplog.text


def test_the_double_is_the_trainer(real):
    kind = real[0].NetworkTrainer
    torch.manual_seed(0)
    model = nn.Conv2d(4, 4, 1)
    for options in OPTIONS.values():
        losses = []
        for each in (double.NetworkTrainer, kind):
            torch.manual_seed(1)
            losses.append(step(each(), each, lambda x, _: model(x), options))
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0, msg=str(options))


def test_refuses_what_it_cannot_serve(kind):
    trainer = adapted(kind)
    with pytest.raises(ValueError, match=r"must have its plain loss, got a SkipStep\w*NetworkTr"):
        skip_step(trainer, 9)
    with pytest.raises(ValueError, match=r"'huber' or 'smooth_l1', got 'l1'"):
        trainer.assert_extra_args(SimpleNamespace(**{**PLAIN, "loss_type": "l1"}), None, None)
    with pytest.raises(ValueError, match=r"tau must lie in \[0\.0, 1\.0\], got 2\.0"):
        adapted(kind, 2.0)
    with pytest.raises(ValueError, match="a skip must be below 1000"):
        adapted(kind, skip_set=1000)
    with pytest.raises(TypeError, match=r"a Network without get_noise_scheduler, .*`loss_of`"):
        skip_step(Network(), 9)


FLOW = {"flow": double.FluxNetworkTrainer, "sample": double.Sd3NetworkTrainer}


@pytest.mark.parametrize("tau", [None, 1.0, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prediction_type", FLOW)
def test_flux_and_sd3(prediction_type, weighted, tau):
    """At τ = 1 nothing changes; below it is the core's loss of what the model was given."""
    args = SimpleNamespace(weighting_scheme=weighted)
    trainer = FLOW[prediction_type]()
    if tau is not None:
        trainer = skip_step(trainer, 0.05, tau=tau)
    scheduler = trainer.get_noise_scheduler(args, torch.device("cpu"))
    latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    preserved = [{"diff_output_preservation": True}, *({} for _ in range(7))]

    def unet(x=None, t=None, img=None, timesteps=None):
        return torch.sin(3 * (x if img is None else img))

    def step(batch, **options):
        torch.manual_seed(1)
        given = args, None, scheduler, latents, batch, None, unet, None, torch.float32, True
        return trainer.get_noise_pred_and_target(*given, **options)

    prediction, target, _timesteps, weighting = step({})
    torch.manual_seed(1)
    noise, sigma = torch.randn_like(latents), torch.rand(8, 1, 1, 1)
    x_t = (1 - sigma) * latents + sigma * noise
    plain = noise - latents if prediction_type == "flow" else latents
    weight = 1 / (sigma + 1) if weighted else torch.ones_like(sigma)
    if tau in (None, 1.0):
        assert torch.equal(target, plain)
        assert torch.equal(torch.ones_like(weight) if weighting is None else weighting, weight)
        return
    criterion = SkipStepLoss(
        ContinuousSchedule.flow(), 0.05, tau=tau, prediction_type=prediction_type, reduction="none"
    )
    expected = criterion.from_output(
        prediction, plain, sigma.flatten(), x_t, weights=weight.flatten()
    )
    found = (weighting * (prediction - target).square()).mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

    _, kept, _, kept_weighting = step({"custom_attributes": preserved})
    torch.testing.assert_close(kept[0], prediction[0])  # the double's network has no adapter
    torch.testing.assert_close(kept_weighting[0], weight[0])
    torch.testing.assert_close(kept[1:], target[1:])
    _, untouched, _, _ = step({}, is_train=False)
    assert torch.equal(untouched, plain)


OTHERS = {
    "lumina_train_network": "LuminaNetworkTrainer",
    "hunyuan_image_train_network": "HunyuanImageNetworkTrainer",
    "anima_train_network": "AnimaNetworkTrainer",
}


@pytest.mark.parametrize("script", OTHERS)
def test_refuses_other_networks_by_name_and_says_what_to_do(script):
    (module,) = load_sd_scripts(script)
    trainer = getattr(module, OTHERS[script])()
    with pytest.raises(ValueError, match=rf"got a {OTHERS[script]} .*regression_target\(target, s"):
        skip_step(trainer, 0.05)


def test_a_flow_matching_scheduler_needs_what_the_target_is():
    from diffusers import FlowMatchEulerDiscreteScheduler

    args, scheduler = SimpleNamespace(**PLAIN), FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"given for a FlowMatchEuler.*'flow' where .*got None"):
        loss_of(args, scheduler, 0.05)
    assert loss_of(args, scheduler, 0.05, prediction_type="flow").schedule.timesteps is None
