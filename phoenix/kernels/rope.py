"""Rotary position embedding (Su et al. 2021) in the Hugging Face form, which rotates halves of a head.

Legend: t rows, h heads, e head_dim.
"""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [x1, x2] to [x1 cos - x2 sin, x2 cos + x1 sin], x1 and x2 the halves of each head.

    x [t, h, e], cos and sin [t, 1, e / 2] in the dtype of x; returns [t, h, e].
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
