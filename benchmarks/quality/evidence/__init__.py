"""The evidence pages, written from the committed results and from nothing else.

Every number, every "better" and every "no difference" comes out of the records; the prose only says
what was asked.  A method of a preset that has no results is "not measured yet".

=================  ==============================================================
`records`          the committed results, and which methods they hold
`front`            the table that the README and `evidence.md` begin with
`conclusions`      `evidence.md`: conclusions, advice, one table
`results`          `evidence_results.md`: every table
`questions`        the six questions, a section of that page
`cifar10`          `evidence_cifar10.md`: photographs, and the protocol
`cifar10_answers`  what is said of CIFAR10, computed
`cifar10_more`     its parts on other samplers, more samples, Min-SNR, many steps
`corrections`      `evidence_corrections.md`: corrections of a trained network
`method`           `evidence_method.md`: how it was measured
`figures`          the figures
=================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.pages.tables import MISSING, write_page
from benchmarks.quality.evidence.cifar10 import cifar10_page
from benchmarks.quality.evidence.conclusions import conclusions
from benchmarks.quality.evidence.corrections import corrections_page
from benchmarks.quality.evidence.method import how_measured
from benchmarks.quality.evidence.records import Evidence, Sources
from benchmarks.quality.evidence.results import results_page

COMMAND = "`python -m benchmarks.quality page` from benchmarks/results; its words are in"


def write_pages(docs: Path, sources: Sources | None = None) -> list[Path]:
    """Write the pages and their figures; return the pages.

    Args:
        docs: Folder of the site's pages.
        sources: Where the results lie.
    """
    evidence = Evidence(sources or Sources(), docs / "assets" / "evidence")
    pages = {
        "evidence.md": ("Evidence", "quality/evidence/conclusions.py", conclusions(evidence)),
        "evidence_results.md": (
            "Every result",
            "quality/evidence/results.py",
            results_page(evidence),
        ),
        "evidence_cifar10.md": ("CIFAR10", "quality/evidence/cifar10.py", cifar10_page(evidence)),
        "evidence_corrections.md": (
            "Corrections compared",
            "quality/evidence/corrections.py",
            corrections_page(evidence),
        ),
        "evidence_method.md": (
            "How it was measured",
            "quality/evidence/method.py",
            how_measured(evidence),
        ),
        "evidence_lab.md": ("The exact lab", "lab/report.py", _lab(evidence)),
    }
    for name, (title, source, parts) in pages.items():
        write_page(docs / name, title, f"{COMMAND} benchmarks/{source}", parts)
    return [docs / name for name in pages]


def _lab(evidence: Evidence) -> Iterable[str]:
    yield (
        "What can be known without training: models whose E[ε | x_t] is a formula, in which the "
        "only error is the sampler's or one that was put there on purpose."
    )
    fragments = [path.read_text(encoding="utf-8") for path in evidence.fragments]
    yield from fragments or [f"{MISSING.capitalize()}."]
