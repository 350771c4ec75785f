import dataclasses
import math

import pytest
import torch

from phoenix import chat
from phoenix.eval.scoring import bits_per_byte, text_bits_per_byte
from phoenix.model.layout import AttentionLayout
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.tokenizer import Tokenizer

CONFIG = MistralConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    sliding_window=None,
    initializer_range=0.3,
)
QUESTION = {"role": "user", "content": "Wie spät ist es?"}
ANSWER = {"role": "assistant", "content": "Zwölf Minuten nach neun, glaube ich. 🕘"}
SECOND = [{"role": "user", "content": "Danke!"}, {"role": "assistant", "content": "Gerne."}]
SYSTEM = {"role": "system", "content": "Du bist eine Uhr."}


@pytest.fixture(scope="module")
def tokenizer(bpe_tokenizer_folder):
    return Tokenizer.from_pretrained(bpe_tokenizer_folder)


def build(**changes):
    model = Mistral(dataclasses.replace(CONFIG, **changes), dtype=torch.float64)
    return model.init_weights(torch.Generator().manual_seed(0)).eval()


def naive_logp(model, context, continuation):
    """Sum of log p of each token of the continuation, one forward pass a token."""
    total = 0.0
    with torch.no_grad():
        for index, token in enumerate(continuation):
            seen = torch.tensor(context + continuation[:index])
            logits = model.logits(seen, AttentionLayout.packed([len(seen)]))[-1]
            total += float(logits.log_softmax(-1)[token])
    return total


def naive_answer(model, tokenizer, conversation):
    total = 0.0
    for index, message in enumerate(conversation):
        if message["role"] == "assistant":
            prompt = chat.render(conversation[:index], tokenizer, "chatml", add_generation_prompt=True).tokens
            total += naive_logp(model, prompt, tokenizer.encode(message["content"]))
    return total


@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
def test_bits_per_byte_of_answers(tokenizer, max_tokens):
    model = build(max_position_embeddings=4096)
    conversations = [[QUESTION, ANSWER], [SYSTEM, QUESTION, ANSWER, *SECOND], [QUESTION, SECOND[1]]]
    expected = sum(naive_answer(model, tokenizer, conversation) for conversation in conversations)
    num_bytes = 2 * (len(ANSWER["content"]) + 4) + 2 * len("Gerne.")  # ö has two bytes, 🕘 four
    found = bits_per_byte(model, tokenizer, conversations, "chatml", max_tokens=max_tokens)
    assert found == pytest.approx(-expected / math.log(2) / num_bytes, rel=1e-6)


def test_a_uniform_model_needs_the_same_bits_for_each_token(tokenizer):
    model = build(max_position_embeddings=4096)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = len(tokenizer.encode(ANSWER["content"]))
    expected = tokens * math.log2(512) / len(ANSWER["content"].encode())
    assert bits_per_byte(model, tokenizer, [[QUESTION, ANSWER]], "chatml") == pytest.approx(expected)
    assert text_bits_per_byte(model, tokenizer, [ANSWER["content"]]) == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 66, 127, 128, 129, 150])
def test_a_long_text_is_scored_in_windows(tokenizer, length):
    model, text = build(), "7" * length  # digits are split: a token each
    ids, size = tokenizer.encode(text), CONFIG.max_position_embeddings
    assert len(ids) == length
    whole, expected = [tokenizer.eos_id, *ids], 0.0
    for position in range(1, len(whole)):
        window = (position - 1) // size  # lm-eval: windows of `size` predictions
        last = min((window + 1) * size, length)
        low = max(0, last - size)
        expected += naive_logp(model, whole[low:position], [whole[position]])
    found = text_bits_per_byte(model, tokenizer, [text])
    assert found == pytest.approx(-expected / math.log(2) / length, rel=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("length", [1, 64, 65, 150])
def test_windows_equal_those_of_lm_eval(tokenizer, length, monkeypatch):
    utils = pytest.importorskip("lm_eval.utils")
    model, seen = build(), []
    monkeypatch.setattr(model, "forward", lambda batch: seen.append(batch) or torch.zeros(len(batch.tokens)))
    text_bits_per_byte(model, tokenizer, ["7" * length], max_tokens=1)
    tokens, size = tokenizer.encode("7" * length), CONFIG.max_position_embeddings
    windows = utils.get_rolling_token_windows(tokens, tokenizer.eos_id, size, 1)
    for batch, (context, targets) in zip(seen, map(utils.make_disjoint_window, windows), strict=True):
        whole = [*context, *targets]
        assert batch.tokens.tolist() == whole[:-1]
        assert batch.labels.tolist() == [-100] * (len(context) - 1) + targets


def test_mode_comes_back_and_nothing_to_score_is_refused(tokenizer):
    model = build(max_position_embeddings=4096).train()
    model.neftune_noise_alpha = 50.0
    noisy = bits_per_byte(model, tokenizer, [[QUESTION, ANSWER]], "chatml")
    assert model.training
    quiet = build(max_position_embeddings=4096)
    assert noisy == bits_per_byte(quiet, tokenizer, [[QUESTION, ANSWER]], "chatml")
    with pytest.raises(ValueError, match="no text"):
        text_bits_per_byte(model, tokenizer, [])
