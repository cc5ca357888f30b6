"""A small network, small grids, and calls that are refused."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout


class Network(nn.Module):
    """It depends on its times, draws random numbers, and keeps what it was called with."""

    self_condition = False  # what denoising-diffusion-pytorch asks for

    def __init__(self, channels=2, out=None, *, dropout=0.1, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(7)
        self.channels = self.out_dim = channels
        self.conv = nn.Conv2d(channels, out or channels, 3, padding=1, dtype=dtype)
        self.dropout, self.seen = dropout, []

    def forward(self, x, t, *_, **__):
        self.seen.append((x.detach(), t, self.training))
        hidden = dropout(x, self.dropout, training=self.training)
        return self.conv(hidden) * (1 + t.reshape(-1, 1, 1, 1) / 1000)


def every_pair(when=lambda _: True, **values):
    """Few of the combinations of `values`, in which every two that can meet still do."""
    whole = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    whole = [each for each in whole if when(each)]

    def pairs(each):
        return set(itertools.combinations(((name, str(value)) for name, value in each.items()), 2))

    left, chosen = set().union(*map(pairs, whole)), []
    while left:
        chosen.append(max(whole, key=lambda each: len(pairs(each) & left)))
        left -= pairs(chosen[-1])
    return chosen


def refuses(error, said, call, *args, **kwargs):
    """A call ends in this error, which says so."""
    with pytest.raises(error, match=said):
        call(*args, **kwargs)


def tree(value):
    """A configuration: dicts as objects, whose entries are attributes."""
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{name: tree(inner) for name, inner in value.items()})


def digits(count=None):
    """scikit-learn's handwritten digits in [-1, 1], of shape [count, 1, 8, 8]."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images[:count], dtype=torch.float32)
    return (images / 8 - 1).unsqueeze(1)
