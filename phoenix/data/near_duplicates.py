"""Rows that are nearly the same: MinHash signatures of their 5-word shingles, compared where a band is equal.

A. Broder, "On the resemblance and containment of documents", 1997; bands: J. Leskovec, A. Rajaraman and
J. Ullman, "Mining of Massive Datasets", chapter 3.  The share of equal entries of two signatures estimates
the Jaccard similarity J of two sets of shingles, with a standard deviation of sqrt(J (1 - J) / 128): 0.035
at 0.8.
"""

import functools
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
BLOCK = 2**16  # rows of signatures read at once: 32 MB


def signature(row: Row) -> np.ndarray:
    """[128] uint32: datasketch's MinHash of the 5-word shingles of all turns.

    Words as in phoenix.data.overlap: case, punctuation and Unicode form make no difference.  A row below 5
    words is one shingle.  Needs datasketch (extra `data`).
    """
    texts = [text for _, text in all_turns(row)]
    said = [word for text in texts for word in normal_words(text)] or ["\n".join(texts)]
    shingles = run_hashes(said, min(SHINGLE, len(said))) >> np.uint64(32)
    minhash = _empty().copy()
    minhash.update_batch(shingles.tolist())
    return minhash.hashvalues


def near_duplicates(signatures: np.ndarray, candidates: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows are near duplicates of an earlier one.

    signatures: [rows, 128] uint32, may be a memory map; candidates: [n] int64, the rows that are compared,
    ascending; threshold: Jaccard similarity of a pair, above 0 and at most 1.  Returns [n] int64: the earlier
    row that each is a near duplicate of, or -1.  That row may be a near duplicate of a still earlier one; the
    end of the chain is a row with -1.

    A pair counts from an estimate of half a standard deviation below the threshold on: 98 % of those at
    threshold + 0.05 do.  Memory: about 40 bytes a row beside the map.
    """
    width = max(w for w in range(1, NUM_PERM + 1) if _chance(threshold, w) >= FOUND)
    least = threshold - 0.5 * (threshold * (1 - threshold) / NUM_PERM) ** 0.5
    result = np.full(len(candidates), -1, np.int64)
    for start in range(0, NUM_PERM - width + 1, width):
        active = np.flatnonzero(result < 0)
        keys = _band_keys(signatures, candidates, active, slice(start, start + width))
        order = np.argsort(keys, kind="stable")  # rows of one key stay in their order
        keys = keys[order]
        same = keys[1:] == keys[:-1]
        grouped = np.append(same, False) | np.insert(same, 0, False)
        group, place = keys[grouped], active[order[grouped]]
        for _ in range(LEADERS):
            first = np.insert(group[1:] != group[:-1], 0, True) if len(group) else np.empty(0, bool)
            leader = place[first][np.cumsum(first) - 1][~first] if len(group) else place
            group, place = group[~first], place[~first]
            if not len(place):
                break
            alike = _estimates(signatures, candidates[place], candidates[leader]) >= least
            result[place[alike]] = candidates[leader[alike]]
            group, place = group[~alike], place[~alike]
    return result


def _chance(similarity: float, width: int) -> float:
    """That two signatures have one of the bands of that width in common."""
    return 1 - (1 - similarity**width) ** (NUM_PERM // width)


def _band_keys(signatures: np.ndarray, candidates: np.ndarray, active: np.ndarray, band: slice) -> np.ndarray:
    """[active] uint64: equal where all entries of the band are."""
    keys = np.empty(len(active), np.uint64)
    factors = np.random.RandomState(band.start).randint(0, 2**63, band.stop - band.start, np.uint64)
    for start in range(0, len(active), BLOCK):
        part = slice(start, start + BLOCK)
        values = signatures[candidates[active[part]], band].astype(np.uint64)
        keys[part] = (values * (2 * factors + 1)).sum(1)
    return keys


def _estimates(signatures: np.ndarray, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[rows] estimated Jaccard similarity of each row to the other one."""
    result = np.empty(len(rows))
    for start in range(0, len(rows), BLOCK // 8):
        part = slice(start, start + BLOCK // 8)
        result[part] = (signatures[rows[part]] == signatures[others[part]]).mean(1)
    return result


@functools.cache
def _empty() -> Any:
    """One object whose permutations all signatures share; the shingles come as hashes."""
    return require("datasketch", "data").MinHash(NUM_PERM, hashfunc=int, scheme="affine32")
