"""What all adapters have in common: a changed copy, one set of options, no default for the skip."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from s2dm_loss import NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters import (
    ddim,
    denoising_diffusion_pytorch,
    edm,
    guided_diffusion,
    score_sde,
    sd_scripts,
)
from s2dm_loss.adapters.diffusers import SkipLoss
from tests.doubles import denoising_diffusion_pytorch_double, score_sde_double, sd_scripts_double
from tests.doubles.edm_double import EDMLoss
from tests.helpers.guided_diffusion_parts import make_diffusion


class Network(nn.Module):
    """What denoising-diffusion-pytorch asks of one."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, *_):
        return self.conv(x)


def lucid():
    return denoising_diffusion_pytorch_double.GaussianDiffusion(Network(), image_size=8)


# The trainer's object, `skip_step` and a skip that fits.
SKIP_STEPS = {
    "denoising_diffusion_pytorch": (lucid, denoising_diffusion_pytorch.skip_step, 49),
    "edm": (EDMLoss, edm.skip_step, 0.05),
    "guided_diffusion": (make_diffusion, guided_diffusion.skip_step, 49),
    "sd_scripts": (sd_scripts_double.NetworkTrainer, sd_scripts.skip_step, 49),
}


def of_trainer(make, skip_step, skip_set):
    return lambda **options: skip_step(make(), **{"skip_set": skip_set, **options})


ARGS = SimpleNamespace(v_parameterization=False, loss_type="l2")
# Each way into an adapter, called with its options.
WAYS = {
    **{name: of_trainer(*parts) for name, parts in SKIP_STEPS.items()},
    "sd_scripts.loss_of": lambda skip_set=49, **options: sd_scripts.loss_of(
        ARGS, DDPMScheduler(), skip_set, **options
    ),
    "ddim": lambda skip_set=49, **options: ddim.ddim_loss(skip_set, **options),
    "diffusers": lambda skip_set=49, **options: SkipLoss.from_scheduler(
        DDPMScheduler(), skip_set, **options
    ),
    **{
        f"score_sde.{name}": lambda skip_set=49, name=name, sde=sde, **options: getattr(
            score_sde, name
        )(sde(), True, skip_set=skip_set, **options)
        for name, sde in (
            ("get_sde_loss_fn", score_sde_double.VPSDE),
            ("get_ddpm_loss_fn", score_sde_double.VPSDE),
            ("get_smld_loss_fn", score_sde_double.VESDE),
        )
    },
}
OWN_THEIR_WEIGHT = ("ddim", "diffusers", "score_sde")


@pytest.mark.parametrize("name", SKIP_STEPS)
def test_skip_step_returns_a_changed_copy(name):
    make, skip_step, skip_set = SKIP_STEPS[name]
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
    with pytest.raises(ValueError, match=r"plain loss, got a SkipStep.*: give it the tr"):
        skip_step(changed, skip_set)
    with pytest.raises(TypeError, match=rf"object of the trainer's, got the class {kind.__name__}"):
        skip_step(kind, skip_set)


def test_a_modules_copy_shares_its_network_and_nothing_that_is_added_later():
    plain = lucid()
    changed = denoising_diffusion_pytorch.skip_step(plain, 49)
    assert all(map(torch.equal, plain.parameters(), changed.parameters()))
    assert next(plain.parameters()) is next(changed.parameters())
    changed.more = nn.Linear(1, 1)
    changed.register_forward_hook(lambda *_: None)
    assert not hasattr(plain, "more")
    assert not plain._forward_hooks
    assert changed.double().betas.dtype == torch.float64
    assert plain.betas.dtype == torch.float32


@pytest.mark.parametrize("name", WAYS)
def test_an_unknown_option_is_named(name):
    with pytest.raises(TypeError, match=r"one of 'tau', .*got 'taus': did you mean 'tau'\?"):
        WAYS[name](taus=0.9)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weighting", "min_snr"),
        ("reduction", "sum"),
        ("prediction_type", "v_prediction"),
        ("timesteps", "stratified"),
    ],
)
def test_an_option_that_the_trainer_settles_is_refused_by_name(name, option, value):
    owns = option == "weighting" and name.startswith(OWN_THEIR_WEIGHT)
    if owns or (name == "diffusers" and option in ("reduction", "prediction_type")):
        more = {"likelihood_weighting": False} if "get_sde" in name else {}
        WAYS[name](**{option: value}, **more)
        return
    with pytest.raises(ValueError, match=f"^{option} cannot be given here, got '{value}': "):
        WAYS[name](**{option: value})


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "options", [{"tau": 1.5}, {"estimator": "exact"}, {"max_c2": -1.0}, {"normalize": 1}]
)
def test_every_other_option_reaches_the_loss_at_once(name, options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        WAYS[name](**options)


def test_a_weighting_is_the_cores():
    """Where the adapter owns the whole weight."""
    x0, noise = torch.randn(2, 6, 2, 4, 4)
    t = torch.tensor([0, 8, 60, 500, 900, 999])
    b = torch.linspace(1e-4, 0.02, 1000)
    output = torch.randn_like(noise)
    criterion = SkipStepLoss(NoiseSchedule.from_betas(b), 49, weighting="min_snr", reduction="none")
    expected = criterion.from_output(output, noise, t)
    found = ddim.ddim_loss(49, weighting="min_snr", data_reduction="mean")
    assert torch.equal(found(lambda *_: output, x0, t, noise, b, keepdim=True), expected)
    loss = SkipLoss.from_scheduler(DDPMScheduler(), 49, weighting="min_snr", reduction="none")(
        output, noise, t
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


ENTRIES = [
    *(module.skip_step for module in (denoising_diffusion_pytorch, edm, guided_diffusion)),
    *(sd_scripts.skip_step, sd_scripts.loss_of, ddim.ddim_loss, SkipLoss, SkipLoss.from_scheduler),
    *(getattr(score_sde, name) for name in score_sde.__all__),
]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.__module__}.{entry.__name__}")
def test_the_skip_has_no_default_and_the_options_stand_once(entry):
    parameters = inspect.signature(entry).parameters
    assert parameters["skip_set"].default is inspect.Parameter.empty
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
    spelled = set(inspect.signature(SkipStepLoss).parameters) & set(parameters)
    assert spelled == {"skip_set"} | ({"schedule"} if entry is SkipLoss else set())


def test_what_the_adapters_show_asks_for_49():
    """The paper's 9 does little on 1,000 timesteps."""
    for path in (Path(ddim.__file__).parent).glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "skip_set=9)" not in text, path.name
        assert "= 9," not in text, path.name
