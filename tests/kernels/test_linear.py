"""Products against their formulas and plain torch under autograd, and what they keep for a backward pass."""

import math

import pytest
import torch
import torch.nn.functional as F

from phoenix.kernels.linear import linear, swiglu_linear


def plain_linear(x, weight):
    return F.linear(x, weight.to(x.dtype))


def plain_swiglu_linear(gate, up, weight):
    return F.linear(F.silu(gate) * up, weight.to(gate.dtype))


FUNCTIONS = {"linear": (linear, plain_linear, 1), "swiglu_linear": (swiglu_linear, plain_swiglu_linear, 2)}
functions = pytest.mark.parametrize("name", FUNCTIONS)


def draw(activations, dtype, weight_dtype, rows=5) -> list[torch.Tensor]:
    """Activations [rows, 7] and a weight [3, 7], all with a gradient."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, 7, generator=generator).to(dtype) for _ in range(activations)]
    inputs.append(torch.randn(3, 7, generator=generator).to(weight_dtype))
    return [x.requires_grad_() for x in inputs]


def test_formulas():
    gate, up, weight = (x.tolist() for x in draw(2, torch.float64, torch.float64))
    hidden = [[g / (1 + math.exp(-g)) * u for g, u in zip(*rows)] for rows in zip(gate, up)]
    for found, rows in (
        (linear(torch.tensor(gate).double(), torch.tensor(weight).double()), gate),
        (swiglu_linear(*(torch.tensor(x, dtype=torch.float64) for x in (gate, up, weight))), hidden),
    ):
        expected = [[sum(a * b for a, b in zip(row, column)) for column in weight] for row in rows]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_closed_gate_gives_zero_and_an_open_one_the_product():
    one = torch.eye(2)
    assert swiglu_linear(torch.tensor([[-200.0, 200.0]]), torch.tensor([[3.0, 3.0]]), one).tolist() == [
        [0, 600]
    ]


@functions
def test_gradcheck(name):
    """Of a weight with a dtype of its own, see the next test: differences need fp64 throughout."""
    ours, _, activations = FUNCTIONS[name]
    assert torch.autograd.gradcheck(ours, draw(activations, torch.float64, torch.float64))
    *inputs, weight = draw(activations, torch.float64, torch.float32)
    assert torch.autograd.gradcheck(lambda *x: ours(*x, weight.detach()), inputs)


@functions
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    "dtype, weight_dtype",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)],
)
def test_values_and_gradients_are_those_of_a_cast_weight(name, dtype, weight_dtype, rows):
    ours, plain, activations = FUNCTIONS[name]
    inputs = draw(activations, dtype, weight_dtype, rows)
    grad = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for function in ours, plain:
        out = function(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    for found, expected in zip(*results):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert results[0][0].dtype == dtype and results[0][-1].dtype == weight_dtype


@functions
def test_what_is_frozen_gets_no_gradient(name):
    """A frozen weight, and activations that no parameter has touched."""
    ours, plain, activations = FUNCTIONS[name]
    for frozen in range(2):
        inputs = draw(activations, torch.bfloat16, torch.float32)
        for x in inputs[-1:] if frozen else inputs[:-1]:
            x.requires_grad_(False)
        asked = [x for x in inputs if x.requires_grad]
        results = [torch.autograd.grad(f(*inputs).sum(), asked) for f in (ours, plain)]
        assert all(torch.equal(*pair) for pair in zip(*results))


@functions
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_inputs_alone_are_kept(name, weight_dtype):
    """No cast of the weight and no silu(gate) * up, both of which autograd keeps."""
    ours, plain, activations = FUNCTIONS[name]
    inputs = draw(activations, torch.bfloat16, weight_dtype)
    held = {x.data_ptr() for x in inputs}
    others = []
    for function in ours, plain:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            function(*inputs)
        others.append([list(x.shape) for x in kept if x.data_ptr() not in held])
    assert not others[0]
    assert bool(others[1]) == (weight_dtype == torch.float32 or name == "swiglu_linear")
