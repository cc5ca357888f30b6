"""Tables that nothing can spoil: casts, moves, exports, transforms, modes, threads, processes."""

import copy
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from s2dm_loss import ScaledModel, SkipSet, SkipStepLoss
from s2dm_loss.tables import DeviceCopies, TimeTable
from tests.strategies import LINEAR, VP, Same, loss_and_gradient, normals, pickled

T = torch.tensor([0, 9, 500, 999])
C2 = LINEAR.alphas_cumprod[T - 9] / LINEAR.alphas_cumprod[T] - 1
S = torch.where(T >= 9, 0.99 / (0.99 + 0.01 * C2), 1.0)
EPS_HAT, NOISE = normals(2, 4, 3)


class Loss:
    """The loss, and what it has to be in float64."""

    expected = (EPS_HAT - S[:, None] * NOISE).square().mean(1)
    settings = "tau", "skip_set", "max_c2", "weighting", "reduction"

    def make(self):
        return SkipStepLoss(LINEAR, 9, normalize=True, reduction="none")

    def run(self, module, x):
        return module.from_output(x, NOISE.to(x.dtype), T)

    def check(self, module, dtype=torch.float64):
        found = self.run(module, EPS_HAT.to(dtype))
        assert type(found) is torch.Tensor
        tolerance = {"rtol": 1e-12, "atol": 0} if dtype == torch.float64 else {}
        torch.testing.assert_close(found, self.expected.to(dtype), **tolerance)


class Gain(Loss):
    expected = S[:, None] * EPS_HAT
    settings = "scale", "prediction_type"

    def make(self):
        return ScaledModel.with_gain(Same(), LINEAR, 9)

    def run(self, module, x):
        return module(x, T)


KINDS = pytest.mark.parametrize("kind", [Loss(), Gain()], ids=["loss", "gain"])


@KINDS
@pytest.mark.parametrize(
    "spoil",
    [
        *(nn.Module.half, nn.Module.double, copy.deepcopy, pickled),
        lambda m: m.bfloat16().float(),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ],
)
def test_casts_moves_and_copies(kind, spoil):
    module = spoil(kind.make())
    for dtype in (torch.float32, torch.float64, torch.float32):
        kind.check(module, dtype)


def test_a_loss_in_continuous_time_pickles_and_moves():
    criterion = SkipStepLoss(VP, 0.01, tau=0.9, estimator="shared")
    again = pickled(criterion)
    data = *normals(2, 4, 3), torch.tensor([0.001, 0.1, 0.5, 1.0])
    assert repr(again) == repr(criterion)
    assert again.to("cpu") is again  # with no table to move
    assert torch.equal(again.from_output(*data), criterion.from_output(*data))


class Step(SkipStepLoss):
    forward = SkipStepLoss.from_output


def test_export_leaves_nothing_behind():
    step, arguments = Step(LINEAR, 9, normalize=True, reduction="none"), (EPS_HAT, NOISE, T)
    for strict in (False, True):
        exported = torch.export.export(step, arguments, strict=strict).module()
        torch.testing.assert_close(exported(*arguments), step(*arguments))
        Loss().check(step)
        Loss().check(copy.deepcopy(step))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_export_takes_any_batch(reduction):
    step, arguments = Step(LINEAR, 9, reduction=reduction), (EPS_HAT, NOISE, T)
    batch = {0: torch.export.Dim("batch", max=64)}
    exported = torch.export.export(step, arguments, dynamic_shapes=(batch, batch, batch)).module()
    shorter = [tensor[:3] for tensor in arguments]
    torch.testing.assert_close(exported(*shorter), step(*shorter))


@KINDS
def test_function_transforms_leave_nothing_behind(kind):
    module = kind.make()

    def run(x):
        return kind.run(module, x).sum()

    torch.func.grad(run)(EPS_HAT)
    torch.func.vmap(run)(torch.stack([EPS_HAT, NOISE]))
    kind.check(pickled(copy.deepcopy(module)))
    kind.check(module)


@KINDS
def test_made_and_first_called_in_inference_mode(kind):
    with torch.inference_mode():
        module = kind.make()
        kind.check(module)
    assert loss_and_gradient(lambda x: kind.run(module, x), EPS_HAT)[1].all()


class Part(nn.Module):
    """A schedule, a weighting and a scale of a user's own, with a number in a buffer."""

    timesteps, check_timesteps = LINEAR.timesteps, LINEAR.check_timesteps
    alpha_sigma, log_alphas_cumprod_at = LINEAR.alpha_sigma, LINEAR.log_alphas_cumprod_at
    draw_timesteps = LINEAR.draw_timesteps

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, t):
        return self.factor * torch.ones(t.shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda part: SkipStepLoss(LINEAR, 9, weighting=part), "weighting"),
        (lambda part: ScaledModel(nn.Identity(), LINEAR, part), "scale"),
        (lambda part: SkipStepLoss(part, 9), "schedule"),
        (lambda part: ScaledModel.with_gain(nn.Identity(), part, 9), "schedule"),
    ],
)
def test_a_setting_that_is_a_module_is_a_setting(make, name):
    """No key of a checkpoint, no parameter, nothing to move; and it cannot be changed."""
    part = Part()
    module = make(part)
    assert getattr(module, name) is part
    assert list(module.state_dict()) == list(module.buffers()) == []
    with pytest.raises(AttributeError, match=f"{name} is read when a"):
        setattr(module, name, Part())
    assert type(getattr(copy.deepcopy(module), name)) is Part


@KINDS
def test_threads(kind):
    check = functools.partial(kind.check, kind.make())
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(check, [torch.float32, torch.float64] * 150))


@KINDS
def test_settings_are_fixed(kind):
    module = kind.make()
    for name in kind.settings:
        before, said = getattr(module, name), rf"{name} is read when a \w+ is made.*make another"
        with pytest.raises(AttributeError, match=said):
            setattr(module, name, 0.5)
        assert getattr(module, name) is before


@pytest.mark.parametrize(
    ("make", "tables"),
    [
        (lambda skips: SkipStepLoss(LINEAR, skips), 5),
        (lambda skips: ScaledModel.with_gain(nn.Linear(3, 3), LINEAR, skips), 2),
        (lambda _: ScaledModel(nn.Linear(3, 3), LINEAR, lambda t: t.double() * 0 + 0.9), 1),
    ],
)
def test_what_is_moved_has_its_tables_ready_there(monkeypatch, make, tables):
    """As a compiled call cannot keep a copy. There are no values to have ready on "meta"."""
    asked = []
    monkeypatch.setattr(TimeTable, "copy_to", lambda table, device: asked.append(device))
    skips = SkipSet.from_timesteps(torch.arange(0, 1000, 100))
    monkeypatch.setattr(skips, "copy_to", asked.append)
    module = make(skips)
    asked.clear()
    assert module.to("cpu").to("meta") is module
    assert asked == [torch.device("cpu")] * tables


class Spread(torch.Tensor):
    """Times on several devices, as a DTensor's: this one has the first alone."""

    device_mesh = "two"

    def full_tensor(self):
        return torch.tensor([1, 3])


def test_times_on_several_devices_are_read_whole_and_no_fake_copy_is_kept():
    table = TimeTable(lambda t: (t.double() / 4,), torch.arange(4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        table.at(torch.tensor([1, 3]), torch.float16)
    for t in (torch.tensor([1, 3]), torch.tensor([1]).as_subclass(Spread)):
        assert table.at(t, torch.float16)[0].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_times_of_any_integer_type(dtype):
    criterion, t = SkipStepLoss(LINEAR, 9, reduction="none"), torch.tensor([0, 8, 9, 100])
    found, expected = (criterion.from_output(*normals(2, 4, 3), each) for each in (t.to(dtype), t))
    assert torch.equal(found, expected)
    gains = criterion.coefficients_at(t).gain
    assert torch.equal(criterion.coefficients_at(t.to(dtype).view(2, 2)).gain, gains.view(2, 2))
    assert torch.equal(criterion.coefficients_at(t[3].to(dtype)).gain, gains[3])


def test_times_outside_the_table_are_refused():
    """A negative one too, which an index would count from the end."""
    criterion = SkipStepLoss(LINEAR, 9)
    for outside in (-1, 1000, -1, 1000):  # the second time from the kept table
        with pytest.raises(ValueError, match=rf"t must lie in \[0, 1000\), got {outside}$"):
            criterion.from_output(*normals(2, 2, 3), torch.tensor([5, outside]))


def test_batches_of_any_size_in_any_order():
    """What the mean divides by is kept for some numbers of values, and made anew for the others."""
    criterion = SkipStepLoss(LINEAR, 9)
    for size in [*range(1, 80), *range(1, 80, 7)]:
        eps_hat, noise = normals(2, 2, size)
        found = criterion.from_output(eps_hat, noise, torch.tensor([0, 3]))  # the plain loss
        torch.testing.assert_close(found, (eps_hat - noise).square().mean())


def test_many_sizes_copy_no_table_again():
    """A copy to a GPU would have the host wait, in most steps of a training with many sizes."""
    criterion, copies = SkipStepLoss(LINEAR, 9), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.clone):
                copies.append(args[0].shape)
            return func(*args, **(kwargs or {}))

    data = [normals(2, 2, size) for size in range(1, 100)]
    for passes in range(2):
        before = len(copies)
        with Copies():
            for each in data:
                criterion.from_output(*each, torch.tensor([0, 3]))
        assert (len(copies) > before) == (passes == 0)


def test_a_device_without_an_index_is_the_one_that_is_read():
    copies = DeviceCopies(torch.ones(2, dtype=torch.float64))
    copy = copies.on(torch.device("cpu:0"), torch.float32)
    assert copies.on(copy.device, torch.float32) is copy


def test_a_table_that_another_thread_drops_is_still_read(monkeypatch):
    """Each keeps its table beside those that it saw, so one of two at a time is lost."""
    keep = TimeTable._kept

    def keep_and_lose(table, *key):
        before = table._tables
        kept = keep(table, *key)
        table._tables = before  # as by another thread that began before this one ended
        return kept

    monkeypatch.setattr(TimeTable, "_kept", keep_and_lose)
    eps_hat, noise = normals(2, 2, 5)
    found = SkipStepLoss(LINEAR, 9).from_output(eps_hat, noise, torch.tensor([0, 3]))
    torch.testing.assert_close(found, (eps_hat - noise).square().mean())


class Backwards(Part):
    timesteps = LINEAR.timesteps.flip(0)


def test_timesteps_in_another_order_are_no_rows_of_a_table():
    for make in (SkipStepLoss, lambda *args: ScaledModel.with_gain(nn.Identity(), *args)):
        with pytest.raises(ValueError, match=r"timesteps must be 0, 1, …, T-1.*got 999, 998, …"):
            make(Backwards(), 9)


class Learns(nn.Module):
    """A schedule of a user's own, in continuous time, whose log SNR has a factor to train."""

    timesteps, check_timesteps, draw_timesteps = None, VP.check_timesteps, VP.draw_timesteps

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

    def log_alphas_cumprod_at(self, t):
        return nn.functional.logsigmoid(5 - (5 + self.factor) * t.double())

    def alpha_sigma(self, t):
        log_alphas_cumprod = self.log_alphas_cumprod_at(t)
        return (0.5 * log_alphas_cumprod).exp(), (-log_alphas_cumprod.expm1()).sqrt()


@pytest.mark.parametrize("normalize", [False, True])
def test_a_schedule_that_learns_has_its_gradient(normalize):
    schedule, (output, target, x_t) = Learns(), normals(3, 4, 3)
    options = {"tau": 0.5, "normalize": normalize, "prediction_type": "v_prediction"}
    criterion, t = SkipStepLoss(schedule, 0.05, **options), torch.tensor([0.1, 0.3, 0.5, 0.9])

    def loss(factor):
        with torch.no_grad():
            schedule.factor.fill_(factor)
        return criterion.from_output(output, target, t, x_t)

    value = criterion.from_output(output.requires_grad_(), target, t, x_t)
    (found,) = torch.autograd.grad(value, schedule.factor)
    expected = (loss(5 + 1e-5) - loss(5 - 1e-5)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_what_a_table_holds_does_not_train():
    free = torch.zeros((), requires_grad=True)
    makes = (
        lambda: SkipStepLoss(LINEAR, 9, weighting=lambda snr: torch.sigmoid(free - snr)),
        lambda: ScaledModel(nn.Identity(), LINEAR, lambda t: free.expand(t.shape)),
    )
    for make, grad in itertools.product(makes, (True, False)):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="must be fixed"):
            make()
