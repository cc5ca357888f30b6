"""What the loss head costs, counted and not timed, and that it stays right while being cheap.

The counts are exact and the same on every run. A ceiling that is broken says that somebody's
training step got slower or larger.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.overhead.contenders import (
    attempts,
    contenders,
    gradient_first_loss,
    released_loss,
)
from benchmarks.overhead.measure import (
    OperatorCount,
    inductor_bytes,
    peak_memory,
    syncs_forbidden,
)
from s2dm_loss import NoiseSchedule, SkipStepLoss, coefficients
from s2dm_loss._head import _CHECKPOINTS_COMPILE, completed_square, mean_square
from s2dm_loss.functional import completed_square_loss
from tests.strategies import normal

LINEAR = NoiseSchedule.linear(1000)
SHAPE = (32, 3, 32, 32)
DATA = 4 * torch.Size(SHAPE).numel()
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="torch.compile on a CPU needs a C++ compiler"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# torch's own forward mode scripts its decompositions when first used.
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def call(estimator="expected", dtype=torch.float32, device=CPU, **options):
    """Return the work of one forward and backward, its tables read already."""
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, **options).to(device)
    eps_hat = normal(*SHAPE, seed=0).to(device, dtype).requires_grad_()
    noise, zeta = (normal(*SHAPE, seed=seed).to(device, dtype) for seed in (1, 2))
    t = torch.arange(SHAPE[0], device=device) * 31

    def work():
        eps_hat.grad = None
        zeta_or_none = zeta if estimator == "fresh" else None
        criterion.from_prediction(eps_hat, noise, t, skip_noise=zeta_or_none).backward()
        return eps_hat.grad

    work()
    return work


# (estimator, dtype): operators, those on data, passes over float32 data, new tensors of that size.
CEILINGS = {
    ("expected", torch.float32): (14, 4, 7, 1),
    ("shared", torch.float32): (15, 4, 7, 1),
    ("fresh", torch.float32): (24, 8, 15, 3),
    # Half types are lifted inside the kernels; the gradient is rounded to them at the end.
    ("expected", torch.bfloat16): (15, 5, 7, 1.5),
    ("shared", torch.bfloat16): (16, 5, 7, 1.5),
}
# A CPU's kernels do not lift, they are given a copy. For the sum of ε² the head makes it, in sight.
CPU_CEILINGS = CEILINGS | {
    ("expected", torch.bfloat16): (18, 6, 9, 2.5),
    ("shared", torch.bfloat16): (19, 6, 9, 2.5),
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(("estimator", "dtype"), CEILINGS)
def test_operators_and_bytes(estimator, dtype, device):
    ceilings = CPU_CEILINGS if device == "cpu" else CEILINGS
    operators, on_data, passes, new_tensors = ceilings[estimator, dtype]
    work = call(estimator, dtype, torch.device(device))
    with OperatorCount(large=DATA // 2) as count:
        work()
    assert count.operators <= operators, count.names
    assert count.data_operators <= on_data, count.names
    # What has one value a sample adds a little, and the table counts as read whole.
    table, per_sample = 1000 * 6 * 4, 400
    assert count.bytes <= passes * DATA + table + per_sample * SHAPE[0]
    assert count.new_bytes <= new_tensors * DATA
    assert count.syncs == 0, count.names


def test_a_constant_that_is_zero_costs_no_pass():
    work = call(normalize=True)
    with OperatorCount(large=DATA) as count:
        work()
    assert count.data_operators == 3, count.names
    assert count.bytes <= 6 * DATA + 1000 * 2 * 4 + 400 * SHAPE[0]


def test_the_count_sees_a_temporary_and_a_sync():
    data = torch.ones(SHAPE)
    with OperatorCount(large=DATA) as count:
        (data * data).sum().item()
    assert count.names[:2] == ["mul", "sum"]
    assert count.data_operators == 2
    assert count.new_bytes == DATA
    assert 4 * DATA <= count.bytes <= 4 * DATA + 16  # mul reads one tensor twice and writes one
    assert count.syncs == 1
    with OperatorCount(large=DATA) as count:
        data[data[:, 0, 0, 0] > 0]
    assert count.syncs == 1, "a boolean index"


def test_peak_memory_is_one_tensor():
    """The allocator's own account, so temporaries inside an operator count as well."""
    eps_hat, noise = normal(*SHAPE, seed=0).float().requires_grad_(), normal(*SHAPE, seed=1).float()
    plain = peak_memory(lambda: F.mse_loss(eps_hat, noise).backward(), CPU)
    work = call()
    work().untyped_storage()  # the gradient of that call is still held, and freed by the next
    peak = peak_memory(work, CPU)
    per_sample = 256 * SHAPE[0]
    assert plain >= DATA
    assert peak <= DATA + per_sample
    assert peak <= plain + per_sample


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_peak_memory_of_half_types_is_two_lifted_tensors(dtype):
    """ε̂ on its way to the residual and the copy of ε; as much as `F.mse_loss` holds."""
    eps_hat, noise = (normal(*SHAPE, seed=seed).to(dtype) for seed in (0, 1))
    eps_hat.requires_grad_()
    plain = peak_memory(lambda: F.mse_loss(eps_hat, noise).backward(), CPU)
    work = call(dtype=dtype)
    work().untyped_storage()
    peak = peak_memory(work, CPU)
    per_sample = 256 * SHAPE[0]
    assert peak <= 2 * DATA + per_sample
    assert peak <= plain + per_sample


def test_no_gradient_no_residual_left_behind():
    criterion = SkipStepLoss(LINEAR, 9)
    eps_hat, noise = normal(*SHAPE, seed=0).float(), normal(*SHAPE, seed=1).float()
    t = torch.arange(SHAPE[0])
    criterion.from_prediction(eps_hat, noise, t)
    with OperatorCount(large=DATA) as count:
        loss = criterion.from_prediction(eps_hat, noise, t)
    assert not loss.requires_grad
    assert count.new_bytes == DATA
    assert count.data_operators == 3


@needs_compiler
def test_compiled_it_moves_no_more_than_it_must():
    """Twice ε̂ and ε in and once the gradient out; of `F.mse_loss` the compiler makes 7 passes."""
    eps_hat, noise = normal(*SHAPE, seed=0).float().requires_grad_(), normal(*SHAPE, seed=1).float()
    losses = contenders(CPU)
    arguments = (eps_hat, noise, torch.arange(SHAPE[0]))
    ours, plain = (inductor_bytes(losses[name], arguments) for name in ("expected", "mse"))
    assert plain >= 5 * DATA
    assert ours <= plain + 200 * SHAPE[0]
    if _CHECKPOINTS_COMPILE:  # an earlier compiler keeps the residual
        assert ours <= 5 * DATA + 200 * SHAPE[0]


@needs_gpu
def test_a_gpu_neither_syncs_nor_refuses_a_graph():
    device = torch.device("cuda")
    work = call(device=device)
    with syncs_forbidden():
        gradient = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    torch.testing.assert_close(captured, gradient)


def mean_of_squares(values):
    return (values**2).reshape(len(values), -1).mean(1)


REDUCE = {"none": lambda loss: loss, "mean": torch.mean, "sum": torch.sum}


def reference(eps_hat, weight, constant, noise_constant, *target, reduction="none", weights=1):
    for gain, noise in zip(target[::2], target[1::2], strict=True):
        eps_hat = eps_hat - gain.reshape(-1, *[1] * (noise.ndim - 1)) * noise
    loss = weight * mean_of_squares(eps_hat)
    loss = loss + (0 if constant is None else constant)
    if noise_constant is not None:
        loss = loss + noise_constant * mean_of_squares(target[1])
    return REDUCE[reduction](weights * loss)


def arguments(*shape):
    """Return ε̂, weight, two constants and two (gain, noise) pairs in float64."""
    eps_hat, *noises = (normal(*shape, seed=seed) for seed in range(3))
    *constants, gain, other_gain = (normal(shape[0], seed=seed) for seed in range(3, 8))
    return eps_hat, *constants, gain, noises[0], other_gain, noises[1]


SHAPES = [(3,), (3, 4), (3, 2, 5), (2, 3, 4, 4), (2, 3, 2, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("without", [(), (1,), (2,), (1, 2)])
def test_value_and_gradient(shape, reduction, weigh, without):
    eps_hat, *target = arguments(*shape)
    target = [None if index in without else tensor for index, tensor in enumerate(target)]
    ours, plain = (eps_hat.clone().requires_grad_() for _ in range(2))
    options = {"reduction": reduction} | ({"weights": normal(shape[0], seed=10)} if weigh else {})
    upstream = normal(shape[0], seed=9) if reduction == "none" else normal(1, seed=9)[0]
    values = completed_square(ours, *target, **options), reference(plain, *target, **options)
    torch.testing.assert_close(*values, rtol=1e-13, atol=1e-15)
    for value in values:
        value.backward(upstream)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("shape", SHAPES)
def test_mean_square(shape):
    values = normal(*shape, seed=0)
    mean = mean_square(values, torch.float64)
    torch.testing.assert_close(mean, mean_of_squares(values), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@forward_mode
def test_every_kind_of_derivative(shape):
    """To second order, forward over backward, in batches; of each argument, and of ε̂ alone."""
    leaves = [leaf.requires_grad_() for leaf in arguments(*shape)]
    constants = [leaf.detach() for leaf in leaves[1:]]

    def of_prediction(eps_hat):
        return completed_square(eps_hat, *constants)

    def mean_of_prediction(eps_hat):
        return completed_square(eps_hat, *constants, reduction="mean")

    for function, inputs in (
        (of_prediction, leaves[:1]),
        (mean_of_prediction, leaves[:1]),
        (completed_square, leaves),
    ):
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(function, inputs)


@forward_mode
def test_torch_func():
    """Against the plain formula: grad, jacobians, hessian, and vmap inside and outside of them."""
    eps_hat, *target = arguments(2, 3, 4)
    batch = normal(5, 2, 3, 4, seed=8)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda x: f(x, *target).sum())(eps_hat),
        "jacrev": lambda f: torch.func.jacrev(lambda x: f(x, *target))(eps_hat),
        "jacfwd": lambda f: torch.func.jacfwd(lambda x: f(x, *target))(eps_hat),
        "hessian": lambda f: torch.func.hessian(lambda x: f(x, *target).sum())(eps_hat),
        "vmap": lambda f: torch.vmap(lambda x: f(x, *target))(batch),
        "vmap of grad": lambda f: torch.vmap(torch.func.grad(lambda x: f(x, *target).sum()))(batch),
        "grad of vmap": lambda f: torch.func.grad(
            lambda xs: torch.vmap(lambda x: f(x, *target))(xs).sum()
        )(batch),
        "vectorised": lambda f: torch.autograd.functional.jacobian(
            lambda x: f(x, *target), eps_hat, vectorize=True
        ),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(
            transform(completed_square), transform(reference), msg=lambda m, n=name: f"{n}: {m}"
        )


def test_autograd_through_a_vmap():
    _, *target = arguments(2, 3, 4)
    batch = normal(5, 2, 3, 4, seed=8).requires_grad_()
    gradients = [
        torch.autograd.grad(torch.vmap(lambda x: f(x, *target))(batch).sum(), batch)[0]  # noqa: B023
        for f in (completed_square, reference)
    ]
    torch.testing.assert_close(*gradients)


def test_hessian_where_the_residual_is_zero():
    """A norm has no derivative there; its square has."""
    one, gain, noise = torch.ones(2).double(), normal(2, seed=0), normal(2, 3, seed=1)
    eps_hat = (gain[:, None] * noise).requires_grad_()
    hessian = torch.autograd.functional.hessian(
        lambda x: completed_square(x, one, None, None, gain, noise).sum(), eps_hat
    )
    torch.testing.assert_close(hessian.reshape(6, 6), 2 / 3 * torch.eye(6, dtype=torch.float64))


def test_three_backwards_through_one_graph():
    """The first consumes the residual, the others make it again."""
    eps_hat, *target = arguments(2, 3, 4)
    eps_hat.requires_grad_()
    loss = completed_square(eps_hat, *target).sum()
    gradients = [
        torch.autograd.grad(loss, eps_hat, retain_graph=True, create_graph=create)[0]
        for create in (False, False, True)
    ]
    again = torch.autograd.grad(reference(eps_hat, *target).sum(), eps_hat)[0]
    for gradient in gradients:
        torch.testing.assert_close(gradient, again, rtol=1e-13, atol=1e-16)


def test_several_gradients_at_once_where_one_residual_is_at_hand():
    eps_hat, *target = arguments(2, 3)
    eps_hat.requires_grad_()
    upstream = torch.eye(2, dtype=torch.float64)
    jacobians = [
        torch.autograd.grad(f(eps_hat, *target), eps_hat, upstream, is_grads_batched=True)[0]
        for f in (completed_square, reference)
    ]
    torch.testing.assert_close(*jacobians)


def test_the_gradient_is_nobody_elses_memory():
    """What is done in place touches neither the inputs nor an earlier gradient."""
    eps_hat, *target = arguments(2, 3, 4)
    eps_hat.requires_grad_()
    before = [tensor.detach().clone() for tensor in (eps_hat, *target)]
    loss = completed_square(eps_hat, *target).sum()
    first = torch.autograd.grad(loss, eps_hat, retain_graph=True)[0]
    kept = first.clone()
    torch.autograd.grad(3 * loss, eps_hat)
    assert torch.equal(first, kept)
    for now, then in zip((eps_hat, *target), before, strict=True):
        assert torch.equal(now, then)


def test_forward_mode_without_torch_func():
    eps_hat, *target = arguments(2, 3)
    eps_hat.requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(eps_hat, torch.ones_like(eps_hat))
        tangents = [
            forward_ad.unpack_dual(f(dual, *target)).tangent for f in (completed_square, reference)
        ]
    torch.testing.assert_close(*tangents)


def test_learned_coefficients_get_a_gradient():
    """A schedule with parameters of its own is trained through the gain and the weight."""
    square = coefficients(LINEAR, 9, t=torch.tensor([5, 900])).complete_square()
    square = square._replace(
        **{
            name: getattr(square, name).requires_grad_()
            for name in ("weight", "gain", "noise_constant", "constant")
        }
    )
    eps_hat, noise = normal(2, 3, seed=0).requires_grad_(), normal(2, 3, seed=1)

    def by_hand(weight, gain, noise_constant, constant):
        constant = constant + noise_constant * mean_of_squares(noise)
        return reference(eps_hat, weight, constant, None, gain, noise).sum()

    leaves = (square.weight, square.gain, square.noise_constant, square.constant)
    loss = completed_square_loss(eps_hat, noise, square, None, "sum", None)
    ours = torch.autograd.grad(loss, leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(by_hand(*leaves), leaves))


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x[:, :1].expand_as(x),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
    ],
    ids=["channels_last", "transposed", "expanded", "strided"],
)
def test_memory_layouts(layout):
    eps_hat, *constants, noise, _, _ = arguments(2, 3, 4, 4)
    eps_hat = layout(eps_hat).requires_grad_()
    for second in (noise, layout(noise)):
        loss = completed_square(eps_hat, *constants, second)
        plain = reference(eps_hat, *constants, second)
        torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
        gradients = [torch.autograd.grad(value.sum(), eps_hat)[0] for value in (loss, plain)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_lifted_and_the_gradient_is_rounded_once(dtype):
    eps_hat, noise = (normal(4, 3, 8, 8, seed=seed).to(dtype) for seed in (0, 1))
    gain, one = torch.linspace(0.9, 1.0, 4), torch.ones(4)
    leaves = eps_hat.requires_grad_(), eps_hat.detach().float().requires_grad_()
    values = [completed_square(leaf, one, one, one, gain, noise.to(leaf.dtype)) for leaf in leaves]
    assert values[0].dtype == torch.float32
    torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    for value in values:
        value.sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad.to(dtype))


def test_checkpointing_and_offloading():
    eps_hat, *target = arguments(2, 3, 4)
    eps_hat.requires_grad_()

    def loss(x):
        return completed_square(2 * x, *target).sum()

    (expected,) = torch.autograd.grad(loss(eps_hat), eps_hat)
    (again,) = torch.autograd.grad(checkpoint(loss, eps_hat, use_reentrant=False), eps_hat)
    with torch.autograd.graph.save_on_cpu():
        (offloaded,) = torch.autograd.grad(loss(eps_hat), eps_hat)
    assert torch.equal(expected, again)
    assert torch.equal(expected, offloaded)


@pytest.mark.parametrize("reduction", REDUCE)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_data_is_no_crash(shape, reduction):
    """As of `F.mse_loss`, a mean of nothing is NaN and a sum of no samples is 0."""
    eps_hat, *target = arguments(*shape)
    loss = completed_square(eps_hat.requires_grad_(), *target, reduction=reduction)
    assert loss.shape == (shape[:1] if reduction == "none" else ())
    if reduction == "sum" and shape[0] == 0:
        assert loss == 0
    else:
        assert loss.isnan().all()
    loss.sum().backward()
    assert eps_hat.grad.shape == shape


def test_fake_tensors():
    with FakeTensorMode():
        eps_hat = torch.empty(SHAPE, requires_grad=True)
        per_sample = [torch.empty(SHAPE[0]) for _ in range(4)]
        loss = completed_square(eps_hat, *per_sample, torch.empty(SHAPE))
        loss.sum().backward()
    assert loss.shape == SHAPE[:1]
    assert eps_hat.grad.shape == SHAPE


@needs_compiler
def test_compiles_whole_with_gradients_for_both():
    torch.compiler.reset()
    eps_hat, *constants, noise, _, _ = (x.float() for x in arguments(2, 3, 4))
    leaves = eps_hat.requires_grad_(), *constants, noise.requires_grad_()
    run = torch.compile(lambda *args: completed_square(*args).sum(), fullgraph=True)
    wanted = eps_hat, noise
    ours = torch.autograd.grad(run(*leaves), wanted)
    torch.testing.assert_close(ours, torch.autograd.grad(reference(*leaves).sum(), wanted))


# What the benchmark compares has to be what it says.


def test_the_released_contender_gives_the_released_values():
    golden = Path(__file__).parent / "data" / "released_loss.json"
    cases = json.loads(golden.read_text(encoding="utf-8"))["cases"]
    assert len(cases) > 1
    for case in cases:
        shape = case["shape"]
        eps_hat, noise, zeta = (
            torch.tensor(case[name], dtype=torch.float64).view(shape)
            for name in ("model_output", "noise", "skip_noise")
        )
        eps_hat.requires_grad_()
        t = torch.tensor(case["timesteps"])
        loss = released_loss(CPU, case["skip"], case["tau"])(eps_hat, noise, t, zeta)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
        gradient = torch.tensor(case["grad_model_output"], dtype=torch.float64).view(shape)
        torch.testing.assert_close(eps_hat.grad, gradient, rtol=1e-6, atol=1e-9)


def test_the_min_snr_contender_weighs_by_min_snr():
    bar = LINEAR.alphas_cumprod
    t = torch.tensor([10, 500, 900])
    eps_hat, noise = normal(3, 4, seed=0).float(), normal(3, 4, seed=1).float()
    snr = bar[t] / (1 - bar[t])
    expected = (snr.clamp(max=5) / snr * mean_of_squares(eps_hat.double() - noise)).mean()
    loss = contenders(CPU)["min_snr"](eps_hat, noise, t)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@needs_compiler
def test_the_attempts_all_give_the_same_loss():
    torch.compiler.reset()
    eps_hat, noise = normal(3, 4, 2, seed=0).float(), normal(3, 4, 2, seed=1).float()
    t = torch.tensor([3, 500, 999])
    losses = attempts(CPU) | {"gradient_first": gradient_first_loss(CPU)}
    del losses["mse"]
    results = {}
    for name, loss in losses.items():
        leaf = eps_hat.clone().requires_grad_()
        value = loss(leaf, noise, t)
        (2 * value).backward()
        results[name] = (value.detach(), leaf.grad)
    for value, gradient in results.values():
        torch.testing.assert_close(value, results["shipped"][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results["shipped"][1], rtol=1e-5, atol=1e-8)
