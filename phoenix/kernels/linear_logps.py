"""Log-probability of each row's label straight from hidden states: logits exist a chunk of rows at a time.

Legend: t rows, c rows of a chunk, d hidden_size, v vocab_size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_BYTES = (
    16 << 20
)  # logits of one chunk on a CPU, where its fp32 copy stays in the cache; 16 times that on a GPU


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


# softmax and log_softmax, not exp and logsumexp: torch's CPU kernels of these two are 10 times as fast on
# processors where MKL's exp is slow, and each is one pass over the chunk.
class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, keep, stats):
        ctx.wide = torch.promote_types(x.dtype, torch.float32)
        logps, entropy, hits = (x.new_zeros(len(x), dtype=ctx.wide) for _ in range(3))
        ctx.kept = []
        for rows in _chunks(x, weight):
            logits = x[rows] @ weight.T  # [c, v]
            values = torch.log_softmax(logits, -1, dtype=ctx.wide)
            logps[rows] = values.gather(-1, labels[rows, None]).squeeze(-1)
            if stats:
                hits[rows] = (values.argmax(-1) == labels[rows]).to(ctx.wide)
                entropy[rows] = -values.mul_(torch.softmax(logits, -1, dtype=ctx.wide)).sum(-1)
            ctx.kept.append(logits if keep and any(ctx.needs_input_grad) else None)
        ctx.save_for_backward(x, weight, labels)
        ctx.mark_non_differentiable(entropy, hits)
        return logps, entropy, hits

    @staticmethod
    def backward(ctx, grad, _entropy, _hits):
        x, weight, labels = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=ctx.wide)  # summed over chunks in fp32
        for index, rows in enumerate(_chunks(x, weight)):
            logits = ctx.kept[index] if ctx.kept[index] is not None else x[rows] @ weight.T
            ctx.kept[index] = None
            # d logp / d logits = onehot(label) - softmax
            dlogits = torch.softmax(logits, -1, dtype=ctx.wide).mul_(-grad[rows, None])
            dlogits.scatter_add_(-1, labels[rows, None], grad[rows, None])
            dlogits = dlogits.to(x.dtype)
            dx[rows] = dlogits @ weight
            dweight += dlogits.T @ x[rows]
        return dx, dweight.to(weight.dtype), None, None, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    chunk_bytes = CHUNK_BYTES * (16 if x.is_cuda else 1)
    size = max(16, chunk_bytes // (len(weight) * x.element_size()))
    return [slice(start, start + size) for start in range(0, len(x), size)]
