"""`check_swap` passes right swaps, and finds each way in which one has been got wrong."""

import random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.prediction import epsilon_from_output
from s2dm_loss.testing import check_swap

LINEAR = NoiseSchedule.linear(1000)
COSINE = NoiseSchedule.cosine(1000)
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
FLOW = ContinuousSchedule.flow()
X0 = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(5))
T = torch.tensor([0, 8, 9, 100, 500, 900, 998, 999])
SIGMA = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99, 1.0])


class Trainer:
    """A training step that knows neither this library nor its schedules."""

    def __init__(self, schedule, kind, t):
        self.kind, self.t = kind, t
        a, b = schedule.alpha_sigma(t)
        self.a, self.b = (scale.float()[:, None, None, None] for scale in (a, b))

    def batch(self, model):
        noise = torch.randn_like(X0)
        x_t = self.a * X0 + self.b * noise
        target = {
            "epsilon": noise,
            "v_prediction": self.a * noise - self.b * X0,
            "sample": X0,
            "flow": noise - X0,
        }[self.kind]
        return model(x_t, self.t), target, x_t, noise

    def loss(self, model):
        output, target, *_ = self.batch(model)
        return F.mse_loss(output, target)


def right(trainer, schedule, skip=9, **options):
    def swapped(model, tau):
        output, target, x_t, _ = trainer.batch(model)
        kind = options.get("prediction_type", trainer.kind)
        criterion = SkipStepLoss(schedule, skip, tau=tau, prediction_type=kind)
        return criterion.from_output(output, target, trainer.t, x_t)

    return swapped


GOOD = [
    (LINEAR, "epsilon", T, 9),
    (LINEAR, "v_prediction", T, 9),
    (COSINE, "v_prediction", T, 9),
    (ZERO_SNR, "v_prediction", T, 9),
    (ZERO_SNR, "sample", T, 9),
    (FLOW, "flow", SIGMA, 0.01),
]


@pytest.mark.parametrize(("schedule", "kind", "t", "skip"), GOOD)
def test_a_right_swap_passes(schedule, kind, t, skip):
    trainer = Trainer(schedule, kind, t)
    report = check_swap(trainer.loss, right(trainer, schedule, skip))
    assert report.calls == 1
    assert report.plain == pytest.approx(report.swapped, rel=1e-5)
    assert report.ratio.shape == (8,)
    assert torch.equal(report.times, t)
    assert "gradient at tau over plain" in str(report)


def test_a_right_swap_passes_whatever_the_default_device():
    trainer = Trainer(LINEAR, "epsilon", T)
    with torch.device("meta"):
        assert check_swap(trainer.loss, right(trainer, LINEAR)).calls == 1


def by_weights(trainer, schedule, skip):
    """The recipe that the pages used to give: right at τ = 1, and 2000 times too large below."""

    def swapped(model, tau):
        output, _, x_t, noise = trainer.batch(model)
        eps_hat = epsilon_from_output(output, x_t, trainer.t, schedule, trainer.kind)
        ratio = trainer.a / (trainer.a + trainer.b) if trainer.kind == "flow" else trainer.a
        criterion = SkipStepLoss(schedule, skip, tau=tau, max_c2=torch.inf)
        return criterion.from_output(eps_hat, noise, trainer.t, weights=1 / ratio.flatten() ** 2)

    return swapped


@pytest.mark.parametrize(
    ("schedule", "kind", "t", "skip"),
    [(COSINE, "v_prediction", T, 9), (FLOW, "flow", SIGMA.clamp(max=0.9999), 0.01)],
)
def test_weights_that_explode_below_tau_one(schedule, kind, t, skip):
    trainer = Trainer(schedule, kind, t)
    with pytest.raises(AssertionError, match="from_output"):
        check_swap(trainer.loss, by_weights(trainer, schedule, skip), rtol=0.1)


def test_weights_that_are_infinite_at_zero_terminal_snr():
    trainer = Trainer(ZERO_SNR, "v_prediction", T)
    with pytest.raises(AssertionError, match=r"at tau = 1 must be the trainer's own.*nan"):
        check_swap(trainer.loss, by_weights(trainer, ZERO_SNR, 9))


def test_a_v_that_is_taken_for_noise():
    trainer = Trainer(LINEAR, "v_prediction", T)

    def swapped(model, tau):
        output, _, _, noise = trainer.batch(model)
        return SkipStepLoss(LINEAR, 9, tau=tau).from_output(output, noise, trainer.t)

    with pytest.raises(AssertionError, match=r"loss at tau = 1.*prediction type"):
        check_swap(trainer.loss, swapped)


@pytest.mark.filterwarnings("ignore:prediction_type 'flow'")
@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_path_whose_time_runs_the_wrong_way(kind):
    """With a schedule that does not check itself: its c² is 0 everywhere, the skip is off."""

    class Backwards(ContinuousSchedule):
        def __init__(self):
            super().__init__(lambda t: (torch.log1p(-t), t.log()))
            self._log_alpha_sigma = lambda t: (t.log(), torch.log1p(-t))

    schedule = Backwards()
    trainer = Trainer(schedule, kind, SIGMA)
    with pytest.raises(AssertionError, match="time run the wrong way"):
        check_swap(trainer.loss, right(trainer, schedule, 0.01))


def test_a_batch_below_the_skip():
    trainer = Trainer(LINEAR, "epsilon", torch.arange(8))
    with pytest.raises(AssertionError, match="all times of this batch below the skip"):
        check_swap(trainer.loss, right(trainer, LINEAR))


def test_another_schedule():
    trainer = Trainer(COSINE, "v_prediction", T)

    def swapped(model, tau):
        noise = torch.randn_like(X0)
        criterion = SkipStepLoss(LINEAR, 9, tau=tau, prediction_type="v_prediction")
        return criterion(model, X0, trainer.t, noise=noise)

    with pytest.raises(AssertionError, match="schedule"):
        check_swap(trainer.loss, swapped)


def test_a_weight_of_the_trainers_that_was_forgotten():
    trainer = Trainer(LINEAR, "epsilon", T)

    def weighted(model):
        output, target, *_ = trainer.batch(model)
        return (torch.arange(1, 9) * (output - target).square().mean((1, 2, 3))).mean()

    with pytest.raises(AssertionError, match="weight of the trainer's"):
        check_swap(weighted, right(trainer, LINEAR))


def test_a_trainer_in_float64_whose_first_draw_is_its_noise():
    """The stand-in's output must not be that noise again: a loss of 0 times 3 is 0."""
    x0, t = X0.double(), T

    def plain(model):
        noise = torch.randn_like(x0)
        a, b = (scale[:, None, None, None] for scale in LINEAR.alpha_sigma(t))
        return F.mse_loss(model(a * x0 + b * noise, t), noise)

    def swapped(model, tau, factor=3.0):
        noise = torch.randn_like(x0)
        return factor * SkipStepLoss(LINEAR, 9, tau=tau)(model, x0, t, noise=noise)

    with pytest.raises(AssertionError, match="the loss at tau = 1 must be the trainer's own"):
        check_swap(plain, swapped)
    assert check_swap(plain, lambda model, tau: swapped(model, tau, 1.0)).plain > 1


def test_a_loss_that_is_nothing_shows_nothing():
    trainer = Trainer(LINEAR, "epsilon", T)
    with pytest.raises(AssertionError, match="the trainer's own loss must not be 0"):
        check_swap(lambda model: 0 * trainer.loss(model), right(trainer, LINEAR))


def test_a_second_call_of_the_model():
    trainer = Trainer(LINEAR, "epsilon", T)

    def swapped(model, tau):
        trainer.batch(model)
        return right(trainer, LINEAR)(model, tau)

    with pytest.raises(AssertionError, match="as often as before, 1 times, got 2"):
        check_swap(trainer.loss, swapped)


def test_another_reduction_and_no_dependence():
    trainer = Trainer(LINEAR, "epsilon", T)

    def per_sample(model, tau):
        output, target, x_t, _ = trainer.batch(model)
        return SkipStepLoss(LINEAR, 9, tau=tau, reduction="none").from_output(
            output, target, trainer.t, x_t
        )

    with pytest.raises(AssertionError, match=r"shape of the trainer's own, \(\), got \(8,\)"):
        check_swap(trainer.loss, per_sample)
    with pytest.raises(AssertionError, match="depend on what the model returns"):
        check_swap(lambda model: torch.zeros(()), per_sample)
    with pytest.raises(TypeError, match="a loss must be a tensor"):
        check_swap(lambda model: 1.0, per_sample)


def test_a_gradient_that_is_nan_at_a_strong_effect_is_no_effect():
    trainer = Trainer(LINEAR, "epsilon", T)
    swapped = right(trainer, LINEAR)
    with pytest.raises(AssertionError, match="the skip must act somewhere"):
        check_swap(
            trainer.loss, lambda m, tau: swapped(m, tau) * (float("nan") if tau == 0.5 else 1)
        )


def test_the_generators_of_numpy_and_python_start_anew_and_go_on_after():
    """Optimal transport pairs noise and data by numpy's: without it a right swap is 1 % off."""
    trainer = Trainer(LINEAR, "epsilon", T)
    scales = []

    def drawn(loss):
        scales.append(random.uniform(1, 2) * np.random.uniform(1, 2))  # noqa: S311 - no secret
        return loss * scales[-1]

    random.seed(1)
    np.random.seed(1)
    swapped = right(trainer, LINEAR)
    check_swap(
        lambda model: drawn(trainer.loss(model)), lambda model, tau: drawn(swapped(model, tau))
    )
    assert len(set(scales)) == 1
    found = random.random(), np.random.random()  # noqa: S311
    random.seed(1)
    np.random.seed(1)
    assert found == (random.random(), np.random.random())  # noqa: S311


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x_t, t: model(sample=x_t, timestep=t),
        lambda model, x_t, t: model(hidden_states=x_t, encoder_hidden_states=None, timestep=t),
        lambda model, x_t, t: model(x_t, timesteps=t, context=None),
        lambda model, x_t, t: model(x_t, t, None, class_labels=t),
    ],
)
def test_the_stand_in_can_be_called_by_keyword(call):
    trainer = Trainer(LINEAR, "epsilon", T)

    def by_name(model):
        return lambda x_t, t: call(model, x_t, t)

    swapped = right(trainer, LINEAR)
    report = check_swap(
        lambda model: trainer.loss(by_name(model)),
        lambda model, tau: swapped(by_name(model), tau),
    )
    assert torch.equal(report.times, T)
    with pytest.raises(TypeError, match=r"with x_t, a tensor, and t, got 0 .*pixels by name"):
        check_swap(lambda model: model(pixels=X0), lambda model, tau: model(pixels=X0))
