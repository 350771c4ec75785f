"""MistralConfig <-> config.json of a Hugging Face folder.

What would change the result and is not built is refused by name; what changes nothing is skipped.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from phoenix.files import UserError

if TYPE_CHECKING:
    from phoenix.model.mistral import MistralConfig


def read(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of MistralConfig.  UserError names file and key of what is missing, wrong or unsupported."""
    if not isinstance(table, dict):
        raise UserError(f"{where}: holds a {type(table).__name__}; expected an object with the model's shape")
    model_type = table.get("model_type")
    if model_type not in ("mistral", "llama"):
        raise UserError(f"{where}: model_type is {model_type!r}; expected 'mistral' or 'llama'")
    _refuse_unsupported(table, where)
    values: dict[str, Any] = {"model_type": model_type}
    for key in (*_SIZES, *_NUMBERS, "max_position_embeddings"):
        values[key] = table.get(key, _DEFAULTS.get(key))
    for key in ("num_key_value_heads", "head_dim"):
        values[key] = table.get(key)
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    _check_numbers(values, where)
    values["sliding_window"] = _window(table, where)
    values["rope_theta"], values["rope_scaling"] = _rope(table, where)
    values["tie_word_embeddings"] = table.get("tie_word_embeddings", False)
    if not isinstance(values["tie_word_embeddings"], bool):
        found = values["tie_word_embeddings"]
        raise UserError(f"{where}: tie_word_embeddings is {found!r}; expected true or false")
    for key, default in (("bos_token_id", 1), ("eos_token_id", 2)):
        token = table.get(key, default)
        values[key] = (token[0] if token else None) if isinstance(token, list) else token
        if values[key] is not None and not _whole(values[key]):
            raise UserError(f"{where}: {key} is {token!r}; expected a token id, a list of them, or null")
    return values


def write(config: MistralConfig) -> dict[str, Any]:
    """The object of a config.json, with the rope keys of old and of new readers."""
    table = dataclasses.asdict(config)
    scaling = table.pop("rope_scaling")
    if config.model_type == "llama":
        table.pop("sliding_window")
    rope = {"rope_type": "llama3", **scaling} if scaling else {"rope_type": "default"}
    return {
        "architectures": ["MistralForCausalLM" if config.model_type == "mistral" else "LlamaForCausalLM"],
        **table,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": rope if scaling else None,
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
    }


def _check_numbers(values: dict[str, Any], where: str) -> None:
    """Refuse what is no size; sets head_dim where the file does not."""
    for key in (*_SIZES, "num_key_value_heads", "max_position_embeddings"):
        if not _whole(values[key]) or values[key] < 1:
            raise UserError(f"{where}: {key} is {values[key]!r}; expected a whole number of at least 1")
    for key in _NUMBERS:
        if not _positive(values[key]):
            raise UserError(f"{where}: {key} is {values[key]!r}; expected a number above 0")
    heads, groups, hidden = map(values.get, ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if values["head_dim"] is None and hidden % heads == 0:
        values["head_dim"] = hidden // heads
    if not _whole(values["head_dim"]) or values["head_dim"] < 1 or values["head_dim"] % 2:
        found = f"head_dim is {values['head_dim']!r} for hidden_size {hidden} and {heads} heads"
        raise UserError(f"{where}: {found}; expected an even number")
    if heads % groups:
        found = f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
        raise UserError(f"{where}: {found}; correct it")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _window(table: dict[str, Any], where: str) -> int | None:
    default = 4096 if table["model_type"] == "mistral" else None
    window = table.get("sliding_window", default)
    if window is not None and (not _whole(window) or window < 1):
        raise UserError(
            f"{where}: sliding_window is {window!r}; expected null (none) or a whole number of at least 1"
        )
    if table["model_type"] == "llama" and window is not None:
        raise UserError(f"{where}: sliding_window is {window!r} in a llama model; expected null")
    return window


def _rope(table: dict[str, Any], where: str) -> tuple[float, Any]:
    """rope_theta and scaling: at the top level and in rope_scaling (old), or in rope_parameters (new)."""
    from phoenix.model.mistral import Llama3Scaling

    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(table.get(key), dict | None):
            raise UserError(f"{where}: {key} is {table[key]!r}; expected an object or null")
        rope |= table.get(key) or {}
    theta = rope.pop("rope_theta", table.get("rope_theta", 10000.0))
    kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope] or ["default"]
    if not _positive(theta):
        raise UserError(f"{where}: rope_theta is {theta!r}; expected a number above 0")
    if kinds[0] not in ("default", "llama3") or kinds[0] != kinds[-1]:
        found = " and ".join(map(repr, kinds))
        raise UserError(f"{where}: rope scaling {found} is not supported; expected 'default' or 'llama3'")
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    names = {field.name for field in dataclasses.fields(Llama3Scaling)} if kinds[0] == "llama3" else set()
    for name in sorted(rope.keys() | names):
        if name not in names and rope[name] is not None:
            raise UserError(
                f"{where}: {name!r} of the rotary positions is {rope[name]!r}, which is not supported"
            )
        if name in names and not _positive(rope.get(name)):
            raise UserError(
                f"{where}: {name!r} of the rope scaling is {rope.get(name)!r}; expected a number above 0"
            )
    if not names:
        return float(theta), None
    scaling = Llama3Scaling(**{name: rope[name] for name in names})
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(f"{where}: high_freq_factor of the rope scaling must be above low_freq_factor")
    return float(theta), scaling


def _refuse_unsupported(table: dict[str, Any], where: str) -> None:
    for key, allowed in _FIXED.items():
        if key in table and table[key] not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise UserError(f"{where}: {key} is {table[key]!r}, which is not supported; expected {wanted}")
    known = {*_FIXED, *_SIZES, *_NUMBERS, *_READ, *_NEUTRAL}
    for key, value in table.items():
        if key not in known and not key.startswith("_") and value not in (None, False, 0, "", [], {}):
            raise UserError(
                f"{where}: {key!r} is not supported, and might change the result; remove it if not"
            )
    kind = "full_attention" if _window(table, where) is None else "sliding_attention"
    layers = table.get("layer_types") or [kind]
    if not isinstance(layers, list) or any(layer != kind for layer in layers):
        raise UserError(
            f"{where}: layer_types is {layers!r}, which is not supported; expected {kind!r} for all"
        )


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NUMBERS = ("rms_norm_eps", "initializer_range")
_DEFAULTS = {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "max_position_embeddings": 32768}
_READ = (
    "model_type num_key_value_heads head_dim max_position_embeddings sliding_window rope_theta rope_scaling "
    "rope_parameters tie_word_embeddings bos_token_id eos_token_id layer_types"
).split()
# Features that exist elsewhere, and the values under which they do nothing.
_FIXED = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "hidden_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "num_local_experts": (None,),
    "is_encoder_decoder": (False, None),
    "auto_map": (None,),
}
_NEUTRAL = (
    "architectures torch_dtype dtype transformers_version use_cache pretraining_tp pad_token_id "
    "unk_token_id name_or_path return_dict output_hidden_states output_attentions id2label label2id "
    "chunk_size_feed_forward is_decoder tokenizer_class torchscript max_length min_length temperature "
    "top_k top_p typical_p num_beams num_beam_groups do_sample repetition_penalty length_penalty "
    "early_stopping num_return_sequences diversity_penalty remove_invalid_values return_dict_in_generate "
    "output_scores use_bfloat16 bad_words_ids problem_type transformers.js_config task_specific_params "
    "decoder_start_token_id forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens "
    "prefix sep_token_id finetuning_task no_repeat_ngram_size is_llama_config model_max_length "
    "max_sequence_length attn_implementation unsloth_fixed unsloth_version"
).split()
