"""The head: its sums at any size, and every kind of derivative, against the plain formula.

And PyTorch's private names: in one file, and the loss is right without any of them.
"""

import functools
import importlib
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import checkpoint as checkpoints

import s2dm_loss
from s2dm_loss import NoiseSchedule, SkipStepLoss
from tests.helpers.commands import run
from tests.strategies import (
    ESTIMATORS,
    FLOW,
    LINEAR,
    beside,
    drawn,
    loss_and_gradient,
    mean_of_squares,
    normal,
    normals,
    same,
)

T = torch.tensor([500, 3, 999, 40])
REDUCE = {"none": lambda loss: loss, "mean": torch.mean, "sum": torch.sum}
# torch's own forward mode scripts its decompositions when first used.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


class Head:
    """A loss of an output at fixed data, and the same by plain operators on float64 tables."""

    def __init__(
        self, *shape, dtype=torch.float64, reduction="none", estimator="fresh", made=SkipStepLoss
    ):
        self.output, self.target, self.x_t, self.xi = normals(4, *shape, dtype=dtype)
        self.t, self.reduction, self.estimator = T[: shape[0]], reduction, estimator
        options = {"reduction": reduction, "estimator": estimator, "prediction_type": "flow"}
        self.criterion = made(LINEAR, 99, **options)
        at_t = self.criterion.coefficients_at(self.t)
        a, b = LINEAR.alpha_sigma(self.t)
        self.weight = at_t.weight
        # ε̂ = (a output + x_t) / (a + b)
        self.scales = at_t.gain, (at_t.gain - 1) / a, at_t.skip_gain * (a + b) / a

    def __call__(self, output):
        given = drawn(self.estimator, self.xi)
        return self.criterion.from_output(output, self.target, self.t, self.x_t, **given)

    def plain(self, output):
        residual = output
        for scale, part in zip(self.scales, (self.target, self.x_t, self.xi), strict=True):
            residual = residual - beside(scale.to(output), part) * part
        return REDUCE[self.reduction](self.weight.to(output) * mean_of_squares(residual))

    def leaf(self):
        return self.output.clone().requires_grad_()


def both(head, function):
    """What a function makes of the loss, and of the plain formula."""
    torch.testing.assert_close(function(head), function(head.plain))


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 2, 3), (2, 3, 1, 2), (2, 1, 2, 1, 3)])
@forward_mode
def test_every_kind_of_derivative(shape, reduction):
    """Of value and gradient to second order, forward over backward, and in batches."""
    head = Head(*shape, reduction=reduction)
    both(head, lambda f: loss_and_gradient(lambda x: normal(shape[0], seed=9) * f(x), head.output))
    options = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(head, head.leaf(), **options)
    assert torch.autograd.gradgradcheck(head, head.leaf())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_of_the_target_as_well(estimator):
    """And of a weight: what is not the output takes plain operators."""
    criterion, (*data, xi) = SkipStepLoss(LINEAR, 99, estimator=estimator), normals(3, 4, 2, 3)
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0], dtype=torch.float64)

    def loss(eps_hat, noise, weights):
        return criterion.from_output(eps_hat, noise, T, weights=weights, **drawn(estimator, xi))

    eps_hat, noise, weights = leaves = [x.requires_grad_() for x in (*data, weights)]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    assert torch.autograd.gradcheck(lambda noise: loss(eps_hat, noise, weights.detach()), noise)
    assert torch.autograd.gradcheck(lambda w: loss(eps_hat.detach(), noise.detach(), w), weights)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x).sum()))(x[None]),
    "grad of vmap": lambda f, x: torch.func.grad(lambda xs: torch.vmap(f)(xs).sum())(x[None]),
    # Several gradients at once.
    "vectorised": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "autograd through vmap": lambda f, x: torch.autograd.grad(
        torch.vmap(f)(leaf := x[None].clone().requires_grad_()).sum(), leaf
    ),
    # The Hessian by autograd alone.
    "backward twice": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x),
    "forward mode": lambda f, x: tangent(f, x),
    "checkpoint": lambda f, x: checkpointed(f, x, "MUST_SAVE"),
}


def tangent(f, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        return forward_ad.unpack_dual(f(dual)).tangent


@pytest.mark.parametrize("name", TRANSFORMS)
@forward_mode
def test_transforms(name):
    """Also where a residual is zero: a norm has no derivative there, and its square has."""
    head = Head(2, 3, 4)
    head.output[1] = head.target[1]  # at t < k
    assert head(head.output)[1] == 0
    both(head, lambda f: TRANSFORMS[name](f, head.output))


def test_vmap_over_every_argument():
    """Per-sample gradients are those of one sample at a time."""
    head = Head(3, 4, 5, reduction="sum")

    def one(output, target, t, x_t, xi):
        arguments = (x[None] for x in (output, target, t, x_t))
        return head.criterion.from_output(*arguments, skip_noise=xi[None])

    batches = head.output, head.target, head.t, head.x_t, head.xi
    _, gradient = loss_and_gradient(head.plain, head.output)
    torch.testing.assert_close(torch.vmap(torch.func.grad(one))(*batches), gradient)


@pytest.mark.slow
def test_linearize():
    """In a process of its own: an operator that it cannot take ends the process, not the test."""
    code = """
import torch
from tests.test_head import Head
for estimator in ("expected", "shared", "fresh"):
    head = Head(3, 4, 5, reduction="mean", estimator=estimator)
    value, jvp = torch.func.linearize(head, head.output)
    torch.testing.assert_close(value, head.plain(head.output))
    (gradient,) = torch.autograd.grad(head(leaf := head.leaf()), leaf)
    torch.testing.assert_close(jvp(head.x_t), (gradient * head.x_t).sum())
"""
    run(sys.executable, "-c", code)


def test_several_backwards_through_one_graph():
    """The first consumes the residual, the others make it again; no gradient changes another."""
    head = Head(2, 3, 4, reduction="sum")
    data = leaf, *_ = head.leaf(), head.target, head.x_t, head.xi
    before = [x.clone() for x in data]
    _, expected = loss_and_gradient(head.plain, head.output)
    loss = head(leaf)
    gradients = [
        torch.autograd.grad(value, leaf, retain_graph=True, create_graph=create)[0]
        for value, create in ((loss, False), (loss, False), (loss, True), (3 * loss, False))
    ]
    same(gradients, [expected, expected, expected, 3 * expected], rtol=1e-13, atol=1e-16)
    same(data, before, rtol=0, atol=0)
    once = head(leaf)
    once.backward()
    with pytest.raises(RuntimeError, match="second time"):
        once.backward()


def test_two_threads_back_through_one_graph(monkeypatch):
    """The second comes while the first is about to take the residual."""
    head = Head(2, 3, 4, reduction="sum")
    loss, seen = head(leaf := head.leaf()), []

    def ask():
        if not seen:
            seen.append(None)
            seen.extend(torch.autograd.grad(loss, leaf, retain_graph=True))
        return False

    monkeypatch.setattr(torch.compiler, "is_compiling", ask)
    seen += torch.autograd.grad(loss, leaf, retain_graph=True)
    _, expected = loss_and_gradient(head.plain, head.output)
    same(seen[1:], [expected, expected], rtol=1e-13, atol=1e-16)


def test_data_changed_between_the_passes_changes_no_gradient():
    head = Head(3, 4, reduction="sum")
    leaf = head.leaf()
    output = 1 * leaf
    loss = head(output)
    output.detach().zero_()
    loss.backward()
    torch.testing.assert_close(leaf.grad, loss_and_gradient(head.plain, head.output)[1])


@pytest.mark.slow
def test_compiled_autograd_and_a_retained_graph():
    """The compiled graph is one for every call, and must not read what an earlier one used up."""
    torch.compiler.reset()
    module = torch._dynamo.compiled_autograd
    enable = getattr(module, "_enable", None) or module.enable  # its name before torch 2.6
    for shape in [(4, 3, 5), (4, 3, 5), (2, 9)]:
        head = Head(*shape, reduction="sum")
        leaf = head.leaf()
        loss = head(leaf)
        _, expected = loss_and_gradient(head.plain, head.output)
        gradients = []
        for compiled in (True, True, False, True, False):
            leaf.grad = None
            with enable(torch.compile(backend="aot_eager")) if compiled else nullcontext():
                loss.backward(retain_graph=True)
            gradients.append(leaf.grad)
        same(gradients, [expected] * 5, rtol=1e-13, atol=1e-15)


def checkpointed(f, x, how):
    """Not by `autograd.grad`, which a reentrant checkpoint refuses."""
    options = {"use_reentrant": how == "reentrant"}
    if how.startswith("MUST"):
        if not hasattr(checkpoints, "CheckpointPolicy"):
            pytest.skip("torch 2.5 was the first with selective checkpointing")
        make = checkpoints.create_selective_checkpoint_contexts
        policy = checkpoints.CheckpointPolicy[how]
        options["context_fn"] = functools.partial(make, lambda *_, **__: policy)
    leaf = x.clone().requires_grad_()
    # What comes before the loss saves a tensor, or nothing would be made again.
    checkpoints.checkpoint(lambda x: f(x * x).sum(), leaf, **options).backward()
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "MUST_SAVE", "MUST_RECOMPUTE"])
def test_checkpoints(how, dtype):
    head = Head(3, 4, 5, dtype=dtype, reduction="mean")
    _, expected = loss_and_gradient(lambda x: head(x * x), head.output)
    torch.testing.assert_close(checkpointed(head, head.output, how), expected)
    with torch.autograd.graph.save_on_cpu():
        _, offloaded = loss_and_gradient(lambda x: head(x * x), head.output)
    assert torch.equal(expected, offloaded)


def test_a_tensor_made_of_tensors():
    """Such as DTensor and quantised ones: whatever is asked of it, plain operators answer."""
    *heads, two = (Head(3, 4, 5, reduction="sum") for _ in range(3))
    for name in ("output", "target", "x_t", "xi"):
        setattr(heads[1], name, 2 * getattr(heads[1], name))
        setattr(two, name, TwoTensor(*(getattr(head, name) for head in heads)))
    leaf = two.output.requires_grad_()
    two(leaf).backward()
    assert isinstance(leaf.grad, TwoTensor)
    gradients = (loss_and_gradient(head.plain, head.output)[1] for head in heads)
    same((leaf.grad.a, leaf.grad.b), gradients)
    parameter = torch.nn.Parameter(heads[0].output.detach().clone())  # is a tensor like any other
    heads[0](parameter).backward()
    torch.testing.assert_close(parameter.grad, leaf.grad.a)


def test_a_target_that_trains_where_no_gradient_is_recorded():
    """As in an evaluation, and in the first pass of a reentrant checkpoint."""
    criterion, (x, noise) = SkipStepLoss(LINEAR, 99), normals(2, 4, 3)
    x, noise = x.requires_grad_(), noise.requires_grad_()

    def loss(x):
        return criterion.from_output(2 * x, noise, T)

    with torch.no_grad():
        value = loss(x)
    again = checkpoints.checkpoint(loss, x, use_reentrant=True)
    again.backward()
    torch.testing.assert_close((value, again.detach()), (loss(x).detach(),) * 2)
    same((x.grad, noise.grad), torch.autograd.grad(loss(x), (x, noise)))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:, :1].expand_as(x),
    "one sample for all": lambda x: x[:1].expand_as(x),
    "every second": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "cropped": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "samples apart": lambda x: torch.stack([x, x], dim=1)[:, 0],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts_and_half_types(layout, dtype):
    """The value to 1e-6 of float64's; the gradient of half types is rounded once."""
    head = Head(2, 3, 2, 263, dtype=dtype)  # pieces with a rest
    output = LAYOUTS[layout](head.output)
    head.x_t = LAYOUTS[layout](head.x_t)
    loss, gradient = loss_and_gradient(head, output)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    exact, exact_gradient = loss_and_gradient(head.plain, output.double())
    rtol = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(loss.double(), exact, rtol=rtol, atol=0)
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, rtol)
    # Half of a unit in the last place, and of the smallest number that float16 has.
    smallest = 2**-25 if dtype == torch.float16 else 1e-6 * float(exact_gradient.abs().max())
    tolerance = {"rtol": 1.01 * unit, "atol": 1.01 * smallest}
    torch.testing.assert_close(gradient.double(), exact_gradient, **tolerance)


@pytest.mark.parametrize("residual", ["normal", 0.1, 0.7, 0.9999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        *((64, 3, 64, 64), (2, 784), (2, 1009), (4, 3, 300, 301), (500, 500)),
        *(pytest.param((1, count), marks=pytest.mark.slow) for count in (1048583, 2**26)),
    ],
    ids=str,
)
def test_the_value_is_right_at_every_size(shape, dtype, residual):
    """Where all residuals have one magnitude, each addition is rounded the same way.

    A norm of each sample is off by 1e-5 then, and a dot product by 3.5e-4 at 2^28.
    """
    noise, t = torch.zeros((), dtype=dtype).expand(shape), torch.full(shape[:1], 3)
    output = torch.randn(shape) if residual == "normal" else torch.full(shape, residual)
    output = output.to(dtype)
    exact = output.double().square().flatten(1).mean(1)  # as before the skip
    criterion = SkipStepLoss(LINEAR, 9, reduction="none")
    for each in (output, output.mT.contiguous().mT):
        loss = criterion.from_output(each, noise, t)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 32, 32), (3, 2**15 + 1)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_infinite_loss_is_not_nan(estimator, shape, compiled):
    """Of data so large that `F.mse_loss` is infinite, at timesteps with and without a skip."""
    torch.compiler.reset()
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, reduction="none")
    eps_hat, noise, zeta = ((1e21 * x.clamp(-2, 2)).float() for x in normals(3, *shape))
    assert F.mse_loss(eps_hat, noise).isinf()
    run = torch.compile(criterion.from_output, backend="aot_eager", disable=not compiled)
    loss = run(eps_hat.requires_grad_(), noise, T[:3], **drawn(estimator, zeta))
    assert loss.isposinf().all()
    loss.sum().backward()
    assert not eps_hat.grad.isnan().any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("which", [0, 1], ids=["output", "target"])
def test_what_is_not_finite_in_the_data_is_not_hidden(estimator, which):
    data = torch.zeros(2, 3, 4)
    data[which, 0, 1], data[which, 1, 2] = torch.inf, torch.nan
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, reduction="none")
    loss = criterion.from_output(*data, T[:3])
    assert loss.isposinf().tolist() == [True, False, False]
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_data_is_no_crash(shape, reduction):
    """A mean of no values is NaN, as of `F.mse_loss`, and a sum over no samples is 0."""
    head = Head(*shape, reduction=reduction)
    loss, gradient = loss_and_gradient(head, head.output)
    per_sample = reduction == "none"
    assert loss.shape == (shape[:1] if per_sample else ())
    assert (loss.isnan() if per_sample or shape[0] else loss == 0).all()
    assert gradient.shape == shape


@pytest.mark.parametrize(("schedule", "skip"), [(LINEAR, 9), (FLOW, 0.1)], ids=repr)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_fake_tensors(estimator, schedule, skip):
    """They have no values; a loss may be made among them, and is right among real ones."""
    t, (eps_hat, noise, xi) = skip * torch.tensor([1, 5]), normals(3, 2, 3)
    options = {"estimator": estimator, "prediction_type": "epsilon"}
    made_before = SkipStepLoss(schedule, skip, **options)
    expected = made_before.from_output(eps_hat, noise, t, **drawn(estimator, xi))
    with FakeTensorMode(allow_non_fake_inputs=True):
        made_inside = SkipStepLoss(schedule, skip, **options)
        weighted = SkipStepLoss(schedule, skip, weighting="min_snr", **options)
        for criterion in (made_before, weighted):
            leaf = torch.empty(4, 3, 8, 8, requires_grad=True)
            criterion(lambda x_t, t, leaf=leaf: leaf, torch.empty(4, 3, 8, 8)).backward()
            assert leaf.grad.shape == leaf.shape
        NoiseSchedule.cosine(100)
    for criterion in (made_before, made_inside):
        found = criterion.from_output(eps_hat, noise, t, **drawn(estimator, xi))
        assert type(found) is torch.Tensor
        assert torch.equal(found, expected)


def test_fake_tensors_in_a_mode_that_takes_no_others():
    """As memory is estimated, with torch's default."""
    made_before = SkipStepLoss(LINEAR, 9)
    with FakeTensorMode():
        net, x0 = torch.nn.Linear(8, 8), torch.empty(4, 3, 8)
        for criterion in (made_before, SkipStepLoss(LINEAR, 9)):
            criterion(lambda x_t, t: net(x_t), x0).backward()
            criterion.from_output(net(x0), x0, torch.zeros(4, dtype=torch.int64)).backward()
    expected = SkipStepLoss(LINEAR, 9).from_output(*normals(2, 4, 3), T)
    assert torch.equal(made_before.from_output(*normals(2, 4, 3), T), expected)


FOLDER = Path(s2dm_loss.__file__).parent
# What `torch.x._y` reads, and a dunder name that tensors made of tensors have.
PRIVATE = re.compile(r"\b(?:torch|forward_ad|dynamo|functorch)(?:\.\w+)*\._(?!_)\w+|__tensor_")


def test_the_private_names_are_in_one_file():
    paths = [*FOLDER.glob("*.py"), *FOLDER.glob("sampling/*.py")]
    users = {path.name for path in paths if PRIVATE.search(path.read_text(encoding="utf-8"))}
    assert users == {"_torch.py"}


SOURCE = (FOLDER / "_torch.py").read_text(encoding="utf-8")
ASKED = re.findall(r'torch\._C(?:\.|, ")(\w+)', SOURCE)
NAMES = [*ASKED, "_current_level", "unset_fake_temporarily"]


@pytest.mark.parametrize("name", [*NAMES, "all of them"])
@forward_mode
def test_without_it_the_loss_is_right(monkeypatch, name):
    """Taken away as by a later PyTorch while the library is loaded; torch itself still needs it."""
    with pytest.MonkeyPatch.context() as patch:
        for each in NAMES if name == "all of them" else [name]:
            if each == "_current_level":
                patch.setattr(torch.autograd, "forward_ad", SimpleNamespace())
            elif each == "unset_fake_temporarily":
                monkeypatch.delattr(fake_tensor, each)
            else:
                patch.delattr(torch._C, each)
        for module in [each for each in sys.modules if each.split(".")[0] == "s2dm_loss"]:
            monkeypatch.delitem(sys.modules, module)
        library = importlib.import_module("s2dm_loss")
    head = Head(2, 3, 4, made=library.SkipStepLoss)
    both(head, lambda f: loss_and_gradient(f, head.output))
    for transform in TRANSFORMS.values():
        both(head, lambda f, transform=transform: transform(f, head.output))
    with torch.device("meta"):
        criterion = library.SkipStepLoss(library.NoiseSchedule.linear(1000), 99)
    criteria, data = (criterion, SkipStepLoss(LINEAR, 99)), (head.output, head.target, head.t)
    torch.testing.assert_close(*(each.from_output(*data) for each in criteria))


def test_a_tensor_that_a_function_transform_left_behind_keeps_its_gradient():
    """It is still wrapped when the transform has ended, which an operator of autograd must see."""
    (x, noise), weight, left = normals(2, 4, 3), normals(1, 4, 3)[0].requires_grad_(), []
    criterion, t = SkipStepLoss(LINEAR, 9), torch.tensor([0, 8, 9, 100])

    def loss(x):
        left.append(x * weight)
        return criterion.from_output(left[0], noise, t)

    torch.func.grad(loss)(x)
    criterion.from_output(left[0], noise, t).backward()
    expected = torch.autograd.grad(criterion.from_output(x * weight, noise, t), weight)[0]
    assert torch.equal(weight.grad, expected)
