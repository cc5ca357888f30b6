"""One training run that survives being killed.

A checkpoint holds the random streams too, so a resumed run ends with the weights it would have had
without the interruption.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import nn

from benchmarks.files import load_tensors, save_json, save_tensors
from benchmarks.provenance import versions
from benchmarks.quality.budget import Budget
from benchmarks.quality.checkpoint import newest_state, remove_states, save_state
from benchmarks.quality.data import ImageSet, to_model_range
from benchmarks.quality.networks import NetworkSpec, SpectralUNet
from benchmarks.quality.objectives import Batch, Loss, Objective
from benchmarks.quality.paths import STEPS
from benchmarks.quality.paths import Path as NoisePath
from benchmarks.quality.streams import Purpose, Stream, generator


def train(
    objective: Objective,
    seed: int,
    *,
    data: ImageSet,
    path: NoisePath,
    network: NetworkSpec,
    budget: Budget,
    folder: Path,
    device: torch.device,
    branch: Path | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> nn.Module:
    """Train a network, or take up a run where it stopped, or load one that is done.

    It has the averaged weights and is in evaluation mode, on the device. The seed is that of the
    initialisation and of all streams. The folder holds checkpoints while it is under way, then
    `weights.pt` and `training.json`. With `branch` it starts from that state of another run;
    `progress` is called with the number of steps just done, and may raise to stop the run.
    """
    weights_path, record_path = folder / "weights.pt", folder / "training.json"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, Purpose.INITIALISATION).initial_seed())
        model = network.build(data.shape)
        if not (weights_path.exists() and record_path.exists()):
            if isinstance(model, SpectralUNet):
                model.measure(to_model_range(data.images))
            run = _Run(model.to(device), objective, seed, data, path, budget, device)
            run.advance(folder, branch, progress)
            run.ema.copy_to(model.parameters())
            save_tensors(weights_path, model.state_dict())
            save_json(record_path, run.record())
    remove_states(folder)
    model.load_state_dict(load_tensors(weights_path))
    return model.to(device).eval().requires_grad_(False)


def kept_state(folder: Path, percent: int) -> Path:
    """Return where a run keeps its state after a share of its steps."""
    return folder / f"state-{percent}.pt"


def averaged_as_in(budget: Budget, parameters: Iterable[nn.Parameter]) -> EMAModel:
    """Return the average of weights that a budget asks for."""
    return EMAModel(
        parameters,
        decay=budget.ema_decay,
        use_ema_warmup=budget.ema_power is not None,
        power=budget.ema_power or 1.0,
        foreach=True,
    )


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        seed: int,
        data: ImageSet,
        path: NoisePath,
        budget: Budget,
        device: torch.device,
    ) -> None:
        self.model, self.objective, self.budget, self.device = model, objective, budget, device
        self.images = data.images.to(device)
        self.streams = {
            purpose: Stream(generator(seed, purpose), budget.batch_size, device)
            for purpose in (Purpose.TRAINING, Purpose.EXTRA)
        }
        self.loss = Loss(objective, path).to(device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=budget.learning_rate, fused=True)
        self.ema = averaged_as_in(budget, model.parameters())
        self.ema.to(device)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.sums = torch.zeros(2, device=device)
        self.parts: dict[str, Any] = {"model": model, "ema": self.ema, "optimizer": self.optimizer}

    def record(self) -> dict[str, Any]:
        """Return what is worth keeping of a finished run."""
        device = self.device
        return {
            "objective": self.objective.name,
            "steps": self.step,
            "parameters": sum(each.numel() for each in self.model.parameters()),
            "seconds": round(self.seconds, 2),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "curve": self.curve,
            "versions": versions(),
        }

    def advance(self, folder: Path, branch: Path | None, progress: Callable[[int], object]) -> None:
        """Go on from the folder's checkpoint, or else from a branching point, to the end."""
        state = newest_state(folder)
        if state is None and branch is not None:
            state = load_tensors(branch)
        if state is not None:
            self._restore(state)
        kept = {round(self.budget.steps * at): round(100 * at) for at in self.budget.keep_at}
        began = time.perf_counter()
        while self.step < self.budget.steps:
            self._take_step()
            if self.step % self.budget.log_every == 0:
                self._log()
            percent = kept.get(self.step)
            due = self.step % self.budget.checkpoint_every == 0 and self.step < self.budget.steps
            if percent is not None or due:
                now = time.perf_counter()
                self.seconds, began = self.seconds + now - began, now
                state = self._state()
                # Before the checkpoint, from which a run goes on behind this step.
                if percent is not None:
                    save_tensors(kept_state(folder, percent), state)
                if due:
                    save_state(folder, state)
            progress(1)
        self.seconds += time.perf_counter() - began

    def _learning_rate(self) -> float:
        rate = self.budget.learning_rate * min(1.0, (self.step + 1) / (self.budget.warmup + 1))
        if not self.budget.anneal:
            return rate
        done = self.step / self.budget.steps
        return rate * (1 + math.cos(math.pi * done)) / 2

    def _batch(self) -> Batch:
        stream = self.streams[Purpose.TRAINING]
        rows = stream.integers(len(self.images))
        t = stream.integers(STEPS)
        noise = stream.normal(tuple(self.images.shape[1:]))
        x0 = to_model_range(self.images[rows])
        if self.budget.flip:
            mirrored = stream.integers(2).bool()[:, None, None, None]
            x0 = torch.where(mirrored, x0.flip(-1), x0)
        return Batch(x0, t, noise, self.streams[Purpose.EXTRA])

    def _take_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.zero_grad()
        loss, errors = self.loss(self.model, self._batch())
        loss.backward()
        if self.budget.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.budget.grad_clip)
        self.optimizer.step()
        self.ema.step(self.model.parameters())
        self.sums += torch.stack([loss.detach(), errors.mean()])
        self.step += 1

    def _log(self) -> None:
        loss, epsilon_mse = (self.sums / self.budget.log_every).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"{self.objective.name}: the loss is {loss} at {self.step}")
        point = {"step": self.step, "loss": loss, "epsilon_mse": epsilon_mse}
        self.curve.append({name: round(value, 6) for name, value in point.items()})
        self.sums.zero_()

    def _state(self) -> dict[str, Any]:
        return {
            **{name: part.state_dict() for name, part in self.parts.items()},
            "streams": {int(p): s.source.get_state() for p, s in self.streams.items()},
            # Dropout draws from the global generators.
            "global": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "sums": self.sums,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.ema.to(self.device)
        for purpose, stream in self.streams.items():
            stream.source.set_state(state["streams"][int(purpose)])
        torch.set_rng_state(state["global"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve = state["curve"]
        self.sums = state["sums"].to(self.device)
