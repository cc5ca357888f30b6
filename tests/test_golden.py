"""The released loss's own values: inputs, loss and gradient, from the authors' code."""

import pytest
import torch

from s2dm_loss import SkipStepLoss
from tests.helpers.released_loss import CASES, released_tensor
from tests.strategies import LINEAR


class Released:
    """One case's tensors, in its own type, and the loss that it is of."""

    def __init__(self, case):
        self.case, self.dtype = case, getattr(torch, case["dtype"])
        self.t = torch.tensor(case["timesteps"])
        self.criterion = SkipStepLoss(LINEAR, case["skip"], tau=case["tau"], estimator="fresh")
        self.leaf = self["model_output"].requires_grad_()

    def __getitem__(self, name):
        return released_tensor(self.case, name, self.dtype)

    def check_gradient(self, loss):
        (gradient,) = torch.autograd.grad(loss, self.leaf)
        expected = self["grad_model_output"]
        tolerance = 1e-12 if self.dtype == torch.float64 else 1e-6
        assert (gradient - expected).norm() <= tolerance * expected.norm()
        assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.fixture(params=CASES, ids=lambda case: f"k{case['skip']}-{case['dtype']}")
def released(request):
    return Released(request.param)


def test_loss_and_terms_have_the_released_gradient_and_value(released):
    data = released.leaf, released["noise"], released.t
    xi = {"skip_noise": released["skip_noise"]}
    released.check_gradient(released.criterion.from_output(*data, **xi))
    total = released.criterion.terms(*data, **xi).total.mean()
    assert total.item() == pytest.approx(released.case["loss"], rel=1e-6)
    released.check_gradient(total)


def test_the_whole_step_makes_the_released_x_t_and_gradient(released):
    seen = []
    data = {name: released[name] for name in ("noise", "skip_noise")}
    loss = released.criterion(
        lambda x_t, t: seen.append((x_t, t)) or released.leaf, released["x0"], released.t, **data
    )
    # The released code computes its schedule in float32.
    torch.testing.assert_close(seen[0][0], released["x_t"], rtol=1e-5, atol=1e-6)
    assert torch.equal(seen[0][1], released.t)
    released.check_gradient(loss)
