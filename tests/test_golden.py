"""The released loss's own values: inputs, loss and gradient, from the authors' code."""

import json
from pathlib import Path

import pytest
import torch

from s2dm_loss import NoiseSchedule, SkipStepLoss, skip_step_loss

CASES = json.loads((Path(__file__).parent / "data" / "released_loss.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"k{c['skip']}-{c['dtype']}")
@pytest.mark.parametrize("form", ["module", "function"])
def test_fresh_estimator_is_the_released_loss(case, form):
    dtype = getattr(torch, case["dtype"])

    def tensor(name):
        return torch.tensor(case[name], dtype=dtype).reshape(case["shape"])

    eps_hat, t = tensor("model_output").requires_grad_(), torch.tensor(case["timesteps"])
    options = {"skip_set": case["skip"], "tau": case["tau"], "estimator": "fresh"}
    schedule = NoiseSchedule.linear(1000)
    skip_noise = tensor("skip_noise")
    if form == "module":
        criterion = SkipStepLoss(schedule, **options)
        loss = criterion.from_prediction(eps_hat, tensor("noise"), t, skip_noise=skip_noise)
    else:
        loss = skip_step_loss(
            eps_hat, tensor("noise"), t, schedule=schedule, skip_noise=skip_noise, **options
        )
    (grad,) = torch.autograd.grad(loss, eps_hat)

    expected = tensor("grad_model_output")
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert (grad - expected).norm() <= tolerance * expected.norm()
    assert (grad - expected).abs().max() <= tolerance * expected.abs().max()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)


@pytest.mark.parametrize("case", CASES[:3], ids=lambda c: f"k{c['skip']}")
def test_forward_makes_the_released_x_t(case):
    def tensor(name):
        return torch.tensor(case[name], dtype=torch.float64).reshape(case["shape"])

    seen = {}

    def model(x_t, t):
        seen["x_t"], seen["t"] = x_t, t
        return tensor("model_output")

    criterion = SkipStepLoss(NoiseSchedule.linear(1000), case["skip"], estimator="fresh")
    loss = criterion(
        model,
        tensor("x0"),
        t=torch.tensor(case["timesteps"]),
        noise=tensor("noise"),
        skip_noise=tensor("skip_noise"),
    )
    # The released code computes its schedule in float32.
    torch.testing.assert_close(seen["x_t"], tensor("x_t"), rtol=1e-5, atol=1e-6)
    assert seen["t"].tolist() == case["timesteps"]
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
