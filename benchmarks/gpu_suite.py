"""Everything that needs a GPU to be checked or measured, in one command and under 5 minutes.

    python benchmarks/gpu_suite.py [--output=PATH]
    python benchmarks/gpu_suite.py --dry-run

Needs torch, numpy, safetensors and tokenizers; the repository need not be installed, weights are random.  A
result is printed as a line of JSON as soon as it is known; all go to benchmarks/results/gpu_suite.json at the
end, also after Ctrl-C or SIGTERM.  A failing check does not stop the others, but the exit code is 1.

Checks hold the error rule of the tests: at most twice plain torch's error in the same dtype, against fp64.
Steps are whole training steps (forward, backward, AdamW on fp32 masters, bf16 compute) on full rows of
2048 tokens made of documents of log-normal length; MFU counts the attention of each document.  --dry-run has
tiny shapes on the CPU, the same code (compiled functions run eagerly), and writes only with --output.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from phoenix.files import write_json  # noqa: E402
from phoenix.kernels.attention import attention  # noqa: E402
from phoenix.kernels.linear_logps import linear_logps  # noqa: E402
from phoenix.model.cache import KVCache  # noqa: E402
from phoenix.model.layout import AttentionLayout, PackedBatch  # noqa: E402
from phoenix.model.mistral import Mistral, MistralConfig  # noqa: E402
from phoenix.train.distributed import World, parallelize  # noqa: E402
from phoenix.train.metrics import peak_flops, training_flops  # noqa: E402
from phoenix.train.optim import build_optimizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu_suite.json"


@dataclass(frozen=True)
class Size:
    """What a run takes: documents of the checks, the step's models, rows and repeats."""

    device: torch.device
    lengths: tuple[int, ...]  # of documents in the checks, longer than the window
    window: int
    vocab_size: int
    models: dict[str, MistralConfig]
    max_length: int
    micro_batch_tokens: int
    warmup: int
    repeats: int


def full_size() -> Size:
    def shape(hidden, layers, heads, groups, head_dim, ffn) -> MistralConfig:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        sizes = (hidden, layers, heads, groups, head_dim)
        return MistralConfig(**dict(zip(names, sizes)), intermediate_size=ffn)

    models = {
        "0.5B": shape(1024, 28, 16, 4, 64, 4096),
        "1.5B": shape(2048, 24, 16, 4, 128, 8192),
        "7.24B": MistralConfig(),
    }
    lengths = (300, 1, 517, 64, 1200)
    return Size(torch.device("cuda"), lengths, 200, 32000, models, 2048, 16384, 3, 8)


def dry_size() -> Size:
    models = dict.fromkeys(("0.5B", "1.5B", "7.24B"), check_config(None, 64))
    return Size(torch.device("cpu"), (9, 1, 14), 5, 64, models, 32, 64, 1, 1)


def check_config(window: int | None, vocab_size: int) -> MistralConfig:
    """Small, 4 query heads a key head, weights so large that positions and windows are felt."""
    return MistralConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, sliding_window=window,
        initializer_range=0.1,
    )  # fmt: skip


# Checks


def worst_error(found: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """The largest |found - exact| over the largest |plain - exact|, which counts as one rounding at least."""
    ratios = []
    for f, p, e in zip(found, plain, exact, strict=True):
        floor = (p.double() - e).abs().max().clamp(min=torch.finfo(f.dtype).eps * e.abs().max())
        ratios.append(float((f.double() - e).abs().max() / floor))
    worst = max(ratios)
    assert worst <= 2, f"the error is {worst:.2f} times that of plain torch, allowed are 2"
    return {"error_ratio": worst}


def model_in(dtype: torch.dtype, size: Size) -> Mistral:
    generator = torch.Generator(size.device).manual_seed(0)
    model = Mistral(check_config(size.window, size.vocab_size), dtype=torch.float32, device=size.device)
    return model.init_weights(generator).to(torch.bfloat16).to(dtype)  # the same weights in every dtype


def documents(size: Size) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randint(0, size.vocab_size, (length,), generator=generator) for length in size.lengths]
    return [document.to(size.device) for document in made]


def label_batch(parts: list[Tensor]) -> PackedBatch:
    """Each document predicts its own next tokens; its last row is not asked."""
    labels = torch.cat([torch.cat([part[1:], part.new_tensor([-100])]) for part in parts])
    layout = AttentionLayout.packed([len(part) for part in parts]).to(labels.device)
    return PackedBatch(torch.cat(parts), labels, layout)


def packed_equals_one_by_one(size: Size, dtype: torch.dtype) -> dict[str, float]:
    """Label log-probs and all gradients; plain torch: the same dtype, a document at a time."""

    def run(dtype: torch.dtype, groups: list[list[Tensor]]) -> list[Tensor]:
        model = model_in(dtype, size)
        logps = torch.cat([model(label_batch(group)) for group in groups])
        return [logps.detach(), *torch.autograd.grad(logps.sum(), list(model.parameters()))]

    parts = documents(size)
    alone = [[part] for part in parts]
    return worst_error(run(dtype, [parts]), run(dtype, alone), run(torch.float64, alone))


@torch.no_grad()
def cached_equals_full(size: Size, dtype: torch.dtype) -> dict[str, float]:
    """Prompts of all but 4 tokens and 4 single ones over a cache, against the logits of whole documents."""
    parts = [part for part in documents(size) if len(part) > 4]
    full = AttentionLayout.packed([len(part) for part in parts]).to(size.device)
    tails = full.cu_seqlens_q[1:, None].long() + torch.arange(
        -5, 0, device=size.device
    )  # the last 5 rows of each

    model, slots = model_in(dtype, size), list(range(len(parts)))
    cache = KVCache(model.config, len(parts), max(map(len, parts)), dtype=dtype, device=size.device)
    prompts = [len(part) - 4 for part in parts]
    tokens = torch.cat([part[:-4] for part in parts])
    found = [model.logits(tokens, AttentionLayout.prefill(prompts, cache, slots), last=True)]
    cache.advance(slots, prompts)
    for column in range(-4, 0):
        tokens = torch.stack([part[column] for part in parts])
        found.append(model.logits(tokens, AttentionLayout.decode(cache, slots)))
        cache.advance(slots, 1)
    plain, exact = (model_in(d, size).logits(torch.cat(parts), full)[tails] for d in (dtype, torch.float64))
    return worst_error([torch.stack(found, 1)], [plain], [exact])


def label_log_probs(size: Size, dtype: torch.dtype, logits_memory: int) -> dict[str, float]:
    """linear_logps and its gradients; plain torch: logits in this dtype, log_softmax in fp32."""
    generator = torch.Generator(size.device).manual_seed(2)
    rows, made = sum(size.lengths), {"generator": generator, "device": size.device}
    x = torch.randn(rows, 256, **made).to(dtype)
    weight = (torch.randn(size.vocab_size, 256, **made) / 16).to(dtype)
    labels = torch.randint(0, size.vocab_size, (rows,), **made)
    labels[::5] = -100

    def run(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x.detach(), weight.detach())]
        logps = function(*inputs)
        return [logps.detach(), *torch.autograd.grad(logps.sum(), inputs)]

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        logits = x @ weight.T
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return logps.gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1) * (labels >= 0)

    found = run(lambda *inputs: linear_logps(*inputs, labels, logits_memory=logits_memory).logps, dtype)
    return worst_error(found, run(plain, dtype), run(plain, torch.float64))


def varlen_equals_torch(size: Size, window: int | None, shared: bool) -> dict[str, float]:
    """The vendor's attention and its gradients in bf16 against plain torch; packed, or a shared prefix."""
    packed, prefix = AttentionLayout.packed(size.lengths), (size.lengths[-1], [7, 3])
    made = AttentionLayout.shared_prefix(*prefix) if shared else packed
    layout, generator = made.to(size.device), torch.Generator(size.device).manual_seed(3)
    shapes = [(layout.num_tokens, heads, 64) for heads in (8, 2, 2, 8)]
    q, k, v, grad = (torch.randn(s, generator=generator, device=size.device).bfloat16() for s in shapes)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
        out = attention(*inputs, layout, window=window, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]

    found = run("varlen" if size.device.type == "cuda" else "torch", torch.bfloat16)
    return worst_error(found, run("torch", torch.bfloat16), run("torch", torch.float64))


# Training steps


def micro_batches(size: Size, config: MistralConfig, count: int) -> list[PackedBatch]:
    """Full rows; documents have 600 of 2048 tokens on average, a row's last one is cut to fit."""
    generator = np.random.default_rng(4)
    batches = []
    for _ in range(count):
        lengths: list[int] = []
        for _ in range(size.micro_batch_tokens // size.max_length):
            left = size.max_length
            while left:
                drawn = generator.lognormal(np.log(0.29 * size.max_length) - 0.32, 0.8)
                lengths.append(min(left, max(2, int(drawn))))
                left -= lengths[-1]
        parts = [torch.from_numpy(generator.integers(0, config.vocab_size, length)) for length in lengths]
        batches.append(label_batch(parts).to(size.device))
    return batches


def training_step(size: Size, name: str, *, compile: bool, checkpointing: bool = False) -> dict[str, Any]:
    """Tokens/s, MFU and peak memory of whole steps of one micro-batch each, no two of them alike."""
    config, on_gpu = size.models[name], size.device.type == "cuda"
    gc.collect()  # the model before
    torch.cuda.empty_cache()
    needed = 16 * config.num_parameters()[0] + (12 << 30)
    if on_gpu and torch.cuda.mem_get_info()[0] < needed:
        return {"skipped": f"needs {needed / 2**30:.0f} GiB of free memory"}
    model = Mistral(config, dtype=torch.float32, device=size.device).init_weights()
    how = {"activation_checkpointing": checkpointing, "compile": compile}
    parallelize(model, World(device=size.device), compute_dtype=torch.bfloat16, **how)
    optimizer = build_optimizer(model, "adamw", learning_rate=1e-5)
    batches = micro_batches(size, config, size.warmup + size.repeats)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = [], 0.0
    for batch in batches:
        start = time.perf_counter()
        total = -model(batch).sum() / (batch.labels >= 0).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = float(total.detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(loss), f"the loss is {loss}"
    measured = list(zip(batches, seconds))[size.warmup :]
    speed = [batch.layout.num_tokens / second for batch, second in measured]
    peak = peak_flops(size.device, torch.bfloat16) if on_gpu else 1e12  # a dry run measures nothing
    work = [training_flops(config, batch.layout.q_length) / second for batch, second in measured]
    return {
        "parameters": config.num_parameters()[0],
        "documents_per_step": float(np.mean([len(batch.layout.q_length) for batch, _ in measured])),
        "tokens_per_second": float(np.median(speed)),
        "spread": (max(speed) - min(speed)) / float(np.median(speed)),
        "mfu": float(np.median(work)) / peak,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        "first_step_seconds": seconds[0],
        "loss": loss,
    }


def jobs(size: Size) -> dict[str, Callable[[], dict]]:
    """Name -> what is run, in this order: checks first, the model that may not fit last."""
    table: dict[str, Callable[[], dict]] = {}
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        table[f"packed_equals_one_by_one {short}"] = lambda d=dtype: packed_equals_one_by_one(size, d)
        table[f"cached_equals_full {short}"] = lambda d=dtype: cached_equals_full(size, d)
        for kept, memory in (("kept", 1 << 30), ("recomputed", 0)):
            table[f"label_log_probs {kept} {short}"] = lambda d=dtype, m=memory: label_log_probs(size, d, m)
    for window in (None, 1, size.window):
        for shared in (False, True):
            key = f"varlen_equals_torch window={window} {'shared_prefix' if shared else 'packed'}"
            table[key] = lambda w=window, s=shared: varlen_equals_torch(size, w, s)
    for name in ("0.5B", "1.5B"):
        table[f"step {name} eager"] = lambda n=name: training_step(size, n, compile=False)
        table[f"step {name} compiled"] = lambda n=name: training_step(size, n, compile=True)
    last = {"compile": True, "checkpointing": True}
    table["step 7.24B compiled checkpointed"] = lambda: training_step(size, "7.24B", **last)
    return table


def run_job(name: str, job: Callable[[], dict]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        result = {"name": name, "ok": True, **job()}
    except Exception as error:  # whatever breaks one job must not stop the others
        result = {"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:1000]}
    return {**result, "seconds": round(time.perf_counter() - start, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, same code")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_suite.json")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("error: torch sees no CUDA device; expected one, or --dry-run", file=sys.stderr)
        return 2
    size = dry_size() if options.dry_run else full_size()
    name = torch.cuda.get_device_name() if size.device.type == "cuda" else platform.processor()
    report: dict[str, Any] = {
        "device": name, "dry_run": options.dry_run, "python": platform.python_version(),
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "results": [], "complete": False,
    }  # fmt: skip
    try:
        with torch.compiler.set_stance("force_eager" if options.dry_run else "default"):
            for name, job in jobs(size).items():
                report["results"].append(run_job(name, job))
                print(json.dumps(report["results"][-1]), flush=True)
        report["complete"] = True
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    finally:
        output = options.output or (None if options.dry_run else RESULTS)
        if output:
            write_json(output, report)
            print(f"wrote {output}", flush=True)
    failed = [result["name"] for result in report["results"] if not result["ok"]]
    print(
        f"{len(report['results']) - len(failed)} ok, {len(failed)} failed: {', '.join(failed) or '-'}",
        flush=True,
    )
    return 0 if report["complete"] and not failed else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
