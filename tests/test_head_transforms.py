"""The head under compiled autograd, linearize, vmap and checkpoints, and of unusual tensors."""

import functools
import importlib
import itertools
import subprocess
import sys

import pytest
import torch
import torch._dynamo.compiled_autograd
from s2dm_loss._head import completed_square, mean_square, placed_like, whole
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import checkpoint as checkpoints

import s2dm_loss
from s2dm_loss import NoiseSchedule, SkipStepLoss, _head
from tests.strategies import normal

LINEAR = NoiseSchedule.linear(1000)
EARLY_AND_LATE = torch.tensor([3, 500, 999])


def arguments(*shape, dtype=torch.float64):
    """Return ε̂, which requires a gradient, weight, two constants, gain and noise."""
    eps_hat, noise = (normal(*shape, seed=seed).to(dtype) for seed in (0, 1))
    lifted = torch.promote_types(dtype, torch.float32)
    constants = [normal(shape[0], seed=seed).to(lifted) for seed in range(2, 6)]
    return eps_hat.requires_grad_(), *constants, noise


def gradient_by_hand(eps_hat, weight, _constant, _noise_constant, gain, noise, upstream=1.0):
    """Return the gradient of the sum over the batch."""
    weight, gain = (x.reshape(-1, *[1] * (noise.ndim - 1)) for x in (weight, gain))
    count = noise[0].numel()
    return (2 / count * upstream * weight * (eps_hat - gain * noise)).detach()


def compiled_autograd(backend):
    module = torch._dynamo.compiled_autograd
    enable = getattr(module, "_enable", None) or module.enable  # its name before torch 2.6
    return enable(torch.compile(backend=backend))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_autograd_and_a_retained_graph(backend):
    """The compiled graph is one for every call, and must not read what an earlier one used up."""
    torch.compiler.reset()
    for shape in [(4, 3, 5), (4, 3, 5), (4, 7), (2, 9)]:
        eps_hat, *constants = arguments(*shape)
        loss = completed_square(eps_hat, *constants, reduction="sum")
        expected = gradient_by_hand(eps_hat, *constants)
        gradients = []
        for compiled in (True, True, False, True, False):
            eps_hat.grad = None
            if compiled:
                with compiled_autograd(backend):
                    loss.backward(retain_graph=True)
            else:
                loss.backward(retain_graph=True)
            gradients.append(eps_hat.grad)
        for gradient in gradients:
            torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-15)


def test_a_graph_that_is_not_retained_is_used_once():
    eps_hat, *constants = arguments(3, 4)
    loss = completed_square(eps_hat, *constants).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_linearize():
    """In a process of its own: an operator that it cannot take ends the process, not the test."""
    code = """
import torch
from s2dm_loss import NoiseSchedule, SkipStepLoss
eps_hat, noise, tangent = torch.randn(3, 3, 4, 5, dtype=torch.float64).unbind()
t = torch.tensor([3, 500, 999])
for estimator in ("expected", "shared"):
    criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9, estimator=estimator)
    loss = lambda x: criterion.from_prediction(x, noise, t)
    value, jvp = torch.func.linearize(loss, eps_hat)
    leaf = eps_hat.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(value, loss(eps_hat))
    torch.testing.assert_close(jvp(tangent), (leaf.grad * tangent).sum())
"""
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not hasattr(checkpoints, "create_selective_checkpoint_contexts"), reason="needs torch 2.5"
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 2**13)])
@pytest.mark.parametrize("policy", ["MUST_SAVE", "MUST_RECOMPUTE"])
def test_selective_checkpointing(policy, shape, dtype):
    eps_hat, *constants = arguments(*shape, dtype=dtype)
    chosen = getattr(checkpoints.CheckpointPolicy, policy)
    contexts = functools.partial(
        checkpoints.create_selective_checkpoint_contexts, lambda *_, **__: chosen
    )

    def loss(x):
        return completed_square(2 * x, *constants, reduction="mean")

    kept = checkpoints.checkpoint(loss, eps_hat, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(
        torch.autograd.grad(kept, eps_hat), torch.autograd.grad(loss(eps_hat), eps_hat)
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 32, 32), (3, 2**15 + 1)])
@pytest.mark.parametrize("estimator", ["expected", "fresh", "shared"])
def test_an_infinite_loss_is_not_nan(estimator, shape, compiled):
    """Of data so large that `F.mse_loss` is infinite, at timesteps with and without a skip."""
    torch.compiler.reset()
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, reduction="none")
    eps_hat, noise, zeta = (
        (1e21 * normal(*shape, seed=seed).clamp(-2, 2)).float() for seed in range(3)
    )
    assert F.mse_loss(eps_hat, noise).isinf()
    # The term that draws ζ has mean(ε ζ) beside the head, for which this is too large.
    zeta = zeta / 1e21 if estimator == "fresh" else None
    run = criterion.from_prediction
    if compiled:
        run = torch.compile(run, backend="aot_eager")
    loss = run(eps_hat.requires_grad_(), noise, EARLY_AND_LATE, skip_noise=zeta)
    assert loss.isposinf().all()
    loss.sum().backward()
    assert not eps_hat.grad.isnan().any()


def test_what_is_not_finite_in_the_data_is_not_hidden():
    eps_hat, noise = torch.zeros(3, 4), torch.zeros(3, 4)
    noise[0, 1], noise[1, 2] = torch.inf, torch.nan
    criterion = SkipStepLoss(LINEAR, 9, reduction="none")
    loss = criterion.from_prediction(eps_hat, noise, EARLY_AND_LATE)
    assert loss[0].isposinf()
    assert loss[1].isnan()
    assert loss[2].isfinite()


def test_mean_square_times_zero_is_zero():
    huge = torch.full((2, 8), 3e38)
    assert torch.equal(0 * mean_square(huge, torch.float32), torch.zeros(2))
    assert (mean_square(huge, torch.float32) > 1e37).all()


def test_a_tensor_made_of_tensors():
    """Such as DTensor and quantised ones: whatever is asked of it, plain operators answer."""
    eps_hat, *constants, noise = (x.detach() for x in arguments(3, 4, 5))
    other, *_, other_noise = (2 * x for x in (eps_hat, noise))
    two = TwoTensor(eps_hat, other).requires_grad_()
    loss = completed_square(two, *constants, TwoTensor(noise, other_noise), reduction="sum")
    loss.backward()
    assert isinstance(two.grad, TwoTensor)
    for part, e, n in ((two.grad.a, eps_hat, noise), (two.grad.b, other, other_noise)):
        torch.testing.assert_close(part, gradient_by_hand(e, *constants, n))
    assert "CompletedSquare" not in loss.grad_fn.name()
    named = torch.nn.Parameter(eps_hat)  # is a tensor like any other
    assert "CompletedSquare" in completed_square(named, *constants, noise).grad_fn.name()


class Placed:
    """As much of a DTensor as the head knows it by."""

    device_mesh = "a mesh"

    def __init__(self, local):
        self.local, self.ndim = local, local.ndim

    @classmethod
    def from_local(cls, local, mesh, *, run_check):
        assert mesh == cls.device_mesh
        assert not run_check  # for which every device would wait for the others
        return cls(local)

    def full_tensor(self):
        return self.local


def test_what_has_one_value_a_sample_is_placed_like_the_data():
    per_sample, data = torch.ones(3), torch.ones(3, 4)
    there = Placed(per_sample)
    placed = placed_like(Placed(data), None, per_sample, there, data, data[0, 0])
    assert placed[0] is None
    assert isinstance(placed[1], Placed)
    assert placed[1].local is per_sample
    assert placed[2] is there
    assert placed[3] is data
    assert placed[4].ndim == 0
    assert placed_like(data, None, per_sample, there) == (None, per_sample, there)


def test_times_that_are_no_dtensor_are_whole():
    t = torch.ones(3)
    assert whole(t) is t
    assert whole(Placed(t)) is t
    named = torch.nn.Parameter(t)
    assert whole(named) is named


def test_a_gain_has_its_noise():
    eps_hat, *constants, noise = arguments(3, 4)
    with pytest.raises(ValueError, match="shorter"):
        completed_square(eps_hat, *constants, noise, constants[-1])


# Of what only the compiler runs, as far as it can be told without one.


@pytest.mark.parametrize(
    ("takes_checkpoints", "version"), [(False, "2.12.1"), (True, "2.13.0"), (True, "2.14.0+cu130")]
)
def test_which_torch_takes_a_checkpoint(takes_checkpoints, version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(s2dm_loss, "_head", _head)  # which an import replaces
    monkeypatch.delitem(sys.modules, "s2dm_loss._head")
    again = importlib.import_module("s2dm_loss._head")
    assert again is not _head
    assert takes_checkpoints == again._CHECKPOINTS_COMPILE == hasattr(again, "checkpoint")


def test_when_it_is_made_twice(monkeypatch):
    """The exporter and function transforms refuse a checkpoint."""
    asked = [
        (_head, "_CHECKPOINTS_COMPILE", True),
        (torch.compiler, "is_compiling", True),
        (torch.compiler, "is_exporting", False),
        (torch._C, "_are_functorch_transforms_active", False),
    ]
    for answers in itertools.product([False, True], repeat=len(asked)):
        with monkeypatch.context() as patch:
            for (place, name, _), answer in zip(asked, answers, strict=True):
                patch.setattr(place, name, answer if place is _head else lambda a=answer: a)
            twice = _head._is_better_made_twice()
        assert twice == (list(answers) == [wanted for *_, wanted in asked])


def test_made_twice_it_is_the_same(monkeypatch):
    eps_hat, *constants = arguments(3, 4)
    monkeypatch.setattr(_head, "checkpoint", checkpoints.checkpoint, raising=False)
    monkeypatch.setattr(_head, "_needs_plain_operators", lambda *_: True)
    monkeypatch.setattr(_head, "_is_better_made_twice", lambda: True)
    # It draws nothing, for which to keep the generators' state.
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("kept for nothing"))
    loss = completed_square(eps_hat, *constants, reduction="sum")
    monkeypatch.undo()
    (gradient,) = torch.autograd.grad(loss, eps_hat)
    torch.testing.assert_close(gradient, gradient_by_hand(eps_hat, *constants))


def test_vmap_over_every_argument():
    eps_hat, *constants = (x.detach() for x in arguments(3, 4))
    batches = [torch.stack([x, 2 * x, x - 1]) for x in (eps_hat, *constants)]
    mapped = torch.vmap(lambda *x: completed_square(*x))(*batches)
    one_by_one = torch.stack([completed_square(*(b[i] for b in batches)) for i in range(3)])
    torch.testing.assert_close(mapped, one_by_one)
    per_sample = torch.vmap(torch.func.grad(lambda *x: completed_square(*x).sum()))(*batches)
    for i in range(3):
        arguments_here = [b[i] for b in batches]
        torch.testing.assert_close(per_sample[i], gradient_by_hand(*arguments_here))


def test_data_changed_between_the_passes_changes_no_gradient():
    eps_hat, *constants = arguments(3, 4)
    expected = gradient_by_hand(eps_hat, *constants)
    output = 1 * eps_hat
    loss = completed_square(output, *constants, reduction="sum")
    output.detach().zero_()
    loss.backward()
    torch.testing.assert_close(eps_hat.grad, expected)
