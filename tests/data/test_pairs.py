"""Two answers that share their prompt have the log-probs and gradients of two sequences on their own."""

import numpy as np
import pytest
import torch

from phoenix.data.pairs import PairLoader, common_prefix
from phoenix.data.store import FORMAT_VERSION, MANIFEST, StoreWriter, TokenStore
from phoenix.files import UserError, write_json
from phoenix.losses import dpo_loss, sequence_logps
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
    (a, b, c), (other, *_) = plain.digests, masked.digests
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


# The loss itself in three ways: shared prompts in one stream, each sequence alone, rows padded to one length

MERGED = {
    "answers merge with the template": ([1, 2, 3], [4, 5, 6, 7, 8], [4, 9, 7, 8]),
    "equal tokens of which one answer learns fewer": ([1, 2], [3, 4, 5], [3, 4, 6]),
}
MERGED_MASKS = dict(zip(MERGED, [([0, 0, 1, 1, 1], [0, 0, 1, 1]), ([1, 1, 1], [0, 1, 1])]))
PAD = 7  # also a token of the text: nothing may depend on it


def in_one_stream(model: Mistral, store: TokenStore) -> torch.Tensor:
    loader = PairLoader(store, seed=0, global_batch_size=99, micro_batch_tokens=999)
    micro = loader.packed_batch(np.arange(len(store) // 3))
    return torch.stack(micro.logps(model(micro.batch)), 1)


def padded_rows(store: TokenStore) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, labels (not shifted) and what is no padding, each [n, t]: all chosen, then all rejected."""
    numbers = [(pair, part) for part in (1, 2) for pair in range(0, len(store), 3)]
    rows = [[store.document(pair), store.document(pair + part)] for pair, part in numbers]
    size = max(len(prompt[0]) + len(answer[0]) for prompt, answer in rows)
    tokens, labels = torch.full((len(rows), size), PAD), torch.full((len(rows), size), -100)
    is_text = torch.zeros(len(rows), size, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        ids = torch.tensor([*prompt[0].tolist(), *answer[0].tolist()])
        learned = torch.tensor([*[False] * len(prompt[0]), *answer[1].astype(bool).tolist()])
        tokens[row, : len(ids)], is_text[row, : len(ids)] = ids, True
        labels[row, : len(ids)] = torch.where(learned, ids, -100)
    return tokens, labels, is_text


def padded(model: Mistral, store: TokenStore) -> torch.Tensor:
    tokens, labels, _ = padded_rows(store)
    layout = AttentionLayout.packed([tokens.shape[1]] * len(tokens))
    logits = model.logits(tokens.flatten(), layout).view(*tokens.shape, VOCAB)
    return sequence_logps(logits, labels).view(2, -1).T


def padded_in_transformers(model: torch.nn.Module, store: TokenStore) -> torch.Tensor:
    tokens, labels, is_text = padded_rows(store)
    return sequence_logps(model(tokens, attention_mask=is_text.long()).logits, labels).view(2, -1).T


def logps_and_gradients(logps_of, model, reference, store):
    """Of all answers [pairs, 2], and {parameter: gradient} of the mean sigmoid loss."""
    logps = logps_of(model, store)
    with torch.no_grad():
        known = logps_of(reference, store)
    losses, *_ = dpo_loss(*logps.unbind(1), *known.unbind(1), beta=0.1)
    names, parameters = zip(*model.named_parameters())
    return logps.detach(), dict(zip(names, torch.autograd.grad(losses.mean(), parameters)))


def in_transformers(model: Mistral) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(**model.config.to_dict(), attn_implementation="eager")
    other = transformers.MistralForCausalLM(config).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    return other


def assert_one_loss(folder, dtype, window, others, *, logps, gradients):
    """others: functions as `padded`, and what makes a model of ours into the one that it takes."""
    store = make_store(folder, PAIRS | MERGED, MERGED_MASKS)
    models = [make_model(dtype, window) for _ in range(2)]
    models[1].init_weights(torch.Generator().manual_seed(2))
    expected, wanted = logps_and_gradients(in_one_stream, *models, store)
    assert len(expected) == len(PAIRS | MERGED) and (expected < 0).all()
    for logps_of, convert in others:
        found, slopes = logps_and_gradients(logps_of, *map(convert, models), store)
        torch.testing.assert_close(found, expected, rtol=0, atol=logps * float(expected.abs().max()))
        assert set(slopes) == set(wanted)
        for name, slope in slopes.items():
            close = gradients * float(wanted[name].abs().max())
            assert close > 0 and (slope - wanted[name]).abs().max() <= close, name


# Prompts have 1 to 30 tokens: windows shorter than most, longer than most, longer than all.
@pytest.mark.parametrize("window", [2, 10, 40])
@pytest.mark.parametrize(
    "dtype, logps, gradients", [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-4)]
)
def test_shared_padded_and_single_sequences_have_one_dpo_loss(tmp_path, dtype, logps, gradients, window):
    others = [(one_at_a_time, lambda model: model), (padded, lambda model: model)]
    assert_one_loss(tmp_path, dtype, window, others, logps=logps, gradients=gradients)


@pytest.mark.peers
@pytest.mark.parametrize("window", [None, 2, 10, 40])
def test_a_padded_batch_in_transformers_has_the_same_dpo_loss(tmp_path, window):
    others = [(padded_in_transformers, in_transformers)]
    assert_one_loss(tmp_path, torch.float32, window, others, logps=1e-5, gradients=1e-4)


def test_a_prefix_ends_within_what_the_template_wrote(tmp_path):
    """The common first token, and the two that differ, have no loss: no label may move to another answer."""
    loader = PairLoader(
        make_store(tmp_path, MERGED, MERGED_MASKS), seed=0, global_batch_size=1, micro_batch_tokens=99
    )
    micro = loader.packed_batch(np.array([0]))
    assert micro.batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 4, 9, 7, 8]
    assert micro.batch.labels.tolist() == [*[-100] * 4, 6, 7, 8, -100, -100, 7, 8, -100]
    assert micro.lengths.tolist() == [[3, 2]]
