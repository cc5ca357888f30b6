"""guided-diffusion's own diffusions for the tests, and its kin's.

The installed package is a fork that is on PyPI, with other samplers and the same losses. OpenAI's
own checkout, first on PYTHONPATH, takes its place.
"""

import guided_diffusion.gaussian_diffusion as gd
import guided_diffusion.respace

from tests.helpers.upstream import load_below, root_of

KIN = {
    "improved-diffusion": ("S2DM_IMPROVED_DIFFUSION_ROOT", "improved_diffusion"),
    "DiT": ("S2DM_DIT_ROOT", "diffusion"),
}


def modules_of(trainer="guided-diffusion"):
    """`gaussian_diffusion` and `respace` of the installed package, or of a copy in a checkout."""
    if trainer not in KIN:
        return gd, guided_diffusion.respace
    variable, package = KIN[trainer]
    return load_below(root_of(variable), package, "gaussian_diffusion", "respace")


def make_diffusion(
    *, steps=1000, schedule="linear", mean="EPSILON", variance="FIXED_LARGE", loss="MSE",
    respacing=None, rescale=False, spaced=True, trainer="guided-diffusion",
):  # fmt: skip
    """One of guided-diffusion's diffusions, chosen by its own names."""
    gd, respace = modules_of(trainer)
    options = {
        "betas": gd.get_named_beta_schedule(schedule, steps),
        "model_mean_type": gd.ModelMeanType[mean],
        "model_var_type": gd.ModelVarType[variance],
        "loss_type": gd.LossType[loss],
        **({"rescale_timesteps": True} if rescale else {}),  # DiT knows no such thing
    }
    if not spaced:
        return gd.GaussianDiffusion(**options)
    kept = respace.space_timesteps(steps, respacing or [steps])
    return respace.SpacedDiffusion(use_timesteps=kept, **options)
