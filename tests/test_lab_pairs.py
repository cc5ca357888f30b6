"""The study of pairs: its judge is exact, and it reports how far a search is from the best."""

import pytest
import torch

from benchmarks.lab import pairs
from benchmarks.lab.linear import gains, output_variances
from s2dm_loss.sampling import EpsilonScaling, SkipGain, StartScaling


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_the_judge_is_exact_on_a_gaussian(name):
    judge = pairs.Judge(pairs.CASES["Gaussian, 10 steps"])
    for correction, strength in (
        (SkipGain(pairs.SCHEDULE), 99),
        (EpsilonScaling(pairs.SCHEDULE), 1.02),
        (StartScaling(), 1.1),
    ):
        start = isinstance(correction, StartScaling)
        table = gains([0]) if start else correction.scale(torch.arange(1000), strength)[None]
        outputs = output_variances(pairs.VARIANCES, table, name, 10)[0]
        outputs = outputs * strength**2 if start else outputs
        expected = float((outputs.sqrt() - pairs.VARIANCES.sqrt()).square().sum())
        assert judge(name, correction, strength) == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_study(monkeypatch):
    monkeypatch.setattr(pairs, "SAMPLERS", ("ddim", "pndm"))
    monkeypatch.setattr(pairs, "HELD_OUT", 1024)
    monkeypatch.setattr(pairs, "NUM_SAMPLES", 512)
    found = pairs.study(pairs.CASES["Gaussian, 10 steps"], repeats=2)
    assert found["best pair"][0].startswith("PNDM")
    assert found["best with DDIM"][0].startswith("DDIM")
    for rows in found["searches"].values():
        assert len(rows) == 2
        assert all(-0.01 <= row["left"] < 0.3 for row in rows)
    assert found["cost"]["several"] <= 2 * found["cost"]["one"]
