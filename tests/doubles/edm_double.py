"""The losses of NVlabs/edm and edm2, which are short: what the papers say, written anew."""

import torch


class EDMLoss:
    """Karras et al., arXiv 2206.00364, Table 1: lognormal σ, and λ(σ) ‖D - x_0‖²."""

    def __init__(self, mean=-1.2, std=1.2, sigma_data=0.5):
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def __call__(self, net, images, labels=None):
        noised, sigma, weight = self.draw(images)
        return weight * (net(noised, sigma, labels) - images) ** 2

    def draw(self, images):
        sigma = (torch.randn(len(images), 1, 1, 1) * self.std + self.mean).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return images + torch.randn_like(images) * sigma, sigma, weight


class EDM2Loss(EDMLoss):
    """Karras et al., arXiv 2312.02696, Eq. 21: the same over u(σ), and + log u(σ)."""

    def __call__(self, net, images, labels=None):
        noised, sigma, weight = self.draw(images)
        denoised, log_u = net(noised, sigma, labels, return_logvar=True)
        return (weight / log_u.exp()) * (denoised - images) ** 2 + log_u
