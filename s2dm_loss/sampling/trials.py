"""Running candidates: what one of them is, on which noise, and how its samples are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss.checks import describe
from s2dm_loss.sampling.corrections import Correction
from s2dm_loss.sampling.frechet import Axes, FrechetComparison
from s2dm_loss.sampling.progress import Reporter

Sampler = Callable[[nn.Module, Tensor], Tensor]

_INPUTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that a network's input can have."""


class Pair(NamedTuple):
    """A candidate: a sampler, by name, and a correction with a strength."""

    sampler: str
    correction: Correction
    strength: float


class Trials(NamedTuple):
    """A model, its samplers, and the values in which samples and data are compared."""

    model: nn.Module
    samplers: dict[str, Sampler]
    data: Tensor
    features: Callable[[Tensor], Tensor] | None
    batch_size: int
    noise_shape: tuple[int, ...]

    def count_calls(self, seed: int) -> dict[str, int]:
        """Return how often each sampler calls the model, by a run on a single sample."""
        calls = {}
        noise = next(self.noises(1, seed))
        for name in self.samplers:
            counted = _Counted(self.model)
            with seeded(sampler_seed(seed, 0)):
                self._samples(name, counted, noise)
            if counted.calls == 0:
                raise ValueError(
                    "sample must call the model that it is given, and made no call of it: is it "
                    "another that it calls?"
                )
            calls[name] = counted.calls
        return calls

    def data_values(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield the values of rows of the data, in batches."""
        for part in torch.split(rows.to(self.data.device), self.batch_size):
            values = self._values(self.data[part])
            if not bool(values.isfinite().all()):
                raise ValueError(
                    "features must return finite values for the data, got NaN or infinity"
                )
            yield values

    def sample_values(self, pair: Pair, count: int, seed: int) -> Iterator[Tensor]:
        """Yield the values of a candidate's samples, in batches."""
        # Once: its tables are made, and a compiler sees one model.
        model = pair.correction.correct_model(self.model, pair.strength)
        for index, noise in enumerate(self.noises(count, seed)):
            start = pair.correction.correct_noise(noise, pair.strength)
            with seeded(sampler_seed(seed, index)):
                yield self._values(self._samples(pair.sampler, model, start))

    def _values(self, samples: Tensor) -> Tensor:
        """Return what is compared of samples or data, float64 [B, D] on the CPU."""
        values = samples if self.features is None else self.features(samples)
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != len(samples):
            raise ValueError(
                f"features must return a tensor of shape [{len(samples)}, D] for "
                f"{describe(samples)}, got {describe(values)}"
            )
        return values.detach().flatten(1).cpu().double()

    def _samples(self, name: str, model: nn.Module, noise: Tensor) -> Tensor:
        samples = self.samplers[name](model, noise)
        expected = (len(noise), *self.data.shape[1:])
        if not isinstance(samples, Tensor) or samples.shape != expected:
            which = "sample" if len(self.samplers) == 1 else f"sample[{name!r}]"
            raise ValueError(
                f"{which} must return a tensor of shape {expected} for noise of shape "
                f"{tuple(noise.shape)}, got {describe(samples)}"
            )
        return samples

    def noises(self, count: int, seed: int) -> Iterator[Tensor]:
        """Yield noise in batches, drawn on the CPU: the same on every device, in every dtype."""
        generator = torch.Generator("cpu").manual_seed(seed)
        # Offloaded weights are on "meta", quantised ones of no dtype for an input.
        weights = list(self.model.parameters())
        device = next((w.device for w in weights if not w.is_meta), self.data.device)
        dtype = next((w.dtype for w in weights if w.dtype in _INPUTS), torch.float32)
        for start in range(0, count, self.batch_size):
            shape = (min(self.batch_size, count - start), *self.noise_shape)
            noise = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
            yield noise.to(device, dtype)


class Stage:
    """One set of noise and some rows of the data, on which candidates are compared."""

    def __init__(
        self, trials: Trials, axes: Axes, rows: Tensor, count: int, seed: int, reporter: Reporter
    ) -> None:
        """Take the axes, the rows of the data, the number of samples and the seed of the noise."""
        self._trials, self._axes, self._reporter = trials, axes, reporter
        self.count: int = count
        self._seed = seed
        data = torch.cat([axes(values) for values in trials.data_values(rows)])
        self.comparison: FrechetComparison = FrechetComparison(data, count, seed)

    def add(self, pair: Pair) -> float:
        """Sample with a candidate, and return the distance of its samples from the data."""
        parts = []
        for values in self._trials.sample_values(pair, self.count, self._seed):
            parts.append(self._axes(values))
            self._reporter.ran()
        distance = self.comparison.add(torch.cat(parts))
        sampler = f"{pair.sampler}, " if len(self._trials.samplers) > 1 else ""
        label = pair.correction.label(pair.strength)
        self._reporter.say(f"{sampler}{label}: distance {distance:.4g} of {self.count} samples")
        return distance


class _Counted(nn.Module):
    """A model that counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.calls = 0

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.model(*args, **kwargs)

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def sampler_seed(seed: int, batch: int) -> int:
    """Return a seed for what a sampler draws itself, which must not repeat its start noise."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return int(torch.randint(2**32, (batch + 1,), generator=generator, device="cpu")[batch])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside, and leave them as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
