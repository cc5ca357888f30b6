"""`check_swap` passes right swaps and finds wrong ones, and `check_target` tells targets apart."""

import contextlib
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.prediction import epsilon_from_output
from s2dm_loss.testing import check_swap, check_target
from tests.strategies import COSINE, FLOW, LINEAR, TYPES, ZERO_SNR, beside, targets_of

X0 = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(5))
T = torch.tensor([0, 8, 9, 100, 500, 900, 998, 999])
SIGMA = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99, 1.0])


class Swap:
    """A training step that knows neither this library nor its schedules."""

    def __init__(self, schedule, kind, t=T, x0=X0):
        self.kind, self.t, self.x0 = kind, t, x0
        self.a, self.b = (beside(scale.float(), x0) for scale in schedule.alpha_sigma(t))

    def batch(self, model):
        noise = torch.randn_like(self.x0)
        x_t = self.a * self.x0 + self.b * noise
        target = targets_of(self.x0, noise, self.a, self.b)[self.kind]
        return model(x_t, self.t), target, x_t, noise

    def loss(self, model):
        output, target, *_ = self.batch(model)
        return F.mse_loss(output, target)

    def by(self, schedule=LINEAR, skip=9, **options):
        """The right swap, for a schedule."""

        def swapped(model, tau):
            output, target, x_t, _ = self.batch(model)
            criterion = SkipStepLoss(schedule, skip, tau=tau, prediction_type=self.kind, **options)
            return criterion.from_output(output, target, self.t, x_t)

        return swapped


def fails(plain, swapped, message, **options):
    with pytest.raises(AssertionError, match=message):
        check_swap(plain, swapped, **options)


EPSILON = Swap(LINEAR, "epsilon")
RIGHT = EPSILON.by()


@pytest.mark.parametrize(
    ("schedule", "kind", "t", "skip"),
    [
        (LINEAR, "epsilon", T, 9),
        (LINEAR, "v_prediction", T, 9),
        (COSINE, "v_prediction", T, 9),
        (ZERO_SNR, "v_prediction", T, 9),
        (ZERO_SNR, "sample", T, 9),
        (FLOW, "flow", SIGMA, 0.01),
    ],
)
def test_a_right_swap_passes(schedule, kind, t, skip):
    trainer = Swap(schedule, kind, t)
    for device in ("meta", "cpu"):
        with torch.device(device):
            report = check_swap(trainer.loss, trainer.by(schedule, skip))
        assert (report.calls, report.ratio.shape) == (1, (8,))
    assert torch.equal(report.times, t)
    assert "gradient at tau over plain" in str(report)


@pytest.mark.parametrize(
    ("schedule", "kind", "t", "skip", "message"),
    [
        (COSINE, "v_prediction", T, 9, "from_output"),
        (FLOW, "flow", SIGMA.clamp(max=0.9999), 0.01, "from_output"),
        (ZERO_SNR, "v_prediction", T, 9, r"at tau = 1 must be the trainer's own.*nan"),
    ],
)
def test_weights_that_explode_below_tau_one(schedule, kind, t, skip, message):
    """The recipe that the pages used to give: right at τ = 1, and 2000 times too large below."""
    trainer = Swap(schedule, kind, t)

    def swapped(model, tau):
        output, _, x_t, noise = trainer.batch(model)
        eps_hat = epsilon_from_output(output, x_t, t, schedule, kind)
        ratio = trainer.a / (trainer.a + trainer.b) if kind == "flow" else trainer.a
        options = {"tau": tau, "max_c2": torch.inf, "prediction_type": "epsilon"}
        criterion = SkipStepLoss(schedule, skip, **options)
        return criterion.from_output(eps_hat, noise, t, weights=1 / ratio.flatten() ** 2)

    fails(trainer.loss, swapped, message, rtol=0.1)


V = Swap(LINEAR, "v_prediction")
EARLY = Swap(LINEAR, "epsilon", torch.arange(8))


def of_noise(model, tau):
    output, _, _, noise = V.batch(model)
    return SkipStepLoss(LINEAR, 9, tau=tau).from_output(output, noise, T)


def of_cosine(model, tau):
    criterion = SkipStepLoss(COSINE, 9, tau=tau, prediction_type="v_prediction")
    return criterion(model, X0, T, noise=torch.randn_like(X0))


def weighted(model):
    output, target, *_ = EPSILON.batch(model)
    return (torch.arange(1, 9) * (output - target).square().mean((1, 2, 3))).mean()


@pytest.mark.parametrize(
    ("plain", "swapped", "message"),
    [
        (V.loss, of_noise, r"loss at tau = 1.*prediction type"),
        (V.loss, of_cosine, "schedule"),
        (weighted, RIGHT, "weight of the trainer's"),
        (EARLY.loss, EARLY.by(), "all times of this batch below the skip"),
        (EPSILON.loss, lambda m, tau: RIGHT(m, tau) * (math.nan, 1)[tau != 0.5], "must act some"),
        (EPSILON.loss, lambda *run: EPSILON.batch(run[0]) and RIGHT(*run), "as before, 1 .* got 2"),
        (EPSILON.loss, EPSILON.by(reduction="none"), r"of the trainer's own, \(\), got \(8,\)"),
        (lambda model: 0 * EPSILON.loss(model), RIGHT, "own loss must not be 0"),
        (lambda model: torch.zeros(()), RIGHT, "depend on what the model returns"),
    ],
)
def test_a_wrong_swap_or_a_loss_that_shows_nothing(plain, swapped, message):
    fails(plain, swapped, message)


@pytest.mark.filterwarnings("ignore:prediction_type 'flow'")
@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_a_path_whose_time_runs_the_wrong_way(kind):
    """Of a schedule that turns after its check: its c² is 0 everywhere, the skip is off."""
    turned = []
    schedule = ContinuousSchedule(lambda t: (torch.log1p(-t), t.log())[:: -1 if turned else 1])
    turned.append(True)
    trainer = Swap(schedule, kind, SIGMA)
    fails(trainer.loss, trainer.by(schedule, 0.01), "time run the wrong way")


def test_a_trainer_in_float64_whose_first_draw_is_its_noise():
    """The stand-in's output must not be that noise again: a loss of 0 times 3 is 0."""
    trainer = Swap(LINEAR, "epsilon", x0=X0.double())
    right = trainer.by()
    assert check_swap(trainer.loss, right).plain > 1
    fails(trainer.loss, lambda *run: 3 * right(*run), "at tau = 1 must be the trainer's own")


def test_the_generators_of_numpy_and_python_start_anew_and_go_on_after():
    """Optimal transport pairs noise and data by numpy's: without it a right swap is 1 % off."""
    scales, states = [], []

    def drawn(loss):
        scales.append(random.uniform(1, 2) * np.random.uniform(1, 2))  # noqa: S311 - no secret
        return loss * scales[-1]

    for check in (lambda *_: None, check_swap):
        check(lambda m: drawn(EPSILON.loss(m)), lambda m, tau: drawn(RIGHT(m, tau)))
        states.append((random.getstate(), str(np.random.get_state())))
    assert len(set(scales)) == 1
    assert states[0] == states[1]


def test_several_gpus_are_no_warning(monkeypatch):
    for name, stub in (
        ("device_count", lambda: 2),
        ("get_rng_state", lambda device=None: torch.zeros(1)),
        ("set_rng_state", lambda *state: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stub)
    check_swap(EPSILON.loss, RIGHT)


def calling(call, trainer=EPSILON, swapped=RIGHT):
    """A trainer's two losses, of a model that is called in another way."""

    def of(model):
        return lambda x_t, t: call(model, x_t, t)

    return lambda model: trainer.loss(of(model)), lambda model, tau: swapped(of(model), tau)


@pytest.mark.filterwarnings("error:the gain at the last timestep")
def test_a_right_swap_of_a_learned_variance_passes_without_a_warning():
    """An output that is x_t is the noise itself at t = 999, where the gradient says nothing."""
    trainer = Swap(LINEAR, "epsilon", T.repeat(4), X0.repeat(4, 1, 1, 1))
    losses = calling(lambda model, x_t, t: model(x_t, t)[:, :3], trainer, trainer.by(skip=49))
    check_swap(*losses, output_of=lambda x: torch.cat([x, x], 1))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x_t, t: model(sample=x_t, timestep=t),
        lambda model, x_t, t: model(hidden_states=x_t, encoder_hidden_states=None, timestep=t),
        lambda model, x_t, t: model(x_t, timesteps=t, context=None),
        lambda model, x_t, t: model(x_t, t, None, class_labels=t),
        lambda model, x_t, t: model(x_t, t).sample,  # as diffusers' networks
        lambda model, x_t, t: model(x_t, t, return_dict=False)[0],
    ],
)
def test_the_stand_in_is_called_as_networks_are(call):
    assert torch.equal(check_swap(*calling(call)).times, T)


def test_data_without_axes():
    trainer = Swap(LINEAR, "epsilon", x0=torch.randn(8))
    assert check_swap(trainer.loss, trainer.by(skip=49)).calls == 1


@pytest.mark.parametrize("t", [T[:1], T[:, None].expand(8, 3)], ids=["one", "each frame's"])
def test_a_report_has_a_row_for_each_sample_whatever_the_shape_of_t(t):
    plain, swapped = calling(lambda model, x_t, _: model(x_t, t))
    said = str(check_swap(plain, swapped))
    assert len(said.splitlines()) == 2 + len(X0)
    assert ("nan" in said) == (t.ndim == 2)
    fails(plain, lambda model, tau: swapped(model, tau) / tau**99, "gradient")


GVP = ContinuousSchedule.from_alpha_sigma(
    lambda t: (torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)), min_time=1e-3
)
SIGMAS = NoiseSchedule.from_sigmas(torch.logspace(-2, 1.9, 200, dtype=torch.float64))
DATA = {"normal": lambda x: x, "half": lambda x: 0.5 * x, "signs": torch.sign}


class Trainer:
    """Makes targets by their definitions, in float32 as trainers do."""

    def __init__(self, schedule, data="normal", shape=(128, 64), seed=0, t=None):
        cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(seed)
        self.schedule = schedule
        self.x0 = DATA[data](torch.randn(*shape, generator=generator))
        self.noise = torch.randn(*shape, generator=generator)
        drawn = schedule.draw_timesteps(shape[0], device=cpu, generator=generator)
        self.t = drawn if t is None else t
        scales = schedule.alpha_sigma(self.t)
        self.alpha, self.sigma = (beside(x.float(), self.x0) for x in scales)
        self.x_t = self.alpha * self.x0 + self.sigma * self.noise

    def target(self, kind):
        if kind == "velocity":  # on GVP, by hand
            return math.pi / 2 * (self.alpha * self.noise - self.sigma * self.x0)
        return targets_of(self.x0, self.noise, self.alpha, self.sigma)[kind]

    def check(self, kind, assumed=None, schedule=None, **changed):
        schedule = schedule or self.schedule
        skip = 1 if schedule.timesteps is not None else 0.01
        criterion = SkipStepLoss(schedule, skip, prediction_type=assumed or kind)
        data = {"target": self.target(kind), "t": self.t, "x_t": self.x_t}
        return check_target(criterion, **{**data, **changed})

    def fails(self, message, *arguments, **options):
        with pytest.raises(AssertionError, match=message):
            self.check(*arguments, **options)


@pytest.mark.filterwarnings("ignore:prediction_type 'flow'")
@pytest.mark.parametrize(
    ("schedule", "kinds"),
    [
        (LINEAR, TYPES),
        (FLOW, TYPES[:4]),
        pytest.param(SIGMAS, TYPES, marks=pytest.mark.slow),
        pytest.param(GVP, [*TYPES[:4], "velocity"], marks=pytest.mark.slow),
    ],
)
def test_8192_values_tell_the_prediction_type(schedule, kinds):
    """On data of variance 1, where a v has mean square 1 too, and others."""
    for (seed, data), kind in itertools.product(enumerate(DATA), kinds):
        trainer = Trainer(schedule, data, seed=seed)
        needed = kind == "v_prediction" and schedule in (LINEAR, GVP) and data != "half"
        report = trainer.check(kind, noise=trainer.noise if needed else None)
        assert report.fits
        assert 7000 < report.values <= 8192  # float32 says nothing next to the data
        assert report.mean_square == pytest.approx(1, abs=0.06)
        assert report.correlation == pytest.approx(0, abs=0.05)
        for assumed in set(kinds) - {kind}:
            said = f"(?s){assumed}.* is not what.*What fits it: prediction_type='{kind}'"
            trainer.fails(said, kind, assumed)


def test_it_rarely_accuses_a_right_target():
    """What the docstring's rate says, on a part: at most 1 %."""
    right = 0
    for seed in range(150):
        with contextlib.suppress(AssertionError):
            right += Trainer(LINEAR, "half", seed=1000 + seed).check("v_prediction").fits
    assert right >= 149


def test_below_8192_values_it_asks_for_the_noise():
    trainer = Trainer(LINEAR, shape=(64, 2))
    with pytest.raises(ValueError, match=r"8192 values or more .* without `noise`, got 128"):
        trainer.check("epsilon")
    assert trainer.check("epsilon", noise=trainer.noise).error < 1e-6
    for kind, assumed in itertools.permutations(TYPES, 2):
        said = f"What fits it: prediction_type='{kind}'"
        trainer.fails(said, kind, assumed, noise=trainer.noise)


@pytest.mark.filterwarnings("ignore:prediction_type .flow. is noise minus data")
@pytest.mark.parametrize("data_at", [0, 1])
def test_the_noise_tells_the_direction_of_time_on_data_of_variance_1(data_at):
    """x_0 and ε have one distribution there: only the noise itself can."""
    path, other = (ContinuousSchedule.flow(data_at=at) for at in (data_at, 1 - data_at))
    trainer, halved = Trainer(path), Trainer(path, "half")
    # For the other clock the target ε - x_0 is one with the other sign.
    message = f"time turned round, data_at={data_at}"
    trainer.fails(message, "flow", schedule=other, noise=trainer.noise)
    halved.fails(message, "flow", schedule=other)
    # torchcfm's and lerobot's target is data minus noise, the velocity with data at 1.
    how = f"prediction_type='velocity' and {message}" if data_at else f"{message} and -output"
    halved.fails(how, "flow", schedule=other, target=halved.x0 - halved.noise)
    discrete = Trainer(LINEAR, "half")
    discrete.fails("time turned round, 999 - t", "v_prediction", t=999 - discrete.t)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
@pytest.mark.parametrize("data", ["normal", "signs"])
def test_a_v_on_data_of_variance_1_asks_for_the_noise(schedule, data):
    """There (v, x_t) is a rotation of (x_0, ε) by any schedule, as far as two means can tell."""
    trainer = Trainer(LINEAR, data, shape=(256, 64))
    with pytest.raises(ValueError, match=r"noise must be given .* got none on data of 1\.0"):
        trainer.check("v_prediction", schedule=schedule)
    if schedule is COSINE:
        trainer.fails("is not what", "v_prediction", schedule=COSINE, noise=trainer.noise)
    assert trainer.check("v_prediction", noise=trainer.noise).fits


@pytest.mark.parametrize("data", ["normal", "half"])
def test_with_the_noise_a_noise_target_is_judged_by_x_t(data):
    """There the noise in the target is right on any path, so x_t less b ε has to be without it."""
    for seed in range(5):
        trainer = Trainer(LINEAR, data, seed=seed)
        for batch in (trainer, Trainer(LINEAR, data, (16, 64), seed)):
            batch.check("epsilon", noise=batch.noise)
        for said, changed in (
            ("is not what", {"schedule": COSINE}),
            ("time turned round, 999 - t", {"t": 999 - trainer.t}),
            ("is not what", {"x_t": torch.zeros_like(trainer.x_t)}),
        ):
            trainer.fails(said, "epsilon", noise=trainer.noise, **changed)


def test_another_path_and_changed_noise_are_named():
    trainer, of_sigma = Trainer(LINEAR, "half"), Trainer(SIGMAS, "half")
    trainer.fails("Nothing else fits it on this schedule", "v_prediction", schedule=COSINE)
    x_t = trainer.x_t + trainer.sigma * 0.5  # an offset that the target does not have
    trainer.fails(r"offset.* off\?", "v_prediction", x_t=x_t)
    # x_0 + σ ε given to a criterion that takes it for √ᾱ x_0 + √(1-ᾱ) ε, and the other way.
    normalised = NoiseSchedule(SIGMAS.log_alphas_cumprod)
    of_sigma.fails("NoiseSchedule.from_sigmas, or x_t divided", "sample", schedule=normalised)
    x_t = of_sigma.x_t / torch.hypot(of_sigma.alpha, of_sigma.sigma)
    of_sigma.fails(r"or x_t multiplied by √\(1\+σ²\)", "sample", x_t=x_t)


@pytest.mark.parametrize("kind", ["epsilon", "score"])
def test_a_noise_is_judged_where_no_data_are_left(kind):
    trainer = Trainer(ZERO_SNR, "half", t=torch.full((128,), 999))
    assert trainer.check(kind, noise=trainer.noise).values == trainer.noise.numel()


def test_only_what_counts_under_a_mask_is_judged():
    trainer, values = Trainer(LINEAR, "half", (64, 4, 64)), torch.arange(64)
    target = trainer.target("v_prediction")
    target[..., 40:] = 7.0
    report = trainer.check("v_prediction", target=target, mask=values < 40)
    assert report.values == 64 * 4 * 40
    trainer.fails("is not what", "v_prediction", target=target)
    target[..., 40:] = math.nan
    assert trainer.check("v_prediction", target=target, mask=values < 40).fits
    with pytest.raises(ValueError, match="got 4096 that count"):
        trainer.check("v_prediction", target=target, mask=values < 16)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("given", [True, False], ids=["noise", ""])
def test_no_sample_is_left_out_for_what_is_wrong_with_it(kind, given):
    trainer = Trainer(LINEAR, "half", shape=(256, 64))
    noise = trainer.noise if given else None
    for name, values in (("target", trainer.target(kind)), ("x_t", trainer.x_t)):
        bad = values.clone()
        bad[:100] *= 1e9
        trainer.fails("is not what", kind, noise=noise, **{name: bad})
        for number in (math.nan, math.inf):
            bad[:100] = number
            with pytest.raises(ValueError, match=f"{name} must be finite .* 6400 values of 16384"):
                trainer.check(kind, noise=noise, **{name: bad})


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_half_precision_next_to_the_data_is_not_accused(kind):
    """There ε̂ is a small difference over a small σ: rounding adds to its mean square."""
    early = torch.arange(128) // 2 * torch.tensor([0, 15]).repeat(64)
    trainer = Trainer(LINEAR, "half", shape=(128, 256), t=early)
    halves = {"x_t": trainer.x_t.bfloat16(), "target": trainer.target(kind).bfloat16()}
    for noise in (None, trainer.noise.bfloat16()):
        report = trainer.check(kind, noise=noise, **halves)
        assert report.values >= 8192
        assert kind == "v_prediction" or report.values <= 64 * 256


ADAPTER = SimpleNamespace(criterion=SkipStepLoss(LINEAR, 9))
OTHERWISE, SMALL = calling(lambda model, x_t, t: model(pixels=x_t)), Trainer(LINEAR, shape=(8, 8))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_swap(lambda model: 1.0, RIGHT), TypeError, "a loss must be a tensor"),
        (lambda: check_swap(*OTHERWISE), TypeError, r"a tensor, and t, got 0 .*pixels by name"),
        (lambda: check_target(ADAPTER, X0, T, X0), TypeError, r"SkipStepLoss, .*its `\.criterion`"),
        (lambda: SMALL.check("epsilon", mask=[1]), TypeError, "mask must"),
        (lambda: SMALL.check("epsilon", mask=torch.ones(3, 8)), ValueError, "mask must"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
