"""What a run writes down: metrics.jsonl (the record), the bar and trackers (views of it), FLOP and MFU.

Names are TRL's; sums and counts are added over micro-batches and ranks, and divided once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import secrets
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from phoenix.files import UserError, atomic_write, read_json_lines, require
from phoenix.kernels.linear_logps import CHUNK_BYTES, LabelStats
from phoenix.model.mistral import MistralConfig

if TYPE_CHECKING:
    from tqdm import tqdm

# Fields of metrics.jsonl that are times or memory; all others are the same in every run of the same config.
TIMING = ("step_seconds", "tokens_per_second", "mfu", "peak_memory_gib", "time")
SPIKE, SPIKE_WINDOW = 10, 50  # times the median loss of so many steps
NUM_DPO_SUMS = 11  # numbers that `dpo_sums` gives


def sft_sums(stats: LabelStats) -> Tensor:
    """[3] fp64: sums of loss, entropy and hits of a micro-batch (LabelStats of [t])."""
    return torch.stack(
        [-stats.logps.detach().double().sum(), stats.entropy.double().sum(), stats.hits.double().sum()]
    )


def sft_metrics(sums: Sequence[float], num_target_tokens: int, prefix: str = "") -> dict[str, float]:
    """Means over the target tokens of all ranks: loss (nats), entropy (nats), mean_token_accuracy."""
    names = ("loss", "entropy", "mean_token_accuracy")
    return {prefix + name: float(value) / num_target_tokens for name, value in zip(names, sums)}


def dpo_sums(
    losses: Tensor, rewards: Sequence[Tensor], logps: Sequence[Tensor], reference_chosen_logps: Tensor,
    lengths: Sequence[Tensor], logits: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """[NUM_DPO_SUMS] fp64: what `dpo_metrics` divides, of the n pairs of a micro-batch.

    All tensors are [n]; rewards, logps, lengths and logits are those of the chosen, then of the rejected
    answers.  logits: sums over an answer's tokens of their mean over the vocabulary.
    """
    fall = (logps[0] < reference_chosen_logps).double()
    fall = torch.where(reference_chosen_logps.isnan(), torch.nan, fall)  # of a loss that has no reference
    values = (losses, *rewards, rewards[0] > rewards[1], *logps, fall, *lengths, *logits)
    return torch.stack([value.detach().double().sum() for value in values])


def dpo_zeros(device: torch.device) -> Tensor:
    """Where `dpo_sums` are added up."""
    return torch.zeros(NUM_DPO_SUMS, dtype=torch.float64, device=device)


def dpo_metrics(sums: Sequence[float], num_pairs: int, prefix: str = "") -> dict[str, float]:
    """Means over the pairs of all ranks, with TRL's names; accuracy: chosen strictly above rejected.

    chosen_fall: share of pairs whose chosen log-prob is below the reference's.  A token's, of all answers of
    a side: nll_loss (of the chosen ones) and logits/chosen, logits/rejected (the mean over the vocabulary).
    """
    loss, chosen, rejected, hits, chosen_logps, rejected_logps, fall, *rest = (float(x) for x in sums)
    lengths, logits = rest[:2], rest[2:]
    means = {
        "loss": loss, "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": hits,
        "rewards/margins": chosen - rejected, "logps/chosen": chosen_logps, "logps/rejected": rejected_logps,
        "chosen_fall": fall, "chosen_length": lengths[0], "rejected_length": lengths[1],
    }  # fmt: skip
    values = {prefix + name: value / num_pairs for name, value in means.items()}
    tokens = {
        "nll_loss": -chosen_logps / max(1.0, lengths[0]), "logits/chosen": logits[0] / max(1.0, lengths[0]),
        "logits/rejected": logits[1] / max(1.0, lengths[1]),
    }  # fmt: skip
    return values | {prefix + name: value for name, value in tokens.items()}


def not_finite(steps: int, step: int, rows: Sequence[str]) -> UserError:
    """The error that ends a run after so many steps without a finite gradient, the last of them `step`."""
    return UserError(
        f"the gradient was not finite in {steps} steps in a row, the last of them step {step + 1} "
        f"({rows[:3]}); look at these rows, lower learning_rate, or set dtype=float32"
    )


def is_spike(recent_losses: Sequence[float], loss: float) -> bool:
    """A loss of SPIKE times the median of the steps before it, or more; with less than 5 of them none is."""
    return len(recent_losses) >= 5 and loss >= SPIKE * statistics.median(recent_losses)


class MetricsLog:
    """metrics.jsonl, an object a line, synced at once; cut back to `step` when a run goes on (-1: anew).

    Numbers may be tensors: they are read when the line is written.  report_to: "tensorboard" or "wandb".
    """

    def __init__(self, folder: Path, *, step: int, report_to: Sequence[str] = (), write: bool = True) -> None:
        self.path, self.write, self.trackers = folder / "metrics.jsonl", write, []
        if not write:
            return
        kept = [row for row in read_json_lines(self.path) if row["step"] <= step]
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115, closed by `close`
        self.trackers = [TRACKERS[name](folder) for name in report_to]

    def log(self, step: int, **values: Any) -> dict[str, Any]:
        """Write one line; a number that is not finite is written as null, which is JSON where NaN is not."""
        row: dict[str, Any] = {"step": step}
        for name, value in values.items():
            value = value.item() if isinstance(value, Tensor) else value
            row[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        if self.write:
            try:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
                os.fsync(self.file.fileno())  # no checkpoint may outlive the rows before it
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}; free space") from None
            for track in self.trackers:
                track(row)
        return row

    def close(self) -> None:
        if self.write:
            self.file.close()  # each row is synced already


def progress_bar(total: int, initial: int, *, show: bool) -> tqdm:
    """A bar on stderr; without a terminal a line a minute; nothing on other ranks."""
    from tqdm import tqdm  # not at the top: the benchmarks count FLOP where it is not installed

    terminal = os.isatty(2)
    return tqdm(
        total=total, initial=initial, disable=not show, dynamic_ncols=terminal, unit="step", smoothing=0.1,
        mininterval=0.5 if terminal else 60, maxinterval=10 if terminal else 60, ascii=not terminal,
    )  # fmt: skip


def update_bar(bar: tqdm, row: dict[str, Any]) -> None:
    """One step further, with the row's numbers; a row of preference training also has its rewards'."""
    shown = [("loss", "loss")]
    shown += [(name, f"rewards/{name}") for name in ("margins", "accuracies") if f"rewards/{name}" in row]
    values = [f"{word} {math.nan if row[name] is None else row[name]:.4f}" for word, name in shown]
    bar.set_postfix_str(
        f"{', '.join(values)}, lr {row['learning_rate']:.2e}, "
        f"{row['tokens_per_second']:.0f} tok/s, mfu {row['mfu']:.1%}",
        refresh=False,
    )
    bar.update()


def write_samples(path: Path, step: int, rows: Sequence[dict[str, Any]], *, write: bool = True) -> None:
    """Add the replies of `step` to samples.jsonl, after those of earlier steps; the file is replaced as a
    whole.
    """
    if write and rows:
        kept = [row for row in read_json_lines(path) if row["step"] < step]
        with atomic_write(path) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *rows])


def training_memory(
    config: MistralConfig, dtype: torch.dtype, shards: int, optim: str, **options: Any
) -> float:
    """Bytes a rank needs about: the sum of `memory_parts`."""
    return sum(memory_parts(config, dtype, shards, optim, **options).values())


def memory_parts(
    config: MistralConfig,
    dtype: torch.dtype,
    shards: int,
    optim: str,
    *,
    micro_batch_tokens: int,
    activation_checkpointing: bool,
    logits_memory: float,
) -> dict[str, float]:
    """Bytes a rank needs, by what takes them; shards: ranks that share one copy of the model.

    state: fp32 weights, gradients and optimizer state.  weights: with FSDP two gathered groups in the compute
    dtype, and one group's gradient in the compute dtype and in fp32; in one process the largest matrix's
    gradient in fp32, or, as large, its cast and its gradient in bf16.  activations: what autograd keeps of
    the blocks; with checkpointing only their inputs.  passing: the larger of logits (those that are kept, or
    one chunk) with the last norm, and a block's gradients, with checkpointing the block itself too.
    """
    parameters, size, layers = config.num_parameters()[0], dtype.itemsize, config.num_hidden_layers
    d, embedding = config.hidden_size, config.vocab_size * config.hidden_size
    outside = embedding * (1 if config.tie_word_embeddings else 2) + d
    block = (parameters - outside) // layers
    matrix = max(embedding, d * max(config.intermediate_size, config.num_attention_heads * config.head_dim))
    weights = 4 * matrix if shards == 1 else max(block, embedding) * (3 * size + 4)
    a_block, a_rest = activation_bytes(config, dtype)
    logits = micro_batch_tokens * config.vocab_size * size
    logits = logits if logits <= logits_memory else min(logits, CHUNK_BYTES)
    gradients = (d + 4 * config.intermediate_size) * size + (a_block if activation_checkpointing else 0)
    return {
        "state": parameters * 4 * (4 if optim == "adamw" else 3) / shards,
        "weights": weights,
        "activations": micro_batch_tokens * layers * (d * size if activation_checkpointing else a_block),
        "passing": max(logits + micro_batch_tokens * a_rest, micro_batch_tokens * gradients),
    }


def activation_bytes(config: MistralConfig, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that autograd keeps for a token: of one block, and behind the last one.

    A norm keeps its input and its result, attention its queries, keys, values and output, SwiGLU its two
    inputs; norms and heads also keep a number each in fp32.
    """
    size, wide = dtype.itemsize, max(4, dtype.itemsize)
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    numbers = 4 * config.hidden_size + heads + 2 * config.intermediate_size
    block = numbers * size + (2 + config.num_attention_heads) * wide
    # The last norm; cos and sin of the position; the log-prob, and the row as a number thrice (int64).
    return block, (2 * config.hidden_size + config.head_dim) * size + 2 * wide + 3 * 8


def training_flops(config: MistralConfig, lengths: Tensor, key_lengths: Tensor | None = None) -> float:
    """FLOP of one training step over segments of `lengths` [n] queries: 6 N a token, and 12 L d for each pair
    of a query and a key that it sees, in a document of l tokens l (l + 1) / 2 pairs.

    N: parameters in matrix products; d: width of the heads together.  key_lengths [n]: keys of each segment,
    whose last query sees all of them (`layout.k_length.sum(1)`); none: its own tokens.  No query sees more
    keys than the window has.  Work done again by activation checkpointing is not counted (that would be HFU).
    """
    keys = (lengths if key_lengths is None else key_lengths).double()

    def pairs(length: Tensor) -> Tensor:
        """Of a query and a key, in documents of these lengths."""
        seen = length if config.sliding_window is None else length.clamp(max=config.sliding_window)
        return length * seen - seen * (seen - 1) / 2

    width = config.num_attention_heads * config.head_dim
    attention = 12 * config.num_hidden_layers * width * (pairs(keys) - pairs(keys - lengths)).sum()
    return float(6 * config.num_parameters()[1] * lengths.double().sum() + attention)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that matrix products reach: the data sheet's for a known GPU, otherwise measured on 2048^3."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, value in GPU_PEAKS.items():
            if part in name:
                return value
    return measure_gemm(device, dtype)


@functools.cache
def measure_gemm(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 5) -> float:
    """Best FLOP/s of a product of two [size, size] matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product = a @ b
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _tensorboard(folder: Path) -> Any:
    require("tensorboard", extra="tracking")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return track


def _wandb(folder: Path) -> Any:
    """wandb goes on with the run whose id stands in the folder; without one it starts another each time."""
    wandb = require("wandb", extra="tracking")
    path = folder / "wandb_id"
    if not path.exists():
        with atomic_write(path) as file:
            file.write(secrets.token_hex(8))
    name = path.read_text(encoding="utf-8")
    run = wandb.init(project="phoenix", name=folder.name, id=name, dir=str(folder), resume="allow")
    return lambda row: run.log(row, step=row["step"])


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
# Dense bf16 FLOP/s of the data sheets.
GPU_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def check_trackers(report_to: Sequence[str]) -> None:
    """UserError for a tracker that does not exist or is not installed, before anything is loaded."""
    for name in report_to:
        if name not in TRACKERS:
            raise UserError(f"report_to holds {name!r}; expected some of {', '.join(TRACKERS)}")
        require(name, extra="tracking")  # a package has its tracker's name
