import itertools

import numpy as np
import pytest
import torch

from phoenix.data.loader import Loader, row_order
from phoenix.data.packing import PACKING, make_plan
from phoenix.files import UserError

LENGTHS = [5, 1, 16, 3, 9, 2, 7, 7, 12, 4, 1, 8, 16, 6, 3, 10, 2, 11]


def make_loader(make_store, strategy="bfd", assistant_only_loss=True, **options):
    store, documents = make_store(LENGTHS, shard_tokens=40)
    plan = make_plan(store, 16, strategy, assistant_only_loss)
    options = {"seed": 7, "global_batch_size": 3, "micro_batch_tokens": 20} | options
    return Loader(store, plan, **options), documents


def shared(batch, world_size):
    """All micro-batches of a batch by index, as the ranks get them."""
    shares = [list(batch.share(rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "every rank must have equally many"
    return dict(itertools.chain(*shares))


def same(one, other):
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "labels")
    ) and torch.equal(one.layout.q_length, other.layout.q_length)


@pytest.mark.parametrize("strategy", PACKING)
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(make_store, strategy):
    loader, _ = make_loader(make_store, strategy)
    for step in range(2 * loader.steps_per_epoch):
        batch = loader.global_batch(step)
        alone = shared(batch, 1)
        assert sorted(alone) == list(range(len(batch.micro_batches)))
        for world_size in (2, 3, 4):
            ranks = shared(batch, world_size)
            assert all(same(ranks[index], micro) for index, micro in alone.items())
            for index in set(ranks) - set(alone):
                assert ranks[index].tokens.shape == (1,) and ranks[index].labels.tolist() == [-100]


@pytest.mark.parametrize("strategy", PACKING)
@pytest.mark.parametrize("global_batch_size", [1, 3, 100])
def test_an_epoch_holds_every_row_once_and_epochs_differ(make_store, strategy, global_batch_size):
    loader, _ = make_loader(make_store, strategy, global_batch_size=global_batch_size)
    steps, rows = loader.steps_per_epoch, len(loader.plan)
    assert steps == -(-rows // min(global_batch_size, rows))
    orders = []
    for epoch in range(2):
        batches = [loader.global_batch(epoch * steps + step) for step in range(steps)]
        assert [len(batch.rows) for batch in batches[:-1]] == [global_batch_size] * (steps - 1)
        assert batches[-1].epoch == epoch + 1
        orders.append([row for batch in batches for row in batch.rows])
        assert sorted(orders[-1]) == list(range(rows))
    assert orders[0] != orders[1]


def test_every_document_is_trained_once_an_epoch_with_its_own_labels(make_store):
    for assistant_only_loss in (True, False):
        loader, documents = make_loader(make_store, "bfd", assistant_only_loss)
        found = []
        for step in range(loader.steps_per_epoch):
            for micro in shared(loader.global_batch(step), 2).values():
                lengths = micro.layout.q_length.tolist()
                parts = zip(micro.tokens.split(lengths), micro.labels.split(lengths))
                found += [(tokens.tolist(), labels.tolist()) for tokens, labels in parts]
                assert micro.tokens.dtype == micro.labels.dtype == torch.int64
        expected = []
        for tokens, mask in documents:
            labels = [int(t) if m or not assistant_only_loss else -100 for t, m in zip(tokens[1:], mask[1:])]
            expected.append((tokens.tolist(), [*labels, -100]))
        padding = [([0], [-100])]  # what ranks without work run
        assert sorted(x for x in found if x not in padding) == sorted(x for x in expected if x not in padding)


def test_a_wrapped_row_is_one_segment_of_the_stream(make_store):
    loader, documents = make_loader(make_store, "wrapped", assistant_only_loss=False)
    stream = np.concatenate([tokens for tokens, _ in documents])
    for row in range(len(loader.plan)):
        batch = loader.packed_batch(np.array([row]))
        assert batch.tokens.tolist() == stream[16 * row : 16 * row + 16].tolist()
        assert batch.labels.tolist() == [*batch.tokens.tolist()[1:], -100]
        assert batch.layout.positions.tolist() == list(range(16)) and len(batch.layout.q_length) == 1


@pytest.mark.parametrize("strategy", PACKING)
@pytest.mark.parametrize("micro_batch_tokens", [16, 20, 33, 1000])
def test_micro_batches_are_whole_rows_in_order_with_known_counts(make_store, strategy, micro_batch_tokens):
    loader, _ = make_loader(make_store, strategy, micro_batch_tokens=micro_batch_tokens, global_batch_size=5)
    sizes = loader.plan.row_tokens
    for step in range(loader.steps_per_epoch):
        batch = loader.global_batch(step)
        micros = list(shared(batch, 1).values())
        assert [micro.tokens.numel() for micro in micros] == [
            sizes[rows].sum() for rows in batch.micro_batches
        ]
        assert max(micro.tokens.numel() for micro in micros) <= micro_batch_tokens
        for rows, following in itertools.pairwise(batch.micro_batches):
            assert sizes[rows].sum() + sizes[following[0]] > micro_batch_tokens, (
                "another row would have fitted"
            )
        assert batch.num_tokens == sum(micro.tokens.numel() for micro in micros)
        assert batch.num_target_tokens == sum(int((micro.labels != -100).sum()) for micro in micros)
    assert loader.num_micro_batches == len(loader.global_batch(0).micro_batches)


def test_a_run_goes_on_at_any_step(make_store):
    loader, _ = make_loader(make_store)
    before = [loader.global_batch(step).rows.tolist() for step in range(12)]
    for step in (11, 3, 0, 7):
        row_order.cache_clear()
        again, _ = make_loader(make_store)
        assert again.global_batch(step).rows.tolist() == before[step]
    other, _ = make_loader(make_store, seed=8)
    assert [other.global_batch(step).rows.tolist() for step in range(12)] != before


def test_the_order_is_that_of_sorted_raw_bits():
    """Derived anew from the bit generator, whose stream numpy keeps the same in all versions."""
    bits = np.random.Philox(np.random.SeedSequence([42, 3])).random_raw(50).tolist()
    assert row_order(50, 42, 3).tolist() == sorted(range(50), key=lambda row: bits[row])


@pytest.mark.parametrize("strategy", PACKING)
@pytest.mark.parametrize("micro_batch_tokens", [16, 20, 33, 1000])
@pytest.mark.parametrize("global_batch_size", [1, 4, 100])
def test_no_micro_batch_exceeds_the_trial(make_store, strategy, micro_batch_tokens, global_batch_size):
    sizes = {"micro_batch_tokens": micro_batch_tokens, "global_batch_size": global_batch_size}
    loader, _ = make_loader(make_store, strategy, **sizes)
    trial = loader.largest_micro_batch()
    assert trial.tokens.numel() <= micro_batch_tokens
    for step in range(20 * loader.steps_per_epoch):
        for micro in shared(loader.global_batch(step), 1).values():
            assert micro.tokens.numel() <= trial.tokens.numel()
            assert micro.layout.max_q <= trial.layout.max_q
            assert (micro.labels != -100).sum() <= micro.tokens.numel() - len(micro.layout.q_length)
    assert (trial.labels == -100).sum() == len(trial.layout.q_length)


def test_steps_follow_from_epochs(make_store):
    loader, _ = make_loader(make_store, global_batch_size=1)
    steps = loader.steps_per_epoch
    assert [loader.total_steps(epochs) for epochs in (1.0, 2, 0.5, 1e-6)] == [
        steps,
        2 * steps,
        -(-steps // 2),
        1,
    ]
    loader.steps_per_epoch = 30
    assert loader.total_steps(0.1) == 3  # 0.1 * 30 is 3.0000000000000004


def test_the_rows_of_a_micro_batch_have_names(make_store):
    loader, documents = make_loader(make_store)
    batch = loader.global_batch(0)
    spans = loader.spans(batch.micro_batches[1])
    starts = np.concatenate([[0], np.cumsum(LENGTHS)]).tolist()
    assert batch.origins([1]) == [f"rows.jsonl, line {starts.index(start) + 1}" for start, _ in spans]
    assert set(batch.origins([1])) < set(batch.origins())
    lines = [name for step in range(loader.steps_per_epoch) for name in loader.global_batch(step).origins()]
    assert sorted(lines) == sorted(f"rows.jsonl, line {line + 1}" for line in range(len(documents)))


def test_what_cannot_be_batched_is_a_sentence(make_store):
    with pytest.raises(UserError, match="micro_batch_tokens=15, but a row has 16"):
        make_loader(make_store, micro_batch_tokens=15)
    store, _ = make_store([1, 4])
    loader = Loader(store, make_plan(store, 4), seed=0, global_batch_size=1, micro_batch_tokens=4)
    with pytest.raises(UserError, match=r"step .: no token .*line 1"):
        [loader.global_batch(step) for step in range(2)]
