"""The gate of SwiGLU against its formula."""

import math

import torch

from phoenix.kernels.swiglu import swiglu


def test_formula():
    gate, up = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = [
        [g / (1 + math.exp(-g)) * u for g, u in zip(*rows)] for rows in zip(gate.tolist(), up.tolist())
    ]
    torch.testing.assert_close(swiglu(gate, up), torch.tensor(expected, dtype=torch.float64))


def test_gradcheck():
    gate, up = torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(swiglu, (gate.clone().requires_grad_(), up.clone().requires_grad_()))


def test_a_closed_gate_gives_zero_and_an_open_one_the_product():
    up = torch.tensor([3.0, 3.0])
    assert swiglu(torch.tensor([-200.0, 200.0]), up).tolist() == [0.0, 600.0]
