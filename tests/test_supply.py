"""Nothing is fetched: not at import, not in a default path, not out of a checkpoint."""

import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.helpers.commands import ROOT, run

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
    assert run(sys.executable, "-c", WITHOUT_SOCKETS) == "refused, and not missed\n"


def test_checkpoints_are_read_as_data_alone():
    loads = []
    for folder in ("s2dm_loss", "adapters", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            loads += re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8"))
    assert loads
    assert all("weights_only=True" in load for load in loads)


def test_every_pin_is_exact_and_said_once_and_the_commands_install_what_is_pinned():
    """README.md's two commands install `quality` and `test`, and .ci/run installs `dev`."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(name): Version(version) for name, version in pins}  # an exact one
    assert len(pinned) == len(pins)
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def required(lines):
        """With the extras of its own that the project names."""
        for requirement in map(Requirement, lines):
            if requirement.name == project["name"]:
                for extra in requirement.extras:
                    yield from required(project["optional-dependencies"][extra])
            else:
                yield requirement

    commands = (ROOT / "README.md").read_text(encoding="utf-8")
    commands += (ROOT / ".ci/run").read_text(encoding="utf-8")
    extras = set(re.findall(r"-c constraints\.txt -e \"\.\[(\w+)\]\"", commands))
    assert extras == {"quality", "test", "dev"}
    found = list(required([*project["dependencies"], f"{project['name']}[{','.join(extras)}]"]))
    assert {"torch", "pytest", "mkdocs", "mypy"} <= {requirement.name for requirement in found}
    for requirement in found:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} has no pin"
        assert pinned[name] in requirement.specifier, f"{requirement} against =={pinned[name]}"
