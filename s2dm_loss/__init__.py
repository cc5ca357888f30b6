"""S²-DM, the skip-step training loss of diffusion models, as a library.

>>> from s2dm_loss import NoiseSchedule, SkipStepLoss
>>> criterion = SkipStepLoss(NoiseSchedule.linear(1000), skip_set=9)
"""

from s2dm_loss._version import __version__
from s2dm_loss.coefficients import Coefficients, CompletedSquare, coefficients
from s2dm_loss.continuous import ContinuousSchedule
from s2dm_loss.functional import LossTerms, skip_step_loss
from s2dm_loss.loss import SkipStepLoss
from s2dm_loss.output import RegressionTarget
from s2dm_loss.prediction import epsilon_from_output, output_from_epsilon
from s2dm_loss.sampling import (
    Candidate,
    Correction,
    CorrectionSearch,
    EpsilonScaling,
    PredictionScaling,
    Recommendation,
    ScaledModel,
    ScanPoint,
    ScoreRescaling,
    SearchCost,
    SkipGain,
    StartScaling,
    standard_corrections,
)
from s2dm_loss.sampling.scaled_model import gain
from s2dm_loss.schedule import NoiseSchedule, Schedule
from s2dm_loss.skip_set import SkipSet

__all__ = [
    "Candidate",
    "Coefficients",
    "CompletedSquare",
    "ContinuousSchedule",
    "Correction",
    "CorrectionSearch",
    "EpsilonScaling",
    "LossTerms",
    "NoiseSchedule",
    "PredictionScaling",
    "Recommendation",
    "RegressionTarget",
    "ScaledModel",
    "ScanPoint",
    "Schedule",
    "ScoreRescaling",
    "SearchCost",
    "SkipGain",
    "SkipSet",
    "SkipStepLoss",
    "StartScaling",
    "__version__",
    "coefficients",
    "epsilon_from_output",
    "gain",
    "output_from_epsilon",
    "skip_step_loss",
    "standard_corrections",
]
