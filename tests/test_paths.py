"""Paths in continuous time: derivatives against 40 digits, velocity, and data at t = 1."""

import functools
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from s2dm_loss.continuous import check_velocity
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon
from s2dm_loss.schedule import check_schedule
from tests.helpers import oracle
from tests.strategies import FLOW, VP, normals, same

T = torch.linspace(0, 1, 41, dtype=torch.float64)
INNER = T[1:-1]
ENDS = torch.tensor([0.0, 1.0])
HALF_PI = math.pi / 2
DATA_AT = pytest.mark.parametrize("data_at", [0, 1])


def gvp(t):
    """SiT's GVP, TrigFlow: alpha = cos(π t / 2), sigma = sin(π t / 2)."""
    return torch.cos(HALF_PI * t), torch.sin(HALF_PI * t)


def own(path, *, data_at=0):
    turned = (lambda t: path(1 - t)) if data_at else path
    return ContinuousSchedule.from_alpha_sigma(turned, data_at=data_at)


def exact(name, times):
    """alpha, sigma, dalpha/dt and dsigma/dt, by 40 digits."""
    pair, rates = oracle.continuous_pair, oracle.continuous_rates
    rows = [[*pair(name, t), *rates(name, t)] for t in times.tolist()]
    return torch.from_numpy(np.array(rows, dtype=float)).unbind(1)


TURNED = ContinuousSchedule.flow(data_at=1)
MAKERS = {
    "vp": ContinuousSchedule.vp,
    "sub_vp": ContinuousSchedule.sub_vp,
    "cosine": functools.partial(ContinuousSchedule.cosine, min_time=1e-4),
    "flow": ContinuousSchedule.flow,
    "gvp": functools.partial(own, gvp),
    "polynomial": functools.partial(own, lambda t: ((1 - t) ** 3, t**2)),
    "ve": functools.partial(own, lambda t: (torch.ones_like(t), 80 * t)),
}


@DATA_AT
@pytest.mark.parametrize("name", MAKERS)
def test_a_path_and_its_derivatives_against_40_digits(name, data_at):
    schedule = MAKERS[name](data_at=data_at)
    schedule.check_derivatives()
    assert schedule.log_alphas_cumprod_at(ENDS)[data_at] == 0
    times = torch.cat([INNER, torch.tensor([0.001, 0.999], dtype=torch.float64)])
    alpha, sigma, *slopes = exact(name, times)
    t, sign = (1 - times, -1) if data_at else (times, 1)
    same(schedule.alpha_sigma(t), (alpha, sigma), rtol=1e-11, atol=0)
    log_bar = (alpha**2 / (alpha**2 + sigma**2)).log()
    same([schedule.log_alphas_cumprod_at(t)], [log_bar], rtol=1e-9, atol=1e-12)
    found = schedule.derivatives(t)
    same(found, [sign * slope for slope in slopes], rtol=1e-12, atol=1e-12)


@DATA_AT
@pytest.mark.parametrize("name", MAKERS)
def test_velocity_gives_what_the_v_of_the_normalised_path_gives(name, data_at):
    """By 40 digits: u = λ x_t + μ v, so the loss on u is μ² times that on v."""
    schedule = MAKERS[name](data_at=data_at)
    t = 1 - INNER if data_at else INNER
    a, b, p, q = (x[:, None, None] for x in exact(name, INNER))
    if data_at:
        p, q = -p, -q
    x0, noise, error = normals(3, len(INNER), 3, 4)
    x_t, norm = a * x0 + b * noise, (a**2 + b**2).sqrt()
    rate, mu = (a * p + b * q) / norm**2, (a * q - b * p) / norm
    v, velocity = (a * noise - b * x0) / norm, p * x0 + q * noise
    torch.testing.assert_close(velocity, rate * x_t + mu * v, rtol=1e-11, atol=1e-11)
    for kind, output in (("velocity", velocity), ("v_prediction", v)):
        found = epsilon_from_output(output, x_t, t, schedule, kind)
        back = output_from_epsilon(noise, x_t, t, schedule, kind)
        same((found, back), (noise, output), rtol=1e-10, atol=1e-10)

    of_v = v + 0.1 * error
    # Small enough that no bound on c² acts, which depend on the scale of the output.
    options = {"tau": 0.9, "reduction": "none", "max_c2": 1e30}
    pairs = {"velocity": (rate * x_t + mu * of_v, velocity), "v_prediction": (of_v, v)}
    found, expected = (
        SkipStepLoss(schedule, 1e-3, prediction_type=kind, **options).from_output(*pair, t, x_t)
        for kind, pair in pairs.items()
    )
    torch.testing.assert_close(found, mu.flatten() ** 2 * expected, rtol=1e-9, atol=0)


def test_a_velocity_that_vanishes_at_the_noise_end_has_tau_times_the_plain_loss_there():
    """x_t = t² x_0 + (1 - t²) ε: at t = 0 both rates are 0, and ε̂ would be 0 / 0."""
    path = ContinuousSchedule.from_alpha_sigma(lambda t: (t**2, 1 - t**2), data_at=1)
    criterion = SkipStepLoss(path, 0.05, prediction_type="velocity", reduction="none")
    (output, x_t), t = normals(2, 2, 5), torch.tensor([0.0, 1e-9], dtype=torch.float64)
    found = criterion.from_output(output, torch.zeros_like(output), t, x_t)
    torch.testing.assert_close(found, 0.99 * output.square().mean(1), rtol=1e-6, atol=0)


def test_the_ends_have_one_sided_limits():
    """0 times infinity where the path is given by its logarithms."""
    logarithms = (
        (lambda t: (torch.log1p(-t), t.log()), (-1.0, -1.0), (1.0, 1.0)),
        (lambda t: (3 * torch.log1p(-t), 2 * t.log()), (-3.0, 0.0), (0.0, 2.0)),
        (lambda t: tuple(x.log() for x in gvp(t)), (0.0, -HALF_PI), (HALF_PI, 0.0)),
    )
    for path, *slopes in logarithms:
        schedule = ContinuousSchedule(path)
        schedule.check_derivatives()
        np.testing.assert_allclose(torch.stack(schedule.derivatives(ENDS)), slopes, atol=1e-9)
    for schedule, sign in ((FLOW, 1.0), (TURNED, -1.0)):
        found = torch.stack(schedule.derivatives(ENDS)).tolist()
        assert found == [[-sign, -sign], [sign, sign]]
    found = ContinuousSchedule.sub_vp().derivatives(ENDS[:1])
    np.testing.assert_allclose(found, [[-0.05], [0.1]], rtol=1e-12)


BY_LOGARITHMS = ContinuousSchedule(
    lambda t: (-0.05 * t, 0.5 * (-(-0.1 * t).expm1()).log()), name="logarithms"
)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ContinuousSchedule.vp(min_time=0), r"dsigma/dt .* got inf at t = 0 on.*min_time above 0"),
        (ContinuousSchedule.vp(data_at=1, min_time=0), r"dsigma/dt .* got -inf at t = 1 on"),
        (
            ContinuousSchedule.from_alpha_sigma(lambda t: ((1 - t**2).sqrt(), t), name="circle"),
            r"dalpha/dt must be finite, got -inf at t = 1 on circle.*the noise end",
        ),
        (BY_LOGARITHMS, "dsigma/dt must be finite, got inf at t = 0 on logarithms"),
    ],
    ids=repr,
)
def test_an_infinite_derivative_is_refused_by_name(schedule, message):
    with pytest.raises(ValueError, match=message):
        SkipStepLoss(schedule, 0.05, prediction_type="velocity")
    with pytest.raises(ValueError, match=message):
        schedule.derivatives(torch.tensor([0.0, 0.5, 1.0]))
    schedule.derivatives(torch.tensor([0.2, 0.5]))
    # Where it cannot be read it is infinite.
    assert torch.func.vmap(lambda t: torch.stack(schedule.derivatives(t)))(ENDS).isinf().any()


def looked_up(t):
    table = torch.linspace(0, 1, 1001, dtype=torch.float64)
    return 1 - t, table[(t * 1000).round().long().clamp(0, 1000)]


def by_numpy(t):
    sigma = torch.from_numpy(np.interp(t.numpy(), [0.0, 1.0], [0.0, 1.0]))
    return 1 - sigma, sigma


NO_DERIVATIVE = {
    looked_up: "dsigma/dt on .* must be the slope of sigma.*looks up a table",
    by_numpy: "must be made of operators that PyTorch can differentiate, got RuntimeError",
    lambda t: ((1 - t).detach(), t): "dalpha/dt on .* must be the slope .* a change of 0 for -",
}


@pytest.mark.parametrize("path", NO_DERIVATIVE)
def test_a_path_without_derivatives_serves_all_but_velocity(path):
    schedule = own(path)
    assert schedule.alpha_sigma(T[20:21])[1].item() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match=NO_DERIVATIVE[path]):
        check_velocity(schedule)


def test_an_interpolated_table_has_derivatives():
    def interpolated(t):
        table = torch.linspace(0, 1, 101, dtype=torch.float64).square()
        row = (t * 100).floor().long().clamp(0, 99)
        return 1 - t, table[row] + (t * 100 - row) * (table[row + 1] - table[row])

    check_velocity(own(interpolated))


@pytest.mark.parametrize("schedule", [own(gvp), ContinuousSchedule.vp(data_at=1), TURNED], ids=repr)
def test_flow_where_it_is_not_the_velocity_is_said_once(schedule):
    said = f"'flow' .* on {re.escape(repr(schedule))} is not the velocity.*type='velocity'"
    with pytest.warns(UserWarning, match=said) as caught:
        SkipStepLoss(schedule, 0.05, prediction_type="flow")
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("name", ["vp", "gvp"])
def test_derivatives_wherever_alpha_sigma_works(name):
    schedule, t = MAKERS[name](data_at=1), torch.tensor([0.2, 0.9])
    expected = torch.stack(schedule.derivatives(t))

    def rates(t):
        return torch.stack(schedule.derivatives(t))

    torch.testing.assert_close(torch.func.vmap(rates, out_dims=1)(t), expected)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(rates(t), expected)
    with torch.autograd.forward_ad.dual_level():
        torch.testing.assert_close(rates(t), expected)
    found, tangent = torch.func.jvp(rates, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(found, expected)
    assert not tangent.any()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert rates(torch.rand(3)).shape == (2, 3)


def test_derivatives_in_several_threads():
    """Levels of forward mode are those of the process: 0 and errors of torch came of it."""
    expected = torch.stack(VP.derivatives(INNER))

    def same(_):
        return all(torch.equal(torch.stack(VP.derivatives(INNER)), expected) for _ in range(200))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(8)))


def test_no_gradient_flows_through_a_path():
    """Neither to t, where it was NaN at the ends, nor to what the path is made of."""
    t = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    at_t = coefficients(FLOW, SkipSet(0.1), t=t)
    slope = torch.nn.Parameter(torch.tensor(0.5))

    def learned(t):
        return 1 - t, t + slope * t * (1 - t)

    with pytest.raises(ValueError, match=r"must be fixed, got values that require a gradient"):
        own(learned)
    slope.requires_grad_(False)
    later = own(learned)
    slope.requires_grad_(True)
    values = [at_t.gain, at_t.weight]
    for path in (FLOW, later):
        values += [*path.alpha_sigma(t), *path.derivatives(t), path.log_alphas_cumprod_at(t)]
    assert not any(value.requires_grad for value in values)
    grad = torch.func.grad(lambda t: sum(FLOW.alpha_sigma(t)).square().sum())(t.detach())
    assert grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_time_that_rounding_puts_beyond_an_end_is_the_end(dtype):
    ulp = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    t = torch.tensor([1 + 2 * ulp, -2 * ulp], dtype=dtype)
    for schedule, alpha in ((FLOW, ENDS.double()), (TURNED, ENDS.double().flip(0))):
        for read in (schedule.alpha_sigma, torch.func.vmap(schedule.alpha_sigma)):
            same(read(t), (alpha, 1 - alpha), rtol=0, atol=0)
        assert schedule.log_alphas_cumprod_at(t).exp().tolist() == alpha.tolist()
    for farther in (1 + 3 * ulp, -3 * ulp):
        outside = torch.tensor([farther], dtype=dtype)
        for read in (FLOW.alpha_sigma, FLOW.log_alphas_cumprod_at):
            with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
                read(outside)
        # Where no value can be read: under vmap as compiled and on a GPU.
        for values in torch.func.vmap(FLOW.alpha_sigma)(outside):
            assert values.isnan().all()


@pytest.mark.filterwarnings("ignore:prediction_type .flow. is noise minus data")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", [FLOW, TURNED], ids=repr)
def test_the_loss_at_a_time_that_rounding_puts_beyond_the_noise_is_that_of_the_end(schedule, dtype):
    """As FlowMatch's first sigma with shift 132: τ times the plain loss, for want of an ε."""
    criterion, ulp = SkipStepLoss(schedule, 0.02, prediction_type="flow"), torch.finfo(dtype).eps
    t = torch.tensor([1 + ulp if schedule is FLOW else -ulp], dtype=dtype)
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert float(criterion.from_output(one, zero, t=t, x_t=zero)) == pytest.approx(0.99)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "cosine", "flow"])
def test_skips_on_a_path_turned_by_hand(name):
    """With t' = 1 - t; only lists of times have a clock of their own."""
    ours, by_hand = MAKERS[name](data_at=1), MAKERS[name](data_at=0)
    t = torch.tensor([0, 0.013, 0.37, 0.5, 0.749, 0.75, 0.9, 0.98, 0.99, 1]).double()
    visited = [0.0, 0.1, 0.35, 0.75, 1.0]
    alike = (SkipSet(0.02), SkipSet([0.02, 0.25]), SkipSet.for_sampling_steps(4))
    lists = SkipSet.from_timesteps(visited), SkipSet.from_timesteps([1 - x for x in visited])
    for skips, turned in (*zip(alike, alike, strict=True), lists):
        earlier, valid = skips.earlier(t, ours)
        expected, expected_valid = turned.earlier(1 - t, by_hand)
        assert torch.equal(valid, expected_valid)
        expected = torch.where(valid, 1 - expected, t)
        torch.testing.assert_close(earlier, expected, rtol=1e-12, atol=1e-12)
        found, expected = coefficients(ours, skips, t=t), coefficients(by_hand, turned, t=1 - t)
        same((found.c2, found.gain), (expected.c2, expected.gain), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skip_is_valid_to_the_rounding_of_one_minus_t(dtype):
    """float32's 0.98 leaves a little less than 0.02, and 1 - float32(0.3) more or less than 0.7."""
    for skip in (0.02, 0.1, 0.3, 0.7, 0.98):
        for t in (torch.tensor([1 - skip], dtype=dtype), 1 - torch.tensor([skip], dtype=dtype)):
            earlier, valid = SkipSet(skip).earlier(t, TURNED)
            assert valid.all()
            assert 1 - 1e-6 < float(earlier) <= 1
    later = torch.tensor([0.9801, 1.0], dtype=dtype)
    assert not SkipSet(0.02).earlier(later, TURNED)[1].any()
    # A skip that is smaller than the rounding is none at the data.
    assert not SkipSet(1e-4).earlier(torch.ones(1, dtype=torch.bfloat16), TURNED)[1].any()


@pytest.mark.parametrize("make", [ContinuousSchedule.vp, ContinuousSchedule.flow])
def test_times_are_drawn_min_time_from_the_data(make):
    ours, by_hand = (
        make(data_at=data_at, min_time=0.2).draw_timesteps(
            1000, device=torch.device("cpu"), generator=torch.Generator().manual_seed(0)
        )
        for data_at in (1, 0)
    )
    assert torch.equal(ours, 1 - by_hand)
    assert 0 <= float(ours.min()) < 0.01
    assert 0.79 < float(ours.max()) <= 0.8


def test_what_says_and_what_refuses_data_at():
    for schedule, said in (
        (ContinuousSchedule.flow(data_at=1), "flow(data_at=1)"),
        (ContinuousSchedule.vp(data_at=1, min_time=0.1), "vp(0.1, 20.0, data_at=1, min_time=0.1)"),
        (own(gvp, data_at=1), "from_alpha_sigma(..., data_at=1)"),
    ):
        assert repr(schedule) == f"ContinuousSchedule.{said}"
    for wrong in (2, True, "1", None):
        with pytest.raises(ValueError, match="data_at must be 0 or 1"):
            ContinuousSchedule.flow(data_at=wrong)
    discrete = NoiseSchedule.linear(10)
    discrete.data_at = 1
    with pytest.raises(ValueError, match=r"data_at=1 is for continuous time.*flip\(0\)"):
        check_schedule(discrete)
