"""Which gain for a trained model? A search that needs samples and data, no features, no labels.

The gain is 1 / (1 + r c²(t)) with r = (1-τ) / τ, and c² grows with the skip k almost alike at every
t. So k and τ are nearly one parameter, the strength: a larger k does what a smaller τ does. The
search therefore holds τ and varies k.

Candidates are compared by the Fréchet distance between samples and data, on their raw values. It
follows the whole covariance, so it sees too little spread in one direction beside too much in
another. The energy distance, which in many dimensions sees little but the total spread, and the
norms of ε̂ that Epsilon Scaling is set by, choose worse: see the page "Which gain?" of the docs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import einsum
from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss._checks import check_batch, check_count, describe
from s2dm_loss.coefficients import DEFAULT_MAX_C2, DEFAULT_TAU
from s2dm_loss.prediction import PredictionType
from s2dm_loss.schedule import Schedule
from s2dm_loss.shrink import ShrunkModel
from s2dm_loss.skip_set import SkipSet

Skip = int | float

# Shares of the schedule. On T = 1000 timesteps they are the skips 9, 29, … 249, of which the paper
# would say S²-DM¹⁰, S²-DM³⁰, ….
DEFAULT_SHARES = (0.01, 0.03, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.25)
CONFIDENCE = 0.95
RESAMPLES = 200
# Above this many dimensions a covariance of a few thousand samples is mostly noise.
MAX_AXES = 128


class Progress(Protocol):
    """A wrapper of an iterable that shows how far it has come, such as `tqdm.tqdm`."""

    def __call__(self, iterable: list[Any], /) -> Iterable[Any]:
        """Return an iterable over the same items."""
        ...


@dataclass(frozen=True)
class GainSearchCost:
    """What a search will cost, known before it starts.

    Attributes:
        candidates: Gains that are compared, "no gain" included.
        runs: Calls of the sampler, one for each candidate and batch.
        calls_per_run: Model calls in one of them.
        num_samples: Samples per candidate.
    """

    candidates: int
    runs: int
    calls_per_run: int
    num_samples: int

    @property
    def model_calls(self) -> int:
        """Calls of the model, on a batch each."""
        return self.runs * self.calls_per_run

    @property
    def sample_evaluations(self) -> int:
        """Evaluations of the network counted sample by sample."""
        return self.candidates * self.num_samples * self.calls_per_run

    @override
    def __str__(self) -> str:
        return (
            f"{self.candidates} candidates x {self.num_samples} samples: {self.runs} sampler runs "
            f"of {self.calls_per_run} model calls each, {self.model_calls} model calls in all"
        )


@dataclass(frozen=True)
class GainCandidate:
    """One gain and how its samples compare with the data.

    Attributes:
        skip: k; 0 stands for no gain.
        distance: Fréchet distance between samples and data, in squared data units.
        difference: `distance` less that without a gain; below 0 is better.
        low: Lower end of the interval of `difference`.
        high: Upper end. The intervals hold together for all candidates, with 95 % confidence, so
            that choosing the best of them is allowed for.
        best_share: Share of the bootstrap resamples in which this candidate is the best.
    """

    skip: Skip
    distance: float
    difference: float
    low: float
    high: float
    best_share: float


@dataclass(frozen=True)
class GainRecommendation:
    """The recommended gain, and how sure that is.

    Attributes:
        skip: The recommended k; None where no gain is better than none beyond doubt.
        tau: τ, as it was given to the search.
        candidates: All that was compared, by ascending skip; the first is no gain.
        skip_interval: Smallest and largest skip (0 is no gain) between which the best one falls
            in 95 % of the bootstrap resamples.
        cost: What the search cost.
        schedule: The schedule, as it was given to the search.
        prediction_type: What the model predicts, as it was given.
        max_c2: The bound on c², as it was given.
    """

    skip: Skip | None
    tau: float
    candidates: tuple[GainCandidate, ...]
    skip_interval: tuple[Skip, Skip]
    cost: GainSearchCost
    schedule: Schedule
    prediction_type: PredictionType
    max_c2: float

    @property
    def best(self) -> GainCandidate:
        """The candidate of least distance, recommended or not."""
        return min(self.candidates, key=lambda candidate: candidate.distance)

    @property
    def at_edge(self) -> bool:
        """Whether the recommended skip is the largest that was tried: larger ones may do better."""
        return self.skip == self.candidates[-1].skip

    def apply(self, model: nn.Module) -> nn.Module:
        """Return `model` with the recommended gain; `model` itself where none is recommended."""
        if self.skip is None:
            return model
        return ShrunkModel(
            model,
            self.schedule,
            self.skip,
            tau=self.tau,
            prediction_type=self.prediction_type,
            max_c2=self.max_c2,
        )

    @override
    def __repr__(self) -> str:
        plain, best = self.candidates[0].distance, self.best
        said = f"GainRecommendation(skip={self.skip}, tau={self.tau}: Fréchet distance {plain:.4g}"
        if best.skip == 0:
            return f"{said} without a gain, more with any)"
        share = "" if plain <= 0 else f", {best.difference / plain:+.1%}"
        ends = "" if plain <= 0 else f" [{best.low / plain:+.1%}, {best.high / plain:+.1%}]"
        low, high = self.skip_interval
        edge = ", the largest tried" if self.at_edge else ""
        return (
            f"{said} -> {best.distance:.4g} at skip {best.skip}{share}{ends}; "
            f"best skip within [{low}, {high}]{edge})"
        )

    @override
    def __str__(self) -> str:
        rows = [f"{'skip':>8}  {'distance':>10}  {'difference [95 %]':>34}  best in"]
        for c in self.candidates:
            interval = f"{c.difference:+.4g} [{c.low:+.4g}, {c.high:+.4g}]" if c.skip else ""
            mark = " <- recommended" if c.skip == (self.skip or 0) else ""
            rows.append(
                f"{c.skip:>8g}  {c.distance:>10.4g}  {interval:>34}  {c.best_share:>7.0%}{mark}"
            )
        return "\n".join([repr(self), *rows])


class GainSearch:
    """A search for the gain that suits a trained model, its sampler and its data.

    >>> import torch
    >>> from s2dm_loss import GainSearch, NoiseSchedule
    >>> schedule = NoiseSchedule.linear(1000)
    >>> data = torch.randn(1024, 2)                  # unit Gaussian: E[ε | x_t] = √(1-ᾱ) x_t
    >>> class Model(torch.nn.Module):
    ...     def forward(self, x_t, t):
    ...         return schedule.alpha_sigma(t)[1][:, None].float() * x_t
    >>> def sample(model, noise):                    # DDIM with 10 steps
    ...     x = noise
    ...     for t in range(900, -1, -100):
    ...         a, b = (float(c) for c in schedule.alpha_sigma(torch.tensor(t)))
    ...         eps = model(x, torch.full((len(x),), t))
    ...         x0 = (x - b * eps) / a
    ...         a, b = schedule.alpha_sigma(torch.tensor(max(t - 100, 0))) if t else (1.0, 0.0)
    ...         x = float(a) * x0 + float(b) * eps
    ...     return x
    >>> search = GainSearch(
    ...     Model(), schedule, sample, data, skips=[49, 99, 149], num_samples=512
    ... )
    >>> print(search.cost)
    4 candidates x 512 samples: 8 sampler runs of 10 model calls each, 80 model calls in all
    >>> search.recommend().skip
    99

    Every candidate starts from the same noise and meets the same global random state, and the
    data are the same, so the differences between candidates are far more exact than the distances.
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
        num_samples: int = 2048,
        batch_size: int = 256,
        noise_shape: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Set the search up; nothing is run yet.

        Args:
            model: The trained network, called `model(x_t, t, ...)`, in evaluation mode.
            schedule: The schedule that it was trained on.
            sample: `sample(model, noise)` returns samples of shape [B, *data.shape[1:]] for noise
                of shape [B, *noise_shape]. It calls the model it is given, which is `model` with
                a candidate's gain. It draws further noise, if any, from the global generator or
                from one that it seeds itself. Do not clamp or round the samples: that hides the
                spread that the search compares.
            data: Data of shape [N, ...], what the samples should look like. A few thousand are
                enough; of more, `4 * num_samples` are drawn.
            skips: The skips k to compare with no gain: ints on a discrete schedule, floats in
                continuous time. By default nine, from 1 % to 25 % of the schedule.
            tau: τ in (0, 1), held fixed: k and τ are nearly one parameter.
            prediction_type: What the model predicts, as for `ShrunkModel`.
            max_c2: Upper bound on c²; see `coefficients`.
            num_samples: Samples per candidate, at least 32.
            batch_size: Noise in one call of `sample`.
            noise_shape: Shape of one sample's noise, where it is not that of the data (a latent
                diffusion model whose `sample` decodes).
            seed: Seed of everything that is drawn.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {describe(model)}")
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule or another Schedule, got {schedule!r}"
            )
        if not callable(sample):
            raise TypeError(f"sample must be callable as sample(model, noise), got {sample!r}")
        check_batch("data", data)
        if data.ndim < 2 or len(data) < 2:
            raise ValueError(
                f"data must have shape [N, ...] with N of at least 2, got {describe(data)}"
            )
        if not bool(data.isfinite().all()):
            raise ValueError("data must be finite, got NaN or infinity in it")
        self.model = model
        self.schedule = schedule
        self.sample = sample
        self.data: Tensor = data.detach()
        self.skips: tuple[Skip, ...] = (
            _default_skips(schedule) if skips is None else _ascending(skips)
        )
        self.tau = tau
        self.prediction_type: PredictionType = prediction_type
        self.max_c2 = max_c2
        self.num_samples: int = check_count("num_samples", num_samples, low=32)
        self.batch_size: int = check_count("batch_size", batch_size)
        shape = data.shape[1:] if noise_shape is None else noise_shape
        self.noise_shape: tuple[int, ...] = tuple(
            check_count("noise_shape", size) for size in shape
        )
        self.seed: int = check_count("seed", seed, low=0)
        if tau in (0, 1):
            raise ValueError(f"tau must lie in (0, 1): 1 is no gain and 0 no model, got {tau!r}")
        for skip in self.skips:
            self._shrink(model, skip)  # checks tau, max_c2, prediction_type and the skip
        self._cost: GainSearchCost | None = None

    @property
    def cost(self) -> GainSearchCost:
        """The cost of `recommend`, before it is spent.

        The model calls of a sampler run are counted once, by a run on a single sample.
        """
        if self._cost is None:
            counted = _Counted(self.model)
            with torch.no_grad(), _seeded(self.seed):
                self._run(counted, self._noise()[:1])
            batches = -(-self.num_samples // self.batch_size)
            candidates = len(self.skips) + 1
            self._cost = GainSearchCost(
                candidates, candidates * batches, counted.calls, self.num_samples
            )
        return self._cost

    def recommend(self, progress: Progress = iter) -> GainRecommendation:
        """Sample with every candidate, compare with the data, and recommend.

        A gain is recommended where the interval of its difference to no gain lies below 0.

        Args:
            progress: Wraps the list of sampler runs to show how far it has come: `tqdm.tqdm`.

        Returns:
            The recommendation; the same for the same arguments and seed.

        Raises:
            ValueError: if `sample` returns another shape than the data's, or the samples without
                a gain are not finite.
        """
        cost = self.cost
        batches = torch.split(self._noise(), self.batch_size)
        comparison = _Comparison(self._drawn_data(), self.num_samples, self.seed)
        parts: list[Tensor] = []
        runs = [(skip, noise) for skip in (0, *self.skips) for noise in batches]
        with torch.no_grad():
            for index, (skip, noise) in enumerate(progress(runs)):
                model = self.model if skip == 0 else self._shrink(self.model, skip)
                with _seeded(self.seed + index % len(batches)):
                    parts.append(self._run(model, noise))
                if len(parts) == len(batches):
                    comparison.add(torch.cat(parts))
                    parts = []
        candidates, skip_interval = comparison.result((0, *self.skips))
        best = min(candidates, key=lambda candidate: candidate.distance)
        return GainRecommendation(
            skip=best.skip if best.high < 0 else None,
            tau=self.tau,
            candidates=candidates,
            skip_interval=skip_interval,
            cost=cost,
            schedule=self.schedule,
            prediction_type=self.prediction_type,
            max_c2=self.max_c2,
        )

    def _shrink(self, model: nn.Module, skip: Skip) -> ShrunkModel:
        return ShrunkModel(
            model,
            self.schedule,
            skip,
            tau=self.tau,
            prediction_type=self.prediction_type,
            max_c2=self.max_c2,
        )

    def _run(self, model: nn.Module, noise: Tensor) -> Tensor:
        """Return the samples of one sampler run, flattened, float64 on the CPU."""
        samples = self.sample(model, noise)
        expected = (len(noise), *self.data.shape[1:])
        if not isinstance(samples, Tensor) or samples.shape != expected:
            raise ValueError(
                f"sample must return a tensor of shape {expected} for noise of shape "
                f"{tuple(noise.shape)}, got {describe(samples)}"
            )
        return samples.detach().flatten(1).to("cpu", torch.float64)

    def _noise(self) -> Tensor:
        # Drawn on the CPU, so that the same seed is the same noise on every device.
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.num_samples, *self.noise_shape, generator=generator)
        parameter = next(self.model.parameters(), self.data)
        return noise.to(parameter.device)

    def _drawn_data(self) -> Tensor:
        limit = 4 * self.num_samples
        data = self.data
        if len(data) > limit:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(self.seed))
            data = data[order[:limit].to(data.device)]
        return data.flatten(1).to("cpu", torch.float64)


class _Comparison:
    """Fréchet distances of several sets of samples from the data, with bootstrap resamples.

    Samples that started from the same noise share their bootstrap weight in every candidate, so
    that the noise common to all falls out of the differences. The weights are those of Rubin's
    Bayesian bootstrap; the first row is even, the estimate itself.
    """

    def __init__(self, data: Tensor, num_samples: int, seed: int) -> None:
        self.center = data.mean(0)
        self.axes = _leading_axes(data - self.center, seed)
        generator = torch.Generator().manual_seed(seed)
        self.weights = _bootstrap_weights(num_samples, generator)
        data_weights = _bootstrap_weights(len(data), generator)
        self.data_moments = _moments(self._coordinates(data), data_weights)
        self.data_roots = _symmetric_root(self.data_moments[1])
        self.distances: list[Tensor] = []

    def _coordinates(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coordinates along the axes, and the square of what lies outside them."""
        values = values - self.center
        along = values @ self.axes
        return along, (values.square().sum(1) - along.square().sum(1)).clamp(min=0)

    def add(self, samples: Tensor) -> None:
        """Take the samples of the next candidate."""
        if not bool(samples.isfinite().all()):
            if not self.distances:
                raise ValueError("sample must return finite samples, got NaN or infinity in them")
            self.distances.append(torch.full((RESAMPLES + 1,), torch.inf, dtype=torch.float64))
            return
        mean, covariance, outside = _moments(self._coordinates(samples), self.weights)
        data_mean, data_covariance, data_outside = self.data_moments
        # tr (C_x C_y)^½ by the eigenvalues of C_y^½ C_x C_y^½, which is symmetric.
        overlap = torch.linalg.eigvalsh(self.data_roots @ covariance @ self.data_roots)
        self.distances.append(
            (mean - data_mean).square().sum(1)
            + _trace(covariance)
            + _trace(data_covariance)
            - 2 * overlap.clamp(min=0).sqrt().sum(1)
            + (outside.sqrt() - data_outside.sqrt()).square()
        )

    def result(self, skips: Sequence[Skip]) -> tuple[tuple[GainCandidate, ...], tuple[Skip, Skip]]:
        """Return the candidates, and the interval in which the best skip falls."""
        table = torch.stack(self.distances)  # [candidates, 1 + RESAMPLES]
        distance, resampled = table[:, 0], table[:, 1:]
        # A resample of a Fréchet distance lies higher than its estimate, as the estimate lies
        # higher than the truth: only the spread of the resamples is used, about the estimate.
        bias = resampled.mean(1, keepdim=True) - distance[:, None]
        resampled = torch.where(distance.isfinite()[:, None], resampled - bias, torch.inf)

        difference = distance - distance[0]
        deviation = resampled - resampled[0] - difference[:, None]
        error = deviation.std(1)
        # One bound for all candidates: the largest of their standardised deviations.
        largest = torch.where(error[:, None] > 0, deviation / error[:, None], 0.0)
        largest = largest.nan_to_num(0.0).abs().amax(0)
        reach = (torch.quantile(largest, CONFIDENCE) * error).nan_to_num(0.0)

        winners = resampled.argmin(0)
        shares = torch.bincount(winners, minlength=len(skips)) / RESAMPLES
        order = winners.sort().values
        tail = round(RESAMPLES * (1 - CONFIDENCE) / 2)
        low, high = (skips[int(order[i])] for i in (tail, RESAMPLES - 1 - tail))
        columns = (distance, difference, difference - reach, difference + reach, shares)
        candidates = tuple(
            GainCandidate(skip, *row)
            for skip, *row in zip(skips, *(c.tolist() for c in columns), strict=True)
        )
        return candidates, (low, high)


class _Counted(nn.Module):
    """A model that counts its calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.model(*args, **kwargs)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside, and leave them as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _default_skips(schedule: Schedule) -> tuple[Skip, ...]:
    if schedule.timesteps is None:
        return DEFAULT_SHARES
    count = schedule.timesteps.numel()
    skips = {max(1, round(share * count) - 1) for share in DEFAULT_SHARES}
    return tuple(sorted(skips))


def _ascending(skips: Sequence[int] | Sequence[float]) -> tuple[Skip, ...]:
    """Return the skips sorted; `SkipSet` checks that they are numbers, positive and distinct."""
    return SkipSet(skips).offsets


def _bootstrap_weights(count: int, generator: torch.Generator) -> Tensor:
    """Return weights of shape [1 + RESAMPLES, count], each row adding up to 1."""
    uniform = torch.rand(RESAMPLES, count, generator=generator, dtype=torch.float64)
    weights = torch.cat([torch.ones(1, count, dtype=torch.float64), -torch.log1p(-uniform)])
    return weights / weights.sum(1, keepdim=True)


def _leading_axes(centered: Tensor, seed: int) -> Tensor:
    """Return principal axes [D, P] of centered data [N, D], or all axes where they are few.

    Any orthonormal axes make a valid distance, so the leading ones need not be exact, and a
    randomised decomposition is enough: an exact one takes minutes for images.
    """
    if centered.shape[1] <= MAX_AXES:
        return torch.eye(centered.shape[1], dtype=centered.dtype)
    with _seeded(seed):
        axes: Tensor = torch.svd_lowrank(centered, q=min(MAX_AXES, len(centered)), niter=4)[2]
    return axes


def _moments(coordinates: tuple[Tensor, Tensor], weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted mean [R, P], covariance [R, P, P] and the mean square outside [R]."""
    along, outside = coordinates
    mean = weights @ along
    # In parts: all outer products at once would hold N P² numbers.
    second = along.new_zeros(len(weights), along.shape[1] ** 2)
    parts = zip(torch.split(weights, 256, dim=1), torch.split(along, 256), strict=True)
    for rows, part in parts:
        second.addmm_(rows, einsum(part, part, "n p, n q -> n p q").flatten(1))
    second = second.reshape(len(weights), along.shape[1], along.shape[1])
    covariance = second - mean[:, :, None] * mean[:, None, :]
    unbiased = 1 - weights.square().sum(1)
    return mean, covariance / unbiased[:, None, None], weights @ outside


def _symmetric_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
    return root


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
