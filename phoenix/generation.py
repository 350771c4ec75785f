"""Text from a model: continuous batching over the slots of a KV cache, greedy or sampled.

Each pass through the model takes one new token of every running sequence, and the whole prompts of those that
have just got a slot: one flat stream either way.  A sequence that ends frees its slot for the next prompt.

Legend: n running sequences, v vocab_size, k candidates for the next token.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from phoenix import chat
from phoenix.files import UserError
from phoenix.model.cache import KVCache
from phoenix.model.layout import AttentionLayout
from phoenix.model.mistral import Mistral
from phoenix.tokenizer import Tokenizer

PREFILL_TOKENS = 4096  # of prompts in one pass, which bounds the memory for activations
Prompt = str | Sequence[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a reply ends.

    temperature 0: the most probable token.  top_k 0 and top_p 1: all tokens.  stop: strings that end a reply
    and are cut off.  cache_memory: bytes of keys and values, which decide how many sequences run at once (at
    least one).  Raises ValueError for values out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: Sequence[str] = ()
    cache_memory: int = 1 << 30

    def __post_init__(self) -> None:
        fits = self.max_new_tokens >= 1 and self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0
        if not fits or isinstance(self.stop, str) or "" in self.stop:
            wanted = "max_new_tokens >= 1, temperature and top_k >= 0, 0 < top_p <= 1, no empty stop"
            raise ValueError(f"got {self}; expected {wanted}")


class Reply(NamedTuple):
    """text, its tokens (without the stop token), and why it ended: "stop" (token or string) or "length"."""

    text: str
    tokens: list[int]
    finish_reason: str


def generate(
    model: Mistral, tokenizer: Tokenizer, prompts: Sequence[Prompt], *, max_new_tokens: int = 256,
    temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0, stop: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """New text for each prompt, in their order; see `generate_all`."""
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, stop)
    return [reply.text for reply in generate_all(model, tokenizer, prompts, sampling)]


def generate_all(
    model: Mistral, tokenizer: Tokenizer, prompts: Sequence[Prompt], sampling: Sampling | None = None
) -> list[Reply]:
    """A Reply for each prompt, in their order.

    A string is continued as it is, with BOS before it if the tokenizer puts one; a list of messages ({"role",
    "content"}) goes through the template that the model folder states.  The stop tokens of the template and
    EOS end a reply.  A reply depends on its prompt and on (seed, its index), not on the others.  Ids that no
    token owns are never chosen.  With a sharded model all ranks call alike, and all get the replies.

    Raises ValueError for a prompt without a token, or with too many to leave room for `max_new_tokens` among
    the model's positions; UserError for messages without a template.
    """
    sampling = sampling or Sampling()
    most = model.config.max_position_embeddings - sampling.max_new_tokens
    sequences = []
    for index, prompt in enumerate(prompts):
        tokens = _encode(prompt, tokenizer)
        if not 1 <= len(tokens) <= most:
            raise ValueError(f"prompt {index} has {len(tokens)} tokens; expected 1 to {most}: "
                             "the model's positions less max_new_tokens")  # fmt: skip
        stream = tokenizer.stream(starts=not isinstance(prompt, str))
        sequences.append(_Sequence(tokens, stream, random.Random(f"{sampling.seed} {index}")))
    template = tokenizer.chat_template
    stop_ids = {tokenizer.eos_id, *(chat.stop_ids(tokenizer, template) if template else ())}
    was_training = model.training
    model.eval()
    try:
        # A sharded model cannot run under inference_mode; compiled blocks would compile anew for every layer.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            _run(model, sequences, sampling, _unowned(model, tokenizer), stop_ids)
    finally:
        model.train(was_training)
    return [Reply(one.text, one.tokens, one.finish_reason) for one in sequences]


def next_tokens(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """The next token of each sequence, [n]: logits [n, v] fp32, draws [n] uniform in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs, ids = candidates(logits, sampling)
    cdf = probs.double().cumsum(-1)
    total = cdf[:, -1:].contiguous()
    chosen = torch.searchsorted(cdf, draws.to(cdf)[:, None] * total, right=True)
    # A product rounded up to `total` must not lead behind the last candidate.
    last = torch.searchsorted(cdf, total)
    return ids.gather(-1, chosen.minimum(last)).squeeze(-1)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities up to a factor, and ids, of the candidates, [n, k]: temperature, then top-k, then top-p.

    top-p keeps the smallest set of most probable tokens that reaches p (Holtzman et al. 2020); others get 0.
    """
    probs = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    size = probs.shape[-1]
    if sampling.top_k == 0 and sampling.top_p == 1:
        return probs, torch.arange(size, device=probs.device).expand_as(probs)
    # Sorting the whole vocabulary takes longer than a small model's pass; 1024 tokens nearly always reach p.
    kept, ids = probs.topk(min(sampling.top_k or 1024, size))
    if not sampling.top_k and float(kept.sum(-1).min()) < sampling.top_p:
        kept, ids = probs.topk(size)
    reach = sampling.top_p * (kept.sum(-1, keepdim=True) if sampling.top_k else 1)
    return kept.masked_fill(kept.cumsum(-1) - kept >= reach, 0), ids


class _Sequence:
    """A prompt and what was said so far; `pending` are the tokens that the model has not seen."""

    def __init__(self, prompt: list[int], stream, draws: random.Random) -> None:
        self.pending, self.stream, self.draws = prompt, stream, draws
        self.tokens, self.text, self.finish_reason = [], "", ""

    def take(self, token: int, stop_ids: set[int], sampling: Sampling) -> bool:
        """Add a token; whether the reply has ended."""
        if token in stop_ids:
            self.finish_reason = "stop"
        else:
            self.pending = [token]
            self.tokens.append(token)
            self.text += self.stream.feed(token)
            if len(self.tokens) == sampling.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            self.text += self.stream.flush()
        cuts = [cut for string in sampling.stop if (cut := self.text.find(string)) >= 0]
        if cuts:
            self.text, self.finish_reason = self.text[: min(cuts)], "stop"
        return bool(self.finish_reason)


def _run(model: Mistral, sequences: list, sampling: Sampling, unowned: Tensor, stop_ids: set) -> None:
    cache = _cache(model, sequences, sampling)
    waiting, free, running = deque(sequences), list(range(len(cache.lengths))), {}
    while waiting or running:
        room = PREFILL_TOKENS
        while waiting and free and (room == PREFILL_TOKENS or len(waiting[0].pending) <= room):
            room -= len(waiting[0].pending)
            running[free.pop()] = waiting.popleft()
        slots, active = list(running), list(running.values())
        lengths = [len(one.pending) for one in active]
        tokens = torch.tensor([token for one in active for token in one.pending], device=cache.device)
        logits = model.logits(tokens, AttentionLayout.prefill(lengths, cache, slots), last=True)
        cache.advance(slots, lengths)
        draws = torch.tensor([one.draws.random() for one in active], dtype=torch.float64)
        chosen = next_tokens(logits.masked_fill(unowned, float("-inf")), draws, sampling)
        if isinstance(next(model.parameters()), DTensor):
            # Ranks that differ in one token would wait for each other for ever.
            torch.distributed.broadcast(chosen, src=0)
        for slot, one, token in zip(slots, active, chosen.tolist()):
            if one.take(token, stop_ids, sampling):
                del running[slot]
                cache.free([slot])
                free.append(slot)


def _cache(model: Mistral, sequences: list[_Sequence], sampling: Sampling) -> KVCache:
    config, parameter = model.config, next(model.parameters())
    dtype = model.compute_dtype or parameter.dtype
    room = max((len(one.pending) for one in sequences), default=1) + sampling.max_new_tokens - 1
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    slots = max(1, min(len(sequences), sampling.cache_memory // (room * row)))
    return KVCache(config, slots, room, dtype=dtype, device=parameter.device)


def _encode(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    if tokenizer.chat_template is None:
        raise UserError(f"{tokenizer.folder} states no chat template; give text instead of messages")
    return chat.render(prompt, tokenizer, tokenizer.chat_template, add_generation_prompt=True).tokens


def _unowned(model: Mistral, tokenizer: Tokenizer) -> Tensor:
    """[v] bool: ids without a token, such as rows that pad a vocabulary."""
    owned = [i < tokenizer.vocab_size and tokenizer.piece(i) != "" for i in range(model.config.vocab_size)]
    return ~torch.tensor(owned, device=next(model.parameters()).device)
