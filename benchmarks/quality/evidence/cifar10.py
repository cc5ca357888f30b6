"""`evidence_cifar10.md`: real photographs, the protocol first."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.pages.tables import MISSING
from benchmarks.quality.evidence.records import Evidence

PRESET = "cifar10-tiny"

PROTOCOL = """\
Written down, and committed with the preset, before the first sample was drawn:

- **Question**: by how much does the loss change the samples of a network trained on CIFAR10, at the
  paper's default k = 9 and at k = 49; does its gain on the plain network do the same without
  training; what do the other corrections with one number do, on both sides of none; and what does a
  better solver do at the same number of network calls?
- **Primary measure**: samples as 8-bit images, Fréchet distance of ImageNet features to the 10,000
  *test* images, DDIM at 10 steps. Beside it the kernel distance (unbiased) of the same features,
  DDIM at 20 steps, DEIS and PNDM.
- **The floor**: as many training images as there are samples, against the test images.
- **Losses** other than the plain one branch off the plain run's state at 75 % of its steps, with
  the same images, timesteps and noise to the end, where the learning rate has fallen to zero.
- **Soundness of the plain network**: the spread of its samples with 50 steps within 3 % of the
  data's, and the best gain of the mean colour, E[ε ε̂] / E[ε̂²], near 1 at late times. If it is not
  sound, the results say so and stand as those of a network that has not learned enough; its younger
  selves at 25 and 50 % show whether an effect goes away with training.
- **Choices**: the strength of a correction is chosen on one seed and reported on the other.
- **Cut first, if time runs out**: cells, in the order of the preset from its end.\
"""


def cifar10_page(evidence: Evidence) -> Iterable[str]:
    """Yield the parts of the page."""
    results = evidence.results(PRESET)
    if results is None:
        yield f"CIFAR10, preset `{PRESET}`: {MISSING}."
    yield "## Protocol"
    yield PROTOCOL
