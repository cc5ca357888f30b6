"""The overhead bench: what it measures is right, and it keeps to its time."""

import json
import math
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks.overhead import __main__ as command
from benchmarks.overhead import holes, levels, plan
from benchmarks.overhead.contenders import contenders, other_loss, released_loss
from benchmarks.overhead.levels import KNOWN, Settings
from benchmarks.overhead.measure import gradient_error
from benchmarks.overhead.step import MEASURE
from s2dm_loss import NoiseSchedule
from tests.helpers.released_loss import CASES as RELEASED
from tests.helpers.released_loss import released_tensor
from tests.strategies import loss_and_gradient

CPU = torch.device("cpu")


def device(name="cuda", **changed):
    """Return a device of the committed results, some levels' figures replaced."""
    found = holes.Device(holes.RESULTS / f"{name}.json")
    found.levels |= {level: {"figures": figures} for level, figures in changed.items()}
    return found


@pytest.mark.parametrize("case", RELEASED, ids=lambda case: f"k{case['skip']}-{case['dtype']}")
def test_the_released_contender_gives_the_released_values(case):
    names = ("model_output", "noise", "skip_noise", "grad_model_output")
    eps_hat, noise, zeta, expected = (released_tensor(case, name) for name in names)
    loss, t = released_loss(CPU, case["skip"], case["tau"]), torch.tensor(case["timesteps"])
    found, gradient = loss_and_gradient(lambda x: loss(x, noise, t, zeta), eps_hat)
    assert found.item() == pytest.approx(case["loss"], rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_the_min_snr_contender_weighs_by_min_snr():
    t, (eps_hat, noise) = torch.tensor([10, 500, 900]), torch.randn(2, 3, 4)
    snr = 1 / (1 / NoiseSchedule.linear().alphas_cumprod[t] - 1)
    errors = (eps_hat.double() - noise).square().mean(1)
    expected = (snr.clamp(max=5) / snr * errors).mean()
    loss = contenders(CPU)["min_snr"](eps_hat, noise, t)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_the_gradients_error_is_that_of_the_type():
    """Rounding to bfloat16, 8 bits, is at most 2^-8 of the largest entry; float32's far less."""
    pair, t = torch.randn(2, 4, 3, 8, 8), torch.tensor([0, 9, 500, 999])
    loss = contenders(CPU)["expected"]
    assert 0 < gradient_error(loss, (*pair, t)) < 1e-6
    assert 1e-4 < gradient_error(loss, (*pair.bfloat16(), t)) <= 2**-8

    def wrong(eps_hat, *others):
        return loss(eps_hat, *others) * (1.01 if eps_hat.dtype == torch.float32 else 1)

    assert gradient_error(wrong, (*pair, t)) == pytest.approx(0.01, rel=1e-3)


def test_another_version_is_loaded_beside_this_one(tmp_path):
    package = tmp_path / "s2dm_loss"
    package.mkdir()
    (package / "__init__.py").write_text("from s2dm_loss.only_there import *\n__version__ = '0'\n")
    (package / "only_there.py").write_text(
        "class NoiseSchedule:\n linear = classmethod(lambda cls: None)\n"
        "class SkipStepLoss:\n"
        " def __init__(self, schedule, skip): pass\n"
        " def to(self, device): return self\n"
        " def from_prediction(self, eps_hat, noise, t): return (eps_hat - noise).square().mean()\n"
    )
    before = dict(sys.modules)
    found = other_loss(tmp_path, CPU)
    assert (list(found), sys.modules) == (["version 0"], before)
    settings = Settings(CPU, 0.01, 14, 1, 0.0, small=True, other=found)
    cell = next(levels.heads(settings, "eager", [torch.bfloat16]))
    assert {"version 0/mse", "expected/mse"} < set(cell["ratios"])
    call = ["run", "--against", str(package), "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(command.main, call)
    assert "against: expected a checkout with a folder s2dm_loss" in said.output


def test_cells_share_the_time_that_is_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shares = []
    for share in Settings(CPU, 2.0, 14, 1, 9.0, deadline=110.0).in_time("abcd"):
        shares.append(share)
        now += 4  # three of them are over before the deadline
    assert shares == [("a", 1.5), ("b", pytest.approx(1.2)), ("c", pytest.approx(0.6))]


def test_what_people_train_on_comes_first():
    shapes = Settings(CPU, 2.0, 28, 128, 60.0).shapes
    sizes = {f"2^{n}": 2**n for n in range(28, 13, -2)}
    assert list(shapes) == [*KNOWN, *sizes]
    assert {name: math.prod(shapes[name]) for name in sizes} == sizes


def test_a_part_that_hangs_takes_no_time_of_the_others(tmp_path, monkeypatch):
    """The child of a part is ended as well, and what is spared goes on to the next."""
    alive = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(alive)!r}, 'a').write('.'); time.sleep(0.02)"
    scripts = {
        "quick": "pass",
        "hangs": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])",
        "fails": "raise SystemExit(3)",
        "last": "pass",
    }
    said, asked = [], []

    def script(part, seconds):
        asked.append(seconds)
        return [sys.executable, "-c", scripts[part[0]]]

    # Shares of 93 seconds, of which only the part that hangs takes its own.
    parts = {(name,): 3.0 if name == "hangs" else 30.0 for name in scripts}
    monkeypatch.setattr(plan, "PARTS", parts)
    monkeypatch.setattr(plan, "command", script)
    began = time.monotonic()
    plan.follow([], 93.0, said.append)
    assert time.monotonic() - began < 60
    assert asked[2] > asked[0]  # what "quick" left
    outcomes = [line.partition(": ")[2].split()[0] for line in said[1::2]]
    assert outcomes == ["done", "ended", "failed", "done"]
    written = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == written > 0


def test_a_part_is_measured_by_the_command_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "PARTS", {("bandwidth",): 60.0})
    said = CliRunner().invoke(command.main, ["gpu", "--rehearse", "--out", str(tmp_path)])
    assert "bandwidth: done" in said.output
    (found,) = json.loads((tmp_path / "cpu.json").read_text())["bandwidth"]["figures"]
    low, middle, high = found["copy_bytes_per_second"]
    assert 1e8 < low <= middle <= high


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    def level(settings):
        yield {"name": "first"}
        raise RuntimeError("the card fell out")

    monkeypatch.setitem(MEASURE, "counts", level)
    path = tmp_path / "cpu.json"
    path.write_text('{"step": {"figures": []}}')
    call = f"run --out={tmp_path} --device cpu --level counts --out {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", ["overhead", *call])
    assert isinstance(CliRunner().invoke(command.main, call).exception, RuntimeError)
    results = json.loads(path.read_text())
    assert results["step"] == {"figures": []}
    assert results["counts"]["figures"] == [{"name": "first"}]
    # It names no folder of one machine.
    words = "python -m benchmarks.overhead run --device cpu --level counts"
    assert results["counts"]["command"] == words


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("call", ["run --device cuda", "gpu"])
def test_a_gpu_that_is_not_there(call):
    answer = CliRunner().invoke(command.main, call.split())
    assert (answer.exit_code, "torch sees no GPU here" in answer.output) == (1, True)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_rate_is_of_the_bytes_that_any_loss_moves(name):
    found = device(name)
    cell = dict(found.known())["CIFAR10"]
    seconds = cell["microseconds"]["expected"][1] / 1e6
    rate = holes.useful_rate(cell, "expected")
    assert rate == pytest.approx(3 * 4 * 128 * 3 * 32 * 32 / seconds)
    copy = found.levels["bandwidth"]["figures"][0]["copy_bytes_per_second"][1]
    moved, least = found.moved(cell)
    assert least == pytest.approx(rate / copy)
    row = found.counted("float32")["expected"]
    assert moved / least == pytest.approx(row["bytes"] / row["data_bytes"] / 3)
    assert found.old == (row["bytes"] / row["data_bytes"] > 6.5)


def test_what_a_step_gains_is_over_the_fastest_plain_one():
    """On the GPU the head was timed at the step's shape twice, and each counts."""
    found = device()
    (step,) = found.levels["step"]["figures"]
    heads = [c for c in found.levels["float32"]["figures"] if c["name"] == "CIFAR10"]
    times = [head["microseconds"] for head in [step["head"], *heads]]
    plain = step["microseconds"]["mse"][1]
    shares = sorted((t["expected"][1] - t["mse"][1]) / plain for t in times)
    assert found.added == pytest.approx(tuple(shares))

    head = {"microseconds": {"mse": [1, 300.0, 1], "expected": [1, 400.0, 1]}}
    half = {**step, "mode": "compiled", "dtype": "bfloat16", "head": head}
    half["microseconds"] = {"mse": [1, 20000.0, 1]}
    faster = device(**{"step-compiled": [half]})
    assert faster.fastest_step["mode"] == "compiled"
    assert faster.added == (0.005, 0.005)


def test_what_was_not_measured_is_named():
    assert device(bfloat16=[]).unmeasured == [
        "bfloat16 at any size",
        "compiled float32 at any size but 2^24",
        "compiled bfloat16 at any size but 2^24",
        "the step, compiled",
        "the step, graph",
        "the step, compiled graph",
    ]


def test_a_wait_or_a_broken_graph_is_seen():
    found = device()
    assert found.waits == 0
    ours = next(r for r in found.levels["counts"]["figures"] if r["contender"] == "expected")
    ours |= {"graph_breaks": 1, "sync": "called a synchronizing CUDA operation"}
    assert found.waits == 2
