"""RMSNorm against its formula, row by row."""

import pytest
import torch

from phoenix.kernels.rms_norm import rms_norm


def naive(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, in fp64."""
    rows = [row / (sum(v * v for v in row.tolist()) / len(row) + eps) ** 0.5 for row in x.double()]
    return torch.stack(rows) * weight.double()


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_formula(shape, eps):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[1], dtype=torch.float64)
    torch.testing.assert_close(rms_norm(x, weight, eps=eps), naive(x, weight, eps))


def test_gradcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, eps=1e-5), (x, weight))


def test_scale_of_a_row_does_not_matter():
    x, weight = torch.randn(4, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(rms_norm(1000 * x, weight, eps=0.0), rms_norm(x, weight, eps=0.0))


def test_a_row_of_zeros_gives_zeros():
    assert not rms_norm(torch.zeros(2, 8), torch.ones(8), eps=1e-5).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_do_not_overflow_and_the_dtype_stays(dtype):
    x = torch.full((2, 8), 300.0, dtype=dtype)  # 300^2 is beyond fp16
    found = rms_norm(x, torch.ones(8), eps=1e-5)
    assert found.dtype == dtype and torch.equal(found, torch.ones(2, 8, dtype=dtype))


def test_the_cast_stands_before_the_weight():
    """As in transformers: the norm in fp32, a cast to the dtype of x, then times the weight."""
    x, weight = torch.randn(50, 64).bfloat16(), torch.randn(64).bfloat16()
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(rms_norm(x, weight, eps=1e-5), normed * weight)


def test_error_is_at_most_twice_that_of_plain_torch():
    """Largest and mean error.  Seeded: two roundings meet in one number for about one draw in eight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator).bfloat16()
    weight = torch.randn(64, generator=generator).bfloat16()
    exact = naive(x, weight, 1e-5)
    floor = (torch.nn.functional.rms_norm(x, (64,), weight, 1e-5).double() - exact).abs()
    error = (rms_norm(x, weight, eps=1e-5).double() - exact).abs()
    assert error.max() <= 2 * floor.max() and error.mean() <= 2 * floor.mean()
