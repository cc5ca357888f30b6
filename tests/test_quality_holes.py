"""Holes of the quality results against numbers computed here from the committed JSON."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from benchmarks.quality import evidence_figures, holes
from benchmarks.quality.committed import method_name, records

FOLDER = Path(__file__).parents[1] / "benchmarks/results/quality"
T_975 = {2: 12.706, 3: 4.303, 5: 2.776}
"""Student's, by seeds, as tables print it."""


def load(preset):
    return json.loads((FOLDER / f"{preset}.json").read_text())


def by_seed(record, method, sampler, steps, name):
    place = record["columns"].index(name)
    rows = [row for row in record["rows"] if (row[0], *row[2:4]) == (method, sampler, steps)]
    return [row[place] for row in sorted(rows, key=lambda row: row[1])]


def wanted(ours, theirs):
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    mean = 100 * (1 - math.exp(fmean(logs)))
    if len(logs) == 1:
        return f"{mean:+.1f} %"
    half = T_975[len(logs)] * stdev(logs) / len(logs) ** 0.5
    low, high = (100 * (1 - math.exp(fmean(logs) + sign * half)) for sign in (1, -1))
    text = f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


@pytest.mark.parametrize(("run", "preset"), [("unet", "cifar10-unet"), ("small", "cifar10-wide")])
@pytest.mark.parametrize(
    ("words", "method", "sampler", "steps"),
    [
        ("gain 49", "plain+gain49", "ddim", 10),
        ("gain 49", "plain+gain49", "unipc", 10),
        ("loss 9", "skip9-expected", "ddim", 20),
        ("plain", "plain", "pndm", 10),
    ],
)
@pytest.mark.parametrize("measure", ["frechet", "kernel"])
def test_a_change_is_over_plain_ddim_in_as_many_steps(
    run, preset, words, method, sampler, steps, measure
):
    record, column = load(preset), f"images_{measure}"
    ours = by_seed(record, method, sampler, steps, column)
    theirs = by_seed(record, "plain", "ddim", steps, column)
    assert holes.change(run, words, sampler, steps, measure) == wanted(ours, theirs)
    points = holes.points(run, words, sampler, steps, measure)
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    assert points == pytest.approx(100 * (1 - math.exp(fmean(logs))))


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


def test_the_dose_of_a_loss_is_by_its_spread():
    names = ("plain", "skip49-expected", "plain+gain49")
    record = load("cifar10-unet")
    plain, loss, gain = (by_seed(record, name, "ddim", 10, "spread")[0] for name in names)
    assert holes.dose("unet", 49) == f"{100 * (loss - plain) / (gain - plain):.0f} %"
    assert holes.fact("unet", "loss share") == "25 %"
    assert load("digits-full")["trainings"]["skip9-expected"]["0"]["loss_share"] == 1


def test_distances_facts_and_the_floor():
    record = load("cifar10-unet")
    frechet = by_seed(record, "plain", "ddim", 10, "images_frechet")[0]
    kernel = by_seed(record, "plain", "unipc", 10, "images_kernel")[0]
    assert holes.distance("unet") == f"{frechet:.1f}"
    assert holes.distance("unet", "plain", "unipc", measure="kernel") == f"{1000 * kernel:.1f}"
    # As many samples as the floor was measured with.
    assert record["floor"]["images_each"] == record["settings"]["samples"]
    assert holes.times_floor("unet") == f"{frechet / record['floor']['frechet']:.1f}"
    assert holes.fact("unet", "images") == f"{16_000 * 128:,}"
    assert holes.fact("small", "seeds") == "3 seeds"
    with pytest.raises(KeyError):
        holes.fact("unet", "weather")


def test_a_correction_chosen_on_the_other_seeds():
    record = load("cifar10-wide")
    names = sorted({row[0] for row in record["rows"] if row[0].startswith("plain+rescaling")})
    plain = by_seed(record, "plain", "ddim", 10, "images_frechet")
    each = {name: by_seed(record, name, "ddim", 10, "images_frechet") for name in names}
    whole = {name: values for name, values in each.items() if len(values) == 3}
    ours = []
    for seed in range(3):
        others = {name: sum(values) - values[seed] for name, values in whole.items()}
        ours.append(whole[min(others, key=others.__getitem__)][seed])
    assert holes.change("small", "rescaling") == wanted(ours, plain)


def test_a_table_says_doses_and_leaves_out_what_nobody_measured():
    rows = [("loss", "loss 9", None), ("none", "gain 7", None), ("UniPC", "plain", "unipc")]
    columns = [("F", "unet", "frechet"), ("small images", "eps16-10k", "frechet")]
    head, _, *lines = holes.table("x", columns, rows).splitlines()
    assert head == "| x | F | small images |"
    change, dose = holes.change("unet", "loss 9"), holes.dose("unet", 9)
    solver = [holes.change(run, "plain", "unipc") for run in ("unet", "eps16-10k")]
    assert lines == [
        f"| loss | {change} (dose {dose}) |  |",
        f"| UniPC | {solver[0]} | {solver[1]} |",
    ]


@pytest.mark.parametrize("name", ["cifar10-16", "cifar10-16-flow"])
def test_the_best_pair_is_the_nearest_by_the_kernel_distance(name):
    record = load(name)
    pairs = {(row[0], row[2]) for row in record["rows"] if row[3] == 10 and "plain" in row[0]}
    values = {pair: by_seed(record, *pair, 10, "images_kernel") for pair in pairs}
    means = {pair: fmean(found) for pair, found in values.items() if len(found) == 2}
    method, sampler = min(means, key=means.__getitem__)
    assert method == "plain"
    assert sampler.startswith("unipc")
    found = holes.best_pair(name, 10)
    value = f"{1000 * means[method, sampler]:.1f} thousandths"
    assert found == f"UniPC with no correction, kernel distance {value}"


@pytest.mark.parametrize(
    ("run", "preset"), [("unet", "cifar10-unet"), ("flow16", "cifar10-16-flow")]
)
def test_where_a_gain_helps(run, preset):
    record, gain = load(preset), "plain+gain0.05" if run == "flow16" else "plain+gain49"
    helped, total = 0, 0
    for sampler, steps in {(row[2], row[3]) for row in record["rows"] if row[0] == gain}:
        cells = [(record, name, sampler, steps) for name in ("plain", gain)]
        plain, ours = (fmean(map(math.log, by_seed(*one, "images_kernel"))) for one in cells)
        if fmean(by_seed(*cells[0], "spread")) < 0.9:
            total += 1
            helped += ours < plain
    assert holes.gains_that_help(0, 0.9, run) == f"{helped} of {total}"
    assert total > 1


def test_spread_in_an_octave():
    bands = load("cifar10-wide")["band_spreads"]
    values = [bands[f"ddim-10, seed {seed}"][-1] for seed in range(3)]
    assert holes.octave("small", "plain", "ddim", 10, -1) == f"{fmean(values):.2f}"
    bands = load("cifar10-16")["band_spreads"]
    values = [bands[f"plain+gain49, ddim-20, seed {seed}"][-1] for seed in range(2)]
    assert holes.octave("eps16", "gain 49", None, 20, -1) == f"{fmean(values):.2f}"


def test_holms_correction_is_over_the_rows_shown(monkeypatch):
    logs = {"a": [-1.0, -1.01, -0.99], "b": [-0.1, -0.2, 0.0], "c": [-0.5, -0.55, -0.45]}

    def compared(run, method, *where):
        ours = {seed: math.exp(log) for seed, log in enumerate(logs[method])}
        return ours, dict.fromkeys(ours, 1.0)

    monkeypatch.setattr(holes, "compared", compared)
    found = holes.together("any", [(name.upper(), name, None) for name in logs])
    assert (found.compared, found.held, found.missed) == (3, "A and C", "B")
    # By hand: t = 0.1 / (0.1 / √3) = √3 with 2 degrees of freedom, p = 1 - √(3/5).
    assert found.p_of_missed == f"{1 - 0.6**0.5:.3f}"
    assert (found.weakest, found.weakest_p) == ("B", found.p_of_missed)


def test_the_archive_keeps_the_form_of_a_record():
    archive = json.loads((FOLDER / "archive.json").read_text())
    assert archive.keys() <= records().keys()
    for name, record in archive.items():
        assert record["preset"] == name
        assert {"settings", "columns", "rows", "floor", "versions", "titles"} <= record.keys()
        assert all(len(row) == len(record["columns"]) for row in record["rows"])
        assert len(holes.archive_row(name)) == 5


def test_names_of_methods_in_words():
    assert method_name("loss 0.05 + gain 0.1") == "skip0.05-expected+gain0.1"
    assert method_name("gain -49") == "plain+gain-49"


def test_a_claim_that_no_longer_holds_is_an_error():
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
