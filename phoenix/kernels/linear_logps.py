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
    """A value a row [t], 0 where nothing is asked: logps, entropy (nats), hits (label is arg max),
    mean_logits (over the vocabulary).
    """

    logps: Tensor
    entropy: Tensor
    hits: Tensor
    mean_logits: Tensor


def linear_logps(
    x: Tensor, weight: Tensor, labels: Tensor, *, logits_memory: int = 1 << 30, stats: bool = False
) -> LabelStats:
    """log softmax(x weight^T)[label] for every row with a label, and 0 for the others.

    x [t, d], weight [v, d] of any floating dtype (cast to that of x), labels [t] int64 (-100: nothing asked).
    Log-probs, entropy and the soft-max are fp32 (fp64 stays).  Rows without a label cost nothing.  What the
    backward pass needs of the logits is kept where all of it fits into `logits_memory` bytes, and computed
    again otherwise: same values either way.  All but logps are 0 unless `stats`; they carry no gradient.
    """
    wanted = labels.ne(IGNORE_INDEX).nonzero().squeeze(1)
    keep = torch.is_grad_enabled() and len(wanted) * len(weight) * x.element_size() <= logits_memory
    found = _LinearLogps.apply(x[wanted], weight, labels[wanted], keep, stats)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(labels.shape).index_put((wanted,), values)

    return LabelStats(*map(spread, found))


# On a CPU the steps of a block are what costs beside the products: softmax and amax run at memory speed where
# MKL's exp, argmax (19 times an amax) and softmax with `dtype=` (6 times a cast before it) do not.
class _LinearLogps(torch.autograd.Function):
    """Keeps p - onehot(label), minus the gradient of logp with respect to the logits, in place of the logits:
    the backward pass is two products, and the incoming gradient scales rows of [c, d], not of [c, v].
    """

    @staticmethod
    def forward(ctx, x, weight, labels, keep, stats):
        wide = torch.promote_types(x.dtype, torch.float32)
        logps, entropy, hits, mean_logits = (x.new_zeros(len(x), dtype=wide) for _ in range(4))
        keep, ctx.kept = keep and any(ctx.needs_input_grad), []
        ctx.save_for_backward(x, weight, labels, logps)
        weight = weight.to(x.dtype)
        if stats:
            mean_logits = x.to(wide) @ weight.mean(0, dtype=wide)
        for rows in _chunks(x, weight):
            logits = x[rows] @ weight.T  # [c, v]
            for part, at in _blocks(logits, rows.start):
                values, label = part.to(wide), labels[at, None]
                best, chosen = values.amax(-1, keepdim=True), values.gather(-1, label)
                if stats:
                    hits[at] = _hits(values, label, chosen)
                p = values.sub_(best).softmax(-1)
                log_best = p.amax(-1, keepdim=True).log()  # minus the log of the sum of exp
                logps[at] = (chosen - best + log_best).squeeze(-1)
                if stats:
                    entropy[at] = -torch.linalg.vecdot(p, values) - log_best.squeeze(-1)
                if keep:
                    part.copy_(p.scatter_(-1, label, logps[at, None].expm1()))
            ctx.kept.append(logits if keep else None)
        ctx.mark_non_differentiable(entropy, hits, mean_logits)
        return logps, entropy, hits, mean_logits

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, labels, logps = ctx.saved_tensors
        grad, given, weight = -grad[:, None], weight.dtype, weight.to(x.dtype)
        scaled, dx, dweight = (x * grad).to(x.dtype), torch.empty_like(x), None
        for index, rows in enumerate(_chunks(x, weight)):
            residual = ctx.kept[index]
            if residual is None:
                residual = x[rows] @ weight.T
                for part, at in _blocks(residual, rows.start):
                    values = part.to(grad.dtype)
                    p = values.sub_(values.amax(-1, keepdim=True)).softmax(-1)
                    part.copy_(p.scatter_(-1, labels[at, None], logps[at, None].expm1()))
            ctx.kept[index] = None
            dx[rows] = (residual @ weight) * grad[rows]
            if ctx.needs_input_grad[1]:
                summand = residual.T @ scaled[rows]
                dweight = summand if dweight is None else dweight.to(grad.dtype).add_(summand)  # in fp32
                del summand
            del residual
        del weight  # with the residual, what is large: the gradient may need room for a cast
        return dx, None if dweight is None else dweight.to(given), None, None, None


def _hits(values: Tensor, label: Tensor, chosen: Tensor) -> Tensor:
    """[c] bool: the label is the first arg max of values [c, v]; chosen [c, 1] are the labels' values."""
    if values.is_cuda:
        return values.argmax(-1) == label.squeeze(-1)
    others = values.scatter_(-1, label, -torch.inf).amax(-1, keepdim=True)
    values.scatter_(-1, label, chosen)
    hits, ties = (chosen > others).squeeze(-1), (chosen == others).squeeze(-1).nonzero().squeeze(-1)
    hits[ties] = values[ties].argmax(-1) == label[ties].squeeze(-1)
    return hits


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
