"""Speed and memory of a training step of Phoenix and of transformers: same weights, same rows, one run.

    python benchmarks/step_vs_transformers.py [--model=FOLDER] [--output=PATH] [--quick]

A step is forward, backward and fused AdamW on a row of 2048 tokens that holds several documents (log-normal
lengths, 350 on average).  Rows are full, so neither side computes padding, and all tokens count for both.
transformers gets `position_ids` that start again with each document, and makes the exact mask of its SDPA
attention from them.  For orientation, its fastest form: the row as one document, which is another result.

    fp32  both in fp32; the first losses must agree to 1e-4, so both do the same work
    bf16  Phoenix: fp32 masters, bf16 compute.  transformers: the same by autocast, and with bf16 weights

Each side has a process of its own, forked after all imports; they work in turns, one at a time.  Memory is
the peak of resident memory above that at the fork.  Ratios are of the same repeat (two rows).  If a side
spreads by more than 15 %, its group is measured once more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from side_by_side import (  # noqa: E402
    MAX_SPREAD,
    PEER_MODEL,
    TINY_MODEL,
    Pacer,
    Side,
    environment,
    make_model,
    ratio,
    spread,
)
from torch import Tensor  # noqa: E402

from phoenix.files import write_json  # noqa: E402
from phoenix.model.layout import AttentionLayout, PackedBatch  # noqa: E402
from phoenix.model.mistral import Mistral  # noqa: E402
from phoenix.train.distributed import keep_freed_memory  # noqa: E402
from phoenix.train.optim import build_optimizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "step_vs_transformers.json"
GROUPS = {
    "fp32": ("phoenix", "transformers", "transformers one document"),
    "bf16": ("phoenix", "transformers autocast", "transformers bf16 weights", "transformers one document"),
}
ROWS, LEARNING_RATE = 2, 1e-5


def make_rows(vocab_size: int, max_length: int) -> list[tuple[Tensor, list[int]]]:
    """Rows of tokens [max_length] and the lengths of their documents; a row's last document is cut to fit."""
    generator, rows = np.random.default_rng(0), []
    for _ in range(ROWS):
        lengths: list[int] = []
        while (left := max_length - sum(lengths)) > 0:
            drawn = generator.lognormal(np.log(0.17 * max_length) - 0.32, 0.8)  # 350 of 2048 on average
            lengths.append(min(left, max(2, int(drawn))))
        rows.append((torch.from_numpy(generator.integers(0, vocab_size, max_length)), lengths))
    return rows


# One side each: model folder, group, side, rows -> step(row index) -> loss


def phoenix_step(folder: str, group: str, _side: str, rows: list) -> Callable[[int], float]:
    keep_freed_memory()  # as recipes/sft.py does
    model = Mistral.from_pretrained(folder)
    model.compute_dtype = torch.bfloat16 if group == "bf16" else torch.float32
    optimizer = build_optimizer(model, "adamw", learning_rate=LEARNING_RATE)
    batches = []
    for tokens, lengths in rows:
        labels = tokens.roll(-1)
        labels[np.cumsum(lengths) - 1] = -100
        batches.append(PackedBatch(tokens, labels, AttentionLayout.packed(lengths)))

    def step(index: int) -> float:
        batch = batches[index]
        loss = -model(batch).sum() / (batch.labels >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def transformers_step(folder: str, group: str, side: str, rows: list) -> Callable[[int], float]:
    dtype = torch.bfloat16 if side.endswith("bf16 weights") else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = []
    for tokens, lengths in rows:
        labels = tokens.clone()  # transformers shifts them
        labels[np.cumsum([0, *lengths[:-1]])] = -100
        positions = torch.cat([torch.arange(length) for length in lengths])
        positions = None if side.endswith("one document") else positions[None]
        batches.append({"input_ids": tokens[None], "labels": labels[None], "position_ids": positions})
    autocast = group == "bf16" and dtype == torch.float32

    def step(index: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batches[index], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def work(pacer: Pacer, folder: str, group: str, side: str, max_length: int) -> None:
    """A side's process: the rows in their order, again and again."""
    vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    make = phoenix_step if side == "phoenix" else transformers_step
    step = make(folder, group, side, make_rows(vocab_size, max_length))
    for index in itertools.cycle(range(ROWS)):
        pacer.wait()
        pacer.done(loss=step(index))


def measure(folder: str, group: str, max_length: int, repeats: int) -> dict[str, Any]:
    """All sides of a group in turns: a warm-up pass over the rows, then `repeats` passes."""
    sides = {side: Side(work, folder, group, side, max_length) for side in GROUPS[group]}
    passes: dict[str, list[list[dict]]] = {side: [] for side in sides}
    try:
        for _ in range(repeats + 1):
            for side, process in sides.items():
                passes[side].append([process.step() for _ in range(ROWS)])
    finally:
        for process in sides.values():
            process.close()
    seconds = {side: [sum(step["seconds"] for step in steps) for steps in passes[side]] for side in sides}
    first = {side: passes[side][0][0]["loss"] for side in sides}
    peaks = {side: passes[side][-1][-1]["peak_memory_gib"] for side in sides}
    return summary({side: times[1:] for side, times in seconds.items()}, first, peaks, ROWS * max_length)


def summary(seconds: dict, first: dict, peaks: dict, tokens: int) -> dict[str, Any]:
    sides = {}
    for side, times in seconds.items():
        median = statistics.median(times)
        sides[side] = {
            "tokens_per_second": tokens / median, "spread": spread(times),
            "peak_memory_gib": peaks[side], "first_loss": first[side],
        }  # fmt: skip
        if side != "phoenix":
            sides[side]["phoenix_times_as_fast"] = ratio(times, seconds["phoenix"])
    return sides


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="a model folder; default: random weights in the shape of the peer model"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--repeats", type=int, default=5, help="passes over the rows that are timed")
    parser.add_argument("--quick", action="store_true", help="a tiny model, short rows and one repeat")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    max_length, repeats = (128, 1) if options.quick else (2048, options.repeats)
    report = {"environment": environment(["torch", "transformers"]), "quick": options.quick,
              "model": options.model or "random", "tokens_per_step": max_length, "rows": ROWS,
              "repeats": repeats}  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or made
        if not options.model:
            make_model(folder, TINY_MODEL if options.quick else PEER_MODEL)
        for group in GROUPS:
            sides = measure(folder, group, max_length, repeats)
            if not options.quick and max(side["spread"] for side in sides.values()) > MAX_SPREAD:
                sides = measure(folder, group, max_length, repeats)
            report[group] = sides
            for side, values in sides.items():
                print(group, side, json.dumps(values), flush=True)
            write_json(options.output, report)  # what is measured stays, should the next group be stopped
    ours, theirs = (report["fp32"][side]["first_loss"] for side in ("phoenix", "transformers"))
    report["losses_equal"] = abs(ours - theirs) <= 1e-4 * abs(theirs)
    report["quiet"] = all(side["spread"] <= MAX_SPREAD for group in GROUPS for side in report[group].values())
    write_json(options.output, report)
    print(f"wrote {options.output}; losses in fp32 {ours:.6f} and {theirs:.6f}; quiet: {report['quiet']}")
    return 0 if report["losses_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
