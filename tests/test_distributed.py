"""Several processes (gloo, CPU) make what one makes on the joined batch."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from s2dm_loss.monitor import LossByNoise, validation_loss
from tests.helpers import distributed_workers as work
from tests.helpers.distributed import run_distributed
from tests.strategies import ESTIMATORS, LINEAR
from tests.test_docs_blocks import FENCE, ROOT

for needed in ("accelerate", "torch.distributed.tensor"):  # torch 2.5
    pytest.importorskip(needed)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder, count = tmp_path_factory.mktemp("ranks"), len(work.SIZES)
    return run_distributed(work.everything, folder, world_size=count)


@pytest.mark.parametrize("how", [*ESTIMATORS, *map(", ".join, product(work.WRAPPERS, work.HOW))])
def test_every_wrapper_is_one_process_on_the_joined_batch(ranks, how):
    """With one call of the model a step, or for each part of an accumulated one."""
    count = sum(work.SIZES) if "uneven" in how else len(work.SIZES) * min(work.SIZES)
    for rank in ranks:
        torch.testing.assert_close(rank["steps"][how], work.alone(count, how))


def test_a_dtensor_in_every_placement_is_the_whole_tensor(ranks):
    for rank in ranks:
        assert rank["placed"].keys() == {*range(len(work.CASES)), *work.WAYS}
        for case, by_placement in rank["placed"].items():
            expected = next(iter(by_placement.values()))  # the plain one
            for placement, found in by_placement.items():
                torch.testing.assert_close(found, expected, msg=f"{case} {placement}")


def test_the_losses_by_noise_add_up_to_those_of_one_process(ranks):
    seen = torch.arange(60) % 3 < 2
    alone = LossByNoise(LINEAR)
    alone.update(work.TIMES[seen], work.BY_TIME[seen])
    first = alone.compute()
    alone.update(work.TIMES, work.BY_TIME)
    for rank in ranks:
        found = rank["by noise"]
        assert found["first"] == pytest.approx(first)
        assert found["second"] == pytest.approx(alone.compute())
        assert found["state"]["sums"][0].sum() == seen.sum()


def test_a_validation_is_that_of_one_process(ranks):
    alone = validation_loss(work.small_model, [work.X0], LINEAR, skip_set=49)
    expected = {"index": alone.index, **alone.losses}
    for rank in ranks:
        for found in rank["validated"]:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.timeout(1300)
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_recipes_of_the_page_run_as_written(tmp_path, launcher):
    page = (ROOT / "docs" / "adapters" / "write_your_own.md").read_text(encoding="utf-8")
    blocks = {match["info"]: match["code"] for match in FENCE.finditer(page)}
    (tmp_path / "train.py").write_text(blocks['python title="train.py"'], encoding="utf-8")
    lines = blocks['sh title="shell"'].splitlines()
    (command,) = (line.split() for line in lines if line.startswith(launcher))
    command[0] = str(Path(sys.executable).with_name(command[0]))
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": 240}
    options |= {"capture_output": True, "text": True}
    for _ in range(5):
        done = subprocess.run(command, check=False, **options)  # noqa: S603 - a command of ours
        # A thread of torch's own now and then aborts a process that is done and about to end.
        if "exitcode: -6" not in done.stderr and "SIGABRT" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss ") == 1  # the first process alone prints
