"""A validation loss that repeats itself: fixed times and fixed noise for each sample.

Sample i is evaluated at `levels` times, one in each of as many equal parts of the schedule, with a
noise of its own at each. Both depend on the seed and on i alone, so neither the batch size, nor the
number of processes, nor a former call changes them, and two checkpoints see the same inputs.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from typing_extensions import Unpack

from s2dm_loss.checks import check_batch, check_count, describe
from s2dm_loss.loss import LossOptions, SkipStepLoss
from s2dm_loss.prediction import PathPoint, evaluating, read_output
from s2dm_loss.schedule import Schedule, check_schedule, log_snr_at
from s2dm_loss.skip_set import Skips, SkipSet
from s2dm_loss.timesteps import times_at
from s2dm_loss.validation_result import ValidationLoss, same_samples
from s2dm_loss.weighting import weights_at

_OF_SKIP_STEP = ("skip_set", "tau", "estimator", "normalize", "max_c2")
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples are spread evenly mod 2^64


def validation_loss(
    model: Callable[..., Any],
    batches: Iterable[Any],
    schedule: Schedule,
    *,
    levels: int = 16,
    skip_set: Skips | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Unpack[LossOptions],
) -> ValidationLoss:
    """Evaluate a model at fixed times and noise; `levels` model calls a batch, without gradients.

    The model is in evaluation mode meanwhile, and torch's random numbers go on afterwards as if it
    had not been called. Two calls on a CPU give the same bits. With several processes every one has
    to call it, each with its own part of the data, and every one gets the result of all.

    Args:
        model: Called as for `SkipStepLoss`; pass the averaged weights if you sample with them.
        batches: Any iterable of batches, such as a DataLoader. A batch is x_0 of shape [B, ...], or
            (x_0, model_kwargs), or (x_0, model_kwargs, index) with an int for each sample. Without
            an index the samples count in their order; with R processes the j-th of process r is
            sample r + R j, as a `DistributedSampler` deals them out. Samples that it repeats, so
            that all processes get as many, count twice: give indices, or its `drop_last=True`.
        schedule: The noise schedule.
        levels: Number of times for each sample.
        skip_set: Skips of the S²-DM loss, evaluated besides the plain one from the same model
            calls; None leaves it out.
        seed: Seed of times and noise. Results compare only at the same seed.
        device: Where the model is called; that of its parameters if not given, or x_0's.
        progress: Show a bar, where tqdm is installed and the error stream is a terminal.
        **options: Those of `SkipStepLoss`: prediction_type, tau, weighting, max_c2, ...

    Returns:
        The loss of each sample at each level, with its means, standard errors, figure and
        comparison.

    Raises:
        TypeError, ValueError: if an argument, a batch or the model's output is not as said.
    """
    levels, seed = check_count("levels", levels, 2), check_count("seed", seed, -(2**63))
    _check_options(options)
    if isinstance(batches, Tensor):
        raise TypeError(
            f"batches must be an iterable of batches, got {describe(batches)}, of which each "
            "sample would be one: give `x0.split(64)`"
        )
    shared: LossOptions = {**options, "reduction": "none"}
    # At τ = 1, which is the plain loss, any skips will do; these fit one timestep too.
    plain: LossOptions = {**shared, "tau": 1.0}
    ends = times_at(check_schedule(schedule), torch.arange(2.0, device="cpu"))
    skips = SkipSet.from_timesteps(ends)
    criteria = {"plain": SkipStepLoss(schedule, skips, **plain)}
    if skip_set is not None:
        criteria["skip_step"] = SkipStepLoss(schedule, skip_set, **shared)
    place = _device_of(model) if device is None else torch.device(device)
    rank, world_size = rank_and_size()
    indices: list[int] = []
    fingerprints: list[list[float]] = []
    losses = [torch.empty(0, len(criteria), levels, dtype=torch.float64, device="cpu")]
    with evaluating(model), torch.no_grad(), _own_random_numbers(place, seed):
        for batch in _bar(batches, shown=progress and rank == 0):
            x0, model_kwargs, index = _read_batch(batch, place)
            if not len(x0):
                continue
            if index is None:
                index = [rank + world_size * (len(indices) + j) for j in range(len(x0))]
            losses.append(_losses_of(criteria, model, x0, model_kwargs, index, levels, seed))
            indices += index
            fingerprints += _fingerprints(x0)
    index_of, fingerprint, found = _joined(indices, fingerprints, torch.cat(losses))
    middle = (torch.arange(levels, dtype=torch.float64, device="cpu") + 0.5) / levels
    # From noise to data, whichever way the schedule's time runs.
    times = times_at(schedule, middle)
    log_snr, order = log_snr_at(schedule, times).sort()
    settings = {
        "schedule": _without_address(schedule),
        "levels": levels,
        "seed": seed,
        # A path of one's own has no name, and log SNR does not tell its scale.
        "alpha": [float(f"{alpha:.6g}") for alpha in schedule.alpha_sigma(times)[0].tolist()],
        **_settings(criteria["plain"], "prediction_type", "weighting"),
        **_weights_of(criteria["plain"], times),
        **_settings(criteria.get("skip_step"), *_OF_SKIP_STEP),
    }
    if sampled := getattr(skip_set, "timesteps", None):
        settings["timesteps"] = list(sampled)  # of which a skip set's name has a few
    return ValidationLoss(
        index=index_of,
        fingerprint=fingerprint,
        losses=dict(zip(criteria, found[..., order].unbind(1), strict=True)),
        log_snr=log_snr.tolist(),
        settings=settings,
    )


def rank_and_size() -> tuple[int, int]:
    """Return the rank of this process and the number of processes: 0 and 1 if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _losses_of(
    criteria: Mapping[str, SkipStepLoss],
    model: Callable[..., Any],
    x0: Tensor,
    model_kwargs: Mapping[str, Any],
    index: Sequence[int],
    levels: int,
    seed: int,
) -> Tensor:
    """Return each criterion's loss of one batch, float64 of shape [B, criteria, levels]."""
    sources = [_source(seed, i) for i in index]
    u = torch.tensor([_uniform(seed, i, levels) for i in index], dtype=torch.float64, device="cpu")
    losses = []
    for times in times_at(criteria["plain"].schedule, u).unbind(1):
        noise = torch.stack(
            [
                torch.randn(x0.shape[1:], generator=source, device="cpu", dtype=torch.float32)
                for source in sources
            ]
        ).to(x0)
        once = _Once(model, model_kwargs)
        for criterion in criteria.values():
            losses.append(criterion(once, x0, times.to(x0.device), noise=noise))
    values = torch.stack(losses, dim=1).to("cpu", torch.float64)
    return values.reshape(-1, levels, len(criteria)).transpose(1, 2)


class _Once:
    """A model that is called for the first loss; the others read the same output."""

    def __init__(self, model: Callable[..., Any], model_kwargs: Mapping[str, Any]) -> None:
        self.model, self.model_kwargs = model, model_kwargs
        self.output: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.output is None:
            self.output = read_output(self.model(x_t, t, **self.model_kwargs))
        return self.output


def _source(seed: int, index: int) -> torch.Generator:
    """Return the random stream of one sample's noise.

    A CPU generator, whose numbers are the same for every device, takes 32 bits of a seed: an odd
    multiple of the index is another one for each of 2^32 samples.
    """
    start = (_hashed(seed) + index * _GOLDEN) % 2**32
    return torch.Generator("cpu").manual_seed(start)


def _uniform(seed: int, index: int, levels: int) -> list[float]:
    """Return one u in each of `levels` parts of [0, 1).

    Over the samples, multiples of the golden ratio fill each part evenly (a Kronecker sequence), so
    the times of n samples are stratified n · levels fold.
    """
    shifts = [_hashed(seed, level) for level in range(levels)]
    within = [((shift + index * _GOLDEN) % 2**64 >> 11) / 2**53 for shift in shifts]
    return [(level + part) / levels for level, part in enumerate(within)]


def _hashed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little")


def _read_batch(
    batch: Any, device: torch.device | None
) -> tuple[Tensor, dict[str, Any], list[int] | None]:
    """Return x_0, the model's further arguments, and the samples' indices or None."""
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    x0, kwargs, index = (*parts, None, None)[:3]
    kwargs = {} if kwargs is None else kwargs
    if len(parts) > 3 or not isinstance(x0, Tensor) or not isinstance(kwargs, Mapping):
        raise TypeError(
            "batches must hold x_0, (x_0, model_kwargs) or (x_0, model_kwargs, index), got "
            f"{', '.join(map(describe, parts))}: of a loader with labels give "
            '`((x, {"y": y}) for x, y in loader)`, or `(x for x, _ in loader)` without them'
        )
    x0 = check_batch("x0", x0).to(device)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    if index is None:
        return x0, moved, None
    index = [int(i) for i in index]
    if len(index) != len(x0):
        raise ValueError(f"index must hold one int for each of {len(x0)} samples, got {len(index)}")
    return x0, moved, index


def _fingerprints(x0: Tensor) -> list[list[float]]:
    """Return each sample's sum with fixed signs over √D, which is ± about its size, and its size.

    A mean would be 0 for all standardised samples.
    """
    values = x0.reshape(len(x0), -1).to("cpu", torch.float64)
    drawn = torch.randint(2, values.shape[1:], generator=_source(0, 0), device="cpu")
    sums = values @ (2.0 * drawn - 1).double() / values.shape[1] ** 0.5
    found: list[list[float]] = torch.stack([sums, values.square().mean(1).sqrt()], 1).tolist()
    return found


def _joined(
    indices: list[int], fingerprints: list[list[float]], losses: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples of all processes, each once, in the order of their index."""
    mine = (
        torch.tensor(indices, dtype=torch.int64, device="cpu"),
        torch.tensor(fingerprints, dtype=torch.float64, device="cpu").reshape(-1, 2),
        losses,
    )
    parts: list[Any] = [mine] * rank_and_size()[1]
    if len(parts) > 1:
        distributed.all_gather_object(parts, mine)
    index, fingerprint, losses = (torch.cat(values) for values in zip(*parts, strict=True))
    if not len(index):
        raise ValueError(
            "batches must hold at least one sample, got none: was an iterator used up before?"
        )
    index, order = index.sort(stable=True)
    fingerprint, losses = fingerprint[order], losses[order]
    # A distributed sampler repeats samples to fill its last batch.
    first = torch.ones_like(index, dtype=torch.bool)
    first[1:] = index[1:] != index[:-1]
    same = same_samples(fingerprint[1:], fingerprint[:-1])
    if bool((~first[1:] & ~same).any()):
        i = int((~first[1:] & ~same).nonzero()[0])
        raise ValueError(f"index must differ between samples, got {int(index[i])} for several")
    return index[first], fingerprint[first], losses[first]


def _device_of(model: object) -> torch.device | None:
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    return next((parameter.device for parameter in parameters), None)


@contextmanager
def _own_random_numbers(device: torch.device | None, seed: int) -> Iterator[None]:
    """Seed torch's generators, which a loader or a model may draw from, and put them back."""
    on_gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _bar(batches: Iterable[Any], *, shown: bool) -> Iterable[Any]:
    if not shown or not sys.stderr.isatty():
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc="validation loss", leave=False)  # type: ignore[no-any-return]


def _check_options(options: LossOptions) -> None:
    if options.get("estimator") == "fresh":
        raise ValueError(
            "estimator must not be 'fresh', which draws a second noise: 'expected' evaluates its "
            "expectation"
        )
    for name in ("reduction", "timesteps"):
        if name in options:
            raise ValueError(f"{name} must be left out: each sample is kept, at times of its own")


def _settings(criterion: SkipStepLoss | None, *names: str) -> dict[str, Any]:
    """Return settings of a loss as JSON can hold them; None for all of a loss that is not there."""
    values = {name: getattr(criterion, name, None) for name in names}
    simple = (bool, int, float, str, type(None))
    return {name: v if isinstance(v, simple) else _without_address(v) for name, v in values.items()}


def _weights_of(criterion: SkipStepLoss, times: Tensor) -> dict[str, Any]:
    """Return the weights of a user's own function, whose name does not tell it from another."""
    weighting = criterion.weighting
    # A module prints no address, nor its values.
    told_by_name = repr(weighting) == _without_address(weighting)
    if weighting is None or (told_by_name and not isinstance(weighting, nn.Module)):
        return {}
    weights = weights_at(weighting, PathPoint.at(criterion.schedule, times)).tolist()
    values = ", ".join(f"{weight:.6g}" for weight in weights)
    return {"weighting": f"{_without_address(weighting)} of {values}"}


def _without_address(value: object) -> str:
    """Return a `repr` less the address in memory, which is another in each process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
