"""A small double of score_sde_pytorch: the behaviour its users rely on, written anew.

The repository has no package to test against. What is kept: the three SDEs and their tables, the
labels its networks get, the losses with their order of random draws, defaults and weights, and the
training step (warm-up, the average of the weights). Set S2DM_SCORE_SDE_ROOT to run the same tests,
and the trainer's own loop, on a real checkout.
"""

# ruff: noqa: N801, N803 - the trainer's names
import math

import torch

from tests.helpers.small import Network


def _column(values):
    return values.reshape(-1, 1, 1, 1)


class SDE:
    T = 1

    def __init__(self, N):
        self.N = N


class _LinearBeta(SDE):
    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(N)
        self.beta_0, self.beta_1 = beta_min, beta_max

    def _log_mean(self, t):
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2

    def _drift(self, x, t):
        beta = self.beta_0 + t * (self.beta_1 - self.beta_0)
        return -0.5 * _column(beta) * x, beta


class VPSDE(_LinearBeta):
    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        super().__init__(beta_min, beta_max, N)
        self.discrete_betas = torch.linspace(beta_min / N, beta_max / N, N)
        self.alphas_cumprod = (1 - self.discrete_betas).cumprod(0)
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_1m_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()

    def marginal_prob(self, x, t):
        log_mean = self._log_mean(t)
        return _column(log_mean.exp()) * x, (1 - (2 * log_mean).exp()).sqrt()

    def sde(self, x, t):
        drift, beta = self._drift(x, t)
        return drift, beta.sqrt()


class subVPSDE(_LinearBeta):
    def marginal_prob(self, x, t):
        log_mean = self._log_mean(t)
        return _column(log_mean.exp()) * x, 1 - (2 * log_mean).exp()

    def sde(self, x, t):
        drift, beta = self._drift(x, t)
        return drift, (beta * (1 - (4 * self._log_mean(t)).exp())).sqrt()


class VESDE(SDE):
    def __init__(self, sigma_min=0.01, sigma_max=50, N=1000):
        super().__init__(N)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        logs = torch.linspace(math.log(sigma_min), math.log(sigma_max), N)
        self.discrete_sigmas = logs.exp()

    def marginal_prob(self, x, t):
        return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sde(self, x, t):
        sigma = self.marginal_prob(x, t)[1]
        return torch.zeros_like(x), sigma * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))


def get_score_fn(sde, model, train=False, continuous=False):
    model.train(train)

    def score_fn(x, t):
        if isinstance(sde, VESDE):
            index = ((sde.T - t) * (sde.N - 1)).round().long()
            return model(x, sde.marginal_prob(x, t)[1] if continuous else index)
        if continuous or isinstance(sde, subVPSDE):
            return -model(x, 999 * t) / _column(sde.marginal_prob(x, t)[1])
        labels = t * (sde.N - 1)
        return -model(x, labels) / _column(sde.sqrt_1m_alphas_cumprod[labels.long()])

    return score_fn


def _over_data(squares, reduce_mean):
    flat = squares.flatten(1)
    return flat.mean(1) if reduce_mean else flat.sum(1) / 2


def get_sde_loss_fn(
    sde, train, reduce_mean=True, continuous=True, likelihood_weighting=True, eps=1e-5
):
    def loss_fn(model, batch):
        score_fn = get_score_fn(sde, model, train, continuous)
        t = torch.rand(len(batch)) * (sde.T - eps) + eps
        z = torch.randn_like(batch)
        mean, std = sde.marginal_prob(batch, t)
        score = score_fn(mean + _column(std) * z, t)
        if not likelihood_weighting:
            return _over_data((score * _column(std) + z) ** 2, reduce_mean).mean()
        g = sde.sde(torch.zeros_like(batch), t)[1]
        return (_over_data((score + z / _column(std)) ** 2, reduce_mean) * g**2).mean()

    return loss_fn


def get_ddpm_loss_fn(vpsde, train, reduce_mean=True):
    def loss_fn(model, batch):
        model.train(train)
        labels = torch.randint(0, vpsde.N, (len(batch),))
        noise = torch.randn_like(batch)
        signal = _column(vpsde.sqrt_alphas_cumprod[labels]) * batch
        x_t = signal + _column(vpsde.sqrt_1m_alphas_cumprod[labels]) * noise
        return _over_data((model(x_t, labels) - noise) ** 2, reduce_mean).mean()

    return loss_fn


def get_smld_loss_fn(vesde, train, reduce_mean=False):
    def loss_fn(model, batch):
        model.train(train)
        labels = torch.randint(0, vesde.N, (len(batch),))
        sigma = vesde.discrete_sigmas.flip(0)[labels]
        noise = torch.randn_like(batch) * _column(sigma)
        difference = model(batch + noise, labels) + noise / _column(sigma) ** 2
        return (_over_data(difference**2, reduce_mean) * sigma**2).mean()

    return loss_fn


def get_step_fn(
    sde,
    train,
    optimize_fn=None,
    reduce_mean=False,
    continuous=True,
    likelihood_weighting=False,
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
        with torch.no_grad():
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            loss = loss_fn(model, batch)
            ema.restore(model.parameters())
        return loss

    return step_fn


def get_optimizer(config, params):
    return torch.optim.Adam(params, lr=config.optim.lr)


def optimization_manager(config):
    def optimize_fn(optimizer, params, step):
        # The learning rate is 0 at step 0.
        for group in optimizer.param_groups:
            group["lr"] = config.optim.lr * min(step / config.optim.warmup, 1.0)
        optimizer.step()

    return optimize_fn


class ExponentialMovingAverage:
    def __init__(self, parameters, decay):
        self.decay = decay
        self.shadow_params = [p.clone().detach() for p in parameters]

    def update(self, parameters):
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - self.decay)

    def store(self, parameters):
        self.collected_params = [p.clone() for p in parameters]

    def copy_to(self, parameters, source=None):
        for value, parameter in zip(source or self.shadow_params, parameters, strict=True):
            parameter.data.copy_(value)

    def restore(self, parameters):
        self.copy_to(parameters, self.collected_params)


def create_model(config):
    return torch.nn.DataParallel(Network(config.data.num_channels))
