"""Rotary position embedding (Su et al. 2021) in the Hugging Face form, which rotates halves of a head.

Legend: t rows, h heads, e head_dim.
"""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [x1, x2] to [x1 cos - x2 sin, x2 cos + x1 sin], x1 and x2 the halves of each head.

    x [t, h, e], cos and sin [t, 1, e / 2] in the dtype of x (they get no gradient); returns [t, h, e].
    """
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    halves = (x1 * cos).addcmul_(x2, sin, value=-direction), (x2 * cos).addcmul_(x1, sin, value=direction)
    return torch.cat(halves, dim=-1)
