"""Which sampler and which correction for a trained model? A search that needs samples and data.

Candidates are compared by the Fréchet distance between samples and data, on their raw values or on
features of the user's. It follows the whole covariance, so it sees too little spread in one
direction beside too much in another. The energy distance, which in many dimensions sees little but
the total spread, and the norms of ε̂ by which Epsilon Scaling explains itself, choose worse: see the
page "Which correction?" of the docs.

Picking the best of many overestimates it. So a third of the data and noise of its own choose the
finalists, and the rest of the data and fresh noise compare them: the best strength of a correction
and half of it (the benefit grows linearly at first, then more slowly; half the strength is safer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss.checks import check_batch, check_count, describe
from s2dm_loss.prediction import evaluating
from s2dm_loss.sampling.choosing import FEWEST, WIDTHS, Plan, every_pair, halved, plan_of, scanned
from s2dm_loss.sampling.corrections import NONE, Correction
from s2dm_loss.sampling.frechet import MAX_AXES, SAMPLES_PER_AXIS, Axes
from s2dm_loss.sampling.progress import Progress, Reporter
from s2dm_loss.sampling.result import Candidate, Recommendation, ScanPoint, SearchCost
from s2dm_loss.sampling.trials import Sampler, Stage, Trials

# Rows of data that are enough to find the axes in which they vary most.
AXES_ROWS = 4096


class CorrectionSearch:
    """A search for the sampler and the correction that suit a trained model and its data.

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
    38 x 512 samples to choose, then 9 x 1024 samples to compare: at most 112 ...
    >>> best = search.recommend(progress=False)
    >>> model, noise = best(Model(), torch.randn(8, 2))

    Every candidate starts from the same noise and meets the same global random state, and the
    data are the same, so the differences between candidates are far more exact than the distances.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Sampler | Mapping[str, Sampler],
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
            model: The trained network, called `model(x_t, t, ...)`. It is put into evaluation mode
                while the search runs.
            sample: `sample(model, noise)` returns samples of shape [B, *data.shape[1:]] for noise
                of shape [B, *noise_shape], on the model's device and of its dtype. It calls the
                model that it is given, which is `model` with a candidate's correction and may lack
                its attributes. It draws further noise, if any, from the global generator: one that
                it seeds itself repeats from batch to batch, and the intervals do not hold. Do not
                clamp or round the samples: that hides the spread that the search compares. Or
                several such samplers by their names, the first being the one in use. Each makes as
                many network calls as the first; one more or less is allowed, and said.
            data: Data of shape [N, ...], what the samples should look like: a few thousand, and
                all that there are if `features` is fast.
            corrections: What to try: `standard_corrections(schedule)`, or some of your own. May be
                empty with several samplers.
            scan: Whether to choose the finalists on a third of the data, and to report the chosen
                ones and half of each. If not, every strength with every sampler is reported.
            features: Maps samples or data [B, ...] to [B, D], in which they are then compared; by
                default the values themselves. A module is put into evaluation mode meanwhile. Above
                128 dimensions, or with fewer than eight samples for each, the distance follows
                fewer axes, at most 128, those in which the data vary most, found on the part that
                is not compared, and the rest as one.
            num_samples: Samples per finalist, at least 32.
            batch_size: Noise in one call of `sample`, and images in one call of `features`.
            noise_shape: Shape of one sample's noise, where it is not that of the data (a latent
                diffusion model whose `sample` decodes).
            seed: Seed of everything that is drawn.

        Raises:
            TypeError, ValueError: if an argument is not as said; the message names it.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {describe(model)}")
        check_batch("data", data)
        if data.ndim < 2 or len(data) < FEWEST:
            raise ValueError(
                f"data must have shape [N, ...] with N of at least {FEWEST}, got {describe(data)}"
            )
        if not bool(data.isfinite().all()):
            raise ValueError("data must be finite, got NaN or infinity in it")
        if features is not None and not callable(features):
            raise TypeError(f"features must be callable as features(samples), got {features!r}")
        self.model = model
        self.samplers: dict[str, Sampler] = _read_samplers(sample)
        self.data: Tensor = data.detach()
        self.corrections: tuple[Correction, ...] = _read_corrections(
            corrections, empty=len(self.samplers) > 1
        )
        self.scan = scan
        self.features = features
        self.num_samples: int = check_count("num_samples", num_samples, low=FEWEST)
        self.batch_size: int = check_count("batch_size", batch_size)
        shape = data.shape[1:] if noise_shape is None else noise_shape
        self.noise_shape: tuple[int, ...] = tuple(
            check_count("noise_shape", size) for size in shape
        )
        self.seed: int = check_count("seed", seed, low=0)
        self._calls: dict[str, int] | None = None

    @property
    def cost(self) -> SearchCost:
        """The cost of `recommend`, before it is spent.

        The network calls of each sampler are counted once, by a run on a single sample.

        Raises:
            ValueError: if a sampler makes no call, or over one call more or less than the first.
        """
        if self._calls is None:
            with torch.no_grad(), evaluating(self.model):
                calls = self._trials.count_calls(self.seed)
            first = next(iter(calls.values()))
            if other := {n: c for n, c in calls.items() if abs(c - first) > 1}:
                raise ValueError(
                    f"sample must hold samplers of as many network calls as the first, {first}, or "
                    f"one more or less, got {other}"
                )
            self._calls = calls
        names = list(self.samplers)
        stages = self._plan(names).stages
        runs = sum(number * -(-samples // self.batch_size) for number, samples in stages)
        return SearchCost(stages, self._calls, runs, self._plan(names[:1]).samples)

    def recommend(self, progress: Progress = True) -> Recommendation:
        """Sample with the candidates, compare with the data, and recommend.

        A candidate is recommended where the interval of its difference to the first, the sampler
        in use with no correction, lies below 0.

        Args:
            progress: What to show on the standard error stream. True: the cost, and on a terminal
                a bar of tqdm's if that is installed, else a line for each candidate. False:
                nothing. Or a wrapper of a list with an item for each sampler run, such as
                `tqdm.tqdm`; what it yields is not looked at.

        Returns:
            The recommendation; the same for the same arguments and seed.

        Raises:
            ValueError: if a sampler does not call its model, returns another shape than the data's,
                or the samples without a correction are not finite.
        """
        cost = self.cost
        said = f"{cost}"
        if any(module.training for module in self.model.modules()):
            said += (
                "\nthe model is put from training mode into evaluation mode, and back at the end"
            )
        reporter = Reporter(progress, cost.runs, said)
        root = torch.Generator("cpu").manual_seed(self.seed)
        order = torch.randperm(len(self.data), generator=root, device="cpu")
        first, second = order[: len(order) // 3], order[len(order) // 3 :]
        seeds = [_drawn(root) for _ in range(3 + len(WIDTHS[0]))]
        trials = self._trials
        with torch.no_grad(), evaluating(self.model), evaluating(self.features):
            scan: tuple[ScanPoint, ...] = ()
            finalists = every_pair(self.samplers, self.corrections)
            seen = torch.cat(list(trials.data_values(first[:AXES_ROWS])))
            if self.scan:
                # Each part is compared along axes that were found on the other.
                others = torch.cat(list(trials.data_values(second[:AXES_ROWS])))

                def stage(count: int, seed: int) -> Stage:
                    axes = self._axes(others, count, len(first), seeds[0])
                    return Stage(trials, axes, first, count, seed, reporter)

                choose = scanned if len(self.samplers) == 1 else halved
                names = list(self.samplers)
                scan, finalists = choose(
                    names, self.corrections, self._plan(names), stage, [seeds[1], *seeds[3:]]
                )
            axes = self._axes(seen, self.num_samples, len(second), seeds[0])
            if not self.scan and axes.axes is None:
                second = order  # nothing was chosen on the first part
            final = Stage(trials, axes, second, self.num_samples, seeds[2], reporter)
            for pair in finalists:
                final.add(pair)
        reporter.close()
        baselines = {pair.sampler: i for i, pair in enumerate(finalists) if pair.correction is NONE}
        found = final.comparison.differences([baselines[pair.sampler] for pair in finalists])
        rows = zip(*(column.tolist() for column in found), strict=True)
        return Recommendation(
            candidates=tuple(
                Candidate(*pair, *row) for pair, row in zip(finalists, rows, strict=True)
            ),
            scan=scan,
            cost=cost,
            searched={
                "samplers": list(self.samplers),
                "corrections": [correction.to_dict() for correction in self.corrections],
                "data": list(self.data.shape),
                "num_samples": self.num_samples,
                "batch_size": self.batch_size,
                "scan": self.scan,
                "seed": self.seed,
            },
        )

    @property
    def _trials(self) -> Trials:
        return Trials(
            self.model,
            self.samplers,
            self.data,
            self.features,
            self.batch_size,
            self.noise_shape,
        )

    def _axes(self, seen: Tensor, samples: int, data: int, seed: int) -> Axes:
        """Return as many axes as that many samples and data can tell."""
        return Axes(seen, min(MAX_AXES, min(samples, data) // SAMPLES_PER_AXIS), seed)

    def _plan(self, samplers: Sequence[str]) -> Plan:
        """Return how many candidates each stage has at most, and of how many samples."""
        if not self.scan:
            return Plan(((len(every_pair(samplers, self.corrections)), self.num_samples),))
        return plan_of(len(samplers), self.corrections, self.num_samples)

    @override
    def __repr__(self) -> str:
        names = f"{list(self.samplers)}, " if len(self.samplers) > 1 else ""
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {names}"
            f"{list(self.corrections)!r}, scan={self.scan}, num_samples={self.num_samples}, "
            f"batch_size={self.batch_size}, seed={self.seed})"
        )


def _read_samplers(sample: Any) -> dict[str, Sampler]:
    samplers = dict(sample) if isinstance(sample, Mapping) else {"sample": sample}
    for name, one in samplers.items():
        if not isinstance(name, str) or not callable(one):
            raise TypeError(
                "sample must be callable as sample(model, noise), or hold such by their names, got "
                f"{name!r}: {one!r}"
            )
    if not samplers:
        raise ValueError("sample must hold at least one sampler, got none")
    return samplers


def _read_corrections(corrections: Any, *, empty: bool) -> tuple[Correction, ...]:
    given = tuple(corrections) if isinstance(corrections, Iterable) else (None,)
    if not (given or empty) or not all(isinstance(c, Correction) for c in given):
        raise TypeError(f"corrections must be at least one Correction, got {describe(corrections)}")
    if bare := [c for c in given if not len(c.strengths)]:
        raise ValueError(f"corrections must each have strengths to try, got {bare[0]!r}")
    return given


def _drawn(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device="cpu"))
