"""Ways around PyTorch's corners; each private name of it, asked for once and guarded.

A name that a later PyTorch no longer has answers with the slower of its two meanings ("a transform
may be active", "somebody may watch"), so that the loss stays right and only the fast path goes.
Without torch's dict of hooks, `before_each_call` alone calls nothing.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])


def typed_as(function: _Function) -> Callable[[Callable[..., Any]], _Function]:
    """Give a stub the type of a function: torch types `Module.__call__` as returning Any."""
    return lambda _: function


def _asked(owner: Any, name: str) -> Callable[[], Any]:
    """Return a private function of PyTorch, or one that always answers yes."""
    found: Callable[[], Any] = getattr(owner, name, lambda: True)
    return found


_functorch_is_active = _asked(torch._C, "_are_functorch_transforms_active")
_dispatch_modes = _asked(torch._C, "_len_torch_dispatch_stack")


def is_traced() -> bool:
    """Return whether a compiler or a function transform (`torch.func`) is at work."""
    return torch.compiler.is_compiling() or bool(_functorch_is_active())


def reading_is_free(t: Tensor) -> bool:
    """Whether values can be read without a device sync and outside any tracer."""
    return type(t) is Tensor and t.device.type == "cpu" and not is_traced()


def needs_plain_operators(tensor: Tensor) -> bool:
    """Return whether more is asked of an operation than its gradient by autograd.

    Under a compiler, a function transform or forward mode, and for tensors that are made of others
    (DTensor), plain operators answer and a custom `autograd.Function` may not.
    """
    return (
        torch.compiler.is_compiling()
        or bool(_functorch_is_active())
        or getattr(forward_ad, "_current_level", 0) >= 0
        or (type(tensor) is not Tensor and hasattr(tensor, "__tensor_flatten__"))
    )


def quick_apply(function: Any) -> Callable[..., Tensor]:
    """Return the `apply` of an `autograd.Function` that is called under no transform.

    `Function.apply` itself asks for transforms at each call, which is a tenth of what a small batch
    costs. All it does besides is done here: to unwrap a tensor that a transform left behind.
    """
    whole: Callable[..., Tensor] = function.apply
    unwrap = getattr(getattr(torch._C, "_functorch", None), "unwrap_if_dead", None)
    if unwrap is None:
        return whole
    quick: Callable[..., Tensor] = super(torch.autograd.Function, function).apply
    return lambda first, *others: quick(unwrap(first), *others)


def is_watched() -> bool:
    """Return whether something looks at each operator, such as selective checkpointing."""
    return bool(_dispatch_modes())


@contextmanager
def real_tensors() -> Iterator[None]:
    """Make tensors that hold values on the CPU, whatever mode or default device is active."""
    pause: Any = nullcontext
    if is_watched():
        fake_tensor: Any = getattr(getattr(torch, "_subclasses", None), "fake_tensor", None)
        pause = getattr(fake_tensor, "unset_fake_temporarily", nullcontext)
    with pause(), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def before_each_call(hook: Callable[[nn.Module, object], None]) -> Iterator[None]:
    """Have a hook called before each module is, in all threads.

    Compiled code is compiled anew for another key of the hook, so each thread keeps its own, which
    `register_module_forward_pre_hook` would not. torch warns that a compiled module calls it twice.
    """
    hooks: dict[int, object] = getattr(nn.modules.module, "_global_forward_pre_hooks", {})
    key = -threading.get_ident()
    mine = key not in hooks
    try:
        hooks[key] = hook
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)` when there are")
            yield
    finally:
        if mine:
            del hooks[key]


def replicated_like(data: Tensor, *per_sample: Tensor) -> tuple[Any, ...]:
    """Return tensors of shape [B], replicated over the mesh of `data` if that is a DTensor.

    Each device makes the coefficients from t, of the whole batch, whatever part of the data lies
    there. A DTensor is known by its attributes: its module is slow to import, and has moved.
    """
    mesh = None if type(data) is Tensor else getattr(data, "device_mesh", None)
    if mesh is None:
        return per_sample
    kind: Any = type(data)
    return tuple(kind.from_local(tensor, mesh, run_check=False) for tensor in per_sample)


def full_tensor(per_sample: Any) -> Tensor:
    """Return a DTensor of shape [B] as the plain tensor of the whole batch, any other as it is."""
    plain = type(per_sample) is Tensor or not hasattr(per_sample, "device_mesh")
    tensor: Tensor = per_sample if plain else per_sample.full_tensor()
    return tensor


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the keyword for a draw of torch's; none without a generator.

    With `generator=None` said, torch takes no symbolic size, and a compiled step would fail at the
    second size of batch.
    """
    return {} if generator is None else {"generator": generator}
