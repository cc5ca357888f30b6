"""Autocast and loss scaling: finite gradients over many random steps, on each schedule."""

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss

SCHEDULES = {
    "linear": (NoiseSchedule.linear(1000), 49),
    "scaled_linear": (NoiseSchedule.scaled_linear(1000), 9),
    "cosine": (NoiseSchedule.cosine(1000), 9),
    "zero terminal SNR": (NoiseSchedule.linear(1000).rescale_zero_terminal_snr(), 9),
    "vp": (ContinuousSchedule.vp(), 0.01),
    "sub_vp": (ContinuousSchedule.sub_vp(), 0.01),
    "cosine path": (ContinuousSchedule.cosine(), 0.01),
    "flow": (ContinuousSchedule.flow(), 0.01),
}
STEPS = 1000


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))

    def forward(self, x_t, t):
        return self.net(x_t)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:weighting min_snr.*the last timestep:UserWarning")
def test_bfloat16_autocast_stays_finite(name, kind):
    torch.manual_seed(0)
    schedule, skip = SCHEDULES[name]
    criterion = SkipStepLoss(schedule, skip, prediction_type=kind, weighting="min_snr")
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(STEPS // 10):  # ten samples a step
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model, torch.randn(10, 8))
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_float16_with_a_grad_scaler_stays_finite(name, kind):
    """From torch's own initial scale on; float16 ends at 65504."""
    torch.manual_seed(0)
    schedule, skip = SCHEDULES[name]
    criterion = SkipStepLoss(schedule, skip, prediction_type=kind)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    skipped = 0
    for _ in range(STEPS // 10):
        with torch.autocast("cpu", torch.float16):
            loss = criterion(model, torch.randn(10, 8))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert skipped <= 3  # and after that the scale has found its place


@pytest.mark.parametrize("estimator", ["expected", "fresh", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 3 * 128 * 128, 50_001])
def test_autocast_casts_nothing_of_the_loss(size, dtype, estimator):
    torch.manual_seed(0)
    eps_hat, noise, zeta = torch.randn(3, 2, size)
    t = torch.tensor([500, 999])
    options = {"skip_noise": zeta} if estimator == "fresh" else {}
    for tau in (1.0, 0.5):
        criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9, tau=tau, estimator=estimator)
        exact = criterion.from_output(
            eps_hat.double(), noise.double(), t, **{k: v.double() for k, v in options.items()}
        )
        if tau == 1:
            mse = (eps_hat.double() - noise.double()).square().mean()
            torch.testing.assert_close(exact, mse, rtol=1e-12, atol=0)
        with torch.autocast("cpu", dtype):
            loss = criterion.from_output(eps_hat, noise, t, **options)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
