"""`weighting=` against what trainers' own code multiplies by, on the same signal-to-noise ratio.

A name weighs the error of the *noise*, whatever the network predicts. Each trainer's number is what
its own squared error, of its own output, is multiplied by: computed here by its formula, and by its
code where a checkout (or the package) is at hand. Where a trainer's weight for v is another loss
than its weight for ε, the test says which.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.weighting import WEIGHTINGS, min_snr, p2, soft_min_snr
from tests.helpers.diffusers_parts import compute_snr, make_scheduler, min_snr_weights
from tests.helpers.packages import k_diffusion_layers
from tests.helpers.sd_scripts_parts import load_sd_scripts
from tests.helpers.upstream import load, root_of, stubs

SCHEDULE = NoiseSchedule.scaled_linear(1000)  # Stable Diffusion's
SNR = SCHEDULE.log_snr.exp()
T = torch.arange(0, 1000, 37)


def weights_of(weighting, prediction_type, schedule=SCHEDULE, t=T):
    """What `weighting` multiplies mse(output, target) by, read off the loss itself."""
    criterion = SkipStepLoss(
        schedule,
        0.001 if schedule.timesteps is None else 9,
        tau=1.0,
        prediction_type=prediction_type,
        weighting=weighting,
        reduction="none",
    )
    # Errors of 1 in float64, around a target and an x_t that say nothing.
    zeros = torch.zeros(len(t), 3, dtype=torch.float64)
    return criterion.from_output(torch.ones_like(zeros), zeros, t, zeros)


def close(found, expected, rtol=1e-6):
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_that_of_diffusers_scripts(prediction_type, gamma):
    """train_text_to_image.py --snr_gamma, with diffusers' own `compute_snr` in float32."""
    scheduler = make_scheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
    )
    close(compute_snr(scheduler, T).double(), SNR[T], rtol=1e-3)
    weights = min_snr_weights(scheduler, T, gamma)
    close(weights_of(min_snr(gamma), prediction_type), weights, rtol=1e-3)


def kohya(name, v, snr, gamma=5.0):
    """sd-scripts' formulas, library/custom_train_functions.py."""
    bounded = snr.clamp(max=1000)
    return {
        "min_snr_gamma": snr.clamp(max=gamma) / (snr + 1 if v else snr),
        "debiased_estimation": 1 / (bounded + 1) if v else bounded.rsqrt(),
        "scale_v_pred_loss_like_noise_pred": bounded / (bounded + 1),
    }[name]


def kohyas_own(name, v, snr, gamma=5.0):
    """The same by its code."""
    (module,) = load_sd_scripts("library.custom_train_functions")
    scheduler = SimpleNamespace(all_snr=snr)
    t, loss = torch.arange(len(snr)), torch.ones_like(snr)
    if name == "min_snr_gamma":
        return module.apply_snr_weight(loss, t, scheduler, gamma, v)
    if name == "debiased_estimation":
        return module.apply_debiased_estimation(loss, t, scheduler, v)
    return module.scale_v_prediction_loss_like_noise_prediction(loss, t, scheduler)


@pytest.mark.parametrize("code", [kohya, kohyas_own], ids=["formula", "code"])
@pytest.mark.parametrize(
    ("name", "v", "weighting"),
    [
        ("min_snr_gamma", False, "min_snr"),
        ("min_snr_gamma", True, "min_snr"),
        ("debiased_estimation", False, "debiased"),
        # For v its weight is 1 / (snr + 1), which on the noise is 1 / snr and not 1 / √snr.
        ("debiased_estimation", True, lambda log_snr: (-log_snr).exp()),
        ("scale_v_pred_loss_like_noise_pred", True, "uniform"),
    ],
)
def test_those_of_sd_scripts(code, name, v, weighting):
    bounded = SNR[T] <= 1000  # above, the trainer holds its debiased weights
    t = T[bounded]
    expected = code(name, v, SNR[t])
    close(weights_of(weighting, "v_prediction" if v else "epsilon", t=t), expected)


def test_debiased_of_sd_scripts_for_v_is_another_loss_than_for_epsilon():
    t = T[SNR[T] <= 1000]
    ours, theirs = (
        weights_of("debiased", "v_prediction", t=t),
        kohya("debiased_estimation", True, SNR[t]),
    )
    close(ours / theirs, SNR[t].sqrt())


def onetrainer(name, v, snr, strength):
    """OneTrainer's formulas, ModelSetupDiffusionLossMixin.py."""
    if name == "MIN_SNR_GAMMA":
        return snr.clamp(max=strength) / (snr + v)
    if name == "DEBIASED_ESTIMATION":
        return (snr.clamp(max=1000) + v).rsqrt()
    return (1 + snr + v) ** -strength  # P2


def onetrainers_own(name, v, snr, strength):
    """The same by its code, on a table that has this signal-to-noise ratio."""
    names = ("modules.util.config.TrainConfig", "modules.util.loss.vb_loss")
    stubbed = stubs(*names, "modules.util.loss.masked_loss")
    (module,) = load(
        root_of("S2DM_ONETRAINER_ROOT"),
        "modules.modelSetup.mixin.ModelSetupDiffusionLossMixin",
        stubbed=stubbed,
    )
    mixin = module.ModelSetupDiffusionLossMixin()
    ones = torch.ones(len(snr), 1)
    data = {
        "loss_type": "target",
        "predicted": ones,
        "target": 0 * ones,
        "timestep": torch.arange(len(snr)),
        "prediction_type": "v_prediction" if v else "epsilon",
    }
    config = SimpleNamespace(
        masked_training=False,
        mse_strength=1.0,
        mae_strength=0.0,
        log_cosh_strength=0.0,
        huber_strength=0.0,
        vb_loss_strength=0.0,
        batch_size=1,
        gradient_accumulation_steps=1,
        loss_scaler=SimpleNamespace(get_scale=lambda **_: 1.0),
        loss_weight_fn=module.LossWeight[name],
        loss_weight_strength=strength,
    )
    return mixin._diffusion_losses(
        {"loss_weight": torch.ones(len(snr))},
        data,
        config,
        torch.device("cpu"),
        alphas_cumprod_fun=lambda t, _: (snr / (1 + snr))[t],
    )


@pytest.mark.parametrize("code", [onetrainer, onetrainers_own], ids=["formula", "code"])
@pytest.mark.parametrize(
    ("name", "v", "strength", "weighting"),
    [
        ("MIN_SNR_GAMMA", False, 5.0, "min_snr"),
        ("MIN_SNR_GAMMA", True, 5.0, "min_snr"),
        ("MIN_SNR_GAMMA", True, 1.0, min_snr(1.0)),
        ("DEBIASED_ESTIMATION", False, 1.0, "debiased"),
        ("P2", False, 1.0, "p2"),
        ("P2", False, 0.5, p2(gamma=0.5)),
        # For v two of its weights are other losses than for ε; on the noise they are these.
        (
            "DEBIASED_ESTIMATION",
            True,
            1.0,
            lambda log_snr: (1 + log_snr.exp()).sqrt() / log_snr.exp(),
        ),
        ("P2", True, 1.0, lambda log_snr: (1 + 1 / log_snr.exp()) / (2 + log_snr.exp())),
    ],
)
def test_those_of_onetrainer(code, name, v, strength, weighting):
    t = T[SNR[T] <= 1000]
    expected = code(name, v, SNR[t], strength)
    close(weights_of(weighting, "v_prediction" if v else "epsilon", t=t), expected, rtol=1e-5)


def k_diffusion(name, sigma, sigma_data):
    """k-diffusion's formulas, layers.py: of the error of F in D = c_skip x + c_out F."""
    total = sigma**2 + sigma_data**2
    return {
        "karras": torch.ones_like(sigma),
        "soft-min-snr": (sigma * sigma_data) ** 2 / total**2,
        "snr": sigma_data**2 / total,
    }[name]


def k_diffusions_own(name, sigma, sigma_data):
    """The same by its code."""
    return k_diffusion_layers().Denoiser(nn.Identity(), sigma_data, weighting=name).weighting(sigma)


@pytest.mark.parametrize("code", [k_diffusion, k_diffusions_own], ids=["formula", "code"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("name", ["karras", "soft-min-snr", "snr"])
def test_those_of_k_diffusion(code, name, sigma_data):
    weighting = {
        "soft-min-snr": soft_min_snr(1 / sigma_data**2),
        "snr": "uniform",
        "karras": lambda log_snr: 1 + (-log_snr).exp() / sigma_data**2,
    }[name]
    sigma = torch.logspace(-2, 1.9, 30, dtype=torch.float64)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    expected = code(name, sigma, sigma_data) / c_out**2  # of the error of D, which is x_0
    path = ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 0.01 + 80 * t))
    found = weights_of(weighting, "sample", path, (sigma - 0.01) / 80)
    close(found, expected, rtol=1e-5)


def test_soft_min_snr_by_its_name_is_k_diffusions_at_its_usual_sigma_data():
    sigma = torch.logspace(-2, 1.9, 30, dtype=torch.float64)
    path = ContinuousSchedule.from_alpha_sigma(lambda t: (torch.ones_like(t), 0.01 + 80 * t))
    c_out = sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    found = weights_of("soft_min_snr", "sample", path, (sigma - 0.01) / 80)
    close(found, k_diffusion("soft-min-snr", sigma, 0.5) / c_out**2, rtol=1e-5)


def test_min_snr_of_denoising_diffusion_pytorch():
    """Its `loss_weight` buffer, for each of its objectives."""
    from tests.doubles.denoising_diffusion_pytorch_double import GaussianDiffusion, Unet

    for objective, name in {
        "pred_noise": "epsilon",
        "pred_x0": "sample",
        "pred_v": "v_prediction",
    }.items():
        diffusion = GaussianDiffusion(
            Unet(8), image_size=8, objective=objective, min_snr_loss_weight=True
        )
        schedule = NoiseSchedule.from_betas(diffusion.betas)
        close(weights_of("min_snr", name, schedule), diffusion.loss_weight[T], rtol=1e-4)


# The table of docs/schedules.md.

PAGE = Path(__file__).parents[1] / "docs" / "schedules.md"
GAMMA, SIGMA_DATA = 5.0, 0.5
# The page's formulas, as functions of r.
FORMULAS = {
    "min(r, γ) / r": lambda r: r.clamp(max=GAMMA) / r,
    "min(r, γ) / (1 + r)": lambda r: r.clamp(max=GAMMA) / (1 + r),
    "min(r, γ) / r + 1": lambda r: r.clamp(max=GAMMA) / r + 1,
    "min(r, γ)": lambda r: r.clamp(max=GAMMA),
    "(min(r, γ) / r + 1) (1 + r) / r": lambda r: (r.clamp(max=GAMMA) / r + 1) * (1 + r) / r,
    "r": lambda r: r,
    "1 / r": lambda r: 1 / r,
    "1 / √r": lambda r: r.rsqrt(),
    "1 / (1 + r)": lambda r: 1 / (1 + r),
    "1 / √(1 + r)": lambda r: (1 + r).rsqrt(),
    "√(1 + r) / r": lambda r: (1 + r).sqrt() / r,
    "r / (1 + r)": lambda r: r / (1 + r),
    "(1 + r)^-γ": lambda r: (1 + r) ** -GAMMA,
    "(2 + r)^-γ": lambda r: (2 + r) ** -GAMMA,
    "(2 + r)^-γ (1 + r) / r": lambda r: (2 + r) ** -GAMMA * (1 + r) / r,
    # The straight path: r = (1 - σ)² / σ².
    "σ": lambda r: 1 / (1 + r.sqrt()),
    "(1 + √r) / r": lambda r: (1 + r.sqrt()) / r,
    "r / (1 + r σ_data²)": lambda r: r / (1 + r * SIGMA_DATA**2),
    "r + 1 / σ_data²": lambda r: r + 1 / SIGMA_DATA**2,
    "1 + 1 / (r σ_data²)": lambda r: 1 + 1 / (r * SIGMA_DATA**2),
}
NAMED = {
    "`min_snr(γ)`": min_snr(GAMMA),
    '`"uniform"`': "uniform",
    '`"debiased"`': "debiased",
    "`p2(1, γ)`": p2(1, GAMMA),
    "`soft_min_snr(1 / σ_data²)`": soft_min_snr(1 / SIGMA_DATA**2),
}
# Which of ours has the name of a trainer's option.
SAME_NAME = {
    "snr_gamma": min_snr(GAMMA),
    "min_snr": min_snr(GAMMA),
    "MIN_SNR": min_snr(GAMMA),
    "debiased": "debiased",
    "DEBIASED": "debiased",
    "`P2`": p2(1, GAMMA),
    "soft-min-snr": soft_min_snr(1 / SIGMA_DATA**2),
    "scale_v_pred": "uniform",
    "train_unconditional": "uniform",
}
OUTPUTS = {"ε": "epsilon", "v": "v_prediction", "x_0": "sample", "flow": "flow"}
ROWS = re.findall(
    r"^\| ([^|]+) \| (ε|v|x_0|flow) \| ([^|]+) \| (equal|different|no name) \| ([^|]+) \|$",
    PAGE.read_text(encoding="utf-8"),
    re.M,
)


def factor(weighting, output):
    """Ours, on the schedule of the output, and r there."""
    if output == "flow":
        schedule, t = ContinuousSchedule.flow(), torch.linspace(0.05, 0.95, 19).double()
        alpha, sigma = schedule.alpha_sigma(t)
        return weights_of(weighting, "flow", schedule, t), (alpha / sigma) ** 2
    t = T[SNR[T] <= 1000]
    return weights_of(weighting, OUTPUTS[output], t=t), SNR[t]


@pytest.mark.parametrize(("option", "output", "theirs", "verdict", "ours"), ROWS)
def test_a_row_of_the_page(option, output, theirs, verdict, ours):
    if "`weights=`" in ours:
        with pytest.raises(ValueError, match="weighting must lie in"):
            factor(lambda log_snr: (1 + (0.5 * log_snr).exp()) ** 4 * (-log_snr).exp(), output)
        return
    weighting = NAMED.get(ours) or (lambda log_snr: FORMULAS[ours](log_snr.exp()))
    found, r = factor(weighting, output)
    expected = FORMULAS[theirs](r)
    close(found, expected, rtol=1e-5)  # the same factor here
    named = [w for word, w in SAME_NAME.items() if word in option]
    if verdict == "no name":
        assert not named
        return
    ratio = factor(named[0], output)[0] / expected
    equal = bool(((ratio - 1).abs() < 1e-5).all())
    assert equal == (verdict == "equal")


def test_every_row_of_the_page_is_tested():
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| trainer, option |") :].split("\n\n")[0]
    assert len(ROWS) == len(table.splitlines()) - 2 > 20


def test_the_numbers_of_the_page():
    t = torch.tensor([999])
    ours = weights_of("debiased", "v_prediction", t=t)
    assert f"{ours.item():.3f}" == "0.068"
    assert f"{onetrainer('DEBIASED_ESTIMATION', True, SNR[t], 1.0).item():.3f}" == "0.998"


ZERO = SCHEDULE.rescale_zero_terminal_snr()


@pytest.mark.filterwarnings("ignore")  # what the loss says of the zeros
@pytest.mark.parametrize("weighting", [None, *WEIGHTINGS])
def test_the_last_timestep_of_v_at_zero_terminal_snr(weighting):
    found = weights_of(weighting, "v_prediction", ZERO, torch.tensor([999]))
    text = PAGE.read_text(encoding="utf-8")
    name = f'`"{weighting}"`' if weighting else "`None`"
    (row,) = re.findall(rf"^\| [^|\n]*{name}[^|\n]* \| ([01]) \|$", text, re.M)
    assert found.item() == pytest.approx(float(row), abs=1e-12)


def test_min_snr_of_the_trainers_is_nan_at_zero_terminal_snr():
    r = torch.zeros(1)
    assert FORMULAS["min(r, γ) / r"](r).isnan().all()
    assert FORMULAS["min(r, γ) / r + 1"](r).isnan().all()
    close(weights_of(min_snr(GAMMA), "epsilon", ZERO, torch.tensor([998])), torch.ones(1))
