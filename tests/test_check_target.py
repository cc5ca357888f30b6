"""`check_target` tells what a trainer's target is, by closed forms of the targets."""

import math

import pytest
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.testing import check_target

LINEAR, FLOW = NoiseSchedule.linear(1000), ContinuousSchedule.flow()
GVP = ContinuousSchedule.from_alpha_sigma(
    lambda t: (torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)), min_time=1e-3
)
SIGMAS = NoiseSchedule.from_sigmas(torch.logspace(-2, 1.9, 200, dtype=torch.float64))
DATA = {
    "normal": lambda *shape, generator: torch.randn(*shape, generator=generator),
    "half": lambda *shape, generator: 0.5 * torch.randn(*shape, generator=generator),
    "signs": lambda *shape, generator: torch.randn(*shape, generator=generator).sign(),
}


class Trainer:
    """Makes targets by their definitions, in float32 as trainers do."""

    def __init__(self, schedule, data="normal", shape=(128, 64), seed=0, t=None):
        generator = torch.Generator().manual_seed(seed)
        self.schedule = schedule
        self.x0 = DATA[data](*shape, generator=generator)
        self.noise = torch.randn(*shape, generator=generator)
        self.t = (
            t
            if t is not None
            else schedule.draw_timesteps(shape[0], device=torch.device("cpu"), generator=generator)
        )
        self.alpha, self.sigma = (
            scale.float().reshape(-1, *[1] * (len(shape) - 1))
            for scale in schedule.alpha_sigma(self.t)
        )
        self.x_t = self.alpha * self.x0 + self.sigma * self.noise

    def target(self, kind):
        alpha, sigma, x0, noise = self.alpha, self.sigma, self.x0, self.noise
        if kind == "velocity":  # on GVP, by hand
            return math.pi / 2 * (alpha * noise - sigma * x0)
        return {
            "epsilon": noise,
            "v_prediction": (alpha * noise - sigma * x0) / torch.hypot(alpha, sigma),
            "sample": x0,
            "flow": noise - x0,
            "score": -noise / sigma,
        }[kind]

    def check(self, kind, assumed, schedule=None, **options):
        schedule = schedule or self.schedule
        skip = 1 if schedule.timesteps is not None else 0.01
        criterion = SkipStepLoss(schedule, skip, prediction_type=assumed)
        arguments = {"t": self.t, "x_t": self.x_t, **options}
        return check_target(criterion, self.target(kind), **arguments)


KINDS = {
    LINEAR: ["epsilon", "v_prediction", "sample", "flow", "score"],
    SIGMAS: ["epsilon", "v_prediction", "sample", "flow", "score"],
    FLOW: ["epsilon", "v_prediction", "sample", "flow"],
    GVP: ["epsilon", "v_prediction", "sample", "flow", "velocity"],
}
PAIRS = [(s, kind, assumed) for s, kinds in KINDS.items() for kind in kinds for assumed in kinds]


@pytest.mark.filterwarnings("ignore:prediction_type 'flow'")
@pytest.mark.parametrize(("schedule", "kind", "assumed"), PAIRS)
def test_8192_values_tell_the_prediction_type(schedule, kind, assumed):
    """On data of variance 1, where a v has mean square 1 too, and others."""
    for seed, data in enumerate(DATA):
        trainer = Trainer(schedule, data, seed=seed)
        if kind == assumed:
            report = trainer.check(kind, assumed)
            assert report.fits
            assert 7000 < report.values <= 8192  # float32 says nothing next to the data
            assert report.mean_square == pytest.approx(1, abs=0.06)
            assert report.correlation == pytest.approx(0, abs=0.05)
        else:
            with pytest.raises(AssertionError, match=f"{assumed}.* is not what") as caught:
                trainer.check(kind, assumed)
            assert f"What fits it: prediction_type='{kind}'" in str(caught.value)


def test_it_rarely_accuses_a_right_target():
    """What the docstring's rate says, on a part: at most 1 %."""
    wrong = 0
    for seed in range(150):
        trainer = Trainer(LINEAR, "half", seed=1000 + seed)
        try:
            trainer.check("v_prediction", "v_prediction")
        except AssertionError:
            wrong += 1
    assert wrong <= 1


def test_below_8192_values_it_asks_for_the_noise():
    trainer = Trainer(LINEAR, shape=(64, 2))
    with pytest.raises(ValueError, match=r"8192 values or more .* without `noise`, got 128"):
        trainer.check("epsilon", "epsilon")
    assert trainer.check("epsilon", "epsilon", noise=trainer.noise).error < 1e-6
    for kind in KINDS[LINEAR]:
        for assumed in KINDS[LINEAR]:
            if kind != assumed:
                with pytest.raises(AssertionError, match=f"What fits it: prediction_type='{kind}'"):
                    trainer.check(kind, assumed, noise=trainer.noise)


@pytest.mark.parametrize("data_at", [0, 1])
def test_the_noise_tells_the_direction_of_time_on_data_of_variance_1(data_at):
    """x_0 and ε have one distribution there: only the noise itself can."""
    trainer = Trainer(ContinuousSchedule.flow(data_at=data_at))
    other = ContinuousSchedule.flow(data_at=1 - data_at)
    # For the other clock the target ε - x_0 is one with the other sign.
    message = f"time turned round, data_at={data_at}"
    with pytest.raises(AssertionError, match=message):
        trainer.check("flow", "flow", schedule=other, noise=trainer.noise)
    halved = Trainer(ContinuousSchedule.flow(data_at=data_at), "half")
    with pytest.raises(AssertionError, match=message):
        halved.check("flow", "flow", schedule=other)
    # torchcfm's and lerobot's target is data minus noise, the velocity with data at 1.
    criterion = SkipStepLoss(other, 0.01, prediction_type="flow")
    how = f"prediction_type='velocity' and {message}" if data_at else f"{message} and -output"
    with pytest.raises(AssertionError, match=how):
        check_target(criterion, halved.x0 - halved.noise, halved.t, halved.x_t)
    discrete = Trainer(LINEAR, "half")
    discrete.t = 999 - discrete.t
    with pytest.raises(AssertionError, match="time turned round, 999 - t"):
        discrete.check("v_prediction", "v_prediction")


def test_a_path_of_sigma_is_named():
    """x_0 + σ ε given to a criterion that takes it for √ᾱ x_0 + √(1-ᾱ) ε, and the other way."""
    trainer = Trainer(SIGMAS, "half")
    normalised = NoiseSchedule(SIGMAS.log_alphas_cumprod)
    with pytest.raises(AssertionError, match=r"NoiseSchedule.from_sigmas, or x_t divided"):
        trainer.check("sample", "sample", schedule=normalised)
    trainer.x_t = trainer.x_t / torch.hypot(trainer.alpha, trainer.sigma)
    with pytest.raises(AssertionError, match=r"or x_t multiplied by √\(1\+σ²\)"):
        trainer.check("sample", "sample")


def test_another_schedule_and_changed_noise():
    trainer = Trainer(LINEAR, "half")
    cosine = NoiseSchedule.cosine(1000)
    with pytest.raises(AssertionError, match="Nothing else fits it on this schedule"):
        trainer.check("v_prediction", "v_prediction", schedule=cosine)
    trainer.x_t = trainer.x_t + trainer.sigma * 0.5  # an offset that the target does not have
    with pytest.raises(AssertionError, match=r"offset.* off\?"):
        trainer.check("v_prediction", "v_prediction")


def test_only_what_counts_under_a_mask_is_judged():
    trainer = Trainer(LINEAR, shape=(64, 4, 64))
    mask = torch.arange(64) < 40
    target = trainer.target("v_prediction")
    target[..., 40:] = 7.0
    criterion = SkipStepLoss(LINEAR, 9, prediction_type="v_prediction")
    report = check_target(criterion, target, trainer.t, trainer.x_t, mask=mask)
    assert report.values == 64 * 4 * 40
    with pytest.raises(AssertionError):
        check_target(criterion, target, trainer.t, trainer.x_t)
    with pytest.raises(ValueError, match="got 4096 that count"):
        check_target(criterion, target, trainer.t, trainer.x_t, mask=torch.arange(64) < 16)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_half_precision_next_to_the_data_is_not_accused(kind):
    """There ε̂ is a small difference over a small σ: rounding adds to its mean square."""
    early = torch.arange(128) // 2 * torch.tensor([0, 15]).repeat(64)
    trainer = Trainer(LINEAR, "normal", shape=(128, 256), t=early)
    trainer.x_t = trainer.x_t.bfloat16()
    target = trainer.target(kind).bfloat16()
    criterion = SkipStepLoss(LINEAR, 9, prediction_type=kind)
    for noise in (None, trainer.noise.bfloat16()):
        report = check_target(criterion, target, trainer.t, trainer.x_t, noise=noise)
        assert report.values >= 8192
        assert kind == "v_prediction" or report.values <= 64 * 256
