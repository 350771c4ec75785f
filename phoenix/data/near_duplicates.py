"""Rows that are nearly the same: MinHash signatures of their 5-word shingles, compared where a band is equal.

A. Broder, "On the resemblance and containment of documents", 1997; bands: J. Leskovec, A. Rajaraman and
J. Ullman, "Mining of Massive Datasets", chapter 3.  The share of equal entries of two signatures estimates
the Jaccard similarity J of two sets of shingles, with a standard deviation of sqrt(J (1 - J) / 128): 0.035
at 0.8.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from phoenix.data.filters import all_turns
from phoenix.data.formats import Row
from phoenix.data.overlap import normal_words, run_hashes
from phoenix.files import require

NUM_PERM = 128
SHINGLE = 5  # words
FOUND = 0.98  # of the pairs at the threshold have an equal band
LEADERS = 16  # rows of a band's group that the others are compared with
BLOCK = 2**12  # rows of signatures that are read at once: 2 MB


def signature(row: Row) -> np.ndarray:
    """[128] uint32: datasketch's MinHash of the 5-word shingles of all turns.

    Words as in phoenix.data.overlap: case, punctuation and Unicode form make no difference.  A row below 5
    words is one shingle.  Needs datasketch (extra `data`).
    """
    texts = [text for _, text in all_turns(row)]
    said = [word for text in texts for word in normal_words(text)] or ["\n".join(texts)]
    shingles = run_hashes(said, [min(SHINGLE, len(said))]) >> np.uint64(32)
    minhash = _empty().copy()
    minhash.update_batch(shingles.tolist())
    return minhash.hashvalues


def near_duplicates(signatures: np.ndarray, candidates: np.ndarray, threshold: float) -> np.ndarray:
    """The earlier row, itself none of them, that each row is a near duplicate of.

    signatures: [rows, 128] uint32, may be a memory map; candidates: [n] int64, ascending, the rows that are
    compared; threshold: Jaccard similarity, above 0 and at most 1.  Returns [n] int64: a row of `candidates`
    whose own entry is -1, or -1.

    A pair counts from an estimate of half a standard deviation below the threshold on, so that 98 % of the
    pairs of 0.85 are found at 0.8.  In a group of more than 16 unlike rows that share a band a pair may stay.
    Memory: below 60 bytes a row beside the map, candidates counted, however many share a band.
    """
    width = max((w for w in range(1, NUM_PERM + 1) if _chance(threshold, w) >= FOUND), default=1)
    least = threshold - 0.5 * (threshold * (1 - threshold) / NUM_PERM) ** 0.5
    row = lambda place, entries=slice(None): signatures[candidates[place], entries]  # noqa: E731
    alike = _in_blocks(lambda place, other: (row(place) == row(other)).mean(1) >= least)
    found = np.full(len(candidates), -1, np.int32)  # places in candidates
    freed = len(found) > 0
    while freed:
        for start in range(0, NUM_PERM - width + 1, width):
            key = _in_blocks(lambda place: _keys(row(place, slice(start, start + width)), start))  # noqa: B023
            _match(found, key, alike)
        # A row whose partner has been dropped for a third one is dropped only if it is like that one, too;
        # if not, it is compared with all that are left once more.
        freed = False
        for place in np.flatnonzero((found >= 0) & (found[found] >= 0)):
            if (third := found[found[place]]) >= 0:
                found[place] = third if alike(*np.array([[place], [third]]))[0] else -1
                freed |= found[place] < 0
    return np.where(found < 0, -1, candidates[found]) if len(found) else found.astype(np.int64)


def _match(found: np.ndarray, key: Callable, alike: Callable) -> None:
    """Fill in `found` of the places that resemble an earlier one of the same key."""
    place = np.flatnonzero(found < 0).astype(np.int32)
    keys = key(place)
    order = np.argsort(keys, kind="stable")  # rows of one key stay in their order
    keys, place = keys[order], place[order]
    del order
    for _ in range(LEADERS):
        first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
        leader = place[first].repeat(np.diff(np.flatnonzero(first), append=len(keys)) - 1)
        keys, place = keys[~first], place[~first]
        same = alike(place, leader)
        found[place[same]] = leader[same]
        keys, place = keys[~same], place[~same]


def _in_blocks(compute: Callable) -> Callable:
    """The function of arrays of one length, called with BLOCK entries at once, since it reads signatures."""
    return lambda *arrays: np.concatenate(
        [compute(*(a[i : i + BLOCK] for a in arrays)) for i in range(0, len(arrays[0]) or 1, BLOCK)]
    )


def _chance(similarity: float, width: int) -> float:
    """That two signatures have one of the bands of that width in common."""
    return 1 - (1 - similarity**width) ** (NUM_PERM // width)


def _keys(entries: np.ndarray, seed: int) -> np.ndarray:
    """[rows, n] -> [rows] uint64: equal where all entries of two rows are."""
    factors = np.random.RandomState(seed).randint(0, 2**63, entries.shape[1], np.uint64)
    return (entries.astype(np.uint64) * (2 * factors + 1)).sum(1)


@functools.cache
def _empty() -> Any:
    """One object whose permutations all signatures share; the shingles come as hashes."""
    return require("datasketch", "data").MinHash(NUM_PERM, hashfunc=int, scheme="affine32")
