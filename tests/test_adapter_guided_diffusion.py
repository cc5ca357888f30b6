"""What the guided-diffusion adapter alone has, on the trainer's own code and that of its kin."""

import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

from s2dm_loss import NoiseSchedule, SkipSet
from s2dm_loss.adapters.guided_diffusion import SkipStepMixin, skip_step
from s2dm_loss.coefficients import coefficients
from tests.helpers import small
from tests.helpers.distributed import run_distributed
from tests.helpers.guided_diffusion_parts import (
    KIN,
    ddp_gradients,
    gd,
    make_diffusion,
    stub_mpi4py,
)
from tests.helpers.patches import patched
from tests.helpers.small import Network
from tests.helpers.trainers import GUIDED, GUIDED_KIN

ROOT = os.environ.get("S2DM_GUIDED_DIFFUSION_ROOT")


def make_batch(diffusion, channels=2, size=6):
    """Data and sorted timesteps that lie below, at and above the skip of 9."""
    last = diffusion.num_timesteps - 1
    t = torch.tensor([0, 8, 9, 10, last // 2, last])
    return torch.randn(len(t), channels, size, size), t


def make_model(diffusion, **options):
    return Network(2, 4 if diffusion.model_var_type.name.startswith("LEARNED") else 2, **options)


def run(diffusion, model, x, t, **kwargs):
    """Terms, gradients of the loss, and the state of the random stream after it."""
    torch.manual_seed(3)
    terms = diffusion.training_losses(model, x, t, kwargs.pop("model_kwargs", {}), **kwargs)
    gradients = torch.autograd.grad(terms["loss"].sum(), list(model.parameters()))
    return terms, gradients, torch.get_rng_state()


CONFIGS = [("guided-diffusion", config) for config in GUIDED]
CONFIGS += [(trainer, config) for trainer in KIN for config in GUIDED_KIN]


@pytest.mark.parametrize(("trainer", "config"), CONFIGS)
def test_the_terms_are_the_trainers_and_one_more(trainer, config):
    """Bit for bit are mse, vb and what is learned of the variance; at τ = 1 the loss is as well."""
    plain = make_diffusion(trainer=trainer, **config)
    model, (x, t) = make_model(plain), make_batch(plain)
    expected, wanted, _ = run(plain, model, x, t)
    terms, gradients, _ = run(skip_step(plain, 9), model, x, t)
    assert set(terms) == {*expected, "skip"}
    assert all(torch.equal(terms[name], expected[name]) for name in expected if name != "loss")
    whole = terms["mse"] + terms["skip"] + terms.get("vb", 0)
    torch.testing.assert_close(terms["loss"], whole)
    assert (terms["skip"] == 0).tolist() == (t < 9).tolist()
    assert not torch.equal(gradients[0][:2], wanted[0][:2])
    assert torch.equal(gradients[0][2:], wanted[0][2:])


@pytest.mark.parametrize("skip", [9, 49])
def test_the_importance_sampler_draws_as_it_does_for_the_plain_loss(monkeypatch, skip):
    """It draws t as often as the loss there is large, and no constant may count as loss.

    The best denoiser of white data, of variance 0.02, has nearly all of its loss at small t.
    """
    monkeypatch.setattr(np, "int", int, raising=False)  # gone since NumPy 1.24
    from guided_diffusion.resample import LossSecondMomentResampler

    x = 0.02**0.5 * torch.randn(1000, 1, 16, 16)
    plain = make_diffusion()
    a_bar = torch.tensor(plain.alphas_cumprod, dtype=torch.float32).view(-1, 1, 1, 1)

    def best(x_t, t):
        a = a_bar[t]
        return (1 - a).sqrt() * x_t / (0.02 * a + 1 - a)

    def late_draws(diffusion):
        torch.manual_seed(0)
        losses = diffusion.training_losses(best, x, torch.arange(1000))["loss"]
        sampler = LossSecondMomentResampler(diffusion, history_per_term=1, uniform_prob=0.0)
        sampler.update_with_all_losses(range(1000), losses.tolist())
        weights = sampler.weights()
        return weights[500:].sum() / weights.sum()

    expected = late_draws(plain)
    assert expected == pytest.approx(0.0024, rel=0.1)
    assert late_draws(skip_step(plain, skip)) < expected + 0.002


def c2_of(diffusion):
    return coefficients(diffusion.skip_step_loss.schedule, diffusion.skip_step_loss.skip_set)


@pytest.mark.parametrize("respacing", [None, "ddim100", "100", "250", [10, 15, 20]])
def test_skips_in_respaced_and_in_original_timesteps(respacing):
    """In original ones a skip reaches the kept timestep at least that far back."""
    plain, base = make_diffusion(respacing=respacing), make_diffusion().alphas_cumprod
    kept = np.array(plain.timestep_map)
    c2 = c2_of(skip_step(plain, 9)).c2.numpy()
    np.testing.assert_allclose(c2[9:], base[kept[:-9]] / base[kept[9:]] - 1, rtol=1e-9)
    assert (c2[:9] == 0).all()
    for skip in (1, 9, 49):
        adapted = skip_step(plain, skip, original_timesteps=True)
        found = c2_of(adapted)
        for index, original in enumerate(kept):
            before = [step for step in kept if step <= original - skip]
            wanted = base[max(before)] / base[original] - 1 if before else 0.0
            assert found.c2[index].item() == pytest.approx(wanted, rel=1e-9, abs=1e-15)
            assert (found.tau[index] < 1) == bool(before)
    terms = adapted.training_losses(make_model(plain), *make_batch(plain))
    assert terms["loss"].isfinite().all()
    assert "in original timesteps" in repr(adapted)


@pytest.mark.parametrize("spaced", [False, True])
def test_without_respacing_original_timesteps_change_nothing(spaced):
    plain = make_diffusion(spaced=spaced)
    for skips in (9, [1, 9], SkipSet.for_sampling_steps(50), SkipSet.from_timesteps([0, 300])):
        found = [c2_of(skip_step(plain, skips, original_timesteps=on)).c2 for on in (False, True)]
        assert torch.equal(*found)


def test_a_samplers_stride_in_original_timesteps():
    plain = make_diffusion(respacing="ddim100")
    by_stride = skip_step(plain, SkipSet.for_sampling_steps(50), original_timesteps=True)
    # 1000 // 50 is two strides of 10.
    assert torch.equal(c2_of(by_stride).c2, c2_of(skip_step(plain, 2)).c2)


def test_a_model_that_maps_timesteps_already_is_not_mapped_twice():
    plain = make_diffusion(respacing="ddim50")
    model, (x, t) = make_model(plain), make_batch(plain)
    for diffusion in (plain, skip_step(plain, 9)):
        diffusion.training_losses(plain._wrap_model(model), x, t)
    assert torch.equal(model.seen[0][1], model.seen[1][1])
    assert model.seen[1][1].tolist() == [plain.timestep_map[i] for i in t.tolist()]


def test_fresh_noise_may_be_given_and_the_signature_has_one_more_name():
    plain = make_diffusion()
    model, (x, t) = make_model(plain), make_batch(plain)
    _, _, state = run(plain, model, x, t)
    adapted = skip_step(plain, 9, estimator="fresh")
    terms, _, _ = run(adapted, model, x, t)
    torch.set_rng_state(state)  # it is drawn after all that the trainer draws
    given, _, _ = run(adapted, model, x, t, skip_noise=torch.randn_like(x))
    assert torch.equal(terms["loss"], given["loss"])
    ours = list(inspect.signature(SkipStepMixin.training_losses).parameters)
    theirs = list(inspect.signature(gd.GaussianDiffusion.training_losses).parameters)
    assert ours == [*theirs, "skip_noise"]


def test_refuses_what_it_cannot_serve():
    for loss in ("KL", "RESCALED_KL"):
        with pytest.raises(ValueError, match=f"MSE or RESCALED_MSE .* got loss_type {loss}"):
            skip_step(make_diffusion(loss=loss, variance="LEARNED_RANGE"), 9)
    with pytest.raises(ValueError, match="EPSILON or START_X, got model_mean_type PREVIOUS_X"):
        skip_step(make_diffusion(mean="PREVIOUS_X"), 9)
    adapted = skip_step(make_diffusion(), 9)
    x, t = make_batch(adapted)
    with pytest.raises(TypeError, match="t must hold integer timesteps"):
        adapted.training_losses(make_model(adapted), x, t.float())
    with pytest.raises(ValueError, match="a skip must be below 50"):
        skip_step(make_diffusion(respacing="ddim50"), 99)
    with pytest.raises(ValueError, match="a skip must be below 1000"):
        skip_step(make_diffusion(respacing="ddim50"), 1000, original_timesteps=True)
    diffusion = make_diffusion()
    diffusion.loss_type = "mse"
    with pytest.raises(TypeError, match=r"a loss_type of guided-diffusion's, an Enum, got 'mse'"):
        skip_step(diffusion, 9)


# --- The trainer's own networks, samplers and training loop ---------------------------------------


def make_unet(kind="image", *, learn_sigma=True, class_cond=False, use_fp16=False):
    from guided_diffusion import script_util

    options = {
        "num_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": "4",
        "learn_sigma": learn_sigma,
        "class_cond": class_cond,
        "use_fp16": use_fp16,
        "use_scale_shift_norm": True,
    }
    torch.manual_seed(0)
    if kind == "super-resolution":  # its widths are tied to images of 64 pixels and up
        options |= {"num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1}
        options |= {"dropout": 0.0, "resblock_updown": False, "use_checkpoint": False}
        model = script_util.sr_create_model(64, 16, **options)
    else:
        model = script_util.create_model(8, channel_mult="1", num_heads=1, **options)
    # The last layer starts at zero, which would hide whatever goes wrong before it.
    torch.nn.init.normal_(model.out[-1].weight, std=0.02)
    if use_fp16:
        model.convert_to_fp16()
    return model


@pytest.mark.parametrize("kind", ["image", "class-conditional", "super-resolution", "fp16"])
def test_real_networks_at_tau_one_and_below(kind):
    size = 64 if kind == "super-resolution" else 8
    model = make_unet(kind, class_cond=kind == "class-conditional", use_fp16=kind == "fp16")
    plain = make_diffusion(variance="LEARNED_RANGE", loss="RESCALED_MSE", rescale=True)
    x, t = torch.randn(2, 3, size, size), torch.tensor([4, 800])
    more = {
        "class-conditional": {"y": torch.tensor([1, 5])},
        "super-resolution": {"low_res": torch.randn(2, 3, size // 4, size // 4)},
    }.get(kind, {})
    expected = run(plain, model, x, t, model_kwargs=more)
    terms, gradients, state = run(skip_step(plain, 9, tau=1.0), model, x, t, model_kwargs=more)
    assert all(torch.equal(terms[name], expected[0][name]) for name in ("mse", "vb", "loss"))
    assert all(map(torch.equal, gradients, expected[1]))
    assert torch.equal(state, expected[2])
    terms, gradients, _ = run(skip_step(plain, 9), model, x, t, model_kwargs=more)
    assert terms["loss"].dtype == torch.float32
    assert (terms["loss"] == expected[0]["loss"]).tolist() == [True, False]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.fixture
def train_util(monkeypatch, tmp_path):
    """The trainer's own `train_util`, in a process group of one."""
    stub_mpi4py(monkeypatch)
    # Gone since NumPy 1.24; the loss-second-moment resampler counts with it.
    monkeypatch.setattr(np, "int", int, raising=False)
    from guided_diffusion import logger, train_util

    logger.configure(dir=str(tmp_path / "log"), format_strs=["json"])
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield train_util
    dist.destroy_process_group()
    logger.Logger.CURRENT.close()


def digits(count=None):
    return small.digits(count).expand(-1, 3, 8, 8).contiguous()


def batches(class_cond, batch_size=32):
    images, labels = digits(), torch.tensor(load_digits().target)
    generator = torch.Generator().manual_seed(0)
    while True:
        index = torch.randint(len(images), (batch_size,), generator=generator)
        yield images[index], {"y": labels[index]} if class_cond else {}


def train(train_util, model, diffusion, sampler, *, steps=16, resume=""):
    from guided_diffusion.resample import create_named_schedule_sampler

    loop = train_util.TrainLoop(
        model=model,
        diffusion=diffusion,
        data=batches(model.num_classes is not None),
        batch_size=32,
        microbatch=16,
        lr=3e-3,
        ema_rate="0.9",
        log_interval=5,
        save_interval=10**6,  # and so one checkpoint, at the end
        resume_checkpoint=resume,
        schedule_sampler=create_named_schedule_sampler(sampler, diffusion),
        lr_anneal_steps=steps,
    )
    loop.run_loop()
    return loop


def held_out_loss(diffusion, model):
    torch.manual_seed(11)
    x, t = digits(64), torch.randint(diffusion.num_timesteps, (64,))
    labels = {} if model.num_classes is None else {"y": torch.tensor(load_digits().target[:64])}
    with torch.no_grad():
        return diffusion.training_losses(model, x, t, labels)["loss"].mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "mean", "class_cond"),
    [("loss-second-moment", "EPSILON", False), ("uniform", "START_X", True)],
)
def test_the_trainers_own_loop(train_util, tmp_path, sampler, mean, class_cond):
    """It learns, resumes without the adapter, and its sampler takes what was learned."""
    np.random.seed(0)  # the stream that the trainer's samplers draw from
    plain = make_diffusion(steps=100, variance="LEARNED_RANGE", mean=mean, loss="RESCALED_MSE")
    adapted = skip_step(plain, 9)
    model = make_unet(class_cond=class_cond)
    before = held_out_loss(adapted, model)
    loop = train(train_util, model, adapted, sampler)
    assert held_out_loss(adapted, model) < 0.85 * before
    if sampler == "loss-second-moment":
        # At most 10 a timestep are kept, of 16 steps with 32 losses each.
        assert 400 < loop.schedule_sampler._loss_counts.sum() <= 16 * 32

    checkpoint = sorted((tmp_path / "log").glob("model*.pt"))[-1]
    untouched = make_unet(class_cond=class_cond)
    assert torch.load(checkpoint).keys() == untouched.state_dict().keys()
    resumed = train(train_util, untouched, plain, sampler, steps=18, resume=str(checkpoint))
    assert resumed.resume_step == loop.step == 16
    lines = (tmp_path / "log" / "progress.json").read_text().splitlines()
    assert {"loss", "mse", "vb", "skip", "skip_q3"} <= set(json.loads(lines[0]))

    sampling = make_diffusion(steps=100, variance="LEARNED_RANGE", mean=mean, respacing="ddim10")
    labels = {"y": torch.tensor([3, 4])} if class_cond else {}
    sample = sampling.ddim_sample_loop(model, (2, 3, 8, 8), device="cpu", model_kwargs=labels)
    assert sample.shape == (2, 3, 8, 8)
    assert sample.isfinite().all()


@pytest.mark.skipif(ROOT is None, reason="set S2DM_GUIDED_DIFFUSION_ROOT: no package has scripts")
@pytest.mark.parametrize("script", ["image_train.py", "super_res_train.py"])
def test_the_pages_diff_in_the_trainers_scripts(train_util, tmp_path, monkeypatch, script):
    """The script runs after the diff that the docs show, on pictures of digits."""
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, digit in enumerate(load_digits().images[:8]):
        picture = Image.fromarray((digit * 15).astype("uint8")).resize((64, 64)).convert("RGB")
        picture.save(pictures / f"{index}.png")

    flags = "--batch_size 2 --lr_anneal_steps 2 --log_interval 1 --num_channels 32"
    flags += (
        " --num_res_blocks 1 --attention_resolutions 16 --learn_sigma True --diffusion_steps 50"
    )
    sizes = " --large_size 64 --small_size 16" if "super" in script else " --image_size 64"
    arguments = [script, "--data_dir", str(pictures), *(flags + sizes).split()]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(train_util.dist_util, "setup_dist", lambda: None)  # the fixture has done it
    monkeypatch.setattr(train_util.logger, "configure", lambda: None)
    path = f"scripts/{script}"
    source = patched("guided-diffusion", path, (Path(ROOT) / path).read_text())
    exec(compile(source, path, "exec"), {"__name__": "__main__"})  # noqa: S102
    lines = (tmp_path / "log" / "progress.json").read_text().splitlines()
    assert len(lines) == 2
    assert {"loss", "mse", "vb", "skip"} <= set(json.loads(lines[0]))


def test_samplers_are_the_trainers_own():
    plain = make_diffusion(respacing="ddim10")
    model = make_model(plain, dropout=0.0).eval()
    for name in ("p_sample_loop", "ddim_sample_loop"):
        samples = []
        for diffusion in (plain, skip_step(plain, 1)):
            torch.manual_seed(0)
            samples.append(getattr(diffusion, name)(model, (2, 2, 6, 6), device="cpu"))
        assert torch.equal(*samples)


def test_resampler_receives_each_timesteps_own_loss(train_util):
    """Its history is indexed by t, so a loss in another order would be filed under another t."""
    from guided_diffusion.resample import LossSecondMomentResampler

    adapted = skip_step(make_diffusion(steps=100), 9)
    resampler = LossSecondMomentResampler(adapted)
    t = torch.tensor([70, 3, 50, 0, 9, 8])
    losses = adapted.training_losses(make_model(adapted), torch.randn(6, 2, 6, 6), t)["loss"]
    resampler.update_with_local_losses(t, losses.detach())
    assert resampler._loss_history[t.numpy(), 0].tolist() == losses.double().tolist()


@pytest.mark.slow
def test_one_model_call_per_step_and_joined_gradients_in_two_processes(tmp_path):
    torch.manual_seed(1)
    batch = {
        "x": torch.randn(8, 1, 6, 6),
        "noise": torch.randn(8, 1, 6, 6),
        "t": torch.tensor([0, 999, 8, 500, 9, 10, 700, 3]),
    }
    alone = ddp_gradients(0, 1, batch)
    ranks = run_distributed(ddp_gradients, tmp_path, 2, batch)
    assert [rank["calls"] for rank in ranks] == [1, 1]
    torch.testing.assert_close(torch.cat([rank["loss"] for rank in ranks]), alone["loss"])
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"], alone["gradients"])


def test_a_step_copies_no_table_to_the_device(monkeypatch):
    """On a GPU a copy from the host waits for it: what is looked up by t lies there already."""
    adapted = skip_step(make_diffusion(), 9)
    model, (x, t) = make_model(adapted), make_batch(adapted)
    adapted.training_losses(model, x, t)
    monkeypatch.setattr(NoiseSchedule, "log_alphas_cumprod_at", None)
    monkeypatch.setattr(NoiseSchedule, "alpha_sigma", None)
    adapted.training_losses(model, x, t)


# A copy of the trainer that weighs its squared error, masks it, or adds to it.


class Weighing(gd.GaussianDiffusion):
    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        terms = super().training_losses(model, x_start, t, model_kwargs, noise)
        snr = torch.from_numpy(1 / (1 - self.alphas_cumprod) - 1).float()[t]
        if self.kind == "P2":
            terms["mse"] = terms["mse"] / (1 + snr)
            terms["loss"] = terms["mse"]
        elif self.kind == "more":
            terms["loss"] = terms["mse"] + 0.5
        return terms


def weighing(kind, tau=0.99):
    plain = make_diffusion(spaced=False)
    plain.__class__, plain.kind = Weighing, kind
    return skip_step(plain, 9, tau=tau)


@pytest.mark.parametrize("tau", [0.99, 1.0])
def test_a_copy_that_weighs_or_adds_is_refused(tau):
    for kind in ("P2", "more"):
        adapted = weighing(kind, tau)
        with pytest.raises(ValueError, match=r"must have the plain mse.*got a SkipStepWeighing"):
            adapted.training_losses(make_model(adapted), *make_batch(adapted))
    adapted = weighing("plain", tau)
    adapted.training_losses(make_model(adapted), *make_batch(adapted))


def test_a_weight_that_is_nearly_always_1_is_found():
    """A hundred calls are looked at: of P2's weights those at late t are 1 to a thousandth."""
    adapted = weighing("P2")
    model, x, late = make_model(adapted), torch.randn(2, 2, 4, 4), torch.full((2,), 990)
    for _ in range(99):
        adapted.training_losses(model, x, late)
    with pytest.raises(ValueError, match="must have the plain mse"):
        adapted.training_losses(model, x, late - 900)


def test_a_model_may_be_called_with_the_timestep_by_name():
    class ByName(gd.GaussianDiffusion):
        def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
            named = lambda x, t: model(x, timestep=t)  # noqa: E731
            return super().training_losses(named, x_start, t, model_kwargs, noise)

    plain = make_diffusion(spaced=False)
    plain.__class__ = ByName
    adapted, network = skip_step(plain, 9, tau=1.0), Network()
    losses = adapted.training_losses(lambda x, timestep: network(x, timestep), *make_batch(plain))
    assert losses["loss"].isfinite().all()
