"""The files that say versions say the same ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from s2dm_loss import __version__

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]


def text_of(name: str) -> str:
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside these tests")
    return path.read_text(encoding="utf-8")


def claimed_pythons() -> list[str]:
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text_of("pyproject.toml"))


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
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == claimed_pythons()
    (floor,) = re.findall(r'^requires-python = ">=(3\.\d+)"$', text_of("pyproject.toml"), re.M)
    assert floor == claimed_pythons()[0]
    sessions = {job["session"]: job for job in jobs["others"]["strategy"]["matrix"]["include"]}
    assert sessions["oldest"]["python"] == floor


def test_the_workflows_run_sessions_that_exist():
    defined = set(re.findall(r"^@nox\.session.*?\ndef (\w+)", text_of("noxfile.py"), re.M | re.S))
    jobs = yaml.safe_load(text_of(".github/workflows/ci.yml"))["jobs"]
    run = {job["session"] for job in jobs["others"]["strategy"]["matrix"]["include"]}
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
