"""The released loss's own values: inputs, loss and gradient, from the authors' code."""

import json
from pathlib import Path

import pytest
import torch

from s2dm_loss import NoiseSchedule, SkipStepLoss

CASES = json.loads((Path(__file__).parent / "data" / "released_loss.json").read_text())["cases"]


class Case:
    """One case's tensors, in its own type."""

    def __init__(self, case):
        self.case, self.dtype = case, getattr(torch, case["dtype"])
        self.t = torch.tensor(case["timesteps"])
        self.criterion = SkipStepLoss(
            NoiseSchedule.linear(1000), case["skip"], tau=case["tau"], estimator="fresh"
        )

    def __getitem__(self, name):
        return torch.tensor(self.case[name], dtype=self.dtype).reshape(self.case["shape"])

    def check_gradient(self, loss, leaf):
        (gradient,) = torch.autograd.grad(loss, leaf)
        expected = self["grad_model_output"]
        tolerance = 1e-12 if self.dtype == torch.float64 else 1e-6
        assert (gradient - expected).norm() <= tolerance * expected.norm()
        assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=CASES, ids=lambda case: f"k{case['skip']}-{case['dtype']}")
def released(request):
    return Case(request.param)


def test_the_loss_has_the_released_gradient(released):
    leaf = released["model_output"].requires_grad_()
    loss = released.criterion.from_output(
        leaf, released["noise"], released.t, skip_noise=released["skip_noise"]
    )
    released.check_gradient(loss, leaf)


def test_the_terms_have_the_released_value_and_gradient(released):
    leaf = released["model_output"].requires_grad_()
    total = released.criterion.terms(
        leaf, released["noise"], released.t, skip_noise=released["skip_noise"]
    ).total.mean()
    assert total.item() == pytest.approx(released.case["loss"], rel=1e-6)
    released.check_gradient(total, leaf)


def test_the_whole_step_makes_the_released_x_t_and_gradient(released):
    seen, leaf = {}, released["model_output"].requires_grad_()

    def model(x_t, t):
        seen["x_t"], seen["t"] = x_t, t
        return leaf

    data = {name: released[name] for name in ("noise", "skip_noise")}
    loss = released.criterion(model, released["x0"], t=released.t, **data)
    # The released code computes its schedule in float32.
    torch.testing.assert_close(seen["x_t"], released["x_t"], rtol=1e-5, atol=1e-6)
    assert torch.equal(seen["t"], released.t)
    released.check_gradient(loss, leaf)
