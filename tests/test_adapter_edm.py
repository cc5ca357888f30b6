"""What the adapter for NVlabs/edm and edm2 alone has, on doubles and the trainers' own losses."""

import pytest
import torch

from s2dm_loss.adapters.edm import skip_step
from tests.doubles.edm_double import EDM2Loss, EDMLoss
from tests.helpers.small import refuses
from tests.helpers.trainers import EDM, as_net
from tests.strategies import pickled

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(5)) / 2


def test_the_log_variance_head_learns_from_the_changed_error():
    """Its minimum is at log u = log of the weighed error, as without the adapter."""
    log_u = torch.zeros(8, requires_grad=True)
    loss_fn = skip_step(EDM2Loss(), 1 / 17, tau=0.9)
    loss = loss_fn(as_net(lambda x_t, _: 0.5 * x_t, log_u), IMAGES).mean((1, 2, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), log_u)
    # d/dx (e exp(-x) + x) at x = 0 is 1 - e, and the loss there is e.
    torch.testing.assert_close(gradient, 1 - loss.detach())


@pytest.mark.parametrize("made", EDM.values(), ids=EDM)
def test_a_snapshot_holds_the_trainers_own_loss(made):
    with made() as kind:
        plain = kind()
        adapted = skip_step(plain, 1 / 17)
        loaded = pickled(adapted)
    assert type(loaded).__name__ == type(plain).__name__
    assert adapted.state_dict() == vars(plain)
    before = dict(vars(plain))
    adapted.load_state_dict({**vars(plain), "sigma_data": 0.7})
    assert adapted.sigma_data == 0.7
    assert vars(plain) == before


def test_refuses_what_it_cannot_serve():
    class Mean(EDMLoss):
        def __call__(self, net, images):
            return super().__call__(net, images).mean()

    class Twice(EDMLoss):
        def __call__(self, net, images):
            return super().__call__(lambda *given: net(net(*given), *given[1:]), images)

    plain, skip, mean = EDMLoss(), 1 / 17, skip_step(Mean(), 1 / 17, tau=1.0)
    text = repr(skip_step(plain, skip))
    assert text.startswith("SkipStepEDMLoss(SkipStepLoss(EDM(0.002, 80.0, rho=7.0)")
    said = r"an object with a __call__, .* EDMLoss\(\), got"
    refuses(TypeError, said, skip_step, lambda net, images: images, skip)
    refuses(ValueError, r"tau must be above 0 .* got 0", skip_step, plain, skip, tau=0.0)
    said = r"0 < sigma_min < sigma_max .* got 3, 2 and 7\.0"
    refuses(ValueError, said, skip_step, plain, skip, sigma_min=3, sigma_max=2)
    said = r"squared error of each sample, of shape \[8, ...\]"
    refuses(ValueError, said, mean, as_net(lambda x_t, _: x_t), IMAGES)
    said = r"must call net once, for D or \(D, log σ²\), got "
    twice = skip_step(Twice(), skip)
    refuses(ValueError, said + "a second call", twice, as_net(lambda x_t, _: x_t), IMAGES)
    three, net = skip_step(plain, skip), as_net(lambda x_t, _: x_t)
    refuses(ValueError, said + "3 outputs", three, lambda *given: 3 * (net(*given),), IMAGES)
