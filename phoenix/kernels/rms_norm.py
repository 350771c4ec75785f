"""RMSNorm (Zhang and Sennrich 2019), in fp32 inside, as Mistral and Llama compute it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), cast back to the dtype of x, times weight.

    x [..., d] of any floating dtype (computed in fp32; fp64 stays), weight [d]; returns the shape and dtype
    of x.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and a number a row, where autograd would keep three tensors of the size of x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (torch.linalg.vecdot(wide, wide)[..., None] / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad = x.to(scale.dtype) * scale, grad.to(scale.dtype)
        dweight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        dnormed = grad * weight.to(x.dtype)
        along = torch.linalg.vecdot(dnormed, normed)[..., None] / x.shape[-1]  # what the norm takes away
        dx = dnormed.sub_(normed.mul_(along)).mul_(scale)
        return dx.to(x.dtype), dweight, None
