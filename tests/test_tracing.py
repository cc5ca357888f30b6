"""Autograd to second order, torch.compile, torch.func, FakeTensorMode, `python -O`."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from tests.strategies import normal

LINEAR = NoiseSchedule.linear(1000)
T = torch.tensor([0, 98, 99, 999])
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)
ESTIMATORS = ["expected", "fresh", "shared"]


def skip_noise_for(estimator, like):
    return normal(*like.shape, seed=9).to(like) if estimator == "fresh" else None


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck_to_second_order(estimator, reduction):
    eps_hat, noise = normal(4, 2, 3, seed=0).requires_grad_(), normal(4, 2, 3, seed=1)
    noise.requires_grad_()
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0], dtype=torch.float64)
    criterion = SkipStepLoss(LINEAR, 99, estimator=estimator, reduction=reduction)
    zeta = skip_noise_for(estimator, noise)

    def loss(eps_hat, noise):
        return criterion.from_output(eps_hat, noise, T, skip_noise=zeta, weights=weights)

    assert torch.autograd.gradcheck(loss, (eps_hat, noise))
    assert torch.autograd.gradgradcheck(loss, (eps_hat, noise))


def test_a_retained_graph_gives_the_same_gradient_twice():
    eps_hat, noise = normal(4, 5, seed=0).requires_grad_(), normal(4, 5, seed=1)
    loss = SkipStepLoss(LINEAR, 99).from_output(eps_hat, noise, T)
    first, second = (
        torch.autograd.grad(loss, eps_hat, retain_graph=retain)[0] for retain in (True, False)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_torch_func(estimator):
    """Per-sample gradients by vmap(grad) are those of one sample at a time."""
    eps_hat, noise = normal(4, 5, seed=0), normal(4, 5, seed=1)
    criterion = SkipStepLoss(LINEAR, 99, estimator=estimator, reduction="sum")
    zeta = skip_noise_for(estimator, noise)

    def one(eps_hat, noise, t, zeta):
        zeta = None if estimator != "fresh" else zeta[None]
        return criterion.from_output(eps_hat[None], noise[None], t[None], skip_noise=zeta)

    zetas = noise if zeta is None else zeta
    per_sample = torch.func.vmap(torch.func.grad(one))(eps_hat, noise, T, zetas)
    leaf = eps_hat.clone().requires_grad_()
    criterion.from_output(leaf, noise, T, skip_noise=zeta).backward()
    torch.testing.assert_close(per_sample, leaf.grad, rtol=1e-12, atol=1e-14)
    hessian = torch.func.hessian(lambda x: one(x, noise[3], T[3], zetas[3]))(eps_hat[3])
    bar = LINEAR.alphas_cumprod
    a = 0.99 + 0.01 * float(bar[900] / bar[999] - 1)
    torch.testing.assert_close(hessian, torch.eye(5).double() * 2 * a / 5)


@needs_compiler
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_without_a_graph_break(estimator):
    torch.compiler.reset()
    criterion = SkipStepLoss(LINEAR, 99, estimator=estimator)

    def run(eps_hat, noise, t, zeta):
        return criterion.from_output(eps_hat, noise, t, skip_noise=zeta)

    compiled = torch.compile(run, fullgraph=True)
    for shape in ((4, 3, 8, 8), (4, 4, 5)):
        eps_hat, noise = normal(*shape, seed=0).float(), normal(*shape, seed=1).float()
        zeta = skip_noise_for(estimator, noise)
        grads, losses = [], []
        for function in (run, compiled):
            leaf = eps_hat.clone().requires_grad_()
            loss = function(leaf, noise, T, zeta)
            loss.backward()
            losses.append(loss.detach())
            grads.append(leaf.grad)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-9)


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_depends_on_data(estimator):
    """Fake tensors have no values: whatever would need one, such as a host sync, raises."""
    criterion = SkipStepLoss(LINEAR, 99, estimator=estimator)
    continuous = SkipStepLoss(ContinuousSchedule.flow(), 0.1, estimator=estimator)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x0 = torch.randn(4, 3, 8, 8)
        for loss_of in (criterion, continuous):
            eps_hat = torch.randn(4, 3, 8, 8, requires_grad=True)
            weights = torch.rand(4)
            loss = loss_of(lambda x_t, t, out=eps_hat: out, x0, weights=weights)
            loss.backward()
            assert loss.shape == ()
            assert eps_hat.grad.shape == x0.shape
    # and no fake tensor is left behind in the tables
    assert all(type(buffer) is torch.Tensor for buffer in criterion.buffers())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_host_sync_on_a_gpu(estimator):
    criterion = SkipStepLoss(LINEAR, 99, estimator=estimator).cuda()
    x0 = torch.randn(4, 3, 8, 8, device="cuda")
    model = torch.nn.Conv2d(3, 3, 1).cuda()
    model(x0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it does not see all that waits
            torch.cuda.set_sync_debug_mode("error")
        criterion(lambda x_t, t: model(x_t), x0).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
