"""Index arithmetic of the layouts, against masks drawn by loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phoenix.model.cache import KVCache
from phoenix.model.layout import AttentionLayout, PackedBatch, segment_sum
from phoenix.model.mistral import MistralConfig

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def seen_keys(layout) -> list[set[int]]:
    """The key rows that each query row may see, as the docstring of layout.py says."""
    rows = []
    for length, starts, counts in zip(layout.q_length, layout.k_start, layout.k_length):
        keys = [int(start) + i for start, count in zip(starts, counts) for i in range(int(count))]
        for query in range(int(length)):
            rows.append(set(keys[: len(keys) - int(length) + query + 1]))
    return rows


def check_consistent(layout):
    t = layout.num_tokens
    assert layout.positions.shape == (t,) and layout.positions.dtype == torch.int64
    assert layout.cu_seqlens_q.dtype == layout.cu_seqlens_k.dtype == torch.int32
    assert layout.cu_seqlens_q.tolist() == [0, *layout.q_length.cumsum(0).tolist()]
    assert layout.cu_seqlens_k.tolist() == [0, *layout.k_length.sum(1).cumsum(0).tolist()]
    assert int(layout.cu_seqlens_q[-1]) == t
    assert layout.max_q == max(layout.q_length.tolist())
    assert layout.max_k == max(sum(counts) for counts in layout.k_length.tolist())
    assert layout.k_start.shape == layout.k_length.shape


@given(LENGTHS)
def test_packed_documents_see_themselves_alone(lengths):
    layout = AttentionLayout.packed(lengths)
    check_consistent(layout)
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    expected = [
        {j for j in range(len(document)) if document[j] == document[i] and j <= i}
        for i in range(len(document))
    ]
    assert seen_keys(layout) == expected
    assert layout.positions.tolist() == [i for length in lengths for i in range(length)]


@given(st.integers(1, 6), LENGTHS)
def test_a_shared_prefix_is_each_answer_behind_the_whole_prefix(prefix, answers):
    layout = AttentionLayout.shared_prefix(prefix, answers)
    check_consistent(layout)
    # What each row of the stream holds: a token of the prefix, or of an answer.
    stream = [("prefix", i) for i in range(prefix)] + [(0, i) for i in range(answers[0])]
    for number, length in enumerate(answers[1:], 1):
        stream += [("prefix", prefix - 1)] + [(number, i) for i in range(length)]
    assert layout.num_tokens == len(stream)
    rows, row = seen_keys(layout), 0
    for number, length in enumerate(answers):
        alone = [("prefix", i) for i in range(prefix)] + [(number, i) for i in range(length)]
        first = 0 if number == 0 else prefix - 1
        for position in range(first, len(alone)):
            assert stream[row] == alone[position] and layout.positions[row] == position
            assert sorted(map(str, (stream[key] for key in rows[row]))) == sorted(
                map(str, alone[: position + 1])
            )
            assert len(rows[row]) == position + 1
            row += 1


def small_cache(num_slots: int, room: int) -> KVCache:
    config = MistralConfig(num_hidden_layers=1, num_key_value_heads=1, head_dim=2)
    return KVCache(config, num_slots, room, dtype=torch.float32, device="cpu")


@given(st.permutations(range(4)), st.lists(st.integers(0, 5), min_size=4, max_size=4), LENGTHS)
def test_new_tokens_see_what_their_slot_holds(slots, held, lengths):
    cache, lengths = small_cache(4, 16), lengths[:4]
    cache.lengths[:] = torch.tensor(held)
    slots = slots[: len(lengths)]
    layout = AttentionLayout.prefill(lengths, cache, slots)
    check_consistent(layout)
    positions = [held[slot] + i for slot, length in zip(slots, lengths) for i in range(length)]
    owner = [slot for slot, length in zip(slots, lengths) for _ in range(length)]
    assert layout.positions.tolist() == positions
    assert layout.cache_rows.tolist() == [16 * slot + position for slot, position in zip(owner, positions)]
    for slot, position, seen in zip(owner, positions, seen_keys(layout)):
        assert seen == {16 * slot + i for i in range(position + 1)}
    cache.advance(slots, lengths)
    assert cache.lengths.tolist() == [
        held[slot] + (lengths[slots.index(slot)] if slot in slots else 0) for slot in range(4)
    ]


def test_decode_is_a_prefill_of_one_token_each():
    cache = small_cache(3, 8)
    cache.advance([0, 2], [4, 7])
    layout = AttentionLayout.decode(cache, [2, 0])
    assert layout.positions.tolist() == [7, 4] and layout.cache_rows.tolist() == [23, 4]
    cache.advance([2, 0], 1)
    assert cache.lengths.tolist() == [5, 0, 8]
    cache.free([2])
    assert cache.lengths.tolist() == [5, 0, 0]


@pytest.mark.parametrize("lengths", [[], [0], [3, -1], [[1, 2]]])
def test_lengths_below_one_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be a list of numbers >= 1, got"):
        AttentionLayout.packed(lengths)
    with pytest.raises(ValueError, match="lengths must be"):
        AttentionLayout.shared_prefix(2, lengths)
    with pytest.raises(ValueError, match="lengths must be"):
        AttentionLayout.prefill(lengths, small_cache(2, 8), [0] * len(lengths))


def test_a_prefix_without_a_token_is_refused():
    with pytest.raises(ValueError, match="lengths must be"):
        AttentionLayout.shared_prefix(0, [1])


@pytest.mark.parametrize(
    "lengths, slots, message",
    [
        ([9], [0], "9 tokens in a slot of the cache with room for 8"),
        ([1, 6], [0, 1], "9 tokens in a slot"),
        (
            [1, 1],
            [0, 0],
            r"slots must be different numbers from 0 to 1, one for each of 2 lengths, got \[0, 0\]",
        ),
        ([1, 1], [0, 0, 1], "slots must be"),
        ([1], [2], "slots must be"),
        ([1], [-1], "slots must be"),
        ([1, 1], [0], "slots must be"),
    ],
)
def test_what_does_not_fit_into_the_cache_is_refused(lengths, slots, message):
    cache = small_cache(2, 8)
    cache.advance([1], 3)
    with pytest.raises(ValueError, match=message):
        AttentionLayout.prefill(lengths, cache, slots)


def test_a_batch_has_one_shape():
    layout = AttentionLayout.packed([2, 1])
    tokens = torch.zeros(3, dtype=torch.int64)
    PackedBatch(tokens, tokens, layout)
    for other in (tokens[:2], tokens[None]):
        with pytest.raises(ValueError, match=r"one shape \[t\], got"):
            PackedBatch(tokens, other, layout)
        with pytest.raises(ValueError, match=r"one shape \[t\], got"):
            PackedBatch(other, other, layout)


@given(LENGTHS)
def test_segment_sum_adds_up_each_segment(lengths):
    values = torch.randn(sum(lengths), dtype=torch.float64)
    sums = segment_sum(values, AttentionLayout.packed(lengths))
    expected, start = [], 0
    for length in lengths:
        expected.append(sum(values[start : start + length].tolist()))
        start += length
    torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64))


def test_segment_sum_does_not_lose_small_values_in_bf16():
    values = torch.ones(1000, dtype=torch.bfloat16)
    assert segment_sum(values, AttentionLayout.packed([1000])).item() == 1000
