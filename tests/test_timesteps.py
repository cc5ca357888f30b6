"""Training times: uniform, stratified, or a function's."""

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule
from s2dm_loss.timesteps import draw, read_timesteps, times_at
from tests.strategies import FLOW, LINEAR, VP

TURNED = ContinuousSchedule.flow(data_at=1, min_time=0.25)
CPU = torch.device("cpu")


@pytest.mark.parametrize("schedule", [LINEAR, FLOW, VP, TURNED], ids=repr)
@pytest.mark.parametrize("batch_size", [1, 2, 7, 128, 1000])
def test_stratified_puts_one_time_in_each_part(schedule, batch_size):
    for _ in range(5):
        t, weights = draw("stratified", schedule, batch_size, device="cpu")
        assert weights is None
        assert t.shape == (batch_size,)
        schedule.check_timesteps(t)
        assert t.dtype == schedule.draw_timesteps(1, device=CPU).dtype
        length = 1000 if schedule is LINEAR else 1
        first = {VP: 1e-5, TURNED: 0.25}.get(schedule, 0)
        since_data = 1 - t if schedule is TURNED else t
        u = (since_data.double().sort().values / length - first) / (1 - first)
        # A timestep stands for the part [t, t + 1) of the table that was rounded down to it.
        slack = 1e-3 if schedule is LINEAR else 1e-6
        edges = torch.arange(batch_size + 1) / batch_size
        assert (u >= edges[:-1] - slack).all()
        assert (u <= edges[1:] + slack).all()


def test_each_sample_of_a_stratified_batch_has_uniform_times():
    """Else the first sample of every batch would be trained at the earliest times alone."""
    draws, small = 10_000, NoiseSchedule.linear(10)
    t = torch.stack([draw("stratified", small, 4, device="cpu")[0] for _ in range(draws)])
    for sample in t.unbind(1):
        counts = sample.bincount(minlength=10).double()
        chi2 = ((counts - draws / 10).square() / (draws / 10)).sum()
        assert chi2 < 27.9  # 99.9 % of chi squared with 9 degrees of freedom


def test_the_mean_of_a_stratified_batch_varies_less():
    """The mean of f(u) = u over B strata has variance 1 / (12 B³), and 1 / (12 B) uniform."""
    size = 16
    for name, power in (("uniform", 1), ("stratified", 3)):
        drawn = (draw(name, FLOW, size, device="cpu")[0] for _ in range(4000))
        means = torch.stack([t.double().mean() for t in drawn])
        assert means.var().item() == pytest.approx(1 / (12 * size**power), rel=0.1)
        assert abs(means.mean() - 0.5) < 4 * (means.var() / 4000).sqrt()


def test_times_never_reach_the_end():
    u = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert times_at(LINEAR, u).tolist() == [0, 500, 999]
    assert times_at(FLOW, u)[-1] < 1
    assert times_at(VP, u)[0].item() == pytest.approx(1e-5)
    assert times_at(TURNED, u)[:2].tolist() == [0.75, 0.375]


def test_a_function_may_return_times_alone():
    t, weights = draw(lambda n, **_: torch.full((n,), 7), LINEAR, 3, device="cpu")
    assert t.tolist() == [7, 7, 7]
    assert weights is None


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.zeros(3, 1), r"shape \(3,\) on one device, got t = "),
        (torch.zeros(2), r"shape \(3,\) on one device, got t = "),
        ([0.0, 0.0, 0.0], "got t = "),
        ((torch.zeros(3), torch.ones(2)), "got weights = "),
        ((torch.zeros(3), 1.0), "got weights = "),
        ((torch.zeros(3), torch.ones(3, device="meta")), "got weights = "),
        ((torch.zeros(3), torch.tensor([1.0, -1.0, 2.0])), "must return weights of at least 0"),
        ((torch.zeros(3), torch.tensor([1.0, torch.nan, 2.0])), "must return weights of at least"),
    ],
)
def test_what_a_function_returns_is_checked(returned, said):
    with pytest.raises(ValueError, match=said):
        draw(lambda n, **_: returned, FLOW, 3, device="cpu")


def test_times_of_the_wrong_kind_and_a_wrong_setting_are_refused():
    with pytest.raises(TypeError, match="integer timesteps"):
        draw(lambda n, **_: torch.rand(n), LINEAR, 3, device="cpu")
    for setting, error in (("stratify", ValueError), (None, TypeError), (3, TypeError)):
        with pytest.raises(error, match="'uniform', 'stratified', or a function"):
            read_timesteps(setting)
    assert [read_timesteps(setting) for setting in ("stratified", len)] == ["stratified", len]


def test_a_stratified_draw_compiles():
    run = torch.compile(
        lambda x: draw("stratified", LINEAR, x.shape[0], device=x.device)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    for size in (4, 6, 9):
        strata = run(torch.zeros(size)).sort().values * size // 1000
        assert strata.tolist() == pytest.approx(list(range(size)), abs=1)


def test_a_stratified_draw_reads_no_value():
    t, _ = draw("stratified", LINEAR, 4, device="meta")
    assert t.device.type == "meta"
