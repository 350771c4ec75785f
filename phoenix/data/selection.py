"""What is decided over all rows at once: duplicates, near duplicates, the held-out split, weights and caps.

Everything works on arrays of one entry a row, in the order of the sources, and by sorting, so that memory
stays below 100 bytes a row and the result depends on the rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phoenix.data.near_duplicates import NUM_PERM, near_duplicates
from phoenix.data.parts import REASONS, Part

BLOCK = 2**16  # rows that are looked at together where a temporary array of all would be large


@dataclass
class Rows:
    """All rows of a run.  reason and copies are what `select` decides."""

    source: np.ndarray  # [rows] int32, number of the source
    reason: np.ndarray  # [rows] uint8, an index of REASONS
    key: np.ndarray  # [rows] uint64, equal for rows of one text
    prompt_key: np.ndarray  # [rows] uint64, equal for pairs of one prompt
    held_out: np.ndarray  # [rows] bool
    lot: np.ndarray  # [rows] float32 in [0, 1), for weights
    copies: np.ndarray  # [rows] int32, how often the row is written


def gather(parts: Sequence[Part], sources: Sequence[int]) -> Rows:
    """The rows of all parts (at least one), in order; sources: number of the source of each file."""
    column = lambda name: np.concatenate([part[name] for part in parts])  # noqa: E731
    names = ("reason", "key", "prompt_key", "held_out", "lot")
    columns = {name: column(name) for name in names}
    counts = [len(part["reason"]) for part in parts]
    source = np.repeat(np.array([sources[part.file] for part in parts], np.int32), counts)
    return Rows(source, **columns, copies=np.zeros(len(source), np.int32))


def near_duplicate_finder(
    parts: Sequence[Part], folder: Path, threshold: float
) -> Callable[[np.ndarray], np.ndarray]:
    """For `select`: the signatures of all rows in one memory-mapped file in the folder, 512 bytes a row."""
    counts = [len(part["reason"]) for part in parts]
    shape = (sum(counts), NUM_PERM)
    none = np.zeros((1, NUM_PERM), np.uint32)
    with open(folder / "signatures", "wb") as file:  # a full disk is an error here, a crash of a map
        for part, count in zip(parts, counts):
            file.write(part["signature"] if part["signature"].shape[1] else none.repeat(count, 0))
    signatures = np.memmap(folder / "signatures", np.uint32, "r", shape=shape)
    return lambda rows: near_duplicates(signatures, rows, threshold)


def select(
    rows: Rows,
    shares: Sequence[tuple[float, int | None]],
    near_duplicates: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    dedup: bool = True,
) -> np.ndarray:
    """Fill in reason and copies of the rows that no filter has dropped.

    shares: (weight, cap) of each source.  near_duplicates: rows still there [n] -> the earlier row that each
    resembles, or -1.  Returns [rows] int32: the row that a duplicate or a near duplicate repeats, or -1.
    """
    twin = np.full(len(rows.reason), -1, np.int32)
    if dedup:
        left = np.flatnonzero(rows.reason == 0).astype(np.int32)
        again, first = _repeats(rows.key[left])
        _drop(rows, "duplicate", left[again])
        twin[left[again]] = left[first]
        leaks, trained = _prompts_of_training(rows)
        _drop(rows, "duplicate", leaks)
        twin[leaks] = trained
    if near_duplicates is not None:
        left = np.flatnonzero(rows.reason == 0)
        found = near_duplicates(left)
        _drop(rows, "near_duplicate", left[found >= 0])
        twin[left[found >= 0]] = found[found >= 0]
    rows.copies[:] = rows.reason == 0
    for number, (weight, cap) in enumerate(shares):
        left = np.flatnonzero((rows.reason == 0) & (rows.source == number))
        copies = int(weight) + (rows.lot[left] < weight % 1)
        copies = np.where(rows.held_out[left], np.minimum(copies, 1), copies)  # measured on, so never twice
        _drop(rows, "weight", left[copies == 0])
        left, copies = left[copies > 0], copies[copies > 0]
        if cap is not None:
            copies = np.clip(cap - (copies.cumsum() - copies), 0, copies)
            _drop(rows, "cap", left[copies == 0])
        rows.copies[left] = copies
    rows.copies[rows.reason != 0] = 0
    return twin


def _drop(rows: Rows, reason: str, which: np.ndarray) -> None:
    rows.reason[which] = REASONS.index(reason)


def _repeats(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the entries that are equal to an earlier one, and for each the index of the first such."""
    order = values.argsort(kind="stable")
    in_order = values[order]
    again = np.flatnonzero(in_order[1:] == in_order[:-1]) + 1
    begins = np.flatnonzero(np.diff(again, prepend=-1) > 1)  # each run of them follows its first entry
    first = np.repeat(again[begins] - 1, np.diff(begins, append=len(again)))
    return order[again], order[first]


def _prompts_of_training(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The held-out rows whose prompt is trained on, and for each the first row that does it."""
    held_out = np.flatnonzero((rows.reason == 0) & rows.held_out)
    wanted, of_row = np.unique(rows.prompt_key[held_out], return_inverse=True)
    owner = np.full(len(wanted), -1)
    for start in range(0, len(rows.reason) if len(wanted) else 0, BLOCK):
        block = slice(start, start + BLOCK)
        place = wanted.searchsorted(rows.prompt_key[block]).clip(max=len(wanted) - 1)
        found = (wanted[place] == rows.prompt_key[block]) & (rows.reason[block] == 0) & ~rows.held_out[block]
        new, first = np.unique(place[found], return_index=True)
        row = start + np.flatnonzero(found)[first]
        owner[new] = np.where(owner[new] < 0, row, owner[new])
    leaks = owner[of_row] >= 0
    return held_out[leaks], owner[of_row][leaks]
