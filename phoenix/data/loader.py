"""Global batches as a pure function of (seed, step), cut into micro-batches that any number of ranks share.

    the plan's rows -> an order for each (seed, epoch) -> global batches -> micro-batches -> ranks

Nothing here depends on the number of ranks before `GlobalBatch.share`, so a run may go on with more or fewer
of them and sees the same batches.  The last global batch of an epoch may be smaller; no row is left out.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from phoenix.data.packing import Plan
from phoenix.data.store import TokenStore
from phoenix.files import UserError
from phoenix.model.layout import IGNORE_INDEX, AttentionLayout, PackedBatch


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step."""

    loader: "Loader"
    epoch: float  # passes over the data when this batch is done
    micro_batches: list[np.ndarray]  # the plan's rows in each

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate(self.micro_batches)

    @property
    def num_tokens(self) -> int:
        return int(self.loader.plan.row_tokens[self.rows].sum())

    @property
    def num_target_tokens(self) -> int:
        """Labels of the whole batch, over all ranks: what its summed loss is divided by."""
        return int(self.loader.plan.row_targets[self.rows].sum())

    def share(self, rank: int, world_size: int) -> Iterator[tuple[int, Any]]:
        """(index in the global batch, micro-batch) for one rank: micro-batch i goes to rank i % world_size.

        Every rank gets equally many, since collectives hang otherwise: where none is left, one token that
        asks for nothing.
        """
        for index in range(rank, -(-len(self.micro_batches) // world_size) * world_size, world_size):
            if index < len(self.micro_batches):
                yield index, self.loader.packed_batch(self.micro_batches[index])
            else:
                yield index, self.loader.packed_batch(self.rows[:0])

    def origins(self, indices: list[int] | None = None) -> list[str]:
        """File and line of the rows in some micro-batches (None: in all), for messages."""
        chosen = self.micro_batches if indices is None else [self.micro_batches[index] for index in indices]
        spans = self.loader.spans(np.concatenate(chosen))
        return list(dict.fromkeys(name for span in spans for name in self.loader.store.origins(*span)))


class Loader:
    """Batches of a store by a plan.

    global_batch_size: rows of the plan in one optimizer step; micro_batch_tokens: tokens of a micro-batch at
    most, filled with whole rows in their order.  Raises UserError if a row does not fit into a micro-batch.
    """

    def __init__(
        self, store: TokenStore, plan: Plan, *, seed: int, global_batch_size: int, micro_batch_tokens: int
    ) -> None:
        if micro_batch_tokens < plan.row_tokens.max():
            raise UserError(
                f"micro_batch_tokens={micro_batch_tokens}, but a row has {plan.row_tokens.max()}; raise it"
            )
        self.store, self.plan, self.seed = store, plan, seed
        self.global_batch_size = min(global_batch_size, len(plan))
        self.micro_batch_tokens = micro_batch_tokens
        self.steps_per_epoch = -(-len(plan) // self.global_batch_size)

    @property
    def num_micro_batches(self) -> int:
        """Of the first global batch; others may have one more or less, and an epoch's last one fewer."""
        return len(self.global_batch(0).micro_batches)

    def total_steps(self, num_train_epochs: float) -> int:
        return max(1, math.ceil(num_train_epochs * self.steps_per_epoch - 1e-9))  # 0.1 * 30 is above 3

    def rows_of(self, steps: int) -> np.ndarray:
        """The plan's rows that the first so many steps see, ascending."""
        if steps >= self.steps_per_epoch:
            return np.arange(len(self.plan))
        return np.sort(row_order(len(self.plan), self.seed, 0)[: steps * self.global_batch_size])

    def global_batch(self, step: int) -> GlobalBatch:
        """The batch of a step, counted from 0.  Raises UserError if no token of it has a loss."""
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.global_batch_size
        rows = row_order(len(self.plan), self.seed, epoch)[first : first + self.global_batch_size]
        batch = GlobalBatch(self, epoch + (first + len(rows)) / len(self.plan), self.cut(rows))
        if batch.num_target_tokens == 0:
            raise UserError(
                f"step {step}: no token of the global batch has a loss ({batch.origins()[0]} and others); "
                "raise global_batch_size, or set assistant_only_loss=false"
            )
        return batch

    def packed_batch(self, rows: np.ndarray) -> PackedBatch:
        """Rows of the plan as one stream; each span is a segment, and its last token predicts nothing.

        Without rows one token that asks for nothing.
        """
        if not len(rows):
            return nothing()
        return self._pack(self.spans(rows), every_token=not self.plan.assistant_only_loss)

    def largest_micro_batch(self) -> PackedBatch:
        """For a trial of the memory: as many tokens as a micro-batch of any epoch can have, the longest
        segment among them, and a label on each."""
        plan = self.plan
        longest = plan.row_offsets.searchsorted((plan.span_end - plan.span_start).argmax(), side="right") - 1
        largest = np.argsort(-plan.row_tokens, kind="stable")[: self.global_batch_size]
        room = min(self.micro_batch_tokens, int(plan.row_tokens[largest].sum()))
        spans = []
        for start, end in self.spans(np.append(longest, largest)):
            if room:
                spans.append((start, min(end, start + room)))
                room -= spans[-1][1] - start
        return self._pack(spans, every_token=True)

    def spans(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """Start and end in the stream of all spans of some rows."""
        edges = [(self.plan.row_offsets[row], self.plan.row_offsets[row + 1]) for row in rows]
        spans = np.concatenate([np.arange(first, last) for first, last in edges])
        return list(zip(self.plan.span_start[spans].tolist(), self.plan.span_end[spans].tolist()))

    def cut(self, rows: np.ndarray) -> list[np.ndarray]:
        """Whole rows in their order, as many to a micro-batch as fit."""
        cuts, held = [], 0
        for place, size in enumerate(self.plan.row_tokens[rows].tolist()):
            if held + size > self.micro_batch_tokens:
                cuts.append(place)
                held = 0
            held += size
        return np.split(rows, cuts)

    def _pack(self, spans: list[tuple[int, int]], *, every_token: bool) -> PackedBatch:
        parts, lengths = [self.store.span(*span) for span in spans], [end - start for start, end in spans]
        tokens = np.concatenate([tokens for tokens, _ in parts]).astype(np.int64)
        asked = np.concatenate([loss_mask for _, loss_mask in parts]) | every_token
        labels = np.append(np.where(asked, tokens, IGNORE_INDEX)[1:], IGNORE_INDEX)
        labels[np.cumsum(lengths) - 1] = IGNORE_INDEX
        return PackedBatch(
            torch.from_numpy(tokens), torch.from_numpy(labels), AttentionLayout.packed(lengths)
        )


def nothing() -> PackedBatch:
    """One token that asks for nothing."""
    label = torch.tensor([IGNORE_INDEX])
    return PackedBatch(torch.zeros_like(label), label, AttentionLayout.packed([1]))


@functools.lru_cache(maxsize=2)
def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The rows in the order of an epoch, a function of its arguments alone.

    Raw bits are sorted, since a bit generator stays the same in all versions of numpy; permutations need not.
    """
    bits = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_rows)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order
