"""What a network is trained and sampled on: the discrete ε schedule, or the straight flow path.

Both share images, timesteps and noise. The common draw of a timestep n of 1,000 stands for the time
t = (n + 1/2) / 1000 of the flow, and a flow network is called with 1000 t, as diffusers' samplers
call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from typing_extensions import override

from s2dm_loss import ContinuousSchedule, NoiseSchedule
from s2dm_loss.prediction import PredictionType
from s2dm_loss.schedule import Schedule

STEPS = 1000


class Noisy(NamedTuple):
    """A noisy batch, what the network should return, the schedule's time, and the network's."""

    x_t: Tensor
    target: Tensor
    t: Tensor
    called: Tensor


class Path(nn.Module, ABC):
    """A schedule, what a network on it predicts, and what it is called with.

    Attributes:
        base: The sampler that others are compared with.
        about: The schedule in words.
    """

    schedule: Schedule
    prediction_type: PredictionType
    base: str
    about: str

    @abstractmethod
    def noisy(self, x0: Tensor, noise: Tensor, n: Tensor) -> Noisy:
        """Return x_t and what a network should make of it, at timesteps n of 1,000."""

    def on_schedule(self, model: nn.Module) -> nn.Module:
        """Return a network that is called with the schedule's time."""
        return model

    def on_sampler(self, model: nn.Module) -> nn.Module:
        """Undo `on_schedule`."""
        return model


class EpsilonPath(Path):
    """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε on the linear schedule, predicting ε; float32 tables."""

    base = "ddim"
    about = "linear, T = 1000, beta 1e-4 to 0.02"
    prediction_type: PredictionType = "epsilon"

    def __init__(self) -> None:
        """Make the tables."""
        super().__init__()
        self.schedule = NoiseSchedule.linear(STEPS)
        alphas_cumprod = self.schedule.alphas_cumprod.double()
        self.register_buffer("signal", alphas_cumprod.sqrt().float()[:, None, None, None])
        self.register_buffer("spread", (1 - alphas_cumprod).sqrt().float()[:, None, None, None])

    @override
    def noisy(self, x0: Tensor, noise: Tensor, n: Tensor) -> Noisy:
        x_t = self.get_buffer("signal")[n] * x0 + self.get_buffer("spread")[n] * noise
        return Noisy(x_t, noise, n, n)


class FlowPath(Path):
    """x_t = (1−t) x_0 + t ε, predicting ε − x_0 (arXiv 2210.02747)."""

    base = "euler"
    about = "flow, x_t = (1 - t) x_0 + t noise, t uniform"
    prediction_type: PredictionType = "flow"

    def __init__(self) -> None:
        """Make the schedule."""
        super().__init__()
        self.schedule = ContinuousSchedule.flow()

    @override
    def noisy(self, x0: Tensor, noise: Tensor, n: Tensor) -> Noisy:
        t = (n.float() + 0.5) / STEPS
        along = t[:, None, None, None]
        return Noisy((1 - along) * x0 + along * noise, noise - x0, t, STEPS * t)

    @override
    def on_schedule(self, model: nn.Module) -> nn.Module:
        return Called(model, lambda net, x, t: net(x, STEPS * t))

    @override
    def on_sampler(self, model: nn.Module) -> nn.Module:
        return Called(model, lambda net, x, t: net(x, 1 / STEPS * t))


class Called(nn.Module):
    """A network by way of a function: `call(network, x, t)` stands for `network(x, t)`."""

    def __init__(
        self, model: nn.Module, call: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ) -> None:
        """Wrap a network."""
        super().__init__()
        self.model, self.call = model, call

    @override
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.call(self.model, x, t)


PATHS: dict[str, type[Path]] = {"epsilon": EpsilonPath, "flow": FlowPath}
