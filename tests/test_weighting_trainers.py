"""`weighting=` and the page on it against what trainers' own code multiplies by.

A name weighs the error of the *noise*. A trainer's number is what its own squared error, of its own
output, is multiplied by: docs/schedules.md gives it as a formula of the signal-to-noise ratio r.
"""

import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.weighting import WEIGHTINGS, min_snr, p2, soft_min_snr
from tests.doubles.denoising_diffusion_pytorch_double import GaussianDiffusion
from tests.helpers import more_trainers
from tests.helpers.diffusers_parts import STABLE_DIFFUSION, diffusers, make_scheduler
from tests.helpers.more_trainers import K_DIFFUSION
from tests.helpers.sd_scripts_parts import load_sd_scripts
from tests.helpers.small import Network
from tests.helpers.trainers import OBJECTIVES

SCHEDULE = NoiseSchedule.scaled_linear(1000)  # Stable Diffusion's
SNR = SCHEDULE.log_snr.exp()
T = torch.arange(0, 1000, 37)
BOUNDED = T[SNR[T] <= 1000]  # above, two trainers hold their debiased weights


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


PAGE = (Path(__file__).parents[1] / "docs" / "schedules.md").read_text(encoding="utf-8")
GAMMA, SIGMA_DATA = 5.0, 0.5
IN_PYTHON = (
    *(("min(r, γ)", "r.clamp(max=γ)"), ("^", "**"), (") (", ") * ("), ("γ (", "γ * (")),
    *(("r σ_data", "r * σ_data"), ("²", "**2"), ("√(1 + r)", "(1 + r) ** 0.5"), ("√r", "r ** 0.5")),
)


def formula(text):
    """One of the page's, as a function of r; on the straight path r = (1 - σ)² / σ²."""
    for theirs, ours in IN_PYTHON:
        text = text.replace(theirs, ours)
    # A formula that our own page gives, so that what a reader copies is what is compared.
    names = {"γ": GAMMA, "σ_data": SIGMA_DATA}
    return lambda r: eval(text, {**names, "r": r, "σ": 1 / (1 + r.sqrt())})  # noqa: S307 - our page


NAMED = {
    "`min_snr(γ)`": min_snr(GAMMA),
    '`"uniform"`': "uniform",
    '`"debiased"`': "debiased",
    "`p2(1, γ)`": p2(1, GAMMA),
    "`soft_min_snr(1 / σ_data²)`": soft_min_snr(1 / SIGMA_DATA**2),
}
# Which of ours has the name of a trainer's option.
SAME_NAME = {
    **dict.fromkeys(("snr_gamma", "min_snr", "MIN_SNR"), min_snr(GAMMA)),
    **dict.fromkeys(("debiased", "DEBIASED"), "debiased"),
    **dict.fromkeys(("scale_v_pred", "train_unconditional"), "uniform"),
    **{"`P2`": p2(1, GAMMA), "soft-min-snr": soft_min_snr(1 / SIGMA_DATA**2)},
}
OUTPUTS = {"ε": "epsilon", "v": "v_prediction", "x_0": "sample", "flow": "flow"}
ROWS = re.findall(
    r"^\| ([^|]+) \| (ε|v|x_0|flow) \| ([^|]+) \| (equal|different|no name) \| ([^|]+) \|$",
    PAGE,
    re.M,
)


def factor(weighting, output):
    """Ours, on a path that such an output is of, and r there."""
    if output in ("ε", "v"):
        return weights_of(weighting, OUTPUTS[output], t=BOUNDED), SNR[BOUNDED]
    schedule, t = ContinuousSchedule.flow(), torch.linspace(0.05, 0.95, 19).double()
    if output == "x_0":
        schedule = ContinuousSchedule.from_alpha_sigma(lambda t: (0 * t + 1, 0.01 + 80 * t**3))
    alpha, sigma = schedule.alpha_sigma(t)
    return weights_of(weighting, OUTPUTS[output], schedule, t), (alpha / sigma) ** 2


@pytest.mark.parametrize(("option", "output", "theirs", "verdict", "ours"), ROWS)
def test_a_row_of_the_page(option, output, theirs, verdict, ours):
    if "`weights=`" in ours:
        with pytest.raises(ValueError, match="weighting must lie in"):
            factor(lambda log_snr: (1 + (0.5 * log_snr).exp()) ** 4 * (-log_snr).exp(), output)
        return
    found, r = factor(NAMED.get(ours) or (lambda log_snr: formula(ours)(log_snr.exp())), output)
    expected = formula(theirs)(r)
    close(found, expected, rtol=1e-5)  # the same factor here
    named = [weighting for word, weighting in SAME_NAME.items() if word in option]
    assert bool(named) == (verdict != "no name")
    if named:
        ratio = factor(named[0], output)[0] / expected
        assert bool(((ratio - 1).abs() < 1e-5).all()) == (verdict == "equal")


def diffusers_scripts(option, output):
    """A trainer's own factor, as each here, and r there; in our words but for `compute_snr`."""
    snr = diffusers.training_utils.compute_snr(make_scheduler(**STABLE_DIFFUSION), BOUNDED)
    close(snr.double(), SNR[BOUNDED], rtol=1e-3)
    if "--snr_gamma" not in option:
        return snr, snr
    over = snr + 1 if output == "v" and "sdxl" not in option else snr
    return snr.clamp(max=GAMMA) / over + ("sdxl" in option), snr


def sd_scripts(option, output):
    (module,) = load_sd_scripts("library.custom_train_functions")
    r = SNR[BOUNDED]
    arguments = torch.ones_like(r), torch.arange(len(r)), SimpleNamespace(all_snr=r)
    if "min_snr_gamma" in option:
        return module.apply_snr_weight(*arguments, GAMMA, output == "v"), r
    if "debiased_estimation" in option:
        return module.apply_debiased_estimation(*arguments, output == "v"), r
    return module.scale_v_prediction_loss_like_noise_prediction(*arguments), r


def onetrainer(option, output):
    module, r = more_trainers.onetrainer(), SNR[BOUNDED]
    ones = torch.ones(len(r), 1)
    data = {"loss_type": "target", "predicted": ones, "target": 0 * ones}
    data |= {"prediction_type": OUTPUTS[output], "timestep": torch.arange(len(r))}
    config = more_trainers.settings_of(module, option.split("`")[1], loss_weight_strength=GAMMA)
    arguments = {"loss_weight": ones[:, 0]}, data, config, torch.device("cpu")
    losses_of = module.ModelSetupDiffusionLossMixin()._diffusion_losses
    return losses_of(*arguments, alphas_cumprod_fun=lambda t, _: (r / (1 + r))[t]), r


def k_diffusion(layers, option, _):
    sigma = torch.logspace(-2, 1.9, 30, dtype=torch.float64)
    c_out = sigma * SIGMA_DATA / (sigma**2 + SIGMA_DATA**2).sqrt()
    denoiser = layers().Denoiser(nn.Identity(), SIGMA_DATA, weighting=option.split("`")[1])
    return denoiser.weighting(sigma) / c_out**2, sigma**-2  # of the error of D, which is x_0


def lucid(_, output):
    """Its `loss_weight` buffer."""
    objective = next(name for name, kind in OBJECTIVES.items() if kind == OUTPUTS[output])
    options = {"image_size": 8, "objective": objective, "min_snr_loss_weight": True}
    diffusion = GaussianDiffusion(Network(3), **options)
    return diffusion.loss_weight, NoiseSchedule.from_betas(diffusion.betas).log_snr.exp()


TRAINERS = [
    ("diffusers", diffusers_scripts),
    ("sd-scripts", sd_scripts),
    ("OneTrainer", onetrainer),
    *(("k-diffusion", functools.partial(k_diffusion, get)) for _, get in K_DIFFUSION),
    ("denoising-diffusion-pytorch", lucid),
]


@pytest.mark.parametrize(
    ("trainer", "option", "output", "theirs"),
    [
        (trainer, *row[:3])
        for name, trainer in TRAINERS
        for row in ROWS
        if row[0].startswith(name) and row[1] != "flow"
    ],
)
def test_a_row_of_the_page_is_what_the_trainers_code_does(trainer, option, output, theirs):
    found, r = trainer(option, output)
    close(found, formula(theirs)(r), rtol=1e-4 if trainer is lucid else 1e-5)


def test_every_row_of_the_page_is_tested():
    table = PAGE[PAGE.index("| trainer, option |") :].split("\n\n")[0]
    assert len(ROWS) == len(table.splitlines()) - 2 > 20


@pytest.mark.filterwarnings("ignore")  # what the loss says of the zeros
@pytest.mark.parametrize("weighting", [None, *WEIGHTINGS])
def test_the_last_timestep_of_v_at_zero_terminal_snr(weighting):
    zero = SCHEDULE.rescale_zero_terminal_snr()
    found = weights_of(weighting, "v_prediction", zero, torch.tensor([999]))
    name = f'`"{weighting}"`' if weighting else "`None`"
    (row,) = re.findall(rf"^\| [^|\n]*{name}[^|\n]* \| ([01]) \|$", PAGE, re.M)
    assert found.item() == pytest.approx(float(row), abs=1e-12)
