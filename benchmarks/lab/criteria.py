"""Ways of choosing a gain that need neither a feature network nor labels.

``CorrectionSearch`` compares candidates by the Fréchet distance of raw values; here are the others
that it was chosen among.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2dm_loss import NoiseSchedule


def energy_distance(samples: Tensor, data: Tensor) -> float:
    """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, for float64 ``[N, D]`` sets."""

    def within(values: Tensor) -> Tensor:
        return torch.cdist(values, values).sum() / (len(values) * (len(values) - 1))

    return float(2 * torch.cdist(samples, data).mean() - within(samples) - within(data))


class NormRecorder(nn.Module):
    """Keeps the mean L2 norm of a model's ε̂ at each t; ``reset`` returns and forgets it."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap ``model``, called ``(x, t)`` with one t for the whole batch."""
        super().__init__()
        self.model = model
        self._norms: defaultdict[int, list[float]] = defaultdict(list)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Call the model and keep the norm of its answer."""
        epsilon: Tensor = self.model(x, t)
        self._norms[int(t)].append(float(epsilon.flatten(1).norm(dim=1).mean()))
        return epsilon

    def reset(self) -> dict[int, float]:
        """Return the mean norm at each t since the last reset."""
        norms = {t: sum(values) / len(values) for t, values in self._norms.items()}
        self._norms.clear()
        return norms


@torch.inference_mode()
def training_norms(
    model: nn.Module,
    schedule: NoiseSchedule,
    data: Tensor,
    times: list[int],
    generator: torch.Generator,
) -> dict[int, float]:
    """Return the mean norm of ε̂ at true x_t, as the network met them in training."""
    norms = {}
    for t in times:
        a, b = (float(c) for c in schedule.alpha_sigma(torch.tensor(t)))
        noise = torch.randn(data.shape, generator=generator, dtype=data.dtype)
        epsilon: Tensor = model(a * data + b * noise, torch.tensor(t))
        norms[t] = float(epsilon.flatten(1).norm(dim=1).mean())
    return norms


def norm_mismatch(sampling: Mapping[int, float], training: Mapping[int, float]) -> float:
    """Return the root mean square over t of the ratio of the two norms, less 1.

    The measure by which Epsilon Scaling (Ning et al., arXiv 2308.15321) shows that sampling strays
    from training, here as a criterion: the less, the better the gain.
    """
    ratios = torch.tensor([sampling[t] / training[t] - 1 for t in sampling])
    return float(ratios.square().mean().sqrt())


def norm_ratio_line(
    sampling: Mapping[int, float], training: Mapping[int, float], num_train_timesteps: int
) -> Tensor:
    """Return λ(t), ``[T]``: the straight line nearest to the ratio of the two norms at each step.

    A use of the measure of our own: it mends at each step the whole error that has gathered by
    then, as if none of it had been mended before.
    """
    times, ratios = _ratios(sampling, training)
    slope, offset = _fitted(torch.stack([times, torch.ones_like(times)], dim=1), ratios)
    return slope * torch.arange(num_train_timesteps).double() + offset


def accumulated_norm_line(
    sampling: Mapping[int, float], training: Mapping[int, float], num_train_timesteps: int
) -> Tensor:
    """Return λ(t) = k t + b, ``[T]``, fitted to the error that gathers along the trajectory.

    What Epsilon Scaling's authors do with the measure: the ratio of the norms at t, less 1, is the
    sum of the errors λ(u) - 1 of all steps u before it, so that k and b are fitted to the sums.
    """
    times, ratios = _ratios(sampling, training)
    # Sampling runs down: what comes before t is all u > t.
    before = (times[None, :] > times[:, None]).double()
    design = torch.stack([before @ times, before.sum(1)], dim=1)
    slope, offset = _fitted(design, ratios - 1)
    return 1 + slope * torch.arange(num_train_timesteps).double() + offset


def _ratios(sampling: Mapping[int, float], training: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    times = sorted(sampling)
    ratios = [sampling[t] / training[t] for t in times]
    return torch.tensor(times).double(), torch.tensor(ratios).double()


def _fitted(design: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    slope, offset = torch.linalg.lstsq(design, values[:, None]).solution.flatten()
    return slope, offset
