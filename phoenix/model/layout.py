"""A batch is one flat stream of tokens plus a layout that says which query rows see which key rows.

There is no padding and no attention-mask matrix.  A stream holds n segments one behind the other; segment i
owns the query rows `cu_seqlens_q[i] : cu_seqlens_q[i + 1]`, and sees one or two ranges of key rows.
Attention is causal and aligned to the **end** of a segment's keys: its last query sees all of them, the query
before it all but the last.

    packed([3, 2])                  keys of the stream shared_prefix(2, [2, 1]): p0 p1 a0 a1 | p1 b0
                                    0 1 2 3 4                                    0  1  2  3    4  5
    query 0 (document 0)            1 . . . .          query 4 (p1 again)        1  .  .  .    1  .
    query 1                         1 1 . . .          query 5 (b0)              1  .  .  .    1  1
    query 2                         1 1 1 . .          keys of segment 1: rows [0, 1), then rows [4, 6)
    query 3 (document 1)            . . . 1 .
    query 4                         . . . 1 1

Legend: t query rows of the stream, s key rows, n segments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phoenix.kernels.linear_logps import IGNORE_INDEX as IGNORE_INDEX

if TYPE_CHECKING:
    from phoenix.model.cache import KVCache


@dataclass(frozen=True)
class AttentionLayout:
    """Which query rows see which key rows.

    positions [t] int64 (position of each query in its own sequence), cu_seqlens_q and cu_seqlens_k [n + 1]
    int32 live on the model's device; q_length [n], k_start and k_length [n, r] int64 (r = 1 or 2 ranges of
    key rows a segment, in order) stay on the CPU, where slicing needs them.  With a cache, new keys go into
    its rows `cache_rows` [t] and k_start counts rows of the cache.
    """

    positions: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    q_length: Tensor
    k_start: Tensor
    k_length: Tensor
    cache: KVCache | None = None
    cache_rows: Tensor | None = None

    @classmethod
    def packed(cls, lengths: Sequence[int]) -> AttentionLayout:
        """Documents one behind the other, each seeing itself.  Raises ValueError for a length below 1."""
        q_length = _lengths(lengths)
        start = q_length.cumsum(0) - q_length
        return _layout(
            _ranges(torch.zeros_like(start), q_length), q_length, start[:, None], q_length[:, None]
        )

    @classmethod
    def shared_prefix(cls, prefix_length: int, answer_lengths: Sequence[int]) -> AttentionLayout:
        """A prefix and n answers to it, the prefix standing once.

        Segments: prefix + first answer, then for each further answer the prefix's last token once more + that
        answer.  A further answer sees the prefix without its last token, then its own rows.

        So row `prefix_length - 1`, and the first row of every further segment, predict an answer's first
        token.
        """
        prefix, answers = int(_lengths([prefix_length])[0]), _lengths(answer_lengths)
        q_length = answers + 1
        q_length[0] += prefix - 1
        start = q_length.cumsum(0) - q_length
        first = torch.arange(len(answers)) == 0
        shared = torch.where(first, 0, prefix - 1)
        positions = _ranges(shared, q_length)
        k_start = torch.stack([torch.zeros_like(start), start], 1)
        return _layout(positions, q_length, k_start, torch.stack([shared, q_length], 1))

    @classmethod
    def join(cls, layouts: Sequence[AttentionLayout]) -> AttentionLayout:
        """Streams one behind the other, none of them with a cache; all with as many ranges of keys."""
        start = torch.tensor([0, *(layout.num_tokens for layout in layouts)]).cumsum(0)
        return _layout(
            torch.cat([layout.positions for layout in layouts]),
            torch.cat([layout.q_length for layout in layouts]),
            torch.cat([layout.k_start + first for layout, first in zip(layouts, start)]),
            torch.cat([layout.k_length for layout in layouts]),
        )

    @classmethod
    def prefill(cls, lengths: Sequence[int], cache: KVCache, slots: Sequence[int]) -> AttentionLayout:
        """New tokens of the sequences in `slots` of a cache; each sees what its slot holds, then itself.

        Raises ValueError for slots that are full or do not exist.  `cache.advance(slots, lengths)` after it.
        """
        q_length, slot = _lengths(lengths), torch.as_tensor(slots, dtype=torch.int64)
        wanted, last = slot.tolist(), len(cache.lengths) - 1
        if not len(wanted) == len(set(wanted)) == len(lengths) or not 0 <= min(wanted) <= max(wanted) <= last:
            raise ValueError(
                f"slots must be different numbers from 0 to {last}, one for each of {len(lengths)} lengths, "
                f"got {wanted}"
            )
        held = cache.lengths[slot]
        if int((held + q_length).max()) > cache.room:
            raise ValueError(
                f"{int((held + q_length).max())} tokens in a slot of the cache with room for {cache.room}"
            )
        start = slot * cache.room
        layout = _layout(_ranges(held, q_length), q_length, start[:, None], (held + q_length)[:, None])
        rows = _ranges(start + held, q_length).to(cache.device)
        return dataclasses.replace(layout.to(cache.device), cache=cache, cache_rows=rows)

    @classmethod
    def decode(cls, cache: KVCache, slots: Sequence[int]) -> AttentionLayout:
        """One new token for each sequence in `slots` of a cache."""
        return cls.prefill([1] * len(slots), cache, slots)

    def to(self, device: torch.device | str) -> AttentionLayout:
        """The same layout with its device tensors on `device`."""
        names = ("positions", "cu_seqlens_q", "cu_seqlens_k")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def max_q(self) -> int:
        return int(self.q_length.max())

    @property
    def max_k(self) -> int:
        return int(self.k_length.sum(1).max())


@dataclass(frozen=True)
class PackedBatch:
    """tokens [t] int64; labels [t] int64, already shifted: what row i must predict, -100 for nothing."""

    tokens: Tensor
    labels: Tensor
    layout: AttentionLayout

    def __post_init__(self) -> None:
        if not self.tokens.shape == self.labels.shape == self.layout.positions.shape:
            shapes = [list(x.shape) for x in (self.tokens, self.labels, self.layout.positions)]
            raise ValueError(f"tokens, labels and positions must have one shape [t], got {shapes}")

    def to(self, device: torch.device | str) -> PackedBatch:
        return PackedBatch(self.tokens.to(device), self.labels.to(device), self.layout.to(device))


def segment_sum(values: Tensor, layout: AttentionLayout) -> Tensor:
    """Sum of a value a row over each segment: [t] -> [n], in fp32 at least (fp64 stays)."""
    values = values if values.dtype == torch.float64 else values.float()
    return torch.stack([part.sum() for part in values.split(layout.q_length.tolist())])


def _lengths(lengths: Sequence[int]) -> Tensor:
    tensor = torch.as_tensor(lengths, dtype=torch.int64).cpu()
    if tensor.ndim != 1 or tensor.numel() == 0 or int(tensor.min()) < 1:
        raise ValueError(f"lengths must be a list of numbers >= 1, got {list(lengths)}")
    return tensor.clone()


def _ranges(start: Tensor, length: Tensor) -> Tensor:
    """start [5, 0], length [2, 3] -> [5, 6, 0, 1, 2]."""
    offset = torch.arange(int(length.sum())) - (length.cumsum(0) - length).repeat_interleave(length)
    return start.repeat_interleave(length) + offset


def _layout(positions: Tensor, q_length: Tensor, k_start: Tensor, k_length: Tensor) -> AttentionLayout:
    cu_seqlens_q, cu_seqlens_k = (
        torch.nn.functional.pad(x.cumsum(0), (1, 0)).to(torch.int32) for x in (q_length, k_length.sum(1))
    )
    return AttentionLayout(positions, cu_seqlens_q, cu_seqlens_k, q_length, k_start, k_length)
