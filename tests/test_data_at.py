"""Data at t = 1: the same loss as on the path turned by hand, with t' = 1 - t."""

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from s2dm_loss.schedule import check_schedule
from tests.strategies import normal

MAKERS = {
    "vp": ContinuousSchedule.vp,
    "sub_vp": ContinuousSchedule.sub_vp,
    "cosine": ContinuousSchedule.cosine,
    "flow": ContinuousSchedule.flow,
}
T = torch.tensor([0.0, 0.013, 0.37, 0.5, 0.749, 0.75, 0.9, 0.98, 0.99, 1.0], dtype=torch.float64)
INNER = T[1:-1]
SKIPS = [
    SkipSet(0.02),
    SkipSet([0.02, 0.25]),
    SkipSet.for_sampling_steps(4),
    SkipSet.from_timesteps([0.0, 0.1, 0.35, 0.75, 1.0]),
]


def turned(skip_set):
    """The skips in the other clock: only lists of times have one."""
    times = getattr(skip_set, "timesteps", None)
    return skip_set if times is None else SkipSet.from_timesteps([1 - t for t in times])


@pytest.mark.parametrize("name", MAKERS)
def test_a_path_turned_by_hand(name):
    ours, by_hand = MAKERS[name](data_at=1), MAKERS[name]()
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(
        ours.log_alphas_cumprod_at(T), by_hand.log_alphas_cumprod_at(1 - T), **close
    )
    for found, expected in zip(ours.alpha_sigma(T), by_hand.alpha_sigma(1 - T), strict=True):
        torch.testing.assert_close(found, expected, **close)
    for found, expected in zip(
        ours.derivatives(INNER), by_hand.derivatives(1 - INNER), strict=True
    ):
        torch.testing.assert_close(found, -expected, **close)
    for skip_set in SKIPS:
        earlier, valid = skip_set.earlier(T, ours)
        expected, expected_valid = turned(skip_set).earlier(1 - T, by_hand)
        assert torch.equal(valid, expected_valid)
        torch.testing.assert_close(earlier, torch.where(valid, 1 - expected, T), **close)
        found = coefficients(ours, skip_set, t=T)
        expected = coefficients(by_hand, turned(skip_set), t=1 - T)
        torch.testing.assert_close(found.c2, expected.c2, **close)
        torch.testing.assert_close(found.gain, expected.gain, **close)


def test_a_path_of_ones_own_is_in_its_own_clock():
    own = ContinuousSchedule.from_alpha_sigma(lambda t: (t, 1 - t), data_at=1, min_time=0.2)
    alpha, sigma = own.alpha_sigma(T)
    torch.testing.assert_close(alpha, T, rtol=1e-14, atol=0)
    torch.testing.assert_close(sigma, 1 - T, rtol=1e-14, atol=0)
    for rate, expected in zip(own.derivatives(T), (1.0, -1.0), strict=True):
        assert rate.tolist() == [expected] * len(T)
    with pytest.raises(ValueError, match=r"rises from t = 1 on.*say data_at=0"):
        ContinuousSchedule.from_alpha_sigma(lambda t: (1 - t, t), data_at=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skip_is_valid_to_the_rounding_of_one_minus_t(dtype):
    """float32's 0.98 leaves a little less than 0.02, and 1 - float32(0.3) more or less than 0.7."""
    for skip in (0.02, 0.1, 0.3, 0.7, 0.98):
        for t in (torch.tensor([1 - skip], dtype=dtype), 1 - torch.tensor([skip], dtype=dtype)):
            earlier, valid = SkipSet(skip).earlier(t, ContinuousSchedule.flow(data_at=1))
            assert valid.all()
            assert 1 - 1e-6 < float(earlier) <= 1
    later = torch.tensor([0.9801, 1.0], dtype=dtype)
    assert not SkipSet(0.02).earlier(later, ContinuousSchedule.flow(data_at=1))[1].any()
    # A skip that is smaller than the rounding is none at the data.
    end = torch.ones(1, dtype=torch.bfloat16)
    assert not SkipSet(1e-4).earlier(end, ContinuousSchedule.flow(data_at=1))[1].any()


def test_times_are_drawn_min_time_from_the_data():
    options = {"device": torch.device("cpu")}
    for make in (ContinuousSchedule.vp, ContinuousSchedule.flow):
        ours, by_hand = make(data_at=1, min_time=0.2), make(min_time=0.2)
        assert ours.min_time == 0.2
        draws = [
            schedule.draw_timesteps(1000, generator=torch.Generator().manual_seed(0), **options)
            for schedule in (ours, by_hand)
        ]
        assert torch.equal(draws[0], 1 - draws[1])
        assert 0 <= float(draws[0].min()) < 0.01
        assert 0.79 < float(draws[0].max()) <= 0.8


def test_what_says_and_what_refuses_data_at():
    assert repr(ContinuousSchedule.flow(data_at=1)) == "ContinuousSchedule.flow(data_at=1)"
    assert repr(ContinuousSchedule.vp(data_at=1, min_time=1e-3)) == (
        "ContinuousSchedule.vp(0.1, 20.0, data_at=1, min_time=0.001)"
    )
    own = ContinuousSchedule.from_alpha_sigma(lambda t: (t, 1 - t), data_at=1)
    assert repr(own) == "ContinuousSchedule.from_alpha_sigma(..., data_at=1)"
    for wrong in (2, True, "1", None):
        with pytest.raises(ValueError, match="data_at must be 0 or 1, the time at which the data"):
            ContinuousSchedule.flow(data_at=wrong)
    with pytest.raises(TypeError, match="data_at"):
        NoiseSchedule.linear(10, data_at=1)
    discrete = NoiseSchedule.linear(10)
    discrete.data_at = 1
    with pytest.raises(ValueError, match=r"data_at=1 is for continuous time.*flip\(0\)"):
        check_schedule(discrete)


@pytest.mark.parametrize("skip_set", SKIPS, ids=repr)
def test_the_loss_compiles(skip_set):
    torch.compiler.reset()
    criterion = SkipStepLoss(ContinuousSchedule.vp(data_at=1), skip_set, prediction_type="velocity")
    output, target, x_t = (normal(4, 5, seed=seed).float() for seed in range(3))
    t = torch.tensor([0.1, 0.5, 0.7, 0.99])
    compiled = torch.compile(criterion.from_output, fullgraph=True, backend="aot_eager")
    found, expected = (loss(output, target, t, x_t) for loss in (compiled, criterion.from_output))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
