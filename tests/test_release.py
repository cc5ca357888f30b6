"""Versions are said once, pins are exact, and nothing is fetched."""

import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from s2dm_loss import __version__
from tests.helpers.commands import ROOT, run

yaml = pytest.importorskip("yaml")


def text_of(name):
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside these tests")
    return path.read_text(encoding="utf-8")


def matrix_of(job):
    return yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"][job]["strategy"]["matrix"]


def test_the_oldest_versions_that_are_tested_are_the_claimed_floors():
    (dependencies,) = re.findall(r"^dependencies = \[(.*)\]$", text_of("pyproject.toml"), re.M)
    floors = {n: Version(v) for n, v in re.findall(r'"([\w-]+)>=([\d.]+)"', dependencies)}
    (oldest,) = re.findall(r"^OLDEST = \((.*?)\)$", text_of("noxfile.py"), re.M | re.S)
    tested = {n: Version(v) for n, v in re.findall(r'"([\w-]+)==([\d.]+)"', oldest)}
    assert set(floors) == {"torch", "einops", "typing-extensions"}
    assert floors.items() <= tested.items()


def test_every_claimed_python_is_in_the_matrix():
    project = text_of("pyproject.toml")
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert matrix_of("tests")["python"] == claimed
    (floor,) = re.findall(r'^requires-python = ">=(3\.\d+)"$', project, re.M)
    assert floor == claimed[0]
    assert {"session": "oldest", "python": floor} in matrix_of("others")["include"]


def test_the_workflows_run_sessions_that_exist():
    defined = set(re.findall(r"^@nox\.session.*?\ndef (\w+)", text_of("noxfile.py"), re.M | re.S))
    run_there = {job["session"] for job in matrix_of("others")["include"]}
    # By hand: an hour, where a change to the mathematics asks for it. "core" is the script's.
    assert run_there | {"tests", "mutation", "core"} == defined
    assert "nox -s core" in text_of(".ci/run")


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["version"] == __version__
    assert citation["preferred-citation"]["url"].endswith("2401.01520")
    versions = re.findall(r"^## \[(.+?)\]", text_of("CHANGELOG.md"), re.M)
    assert versions[0] in ("Unreleased", __version__)
    assert __version__ in versions or versions == ["Unreleased"]


WITHOUT_SOCKETS = """
import socket

def refused(*args, **kwargs):
    raise RuntimeError("the network was asked for")

socket.socket.connect = socket.socket.connect_ex = refused
socket.create_connection = socket.getaddrinfo = refused
import torch
from s2dm_loss import NoiseSchedule, ScaledModel, SkipStepLoss, testing, weighting
from s2dm_loss.adapters import ddim, diffusers, guided_diffusion, score_sde
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
    folders = (ROOT / name for name in ("s2dm_loss", "adapters", "benchmarks"))
    code = "".join(path.read_text("utf-8") for folder in folders for path in folder.rglob("*.py"))
    loads = re.findall(r"torch\.load\([^)]*\)", code)
    assert loads
    assert all("weights_only=True" in load for load in loads)


def test_every_pin_is_exact_and_said_once_and_the_commands_install_what_is_pinned():
    """README.md's two commands install `quality` and `test`, and .ci/run installs `dev`."""
    lines = text_of("constraints.txt").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(name): Version(version) for name, version in pins}  # an exact one
    assert len(pinned) == len(pins)
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads(text_of("pyproject.toml"))["project"]

    def required(lines):
        """With the extras of its own that the project names."""
        for requirement in map(Requirement, lines):
            if requirement.name == project["name"]:
                for extra in requirement.extras:
                    yield from required(project["optional-dependencies"][extra])
            else:
                yield requirement

    commands = text_of("README.md") + text_of(".ci/run")
    extras = set(re.findall(r"-c constraints\.txt -e \"\.\[(\w+)\]\"", commands))
    assert extras == {"quality", "test", "dev"}
    found = list(required([*project["dependencies"], f"{project['name']}[{','.join(extras)}]"]))
    assert {"torch", "pytest", "mkdocs", "mypy"} <= {requirement.name for requirement in found}
    for requirement in found:
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{requirement} has no pin"
        assert pinned[name] in requirement.specifier, f"{requirement} against =={pinned[name]}"
