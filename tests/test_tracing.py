"""torch.compile, torch.export and `python -O`."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from tests.strategies import drawn, normal

LINEAR = NoiseSchedule.linear(1000)
T = torch.tensor([0, 98, 99, 999])
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)
ESTIMATORS = ["expected", "fresh", "shared"]


@needs_compiler
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_without_a_graph_break(estimator):
    """For two shapes, with a gradient of the target in one of them."""
    torch.compiler.reset()
    criterion = SkipStepLoss(LINEAR, 99, estimator=estimator)

    def run(eps_hat, noise, xi):
        return criterion.from_output(eps_hat, noise, T, **drawn(estimator, xi))

    compiled = torch.compile(run, fullgraph=True)
    for shape in ((4, 3, 8, 8), (4, 4, 5)):
        eps_hat, noise, xi = (normal(*shape, seed=seed).float() for seed in range(3))
        noise.requires_grad_(len(shape) == 3)
        results = []
        for function in (run, compiled):
            leaves = [eps_hat.clone().requires_grad_(), *([noise] if noise.requires_grad else [])]
            loss = function(leaves[0], noise, xi)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-9)


@needs_compiler
@pytest.mark.parametrize("schedule", [LINEAR, ContinuousSchedule.flow()], ids=repr)
def test_forward_compiles_with_its_model(schedule):
    torch.compiler.reset()
    skip = 99 if schedule is LINEAR else 0.1
    criterion = SkipStepLoss(schedule, skip)
    model = torch.nn.Linear(5, 5)
    x0, noise = normal(4, 5, seed=0).float(), normal(4, 5, seed=1).float()
    t = T if schedule is LINEAR else torch.tensor([0.0, 0.05, 0.5, 1.0])

    def step(x0, t, noise):
        return criterion(lambda x_t, t: model(x_t), x0, t=t, noise=noise)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x0, t, noise), step(x0, t, noise), rtol=1e-5, atol=0)


@needs_compiler
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow", "velocity"])
@pytest.mark.parametrize(
    "skip_set",
    [SkipSet(0.1), SkipSet.from_timesteps([0.0, 0.25, 0.75]), SkipSet.for_sampling_steps(20)],
    ids=repr,
)
def test_continuous_time_compiles_with_every_skip_set(skip_set, kind):
    torch.compiler.reset()
    schedule = ContinuousSchedule.flow() if kind == "flow" else ContinuousSchedule.vp()
    criterion = SkipStepLoss(schedule, skip_set, prediction_type=kind)
    output, target, x_t = (normal(4, 5, seed=seed).float() for seed in range(3))
    compiled = torch.compile(criterion.from_output, fullgraph=True, backend="aot_eager")
    arguments = output, target, torch.tensor([0.01, 0.3, 0.5, 0.9]), x_t
    torch.testing.assert_close(
        compiled(*arguments), criterion.from_output(*arguments), rtol=1e-5, atol=0
    )


def derivative(loss, eps_hat):
    return torch.autograd.grad(loss(eps_hat), eps_hat)[0]


# What a compiled function may do around the loss, which is itself made in two parts there.
AROUND_THE_LOSS = {
    "a function transform": lambda loss: torch.func.grad(loss),
    "a checkpoint": lambda loss: (
        lambda eps_hat: checkpoint(lambda x: loss(2 * x), eps_hat, use_reentrant=False)
    ),
    "its own backward": lambda loss: lambda eps_hat: derivative(loss, eps_hat),
}


@pytest.mark.parametrize("around", AROUND_THE_LOSS)
def test_compiled_with_something_around_it(around):
    torch.compiler.reset()
    criterion = SkipStepLoss(LINEAR, 99)
    eps_hat, noise = (normal(4, 5, seed=seed, dtype=torch.float32) for seed in (0, 1))
    eps_hat.requires_grad_()
    run = AROUND_THE_LOSS[around](lambda x: criterion.from_output(x, noise, T))
    compiled = torch.compile(run, backend="aot_eager")
    values = compiled(eps_hat), run(eps_hat)
    torch.testing.assert_close(*values)
    if around == "a checkpoint":
        torch.testing.assert_close(*(torch.autograd.grad(v, eps_hat)[0] for v in values))


def test_exports():
    class Loss(SkipStepLoss):
        def forward(self, eps_hat, noise, t):
            return self.from_output(eps_hat, noise, t)

    criterion = Loss(LINEAR, 99)
    arguments = normal(4, 5, seed=0).float(), normal(4, 5, seed=1).float(), T
    exported = torch.export.export(criterion, arguments, strict=True).module()
    torch.testing.assert_close(exported(*arguments), criterion(*arguments))


def test_errors_are_the_same_under_python_optimize():
    code = """
import torch
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
        print("no error")
    except (TypeError, ValueError) as error:
        print(type(error).__name__, error)
"""
    environment = {**os.environ, "PYTHONOPTIMIZE": ""}
    outputs = [
        subprocess.run(  # noqa: S603 - our own interpreter and code
            [sys.executable, *flags, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout
        for flags in ([], ["-O"])
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count("Error") == 6


@pytest.mark.parametrize("estimator", ["expected", "fresh"])
@pytest.mark.parametrize(
    ("schedule", "skip"), [(LINEAR, 9), (ContinuousSchedule.vp(), 0.01)], ids=str
)
def test_a_compiled_step_that_draws_takes_a_shorter_last_batch(schedule, skip, estimator):
    """torch takes no symbolic size beside `generator=None`, so that word must not be said."""
    torch.compiler.reset()
    criterion = SkipStepLoss(schedule, skip, estimator=estimator).to("cpu")
    net = torch.nn.Linear(3, 3)
    step = torch.compile(lambda x: criterion(lambda x_t, t: net(x_t), x), backend="eager")
    losses = [step(torch.randn(count, 3)) for count in (64, 64, 40)]
    assert all(bool(loss.isfinite()) for loss in losses)


def test_a_fresh_loss_draws_under_a_dynamic_batch():
    torch.compiler.reset()
    criterion = SkipStepLoss(LINEAR, 9, estimator="fresh").to("cpu")
    call = torch.compile(criterion.from_output, backend="eager", dynamic=True)
    for count in (4, 7):
        t = torch.randint(1000, (count,))
        assert bool(call(torch.randn(count, 3), torch.randn(count, 3), t).isfinite())
