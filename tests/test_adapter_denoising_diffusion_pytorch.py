"""The adapter for denoising-diffusion-pytorch, on a double and on the trainer's own code.

The package needs torchvision, ema-pytorch and pytorch-fid, for pictures, averages and scores; the
checkout that `S2DM_DENOISING_DIFFUSION_PYTORCH_ROOT` names is run with stubs of these.
"""

import copy
import importlib
import pickle
import random
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from s2dm_loss import NoiseSchedule, SkipStepLoss
from s2dm_loss.adapters.denoising_diffusion_pytorch import skip_step
from s2dm_loss.testing import check_swap
from tests.doubles import denoising_diffusion_pytorch_double as double
from tests.helpers.diffusers_parts import digits
from tests.helpers.upstream import load, root_of, stubs

ROOT = "S2DM_DENOISING_DIFFUSION_PYTORCH_ROOT"
STUBS = (
    *("torchvision", "torchvision.transforms", "torchvision.utils", "ema_pytorch"),
    *("pytorch_fid", "pytorch_fid.fid_score", "pytorch_fid.inception"),
)
TIMES = torch.tensor([0, 8, 9, 300, 700, 999])
OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")


def real_modules(*names: str) -> list[ModuleType]:
    package = "denoising_diffusion_pytorch"
    names = [package, *(f"{package}.{name}" for name in names)]
    return load(root_of(ROOT), *names, stubbed=stubs(*STUBS))


@pytest.fixture(scope="module")
def real():
    return real_modules()[0]


@pytest.fixture(params=["double", "real"])
def package(request):
    return double if request.param == "double" else request.getfixturevalue("real")


def make_unet(package, **options):
    torch.manual_seed(0)
    return package.Unet(dim=8, dim_mults=(1, 2), channels=3, flash_attn=False, **options)


def make_diffusion(package, model, **options):
    # What the trainer asks of a model; `check_swap` brings a bare one.
    for name, value in {"channels": 3, "out_dim": 3, "self_condition": False}.items():
        if not hasattr(model, name):
            setattr(model, name, value)
    return package.GaussianDiffusion(model, **{"image_size": 8, **options})


def run(diffusion, images, seed=1, **kwargs):
    """The loss, its gradients and the state of both random streams after it."""
    torch.manual_seed(seed)
    random.seed(seed)
    loss = diffusion(images, **kwargs)
    gradients = torch.autograd.grad(loss.sum(), list(diffusion.model.parameters()))
    return loss, gradients, torch.get_rng_state(), random.getstate()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("min_snr", [False, True])
def test_the_swap(package, objective, schedule, min_snr):
    images = torch.rand(6, 3, 8, 8)

    def loss(model, tau=None):
        diffusion = make_diffusion(
            package,
            model,
            objective=objective,
            beta_schedule=schedule,
            min_snr_loss_weight=min_snr,
        )
        if tau is not None:
            diffusion = skip_step(diffusion, 9, tau=tau)
        return diffusion(images, times=TIMES, loss_reduction="none")

    report = check_swap(loss, loss, rtol=0.0)
    assert report.calls == 1
    assert report.times.tolist() == TIMES.tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"offset_noise_strength": 0.1}, {"self_condition": True}, {"immiscible": True}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_at_tau_one_every_option_is_the_trainers_own_bit_for_bit(package, options, objective):
    if package is double and "immiscible" in options:
        pytest.skip("the double has no immiscible noise")
    options = dict(options)
    condition = {name: options.pop(name) for name in ("self_condition",) if name in options}
    model = make_unet(package, **condition)
    images = torch.rand(6, 3, 8, 8)
    for seed in (1, 2, 3):  # with self-conditioning one call or two
        plain = make_diffusion(package, model, objective=objective, **options)
        adapted = skip_step(copy.deepcopy(plain), 9, tau=1.0)
        expected, found = run(plain, images, seed), run(adapted, images, seed)
        assert torch.equal(found[0], expected[0])
        assert all(map(torch.equal, found[1], expected[1]))
        assert torch.equal(found[2], expected[2])
        assert found[3] == expected[3]


@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_below_tau_one_it_is_the_cores_loss(package, objective, schedule, estimator):
    """`from_output` on what the model returned, times the trainer's weight of each timestep."""
    model = make_unet(package)
    diffusion = make_diffusion(
        package, model, objective=objective, beta_schedule=schedule, offset_noise_strength=0.1
    )
    adapted = skip_step(copy.deepcopy(diffusion), 9, estimator=estimator)
    adapted.model = model
    images = torch.rand(6, 3, 8, 8)
    loss, gradients, *_ = run(adapted, images, times=TIMES, loss_reduction="none")

    torch.manual_seed(1)
    noise = torch.randn(6, 3, 8, 8)
    noise += 0.1 * torch.randn(6, 3).reshape(6, 3, 1, 1)
    zeta = {"skip_noise": torch.randn(6, 3, 8, 8)} if estimator == "fresh" else {}
    x_start = 2 * images - 1
    a_bar = diffusion.alphas_cumprod.double()[TIMES].reshape(-1, 1, 1, 1)
    x_t = diffusion.q_sample(x_start=x_start, t=TIMES, noise=noise)
    name, target = {
        "pred_noise": ("epsilon", noise),
        "pred_x0": ("sample", x_start),
        "pred_v": ("v_prediction", a_bar.sqrt() * noise - (1 - a_bar).sqrt() * x_start),
    }[objective]
    criterion = SkipStepLoss(
        NoiseSchedule.from_betas(diffusion.betas.double()),
        9,
        estimator=estimator,
        prediction_type=name,
        reduction="none",
    )
    output = model(x_t, TIMES, None)
    expected = criterion.from_output(
        output, target.float(), TIMES, x_t, weights=diffusion.loss_weight[TIMES], **zeta
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    reference = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for gradient, other in zip(gradients, reference, strict=True):
        assert (gradient - other).norm() <= 1e-4 * other.norm() + 1e-7


def test_self_conditioning_is_made_of_the_untouched_output(package):
    """What the first call says of x_0 goes into the second as the model said it."""
    model = make_unet(package, self_condition=True)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    images = torch.rand(6, 3, 8, 8)
    for adapt in (lambda d: d, lambda d: skip_step(d, 99, tau=0.5)):
        diffusion = adapt(make_diffusion(package, model))
        run(diffusion, images, seed=1, times=TIMES)  # random.random() is 0.13: two calls
    assert len(seen) == 4
    assert torch.equal(seen[1], seen[3])


def test_the_double_is_the_trainer(real):
    images = torch.rand(6, 3, 8, 8)
    model = make_unet(double, self_condition=True)
    for objective in OBJECTIVES:
        for schedule in SCHEDULES:
            for min_snr in (False, True):
                options = {
                    "objective": objective,
                    "beta_schedule": schedule,
                    "min_snr_loss_weight": min_snr,
                    "offset_noise_strength": 0.1,
                }
                ours, theirs = (
                    run(make_diffusion(package, model, **options), images, times=TIMES)
                    for package in (double, real)
                )
                # Its buffers are rounded to float32 after the root, the double's before.
                torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=0)
                assert torch.equal(ours[2], theirs[2])
                assert ours[3] == theirs[3]


def test_it_is_a_copy_with_the_same_network_keys_and_samplers(package):
    diffusion = make_diffusion(package, make_unet(package))
    keys = diffusion.state_dict().keys()
    adapted = skip_step(diffusion, 9)
    assert type(diffusion) is package.GaussianDiffusion
    assert adapted.model is diffusion.model
    assert isinstance(adapted, package.GaussianDiffusion)
    assert adapted.state_dict().keys() == keys
    assert "SkipSet(9)" in repr(adapted)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle"])
def test_copies_train_alike(duplicate):
    """As the trainer's average of the weights is one; a pickle needs a diffusion that has one."""
    adapted = skip_step(make_diffusion(double, make_unet(double)), 9)
    other = (
        copy.deepcopy(adapted) if duplicate == "deepcopy" else pickle.loads(pickle.dumps(adapted))  # noqa: S301
    )
    images = torch.rand(6, 3, 8, 8)
    assert type(other) is type(adapted)
    assert torch.equal(run(adapted, images)[0], run(other, images)[0])


@pytest.mark.parametrize("file", ["classifier_free_guidance", "repaint", "guided_diffusion"])
def test_the_siblings_with_classes_of_the_same_name(file):
    sibling = real_modules(file)[1]
    images = 2 * torch.rand(6, 3, 8, 8) - 1
    given = {"classes": torch.arange(6)} if file == "classifier_free_guidance" else {}

    def loss(model, tau=None):
        model.channels = model.out_dim = 3
        model.random_or_learned_sinusoidal_cond = model.self_condition = False
        diffusion = sibling.GaussianDiffusion(model, image_size=8, timesteps=1000)
        if tau is not None:
            diffusion = skip_step(diffusion, 9, tau=tau)
        return diffusion.p_losses(images, TIMES, **given)

    check_swap(loss, loss, rtol=0.0)


def test_the_one_dimensional_sibling():
    line = real_modules("denoising_diffusion_pytorch_1d")[1]
    sequences = torch.randn(6, 3, 16)

    def in_one_dimension(model, tau=None, **options):
        model.channels, model.self_condition = 3, False
        diffusion = line.GaussianDiffusion1D(model, seq_length=16, timesteps=1000)
        if tau is not None:
            diffusion = skip_step(diffusion, 9, tau=tau)
        return diffusion.p_losses(sequences, TIMES, **options)

    check_swap(in_one_dimension, in_one_dimension, rtol=0.0)
    torch.manual_seed(2)
    elements = in_one_dimension(Same(), 0.99, return_reduced_loss=False)
    torch.manual_seed(2)
    each = in_one_dimension(Same(), 0.99, loss_reduction="none")
    torch.testing.assert_close(elements.mean((1, 2)), each)


class Same(nn.Module):
    def forward(self, x, t, **_):
        return x


class Average(nn.Module):
    """What the trainer asks of ema-pytorch."""

    def __init__(self, model, **_):
        super().__init__()
        self.ema_model = copy.deepcopy(model)

    def update(self):
        pass


def test_the_trainers_own_loop(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    inner = real_modules("denoising_diffusion_pytorch")[1]
    monkeypatch.setattr(inner, "EMA", Average)
    images = (digits(128).expand(-1, 3, -1, -1) + 1) / 2
    monkeypatch.setattr(inner, "Dataset", lambda *_, **__: list(images))
    # Its loader would start processes of its own, and pin memory.
    monkeypatch.setattr(
        inner, "DataLoader", lambda data, batch_size, **_: DataLoader(data, batch_size)
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    losses = {}
    for tau in (None, 1.0, 0.5):
        torch.manual_seed(0)
        diffusion = make_diffusion(inner, make_unet(inner), timesteps=100)
        if tau is not None:
            diffusion = skip_step(diffusion, 9, tau=tau)
        trainer = inner.Trainer(
            diffusion,
            "no folder is read",
            train_batch_size=16,
            train_lr=1e-3,
            train_num_steps=3,
            results_folder=str(tmp_path),
            calculate_fid=False,
        )
        torch.manual_seed(1)
        trainer.train()
        trainer.save("end")
        saved = torch.load(tmp_path / "model-end.pt", weights_only=False)["model"]
        losses[tau] = {name: value for name, value in saved.items() if name.startswith("model.")}
    assert losses[None].keys() == losses[0.5].keys()
    assert all(torch.equal(losses[None][name], losses[1.0][name]) for name in losses[None])
    assert not all(torch.equal(losses[None][name], losses[0.5][name]) for name in losses[None])


def test_refuses_what_it_cannot_serve():
    plain = make_diffusion(double, make_unet(double))
    with pytest.raises(ValueError, match=r"tau must be above 0 .* got 0"):
        skip_step(plain, 9, tau=0.0)
    with pytest.raises(TypeError, match=r"got a Unet without p_losses, model, .*loss_weight"):
        skip_step(make_unet(double), 9)
    adapted = skip_step(plain, 9)
    with pytest.raises(ValueError, match="must have its plain loss, got a SkipStepGaussianDiff"):
        skip_step(adapted, 9)

    class OwnLoss(double.GaussianDiffusion):
        def p_losses(self, x_start, t, loss_reduction="mean"):
            return x_start.abs().mean()

    with pytest.raises(ValueError, match="GaussianDiffusion1D, got that of OwnLoss"):
        skip_step(OwnLoss(make_unet(double), image_size=8), 9)
    with pytest.raises(ValueError, match="got that of what it wraps"):
        skip_step(torch.compile(plain), 9)
    GaussianDiffusion = type(  # noqa: N806 - a release before 2.3
        "GaussianDiffusion", (nn.Module,), {"p_losses": lambda self, x_start, t: x_start.mean()}
    )
    old = GaussianDiffusion()
    for name in ("model", "model_predictions", "betas", "objective", "loss_weight"):
        setattr(old, name, None)
    with pytest.raises(ValueError, match=r"must take loss_reduction, .* 2\.3 on"):
        skip_step(old, 9)
    with pytest.raises(ValueError, match="a skip must be below 1000"):
        skip_step(make_diffusion(double, make_unet(double)), 1000)


def test_refuses_the_trainers_other_losses(real):
    model = make_unet(real)
    continuous = real.ContinuousTimeGaussianDiffusion
    model.random_or_learned_sinusoidal_cond = True
    with pytest.raises(TypeError, match=r"ContinuousTimeGaussianDiffusion without .*betas"):
        skip_step(continuous(model, image_size=8), 9)
    learned = make_unet(real)
    learned.out_dim = 6
    with pytest.raises(ValueError, match="got that of LearnedGaussianDiffusion"):
        skip_step(real.LearnedGaussianDiffusion(learned, image_size=8), 9)


def test_imports_no_trainer():
    module = importlib.import_module("s2dm_loss.adapters.denoising_diffusion_pytorch")
    assert "denoising_diffusion_pytorch" not in vars(module)


def test_replicas_do_not_change_one_anothers_outputs():
    """Those of `nn.DataParallel` share their hooks."""
    diffusion = skip_step(make_diffusion(double, make_unet(double)), 99, tau=0.5)
    x, t = torch.rand(6, 3, 8, 8), TIMES
    noise = torch.randn_like(x)
    expected = diffusion.p_losses(x, t, noise=noise)
    replica = diffusion._replicate_for_data_parallel()
    replica.model = diffusion.model._replicate_for_data_parallel()
    assert replica.model._forward_hooks is diffusion.model._forward_hooks
    inner = replica.model.forward
    # The other's call comes while this one's hook is there.
    replica.model.forward = lambda *args: (diffusion.p_losses(x, t, noise=noise), inner(*args))[1]
    torch.testing.assert_close(replica.p_losses(x, t, noise=noise), expected)
