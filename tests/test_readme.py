"""The README's numbers are those of the committed results, and its commands those that CI runs."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="the evidence's statistics need the extra `quality`")
pytest.importorskip("matplotlib", reason="so do its pages")
from benchmarks.overhead.figures import head_shares
from benchmarks.pages.tables import listed
from benchmarks.quality.corrections import ScoreRescaling
from benchmarks.quality.evidence.cifar10_answers import (
    BATCH,
    LONGER,
    MARGIN,
    MORE,
    OTHERS,
    PRESET,
    RESCALED,
    UNCLAMPED,
    UNET,
    WIDER,
    answer,
    by_kind,
    chosen_correction,
    is_sound,
    left_where_asked,
    over_ddim,
    over_plain,
    searched,
)
from benchmarks.quality.evidence.corrections import CELLS as CORRECTED
from benchmarks.quality.evidence.corrections import SOLVERS, of_family
from benchmarks.quality.evidence.front import front_note, front_table
from benchmarks.quality.evidence.records import TEN, Evidence, Sources, corrected, trained
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.statistics import Cell, Results, improvement_of_ratios
from benchmarks.quality.tables import distance_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks/results/quality"
CELLS = [Cell(name, steps) for name in ("ddim", "pndm", "deis") for steps in (10, 20, 50, 100)]
FLAT = " ".join(README.split())
CIFAR10 = sorted(path.stem for path in RESULTS.glob("cifar10-*.json"))


def results_of(name: str) -> Results:
    return Results(json.loads((RESULTS / f"{name}.json").read_text()))


def said(found) -> str:
    return f"{found.mean:+.1f} % [{found.low:+.1f}, {found.high:+.1f}]"


def test_the_table_in_front_is_that_of_the_records(tmp_path):
    evidence = Evidence(Sources(RESULTS), tmp_path)
    assert front_table(evidence) in README
    assert front_note(evidence) in FLAT


@pytest.mark.parametrize(
    ("preset", "method", "cells"),
    [
        ("digits-full", "skip9-expected", CELLS),
        ("digits-full", "skip99-expected", CELLS),
        ("digits-full", "min-snr-5", CELLS),
        ("textures", "skip9-expected", CELLS),
        ("textures", "skip99-expected", CELLS),
    ],
)
def test_evidence_in_the_readme_is_that_of_the_record(preset, method, cells):
    found = results_of(preset).improvement(method, cells, "images_frechet")
    assert found.count == 5
    assert said(found) in README


def test_a_larger_skip_does_more_in_the_cell_of_the_table():
    digits, crops = (
        said(over_plain(results_of(name), "skip99-expected", TEN))
        for name in ("digits-full", "textures")
    )
    assert f"k = 99 did {digits} and {crops} in the cell of the table" in FLAT


def test_what_the_readme_says_of_the_digits_is_so():
    """No effect at k = 9; help and harm at k = 99; Min-SNR above every skip; rescaling best."""
    results = results_of("digits-full")

    def improvement(method, cells=CELLS):
        return results.improvement(method, cells, "images_frechet")

    assert improvement("skip9-expected").sign == 0
    assert improvement("skip99-expected", [TEN]).sign == 1
    assert improvement("skip99-expected").sign == -1
    best = improvement("min-snr-5").low
    skips = [name for name in results.methods if name.startswith("skip")]
    assert all(improvement(name).high < best for name in skips)
    chosen = results_of("digits-corrections").chosen_elsewhere(
        of_family(ScoreRescaling), TEN, "images_frechet"
    )
    assert set(chosen.values()) == {"plain+rescaling2"}
    assert "it is by 2 in the digits' column and by 0.97 in the crops'." in FLAT
    textures = results_of("textures-corrections")
    chosen = textures.chosen_elsewhere(of_family(ScoreRescaling), TEN, "images_frechet")
    assert set(chosen.values()) == {"plain+rescaling0.97"}
    for cell in CORRECTED:  # docs/alternatives.md: "no effect shown on crops of photographs"
        chosen = textures.chosen_elsewhere(
            [*of_family(ScoreRescaling), "plain"], cell, "images_frechet"
        )
        found = textures.against(chosen, dict.fromkeys(chosen, "plain"), cell, "images_frechet")
        assert found.sign == 0


def test_what_the_readme_says_of_cifar10_is_so():
    results, found = results_of(PRESET), answer(results_of(PRESET))
    assert {one.count for one in found.values() if one is not None} == {3}
    # "It costs nothing and does most", with DDIM's samples in front of it.
    solvers = [found[solver].mean for solver in SOLVERS]
    assert found["unipc"].mean == max(solvers)
    assert min(found["unipc"].low, searched(results).low) > found["loss"].high
    assert found["unipc"].low > max(found["correction"].high, searched(results).high)
    exact = improvement_of_ratios(
        results.values("plain", Cell("unipc", 50), "images_frechet"),
        results.values("plain", TEN, "images_frechet"),
    )
    assert f"nearer than DDIM at 10 by only {said(exact)}." in FLAT
    assert found["unipc"].mean == max(one.mean for one in found.values())  # "does most"
    unipc, pndm = (
        [said(over_plain(results, name, Cell(solver, 10))) for name in (trained(49), corrected(49))]
        for solver in ("unipc", "pndm")
    )
    assert f"on the small network {' and '.join(unipc)} to UniPC's, {' and '.join(pndm)} to" in FLAT
    assert max(-found["loss"].low, found["loss"].high) <= MARGIN  # "it is equivalent"
    small, large = (
        [
            found.mean
            for skip in (9, 49)
            for cell in network.cells("plain")
            if (found := over_plain(network, trained(skip), cell, corrected(skip))) is not None
        ]
        for network in (results, results_of(UNET))
    )
    assert (
        f"it was the better by up to {-min(small):.1f} % and the worse by up to {max(small):.1f} %,"
        f" by sampler and steps, on one seed of the U-Net by up to {-min(large):.1f} % and "
        f"{max(large):.1f} %."
    ) in FLAT
    assert set(chosen_correction(results).values()) == {RESCALED}  # "the best on the small network"
    plain = results.values("plain", TEN, "images_frechet").values()
    assert f"They lie at {np.mean(list(plain)):.0f} with DDIM at 10 steps, and hardly" in FLAT
    assert f"({millions(results)} million parameters, as many images)" in FLAT
    assert is_sound(results) is False


def test_what_is_said_of_solvers_on_cifar10_is_so():
    """README and docs/alternatives.md: DEIS and PNDM are worse than DDIM from 20 steps on."""
    results = results_of(PRESET)
    steps = sorted({cell.steps for cell in results.cells("plain") if cell.sampler == "deis"})
    assert steps[:3] == [10, 20, 50]
    for solver in ("deis", "pndm"):
        assert over_ddim(results, solver, 10).sign == 1
        assert all(over_ddim(results, solver, more).sign == -1 for more in steps[1:])
        assert over_ddim(results, solver, 10).high < over_ddim(results, "unipc", 10).low
    for solver in ("unipc", "dpm++2m"):
        assert all(over_ddim(results, solver, more).sign == 1 for more in (10, 20))


def test_loss_and_gain_are_as_near_to_one_another_as_the_alternatives_say():
    page = (ROOT / "docs/alternatives.md").read_text(encoding="utf-8")
    assert "the two were within 8 % of one another in every cell we measured" in page
    compared = [
        found.mean
        for preset in ("digits-full", "textures", *CIFAR10)
        for results in [results_of(preset)]
        for skip in (1, 9, 49, 99, 149)
        for cell in results.cells("plain")
        if not results.at_floor(trained(skip), cell, "images_frechet")
        and (found := over_plain(results, trained(skip), cell, corrected(skip))) is not None
    ]
    assert len(compared) > 80
    assert 7 < max(map(abs, compared)) < 8


def test_what_the_readme_says_of_min_snr_on_cifar10_is_so():
    more = results_of(MORE)
    on_top = over_plain(more, "min-snr-5+gain49", TEN, "min-snr-5")
    assert on_top.count == over_plain(more, "min-snr-5", TEN).count == 3
    assert f"whose gain on top of it did another {said(on_top)}." in FLAT
    trained_so, weighted = (
        over_plain(results_of(name), method, TEN).mean
        for name, method in ((PRESET, "skip49-expected"), (MORE, "min-snr-5"))
    )
    assert weighted < trained_so  # "on CIFAR10 less than k = 49"


def test_unclamped_samples_are_those_of_the_answer_and_say_the_same():
    """The CIFAR10 page's protocol, and CHANGELOG.md."""
    raw, images = results_of(UNCLAMPED), results_of(PRESET)
    apart = []
    for name in raw.methods:
        for cell in raw.cells(name):
            ours = raw.values(name, cell, "images_frechet")
            assert ours == images.values(name, cell, "images_frechet")
            if name != "plain":
                both = (
                    over_plain(raw, name, cell, measure=m)
                    for m in ("images_frechet", "raw_frechet")
                )
                apart.append(abs(next(both).mean - next(both).mean))
    assert len(apart) == 5
    assert max(apart) < 0.8


def test_what_the_readme_says_of_other_networks_on_cifar10_is_so():
    _, *others = OTHERS  # the first is the paper's
    found = [over_plain(results_of(name), "plain+gain49", TEN) for name in others]
    gains = [said(one) if one.count > 1 else f"{one.mean:+.1f} %" for one in found]
    assert f"Elsewhere on CIFAR10 the gain of k = 49 did {listed(gains)}." in FLAT


def test_what_the_readme_says_of_the_papers_unet_is_so():
    results, wide = results_of(UNET), results_of(PRESET)
    assert is_sound(results) is True
    assert list(results.values("plain", TEN)) == [0]  # "one seed"
    budget, theirs = (PRESETS[name].budget for name in (UNET, "cifar10"))
    assert f"after {theirs.steps * theirs.batch_size / 1e6:.0f} million images" in FLAT
    assert round(budget.steps * budget.batch_size / 1e6) == 2
    assert f"has {millions(results)} million parameters and has seen 2 million images" in FLAT

    def over(name, cell=TEN, base="plain"):
        return f"{over_plain(results, name, cell, base).mean:+.1f} %"

    unipc, pndm = Cell("unipc", 10), Cell("pndm", 10)
    assert (
        f"the loss adds {over(trained(49), unipc)} and its gain {over(corrected(49), unipc)} to "
        f"UniPC's samples, and the loss {over(trained(49), pndm)} to PNDM's;"
    ) in FLAT
    solvers = {one: over_ddim(results, one, 10).mean for one in SOLVERS}
    assert max(solvers, key=solvers.get) == "pndm"  # "PNDM on the paper's U-Net"
    default = [over_plain(results, trained(9), cell) for cell in results.cells("plain")]
    default = [one.mean for one in default if one is not None]
    assert len(default) == 4
    assert f"U-Net {min(default):+.1f} to {max(default):+.1f} %, by sampler and steps" in FLAT
    assert f"does {over(RESCALED)} on the U-Net;" in FLAT
    few, many = (results.values("plain", Cell("ddim", n), "images_frechet")[0] for n in (10, 100))
    assert f"at {few:.0f} from the test images with DDIM at 10 steps and at {many:.0f} with" in FLAT
    assert f"as many real ones lie at {results.floor:.0f}." in FLAT
    grown = [over(f"plain@{part}+gain49", base=f"plain@{part}") for part in (25, 50)]
    grown = listed([*grown, over(corrected(49))])
    assert f"The gain of k = 49 did {grown} after 25, 50 and 100 % of those images." in FLAT
    gains = [over_plain(results, name, TEN).mean for name in (trained(49), corrected(49))]
    others = [gain for name, gain in solvers.items() if name != "pndm"]
    assert max(others) < min(gains) < max(gains) < solvers["pndm"]  # "the others do less"
    # docs/which_gain.md: "helped UniPC at 10 steps too, by a fifth"; the table of alternatives
    assert 18 < over_plain(results, corrected(49), unipc).mean < 22
    assert over_plain(wide, RESCALED, TEN).sign == 1


def test_what_the_readme_says_of_larger_batches_is_so():
    batch = results_of(BATCH)
    assert is_sound(batch) is True
    assert list(batch.values("plain", TEN)) == [2]  # "one seed of it"
    found = (over_plain(batch, name, TEN) for name in (corrected(49), RESCALED))
    gain, rescaling = (f"{one.mean:+.1f} %" for one in found)
    unipc = f"{over_ddim(batch, 'unipc', 10).mean:+.1f} %"
    assert (
        f"is sound, and answers as here: the gain of k = 49 does {gain}, score rescaling by 1.05 "
        f"{rescaling} and UniPC {unipc}."
    ) in FLAT
    assert max(moved(results_of(PRESET).of_seeds([2]), batch)) < 2


def test_what_the_readme_says_of_a_gpu_is_so():
    figures = json.loads((ROOT / "benchmarks/results/overhead/cuda.json").read_text())
    assert figures["step"]["machine"]["gpu"] == "NVIDIA H200"
    assert figures["step"]["figures"]["parameters"] == 35746307  # "the paper's U-Net"
    least, most = (f"{100 * share:.1f}" for share in head_shares(figures))
    assert f"{least} to {most} % of an eager training step of the paper's U-Net." in FLAT
    known = [
        cell
        for cell in figures["head"]["figures"]
        if cell["mode"] == "eager" and cell["dtype"] == "float32" and cell["name"][:2] != "2^"
    ]
    assert len(known) == 4
    assert all(1.9 < cell["ratios"]["expected/mse"][1] < 2.1 for cell in known)  # "twice as long"
    times = [cell["microseconds"] for cell in (*known, figures["step"]["figures"]["head"])]
    more = [(time["expected"][1] - time["mse"][1]) / 1e3 for time in times]
    assert {f"{each:.1f}" for each in more} == {"0.3", "0.4"}
    assert "0.3 to 0.4 ms more" in FLAT


def moved(wide, other):
    """How far each improvement is from that on the same seeds of the answer's network."""
    found = []
    for name in other.methods:
        for cell in other.cells(name):
            if "@" in name or (name == "plain" and cell.sampler == "ddim"):
                continue
            than = Cell("ddim", cell.steps) if name == "plain" else cell
            pair = [
                improvement_of_ratios(
                    one.values(name, cell, "images_frechet"),
                    one.values("plain", than, "images_frechet"),
                )
                for one in (wide, other)
            ]
            found += [abs(pair[1].mean - pair[0].mean)] if None not in pair else []
    return found


def spreads_apart(wide, other, seed):
    """How far the raw spreads of the plain network's samples lie from one another."""
    here, there = (one.record["raw_spreads"] for one in (wide, other))
    return [abs(here[cell][seed] - there[cell][seed]) for cell in here if cell in there]


def test_what_the_readme_says_of_longer_training_is_so():
    longer, wide = results_of(LONGER), results_of(PRESET).of_seeds([2])
    steps = PRESETS[LONGER].budget.steps
    assert f"trained on {steps * 128 / 1e6:.1f} million images]" in FLAT
    assert len(moved(wide, longer)) > 15
    assert f"moves by more than {max(moved(wide, longer)):.1f} percentage points;" in FLAT
    assert max(spreads_apart(wide, longer, "2")) < 1e-3  # "has the same spread"


def test_what_the_readme_says_of_a_larger_network_is_so():
    wider = results_of(WIDER).of_seeds([0])
    wide = results_of(PRESET).of_seeds([0])
    assert f"a network of {millions(wider)} million parameters]" in FLAT
    before, now = (one.values("plain", TEN, "images_frechet")[0] for one in (wide, wider))
    apart = max(spreads_apart(wide, wider, "0"))
    assert f"lies nearer by {100 * (1 - now / before):.0f} %, again with the same spread" in FLAT
    assert f"spread to {apart:.3f} of the data's" in FLAT
    assert is_sound(wider) is False


def test_what_the_readme_says_of_training_and_gain_on_the_digits_is_so():
    """ "It cannot be told from training", by every interval."""
    results = results_of("digits-full")
    for skip in (1, 9, 49, 99, 149):
        for measure in ("images_frechet", "raw_frechet"):
            assert results.improvement(trained(skip), CELLS, measure, corrected(skip)).sign == 0


def test_what_the_readme_says_of_the_paper_is_what_the_presets_hold():
    ranges = [
        PRESETS[name].paper["relative improvement over plain, range over samplers and steps"]
        for name in ("cifar10", "celeba")
    ]
    assert ranges == ["3.27 % to 14.06 %", "8.97 % to 27.08 %"]
    assert "reports 3.27 to 14.06 % on CIFAR10 and 8.97 to 27.08 % on CelebA, by FID" in FLAT


def test_a_better_solver_does_more_than_any_skip():
    """docs/evidence.md, "What to do": on CIFAR10 and on the digits, in the loss or as a gain."""
    for name, solved in ((PRESET, PRESET), ("digits-full", "digits-corrections")):
        results = results_of(name)
        skips = [one for one in results.methods if "skip" in one or one.startswith("plain+gain")]
        assert len(skips) > 5
        unipc = over_ddim(results_of(solved), "unipc", TEN.steps)
        for one in skips:
            found = results.improvement(one, [TEN], "images_frechet")
            assert found is None or found.high < unipc.low or found.count == 1


def test_what_the_pages_say_of_score_rescaling_is_so():
    """It lowers the spread where it helps, and by 3/4 harms where SA-DPM helps."""
    wide = results_of(PRESET)
    spreads = [wide.values(name, TEN, "spread") for name in ("plain+rescaling1.05", "plain")]
    assert all(spreads[0][seed] < spreads[1][seed] for seed in spreads[1])
    digits, corrections = results_of("digits-full"), results_of("digits-corrections")
    assert corrections.improvement("plain+rescaling0.75", [TEN], "images_frechet").sign == -1
    sa_dpm = next(name for name in digits.methods if name.startswith("sa-dpm"))
    assert digits.improvement(sa_dpm, [TEN], "images_frechet").sign == 1


def test_what_the_plots_description_says_is_so():
    losses, gains, corrections, solvers = by_kind(results_of(PRESET))
    k_9, k_49, fresh = (
        losses[f"S²-DM k = {kind}"] for kind in ("9, expected", "49, expected", "9, fresh")
    )
    assert len(losses) == 3
    assert all(0.4 < value < 1 for value in (*k_9, *fresh))
    assert all(4 < value < 5.2 for value in k_49)
    assert all(5 < value < 8 for value in gains["gain k = 49"])
    assert all(16 < value < 18 for value in corrections["Temporal Score Rescaling"])
    assert all(31.5 < value < 32.5 for value in solvers["UniPC"])
    losses, gains, corrections, solvers = by_kind(results_of(UNET))
    shown = [
        *(losses[f"S²-DM k = {skip}, expected"] for skip in (9, 49)),
        gains["gain k = 49"],
        corrections["Temporal Score Rescaling"],
        *(solvers[name] for name in ("UniPC", "PNDM")),
    ]
    assert [round(value) for (value,) in shown] == [3, 23, 24, -43, 20, 38]


def test_the_readme_says_what_spread_is_lacking():
    results = results_of(PRESET)
    lacking = [1 - one for ratios in left_where_asked(results).values() for one in ratios]
    assert 0.015 < min(lacking) < 0.025  # "lack 2 to 4 %"
    assert 0.035 < max(lacking) < 0.045
    assert "not sound, if by little: its samples lack 2 to 4 % of that spread." in FLAT
    assert "At 50 steps and more they have, to 3 %, the spread that the sampler leaves," in FLAT


def millions(results) -> str:
    return f"{results.record['trainings']['plain']['0']['parameters'] / 1e6:.2f}"


@pytest.mark.parametrize("measure", ["images_frechet", "raw_frechet"])
def test_the_digits_tables_in_the_readme_are_those_of_the_record(measure):
    cells = [Cell(name, steps) for name in ("ddim", "pndm", "deis") for steps in (10, 20, 50)]
    methods = ["plain", "skip9-expected", "skip99-expected"]
    assert distance_table(results_of("digits"), methods, cells, measure) in README


def test_the_command_that_ci_runs_is_in_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "from_readme test" in script
    assert README.count("<!-- command: test -->\n```sh\n") == 1
    assert README.count("<!-- command: digits -->\n```sh\n") == 1
