"""Numbers that the real trainers gave: the doubles give them too, and so does our loss at τ = 1."""

import re

import pytest
import torch

from tests.helpers.patches import PAGES, TRAINERS
from tests.helpers.records import DOUBLED, of_today, ours, ratios, read, summary, table
from tests.helpers.trainers_of_today import CASES

RECORDS = read()
ROW = re.compile(r"^\| ([\w-]+) \| (\w{7}) \| (\d+) \| ([\d.]+) to ([\d.]+) \|$", re.M)
TABLES = {
    "flow.md": [
        *("SiT", "REPA", "conditional-flow-matching", "flow_matching", "musubi-tuner"),
        *("ai-toolkit", "SimpleTuner", "sd-scripts"),
    ],
    "robotics.md": ["lerobot", "diffusion_policy"],
}
STEPS = [(trainer, name) for trainer in DOUBLED for name in RECORDS[trainer]["steps"]]


def compare(found, recorded, rtol):
    assert found.keys() == recorded.keys()
    for name, values in recorded.items():
        ours, wanted = (torch.tensor(x, dtype=torch.float64) for x in (found[name], values))
        scale = wanted.abs().max().item()
        torch.testing.assert_close(
            ours, wanted, rtol=rtol, atol=rtol * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_every_trainer_is_on_record_at_its_commit():
    assert set(RECORDS) == set(DOUBLED) | {case.file[0] for case in CASES}
    for trainer, record in RECORDS.items():
        assert (record["repository"], record["commit"]) == TRAINERS[trainer][:2]
    assert {case.name for case in CASES} == {
        name for record in RECORDS.values() for name in record.get("losses", {})
    }


@pytest.mark.parametrize(("trainer", "name"), STEPS)
@pytest.mark.parametrize("which", [0, 1], ids=["double", "real"])
def test_a_step_is_the_recorded_one(trainer, name, which):
    """The double's, and, where the trainer is at hand, that of its own code."""
    cases, packages = DOUBLED[trainer]
    runs = dict(cases(packages[which][1]()))
    assert runs.keys() == RECORDS[trainer]["steps"].keys()
    # A double rounds its tables at another place than the trainer does.
    compare(summary(runs[name]), RECORDS[trainer]["steps"][name], 2e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_loss_of_today_is_the_recorded_one(case):
    compare(of_today(case), RECORDS[case.file[0]]["losses"][case.name], 1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_our_loss_on_a_trainers_numbers(case):
    """At τ = 1 its value and gradient; below it, finite, near, and not the same."""
    record = RECORDS[case.file[0]]["losses"][case.name]
    loss, gradient = ours(case, 1.0)
    assert loss == pytest.approx(record["loss"], rel=1e-5)
    wanted = torch.tensor(record["gradient"]).reshape(record["shape"])
    scale = wanted.abs().max().item()
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * scale)
    ratio = ratios(case)
    assert ((ratio > 0.9) & (ratio < 1.6)).all(), ratio
    assert not torch.equal(ours(case, 0.99)[1], gradient)


@pytest.mark.parametrize("page", TABLES)
def test_the_table_of_a_page(page):
    text = (PAGES / page).read_text(encoding="utf-8")
    rows = {match[1]: match.groups() for match in ROW.finditer(text)}
    for trainer, commit, losses, least, most in table(TABLES[page]):
        _, *said = rows.pop(trainer)
        assert said[:2] == [commit, str(losses)]
        assert [float(value) for value in said[2:]] == pytest.approx([least, most], abs=2e-3)
    assert not rows
