"""Memory and time of the paper's run and of a 70B model on 64 GPUs, computed: writes docs/scaling.md.

    python benchmarks/scaling.py              the page, from the formulas of the code and benchmarks/results/
    python benchmarks/scaling.py --measure    first measure the coefficients on this CPU (two minutes)

The page is a function of committed files alone.  Measured are bytes (what autograd keeps, and the highest
sum of live tensors in a step) and the speed of SHA-256, which a checkpoint's writer waits for; the rest is
arithmetic over `memory_parts` and `training_flops` of phoenix/train/metrics.py, with the assumptions below.

Legend: S ranks that share one copy of the model (dp_shard), R copies (dp_replicate), d hidden_size, f
intermediate_size, L layers, h query heads, g key/value heads, e head_dim, i bytes of the compute dtype.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import time
import weakref
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from phoenix.files import atomic_write, write_json  # noqa: E402
from phoenix.model.layout import AttentionLayout, PackedBatch  # noqa: E402
from phoenix.model.mistral import Mistral, MistralConfig  # noqa: E402
from phoenix.train.distributed import World, parallelize  # noqa: E402
from phoenix.train.metrics import GPU_PEAKS, activation_bytes, memory_parts, training_flops  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scaling.md"


@dataclass(frozen=True)
class Machine:
    """One GPU and its share of a node of eight; bytes a second, in one direction."""

    name: str
    flops: float  # dense bf16
    nvlink: float
    network: float  # of the adapter that stands beside each GPU
    to_host: float


@dataclass(frozen=True)
class Training:
    """A model, and how its steps are spread over GPUs."""

    name: str
    model: MistralConfig
    gpus: int
    shards: int
    micro_batch_tokens: int
    activation_checkpointing: bool = True

    @property
    def copies(self) -> int:
        return self.gpus // self.shards


GB = 1e9
GPUS_A_NODE, CAPACITY, USABLE, DISK = 8, 80 * GB, 0.9, 2 * GB
MACHINES = (
    Machine("A100", GPU_PEAKS["A100"], nvlink=300 * GB, network=25 * GB, to_host=20 * GB),
    Machine("H100", GPU_PEAKS["H100"], nvlink=450 * GB, network=50 * GB, to_host=40 * GB),
)
LOGITS_MEMORY = float(2**30)  # the default of recipes/sft.py
STEPS, ROWS, LENGTH, SAVE_STEPS = 228, 512, 2048, 50  # recipes/configs/phoenix_sft.toml
MISTRAL_7B = MistralConfig()
LLAMA_70B = MistralConfig(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    intermediate_size=28672, vocab_size=32000, sliding_window=None, model_type="llama",
)  # fmt: skip
PAPER = Training("Mistral-7B", MISTRAL_7B, gpus=8, shards=8, micro_batch_tokens=16384)
LARGE = Training("70B", LLAMA_70B, gpus=64, shards=64, micro_batch_tokens=16384)
# bf16, full fine-tuning or pre-training: machine, MFU, who and where.
PUBLISHED = (
    ("A100", 0.642, "llm-foundry, MPT-7B, s 2048, 8 GPUs (its scripts/train/benchmarking)"),
    ("A100", 0.68, "fms-fsdp, Llama-2 7B, s 4096, compiled, 128 GPUs (its README)"),
    ("H100", 0.33, "torchtitan, Llama-3.1 8B, s 8192, eager, 8 GPUs (its benchmarks/llama3_h100_202412)"),
    ("H100", 0.464, "llm-foundry, MPT-7B, s 2048, 8 GPUs (its scripts/train/benchmarking)"),
    ("H100", 0.46, "fms-fsdp, Llama-2 7B, s 4096, compiled, 96 GPUs (its README)"),
)
GEMM_CEILING = 0.79  # 780 of 989 TFLOP/s, bf16 4224 x 2048 x 8192 on an H100: gist Chillee/2ec8969
HALF = 0.5


# Computing


def flops_a_token(model: MistralConfig, lengths: Iterable[int]) -> float:
    lengths = torch.tensor(list(lengths))
    return training_flops(model, lengths) / int(lengths.sum())


def memory(training: Training) -> dict[str, float]:
    """Bytes a GPU, by what takes them, in bf16 with AdamW."""
    return memory_parts(
        training.model, torch.bfloat16, training.shards, "adamw",
        micro_batch_tokens=training.micro_batch_tokens, logits_memory=LOGITS_MEMORY,
        activation_checkpointing=training.activation_checkpointing,
    )  # fmt: skip


def fits(training: Training) -> bool:
    return sum(memory(training).values()) <= USABLE * CAPACITY


def accumulation(training: Training) -> int:
    """Micro-batches of a GPU in one step."""
    return ROWS * LENGTH // (training.gpus * training.micro_batch_tokens)


def step_seconds(training: Training, machine: Machine, mfu: float) -> float:
    flops = ROWS * LENGTH * flops_a_token(training.model, [LENGTH])
    return flops / (training.gpus * mfu * machine.flops)


def traffic(training: Training) -> dict[str, float]:
    """Bytes that a GPU receives for one micro-batch: two gathers in bf16 and one reduction in fp32 over the
    shards; with copies an all-reduce of the GPU's own fp32 gradients over them.
    """
    parameters, shards, copies = training.model.num_parameters()[0], training.shards, training.copies
    others = (shards - 1) / shards
    return {
        "gathers": 2 * 2 * parameters * others,
        "reduction": 4 * parameters * others,
        "copies": 2 * 4 * parameters / shards * (copies - 1) / copies,
    }


def traffic_seconds(training: Training, machine: Machine) -> tuple[float, float]:
    """Time of a micro-batch's traffic, at best and at worst.

    Within a node NVLink is the limit.  Across nodes, at best the rings of a collective leave a node through
    all of its adapters at once, at worst each GPU takes its bytes through its own adapter alone.
    """
    volume = traffic(training)
    sharded, copied = volume["gathers"] + volume["reduction"], volume["copies"] / machine.network
    if training.shards <= GPUS_A_NODE:
        return sharded / machine.nvlink + copied, sharded / machine.nvlink + copied
    best = min(machine.nvlink, GPUS_A_NODE * machine.network)
    return sharded / best + copied, sharded / machine.network + copied


def checkpoint(training: Training, machine: Machine, hashing: float) -> dict[str, float]:
    """Bytes and seconds of a checkpoint: its total, a GPU's part, what the step waits, what the writers take.

    hashing: bytes a second of a writer's SHA-256.  A writer hashes and writes a piece after the other.
    """
    total = 12.0 * training.model.num_parameters()[0]
    a_gpu = total / training.shards
    writers = min(training.shards, GPUS_A_NODE)
    return {
        "bytes": total, "a_gpu": a_gpu, "a_node": a_gpu * GPUS_A_NODE, "wait": a_gpu / machine.to_host,
        "write": a_gpu / hashing + a_gpu * writers / DISK,
    }  # fmt: skip


# The page


def table(header: str, rows: Iterable[Iterable[Any]]) -> str:
    lines = [header, "| " + " | ".join("---" for _ in range(header.count("|") - 1)) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def gb(value: float) -> str:
    return f"{value / GB:.1f}"


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def memory_row(training: Training) -> list[str]:
    parts = memory(training)
    names = ("state", "weights", "activations", "passing")
    answer = "yes" if fits(training) else "**no**"
    return [*(gb(parts[name]) for name in names), gb(sum(parts.values())), answer]


def memory_of_the_paper() -> str:
    rows = []
    for checkpointing in (True, False):
        for tokens in (2048, 4096, 8192, 16384, 32768):
            case = replace(PAPER, micro_batch_tokens=tokens, activation_checkpointing=checkpointing)
            rows.append(["on" if checkpointing else "off", tokens, *memory_row(case)])
    return table(
        "| checkpointing | micro_batch_tokens | state | weights | activations | passing | sum, GB | fits |",
        rows,
    )


def memory_of_the_large() -> str:
    rows = []
    for shards in (8, 16, 32, 64):
        for tokens in (2048, 8192, 16384):
            case = replace(LARGE, shards=shards, micro_batch_tokens=tokens)
            rows.append([shards, case.copies, tokens, *memory_row(case)])
    header = "| dp_shard | dp_replicate | micro_batch_tokens | state | weights | activations | passing "
    return table(header + "| sum, GB | fits |", rows)


def mfu_rows(results: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Machine, MFU, and where it comes from; those of step_profile.json once it is there."""
    rows = [*PUBLISHED]
    for machine in MACHINES:
        rows.append((machine.name, HALF, "the half that `recipes/sft.py` announces"))
        bound = GEMM_CEILING * 6 / 8
        rows.append(
            (machine.name, bound, "bound with full recomputation: products at 79 % of peak, 8 N for 6 N")
        )
        for dtype, values in results["step_profile"].items():
            if isinstance(values, dict) and "matmul_share" in values:
                share = values["matmul_share"]
                source = (
                    f"bound if products at 79 % of peak take {share:.0%} of a step, as in {dtype} on a CPU"
                )
                rows.append(
                    (machine.name, GEMM_CEILING * share, f"{source} (`benchmarks/results/step_profile.json`)")
                )
    return sorted(rows, key=lambda row: (row[0], row[1]))


def time_table(training: Training, results: dict[str, Any]) -> str:
    machines = {machine.name: machine for machine in MACHINES}
    rows = []
    for name, mfu, source in mfu_rows(results):
        seconds = step_seconds(training, machines[name], mfu)
        tokens = ROWS * LENGTH / seconds / training.gpus
        rows.append([name, f"{mfu:.1%}", f"{tokens:,.0f}", short(seconds), duration(STEPS * seconds), source])
    return table("| GPU | MFU | tokens/s/GPU | step | 228 steps | MFU of |", rows)


def traffic_table(cases: Iterable[Training]) -> str:
    rows = []
    for case in cases:
        for machine in MACHINES:
            volume, (best, worst) = sum(traffic(case).values()), traffic_seconds(case, machine)
            compute = step_seconds(case, machine, HALF) / accumulation(case)
            answer = "yes" if worst <= compute else "at best" if best <= compute else "**no**"
            times = short(best) if best == worst else f"{short(best)} to {short(worst)}"
            rows.append([
                case.name, f"{case.shards} x {case.copies}", case.micro_batch_tokens, accumulation(case),
                machine.name, gb(volume), gb(volume * accumulation(case)), times, short(compute), answer,
            ])  # fmt: skip
    header = "| model | dp_shard x dp_replicate | micro_batch_tokens | micro-batches a step | GPU "
    return table(header + "| GB each | GB a step | traffic each | compute each | hides |", rows)


def checkpoint_table(cases: Iterable[Training], hashing: float) -> str:
    rows = []
    for case in cases:
        for machine in MACHINES:
            values = checkpoint(case, machine, hashing)
            between = SAVE_STEPS * step_seconds(case, machine, HALF)
            sizes = [gb(values[name]) for name in ("bytes", "a_gpu", "a_node")]
            times = [short(values["wait"]), f"{values['write']:.0f} s", duration(between)]
            rows.append([case.name, f"{case.shards} x {case.copies}", machine.name, *sizes, *times])
    header = "| model | dp_shard x dp_replicate | GPU | GB | GB a writer | GB of host memory a node "
    return table(header + "| step waits | files written in | 50 steps take |", rows)


def flops_table() -> str:
    rows = []
    for length in (512, 2048, 8192):
        open_ended = replace(MISTRAL_7B, sliding_window=None)
        values = [flops_a_token(model, [length]) / 1e9 for model in (MISTRAL_7B, open_ended, LLAMA_70B)]
        rows.append([length, *(f"{value:.1f}" for value in values)])
    return table("| document, tokens | Mistral-7B, window 4096 | without a window | 70B |", rows)


def measured_table(results: dict[str, Any]) -> str:
    rows = []
    for row in results["scaling"]["activations"]:
        shape = row["shape"]
        sizes = [f"{shape[name]}" for name in ("hidden_size", "intermediate_size", "num_hidden_layers")]
        heads = f"{shape['num_attention_heads']}/{shape['num_key_value_heads']}"
        rows.append([
            " · ".join([*sizes, heads]), shape["tokens"], row["dtype"],
            "on" if row["activation_checkpointing"] else "off", f"{row['kept_bytes'] / 1e6:.1f}",
            f"{row['kept_ratio']:.3f}", f"{row['peak_bytes'] / 1e6:.1f}", f"{row['peak_ratio']:.2f}",
        ])  # fmt: skip
    header = (
        "| d · f · L · h/g | tokens | dtype | checkpointing | kept, MB | / formula | peak, MB | / formula |"
    )
    return table(header, rows)


def assumptions(hashing: float) -> str:
    def each(name: str) -> str:
        return ", ".join(f"{m.name} {getattr(m, name) / GB:.0f} GB/s" for m in MACHINES)

    rows = [
        ("memory of a GPU", f"{CAPACITY / GB:.0f} GB, of which {USABLE:.0%} are used",
         "the rest is for CUDA, NCCL and gaps between blocks of memory"),
        ("peak of dense bf16", ", ".join(f"{m.name} {m.flops / 1e12:.0f} TFLOP/s" for m in MACHINES),
         "data sheets; `GPU_PEAKS` in `phoenix/train/metrics.py`"),
        ("NVLink, one direction", each("nvlink"), "half of the data sheets' sum of both directions"),
        ("network adapter beside each GPU", each("network"), "200 and 400 Gbit/s, as in DGX A100 and H100"),
        ("copy to pinned host memory", each("to_host"), "about two thirds of PCIe 4 and 5 x16"),
        ("disk of a node", f"{DISK / GB:.0f} GB/s", "one NVMe drive; a shared file system is another number"),
        ("SHA-256 of a writer", f"{hashing / GB:.2f} GB/s", "measured: `benchmarks/results/scaling.json`"),
        ("MFU where none is named", f"{HALF:.0%}", "the half that `recipes/sft.py` announces"),
        ("documents", f"rows of {LENGTH} tokens seen as one document", "`packing_strategy = \"wrapped\"`"),
        ("gathered at once", "two groups of FSDP, one group's gradients in bf16 and fp32",
         "a group is a block, or embedding or head; the next is fetched during the present one"),
        ("traffic and compute", "overlap where traffic is shorter", "first gather and last reduction do not"),
    ]  # fmt: skip
    return table("| what | value | reason |", rows)


def formulas() -> str:
    rows = [
        ("state", "N x (4 + 4 + 4 + 4) / S: fp32 weights, gradients, two moments"),
        ("weights", "(3 i + 4) x parameters of the largest FSDP group; in one process 4 x those of the "
         "largest matrix"),
        ("a block's activations, B", "t x ((4 d + 2 (h + g) e + 2 f) i + 4 (2 + h))"),
        ("activations", "L B; with checkpointing L t d i"),
        ("passing", "the larger of logits with the last norm, t x (v + 2 d + e) i, and a block's gradients, "
         "t x (d + 4 f) i, with checkpointing B more"),
        ("FLOP a step", "6 N' x Σl + 12 L h e x Σ(pairs), N' without the input embedding"),
        ("pairs of a document of l tokens", "l (l + 1) / 2; W l - W (W - 1) / 2 beyond a window W"),
        ("traffic of a micro-batch", "(4 N + 4 N) (S - 1) / S + 8 N / S x (R - 1) / R bytes"),
        ("time of a step", "FLOP / (GPUs x MFU x peak)"),
    ]  # fmt: skip
    return table("| what | formula |", rows)


def summary(results: dict[str, Any]) -> str:
    """What the command prints."""
    lines = []
    for case in (PAPER, LARGE):
        times = ", ".join(f"{duration(STEPS * step_seconds(case, m, HALF))} on {m.name}" for m in MACHINES)
        lines.append(
            f"{case.name} on {case.gpus} GPUs, sharded over {case.shards}: "
            f"{gb(sum(memory(case).values()))} GB of {CAPACITY / GB:.0f} GB a GPU; "
            f"{STEPS} steps at {HALF:.0%} MFU: {times}"
        )
    kept = [row["kept_ratio"] for row in results["scaling"]["activations"]]
    peak = [row["peak_ratio"] for row in results["scaling"]["activations"]]
    lines.append(
        f"measured / formula: kept by autograd {min(kept):.3f} to {max(kept):.3f}, peak of a step "
        f"{min(peak):.2f} to {max(peak):.2f}\nwrote docs/scaling.md"
    )
    return "\n".join(lines)


def read_results() -> dict[str, Any]:
    def read(name: str) -> dict[str, Any]:
        path = RESULTS / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    return {name: read(name) for name in ("scaling", "step_profile", "gpu_suite")}


def page(results: dict[str, Any]) -> str:
    hashing = results["scaling"]["sha256_bytes_per_second"]
    halves = [replace(LARGE, shards=32, micro_batch_tokens=n) for n in (8192, 16384)]
    wholes = [replace(LARGE, micro_batch_tokens=n) for n in (8192, 16384)]
    peak = [row["peak_ratio"] for row in results["scaling"]["activations"]]
    gpu = "`benchmarks/results/gpu_suite.json` has steps measured on one GPU; nothing here uses them."
    return TEMPLATE.format(
        summary=summary(results),
        gpu=gpu if results["gpu_suite"] else "Nothing on a GPU has been measured.",
        parameters=f"{MISTRAL_7B.num_parameters()[0]:,}",
        state=f"{16 * MISTRAL_7B.num_parameters()[0] / GB:.0f}",
        state_a_gpu=gb(16 * MISTRAL_7B.num_parameters()[0] / 8),
        large_parameters=f"{LLAMA_70B.num_parameters()[0]:,}",
        large_state=f"{16 * LLAMA_70B.num_parameters()[0] / GB:,.0f}",
        large_state_a_gpu=f"{16 * LLAMA_70B.num_parameters()[0] / GB / 8:.0f}",
        tokens=f"{STEPS * ROWS * LENGTH / 1e6:.1f}",
        paper_memory=memory_of_the_paper(), paper_time=time_table(PAPER, results),
        large_memory=memory_of_the_large(), large_time=time_table(LARGE, results),
        traffic=traffic_table([PAPER, *halves, *wholes]),
        checkpoints=checkpoint_table([PAPER, halves[0], LARGE], hashing),
        flops=flops_table(), formulas=formulas(), measured=measured_table(results),
        assumptions=assumptions(hashing),
        lowest_peak=f"{min(peak):.2f}", highest_peak=f"{max(peak):.2f}",
    )  # fmt: skip


# Measuring


@dataclass(frozen=True)
class Shape:
    """A small model and a micro-batch."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tokens: int
    documents: int

    @property
    def config(self) -> MistralConfig:
        sizes = {name: value for name, value in asdict(self).items() if name not in ("tokens", "documents")}
        head_dim = self.hidden_size // self.num_attention_heads
        return MistralConfig(**sizes, head_dim=head_dim, vocab_size=1000, initializer_range=0.1)

    def batch(self) -> PackedBatch:
        tokens = torch.randint(0, 1000, (self.tokens,), generator=torch.Generator().manual_seed(0))
        lengths = [self.tokens // self.documents] * self.documents
        return PackedBatch(tokens, tokens.roll(-1), AttentionLayout.packed(lengths))


SHAPES = (
    Shape(128, 448, 4, 4, 1, 8192, 16),  # Mistral's proportions, 1 / 32 as wide
    Shape(256, 896, 6, 8, 2, 8192, 4),
    Shape(256, 640, 8, 8, 8, 4096, 16),  # no grouping of heads, another gate
    Shape(512, 2048, 6, 8, 2, 256, 2),  # few tokens: matrices and their gradients weigh as much
)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made under it that still live, and their highest sum.

    before: tensors that are there already; views of them, and sums into them, are nothing new.
    """

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {x.untyped_storage()._cdata for x in before}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def build(config: MistralConfig, dtype: torch.dtype, *, activation_checkpointing: bool) -> Mistral:
    model = Mistral(config).init_weights(torch.Generator().manual_seed(0))
    options = {"activation_checkpointing": activation_checkpointing, "compile": False}
    return parallelize(model, World(), compute_dtype=dtype, **options).train()


def kept_bytes(model: Mistral, batch: PackedBatch) -> int:
    """Bytes of the storages that autograd keeps between forward and backward, weights and logits excepted."""
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    weights = {*shapes, *(shape[::-1] for shape in shapes)}  # copies in bf16 too, which products transpose
    inputs = {x.untyped_storage().data_ptr() for x in (*model.parameters(), batch.tokens, batch.labels)}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs and tuple(tensor.shape) not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    return sum(storage.nbytes() for storage in storages.values())


def expected_kept(config: MistralConfig, dtype: torch.dtype, tokens: int, *, checkpointing: bool) -> int:
    """The formula's bytes between forward and backward: with checkpointing no block is there as a whole."""
    a_block, a_rest = activation_bytes(config, dtype)
    a_layer = config.hidden_size * dtype.itemsize if checkpointing else a_block
    return tokens * (config.num_hidden_layers * a_layer + a_rest)


def peak_bytes(model: Mistral, batch: PackedBatch) -> int:
    """Highest sum of live tensors in a forward and backward pass that adds to gradients already there."""
    model(batch).sum().backward()
    parameters = list(model.parameters())
    with LiveBytes([*parameters, *(parameter.grad for parameter in parameters)]) as live:
        model(batch).sum().backward()
    return live.peak


def measure() -> dict[str, Any]:
    rows = []
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for checkpointing in (False, True):
                model = build(shape.config, dtype, activation_checkpointing=checkpointing)
                batch, options = shape.batch(), {"activation_checkpointing": checkpointing}
                parts = memory_parts(
                    shape.config, dtype, 1, "adamw", micro_batch_tokens=shape.tokens,
                    logits_memory=LOGITS_MEMORY, **options,
                )  # fmt: skip
                kept = kept_bytes(model, batch)
                formula = expected_kept(shape.config, dtype, shape.tokens, checkpointing=checkpointing)
                held = sum(parts.values()) - parts["state"]
                peak = peak_bytes(model, batch)
                rows.append({
                    "shape": asdict(shape), "dtype": str(dtype).removeprefix("torch."), **options,
                    "kept_bytes": kept, "kept_formula": formula, "kept_ratio": kept / formula,
                    "peak_bytes": peak, "peak_formula": held, "peak_ratio": peak / held,
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    block = bytes(1 << 24)
    seconds = []
    for _ in range(16):  # the best: the machine may have other work
        begun = time.perf_counter()
        hashlib.sha256(block).digest()
        seconds.append(time.perf_counter() - begun)
    speed = len(block) / min(seconds)
    info = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(": ")[1] for line in info if line.startswith("model name")), "")
    environment = {
        "processor": processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
    }
    return {"environment": environment, "sha256_bytes_per_second": speed, "activations": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure the coefficients first")
    options = parser.parse_args()
    if options.measure:
        torch.set_num_threads(1)
        write_json(RESULTS / "scaling.json", measure())
    results = read_results()
    with atomic_write(PAGE) as file:
        file.write(page(results))
    print(summary(results))
    return 0


TEMPLATE = """\
# Scaling

```
python benchmarks/scaling.py
```

prints

```
{summary}
```

and writes this page from the formulas of the code and from `benchmarks/results/*.json`. `--measure` first
measures on the CPU what can be measured there, into `benchmarks/results/scaling.json`.

**{gpu}** Every figure below is computed by `benchmarks/scaling.py`, except those whose
source is named beside them. There is no row for `recipes/dpo.py`.

## The paper's SFT: Mistral-7B on 8 GPUs of 80 GB

228 steps of 512 rows of 2048 tokens, {tokens} million tokens (`recipes/configs/phoenix_sft.toml`, with
`micro_batch_tokens=16384` and checkpointing on). {parameters} parameters of 16 bytes are {state} GB,
{state_a_gpu} GB a GPU.

Memory of a GPU in GB (`memory_parts` in `phoenix/train/metrics.py`):

{paper_memory}

Time, without evaluations and checkpoints:

{paper_time}

tokens/s/GPU are those of this model at that MFU, not the publisher's. torchtitan names 33 to 39 %; its lowest
stands here.

## 70B on 64 GPUs of 80 GB

The shape of Llama-2-70B: hidden 8192, 80 layers, 64 heads, 8 key/value heads of width 128, FFN 28672,
vocabulary 32000; {large_parameters} parameters, {large_state} GB of state. Eight nodes of eight GPUs.
`dp_replicate=R` of `recipes/sft.py` keeps R copies, each sharded over 64 / R neighbouring GPUs:

{large_memory}

Over the eight GPUs of one node the state alone is {large_state_a_gpu} GB a GPU. 512 rows over 64 GPUs are
16384 tokens a GPU: a larger `micro_batch_tokens` leaves GPUs without work and is refused.

```
torchrun --nnodes=8 --nproc-per-node=8 ... recipes/sft.py CONFIG dp_replicate=1
```

Time of the same {tokens} million tokens, traffic hidden:

{large_time}

The publishers measured models of 7B and 8B; no figure for 70B stands behind this table.

## Traffic

For each micro-batch a GPU receives every weight twice in bf16, for the forward and the backward pass, and
sends every gradient once in fp32; copies of the model sum the GPU's own part of the gradients in fp32.
Compute is at 50 % MFU.

{traffic}

Two times are bounds for groups that span nodes: rings that leave a node through all eight adapters, and each
GPU taking its bytes through its own adapter alone. "at best" hides only near the first.

## Checkpoints

12 bytes a parameter (weight and two moments in fp32). A step waits for the copy to the host; a thread of each
GPU of the first copy of the model then hashes and writes (`phoenix/train/checkpoint.py`). A save that finds
the one before it still being written waits for it.

{checkpoints}

## FLOP

GFLOP a token (`training_flops` in `phoenix/train/metrics.py`):

{flops}

## Measured on a CPU

`benchmarks/results/scaling.json`. kept: unique storages that autograd holds between forward and backward,
weights excepted. peak: highest sum of live tensors in a forward and backward pass, those from before it
excepted. Both stand beside the formula.

{measured}

The peak is {lowest_peak} to {highest_peak} of the formula. Where it is below, not all of a block's gradients
live at the same time. What attention's operator makes and frees inside is not seen, and the gathered weights
of FSDP are not measured.

## Formulas

S = `dp_shard`, R = `dp_replicate`, N parameters, d hidden, f FFN, L layers, h heads, g key/value heads of
width e, v vocabulary, i bytes of the compute dtype, t tokens of a micro-batch.

{formulas}

Logits above `logits_memory` (1 GiB) are computed again, a chunk of 256 MiB at a time, and count as one chunk.

## Assumptions

{assumptions}
"""


if __name__ == "__main__":
    sys.exit(main())
