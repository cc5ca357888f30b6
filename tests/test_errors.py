"""Wrong input: the error names the argument, what came and what was expected."""

import math

import pytest
import torch
from torch import nn

from s2dm_loss import (
    ContinuousSchedule,
    NoiseSchedule,
    ScaledModel,
    SkipSet,
    SkipStepLoss,
    coefficients,
    epsilon_from_output,
    output_from_epsilon,
    skip_step_loss,
)

LINEAR = NoiseSchedule.linear(1000)
FLOW = ContinuousSchedule.flow()
X = torch.zeros(4, 3, 8, 8)
T = torch.tensor([0, 9, 500, 999])
NAN = math.nan


def loss(eps_hat=X, noise=X, t=T, **kwargs):
    options = {
        name: kwargs.pop(name) for name in ("estimator", "schedule", "skip") if name in kwargs
    }
    criterion = SkipStepLoss(
        options.get("schedule", LINEAR),
        options.get("skip", 9),
        estimator=options.get("estimator", "expected"),
    )
    return criterion.from_prediction(eps_hat, noise, t, **kwargs)


CASES = [
    # t
    ("t too large", lambda: loss(t=T + 1), ValueError, r"t must lie in \[0, 1000\), got 1000"),
    ("t negative", lambda: loss(t=T - 1), ValueError, r"t must lie in \[0, 1000\), got -1"),
    (
        "t float",
        lambda: loss(t=T.float()),
        TypeError,
        r"t must hold integer timesteps in \[0, 1000\), got .*float32",
    ),
    ("t bool", lambda: loss(t=T > 9), TypeError, r"t must hold integer timesteps.*bool"),
    (
        "t bfloat16",
        lambda: loss(t=T.bfloat16()),
        TypeError,
        r"t must hold integer timesteps.*bfloat16",
    ),
    ("t scalar", lambda: loss(t=T[0]), ValueError, r"t must have shape \(4,\).*shape \(\)"),
    ("t of 1", lambda: loss(t=T[:1]), ValueError, r"t must have shape \(4,\).*shape \(1,\)"),
    ("t 2-d", lambda: loss(t=T[:, None]), ValueError, r"t must have shape \(4,\).*\(4, 1\)"),
    ("t device", lambda: loss(t=T.to("meta")), ValueError, r"t must be on the device.*cpu.*meta"),
    ("t list", lambda: loss(t=[0, 1, 2, 3]), TypeError, r"t must be a tensor, got .*list"),
    (
        "t int in continuous time",
        lambda: loss(schedule=FLOW, skip=0.1),
        TypeError,
        r"t must hold floating-point times in \[0, 1\], got .*int64",
    ),
    (
        "t out of range in continuous time",
        lambda: loss(schedule=FLOW, skip=0.1, t=T.float()),
        ValueError,
        r"t must lie in \[0, 1\], got values from 0.0 to 999.0",
    ),
    (
        "a prediction for the model",
        lambda: SkipStepLoss(LINEAR, 9)(X, X, T),
        TypeError,
        r"model must be callable, got .*goes to `from_prediction\(eps_hat, noise, t\)`",
    ),
    # noise and eps_hat
    (
        "noise shape",
        lambda: loss(noise=X[:, :1]),
        ValueError,
        r"eps_hat must have the shape of noise, \(4, 1, 8, 8\), got .*\(4, 3, 8, 8\)",
    ),
    ("noise int", lambda: loss(noise=X.long()), TypeError, r"noise must be a floating-point"),
    ("noise none", lambda: loss(noise=None), TypeError, r"noise must be a tensor, got None"),
    ("noise 0-d", lambda: loss(noise=X.sum()), ValueError, r"noise must have a batch axis"),
    (
        "eps_hat device",
        lambda: loss(eps_hat=X.to("meta")),
        ValueError,
        r"eps_hat must be on the device of noise, cpu, got .*meta",
    ),
    (
        "2C channels",
        lambda: loss(eps_hat=torch.zeros(4, 6, 8, 8)),
        ValueError,
        r"\(4, 6, 8, 8\).*learned variance.*chunk\(2, dim=1\)",
    ),
    (
        "weights",
        lambda: loss(weights=torch.ones(4, 1)),
        ValueError,
        r"weights must have shape \(4,\).*\(4, 1\)",
    ),
    (
        "skip_noise shape",
        lambda: loss(estimator="fresh", skip_noise=X[:2]),
        ValueError,
        r"skip_noise must have the shape of noise.*\(2, 3, 8, 8\)",
    ),
    (
        "skip_noise without use",
        lambda: loss(skip_noise=X),
        ValueError,
        r"skip_noise belongs to the estimator 'fresh', got it with 'expected'",
    ),
    (
        "terms of fresh without noise",
        lambda: SkipStepLoss(LINEAR, estimator="fresh").terms(X, X, T),
        ValueError,
        r"skip_noise must be given",
    ),
    # the constructor
    (
        "skip T",
        lambda: SkipStepLoss(LINEAR, 1000),
        ValueError,
        r"skip must be below 1000.*got 1000",
    ),
    ("skip 0", lambda: SkipStepLoss(LINEAR, 0), ValueError, r"skip must be positive, got 0"),
    ("skip negative", lambda: SkipSet([9, -1]), ValueError, r"skip must be positive, got -1"),
    ("skip nan", lambda: SkipSet(NAN), ValueError, r"skip must be positive, got nan"),
    ("skip float", lambda: SkipStepLoss(LINEAR, 9.0), TypeError, r"int skips, such as 9, got 9.0"),
    ("skip str", lambda: SkipSet("9"), TypeError, r"skip_set must be .*got '9' \(str\)"),
    ("skip None", lambda: SkipSet(None), TypeError, r"skip_set must be .*got None"),
    ("skip bool", lambda: SkipSet(True), TypeError, r"skip must be an int or a float, got True"),
    ("skip list of str", lambda: SkipSet(["a"]), TypeError, r"skip must be an int.*got 'a'"),
    ("skips none", lambda: SkipSet([]), ValueError, r"skip_set must hold at least one skip"),
    ("skips twice", lambda: SkipSet([9, 9]), ValueError, r"skips must be distinct"),
    ("skips mixed", lambda: SkipSet([9, 0.5]), TypeError, r"all ints .* or all floats"),
    (
        "int skip in continuous time",
        lambda: SkipStepLoss(FLOW, 9),
        TypeError,
        r"continuous schedule takes skips as floats.*got 9",
    ),
    (
        "skip of 1 in continuous time",
        lambda: SkipStepLoss(FLOW, 1.0),
        ValueError,
        r"skip must be below 1.*got 1.0",
    ),
    (
        "one sampling step",
        lambda: SkipSet.for_sampling_steps(1),
        ValueError,
        r"num_inference_steps must be at least 2, got 1",
    ),
    (
        "float sampling steps",
        lambda: SkipSet.for_sampling_steps(10.0),
        TypeError,
        r"num_inference_steps must be an int, got 10.0",
    ),
    (
        "more sampling steps than T",
        lambda: SkipStepLoss(NoiseSchedule.linear(10), SkipSet.for_sampling_steps(20)),
        ValueError,
        r"num_inference_steps must be at most the schedule's 10",
    ),
    (
        "sampled timestep beyond T",
        lambda: SkipStepLoss(LINEAR, SkipSet.from_timesteps([0, 1000])),
        ValueError,
        r"timesteps must lie in \[0, 999\], got values from 0 to 1000",
    ),
    (
        "sampled timestep below 0",
        lambda: SkipStepLoss(LINEAR, SkipSet.from_timesteps([-1, 5])),
        ValueError,
        r"timesteps must lie in \[0, 999\], got values from -1 to 5",
    ),
    (
        "sampled time beyond 1",
        lambda: SkipStepLoss(FLOW, SkipSet.from_timesteps([0.5, 1.5])),
        ValueError,
        r"timesteps must lie in \[0, 1.0\], got values from 0.5 to 1.5",
    ),
    ("no timesteps", lambda: SkipSet.from_timesteps([]), ValueError, r"timesteps must be 1-d"),
    ("timesteps str", lambda: SkipSet.from_timesteps("abc"), TypeError, r"timesteps must be a"),
    (
        "all skipped",
        lambda: SkipSet.from_skipped(range(10), 10),
        ValueError,
        r"timesteps must leave at least one",
    ),
    (
        "skipped beyond T",
        lambda: SkipSet.from_skipped([10], 10),
        ValueError,
        r"timesteps must lie in \[0, 10\), got 10",
    ),
    (
        "skipped below 0",
        lambda: SkipSet.from_skipped([3, -1], 10),
        ValueError,
        r"timesteps must lie in \[0, 10\), got -1 at index 1",
    ),
    ("tau 1.5", lambda: SkipStepLoss(LINEAR, tau=1.5), ValueError, r"tau must lie in \[0.*1.5"),
    ("tau -1", lambda: SkipStepLoss(LINEAR, tau=-1), ValueError, r"tau must lie in \[0.*-1"),
    ("tau nan", lambda: SkipStepLoss(LINEAR, tau=NAN), ValueError, r"tau must lie in .*nan"),
    ("tau str", lambda: SkipStepLoss(LINEAR, tau="1"), TypeError, r"tau must be a real number"),
    (
        "max_c2",
        lambda: SkipStepLoss(LINEAR, max_c2=-1),
        ValueError,
        r"max_c2 must lie in \[0.0, inf\], got -1",
    ),
    (
        "estimator",
        lambda: SkipStepLoss(LINEAR, estimator="exact"),
        ValueError,
        r"estimator must be one of 'expected', 'fresh', 'shared', got 'exact'",
    ),
    (
        "reduction",
        lambda: SkipStepLoss(LINEAR, reduction="avg"),
        ValueError,
        r"reduction must be one of 'mean', 'sum', 'none', got 'avg'",
    ),
    (
        "reduction of the function",
        lambda: skip_step_loss(X, X, T, schedule=LINEAR, reduction="avg"),
        ValueError,
        r"reduction must be one of",
    ),
    (
        "estimator of the function",
        lambda: skip_step_loss(X, X, T, schedule=LINEAR, estimator="avg"),
        ValueError,
        r"estimator must be one of",
    ),
    (
        "prediction type",
        lambda: SkipStepLoss(LINEAR, prediction_type="eps"),
        ValueError,
        r"prediction_type must be one of 'epsilon', .*got 'eps'",
    ),
    (
        "schedule",
        lambda: SkipStepLoss(1000),
        TypeError,
        r"schedule must be a NoiseSchedule or another Schedule, got 1000",
    ),
    (
        "coefficients of a continuous schedule without t",
        lambda: coefficients(FLOW, 0.1),
        ValueError,
        r"t must be given for a continuous schedule",
    ),
    # schedules
    (
        "beta 1",
        lambda: NoiseSchedule.from_betas([0.5, 1.0, 0.5]),
        ValueError,
        r"betas.*1.0 at index 1",
    ),
    ("beta 0", lambda: NoiseSchedule.from_betas([0.0]), ValueError, r"betas must lie in \(0, 1\)"),
    ("beta nan", lambda: NoiseSchedule.from_betas([0.1, NAN]), ValueError, r"betas.*NaN.*index 1"),
    ("no betas", lambda: NoiseSchedule.from_betas([]), ValueError, r"betas must be 1-d and not"),
    (
        "betas 2-d",
        lambda: NoiseSchedule.from_betas([[0.1]]),
        ValueError,
        r"betas must be 1-d and not empty, got shape \(1, 1\)",
    ),
    ("betas str", lambda: NoiseSchedule.from_betas("x"), TypeError, r"betas must be a sequence"),
    (
        "rising ᾱ",
        lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.8, 0.85]),
        ValueError,
        r"alphas_cumprod must decrease strictly with t, got 0.85 at index 2",
    ),
    (
        "flat ᾱ",
        lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.9]),
        ValueError,
        r"alphas_cumprod must decrease strictly with t, got 0.9 at index 1",
    ),
    (
        "ᾱ above 1",
        lambda: NoiseSchedule.from_alphas_cumprod([1.1, 0.9]),
        ValueError,
        r"alphas_cumprod must lie in \[0, 1\], got 1.1 at index 0",
    ),
    (
        "ᾱ below 0",
        lambda: NoiseSchedule.from_alphas_cumprod([0.9, -0.1]),
        ValueError,
        r"alphas_cumprod must lie in \[0, 1\], got -0.1",
    ),
    (
        "rising SNR",
        lambda: NoiseSchedule.from_log_snr([0.0, 1.0]),
        ValueError,
        r"log_snr must decrease strictly.*increases: turn it round",
    ),
    ("log ᾱ above 0", lambda: NoiseSchedule([0.1]), ValueError, r"log_alphas_cumprod must be at"),
    ("log ᾱ rises", lambda: NoiseSchedule([-2, -1]), ValueError, r"increase, got -1.0 at index 1"),
    (
        "log ᾱ infinite early",
        lambda: NoiseSchedule([-1.0, -math.inf, -math.inf]),
        ValueError,
        r"must be finite before its end, got -inf at index 1",
    ),
    ("T 0", lambda: NoiseSchedule.linear(0), ValueError, r"num_train_timesteps must be at least 1"),
    ("T float", lambda: NoiseSchedule.cosine(10.0), TypeError, r"num_train_timesteps must be an"),
    (
        "beta_start",
        lambda: NoiseSchedule.linear(9, 0.0, 0.1),
        ValueError,
        r"beta_start must lie in \(0.0, 1.0\), got 0.0",
    ),
    (
        "beta_end",
        lambda: NoiseSchedule.linear(9, 0.1, 1.0),
        ValueError,
        r"beta_end must lie in \(0.0, 1.0\), got 1.0",
    ),
    (
        "max_beta",
        lambda: NoiseSchedule.cosine(9, max_beta=1),
        ValueError,
        r"max_beta must lie in \(0.0, 1.0\), got 1.0",
    ),
    (
        "one timestep to rescale",
        lambda: NoiseSchedule.linear(1).rescale_zero_terminal_snr(),
        ValueError,
        r"schedule of two timesteps or more can be rescaled",
    ),
    ("beta_max", lambda: ContinuousSchedule.vp(2.0, 1.0), ValueError, r"beta_max must lie in \[2"),
    ("beta_min", lambda: ContinuousSchedule.sub_vp(0.0), ValueError, r"beta_min must lie in \(0"),
    ("path", lambda: ContinuousSchedule(3), TypeError, r"log_alpha_sigma must be callable, got 3"),
    (
        "min_time",
        lambda: ContinuousSchedule.from_alpha_sigma(lambda t: (1 - t, t), min_time=1.0),
        ValueError,
        r"min_time must lie in \[0, 1\), got 1.0",
    ),
    # forward
    (
        "model output shape",
        lambda: SkipStepLoss(LINEAR)(lambda x, t: x[:, :1], X),
        ValueError,
        r"model output must have the shape of x0.*\(4, 1, 8, 8\)",
    ),
    (
        "model output with a variance",
        lambda: SkipStepLoss(LINEAR)(lambda x, t: torch.cat([x, x], 1), X),
        ValueError,
        r"model output.*learned variance",
    ),
    (
        "model output type",
        lambda: SkipStepLoss(LINEAR)(lambda x, t: {"sample": x}, X),
        TypeError,
        r"model must return a tensor, a tuple .*dict",
    ),
    ("x0", lambda: SkipStepLoss(LINEAR)(None, [1.0]), TypeError, r"x0 must be a tensor"),
    (
        "noise of forward",
        lambda: SkipStepLoss(LINEAR)(None, X, noise=X[:2]),
        ValueError,
        r"noise must have the shape of x0",
    ),
    (
        "t of forward",
        lambda: SkipStepLoss(LINEAR)(None, X, t=T[:2]),
        ValueError,
        r"t must have shape \(4,\), one value for each sample of x0",
    ),
    # conversions and the gain
    (
        "conversion shape",
        lambda: epsilon_from_output(X[:, :1], X, T, LINEAR, "sample"),
        ValueError,
        r"output must have the shape of x_t",
    ),
    (
        "conversion shape of a noise prediction",
        lambda: epsilon_from_output(X[:, :1], X, T, LINEAR, "epsilon"),
        ValueError,
        r"output must have the shape of x_t",
    ),
    (
        "conversion type",
        lambda: output_from_epsilon(X, X, T, LINEAR, "x0"),
        ValueError,
        r"prediction_type must be one of",
    ),
    (
        "conversion t",
        lambda: epsilon_from_output(X, X, T[:3], LINEAR, "flow"),
        ValueError,
        r"t must have shape \(4,\)",
    ),
    (
        "model to shrink",
        lambda: ScaledModel.with_gain(lambda x, t: x, LINEAR, 9),
        TypeError,
        r"model must be an nn.Module",
    ),
    (
        "skip of the gain",
        lambda: ScaledModel.with_gain(nn.Identity(), LINEAR, 1000),
        ValueError,
        r"skip must be below 1000",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_error_names_what_came_and_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
