"""Import a trainer's own code from a checkout of its repository."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def checkout_on_path(root: Path, stubs: Mapping[str, ModuleType] = {}) -> Iterator[None]:
    """Let the flat modules of `root` be imported, and `stubs` stand for what is not installed.

    Trainers call their modules `models`, `utils` or `datasets`, names that others use as well: on
    leaving, every module that came in is dropped and every one that gave way is back.
    """
    names = {path.stem for path in root.iterdir() if path.suffix == ".py" or path.is_dir()}
    names |= {name.split(".")[0] for name in stubs}
    before = dict(sys.modules)
    for name in before:
        if name.split(".")[0] in names:
            del sys.modules[name]
    sys.modules.update(stubs)
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))
        for name in list(sys.modules):
            if name.split(".")[0] in names:
                del sys.modules[name]
        sys.modules.update(
            {name: module for name, module in before.items() if name.split(".")[0] in names}
        )
