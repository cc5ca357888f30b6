"""The README can be read in a minute, and its commands are those that CI runs.

`tests/test_pages.py` holds its numbers to the committed results, `tests/test_docs_blocks.py` runs
its code.
"""

import functools
import inspect
import re

import pytest
import torch

import s2dm_loss
from s2dm_loss.sampling import CorrectionSearch, EpsilonScaling, ScoreRescaling, SkipGain
from tests.helpers.commands import ROOT
from tests.strategies import LINEAR, Same

README = (ROOT / "README.md").read_text(encoding="utf-8")


def command(name):
    (found,) = re.findall(rf"^<!-- command: {name} -->\n```sh\n(.*?)^```$", README, re.M | re.S)
    return found


def test_it_is_short():
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    prose = re.sub(r"^(<!--|\||!\[).*$", "", prose, flags=re.M)
    assert 400 < len(prose.split()) <= 650
    before_code = README.split("```")[0]
    assert len(re.findall(r"\d+(?:[.,]\d+)?", before_code)) <= 15
    assert before_code.count("\n") < 25, "the first code is on the first screen"
    assert set(re.findall(r"skip_set=([\d.]+)", README)) == {"49", "0.05"}, "what it recommends"


def test_every_public_name_is_used_where_a_newcomer_reads():
    text = "\n".join([README, *(p.read_text("utf-8") for p in (ROOT / "docs").rglob("*.md"))])
    unused = [n for n in s2dm_loss.__all__ if n[0] != "_" and not re.search(rf"\b{n}[(.]", text)]
    assert not unused
    assert len(s2dm_loss.__all__) <= 13


def images_of_a_search(num_samples):
    """How many images a search over five solvers and a pipeline's three corrections makes."""
    made = []

    def solver(kept, model, start):
        made.append(len(start))
        return kept * start - 0.1 * model(start, torch.full((len(start),), 500))

    solvers = {str(n): functools.partial(solver, 0.9 + 0.03 * n) for n in range(5)}
    corrections = [one(LINEAR) for one in (SkipGain, EpsilonScaling, ScoreRescaling)]
    data = torch.randn(2000, 12)
    CorrectionSearch(Same(), solvers, data, corrections, num_samples=num_samples).recommend(False)
    return sum(made)


def test_what_a_search_costs():
    pytest.importorskip("diffusers")
    from s2dm_loss.adapters.diffusers import search_pipeline

    usual = inspect.signature(search_pipeline).parameters["num_samples"].default
    made = [images_of_a_search(usual), images_of_a_search(64)]
    for page in (README, (ROOT / "docs" / "correct.md").read_text("utf-8")):
        page = " ".join(page.split())
        said = re.search(r"about ([\d,]+) images\b.*?`num_samples=64` about ([\d,]+)", page)
        assert [int(n.replace(",", "")) for n in said.groups()] == pytest.approx(made, rel=0.05)


def test_its_files_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_install_through_the_constraints_and_ci_runs_one():
    assert all("-c constraints.txt" in command(name) for name in ("digits", "test"))
    assert "from_readme test" in (ROOT / ".ci" / "run").read_text()
    assert command("digits").rstrip().endswith("-m benchmarks.quality run digits")
