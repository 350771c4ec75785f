"""Attention against a full-mask fp64 attention written here, over lengths, windows, groups and layouts."""

import itertools
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from phoenix.kernels.attention import IMPLEMENTATIONS, attention
from phoenix.model.cache import KVCache
from phoenix.model.layout import AttentionLayout
from phoenix.model.mistral import MistralConfig

IMPLS = [name if name == "torch" else pytest.param(name, marks=pytest.mark.gpu) for name in IMPLEMENTATIONS]
LENGTHS = [[1], [5, 3], [1, 1, 7], [17]]
WINDOWS = [None, 1, 2, 7, 100]
HEADS = [(2, 2), (4, 2), (4, 1)]


def visible(layout, num_keys: int, window: int | None) -> torch.Tensor:
    """[t, s], by loops: the last query of a segment sees its last key, each at most `window` keys."""
    mask, row = torch.zeros(layout.num_tokens, num_keys, dtype=torch.bool), 0
    for length, starts, counts in zip(layout.q_length, layout.k_start, layout.k_length):
        keys = [int(start) + i for start, count in zip(starts, counts) for i in range(int(count))]
        for query in range(int(length)):
            end = len(keys) - int(length) + query + 1
            for key in keys[max(0, end - (window or end)) : end]:
                mask[row, key] = True
            row += 1
    return mask


def naive_attention(q, k, v, mask):
    """fp64, one head at a time, every score computed; q [t, h, e], k and v [s, g, e], mask [t, s]."""
    q, k, v = q.double(), k.double(), v.double()
    heads = []
    for head in range(q.shape[1]):
        group = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, group].T / q.shape[2] ** 0.5
        heads.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v[:, group])
    return torch.stack(heads, 1)


def make(layout, heads, dtype=torch.float64, num_keys=None, device="cpu", head_dim=8, seed=0):
    """Random q, k, v and a random gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    t, s, (h, g) = layout.num_tokens, num_keys or layout.num_tokens, heads
    shapes = [(t, h, head_dim), (s, g, head_dim), (s, g, head_dim), (t, h, head_dim)]
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.requires_grad_() for x in made[:3]], made[3]


def layouts():
    yield from (AttentionLayout.packed(lengths) for lengths in LENGTHS)
    yield from (AttentionLayout.shared_prefix(*case) for case in [(1, [2, 3]), (5, [1, 2, 4]), (9, [3])])


def run(function, inputs, grad):
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", WINDOWS)
def test_values_and_gradients_are_exact_in_fp64(heads, window):
    for layout in layouts():
        inputs, grad = make(layout, heads)
        mask = visible(layout, layout.num_tokens, window)
        found = run(partial(attention, layout=layout, window=window, impl="torch"), inputs, grad)
        exact = run(partial(naive_attention, mask=mask), inputs, grad)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    layout = AttentionLayout.shared_prefix(3, [2, 1])
    inputs, _ = make(layout, (2, 1), head_dim=4)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, layout, window=3, impl="torch"), inputs)


def test_opcheck():
    layout = AttentionLayout.packed([2, 1])
    (q, k, v), _ = make(layout, (2, 1), torch.float32, head_dim=4)
    arguments = (q, k, v, layout.q_length, layout.k_start, layout.k_length, 0)
    torch.library.opcheck(torch.ops.phoenix.segment_attention.default, arguments)


def plain_attention(q, k, v, mask):
    """Full-mask attention in the dtype of q, scores and softmax in fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("the,she->hts", q, k).float() / q.shape[2] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
    return torch.einsum("hts,she->the", weights, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_error_is_at_most_twice_that_of_plain_torch(impl, dtype):
    """The largest error over all layouts, windows and heads, for the output and for each gradient."""
    device = "cpu" if impl == "torch" else "cuda"
    if impl != "torch" and dtype == torch.float32:
        pytest.skip("the vendors' attention has 16 bits")
    errors, floors = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for layout, heads, window in itertools.product(layouts(), HEADS, (None, 1, 2, 7)):
        layout = layout.to(device)
        inputs, grad = make(layout, heads, dtype, device=device, head_dim=16)
        mask = visible(layout, layout.num_tokens, window).to(device)
        exact = run(partial(naive_attention, mask=mask), inputs, grad)
        plain = run(partial(plain_attention, mask=mask), inputs, grad)
        found = run(partial(attention, layout=layout, window=window, impl=impl), inputs, grad)
        for i, (e, p, f) in enumerate(zip(exact, plain, found)):
            smallest = torch.finfo(dtype).eps * e.abs().max()
            floors[i] = max(floors[i], (p - e).abs().max().item(), smallest.item())
            errors[i] = max(errors[i], (f - e).abs().max().item())
    assert (errors <= 2 * floors).all(), f"out, dq, dk, dv are off by {errors}, plain torch by {floors}"


def cache_of(lengths, room=16, heads=2):
    config = MistralConfig(num_hidden_layers=1, num_key_value_heads=heads, head_dim=8)
    cache = KVCache(config, len(lengths), room, dtype=torch.float64, device="cpu")
    for rows in (*cache.keys, *cache.values):
        rows.copy_(
            torch.randn(rows.shape, dtype=torch.float64)
        )  # what lies behind a slot's length is never read
    cache.advance(range(len(lengths)), lengths)
    return cache


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("slots, lengths", [([0, 1, 2], [1, 1, 1]), ([2, 0], [3, 5]), ([1], [9])])
def test_new_tokens_against_a_cache(slots, lengths, window):
    cache = cache_of([4, 0, 7])
    layout = AttentionLayout.prefill(lengths, cache, slots)
    (q, *_), _ = make(layout, (4, 2))
    found = attention(q, cache.keys[0], cache.values[0], layout, window=window)
    mask, row = torch.zeros(len(q), 48, dtype=torch.bool), 0
    for slot, length in zip(slots, lengths):
        for i in range(length):
            end = int(cache.lengths[slot]) + i + 1
            mask[row, 16 * slot + max(0, end - (window or end)) : 16 * slot + end] = True
            row += 1
    torch.testing.assert_close(found, naive_attention(q, cache.keys[0], cache.values[0], mask))


def test_gradients_of_unseen_keys_are_zero():
    layout = AttentionLayout.packed([3, 2])
    inputs, grad = make(layout, (2, 1))
    grad[:3] = 0
    _, _, dk, dv = run(partial(attention, layout=layout, window=None), inputs, grad)
    assert not dk[:3].any() and not dv[:3].any() and dk[3:].any()


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        ([(4, 2, 8), (5, 2, 8), (5, 2, 8)], {}, r"t = 5, .* got \[\[4, 2, 8\]"),
        ([(5, 2, 8), (5, 2, 8), (4, 2, 8)], {}, "got"),
        ([(5, 3, 8), (5, 2, 8), (5, 2, 8)], {}, "got"),
        ([(5, 2, 8), (5, 2, 4), (5, 2, 4)], {}, "got"),
        ([(5, 16), (5, 16), (5, 16)], {}, "got"),
        ([(5, 2, 8), (4, 2, 8), (4, 2, 8)], {}, "key row 4 of 4 rows"),
        ([(5, 2, 8)] * 3, {"window": 0}, "window of at least 1 key, or None, got 0"),
        ([(5, 2, 8)] * 3, {"window": -1}, "window of at least 1 key"),
        ([(5, 2, 8)] * 3, {"impl": "flsh"}, "'flsh' cannot run .* torch, varlen, flash"),
        ([(5, 2, 8)] * 3, {"impl": "varlen"}, "'varlen' cannot run in torch.float32 on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*map(torch.zeros, shapes), AttentionLayout.packed([3, 2]), **{"window": None, **options})


def test_compiles_whole_and_once_for_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()

    def double(q, k, v, layout):
        return attention(2 * q, k, v, layout, window=4) * 2

    compiled = torch.compile(double, backend=counter, fullgraph=True, dynamic=True)
    # A lone document has a graph of its own: torch specialises sizes of 1.
    for lengths, graphs in (([3, 2, 6], 1), ([1, 1, 1, 1, 9], 1), ([7, 3], 1), ([5], 2), ([8], 2)):
        layout = AttentionLayout.packed(lengths)
        inputs, grad = make(layout, (4, 2), torch.float32)
        found = run(partial(compiled, layout=layout), inputs, grad)
        expected = run(partial(double, layout=layout), inputs, grad)
        torch.testing.assert_close(found, expected)
        assert counter.frame_count == graphs, f"lengths {lengths} compiled again"
