"""Finite everywhere: every built-in schedule, every timestep, every skip, half types, autocast."""

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from tests.strategies import COSINE, ESTIMATORS, FLOW, LINEAR, VP, ZERO_SNR, drawn, normal, normals

SCALED = NoiseSchedule.scaled_linear(1000)
DISCRETE = [
    *(LINEAR, SCALED, COSINE, ZERO_SNR),
    *(SCALED.rescale_zero_terminal_snr(), COSINE.rescale_zero_terminal_snr()),
]
CONTINUOUS = [VP, ContinuousSchedule.sub_vp(), ContinuousSchedule.cosine(), FLOW]


def check(criterion, t):
    noise = normal(len(t), 2, 2, seed=1).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        eps_hat = normal(len(t), 2, 2, seed=0, dtype=dtype).requires_grad_()
        loss = criterion.from_output(eps_hat, noise, t)
        loss.sum().backward()
        assert loss.isfinite().all(), (criterion, loss.isfinite().logical_not().nonzero()[0])
        assert eps_hat.grad.isfinite().all(), criterion
        # No timestep weighs more than the bound on c² allows: 0.99 + 0.01 · 100.
        assert loss.max() < 1.99 * 40


@pytest.mark.slow
@pytest.mark.parametrize("schedule", DISCRETE, ids=repr)
def test_every_timestep_and_every_skip(schedule):
    for k in range(1, 1000):
        at_t = coefficients(schedule, k)
        for values, low, high in ((at_t.weight, 0.99, 1.99), (at_t.gain, 0.99 / 1.99, 1.0)):
            assert low - 1e-12 < values.min() <= values.max() < high + 1e-12, k


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("schedule", [*DISCRETE, *CONTINUOUS], ids=repr)
def test_every_time_in_every_form(schedule, estimator, normalize):
    t, skips = schedule.timesteps, (1, 99, 999, [1, 9, 999])
    if t is None:
        t, skips = torch.linspace(0, 1, 401), (1e-4, 0.1, 0.999, [0.01, 0.3])
    options = {"estimator": estimator, "normalize": normalize, "reduction": "none"}
    options["prediction_type"] = "epsilon"
    for skip in skips:
        check(SkipStepLoss(schedule, skip, **options), t)


def test_float64_tables_matter_at_small_skips():
    """A float32 ᾱ gives c a relative error of 1.7e-4 at k = 1; ours is at float32 rounding."""
    # With ε̂ = 1 and ε = 0 the loss is A: at τ = 0 it is c².
    criterion = SkipStepLoss(LINEAR, 1, tau=0.0, reduction="none")
    loss = criterion.from_output(torch.ones(999, 1), torch.zeros(999, 1), LINEAR.timesteps[1:])
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[1:]
    torch.testing.assert_close(loss.double(), beta / (1 - beta), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", [*DISCRETE[:4], *CONTINUOUS], ids=repr)
@pytest.mark.filterwarnings("ignore:weighting min_snr.*the last timestep:UserWarning")
def test_a_thousand_samples_under_autocast_stay_finite(schedule, kind, dtype):
    """With float16, which ends at 65504, at an eighth of torch's own initial loss scale."""
    torch.manual_seed(0)
    half = dtype == torch.float16
    skip = 0.01 if schedule.timesteps is None else 49 if schedule is LINEAR else 9
    weighting = None if half else "min_snr"
    criterion = SkipStepLoss(schedule, skip, prediction_type=kind, weighting=weighting)
    net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    scale = 2.0**13 if half else 1.0
    for _ in range(16):
        with torch.autocast("cpu", dtype):
            loss = criterion(lambda x_t, t: net(x_t), torch.randn(64, 8))
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(scale * loss, list(net.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 3 * 128 * 128, 50_001])
def test_autocast_casts_nothing_of_the_loss(size, dtype, estimator):
    eps_hat, noise, zeta = normals(3, 2, size, dtype=torch.float32)
    t = torch.tensor([500, 999])
    criterion = SkipStepLoss(LINEAR, 9, tau=0.5, estimator=estimator)
    given = drawn(estimator, zeta.double())
    exact = criterion.from_output(eps_hat.double(), noise.double(), t, **given)
    with torch.autocast("cpu", dtype):
        loss = criterion.from_output(eps_hat, noise, t, **drawn(estimator, zeta))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
