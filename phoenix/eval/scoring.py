"""Bits per byte: how well a model predicts a text, whatever its tokenizer.

    - sum of log p(token) / (ln 2 * UTF-8 bytes of the text)

Sums over all texts are divided once.  Compare models on the same texts, never one language with another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch

from phoenix import chat
from phoenix.model.layout import IGNORE_INDEX, AttentionLayout, PackedBatch
from phoenix.model.mistral import Mistral
from phoenix.tokenizer import Tokenizer

Document = tuple[list[int], list[int]]  # tokens, and each token's label: the next token, or -100
Messages = Sequence[dict[str, str]]


def bits_per_byte(
    model: Mistral,
    tokenizer: Tokenizer,
    conversations: Sequence[Messages],
    template: str,
    *,
    max_tokens: int = 4096,
) -> float:
    """Bits per byte of the assistant's messages, each given what stands before it under the chat template.

    Their content counts alone, neither stop tokens nor other pieces of the template.  max_tokens: of a batch
    (memory); a longer conversation is a batch of its own.  With a sharded model all ranks call alike.
    """
    documents, num_bytes = [], 0
    for messages in conversations:
        rendered = chat.render(messages, tokenizer, template)
        scored = zip(rendered.loss_mask, rendered.is_template)
        labels = [token if mask and not piece else IGNORE_INDEX
                  for token, (mask, piece) in zip(rendered.tokens, scored)]  # fmt: skip
        documents.append((rendered.tokens, [*labels[1:], IGNORE_INDEX]))
        num_bytes += sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
    return _bits(model, documents, num_bytes, max_tokens)


def text_bits_per_byte(
    model: Mistral, tokenizer: Tokenizer, texts: Sequence[str], *, max_tokens: int = 4096
) -> float:
    """Bits per byte of plain texts; BOS (or else EOS) is context only.

    A text beyond the model's positions is scored in windows, each token once, as in lm-eval's rolling
    log-likelihood: a window begins with the last token of the one before, and the last window is filled up
    with earlier tokens.
    """
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise ValueError("the tokenizer has neither BOS nor EOS to stand before a text")
    size, documents = model.config.max_position_embeddings, []
    for text in texts:
        tokens = [first, *tokenizer.encode(text)]
        for start in range(0, len(tokens) - 1, size):
            end = min(start + size, len(tokens) - 1)
            low = max(0, end - size)
            documents.append((tokens[low:end], [IGNORE_INDEX] * (start - low) + tokens[start + 1 : end + 1]))
    return _bits(model, documents, sum(len(text.encode()) for text in texts), max_tokens)


def _bits(model: Mistral, documents: Iterable[Document], num_bytes: int, max_tokens: int) -> float:
    if not num_bytes:
        raise ValueError("there is no text to score")
    device, total, was_training = next(model.parameters()).device, 0.0, model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(documents, max_tokens):
                total += float(model(batch.to(device)).double().sum())
    finally:
        model.train(was_training)
    return -total / (math.log(2) * num_bytes)


def _batches(documents: Iterable[Document], max_tokens: int) -> Iterator[PackedBatch]:
    held: list[Document] = []
    for document in documents:
        if held and sum(len(tokens) for tokens, _ in held) + len(document[0]) > max_tokens:
            yield _packed(held)
            held = []
        held.append(document)
    yield _packed(held)


def _packed(documents: list[Document]) -> PackedBatch:
    tokens, labels = (torch.tensor([i for part in parts for i in part]) for parts in zip(*documents))
    return PackedBatch(tokens, labels, AttentionLayout.packed([len(tokens) for tokens, _ in documents]))
