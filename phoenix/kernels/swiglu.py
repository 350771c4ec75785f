"""The gate of SwiGLU (Shazeer 2020)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; gate and up [t, f], returns [t, f]."""
    return F.silu(gate) * up
