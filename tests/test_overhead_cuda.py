"""The benchmark's GPU paths as far as fake CUDA goes: a plain error of Python shows without one."""

import contextlib
import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.overhead import measure, step
from s2dm_loss import NoiseSchedule, SkipStepLoss

CUDA = torch.device("cuda", 0)


class Gpu:
    """A GPU of which each call takes a millisecond and 1,000 bytes, and which keeps a diary."""

    def __init__(self, monkeypatch):
        self.diary, self.clock, self.held, self.peak = [], 0.0, 5000, 9999
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                gpu.diary.append("record")
                self.at = gpu.clock

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

        fakes = {
            "Event": Event,
            "Stream": Stream,
            "CUDAGraph": Graph,
            "synchronize": lambda device=None: self.diary.append("synchronize"),
            "memory_allocated": lambda _device: self.held,
            "max_memory_allocated": lambda _device: self.peak,
            "reset_peak_memory_stats": lambda _device: reset(),
            "get_sync_debug_mode": lambda: 0,
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
    seconds = measure._time(gpu.work, CUDA, lambda: pytest.fail("the host's clock"))
    assert seconds == pytest.approx(1e-3)
    assert gpu.diary == ["synchronize", "record", "work", "record", "wait"]


def test_peak_memory_is_above_what_was_held(gpu):
    assert measure.peak_memory(gpu.work, CUDA) == 1000
    assert gpu.diary == ["synchronize", "work", "synchronize"]


def test_syncs_are_allowed_again_after_an_error(gpu):
    with pytest.raises(RuntimeError, match="a sync"), measure.syncs_forbidden():
        raise RuntimeError("a sync")
    assert gpu.diary == ["error", 0]


def test_kernels_are_the_events_on_the_device(gpu, monkeypatch):
    kinds = [measure.DeviceType.CPU, measure.DeviceType.CUDA, measure.DeviceType.CUDA]
    events = [types.SimpleNamespace(device_type=kind) for kind in kinds]
    profiler = types.SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(measure, "profile", lambda activities: contextlib.nullcontext(profiler))
    assert measure.kernels(gpu.work) == 2
    assert gpu.diary == ["synchronize", "work", "synchronize"]


def test_inputs_lie_on_the_gpu():
    with FakeTensorMode():
        inputs = measure.Inputs((4, 3), torch.float16, CUDA, 0)
        for tensor in inputs():
            assert tensor.device == CUDA
    assert len(inputs.sets) == 3


def test_a_captured_step_trains(gpu, monkeypatch):
    """With the optimizer as a graph has to have it; captured here, it only runs once more."""
    made = {}

    def adamw(parameters, lr, capturable):
        made["capturable"] = capturable
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    model, x0 = nn.Conv2d(3, 3, 1), torch.randn(4, 3, 2, 2)
    criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9)

    def objective(noise, t):
        return criterion(lambda x_t, t: model(x_t), x0, t, noise=noise)

    before = model.weight.detach().clone()
    captured = step._capture(model, objective, x0)
    assert made == {"capturable": True}
    assert captured["captured"]
    assert gpu.diary.count("replay") == 10
    assert not torch.equal(model.weight, before)
