"""S²-DM, the skip-step training loss of diffusion models, as a library.

>>> from s2dm_loss import NoiseSchedule, SkipStepLoss
>>> criterion = SkipStepLoss(NoiseSchedule.linear(1000), skip_set=49)

What is used less often is imported from its module: `s2dm_loss.sampling`, `s2dm_loss.monitor`,
`s2dm_loss.prediction`, `s2dm_loss.weighting`, `s2dm_loss.coefficients`, `s2dm_loss.testing` and
`s2dm_loss.adapters`.
"""

from s2dm_loss._version import __version__
from s2dm_loss.coefficients import gain
from s2dm_loss.continuous import ContinuousSchedule
from s2dm_loss.loss import SkipStepLoss
from s2dm_loss.monitor import LossByNoise
from s2dm_loss.sampling import CorrectionSearch, ScaledModel, ScoreRescaling, SkipGain
from s2dm_loss.schedule import NoiseSchedule
from s2dm_loss.skip_set import SkipSet
from s2dm_loss.validation import validation_loss

__all__ = [
    "ContinuousSchedule",
    "CorrectionSearch",
    "LossByNoise",
    "NoiseSchedule",
    "ScaledModel",
    "ScoreRescaling",
    "SkipGain",
    "SkipSet",
    "SkipStepLoss",
    "__version__",
    "gain",
    "validation_loss",
]
