"""Two answers that share their prompt have the log-probs and gradients of two sequences on their own."""

import numpy as np
import pytest
import torch

from phoenix.data.pairs import PairLoader, common_prefix
from phoenix.data.store import FORMAT_VERSION, MANIFEST, StoreWriter, TokenStore
from phoenix.files import UserError, write_json
from phoenix.model.layout import AttentionLayout, PackedBatch
from phoenix.model.mistral import Mistral, MistralConfig

VOCAB = 50
# name -> (prompt, chosen, rejected): lengths of random answers, or the tokens themselves.
PAIRS = {
    "usual": (9, 5, 7),
    "prompt of one token": (1, 4, 3),
    "answers of one token": (6, 1, 1),
    "answers that begin alike": ([1, 2, 3], [4, 5, 6, 7], [4, 5, 8, 9, 10]),
    "one answer begins the other": ([1, 2, 3], [4, 5], [4, 5, 6]),
    "equal answers": ([1, 2, 3], [4, 5], [4, 5]),
    "all of one token": ([1], [2], [3]),
    "long": (30, 20, 3),
}


def make_store(folder, pairs=PAIRS, masks=None) -> TokenStore:
    random = np.random.default_rng(0)
    writer = StoreWriter(folder, "train", VOCAB, 60)
    for line, (name, parts) in enumerate(pairs.items(), 1):
        tokens = [np.array(random.integers(0, VOCAB, p) if isinstance(p, int) else p) for p in parts]
        learned = [np.zeros(len(tokens[0]), bool), *(np.ones(len(part), bool) for part in tokens[1:])]
        if masks and name in masks:
            learned[1:] = [np.array(mask, bool) for mask in masks[name]]
        writer.add(list(zip(tokens, learned)), (0, line))
    manifest = {"format_version": FORMAT_VERSION, "kind": "pairs", "chat_template": "chatml"}
    manifest |= {"inputs": [{"path": "rows.jsonl"}], "splits": {"train": writer.close()}}
    write_json(folder / MANIFEST, manifest)
    return TokenStore.open(folder, kind="pairs")


def make_model(dtype: torch.dtype, window: int | None) -> Mistral:
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, sliding_window=window, initializer_range=0.3,
    )  # fmt: skip
    return Mistral(config, dtype=dtype).init_weights(torch.Generator().manual_seed(1))


def one_at_a_time(model: Mistral, store: TokenStore) -> torch.Tensor:
    """[pairs, 2]: each sequence through the model alone."""
    rows = []
    for number in range(len(store) // 3):
        prompt, *answers = (store.document(3 * number + part) for part in range(3))
        for tokens, mask in answers:
            ids = np.concatenate([prompt[0], tokens]).astype(np.int64)
            asked = np.concatenate([np.zeros(len(prompt[0]), bool), mask])
            labels = np.append(np.where(asked, ids, -100)[1:], -100)
            layout = AttentionLayout.packed([len(ids)])
            rows.append(model(PackedBatch(torch.from_numpy(ids), torch.from_numpy(labels), layout)).sum())
    return torch.stack(rows).view(-1, 2)


@pytest.mark.parametrize("window", [None, 3, 12])
@pytest.mark.parametrize(
    "dtype, logps, gradients", [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-4)]
)
def test_shared_equals_one_at_a_time(tmp_path, dtype, logps, gradients, window):
    store, model = make_store(tmp_path), make_model(dtype, window)
    expected = one_at_a_time(model, store)
    factors = torch.linspace(-1, 1, expected.numel(), dtype=dtype).view_as(expected)
    wanted = torch.autograd.grad((expected * factors).sum(), list(model.parameters()))
    loader = PairLoader(store, seed=0, global_batch_size=99, micro_batch_tokens=64)
    found = torch.zeros_like(expected)
    for rows in loader.cut(np.arange(len(PAIRS))):
        micro = loader.packed_batch(rows)
        values = torch.stack(micro.logps(model(micro.batch)), 1)
        found[rows] = values.detach()
        (values * factors[rows]).sum().backward()
        assert micro.batch.layout.num_tokens == loader.plan.row_tokens[rows].sum() <= 64
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=logps * scale)
    for parameter, gradient in zip(model.parameters(), wanted):
        close = gradients * float(gradient.abs().max())
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=close)


def test_counts_of_labels_and_of_what_is_shared(tmp_path):
    store = make_store(tmp_path)
    loader = PairLoader(store, seed=0, global_batch_size=99, micro_batch_tokens=999)
    by_name = dict(zip(PAIRS, loader.prefix.tolist()))
    assert by_name["answers that begin alike"] == 5 and by_name["one answer begins the other"] == 4
    assert by_name["equal answers"] == 4 and by_name["prompt of one token"] == 1
    micro = loader.packed_batch(np.arange(len(PAIRS)))
    assert micro.lengths[3].tolist() == [4, 5] and micro.lengths[4].tolist() == [2, 3]
    assert loader.plan.row_targets.tolist() == micro.lengths.sum(1).tolist()


def test_only_the_last_turn_has_a_loss_if_asked(tmp_path):
    pairs = {"turns": ([1, 2], [3, 4, 5, 6, 7], [3, 8, 9, 6])}
    masks = {"turns": ([1, 1, 0, 1, 1], [1, 0, 1, 1])}
    store = make_store(tmp_path, pairs, masks)
    for last, counts in ((False, [4, 3]), (True, [2, 2])):
        loader = PairLoader(store, seed=0, global_batch_size=1, micro_batch_tokens=99, last_turn_only=last)
        assert loader.packed_batch(np.array([0])).lengths[0].tolist() == counts


def test_a_rank_without_pairs_has_a_graph(tmp_path):
    loader = PairLoader(make_store(tmp_path), seed=0, global_batch_size=99, micro_batch_tokens=999)
    model = make_model(torch.float32, None)
    [(_, whole)] = loader.global_batch(0).share(0, 2)
    [(_, micro)] = loader.global_batch(0).share(1, 2)
    assert sorted(whole.pairs) == list(range(len(PAIRS))) and len(micro.pairs) == 0
    chosen, rejected = micro.logps(model(micro.batch))
    (chosen.sum() + rejected.sum()).backward()
    assert chosen.shape == (0,) and model.lm_head.weight.grad is not None


def test_the_digest_is_of_tokens_prompt_and_mask(tmp_path):
    pairs = {"a": ([1, 2], [3, 4], [5]), "b": ([1, 2, 3], [4], [5]), "c": ([1, 2], [3, 4], [6])}
    for name in ("plain", "masked"):
        (tmp_path / name).mkdir()
    plain = PairLoader(
        make_store(tmp_path / "plain", pairs), seed=0, global_batch_size=9, micro_batch_tokens=99
    )
    masks = {"a": ([0, 1], [1])}
    masked = PairLoader(
        make_store(tmp_path / "masked", pairs, masks), seed=0, global_batch_size=9, micro_batch_tokens=99
    )
    (a, b, c), (other, *_) = plain.digests(), masked.digests()
    assert a[0] == c[0] and len({*a, *b, *c}) == 5 and other[0] != a[0] and other[1] == a[1]
    assert all(len(digest) == 16 for digest in (*a, *b))


def test_a_pair_above_the_micro_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="micro_batch_tokens=20, but a row has"):
        PairLoader(make_store(tmp_path), seed=0, global_batch_size=9, micro_batch_tokens=20)


def test_a_prefix_ends_where_masks_differ():
    tokens = np.arange(5)
    one, other = np.array([0, 0, 1, 1, 1], bool), np.array([0, 0, 1, 0, 1], bool)
    assert common_prefix((tokens, one), (tokens, other)) == 3
    assert common_prefix((tokens, one), (tokens[:3], one[:3])) == 2
