"""What can be put on a trained network, without training it on.

A correction is one small class, as an objective is: its settings, its name, and what it makes of a
network for one sampler at one number of steps.  The first four have one strength and are the
library's own; the last three are fitted, in closed form or by a minute of gradients, and are here
to be compared with them.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

import s2dm_loss
from benchmarks.quality.data import ImageSet, to_model_range
from benchmarks.quality.named import Named
from benchmarks.quality.samplers import make_scheduler, sample, set_steps, trajectory, visited
from benchmarks.quality.streams import Purpose, generator
from s2dm_loss import NoiseSchedule

FIT_IMAGES = 1024
FIT_NOISES = 128
LONG_RUN = 10
"""How many times the steps of a sampler its reference run has."""


@dataclass(frozen=True)
class Setting:
    """What a correction is made for.

    Attributes:
        schedule: The noise schedule.
        data: The images that the network was trained on.
        sampler: A key of `SAMPLERS`.
        steps: Sampling steps.
        seed: Seed of whatever is drawn for a fit; never the noise that samples start from.
    """

    schedule: NoiseSchedule
    data: ImageSet
    sampler: str
    steps: int
    seed: int


class Corrected(NamedTuple):
    """A corrected network.

    Attributes:
        model: The network.
        start: The factor of the noise that samples start from.
        fitted: What was fitted, by timestep, for the record.
    """

    model: nn.Module
    start: float = 1.0
    fitted: dict[int, list[float]] | None = None


class Correction(Named, ABC):
    """What is put on a trained network, without training.

    Attributes:
        single: Whether it has one strength, which somebody has to choose.
    """

    single: ClassVar[bool] = True

    @abstractmethod
    def apply(self, model: nn.Module, setting: Setting) -> Corrected:
        """Return the corrected network."""


@dataclass(frozen=True)
class Gain(Correction):
    """s(t)·ε̂, with the gain s(t) that `SkipStep` would have taught; its inverse for k < 0."""

    label = "gain{skip}"
    heading = "gain k = {skip}"
    ours = True

    skip: int
    tau: float = 0.99

    @override
    def apply(self, model: nn.Module, setting: Setting) -> Corrected:
        correction = s2dm_loss.SkipGain(setting.schedule, (self.skip,), tau=self.tau)
        return Corrected(correction.correct_model(model, self.skip))


@dataclass(frozen=True)
class EpsilonScaling(Correction):
    """ε̂ / λ (arXiv 2308.15321), with λ = `factor` + `slope` t / T, a constant or a line."""

    label = "scaling{factor:g}"
    heading = "Epsilon Scaling λ = {factor:g}"

    factor: float
    slope: float = 0.0

    @override
    def apply(self, model: nn.Module, setting: Setting) -> Corrected:
        if self.slope:
            count = len(setting.schedule.alphas_cumprod)
            line = self.factor + self.slope * torch.arange(count) / count
            return Corrected(ScaledInTime(model, 1 / line))
        correction = s2dm_loss.EpsilonScaling(setting.schedule, (self.factor,))
        return Corrected(correction.correct_model(model, self.factor))


@dataclass(frozen=True)
class ScoreRescaling(Correction):
    """Temporal Score Rescaling (arXiv 2510.01184) with ψ = 1."""

    label = "rescaling{strength:g}"
    heading = "Temporal Score Rescaling k = {strength:g}"

    strength: float

    @override
    def apply(self, model: nn.Module, setting: Setting) -> Corrected:
        correction = s2dm_loss.ScoreRescaling(setting.schedule, (self.strength,))
        return Corrected(correction.correct_model(model, self.strength))


@dataclass(frozen=True)
class StartScaling(Correction):
    """The noise that samples start from, times a constant."""

    label = "start{factor:g}"
    heading = "start noise · {factor:g}"

    factor: float

    @override
    def apply(self, model: nn.Module, setting: Setting) -> Corrected:
        del setting
        return Corrected(model, self.factor)


class Frequencies(nn.Module):
    """An orthonormal basis of images: the discrete cosine transform of each channel.

    Attributes:
        bands: Which band of frequencies each coordinate belongs to, int64 `[H, W]`: 0 is the mean
            of a channel alone, and each band above is an octave.
    """

    bands: Tensor

    def __init__(self, size: int) -> None:
        """Make the transform of images with sides of `size` pixels."""
        super().__init__()
        place = torch.arange(size, dtype=torch.float64)
        cosines = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
        cosines[0] /= math.sqrt(2)
        self.register_buffer("cosines", cosines.float(), persistent=False)
        frequency = torch.maximum(place[:, None], place)
        octave = frequency.clamp(min=0.5).log2().floor().long() + 1
        self.register_buffer("bands", octave, persistent=False)

    @property
    def count(self) -> int:
        """How many bands there are."""
        return int(self.bands.max()) + 1

    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates of images, `[B, C, H, W]`."""
        cosines = self.get_buffer("cosines")
        return cosines @ x @ cosines.T

    def images(self, coordinates: Tensor) -> Tensor:
        """Return the images of coordinates, `[B, C, H, W]`."""
        cosines = self.get_buffer("cosines")
        return cosines.T @ coordinates @ cosines


class PrincipalAxes(nn.Module):
    """An orthonormal basis of images: the principal axes of a data set.

    Attributes:
        variances: The data's variance along each axis, float64 `[D]`.
    """

    def __init__(self, data: ImageSet) -> None:
        """Take the axes of all images in the model's range."""
        super().__init__()
        values = torch.cat([to_model_range(part).flatten(1) for part in data.images.split(4096)])
        centred = values - values.mean(0)
        covariance = centred.T @ centred / (len(centred) - 1)
        variances, axes = torch.linalg.eigh(covariance.double())
        self.variances = variances.clamp(min=0)
        self.register_buffer("axes", axes.float(), persistent=False)

    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates of images `[B, C, H, W]`: `[B, D]`."""
        return x.flatten(1) @ self.get_buffer("axes")

    def images(self, coordinates: Tensor) -> Tensor:
        """Return the images of coordinates, flat: `[B, D]`."""
        return coordinates @ self.get_buffer("axes").T


class ScaledCoordinates(nn.Module):
    """A network whose answer is multiplied by a gain for each timestep and coordinate.

    Args:
        model: Called `(x, t)` with `t` of shape `[]`; returns ε̂.
        basis: `Frequencies` or `PrincipalAxes`.
        gains: `[T, ...]`, whose rows broadcast against coordinates.
    """

    def __init__(self, model: nn.Module, basis: Frequencies | PrincipalAxes, gains: Tensor) -> None:
        """Wrap a network."""
        super().__init__()
        self.model = model
        self.basis = basis
        self.register_buffer("gains", gains.float(), persistent=False)

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise = self.basis.coordinates(self.model(x, t))
        return self.basis.images(self.get_buffer("gains")[t] * noise).view_as(x)


@dataclass(frozen=True)
class AxisGains(Correction):
    """A gain for each principal axis, with which every step is exact for Gaussian data.

    For a first-order step from σ to σ' along an axis of variance v it is
    ((v + σ²) - √((v + σ²)(v + σ'²))) / (σ (σ - σ')); what it is for another solver follows from
    its own steps, which are linear in ε̂.
    """

    label = "axis-gains"
    heading = "Gaussian gain for each axis"
    single = False

    @override
    def apply(self, model: nn.Module, setting: Setting) -> Corrected:
        basis = PrincipalAxes(setting.data)
        times, gains = gaussian_gains(
            setting.sampler, setting.schedule, setting.steps, basis.variances
        )
        table = torch.ones(len(setting.schedule.alphas_cumprod), gains.shape[1])
        table[times] = gains.float()
        return Corrected(ScaledCoordinates(model, basis, table))


def gaussian_gains(
    sampler: str, schedule: NoiseSchedule, steps: int, variances: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gains on ε̂ that keep a sampler's steps on the exact path of Gaussian data.

    Args:
        sampler: A sampler that visits each of its timesteps once.
        schedule: The noise schedule.
        steps: Sampling steps.
        variances: The data's variances along axes, float64 `[D]`.

    Returns:
        The visited timesteps `[steps]`, and the gains, float64 `[steps, D]`.

    Raises:
        ValueError: If the sampler visits a timestep twice.
    """
    scheduler = make_scheduler(sampler, schedule)
    set_steps(scheduler, sampler, steps)
    times = scheduler.timesteps.long()
    if len(times.unique()) < len(times):
        raise ValueError(f"sampler: expected one that visits each timestep once, got {sampler!r}")
    alphas_cumprod = schedule.alphas_cumprod.double()
    # Along an axis every exact path is proportional to this.
    levels = torch.cat([alphas_cumprod[times], alphas_cumprod.new_ones(1)])[:, None]
    path = (levels * variances + 1 - levels).sqrt()
    gains = []
    for row, t in enumerate(scheduler.timesteps):
        x = path[row]
        noise = x * (1 - levels[row]).sqrt() / path[row].square()
        without, with_it = (
            copy.deepcopy(scheduler).step(factor * noise, t, x, return_dict=False)[0]
            for factor in (0.0, 1.0)
        )
        gains.append((path[row + 1] - without) / (with_it - without))
        scheduler.step(gains[-1] * noise, t, x, return_dict=False)
    return times, torch.stack(gains)


def gaussian_variances(
    sampler: str, schedule: NoiseSchedule, steps: int, variances: Tensor
) -> Tensor:
    """Return the variances of a deterministic sampler's samples of Gaussian data, float64 `[D]`.

    With the exact ε̂, √(1−ᾱ) x_t / (1 − ᾱ + ᾱ v) along an axis of variance v, each sample is
    proportional to its start. So this is what a sampler alone leaves, with nothing left to learn.

    Args:
        sampler: A sampler that draws no noise.
        schedule: The noise schedule.
        steps: Sampling steps.
        variances: The data's variances along axes, float64 `[D]`.
    """
    alphas_cumprod = schedule.alphas_cumprod.double()

    def exact(x: Tensor, t: Tensor) -> Tensor:
        level = alphas_cumprod[t.long()]
        return (1 - level).sqrt() / (1 - level + level * variances) * x

    start = torch.ones_like(variances)[None]
    return sample(exact, sampler, schedule, steps, start, torch.Generator())[0].square()


@dataclass(frozen=True)
class BandGains(Correction):
    """The best gain of each octave of frequencies at each time, E[ε ε̂] / E[ε̂²] on the data.

    It mends what a network has not learned, where a gain in k mends what the sampler does wrong.
    """

    label = "band-gains"
    heading = "best gain of each frequency band"
    single = False

    @override
    def apply(self, model: nn.Module, setting: Setting) -> Corrected:
        basis = Frequencies(setting.data.shape[-1])
        times, gains = best_gains(model, setting, basis)
        table = _between(times, gains, len(setting.schedule.alphas_cumprod))
        fitted = dict(zip(times.tolist(), gains.tolist(), strict=True))
        scaled = ScaledCoordinates(model, basis, table[:, basis.bands][:, None])
        return Corrected(scaled, fitted=fitted)


@torch.inference_mode()
def best_gains(
    model: nn.Module, setting: Setting, basis: Frequencies, count: int = 21
) -> tuple[Tensor, Tensor]:
    """Return E[ε ε̂] / E[ε̂²] of each band of frequencies, on `FIT_IMAGES` images at each time.

    Where a network is the conditional mean it is 1 everywhere.

    Args:
        model: Called `(x, t)` with `t` of shape `[]`; returns ε̂.
        setting: The schedule, the images and a seed.
        basis: The frequencies.
        count: How many times, evenly spaced over the schedule.

    Returns:
        The times, int64 `[count]`, and the gains, float64 `[count, bands]`.
    """
    device = _device(model)
    alphas_cumprod = setting.schedule.alphas_cumprod.double()
    times = torch.linspace(0, len(alphas_cumprod) - 1, count).round().long()
    draw = generator(setting.seed, Purpose.FIT)
    found = []
    for t in times:
        rows = torch.randperm(len(setting.data), generator=draw)[:FIT_IMAGES]
        sums = torch.zeros(2, basis.count, dtype=torch.float64)
        for part in rows.split(256):
            x0 = to_model_range(setting.data.images[part])
            noise = torch.randn(x0.shape, generator=draw)
            level = float(alphas_cumprod[t])
            x_t = math.sqrt(level) * x0 + math.sqrt(1 - level) * noise
            predicted = model(x_t.to(device), t.to(device)).cpu()
            true, guess = (basis.coordinates(values).double() for values in (noise, predicted))
            for row, product in enumerate((true * guess, guess.square())):
                per_place = product.sum((0, 1))
                sums[row].index_add_(0, basis.bands.flatten(), per_place.flatten())
        found.append(sums[0] / sums[1])
    return times, torch.stack(found)


@dataclass(frozen=True)
class StepGains(Correction):
    """One gain for each visited time, fitted to where a run of ten times the steps ends."""

    label = "step-gains"
    heading = "fitted gain for each step"
    single = False

    @override
    def apply(self, model: nn.Module, setting: Setting) -> Corrected:
        schedule, sampler = setting.schedule, setting.sampler
        draw = generator(setting.seed, Purpose.FIT)
        device = _device(model)
        start = torch.randn(FIT_NOISES, *setting.data.shape, generator=draw).to(device)
        wanted = sample(model, sampler, schedule, LONG_RUN * setting.steps, start, draw).clone()
        times = visited(sampler, schedule, setting.steps).to(device)
        gains = torch.ones(len(times), device=device, requires_grad=True)
        optimizer = torch.optim.LBFGS([gains], max_iter=30, line_search_fn="strong_wolfe")

        def scaled(x: Tensor, t: Tensor) -> Tensor:
            factor: Tensor = gains[torch.searchsorted(times, t.long())]
            noise: Tensor = factor * model(x, t)
            return noise

        def closure() -> Tensor:
            optimizer.zero_grad()
            reached = trajectory(scaled, sampler, schedule, setting.steps, start, draw)
            loss = (reached - wanted).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        table = torch.ones(len(schedule.alphas_cumprod), device=device)
        table[times] = gains.detach()
        fitted = dict(zip(times.tolist(), gains.detach()[:, None].tolist(), strict=True))
        return Corrected(ScaledInTime(model, table), fitted=fitted)


class ScaledInTime(nn.Module):
    """A network whose answer is multiplied by a gain for each timestep."""

    def __init__(self, model: nn.Module, gains: Tensor) -> None:
        """Wrap a network."""
        super().__init__()
        self.model = model
        self.register_buffer("gains", gains, persistent=False)

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        noise: Tensor = self.get_buffer("gains")[t] * self.model(x, t)
        return noise


def _device(model: nn.Module) -> torch.device:
    """Return where a network lies; one without parameters is at home anywhere."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _between(times: Tensor, values: Tensor, count: int) -> Tensor:
    """Return values `[times, ...]` at all of `count` times, by straight lines."""
    everywhere = torch.arange(count)
    upper = torch.searchsorted(times, everywhere).clamp(1, len(times) - 1)
    low, high = times[upper - 1], times[upper]
    share = ((everywhere - low) / (high - low)).double()[:, None]
    return values[upper - 1] * (1 - share) + values[upper] * share
