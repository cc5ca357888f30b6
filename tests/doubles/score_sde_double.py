"""A small double of score_sde_pytorch: the behaviour its users rely on, written anew.

The three SDEs and their tables (no drift), the labels its networks get, the losses with their order
of random draws, defaults and weights, and the step with its average of the weights.
"""

# ruff: noqa: N801, N803 - the trainer's names
import math

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def _column(values):
    return values.reshape(-1, 1, 1, 1)


class _LinearBeta:
    T = 1

    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        self.beta_0, self.beta_1, self.N = beta_min, beta_max, N
        self.discrete_betas = torch.linspace(beta_min / N, beta_max / N, N)
        alphas_cumprod = (1 - self.discrete_betas).cumprod(0)
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt()
        self.sqrt_1m_alphas_cumprod = (1 - alphas_cumprod).sqrt()

    def _log_mean(self, t):
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2

    def marginal_prob(self, x, t):
        log_mean = self._log_mean(t)
        return _column(log_mean.exp()) * x, (1 - (2 * log_mean).exp()).sqrt()

    def sde(self, x, t):
        return None, (self.beta_0 + t * (self.beta_1 - self.beta_0)).sqrt()


class VPSDE(_LinearBeta):
    pass


class subVPSDE(_LinearBeta):
    def marginal_prob(self, x, t):
        mean, std = super().marginal_prob(x, t)
        return mean, std**2

    def sde(self, x, t):
        return None, super().sde(x, t)[1] * (1 - (4 * self._log_mean(t)).exp()).sqrt()


class VESDE:
    T = 1

    def __init__(self, sigma_min=0.01, sigma_max=50, N=1000):
        self.sigma_min, self.sigma_max, self.N = sigma_min, sigma_max, N
        self.discrete_sigmas = torch.linspace(math.log(sigma_min), math.log(sigma_max), N).exp()

    def marginal_prob(self, x, t):
        return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x, t):
        sigma = self.marginal_prob(x, t)[1]
        return None, sigma * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))


def _score(sde, model, continuous, x, t):
    if isinstance(sde, VESDE):
        index = ((sde.T - t) * (sde.N - 1)).round().long()
        return model(x, sde.marginal_prob(x, t)[1] if continuous else index)
    if continuous or isinstance(sde, subVPSDE):
        return -model(x, 999 * t) / _column(sde.marginal_prob(x, t)[1])
    labels = t * (sde.N - 1)
    return -model(x, labels) / _column(sde.sqrt_1m_alphas_cumprod[labels.long()])


def _over_data(squares, reduce_mean):
    flat = squares.flatten(1)
    return flat.mean(1) if reduce_mean else flat.sum(1) / 2


def get_sde_loss_fn(
    sde, train, reduce_mean=True, continuous=True, likelihood_weighting=True, eps=1e-5
):
    def loss_fn(model, batch):
        model.train(train)
        t = torch.rand(len(batch)) * (sde.T - eps) + eps
        z = torch.randn_like(batch)
        mean, std = sde.marginal_prob(batch, t)
        score = _score(sde, model, continuous, mean + _column(std) * z, t)
        if not likelihood_weighting:
            return _over_data((score * _column(std) + z) ** 2, reduce_mean).mean()
        g = sde.sde(torch.zeros_like(batch), t)[1]
        return (_over_data((score + z / _column(std)) ** 2, reduce_mean) * g**2).mean()

    return loss_fn


def _discrete(sde, train, reduce_mean, alphas, sigmas, scales):
    """Of an output that is ε over these scales."""

    def loss_fn(model, batch):
        model.train(train)
        labels, noise = torch.randint(0, sde.N, (len(batch),)), torch.randn_like(batch)
        alpha, sigma, scale = (_column(table[labels]) for table in (alphas, sigmas, scales))
        output = model(alpha * batch + sigma * noise, labels)
        return _over_data((scale * output - noise) ** 2, reduce_mean).mean()

    return loss_fn


def get_ddpm_loss_fn(vpsde, train, reduce_mean=True):
    tables = vpsde.sqrt_alphas_cumprod, vpsde.sqrt_1m_alphas_cumprod, torch.ones(vpsde.N)
    return _discrete(vpsde, train, reduce_mean, *tables)


def get_smld_loss_fn(vesde, train, reduce_mean=False):
    sigmas = vesde.discrete_sigmas.flip(0)
    return _discrete(vesde, train, reduce_mean, torch.ones(vesde.N), sigmas, -sigmas)


def get_step_fn(
    sde, train, optimize_fn=None, reduce_mean=False, continuous=True, likelihood_weighting=False
):
    if continuous:
        loss_fn = get_sde_loss_fn(sde, train, reduce_mean, True, likelihood_weighting)
    elif isinstance(sde, VESDE):
        loss_fn = get_smld_loss_fn(sde, train, reduce_mean)
    else:
        loss_fn = get_ddpm_loss_fn(sde, train, reduce_mean)

    def step_fn(state, batch):
        model, ema = state["model"], state["ema"]
        if train:
            state["optimizer"].zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimize_fn(state["optimizer"], model.parameters(), step=state["step"])
            state["step"] += 1
            ema.update(model.parameters())
            return loss
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        with torch.no_grad():
            loss = loss_fn(model, batch)
        ema.restore(model.parameters())
        return loss

    return step_fn


class ExponentialMovingAverage:
    """Of all parameters as one vector."""

    def __init__(self, parameters, decay):
        self.decay, self.shadow_params = decay, [parameters_to_vector(parameters).detach()]

    def update(self, parameters):
        self.shadow_params[0].lerp_(parameters_to_vector(parameters).detach(), 1 - self.decay)

    def store(self, parameters):
        self.stored = parameters_to_vector(parameters).detach()

    def copy_to(self, parameters):
        vector_to_parameters(self.shadow_params[0], parameters)

    def restore(self, parameters):
        vector_to_parameters(self.stored, parameters)
