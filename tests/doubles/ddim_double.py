"""A small double of ermongroup/ddim: the behaviour its users rely on, written anew.

The repository has no package to test against. What is kept: the loss and how it is called, the
schedules of β, and the sampler with its two choices of timesteps. Set S2DM_DDIM_ROOT to run the
same tests, and the trainer's own loop, on a real checkout.
"""

import numpy as np
import torch


def noise_estimation_loss(model, x0, t, e, b, keepdim=False):
    a = (1 - b).cumprod(dim=0).index_select(0, t).view(-1, 1, 1, 1)
    output = model(x0 * a.sqrt() + e * (1.0 - a).sqrt(), t.float())
    losses = (e - output).square().sum(dim=(1, 2, 3))
    return losses if keepdim else losses.mean(dim=0)


def get_beta_schedule(beta_schedule, *, beta_start, beta_end, num_diffusion_timesteps):
    steps = num_diffusion_timesteps
    if beta_schedule == "linear":
        return np.linspace(beta_start, beta_end, steps)
    if beta_schedule == "quad":
        return np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    if beta_schedule == "const":
        return np.full(steps, beta_end)
    if beta_schedule == "jsd":
        return 1 / np.linspace(steps, 1, steps)
    return (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + beta_start


def sample_image(config, model, x, skip_type, timesteps):
    betas = get_beta_schedule(**vars(config.diffusion))
    if skip_type == "uniform":
        seq = list(range(0, len(betas), len(betas) // timesteps))
    else:
        seq = [int(s) for s in np.linspace(0, np.sqrt(len(betas) * 0.8), timesteps) ** 2]
    a_bar = np.append((1 - betas).cumprod(), 1.0)  # of -1, where the last jump goes, 1
    for i, j in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True):
        eps = model(x, torch.full((len(x),), float(i)))
        x0 = (x - eps * (1 - a_bar[i]) ** 0.5) / a_bar[i] ** 0.5
        x = a_bar[j] ** 0.5 * x0 + (1 - a_bar[j]) ** 0.5 * eps
    return x
