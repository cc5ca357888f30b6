"""The benchmark's GPU paths as far as fake CUDA goes: a plain error of Python shows without one."""

import contextlib
import json
import time
import warnings
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from benchmarks.overhead import __main__ as command
from benchmarks.overhead import contenders, holes, levels, measure, step
from benchmarks.overhead.levels import Settings

CUDA, META = torch.device("cuda", 0), torch.device("meta")


class Gpu:
    """A GPU of which each call takes a millisecond and 1,000 bytes, and which keeps a diary."""

    def __init__(self, monkeypatch):
        self.diary, self.clock, self.held, self.peak = [], 0.0, 5000, 9999
        self.now, self.mode = lambda: self.clock, 0
        note = self.diary.append
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                self.synchronize = lambda: note("wait")

            def record(self):
                note("record")
                self.at = gpu.now()

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)  # in milliseconds, as CUDA's

        class Stream:
            def wait_stream(self, other):
                assert isinstance(other, Stream)

        def set_mode(mode):
            self.mode = mode
            # As torch's own does when it is first set, and sets it all the same.
            if mode == "error":
                warnings.warn("Synchronization debug mode is a prototype", stacklevel=2)

        fakes = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: note("replay")),
            "synchronize": lambda device=None: note("synchronize"),
            "memory_allocated": lambda _device: self.held,
            "max_memory_allocated": lambda _device: self.peak,
            "reset_peak_memory_stats": lambda _device: setattr(self, "peak", self.held),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": set_mode,
            "current_stream": Stream,
            "stream": contextlib.nullcontext,
            "graph": contextlib.nullcontext,
            "empty_cache": lambda: note("emptied"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def work(self):
        self.diary.append("work")
        self.clock += 1e-3
        self.peak = max(self.peak, self.held + 1000)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def profile_of(*kinds):
    events = [SimpleNamespace(device_type=getattr(measure.DeviceType, kind)) for kind in kinds]
    profiler = SimpleNamespace(events=lambda: events)
    return lambda activities: contextlib.nullcontext(profiler)


def test_what_is_measured_begins_on_an_idle_gpu_and_ends_when_it_is_done(gpu, monkeypatch):
    times = measure.interleave({"ours": lambda: gpu.work}, CUDA, 0, least_rounds=1)
    assert times["ours"] == pytest.approx([1e-3])
    assert gpu.diary == ["work", "synchronize", "record", "work", "record", "wait"]
    gpu.diary.clear()
    assert measure.peak_memory(gpu.work, CUDA) == 1000  # above what was held
    monkeypatch.setattr(measure, "profile", profile_of("CPU", "CUDA", "CUDA"))
    assert measure.kernels(gpu.work) == 2
    assert gpu.diary == ["synchronize", "work", "synchronize"] * 2


def test_inputs_lie_on_the_gpu_and_take_turns():
    """And only those in use hold a gradient."""
    with FakeTensorMode():
        inputs = measure.inputs_in_turn((4, 3), torch.float16, CUDA, 0)
        first = next(inputs)
        first[0].grad = torch.zeros_like(first[0])
        others = [next(inputs) for _ in range(3)]
    assert {tensor.device for tensor in first} == {CUDA}
    assert [other[0] is first[0] for other in others] == [False, False, True]
    assert first[0].grad is None


def test_what_is_captured_runs_before_and_is_replayed(gpu):
    """Three times to warm up on a stream of its own, once into the graph."""
    value = torch.zeros(())

    def work():
        gpu.work()
        return value.add_(1)

    replay, result = step.capture(work)
    assert gpu.diary == ["work"] * 4
    assert result is value
    held = weakref.ref(work)
    del work
    assert held() is not None  # a graph reads its inputs where they lie
    replay()
    assert gpu.diary[-1] == "replay"


class OnTheCpu(TorchFunctionMode):
    """Makes on the CPU what is to be made on the GPU, where syncs can be forbidden all the same."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        masked = func is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool
        if masked and self.gpu.mode == "error":
            raise RuntimeError("called a synchronizing operation\nand where")
        args, kwargs = tree_map(self.place, (args, kwargs or {}))
        return func(*args, **kwargs)

    @staticmethod
    def place(value):
        return torch.device("cpu") if getattr(value, "type", None) == "cuda" else value


class SmallNet(nn.Conv2d):
    def forward(self, x_t, t):
        assert t.shape == x_t.shape[:1]
        return SimpleNamespace(sample=super().forward(x_t))


@pytest.fixture
def small(monkeypatch):
    """The smallest model and sizes, nothing compiled: that is the same on every device."""
    known = {"CIFAR10": (4, 3, 2, 2), "SD latents": (4, 4, 2, 2)}
    explained = SimpleNamespace(graph_break_count=0)
    for place, name, double in (
        (step, "cifar10_unet", lambda small: SmallNet(3, 3, 1)),
        (levels, "LATENTS", known["SD latents"]),
        (levels, "KNOWN", known),
        (levels, "flat_shape", lambda log2: (8, 4, 2, 2)),
        (measure, "inductor_bytes", lambda loss, arguments: 0),
        (torch._dynamo, "explain", lambda loss: lambda *arguments: explained),
        (torch, "compile", lambda given, **options: given),
    ):
        monkeypatch.setattr(place, name, double)


@pytest.fixture
def gpu_there(gpu, small, monkeypatch):
    """A GPU that torch finds, whose tensors lie on the CPU and whose kernels nobody counts."""
    gpu.now = time.perf_counter
    adamw, autocast, copy_bandwidth = torch.optim.AdamW, torch.autocast, measure.copy_bandwidth

    def any_adamw(parameters, fused, capturable, **options):
        return adamw(parameters, **options)

    gpu.adamw = Mock(side_effect=any_adamw)
    gpu.autocast = Mock(side_effect=lambda _kind, *given, **more: autocast("cpu", *given, **more))
    for place, name, double in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_name", lambda _device: "a GPU's name"),
        # A build with CUDA would have the optimizer ask the driver whether it is captured.
        (torch.accelerator, "current_accelerator", lambda **_options: None),
        (measure, "profile", profile_of("CUDA")),
        (torch.optim, "AdamW", gpu.adamw),
        (torch, "autocast", gpu.autocast),
        (measure, "copy_bandwidth", lambda device, _mib, time: copy_bandwidth(device, 1, time)),
    ):
        monkeypatch.setattr(place, name, double)
    with OnTheCpu(gpu):
        yield gpu


def measured(folder, *options):
    sizes = ["--seconds", "0.01", "--largest", "14", "--step-batch", "4", "--step-seconds", "0.01"]
    said = CliRunner().invoke(command.main, ["run", *sizes, "--out", folder, *options])
    assert said.exit_code == 0, said.output
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_a_whole_run_on_a_gpu(gpu_there, tmp_path):
    results = measured(tmp_path)
    assert list(results) == list(command.LEVELS)
    assert {level["machine"]["gpu"] for level in results.values()} == {"a GPU's name"}
    assert results["bandwidth"]["figures"][0]["mebibytes"] == 1024
    # Only the boolean masks wait.
    for row in results["counts"]["figures"]:
        assert row["kernels"] == 1
        waits = "called a synchronizing operation" if row["contender"] == "released" else None
        assert row["sync"] == waits
    heads = [results[level]["figures"] for level in ("float32", "bfloat16", "compiled")]
    assert [len(cells) for cells in heads] == [3, 3, 6]  # shapes, and two types compiled
    steps = [c for name in results if "step" in name for c in results[name]["figures"]]
    modes = ["float32 eager", *(f"bfloat16 {n}" for n in ("compiled", "graph", "compiled graph"))]
    assert [f"{cell['dtype']} {cell['mode']}" for cell in steps] == modes
    for cell in results["step-graph"]["figures"]:
        assert "released" not in cell["microseconds"]  # a graph cannot hold its masks
        assert set(cell["loss_falls"]) == set(cell["microseconds"])
    # What a graph holds needs an optimizer that keeps its count on the GPU, and no cache.
    adamws = [call.kwargs for call in gpu_there.adamw.call_args_list]
    fast = [(made["fused"], made["capturable"]) for made in adamws]
    assert fast == [(False, False), *[(True, True)] * 3]
    calls = gpu_there.autocast.call_args_list
    assert {(call.args[0], call.kwargs["cache_enabled"]) for call in calls} == {("cuda", False)}
    assert holes.Device(tmp_path / "cuda.json").unmeasured == []


def test_a_rehearsal_on_a_cpu_measures_what_a_gpu_would(small, tmp_path):
    results = measured(tmp_path, "--device", "cpu", "--small")
    assert set(results) == {*command.LEVELS} - {"step-graph"}  # which needs a GPU
    assert {c["mode"] for c in results["compiled"]["figures"]} == {"compiled"}
    assert {c["dtype"] for c in results["compiled"]["figures"]} == {"float32", "bfloat16"}
    (cell,) = results["step"]["figures"]
    assert set(cell["head"]["microseconds"]) | {"sa_dpm"} == set(cell["microseconds"])
    assert results["step-compiled"]["figures"][0]["dtype"] == "bfloat16"
    syncs = {row["contender"]: row["sync_operators"] for row in results["counts"]["figures"]}
    assert syncs.pop("released") > 0
    assert not any(syncs.values())
    assert holes.Device(tmp_path / "cpu.json").unmeasured == []


def test_a_rehearsals_network_is_a_u_net():
    answer = step.cifar10_unet(small=True)(torch.zeros(1, 3, 8, 8), torch.tensor([5])).sample
    assert answer.shape == (1, 3, 8, 8)


def test_a_card_that_is_too_small_leaves_one_cell_out(gpu_there, tmp_path, monkeypatch):
    whole = levels.interleave_heads

    def too_large(settings, losses, shape, *rest):
        if shape == (8, 4, 2, 2):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return whole(settings, losses, shape, *rest)

    monkeypatch.setattr(levels, "interleave_heads", too_large)
    cells = measured(tmp_path, "--level", "float32")["float32"]["figures"]
    assert [cell["name"] for cell in cells] == ["CIFAR10", "SD latents"]
    assert "emptied" in gpu_there.diary


def test_a_gpu_has_sizes_of_its_own(gpu_there, tmp_path, monkeypatch):
    level = Mock(return_value=[])
    monkeypatch.setitem(step.MEASURE, "counts", level)
    for device in ([], ["--device", "cuda"], ["--device", "cpu"]):
        call = ["run", "--level", "counts", "--out", tmp_path, *device]
        CliRunner().invoke(command.main, call)
    found = [(s.device.type, s.largest, s.step_batch) for (s,), _ in level.call_args_list]
    assert found == [("cuda", 28, 128), ("cuda", 28, 128), ("cpu", 26, 4)]


def test_losses_and_steps_compute_where_they_are_told_to(small, monkeypatch):
    """On meta tensors: beside one on the CPU an operator fails, as beside one on a GPU it would."""
    losses = contenders.contenders(META, torch.bfloat16)
    arguments = measure.some_arguments((4, 3, 2, 2), torch.float32, META)
    with pytest.raises(NotImplementedError, match="nonzero"):
        losses.pop("released")(*arguments)  # the host needs values to know the shape
    for loss in losses.values():
        loss(*arguments).backward()
        assert arguments[0].grad.device == META
    monkeypatch.setattr(step, "contenders", lambda device: losses)
    (found,) = step.step(Settings(META, 0.01, 8, 4, 0.01), ["eager"])
    assert set(found["peak_bytes"]) == {*losses, "sa_dpm"}
