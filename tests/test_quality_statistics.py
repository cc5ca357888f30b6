from __future__ import annotations

from typing import Any

import pytest
from scipy import stats

from benchmarks.quality.statistics import Cell, Results, interval

COLUMNS = ["method", "seed", "sampler", "steps", "raw_frechet", "images_frechet", "spread"]


def results(rows: list[list[Any]]) -> Results:
    return Results({"columns": COLUMNS, "rows": rows, "titles": {"plain": "Plain"}})


def test_the_t_interval_is_scipys() -> None:
    values = [3.0, 5.0, 4.0, 9.0, 6.5]
    found = interval(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.mean == pytest.approx(5.5)
    assert found.count == 5
    assert min(values) <= found.boot_low < found.mean < found.boot_high <= max(values)
    assert interval(values) == found


def test_the_sign_is_the_t_intervals() -> None:
    assert interval([1.0, 1.1, 0.9]).sign == 1
    assert interval([-1.0, -1.1, -0.9]).sign == -1
    assert interval([-1.0, 1.0, 0.2]).sign == 0
    assert interval([7.0]).sign == 0  # one seed shows nothing


def test_no_values() -> None:
    with pytest.raises(ValueError, match="values: expected one value per seed, got none"):
        interval([])


def test_improvements_are_paired_by_seed() -> None:
    cell = Cell("ddim", 10)
    found = results(
        [
            ["plain", 0, "ddim", 10, 2.0, 8.0, 1.0],
            ["plain", 1, "ddim", 10, 4.0, 8.0, 1.0],
            ["plain", 2, "ddim", 10, 9.0, 8.0, 1.0],
            ["skip", 0, "ddim", 10, 1.0, 10.0, 1.0],
            ["skip", 1, "ddim", 10, 3.0, None, 1.0],
        ]
    )
    assert found.improvements("skip", cell) == {0: 50.0, 1: 25.0}
    assert found.improvements("skip", cell, "images_frechet") == {0: -25.0}
    assert found.improvements("plain", cell, baseline="skip") == pytest.approx(
        {0: -100.0, 1: -100 / 3}
    )
    assert found.methods == ["plain", "skip"]
    assert found.cells("plain") == [cell]
    assert found.title("plain") == "Plain"


def test_a_mean_over_cells_uses_seeds_that_have_them_all() -> None:
    cells = [Cell("ddim", 10), Cell("ddim", 20)]
    rows = [["plain", s, "ddim", n, 10.0, 10.0, 1.0] for s in range(3) for n in (10, 20)]
    rows += [["skip", 0, "ddim", 10, 9.0, 0, 1.0], ["skip", 0, "ddim", 20, 7.0, 0, 1.0]]
    rows += [["skip", 1, "ddim", 10, 8.0, 0, 1.0], ["skip", 1, "ddim", 20, 8.0, 0, 1.0]]
    rows += [["skip", 2, "ddim", 10, 1.0, 0, 1.0]]
    found = results(rows).improvement("skip", cells)
    assert found is not None
    assert found.count == 2
    assert found.mean == pytest.approx(20.0)
    assert results(rows).improvement("unknown", cells) is None
    assert results(rows).improvement("skip", []) is None


def test_a_feature_network_without_raw_samples() -> None:
    found = results([["plain", 0, "ddim", 10, None, 3.0, 1.0]])
    assert found.primary == "images_frechet"
    assert found.values("plain", Cell("ddim", 10)) == {0: 3.0}
