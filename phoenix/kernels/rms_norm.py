"""RMSNorm (Zhang and Sennrich 2019), in fp32 inside, as Mistral and Llama compute it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), cast back to the dtype of x, times weight.

    x [..., d] of any floating dtype (computed in fp32; fp64 stays), weight [d]; returns the shape and dtype
    of x.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)
