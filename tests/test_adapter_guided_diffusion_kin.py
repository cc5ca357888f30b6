"""The guided-diffusion adapter on trainers that carry a copy of its `gaussian_diffusion.py`.

openai/improved-diffusion and facebookresearch/DiT, in checkouts named by environment variables.
"""

import itertools

import pytest
import torch
from torch import nn

from s2dm_loss.adapters.guided_diffusion import skip_step
from s2dm_loss.testing import check_swap
from tests.helpers.upstream import load_below, root_of

KIN = {
    "improved-diffusion": ("S2DM_IMPROVED_DIFFUSION_ROOT", "improved_diffusion"),
    "DiT": ("S2DM_DIT_ROOT", "diffusion"),
}


@pytest.fixture(scope="module", params=KIN)
def trainer(request):
    variable, package = KIN[request.param]
    return load_below(root_of(variable), package, "gaussian_diffusion", "respace")


def make_diffusion(trainer, *, mean, variance, loss, respacing="", schedule="linear"):
    gd, respace = trainer
    return respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(1000, respacing or [1000]),
        betas=gd.get_named_beta_schedule(schedule, 1000),
        model_mean_type=gd.ModelMeanType[mean],
        model_var_type=gd.ModelVarType[variance],
        loss_type=gd.LossType[loss],
    )


GRID = [
    *itertools.product(
        ("EPSILON", "START_X"),
        ("FIXED_LARGE", "LEARNED_RANGE"),
        ("MSE", "RESCALED_MSE"),
        ("", "ddim50"),
    )
]


@pytest.mark.parametrize(("mean", "variance", "loss", "respacing"), GRID)
def test_the_swap(trainer, mean, variance, loss, respacing):
    """Bit for bit at τ = 1, in value and gradient, `vb` included."""
    options = {"mean": mean, "variance": variance, "loss": loss, "respacing": respacing}
    plain = make_diffusion(trainer, **options)
    last = plain.num_timesteps - 1
    x, t = torch.randn(6, 2, 6, 6), torch.tensor([0, 8, 9, last // 3, last - 1, last])
    channels = 4 if variance == "LEARNED_RANGE" else 2
    torch.manual_seed(1)
    noise = torch.randn(6, channels, 6, 6)

    def run(model, tau=None):
        diffusion = plain if tau is None else skip_step(plain, 9, tau=tau)
        return diffusion.training_losses(model, x, t, {})["loss"]

    report = check_swap(run, run, rtol=0.0, output_of=lambda _: noise)
    assert report.calls == 1


def test_every_term_is_the_trainers_at_tau_one_and_vb_below_it(trainer):
    plain = make_diffusion(trainer, mean="EPSILON", variance="LEARNED_RANGE", loss="MSE")
    model = nn.Conv2d(2, 4, 3, padding=1)
    x, t = torch.randn(4, 2, 6, 6), torch.tensor([3, 9, 500, 999])
    terms = {}
    for tau in (None, 1.0, 0.99):
        diffusion = plain if tau is None else skip_step(plain, 9, tau=tau)
        torch.manual_seed(0)
        terms[tau] = diffusion.training_losses(lambda x_t, _: model(x_t), x, t, {})
    assert set(terms[1.0]) == {*terms[None], "skip"} == {"mse", "vb", "loss", "skip"}
    for name, values in terms[None].items():
        assert torch.equal(terms[1.0][name], values)
    for name in ("mse", "vb"):
        assert torch.equal(terms[0.99][name], terms[None][name])
    assert (terms[0.99]["skip"] == 0).tolist() == [True, False, False, False]


def test_refuses_variational_bounds(trainer):
    options = {"mean": "EPSILON", "variance": "LEARNED", "loss": "RESCALED_KL"}
    diffusion = make_diffusion(trainer, **options)
    with pytest.raises(ValueError, match="got loss_type RESCALED_KL"):
        skip_step(diffusion, 9)
