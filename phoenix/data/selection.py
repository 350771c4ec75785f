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

    Weights come first: a row that is not drawn takes no duplicate with it.  Caps come last, as they count
    rows that are written.
    """
    twin = np.full(len(rows.reason), -1, np.int32)
    weights = np.array([weight for weight, _ in shares])
    rows.copies[:] = (weights // 1)[rows.source] + (rows.lot < (weights % 1)[rows.source])
    rows.copies[rows.held_out] = rows.copies[rows.held_out].clip(max=1)  # measured on, so never twice
    _drop(rows, "weight", np.flatnonzero((rows.reason == 0) & (rows.copies == 0)))
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
    rows.copies[rows.reason != 0] = 0
    for number, (_, cap) in enumerate(shares):
        if cap is not None:
            left = np.flatnonzero((rows.reason == 0) & (rows.source == number))
            copies = rows.copies[left]
            rows.copies[left] = np.clip(cap - (copies.cumsum() - copies), 0, copies)
            _drop(rows, "cap", left[rows.copies[left] == 0])
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
    there = rows.reason == 0
    order = np.concatenate([np.flatnonzero(there & ~rows.held_out), np.flatnonzero(there & rows.held_out)])
    again, first = (order[found] for found in _repeats(rows.prompt_key[order]))  # trained rows come first
    leaks = rows.held_out[again] & ~rows.held_out[first]
    return again[leaks], first[leaks]
