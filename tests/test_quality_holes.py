"""Statistics by hand, and holes of the quality results against the committed JSON."""

import json
import math
from statistics import fmean

import pytest
import torch
from scipy import stats

from benchmarks.quality import evidence_figures, holes
from benchmarks.quality.committed import FOLDER, method_name
from benchmarks.quality.statistics import Cell, Results, change, holm, interval, percent

PRESETS = {"unet": "cifar10-unet", "small": "cifar10-wide"}
PRESETS |= {"eps16": "cifar10-16", "flow16": "cifar10-16-flow"}


def load(run):
    return json.loads((FOLDER / f"{PRESETS.get(run, run)}.json").read_text())


def by_seed(record, method, sampler, steps, name):
    place = record["columns"].index(name)
    rows = [row for row in record["rows"] if (row[0], *row[2:4]) == (method, sampler, steps)]
    return [row[place] for row in sorted(rows, key=lambda row: row[1])]


def wanted(ours, theirs):
    return percent(change(dict(enumerate(ours)), dict(enumerate(theirs))))


@pytest.mark.parametrize("run", ["unet", "small"])
@pytest.mark.parametrize(
    ("words", "method", "sampler", "steps", "measure"),
    [
        ("gain 49", "plain+gain49", "ddim", 10, "frechet"),
        ("gain 49", "plain+gain49", "unipc", 10, "kernel"),
        ("loss 9", "skip9-expected", "ddim", 20, "kernel"),
        ("plain", "plain", "pndm", 10, "frechet"),
    ],
)
def test_a_change_is_over_plain_ddim_in_as_many_steps(run, words, method, sampler, steps, measure):
    record, column = load(run), f"images_{measure}"
    ours = by_seed(record, method, sampler, steps, column)
    theirs = by_seed(record, "plain", "ddim", steps, column)
    assert holes.change(run, words, sampler, steps, measure) == wanted(ours, theirs)
    ratio = math.exp(fmean(math.log(a / b) for a, b in zip(ours, theirs, strict=True)))
    points = holes.points(run, words, sampler, steps, measure)
    assert points == pytest.approx(100 * (1 - ratio))


def test_a_change_over_something_else_and_one_that_was_not_measured():
    places = [(name, "ddim", 10, "images_frechet") for name in ("skip49-expected", "plain+gain49")]
    ours, theirs = (by_seed(load("digits-full"), *place) for place in places)
    over = ("gain 49", None, 10)
    assert holes.change("digits-full", "loss 49", over=over) == wanted(ours, theirs)
    assert holes.verdict("digits-full", "loss 49", over=over) == "no difference shown"
    assert holes.verdict("digits-full", "min-snr-5") == "better"
    assert holes.change("unet", "gain 99") is None
    with pytest.raises(LookupError, match="no committed results of 'nothing'"):
        holes.change("nothing", "gain 49")


def test_dose_distances_facts_and_the_floor():
    names, record = ("plain", "skip49-expected", "plain+gain49"), load("unet")
    plain, loss, gain = (by_seed(record, name, "ddim", 10, "spread")[0] for name in names)
    assert holes.dose("unet", 49) == f"{100 * (loss - plain) / (gain - plain):.0f} %"
    assert holes.fact("unet", "loss share") == "25 %"
    assert load("digits-full")["trainings"]["skip9-expected"]["0"]["loss_share"] == 1
    frechet = by_seed(record, "plain", "ddim", 10, "images_frechet")[0]
    kernel = by_seed(record, "plain", "unipc", 10, "images_kernel")[0]
    assert holes.distance("unet") == f"{frechet:.1f}"
    assert holes.distance("unet", "plain", "unipc", measure="kernel") == f"{1000 * kernel:.1f}"
    assert record["floor"]["images_each"] == record["settings"]["samples"]
    assert holes.times_floor("unet") == f"{frechet / record['floor']['frechet']:.1f}"
    assert holes.fact("unet", "images") == f"{16_000 * 128:,}"
    assert holes.fact("small", "seeds") == "3 seeds"
    with pytest.raises(KeyError):
        holes.fact("unet", "weather")


def test_a_correction_chosen_on_the_other_seeds():
    record = load("small")
    names = sorted({row[0] for row in record["rows"] if row[0].startswith("plain+rescaling")})
    plain = by_seed(record, "plain", "ddim", 10, "images_frechet")
    each = {name: by_seed(record, name, "ddim", 10, "images_frechet") for name in names}
    whole = {name: values for name, values in each.items() if len(values) == 3}
    ours = [min(whole.values(), key=lambda v: sum(v) - v[seed])[seed] for seed in range(3)]
    assert holes.change("small", "rescaling") == wanted(ours, plain)


def test_a_table_says_doses_and_leaves_out_what_nobody_measured():
    rows = [("loss", "loss 9", None), ("none", "gain 7", None), ("UniPC", "plain", "unipc")]
    columns = [("F", "unet", "frechet"), ("small images", "eps16-10k", "frechet")]
    head, _, *lines = holes.table("x", columns, rows).splitlines()
    assert head == "| x | F | small images |"
    change, dose = holes.change("unet", "loss 9"), holes.dose("unet", 9)
    solver = " | ".join(holes.change(run, "plain", "unipc") for run in ("unet", "eps16-10k"))
    assert lines == [f"| loss | {change} (dose {dose}) |  |", f"| UniPC | {solver} |"]


@pytest.mark.parametrize("run", ["eps16", "flow16"])
def test_the_best_pair_is_the_nearest_by_the_kernel_distance(run):
    record = load(run)
    pairs = {(row[0], row[2]) for row in record["rows"] if row[3] == 10 and "plain" in row[0]}
    values = {pair: by_seed(record, *pair, 10, "images_kernel") for pair in pairs}
    value, pair = min((fmean(found), pair) for pair, found in values.items() if len(found) == 2)
    assert (pair[0], pair[1][:5]) == ("plain", "unipc")
    said = f"UniPC with no correction, kernel distance {1000 * value:.1f} thousandths"
    assert holes.best_pair(run, 10) == said


@pytest.mark.parametrize("run", ["unet", "flow16"])
def test_where_a_gain_helps(run):
    record, gain = load(run), "plain+gain0.05" if run == "flow16" else "plain+gain49"
    helped = []
    for sampler, steps in {(row[2], row[3]) for row in record["rows"] if row[0] == gain}:
        cells = [(record, name, sampler, steps) for name in ("plain", gain)]
        plain, ours = (fmean(map(math.log, by_seed(*one, "images_kernel"))) for one in cells)
        if fmean(by_seed(*cells[0], "spread")) < 0.9:
            helped.append(ours < plain)
    assert holes.gains_that_help(0, 0.9, run) == f"{sum(helped)} of {len(helped)}"
    assert len(helped) > 1


@pytest.mark.parametrize("run", ["eps16", "flow16"])
def test_what_a_search_over_pairs_recommends(run):
    kept = [one for one in load(run)["searches"] if len(one.get("samplers", ())) > 1]
    ours, theirs = ([one[f"{what}_kernel"] for one in kept] for what in ("corrected", "plain"))
    found = holes.pair_search(run)
    assert found.change == wanted(ours, theirs)
    assert (found.nearer > 0) == (fmean(map(math.log, ours)) < fmean(map(math.log, theirs)))
    assert all(f"UniPC with {one['recommended']}" in found.pairs for one in kept)
    base = kept[0]["samplers"][0]
    alone = [one for one in load(run)["searches"] if "samplers" not in one]
    said = [one["recommended"] for one in alone if one["sampler"] == base]
    assert holes.recommended(run, base) == " and ".join(dict.fromkeys(said))
    with pytest.raises(ValueError, match="no pairs were searched on unet"):
        holes.pair_search("unet")


def test_spread_of_raw_samples_and_in_an_octave():
    raw = load("eps16")["raw_spreads"]["plain+gain49, ddim-10"]
    assert holes.spread("eps16", "gain 49", raw=True) == f"{fmean(raw.values()):.3f}"
    for run, method, key, steps in (
        ("small", "plain", "ddim-10", 10),
        ("eps16", "gain 49", "plain+gain49, ddim-20", 20),
    ):
        bands = load(run)["band_spreads"]
        values = [octaves[-1] for name, octaves in bands.items() if name.startswith(f"{key}, seed")]
        assert holes.octave(run, method, None, steps, -1) == f"{fmean(values):.2f}"


def test_holms_correction_is_over_the_rows_shown(monkeypatch):
    logs = {"a": [-1.0, -1.01, -0.99], "b": [-0.1, -0.2, 0.0], "c": [-0.5, -0.55, -0.45]}

    def compared(run, method, *where):
        assert where == (None, 10, "kernel")
        ours = {seed: math.exp(log) for seed, log in enumerate(logs[method])}
        return ours, dict.fromkeys(ours, 1.0)

    monkeypatch.setattr(holes, "compared", compared)
    found = holes.together("any", [(name.upper(), name, None) for name in logs])
    assert (found.compared, found.held, found.missed) == (3, "A and C", "B")
    # By hand: t = 0.1 / (0.1 / √3) = √3 with 2 degrees of freedom, p = 1 - √(3/5).
    assert found.p_of_missed == f"{1 - 0.6**0.5:.3f}"
    assert (found.weakest, found.weakest_p) == ("B", found.p_of_missed)


def test_names_of_methods_in_words_and_claims_that_no_longer_hold():
    assert method_name("loss 0.05 + gain 0.1") == "skip0.05-expected+gain0.1"
    assert method_name("gain -49") == "plain+gain-49"
    assert holes.claim(True) == ""
    with pytest.raises(ValueError, match="no longer say"):
        holes.claim(False)


@pytest.mark.parametrize("skip", [9, 49])
def test_the_gap_of_continuous_time_is_computed(skip):
    """From ᾱ by the betas, and by the VP-SDE's own integral."""
    levels = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().cumsum(0)
    n = torch.arange(skip + 1, 1000)

    def integral(t):
        return -(0.1 * t + 19.9 * t**2 / 2)

    times = (n.double() + 1) / 1000
    steps = (levels[n - skip] - levels[n], integral(times - skip / 1000) - integral(times))
    s = [0.99 / (0.99 + 0.01 * torch.expm1(step)) for step in steps]
    gap = 100 * float((s[1] / s[0] - 1).abs().max())
    assert holes.continuous_gap(skip) == f"{gap:.3f} %"


@pytest.mark.parametrize("name", evidence_figures.FIGURES)
def test_figures_are_drawn_from_the_committed_results(name):
    figure = evidence_figures.FIGURES[name]()
    assert figure.axes
    assert all(axes.lines for axes in figure.axes)


COLUMNS = ["method", "seed", "sampler", "steps", "raw_frechet", "images_frechet", "spread"]


def results(rows):
    return Results({"columns": COLUMNS, "rows": rows, "preset": "made"})


def rows_of(values, columns):
    each = [(name, seed, x) for name, row in values.items() for seed, x in enumerate(row)]
    return [[name, seed, "ddim", 10, *columns(x)] for name, seed, x in each]


def test_the_sign_is_the_t_intervals():
    values = [1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [-1.0, 1.0, 0.2], [7.0]  # one seed: nothing
    assert [interval(each).sign for each in values] == [1, -1, 0, 0]
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
    assert percent(found) == f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"
    assert percent(found._replace(low=0.04)) == f"**{found.mean:+.1f} % [+0.0, {ends[1]:+.1f}]**"
    assert (percent(found._replace(seeds=1)), found.seeds) == (f"{found.mean:+.1f} %", 3)
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
    rows = rows_of({"plain": (2.0, 4.0, 9.0)}, lambda raw: (raw, 8.0, 1.0))
    rows += [["plain", 0, "unipc", 10, 9.0, 4.0, 1.0]]
    rows += [["skip", 0, "ddim", 10, 1.0, 10.0, 1.0], ["skip", 1, "ddim", 10, 3.0, None, 1.0]]
    found = results(rows)
    paired = found.change("skip", cell, "raw_frechet")
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
