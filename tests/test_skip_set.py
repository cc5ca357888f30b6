"""Which earlier time each t is paired with, against plain loops over the definition."""

import contextlib
import functools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from s2dm_loss import NoiseSchedule, ScaledModel, SkipSet, SkipStepLoss, gain
from tests.strategies import FLOW, VP

SCHEDULE = NoiseSchedule.linear(100)


def pairs(skip_set):
    """{t: sorted valid earlier timesteps}."""
    earlier, valid = skip_set.earlier(SCHEDULE.timesteps, SCHEDULE)
    return {t: sorted(earlier[valid[:, t], t].tolist()) for t in range(100)}


@given(st.sets(st.integers(1, 99), min_size=1, max_size=4))
def test_offsets(skips):
    assert pairs(SkipSet(skips)) == {t: sorted(t - k for k in skips if t >= k) for t in range(100)}


def test_for_sampling_steps_is_the_stride():
    for steps in range(2, 101):
        assert pairs(SkipSet.for_sampling_steps(steps)) == pairs(SkipSet(100 // steps))


@given(st.lists(st.integers(0, 99) | st.floats(0, 99), min_size=1, max_size=30))
def test_from_timesteps_pairs_with_the_latest_sampled_before(timesteps):
    """Of lists in any order and with repeats, as PNDM's are, and of fractions, as Euler's."""
    assume(max(timesteps) > 1 or not any(t % 1 for t in timesteps))  # which look like times
    visited = {round(t) for t in timesteps}
    expected = {t: sorted(s for s in visited if s < t)[-1:] for t in range(100)}
    assert pairs(SkipSet.from_timesteps(timesteps)) == expected


@pytest.mark.parametrize(
    ("visited", "count", "warns"),
    [
        ([14.61, 3.2, 0.03, 0.0], 1000, True),  # Euler's sigmas
        (range(20), 1000, True),  # the steps' indices
        (range(0, 1000, 50), 4000, True),  # another schedule's
        (range(0, 1000, 50), 1000, False),
        ([i * i for i in range(29)], 1000, False),  # DDIM's "quad", to 0.8 T
        ([0], 1, False),
    ],
)
def test_timesteps_that_are_all_early_are_warned_of(visited, count, warns):
    schedule = NoiseSchedule.linear(count, 1e-5, 0.02)
    said = f"go from 0 to {max(visited):g}, on a schedule whose last is {count - 1}"
    for make in (SkipStepLoss, functools.partial(ScaledModel.with_gain, nn.Identity())):
        with pytest.warns(UserWarning, match=said) if warns else contextlib.nullcontext():
            make(schedule, SkipSet.from_timesteps(visited))


def test_continuous_offsets():
    t = torch.tensor([0.0, 0.05, 0.1, 0.7], dtype=torch.float64)
    earlier, valid = SkipSet([0.05, 0.2]).earlier(t, VP)
    assert valid.tolist() == [[False, True, True, True], [False, False, False, True]]
    expected = [[0.0, 0.0, 0.05, 0.65], [0.0, 0.05, 0.1, 0.5]]
    np.testing.assert_allclose(earlier.numpy(), expected)
    earlier, _ = SkipSet.for_sampling_steps(20).earlier(t, VP)
    np.testing.assert_allclose(earlier.numpy(), expected[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sampled_time_in_float32_is_not_after_itself(dtype):
    """float32 has no 0.1; widened again it is a little above it, or below."""
    times = [i / 10 for i in range(11)]
    t, skips = torch.tensor(times, dtype=dtype).double(), SkipSet.from_timesteps(times[:0:-1])
    earlier, valid = skips.earlier(t, VP)
    assert valid.tolist() == [[False] * 2 + [True] * 9]
    np.testing.assert_allclose(earlier[0, 2:].numpy(), times[1:-1], atol=1e-15)
    # A time between two is after the first of them.
    earlier, _ = skips.earlier(t[1:-1] + 0.01, VP)
    np.testing.assert_allclose(earlier[0].numpy(), times[1:-1], atol=1e-15)


@pytest.mark.parametrize("steps", [10, 20, 50, 128])
@pytest.mark.parametrize(
    "times_of",
    [
        # As an Euler loop goes, t -= dt in float32; NumPy adds one by one, as it does.
        lambda steps: torch.tensor(np.r_[1, np.full(steps - 1, -1 / steps)].cumsum(dtype="f4")),
        lambda steps: 1 - torch.arange(steps) / steps,
        lambda steps: torch.linspace(1, 0, steps + 1)[:-1].half(),
        lambda steps: torch.linspace(1, 0, steps + 1)[:-1].bfloat16(),
    ],
    ids=["accumulated", "float32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("schedule", [VP, FLOW], ids=repr)
def test_a_samplers_times_have_their_gain_however_they_are_rounded(schedule, times_of, steps):
    """Against the gain of the exact times, which the closed form of c² gives."""
    exact = [(steps - i) / steps for i in range(steps)]
    t = torch.tensor(exact, dtype=torch.float64)
    at_earlier, at_t = (schedule.log_alphas_cumprod_at(x) for x in (t - 1 / steps, t))
    expected = 0.99 / (0.99 + 0.01 * ((at_earlier - at_t).exp() - 1).clamp(max=100))
    skip_set = SkipSet.from_timesteps([i / steps for i in range(steps + 1)])
    rounded = times_of(steps)
    earlier, valid = skip_set.earlier(rounded, schedule)
    assert valid.all()
    np.testing.assert_allclose(earlier[0].numpy(), np.array(exact) - 1 / steps, atol=1e-12)
    found = gain(schedule, skip_set, t=rounded, prediction_type="epsilon")
    # The gain of a time that is off by its rounding; at no step it is lost.
    off = torch.maximum((rounded.double() - t).abs() * steps, torch.tensor(1e-6))
    assert (((1 - found) / (1 - expected) - 1).abs() < 4 * off + 1e-5).all()


@pytest.mark.parametrize("times", [torch.linspace(0, 1, 21), torch.linspace(1e-3, 0.95, 20)])
def test_times_are_no_timesteps_of_a_discrete_schedule(times):
    """Rounded they would be 0 and 1, and every later t be paired with 1."""
    with pytest.raises(ValueError, match=r"fractions up to .*continuous times.*999 \* timesteps"):
        SkipSet.from_timesteps(times).check(NoiseSchedule.linear(1000))
    SkipSet.from_timesteps(times).check(FLOW)
    for visited in ([0, 1], [0.4, 1.2], 999 * times):
        SkipSet.from_timesteps(visited).check(NoiseSchedule.linear(1000))
    SkipSet.from_timesteps([0, 0.5, 1]).check(NoiseSchedule.linear(2))  # which has no others


def test_a_skip_of_the_whole_time_in_float32_is_valid():
    """float32's 0.04 is a little less than 0.04, of which the skip is all."""
    earlier, valid = SkipSet.for_sampling_steps(25).earlier(torch.tensor([0.02, 0.04, 0.08]), VP)
    assert valid.tolist() == [[False, True, True]]
    np.testing.assert_allclose(earlier[0, 1:].numpy(), [0.0, 0.04], atol=1e-8)
    assert (earlier >= 0).all()


@pytest.mark.parametrize(
    ("skip_set", "text"),
    [
        (SkipSet(np.int64(9)), "SkipSet(9)"),
        (SkipSet(np.array([49, 1, 9])), "SkipSet([1, 9, 49])"),
        (SkipSet(np.float64(0.5)), "SkipSet(0.5)"),
        (SkipSet.for_sampling_steps(50), "SkipSet.for_sampling_steps(50)"),
        (SkipSet.from_timesteps(range(6)), "SkipSet.from_timesteps([0, 1, 2, 3, 4, 5])"),
        (SkipSet.from_timesteps(range(7)), "SkipSet.from_timesteps([0, 1, 2, ..., 5, 6])"),
    ],
)
def test_repr(skip_set, text):
    """Numbers of NumPy's count as well."""
    assert repr(skip_set) == text


def test_skip_sets_are_equal_where_they_say_the_same():
    of_each, again = (
        [
            *(SkipSet(9), SkipSet([9, 49]), SkipSet(9.0)),  # 9 timesteps and 9 units of time
            *(SkipSet.for_sampling_steps(9), SkipSet.from_timesteps([9])),
            SkipSet.from_timesteps([9, 49]),
        ]
        for _ in range(2)
    )
    for i, one in enumerate(of_each):
        for j, other in enumerate(again):
            assert (one == other) == (hash(one) == hash(other)) == (i == j)
    assert SkipSet([49, 9]) == SkipSet([9, 49])
    assert SkipSet.from_timesteps([49, 9, 9]) == SkipSet.from_timesteps(np.array([9, 49]))
    assert SkipSet(9) != 9
