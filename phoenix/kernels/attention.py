"""Attention over a flat stream: grouped queries, causal, with a sliding window.

`attention` is the one signature; `IMPLEMENTATIONS` at the end of the file is the place for a further backend.

    torch   SDPA segment by segment; any device and dtype; keys in one or two ranges
    varlen  torch.nn.attention.varlen, CUDA, fp16 and bf16
    flash   the flash-attn package (extra `flash`), CUDA, fp16 and bf16

Legend: t query rows, s key rows, h query heads, g key/value heads, e head_dim.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from phoenix.files import require

if TYPE_CHECKING:
    from phoenix.model.layout import AttentionLayout

SHORT = 384  # keys of a segment up to which its backward pass on a CPU runs in fp32


def attention(
    q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, *, window: int | None, impl: str = "auto"
) -> Tensor:
    """softmax(q k^T / sqrt(e)) v for every segment of the layout, causal, aligned to the end of its keys.

    q [t, h, e], k and v [s, g, e] with h a multiple of g (query head i reads key head i // (h // g), Ainslie
    et al. 2023); returns [t, h, e].  window W: a query sees the last W keys up to its own position, itself
    included (Mistral 7B, section 2); None sees all.  impl "auto": on CUDA in fp16 or bf16 `flash` where
    flash-attn is installed, otherwise `varlen`; everything else `torch`.  Raises ValueError for shapes that
    do not fit.
    """
    fits = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    if not fits or q.shape[0] != layout.num_tokens or q.shape[1] % k.shape[1]:
        shapes = [list(x.shape) for x in (q, k, v)]
        raise ValueError(
            f"expected q [t, h, e] with t = {layout.num_tokens}, k and v [s, g, e], got {shapes}"
        )
    if window is not None and window < 1:
        raise ValueError(f"expected a window of at least 1 key, or None, got {window}")
    vendors = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)
    if impl == "auto":
        impl = _vendor() if vendors else "torch"
    if impl not in IMPLEMENTATIONS or (impl != "torch" and not vendors):
        raise ValueError(
            f"impl {impl!r} cannot run in {q.dtype} on {q.device}; "
            f"of {', '.join(IMPLEMENTATIONS)} only torch runs without CUDA and a 16-bit dtype"
        )
    return IMPLEMENTATIONS[impl](q, k, v, layout, window)


@torch.compiler.assume_constant_result
def _vendor() -> str:
    return "flash" if importlib.util.find_spec("flash_attn") else "varlen"


def _torch(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, window: int | None) -> Tensor:
    out, _ = _segments(q, k, v, layout.q_length, layout.k_start, layout.k_length, window or 0)
    return out


# An operator of its own keeps lengths out of compiled graphs, and lets the backward pass add into one buffer
# a tensor instead of building a full-size gradient for each slice.
@torch.library.custom_op("phoenix::segment_attention", mutates_args=())
def _segments(
    q: Tensor, k: Tensor, v: Tensor, q_length: Tensor, k_start: Tensor, k_length: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))  # [h, t]
    for rows, ranges, mask, causal in _blocks(q_length, k_start, k_length, window, k):
        keys, values = _gather(k, ranges), _gather(v, ranges)
        part, part_lse = _forward(_heads(q[rows]), keys, values, mask, causal)
        out[rows] = part[0].transpose(0, 1)
        lse[:, rows] = part_lse[0]
    return out, lse


@_segments.register_fake
def _(q, k, v, q_length, k_start, k_length, window):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        q.shape[1], q.shape[0], dtype=lse_dtype
    )


@torch.library.custom_op("phoenix::segment_attention_backward", mutates_args=())
def _segments_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    q_length: Tensor, k_start: Tensor, k_length: Tensor, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)  # each row is written once
    dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for rows, ranges, mask, causal in _blocks(q_length, k_start, k_length, window, k):
        keys, values = _gather(k, ranges), _gather(v, ranges)
        parts = _backward(
            _heads(grad[rows]),
            _heads(q[rows]),
            keys,
            values,
            _heads(out[rows]),
            lse[:, rows][None],
            mask,
            causal,
        )
        dq[rows] = parts[0][0].transpose(0, 1)
        for total, part in ((dk, parts[1]), (dv, parts[2])):
            pieces = part[0].transpose(0, 1).split([end - start for start, end in ranges])
            for (start, end), piece in zip(ranges, pieces):
                total[start:end] += piece
    return dq, dk, dv


@_segments_backward.register_fake
def _(grad, q, k, v, out, lse, q_length, k_start, k_length, window):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _segments_autograd(ctx, grad: Tensor, _grad_lse: Tensor) -> tuple:
    q, k, v, q_length, k_start, k_length, out, lse = ctx.saved_tensors
    grads = _segments_backward(grad, q, k, v, out, lse, q_length, k_start, k_length, ctx.window)
    return (*grads, None, None, None, None)


_segments.register_autograd(_segments_autograd, setup_context=_save_for_backward)


def _blocks(
    q_length: Tensor, k_start: Tensor, k_length: Tensor, window: int, k: Tensor
) -> Iterator[tuple[slice, list[tuple[int, int]], Tensor | None, bool]]:
    """Each segment as blocks of queries: their rows, their ranges of key rows, and a mask [queries, keys]
    unless plain causality (as many queries as keys) or none (a single query) is all there is to it.

    A segment longer than the window is cut into blocks of `window` queries, which see < 2 window keys.
    """
    row = 0
    if int((k_start + k_length).max()) > len(k):
        raise ValueError(f"the layout names key row {int((k_start + k_length).max()) - 1} of {len(k)} rows")
    for length, starts, counts in zip(q_length.tolist(), k_start.tolist(), k_length.tolist()):
        total = sum(counts)
        step = length if not window or total <= window else window
        for first in range(0, length, step):
            last = min(first + step, length)
            low = max(0, total - length + first - window + 1) if window else 0
            high = total - length + last
            rows, num_q, num_k = slice(row + first, row + last), last - first, high - low
            masked = num_q > 1 and (num_q != num_k or bool(window and num_k > window))
            mask = _mask(num_q, num_k, window or num_k, k.device) if masked else None
            yield rows, _cut(starts, counts, low, high), mask, num_q > 1 and not masked
        row += length


def _mask(num_q: int, num_k: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys], True where seen; the last query sees the last key.

    num_q 2, num_k 4, window 2: 0110, 0011.
    """
    last = torch.arange(num_k - num_q, num_k, device=device)[:, None]
    key = torch.arange(num_k, device=device)[None]
    return (key <= last) & (key > last - window)


def _cut(starts: list[int], counts: list[int], low: int, high: int) -> list[tuple[int, int]]:
    """Key rows of the keys `low : high` of a segment, whose ranges are numbered through."""
    ranges, before = [], 0
    for start, count in zip(starts, counts):
        begin, end = max(low - before, 0), min(high - before, count)
        if begin < end:
            ranges.append((start + begin, start + end))
        before += count
    return ranges


def _heads(x: Tensor) -> Tensor:
    return x.transpose(0, 1)[None]  # [rows, heads, e] -> [1, heads, rows, e]


def _gather(x: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    parts = [x[start:end] for start, end in ranges]
    return _heads(parts[0] if len(parts) == 1 else torch.cat(parts))


def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """SDPA of one block [1, heads, rows, e]; on a CPU with the log-sum-exp [1, h, rows] for the backward."""
    if q.device.type == "cpu":
        if q.dtype == torch.bfloat16 and q.shape[2] == 1:
            # The bf16 kernel repacks all keys first: 539 us for one query and 400 keys, 131 us in fp32.
            out, lse = _forward(q.float(), k.float(), v.float(), mask, causal)
            return out.to(q.dtype), lse
        bias = (
            None if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
        )
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias
        )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    return out, out.new_zeros(out.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        # torch's bf16 kernel has a high price a call: 8 times that of fp32 at 16 keys, 1.2 times at 384
        dtype = q.dtype if k.shape[2] > SHORT else torch.promote_types(q.dtype, torch.float32)
        bias = (
            None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        )
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        inputs = (x.to(dtype) for x in (grad, q, k, v, out))
        return op(*inputs, lse, 0.0, causal, attn_mask=bias)
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        again = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return torch.autograd.grad(again, (q, k, v), grad)


def _contiguous_keys(x: Tensor, layout: AttentionLayout) -> Tensor:
    """Key rows [s, g, e] in the order of the segments, as the kernels of cu_seqlens_k want them."""
    starts, counts = layout.k_start.flatten().tolist(), layout.k_length.flatten().tolist()
    ranges = [(start, start + count) for start, count in zip(starts, counts) if count]
    adjacent = all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))
    if adjacent and ranges[0][0] == 0 and ranges[-1][1] == x.shape[0]:
        return x
    return torch.cat([x[start:end] for start, end in ranges])


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, window: int | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    k, v = _contiguous_keys(k, layout), _contiguous_keys(v, layout)
    # Mistral's window counts the query itself; the left bound of flash attention does not.
    left = window - 1 if window else -1
    lengths = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_q, layout.max_k)
    return varlen_attn(q, k, v, *lengths, window_size=(left, 0), **_grouped_queries())


@torch.compiler.assume_constant_result
def _grouped_queries() -> dict[str, bool]:
    """varlen_attn of torch 2.11 takes grouped queries as they come, later ones want `enable_gqa` for them."""
    from torch.nn.attention.varlen import varlen_attn

    return {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: AttentionLayout, window: int | None) -> Tensor:
    flash_attn = require("flash_attn", extra="flash")
    k, v = _contiguous_keys(k, layout), _contiguous_keys(v, layout)
    left = window - 1 if window else -1
    lengths = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_q, layout.max_k)
    return flash_attn.flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=(left, 0))


IMPLEMENTATIONS = {"torch": _torch, "varlen": _varlen, "flash": _flash}
