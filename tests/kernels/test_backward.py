"""Gradients written by hand are at most twice as far from fp64 as those of plain torch in the same dtype."""

import pytest
import torch
import torch.nn.functional as F

from phoenix.kernels.linear import swiglu_linear
from phoenix.kernels.rms_norm import rms_norm
from phoenix.kernels.rope import rope


def plain_norm(x, weight):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return normed.to(x.dtype) * weight


def plain_rope(x, angle):
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


KERNELS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, eps=1e-5), plain_norm, [(50, 64), (64,)]),
    "swiglu_linear": (
        swiglu_linear,
        lambda gate, up, weight: F.linear(F.silu(gate) * up, weight),
        [(50, 64), (50, 64), (16, 64)],
    ),
    "rope": (
        lambda x, angle: rope(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype)),
        plain_rope,
        [(50, 4, 16), (50, 1, 8)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KERNELS)
def test_error_is_at_most_twice_that_of_plain_torch(name, dtype):
    ours, plain, shapes = KERNELS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    asked = 1 if name == "rope" else len(inputs)  # angles get no gradient

    def run(function, dtype):
        values = [x.to(dtype).requires_grad_(index < asked) for index, x in enumerate(inputs)]
        out = function(*values)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
        return [out, *torch.autograd.grad(out, values[:asked], grad.to(dtype))]

    exact, floor, found = run(plain, torch.float64), run(plain, dtype), run(ours, dtype)
    for number, (e, f, y) in enumerate(zip(exact, floor, found)):
        what = f"gradient {number}" if number else "the output"
        allowed = 2 * (f.double() - e).abs().max().clamp(min=torch.finfo(dtype).eps * e.abs().max())
        error = (y.double() - e).abs().max()
        assert error <= allowed, f"{what} is off by {error:.1e}, plain torch by {allowed / 2:.1e}"


@pytest.mark.parametrize("name", KERNELS)
def test_gradcheck(name):
    ours, _, shapes = KERNELS[name]
    inputs = [torch.randn(2, *shape[1:], dtype=torch.float64) for shape in shapes]
    if name == "rms_norm":
        inputs[1] = torch.randn(64, dtype=torch.float64)
    asked = 1 if name == "rope" else len(inputs)
    inputs = [x.requires_grad_(index < asked) for index, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(ours, inputs)
