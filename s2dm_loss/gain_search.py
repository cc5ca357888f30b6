"""The search over the gain of S²-DM alone, in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from s2dm_loss.checks import check_iterable
from s2dm_loss.coefficients import DEFAULT_MAX_C2, DEFAULT_TAU
from s2dm_loss.corrections import SkipGain
from s2dm_loss.prediction import PredictionType
from s2dm_loss.recommend import CorrectionSearch
from s2dm_loss.schedule import Schedule


class GainSearch(CorrectionSearch):
    """The search over the gain of S²-DM alone: `GainSearch(model, schedule, sample, data)`.

    >>> import torch
    >>> from s2dm_loss import GainSearch, NoiseSchedule
    >>> class Model(torch.nn.Module):
    ...     def forward(self, x_t, t):
    ...         return x_t
    >>> def sample(model, noise):
    ...     return model(noise, torch.full((len(noise),), 999))
    >>> generator = torch.Generator().manual_seed(1)
    >>> data = torch.randn(2000, 3, generator=generator) * 0.5
    >>> schedule = NoiseSchedule.linear(1000)
    >>> search = GainSearch(
    ...     Model(), schedule, sample, data, skips=[49, 99, 149], tau=0.9
    ... )
    >>> print(search.recommend().strength)
    99
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        sample: Callable[[nn.Module, Tensor], Tensor],
        data: Tensor,
        *,
        skips: Sequence[int] | Sequence[float] | None = None,
        tau: float = DEFAULT_TAU,
        prediction_type: PredictionType = "epsilon",
        max_c2: float = DEFAULT_MAX_C2,
        features: Callable[[Tensor], Tensor] | None = None,
        num_samples: int = 2048,
        batch_size: int = 256,
        noise_shape: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Set the search up; nothing is run yet.

        Args:
            model: As for `CorrectionSearch`, like all arguments that are not named here.
            schedule: The schedule that the model was trained on.
            sample: The sampler.
            data: The data.
            skips: The skips k to compare, all of which are reported; -k is the inverse of the gain
                with k. By default a scan in both directions chooses one.
            tau: τ in (0, 1), held fixed: k and τ are nearly one parameter.
            prediction_type: What the model predicts.
            max_c2: Upper bound on c²; see `coefficients`.
            features: The features.
            num_samples: Samples per candidate.
            batch_size: Samples in one batch.
            noise_shape: Shape of one sample's noise.
            seed: The seed.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        if skips is not None:
            check_iterable("skips", skips)
        correction = SkipGain(
            schedule, skips, tau=tau, prediction_type=prediction_type, max_c2=max_c2
        )
        super().__init__(
            model,
            sample,
            data,
            [correction],
            scan=skips is None,
            features=features,
            num_samples=num_samples,
            batch_size=batch_size,
            noise_shape=noise_shape,
            seed=seed,
        )
