"""The head's sums are right to 1e-6 at any size, in any memory format, of any floating type."""

import pytest
import torch
from s2dm_loss._head import completed_square, mean_square

from benchmarks.overhead.measure import OperatorCount, peak_memory
from tests.strategies import normal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape, seed=0):
    return normal(*shape, seed=seed).float()


# No side is a multiple of the length of a piece, unless the name says so.
LAYOUTS = {
    "pieces to the last value": lambda draw, n: draw(2, 256 * n),
    "one sample": lambda draw, n: draw(1, 256 * n + 1),
    "rows": lambda draw, n: draw(2, 256 * n + 255),
    "channels": lambda draw, n: draw(2, 3, 9 * n, 11),
    "channels_last": lambda draw, n: draw(2, 3, 9 * n, 11).contiguous(
        memory_format=torch.channels_last
    ),
    "transposed": lambda draw, n: draw(2, 3, 11, 9 * n).transpose(2, 3),
    "batch innermost": lambda draw, n: draw(64 * n + 1, 2).t(),
    "every second": lambda draw, n: draw(2, 128 * n + 1, 2)[..., 0],
    "cropped": lambda draw, n: draw(2, 3, 5 * n, 20)[..., 1:-2],
    "cropped channels_last": lambda draw, n: draw(2, 5 * n, 17, 6)[..., :3].permute(0, 3, 1, 2),
    "expanded channels": lambda draw, n: draw(2, 1, 9 * n, 11).expand(2, 3, 9 * n, 11),
    "samples apart": lambda draw, n: draw(4, 200 * n)[::2],
    "one channel for all": lambda draw, n: draw(2, 3, 9 * n, 11)[:, :1].expand(2, 3, 9 * n, 11),
    "one sample for all": lambda draw, n: draw(1, 200 * n).expand(2, 200 * n),
    "volumes": lambda draw, n: draw(2, 3, 5, n, 17).contiguous(
        memory_format=torch.channels_last_3d
    ),
}


def exact_mean_square(values):
    """Return the mean square of each sample, added up in float64 from exact squares."""
    return torch.stack([sample.reshape(-1).double().square().mean() for sample in values])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [4, 50, 400, 3000])
def test_mean_square(layout, size, dtype):
    values = LAYOUTS[layout](lambda *shape: draw(*shape).to(dtype), size)
    mean = mean_square(values, torch.float32)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact_mean_square(values), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.1, 0.7, 0.9999])
@pytest.mark.parametrize("shape", [(2, 2**14 + 1), (1, 2**20), (1, 2**24), (2, 3, 600, 601)])
@pytest.mark.parametrize("expand", [False, True])
def test_equal_values(value, shape, expand):
    """Where each addition is rounded the same way, a long sum goes wrong soonest."""
    values = torch.tensor(value).expand(shape)
    expected = torch.tensor(value).double().square().expand(shape[0])
    mean = mean_square(values if expand else values.contiguous(), torch.float32)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "values",
    [
        torch.full((2, 3, 16, 128), 0.7)[:, :1].expand(2, 3, 16, 128),
        torch.full((500, 500), 0.7).t(),
        torch.full((2, 2**12), 0.1).bfloat16(),
    ],
    ids=["one channel for all", "transposed, batch and sample equally long", "half type"],
)
def test_equal_values_where_one_norm_would_be_wrong(values):
    norm = torch.linalg.vector_norm(values.float(), dim=tuple(range(1, values.ndim)))
    exact = exact_mean_square(values)
    assert ((norm.double().square() / values[0].numel() / exact - 1).abs() > 4e-6).all()
    mean = mean_square(values, torch.float32)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 2**14), (1, 2**20), (1, 2**24), (3, 5, 2**16 + 1), (1, 3, 512, 512)]
)
def test_loss_of_large_samples(shape, dtype):
    eps_hat, noise = draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype)
    weight, constant, noise_constant, gain = torch.linspace(0.5, 1, 4 * len(eps_hat)).chunk(4)
    loss = completed_square(eps_hat, weight, constant, noise_constant, gain, noise)
    residuals = [eps_hat[i].double() - gain[i] * noise[i].double() for i in range(len(noise))]
    expected = weight * exact_mean_square(residuals)
    expected = expected + constant + noise_constant * exact_mean_square(noise)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [784, 3072, 2**14])
def test_equal_values_of_small_samples(count):
    """Eight lanes of additions, each wrong by half a unit in the last place of what is there."""
    values = torch.linspace(0.1, 1, 100)[:, None].expand(100, count).contiguous()
    bound = count / 8 * 2**-25 + 2**-22
    mean = mean_square(values, torch.float32)
    torch.testing.assert_close(mean.double(), exact_mean_square(values), rtol=bound, atol=0)


def test_float64_keeps_its_digits():
    values = normal(2, 2**16 + 1, seed=0)
    mean = mean_square(values, torch.float64)
    torch.testing.assert_close(mean, values.square().mean(1), rtol=1e-14, atol=0)


def test_no_samples_of_many_values():
    assert mean_square(torch.empty(0, 2**15 + 1), torch.float32).shape == (0,)


@pytest.mark.parametrize(
    "layout", ["channels", "channels_last", "rows", "cropped", "samples apart"]
)
def test_sums_make_no_large_tensor(layout):
    values = LAYOUTS[layout](draw, 2**14)
    peak = peak_memory(lambda: mean_square(values, torch.float32), torch.device("cpu"))
    # A norm for each piece of 256 in float32 and float64, or the squares of one chunk.
    assert peak <= (1.01 * 4 * 2**18 if layout == "cropped" else values.numel() // 16)


def operators(values):
    with OperatorCount(large=0) as count:
        mean_square(values, torch.float32)
    return count.names


def test_sums_call_few_operators():
    """A norm, where a sample is short enough; else a sum of pieces' norms, or of chunks."""
    short, longer = draw(2, 4, 64, 64), draw(2, 2**14 + 1)
    short_half, longer_half = draw(2, 2**11).half(), draw(2, 2**11 + 1).half()
    for values in (short, short.contiguous(memory_format=torch.channels_last), short_half):
        assert operators(values).count("linalg_vector_norm") == 1
        assert "sum" not in operators(values)
    for values in (longer, longer_half):
        assert operators(values).count("sum") == 1
    cropped = LAYOUTS["cropped"](draw, 2**12)
    assert len(operators(cropped)) <= 2 * (cropped.numel() / 2**18 + 1) + 4


def test_off_a_cpu_a_norm_squared_is_the_sum():
    class Elsewhere(torch.Tensor):
        is_cpu = False

    values = draw(3, 4, 5)
    mean = mean_square(values.as_subclass(Elsewhere), torch.float32)
    torch.testing.assert_close(mean.as_subclass(torch.Tensor).double(), exact_mean_square(values))
