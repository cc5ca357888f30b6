"""Settings that all tests share."""

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

# Reproducible runs: a random failure in somebody's CI is no help to them.
settings.register_profile("s2dm", deadline=None, derandomize=True, max_examples=60)
# The tests of test_fuzz.py make five or ten times as many each: 50,000 in all, anew each night.
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
# `nox -s mutation` runs tests once for each mutant: few examples, and no simpler ones looked for.
settings.register_profile(
    "mutation",
    settings.get_profile("s2dm"),
    max_examples=10,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "s2dm"))

# Tests of the benches and of trainers compute the same everywhere; what needs a GPU has its own.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("S2DM_DEVICE", "cpu")

# Tests run side by side (pytest-xdist); one thread each keeps them out of one another's way.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers_and_types():
    """What a test draws without a seed of its own does not depend on which tests ran before it."""
    seed = 240101520  # none that a test sets again, and then draws the same numbers
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    yield
    torch.set_default_dtype(torch.float32)
