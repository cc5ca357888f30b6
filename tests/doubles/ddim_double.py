"""A small double of ermongroup/ddim: its loss, schedules and choices of timesteps, written anew."""

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
    """It visits its timesteps, and does nothing else."""
    total = config.diffusion.num_diffusion_timesteps
    if skip_type == "uniform":
        seq = range(0, total, total // timesteps)
    else:
        seq = [int(s) for s in np.linspace(0, np.sqrt(total * 0.8), timesteps) ** 2]
    for i in reversed(seq):
        x = model(x, torch.full((len(x),), float(i)))
    return x
