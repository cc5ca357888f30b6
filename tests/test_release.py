"""The files that say versions say the same ones."""

import re

import pytest

from s2dm_loss import __version__
from tests.helpers.commands import ROOT

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
    floors = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', dependencies))
    (oldest,) = re.findall(r"^OLDEST = \((.*?)\)$", text_of("noxfile.py"), re.M | re.S)
    tested = dict(re.findall(r'"([\w-]+)==([\d.]+)"', oldest))
    assert set(floors) == {"torch", "einops", "typing-extensions"}
    for name, floor in floors.items():
        # 2.4 is tested as 2.4.0.
        assert tested[name] == floor + ".0" * (2 - floor.count(".")), name


def test_every_claimed_python_is_in_the_matrix():
    project = text_of("pyproject.toml")
    claimed = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert matrix_of("tests")["python"] == claimed
    (floor,) = re.findall(r'^requires-python = ">=(3\.\d+)"$', project, re.M)
    assert floor == claimed[0]
    assert {"session": "oldest", "python": floor} in matrix_of("others")["include"]


def test_the_workflows_run_sessions_that_exist():
    defined = set(re.findall(r"^@nox\.session.*?\ndef (\w+)", text_of("noxfile.py"), re.M | re.S))
    run = {job["session"] for job in matrix_of("others")["include"]}
    by_hand = {"mutation"}  # an hour, where a change to the mathematics asks for it
    assert run | {"tests"} | by_hand == defined


def test_the_citation_is_of_this_version_and_names_the_paper():
    citation = yaml.safe_load(text_of("CITATION.cff"))
    assert citation["version"] == __version__
    assert citation["preferred-citation"]["url"].endswith("2401.01520")


def test_the_changelog_knows_this_version():
    changelog = text_of("CHANGELOG.md")
    versions = re.findall(r"^## \[(.+?)\]", changelog, re.M)
    assert versions[0] == "Unreleased" or versions[0] == __version__
    assert __version__ in versions or versions == ["Unreleased"]
