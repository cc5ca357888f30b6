"""`evidence_method.md`: how it was measured, and every command."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import wrap

import numpy as np

from benchmarks.pages.tables import MISSING, counted
from benchmarks.quality.data import LOCAL
from benchmarks.quality.evidence.records import IMAGES, RAW, Evidence
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.settings import in_words
from benchmarks.quality.statistics import Cell, Results

COLUMNS = 80  # of a block on the page


def how_measured(evidence: Evidence) -> Iterable[str]:
    """Yield the parts of the page."""
    yield (
        "On the digits, where nothing else is said. CIFAR10 has [a protocol of its own]"
        "(evidence_cifar10.md#protocol)."
    )
    results = evidence.full
    if results is None:
        yield f"The grid on the digits: {MISSING}."
    else:
        yield from _setting(results)
        yield from _two_measures(results)
        yield from _floor(results)
    yield from _commands()


def _setting(results: Results) -> Iterable[str]:
    record = results.record
    settings, floor = record["settings"], record["floor"]
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v and k != "commit")
    yield "## The setting"
    yield f"""\
- **Data**: scikit-learn's 1,797 handwritten digits, 8 x 8.
- **Network**: {in_words(settings["network"])}.
- **Training**: {in_words(settings["budget"])}. The same for every method.
- **Schedule**: {settings["schedule"]}.
- **Common random numbers**: for each seed, every objective has the same initialisation, the same
  images in the same order, the same timesteps and the same noise; what an objective draws besides
  (the fresh ζ, DDPM-IP's ξ, SA-DPM's second noise) comes from a stream of its own. Sampling starts
  from the same noise for every method, sampler and number of steps. One reduction, the mean.
- **Samplers**: diffusers', all with `leading` timestep spacing and no clipping inside the sampler;
  PNDM without its Runge-Kutta warm-up.
- **Distances**: torchmetrics' Fréchet distance and kernel distance between
  {settings["samples"]:,} samples and the data, on {floor["features"]},
  scaled to unit mean variance.
- **Intervals**: the relative improvement within each seed, then Student's t over the seeds. Beside
  it, where shown, a percentile bootstrap over the seeds, which is too narrow with five of them.
  They cover what another seed would change, and not what other data or another network would.
- **Versions**: {versions}."""


def _two_measures(results: Results) -> Iterable[str]:
    images, raw = (
        np.mean(list(results.values("plain", Cell("deis", 50), measure).values()))
        for measure in (IMAGES, RAW)
    )
    yield "## 8-bit and raw"
    yield (
        "*8-bit*: samples limited to the image range and rounded to 256 levels, as a file holds "
        "them. This is what most people deliver, and what the paper's FID was measured on. *Raw*: "
        "samples as the sampler returns them, which shows the mechanism. On these digits the two "
        "differ much, since more than half of all pixels are at the very end of the range: DEIS at "
        f"50 steps, plain training, is at {images:.3f} in 8 bits and {raw:.3f} raw, because the "
        "limit turns the small noise around black into a grey veil and cuts strokes that "
        "overshoot. Both are given everywhere; where they disagree, the improvement depends on "
        "what is done with the samples, and we say so."
    )


def _floor(results: Results) -> Iterable[str]:
    floor, samples = results.record["floor"], results.record["settings"]["samples"]
    reference = floor.get("reference", floor["images_each"])
    yield "## The floor"
    yield (
        f"Real images are not at distance 0 from real images: {floor['images_each']:,} and "
        f"{reference:,} of them, chosen at random, are {floor['frechet']:.3f} apart (mean over "
        f"{counted(floor.get('repeats', 1), 'choice')}). That is the Fréchet distance's bias of "
        "sample size, proportional to 1/n + 1/m, so "
        f"{samples:,} samples cannot be expected below about {results.floor:.2f}. Where plain "
        "training and a method both are within a quarter of it, no percentage is quoted. The "
        "kernel distance has no such bias, and is 0 in the mean for real images."
    )


def _commands() -> Iterable[str]:
    lines = []
    for name, preset in PRESETS.items():
        local = " --data FOLDER" if preset.data in LOCAL else ""
        command = f"python -m benchmarks.quality run {name}{local}"
        about = f"{preset.about[0].upper()}{preset.about[1:]}."
        lines += [*wrap(f"# {about}", COLUMNS, subsequent_indent="# "), command]
    listing = "\n".join(lines)
    yield "## Every command"
    yield f"""\
```sh
pip install -e ".[quality]"
# And for CIFAR10's smaller networks .[imagenet], for cifar10 and celeba
# .[inception], for patches .[patches].
{listing}
# Its results, into the repository.
python -m benchmarks.quality keep PRESET
# These pages.
python -m benchmarks.quality page
```

`--dry-run` says what a run would cost, `--workers` shares it among processes, and a run that was
stopped or killed goes on where it was when it is started again. On several GPUs:
`torchrun --nproc_per_node 4 -m benchmarks.quality run cifar10 --data FOLDER`."""
