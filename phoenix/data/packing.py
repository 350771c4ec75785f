"""Documents -> rows of at most `max_length` tokens, planned once from the documents' lengths.

A plan names places in a split's stream of tokens: all documents one behind the other in the store's order.
A row is a list of spans [start, end) of that stream, and each span is a segment of its own: with `bfd` a span
is a document, with `wrapped` it is a whole row.

    lengths 3 1 4, max_length 5      bfd       row 0: [3, 4) [4, 8)   row 1: [0, 3)
                                     wrapped   row 0: [0, 5)          the tail [5, 8) is dropped
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from phoenix.data.store import TokenStore
from phoenix.files import UserError


@dataclass(frozen=True)
class Plan:
    """Row i holds the spans row_offsets[i] : row_offsets[i + 1]; all arrays are int64."""

    span_start: np.ndarray  # [spans]
    span_end: np.ndarray  # [spans]
    row_offsets: np.ndarray  # [rows + 1]
    row_tokens: np.ndarray  # [rows]
    row_targets: np.ndarray  # [rows], how many labels each row has
    max_length: int
    assistant_only_loss: bool

    def __len__(self) -> int:
        return len(self.row_tokens)

    @property
    def num_tokens(self) -> int:
        return int(self.row_tokens.sum())

    @property
    def fill_rate(self) -> float:
        """Share of the rows' room that holds tokens."""
        return self.num_tokens / (len(self) * self.max_length)


def make_plan(
    store: TokenStore, max_length: int, packing_strategy: str = "bfd", assistant_only_loss: bool = True
) -> Plan:
    """The rows of a split.  Labels are the tokens with a loss but for a span's first: nothing predicts it.

    assistant_only_loss=False: every token has a loss.  Raises UserError for a document above max_length
    (bfd), a stream below it (wrapped), or if no token at all has a loss.
    """
    start, end, row_offsets = PACKING[packing_strategy](store.lengths, max_length)
    second = np.minimum(start + 1, end)
    targets = end - second
    if assistant_only_loss:
        until = _count_before(store.loss_masks(), np.concatenate([second, end]))
        targets = until[len(start) :] - until[: len(start)]
    row_tokens, row_targets = (np.add.reduceat(x, row_offsets[:-1]) for x in (end - start, targets))
    if row_targets.sum() == 0:
        raise UserError(f"{store.folder}: no token has a loss; prepare it again with rows that have answers")
    return Plan(start, end, row_offsets, row_tokens, row_targets, max_length, assistant_only_loss)


def pack_documents(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best-fit decreasing: the longest document first, each into the row where it leaves the least room.

    lengths [documents] -> span_start, span_end, row_offsets of a Plan.  No document is cut: one above
    max_length raises UserError.  Documents of one length are placed together, so that a million take a
    second; among them the store's order decides.
    """
    if lengths.max() > max_length:
        raise UserError(
            f"{(lengths > max_length).sum()} documents are longer than max_length={max_length} (the longest: "
            f"{lengths.max()} tokens); raise max_length, or prepare the store with this one"
        )
    order = np.argsort(-lengths, kind="stable")
    row_of, rows = np.empty(len(lengths), np.int64), _OpenRows(max_length)
    for group in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        while len(group):
            placed = rows.place(int(lengths[group[0]]), len(group))
            row_of[group[: len(placed)]] = placed
            group = group[len(placed) :]
    order, end = np.argsort(row_of, kind="stable"), lengths.cumsum()
    row_offsets = np.concatenate([[0], np.bincount(row_of).cumsum()])
    return (end - lengths)[order], end[order], row_offsets


def wrap_documents(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole stream cut every max_length tokens, whatever document ends there; the tail is dropped.

    So did TRL 0.7.4, with which the paper's models were made.  A row is one segment: its positions and its
    attention run across documents.
    """
    total = int(lengths.sum())
    if total < max_length:
        raise UserError(
            f"the store holds {total} tokens, less than a row of max_length={max_length}; lower it"
        )
    start = np.arange(total // max_length, dtype=np.int64) * max_length
    return start, start + max_length, np.arange(len(start) + 1)


class _OpenRows:
    """Rows with room left, found by the room."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.num_rows = max_length, 0
        self.rooms: list[int] = []  # ascending, each once
        self.rows: dict[int, list[np.ndarray]] = {}

    def place(self, length: int, count: int) -> np.ndarray:
        """Rows for the first of `count` documents of one length: as many as fit the tightest rows, >= 1."""
        at = bisect_left(self.rooms, length)
        room = self.rooms.pop(at) if at < len(self.rooms) else self.max_length
        each = room // length  # a row that took one is the tightest for the next, until it is full
        needed = -(-count // each)
        if room in self.rows:
            rows = np.concatenate(self.rows.pop(room))
        else:
            rows = np.arange(self.num_rows, self.num_rows + needed)
            self.num_rows += needed
        placed = np.repeat(rows[:needed], each)[:count]
        full = len(placed) // each
        self._keep(room - each * length, rows[:full])
        self._keep(room - len(placed) % each * length, rows[full:needed])
        self._keep(room, rows[needed:])
        return placed

    def _keep(self, room: int, rows: np.ndarray) -> None:
        if room and len(rows):
            if room not in self.rows:
                insort(self.rooms, room)
            self.rows.setdefault(room, []).append(rows)


def _count_before(masks: Iterable[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """How many True stand before each position of the joined masks; one mask at a time is in memory."""
    order = np.argsort(positions, kind="stable")
    ascending, counts = positions[order], np.zeros(len(positions), np.int64)
    base = total = 0
    for mask in masks:
        running = np.cumsum(mask, dtype=np.int64)
        first, last = np.searchsorted(ascending, [base, base + len(mask)], side="right")
        counts[order[first:last]] = total + running[ascending[first:last] - base - 1]
        base, total = base + len(mask), total + int(running[-1])
    return counts


PACKING = {"bfd": pack_documents, "wrapped": wrap_documents}
