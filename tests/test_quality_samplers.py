import pytest
import torch

from benchmarks.quality.samplers import SAMPLERS, TITLES, make_scheduler, sample
from benchmarks.quality.streams import Purpose, generator
from s2dm_loss import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(1000)
SPREAD = 0.5


def exact(x, t):
    """E[ε | x_t] for data drawn from N(0.3, SPREAD²)."""
    alphas_cumprod = SCHEDULE.alphas_cumprod[t].to(x)
    variance = alphas_cumprod * SPREAD**2 + 1 - alphas_cumprod
    return (1 - alphas_cumprod).sqrt() * (x - alphas_cumprod.sqrt() * 0.3) / variance


def draw(name, steps, seed=0):
    start = torch.randn(4096, 1, 2, 2, generator=generator(seed, Purpose.START))
    return sample(exact, name, SCHEDULE, steps, start, generator(seed, Purpose.SAMPLER))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_recovers_gaussian_data_from_its_exact_model(name):
    # DDPM's own variance is right for small steps only.
    steps = 1000 if name == "ddpm" else 100
    samples = draw(name, steps)
    assert float(samples.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(samples.std()) == pytest.approx(SPREAD, rel=0.03)
    assert torch.equal(samples, draw(name, steps))
    assert not torch.equal(samples, draw(name, steps, seed=1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_schedulers_have_the_schedules_own_table(name):
    scheduler = make_scheduler(name, SCHEDULE)
    table = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(table, SCHEDULE.alphas_cumprod, rtol=1e-5, atol=0)
    assert not scheduler.config.get("clip_sample", False)
    assert name in TITLES


def test_timesteps_that_are_visited():
    wanted = dict.fromkeys(("ddim", "pndm", "ddpm"), range(0, 1000, 100))
    for name, times in {**wanted, "deis": range(90, 901, 90)}.items():
        scheduler = make_scheduler(name, SCHEDULE)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps.unique().tolist() == list(times)
    with pytest.raises(ValueError, match=r"sampler: expected one of ddim, pndm, .*, got 'euler'"):
        make_scheduler("euler", SCHEDULE)
