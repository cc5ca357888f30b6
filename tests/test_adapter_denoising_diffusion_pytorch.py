"""What the denoising-diffusion-pytorch adapter alone has, on the trainer's own code."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader as Loader

from s2dm_loss.adapters.denoising_diffusion_pytorch import skip_step
from tests.doubles import denoising_diffusion_pytorch_double as double
from tests.helpers.small import Network, digits, refuses
from tests.helpers.trainers import OBJECTIVES, TIMES
from tests.helpers.upstream import denoising_diffusion_pytorch

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def package():
    return denoising_diffusion_pytorch()[0]


def make(package, *, self_condition=False, **options):
    """A diffusion with a network of the trainer's own."""
    torch.manual_seed(0)
    unet = package.Unet(8, dim_mults=(1, 2), self_condition=self_condition, flash_attn=False)
    return package.GaussianDiffusion(unet, image_size=8, **options)


def make_double(kind=double.GaussianDiffusion, **options):
    return kind(Network(3, dropout=0.0), image_size=8, **options)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_double_is_the_trainer(package, objective):
    options = {"objective": objective, "offset_noise_strength": 0.1}
    for schedule, min_snr in itertools.product(double.SCHEDULES, (False, True)):
        options |= {"beta_schedule": schedule, "min_snr_loss_weight": min_snr}
        results = []
        for module in (package, double):
            diffusion = make_double(module.GaussianDiffusion, **options)
            torch.manual_seed(1)
            loss = diffusion(IMAGES, times=TIMES, loss_reduction="none")
            results.append((loss, diffusion.loss_weight, diffusion.betas))
        # A double rounds its tables at another place than the trainer does.
        torch.testing.assert_close(*results, rtol=2e-5, atol=1e-7)


def test_self_conditioning_is_made_of_the_untouched_output(package):
    """What the first call says of x_0 goes into the second as the model said it."""
    plain, seen = make(package, self_condition=True), []
    plain.model.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    for diffusion in (plain, skip_step(plain, 99, tau=0.5)):
        torch.manual_seed(1)
        random.seed(1)  # random.random() is 0.13: two calls
        diffusion(IMAGES, times=TIMES)
    assert len(seen) == 4
    assert torch.equal(seen[1], seen[3])


def test_a_loss_of_each_element_in_one_dimension():
    line = denoising_diffusion_pytorch("denoising_diffusion_pytorch_1d")[1]
    model = nn.Module()
    model.channels, model.self_condition, model.forward = 3, False, lambda x, *_: x
    diffusion = line.GaussianDiffusion1D(model, seq_length=16, timesteps=1000)
    losses = []
    for options in ({"return_reduced_loss": False}, {"loss_reduction": "none"}):
        torch.manual_seed(2)
        losses.append(skip_step(diffusion, 9).p_losses(2 * torch.rand(6, 3, 16), TIMES, **options))
    torch.testing.assert_close(losses[0].mean((1, 2)), losses[1])


def test_the_trainers_own_loop(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    inner = denoising_diffusion_pytorch("denoising_diffusion_pytorch")[1]
    average = nn.Module()  # what it asks of ema-pytorch
    average.update = lambda: None
    monkeypatch.setattr(inner, "EMA", lambda *_, **__: average)
    images = (digits(128).expand(-1, 3, -1, -1) + 1) / 2
    monkeypatch.setattr(inner, "Dataset", lambda *_, **__: list(images))
    # The trainer's would start processes of its own, and pin memory.
    monkeypatch.setattr(inner, "DataLoader", lambda data, batch_size, **_: Loader(data, batch_size))
    AcceleratorState._reset_state(reset_partial_state=True)
    weights = []
    for tau in (None, 1.0, 0.5):
        diffusion = make(inner, timesteps=100)
        if tau is not None:
            diffusion = skip_step(diffusion, 9, tau=tau)
        options = {"train_lr": 1e-3, "train_num_steps": 3, "results_folder": str(tmp_path)}
        trainer = inner.Trainer(
            diffusion, "no folder is read", train_batch_size=16, calculate_fid=False, **options
        )
        torch.manual_seed(1)
        trainer.train()
        weights.append(list(diffusion.model.parameters()))
    plain, same, other = weights
    assert all(map(torch.equal, plain, same))
    assert not all(map(torch.equal, plain, other))


def test_refuses_what_it_cannot_serve():
    refuses(ValueError, r"tau must be above 0 .* got 0", skip_step, make_double(), 9, tau=0.0)

    class OwnLoss(double.GaussianDiffusion):
        def p_losses(self, x_start, t, loss_reduction="mean"):
            return x_start.abs().mean()

    said = "GaussianDiffusion1D, got that of OwnLoss"
    refuses(ValueError, said, skip_step, make_double(OwnLoss), 9)
    names = ("p_losses", "model", "model_predictions", "betas", "objective", "loss_weight")
    attributes = dict.fromkeys(names)
    compiled = SimpleNamespace(**attributes)
    refuses(ValueError, "got that of what it wraps", skip_step, compiled, 9)
    attributes["p_losses"] = lambda self, x_start, t: x_start.mean()
    old = type("GaussianDiffusion", (), attributes)()
    refuses(ValueError, r"must take loss_reduction, .* 2\.3 on", skip_step, old, 9)


def test_refuses_the_trainers_other_losses(package):
    model = make(package).model
    model.random_or_learned_sinusoidal_cond = True
    continuous = package.ContinuousTimeGaussianDiffusion(model, image_size=8)
    said = r"ContinuousTimeGaussianDiffusion without .*betas"
    refuses(TypeError, said, skip_step, continuous, 9)
    model.random_or_learned_sinusoidal_cond, model.out_dim = False, 6
    learned = package.LearnedGaussianDiffusion(model, image_size=8)
    refuses(ValueError, "got that of LearnedGaussianDiffusion", skip_step, learned, 9)


def test_replicas_do_not_change_one_anothers_outputs():
    """Those of `nn.DataParallel` share their hooks."""
    diffusion = skip_step(make_double(), 99, tau=0.5)
    noise = torch.randn_like(IMAGES)
    expected = diffusion.p_losses(IMAGES, TIMES, noise=noise)
    replica = diffusion._replicate_for_data_parallel()
    replica.model = diffusion.model._replicate_for_data_parallel()
    assert replica.model._forward_hooks is diffusion.model._forward_hooks
    inner, losses = replica.model.forward, []

    def other_first(*args):  # its call comes while this one's hook is there
        losses.append(diffusion.p_losses(IMAGES, TIMES, noise=noise))
        return inner(*args)

    replica.model.forward = other_first
    losses.append(replica.p_losses(IMAGES, TIMES, noise=noise))
    for loss in losses:
        torch.testing.assert_close(loss, expected)
