"""What the page on other trainers uses of k-diffusion's `Denoiser`, as its source documents it.

Karras et al. (arXiv 2206.00364): D(x) = c_skip x + c_out F(c_in x, σ), and a loss on F, weighted by
`weighting`. Written from the behaviour at commit 4601bf085320592473f681a62808ed873d17fad5.
"""

import torch
from torch import nn


class Denoiser(nn.Module):
    def __init__(self, inner_model, sigma_data=1.0, weighting="karras", scales=1):
        super().__init__()
        self.inner_model, self.sigma_data, self.scales = inner_model, sigma_data, scales
        self.kind = weighting

    def weighting(self, sigma):
        of_data = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        return {
            "karras": torch.ones_like(sigma),
            "snr": of_data,
            "soft-min-snr": of_data * (1 - of_data),
        }[self.kind]

    def loss(self, input, noise, sigma, **kwargs):  # noqa: A002 - the trainer's name
        column = sigma.reshape(-1, 1, 1, 1)
        denoised = self(input + column * noise, sigma, **kwargs)
        error = (denoised - input) / self.get_scalings(column)[1]
        return error.square().mean(dim=(1, 2, 3)) * self.weighting(sigma)

    def forward(self, input, sigma, **kwargs):  # noqa: A002 - the trainer's name
        c_skip, c_out, c_in = self.get_scalings(sigma.reshape(-1, 1, 1, 1))
        return c_out * self.inner_model(c_in * input, sigma, **kwargs) + c_skip * input

    def get_scalings(self, sigma):
        total = (sigma**2 + self.sigma_data**2).sqrt()
        return (self.sigma_data / total) ** 2, sigma * self.sigma_data / total, 1 / total
