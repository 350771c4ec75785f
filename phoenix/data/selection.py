"""What is decided over all rows at once: duplicates, near duplicates, the held-out split, weights and caps.

Everything works on arrays of one entry a row, in the order of the sources, and by sorting, so that memory
stays below 100 bytes a row and the result depends on the rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from phoenix.data.near_duplicates import NUM_PERM, near_duplicates
from phoenix.data.parts import REASONS, Part


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
    signatures = np.lib.format.open_memmap(folder / "signatures.npy", "w+", np.uint32, shape=shape)
    for part, end, count in zip(parts, accumulate(counts), counts):
        if (values := part["signature"]).shape[1]:
            signatures[end - count : end] = values
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
    resembles, or -1.  Returns [rows] int64: the row that a duplicate or a near duplicate repeats, or -1.
    """
    twin = np.full(len(rows.reason), -1)
    if dedup:
        left = np.flatnonzero(rows.reason == 0)
        first = left[_first_of_equals(rows.key[left])]
        _drop(rows, "duplicate", left[first != left])
        twin[left] = np.where(first != left, first, -1)
        left = np.flatnonzero((rows.reason == 0) & rows.held_out)
        trained = np.flatnonzero((rows.reason == 0) & ~rows.held_out)
        owner = _find(rows.prompt_key[trained], rows.prompt_key[left])
        leaks = left[owner >= 0]
        _drop(rows, "duplicate", leaks)
        twin[leaks] = trained[owner[owner >= 0]]
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


def _first_of_equals(values: np.ndarray) -> np.ndarray:
    """[n] -> [n] index of the first entry that is equal to each."""
    order = values.argsort(kind="stable")
    is_first = np.r_[True, values[order][1:] != values[order][:-1]][: len(values)]
    result = np.empty(len(values), np.int64)
    result[order] = np.maximum.accumulate(np.where(is_first, np.arange(len(values)), 0))
    result[order] = order[result[order]]
    return result


def _find(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """[m] index in values [n] of the first entry that is equal to each wanted one, or -1."""
    if not len(values):
        return np.full(len(wanted), -1)
    order = values.argsort(kind="stable")
    place = np.searchsorted(values[order], wanted).clip(max=len(values) - 1)
    return np.where(values[order[place]] == wanted, order[place], -1)
