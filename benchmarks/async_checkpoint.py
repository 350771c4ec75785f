"""What a checkpoint costs the steps around it, on the quickstart's model: asynchronous, and waited for.

    python benchmarks/async_checkpoint.py [--output=PATH] [--repeats=5] [--quick]

Three turns in each repeat, each of the same number of steps on the same rows (the quickstart's: 4 rows of
1024 tokens a step): without a checkpoint; with one that is begun before the first step and has its name after
the last; and with one that is waited for.  `added_share_of_a_step` is the time that the checkpoint adds to a
turn, over a step of the same repeat.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from side_by_side import TINY_MODEL, environment, spread  # noqa: E402
from step_vs_transformers import make_rows  # noqa: E402

from phoenix.files import write_json  # noqa: E402
from phoenix.model.layout import AttentionLayout, PackedBatch  # noqa: E402
from phoenix.model.mistral import Mistral, MistralConfig  # noqa: E402
from phoenix.train import distributed, metrics  # noqa: E402
from phoenix.train.checkpoint import CheckpointWriter  # noqa: E402
from phoenix.train.optim import build_optimizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "async_checkpoint.json"
SMOLLM2 = MistralConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, sliding_window=None, rope_theta=100000.0, tie_word_embeddings=True,
    model_type="llama",
)  # fmt: skip
TURNS = ("without", "asynchronous", "waited for")


class Run:
    """A model in training, and the writer of its checkpoints."""

    def __init__(self, config: MistralConfig, row_length: int, folder: Path) -> None:
        self.model = Mistral(config).init_weights(torch.Generator().manual_seed(0)).train()
        self.world = distributed.World()
        self.model.compute_dtype = distributed.resolve_dtype("auto", self.world.device)
        self.optimizer = build_optimizer(self.model, "adamw", learning_rate=1e-5)
        self.writer = CheckpointWriter(folder, self.model, self.optimizer, self.world, 1)
        self.saves = 0
        self.batches = []  # two micro-batches of two rows
        for _ in range(2):
            rows = make_rows(config.vocab_size, row_length)
            tokens, lengths = torch.cat([row for row, _ in rows]), [n for _, ends in rows for n in ends]
            labels = tokens.roll(-1)
            labels[np.cumsum(lengths) - 1] = -100
            self.batches.append(PackedBatch(tokens, labels, AttentionLayout.packed(lengths)))

    def step(self) -> None:
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in self.batches:
            stats = self.model(batch, stats=True)
            (-stats.logps.sum() / 4000).backward()
            sums += metrics.sft_sums(stats)
        grad_norm, _ = distributed.reduce_gradients(self.model, self.world, sums)
        distributed.scale_gradients(self.model, grad_norm, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def turn(self, kind: str, steps: int) -> dict[str, float]:
        begun = time.perf_counter()
        if kind != "without":
            self.saves += 1
            self.writer.save({"step": self.saves}, wait=kind == "waited for")
        saved = time.perf_counter()
        for _ in range(steps):
            self.step()
        written = not self.writer.busy
        stepped = time.perf_counter()
        self.writer.finish()
        end = time.perf_counter()
        return {
            "seconds": end - begun, "save": saved - begun, "finish": end - stepped,
            "written_in_time": float(written),
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each kind")
    parser.add_argument("--steps", type=int, default=1, help="steps of a turn")
    parser.add_argument("--quick", action="store_true", help="a tiny model and short rows")
    options = parser.parse_args()
    distributed.keep_freed_memory()
    config, row_length = (TINY_MODEL, 64) if options.quick else (SMOLLM2, 1024)
    report: dict[str, Any] = {
        "environment": environment(["torch"]), "quick": options.quick,
        "parameters": config.num_parameters()[0], "steps_of_a_turn": options.steps,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=options.output.parent) as folder:
        run = Run(config, row_length, Path(folder))
        run.step()
        turns = [{kind: run.turn(kind, options.steps) for kind in TURNS} for _ in range(options.repeats)]
    step = [turn["without"]["seconds"] / options.steps for turn in turns]
    report["step_seconds"] = statistics.median(step)
    report["spread"] = spread(step)
    for kind in TURNS[1:]:
        added = [(turn[kind]["seconds"] - turn["without"]["seconds"]) / one for turn, one in zip(turns, step)]
        report[kind] = {
            "added_share_of_a_step": statistics.median(added), "min": min(added), "max": max(added),
            **{name: statistics.median(turn[kind][name] for turn in turns)
               for name in ("save", "finish", "written_in_time")},
        }  # fmt: skip
        print(kind, report[kind], flush=True)
    write_json(options.output, report)
    print(f"wrote {options.output}; a step takes {report['step_seconds']:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
