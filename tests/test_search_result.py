"""What a search says, keeps, draws and shows."""

import builtins
import json
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from s2dm_loss import NoiseSchedule
from s2dm_loss.sampling import (
    Candidate,
    Correction,
    CorrectionSearch,
    EpsilonScaling,
    Recommendation,
    ScanPoint,
    ScoreRescaling,
    SearchCost,
    SkipGain,
    StartScaling,
    standard_corrections,
)
from s2dm_loss.sampling.corrections import NONE, NoCorrection
from s2dm_loss.sampling.progress import Reporter

INF = float("inf")
LINEAR = NoiseSchedule.linear(1000)
GAIN = SkipGain(LINEAR, tau=0.98)
ONE = SearchCost(((3, 64),), {"sample": 10}, 3, 192)
TWO = SearchCost(((9, 32), (3, 64)), {"DDIM": 10, "PNDM": 11}, 12, 192)
NO = Candidate("sample", NONE, 0, 2.0)
# distance, best_share, difference, low, high, own_high
SURE = Candidate("sample", GAIN, 49, 1.5, 0.4, -0.5, -0.8, -0.2, -0.2)
NEARER = Candidate("sample", GAIN, 99, 1.0, 0.6, -1.0, -2.5, 0.5, 0.5)


def found(*candidates, cost=ONE, scan=()):
    return Recommendation(candidates, scan, cost)


def test_one_line_says_what_to_do():
    assert str(found(NO, SURE, NEARER)).splitlines() == [
        "Use gain k = 49: 25 % [10, 40] nearer to the data.",
        "",
        "correction   distance    nearer [95 %]  probably the best",
        "none                2                                  0%",
        "gain k = 49       1.5    25 % [10, 40]                40%  <- use this",
        "gain k = 99         1  50 % [-25, 125]                60%",
    ]
    assert str(found(NO, NEARER)).splitlines()[0] == (
        "No correction is better than none (the nearest, gain k = 99, by 50 % [-25, 125])."
    )
    assert str(found(NO)).splitlines()[0] == "No correction is better than none."
    assert repr(found(NO)) == "Recommendation(no correction is better than none)"
    assert repr(found(NO, SURE)) == (
        "Recommendation(use gain k = 49: 25 % [10, 40] nearer to the data; it is the outermost "
        "strength tried, so try more)"
    )
    # A distance may come out at 0 or below, of which there is no share.
    none, near = Candidate("sample", NONE, 0, -0.01), replace(NEARER, distance=-1.01)
    assert "by 1 [-0.5, 2.5])" in str(found(none, near))


def test_the_sure_one_is_recommended_where_the_best_is_not_sure():
    # Seen with large gains: the best of all has the widest interval.
    result = found(NO, SURE, NEARER)
    assert result.best is NEARER
    assert result.recommended is SURE
    assert (result.sampler, result.correction, result.strength) == ("sample", GAIN, 49)
    assert result.improves
    nothing = found(NO, NEARER)
    assert (nothing.recommended, nothing.correction, nothing.strength) == (NO, NONE, 0)
    assert not nothing.improves
    model, noise = nn.Identity(), torch.ones(2, 3)
    assert nothing(model, noise) == (model, noise)


def test_with_several_samplers_the_correction_must_be_better_than_its_sampler_alone():
    use = Candidate("DDIM", NONE, 0, 2.0)
    alone = Candidate("PNDM", NONE, 0, 1.0, 0.2, -1.0, -1.2, -0.8, -0.8)
    sure = Candidate("PNDM", GAIN, 49, 0.9, 0.8, -1.1, -1.3, -0.9, -0.05)
    unsure = Candidate("PNDM", GAIN, 49, 0.9, 0.8, -1.1, -1.3, -0.9, 0.05)
    result = found(use, alone, sure, cost=TWO)
    assert result.recommended is sure
    assert str(result) == (
        "Use PNDM with gain k = 49: 55 % [45, 65] nearer to the data than DDIM with no "
        "correction; it is the outermost strength tried, so try more.\n"
        "\n"
        "sampler  network calls  correction   distance  nearer [95 %]  probably the best\n"
        "DDIM                10  none                2                                0%\n"
        "PNDM                11  none                1  50 % [40, 60]                20%\n"
        "PNDM                11  gain k = 49       0.9  55 % [45, 65]                80%"
        "  <- use this"
    )
    assert found(use, alone, unsure, cost=TWO).recommended is alone
    # Where the sampler alone is no better than the one in use, the pair is.
    worse = Candidate("PNDM", NONE, 0, 2.5, 0.2, 0.5, 0.1, 0.9, 0.9)
    assert found(use, worse, unsure, cost=TWO).recommended is unsure
    assert str(found(use, worse, cost=TWO)).startswith(
        "Keep DDIM with no correction: nothing is surely better.\n"
    )
    assert str(TWO) == (
        "9 x 32 samples to choose, then 3 x 64 samples to compare: at most 12 sampler runs of 10 "
        "network calls each, 480 samples in all (PNDM makes 11); over one sampler alone it would "
        "be 192"
    )
    assert TWO.network_calls == 480 * 11


def a_search(**options):
    """With features that are few, so that a strength is surely better."""
    data = 0.9 * torch.randn(600, 3, generator=torch.Generator().manual_seed(0))

    def sample(model, noise):
        return model(noise, torch.full((len(noise),), 999))

    class Echo(nn.Module):
        def forward(self, x_t, t):
            return x_t

    corrections = [SkipGain(LINEAR, tau=0.98), StartScaling(), ScoreRescaling(LINEAR, psi=2.0)]
    settings = {"num_samples": 128, **options}
    return CorrectionSearch(Echo(), sample, data, corrections, **settings)


@pytest.fixture(scope="module")
def result():
    return a_search().recommend(progress=False)


def test_what_it_keeps_can_be_read_without_the_data(result):
    text = json.dumps(result.to_dict(), allow_nan=False)
    values = json.loads(text)
    loaded = Recommendation.from_dict(values)
    assert str(loaded) == str(result)
    assert loaded.cost == result.cost
    assert loaded.to_dict() == values
    assert values["searched"]["seed"] == 0
    assert values["searched"]["data"] == [600, 3]
    assert [c["type"] for c in values["searched"]["corrections"]] == [
        "SkipGain",
        "StartScaling",
        "ScoreRescaling",
    ]
    assert values["torch"] == torch.__version__
    assert values["recommended"] == [result.sampler, result.recommended.label]
    # With its schedule it does what the search's own does, options and all.
    whole = Recommendation.from_dict(values, LINEAR)
    assert whole.to_dict() == values
    x, t = torch.randn(4, 3), torch.tensor([0, 99, 500, 999])
    for ours, theirs in zip(result.candidates, whole.candidates, strict=True):
        (a, b), (c, d) = (one.correction(nn.Identity(), x, one.strength) for one in (ours, theirs))
        assert torch.equal(b, d)
        if ours.is_corrected and not isinstance(ours.correction, StartScaling):
            assert torch.equal(a.rescale(x, x, t), c.rescale(x, x, t))
    assert isinstance(pickle.loads(pickle.dumps(result)), Recommendation)  # noqa: S301
    stored = next(
        c
        for c in loaded.candidates
        if isinstance(c.correction, Correction) and c.label.startswith("gain")
    )
    for change in (stored.correction.correct_model, stored.correction.correct_noise):
        with pytest.raises(ValueError, match=r"was loaded without its schedule.*from_dict"):
            change(nn.Identity(), stored.strength)


def test_what_has_no_number_and_what_is_a_users_own_is_kept_too():
    class Mine(Correction):
        name, strengths = "mine", (2.0,)

    mine = Mine()
    far = Candidate("sample", mine, 2.0, INF, 0.0, INF, INF, INF)
    values = json.loads(json.dumps(found(NO, far).to_dict(), allow_nan=False))
    loaded = Recommendation.from_dict(values)
    assert loaded.candidates[1].distance == INF
    assert loaded.candidates[1].label == "mine 2"
    with pytest.raises(ValueError, match="got those of a Mine: apply your own"):
        Recommendation.from_dict(values, LINEAR)


def test_no_candidate_has_a_hole_that_a_plot_would_stumble_over(result):
    for entry in (*result.candidates, *result.scan):
        values = entry._asdict() if isinstance(entry, ScanPoint) else vars(entry)
        assert all(value is not None for value in values.values())
        assert isinstance(entry.correction, Correction)
    assert isinstance(result.candidates[0].correction, NoCorrection)
    assert NONE.label(0) == "none"


def test_no_letter_stands_for_a_skip_and_for_a_strength():
    labels = [c.label(c.strengths[0]) for c in standard_corrections(LINEAR)]
    assert labels == [
        "gain k = -99",
        "epsilon scaling λ = 0.97",
        "start noise times 0.9",
        "score rescaling r = 0.75",
    ]


def test_its_figure(result):
    pytest.importorskip("matplotlib")
    figure = result.plot()
    compared, *scans = figure.axes
    assert [axis.get_xlabel() for axis in scans] == [
        "gain k ",
        "start noise times",
        "score rescaling r ",
    ]
    ticks = [label.get_text() for label in compared.get_yticklabels()]
    assert ticks == [candidate.label for candidate in result.candidates]
    lines = compared.containers
    assert len(lines) == len(result.candidates)
    points = scans[0].lines[0].get_xdata()
    assert set(GAIN.strengths) | {0} <= set(points)
    far = Candidate("sample", GAIN, 9, INF, 0.0, INF, INF, INF)
    found(NO, far).plot().canvas.draw()  # without a scan, and without a distance


def test_a_figure_without_matplotlib_says_what_to_install(result, monkeypatch):
    usual = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 's2dm-loss\[plot\]'"):
        result.plot()


def test_progress_without_a_terminal_is_a_line_for_each_candidate(capsys):
    search = a_search(num_samples=64, batch_size=64)
    result = search.recommend()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == str(search.cost)
    assert "into evaluation mode" in said[1]
    assert said[2].startswith("about ")
    lines = [line for line in said if ": distance " in line]
    assert len(lines) == len(result.scan) + len(result.candidates)
    assert lines[1].startswith("gain k = -99: distance ")
    search.recommend(progress=False)
    assert not capsys.readouterr().err


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


@pytest.mark.parametrize("installed", [True, False])
def test_progress_on_a_terminal_is_a_bar_where_there_is_one(installed, monkeypatch):
    if installed:
        pytest.importorskip("tqdm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    search = a_search(num_samples=64, batch_size=64)
    search.recommend()
    assert terminal.text.startswith(str(search.cost))
    runs = search.cost.runs
    assert (f"{runs}/{runs}" in terminal.text) is installed
    assert ("gain k = 99: distance" in terminal.text) is not installed


def test_it_says_how_long_it_will_take(monkeypatch, capsys):
    now = iter([0.0, 3.0])
    monkeypatch.setattr("s2dm_loss.sampling.progress.time.monotonic", lambda: next(now))
    reporter = Reporter(True, 100, "cost")
    reporter.ran()
    reporter.ran()
    assert capsys.readouterr().err == "cost\nabout 5 min\n"


def test_options_are_those_that_a_strength_depends_on():
    assert GAIN.to_dict() == {
        "type": "SkipGain",
        "name": "gain k =",
        "strengths": [-99, -49, -19, 19, 49, 99, 149, 199],
        "prediction_type": "epsilon",
        "tau": 0.98,
        "max_c2": 100.0,
    }
    assert EpsilonScaling(LINEAR, [1.5]).to_dict()["strengths"] == [1.5]
