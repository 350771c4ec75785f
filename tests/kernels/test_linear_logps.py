"""Label log-probabilities in chunks against log_softmax over all logits."""

import pytest
import torch

from phoenix.kernels import linear_logps as module
from phoenix.kernels.linear_logps import IGNORE_INDEX, linear_logps

WIDTH, VOCAB = 8, 33


def naive(x, weight, labels):
    """log softmax(x weight^T)[label], entropy, hits and the mean logit, a row at a time; 0 where the label is
    -100."""
    rows = []
    for row, label in zip(x, labels.tolist()):
        logits = weight @ row
        logps = logits.log_softmax(-1)
        zero = 0 * logps.sum()
        if label == -100:
            rows.append((zero, zero, zero, zero))
        else:
            hit, entropy = zero + (logps.argmax() == label), -(logps.exp() * logps).sum()
            rows.append((logps[label], entropy, hit, logits.mean()))
    return [torch.stack(column) for column in zip(*rows)]


def make(rows, counted, dtype=torch.float64, seed=0):
    """x, weight and labels of which the first, the last and others are ignored, `counted` are not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    labels = torch.full((rows,), IGNORE_INDEX)
    chosen = torch.randperm(rows, generator=generator)[:counted]
    labels[chosen] = torch.randint(0, VOCAB, (counted,), generator=generator)
    return x, weight, labels


@pytest.fixture(autouse=True)
def chunks_of_16_rows(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 16 * VOCAB * 8)


@pytest.mark.parametrize("logits_memory", [0, 1 << 30])
@pytest.mark.parametrize("rows, counted", [(1, 1), (20, 15), (16, 16), (17, 17), (60, 48), (60, 49)])
def test_values_and_gradients_are_those_of_log_softmax(rows, counted, logits_memory):
    x, weight, labels = make(rows, counted)
    found = linear_logps(x, weight, labels, logits_memory=logits_memory, stats=True)
    expected = naive(x, weight, labels)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)
    grad = torch.randn(rows, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(found.logps, (x, weight), grad),
        torch.autograd.grad(expected[0], (x, weight), grad),
    )


def test_gradcheck():
    x, weight, labels = make(19, 18)
    for memory in (0, 1 << 30):
        function = lambda x, w, m=memory: linear_logps(x, w, labels, logits_memory=m).logps  # noqa: E731
        assert torch.autograd.gradcheck(function, (x, weight))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kept_logits_equal_logits_computed_again(dtype):
    x, weight, labels = make(60, 50, dtype)
    results = []
    for memory in (0, 1 << 30):
        found = linear_logps(x, weight, labels, logits_memory=memory).logps
        results.append((found, *torch.autograd.grad(found.sum(), (x, weight))))
    for recomputed, kept in zip(*results):
        assert torch.equal(recomputed, kept)


def test_logits_memory_decides_what_is_kept(monkeypatch):
    """The bytes of all counted logits keep them, one byte less does not; without gradients none is kept."""
    kept, forward = [], module._LinearLogps.forward

    def spy(ctx, *inputs):
        outputs = forward(ctx, *inputs)
        kept.append([logits is not None for logits in ctx.kept])
        return outputs

    monkeypatch.setattr(module._LinearLogps, "forward", staticmethod(spy))
    x, weight, labels = make(60, 50)
    for memory in (50 * VOCAB * 8, 50 * VOCAB * 8 - 1):
        linear_logps(x, weight, labels, logits_memory=memory)
    with torch.no_grad():
        linear_logps(x, weight, labels)
    linear_logps(x.detach(), weight.detach(), labels)
    assert kept == [[True] * 4, [False] * 4, [False] * 4, [False] * 4]


@pytest.mark.parametrize("stats", [False, True])
def test_no_counted_row_gives_a_zero_that_has_a_gradient(stats):
    x, weight, _ = make(5, 5)
    found = linear_logps(x, weight, torch.full((5,), IGNORE_INDEX), stats=stats)
    assert not found.logps.any()
    found.logps.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x)) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_ignored_rows_are_never_read():
    x, weight, labels = make(20, 10)
    wild = x.detach().clone()
    wild[labels == IGNORE_INDEX] = torch.nan
    assert torch.equal(linear_logps(wild, weight, labels).logps, linear_logps(x, weight, labels).logps)


def test_stats_are_off_unless_asked_and_carry_no_gradient():
    x, weight, labels = make(20, 10)
    found = linear_logps(x, weight, labels)
    assert not found.entropy.any() and not found.hits.any()
    found = linear_logps(x, weight, labels, stats=True)
    assert not found.entropy.requires_grad and not found.hits.requires_grad and found.logps.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_the_arg_max(dtype):
    """As torch.argmax has it.  Logits are small whole numbers, so many rows have their maximum twice."""
    weight = torch.randint(-1, 2, (VOCAB, WIDTH), generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randint(-1, 2, (60, WIDTH), generator=torch.Generator().manual_seed(1)).to(dtype)
    logits = x @ weight.T
    ties = (logits == logits.amax(-1, keepdim=True)).sum(-1)
    assert (ties > 1).sum() > 10
    last = logits.shape[1] - 1 - logits.flip(-1).argmax(-1)
    for labels in (logits.argmax(-1), last):
        found = linear_logps(x, weight, labels, stats=True).hits
        assert torch.equal(found, (logits.argmax(-1) == labels).float())


def test_large_logits_stay_finite():
    x, weight, labels = make(20, 20)
    found = linear_logps(1e4 * x, weight, labels, stats=True)
    assert all(values.isfinite().all() for values in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_torch(dtype):
    """Plain torch: logits in this dtype, log_softmax in fp32; the gradient of the mean over counted rows."""
    for seed in range(5):
        x, weight, labels = make(60, 50, dtype, seed)

        def run(function, x, weight):
            logps = function(x, weight)
            return [logps, *torch.autograd.grad(logps.sum() / 50, (x, weight))]

        def plain(x, weight, labels=labels):
            logps = (x @ weight.T).float().log_softmax(-1)
            return logps.gather(-1, labels.clamp(min=0)[:, None])[:, 0] * (labels != IGNORE_INDEX)

        wide = [y.detach().double().requires_grad_() for y in (x, weight)]
        exact = run(lambda x, w, labels=labels: naive(x, w, labels)[0], *wide)
        floor, found = run(plain, x, weight), run(lambda x, w: linear_logps(x, w, labels).logps, x, weight)  # noqa: B023
        for name, e, f, y in zip(("logps", "dx", "dweight"), exact, floor, found):
            smallest = torch.finfo(y.dtype).eps * e.abs().max()
            allowed = 2 * (f.double() - e).abs().max().clamp(min=smallest)
            error = (y.double() - e).abs().max()
            assert error <= allowed, f"{name} is off by {error:.1e}, plain torch by {allowed / 2:.1e}"


def test_log_probabilities_of_bf16_are_fp32():
    x, weight, labels = make(20, 20, torch.bfloat16)
    assert all(values.dtype == torch.float32 for values in linear_logps(x, weight, labels, stats=True))


@pytest.mark.parametrize("logits_memory", [0, 1 << 30])
def test_a_wider_weight_counts_as_its_cast_and_gets_a_gradient_of_its_own_dtype(logits_memory):
    """Several chunks of rows: the gradient of an fp32 weight is their sum before it is rounded to bf16."""
    x, _, labels = make(60, 50, torch.bfloat16)
    weight = make(60, 50, torch.float32)[1]
    results, kept = [], []
    for w in (weight, weight.detach().bfloat16().requires_grad_()):
        with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
            found = linear_logps(x, w, labels, logits_memory=logits_memory, stats=True)
        results.append((*found, *torch.autograd.grad(found.logps.sum(), (x, w))))
        if w is weight:
            assert not any(y.shape == w.shape and y.dtype == torch.bfloat16 for y in kept)
    assert results[0][-1].dtype == torch.float32
    for mixed, narrow in zip(*results):
        assert torch.equal(mixed.to(narrow.dtype), narrow)
