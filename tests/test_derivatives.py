"""The derivatives of a path against closed forms, and the paths that have none."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from s2dm_loss.continuous import check_velocity, warn_if_not_straight

T = torch.linspace(0, 1, 41, dtype=torch.float64)
INNER = T[1:-1]
HALF_PI = math.pi / 2


def gvp(t):
    """SiT's GVP, TrigFlow: alpha = cos(π t / 2), sigma = sin(π t / 2)."""
    return torch.cos(HALF_PI * t), torch.sin(HALF_PI * t)


def polynomial(t):
    return (1 - t) ** 3, t**2


def closed_forms(name, t):
    """(alpha, sigma, dalpha/dt, dsigma/dt), by hand."""
    if name in ("vp", "sub_vp"):
        alpha = np.exp(-0.25 * t**2 * 19.9 - 0.05 * t)
        slope = -0.5 * (0.1 + 19.9 * t) * alpha
        if name == "sub_vp":
            return alpha, 1 - alpha**2, slope, -2 * alpha * slope
        sigma = np.sqrt(-np.expm1(-0.5 * t**2 * 19.9 - 0.1 * t))
        return alpha, sigma, slope, -alpha * slope / sigma
    if name == "cosine":
        u, start = (t + 0.008) / 1.008 * HALF_PI, 0.008 / 1.008 * HALF_PI
        alpha, slope = np.cos(u) / np.cos(start), -np.sin(u) / np.cos(start) * HALF_PI / 1.008
        sigma = np.sqrt(np.sin(u - start) * np.sin(u + start)) / np.cos(start)
        return alpha, sigma, slope, -alpha * slope / sigma
    u = HALF_PI * t
    return {
        "flow": (1 - t, t, 0 * t - 1, 0 * t + 1),
        "gvp": (np.cos(u), np.sin(u), -HALF_PI * np.sin(u), HALF_PI * np.cos(u)),
        "polynomial": ((1 - t) ** 3, t**2, -3 * (1 - t) ** 2, 2 * t),
        "ve": (0 * t + 1, 80 * t, 0 * t, 0 * t + 80),
    }[name]


def own(path, data_at, **options):
    if data_at:
        return ContinuousSchedule.from_alpha_sigma(lambda t: path(1 - t), data_at=1, **options)
    return ContinuousSchedule.from_alpha_sigma(path, **options)


MAKERS = {
    "vp": lambda data_at: ContinuousSchedule.vp(data_at=data_at),
    "sub_vp": lambda data_at: ContinuousSchedule.sub_vp(data_at=data_at),
    "cosine": lambda data_at: ContinuousSchedule.cosine(data_at=data_at, min_time=1e-4),
    "flow": lambda data_at: ContinuousSchedule.flow(data_at=data_at),
    "gvp": lambda data_at: own(gvp, data_at),
    "polynomial": lambda data_at: own(polynomial, data_at),
    "ve": lambda data_at: own(lambda t: (torch.ones_like(t), 80 * t), data_at),
}


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("name", MAKERS)
def test_a_path_and_its_derivatives_are_the_closed_forms(name, data_at):
    schedule = MAKERS[name](data_at)
    schedule.check_derivatives()
    times = torch.cat([INNER, torch.tensor([0.001, 0.999], dtype=torch.float64)])
    alpha, sigma, alpha_slope, sigma_slope = closed_forms(name, times.numpy())
    t, sign = (1 - times, -1) if data_at else (times, 1)
    path = schedule.alpha_sigma(t)
    np.testing.assert_allclose(path[0], alpha, rtol=1e-11)
    np.testing.assert_allclose(path[1], sigma, rtol=1e-11)
    log_bar = np.log(alpha**2 / (alpha**2 + sigma**2))
    np.testing.assert_allclose(schedule.log_alphas_cumprod_at(t), log_bar, rtol=1e-9, atol=1e-12)
    found = schedule.derivatives(t)
    np.testing.assert_allclose(sign * found[0].numpy(), alpha_slope, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sign * found[1].numpy(), sigma_slope, rtol=1e-12, atol=1e-12)
    assert found[0].dtype == found[1].dtype == torch.float64


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("name", MAKERS)
def test_velocity_is_lambda_x_t_plus_mu_v(name, data_at):
    """u = λ x_t + μ v, with v that of the normalised path (METHOD, "Any path, any velocity")."""
    schedule = MAKERS[name](data_at)
    t = 1 - INNER if data_at else INNER
    a, b = schedule.alpha_sigma(t)
    p, q = schedule.derivatives(t)
    norm = a**2 + b**2
    rate, mu = (a * p + b * q) / norm, (a * q - b * p) / norm
    x0, noise = 0.7, -1.3
    v = (a * noise - b * x0) / norm.sqrt()
    np.testing.assert_allclose(
        p * x0 + q * noise, rate * (a * x0 + b * noise) + mu * norm.sqrt() * v, rtol=1e-12
    )
    # μ √(a²+b²) is the path's turn: by the difference of its angle.
    h = 1e-5
    angles = [torch.atan2(*reversed(schedule.alpha_sigma(t + way * h))) for way in (1, -1)]
    np.testing.assert_allclose(mu, (angles[0] - angles[1]) / (2 * h), rtol=1e-5, atol=1e-6)


ENDS = torch.tensor([0.0, 1.0])


def test_the_ends_have_one_sided_limits():
    """0 times infinity where the path is given by its logarithms."""
    logarithms = {
        "flow": (lambda t: (torch.log1p(-t), t.log()), (-1.0, -1.0), (1.0, 1.0)),
        "polynomial": (lambda t: (3 * torch.log1p(-t), 2 * t.log()), (-3.0, 0.0), (0.0, 2.0)),
        "gvp": (
            lambda t: (torch.cos(HALF_PI * t).log(), torch.sin(HALF_PI * t).log()),
            (0.0, -HALF_PI),
            (HALF_PI, 0.0),
        ),
    }
    for path, alpha_slope, sigma_slope in logarithms.values():
        schedule = ContinuousSchedule(path)
        schedule.check_derivatives()
        found = schedule.derivatives(ENDS)
        np.testing.assert_allclose(found[0], alpha_slope, atol=1e-9)
        np.testing.assert_allclose(found[1], sigma_slope, atol=1e-9)
    for data_at, sign in ((0, 1.0), (1, -1.0)):
        found = ContinuousSchedule.flow(data_at=data_at).derivatives(ENDS)
        assert torch.stack(found).tolist() == [[-sign, -sign], [sign, sign]]
    np.testing.assert_allclose(
        ContinuousSchedule.sub_vp().derivatives(ENDS[:1]), [[-0.05], [0.1]], rtol=1e-12
    )


def circle(t):
    """dalpha/dt is infinite at the noise end."""
    return (1 - t**2).sqrt(), t


INFINITE = {
    "vp": (ContinuousSchedule.vp(min_time=0), r"dsigma/dt must be finite, got inf at t = 0 on"),
    "vp, data at 1": (
        ContinuousSchedule.vp(data_at=1, min_time=0),
        r"dsigma/dt must be finite, got -inf at t = 1 on",
    ),
    "cosine": (ContinuousSchedule.cosine(), r"dsigma/dt .*min_time above 0"),
    "circle": (
        ContinuousSchedule.from_alpha_sigma(circle, name="circle"),
        r"dalpha/dt must be finite, got -inf at t = 1 on circle.*the noise end",
    ),
    "vp by its logarithms": (
        ContinuousSchedule(
            lambda t: (-0.05 * t, 0.5 * (-(-0.1 * t).expm1()).log()), name="logarithms"
        ),
        "dsigma/dt must be finite, got inf at t = 0 on logarithms",
    ),
}


@pytest.mark.parametrize("case", INFINITE)
def test_an_infinite_derivative_is_refused_by_name(case):
    schedule, message = INFINITE[case]
    with pytest.raises(ValueError, match=message):
        check_velocity(schedule)
    with pytest.raises(ValueError, match=message):
        schedule.derivatives(torch.tensor([0.0, 0.5, 1.0]))
    schedule.derivatives(torch.tensor([0.2, 0.5]))
    # Where it cannot be read it is infinite.
    assert torch.func.vmap(lambda t: torch.stack(schedule.derivatives(t)))(ENDS).isinf().any()


def looked_up(t):
    table = torch.linspace(0, 1, 1001, dtype=torch.float64)
    sigma = table[(t * 1000).round().long().clamp(0, 1000)]
    return 1 - t, sigma


def rounded(t):
    return 1 - t, (t * 7).round() / 7


def by_numpy(t):
    sigma = torch.from_numpy(np.interp(t.numpy(), [0.0, 1.0], [0.0, 1.0]))
    return 1 - sigma, sigma


def detached(t):
    return (1 - t).detach(), t


NO_DERIVATIVE = {
    looked_up: "dsigma/dt on .* must be the slope of sigma.*looks up a table",
    rounded: "dsigma/dt on .* must be the slope of sigma",
    by_numpy: "must be made of operators that PyTorch can differentiate, got RuntimeError",
    detached: "dalpha/dt on .* must be the slope of alpha, got a change of 0 for -",
}


@pytest.mark.parametrize("path", NO_DERIVATIVE)
def test_a_path_without_derivatives_serves_all_but_velocity(path):
    schedule = ContinuousSchedule.from_alpha_sigma(path)
    assert schedule.alpha_sigma(T[20:21])[1].item() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match=NO_DERIVATIVE[path]):
        check_velocity(schedule)


def interpolated(t):
    """A table with straight lines between its rows: its slopes are right."""
    table = torch.linspace(0, 1, 101, dtype=torch.float64).square()
    row = (t * 100).floor().long().clamp(0, 99)
    return 1 - t, table[row] + (t * 100 - row) * (table[row + 1] - table[row])


def test_an_interpolated_table_has_derivatives():
    check_velocity(ContinuousSchedule.from_alpha_sigma(interpolated))


def test_what_has_no_time_has_no_velocity():
    with pytest.raises(ValueError, match="'velocity' takes a schedule with derivatives, got Noise"):
        check_velocity(NoiseSchedule.linear(10))


def test_which_paths_are_not_straight():
    with pytest.warns(UserWarning, match=r"'flow' is noise minus data, .*'velocity'"):
        warn_if_not_straight(own(gvp, 0))
    with pytest.warns(UserWarning, match=r"vp\(0.1, 20.0, data_at=1\) is not the velocity"):
        warn_if_not_straight(ContinuousSchedule.vp(data_at=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data_at in (0, 1):
            warn_if_not_straight(ContinuousSchedule.flow(data_at=data_at))
            warn_if_not_straight(own(lambda t: (1 - t, t), data_at))
        warn_if_not_straight(NoiseSchedule.linear(10))


@pytest.mark.parametrize("name", ["vp", "gvp"])
def test_derivatives_wherever_alpha_sigma_works(name):
    schedule = MAKERS[name](1)
    t = torch.tensor([0.2, 0.9])
    expected = torch.stack(schedule.derivatives(t))

    def rates(t):
        return torch.stack(schedule.derivatives(t))

    torch.compiler.reset()
    compiled = torch.compile(rates, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(t), expected, rtol=1e-12, atol=0)
    assert compiled(torch.tensor([0.2, 1.1]))[:, 1].isnan().all()
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


def test_no_gradient_flows_through_a_path():
    """Neither to t, where it was NaN at the ends, nor to what the path is made of."""
    t = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    schedule = ContinuousSchedule.flow()
    at_t = coefficients(schedule, SkipSet(0.1), t=t)
    for value in (*schedule.alpha_sigma(t), *schedule.derivatives(t), at_t.gain, at_t.weight):
        assert not value.requires_grad
    assert not schedule.log_alphas_cumprod_at(t).requires_grad
    grad = torch.func.grad(lambda t: sum(schedule.alpha_sigma(t)).square().sum())(t.detach())
    assert grad.tolist() == [0.0, 0.0, 0.0]

    slope = torch.nn.Parameter(torch.tensor(0.5))

    def learned(t):
        return 1 - t, t + slope * t * (1 - t)

    with pytest.raises(ValueError, match=r"must be fixed, got values that require a gradient"):
        ContinuousSchedule.from_alpha_sigma(learned)
    slope.requires_grad_(False)
    later = ContinuousSchedule.from_alpha_sigma(learned)
    slope.requires_grad_(True)
    for value in (*later.alpha_sigma(t), *later.derivatives(t), later.log_alphas_cumprod_at(t)):
        assert not value.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_time_that_rounding_puts_beyond_an_end_is_the_end(dtype):
    ulp = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    t = torch.tensor([1 + ulp, -ulp], dtype=dtype)
    for data_at in (0, 1):
        schedule = ContinuousSchedule.flow(data_at=data_at)
        expected = torch.tensor([[data_at, 1 - data_at], [1 - data_at, data_at]])
        assert torch.equal(torch.stack(schedule.alpha_sigma(t)), expected.double())
        assert schedule.log_alphas_cumprod_at(t).exp().tolist() == expected[0].tolist()
        found = torch.func.vmap(lambda t, s=schedule: s.alpha_sigma(t)[0])(t)
        assert torch.equal(found, expected[0].double())
    for farther in (1 + 4 * ulp, -4 * ulp):
        with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
            ContinuousSchedule.flow().alpha_sigma(torch.tensor([farther], dtype=dtype))


def test_the_first_sigma_of_flowmatch_with_shift_132_is_the_end():
    """It is 1 + 1 ulp. There an output says nothing of ε: the loss is τ times the plain one."""
    shift = 1.32
    sigma = torch.tensor([1.0])
    sigma = shift * sigma / (1 + (shift - 1) * sigma)  # as diffusers' FlowMatch makes it
    assert float(sigma) == 1 + torch.finfo(torch.float32).eps
    criterion = SkipStepLoss(ContinuousSchedule.flow(), 0.02, prediction_type="flow")
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert float(criterion.from_output(one, zero, t=sigma, x_t=zero)) == pytest.approx(0.99)
