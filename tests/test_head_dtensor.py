"""The loss of a DTensor, which tensor-parallel training makes, is that of the whole tensor."""

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.head_workers import CASES, losses_in_every_placement
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
