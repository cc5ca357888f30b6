"""Which correction for a trained model, and how strong? A search that needs samples and data.

Candidates are compared by the Fréchet distance between samples and data, on their raw values or on
features of the user's. It follows the whole covariance, so it sees too little spread in one
direction beside too much in another. The energy distance, which in many dimensions sees little but
the total spread, and the norms of ε̂ by which Epsilon Scaling explains itself, choose worse: see the
page "Which gain?" of the docs.

Of many strengths the best looks better than it is. So a scan chooses, a coarse one and then a finer
one about the best, on a third of the data; and what it chose is compared with no correction on the
rest and on fresh noise. So is half of it: near no correction what is won grows with the strength as
its error does, further out by less, so that half a strength is the surer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss.checks import check_batch, check_count, describe
from s2dm_loss.sampling.corrections import Correction
from s2dm_loss.sampling.frechet import MAX_AXES, SAMPLES_PER_AXIS, Axes, FrechetComparison
from s2dm_loss.sampling.result import Candidate, Recommendation, ScanPoint, SearchCost

_INPUTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that a network's input can have."""

# Rows of data that are enough to find the axes in which they vary most.
AXES_ROWS = 4096


class Progress(Protocol):
    """A wrapper of an iterable that shows how far it has come, such as `tqdm.tqdm`."""

    def __call__(self, iterable: list[Any], /) -> Iterable[Any]:
        """Return an iterable over the same items."""
        ...


class CorrectionSearch:
    """A search for the correction that suits a trained model, its sampler and its data.

    >>> import torch
    >>> from s2dm_loss import CorrectionSearch, NoiseSchedule
    >>> from s2dm_loss.sampling import standard_corrections
    >>> schedule = NoiseSchedule.linear(1000)
    >>> data = torch.randn(2048, 2)  # unit Gaussian: E[ε | x_t] = √(1-ᾱ) x_t
    >>> class Model(torch.nn.Module):
    ...     def forward(self, x_t, t):
    ...         return schedule.alpha_sigma(t)[1][:, None].float() * x_t
    >>> def sample(model, noise):    # DDIM with 10 steps
    ...     x = noise
    ...     for t in range(900, -1, -100):
    ...         a, b = (float(c) for c in schedule.alpha_sigma(torch.tensor(t)))
    ...         eps = model(x, torch.full((len(x),), t))
    ...         x0 = (x - b * eps) / a
    ...         if t == 0:
    ...             return x0
    ...         t = torch.tensor(t - 100)
    ...         a, b = (float(c) for c in schedule.alpha_sigma(t))
    ...         x = a * x0 + b * eps
    >>> search = CorrectionSearch(
    ...     Model(), sample, data, standard_corrections(schedule), num_samples=1024
    ... )
    >>> print(search.cost)  # doctest: +ELLIPSIS
    38 x 512 to choose, then 9 candidates x 1024 samples: 112 sampler runs of ...
    >>> best = search.recommend()
    >>> model, noise = best(Model(), torch.randn(8, 2))

    Every candidate starts from the same noise and meets the same global random state, and the
    data are the same, so the differences between candidates are far more exact than the distances.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Callable[[nn.Module, Tensor], Tensor],
        data: Tensor,
        corrections: Sequence[Correction],
        *,
        scan: bool = True,
        features: Callable[[Tensor], Tensor] | None = None,
        num_samples: int = 2048,
        batch_size: int = 256,
        noise_shape: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        """Set the search up; nothing is run yet.

        Args:
            model: The trained network, called `model(x_t, t, ...)`, in evaluation mode.
            sample: `sample(model, noise)` returns samples of shape [B, *data.shape[1:]] for noise
                of shape [B, *noise_shape], on the model's device and of its dtype. It calls the
                model that it is given, which is `model` with a candidate's correction and may lack
                its attributes. It draws further noise, if any, from the global generator: one that
                it seeds itself repeats from batch to batch, and the intervals do not hold. Do not
                clamp or round the samples: that hides the spread that the search compares.
            data: Data of shape [N, ...], what the samples should look like: a few thousand, and
                all that there are if `features` is fast.
            corrections: What to try: `standard_corrections(schedule)`, or some of your own.
            scan: Whether to choose a strength of each correction by a scan, on a third of the data
                and half as many samples, and to report the chosen ones and half of each. If not,
                every strength is reported.
            features: Maps samples or data [B, ...] to [B, D], in which they are then compared; by
                default the values themselves. Above 128 dimensions, or with fewer than eight
                samples for each, the distance follows fewer axes, at most 128, those in which the
                data vary most, found on the part that is not compared, and the rest as one.
            num_samples: Samples per candidate, at least 32.
            batch_size: Noise in one call of `sample`, and images in one call of `features`.
            noise_shape: Shape of one sample's noise, where it is not that of the data (a latent
                diffusion model whose `sample` decodes).
            seed: Seed of everything that is drawn.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {describe(model)}")
        if not callable(sample):
            raise TypeError(f"sample must be callable as sample(model, noise), got {sample!r}")
        check_batch("data", data)
        if data.ndim < 2 or len(data) < 32:
            raise ValueError(
                f"data must have shape [N, ...] with N of at least 32, got {describe(data)}"
            )
        if not bool(data.isfinite().all()):
            raise ValueError("data must be finite, got NaN or infinity in it")
        given = tuple(corrections) if isinstance(corrections, Iterable) else ()
        if not given or not all(isinstance(c, Correction) for c in given):
            raise TypeError(
                f"corrections must be at least one Correction, got {describe(corrections)}"
            )
        if bare := [c for c in given if not len(c.strengths)]:
            raise ValueError(f"corrections must each have strengths to try, got {bare[0]!r}")
        if features is not None and not callable(features):
            raise TypeError(f"features must be callable as features(samples), got {features!r}")
        self.model = model
        self.sample = sample
        self.data: Tensor = data.detach()
        self.corrections: tuple[Correction, ...] = given
        self.scan = scan
        self.features = features
        self.num_samples: int = check_count("num_samples", num_samples, low=32)
        self.batch_size: int = check_count("batch_size", batch_size)
        shape = data.shape[1:] if noise_shape is None else noise_shape
        self.noise_shape: tuple[int, ...] = tuple(
            check_count("noise_shape", size) for size in shape
        )
        self.seed: int = check_count("seed", seed, low=0)
        self._cost: SearchCost | None = None

    @property
    def cost(self) -> SearchCost:
        """The cost of `recommend`, before it is spent.

        The model calls of a sampler run are counted once, by a run on a single sample.
        """
        if self._cost is None:
            counted = _Counted(self.model)
            with torch.no_grad(), _seeded(_sampler_seed(self.seed, 0)):
                self._samples(counted, next(self._noises(1, self.seed)))
            if counted.calls == 0:
                raise ValueError(
                    "sample must call the model that it is given, and made no call of it: is it "
                    "another that it calls?"
                )
            strengths = sum(len(correction.strengths) for correction in self.corrections)
            count = len(self.corrections)
            # The finer scan tries two strengths of each correction.
            scanned = 1 + strengths + 2 * count if self.scan else 0
            candidates = 1 + (2 * count if self.scan else strengths)
            runs = sum(
                number * -(-samples // self.batch_size)
                for number, samples in (
                    (scanned, self._scan_samples),
                    (candidates, self.num_samples),
                )
            )
            self._cost = SearchCost(
                scanned, self._scan_samples, candidates, self.num_samples, runs, counted.calls
            )
        return self._cost

    def recommend(self, progress: Progress = iter) -> Recommendation:
        """Sample with the candidates, compare with the data, and recommend.

        A correction is recommended where the interval of its difference to none lies below 0.

        Args:
            progress: Wraps a list of as many items as there are sampler runs, to show how far it
                has come: `tqdm.tqdm`. It only shows: what it yields is not looked at.

        Returns:
            The recommendation; the same for the same arguments and seed.

        Raises:
            ValueError: if `sample` does not call its model, returns another shape than the data's,
                or the samples without a correction are not finite.
        """
        ticks = iter(progress(list(range(self.cost.runs))))
        root = torch.Generator("cpu").manual_seed(self.seed)
        order = torch.randperm(len(self.data), generator=root, device="cpu")
        first, second = order[: len(order) // 3], order[len(order) // 3 :]
        seeds = [_drawn(root) for _ in range(3)]
        with torch.no_grad():
            seen = torch.cat(list(self._data_values(first[:AXES_ROWS])))
            scan: tuple[ScanPoint, ...] = ()
            if self.scan:
                # Each part is compared along axes that were found on the other.
                others = torch.cat(list(self._data_values(second[:AXES_ROWS])))
                axes = self._axes(others, self._scan_samples, len(first), seeds[0])
                stage = _Stage(self, axes, first, self._scan_samples, seeds[1], ticks)
                scan = self._scanned(stage)
                chosen = [c for correction in self.corrections for c in _chosen(scan, correction)]
            else:
                chosen = [(c, strength) for c in self.corrections for strength in c.strengths]
            axes = self._axes(seen, self.num_samples, len(second), seeds[0])
            if not self.scan and axes.axes is None:
                second = order  # nothing was chosen on the first part
            stage = _Stage(self, axes, second, self.num_samples, seeds[2], ticks)
            for candidate in ((None, 0.0), *chosen):
                stage.add(*candidate)
        for _ in islice(ticks, self.cost.runs):  # the scan may have needed fewer than stated
            pass
        columns = (column.tolist() for column in stage.comparison.differences())
        return Recommendation(
            candidates=tuple(
                Candidate(*candidate, *row)
                for candidate, *row in zip([(None, 0.0), *chosen], *columns, strict=True)
            ),
            scan=scan,
            cost=self.cost,
        )

    @property
    def _scan_samples(self) -> int:
        return max(32, self.num_samples // 2) if self.scan else 0

    def _scanned(self, stage: _Stage) -> tuple[ScanPoint, ...]:
        """Try all strengths, then those halfway from each correction's best to its neighbours."""
        plain = ScanPoint(None, 0.0, stage.add(None, 0.0))
        scan = [plain]
        for correction in self.corrections:
            points = [
                ScanPoint(correction, s, stage.add(correction, s)) for s in correction.strengths
            ]
            line = sorted([(s, d) for _, s, d in points] + [(correction.none, plain.distance)])
            best = min(range(len(line)), key=lambda i: line[i][1])
            tried = {strength for strength, _ in line}
            for i in (best - 1, best):
                if 0 <= i < len(line) - 1:
                    strength = correction.between(line[i][0], line[i + 1][0])
                    if strength not in tried:
                        points.append(
                            ScanPoint(correction, strength, stage.add(correction, strength))
                        )
            scan += points
        return tuple(scan)

    def _axes(self, seen: Tensor, samples: int, data: int, seed: int) -> Axes:
        """Return as many axes as that many samples and data can tell."""
        return Axes(seen, min(MAX_AXES, min(samples, data) // SAMPLES_PER_AXIS), seed)

    def _data_values(self, rows: Tensor) -> Iterator[Tensor]:
        for part in torch.split(rows.to(self.data.device), self.batch_size):
            values = self._values(self.data[part])
            if not bool(values.isfinite().all()):
                raise ValueError(
                    "features must return finite values for the data, got NaN or infinity"
                )
            yield values

    def _values(self, samples: Tensor) -> Tensor:
        """Return what is compared of samples or data, float64 [B, D] on the CPU."""
        values = samples if self.features is None else self.features(samples)
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != len(samples):
            raise ValueError(
                f"features must return a tensor of shape [{len(samples)}, D] for "
                f"{describe(samples)}, got {describe(values)}"
            )
        return values.detach().flatten(1).cpu().double()

    def _samples(self, model: nn.Module, noise: Tensor) -> Tensor:
        samples = self.sample(model, noise)
        expected = (len(noise), *self.data.shape[1:])
        if not isinstance(samples, Tensor) or samples.shape != expected:
            raise ValueError(
                f"sample must return a tensor of shape {expected} for noise of shape "
                f"{tuple(noise.shape)}, got {describe(samples)}"
            )
        return samples

    def _noises(self, count: int, seed: int) -> Iterator[Tensor]:
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

    @override
    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {list(self.corrections)!r}, "
            f"scan={self.scan}, num_samples={self.num_samples}, batch_size={self.batch_size}, "
            f"seed={self.seed})"
        )


class _Stage:
    """One set of noise and some rows of the data, on which candidates are compared."""

    def __init__(
        self,
        search: CorrectionSearch,
        axes: Axes,
        rows: Tensor,
        count: int,
        seed: int,
        ticks: Iterator[Any],
    ) -> None:
        self._search, self._axes, self._ticks = search, axes, ticks
        self._count, self._seed = count, seed
        data = torch.cat([axes(values) for values in search._data_values(rows)])
        self.comparison = FrechetComparison(data, count, seed)
        self._is_first = True

    def add(self, correction: Correction | None, strength: float) -> float:
        """Sample with a correction, and return the distance from the data."""
        search = self._search
        parts = []
        model = search.model
        if correction is not None:  # once: its tables are made, and a compiler sees one model
            model = correction.correct_model(model, strength)
        for index, noise in enumerate(search._noises(self._count, self._seed)):
            next(self._ticks, None)
            if correction is not None:
                noise = correction.correct_noise(noise, strength)
            with _seeded(_sampler_seed(self._seed, index)):
                parts.append(self._axes(search._values(search._samples(model, noise))))
        coordinates = torch.cat(parts)
        if self._is_first and not bool(coordinates.isfinite().all()):
            raise ValueError("sample must return finite samples, got NaN or infinity in them")
        self._is_first = False
        return self.comparison.add(coordinates)


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


def _sampler_seed(seed: int, batch: int) -> int:
    """Return a seed for what a sampler draws itself, which must not repeat its start noise."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return int(torch.randint(2**32, (batch + 1,), generator=generator, device="cpu")[batch])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators inside, and leave them as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device="cpu"))


def _chosen(scan: Sequence[ScanPoint], correction: Correction) -> list[tuple[Correction, float]]:
    """Return the best strength of a correction, and before it half of that."""
    points = [point for point in scan if point.correction is correction]
    best = min(points, key=lambda point: point.distance).strength
    half = correction.between(*sorted((correction.none, best)))
    strengths = [best] if half in (correction.none, best) else [half, best]
    return [(correction, strength) for strength in strengths]
