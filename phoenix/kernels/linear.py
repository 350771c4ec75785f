"""Products with weights that may be wider than the activations: what autograd would keep and need not be.

Legend: t rows, d in_features, o out_features, f intermediate_size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in the dtype of x: x [t, d], weight [o, d] of any floating dtype; returns [t, o].

    A weight of another dtype is cast once forward and once backward, so no copy of it waits between them; its
    gradient has the weight's dtype.
    """
    return F.linear(x, weight) if x.dtype == weight.dtype else _CastLinear.apply(x, weight)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) weight^T, SwiGLU (Shazeer 2020) with the projection behind it.

    gate and up [t, f], weight [d, f] of any floating dtype; returns [t, d] in the dtype of gate.  Keeps its
    inputs alone: silu(gate) * up is computed again, which takes less time than memory for it.
    """
    return _SwiGLULinear.apply(gate, up, weight)


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        dweight = (grad.T @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dweight


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        open_gate, dweight = F.silu(gate), None
        dhidden = grad @ weight.to(grad.dtype)
        if ctx.needs_input_grad[2]:
            dweight = (grad.T @ (open_gate * up)).to(weight.dtype)
        return torch.ops.aten.silu_backward(dhidden * up, gate), open_gate.mul_(dhidden), dweight
