"""The benchmark's GPU paths as far as fake CUDA goes: a plain error of Python shows without one."""

import contextlib
import json
import time
import types
import warnings
import weakref

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
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                gpu.diary.append("record")
                self.at = gpu.now()

            def synchronize(self):
                gpu.diary.append("wait")

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)  # in milliseconds, as CUDA's

        class Stream:
            def wait_stream(self, other):
                assert isinstance(other, Stream)

        class Graph:
            def replay(self):
                gpu.diary.append("replay")

        def reset():
            self.peak = self.held

        def set_mode(mode):
            self.diary.append(mode)
            self.mode = mode
            # As torch's own does when it is first set, and sets it all the same.
            if mode == "error":
                warnings.warn("Synchronization debug mode is a prototype", stacklevel=2)

        fakes = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "synchronize": lambda device=None: self.diary.append("synchronize"),
            "memory_allocated": lambda _device: self.held,
            "max_memory_allocated": lambda _device: self.peak,
            "reset_peak_memory_stats": lambda _device: reset(),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": set_mode,
            "current_stream": Stream,
            "stream": lambda _stream: contextlib.nullcontext(),
            "graph": lambda _graph: contextlib.nullcontext(),
        }
        for name, fake in fakes.items():
            assert hasattr(torch.cuda, name)  # torch's own has that name
            monkeypatch.setattr(torch.cuda, name, fake)

    def work(self):
        self.diary.append("work")
        self.clock += 1e-3
        self.peak = max(self.peak, self.held + 1000)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_times_are_those_between_two_events_from_an_idle_gpu(gpu):
    assert measure._time(gpu.work, CUDA) == pytest.approx(1e-3)
    assert gpu.diary == ["synchronize", "record", "work", "record", "wait"]


def test_peak_memory_is_above_what_was_held(gpu):
    assert measure.peak_memory(gpu.work, CUDA) == 1000
    assert gpu.diary == ["synchronize", "work", "synchronize"]


def test_kernels_are_the_events_on_the_device(gpu, monkeypatch):
    kinds = [measure.DeviceType.CPU, measure.DeviceType.CUDA, measure.DeviceType.CUDA]
    events = [types.SimpleNamespace(device_type=kind) for kind in kinds]
    profiler = types.SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(measure, "profile", lambda activities: contextlib.nullcontext(profiler))
    assert measure.kernels(gpu.work) == 2
    assert gpu.diary == ["synchronize", "work", "synchronize"]


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
    """An ε-model that returns what the U-Net does."""

    def __init__(self):
        super().__init__(3, 3, 1)

    def forward(self, x_t, t):
        assert t.shape == x_t.shape[:1]
        return types.SimpleNamespace(sample=super().forward(x_t))


@pytest.fixture
def small(monkeypatch):
    """The smallest model and sizes, nothing compiled: that is the same on every device."""
    monkeypatch.setattr(step, "cifar10_unet", lambda small: SmallNet())
    monkeypatch.setattr(levels, "LATENTS", (4, 4, 2, 2))
    known = {"CIFAR10": (4, 3, 2, 2), "SD latents": (4, 4, 2, 2)}
    monkeypatch.setattr(levels, "KNOWN", known)
    monkeypatch.setattr(levels, "flat_shape", lambda log2: (8, 4, 2, 2))
    monkeypatch.setattr(measure, "inductor_bytes", lambda loss, arguments: 0)
    explained = types.SimpleNamespace(graph_break_count=0)
    monkeypatch.setattr(torch._dynamo, "explain", lambda loss: lambda *arguments: explained)
    monkeypatch.setattr(torch, "compile", lambda given, **options: given)


@pytest.fixture
def gpu_there(gpu, small, monkeypatch):
    """A GPU that torch finds, whose tensors lie on the CPU and whose kernels nobody counts."""
    gpu.now = time.perf_counter
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a GPU's name")
    # A build with CUDA would have the optimizer ask the driver whether it is captured.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_options: None)
    monkeypatch.setattr(measure, "profile", lambda activities: contextlib.nullcontext(PROFILER))
    adamw, autocast = torch.optim.AdamW, torch.autocast

    def any_adamw(parameters, fused, capturable, **options):
        gpu.diary.append(("adamw", fused, capturable))
        return adamw(parameters, **options)

    def any_autocast(kind, dtype, *, cache_enabled):
        assert kind == "cuda"
        gpu.diary.append(("autocast", cache_enabled))
        return autocast("cpu", dtype, cache_enabled=cache_enabled)

    monkeypatch.setattr(torch.optim, "AdamW", any_adamw)
    monkeypatch.setattr(torch, "autocast", any_autocast)
    copy_bandwidth = measure.copy_bandwidth

    def small_copies(device, mebibytes, seconds):
        assert mebibytes == 1024
        return copy_bandwidth(device, 1, seconds)

    monkeypatch.setattr(measure, "copy_bandwidth", small_copies)
    with OnTheCpu(gpu):
        yield gpu


PROFILER = types.SimpleNamespace(
    events=lambda: [types.SimpleNamespace(device_type=measure.DeviceType.CUDA)]
)


def test_a_whole_run_on_a_gpu(gpu_there, tmp_path):
    call = ["run", "--seconds", "0.01", "--largest", "14", "--step-batch", "4"]
    said = CliRunner().invoke(command.main, [*call, "--step-seconds", "0.01", "--out", tmp_path])
    assert said.exit_code == 0, said.output
    results = json.loads((tmp_path / "cuda.json").read_text())
    assert list(results) == list(command.LEVELS)
    assert {level["machine"]["gpu"] for level in results.values()} == {"a GPU's name"}
    # Only the boolean masks wait.
    for row in results["counts"]["figures"]:
        assert row["kernels"] == 1
        waits = "called a synchronizing operation" if row["contender"] == "released" else None
        assert row["sync"] == waits
    heads = [results[level]["figures"] for level in ("float32", "bfloat16", "compiled")]
    assert [len(cells) for cells in heads] == [3, 3, 6]  # shapes, and two types compiled
    modes = [
        (cell["dtype"], cell["mode"])
        for level in ("step", "step-compiled", "step-graph")
        for cell in results[level]["figures"]
    ]
    assert modes == [
        ("float32", "eager"), ("bfloat16", "compiled"),
        ("bfloat16", "graph"), ("bfloat16", "compiled graph"),
    ]  # fmt: skip
    for cell in results["step-graph"]["figures"]:
        assert "released" not in cell["microseconds"]  # a graph cannot hold its masks
        assert set(cell["loss_falls"]) == set(cell["microseconds"])
    # What a graph holds needs an optimizer that keeps its count on the GPU, and no cache.
    options = [entry for entry in gpu_there.diary if isinstance(entry, tuple)]
    plain, fast, cacheless = ("adamw", False, False), ("adamw", True, True), ("autocast", False)
    assert [entry for entry in options if entry != cacheless] == [plain, fast, fast, fast]
    assert cacheless in options
    assert holes.Device(tmp_path / "cuda.json").unmeasured == []


def test_a_card_that_is_too_small_leaves_one_cell_out(gpu_there, tmp_path, monkeypatch):
    whole = levels.interleave_heads

    def too_large(settings, losses, shape, *rest):
        if shape == (8, 4, 2, 2):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return whole(settings, losses, shape, *rest)

    monkeypatch.setattr(levels, "interleave_heads", too_large)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: gpu_there.diary.append("emptied"))
    call = ["run", "--seconds", "0.01", "--largest", "14", "--out", tmp_path]
    said = CliRunner().invoke(command.main, [*call, "--level", "float32"])
    assert said.exit_code == 0, said.output
    cells = json.loads((tmp_path / "cuda.json").read_text())["float32"]["figures"]
    assert [cell["name"] for cell in cells] == ["CIFAR10", "SD latents"]
    assert "emptied" in gpu_there.diary


def test_a_gpu_has_sizes_of_its_own(gpu_there, tmp_path, monkeypatch):
    found = []

    def level(settings):
        found.append(settings)
        yield {}

    monkeypatch.setitem(command.LEVELS, "counts", level)
    call = ["run", "--level", "counts", "--out", tmp_path]
    for device in ([], ["--device", "cuda"], ["--device", "cpu"]):
        CliRunner().invoke(command.main, [*call, *device])
    sizes = [(s.device.type, s.largest, s.step_batch) for s in found]
    assert sizes == [("cuda", 28, 128), ("cuda", 28, 128), ("cpu", 26, 4)]


def test_losses_compute_where_they_are_told_to(small):
    """On meta tensors: beside one on the CPU an operator fails, as beside one on a GPU it would."""
    for name, loss in contenders.contenders(META, torch.bfloat16).items():
        arguments = measure.some_arguments((4, 3, 2, 2), torch.float32, META)
        if name == "released":  # the host needs values to know the shape
            with pytest.raises(NotImplementedError, match="nonzero"):
                loss(*arguments)
            continue
        loss(*arguments).backward()
        assert arguments[0].grad.device == META


def test_a_step_computes_where_it_is_told_to(small, monkeypatch):
    losses = contenders.contenders(META)
    del losses["released"]
    monkeypatch.setattr(step, "contenders", lambda device: losses)
    (found,) = step.step(Settings(META, 0.01, 8, 4, 0.01), ["eager"])
    assert set(found["peak_bytes"]) == {*losses, "sa_dpm"}
