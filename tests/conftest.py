"""Settings that all tests share."""

import torch
from hypothesis import settings

# Reproducible runs: a random failure in somebody's CI is no help to them.
settings.register_profile("s2dm", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("s2dm")

# Tests run side by side (pytest-xdist); one thread each keeps them out of one another's way.
torch.set_num_threads(1)
