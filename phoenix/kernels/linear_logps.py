"""Log-probability of each row's label straight from hidden states: logits exist a chunk of rows at a time.

Matrix products run on a chunk as large as memory allows, the steps between them on small blocks of it.

Legend: t rows, c rows of a chunk, d hidden_size, v vocab_size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_BYTES = 256 << 20  # logits of one chunk: each chunk costs a sum of whole weight gradients
BLOCK_BYTES = 4 << 20  # fp32 values of one block of a chunk: fits a CPU's cache; 16 times that on a GPU


class LabelStats(NamedTuple):
    """A value a row [t], 0 where nothing is asked: logps, entropy (nats), hits (label is arg max)."""

    logps: Tensor
    entropy: Tensor
    hits: Tensor


def linear_logps(
    x: Tensor, weight: Tensor, labels: Tensor, *, logits_memory: int = 1 << 30, stats: bool = False
) -> LabelStats:
    """log softmax(x weight^T)[label] for every row with a label, and 0 for the others.

    x [t, d], weight [v, d] of the same dtype, labels [t] int64 (-100: nothing asked).  Log-probs, entropy and
    the soft-max are fp32 (fp64 stays).  Rows without a label cost nothing.  The logits of a backward pass are
    kept where all of them fit into `logits_memory` bytes, and computed again otherwise: same values either
    way.  Entropy and hits are 0 unless `stats`; they carry no gradient.
    """
    wanted = labels.ne(IGNORE_INDEX).nonzero().squeeze(1)
    keep = torch.is_grad_enabled() and len(wanted) * len(weight) * x.element_size() <= logits_memory
    logps, entropy, hits = _LinearLogps.apply(x[wanted], weight, labels[wanted], keep, stats)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).index_put((wanted,), values)

    return LabelStats(spread(logps), spread(entropy), spread(hits))


# softmax and log_softmax of fp32 values, not exp and logsumexp: torch's CPU kernels of these two are up to 10
# times as fast where MKL's exp is slow.  Their `dtype=` would be 6 times slower in bf16 than a cast before.
class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, keep, stats):
        ctx.wide = torch.promote_types(x.dtype, torch.float32)
        logps, entropy, hits = (x.new_zeros(len(x), dtype=ctx.wide) for _ in range(3))
        ctx.kept = []
        for rows in _chunks(x, weight):
            logits = x[rows] @ weight.T  # [c, v]
            for part, at in _blocks(logits, rows.start):
                values = part.to(ctx.wide)
                logp = values.log_softmax(-1)
                logps[at] = logp.gather(-1, labels[at, None]).squeeze(-1)
                if stats:
                    hits[at] = (values.argmax(-1) == labels[at]).to(ctx.wide)
                    entropy[at] = -logp.mul_(values.softmax(-1)).sum(-1)
            ctx.kept.append(logits if keep and any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(x, weight, labels)
        ctx.mark_non_differentiable(entropy, hits)
        return logps, entropy, hits

    @staticmethod
    def backward(ctx, grad, _entropy, _hits):
        x, weight, labels = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), None
        for index, rows in enumerate(_chunks(x, weight)):
            logits = ctx.kept[index] if ctx.kept[index] is not None else x[rows] @ weight.T
            ctx.kept[index] = None
            for part, at in _blocks(logits, rows.start):
                # d logp / d logits = onehot(label) - softmax, written over the logits
                dlogits = part.to(ctx.wide).softmax(-1).mul_(-grad[at, None])
                part.copy_(dlogits.scatter_add_(-1, labels[at, None], grad[at, None]))
            dx[rows] = logits @ weight
            summand = logits.T @ x[rows]
            dweight = summand if dweight is None else dweight.to(ctx.wide).add_(summand)  # summed in fp32
        return dx, dweight.to(weight.dtype), None, None, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    """Rows of the matrix products, at least one slice, be it of no rows."""
    size = max(16, CHUNK_BYTES // (len(weight) * x.element_size()))
    return [slice(start, start + size) for start in range(0, max(1, len(x)), size)]


def _blocks(logits: Tensor, first: int) -> Iterator[tuple[Tensor, slice]]:
    """A chunk's logits as blocks for the steps in fp32, and the rows of each; its row 0 is row `first`."""
    size = max(1, BLOCK_BYTES * (16 if logits.is_cuda else 1) // (4 * logits.shape[1]))
    for start in range(0, len(logits), size):
        part = logits[start : start + size]
        yield part, slice(first + start, first + start + len(part))
