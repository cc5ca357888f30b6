"""PyTorch's private names: in one file, and the loss is right without any of them."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import fake_tensor

import s2dm_loss
from s2dm_loss import NoiseSchedule, SkipStepLoss, _torch
from tests.strategies import loss_and_gradient
from tests.test_head import CHECKPOINTS, TRANSFORMS, Head, both, checkpoints, forward_mode

FOLDER = Path(s2dm_loss.__file__).parent
# What `torch.x._y` reads, and a dunder name that tensors made of tensors have.
PRIVATE = re.compile(r"\b(?:torch|forward_ad|dynamo|functorch)(?:\.\w+)*\._(?!_)\w+|__tensor_")


def test_the_private_names_are_in_one_file():
    users = {
        path.name
        for path in [*FOLDER.glob("*.py"), *FOLDER.glob("sampling/*.py")]
        if PRIVATE.search(path.read_text(encoding="utf-8"))
    }
    assert users == {"_torch.py"}


def gone(monkeypatch, name):
    """Take a name away as a later PyTorch would, before the file asks for it."""
    if name == "_current_level":
        monkeypatch.setattr(_torch, "forward_ad", SimpleNamespace())
    elif name == "unset_fake_temporarily":
        monkeypatch.delattr(fake_tensor, name)
    else:
        where = {
            "_are_functorch_transforms_active": "_functorch_is_active",
            "_len_torch_dispatch_stack": "_dispatch_modes",
        }[name]
        assert hasattr(torch._C, name)
        # torch itself still needs it: it is as if the file had asked in vain.
        monkeypatch.setattr(_torch, where, _torch._asked(SimpleNamespace(), name))


ASKED = re.findall(r'_asked\(torch\._C, "(\w+)"\)', Path(_torch.__file__).read_text())
NAMES = [*ASKED, "_current_level", "unset_fake_temporarily"]


@pytest.mark.parametrize("name", [*NAMES, "all of them"])
@forward_mode
def test_without_it_the_loss_is_right(monkeypatch, name):
    assert len(NAMES) == 4
    for each in NAMES if name == "all of them" else [name]:
        gone(monkeypatch, each)
    head = Head(2, 3, 4)
    both(head, lambda f: loss_and_gradient(f, head.output))
    for transform in TRANSFORMS.values():
        both(head, lambda f, transform=transform: transform(f, head.output))
    head = Head(2, 3, 4, reduction="mean")
    leaf = head.leaf()
    checkpoints.checkpoint(lambda x: head(2 * x), leaf, **CHECKPOINTS["saved"]()).backward()
    expected = loss_and_gradient(lambda x: head.plain(2 * x), head.output)[1]
    torch.testing.assert_close(leaf.grad, expected)
    torch.compiler.reset()
    compiled = torch.compile(head, backend="aot_eager")
    torch.testing.assert_close(compiled(head.output), head.plain(head.output))
    with torch.device("meta"):
        criterion = SkipStepLoss(NoiseSchedule.linear(1000), 99)
    torch.testing.assert_close(
        criterion.from_output(head.output, head.target, head.t),
        SkipStepLoss(NoiseSchedule.linear(1000), 99).from_output(head.output, head.target, head.t),
    )


class Placed:
    """As much of a DTensor as the library knows it by."""

    device_mesh = "a mesh"

    def __init__(self, local):
        self.local, self.ndim = local, local.ndim

    @classmethod
    def from_local(cls, local, mesh, *, run_check):
        assert mesh == cls.device_mesh
        assert not run_check  # for which every device would wait for the others
        return cls(local)

    def full_tensor(self):
        return self.local


def test_what_has_one_value_a_sample_is_placed_like_the_data():
    per_sample, data = torch.ones(3), torch.ones(3, 4)
    there = Placed(per_sample)
    placed = _torch.placed_like(Placed(data), None, per_sample, there, data)
    assert placed[0] is None
    assert isinstance(placed[1], Placed)
    assert placed[1].local is per_sample
    assert placed[2:] == (there, data)
    assert _torch.placed_like(data, None, per_sample, there) == (None, per_sample, there)
    assert _torch.whole(per_sample) is _torch.whole(there) is per_sample
