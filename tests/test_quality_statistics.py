from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import stats

from benchmarks.quality.statistics import (
    Cell,
    Results,
    holm,
    improvement_of_ratios,
    interval,
    p_value,
)

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


def test_ratios_are_averaged_in_logarithms() -> None:
    """Half and double cancel; the interval is the t interval of the logarithms, mapped."""
    cancelled = improvement_of_ratios({0: 1.0, 1: 8.0}, {0: 2.0, 1: 4.0})
    assert cancelled is not None
    assert cancelled.mean == pytest.approx(0, abs=1e-12)
    ours, theirs = {0: 9.0, 1: 7.0, 2: 4.0, 5: 1.0}, {0: 10.0, 1: 10.0, 2: 5.0, 7: 1.0}
    found = improvement_of_ratios(ours, theirs)
    assert found is not None
    assert found.mean == pytest.approx(100 * (1 - (0.9 * 0.7 * 0.8) ** (1 / 3)))
    logs = [math.log(0.9), math.log(0.7), math.log(0.8)]
    wanted = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    ends = [100 * (1 - math.exp(end)) for end in (wanted.high, wanted.low)]
    assert [found.low, found.high] == pytest.approx(ends)
    assert found.low < found.boot_low < found.mean < found.boot_high < found.high
    assert found.count == 3
    assert improvement_of_ratios({0: 1.0}, {1: 1.0}) is None


def test_p_values_are_scipys() -> None:
    values = [0.3, 0.5, -0.1, 0.2]
    assert p_value(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert p_value([0.3]) == p_value([0.0, 0.0]) == 1.0
    assert p_value([-0.3, -0.3]) < 1e-10


def test_holms_p_values_are_those_of_his_example() -> None:
    """By hand: 3 · 0.01, then 2 · 0.03, then the largest so far, and never above 1."""
    assert holm({"b": 0.03, "c": 0.04, "a": 0.01}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


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
