"""What is decided over all rows, against a plain double of loops and dictionaries."""

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
    """(reason, copies, twin) of each row, decided one row at a time."""
    reason, copies, twin = [row[4] for row in rows], [0] * len(rows), [-1] * len(rows)

    def drop(i, name, of=-1):
        reason[i], twin[i] = name, of

    if dedup:
        first = {}
        for i, (key, *_) in enumerate(rows):
            if reason[i] == "kept" and first.setdefault(key, i) != i:
                drop(i, "duplicate", first[key])
        trained = {}
        for i, (_, prompt, held_out, *_) in enumerate(rows):
            if reason[i] == "kept" and not held_out:
                trained.setdefault(prompt, i)
        for i, (_, prompt, held_out, *_) in enumerate(rows):
            if reason[i] == "kept" and held_out and prompt in trained:
                drop(i, "duplicate", trained[prompt])
    for i, other in near([i for i in range(len(rows)) if reason[i] == "kept"]).items():
        drop(i, "near_duplicate", other)
    taken = [0] * SOURCES
    for i, (_, _, held_out, lot, *_) in enumerate(rows):
        if reason[i] != "kept":
            continue
        weight, cap = shares[source[i]]
        count = int(weight) + (1 if lot < weight - int(weight) else 0)
        count = min(count, 1) if held_out else count
        room = float("inf") if cap is None else cap - taken[source[i]]
        if count == 0 or room <= 0:
            drop(i, "weight" if count == 0 else "cap")
        else:
            copies[i] = int(min(count, room))
            taken[source[i]] += copies[i]
    return reason, copies, twin


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
