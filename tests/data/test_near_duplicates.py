import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from phoenix.data.formats import Conversation, PreferencePair, Text
from phoenix.data.near_duplicates import NUM_PERM, near_duplicates, signature

pytest.importorskip("datasketch")
SAMPLE = Path(__file__).parents[2] / "recipes" / "sample"
LEVELS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def plain(text):
    return Text(text, "x", None, 1)


def turns(*contents):
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents))


def jaccard(one, other):
    one, other = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one, other))
    return len(one & other) / len(one | other)


def vocabulary():
    rows = map(json.loads, (SAMPLE / "summaries.jsonl").read_text().splitlines())
    return [word for row in rows for turn in row["messages"] for word in turn["content"].split()]


def planted(level, number, seed):
    """`number` pairs of texts of 300 words whose shingles have that Jaccard similarity, to 0.01."""
    drawn, vocabulary_, pairs = random.Random(seed), [w.lower() for w in vocabulary() if w.isalpha()], []
    while len(pairs) < number:
        one = drawn.choices(vocabulary_, k=300)
        changes = drawn.randint(0, 8)  # single words here and there, then the end until it is unlike enough
        other = one.copy()
        for place in drawn.sample(range(250), changes):
            other[place] = drawn.choice(vocabulary_)
        end = len(other)
        while jaccard(one, other) > level + 0.01 and end > 0:
            end -= 1
            other[end] = drawn.choice(vocabulary_)
        if abs(jaccard(one, other) - level) <= 0.01:
            pairs.append((" ".join(one), " ".join(other)))
    return pairs


def test_pairs_of_known_similarity_are_found_from_the_threshold_on():
    found, number = {}, 60
    for level in LEVELS:
        pairs = planted(level, number, seed=int(100 * level))
        signatures = np.stack([signature(plain(text)) for pair in zip(*pairs) for text in pair])
        result = near_duplicates(signatures, np.arange(2 * number), 0.8)
        assert (result[:number] == -1).all()
        assert set(result[number:] - np.arange(number)) <= {0, *(-1 - np.arange(number))}  # its own, or none
        found[level] = (result[number:] >= 0).mean()
    assert min(found[0.85], found[0.9], found[0.95]) >= 0.95, found
    assert max(found[0.5], found[0.6], found[0.7]) <= 0.05, found


def test_equal_entries_estimate_the_similarity():
    for level in (0.5, 0.8):
        pairs = planted(level, 40, seed=1)
        estimates = [(signature(plain(a)) == signature(plain(b))).mean() for a, b in pairs]
        assert np.mean(estimates) == pytest.approx(level, abs=0.03)  # 0.007 is a standard deviation
        assert np.std(estimates) < 2 * (level * (1 - level) / NUM_PERM) ** 0.5


def test_form_makes_no_difference_and_short_rows_are_compared_whole():
    same = (
        plain("Größe der Straße: drei Meter, sagt er."),
        plain("GRO\u0308SSE der\nSTRASSE - drei_Meter; sagt er!"),
    )
    assert (signature(same[0]) == signature(same[1])).all()
    chat = Conversation(turns("Größe der Straße?", "Drei Meter, sagt er."), "x", None, 1)
    assert (signature(chat) == signature(same[0])).all()
    pair = PreferencePair(turns("eins zwei drei"), turns("", "vier")[1:], turns("", "fünf")[1:], "x", None, 1)
    assert (signature(pair) == signature(plain("eins zwei drei vier fünf"))).all()
    short = [signature(plain(text)) for text in ("Hallo!", "hallo", "Hallo du", "🙂", "?", "…", "?")]
    result = near_duplicates(np.stack(short), np.arange(7), 0.8)
    assert result.tolist() == [-1, 0, -1, -1, -1, -1, 4]


def test_every_process_computes_the_same():
    script = (
        "from phoenix.data.formats import Text\nfrom phoenix.data.near_duplicates import signature\n"
        "print(signature(Text('Wie groß ist der Turm in der Mitte?', 'x', None, 1)).tolist())"
    )
    here = signature(plain("Wie groß ist der Turm in der Mitte?"))
    assert here.dtype == np.uint32 and here.shape == (NUM_PERM,)
    for seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(SAMPLE.parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, check=True
        )
        assert json.loads(done.stdout) == here.tolist()


def copies(signatures, of, share, seed):
    """Signatures that agree with row `of` in exactly that share of the entries."""
    drawn = np.random.default_rng(seed)
    result = drawn.integers(0, 2**32, NUM_PERM, np.uint32)
    kept = drawn.permutation(NUM_PERM)[: round(share * NUM_PERM)]
    result[kept] = signatures[of][kept]
    return result


def test_a_dropped_row_is_like_an_earlier_row_that_stays():
    rows = np.random.default_rng(3).integers(0, 2**32, (3000, NUM_PERM), np.uint32)
    for row in range(1000, 3000):  # chains, each link of which is above the threshold, and the whole below
        rows[row] = copies(rows, row - 1000, 0.85 if row % 2 else 0.97, seed=row)
    result = near_duplicates(rows, np.arange(3000), 0.8)
    dropped = np.flatnonzero(result >= 0)
    assert (result[dropped] < dropped).all() and (result[result[dropped]] == -1).all()
    assert (rows[dropped] == rows[result[dropped]]).mean(1).min() > 0.78
    assert (result[:1000] == -1).all() and (result[1000:2000] >= 0).mean() > 0.95
    assert (result[2000:][::2] == np.arange(1000)[::2]).mean() > 0.95  # 0.94 alike at both ends
    assert (result[2000:][1::2] == -1).mean() > 0.5  # 0.72 alike at both ends


def test_only_candidates_are_compared_and_named_by_their_row():
    rows = np.random.default_rng(4).integers(0, 2**32, (50, NUM_PERM), np.uint32)
    rows[[7, 30, 41]] = rows[3]
    candidates = np.array([1, 7, 8, 30, 41, 49])
    assert near_duplicates(rows, candidates, 0.8).tolist() == [-1, -1, -1, 7, 7, -1]
    assert near_duplicates(rows, candidates[:0], 0.8).tolist() == []
    assert near_duplicates(rows, candidates[:1], 0.8).tolist() == [-1]
    rows[8, 0] += 1
    assert near_duplicates(rows, candidates, 1.0).tolist() == [-1, -1, -1, 7, 7, -1]


def test_one_cluster_of_all_rows_costs_no_more_than_its_size():
    rows = np.tile(np.random.default_rng(5).integers(0, 2**32, NUM_PERM, np.uint32), (50_000, 1))
    result = near_duplicates(rows, np.arange(len(rows)), 0.8)
    assert result[0] == -1 and (result[1:] == 0).all()


def test_a_row_that_comes_free_is_compared_with_those_that_stay():
    """c is like b and d; b goes for a, which is unlike c: c must still go for d."""
    rows = np.random.default_rng(7).integers(0, 2**32, (4, NUM_PERM), np.uint32)
    a, d, b, c = rows
    c[16:] = d[16:]  # the first bands, which are looked at first, are those of b
    b[:-24] = c[:-24]
    a[24:] = b[24:]
    least = lambda one, other: (one == other).mean() > 0.8  # noqa: E731
    assert least(c, d) and least(c, b) and least(a, b) and not (least(a, c) or least(a, d) or least(b, d))
    assert near_duplicates(rows, np.arange(4), 0.8).tolist() == [-1, -1, 0, 1]


@pytest.mark.parametrize("share_a_band", [False, True])
def test_memory_beside_the_signatures_is_below_60_bytes_a_row(share_a_band, tmp_path):
    number, drawn = 300_000, np.random.default_rng(6)
    made = drawn.integers(0, 2**32, (number, NUM_PERM), np.uint32)
    if share_a_band:
        made[:, :8] = made[0, :8]
    np.save(tmp_path / "s.npy", made)
    signatures = np.load(tmp_path / "s.npy", mmap_mode="r")
    candidates = np.arange(number)
    tracemalloc.start()
    try:
        near_duplicates(signatures, candidates, 0.8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak + candidates.nbytes < 60 * number
