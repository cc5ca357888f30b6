"""Nothing is fetched: not at import, not in a default path, not out of a checkpoint."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

WITHOUT_SOCKETS = """
import socket

def refused(*args, **kwargs):
    raise RuntimeError("the network was asked for")

socket.socket.connect = socket.socket.connect_ex = refused
socket.create_connection = socket.getaddrinfo = refused
import torch
import s2dm_loss
from s2dm_loss import CorrectionSearch, NoiseSchedule, ScaledModel, SkipStepLoss
import s2dm_loss.adapters.diffusers, s2dm_loss.adapters.guided_diffusion
import s2dm_loss.adapters.score_sde, s2dm_loss.adapters.ddim
import s2dm_loss.testing, s2dm_loss.weighting
criterion = SkipStepLoss(NoiseSchedule.linear(1000), 9)
criterion(lambda x_t, t: x_t, torch.randn(4, 3)).item()
ScaledModel.with_gain(torch.nn.Identity(), NoiseSchedule.linear(1000), 9)
try:
    socket.create_connection(("localhost", 1))
except RuntimeError:
    print("refused, and not missed")
"""


def test_the_library_asks_for_no_network():
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", WITHOUT_SOCKETS], capture_output=True, text=True, check=False
    )
    assert done.stdout == "refused, and not missed\n", done.stderr


def test_checkpoints_are_read_as_data_alone():
    loads = []
    for folder in ("s2dm_loss", "adapters", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            loads += re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8"))
    assert loads
    assert all("weights_only=True" in load for load in loads)


def test_every_pin_is_exact_and_said_once():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.!+-]*", pin) for pin in pins)
    names = [re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins]
    assert len(set(names)) == len(names)
    assert "torch==2.13.0" in pins


def requirements_of(project, *extras):
    """What the project and its extras require, with the extras of its own that they name."""
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = []
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            found += requirements_of(project, *requirement.extras)
        else:
            found.append(requirement)
    return found


def test_what_the_commands_install_is_pinned_within_its_range():
    """README.md's two commands install `quality` and `test`, and .ci/run installs `dev`."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    commands = (ROOT / "README.md").read_text(encoding="utf-8")
    commands += (ROOT / ".ci/run").read_text(encoding="utf-8")
    extras = set(re.findall(r"-c constraints\.txt -e \"\.\[(\w+)\]\"", commands))
    assert extras == {"quality", "test", "dev"}
    required = requirements_of(project, *sorted(extras))
    assert {"torch", "pytest", "mkdocs", "mypy"} <= {requirement.name for requirement in required}
    for requirement in required:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} has no pin"
        assert pinned[name] in requirement.specifier, f"{requirement} against =={pinned[name]}"
