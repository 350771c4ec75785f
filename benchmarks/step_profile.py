"""Where the time of a training step goes: the share of its matrix products, and the rest by operator.

    python benchmarks/step_profile.py [--output=PATH] [--repeats=7] [--quick]

A step is that of recipes/sft.py on one packed row of 2048 tokens of the peer model: forward with metrics,
backward, norm, clipping, fused AdamW.  Beside it, in turns with it and in the same process, the products of
its linear layers and of its head alone: forward, data gradient and weight gradient, each at its real shape
and in the dtype of the computation.  The products inside attention do not count as such.  `matmul_share` is
the median over repeats of the one time over the other; `operators` is torch's profile of one more step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from side_by_side import PEER_MODEL, TINY_MODEL, environment, spread  # noqa: E402
from step_vs_transformers import make_rows  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from phoenix.files import write_json  # noqa: E402
from phoenix.kernels.linear_logps import IGNORE_INDEX  # noqa: E402
from phoenix.model.layout import AttentionLayout, PackedBatch  # noqa: E402
from phoenix.model.mistral import Mistral, MistralConfig  # noqa: E402
from phoenix.train import distributed, metrics  # noqa: E402
from phoenix.train.optim import build_optimizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "step_profile.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_batch(vocab_size: int, max_length: int) -> PackedBatch:
    tokens, lengths = make_rows(vocab_size, max_length)[0]
    labels = tokens.roll(-1)
    labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
    return PackedBatch(tokens, labels, AttentionLayout.packed(lengths))


def make_step(model: Mistral, batch: PackedBatch) -> Callable[[], None]:
    """The step of recipes/sft.py."""
    world, optimizer = distributed.World(), build_optimizer(model, "adamw", learning_rate=1e-5)
    targets = int((batch.labels != IGNORE_INDEX).sum())

    def step() -> None:
        stats = model(batch, stats=True)
        (-stats.logps.sum() / targets).backward()
        grad_norm, _ = distributed.reduce_gradients(model, world, metrics.sft_sums(stats))
        distributed.scale_gradients(model, grad_norm, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_products(model: Mistral, batch: PackedBatch, dtype: torch.dtype) -> Callable[[], None]:
    """Forward, data gradient and weight gradient of every matrix of the model, and nothing else."""
    shapes = [tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)]
    rows = [batch.layout.num_tokens] * len(shapes) + [int((batch.labels != IGNORE_INDEX).sum())]
    shapes.append(tuple(model.lm_head.weight.shape))
    # One set of operands a shape: as in a step, a matrix has left the cache when its turn comes again.
    operands: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}
    for (out, inner), t in zip(shapes, rows):
        if (out, inner, t) not in operands:
            made = (torch.randn(size).to(dtype) for size in ((t, inner), (out, inner), (t, out)))
            operands[out, inner, t] = tuple(made)

    def products() -> None:
        for (out, inner), t in zip(shapes, rows):
            x, weight, grad = operands[out, inner, t]
            torch.mm(x, weight.T), torch.mm(grad, weight), torch.mm(grad.T, x)

    return products


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(config: MistralConfig, dtype: torch.dtype, max_length: int, repeats: int) -> dict[str, Any]:
    model = Mistral(config).init_weights(torch.Generator().manual_seed(0)).train()
    model.compute_dtype = dtype
    batch = make_batch(config.vocab_size, max_length)
    step, products = make_step(model, batch), make_products(model, batch, dtype)
    times = [(seconds(step), seconds(products)) for _ in range(repeats + 2)][2:]
    steps, alone = (list(column) for column in zip(*times))
    shares = [b / a for a, b in times]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    flops = metrics.training_flops(config, batch.layout.q_length)
    return {
        "matmul_share": statistics.median(shares), "matmul_share_min": min(shares),
        "matmul_share_max": max(shares), "step_seconds": statistics.median(steps),
        "products_seconds": statistics.median(alone), "spread": max(spread(steps), spread(alone)),
        "tokens_per_second": max_length / statistics.median(steps),
        "gflops_of_the_step": flops / statistics.median(steps) / 1e9,
        "gflops_of_a_square_product": metrics.measure_gemm(torch.device("cpu"), dtype) / 1e9,
        "operators": {row.key: round(row.self_cpu_time_total / total, 4) for row in rows[:20]},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--repeats", type=int, default=7, help="steps and sets of products that are timed")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a short row")
    options = parser.parse_args()
    distributed.keep_freed_memory()
    config, max_length = (TINY_MODEL, 128) if options.quick else (PEER_MODEL, 2048)
    report: dict[str, Any] = {"environment": environment(["torch"]), "quick": options.quick}
    for name, dtype in DTYPES.items():
        report[name] = measure(config, dtype, max_length, options.repeats)
        print(name, {key: value for key, value in report[name].items() if key != "operators"}, flush=True)
    report["load_after"] = os.getloadavg()[0]
    write_json(options.output, report)
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
