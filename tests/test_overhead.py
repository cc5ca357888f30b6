"""The overhead bench: what it measures is right, and it keeps to its time."""

import json
import sys
import time
import types

import pytest
import torch
from click.testing import CliRunner

from benchmarks.overhead import __main__ as command
from benchmarks.overhead import holes, levels, plan
from benchmarks.overhead.contenders import contenders, other_loss, released_loss
from benchmarks.overhead.levels import KNOWN, Settings
from benchmarks.overhead.measure import gradient_error
from s2dm_loss import NoiseSchedule
from tests.helpers.released_loss import CASES as RELEASED
from tests.helpers.released_loss import released_tensor
from tests.strategies import loss_and_gradient

CPU = torch.device("cpu")


def device(tmp_path, name="cuda", **changed):
    """Return a device of the committed results, some levels replaced."""
    levels = json.loads((holes.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    path = tmp_path / f"{name}.json"
    levels |= {level: {"version": "0", **found} for level, found in changed.items()}
    path.write_text(json.dumps(levels), encoding="utf-8")
    return holes.Device(path)


# What is compared has to be what it says.


@pytest.mark.parametrize("case", RELEASED, ids=lambda case: f"k{case['skip']}-{case['dtype']}")
def test_the_released_contender_gives_the_released_values(case):
    eps_hat, noise, zeta = (
        released_tensor(case, name) for name in ("model_output", "noise", "skip_noise")
    )
    loss = released_loss(CPU, case["skip"], case["tau"])
    t = torch.tensor(case["timesteps"])
    found, gradient = loss_and_gradient(lambda x: loss(x, noise, t, zeta), eps_hat)
    assert found.item() == pytest.approx(case["loss"], rel=1e-6)
    expected = released_tensor(case, "grad_model_output")
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_the_min_snr_contender_weighs_by_min_snr():
    bar = NoiseSchedule.linear().alphas_cumprod
    t = torch.tensor([10, 500, 900])
    eps_hat, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    snr = bar[t] / (1 - bar[t])
    errors = (eps_hat.double() - noise).square().mean(1)
    expected = (snr.clamp(max=5) / snr * errors).mean()
    loss = contenders(CPU)["min_snr"](eps_hat, noise, t)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_the_gradients_error_is_that_of_the_type():
    """Rounding to bfloat16, 8 bits, is at most 2^-8 of the largest entry; float32's far less."""
    noise, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 9, 500, 999])
    eps_hat = torch.randn(4, 3, 8, 8)
    loss = contenders(CPU)["expected"]
    single = gradient_error(loss, (eps_hat, noise, t))
    half = gradient_error(loss, (eps_hat.bfloat16(), noise.bfloat16(), t))
    assert 0 < single < 1e-6
    assert 1e-4 < half <= 2**-8
    wrong = gradient_error(
        lambda e, n, t: loss(e, n, t) * (1.01 if e.dtype == torch.float32 else 1),
        (eps_hat, noise, t),
    )
    assert wrong == pytest.approx(0.01, rel=1e-3)


def test_another_version_is_loaded_beside_this_one(tmp_path):
    package = tmp_path / "s2dm_loss"
    package.mkdir()
    (package / "only_there.py").touch()
    imports = "import s2dm_loss.only_there\nfrom s2dm_loss.loss import *"
    (package / "__init__.py").write_text(f"{imports}\n__version__ = '0'\n")
    (package / "loss.py").write_text(
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


# Time.


def test_cells_share_the_time_that_is_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    settings = Settings(CPU, 2.0, 14, 1, 9.0, deadline=110.0)
    shares = []
    for share in settings.in_time("abcd"):
        shares.append(share)
        now += 4  # three of them are over before the deadline
    assert shares == [("a", 1.5), ("b", pytest.approx(1.2)), ("c", pytest.approx(0.6))]
    assert [seconds for _, seconds in settings.in_time("a")] == []


def test_what_people_train_on_comes_first():
    settings = Settings(CPU, 2.0, 28, 128, 60.0)
    names = [name for (name, _), _ in settings.in_time(list(settings.shapes.items()))]
    assert [name.split(", ")[-1] for name in names[:5]] == list(KNOWN)
    assert names[5:] == ["2^28", "2^26", "2^24", "2^22", "2^20", "2^18", "2^16", "2^14"]
    for log2 in (14, 28):
        assert torch.Size(settings.shapes[f"2^{log2}"]).numel() == 2**log2


def test_the_plan_takes_eight_minutes_at_most():
    assert 450 < sum(plan.PARTS.values()) <= 8 * 60 - 5
    planned = [level for part in plan.PARTS for level in part]
    assert sorted(planned) == sorted(command.LEVELS)


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
    assert any(line.startswith("hangs: ended after") for line in said)
    assert "fails: failed with exit status 3; what it had written is kept" in said
    assert said[-1].startswith("last: done")
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

    monkeypatch.setitem(command.LEVELS, "counts", level)
    path = tmp_path / "cpu.json"
    path.write_text('{"step": {"figures": []}}')
    call = ["run", f"--out={tmp_path}", "--device", "cpu", "--level", "counts"]
    call += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["overhead", *call])
    said = CliRunner().invoke(command.main, call)
    assert isinstance(said.exception, RuntimeError)
    results = json.loads(path.read_text())
    assert results["counts"]["figures"] == [{"name": "first"}]
    # It names no folder of one machine.
    words = "python -m benchmarks.overhead run --device cpu --level counts"
    assert results["counts"]["command"] == words
    assert results["step"] == {"figures": []}


def test_a_rehearsal_measures_what_a_gpu_would(tmp_path, monkeypatch):
    """Every level at small sizes; nothing is compiled, which takes a CPU minutes."""
    tiny = {name: (4, *[2] * (len(shape) - 1)) for name, shape in KNOWN.items()}
    monkeypatch.setattr("benchmarks.overhead.levels.KNOWN", tiny)
    monkeypatch.setattr(torch, "compile", lambda given, **_options: given)
    explained = types.SimpleNamespace(graph_break_count=0)
    monkeypatch.setattr(torch._dynamo, "explain", lambda loss: lambda *arguments: explained)
    monkeypatch.setattr("benchmarks.overhead.measure.inductor_bytes", lambda loss, arguments: 1)
    call = ["run", "--device", "cpu", "--small", "--seconds", "0.01", "--step-seconds", "0.01"]
    call += ["--largest", "14", "--step-batch", "1", "--out", str(tmp_path)]
    said = CliRunner().invoke(command.main, call)
    assert said.exit_code == 0, said.output
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert set(results) == {*command.LEVELS} - {"step-graph"}  # which needs a GPU
    cells = results["float32"]["figures"] + results["bfloat16"]["figures"]
    assert len(cells) == 2 * (len(KNOWN) + 1)
    assert {c["mode"] for c in results["compiled"]["figures"]} == {"compiled"}
    assert {c["dtype"] for c in results["compiled"]["figures"]} == {"float32", "bfloat16"}
    (step,) = results["step"]["figures"]
    assert set(step["head"]["microseconds"]) | {"sa_dpm"} == set(step["microseconds"])
    assert results["step-compiled"]["figures"][0]["dtype"] == "bfloat16"
    syncs = {row["contender"]: row["sync_operators"] for row in results["counts"]["figures"]}
    assert syncs.pop("released") > 0
    assert not any(syncs.values())
    assert holes.Device(tmp_path / "cpu.json").unmeasured == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["run", "--device", "cuda"], "device: torch sees no GPU here"),
        (["gpu"], "gpu: torch sees no GPU here; --rehearse needs none"),
    ],
)
def test_a_gpu_that_is_not_there(call, said):
    answer = CliRunner().invoke(command.main, call)
    assert (answer.exit_code, answer.output) == (1, f"Error: {said}\n")


# The page's numbers.


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_a_rate_is_of_the_bytes_that_any_loss_moves(tmp_path, name):
    found = device(tmp_path, name)
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


def test_what_a_step_gains_is_over_the_fastest_plain_one(tmp_path):
    """On the GPU the head was timed at the step's shape twice, and each counts."""
    found = device(tmp_path)
    (step,) = found.levels["step"]["figures"]
    heads = [c for c in found.levels["float32"]["figures"] if c["name"] == "CIFAR10"]
    times = [head["microseconds"] for head in [step["head"], *heads]]
    plain = step["microseconds"]["mse"][1]
    shares = sorted((t["expected"][1] - t["mse"][1]) / plain for t in times)
    assert found.added == pytest.approx(tuple(shares))

    half = {
        **step,
        "mode": "compiled",
        "dtype": "bfloat16",
        "microseconds": {"mse": [1, 20000.0, 1]},
        "head": {"microseconds": {"mse": [1, 300.0, 1], "expected": [1, 400.0, 1]}},
    }
    faster = device(tmp_path, **{"step-compiled": {"figures": [half]}})
    assert faster.fastest_step["mode"] == "compiled"
    assert faster.added == (0.005, 0.005)


def test_what_was_not_measured_is_named(tmp_path):
    found = device(tmp_path, bfloat16={"figures": []})
    assert found.unmeasured == [
        "bfloat16 at any size",
        "compiled float32 at any size but 2^24",
        "compiled bfloat16 at any size but 2^24",
        "the step, compiled",
        "the step, graph",
        "the step, compiled graph",
    ]


def test_a_wait_or_a_broken_graph_is_seen(tmp_path):
    found = device(tmp_path)
    assert found.waits == 0
    ours = next(r for r in found.levels["counts"]["figures"] if r["contender"] == "expected")
    ours |= {"graph_breaks": 1, "sync": "called a synchronizing CUDA operation"}
    assert found.waits == 2
