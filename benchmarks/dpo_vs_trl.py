"""Speed and memory of preference training, Phoenix beside TRL's DPOTrainer: same model and pairs, one run.

    make .venv-peers
    .venv-peers/bin/python benchmarks/dpo_vs_trl.py [--output=PATH] [--minutes=12] [--repeats=5] [--quick]

Eight pairs of random tokens, in log-normal lengths around 172 tokens of prompt, 241 of the chosen and 237 of
the rejected answer, are one step on both sides; the reference's log-probs are computed before the first one.
Phoenix runs the loop of recipes/dpo.py with its defaults, and once more with both answers as whole sequences:
what sharing the prompt brings.  TRL runs its own loop with precompute_ref_log_probs=True, SDPA, fused AdamW
and no activation checkpointing; the rows reach it as token ids.

    fp32  both in fp32
    bf16  Phoenix: fp32 masters, bf16 compute.  TRL: autocast, as bf16=True does it, or bf16 weights

A probe of one step runs TRL with 1, 2, 4 and 8 pairs at once; in bf16, the fastest two sizes of fp32 in both
ways.  Then the sides take turns, each a process of its own, forked after all imports: TRL at its fastest, and
Phoenix in both ways.  A turn is the reference of all pairs, then a step, from the end of what came before it;
the first step is left out.  Ratios are of the same repeat.  Last come other shares of the prompt, Phoenix
alone.  Memory is the peak of resident memory above that at the fork.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import side_by_side  # noqa: E402
import torch  # noqa: E402
from sft_vs_trl import MAX_GRAD_NORM, PACKAGES, SEED, Bench, make_tokenizer  # noqa: E402
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

from phoenix.data.pairs import PairBatch, PairLoader  # noqa: E402
from phoenix.data.store import FORMAT_VERSION, MANIFEST, StoreWriter, TokenStore  # noqa: E402
from phoenix.files import write_json  # noqa: E402
from phoenix.model.layout import IGNORE_INDEX, AttentionLayout, PackedBatch  # noqa: E402
from phoenix.model.pretrained import read_config  # noqa: E402
from phoenix.train import distributed, metrics  # noqa: E402
from phoenix.train.optim import build_optimizer  # noqa: E402
from phoenix.train.preference import LossConfig, Objective  # noqa: E402
from phoenix.train.reference import ReferenceCache  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "dpo_vs_trl.json"
PAIRS, MAX_LENGTH = 8, 2048
MICRO_BATCH_TOKENS = 1280  # the longest pair has fewer: one or two at once, as TRL at its fastest
LENGTHS = (172, 241, 237)  # of prompt, chosen and rejected answer, on average
SHARES = (0.2, 0.5, 0.8)  # of the prompt in a sequence
SHARE_PAIRS = 4  # a step; of these
LEARNING_RATE, BETA = 5e-7, 0.1

BATCH_SIZES = (1, 2, 4, 8)  # of TRL: pairs at once
DTYPES = {
    "fp32": {"fp32": {}},
    "bf16": {"autocast": {}, "bf16 weights": {"dtype": "bfloat16", "bf16": False}},
}
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected


# The pairs


def make_pairs(number: int, means: Sequence[float], vocab_size: int) -> list[Pair]:
    """Random tokens; each of the three lengths takes evenly spaced quantiles of a log-normal distribution, so
    that few pairs have the stated mean.
    """
    generator = np.random.default_rng(0)
    places = [statistics.NormalDist().inv_cdf((i + 0.5) / number) for i in range(number)]
    shape = np.exp(0.5 * np.array(places))
    shape /= shape.mean()
    lengths = [np.maximum(1, (mean * generator.permutation(shape)).round()).astype(int) for mean in means]
    return [tuple(generator.integers(3, vocab_size, n) for n in sizes) for sizes in zip(*lengths)]


def write_store(folder: Path, pairs: list[Pair], vocab_size: int) -> None:
    folder.mkdir()
    writer = StoreWriter(folder, "train", vocab_size)
    for line, parts in enumerate(pairs):
        writer.add([(part, np.full(len(part), place > 0)) for place, part in enumerate(parts)], (0, line))
    manifest = {"format_version": FORMAT_VERSION, "kind": "pairs", "splits": {"train": writer.close()}}
    write_json(folder / MANIFEST, manifest | {"chat_template": "chatml", "inputs": []})


def write_dataset(folder: Path, pairs: list[Pair]) -> None:
    """Pairs as DPOTrainer's collator takes them."""
    import datasets

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = {name: [pair[place].tolist() for pair in pairs] for place, name in enumerate(names)}
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))


class PlainLoader(PairLoader):
    """The same pairs as whole sequences, each with its prompt."""

    def __init__(self, store: TokenStore, **options: Any) -> None:
        super().__init__(store, **options)
        self.plan = dataclasses.replace(self.plan, row_tokens=self.plan.row_tokens + self.prefix - 1)

    def packed_batch(self, rows: np.ndarray) -> PairBatch:
        sequences = [sequence for row in rows for sequence in self._sequences(row)]
        sizes = [len(tokens) for tokens, _ in sequences]
        labels = [np.append(np.where(mask, ids, IGNORE_INDEX)[1:], IGNORE_INDEX) for ids, mask in sequences]
        batch = PackedBatch(
            torch.from_numpy(np.concatenate([tokens for tokens, _ in sequences])),
            torch.from_numpy(np.concatenate(labels)),
            AttentionLayout.packed(sizes),
        )
        parts = [size for chosen, rejected in zip(sizes[::2], sizes[1::2]) for size in (0, chosen, rejected)]
        lengths = torch.tensor([int(mask[1:].sum()) for _, mask in sequences]).view(-1, 2)
        return PairBatch(batch, rows, torch.tensor([*parts, 0]), None, lengths)


# One side each: a step, then reference and step in turn until it is killed


def phoenix_side(pacer: Pacer, folder: Path, group: str, setting: dict) -> None:
    """The loop of recipes/dpo.py, with its pieces.  setting: `plain`, and `store`, the name of the folder."""
    distributed.keep_freed_memory()
    world, config = distributed.World(), read_config(folder / "model")
    store = TokenStore.open(folder / setting.get("store", "store"), kind="pairs")
    loader = (PlainLoader if setting.get("plain") else PairLoader)(
        store, seed=SEED, global_batch_size=PAIRS, micro_batch_tokens=MICRO_BATCH_TOKENS
    )
    dtype = torch.bfloat16 if group == "bf16" else torch.float32
    peak = metrics.peak_flops(world.device, dtype)
    model = distributed.load_model(
        folder / "model", world, compute_dtype=dtype, logits_memory=2**30, activation_checkpointing=False,
        compile=False,
    )  # fmt: skip
    cache = ReferenceCache(Path(tempfile.mkdtemp(dir=folder)), folder / "model", dtype, world)
    objective = Objective(LossConfig(beta=BETA), loader)
    objective.ask_reference(cache, model, loader.steps_per_epoch)
    optimizer = build_optimizer(model, "adamw", learning_rate=LEARNING_RATE)
    log = metrics.MetricsLog(Path(tempfile.mkdtemp(dir=folder)), step=-1)
    shown = {"logps": objective.reference.tolist(), "tokens": int(loader.plan.row_tokens.sum())}
    for step in itertools.count():
        pacer.wait()
        start, batch = time.perf_counter(), loader.global_batch(step)
        sums, flops = metrics.dpo_zeros(world.device), 0.0
        model.train()
        whole = objective.first_pass(model, step, world)
        for _, micro in batch.share(world.rank, world.world_size):
            loss, values = objective.loss(micro, model(micro.batch, stats=True), whole)
            (loss / len(batch.rows)).backward()
            sums += values
            layout = micro.batch.layout
            flops += metrics.training_flops(config, layout.q_length, layout.k_length.sum(1))
        extra = torch.cat([sums, torch.tensor([flops], dtype=torch.float64)])
        grad_norm, (*sums, flops) = distributed.reduce_gradients(model, world, extra)
        distributed.scale_gradients(model, grad_norm, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        row = log.log(
            step + 1, **metrics.dpo_metrics(sums, len(batch.rows)), grad_norm=grad_norm,
            step_seconds=seconds, tokens_per_second=batch.num_tokens / seconds,
            mfu=float(flops) / seconds / peak, peak_memory_gib=metrics.peak_memory_gib(world.device),
        )  # fmt: skip
        pacer.done(pairs=len(batch.rows), loss=row["loss"], **shown)
        shown = {}
        pacer.wait()
        cache.values.clear()
        objective.ask_reference(cache, model, loader.steps_per_epoch)
        pacer.done(pairs=len(loader.plan))


def trl_side(pacer: Pacer, folder: Path, group: str, setting: dict) -> None:
    """DPOTrainer.train with a callback that waits between steps.  setting: of DPOConfig, and `dtype`."""
    import datasets
    import trl
    from transformers import TrainerCallback

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # of token ids already

        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            losses.append(loss.item())
            return loss

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            pacer.wait()

        def on_step_end(self, *args, **kwargs):
            pacer.done(pairs=PAIRS, loss=statistics.mean(losses), **shown)
            losses.clear()
            shown.clear()
            pacer.wait()
            rows = list(trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]))
            for first in range(0, len(rows), size):
                batch = trainer.data_collator(rows[first : first + size])
                trainer.compute_ref_log_probs(trainer.model, batch)
            pacer.done(pairs=len(rows))
            pacer.wait()

    losses: list[float] = []
    given = dict(setting)
    dtype, size = given.pop("dtype", "float32"), given["per_device_train_batch_size"]
    config = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(dir=folder), use_cpu=True, report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True, max_steps=10**6, seed=SEED, max_length=MAX_LENGTH, beta=BETA,
        learning_rate=LEARNING_RATE, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="constant", gradient_checkpointing=False, precompute_ref_log_probs=True,
        gradient_accumulation_steps=PAIRS // size, model_init_kwargs={"dtype": dtype},
        **{"bf16": group == "bf16", **given},
    )  # fmt: skip
    rows = datasets.load_from_disk(str(folder / f"dataset_{group}"))
    trainer = Trainer(
        str(folder / "model"), args=config, train_dataset=rows, processing_class=make_tokenizer(),
        callbacks=[Turns()],
    )  # fmt: skip
    kept = trainer.train_dataset
    shown = {"logps": [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in kept]}
    trainer.train()


WORK: dict[str, Callable[..., None]] = {"phoenix": phoenix_side, "trl": trl_side}


# The protocol


def probe(bench: Bench, group: str, setting: dict, timeout: float) -> dict[str, Any]:
    """Figures of the first step of TRL, in a process that ends with it; or why it failed."""
    side = Side(trl_side, bench.folder, group, setting)
    try:
        step = side.step(timeout)
    except RuntimeError as error:
        return {"setting": setting, "failed": str(error)}
    finally:
        side.close()
    return {"setting": setting, "pairs_per_second": rate(step), "peak_memory_gib": step["peak_memory_gib"]}


def rate(turn: dict[str, Any]) -> float:
    return turn["pairs"] / turn["seconds"]


def speed(values: dict[str, Any]) -> float:
    return values.get("pairs_per_second", 0.0)


def settings(group: str, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """name -> setting of TRL."""
    return {
        f"{name}, {size} at once": {"per_device_train_batch_size": size, **given}
        for size in sizes
        for name, given in DTYPES[group].items()
    }


def fastest_sizes(found: dict[str, dict[str, Any]], number: int) -> list[int]:
    """Batch sizes of a probe, the fastest first; those that failed are left out."""
    working = sorted((values for values in found.values() if speed(values)), key=speed, reverse=True)
    sizes = dict.fromkeys(values["setting"]["per_device_train_batch_size"] for values in working)
    return list(sizes)[:number]


def measure(bench: Bench, group: str, chosen: dict[str, tuple[str, dict]], end: float) -> dict[str, Any]:
    """side -> its first step, and (reference, step) of each repeat; the sides take turns."""
    sides = {
        name: Side(WORK[library], bench.folder, group, setting)
        for name, (library, setting) in chosen.items()
    }  # fmt: skip
    try:
        found = {name: {"first": side.step(), "repeats": []} for name, side in sides.items()}
        for repeat in range(bench.repeats):
            begun = time.monotonic()
            for name, side in sides.items():
                found[name]["repeats"].append((side.step(), side.step()))
            if repeat + 1 < bench.repeats and end - time.monotonic() < time.monotonic() - begun:
                bench.leave_out(f"{group}, {'; '.join(sides)}: repeats after {repeat + 1} of {bench.repeats}")
                break
    finally:
        for side in sides.values():
            side.close()
    return found


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """side -> pairs/s of step and reference in each repeat, their medians and spreads, peak memory."""
    sides = {}
    for name, turns in found.items():
        values = sides[name] = {}
        for place, what in enumerate(("reference", "training")):
            rates = [rate(repeat[place]) for repeat in turns["repeats"]]
            values[what] = {
                "pairs_per_second": statistics.median(rates), "spread": spread(rates), "repeats": rates
            }  # fmt: skip
        values["peak_memory_gib"] = turns["repeats"][-1][-1]["peak_memory_gib"]
        values["first_loss"] = turns["first"]["loss"]
    return sides


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Of two sides: the ratios of their speeds, of paired repeats, and of their memory."""
    speeds = {
        what: ratio(ours[what]["repeats"], theirs[what]["repeats"]) for what in ("training", "reference")
    }
    return {**speeds, "memory": ours["peak_memory_gib"] / theirs["peak_memory_gib"]}


def largest_difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Of log-probs of the same answers, relative."""
    ours, theirs = np.array(ours), np.array(theirs)
    return float((np.abs(ours - theirs) / np.abs(theirs)).max())


def run_group(bench: Bench, group: str, sizes: Sequence[int], end: float) -> list[int]:
    """Probe and measure, into the report; the fastest two batch sizes."""
    report, begun = bench.report[group], time.monotonic()
    found = report["probe"] = {}
    for name, setting in settings(group, sizes).items():
        left = begun + 0.45 * (end - begun) - time.monotonic()
        if left < 5 and found:
            bench.leave_out(f"{group}, probe of TRL: {name}")
            continue
        found[name] = probe(bench, group, setting, max(left, 60))
        print(group, name, json.dumps(found[name]), flush=True)
        bench.save()
    best = max(found, key=lambda name: speed(found[name]))
    if not speed(found[best]):
        bench.leave_out(f"{group}: all, since no setting of TRL ran")
        return list(sizes)
    report["trl_setting"] = best
    chosen = {
        "phoenix": ("phoenix", {}), "phoenix, whole sequences": ("phoenix", {"plain": True}),
        "trl": ("trl", found[best]["setting"]),
    }  # fmt: skip
    turns = measure(bench, group, chosen, end)
    sides = report["sides"] = summarise(turns)
    for name, side in sides.items():
        print(group, name, json.dumps(side), flush=True)
    logps = [turns[name]["first"]["logps"] for name in chosen]
    report["logps"] = dict(zip(chosen, (values[0] for values in logps)))  # of the first pair
    report["logps_relative_difference"] = largest_difference(logps[0], logps[2])
    report["tokens"] = {name: turns[name]["first"]["tokens"] for name in list(chosen)[:2]}
    least = min(values["peak_memory_gib"] for values in found.values() if speed(values))
    ours = sides["phoenix"]
    bench.report["ratios"][group] = {
        "phoenix_vs_trl": compare(ours, sides["trl"]),
        "whole_sequences_vs_trl": compare(sides["phoenix, whole sequences"], sides["trl"]),
        "sharing_the_prompt": compare(ours, sides["phoenix, whole sequences"]),
        "memory_vs_leanest_trl_of_probe": ours["peak_memory_gib"] / least,
    }
    report["quiet"] = all(
        side[what]["spread"] <= MAX_SPREAD for side in sides.values() for what in ("training", "reference")
    )
    bench.save()
    return fastest_sizes(found, 2)


def run_shares(bench: Bench, group: str, shares: Sequence[float], end: float) -> None:
    """What sharing brings for some shares of the prompt, into the report."""
    for number, share in enumerate(shares):
        if bench.left < 15 and not bench.quick:
            bench.leave_out(f"{group}: share of the prompt {share}")
            continue
        store = {"store": f"store_{share}"}
        chosen = {
            f"share {share}": ("phoenix", store),
            f"share {share}, whole sequences": ("phoenix", {**store, "plain": True}),
        }
        now = time.monotonic()
        found = measure(bench, group, chosen, now + (end - now) / (len(shares) - number))
        tokens = [turns["first"]["tokens"] for turns in found.values()]
        gain = compare(*summarise(found).values())
        gain |= {"fewer_tokens": tokens[1] / tokens[0], "repeats": len(found[f"share {share}"]["repeats"])}
        bench.report["ratios"].setdefault("sharing_by_share_of_the_prompt", {}).setdefault(group, {})[
            str(share)
        ] = gain
        print(group, "share", share, json.dumps(gain), flush=True)
        bench.save()


def main() -> int:
    return side_by_side.main(__doc__, RESULTS, 12, import_peers, run)


def import_peers() -> tuple:
    import trl

    return trl.DPOTrainer, trl.DPOConfig


def run(options: argparse.Namespace) -> int:
    shape = TINY_MODEL if options.quick else PEER_MODEL
    means = [length / 8 for length in LENGTHS] if options.quick else LENGTHS
    # At the usual std of 0.02 a log-prob hardly shows which tokens see which.
    shape = dataclasses.replace(shape, initializer_range=max(0.05, shape.initializer_range))
    report = {
        "ratios": {}, "environment": environment(PACKAGES), "quick": options.quick, "pairs_per_step": PAIRS,
        "repeats": 1 if options.quick else options.repeats, "left_out": [], "fp32": {}, "bf16": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        end = time.monotonic() + 60 * options.minutes
        bench = Bench(
            Path(made), options.output, MAX_LENGTH, report["repeats"], 1, options.quick, end, report
        )
        make_model(str(bench.folder / "model"), shape)
        pairs = make_pairs(PAIRS, means, shape.vocab_size)
        lengths = np.array([[len(part) for part in pair] for pair in pairs])
        report["mean_lengths"] = dict(zip(("prompt", "chosen", "rejected"), lengths.mean(0).tolist()))
        report["longest_sequence"] = int((lengths[:, :1] + lengths[:, 1:]).max())
        write_store(bench.folder / "store", pairs, shape.vocab_size)
        for group in ("fp32", "bf16"):
            write_dataset(bench.folder / f"dataset_{group}", pairs)
        total = means[0] + (means[1] + means[2]) / 2
        for share in SHARES:
            parts = [share * total, *[(1 - share) * total] * 2]
            rows = make_pairs(SHARE_PAIRS, parts, shape.vocab_size)
            write_store(bench.folder / f"store_{share}", rows, shape.vocab_size)
        sizes = BATCH_SIZES[:2] if options.quick else BATCH_SIZES
        for group, part in (("fp32", 0.46), ("bf16", 0.75)):
            sizes = run_group(bench, group, sizes, time.monotonic() + part * bench.left)
        shares = SHARES[:1] if options.quick else SHARES
        for group, part in (("bf16", 0.5), ("fp32", 1.0)):
            run_shares(bench, group, shares, time.monotonic() + part * bench.left)
    checks = report["checks"] = check(report["fp32"])
    report["quiet"] = all(report[group].get("quiet", False) for group in ("fp32", "bf16"))
    bench.save()
    print(json.dumps(report["ratios"], indent=2))
    print(f"wrote {options.output}; {checks}; quiet: {report['quiet']}")
    return 0 if all(checks.values()) else 1


def check(group: dict[str, Any]) -> dict[str, bool]:
    """Whether both sides, in fp32, begin at ln 2 and agree on the log-probs of all answers."""
    losses = [side["first_loss"] for side in group.get("sides", {}).values()]
    return {
        "first_losses_are_ln_2": bool(losses) and all(abs(loss - math.log(2)) <= 1e-4 for loss in losses),
        "logps_equal": group.get("logps_relative_difference", math.inf) <= 1e-4,
    }


if __name__ == "__main__":
    sys.exit(main())
