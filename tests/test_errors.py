"""Wrong input: the error names the argument, what came and what was expected."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, ScaledModel, SkipSet, SkipStepLoss, gain
from s2dm_loss.coefficients import coefficients
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon
from s2dm_loss.sampling import standard_corrections
from s2dm_loss.weighting import min_snr, p2, sigmoid, soft_min_snr
from tests.strategies import FLOW, LINEAR, VP, ZERO_SNR

BETA = torch.linspace(1e-4, 0.02, 1000)
BAR = (1 - BETA).cumprod(0)
X, T, NAN = torch.zeros(4, 3, 8, 8), torch.tensor([0, 9, 500, 999]), math.nan
ONE, FALLS = X[:, :1], torch.linspace(0.95, 0.05, 10)
VARIANCES = 1 - BAR, (1 - BAR).sqrt(), 1 - BAR[-100:]
SIX, NINE = (torch.zeros(4, channels, 8, 8) for channels in (6, 9))
CRITERION = SkipStepLoss(LINEAR, 9)


def made(schedule=LINEAR, skip=9, **options):
    return SkipStepLoss(schedule, skip, **options)


def loss(output=X, target=X, t=T, x_t=None, *, schedule=LINEAR, skip=9, **kwargs):
    names = {"estimator", "prediction_type"} & kwargs.keys()
    options = {name: kwargs.pop(name) for name in names}
    return made(schedule, skip, **options).from_output(output, target, t, x_t, **kwargs)


def of_v(*arguments):
    return loss(*arguments, prediction_type="v_prediction")


def of_flow(kind, **options):
    return made(FLOW, 0.01, prediction_type=kind, **options)


BARS, BETAS, LOG_SNR, SIGMAS = (
    getattr(NoiseSchedule, f"from_{name}")
    for name in ("alphas_cumprod", "betas", "log_snr", "sigmas")
)
SCHEDULER = type("Scheduler", (), {"alphas_cumprod": BAR})  # as diffusers' are
OWN, LOGS = ContinuousSchedule.from_alpha_sigma, ContinuousSchedule
SAMPLED, STEPS = SkipSet.from_timesteps, SkipSet.for_sampling_steps
MEANT = {"v-prediction": "v_prediction", "noise": "epsilon", "x0": "sample", "Flow": "flow"}
LEARNED = nn.Linear(1, 1)  # as EDM2's weighting, which is trained beside the network
SHRUNK = ScaledModel.with_gain(nn.Identity(), LINEAR, 9)


def scaled(output, x_t=X, t=5):
    return SHRUNK.rescale(output, x_t, t)


WEIGHT = r"weighting must lie in \[0, 1e\+06\].*"
COUNT = r"got 1000, which looks like the number of timesteps: NoiseSchedule.linear\(1000\)"
CASES = {
    ValueError: [
        (lambda: loss(t=T // 999 * 1000), r"t must lie in \[0, 1000\), got 1000"),
        (lambda: loss(t=T - 1), r"t must lie in \[0, 1000\), got -1"),
        (lambda: loss(t=T[0]), r"t must have shape \(4,\).*shape \(\)"),
        (lambda: loss(t=T[:1]), r"t must have shape \(4,\), .* of target .*shape \(1,\)"),
        (lambda: loss(t=T[:, None]), r"t must have shape \(4,\).*\(4, 1\)"),
        (lambda: loss(t=T.to("meta")), r"t must be on the device.*cpu.*meta"),
        (lambda: loss(schedule=VP, skip=0.1, t=T.float()), r"\[0, 1\], got .* 0.0 to 999.0"),
        (lambda: of_v(X, X, X, T), r"t must have shape \(4,\), got .*t comes before x_t"),
        (lambda: of_v(*[X[:, 0, 0]] * 3, T), r"t must have shape \(4,\), got .*t comes before x_t"),
        (lambda: of_v(X, X, torch.rand(4, 3), X), r"t must have shape \(4,\).*make frames samples"),
        (lambda: loss(X, X.clone().requires_grad_()), "target .* and output does not: the output"),
        (lambda: of_v(X, X, T, SIX), r"x_t must .* target.*\(4, 6, 8, 8\).*noisy .*\[:, :3\]"),
        (lambda: of_v(X, X, T, NINE), r"\(4, 9, 8, 8\).*a condition beside .*x_t\[:, :3\]"),
        (lambda: of_v(X, X, T, ONE), r"got .*\(4, 1, 8, 8\), \S+ on cpu$"),
        (lambda: loss(target=ONE), r"output must .* of target, \(4, 1, 8, 8\), got .*\(4, 3, 8, 8"),
        (lambda: loss(target=X.sum()), "target must have a batch axis"),
        (lambda: loss(X.to("meta")), "output must be on the device of target, cpu, got .*meta"),
        (lambda: loss(SIX), r"\(4, 6, 8, 8\).*learned variance.*chunk\(2, dim=1\)"),
        (lambda: loss(weights=torch.ones(4, 1)), r"weights must have shape \(4,\).*\(4, 1\)"),
        (lambda: loss(estimator="fresh", skip_noise=X[:2]), r"skip_noise .* of target.*\(2, 3, 8"),
        (lambda: loss(skip_noise=X), "skip_noise belongs .*'fresh', got it with 'expected'"),
        (lambda: made(estimator="fresh").terms(X, X, T), "skip_noise must be given"),
        (lambda: made(prediction_type="flow").terms(X, X, T), "terms takes a noise .*'flow'"),
        (lambda: made(LINEAR, 1000), r"skip must be below 1000.*got 1000"),
        (lambda: made(LINEAR, 0), "skip must be positive, got 0"),
        (lambda: SkipSet(NAN), "skip must be positive, got nan"),
        (lambda: SkipSet([]), "skip_set must hold at least one skip"),
        (lambda: SkipSet([9, 9]), "skips must be distinct"),
        (lambda: made(VP, 1.0), r"skip must be below 1.*got 1.0"),
        (lambda: STEPS(1), "num_inference_steps must be at least 2, got 1"),
        (lambda: made(LINEAR, STEPS(1001)), "must be at most the schedule's 1000 timesteps"),
        (lambda: made(LINEAR, SAMPLED([0, 1000])), r"must lie in \[0, 999\], .* 0 to 1000"),
        (lambda: made(LINEAR, SAMPLED([-1, 5])), r"timesteps must lie in \[0, 999\], .* -1 to 5"),
        (lambda: made(VP, SAMPLED([0.5, 1.5])), r"must lie in \[0, 1.0\], .* from 0.5 to 1.5"),
        (lambda: SAMPLED([]), "timesteps must be 1-d"),
        (lambda: BETAS(BETA.flip(0)), r"fall from 0\.02 to 0\.0001: turn the table round"),
        # 20 values, some of them equal.
        (lambda: BETAS(BETA[::50].flip(0).clamp(max=0.015)), r"0\.015 to 0\.0001: turn the table"),
        *((lambda x=x: BETAS(x), "most exceed .*1 - ᾱ or its root") for x in VARIANCES),
        (lambda: BETAS(FALLS), r"fall from 0\.95 to 0\.05, which look like ᾱ"),
        (lambda: BETAS(torch.cat([FALLS, FALLS[5:] / 10])), r"0\.95 to 0\.005, which look like ᾱ"),
        (lambda: NoiseSchedule.linear(1000, 0.02, 1e-4), "beta_start must be at most beta_end"),
        (lambda: BETAS(BETA.clone().requires_grad_()), "betas must be fixed, got one that"),
        (lambda: gain(FLOW, 0.05, t=T / 1000), "prediction_type must be given on"),
        (lambda: gain(LINEAR, 9, prediction_type="velocity"), "takes a schedule with derivatives"),
        (lambda: made(tau=1.5), r"tau must lie in \[0.*1.5"),
        (lambda: made(tau=-1), r"tau must lie in \[0.*-1"),
        (lambda: made(tau=NAN), r"tau must lie in .*nan"),
        (lambda: made(max_c2=-1), r"max_c2 must lie in \[0.0, inf\], got -1"),
        (lambda: made(estimator="exact"), "estimator must be one of 'expected', .* got 'exact'"),
        (lambda: made(reduction="avg"), "reduction must be one of 'mean', .* got 'avg'"),
        (lambda: made(prediction_type="banana"), "got 'banana'$"),
        (lambda: made(prediction_type="velocity"), "a schedule with derivatives, got Noise"),
        (lambda: coefficients(FLOW, 0.1), "t must be given for a continuous schedule"),
        (lambda: BETAS([0.5, 1.0, 1.0]), r"betas must lie in \(0, 1\).*got 1.0 at index 1"),
        (lambda: BETAS([1.0, 0.5]), "got 1.0 at index 0"),
        (lambda: BETAS([0.0]), r"betas must lie in \(0, 1\)"),
        (lambda: BETAS([0.1, NAN]), r"betas.*NaN.*index 1"),
        (lambda: BETAS([]), "betas must be 1-d and not"),
        (lambda: BETAS(1000), COUNT),
        (lambda: BARS(torch.tensor([1000])), COUNT),
        (lambda: BETAS([[0.1]]), r"betas must be 1-d and not empty, got shape \(1, 1\)"),
        (lambda: BARS([0.9, 0.8, 0.85]), "alphas_cumprod must decrease .* 0.85 at index 2"),
        (lambda: BARS([0.9, 0.9]), "alphas_cumprod must decrease strictly .* 0.9 at index 1"),
        (lambda: BARS([0.1, 0.1, 0.2]), r"decrease strictly with t, got 0\.1 at index 1"),
        (lambda: BARS([1.1, 0.9]), r"alphas_cumprod must lie in \[0, 1\], got 1.1 at index 0"),
        (lambda: BARS([0.9, -0.1]), r"alphas_cumprod must lie in \[0, 1\], got -0.1"),
        (lambda: BETAS(BAR), "from_alphas_cumprod takes them"),
        (lambda: BARS(BETA), r"increases: .*flip\(0\).*use from_betas"),
        (lambda: BARS(1 - BETA), r"1 - β .*cumprod\(0\)"),
        (lambda: SIGMAS((1 - BAR).sqrt()), r"never exceed 1.*√\(1-ᾱ\)"),
        (lambda: SIGMAS(torch.linspace(0.001, 1, 1000)), r"ContinuousSchedule.flow"),
        (lambda: SIGMAS([80.0, 1.0, 0.1]), r"decreases.*`sigmas.flip\(0\)`"),
        (lambda: SIGMAS([0.0, 1.0]), "sigmas must be positive and finite"),
        (lambda: SIGMAS([1.0, 2.0]).rescale_zero_terminal_snr(), "variance-pres"),
        (lambda: LOG_SNR(torch.linspace(99, 1, 100)), "ends at 1, which looks like an SNR"),
        # Turned round these would be schedules, and others.
        (lambda: LOG_SNR(-LINEAR.log_snr), "γ .*`-log_snr`"),
        (lambda: BARS(1 - LINEAR.alphas_cumprod), "1 - ᾱ, `1 - alphas_cum"),
        (lambda: LOG_SNR([0.0, 1.0]), r"log_snr must decrease .*increases: .*`log_snr.flip\(0\)`"),
        (lambda: NoiseSchedule([0.1]), "log_alphas_cumprod must be at"),
        (lambda: NoiseSchedule([-2, -1]), "increase, got -1.0 at index 1"),
        (lambda: NoiseSchedule([-1.0, -math.inf, -math.inf]), "finite .* end, got -inf at index 1"),
        (lambda: NoiseSchedule.linear(0), "num_train_timesteps must be at least 1"),
        (lambda: NoiseSchedule.linear(9, 0.0), r"beta_start must lie in \(0.0, 1.0\), got 0.0"),
        (lambda: NoiseSchedule.linear(9, 0.1, 1.0), r"beta_end must lie in \(0.0, 1.0\), got 1.0"),
        (lambda: NoiseSchedule.cosine(9, max_beta=1), r"max_beta must lie in \(0.0, 1.0\), got 1"),
        (lambda: NoiseSchedule.linear(1).rescale_zero_terminal_snr(), "of two timesteps or more"),
        (lambda: ContinuousSchedule.vp(2.0, 1.0), r"beta_max must lie in \[2"),
        (lambda: ContinuousSchedule.vp(0.1, math.inf), "beta_max must lie"),
        (lambda: ContinuousSchedule.sub_vp(0.0), r"beta_min must lie in \(0"),
        (lambda: ContinuousSchedule.flow(min_time=1.0), r"min_time must lie in \[0, 1\), got 1.0"),
        (lambda: LOGS(lambda t: (t.log(), torch.log1p(-t))), r"one that rises.*say data_at=1"),
        (lambda: LOGS(lambda t: (0 * t - 1, 0 * t - 1)), "the same at every t"),
        (lambda: LOGS(lambda t: (t.sum(), t)), r"of the shape of t.*shape \(\)"),
        (lambda: LOGS(lambda t: (t.log(), (t - 2).log())), "without NaN, got NaN"),
        (lambda: LOGS(lambda t: (1 - t, t)), "from_alpha_sigma takes them"),
        (lambda: LOGS(lambda t: (t * 0 + 1, 80 * t + 1)), "from_alpha_sigma takes them"),
        (lambda: OWN(lambda t: (1 - t, t), data_at=1), r"rises from t = 1 on.*say data_at=0"),
        # Between its ends.
        (lambda: OWN(lambda t: (1 - t, t + 0.3 * (12 * t).sin())), "rises from t = 0 on"),
        (lambda: OWN(lambda t: (0.999 - t, t)), "^alpha_sigma must .*at least 0, got -0.001 for t"),
        (lambda: CRITERION(lambda x, t: ONE, X), r"model output must .* of x0.*\(4, 1, 8, 8\)"),
        (lambda: CRITERION(None, X, noise=X[:2]), "noise must have the shape of x0"),
        (lambda: CRITERION(None, X, t=T[:2]), r"t must have shape \(4,\), one value .* of x0"),
        (lambda: epsilon_from_output(ONE, X, T, LINEAR, "sample"), "output must .* shape of x_t"),
        (lambda: output_from_epsilon(X, X, T, LINEAR, "x0"), "prediction_type must be one of"),
        (lambda: epsilon_from_output(X, X, T[:3], LINEAR, "flow"), r"t must have shape \(4,\)"),
        (lambda: scaled(X, t=T[:3]), r"t must have shape \(4,\)"),
        (lambda: scaled(X, t=T[:, None]), r"t must have shape \(4,\)"),
        (lambda: scaled(X[:1], X[:1], T[:2]), r"t must have shape \(1,\)"),
        (lambda: scaled(NINE), "model output must have the shape of x_t"),
        (lambda: scaled(SIX[:, :, :1]), "model output must have the shape of x_t"),
        (lambda: scaled(X[:1]), "model output must have the shape of x_t"),
        (lambda: scaled(X[:, 0, 0, 0], X[:2, 0, 0, 0]), "model output must have the shape of x_t"),
        (lambda: ScaledModel(nn.Identity(), LINEAR, lambda t: torch.ones(3)), "scale must return"),
        (lambda: ScaledModel(nn.Identity(), LINEAR, lambda t: 0.9), "scale must return a floating"),
        (lambda: ScaledModel(nn.Identity(), LINEAR, torch.ones_like), "scale must return a float"),
        (lambda: made(prediction_type="v"), r"one of 'eps.*'v': did you mean 'v_prediction'\?"),
        (lambda: made(prediction_type="eps"), "'eps': did you mean 'epsilon'"),
        *(
            (lambda kind=kind: made(prediction_type=kind), f"did you mean '{meant}'")
            for kind, meant in MEANT.items()
        ),
        (lambda: made(weighting="min-snr"), r"must .*'min-snr': did you mean 'min_snr'\?"),
        (lambda: min_snr(0.0), r"gamma must lie in \(0.0, inf\)"),
        (lambda: soft_min_snr(0.0), r"gamma must lie in \(0.0, inf\)"),
        (lambda: p2(0.0), r"k must lie in \(0.0, inf\)"),
        (lambda: p2(1, -1), r"gamma must lie in \[0.0, inf\]"),
        (lambda: sigmoid(math.inf), r"bias must lie in \(-inf, inf\)"),
        (lambda: made(ZERO_SNR, weighting="debiased"), WEIGHT + "index 999 of 1000.*no bound"),
        (lambda: of_flow("sample", weighting="uniform"), WEIGHT + "index 0 of 17.* no noise, snr"),
        (lambda: of_flow("epsilon", weighting="debiased"), WEIGHT + "no signal, 1 / snr has no b"),
        (lambda: made(FLOW, 0.01), "prediction_type must be given on Con.*flow.*'flow' for noise"),
        (lambda: ScaledModel.with_gain(LEARNED, FLOW, 0.1), "prediction_type must be given on"),
        (lambda: standard_corrections(FLOW), "prediction_type must be given on"),
        (lambda: made(weighting=LEARNED), "weighting must be fixed, got Linear.* with parameters"),
        (lambda: made(weighting=lambda log_snr: log_snr.mean()), "of the shape of log SNR"),
    ],
    TypeError: [
        (lambda: made(weighting=5.0), "weighting must be .* got 5.0"),
        (lambda: made(weighting=lambda log_snr: 1.0), "weighting must return a tensor, got 1.0"),
        (lambda: made(weighting=min_snr), r"weighting must be called, min_snr\(\)"),
        (lambda: loss(t=T.float()), r"t must hold integer timesteps in \[0, 1000\), got .*float32"),
        (lambda: loss(t=T > 9), r"t must hold integer timesteps.*bool"),
        (lambda: loss(t=[0, 1, 2, 3]), r"t must be a tensor, got .*list"),
        (lambda: loss(schedule=VP, skip=0.1), r"floating-point times in \[0, 1\], got .*int64"),
        (lambda: CRITERION.coefficients_at(T / 1000), r"t / 1000 as `\(1000 \* t\)\.round"),
        (lambda: CRITERION(X, X, T), r"model must be callable, .*goes to `from_output\(output, ta"),
        (lambda: loss(target=X.long()), "target must be a floating-point"),
        (lambda: loss(target=None), "target must be a tensor, got None"),
        (lambda: made(LINEAR, 9.0), r"in timesteps, got 9.0: on 1000 timesteps that is 9$"),
        (lambda: made(LINEAR, math.inf), "got inf: on 1000 timesteps that is 999$"),
        (lambda: made(LINEAR, 0.02), "got 0.02, a skip in units of time: on 1000 .* is 20"),
        (lambda: made(LINEAR, T), r"SkipSet\.from_timesteps"),
        (lambda: SkipSet("9"), r"skip_set must be .*got '9' \(str\)"),
        (lambda: SkipSet(True), "skip must be an int or a float, got True"),
        (lambda: SkipSet(["a"]), r"skip must be an int.*got 'a'"),
        (lambda: SkipSet([9, 0.5]), "all ints .* or all floats"),
        (lambda: made(VP, 9), r"continuous schedule takes skips as floats.*such as 0.01, got 9"),
        (lambda: STEPS(10.0), "num_inference_steps must be an int, got 10.0"),
        (lambda: made(tau="1"), "tau must be a real number"),
        (lambda: SkipStepLoss(LINEAR), "skip_set"),
        (lambda: made(BETA), "got a Tensor: NoiseSchedule.from_betas takes β, from_alphas_cumprod"),
        (lambda: made(np.ones(3000)), "got a ndarray: NoiseSchedule.from_betas takes"),
        (lambda: made(1000), r"schedule must .*got 1000 \(int\): NoiseSchedule.linear\(1000\)"),
        (lambda: made("linear"), r"got 'linear' \(str\): NoiseSchedule.linear\(1000\)"),
        (lambda: made(SCHEDULER()), "got a Scheduler: NoiseSchedule.from_alphas_cumprod"),
        (lambda: coefficients(None, 9), "got a NoneType: see NoiseSchedule"),
        (lambda: coefficients(LINEAR, 1, t=[1]), r"t must be a tensor, got \[1\]"),
        (lambda: BETAS("x"), "betas must be a sequence"),
        (lambda: NoiseSchedule.cosine(10.0), "num_train_timesteps must be an"),
        (lambda: ScaledModel(nn.Identity(), LINEAR, 0.9), r"scale must be callable as scale\(t\)"),
        (lambda: LOGS(3), "log_alpha_sigma must be callable, got 3"),
        (lambda: LOGS(lambda t: t), "must return two tensors.*got a tensor of shape"),
        (
            lambda: OWN(lambda t: (1.0, t)),
            r"^alpha_sigma must .* alpha and sigma.*got 1.0 .* and a",
        ),
        (lambda: CRITERION(lambda x, t: {"sample": x}, X), r"model must return a tensor.*dict"),
        (lambda: CRITERION(None, [1.0]), "x0 must be a tensor"),
        (lambda: ScaledModel.with_gain(lambda x, t: x, LINEAR, 9), "model must be an nn.Module"),
    ],
}


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [(error, *case) for error, cases in CASES.items() for case in cases],
)
def test_error_names_what_came_and_what_was_expected(error, call, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value)) < 400
