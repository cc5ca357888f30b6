"""Several processes (gloo, CPU) make what one makes on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2dm_loss.monitor import LossByNoise, validation_loss
from tests.helpers.distributed import run_distributed
from tests.helpers.distributed_workers import (
    CASES,
    HOW,
    LOSSES,
    WAYS,
    WRAPPERS,
    alone,
    everything,
    small_model,
)
from tests.strategies import LINEAR, normal, normals, timesteps

for needed in ("accelerate", "diffusers", "torch.distributed.tensor"):  # torch 2.5
    pytest.importorskip(needed)
pytestmark = pytest.mark.slow

SIZES = [4, 2, 3]
X0, NOISE, XI = normals(3, sum(SIZES), 1, 6, 6, dtype=torch.float32)
# The first process has times below the skip alone.
T = torch.tensor([0, 8, 3, 5, 999, 100, 500, 9, 700])
BATCH = {"x0": X0, "noise": NOISE, "skip_noise": XI, "t": T}
OF_HEAD = {
    **{name: normal(5, 7, 3, seed=i) for i, name in enumerate("xy")},  # neither axis even in three
    "weights": normal(5, seed=2).abs(),
    "t": torch.tensor([3, 8, 9, 500, 999]),
    "time": torch.tensor([0.01, 0.04, 0.06, 0.5, 0.99], dtype=torch.float64),
}
TIMES, BY_TIME = timesteps(1000, 60, 0), normal(60, seed=3).abs()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    arguments = BATCH, SIZES, OF_HEAD, TIMES, BY_TIME
    return run_distributed(
        everything, tmp_path_factory.mktemp("ranks"), *arguments, world_size=len(SIZES)
    )


@pytest.mark.parametrize(
    "how", [*LOSSES, *(f"{wrapper}, {how}" for wrapper in WRAPPERS for how in HOW), "accelerate"]
)
def test_every_wrapper_is_one_process_on_the_joined_batch(ranks, how):
    """With one call of the model a step, or for each part of an accumulated one."""
    count = sum(SIZES) if "uneven" in how else len(SIZES) * min(SIZES)
    for rank in ranks:
        torch.testing.assert_close(rank["steps"][how], alone(BATCH, count, how))


def test_a_dtensor_in_every_placement_is_the_whole_tensor(ranks):
    for rank in ranks:
        placed = rank["placed"]
        assert len(placed) == 4 * len(CASES)
        for (placement, case), found in placed.items():
            expected = placed["plain", case]
            torch.testing.assert_close(tuple(found), expected, msg=f"{placement} {case}")


def test_times_that_are_a_dtensor_are_those_of_the_whole_batch(ranks):
    for rank in ranks:
        results = rank["times"]
        assert len(results) == 9 * len(WAYS)
        for (way, times, data), loss in results.items():
            expected = results[way, "plain", "plain"]
            torch.testing.assert_close(loss, expected, msg=f"{way}, t {times}, data {data}")


def test_the_losses_by_noise_add_up_to_those_of_one_process(ranks):
    seen = torch.arange(60) % 3 < 2
    alone = LossByNoise(LINEAR)
    alone.update(TIMES[seen], BY_TIME[seen])
    first = alone.compute()
    alone.update(TIMES, BY_TIME)
    for rank in ranks:
        found = rank["by noise"]
        assert found["first"] == pytest.approx(first)
        assert found["second"] == pytest.approx(alone.compute())
        assert found["state"]["sums"][0].sum() == seen.sum()


def test_a_validation_is_that_of_one_process(ranks):
    alone = validation_loss(small_model, [X0], LINEAR, skip_set=49)
    expected = {"index": alone.index, **alone.losses}
    for rank in ranks:
        for found in rank["validated"]:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def page_block(title: str) -> str:
    """The fenced block under a title of the page for a loop of one's own."""
    page = Path(__file__).parents[1] / "docs" / "adapters" / "write_your_own.md"
    text = page.read_text(encoding="utf-8")
    return text.partition(f'title="{title}"\n')[2].partition("\n```")[0]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_recipes_of_the_page_run_as_written(tmp_path, launcher):
    (tmp_path / "train.py").write_text(page_block("train.py"), encoding="utf-8")
    command = next(
        line for line in page_block("shell").splitlines() if line.startswith(launcher)
    ).split()
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for _ in range(5):
        done = subprocess.run(  # noqa: S603 - a command of ours
            [str(programs / command[0]), *command[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        # A thread of torch's own now and then aborts a process that is done and about to end.
        if "exitcode: -6" not in done.stderr and "SIGABRT" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss ") == 1  # the first process alone prints
