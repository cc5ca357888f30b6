"""docs/adapters/flow.md and robotics.md: their patches on the trainers' own losses."""

import pytest

from s2dm_loss.testing import check_swap
from tests.helpers.patches import patched
from tests.helpers.trainers_of_today import CASES, FLOW_MATCHING, TORCHCFM, source_of


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_patched_trainer(case):
    """At τ = 1 the trainer's own value and gradient; below it, finite and near at every sample."""
    plain = source_of(*case.file)
    # The libraries have no loop of their own to patch: the page's stands for it.
    swapped = plain if case.file in (TORCHCFM, FLOW_MATCHING) else patched(*case.file, plain)

    def loss(model, tau=None):
        source = plain if tau is None else swapped
        return case.loss(source, model, {}, tau, **case.options)

    report = check_swap(loss, loss, rtol=1e-4)
    assert report.calls == 1
