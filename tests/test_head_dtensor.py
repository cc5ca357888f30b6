"""The loss of a DTensor, which tensor-parallel training makes, is that of the whole tensor."""

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.head_workers import (
    CASES,
    WAYS,
    losses_in_every_placement,
    losses_of_placed_times,
)
from tests.strategies import normal

pytest.importorskip("torch.distributed.tensor")  # torch 2.5


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_placement_is_the_whole(world_size, tmp_path):
    shape = (5, 3, 4)  # neither the batch nor the channels are even in two
    batch = {
        "eps_hat": normal(*shape, seed=0),
        "noise": normal(*shape, seed=1),
        "weights": normal(shape[0], seed=2).abs(),
        "t": torch.tensor([3, 8, 9, 500, 999]),
    }
    ranks = run_distributed(losses_in_every_placement, tmp_path, batch, world_size=world_size)
    for results in ranks:
        assert len(results) == 4 * len(CASES)
        for placement, case in results:
            torch.testing.assert_close(results[placement, case], results["whole", case])


def test_times_that_are_a_dtensor_are_those_of_the_whole_batch(tmp_path):
    batch = {
        "x": normal(5, 3, 4, seed=0),
        "y": normal(5, 3, 4, seed=1),
        "t": torch.tensor([3, 8, 9, 500, 999]),
        "time": torch.tensor([0.01, 0.04, 0.06, 0.5, 0.99], dtype=torch.float64),
    }
    for results in run_distributed(losses_of_placed_times, tmp_path, batch):
        assert len(results) == 9 * len(WAYS)
        for (way, times, data), loss in results.items():
            expected = results[way, "plain", "plain"]
            torch.testing.assert_close(loss, expected, msg=f"{way}, t {times}, data {data}")
