"""Tables that nothing can spoil: casts, moves, exports, transforms, modes, threads, processes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from s2dm_loss import ScaledModel, SkipSet, SkipStepLoss
from s2dm_loss.tables import TimeTable
from tests.strategies import LINEAR, VP, Same, normals

T = torch.tensor([0, 9, 500, 999])
C2 = LINEAR.alphas_cumprod[T - 9] / LINEAR.alphas_cumprod[T] - 1
A = torch.where(T >= 9, 0.99 + 0.01 * C2, 1.0)
S = torch.where(T >= 9, 0.99 / A, 1.0)


EPS_HAT, NOISE = normals(2, 4, 3)


class Loss:
    """The loss, and what it has to be in float64."""

    expected = (EPS_HAT - S[:, None] * NOISE).square().mean(1)

    def make(self):
        return SkipStepLoss(LINEAR, 9, normalize=True, reduction="none")

    def run(self, module, x):
        return module.from_output(x, NOISE.to(x.dtype), T)

    def check(self, module, dtype=torch.float64):
        found = self.run(module, EPS_HAT.to(dtype))
        assert type(found) is torch.Tensor
        torch.testing.assert_close(found, self.expected.to(dtype))
        if dtype == torch.float64:
            torch.testing.assert_close(found, self.expected, rtol=1e-12, atol=0)


class Gain(Loss):
    expected = S[:, None] * EPS_HAT

    def make(self):
        return ScaledModel.with_gain(Same(), LINEAR, 9)

    def run(self, module, x):
        return module(x, T)


KINDS = pytest.mark.parametrize("kind", [Loss(), Gain()], ids=["loss", "gain"])


@KINDS
@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.bfloat16().float(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("meta").to_empty(device="cpu"),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301 - our own bytes
    ],
    ids=["bfloat16 and back", "half", "double", "meta and back", "deepcopy", "pickle"],
)
def test_casts_moves_and_copies(kind, spoil):
    module = spoil(kind.make())
    for dtype in (torch.float32, torch.float64, torch.float32):
        kind.check(module, dtype)


def test_a_loss_in_continuous_time_pickles_and_moves():
    criterion = SkipStepLoss(VP, 0.01, tau=0.9, estimator="shared")
    again = pickle.loads(pickle.dumps(criterion))  # noqa: S301 - our own bytes
    data = *normals(2, 4, 3), torch.tensor([0.001, 0.1, 0.5, 1.0])
    assert repr(again) == repr(criterion)
    assert again.to("cpu") is again  # with no table to move
    assert torch.equal(again.from_output(*data), criterion.from_output(*data))


class Step(nn.Module):
    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, eps_hat, noise, t):
        return self.criterion.from_output(eps_hat, noise, t)


def test_export_leaves_nothing_behind():
    step, arguments = Step(Loss().make()), (*normals(2, 4, 3), T)
    for strict in (False, True):
        exported = torch.export.export(step, arguments, strict=strict).module()
        torch.testing.assert_close(exported(*arguments), step(*arguments))
        Loss().check(step.criterion)
        Loss().check(copy.deepcopy(step.criterion))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_export_takes_any_batch(reduction):
    step, arguments = Step(SkipStepLoss(LINEAR, 9, reduction=reduction)), (*normals(2, 4, 3), T)
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
    kind.check(pickle.loads(pickle.dumps(copy.deepcopy(module))))  # noqa: S301 - our own bytes
    kind.check(module)


@KINDS
def test_made_and_first_called_in_inference_mode(kind):
    with torch.inference_mode():
        module = kind.make()
        kind.check(module)
    leaf = EPS_HAT.clone().requires_grad_()
    kind.run(module, leaf).sum().backward()
    assert leaf.grad is not None


class Own:
    """A schedule of a user's own."""

    timesteps = LINEAR.timesteps
    check_timesteps = LINEAR.check_timesteps
    log_alphas_cumprod_at = LINEAR.log_alphas_cumprod_at
    alpha_sigma = LINEAR.alpha_sigma
    draw_timesteps = LINEAR.draw_timesteps


class Part(Own, nn.Module):
    """A schedule, a weighting and a scale with a number in a buffer."""

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
    module = kind.make()

    def work(dtype):
        for _ in range(50):
            kind.check(module, dtype)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, [torch.float32, torch.float64] * 3))


LOSS, SHRUNK = SkipStepLoss(LINEAR, 9), ScaledModel.with_gain(nn.Identity(), LINEAR, 9)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (LOSS, ("tau", "skip_set", "max_c2", "weighting", "reduction")),
        (SHRUNK, ("scale", "prediction_type")),
    ],
)
def test_settings_are_fixed(module, names):
    for name in names:
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


def test_times_on_several_devices_are_read_whole():
    table = TimeTable(lambda t: (t.double() / 4,), torch.arange(4))
    found = table.at(torch.tensor([1]).as_subclass(Spread), torch.float32)
    assert found[0].tolist() == [0.25, 0.75]


def test_no_fake_copy_is_kept():
    table, t = TimeTable(lambda t: (t.double() / 4,), torch.arange(4)), torch.tensor([1, 3])
    with FakeTensorMode(allow_non_fake_inputs=True):
        table.at(t, torch.float16)
    assert table.at(t, torch.float16)[0].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_times_of_any_integer_type(dtype):
    criterion, t = SkipStepLoss(LINEAR, 9, reduction="none"), torch.tensor([0, 8, 9, 100])
    found, expected = (criterion.from_output(*normals(2, 4, 3), each) for each in (t.to(dtype), t))
    assert torch.equal(found, expected)
    gains = criterion.coefficients_at(t).gain
    assert torch.equal(criterion.coefficients_at(t.to(dtype).view(2, 2)).gain, gains.view(2, 2))
    assert torch.equal(criterion.coefficients_at(t[3].to(dtype)).gain, gains[3])


@pytest.mark.parametrize("outside", [-1, 1000])
def test_times_outside_the_table_are_refused(outside):
    """A negative one too, which an index would count from the end."""
    criterion = SkipStepLoss(LINEAR, 9)
    for _ in range(2):  # the second time from the kept table
        with pytest.raises(ValueError, match=rf"t must lie in \[0, 1000\), got {outside}$"):
            criterion.from_output(*normals(2, 2, 3), torch.tensor([5, outside]))


def test_batches_of_any_size_in_any_order():
    """What the mean divides by is kept for some numbers of values, and made anew for the others."""
    criterion = SkipStepLoss(LINEAR, 9)
    for size in [*range(1, 80), *range(1, 80, 7)]:
        eps_hat, noise = normals(2, 2, size)
        found = criterion.from_output(eps_hat, noise, torch.tensor([0, 3]))  # the plain loss
        torch.testing.assert_close(found, (eps_hat - noise).square().mean())


class Backwards(Own):
    """In the order of sampling."""

    timesteps = LINEAR.timesteps.flip(0)


def test_timesteps_in_another_order_are_no_rows_of_a_table():
    for make in (SkipStepLoss, lambda *args: ScaledModel.with_gain(nn.Identity(), *args)):
        with pytest.raises(ValueError, match=r"timesteps must be 0, 1, …, T-1.*got 999, 998, …, 0"):
            make(Backwards(), 9)


def test_what_a_table_holds_does_not_train():
    free = torch.zeros((), requires_grad=True)
    makes = (
        lambda: SkipStepLoss(LINEAR, 9, weighting=lambda snr: torch.sigmoid(free - snr)),
        lambda: ScaledModel(nn.Identity(), LINEAR, lambda t: free.expand(t.shape)),
    )
    for make in makes:
        with pytest.raises(ValueError, match="must be fixed on a discrete schedule"):
            make()
        with torch.no_grad(), pytest.raises(ValueError, match="must be fixed"):
            make()
