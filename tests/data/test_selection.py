"""What is decided over all rows, against a plain double of loops and dictionaries."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix.data.parts import REASONS
from phoenix.data.selection import Rows, select

SOURCES = 3
ROW = st.tuples(
    st.integers(0, 6),  # key
    st.integers(0, 3),  # prompt
    st.booleans(),  # held out
    st.sampled_from([0.0, 0.1, 0.25, 0.49, 0.5, 0.75, 0.99]),  # lot
    st.sampled_from(["kept", "kept", "kept", "kept", "empty", "too_long"]),
    st.integers(-3, 20),  # resembles the row so far before it, if above 0
)
SHARE = st.tuples(
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 2.75]),
    st.none() | st.integers(1, 8),
)


def plain(rows, source, shares, dedup, near):
    """(reason, copies, twin) of each row, decided one row at a time by what docs/prepare.md says.

    The table of filters gives the order: weight, duplicate, near_duplicate, cap.
    """
    reason, twin = [row[4] for row in rows], [-1] * len(rows)
    here = lambda: [i for i in range(len(rows)) if reason[i] == "kept"]  # noqa: E731

    def drop(i, name, of=-1):
        reason[i], twin[i] = name, of

    # "weight = 0.5 takes half of a source's rows, 2.5 each row twice and half of them once more."
    # "A held-out row is never repeated."
    copies = []
    for (_, _, held_out, lot, *_), number in zip(rows, source):
        weight = shares[number][0]
        count = math.floor(weight) + (lot < weight - math.floor(weight))
        copies.append(min(count, 1) if held_out else count)
    for i in here():
        if not copies[i]:
            drop(i, "weight")
    if dedup:
        first = {}
        for i in here():
            if first.setdefault(rows[i][0], i) != i:
                drop(i, "duplicate", first[rows[i][0]])
        trained = {}
        for i in here():
            if not rows[i][2]:
                trained.setdefault(rows[i][1], i)
        for i in here():
            if rows[i][2] and rows[i][1] in trained:
                drop(i, "duplicate", trained[rows[i][1]])
    for i, other in near(here()).items():
        drop(i, "near_duplicate", other)
    # "cap is the most rows of a source, copies counted, ...: the first ones in the order of its files."
    for number, (_, cap) in enumerate(shares):
        room = math.inf if cap is None else cap
        for i in here():
            if source[i] == number:
                copies[i] = min(copies[i], room)
                room -= copies[i]
                if not copies[i]:
                    drop(i, "cap")
    return reason, [n if name == "kept" else 0 for n, name in zip(copies, reason)], twin


def resembling(rows):
    """Rows still there -> {row: earlier one that it resembles, itself not dropped}."""

    def near(left):
        found = {}
        for place, row in enumerate(left):
            back = rows[row][5]
            if 0 < back <= place and left[place - back] not in found:
                found[row] = left[place - back]
        return found

    return near


@settings(max_examples=400, deadline=None)
@given(
    st.lists(ROW, max_size=30),
    st.randoms(use_true_random=False),
    st.tuples(*[SHARE] * SOURCES),
    st.booleans(),
    st.booleans(),
)
def test_select_decides_as_plain_loops_do(drawn, random, shares, dedup, with_near):
    source = sorted(random.randrange(SOURCES) for _ in drawn)
    columns = list(zip(*drawn)) or [()] * 6
    rows = Rows(
        np.array(source, np.int32), np.array([REASONS.index(name) for name in columns[4]], np.uint8),
        np.array(columns[0], np.uint64), np.array(columns[1], np.uint64), np.array(columns[2], bool),
        np.array(columns[3], np.float32), np.zeros(len(drawn), np.int32),
    )  # fmt: skip
    near = resembling(drawn) if with_near else lambda left: {}

    def finder(left):
        found = near(left.tolist())
        return np.array([found.get(row, -1) for row in left.tolist()], np.int64)

    twin = select(rows, shares, finder if with_near else None, dedup=dedup)
    found = [REASONS[code] for code in rows.reason], rows.copies.tolist(), twin.tolist()
    assert found == plain(drawn, source, shares, dedup, near)


def rows_of(count, held_out=False, seed=0):
    random = np.random.default_rng(seed)
    lots = random.random(count).astype(np.float32)
    keys = np.arange(count, dtype=np.uint64)
    zeros = np.zeros(count, np.int32)
    return Rows(zeros, zeros.astype(np.uint8), keys, keys, np.full(count, held_out), lots, zeros.copy())


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0, 1.3, 2.5])
def test_a_weight_takes_its_share_and_a_larger_one_holds_the_rows_of_a_smaller(weight):
    rows, more = rows_of(20_000), rows_of(20_000)
    select(rows, [(weight, None)])
    select(more, [(weight + 0.2, None)])
    assert rows.copies.mean() == pytest.approx(weight, abs=0.015)
    assert (more.copies >= rows.copies).all()
    held_out = rows_of(20_000, held_out=True)
    select(held_out, [(weight, None)])
    assert held_out.copies.max() == 1 and held_out.copies.mean() == pytest.approx(min(weight, 1), abs=0.015)


def test_a_cap_counts_copies_and_takes_the_first_rows():
    rows = rows_of(10)
    select(rows, [(2.0, 5)])
    assert rows.copies.tolist() == [2, 2, 1, *[0] * 7]
    assert [REASONS[code] for code in rows.reason] == ["kept"] * 3 + ["cap"] * 7


def test_a_row_that_is_not_drawn_takes_no_duplicate_with_it():
    """The same four texts in a source that is off and in one that is on; a held-out row beside both."""
    rows = rows_of(9)
    rows.key[:] = rows.prompt_key[:] = [0, 1, 2, 3, 0, 1, 2, 3, 0]
    rows.source[4:] = 1
    rows.held_out[8] = True
    rows.lot[:] = [0.2, 0.4, 0.6, 0.8] * 2 + [0.2]
    select(rows, [(0.0, None), (1.0, None)])
    assert [REASONS[code] for code in rows.reason] == ["weight"] * 4 + ["kept"] * 4 + ["duplicate"]
    rows.reason[:] = 0
    twin = select(rows, [(0.5, None), (1.0, None)])
    assert rows.copies.tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 0] and twin[[4, 5, 8]].tolist() == [0, 1, 0]


def test_memory_of_a_row_is_at_most_100_bytes():
    count = 200_000
    rows = rows_of(count)
    rows.prompt_key, rows.copies = rows.key // 4, rows.copies.copy()
    rows.held_out = np.random.default_rng(1).random(count) < 0.5
    own = sum(array.nbytes for array in vars(rows).values())
    tracemalloc.start()
    try:
        select(rows, [(1.5, count // 3)])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert own + peak <= 100 * count, (own / count, peak / count)
