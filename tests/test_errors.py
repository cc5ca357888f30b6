"""Wrong input: the error names the argument, what came and what was expected."""

import math

import pytest
import torch
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, ScaledModel, SkipSet, SkipStepLoss
from s2dm_loss.coefficients import coefficients
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon

LINEAR = NoiseSchedule.linear(1000)
FLOW = ContinuousSchedule.flow()
X = torch.zeros(4, 3, 8, 8)
T = torch.tensor([0, 9, 500, 999])
NAN = math.nan


def loss(output=X, target=X, t=T, x_t=None, *, schedule=LINEAR, skip=9, **kwargs):
    options = {
        name: kwargs.pop(name) for name in ("estimator", "prediction_type") if name in kwargs
    }
    return SkipStepLoss(schedule, skip, **options).from_output(output, target, t, x_t, **kwargs)


def of_v(*arguments, **kwargs):
    return loss(*arguments, prediction_type="v_prediction", **kwargs)


CASES = {
    ValueError: [
        (lambda: loss(t=T // 999 * 1000), r"t must lie in \[0, 1000\), got 1000"),
        (lambda: loss(t=T - 1), r"t must lie in \[0, 1000\), got -1"),
        (lambda: loss(t=T[0]), r"t must have shape \(4,\).*shape \(\)"),
        (lambda: loss(t=T[:1]), r"t must have shape \(4,\).*shape \(1,\)"),
        (lambda: loss(t=T[:, None]), r"t must have shape \(4,\).*\(4, 1\)"),
        (lambda: loss(t=T.to("meta")), r"t must be on the device.*cpu.*meta"),
        (
            lambda: loss(schedule=FLOW, skip=0.1, t=T.float()),
            r"t must lie in \[0, 1\], got values from 0.0 to 999.0",
        ),
        (
            lambda: of_v(X, X, X, T),
            r"t must have shape \(4,\), got .*t comes before x_t, from_output\(output, target, t,",
        ),
        (
            lambda: loss(X, X.clone().requires_grad_(), T),
            r"target requires grad and output does not: the output comes first",
        ),
        (
            lambda: of_v(X, X, T, torch.zeros(4, 6, 8, 8)),
            r"x_t must have the shape of target.*\(4, 6, 8, 8\).*noisy channels alone.*\[:, :3\]",
        ),
        (
            lambda: of_v(X, X, T, torch.zeros(4, 9, 8, 8)),
            r"\(4, 9, 8, 8\).*a condition beside the noisy data.*x_t\[:, :3\]",
        ),
        (lambda: of_v(X, X, T, X[:, :1]), r"got .*\(4, 1, 8, 8\), \S+ on cpu$"),
        (
            lambda: loss(target=X[:, :1]),
            r"output must have the shape of target, \(4, 1, 8, 8\), got .*\(4, 3, 8, 8\)",
        ),
        (lambda: loss(target=X.sum()), r"target must have a batch axis"),
        (
            lambda: loss(output=X.to("meta")),
            r"output must be on the device of target, cpu, got .*meta",
        ),
        (
            lambda: loss(output=torch.zeros(4, 6, 8, 8)),
            r"\(4, 6, 8, 8\).*learned variance.*chunk\(2, dim=1\)",
        ),
        (lambda: loss(weights=torch.ones(4, 1)), r"weights must have shape \(4,\).*\(4, 1\)"),
        (
            lambda: loss(estimator="fresh", skip_noise=X[:2]),
            r"skip_noise must have the shape of target.*\(2, 3, 8, 8\)",
        ),
        (
            lambda: loss(skip_noise=X),
            r"skip_noise belongs to an estimator that draws it, 'fresh', got it with 'expected'",
        ),
        (
            lambda: SkipStepLoss(LINEAR, 9, estimator="fresh").terms(X, X, T),
            r"skip_noise must be given",
        ),
        (lambda: SkipStepLoss(LINEAR, 1000), r"skip must be below 1000.*got 1000"),
        (lambda: SkipStepLoss(LINEAR, 0), r"skip must be positive, got 0"),
        (lambda: SkipSet([9, -1]), r"skip must be positive, got -1"),
        (lambda: SkipSet(NAN), r"skip must be positive, got nan"),
        (lambda: SkipSet([]), r"skip_set must hold at least one skip"),
        (lambda: SkipSet([9, 9]), r"skips must be distinct"),
        (lambda: SkipStepLoss(FLOW, 1.0), r"skip must be below 1.*got 1.0"),
        (lambda: SkipSet.for_sampling_steps(1), r"num_inference_steps must be at least 2, got 1"),
        (
            lambda: SkipStepLoss(NoiseSchedule.linear(10), SkipSet.for_sampling_steps(20)),
            r"num_inference_steps must be at most the schedule's 10",
        ),
        (
            lambda: SkipStepLoss(LINEAR, SkipSet.from_timesteps([0, 1000])),
            r"timesteps must lie in \[0, 999\], got values from 0 to 1000",
        ),
        (
            lambda: SkipStepLoss(LINEAR, SkipSet.from_timesteps([-1, 5])),
            r"timesteps must lie in \[0, 999\], got values from -1 to 5",
        ),
        (
            lambda: SkipStepLoss(FLOW, SkipSet.from_timesteps([0.5, 1.5])),
            r"timesteps must lie in \[0, 1.0\], got values from 0.5 to 1.5",
        ),
        (lambda: SkipSet.from_timesteps([]), r"timesteps must be 1-d"),
        (lambda: SkipSet.from_skipped(range(10), 10), r"timesteps must leave at least one"),
        (lambda: SkipSet.from_skipped([10], 10), r"timesteps must lie in \[0, 10\), got 10"),
        (
            lambda: SkipSet.from_skipped([3, -1], 10),
            r"timesteps must lie in \[0, 10\), got -1 at index 1",
        ),
        (lambda: SkipStepLoss(LINEAR, 9, tau=1.5), r"tau must lie in \[0.*1.5"),
        (lambda: SkipStepLoss(LINEAR, 9, tau=-1), r"tau must lie in \[0.*-1"),
        (lambda: SkipStepLoss(LINEAR, 9, tau=NAN), r"tau must lie in .*nan"),
        (lambda: SkipStepLoss(LINEAR, 9, max_c2=-1), r"max_c2 must lie in \[0.0, inf\], got -1"),
        (
            lambda: SkipStepLoss(LINEAR, 9, estimator="exact"),
            r"estimator must be one of 'expected', 'fresh', 'shared', got 'exact'",
        ),
        (
            lambda: SkipStepLoss(LINEAR, 9, reduction="avg"),
            r"reduction must be one of 'mean', 'sum', 'none', got 'avg'",
        ),
        (
            lambda: SkipStepLoss(LINEAR, 9, weighting="min-snr"),
            r"weighting must be one of 'uniform', .*got 'min-snr': did you mean 'min_snr'\?",
        ),
        (lambda: SkipStepLoss(LINEAR, 9, prediction_type="banana"), r"got 'banana'$"),
        (lambda: coefficients(FLOW, 0.1), r"t must be given for a continuous schedule"),
        (lambda: NoiseSchedule.from_betas([0.5, 1.0, 0.5]), r"betas.*1.0 at index 1"),
        (lambda: NoiseSchedule.from_betas([0.0]), r"betas must lie in \(0, 1\)"),
        (lambda: NoiseSchedule.from_betas([0.1, NAN]), r"betas.*NaN.*index 1"),
        (lambda: NoiseSchedule.from_betas([]), r"betas must be 1-d and not"),
        (
            lambda: NoiseSchedule.from_betas([[0.1]]),
            r"betas must be 1-d and not empty, got shape \(1, 1\)",
        ),
        (
            lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.8, 0.85]),
            r"alphas_cumprod must decrease strictly with t, got 0.85 at index 2",
        ),
        (
            lambda: NoiseSchedule.from_alphas_cumprod([0.9, 0.9]),
            r"alphas_cumprod must decrease strictly with t, got 0.9 at index 1",
        ),
        (
            lambda: NoiseSchedule.from_alphas_cumprod([1.1, 0.9]),
            r"alphas_cumprod must lie in \[0, 1\], got 1.1 at index 0",
        ),
        (
            lambda: NoiseSchedule.from_alphas_cumprod([0.9, -0.1]),
            r"alphas_cumprod must lie in \[0, 1\], got -0.1",
        ),
        (
            lambda: NoiseSchedule.from_log_snr([0.0, 1.0]),
            r"log_snr must decrease strictly.*increases: turn it round",
        ),
        (lambda: NoiseSchedule([0.1]), r"log_alphas_cumprod must be at"),
        (lambda: NoiseSchedule([-2, -1]), r"increase, got -1.0 at index 1"),
        (
            lambda: NoiseSchedule([-1.0, -math.inf, -math.inf]),
            r"must be finite before its end, got -inf at index 1",
        ),
        (lambda: NoiseSchedule.linear(0), r"num_train_timesteps must be at least 1"),
        (
            lambda: NoiseSchedule.linear(9, 0.0, 0.1),
            r"beta_start must lie in \(0.0, 1.0\), got 0.0",
        ),
        (lambda: NoiseSchedule.linear(9, 0.1, 1.0), r"beta_end must lie in \(0.0, 1.0\), got 1.0"),
        (
            lambda: NoiseSchedule.cosine(9, max_beta=1),
            r"max_beta must lie in \(0.0, 1.0\), got 1.0",
        ),
        (
            lambda: NoiseSchedule.linear(1).rescale_zero_terminal_snr(),
            r"schedule of two timesteps or more can be rescaled",
        ),
        (lambda: ContinuousSchedule.vp(2.0, 1.0), r"beta_max must lie in \[2"),
        (lambda: ContinuousSchedule.sub_vp(0.0), r"beta_min must lie in \(0"),
        (
            lambda: ContinuousSchedule.from_alpha_sigma(lambda t: (1 - t, t), min_time=1.0),
            r"min_time must lie in \[0, 1\), got 1.0",
        ),
        (
            lambda: SkipStepLoss(LINEAR, 9)(lambda x, t: x[:, :1], X),
            r"model output must have the shape of x0.*\(4, 1, 8, 8\)",
        ),
        (
            lambda: SkipStepLoss(LINEAR, 9)(lambda x, t: torch.cat([x, x], 1), X),
            r"model output.*learned variance",
        ),
        (lambda: SkipStepLoss(LINEAR, 9)(None, X, noise=X[:2]), r"noise must have the shape of x0"),
        (
            lambda: SkipStepLoss(LINEAR, 9)(None, X, t=T[:2]),
            r"t must have shape \(4,\), one value for each sample of x0",
        ),
        (
            lambda: epsilon_from_output(X[:, :1], X, T, LINEAR, "sample"),
            r"output must have the shape of x_t",
        ),
        (
            lambda: epsilon_from_output(X[:, :1], X, T, LINEAR, "epsilon"),
            r"output must have the shape of x_t",
        ),
        (lambda: output_from_epsilon(X, X, T, LINEAR, "x0"), r"prediction_type must be one of"),
        (lambda: epsilon_from_output(X, X, T[:3], LINEAR, "flow"), r"t must have shape \(4,\)"),
        (lambda: ScaledModel.with_gain(nn.Identity(), LINEAR, 1000), r"skip must be below 1000"),
        *(
            (
                lambda said=said: SkipStepLoss(LINEAR, 9, prediction_type=said),
                rf"prediction_type must be one of 'eps.*got '{said}': did you mean '{meant}'\?",
            )
            for said, meant in {
                "v": "v_prediction",
                "v-prediction": "v_prediction",
                "eps": "epsilon",
                "noise": "epsilon",
                "x0": "sample",
                "Flow": "flow",
            }.items()
        ),
    ],
    TypeError: [
        (lambda: loss(t=T.float()), r"t must hold integer timesteps in \[0, 1000\), got .*float32"),
        (lambda: loss(t=T > 9), r"t must hold integer timesteps.*bool"),
        (lambda: loss(t=T.bfloat16()), r"t must hold integer timesteps.*bfloat16"),
        (lambda: loss(t=[0, 1, 2, 3]), r"t must be a tensor, got .*list"),
        (
            lambda: loss(schedule=FLOW, skip=0.1),
            r"t must hold floating-point times in \[0, 1\], got .*int64",
        ),
        (
            lambda: SkipStepLoss(LINEAR, 9)(X, X, T),
            r"model must be callable, got .*goes to `from_output\(output, target, t, x_t\)`",
        ),
        (lambda: loss(target=X.long()), r"target must be a floating-point"),
        (lambda: loss(target=None), r"target must be a tensor, got None"),
        (lambda: SkipStepLoss(LINEAR, 9.0), r"int skips, in timesteps, got 9.0"),
        (lambda: SkipSet("9"), r"skip_set must be .*got '9' \(str\)"),
        (lambda: SkipSet(None), r"skip_set must be .*got None"),
        (lambda: SkipSet(True), r"skip must be an int or a float, got True"),
        (lambda: SkipSet(["a"]), r"skip must be an int.*got 'a'"),
        (lambda: SkipSet([9, 0.5]), r"all ints .* or all floats"),
        (lambda: SkipStepLoss(FLOW, 9), r"continuous schedule takes skips as floats.*got 9"),
        (lambda: SkipSet.for_sampling_steps(10.0), r"num_inference_steps must be an int, got 10.0"),
        (lambda: SkipSet.from_timesteps("abc"), r"timesteps must be a"),
        (lambda: SkipStepLoss(LINEAR, 9, tau="1"), r"tau must be a real number"),
        (lambda: SkipStepLoss(LINEAR), "skip_set"),
        (
            lambda: SkipStepLoss(1000, 9),
            r"schedule must be a NoiseSchedule or another Schedule, got 1000",
        ),
        (lambda: NoiseSchedule.from_betas("x"), r"betas must be a sequence"),
        (lambda: NoiseSchedule.cosine(10.0), r"num_train_timesteps must be an"),
        (lambda: ContinuousSchedule(3), r"log_alpha_sigma must be callable, got 3"),
        (
            lambda: SkipStepLoss(LINEAR, 9)(lambda x, t: {"sample": x}, X),
            r"model must return a tensor, a tuple .*dict",
        ),
        (lambda: SkipStepLoss(LINEAR, 9)(None, [1.0]), r"x0 must be a tensor"),
        (lambda: ScaledModel.with_gain(lambda x, t: x, LINEAR, 9), r"model must be an nn.Module"),
    ],
}


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [(error, *case) for error, cases in CASES.items() for case in cases],
)
def test_error_names_what_came_and_what_was_expected(error, call, message):
    with pytest.raises(error, match=message):
        call()
