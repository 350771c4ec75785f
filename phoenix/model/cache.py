"""Keys and values of sequences under generation, in slots of one flat stream of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from phoenix.model.mistral import MistralConfig


class KVCache:
    """`num_slots` slots of `room` rows each: slot i owns the rows `i * room : (i + 1) * room` of every layer.

    keys, values: a list, one tensor a layer, [num_slots * room, g, e]; lengths [num_slots] int64 on the CPU:
    the rows in use.  Nothing is ever moved: a slot is freed by setting its length to 0.
    """

    def __init__(
        self, config: MistralConfig, num_slots: int, room: int, *, dtype: torch.dtype, device: Any
    ) -> None:
        shape = (num_slots * room, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
            for _ in range(2)
        )
        self.lengths = torch.zeros(num_slots, dtype=torch.int64)
        self.room = room
        self.device = torch.device(device)

    def update(self, layer: int, k: Tensor, v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [t, g, e] into `rows` [t]; returns all rows of the layer [s, g, e]."""
        self.keys[layer].index_copy_(0, rows, k)
        self.values[layer].index_copy_(0, rows, v)
        return self.keys[layer], self.values[layer]

    def advance(self, slots: Sequence[int], lengths: Sequence[int] | int) -> None:
        """Count new tokens as held, after the forward pass that wrote them."""
        self.lengths[torch.as_tensor(slots)] += torch.as_tensor(lengths)

    def free(self, slots: Sequence[int]) -> None:
        self.lengths[torch.as_tensor(slots)] = 0
