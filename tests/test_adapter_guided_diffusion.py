"""The guided-diffusion adapter on the trainer's own code, from the package guided-diffusion-sdk."""

import copy
import inspect
import itertools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

from s2dm_loss import NoiseSchedule, SkipSet, SkipStepLoss
from s2dm_loss.adapters.guided_diffusion import SkipStepMixin, skip_step
from s2dm_loss.coefficients import coefficients
from s2dm_loss.testing import check_swap
from tests.helpers.distributed import run_distributed
from tests.helpers.guided_diffusion_parts import (
    TinyModel,
    ddp_gradients,
    gd,
    make_diffusion,
    stub_mpi4py,
)
from tests.helpers.patches import patched
from tests.helpers.released_loss import CASES, released_constant

ROOT = os.environ.get("S2DM_GUIDED_DIFFUSION_ROOT")

NAMES = ("mean", "variance", "loss", "schedule", "respacing", "rescale", "spaced")
GRID = [
    dict(zip(NAMES, values, strict=True))
    for values in itertools.product(
        ("EPSILON", "START_X"),
        ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"),
        ("MSE", "RESCALED_MSE"),
        ("linear", "cosine"),
        (None, "ddim50", "250", [10, 15, 20]),
        (False, True),
        (False, True),
    )
    if values[6] or values[4] is None
]


def make_batch(diffusion, channels=2, size=6):
    """Data and sorted timesteps that lie below, at and above the skip of 9."""
    last = diffusion.num_timesteps - 1
    t = torch.tensor([0, 8, 9, 10, last // 2, last])
    return torch.randn(len(t), channels, size, size), t


def make_model(diffusion, channels=2, **options):
    learned = diffusion.model_var_type.name.startswith("LEARNED")
    torch.manual_seed(7)
    return TinyModel(channels, 2 * channels if learned else channels, **options)


def run(diffusion, model, x, t, seed=3, **kwargs):
    """Terms, gradients of the loss, and the state of the random stream after it."""
    torch.manual_seed(seed)
    terms = diffusion.training_losses(model, x, t, **kwargs)
    gradients = torch.autograd.grad(terms["loss"].sum(), list(model.parameters()))
    return terms, gradients, torch.get_rng_state()


@pytest.mark.parametrize(
    ("estimator", "given_noise"), [("expected", False), ("shared", False), ("expected", True)]
)
def test_tau_one_is_the_trainers_own_loss_over_the_full_grid(estimator, given_noise):
    for config in GRID:
        plain = make_diffusion(**config)
        model = make_model(plain)
        x, t = make_batch(plain)
        kwargs = {"noise": torch.randn_like(x)} if given_noise else {}
        adapted = skip_step(plain, 9, tau=1.0, estimator=estimator)
        expected, expected_gradients, expected_state = run(plain, model, x, t, **kwargs)
        terms, gradients, state = run(adapted, model, x, t, **kwargs)

        assert set(terms) == {*expected, "skip"}, config
        for name, values in expected.items():
            assert torch.equal(terms[name], values), (name, config)
        for gradient, reference in zip(gradients, expected_gradients, strict=True):
            assert torch.equal(gradient, reference), config
        assert torch.equal(state, expected_state), config
        assert torch.equal(model.seen[0], model.seen[1]), config
        assert len(model.seen) == 2, config


@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
def test_epsilon_models_get_the_cores_loss(estimator):
    for config in GRID:
        if config["mean"] != "EPSILON":
            continue
        plain = make_diffusion(**config)
        model = make_model(plain, dropout=0.0)
        x, t = make_batch(plain)
        noise, skip_noise = torch.randn(2, *x.shape)
        given = {"skip_noise": skip_noise} if estimator == "fresh" else {}
        adapted = skip_step(plain, 9, estimator=estimator)
        terms, gradients, _ = run(adapted, model, x, t, noise=noise, **given)

        reference = SkipStepLoss(
            NoiseSchedule.from_betas(plain.betas), 9, estimator=estimator, reduction="none"
        )
        mapped = plain._wrap_model(model) if config["spaced"] else model
        scaled = plain._scale_timesteps(t)
        eps_hat = mapped(plain.q_sample(x, t, noise=noise), scaled)[:, :2]
        core = reference.from_output(eps_hat, noise, t, **given)
        bound = plain.training_losses(model, x, t, noise=noise).get("vb", torch.zeros(()))
        torch.testing.assert_close(terms["loss"], core + bound, rtol=1e-5, atol=1e-6)
        expected = torch.autograd.grad(core.sum() + bound.sum(), list(model.parameters()))
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5, msg=str(config))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("estimator", ["expected", "shared", "fresh"])
@pytest.mark.parametrize("variance", ["FIXED_LARGE", "LEARNED_RANGE"])
def test_predict_xstart_is_eq_13_times_the_weight_of_the_trainers_own_loss(
    schedule, estimator, variance
):
    """In float64 and as the paper writes it: both terms, less what they are at their least."""
    plain = make_diffusion(mean="START_X", variance=variance, schedule=schedule)
    model = make_model(plain, dropout=0.0)
    x, t = make_batch(plain)
    noise, zeta = torch.randn(2, *x.shape)
    given = {"skip_noise": zeta} if estimator == "fresh" else {}
    terms, gradients, _ = run(
        skip_step(plain, 9, estimator=estimator), model, x, t, noise=noise, **given
    )

    a_bar = torch.tensor(plain.alphas_cumprod)
    odds = ((1 - a_bar) / a_bar)[t]  # mse(x_0) = odds mse(ε̂, ε)
    earlier = (t - 9).clamp(min=0)
    c2 = (a_bar[earlier] / a_bar[t] - 1).clamp(max=100).minimum(100 / odds)
    c2 = torch.where(t >= 9, c2, 0.0)
    c = c2.sqrt().minimum(10 / odds.clamp(min=1)).view(-1, 1, 1, 1)
    c2 = c2.view(-1, 1, 1, 1)
    tau = torch.where(t >= 9, 0.99, 1.0).view(-1, 1, 1, 1)
    root_a, root_b = (s[t].view(-1, 1, 1, 1) for s in (a_bar.sqrt(), (1 - a_bar).sqrt()))
    prediction = model(plain.q_sample(x, t, noise=noise), t)[:, :2].double()
    x_t = root_a * x + root_b * noise  # float32 keeps nothing of x_0 beside the last timestep's ε
    eps_hat = (x_t - root_a * prediction) / root_b
    target = {"expected": 0.0, "shared": noise, "fresh": zeta}[estimator]

    def eq_13(eps_hat):
        skip = c2 * eps_hat.square() - 2 * c * eps_hat * target
        return (tau * (eps_hat - noise).square() + (1 - tau) * skip).mean((1, 2, 3))

    best = (tau * noise + (1 - tau) * c * target) / (tau + (1 - tau) * c2)
    loss = odds * (eq_13(eps_hat) - eq_13(best))
    base = (prediction - x).square().mean((1, 2, 3))
    torch.testing.assert_close(terms["mse"].double(), base, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["skip"].double(), loss - base, rtol=1e-3, atol=2e-5)
    bound = plain.training_losses(model, x, t, noise=noise).get("vb", torch.zeros(()))
    torch.testing.assert_close(terms["loss"].double(), loss + bound, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(loss.sum() + bound.sum(), list(model.parameters()))
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_swap(mean, schedule):
    x = torch.randn(6, 2, 6, 6)
    t = torch.tensor([0, 8, 9, 300, 700, 998])

    def loss(model, tau=None):
        plain = make_diffusion(mean=mean, schedule=schedule)
        diffusion = plain if tau is None else skip_step(plain, 9, tau=tau)
        return diffusion.training_losses(model, x, t)["loss"]

    report = check_swap(loss, loss, rtol=0.0)  # bit for bit at τ = 1
    assert report.calls == 1


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


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"k{c['skip']}-{c['dtype']}")
def test_replays_the_released_loss(case, spaced):
    dtype = getattr(torch, case["dtype"])

    def tensor(name):
        return torch.tensor(case[name], dtype=dtype).reshape(case["shape"])

    output = tensor("model_output").requires_grad_()
    seen = []

    def model(x_t, _):
        seen.append(x_t)
        return output

    diffusion = skip_step(
        make_diffusion(spaced=spaced), case["skip"], tau=case["tau"], estimator="fresh"
    )
    losses = diffusion.training_losses(
        model,
        tensor("x0"),
        torch.tensor(case["timesteps"]),
        noise=tensor("noise"),
        skip_noise=tensor("skip_noise"),
    )
    loss = losses["loss"].mean()
    (gradient,) = torch.autograd.grad(loss, output)
    expected = tensor("grad_model_output")
    # The released loss reads float32 ᾱ where guided-diffusion's β are float64.
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()
    # The constant that no gradient sees is left out.
    assert loss.item() == pytest.approx(case["loss"] - released_constant(case), rel=2e-6)
    torch.testing.assert_close(seen[0], tensor("x_t"), rtol=1e-5, atol=1e-5)


def test_loss_is_the_sum_of_its_logged_terms():
    adapted = skip_step(make_diffusion(variance="LEARNED_RANGE"), 9)
    x, t = make_batch(adapted)
    terms = adapted.training_losses(make_model(adapted), x, t)
    expected = terms["mse"] + terms["skip"] + terms["vb"]
    torch.testing.assert_close(terms["loss"], expected)
    assert (terms["skip"] == 0).tolist() == (t < 9).tolist()


def test_variance_loss_is_untouched_and_does_not_reach_the_mean():
    for loss in ("MSE", "RESCALED_MSE"):
        plain = make_diffusion(variance="LEARNED_RANGE", loss=loss, respacing="ddim50")
        adapted = skip_step(plain, 9)
        model = make_model(plain, dropout=0.0)
        x, t = make_batch(plain)
        noise = torch.randn_like(x)
        vb = adapted.training_losses(model, x, t, noise=noise)["vb"]
        assert torch.equal(vb, plain.training_losses(model, x, t, noise=noise)["vb"])
        (gradient,) = torch.autograd.grad(vb.sum(), model.conv.weight)
        assert gradient[:2].abs().max() == 0
        assert gradient[2:].abs().max() > 0


@pytest.mark.parametrize("respacing", ["ddim100", "100", "250", [10, 15, 20]])
def test_skips_are_respaced_timesteps_by_default(respacing):
    plain = make_diffusion(respacing=respacing)
    base = make_diffusion().alphas_cumprod
    criterion = skip_step(plain, 9).skip_step_loss
    c2 = coefficients(criterion.schedule, criterion.skip_set).c2.numpy()
    kept = np.array(plain.timestep_map)
    np.testing.assert_allclose(c2[9:], base[kept[:-9]] / base[kept[9:]] - 1, rtol=1e-9)
    assert (c2[:9] == 0).all()


@pytest.mark.parametrize("respacing", [None, "ddim100", "100", "250", [10, 15, 20]])
@pytest.mark.parametrize("skip", [1, 9, 49])
def test_skips_in_original_timesteps_reach_the_kept_one_at_least_that_far_back(respacing, skip):
    plain = make_diffusion(respacing=respacing)
    base = make_diffusion().alphas_cumprod
    adapted = skip_step(plain, skip, original_timesteps=True)
    criterion = adapted.skip_step_loss
    found = coefficients(criterion.schedule, criterion.skip_set)
    kept = plain.timestep_map
    for index, original in enumerate(kept):
        before = [step for step in kept if step <= original - skip]
        c2 = base[max(before)] / base[original] - 1 if before else 0.0
        assert found.c2[index].item() == pytest.approx(c2, rel=1e-9, abs=1e-15)
        assert (found.tau[index] < 1) == bool(before)
    x, t = make_batch(plain)
    terms = adapted.training_losses(make_model(plain), x, t)
    assert terms["loss"].isfinite().all()
    assert "in original timesteps" in repr(adapted)


def test_without_respacing_original_timesteps_change_nothing():
    for spaced in (False, True):
        plain = make_diffusion(spaced=spaced)
        x, t = make_batch(plain)
        model = make_model(plain)
        for skips in (9, [1, 9], SkipSet.for_sampling_steps(50), SkipSet.from_timesteps([0, 300])):
            one = run(skip_step(plain, skips), model, x, t)[0]
            other = run(skip_step(plain, skips, original_timesteps=True), model, x, t)[0]
            assert torch.equal(one["loss"], other["loss"])


def test_a_samplers_stride_in_original_timesteps():
    plain = make_diffusion(respacing="ddim100")
    by_stride = skip_step(plain, SkipSet.for_sampling_steps(50), original_timesteps=True)
    by_steps = skip_step(plain, 2)  # 1000 // 50 is two strides of 10
    at_t = [
        coefficients(d.skip_step_loss.schedule, d.skip_step_loss.skip_set)
        for d in (by_stride, by_steps)
    ]
    assert torch.equal(at_t[0].c2, at_t[1].c2)


def test_a_model_that_maps_timesteps_already_is_not_mapped_twice():
    plain = make_diffusion(respacing="ddim50")
    model = make_model(plain)
    x, t = make_batch(plain)
    for diffusion in (plain, skip_step(plain, 9)):
        diffusion.training_losses(plain._wrap_model(model), x, t)
    assert torch.equal(model.seen[0], model.seen[1])
    assert model.seen[1].tolist() == [plain.timestep_map[i] for i in t.tolist()]


def test_fresh_noise_is_drawn_after_all_that_the_trainer_draws():
    plain = make_diffusion()
    model = make_model(plain)
    x, t = make_batch(plain)
    expected, _, state = run(plain, model, x, t)
    adapted = skip_step(plain, 9, estimator="fresh")
    terms, _, _ = run(adapted, model, x, t)
    assert torch.equal(terms["mse"], expected["mse"])  # the same noise, the same dropout
    torch.set_rng_state(state)
    zeta = torch.randn_like(x)
    given, _, _ = run(adapted, model, x, t, skip_noise=zeta)
    assert torch.equal(terms["loss"], given["loss"])


@pytest.mark.parametrize("estimator", ["expected", "fresh"])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_follows_its_tensors_to_another_device_without_reading_values(mean, estimator):
    """The device "meta" holds no values: what would make a GPU wait, or stays behind, fails."""
    adapted = skip_step(make_diffusion(mean=mean), 9, estimator=estimator, original_timesteps=True)
    model = make_model(adapted).to("meta")
    x, t = make_batch(adapted)
    losses = adapted.training_losses(model, x.to("meta"), t.to("meta"))
    assert losses["loss"].device.type == losses["skip"].device.type == "meta"


def test_signature_is_the_trainers_with_one_more_name():
    ours = list(inspect.signature(SkipStepMixin.training_losses).parameters)
    theirs = list(inspect.signature(gd.GaussianDiffusion.training_losses).parameters)
    assert ours == [*theirs, "skip_noise"]


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))],  # noqa: S301
)
@pytest.mark.parametrize("original", [False, True])
def test_copies_and_pickles_train_alike(duplicate, original):
    adapted = skip_step(make_diffusion(respacing="ddim100"), 9, original_timesteps=original)
    other = duplicate(adapted)
    model = make_model(adapted)
    x, t = make_batch(adapted)
    assert type(other) is type(adapted)
    assert torch.equal(run(adapted, model, x, t)[0]["loss"], run(other, model, x, t)[0]["loss"])


@pytest.mark.parametrize("loss", ["KL", "RESCALED_KL"])
def test_refuses_variational_bounds(loss):
    with pytest.raises(ValueError, match=f"MSE or RESCALED_MSE .* got loss_type {loss}"):
        skip_step(make_diffusion(loss=loss, variance="LEARNED_RANGE"), 9)


def test_refuses_what_it_cannot_read_the_noise_from():
    with pytest.raises(ValueError, match="EPSILON or START_X, got model_mean_type PREVIOUS_X"):
        skip_step(make_diffusion(mean="PREVIOUS_X"), 9)


def test_refuses_what_is_no_diffusion():
    with pytest.raises(
        TypeError, match=r"diffusion must be .* got a TinyModel without training_losses"
    ):
        skip_step(TinyModel(1, 1), 9)


def test_refuses_float_timesteps_and_skips_that_do_not_fit():
    adapted = skip_step(make_diffusion(), 9)
    x, t = make_batch(adapted)
    with pytest.raises(TypeError, match="t must hold integer timesteps"):
        adapted.training_losses(make_model(adapted), x, t.float())
    with pytest.raises(ValueError, match="a skip must be below 50"):
        skip_step(make_diffusion(respacing="ddim50"), 99)
    with pytest.raises(ValueError, match="a skip must be below 1000"):
        skip_step(make_diffusion(respacing="ddim50"), 1000, original_timesteps=True)


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
    if kind == "image":
        model = script_util.create_model(8, channel_mult="1", num_heads=1, **options)
    else:
        options |= {"num_heads": 1, "num_head_channels": -1, "num_heads_upsample": -1}
        # Its widths are tied to images of 64 pixels and up.
        options |= {"dropout": 0.0, "resblock_updown": False, "use_checkpoint": False}
        model = script_util.sr_create_model(64, 16, **options)
    # The last layer starts at zero, which would hide whatever goes wrong before it.
    torch.nn.init.normal_(model.out[-1].weight, std=0.02)
    if use_fp16:
        model.convert_to_fp16()
    return model


@pytest.mark.parametrize("kind", ["image", "class-conditional", "super-resolution", "fp16"])
def test_real_networks_at_tau_one_and_below(kind):
    size = 64 if kind == "super-resolution" else 8
    model = make_unet(
        "super-resolution" if kind == "super-resolution" else "image",
        class_cond=kind == "class-conditional",
        use_fp16=kind == "fp16",
    )
    plain = make_diffusion(variance="LEARNED_RANGE", loss="RESCALED_MSE", rescale=True)
    x = torch.randn(2, 3, size, size)
    t = torch.tensor([4, 800])
    model_kwargs = {
        "class-conditional": {"y": torch.tensor([1, 5])},
        "super-resolution": {"low_res": torch.randn(2, 3, size // 4, size // 4)},
    }.get(kind, {})
    expected = run(plain, model, x, t, model_kwargs=model_kwargs)
    terms, gradients, state = run(
        skip_step(plain, 9, tau=1.0), model, x, t, model_kwargs=model_kwargs
    )
    for name in ("mse", "vb", "loss"):
        assert torch.equal(terms[name], expected[0][name])
    assert all(map(torch.equal, gradients, expected[1]))
    assert torch.equal(state, expected[2])
    terms, gradients, _ = run(skip_step(plain, 9), model, x, t, model_kwargs=model_kwargs)
    assert terms["loss"].dtype == torch.float32
    assert terms["loss"][0] == expected[0]["loss"][0]
    assert terms["loss"][1] != expected[0]["loss"][1]
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


def digits(size=8):
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 8 - 1
    return images[:, None].expand(-1, 3, size, size).contiguous()


def batches(batch_size=32, *, class_cond=False):
    images, labels = digits(), torch.tensor(load_digits().target)
    generator = torch.Generator().manual_seed(0)
    while True:
        index = torch.randint(len(images), (batch_size,), generator=generator)
        yield images[index], {"y": labels[index]} if class_cond else {}


def train(train_util, model, diffusion, sampler, *, steps=20, resume=""):
    from guided_diffusion.resample import create_named_schedule_sampler

    loop = train_util.TrainLoop(
        model=model,
        diffusion=diffusion,
        data=batches(class_cond=model.num_classes is not None),
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
    x = digits()[:128]
    t = torch.randint(diffusion.num_timesteps, (len(x),))
    labels = {} if model.num_classes is None else {"y": torch.tensor(load_digits().target[:128])}
    with torch.no_grad():
        return diffusion.training_losses(model, x, t, labels)["loss"].mean().item()


@pytest.mark.parametrize(
    ("sampler", "mean", "class_cond"),
    [
        ("uniform", "EPSILON", False),
        ("loss-second-moment", "EPSILON", False),
        ("uniform", "START_X", True),
    ],
)
def test_the_trainers_own_loop(train_util, tmp_path, sampler, mean, class_cond):
    np.random.seed(0)  # the stream that the trainer's samplers draw from
    plain = make_diffusion(steps=100, variance="LEARNED_RANGE", mean=mean, loss="RESCALED_MSE")
    adapted = skip_step(plain, 9)
    model = make_unet(class_cond=class_cond)
    before = held_out_loss(adapted, model)
    loop = train(train_util, model, adapted, sampler)
    assert held_out_loss(adapted, model) < 0.8 * before
    if sampler == "loss-second-moment":
        # At most 10 a timestep are kept, of 20 steps with 32 losses each.
        assert 500 < loop.schedule_sampler._loss_counts.sum() <= 20 * 32

    checkpoint = sorted((tmp_path / "log").glob("model*.pt"))[-1]
    saved = torch.load(checkpoint)
    untouched = make_unet(class_cond=class_cond)
    assert saved.keys() == untouched.state_dict().keys()
    resumed = train(
        train_util, untouched, plain, sampler, steps=loop.step + 2, resume=str(checkpoint)
    )
    assert resumed.resume_step == loop.step == 20
    lines = (tmp_path / "log" / "progress.json").read_text().splitlines()
    assert {"loss", "mse", "vb", "skip", "skip_q3"} <= set(json.loads(lines[0]))

    sampling = make_diffusion(steps=100, variance="LEARNED_RANGE", mean=mean, respacing="ddim10")
    model_kwargs = {"y": torch.tensor([3, 4])} if class_cond else {}
    sample = sampling.ddim_sample_loop(model, (2, 3, 8, 8), device="cpu", model_kwargs=model_kwargs)
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
    adapted = skip_step(plain, 1)
    model = make_model(plain, dropout=0.0).eval()
    samples = []
    for diffusion in (plain, adapted):
        for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
            torch.manual_seed(0)
            samples.append(loop(model, (2, 2, 6, 6), device="cpu"))
    assert torch.equal(samples[0], samples[2])
    assert torch.equal(samples[1], samples[3])


def test_resampler_receives_each_timesteps_own_loss(train_util):
    """Its history is indexed by t, so a loss in another order would be filed under another t."""
    from guided_diffusion.resample import LossSecondMomentResampler

    adapted = skip_step(make_diffusion(steps=100), 9)
    resampler = LossSecondMomentResampler(adapted)
    x = torch.randn(6, 2, 6, 6)
    t = torch.tensor([70, 3, 50, 0, 9, 8])
    losses = adapted.training_losses(make_model(adapted), x, t)["loss"].detach()
    resampler.update_with_local_losses(t, losses)
    assert resampler._loss_history[t.numpy(), 0].tolist() == losses.double().tolist()


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


class Weighing(gd.GaussianDiffusion):
    """A copy of the trainer that weighs its squared error, masks it, or adds to it."""

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        terms = super().training_losses(model, x_start, t, model_kwargs, noise)
        snr = torch.from_numpy(1 / (1 - self.alphas_cumprod) - 1).float()[t]
        if self.kind == "P2":
            terms["mse"] = terms["mse"] / (1 + snr)
            terms["loss"] = terms["mse"]
        elif self.kind == "more":
            terms["loss"] = terms["mse"] + 0.5
        return terms


@pytest.mark.parametrize("kind", ["P2", "more", "plain"])
@pytest.mark.parametrize("tau", [0.99, 1.0])
def test_a_copy_that_weighs_or_adds_is_refused(kind, tau):
    plain = make_diffusion(spaced=False)
    plain.__class__ = Weighing
    plain.kind = kind
    adapted = skip_step(plain, 9, tau=tau)
    x, t = make_batch(adapted)
    model = make_model(adapted)
    if kind == "plain":
        adapted.training_losses(model, x, t)
        return
    with pytest.raises(ValueError, match=r"must have the plain mse.*got a SkipStepWeighing"):
        adapted.training_losses(model, x, t)


def test_a_weight_that_is_nearly_always_1_is_found():
    """A hundred calls are looked at: of P2's weights those at late t are 1 to a thousandth."""
    plain = make_diffusion(spaced=False)
    plain.__class__, plain.kind = Weighing, "P2"
    adapted = skip_step(plain, 9)
    model = make_model(adapted)
    late = torch.full((2,), 990)
    for _ in range(99):
        adapted.training_losses(model, torch.randn(2, 2, 4, 4), late)
    with pytest.raises(ValueError, match="must have the plain mse"):
        adapted.training_losses(model, torch.randn(2, 2, 4, 4), late - 900)


def test_a_model_may_be_called_with_the_timestep_by_name():
    class ByName(gd.GaussianDiffusion):
        def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
            def named(x, t):
                return model(x, timestep=t)

            return super().training_losses(named, x_start, t, model_kwargs, noise)

    class Named(TinyModel):
        def forward(self, x, timestep):
            return super().forward(x, timestep)

    plain = make_diffusion(spaced=False)
    plain.__class__ = ByName
    adapted = skip_step(plain, 9, tau=1.0)
    x, t = make_batch(adapted)
    assert adapted.training_losses(Named(2, 2), x, t)["loss"].isfinite().all()


def test_kinds_that_are_no_enum_are_refused_by_name():
    diffusion = make_diffusion()
    diffusion.loss_type = "mse"
    with pytest.raises(TypeError, match=r"a loss_type of guided-diffusion's, an Enum, got 'mse'"):
        skip_step(diffusion, 9)
