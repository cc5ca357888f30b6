"""Several processes (gloo, CPU) make the gradients that one makes on the joined batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.distributed_workers import LOSSES, WRAPPERS, alone, everything

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")

WRAPPED = [
    f"{wrapper}, {how}"
    for wrapper in WRAPPERS
    for how in ("outside", "inside", "accumulated", "uneven")
]
SIZES = {2: [4, 3], 4: [2, 2, 2, 3]}


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size} processes")
def runs(request, tmp_path_factory):
    sizes = SIZES[request.param]
    generator = torch.Generator().manual_seed(2)
    x0, noise, xi = torch.randn(3, sum(sizes), 1, 6, 6, generator=generator).unbind(0)
    # The first process has times below the skip alone.
    t = torch.tensor([0, 8, 3, 5, 999, 100, 500, 9, 700])[: sum(sizes)]
    batch = {"x0": x0, "noise": noise, "skip_noise": xi, "t": t}
    folder = tmp_path_factory.mktemp("ranks")
    ranks = run_distributed(everything, folder, batch, sizes, world_size=request.param)
    return batch, sizes, ranks


@pytest.mark.parametrize("how", [*LOSSES, *WRAPPED, "accelerate"])
def test_every_wrapper_is_one_process_on_the_joined_batch(runs, how):
    """With one call of the model a step, or for each part of an accumulated one."""
    batch, sizes, ranks = runs
    count = sum(sizes) if "uneven" in how else len(sizes) * min(sizes)
    for rank in ranks:
        torch.testing.assert_close(rank[how], alone(batch, count, how))


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
            timeout=60,
            check=False,
        )
        # A thread of torch's own now and then aborts a process that is done and about to end.
        if "exitcode: -6" not in done.stderr and "SIGABRT" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss ") == 1  # the first process alone prints
