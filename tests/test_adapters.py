"""What all adapters have in common."""

import copy
import functools
import importlib.util
import itertools
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from s2dm_loss import ContinuousSchedule, NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters import ddim, edm, guided_diffusion, score_sde, sd_scripts
from s2dm_loss.adapters import denoising_diffusion_pytorch as lucid
from s2dm_loss.adapters.changed_output import changed_output
from s2dm_loss.adapters.diffusers import SkipLoss
from s2dm_loss.prediction import PREDICTION_TYPES
from s2dm_loss.testing import check_swap
from tests.doubles import denoising_diffusion_pytorch_double as lucid_double
from tests.doubles import edm_double, score_sde_double, sd_scripts_double
from tests.helpers import more_trainers, trainers
from tests.helpers.guided_diffusion_parts import make_diffusion
from tests.helpers.records import Probe
from tests.helpers.small import Network, every_pair, refuses
from tests.helpers.trainers import DDPM, SEED, as_net
from tests.strategies import pickled

CASES = trainers.CASES + more_trainers.CASES


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_swap(case):
    """Value and gradient at τ = 1, one call, and gradients near the plain ones at τ = 0.99."""
    report = check_swap(case.loss, case.loss, rtol=case.rtol)
    assert report.calls == 1


@pytest.mark.parametrize("case", [case for case in CASES if case.channels], ids=lambda c: c.name)
def test_tau_one_is_the_trainers_own_step(case):
    """Its loss, what a network of ours in a wrapper sees, and both random streams after it."""
    shared = {"estimator": "shared"} if case.options is None else {}
    runs = []
    for given in ({}, {"tau": 1.0, **shared}):
        model, calls = Network(case.channels, dtype=case.dtype), []
        wrapped = nn.DataParallel(model)
        wrapped.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(SEED)
        random.seed(SEED)
        loss = case.loss(wrapped, **given).detach()
        assert len(calls) == len(model.seen)
        runs.append((loss, model.seen, torch.get_rng_state(), random.getstate()))
    (plain, seen, *streams), (found, ours, *after) = runs
    torch.testing.assert_close(found, plain, rtol=case.rtol, atol=0)
    for call, theirs in zip(ours, seen, strict=True):
        assert all(map(torch.equal, call[:2], theirs[:2]))
        assert (call[1].dtype, call[2]) == (theirs[1].dtype, theirs[2])
    assert torch.equal(after[0], streams[0])
    assert after[1] == streams[1]


OPTIONS = {
    "expected": {"tau": 0.9},
    "shared": {"tau": 0.5, "estimator": "shared", "max_c2": 0.01, "normalize": True},
    "fresh": {"tau": 0.9, "estimator": "fresh"},
}


@pytest.mark.parametrize("case", [case for case in CASES if case.reference], ids=lambda c: c.name)
@pytest.mark.parametrize("estimator", OPTIONS)
def test_below_tau_one_it_is_the_cores_loss(case, estimator):
    """Of each sample, times the weight that the trainer's own gradient has over the plain one's."""
    options = OPTIONS[estimator]
    if case.options is not None and estimator != "expected":
        pytest.skip("a patch says its own options")

    def theirs(**given):
        model = Probe()
        torch.manual_seed(SEED)
        random.seed(SEED)
        loss = case.loss(model, **given).double().sum()
        (gradient,) = torch.autograd.grad(loss, model.seen["output"])
        return loss.item(), gradient.double(), model.seen

    plain, gradient, seen = theirs()
    xi = torch.randn(seen["x_t"].shape, dtype=case.dtype)  # after all that the trainer draws
    ours, ours_gradient, seen = theirs(**options)
    x_t = case.unscaled(seen["x_t"].double(), seen["t"])
    tiny, axes = torch.finfo(torch.float64).tiny, tuple(range(1, x_t.ndim))

    def cores(tau):
        output = seen["output"].detach().double().requires_grad_()
        predicted, target, times, *each = case.reference(x_t, seen["t"], output)
        criterion = SkipStepLoss(
            case.schedule,
            case.skips,
            **{**options, **(case.options or {}), "tau": tau},
            prediction_type=case.predicts,
        )
        drawn = {"skip_noise": xi.double()} if estimator == "fresh" else {}
        changed, factor = criterion.regression_target(target.double(), times, x_t, **drawn)
        error = (predicted - changed).square() * (each[0] if each else 1)
        loss = factor * error.mean(axes)
        return loss.detach(), torch.autograd.grad(loss.sum(), output)[0]

    (loss, wanted), (skipped, skipped_gradient) = cores(1.0), cores(options["tau"])
    weight = (gradient * wanted).sum(axes) / wanted.square().sum(axes).clamp(min=tiny)
    expected = weight.reshape(-1, *[1] * len(axes)) * skipped_gradient
    scale = expected.abs().amax(axes, keepdim=True).clamp(min=tiny)
    torch.testing.assert_close(ours_gradient / scale, expected / scale, rtol=0, atol=2e-4)
    change = float((weight * (skipped - loss)).sum())
    assert ours - plain == pytest.approx(change, rel=1e-3, abs=1e-5 * abs(plain))


# A device that holds no values: what would make a GPU wait, or stays behind, fails.
X, T = torch.empty(4, 2, 4, 4, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")


def ddim_on_meta(model, **options):
    loss_fn, b = ddim.ddim_loss(9, **options), torch.linspace(1e-4, 0.02, 1000)
    x = torch.randn(4, 2, 4, 4)
    loss_fn(Network(), x, torch.tensor([5, 9, 300, 999]), x, b)  # makes the tables, of β's values
    torch.utils.swap_tensors(b, b.to("meta"))  # the same table to the loss, and without values
    yield loss_fn(model, X, T, X, b)


def guided_on_meta(model, **options):
    for mean in ("EPSILON", "START_X"):
        skip_step = functools.partial(guided_diffusion.skip_step, original_timesteps=True)
        terms = skip_step(make_diffusion(mean=mean), 9, **options).training_losses(model, X, T)
        yield from (terms["loss"], terms["skip"])


VP, SUB_VP, VE = (getattr(score_sde_double, f"{name}SDE")() for name in ("VP", "subVP", "VE"))


def score_sde_on_meta(model, **options):
    for sde, continuous in itertools.product((VP, SUB_VP, VE), (True, False)):
        given = {"continuous": continuous, "allow_ve": True, **options}
        yield score_sde.get_sde_loss_fn(sde, True, skip_set=9, **given)(model, X)
    yield score_sde.get_ddpm_loss_fn(VP, True, skip_set=9, **options)(model, X)
    yield score_sde.get_smld_loss_fn(VE, True, skip_set=9, **options)(model, X)


@pytest.mark.parametrize("losses", [ddim_on_meta, guided_on_meta, score_sde_on_meta])
@pytest.mark.parametrize("estimator", ["expected", "fresh"])
def test_follows_its_tensors_without_reading_values(losses, estimator):
    for loss in losses(Network().to("meta"), estimator=estimator):
        assert loss.device.type == "meta"


SCHEDULES = {
    "zero terminal snr": NoiseSchedule.linear(1000).rescale_zero_terminal_snr(),
    "cosine": NoiseSchedule.cosine(1000),
    "flow": ContinuousSchedule.flow(),
}
CHANGES = every_pair(
    lambda each: each["name"] == "flow" or each["prediction_type"] != "velocity",
    name=SCHEDULES,
    prediction_type=PREDICTION_TYPES,
    estimator=("expected", "shared", "fresh"),
    tau=(0.1, 0.99, 1.0),
)


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: " ".join(map(str, case.values())))
def test_a_squared_error_of_the_changed_output_is_the_loss(case):
    """In value and gradient; at τ = 1 nothing changes."""
    name, t, skips = case["name"], torch.tensor([0, 8, 9, 300, 999]), 9
    if name == "flow":
        t, skips = torch.tensor([0.001, 0.01, 0.02, 0.5, 1.0], dtype=torch.float64), 0.01
    output, target, x_t = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    output.requires_grad_()
    options = {key: value for key, value in case.items() if key != "name"}
    criterion = SkipStepLoss(SCHEDULES[name], skips, **options, reduction="none")
    torch.manual_seed(0)
    expected = criterion.from_output(output, target, t, x_t)
    torch.manual_seed(0)  # the estimator "fresh" draws once
    changed, weight = changed_output(criterion, output, t, x_t)
    found = weight * (changed - target).square().mean((1, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), output)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    if case["tau"] == 1:
        assert torch.equal(changed, output)
        assert torch.equal(weight, torch.ones_like(weight))


def test_half_precision_is_lifted_and_tau_zero_refused():
    t, output = torch.tensor([3, 300]), torch.randn(2, 2, 4, 4).half()
    criterion = SkipStepLoss(DDPM, 9, prediction_type="v_prediction")
    changed, weight = changed_output(criterion, output, t, output)
    assert changed.dtype == weight.dtype == torch.float32
    none = SkipStepLoss(DDPM, 9, tau=0.0)
    refuses(ValueError, "tau must be above 0", changed_output, none, output, t, output)


def make_lucid():
    return lucid_double.GaussianDiffusion(Network(3), image_size=8)


IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
# The trainer's object, `skip_step`, a skip that fits, and a loss of the object.
SKIP_STEPS = {
    "denoising_diffusion_pytorch": (make_lucid, lucid.skip_step, 49, lambda made: made(IMAGES)),
    "edm": (edm_double.EDMLoss, edm.skip_step, 0.05, lambda made: made(as_net(Network(3)), IMAGES)),
    "guided_diffusion": (
        lambda: make_diffusion(respacing="ddim100"),
        functools.partial(guided_diffusion.skip_step, original_timesteps=True),
        49,
        lambda plain: plain.training_losses(Network(3), IMAGES, torch.tensor([0, 3, 50, 99])),
    ),
    "sd_scripts": (sd_scripts_double.NetworkTrainer, sd_scripts.skip_step, 49, None),
}


@pytest.mark.parametrize("name", SKIP_STEPS)
def test_skip_step_returns_a_changed_copy(name):
    make, skip_step, skip_set, _ = SKIP_STEPS[name]
    plain = make()
    kind, attributes = type(plain), dict(vars(plain))
    inner = {key: dict(value) for key, value in attributes.items() if isinstance(value, dict)}
    changed = skip_step(plain, skip_set)
    assert type(plain) is kind
    assert vars(plain) == attributes
    for key, value in inner.items():  # as a module's table of submodules
        assert vars(plain)[key].keys() == value.keys()
    assert isinstance(changed, kind)
    assert type(changed).__name__ == f"SkipStep{kind.__name__}"
    assert type(skip_step(plain, skip_set)) is type(changed)  # and again, from the same object
    none = {} if name == "edm" else nn.Linear(1, 1)
    for error, said, value in (
        (ValueError, r"plain loss, got a SkipStep.*: give it the tr", changed),
        (TypeError, rf"object of the trainer's, got the class {kind.__name__}", kind),
        (TypeError, r"a Linear without|a __call__, .* EDMLoss\(\)", none),
    ):
        refuses(error, said, skip_step, value, skip_set)


@pytest.mark.parametrize("name", ["denoising_diffusion_pytorch", "guided_diffusion", "edm"])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_copies_and_pickles_train_alike(name, duplicate):
    if (name, duplicate) == ("edm", pickled):
        pytest.skip("its pickle holds the trainer's own loss: tests/test_adapter_edm.py")
    make, skip_step, skip_set, loss_of = SKIP_STEPS[name]
    changed = skip_step(make(), skip_set)
    other = duplicate(changed)
    assert type(other) is type(changed)
    losses = []
    for each in (changed, other):
        torch.manual_seed(0)
        losses.append(loss_of(each))
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    other.more = True
    assert not hasattr(changed, "more")


def test_a_modules_copy_shares_its_network_and_nothing_that_is_added_later():
    plain = make_lucid()
    changed = lucid.skip_step(plain, 49)
    assert changed.model is plain.model
    assert changed.state_dict().keys() == plain.state_dict().keys()
    assert next(plain.parameters()) is next(changed.parameters())
    changed.more = nn.Linear(1, 1)
    changed.register_forward_hook(lambda *_: None)
    assert not hasattr(plain, "more")
    assert not plain._forward_hooks
    assert changed.double().betas.dtype == torch.float64
    assert plain.betas.dtype == torch.float32


ARGS = SimpleNamespace(v_parameterization=False, loss_type="l2")
# Each way into an adapter, which takes the skip and the options, and a skip that fits.
WAYS = {
    **{
        name: (functools.partial(skip_step, make()), skip_set)
        for name, (make, skip_step, skip_set, _) in SKIP_STEPS.items()
    },
    "sd_scripts.loss_of": (functools.partial(sd_scripts.loss_of, ARGS, DDPMScheduler()), 49),
    "ddim": (ddim.ddim_loss, 49),
    "diffusers": (functools.partial(SkipLoss.from_scheduler, DDPMScheduler()), 49),
    "diffusers, class": (functools.partial(SkipLoss, DDPM, scheduler=DDPMScheduler()), 49),
    **{
        name: (functools.partial(getattr(score_sde, name), VE if "smld" in name else VP, False), 49)
        for name in score_sde.__all__
    },
}


@pytest.mark.parametrize("name", WAYS)
def test_options_are_refused_by_name(name):
    """Unknown ones, those that the trainer settles or the core refuses; the skip must be given."""
    entry, skip_set = WAYS[name]
    refuses(TypeError, r"missing 1 required .* argument: 'skip_set'", entry)
    way = functools.partial(entry, skip_set=skip_set)
    refuses(TypeError, r"one of 'tau', .*got 'taus': did you mean 'tau'\?", way, taus=0.9)
    more = {"likelihood_weighting": False} if name == "get_sde_loss_fn" else {}
    own = ["weighting"] if name.startswith(("ddim", "diffusers", "get_")) else []
    own += ["reduction", "prediction_type"] if name.startswith("diffusers") else []
    settled = {"weighting": "min_snr", "reduction": "sum", "timesteps": "stratified"}
    for option, value in {**settled, "prediction_type": "v_prediction"}.items():
        if option in own:
            way(**{option: value}, **more)
            continue
        said = f"^{option} cannot be given here, got '{value}': "
        refuses(ValueError, said, way, **{option: value})
    either = (TypeError, ValueError)
    for option, value in {"tau": 1.5, "estimator": "exact", "max_c2": -1.0, "normalize": 1}.items():
        refuses(either, option, way, **{option: value})
    refuses(TypeError, "skip_set must be", way, skip_set="9")
    if name != "ddim":  # whose schedule comes with the first batch
        refuses(either, "skip must be below|takes skips as floats", way, skip_set=1000)


def test_no_trainer_is_imported(monkeypatch):
    """Their modules have names that others have as well, and are needed when used, if at all."""
    for name in (
        *("losses", "models", "utils", "sde_lib", "sampling", "datasets", "functions", "training"),
        *("diffusers", "denoising_diffusion_pytorch", "guided_diffusion", "library"),
    ):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    for path in Path(ddim.__file__).parent.glob("*.py"):
        spec = importlib.util.spec_from_file_location("fresh_copy", path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
