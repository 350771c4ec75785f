"""MistralConfig <-> config.json of a Hugging Face folder.

What would change the result and is not built is refused by name; what changes nothing is skipped.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from phoenix.files import UserError

if TYPE_CHECKING:
    from phoenix.model.mistral import MistralConfig


def read(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Arguments of MistralConfig.  UserError names file and key of what is missing, wrong or unsupported."""
    from phoenix.model.mistral import MistralConfig

    if not isinstance(table, dict):
        raise UserError(f"{where}: holds a {type(table).__name__}; expected an object with the model's shape")
    model_type = table.get("model_type")
    if model_type not in ("mistral", "llama"):
        raise UserError(f"{where}: model_type is {model_type!r}; expected 'mistral' or 'llama'")
    _refuse_unsupported(table, where)
    values: dict[str, Any] = {"model_type": model_type}
    for key in (*_SIZES, *_NUMBERS, "max_position_embeddings"):
        values[key] = table.get(key, _DEFAULTS.get(key))
    values["num_key_value_heads"] = table.get("num_key_value_heads") or values["num_attention_heads"]
    _check_numbers(values, where)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    values["head_dim"] = table.get("head_dim") or hidden // heads
    if heads % values["num_key_value_heads"] or values["head_dim"] % 2:
        raise UserError(
            f"{where}: num_attention_heads {heads} is no multiple of num_key_value_heads, or head_dim is odd"
        )
    values["sliding_window"] = _window(table, where)
    values["rope_theta"], values["rope_scaling"] = _rope(table, where)
    values["tie_word_embeddings"] = bool(table.get("tie_word_embeddings", False))
    for key, default in (("bos_token_id", 1), ("eos_token_id", 2)):
        token = table.get(key, default)
        values[key] = token[0] if isinstance(token, list) and token else token
    assert set(values) == {field.name for field in dataclasses.fields(MistralConfig)}
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
    for key in (*_SIZES, "num_key_value_heads", "max_position_embeddings"):
        if not isinstance(values[key], int) or isinstance(values[key], bool) or values[key] < 1:
            raise UserError(f"{where}: {key} is {values[key]!r}; expected a whole number of at least 1")
    for key in _NUMBERS:
        if not isinstance(values[key], int | float) or isinstance(values[key], bool) or values[key] <= 0:
            raise UserError(f"{where}: {key} is {values[key]!r}; expected a number above 0")
    if values["hidden_size"] % values["num_attention_heads"]:
        raise UserError(f"{where}: hidden_size is no multiple of num_attention_heads; correct the file")


def _window(table: dict[str, Any], where: str) -> int | None:
    default = 4096 if table["model_type"] == "mistral" else None
    window = table.get("sliding_window", default)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise UserError(
            f"{where}: sliding_window is {window!r}; expected null (none) or a whole number of at least 1"
        )
    if table["model_type"] == "llama" and window is not None:
        raise UserError(f"{where}: sliding_window is {window!r} in a llama model; expected null")
    return window


def _rope(table: dict[str, Any], where: str) -> tuple[float, Any]:
    from phoenix.model.mistral import Llama3Scaling

    rope = {**(table.get("rope_scaling") or {}), **(table.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", table.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise UserError(f"{where}: rope_theta is {theta!r}; expected a number above 0")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; expected 'default' or 'llama3'")
    try:
        return float(theta), Llama3Scaling(**rope)
    except TypeError as error:
        raise UserError(
            f"{where}: rope scaling 'llama3' does not fit ({error}); correct rope_parameters"
        ) from None


def _refuse_unsupported(table: dict[str, Any], where: str) -> None:
    for key, allowed in _FIXED.items():
        if key in table and table[key] not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise UserError(f"{where}: {key} is {table[key]!r}, which is not supported; expected {wanted}")
    known = {*_FIXED, *_SIZES, *_NUMBERS, *_READ, *_NEUTRAL}
    for key, value in table.items():
        if key not in known and not key.startswith("_") and value not in (None, False, 0, "", [], {}):
            raise UserError(
                f"{where}: {key!r} is not supported, and might change the result; remove it if it does not"
            )
    if any(kind not in ("full_attention", "sliding_attention") for kind in table.get("layer_types") or []):
        raise UserError(
            f"{where}: layer_types holds {table['layer_types']!r}; expected full or sliding attention"
        )
    if len(set(table.get("layer_types") or [])) > 1:
        raise UserError(
            f"{where}: layer_types differ between layers, which is not supported; expected one kind"
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
    "output_scores use_bfloat16 bad_words_ids problem_type transformers.js_config task_specific_params"
).split()
