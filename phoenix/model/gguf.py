"""A GGUF file of llama architecture -> a folder in Hugging Face layout (extra `gguf`).

The file's tensors are dequantised by the `gguf` package.  llama.cpp rotates neighbouring pairs of a head,
Hugging Face its halves: the rows of q and k are put back in order.  Tokenizer (byte-level BPE or
sentencepiece) and chat template come along.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phoenix.files import UserError, require
from phoenix.model.mistral import MistralConfig
from phoenix.model.pretrained import materialise, meta_model, save_model


def import_gguf(path: Path, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write `folder` (config.json, model.safetensors, tokenizer, chat template) from the GGUF file at `path`.

    Raises UserError for a file that does not exist or is cut, another architecture, scaled rotary positions,
    a quantisation that the gguf package cannot undo, or a tokenizer of an unknown kind.
    """
    gguf = require("gguf", extra="gguf")
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file; expected a GGUF model")
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: not a whole GGUF file ({error}); copy it again") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tensors, path)
    model = meta_model(config).to(dtype)
    shapes = {_gguf_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, tensor in tensors.items():
        if name not in shapes:
            raise UserError(
                f"{path}: has the tensor {name!r}, which is not supported; expected a plain llama model"
            )
        if tuple(reversed(tensor.shape.tolist())) != shapes[name]:
            raise UserError(f"{path}: {name} has another shape than the fields say; expected {shapes[name]}")
    texts = _tokenizer_files(fields, path)
    materialise(model, "cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_tensor(gguf, tensors, name, config, path))
    save_model(model, folder, texts=texts)


def _config(fields: dict[str, Any], tensors: dict[str, Any], path: Path) -> MistralConfig:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: the architecture is {architecture!r}; expected 'llama'")
    try:
        heads, d = fields["llama.attention.head_count"], fields["llama.embedding_length"]
        table = {
            "model_type": "llama",
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "hidden_size": d,
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
            "head_dim": fields.get("llama.attention.key_length", d // heads),
            "max_position_embeddings": fields["llama.context_length"],
            "rms_norm_eps": _shortest(fields["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        }
    except KeyError as error:
        raise UserError(f"{path}: lacks the field or tensor {error}; expected a whole llama model") from None
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a size is no number ({error}); expected a llama model") from None
    scaling = fields.get("llama.rope.scaling.type", "none")
    rotated = fields.get("llama.rope.dimension_count", table["head_dim"])
    if scaling != "none" or rotated != table["head_dim"]:
        raise UserError(
            f"{path}: rotary positions are scaled ({scaling}) or partial ({rotated}), which is not supported"
        )
    return MistralConfig.from_dict(table, str(path))


def _shortest(value: float) -> float:
    """The shortest number that fp32 stores as `value`: 9.999999747e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _gguf_name(name: str) -> str:
    """model.layers.3.self_attn.q_proj.weight -> blk.3.attn_q.weight."""
    if not name.startswith("model.layers."):
        return _OUTER[name]
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{_INNER[rest.removesuffix('.weight')]}.weight"


def _tensor(gguf: Any, tensors: dict[str, Any], name: str, config: MistralConfig, path: Path) -> Tensor:
    source = _gguf_name(name)
    if source not in tensors:
        raise UserError(f"{path}: lacks the tensor {source!r}; expected a whole llama model")
    entry = tensors[source]
    try:
        tensor = torch.from_numpy(gguf.quants.dequantize(entry.data, entry.tensor_type).copy())
    except NotImplementedError:
        kind = entry.tensor_type.name
        raise UserError(f"{path}: {source} is stored as {kind}, which the gguf package cannot undo") from None
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if heads := rotated.get(name.split(".")[-2]):
        tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def _tokenizer_files(fields: dict[str, Any], path: Path) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json as text."""
    kind, pieces = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.tokens")
    if kind not in _TOKENIZERS or not pieces:
        found = f"the tokenizer is of the kind {kind!r} with {len(pieces or ())} pieces"
        raise UserError(f"{path}: {found}; expected one of {', '.join(_TOKENIZERS)}")
    types = _types(fields, pieces)
    added = [
        {"id": i, "content": piece, "special": types[i] == _CONTROL, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}
        for i, piece in enumerate(pieces) if types[i] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    tokenizer = {"version": "1.0", "added_tokens": added, **_TOKENIZERS[kind](fields, pieces, path)}
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {token: fields.get(f"tokenizer.ggml.{name}_token_id") for token, name in names.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{token: pieces[i] for token, i in ids.items() if i is not None},
        "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", kind == "llama")),
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
    if fields.get("tokenizer.chat_template"):
        config["chat_template"] = fields["tokenizer.chat_template"]
    texts = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    return {name: json.dumps(value, ensure_ascii=False, indent=1) + "\n" for name, value in texts.items()}


def _types(fields: dict[str, Any], pieces: list[str]) -> list[int]:
    types = fields.get("tokenizer.ggml.token_type") or []
    return types if len(types) == len(pieces) else [_NORMAL] * len(pieces)


def _byte_level(fields: dict[str, Any], pieces: list[str], path: Path) -> dict[str, Any]:
    """Byte-level BPE, its text cut as `tokenizer.ggml.pre` names it."""
    pre = fields.get("tokenizer.ggml.pre")
    if pre not in _CUTS:
        raise UserError(f"{path}: cuts text as {pre!r}; expected one of {', '.join(_CUTS)}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    cut = {**byte_level, "use_regex": pre != "llama-bpe"}  # which has a pattern of its own
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_CUTS[pre], cut]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "ignore_merges": pre == "llama-bpe",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [merge.split(" ", 1) for merge in fields.get("tokenizer.ggml.merges", [])],
        },
    }


def _sentencepiece(fields: dict[str, Any], pieces: list[str], path: Path) -> dict[str, Any]:
    """Sentencepiece BPE with byte fallback; merges: pairs of pieces that make a piece, best score first."""
    scores, ids = fields.get("tokenizer.ggml.scores") or [], {piece: i for i, piece in enumerate(pieces)}
    if len(scores) != len(pieces):
        raise UserError(f"{path}: has {len(scores)} scores for {len(pieces)} pieces; expected one each")
    # Only ordinary pieces: "<s" and ">" of a text never become the control token <s>.
    types = _types(fields, pieces)
    plain = {piece: i for piece, i in ids.items() if types[i] == _NORMAL}
    merges = []
    for piece, i in plain.items():
        cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        merges += [(-scores[i], plain[a], plain[b], [a, b]) for a, b in cuts if a in plain and b in plain]
    starts = fields.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [{"type": "Prepend", "prepend": "▁"}] if starts else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    unknown = pieces[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "unk_token": unknown, "fuse_unk": True, "byte_fallback": True,
            "vocab": ids, "merges": [merge[-1] for merge in sorted(merges)],
        },
    }  # fmt: skip


_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
# tokenizer.ggml.pre -> what cuts the text before the bytes are merged; the names are llama.cpp's, whose
# "default" is none of these.
_CUTS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}],
    "gpt-2": [],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
    ],
}
_TOKENIZERS = {"gpt2": _byte_level, "llama": _sentencepiece}
