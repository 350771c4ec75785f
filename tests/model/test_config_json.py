"""config.json: what we and others write is read, what would change the result is refused by name."""

import dataclasses
import json

import pytest

from phoenix.files import UserError
from phoenix.model.mistral import Llama3Scaling, MistralConfig

MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA_3_2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
SCALING = Llama3Scaling(32.0, 1.0, 4.0, 8192)
CONFIGS = [
    MistralConfig(),
    MistralConfig(sliding_window=None, rope_theta=1e6, vocab_size=32768, tie_word_embeddings=True),
    MistralConfig(model_type="llama", sliding_window=None, rope_scaling=SCALING, bos_token_id=None),
    MistralConfig(hidden_size=5120, head_dim=128, eos_token_id=None, rms_norm_eps=1e-6),
]


def read(table, **changes) -> MistralConfig:
    return MistralConfig.from_dict({**table, **changes}, "folder/config.json")


def test_mistral_7b_is_the_default():
    assert read(MISTRAL) == MistralConfig()


def test_llama_3_2():
    assert read(LLAMA_3_2) == MistralConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
        max_position_embeddings=131072, sliding_window=None, rope_theta=500000.0, rope_scaling=SCALING,
        tie_word_embeddings=True, bos_token_id=128000, eos_token_id=128001, model_type="llama",
    )  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_through_a_file(config):
    assert MistralConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_old_and_new_readers_find_their_rope_keys(config):
    table = config.to_dict()
    new = table["rope_parameters"]
    assert table["rope_theta"] == new["rope_theta"] == config.rope_theta
    old = {key: value for key, value in table.items() if key != "rope_parameters"}
    young = {key: value for key, value in table.items() if key not in ("rope_theta", "rope_scaling")}
    assert MistralConfig.from_dict(old) == MistralConfig.from_dict(young) == config


def test_scaling_of_the_oldest_readers_has_its_kind_under_type():
    scaling = {**LLAMA_3_2["rope_scaling"]}
    scaling["type"] = scaling.pop("rope_type")
    assert read(LLAMA_3_2, rope_scaling=scaling).rope_scaling == SCALING
    assert read(LLAMA_3_2, rope_scaling={**scaling, "rope_type": "llama3"}).rope_scaling == SCALING


def test_what_a_file_leaves_out_is_transformers_default():
    out = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "sliding_window", "tie_word_embeddings")
    table = {key: value for key, value in MISTRAL.items() if key not in out}
    config = read(table)
    assert (config.num_key_value_heads, config.rms_norm_eps, config.rope_theta) == (32, 1e-6, 10000.0)
    assert (config.sliding_window, config.tie_word_embeddings, config.head_dim) == (4096, False, 128)
    assert read(table, model_type="llama").sliding_window is None


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["Mistral", "Llama"])
def test_configs_of_transformers_are_read(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{kind}Config")()
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for table in (theirs.to_dict(), saved):
        config = MistralConfig.from_dict(table)
        for field in dataclasses.fields(MistralConfig):
            if field.name not in ("rope_theta", "rope_scaling", "sliding_window"):
                assert getattr(config, field.name) == getattr(theirs, field.name), field.name
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert config.sliding_window == getattr(theirs, "sliding_window", None)


@pytest.mark.peers
@pytest.mark.parametrize("config", CONFIGS)
def test_transformers_reads_ours(config):
    transformers = pytest.importorskip("transformers")
    kind = {"mistral": "Mistral", "llama": "Llama"}[config.model_type]
    theirs = getattr(transformers, f"{kind}Config")(**config.to_dict())
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")
    for name in ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "eos_token_id"):
        assert getattr(theirs, name) == getattr(config, name)


BENIGN = {
    "_name_or_path": "x", "pad_token_id": 0, "pretraining_tp": 2, "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": "fp16"}, "unsloth_version": "2024.9", "max_length": 4096,
    "attention_bias": False, "quantization_config": None, "layer_types": ["sliding_attention"] * 32,
    "some_new_switch": False, "some_new_list": [], "_attn_implementation_autoset": True, "dtype": "bfloat16",
    "id2label": {"0": "LABEL_0"}, "temperature": 0.6, "do_sample": True, "head_dim": None,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("key", BENIGN)
def test_what_changes_nothing_is_skipped(key):
    assert read(MISTRAL, **{key: BENIGN[key]}) == MistralConfig()


WHOLE = "expected a whole number of at least 1"
REFUSED = [
    ("model_type", "qwen2", "model_type is 'qwen2'; expected 'mistral' or 'llama'"),
    ("hidden_act", "gelu", "hidden_act is 'gelu', which is not supported"),
    ("attention_bias", True, "attention_bias is True, which is not supported"),
    ("mlp_bias", True, "mlp_bias is True"),
    ("attention_dropout", 0.1, "attention_dropout is 0.1"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
    ("quantization_config", {"bits": 4}, "quantization_config is"),
    ("num_local_experts", 8, "num_local_experts is 8"),
    ("auto_map", {"AutoModel": "x.py"}, "auto_map is"),
    ("attn_logit_softcapping", 50.0, "'attn_logit_softcapping' is not supported, and might change"),
    ("rope_interleaved", True, "'rope_interleaved' is not supported"),
    ("layer_types", ["sliding_attention", "full_attention"], "layer_types is"),
    ("layer_types", ["full_attention"] * 32, "expected 'sliding_attention' for all"),
    ("layer_types", "full_attention", "layer_types is"),
    ("sliding_window", 0, r"sliding_window is 0; expected null \(none\) or a whole number of at least 1"),
    ("sliding_window", -1, "sliding_window is -1"),
    ("sliding_window", True, "sliding_window is True"),
    ("sliding_window", 4096.0, "sliding_window is 4096.0"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope scaling 'linear' is not supported"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope scaling 'yarn' is not supported"),
    ("rope_scaling", {"rope_type": ["llama3"]}, "rope scaling"),
    ("rope_scaling", {"rope_type": "llama3", "type": "linear"}, "rope scaling 'llama3' and 'linear'"),
    ("rope_scaling", {"factor": 2.0}, "'factor' of the rotary positions is 2.0"),
    ("rope_scaling", "linear", "rope_scaling is 'linear'; expected an object or null"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "'high_freq_factor' .* is None"),
    ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}, "'full_attention' of the rotary positions"),
    ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "'partial_rotary_factor' of the"),
    ("rope_parameters", {"rope_theta": "1e6"}, "rope_theta is '1e6'; expected a number above 0"),
    ("rope_theta", float("nan"), "rope_theta is nan"),
    ("rope_theta", 0, "rope_theta is 0"),
    ("vocab_size", None, f"vocab_size is None; {WHOLE}"),
    ("hidden_size", 4096.0, f"hidden_size is 4096.0; {WHOLE}"),
    ("num_hidden_layers", -3, f"num_hidden_layers is -3; {WHOLE}"),
    ("num_key_value_heads", 0, f"num_key_value_heads is 0; {WHOLE}"),
    ("num_key_value_heads", 5, "num_attention_heads 32 is no multiple of num_key_value_heads 5"),
    ("num_attention_heads", True, f"num_attention_heads is True; {WHOLE}"),
    ("hidden_size", 4095, "head_dim is None for hidden_size 4095 and 32 heads; expected an even number"),
    ("head_dim", 127, "head_dim is 127"),
    ("head_dim", "128", "head_dim is '128'"),
    ("head_dim", 0, "head_dim is 0"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps is nan; expected a number above 0"),
    ("rms_norm_eps", "1e-5", "rms_norm_eps is '1e-5'"),
    ("tie_word_embeddings", "false", "tie_word_embeddings is 'false'; expected true or false"),
    ("eos_token_id", "</s>", "eos_token_id is '</s>'; expected a token id"),
]  # fmt: skip


@pytest.mark.parametrize("key, value, message", REFUSED)
def test_what_would_change_the_result_is_refused_by_name(key, value, message):
    with pytest.raises(UserError, match=rf"^folder/config\.json: .*{message}") as error:
        read(MISTRAL, **{key: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
def test_a_missing_size_is_named(key):
    with pytest.raises(UserError, match=f"{key} is None"):
        MistralConfig.from_dict({name: value for name, value in MISTRAL.items() if name != key})


def test_a_llama_has_no_window():
    with pytest.raises(UserError, match="sliding_window is 4096 in a llama model; expected null"):
        read(LLAMA_3_2, sliding_window=4096)
    swapped = {**LLAMA_3_2["rope_scaling"], "low_freq_factor": 4.0}
    with pytest.raises(UserError, match="high_freq_factor of the rope scaling must be above low_freq_factor"):
        read(LLAMA_3_2, rope_scaling=swapped)


@pytest.mark.parametrize("table", [None, [], "mistral", 3])
def test_another_kind_of_file_is_refused(table):
    with pytest.raises(UserError, match="expected an object with the model's shape"):
        MistralConfig.from_dict(table)
