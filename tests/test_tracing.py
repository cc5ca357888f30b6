"""torch.compile and torch.export."""

import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from s2dm_loss import ContinuousSchedule, SkipSet, SkipStepLoss
from tests.strategies import FLOW, LINEAR, VP, drawn, loss_and_gradient, normals, same

T = torch.tensor([0, 98, 99, 999])
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs one for C++")
TURNED = ContinuousSchedule.vp(data_at=1)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("estimator", "backend"),
    [
        *(("expected", "aot_eager"), ("shared", "aot_eager")),
        pytest.param("fresh", "inductor", marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_compiles_without_a_graph_break(estimator, backend):
    criterion = SkipStepLoss(LINEAR, 99, estimator=estimator)

    def run(eps_hat, noise, xi):
        return criterion.from_output(eps_hat, noise, T, **drawn(estimator, xi))

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for shape in ((4, 3, 8, 8), (4, 4, 5)):
        eps_hat, noise, xi = normals(3, *shape, dtype=torch.float32)
        leaves = [eps_hat.requires_grad_(), *([noise.requires_grad_()] if len(shape) == 3 else [])]
        eager, fast = (function(eps_hat, noise, xi) for function in (run, compiled))
        torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-9)
        found, expected = (torch.autograd.grad(loss, leaves) for loss in (fast, eager))
        same(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "skip_set", "kind", "t"),
    [
        (LINEAR, 99, "epsilon", T),
        (FLOW, SkipSet(0.1), "flow", torch.tensor([0.0, 0.05, 0.5, 1.0])),
        *(
            pytest.param(*case, torch.tensor([0.01, 0.3, 0.5, 0.9]), marks=pytest.mark.slow)
            for case in [
                (TURNED, SkipSet.from_timesteps([0.0, 0.25, 0.75]), "velocity"),
                (VP, SkipSet.for_sampling_steps(20), "v_prediction"),
                (TURNED, SkipSet([0.02, 0.25]), "epsilon"),
            ]
        ),
    ],
    ids=str,
)
def test_forward_compiles_with_its_model(schedule, skip_set, kind, t):
    criterion, model = SkipStepLoss(schedule, skip_set, prediction_type=kind), torch.nn.Linear(5, 5)
    x0, noise = normals(2, 4, 5, dtype=torch.float32)

    def step(x0, t, noise):
        return criterion(lambda x_t, t: model(x_t), x0, t=t, noise=noise)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x0, t, noise), step(x0, t, noise), rtol=1e-5, atol=0)


# What a compiled function may do around the loss, which is itself made in two parts there.
AROUND_THE_LOSS = {
    "a function transform": lambda loss, x: torch.func.grad(loss)(x),
    "a checkpoint": lambda loss, x: checkpoint(lambda y: loss(2 * y), x, use_reentrant=False),
    "its own backward": lambda loss, x: torch.autograd.grad(loss(x), x)[0],
}


@pytest.mark.parametrize("around", AROUND_THE_LOSS)
def test_compiled_with_something_around_it(around):
    criterion, (eps_hat, noise) = SkipStepLoss(LINEAR, 99), normals(2, 4, 5, dtype=torch.float32)
    eps_hat.requires_grad_()

    def run(x):
        return AROUND_THE_LOSS[around](lambda x: criterion.from_output(x, noise, T), x)

    compiled = torch.compile(run, backend="aot_eager")
    if around == "a checkpoint":
        same(loss_and_gradient(compiled, eps_hat), loss_and_gradient(run, eps_hat))
    else:
        torch.testing.assert_close(compiled(eps_hat), run(eps_hat))


@pytest.mark.parametrize(
    ("schedule", "skip", "estimator"),
    [(LINEAR, 9, "fresh"), pytest.param(VP, 0.01, "expected", marks=pytest.mark.slow)],
    ids=str,
)
def test_a_compiled_step_that_draws_takes_a_shorter_last_batch(schedule, skip, estimator):
    """torch takes no symbolic size beside `generator=None`, so that word must not be said."""
    criterion = SkipStepLoss(schedule, skip, estimator=estimator).to("cpu")
    net = torch.nn.Linear(3, 3)
    step = torch.compile(lambda x: criterion(lambda x_t, t: net(x_t), x), backend="eager")
    losses = [step(torch.randn(count, 3)) for count in (64, 64, 40)]
    assert all(bool(loss.isfinite()) for loss in losses)


def test_traced_times_outside_the_table_are_no_other_times():
    criterion = SkipStepLoss(LINEAR, 9, reduction="none")
    compiled = torch.compile(criterion.from_output, backend="aot_eager", fullgraph=True)
    loss = compiled(*normals(2, 4, 3), torch.tensor([-1, 0, 999, 1000]))
    assert loss.isnan().tolist() == [True, False, False, True]
