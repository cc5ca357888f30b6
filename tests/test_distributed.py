"""Two processes (gloo, CPU) make the gradients that one makes on the joined batch."""

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.distributed_workers import everything

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    generator = torch.Generator().manual_seed(1)
    x0, noise, skip_noise = torch.randn(3, 8, 1, 6, 6, generator=generator).unbind(0)
    t = torch.tensor([0, 999, 8, 500, 9, 10, 700, 3])
    batch = {"x0": x0, "noise": noise, "skip_noise": skip_noise, "t": t}
    alone = everything(0, 1, batch)
    alone["accelerate"] = alone["epsilon"]
    return alone, run_distributed(everything, tmp_path_factory.mktemp("ranks"), 2, batch)


@pytest.mark.parametrize(
    "kind", ["expected", "fresh", "shared", "epsilon", "v_prediction", "accelerate"]
)
def test_two_processes_are_one_on_the_joined_batch(runs, kind):
    alone, ranks = runs
    for rank in ranks:
        assert rank[kind]["calls"] == 1
        torch.testing.assert_close(rank[kind]["gradients"], alone[kind]["gradients"])
    losses = torch.stack([rank[kind]["loss"] for rank in ranks])
    torch.testing.assert_close(losses.mean(), alone[kind]["loss"])
    assert losses[0] != losses[1]  # each has seen its own part


def test_accelerate_ran_in_two_processes(runs):
    _, ranks = runs
    for rank in ranks:
        assert rank["accelerate"]["wrapper"] == "DistributedDataParallel"
        assert rank["accelerate"]["processes"] == 2
