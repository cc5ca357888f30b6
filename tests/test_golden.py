"""The released loss's own values: inputs, loss and gradient, from the authors' code."""

import pytest
import torch

from s2dm_loss import SkipStepLoss
from tests.helpers.released_loss import CASES, released_tensor
from tests.strategies import LINEAR, loss_and_gradient


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"k{case['skip']}-{case['dtype']}")
def test_loss_terms_and_the_whole_step_have_the_released_gradient(case):
    dtype, t, seen = getattr(torch, case["dtype"]), torch.tensor(case["timesteps"]), []
    names = ("model_output", "noise", "skip_noise", "x0", "x_t", "grad_model_output")
    output, noise, xi, x0, x_t, expected = (released_tensor(case, name, dtype) for name in names)
    criterion = SkipStepLoss(LINEAR, case["skip"], tau=case["tau"], estimator="fresh")
    total, gradient = loss_and_gradient(
        lambda x: criterion.terms(x, noise, t, skip_noise=xi).total.mean(), output
    )
    assert total.item() == pytest.approx(case["loss"], rel=1e-6)
    wide = criterion.terms(output, noise, t, skip_noise=xi.double())
    assert {part.dtype for part in wide} == {dtype}
    gradients = [gradient]
    for way in (
        lambda x: criterion.from_output(x, noise, t, skip_noise=xi),
        lambda x: criterion(
            lambda *inputs: seen.append(inputs) or x, x0, t, noise=noise, skip_noise=xi
        ),
    ):
        gradients.append(loss_and_gradient(way, output)[1])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for gradient in gradients:
        assert (gradient - expected).norm() <= tolerance * expected.norm()
        assert (gradient - expected).abs().max() <= tolerance * expected.abs().max()
    ((found_x_t, found_t),) = seen
    # The released code computes its schedule in float32.
    torch.testing.assert_close(found_x_t, x_t, rtol=1e-5, atol=1e-6)
    assert torch.equal(found_t, t)
