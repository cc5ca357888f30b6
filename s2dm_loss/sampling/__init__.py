"""For a trained model: corrections of its samples, and a search for the one that suits it.

ScaledModel          any factor s(t) on the noise prediction; `with_gain` is S²-DM's
SkipGain, EpsilonScaling, ScoreRescaling, StartScaling
corrections with one strength each
CorrectionSearch     which correction, how strong, and is it better than none?
"""

from s2dm_loss.sampling.corrections import (
    Correction,
    EpsilonScaling,
    NoCorrection,
    PredictionScaling,
    ScoreRescaling,
    SkipGain,
    StartScaling,
    standard_corrections,
)
from s2dm_loss.sampling.result import Candidate, Recommendation, ScanPoint, SearchCost
from s2dm_loss.sampling.scaled_model import ScaledModel
from s2dm_loss.sampling.search import CorrectionSearch

__all__ = [
    "Candidate",
    "Correction",
    "CorrectionSearch",
    "EpsilonScaling",
    "NoCorrection",
    "PredictionScaling",
    "Recommendation",
    "ScaledModel",
    "ScanPoint",
    "ScoreRescaling",
    "SearchCost",
    "SkipGain",
    "StartScaling",
    "standard_corrections",
]
