"""The model: packing, sharing and caching change nothing; transformers computes the same."""

import dataclasses
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from phoenix.kernels.linear_logps import LabelStats
from phoenix.model.cache import KVCache
from phoenix.model.layout import IGNORE_INDEX, AttentionLayout, PackedBatch
from phoenix.model.mistral import Llama3Scaling, Mistral, MistralConfig, neftune

LENGTHS = [[1], [5, 3], [1, 1, 7], [13, 2, 6]]


def tokens_of(lengths, vocab_size=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in lengths]


def batch_of(documents) -> PackedBatch:
    """Each document predicts its own next tokens; its last row, and every fourth, is not asked."""
    labels = [torch.cat([document[1:], torch.tensor([IGNORE_INDEX])]) for document in documents]
    labels = torch.cat(labels)
    labels[3::4] = IGNORE_INDEX
    return PackedBatch(torch.cat(documents), labels, AttentionLayout.packed([len(d) for d in documents]))


def alone(batch: PackedBatch) -> list[PackedBatch]:
    lengths = batch.layout.q_length.tolist()
    rows = zip(batch.tokens.split(lengths), batch.labels.split(lengths))
    return [PackedBatch(*row, AttentionLayout.packed([len(row[0])])) for row in rows]


def gradients(model, batches) -> list[torch.Tensor]:
    return torch.autograd.grad(sum(model(batch).sum() for batch in batches), list(model.parameters()))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed_documents_equal_one_by_one(tiny_model, lengths):
    batch = batch_of(tokens_of(lengths))
    packed = tiny_model(batch)
    assert packed.shape == batch.tokens.shape and packed.dtype == torch.float32
    assert (packed - torch.cat([tiny_model(one) for one in alone(batch)])).abs().max() <= 1e-5


@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_of_a_packed_batch_are_the_sum_over_documents(tiny_model, lengths):
    model, batch = tiny_model.double(), batch_of(tokens_of(lengths))
    for packed, summed in zip(gradients(model, [batch]), gradients(model, alone(batch))):
        torch.testing.assert_close(packed, summed, rtol=1e-9, atol=1e-9 * max(1, summed.abs().max().item()))


def test_log_probs_are_those_of_the_logits(tiny_model):
    batch = batch_of(tokens_of([9, 4]))
    logits = tiny_model.logits(batch.tokens, batch.layout)
    assert logits.shape == (13, 512) and logits.dtype == torch.float32
    asked = batch.labels != IGNORE_INDEX
    expected = logits.log_softmax(-1)[asked].gather(-1, batch.labels[asked, None])[:, 0]
    stats = tiny_model(batch, stats=True)
    assert isinstance(stats, LabelStats)
    torch.testing.assert_close(stats.logps[asked], expected)
    assert not stats.logps[~asked].any()
    assert torch.equal(stats.hits[asked], (logits.argmax(-1) == batch.labels)[asked].float())
    last = tiny_model.logits(batch.tokens, batch.layout, last=True)
    torch.testing.assert_close(last, logits[[8, 12]])


@pytest.mark.parametrize("prefix, answers", [(1, [2, 3]), (9, [4, 1, 7]), (3, [2])])
def test_a_shared_prefix_equals_each_answer_behind_the_whole_prefix(tiny_model, prefix, answers):
    model = tiny_model.double()
    (start, *ends) = tokens_of([prefix, *answers])
    rows = [torch.cat([start, end]) for end in ends]
    tokens = torch.cat([rows[0], *(torch.cat([start[-1:], end]) for end in ends[1:])])
    layout = AttentionLayout.shared_prefix(prefix, answers)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    row = prefix - 1
    for end in ends:
        labels[row : row + len(end)] = end
        row += len(end) + 1
    shared = PackedBatch(tokens, labels, layout)
    apart = []
    for whole in rows:
        asked = torch.full_like(whole, IGNORE_INDEX)
        asked[prefix - 1 : -1] = whole[prefix:]
        apart.append(PackedBatch(whole, asked, AttentionLayout.packed([len(whole)])))
    found = model(shared)[labels != IGNORE_INDEX]
    expected = torch.cat([model(one)[one.labels != IGNORE_INDEX] for one in apart])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for found, expected in zip(gradients(model, [shared]), gradients(model, apart)):
        torch.testing.assert_close(
            found, expected, rtol=1e-9, atol=1e-9 * max(1, expected.abs().max().item())
        )


@torch.no_grad()
def test_cached_decoding_equals_the_whole_text(tiny_model):
    """Texts in slots 2, 0, 3: prefill of unequal lengths, a second prefill, single tokens, a freed slot."""
    model = tiny_model.double()
    cache = KVCache(model.config, 4, 24, dtype=torch.float64, device="cpu")
    texts = dict(zip([2, 0, 3], tokens_of([20, 14, 9])))
    done = dict.fromkeys(texts, 0)
    whole = {slot: model.logits(text, AttentionLayout.packed([len(text)])) for slot, text in texts.items()}

    def step(slots, lengths):
        layout = AttentionLayout.prefill(lengths, cache, slots)
        new = [texts[slot][done[slot] : done[slot] + length] for slot, length in zip(slots, lengths)]
        logits = model.logits(torch.cat(new), layout).split(lengths)
        cache.advance(slots, lengths)
        for slot, length, found in zip(slots, lengths, logits):
            torch.testing.assert_close(found, whole[slot][done[slot] : done[slot] + length])
            done[slot] += length

    step([2, 0], [7, 3])
    step([0, 3, 2], [6, 1, 2])
    for _ in range(4):
        step([3, 0, 2], [1, 1, 1])
    cache.free([2])
    texts[2], done[2] = texts[0], 0
    whole[2] = whole[0]
    step([2, 3], [14, 4])


def test_tokens_and_layout_must_fit(tiny_model):
    layout = AttentionLayout.packed([3])
    for shape in ((4,), (1, 3)):
        with pytest.raises(ValueError, match=r"expected tokens \[t\] with t = 3, got"):
            tiny_model.logits(torch.zeros(shape, dtype=torch.int64), layout)


def test_fp32_weights_compute_in_bf16_and_get_fp32_gradients(tiny_model):
    tiny_model.compute_dtype = torch.bfloat16
    batch = batch_of(tokens_of([9, 4]))
    logps = tiny_model(batch)
    assert logps.dtype == torch.float32
    logps.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in tiny_model.parameters())
    with torch.no_grad():
        rounded = Mistral(tiny_model.config, dtype=torch.bfloat16)
        rounded.load_state_dict(tiny_model.state_dict())
        assert torch.equal(rounded(batch), logps)


def test_parameters_are_counted(tiny_model):
    total, in_products = tiny_model.config.num_parameters()
    assert total == sum(p.numel() for p in tiny_model.parameters())
    assert in_products == sum(
        p.numel() for name, p in tiny_model.named_parameters() if "norm" not in name
    ) - (0 if tiny_model.config.tie_word_embeddings else tiny_model.model.embed_tokens.weight.numel())
    assert MistralConfig().num_parameters()[0] == 7_241_732_096  # Mistral-7B-v0.1


def test_initial_weights(tiny_config):
    model = Mistral(dataclasses.replace(tiny_config, initializer_range=0.1))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.1)
            assert abs(parameter.mean().item()) < 0.1 * 5 / math.sqrt(parameter.numel())


def test_a_block_compiles_whole_and_once_for_all_lengths(tiny_model):
    torch._dynamo.reset()
    counter = CompileCounter()
    for layer in tiny_model.model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=counter)
    plain = Mistral(tiny_model.config)
    plain.load_state_dict(tiny_model.state_dict())
    first = 0
    for lengths in ([3, 2, 9, 1, 5], [1, 1, 7, 2, 2, 11, 3], [30, 5, 4]):
        batch = batch_of(tokens_of(lengths))
        torch.testing.assert_close(tiny_model(batch), plain(batch), rtol=1e-4, atol=1e-4)
        first = first or counter.frame_count
    assert counter.frame_count == first


def noise_of(model, lengths):
    """What NEFTune adds to the embeddings of documents of these lengths, one tensor a document."""
    x = torch.zeros(sum(lengths), model.config.hidden_size)
    return neftune(x, AttentionLayout.packed(lengths), model.neftune_noise_alpha).split(lengths)


def test_neftune_noise_has_the_bound_of_each_document(tiny_model):
    """U(-a, a) with a = alpha / sqrt(l d) by the document's own length l, not by the row's."""
    tiny_model.neftune_noise_alpha = 5.0
    lengths = [1, 40, 400]
    for length, noise in zip(lengths, noise_of(tiny_model, lengths)):
        bound = 5 / math.sqrt(length * tiny_model.config.hidden_size)
        assert noise.abs().max() <= bound
        if length > 1:
            assert noise.abs().max() > 0.99 * bound
            assert noise.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert abs(noise.mean().item()) < 5 * bound / math.sqrt(noise.numel())


def test_neftune_acts_in_training_alone(tiny_model):
    batch = batch_of(tokens_of([9, 4]))
    clean = tiny_model(batch)
    tiny_model.neftune_noise_alpha = 5.0
    assert torch.equal(tiny_model(batch), clean)
    tiny_model.train()
    torch.manual_seed(0)
    noisy = tiny_model(batch)
    assert (noisy - clean).abs().max() > 1e-3
    torch.manual_seed(0)
    assert torch.equal(tiny_model(batch), noisy)
    tiny_model.neftune_noise_alpha = 0.0
    assert torch.equal(tiny_model(batch), clean)


def peer(model: Mistral):
    """The same weights in transformers."""
    transformers = pytest.importorskip("transformers")
    table = {**model.config.to_dict(), "use_cache": True}
    kind = {"mistral": "Mistral", "llama": "Llama"}[model.config.model_type]
    config = getattr(transformers, f"{kind}Config")(**table, attn_implementation="eager")
    other = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    lost = other.load_state_dict(model.state_dict(), strict=True)
    assert not lost.missing_keys and not lost.unexpected_keys
    return other


SMALL = MistralConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=None, initializer_range=0.2,
)  # fmt: skip
LLAMA = dataclasses.replace(SMALL, model_type="llama")
PEERS = {
    "mistral": SMALL,
    "window shorter than the text": dataclasses.replace(SMALL, sliding_window=6),
    "window of 1": dataclasses.replace(SMALL, sliding_window=1),
    "1 head a group": dataclasses.replace(SMALL, num_key_value_heads=4),
    "4 heads a group": dataclasses.replace(SMALL, num_key_value_heads=1),
    "tied": dataclasses.replace(SMALL, tie_word_embeddings=True),
    "wide heads, eps, theta": dataclasses.replace(SMALL, head_dim=20, rms_norm_eps=0.1, rope_theta=100.0),
    "llama": LLAMA,
    "llama, tied, llama3 scaling": dataclasses.replace(
        LLAMA, tie_word_embeddings=True, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32), num_key_value_heads=1
    ),
}


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_logits_and_gradients_equal_those_of_transformers(name):
    torch.manual_seed(0)
    model = Mistral(PEERS[name]).init_weights()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    other, (tokens,) = peer(model), tokens_of([40], 97)
    expected = other(tokens[None]).logits[0]
    found = model.logits(tokens, AttentionLayout.packed([40]))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    labels = torch.cat([tokens[1:], torch.tensor([IGNORE_INDEX])])
    loss = -model(PackedBatch(tokens, labels, AttentionLayout.packed([40]))).sum() / 39
    theirs = other(tokens[None], labels=tokens[None]).loss
    torch.testing.assert_close(loss, theirs)
    loss.backward()
    theirs.backward()
    wanted = dict(other.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        grad = wanted[parameter_name].grad
        assert (parameter.grad - grad).abs().max() <= 1e-4 * grad.abs().max(), parameter_name


@pytest.mark.peers
@pytest.mark.parametrize("name", ["window shorter than the text", "llama, tied, llama3 scaling"])
@torch.no_grad()
def test_greedy_tokens_equal_those_of_transformers(name):
    model = Mistral(PEERS[name]).init_weights(torch.Generator().manual_seed(1)).eval()
    (prompt,) = tokens_of([11], 97)
    theirs = peer(model).generate(
        prompt[None], max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert greedy(model, prompt, 20) == theirs[0, 11:].tolist()


def greedy(model, prompt, number):
    """Token by token over a cache."""
    cache = KVCache(model.config, 1, len(prompt) + number, dtype=torch.float32, device="cpu")
    tokens, new = [], prompt
    for _ in range(number):
        logits = model.logits(new, AttentionLayout.prefill([len(new)], cache, [0]), last=True)
        cache.advance([0], len(new))
        new = logits.argmax(-1)
        tokens.append(new.item())
    return tokens


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    """The base model of the quickstart, read by us and by transformers."""
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    other = auto.from_pretrained(smollm2_folder, dtype=torch.float32, attn_implementation="eager")
    return Mistral.from_pretrained(smollm2_folder), other


@pytest.mark.peers
@torch.no_grad()
def test_smollm2_equals_transformers(smollm2):
    (model, other), (prompt,) = smollm2, tokens_of([24], 49152)
    found, expected = model.logits(prompt, AttentionLayout.packed([24])), other(prompt[None]).logits[0]
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.peers
@torch.no_grad()
def test_smollm2_writes_what_transformers_writes(smollm2):
    (model, other), (prompt,) = smollm2, tokens_of([24], 49152)
    theirs = other.generate(
        prompt[None], max_new_tokens=20, min_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert greedy(model, prompt, 20) == theirs[0, 24:].tolist()
