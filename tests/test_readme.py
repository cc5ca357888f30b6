"""What the README says that no other test checks, and its commands, which are those of CI."""

import functools
import inspect
import re
from unittest.mock import Mock

import pytest
import torch

from s2dm_loss.sampling import CorrectionSearch, EpsilonScaling, ScoreRescaling, SkipGain
from tests.helpers.commands import ROOT
from tests.strategies import LINEAR, Same

README = (ROOT / "README.md").read_text(encoding="utf-8")


def command(name):
    (found,) = re.findall(rf"^<!-- command: {name} -->\n```sh\n(.*?)^```$", README, re.M | re.S)
    return found


def images_of_a_search(num_samples):
    """How many images a search over five solvers and a pipeline's three corrections announces."""
    solver = Mock(side_effect=lambda kept, model, x: kept * x - 0.1 * model(x, 500))
    solvers = {str(n): functools.partial(solver, 0.9 + 0.03 * n) for n in range(5)}
    corrections = [one(LINEAR) for one in (SkipGain, EpsilonScaling, ScoreRescaling)]
    data = torch.randn(2000, 12)
    search = CorrectionSearch(Same(), solvers, data, corrections, num_samples=num_samples)
    announced = search.recommend(False).cost.samples
    made = sum(len(call.args[2]) for call in solver.call_args_list)
    assert announced / 2 < made <= announced
    return announced


def test_what_a_search_costs():
    pytest.importorskip("diffusers")
    from s2dm_loss.adapters.diffusers import search_pipeline

    usual = inspect.signature(search_pipeline).parameters["num_samples"].default
    announced = [images_of_a_search(usual), images_of_a_search(64)]
    for page in (README, (ROOT / "docs" / "correct.md").read_text("utf-8")):
        page = " ".join(page.split())
        said = re.search(r"at most ([\d,]+) images\b.*?`num_samples=64` at most ([\d,]+)", page)
        assert [int(n.replace(",", "")) for n in said.groups()] == pytest.approx(
            announced, rel=0.01
        )


def test_its_files_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_install_through_the_constraints_and_ci_runs_one():
    assert all("-c constraints.txt" in command(name) for name in ("digits", "test"))
    assert "from_readme test" in (ROOT / ".ci" / "run").read_text()
    assert command("digits").rstrip().endswith("-m benchmarks.quality run digits")
