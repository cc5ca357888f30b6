"""What the guided-diffusion adapter alone has, on the trainer's own code and that of its kin."""

import inspect
import itertools
import json
import sys
from types import SimpleNamespace

import guided_diffusion.gaussian_diffusion as gd
import numpy as np
import pytest
import torch
import torch.distributed as dist

from s2dm_loss import NoiseSchedule, SkipSet
from s2dm_loss.adapters.guided_diffusion import SkipStepMixin, skip_step
from s2dm_loss.coefficients import coefficients
from tests.helpers.guided_diffusion_parts import KIN, make_diffusion
from tests.helpers.patches import patched
from tests.helpers.small import Network, refuses
from tests.helpers.trainers import GUIDED, GUIDED_KIN
from tests.helpers.upstream import root_of, stub


def make_batch(diffusion):
    """Data and sorted timesteps that lie below, at and above the skip of 9."""
    last = diffusion.num_timesteps - 1
    return torch.randn(6, 2, 6, 6), torch.tensor([0, 8, 9, 10, last // 2, last])


def make_model(diffusion, **options):
    return Network(2, 4 if diffusion.model_var_type.name.startswith("LEARNED") else 2, **options)


def run(diffusion, model, x, t, **model_kwargs):
    """Terms and gradients of the loss."""
    torch.manual_seed(3)
    terms = diffusion.training_losses(model, x, t, model_kwargs)
    return terms, torch.autograd.grad(terms["loss"].sum(), list(model.parameters()))


CONFIGS = [("guided-diffusion", config) for config in GUIDED]
CONFIGS += [(trainer, config) for trainer in KIN for config in GUIDED_KIN]


@pytest.mark.parametrize(("trainer", "config"), CONFIGS)
def test_the_terms_are_the_trainers_and_one_more(trainer, config):
    """Bit for bit are mse, vb and what is learned of the variance; at τ = 1 the loss is as well."""
    plain = make_diffusion(trainer=trainer, **config)
    model, (x, t) = make_model(plain), make_batch(plain)
    expected, wanted = run(plain, model, x, t)
    terms, gradients = run(skip_step(plain, 9), model, x, t)
    assert set(terms) == {*expected, "skip"}
    assert all(torch.equal(terms[name], expected[name]) for name in expected if name != "loss")
    whole = terms["mse"] + terms["skip"] + terms.get("vb", 0)
    torch.testing.assert_close(terms["loss"], whole)
    assert (terms["skip"] == 0).tolist() == (t < 9).tolist()
    assert not torch.equal(gradients[0][:2], wanted[0][:2])
    assert torch.equal(gradients[0][2:], wanted[0][2:])


def c2_of(diffusion):
    return coefficients(diffusion.skip_step_loss.schedule, diffusion.skip_step_loss.skip_set)


VISITED = (0, 300, 600, 800)


@pytest.mark.parametrize("respacing", ["none", None, "ddim100", [10, 15, 20]])
@pytest.mark.parametrize(
    ("skips", "reached_from"),
    [
        (9, lambda t: t - 9),
        (SkipSet.for_sampling_steps(50), lambda t: t - 20),
        (SkipSet.from_timesteps(VISITED), lambda t: max(s for s in (-1, *VISITED) if s < t)),
    ],
)
def test_skips_in_original_timesteps(respacing, skips, reached_from):
    """They reach the latest kept timestep at least that far back."""
    spaced, base = respacing != "none", make_diffusion().alphas_cumprod
    plain = make_diffusion(respacing=respacing, spaced=spaced)
    adapted, same, other = (skip_step(plain, k, original_timesteps=True) for k in (skips, skips, 7))
    found, kept = c2_of(adapted), np.array(plain.timestep_map if spaced else range(1000))
    for index, original in enumerate(kept):
        before = kept[kept <= reached_from(original)]
        wanted = base[before[-1]] / base[original] - 1 if len(before) else 0.0
        assert found.c2[index].item() == pytest.approx(wanted, rel=1e-9, abs=1e-15)
        assert (found.tau[index] < 1) == bool(len(before))
    assert "in original timesteps" in repr(adapted)
    assert adapted.skip_step_loss.skip_set == same.skip_step_loss.skip_set
    assert adapted.skip_step_loss.skip_set != other.skip_step_loss.skip_set


def test_a_model_that_maps_timesteps_already_is_not_mapped_twice():
    plain = make_diffusion(respacing="ddim50")
    model, (x, t) = make_model(plain), make_batch(plain)
    for diffusion in (plain, skip_step(plain, 9)):
        diffusion.training_losses(plain._wrap_model(model), x, t)
    assert torch.equal(model.seen[0][1], model.seen[1][1])
    assert model.seen[1][1].tolist() == [plain.timestep_map[i] for i in t.tolist()]


def test_fresh_noise_may_be_given_and_the_signature_has_one_more_name():
    plain = make_diffusion()
    model, (x, t) = make_model(plain, dropout=0.0), make_batch(plain)
    adapted, noise = skip_step(plain, 9, estimator="fresh"), torch.randn_like(x)
    torch.manual_seed(0)
    found = adapted.training_losses(model, x, t, noise=noise)["loss"]
    torch.manual_seed(0)
    xi = torch.randn_like(x)
    given = adapted.training_losses(model, x, t, noise=noise, skip_noise=xi)["loss"]
    assert torch.equal(found, given)
    ours = list(inspect.signature(SkipStepMixin.training_losses).parameters)
    theirs = list(inspect.signature(gd.GaussianDiffusion.training_losses).parameters)
    assert ours == [*theirs, "skip_noise"]


def test_refuses_what_it_cannot_serve():
    kl = make_diffusion(loss="RESCALED_KL", variance="LEARNED_RANGE")
    adapted, unnamed = skip_step(make_diffusion(), 9), make_diffusion()
    unnamed.loss_type, (x, t) = "mse", make_batch(adapted)
    previous, respaced = make_diffusion(mean="PREVIOUS_X"), make_diffusion(respacing="ddim50")
    refuses(ValueError, "MSE or RESCALED_MSE .* got loss_type RESCALED_KL", skip_step, kl, 9)
    refuses(ValueError, "mean_type PREVIOUS_X", skip_step, previous, 9)
    refuses(TypeError, "a loss_type of guided-diffusion's, an Enum, got", skip_step, unnamed, 9)
    refuses(ValueError, "must be below 1000", skip_step, respaced, 1000, original_timesteps=True)
    inputs = make_model(adapted), x, t.float()
    refuses(TypeError, "integer times", adapted.training_losses, *inputs)


def make_unet(kind="class-conditional"):
    from guided_diffusion import script_util

    options = {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "4"}
    options |= {"class_cond": kind == "class-conditional", "use_fp16": kind == "fp16"}
    options["learn_sigma"] = True
    if kind == "super-resolution":  # its widths are tied to images of 64 pixels and up
        options |= {"use_checkpoint": False, "num_heads": 1, "num_head_channels": -1}
        options |= {"num_heads_upsample": -1, "use_scale_shift_norm": True, "dropout": 0.0}
        model = script_util.sr_create_model(64, 16, **options, resblock_updown=False)
    else:
        model = script_util.create_model(8, channel_mult="1", num_heads=1, **options)
    # The last layer starts at zero, which would hide whatever goes wrong before it.
    torch.nn.init.normal_(model.out[-1].weight, std=0.02)
    if kind == "fp16":
        model.convert_to_fp16()
    return model


@pytest.mark.parametrize("kind", ["class-conditional", "super-resolution", "fp16"])
def test_real_networks_at_tau_one_and_below(kind):
    size = 64 if kind == "super-resolution" else 8
    more = {
        "class-conditional": {"y": torch.tensor([1, 5])},
        "super-resolution": {"low_res": torch.randn(2, 3, size // 4, size // 4)},
    }.get(kind, {})
    plain = make_diffusion(variance="LEARNED_RANGE", loss="RESCALED_MSE", rescale=True)
    batch = make_unet(kind), torch.randn(2, 3, size, size), torch.tensor([4, 800])
    expected, wanted = run(plain, *batch, **more)
    terms, gradients = run(skip_step(plain, 9, tau=1.0), *batch, **more)
    assert all(torch.equal(terms[name], expected[name]) for name in ("mse", "vb", "loss"))
    assert all(map(torch.equal, gradients, wanted))
    terms, gradients = run(skip_step(plain, 9), *batch, **more)
    assert terms["loss"].dtype == torch.float32
    assert (terms["loss"] == expected["loss"]).tolist() == [True, False]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.fixture
def train_util(monkeypatch, tmp_path):
    """The trainer's own `train_util`, in a process group of one."""
    # mpi4py, which needs an MPI to build, only finds ranks and shares a checkpoint between them.
    alone = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, bcast=lambda value, root: value)
    mpi = SimpleNamespace(COMM_WORLD=alone)
    monkeypatch.setitem(sys.modules, "mpi4py", stub("mpi4py", MPI=mpi))
    # Gone since NumPy 1.24; the loss-second-moment resampler counts with it.
    monkeypatch.setattr(np, "int", int, raising=False)
    from guided_diffusion import logger, train_util

    logger.configure(dir=str(tmp_path / "log"), format_strs=["json"])
    method = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("gloo", init_method=method, rank=0, world_size=1)
    yield train_util
    dist.destroy_process_group()
    logger.Logger.CURRENT.close()


def logged(tmp_path):
    lines = (tmp_path / "log" / "progress.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_trainers_own_loop(train_util, tmp_path):
    """It logs each term, its sampler takes every loss, and its checkpoint is the model's alone."""
    from guided_diffusion.resample import create_named_schedule_sampler

    np.random.seed(0)  # the stream that the trainer's samplers draw from
    plain = make_diffusion(steps=100, variance="LEARNED_RANGE", loss="RESCALED_MSE")
    diffusion, model = skip_step(plain, 9), make_unet()
    sampler = create_named_schedule_sampler("loss-second-moment", diffusion)
    data = itertools.repeat((torch.randn(32, 3, 8, 8), {"y": torch.randint(1000, (32,))}))
    parts = {"model": model, "diffusion": diffusion, "data": data, "schedule_sampler": sampler}
    options = {"batch_size": 32, "microbatch": 16, "lr": 3e-3, "ema_rate": "0.9"}
    options |= {"log_interval": 2, "lr_anneal_steps": 4, "resume_checkpoint": ""}
    options["save_interval"] = 10**6  # one checkpoint, at the end
    train_util.TrainLoop(**parts, **options).run_loop()
    # At most 10 a timestep are kept, of 4 steps with 32 losses each.
    assert 100 < sampler._loss_counts.sum() <= 4 * 32
    assert {"loss", "mse", "vb", "skip", "skip_q3"} <= set(logged(tmp_path)[0])
    checkpoint = sorted((tmp_path / "log").glob("model*.pt"))[-1]
    assert torch.load(checkpoint).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("script", "sizes"),
    [("image_train", "--image_size 64"), ("super_res_train", "--large_size 64 --small_size 16")],
)
def test_the_pages_diff_in_the_trainers_scripts(train_util, tmp_path, monkeypatch, script, sizes):
    """The script runs after the diff that the docs show."""
    from PIL import Image

    script = f"scripts/{script}.py"
    source = (root_of("S2DM_GUIDED_DIFFUSION_ROOT") / script).read_text()
    for index in range(8):
        Image.new("RGB", (64, 64), (30 * index, 90, 200)).save(tmp_path / f"{index}.png")
    flags = (
        f"--data_dir {tmp_path} {sizes} --batch_size 2 --lr_anneal_steps 2 --log_interval 1 "
        "--num_channels 32 --num_res_blocks 1 --attention_resolutions 16 --learn_sigma True "
        "--diffusion_steps 50"
    )
    monkeypatch.setattr("sys.argv", [script, *flags.split()])
    monkeypatch.setattr(train_util.dist_util, "setup_dist", lambda: None)  # the fixture has done it
    monkeypatch.setattr(train_util.logger, "configure", lambda: None)
    source = patched("guided-diffusion", script, source)
    exec(compile(source, script, "exec"), {"__name__": "__main__"})  # noqa: S102 - the trainer's
    lines = logged(tmp_path)
    assert len(lines) == 2
    assert {"loss", "mse", "vb", "skip"} <= set(lines[0])


def test_a_step_copies_no_table_to_the_device(monkeypatch):
    """On a GPU a copy from the host waits for it: what is looked up by t lies there already."""
    adapted = skip_step(make_diffusion(), 9)
    model, (x, t) = make_model(adapted), make_batch(adapted)
    adapted.training_losses(model, x, t)
    monkeypatch.setattr(NoiseSchedule, "log_alphas_cumprod_at", None)
    monkeypatch.setattr(NoiseSchedule, "alpha_sigma", None)
    adapted.training_losses(model, x, t)


class Copy(gd.GaussianDiffusion):
    """A user's own: it names the timestep and, unless it is "plain", weighs the error or adds."""

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        def named(x, t):
            return model(x, timestep=t)

        terms = super().training_losses(named, x_start, t, model_kwargs, noise)
        snr = torch.from_numpy(1 / (1 - self.alphas_cumprod) - 1).float()[t]
        if self.kind == "P2":
            terms["mse"] = terms["mse"] / (1 + snr)
            terms["loss"] = terms["mse"]
        elif self.kind == "more":
            terms["loss"] = terms["mse"] + 0.5
        return terms


def loss_of_copy(kind, tau=0.99):
    plain, network = make_diffusion(spaced=False), Network()
    plain.__class__, plain.kind = Copy, kind
    adapted = skip_step(plain, 9, tau=tau)
    return lambda x, t: adapted.training_losses(lambda x, timestep: network(x, timestep), x, t)


@pytest.mark.parametrize("tau", [0.99, 1.0])
def test_a_copy_that_weighs_or_adds_is_refused(tau):
    batch = make_batch(make_diffusion())
    for kind in ("P2", "more"):
        said = r"must have the plain mse.*got a SkipStepCopy"
        refuses(ValueError, said, loss_of_copy(kind, tau), *batch)
    assert loss_of_copy("plain", tau)(*batch)["loss"].isfinite().all()


def test_a_weight_that_is_nearly_always_1_is_found():
    """A hundred calls are looked at: of P2's weights those at late t are 1 to a thousandth."""
    loss_of, x, late = loss_of_copy("P2"), torch.randn(2, 2, 4, 4), torch.full((2,), 990)
    for _ in range(99):
        loss_of(x, late)
    refuses(ValueError, "must have the plain mse", loss_of, x, late - 900)
