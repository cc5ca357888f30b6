"""Random schedules, skips and tensors, and what the tests of the core share."""

import pickle

import hypothesis.strategies as st
import torch

from s2dm_loss import ContinuousSchedule, NoiseSchedule

LINEAR, COSINE = NoiseSchedule.linear(1000), NoiseSchedule.cosine(1000)
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
FLOW, VP = ContinuousSchedule.flow(), ContinuousSchedule.vp()
TYPES = ["epsilon", "v_prediction", "sample", "flow", "score"]
ESTIMATORS = ["expected", "fresh", "shared"]


@st.composite
def betas(draw, min_size=1, max_size=2000):
    """Any β in (0, 1): short lists of anything, and long ones at a random scale."""
    if draw(st.booleans()):
        values = st.floats(min_value=1e-9, max_value=1 - 1e-6)
        return draw(st.lists(values, min_size=min_size, max_size=min(max_size, 20)))
    size = draw(st.integers(min_size, max_size))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    log_scale = draw(st.floats(-6.0, -1.0))
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    return (10 ** (log_scale + (uniform - 0.5))).clamp(max=0.999).tolist()


@st.composite
def schedules(draw, min_size=2, max_size=2000):
    return NoiseSchedule.from_betas(draw(betas(min_size, max_size)))


@st.composite
def schedules_with_skips(draw):
    schedule = draw(schedules())
    skips = st.integers(1, schedule.num_train_timesteps - 1)
    return schedule, sorted(draw(st.sets(skips, min_size=1, max_size=3)))


shapes = st.sampled_from(
    [(7,), (3, 5), (4, 4), (3, 3, 3), (2, 3, 4, 4), (4, 4, 4, 4), (2, 4, 2, 3, 3), (1, 1)]
)
taus = st.floats(0.01, 1.0)
seeds = st.integers(0, 2**31)


class Same(torch.nn.Module):
    def forward(self, x_t, t):
        return x_t


def pickled(value):
    """Return a value as it comes back from a pickle."""
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - our own bytes


def normal(*shape, seed, dtype=torch.float64):
    """Gaussian noise from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def normals(count, *shape, dtype=torch.float64):
    return [normal(*shape, seed=seed, dtype=dtype) for seed in range(count)]


def timesteps(size, count, seed):
    """`count` random timesteps in [0, size)."""
    return torch.randint(size, (count,), generator=torch.Generator().manual_seed(seed))


def beside(per_sample, data):
    """One value a sample, with the data's rank."""
    return per_sample.reshape(-1, *[1] * (data.ndim - 1))


def mean_of_squares(values):
    """The mean square of each sample."""
    return (values**2).reshape(len(values), values.shape[1:].numel()).mean(1)


def drawn(estimator, xi):
    """The noise that an estimator draws, as an argument."""
    return {"skip_noise": xi} if estimator == "fresh" and xi is not None else {}


def loss_and_gradient(function, output):
    """The value, and the gradient of its sum by the output."""
    leaf = output.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = function(leaf)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def excess_over_least(two_terms, eps_hat):
    """How far a quadratic of each sample lies above its minimum, its gradient at ε̂, and its A.

    By gradients at two places alone: L(ε̂) = A mean (ε̂ - best)² + what is left at `best`.
    """
    (_, here), (_, there) = (loss_and_gradient(two_terms, x) for x in (eps_hat, eps_hat + 1))
    count = eps_hat[0].numel()
    big_a = (there - here).flatten(1).sum(1) / 2 if eps_hat.ndim > 1 else (there - here) / 2
    return mean_of_squares(here) * count**2 / (4 * big_a), here, big_a


def targets_of(x0, eps, a, b):
    """What a perfect network of each type puts out, by the definitions."""
    return {
        "epsilon": eps,
        "v_prediction": (a * eps - b * x0) / (a**2 + b**2) ** 0.5,
        "sample": x0,
        "flow": eps - x0,
        "score": -eps / b,
    }


def batch(schedule, t, kind):
    """An output, and the target and x_t that a trainer makes of x_0 and ε."""
    x0, eps, output = normals(3, len(t), 3, 2)
    a, b = (beside(scale.double(), x0) for scale in schedule.alpha_sigma(t))
    return output, targets_of(x0, eps, a, b)[kind], a * x0 + b * eps, x0, eps


def ways_in(criterion, t, target, x_t, x0, eps, **given):
    """The loss of an output: of a trainer's, in the whole step, and by a trainer's own loss."""
    changed = criterion.regression_target(target, t, x_t, **given)
    return (
        lambda o: criterion.from_output(o, target, t, x_t, **given),
        lambda o: criterion(lambda x_t, t: o, x0, t, noise=eps, **given),
        lambda o: changed.weight * (o - changed.target).square().mean((1, 2)),
    )


def same(found, expected, **tolerance):
    """That several tensors, such as value and gradient, are close."""
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, **tolerance)
