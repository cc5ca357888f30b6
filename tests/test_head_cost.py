"""What a call of the loss costs, counted and not timed: the same on every run."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import s2dm_loss
from benchmarks.overhead.contenders import contenders
from benchmarks.overhead.measure import OperatorCount, inductor_bytes, peak_memory, syncs_forbidden
from s2dm_loss import SkipStepLoss
from tests.strategies import ESTIMATORS, LINEAR, drawn, normal

SHAPE = (32, 3, 32, 32)
DATA = 4 * torch.Size(SHAPE).numel()
PER_SAMPLE = 1200 * SHAPE[0]  # one value a sample, and one for each piece of 256
TABLE = 9 * 1000 * 4  # counts as read whole
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def call(estimator="expected", kind="epsilon", dtype=torch.float32, device=CPU):
    """Return the work of one forward and backward, its tables read already."""
    criterion = SkipStepLoss(LINEAR, 9, estimator=estimator, prediction_type=kind).to(device)
    output, target, x_t, xi = (normal(*SHAPE, seed=seed).to(device, dtype) for seed in range(4))
    x_t = x_t if kind == "v_prediction" else None
    output.requires_grad_()
    t = torch.arange(SHAPE[0], device=device) * 31

    def forward():
        return criterion.from_output(output, target, t, x_t, **drawn(estimator, xi))

    def work():
        output.grad = None
        forward().backward()
        return output.grad

    work()
    work.forward = forward
    return work


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_operators_and_bytes(estimator, kind, dtype, device):
    """One more operator, which reads one more tensor, for each part of the target but the first."""
    work = call(estimator, kind, dtype, torch.device(device))
    with OperatorCount(large=DATA // 2) as count:
        work()
    more = (estimator == "fresh") + (kind == "v_prediction")
    half = dtype == torch.bfloat16  # lifted in sight on a CPU, and rounded at the end
    assert count.operators <= 9 + more + 2 * half, count.names
    assert count.data_operators <= 3 + more + 2 * half, count.names
    # Somebody who watches, as this count does, sees each part of the target and the gradient
    # written anew; by itself it is all in place (`test_peak_memory`).
    assert count.new_bytes <= (2 + more + 1.5 * half) * DATA
    passes = 6 + 3 * more + 2.5 * half
    assert count.bytes <= passes * DATA + TABLE + 2 * PER_SAMPLE
    assert count.syncs == 0, count.names


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peak_memory(estimator, kind, dtype):
    """One new tensor; of half types two in float32, as much as `F.mse_loss` of copies holds."""
    output, target = (normal(*SHAPE, seed=seed).to(dtype) for seed in (0, 1))
    output.requires_grad_()
    plain = peak_memory(lambda: F.mse_loss(output.float(), target.float()).backward(), CPU)
    work = call(estimator, kind, dtype)
    work().untyped_storage()  # the gradient of that call is still held, and freed by the next
    peak = peak_memory(work, CPU)
    assert plain >= DATA
    assert peak <= min((1 if dtype == torch.float32 else 2) * DATA, plain) + PER_SAMPLE


def test_without_a_gradient_no_residual_stays_behind():
    forward = call().forward
    with torch.no_grad(), OperatorCount(large=DATA) as count:
        loss = forward()
    assert (loss.requires_grad, count.new_bytes, count.data_operators) == (False, DATA, 2)


@pytest.mark.parametrize(("kind", "calls"), [("epsilon", 20), ("v_prediction", 21)])
def test_few_calls_until_the_arithmetic(kind, calls):
    """From `from_output` to the first operator on the data."""
    forward, seen, folder = call(kind=kind).forward, [], str(Path(s2dm_loss.__file__).parent)

    def profile(frame, event, argument):
        if event == "c_call" and argument.__name__ == "addcmul":
            sys.setprofile(None)
        elif event == "call" and frame.f_code.co_filename.startswith(folder):
            seen.append(frame.f_code.co_name)

    sys.setprofile(profile)
    try:
        forward()
        assert sys.getprofile() is None, "never arrived"
    finally:
        sys.setprofile(None)
    assert len(seen) <= calls, seen


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile on a CPU needs a compiler")
def test_compiled_it_moves_no_more_than_mse_loss():
    output, noise = (normal(*SHAPE, seed=seed).float() for seed in (0, 1))
    losses, arguments = contenders(CPU), (output.requires_grad_(), noise, torch.arange(SHAPE[0]))
    ours, plain = (inductor_bytes(losses[name], arguments) for name in ("expected", "mse"))
    assert plain >= 5 * DATA
    assert ours <= plain + 2 * TABLE + PER_SAMPLE


@needs_gpu
def test_a_gpu_neither_syncs_nor_refuses_a_graph():
    work = call(device=torch.device("cuda"))
    with syncs_forbidden():
        gradient = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    torch.testing.assert_close(captured, gradient)


def test_the_count_sees_a_temporary_and_a_sync():
    data = torch.ones(SHAPE)
    with OperatorCount(large=DATA) as count:
        (data * data).sum().item()
    assert (count.data_operators, count.new_bytes, count.syncs) == (2, DATA, 1), count.names
    assert 4 * DATA <= count.bytes <= 4 * DATA + 16  # mul reads one tensor twice and writes one
    with OperatorCount(large=DATA) as count:
        data[data[:, 0, 0, 0] > 0]
    assert count.syncs == 1, "a boolean index"
