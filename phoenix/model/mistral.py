"""Mistral (Jiang et al. 2023, arXiv 2310.06825) on a flat stream of tokens, and its Llama relatives.

Read from the bottom of a block to the top: embedding, then for each block RMSNorm, grouped-query attention
with rotary positions and a sliding window, RMSNorm, SwiGLU; then RMSNorm and the head.  What is unusual:
there is no batch dimension and no padding (see layout.py), and in training the head gives label log-probs,
never logits.  Module names are those of the Hugging Face checkpoints, so there is no weight map.

Weights may be fp32 while the computation is bf16: each layer casts its weight when it uses it, so the
optimizer steps fp32 masters, and gradients arrive in fp32.

Legend: t query rows of the stream, n segments, d hidden_size, f intermediate_size, v vocab_size, h query
heads, g key/value heads, e head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from phoenix.kernels.attention import attention
from phoenix.kernels.linear import linear, swiglu_linear
from phoenix.kernels.linear_logps import LabelStats, linear_logps
from phoenix.kernels.rms_norm import rms_norm
from phoenix.kernels.rope import rope
from phoenix.model import config_json
from phoenix.model.layout import AttentionLayout, PackedBatch

if TYPE_CHECKING:
    from phoenix.tokenizer import Tokenizer


@dataclass(frozen=True)
class Llama3Scaling:
    """Stretching of the slow rotary frequencies, as Llama 3.1 and 3.2 do it."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class MistralConfig:
    """Shape of a model, in the names of a Hugging Face config.json; the defaults are Mistral-7B-v0.1."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    sliding_window: int | None = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    model_type: str = "mistral"

    @classmethod
    def from_dict(cls, table: dict[str, Any], where: str = "config.json") -> MistralConfig:
        """From a config.json, old or new rope keys.  UserError names what is missing or unsupported."""
        return cls(**config_json.read(table, where))

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers 4 and 5, vLLM and llama.cpp read."""
        return config_json.write(self)

    def num_parameters(self) -> tuple[int, int]:
        """All parameters, and those that stand in matrix products (without the input embedding)."""
        d, e = self.hidden_size, self.head_dim
        attn = 2 * d * e * (self.num_attention_heads + self.num_key_value_heads)
        layers = self.num_hidden_layers * (attn + 3 * d * self.intermediate_size)
        embedding = self.vocab_size * d
        norms = (2 * self.num_hidden_layers + 1) * d
        return layers + norms + embedding * (1 if self.tie_word_embeddings else 2), layers + embedding


class Mistral(nn.Module):
    """A causal language model.  `model(batch)` gives label log-probs, `model.logits(tokens, layout)` logits.

    compute_dtype: the dtype of activations; None: that of the weights.  neftune_noise_alpha: NEFTune (Jain et
    al. 2023), 0 for none.  logits_memory: bytes of logits that a forward pass may keep for the backward pass.
    """

    def __init__(
        self, config: MistralConfig, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.neftune_noise_alpha = 0.0
        self.logits_memory = 1 << 30
        made = {"dtype": dtype, "device": device}
        self.model = Backbone(config, **made)
        self.lm_head = Head(config, **made)
        if config.tie_word_embeddings:
            self.tie_weights()

    def forward(self, batch: PackedBatch, *, stats: bool = False) -> Tensor | LabelStats:
        """Log-probability of each row's label, [t] fp32 in nats, 0 where the label is -100.

        stats: LabelStats of three such vectors: logps, entropy of the prediction, hits of the arg max.
        """
        x = self._hidden(batch.tokens, batch.layout)
        result = self.lm_head(x, batch.labels, logits_memory=self.logits_memory, stats=stats)
        return result if stats else result.logps

    def logits(self, tokens: Tensor, layout: AttentionLayout, *, last: bool = False) -> Tensor:
        """Logits of the next token after each row, [t, v] in fp32 (fp64 stays).

        last: of each segment's last row only, [n, v].  With a cache in the layout, new keys and values are
        written into it.
        """
        x = self._hidden(tokens, layout)
        if last:
            x = x[layout.cu_seqlens_q[1:].long() - 1]
        return self.lm_head(x)

    def _hidden(self, tokens: Tensor, layout: AttentionLayout) -> Tensor:
        if tokens.ndim != 1 or tokens.shape != layout.positions.shape:
            raise ValueError(f"expected tokens [t] with t = {layout.num_tokens}, got {list(tokens.shape)}")
        alpha = self.neftune_noise_alpha if self.training else 0.0
        return self.model(tokens, layout, self.compute_dtype, alpha)

    def tie_weights(self) -> None:
        """Make the head use the embedding's weight; materialising a meta model parts the two again."""
        self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> Mistral:
        """Random weights: N(0, initializer_range), norms 1 (transformers' rule, no scaling by depth)."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        return self

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Mistral:
        """A model from a folder in Hugging Face layout; see phoenix.model.pretrained.load_model."""
        from phoenix.model.pretrained import load_model

        return load_model(Path(folder), dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a folder in Hugging Face layout; see phoenix.model.pretrained.save_model."""
        from phoenix.model.pretrained import save_model

        save_model(self, Path(folder), tokenizer)


class Backbone(nn.Module):
    """Tokens [t] -> normed hidden states [t, d]."""

    def __init__(self, config: MistralConfig, **made: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, **made)
        self.layers = nn.ModuleList(Block(config, index, **made) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, **made)

    def forward(
        self, tokens: Tensor, layout: AttentionLayout, dtype: torch.dtype | None, alpha: float
    ) -> Tensor:
        x = self.embed_tokens(tokens)  # [t, d]
        x = x if dtype is None else x.to(dtype)
        if alpha:
            x = neftune(x, layout, alpha)
        cos, sin = rope_table(self.config, layout.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, layout)
        return self.norm(x)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: MistralConfig, index: int, **made: Any) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config, **made)
        self.self_attn = Attention(config, index, **made)
        self.post_attention_layernorm = RMSNorm(config, **made)
        self.mlp = MLP(config, **made)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions and a sliding window."""

    def __init__(self, config: MistralConfig, index: int, **made: Any) -> None:
        super().__init__()
        self.index, self.head_dim, self.window = index, config.head_dim, config.sliding_window
        heads, groups = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, heads, **made)
        self.k_proj = Linear(config.hidden_size, groups, **made)
        self.v_proj = Linear(config.hidden_size, groups, **made)
        self.o_proj = Linear(heads, config.hidden_size, **made)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [t, h, e]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [t, g, e]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if layout.cache is not None:
            k, v = layout.cache.update(self.index, k, v, layout.cache_rows)  # [s, g, e]
        out = attention(q, k, v, layout, window=self.window)  # [t, h, e]
        return self.o_proj(out.flatten(-2))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: MistralConfig, **made: Any) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, **made)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, **made)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, **made)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu_linear(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


class Linear(nn.Linear):
    """No bias; computes in the dtype of the input."""

    def __init__(self, in_features: int, out_features: int, **made: Any) -> None:
        super().__init__(in_features, out_features, bias=False, **made)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    def __init__(self, config: MistralConfig, **made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size, **made))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)


class Head(nn.Module):
    """Hidden states [t, d] -> LabelStats for labels [t], or logits [t, v] without labels.

    One forward for both, so that FSDP gathers the weight just here.
    """

    def __init__(self, config: MistralConfig, **made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, **made))

    def forward(self, x: Tensor, labels: Tensor | None = None, **options: Any) -> LabelStats | Tensor:
        if labels is None:
            logits = linear(x, self.weight)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        return linear_logps(x, self.weight, labels, **options)


def rope_table(config: MistralConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of each row's angles, [t, 1, e / 2]: in fp32 (fp64 stays), then cast to dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, config.head_dim, 2, dtype=wide, device=positions.device) / config.head_dim
    frequency = config.rope_theta**-exponent  # [e / 2]
    if config.rope_scaling is not None:
        frequency = llama3_frequencies(frequency, config.rope_scaling)
    angle = (positions[:, None].to(wide) * frequency)[:, None]  # [t, 1, e / 2]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def llama3_frequencies(frequency: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Keep short wave lengths, divide long ones by `factor`, blend between (Llama 3.1's rule)."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


def neftune(x: Tensor, layout: AttentionLayout, alpha: float) -> Tensor:
    """x + U(-1, 1) alpha / sqrt(l d), l the length of the row's own document (NEFTune, algorithm 1)."""
    length = layout.k_length.sum(1).repeat_interleave(layout.q_length).to(x.device)
    scale = alpha / (length[:, None] * x.shape[-1]).sqrt()  # [t, 1]
    return x + (torch.empty_like(x).uniform_(-1, 1) * scale).to(x.dtype)
