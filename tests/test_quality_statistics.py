import math

import pytest
from scipy import stats

from benchmarks.quality.statistics import (
    RAW_FRECHET,
    Cell,
    Results,
    change,
    holm,
    interval,
)

COLUMNS = ["method", "seed", "sampler", "steps", "raw_frechet", "images_frechet", "spread"]


def results(rows):
    return Results({"columns": COLUMNS, "rows": rows, "preset": "made"})


def rows_of(values, columns):
    """Rows of DDIM at 10 steps from a value for each method and seed."""
    each = [(name, seed, x) for name, row in values.items() for seed, x in enumerate(row)]
    return [[name, seed, "ddim", 10, *columns(x)] for name, seed, x in each]


def test_the_sign_is_the_t_intervals():
    assert interval([1.0, 1.1, 0.9]).sign == 1
    assert interval([-1.0, -1.1, -0.9]).sign == -1
    assert interval([-1.0, 1.0, 0.2]).sign == 0
    assert interval([7.0]).sign == 0  # one seed shows nothing
    with pytest.raises(ValueError, match="values: expected one value per seed, got none"):
        interval([])


def test_ratios_are_averaged_in_logarithms():
    """Half and double cancel; the interval is the t interval of the logarithms, mapped."""
    cancelled = change({0: 1.0, 1: 8.0}, {0: 2.0, 1: 4.0})
    assert cancelled.mean == pytest.approx(0, abs=1e-12)
    ours, theirs = {0: 9.0, 1: 7.0, 2: 4.0, 5: 1.0}, {0: 10.0, 1: 10.0, 2: 5.0, 7: 1.0}
    found = change(ours, theirs)
    assert found.mean == pytest.approx(100 * (1 - (0.9 * 0.7 * 0.8) ** (1 / 3)))
    logs = [math.log(0.9), math.log(0.7), math.log(0.8)]
    wanted = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    ends = [100 * (1 - math.exp(end)) for end in (wanted.high, wanted.low)]
    assert [found.low, found.high] == pytest.approx(ends)
    assert found.seeds == 3
    assert change({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="distances: expected positive ones"):
        change({0: -0.001}, {0: 0.002})  # kernel distances at the floor have no ratio


def test_holms_p_values_are_those_of_his_example():
    """By hand: 3 · 0.01, then 2 · 0.03, then the largest so far, and never above 1."""
    found = holm({"b": 0.03, "c": 0.04, "a": 0.01})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_changes_are_paired_by_seed():
    cell = Cell("ddim", 10)
    found = results(
        [
            ["plain", 0, "ddim", 10, 2.0, 8.0, 1.0],
            ["plain", 1, "ddim", 10, 4.0, 8.0, 1.0],
            ["plain", 2, "ddim", 10, 9.0, 8.0, 1.0],
            ["plain", 0, "unipc", 10, 9.0, 4.0, 1.0],
            ["skip", 0, "ddim", 10, 1.0, 10.0, 1.0],
            ["skip", 1, "ddim", 10, 3.0, None, 1.0],
        ]
    )
    paired = found.change("skip", cell, RAW_FRECHET)
    assert paired.mean == pytest.approx(100 * (1 - (0.5 * 0.75) ** 0.5))
    eight_bit = found.change("skip", cell)
    assert (eight_bit.mean, eight_bit.seeds) == (pytest.approx(-25.0), 1)
    solver = found.change("plain", Cell("unipc", 10), over=("plain", cell))
    assert solver.mean == pytest.approx(50.0)
    assert found.change("unknown", cell) is None
    assert found.cells("plain") == [cell, Cell("unipc", 10)]
    assert (found.methods, found.base) == (["plain", "skip"], "ddim")
    with pytest.raises(LookupError, match="has no images_frechet of skip"):
        found.mean("skip", Cell("ddim", 20))


def test_a_mean_over_cells_uses_seeds_that_have_them_all():
    cells = [Cell("ddim", 10), Cell("ddim", 20)]
    rows = [["plain", s, "ddim", n, 10.0, 10.0, 1.0] for s in range(3) for n in (10, 20)]
    rows += [["skip", 0, "ddim", 10, 9, 9.0, 1.0], ["skip", 0, "ddim", 20, 9, 7.0, 1.0]]
    rows += [["skip", 1, "ddim", 10, 9, 8.0, 1.0], ["skip", 1, "ddim", 20, 9, 8.0, 1.0]]
    rows += [["skip", 2, "ddim", 10, 9, 1.0, 1.0]]
    found = results(rows).mean_change("skip", cells)
    assert found.seeds == 2
    assert found.mean == pytest.approx(100 * (1 - (0.9 * 0.7 * 0.8 * 0.8) ** 0.25))
    assert results(rows).mean_change("unknown", cells) is None
    assert results(rows).mean_change("skip", []) is None


def test_a_choice_is_made_on_the_other_seeds():
    cell = Cell("ddim", 10)
    distances = {"a": (1.0, 9.0, 3.0), "b": (6.0, 1.0, 2.0), "c": (0.1, 0.1)}
    rows = rows_of(distances, lambda d: (0.0, d, 1.0))
    # Without seed 0: a 6, b 1.5; without 1: a 2, b 4; without 2: a 5, b 3.5. c lacks a seed.
    assert results(rows).chosen_elsewhere(["a", "b", "c"], cell) == {0: "b", 1: "a", 2: "b"}
    assert results(rows[:1]).chosen_elsewhere(["a"], cell) == {}


def test_the_dose_is_the_share_of_the_way_to_the_gain():
    spreads = {"plain": (0.8, 0.9), "gain": (0.9, 0.95), "loss": (0.87, 0.91)}
    found = results(rows_of(spreads, lambda x: (0.0, 1.0, x)))
    assert found.dose("loss", "gain", Cell("ddim", 10)).mean == pytest.approx((0.7 + 0.2) / 2)
    assert found.dose("loss", "none", Cell("ddim", 10)) is None


def test_the_floor_is_of_as_many_images_as_there_are_samples():
    """Two sets of 898 are 0.5 apart, so 4,096 and 1,796 are 0.5 (1/4096 + 1/1796) / (2/898)."""
    found = results([["plain", 0, "ddim", 10, 0.0, 0.2, 1.0]])
    found.record |= {"settings": {"samples": 4096}, "floor": {"frechet": 0.5, "images_each": 898}}
    floor = 0.5 * (1 / 4096 + 1 / 1796) / (2 / 898)
    assert found.floor == pytest.approx(floor)
    assert found.at_floor("plain", Cell("ddim", 10)) == (1.25 * floor > 0.2)
    assert not found.at_floor("plain", Cell("ddim", 10), "spread")
