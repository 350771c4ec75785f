"""Log-probability of each row's label straight from hidden states: logits exist a chunk of rows at a time.

Legend: t rows, c rows of a chunk, d hidden_size, v vocab_size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_BYTES = 64 << 20  # logits of one chunk; larger chunks were no faster on CPU or GPU


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
    logps, entropy, hits = _LinearLogps.apply(x[wanted], weight, labels[wanted], logits_memory, stats)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).index_put((wanted,), values)

    return LabelStats(spread(logps), spread(entropy), spread(hits))


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, logits_memory, stats):
        wide = torch.promote_types(x.dtype, torch.float32)
        logps, lse, entropy, hits = (x.new_zeros(len(x), dtype=wide) for _ in range(4))
        keep = len(x) * len(weight) * x.element_size() <= logits_memory and any(ctx.needs_input_grad)
        ctx.kept = []
        for rows in _chunks(x, weight):
            logits = x[rows] @ weight.T  # [c, v]
            values = logits.to(wide)
            lse[rows] = values.logsumexp(-1)
            logps[rows] = values.gather(-1, labels[rows, None]).squeeze(-1) - lse[rows]
            if stats:
                entropy[rows] = lse[rows] - ((values - lse[rows, None]).exp() * values).sum(-1)
                hits[rows] = (values.argmax(-1) == labels[rows]).to(wide)
            ctx.kept.append(logits if keep else None)
        ctx.save_for_backward(x, weight, labels, lse)
        ctx.mark_non_differentiable(entropy, hits)
        return logps, entropy, hits

    @staticmethod
    def backward(ctx, grad, _entropy, _hits):
        x, weight, labels, lse = ctx.saved_tensors
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=lse.dtype)  # summed over chunks in fp32
        for index, rows in enumerate(_chunks(x, weight)):
            logits = ctx.kept[index] if ctx.kept[index] is not None else x[rows] @ weight.T
            ctx.kept[index] = None
            # d logp / d logits = onehot(label) - softmax
            dlogits = (logits.to(lse.dtype) - lse[rows, None]).exp_().mul_(-grad[rows, None])
            dlogits.scatter_add_(-1, labels[rows, None], grad[rows, None])
            dlogits = dlogits.to(x.dtype)
            dx[rows] = dlogits @ weight
            dweight += dlogits.T @ x[rows]
        return dx, dweight.to(weight.dtype), None, None, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    size = max(16, CHUNK_BYTES // (len(weight) * x.element_size()))
    return [slice(start, start + size) for start in range(0, len(x), size)]
