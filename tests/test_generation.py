import dataclasses
import math

import pytest
import torch
from torch.distributed.tensor import DTensor

from phoenix.files import UserError
from phoenix.generation import Sampling, candidates, generate, generate_all, next_tokens
from phoenix.model.layout import AttentionLayout, PackedBatch
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.tokenizer import Tokenizer
from phoenix.train import distributed

CONFIG = MistralConfig(
    vocab_size=520,  # 8 more than the tokenizer has
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    sliding_window=None,
    initializer_range=0.3,
)
PROMPTS = [
    "Der Zug",
    "For a cake you need 250 g of flour, three eggs,",
    "x",
    "Straßenbahnen und Fahrräder",
    "2023",
]
CHAT = [{"role": "user", "content": "Wie geht es Ihnen?"}]


def build(seed=0, dtype=torch.float32, **changes):
    model = Mistral(dataclasses.replace(CONFIG, **changes), dtype=dtype)
    return model.init_weights(torch.Generator().manual_seed(seed)).eval()


def naive_greedy(model, tokenizer, prompt, stop_ids, max_new_tokens):
    """The whole text through the model for each token."""
    tokens = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    new = []
    with torch.no_grad():
        while len(new) < max_new_tokens:
            logits = model.logits(torch.tensor(tokens + new), AttentionLayout.packed([len(tokens + new)]))
            token = int(logits[-1, : tokenizer.vocab_size].argmax())
            if token in stop_ids:
                break
            new.append(token)
    return new


@pytest.fixture(scope="module")
def tokenizer(bpe_tokenizer_folder):
    return Tokenizer.from_pretrained(bpe_tokenizer_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 1, 4])
def test_greedy_equals_the_loop_without_cache(tokenizer, window, dtype):
    model = build(dtype=dtype, sliding_window=window)
    replies = generate_all(model, tokenizer, PROMPTS, Sampling(max_new_tokens=20))
    for prompt, reply in zip(PROMPTS, replies):
        expected = naive_greedy(model, tokenizer, prompt, {tokenizer.eos_id, 2}, 20)
        assert reply.tokens == expected
        assert reply.text == tokenizer.decode(expected, starts=False)
        assert reply.finish_reason == ("length" if len(expected) == 20 else "stop")
    if window != 1:  # the model looks at its prompt
        assert len({tuple(reply.tokens) for reply in replies}) == len(PROMPTS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_a_reply_does_not_depend_on_the_others(tokenizer, temperature, slots):
    model = build(dtype=torch.float64)
    longest = max(len(tokenizer.encode(prompt)) for prompt in PROMPTS)
    slot_bytes = (longest + 29) * 2 * 2 * 2 * 8 * 8
    sampling = Sampling(30, temperature, seed=3, cache_memory=slots * slot_bytes)
    together = generate_all(model, tokenizer, PROMPTS, sampling)
    for index, prompt in enumerate(PROMPTS):
        fillers = ["a"] * index  # the index of a prompt is part of its seed
        alone = generate_all(model, tokenizer, [*fillers, prompt], Sampling(30, temperature, seed=3))
        assert alone[-1] == together[index]


def test_a_freed_slot_is_used_again_and_no_more_than_the_budget(tokenizer, monkeypatch):
    model, used = build(), []
    logits = model.logits

    def watch(tokens, layout, last=False):
        if layout.cache is not None:
            used.append((len(layout.cache.lengths), layout.q_length.tolist()))
        return logits(tokens, layout, last=last)

    monkeypatch.setattr(model, "logits", watch)
    prompts = [prompt[:7] for prompt in PROMPTS]
    longest = max(len(tokenizer.encode(prompt)) for prompt in prompts)
    sampling = Sampling(max_new_tokens=4, cache_memory=2 * (longest + 3) * 2 * 2 * 2 * 8 * 4)
    replies = generate_all(model, tokenizer, prompts, sampling)
    expected = [naive_greedy(model, tokenizer, prompt, {tokenizer.eos_id}, 4) for prompt in prompts]
    assert [reply.tokens for reply in replies] == expected
    assert all(len(lengths) <= slots == 2 for slots, lengths in used)
    assert any(sorted(lengths)[0] == 1 < sorted(lengths)[1] for _, lengths in used)  # a prompt joins a reply
    generate_all(model, tokenizer, PROMPTS, Sampling(max_new_tokens=2, cache_memory=0))
    assert used[-1][0] == 1  # at least one, whatever the budget


@pytest.mark.peers
@pytest.mark.parametrize("window", [None, 4])
def test_greedy_equals_transformers(tokenizer, tmp_path, window):
    transformers = pytest.importorskip("transformers")
    model = build(sliding_window=window)
    model.save_pretrained(tmp_path / "model")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    replies = generate_all(model, tokenizer, PROMPTS, Sampling(max_new_tokens=20))
    for prompt, reply in zip(PROMPTS, replies):
        ids = torch.tensor([tokenizer.encode(prompt)])
        expected = peer.generate(
            ids, do_sample=False, max_new_tokens=20, eos_token_id=tokenizer.eos_id, pad_token_id=0,
            suppress_tokens=list(range(512, 520)),
        )  # fmt: skip
        assert reply.tokens == [i for i in expected[0, ids.shape[1] :].tolist() if i != tokenizer.eos_id]


@pytest.mark.peers
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.9), (50, 0.5), (3000, 0.01), (0, 0.999999)]
)
def test_candidates_equal_transformers_warpers(temperature, top_k, top_p):
    process = pytest.importorskip("transformers").generation.logits_process
    logits = 3 * torch.randn(4, 2000, generator=torch.Generator().manual_seed(1))
    expected = process.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = process.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = process.TopPLogitsWarper(top_p)(None, expected)
    probs, ids = candidates(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    found = torch.zeros_like(logits).scatter_(-1, ids, probs / probs.sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected.softmax(-1))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[math.log(0.5), float("-inf"), math.log(0.3), math.log(0.2)]]).expand(1000, -1)
    draws = torch.arange(1000, dtype=torch.float64) / 1000
    chosen = next_tokens(logits, draws, Sampling(temperature=1.0))
    assert chosen.bincount(minlength=4).tolist() == pytest.approx([500, 0, 300, 200], abs=1)
    ends = torch.tensor(
        [0.0, 1.0], dtype=torch.float64
    )  # a draw is below 1, but draw * total may be rounded up
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=1e-30),
    ):
        probabilities = logits[:2].softmax(-1).gather(-1, next_tokens(logits[:2], ends, sampling)[:, None])
        assert (probabilities > 0).all()
    assert next_tokens(logits[:2], ends, Sampling(temperature=1e-30)).tolist() == [0, 0]
    assert next_tokens(logits[:2], ends, Sampling(temperature=5.0, top_k=1)).tolist() == [0, 0]


def test_sampling_is_seeded(tokenizer):
    model = build()
    options = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 40}
    first, again, other = (generate(model, tokenizer, ["a"] * 3, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 3  # each index draws for itself


def test_ids_without_a_token_are_never_chosen(tokenizer):
    model = build()
    with torch.no_grad():  # padding rows win every arg max
        model.lm_head.weight[512:] = 100 * model.lm_head.weight[:512].mean(0)
        model.lm_head.weight[:512] *= 0.01
    for temperature in (0.0, 3.0):
        for reply in generate_all(model, tokenizer, PROMPTS, Sampling(10, temperature)):
            assert all(token < tokenizer.vocab_size for token in reply.tokens)


def test_stop_strings_are_cut_off(tokenizer):
    model = build()
    whole = generate(model, tokenizer, PROMPTS, max_new_tokens=20)
    stops = (whole[0][7:9], whole[1][5:8])
    for reply, text in zip(generate_all(model, tokenizer, PROMPTS, Sampling(20, stop=stops)), whole):
        cut = min((text.find(stop) for stop in stops if stop in text), default=None)
        assert reply.text == text[:cut]
        assert len(reply.tokens) <= 20
        if cut is not None:
            assert reply.finish_reason == "stop"


def test_messages_go_through_the_template_and_end_at_its_stop_token(tokenizer):
    model = build()
    with torch.no_grad():  # <|im_end|> is always the most probable
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    assert tokenizer.chat_template == "chatml"
    assert generate_all(model, tokenizer, [CHAT, "Hallo"], Sampling(5)) == [("", [], "stop")] * 2


def test_messages_equal_their_rendering(tokenizer):
    model = build()
    text = "<|im_start|>user\nWie geht es Ihnen?<|im_end|>\n<|im_start|>assistant\n"
    tokens = [
        token
        for part in text.replace("<|", "\0<|").replace("|>", "|>\0").split("\0")
        if part
        for token in (
            [tokenizer.special_ids[part]] if part in tokenizer.special_ids else tokenizer.encode(part)
        )
    ]
    reply = generate_all(model, tokenizer, [CHAT], Sampling(3))[0]
    with torch.no_grad():
        logits = model.logits(torch.tensor(tokens), AttentionLayout.packed([len(tokens)]))[-1, :512]
    assert reply.tokens[0] == int(logits.argmax())


def test_bos_stands_before_a_text(sp_tokenizer_folder):
    tokenizer, model = Tokenizer.from_pretrained(sp_tokenizer_folder), build()
    assert tokenizer.bos_id is not None
    for prompt, reply in zip(PROMPTS, generate_all(model, tokenizer, PROMPTS, Sampling(15))):
        assert reply.tokens == naive_greedy(model, tokenizer, prompt, {tokenizer.eos_id}, 15)
    replies = generate_all(model, tokenizer, ["Der Zug"] * 30, Sampling(2, temperature=2.0))
    assert all(reply.text == tokenizer.decode(reply.tokens, starts=False) for reply in replies)
    assert any(reply.text.startswith(" ") for reply in replies)  # the prompt goes on, so the space stays
    with pytest.raises(UserError, match="no chat template"):
        generate(model, tokenizer, [CHAT])


def test_training_mode_comes_back_and_no_gradient_is_kept(tokenizer):
    model = build().train()
    model.neftune_noise_alpha = 100.0
    replies = generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    assert model.training
    assert replies == generate(build(), tokenizer, PROMPTS, max_new_tokens=10)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.lm_head = None
    with pytest.raises(TypeError):
        generate(model, tokenizer, PROMPTS, max_new_tokens=10)
    assert model.training


def test_compiled_blocks_are_not_compiled_again_for_generation(tokenizer):
    model = build()
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=5)
    compiled = []
    for layer in model.model.layers:
        layer.compile(backend=lambda graph, _inputs: compiled.append(graph) or graph)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=5) == expected
    assert not compiled
    model(_batch())
    assert compiled


def test_cache_and_computation_have_the_compute_dtype(tokenizer, monkeypatch):
    model, seen = build(), []
    model.compute_dtype = torch.bfloat16
    logits = model.logits

    def watch(tokens, layout, last):
        seen.append(layout.cache.keys[0].dtype)
        return logits(tokens, layout, last=last)

    monkeypatch.setattr(model, "logits", watch)
    generate(model, tokenizer, PROMPTS, max_new_tokens=3)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan), ("top_p", 0.0), ("top_p", 1.1),
     ("top_k", -1), ("stop", [""]), ("stop", "ab")],
)  # fmt: skip
def test_values_out_of_range_are_refused(tokenizer, name, value):
    with pytest.raises(ValueError, match="expected"):
        generate(build(), tokenizer, ["a"], **{name: value})


def test_a_prompt_must_fit_and_hold_a_token(tokenizer):
    model, room = build(), CONFIG.max_position_embeddings
    fits = "1" * (room - 3)  # digits are split: a token each
    assert len(tokenizer.encode(fits)) == room - 3
    assert len(generate_all(model, tokenizer, [fits], Sampling(3))[0].tokens) <= 3
    with pytest.raises(ValueError, match=f"prompt 1 has {room - 2} tokens; expected 1 to {room - 3}"):
        generate(model, tokenizer, ["a", fits + "1"], max_new_tokens=3)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        generate(model, tokenizer, [""])
    assert generate(model, tokenizer, []) == []


def _on_a_rank(rank, world_size, folder, tokenizer_folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        tokenizer, found = Tokenizer.from_pretrained(tokenizer_folder), []
        for tied in (False, True):
            model = build(tie_word_embeddings=tied)
            distributed._shard(model, distributed.World(rank, world_size), torch.float32)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            model.train()
            for temperature in (0.0, 1.0):
                sampling = Sampling(8, temperature, cache_memory=20_000)
                found.append(generate_all(model, tokenizer, PROMPTS, sampling))
            loss = -model(_batch()).sum()  # training goes on after it
            loss.backward()
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _batch():
    tokens = torch.arange(10)
    return PackedBatch(tokens, tokens, AttentionLayout.packed([10]))


def _expected(tokenizer):
    for tied in (False, True):
        for temperature in (0.0, 1.0):
            yield generate_all(build(tie_word_embeddings=tied), tokenizer, PROMPTS, Sampling(8, temperature))


def test_a_sharded_model_says_the_same(tokenizer, bpe_tokenizer_folder, tmp_path):
    threads = torch.get_num_threads()
    _on_a_rank(0, 1, tmp_path, bpe_tokenizer_folder)
    torch.set_num_threads(threads)
    assert torch.load(tmp_path / "0.pt", weights_only=False) == list(_expected(tokenizer))


@pytest.mark.slow
def test_two_ranks_say_the_same(tokenizer, bpe_tokenizer_folder, tmp_path):
    torch.multiprocessing.spawn(_on_a_rank, (2, tmp_path, bpe_tokenizer_folder), nprocs=2)
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=False) == list(_expected(tokenizer))
