"""torch.compile, torch.export and `python -O`."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from s2dm_loss import ContinuousSchedule, SkipSet, SkipStepLoss
from tests.strategies import FLOW, LINEAR, VP, drawn, loss_and_gradient, normals

T = torch.tensor([0, 98, 99, 999])
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="inductor needs one for C++"
)
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
    """For two shapes, with a gradient of the target in one of them."""
    criterion = SkipStepLoss(LINEAR, 99, estimator=estimator)

    def run(eps_hat, noise, xi):
        return criterion.from_output(eps_hat, noise, T, **drawn(estimator, xi))

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for shape in ((4, 3, 8, 8), (4, 4, 5)):
        eps_hat, noise, xi = normals(3, *shape, dtype=torch.float32)
        noise.requires_grad_(len(shape) == 3)
        results = []
        for function in (run, compiled):
            leaves = [eps_hat.clone().requires_grad_(), *([noise] if noise.requires_grad else [])]
            loss = function(leaves[0], noise, xi)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-9)


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
    "a function transform": lambda loss: torch.func.grad(loss),
    "a checkpoint": lambda loss: (
        lambda eps_hat: checkpoint(lambda x: loss(2 * x), eps_hat, use_reentrant=False)
    ),
    "its own backward": lambda loss: lambda x: torch.autograd.grad(loss(x), x)[0],
}


@pytest.mark.parametrize("around", AROUND_THE_LOSS)
def test_compiled_with_something_around_it(around):
    criterion = SkipStepLoss(LINEAR, 99)
    eps_hat, noise = normals(2, 4, 5, dtype=torch.float32)
    eps_hat.requires_grad_()
    run = AROUND_THE_LOSS[around](lambda x: criterion.from_output(x, noise, T))
    compiled = torch.compile(run, backend="aot_eager")
    if around == "a checkpoint":
        values = loss_and_gradient(compiled, eps_hat), loss_and_gradient(run, eps_hat)
    else:
        values = compiled(eps_hat), run(eps_hat)
    torch.testing.assert_close(*values)


ERRORS = """
import sys, torch
from s2dm_loss import NoiseSchedule, SkipStepLoss
criterion = SkipStepLoss(NoiseSchedule.linear(10), 2)
x = torch.zeros(2, 3)
for call in (
    lambda: SkipStepLoss(NoiseSchedule.linear(10), 10),
    lambda: SkipStepLoss(NoiseSchedule.linear(10), 2, tau=2.0),
    lambda: criterion.from_output(x, x, torch.tensor([0, 10])),
    lambda: criterion.from_output(x, x, torch.tensor([0.0, 1.0])),
    lambda: criterion.from_output(x[:, :2], x, torch.tensor([0, 1])),
    lambda: NoiseSchedule.from_betas([0.5, 1.5]),
):
    try:
        call()
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_errors_are_the_same_under_python_optimize(capsys):
    exec(ERRORS, {})  # noqa: S102
    here = capsys.readouterr().out
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-O", "-c", ERRORS], capture_output=True, text=True, check=True
    )
    assert done.stdout == here
    assert here.count("Error") == 6


@pytest.mark.parametrize(
    ("schedule", "skip", "estimator"),
    [
        (LINEAR, 9, "fresh"),
        pytest.param(VP, 0.01, "expected", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_compiled_step_that_draws_takes_a_shorter_last_batch(schedule, skip, estimator):
    """torch takes no symbolic size beside `generator=None`, so that word must not be said."""
    criterion = SkipStepLoss(schedule, skip, estimator=estimator).to("cpu")
    net = torch.nn.Linear(3, 3)
    step = torch.compile(lambda x: criterion(lambda x_t, t: net(x_t), x), backend="eager")
    losses = [step(torch.randn(count, 3)) for count in (64, 64, 40)]
    assert all(bool(loss.isfinite()) for loss in losses)


def test_a_fresh_loss_draws_under_a_dynamic_batch():
    criterion = SkipStepLoss(LINEAR, 9, estimator="fresh").to("cpu")
    call = torch.compile(criterion.from_output, backend="eager", dynamic=True)
    for count in (4, 7):
        t = torch.randint(1000, (count,))
        assert bool(call(torch.randn(count, 3), torch.randn(count, 3), t).isfinite())


def test_traced_times_outside_the_table_are_no_other_times():
    criterion = SkipStepLoss(LINEAR, 9, reduction="none")
    compiled = torch.compile(criterion.from_output, backend="aot_eager", fullgraph=True)
    loss = compiled(*normals(2, 4, 3), torch.tensor([-1, 0, 999, 1000]))
    assert loss.isnan().tolist() == [True, False, False, True]
