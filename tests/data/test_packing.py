import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix.data.packing import PACKING, make_plan, pack_documents
from phoenix.files import UserError


def best_fit_decreasing(lengths, max_length):
    """The textbook's way: each document, longest first, into the fullest row that has room."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= max_length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def rows_of(start, end, row_offsets):
    return [list(zip(start[a:b], end[a:b])) for a, b in zip(row_offsets, row_offsets[1:])]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=80), st.integers(20, 45))
def test_packing_is_best_fit_decreasing_and_holds_every_document_once(lengths, max_length):
    lengths = np.array(lengths)
    start, end, row_offsets = pack_documents(lengths, max_length)
    rows = rows_of(start, end, row_offsets)
    edges = np.concatenate([[0], lengths.cumsum()])
    assert sorted(zip(start, end)) == list(zip(edges, edges[1:]))
    assert all(sum(b - a for a, b in row) <= max_length for row in rows)
    # Which of two equally full rows takes a document is free; how full the rows become is not.
    fullness = sorted(sum(int(b - a) for a, b in row) for row in rows)
    assert fullness == sorted(map(sum, best_fit_decreasing(lengths.tolist(), max_length)))
    again = pack_documents(lengths, max_length)
    assert all(np.array_equal(x, y) for x, y in zip((start, end, row_offsets), again))


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 40))
def test_wrapped_rows_are_the_stream_without_its_tail(lengths, max_length):
    total = sum(lengths)
    if total < max_length:
        with pytest.raises(UserError, match=f"{total} tokens"):
            PACKING["wrapped"](np.array(lengths), max_length)
        return
    rows = rows_of(*PACKING["wrapped"](np.array(lengths), max_length))
    assert rows == [[(i * max_length, (i + 1) * max_length)] for i in range(total // max_length)]


@pytest.mark.parametrize("strategy", PACKING)
@pytest.mark.parametrize("assistant_only_loss", [True, False])
@pytest.mark.parametrize("shard_tokens", [1, 30, 10_000])
def test_a_plan_counts_tokens_and_labels(make_store, strategy, assistant_only_loss, shard_tokens):
    store, documents = make_store([1, 7, 3, 16, 1, 9, 2, 5, 5, 8], shard_tokens)
    plan = make_plan(store, 16, strategy, assistant_only_loss)
    mask = np.concatenate([mask for _, mask in documents]) | (not assistant_only_loss)
    rows = rows_of(plan.span_start, plan.span_end, plan.row_offsets)
    assert plan.row_targets.tolist() == [sum(mask[a + 1 : b].sum() for a, b in row) for row in rows]
    assert plan.row_tokens.tolist() == [sum(b - a for a, b in row) for row in rows]
    assert len(plan) == len(rows) and plan.num_tokens == plan.row_tokens.sum()
    assert plan.fill_rate == pytest.approx(plan.num_tokens / (16 * len(rows)))


def test_what_cannot_be_packed_is_a_sentence(make_store):
    store, _ = make_store([5, 20, 30, 3])
    with pytest.raises(UserError, match=r"2 documents .*max_length=16 .*longest: 30"):
        make_plan(store, 16)
    store, _ = make_store([1, 1])
    with pytest.raises(UserError, match="no token has a loss"):
        make_plan(store, 16)


def test_a_million_documents_are_packed_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.9, 1_000_000), 5, 2048).astype(np.int64)
    start, end, row_offsets = pack_documents(lengths, 2048)
    assert (end - start).sum() == lengths.sum()
    assert lengths.sum() / (2048 * (len(row_offsets) - 1)) > 0.99
