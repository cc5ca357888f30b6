"""A small double of ermongroup/ddim: the behaviour its users rely on, written anew.

The repository has no package to test against. What is kept: the registry of losses and how it is
called, the schedules of β, the training loop (antithetic t, gradient clipping, averaged weights,
the list it saves), and the sampler with its two choices of timesteps. Set S2DM_DDIM_ROOT to run
the same tests on a real checkout.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from s2dm_loss.adapters.ddim import ddim_loss


def noise_estimation_loss(model, x0, t, e, b, keepdim=False):
    a = (1 - b).cumprod(dim=0).index_select(0, t).view(-1, 1, 1, 1)
    output = model(x0 * a.sqrt() + e * (1.0 - a).sqrt(), t.float())
    losses = (e - output).square().sum(dim=(1, 2, 3))
    return losses if keepdim else losses.mean(dim=0)


loss_registry = {"simple": noise_estimation_loss}


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


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, channels = config.model.ch, config.model.in_channels
        self.time = nn.Linear(2, width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x, t):
        s = t[:, None] / 1000
        embedding = self.time(torch.cat([s, s.square()], dim=1))
        return self.last(nn.functional.silu(self.first(x) + embedding[:, :, None, None]))


def make_betas(config):
    diffusion = config.diffusion
    betas = get_beta_schedule(
        diffusion.beta_schedule,
        beta_start=diffusion.beta_start,
        beta_end=diffusion.beta_end,
        num_diffusion_timesteps=diffusion.num_diffusion_timesteps,
    )
    return torch.from_numpy(betas).float()


def train(config, directory, images, *, swap=False):
    """Train for one epoch as the runner does; return its losses.

    With `swap` the registry's line is changed as the adapter's page says.
    """
    registry = {"simple": ddim_loss(skip_set=49)} if swap else loss_registry
    b = make_betas(config)
    steps = len(b)
    model = nn.DataParallel(Model(config))
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optim.lr)
    shadow = {name: p.data.clone() for name, p in model.module.named_parameters()}
    losses = []
    size = config.training.batch_size
    for x in images[torch.randperm(len(images))].split(size):
        x = 2 * x - 1
        e = torch.randn_like(x)
        t = torch.randint(steps, (len(x) // 2 + 1,))
        t = torch.cat([t, steps - t - 1])[: len(x)]
        loss = registry[config.model.type](model, x, t, e, b)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        rate = config.model.ema_rate
        for name, p in model.module.named_parameters():
            shadow[name] = (1 - rate) * p.data + rate * shadow[name]
    states = [model.state_dict(), optimizer.state_dict(), 0, len(losses), shadow]
    torch.save(states, Path(directory) / "ckpt.pth")
    return losses


def sample(config, directory):
    """Sample from a checkpoint with the averaged weights, as the untouched runner does."""
    states = torch.load(Path(directory) / "ckpt.pth")
    model = nn.DataParallel(Model(config))
    model.load_state_dict(states[0], strict=True)
    for name, p in model.module.named_parameters():
        p.data.copy_(states[4][name])
    data = config.data
    x = torch.randn(8, data.channels, data.image_size, data.image_size)
    return sample_image(config, model, x, "uniform", 10)


def sample_image(config, model, x, skip_type, timesteps):
    b = make_betas(config)
    if skip_type == "uniform":
        seq = list(range(0, len(b), len(b) // timesteps))
    else:
        seq = [int(s) for s in np.linspace(0, np.sqrt(len(b) * 0.8), timesteps) ** 2]
    a_bar = torch.cat(
        [torch.ones(1), (1 - b).cumprod(0)]
    )  # ᾱ of -1, where the last jump goes, is 1
    with torch.no_grad():
        for i, j in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True):
            eps = model(x, torch.full((len(x),), float(i)))
            x0 = (x - eps * (1 - a_bar[i + 1]).sqrt()) / a_bar[i + 1].sqrt()
            x = a_bar[j + 1].sqrt() * x0 + (1 - a_bar[j + 1]).sqrt() * eps
    return x
