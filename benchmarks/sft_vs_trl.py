"""Speed and memory of supervised fine-tuning, Phoenix beside TRL's SFTTrainer: same model and rows, one run.

    make .venv-peers
    .venv-peers/bin/python benchmarks/sft_vs_trl.py [--output=PATH] [--minutes=30] [--repeats=5] [--quick]

Documents of log-normal lengths (350 tokens on average, at most 2048) are packed by each side itself; a step
is one packed row, with clipping and fused AdamW, and all tokens count.  Phoenix runs the loop of
recipes/sft.py, TRL its own; a step lasts from the end of the one before it, so fetching the row, logging and
callbacks count.

    fp32  both in fp32
    bf16  Phoenix: fp32 masters, bf16 compute.  TRL: autocast, as bf16=True does it, and bf16 weights

A probe of a few steps runs every setting in PHOENIX and TRL, and one more of TRL that joins all that helped.
Then four sides take turns, each a process of its own, forked after all imports: Phoenix as its recipe is by
default, the fastest Phoenix, TRL as it is by default, the fastest TRL; and where that computes something else
than Phoenix (`wrapped` lets documents see each other, bf16 weights lose small updates), the fastest that does
not.  Ratios are of the same repeat.  If a side spreads by more than 15 %, its group is measured once more.
Tokens are real ones, without padding.  Memory is the peak of resident memory above that at the fork.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import side_by_side  # noqa: E402
import torch  # noqa: E402
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

from phoenix.data.loader import Loader  # noqa: E402
from phoenix.data.packing import make_plan  # noqa: E402
from phoenix.data.store import FORMAT_VERSION, MANIFEST, StoreWriter, TokenStore  # noqa: E402
from phoenix.files import write_json  # noqa: E402
from phoenix.model.layout import AttentionLayout, PackedBatch  # noqa: E402
from phoenix.model.pretrained import load_model, read_config  # noqa: E402
from phoenix.train import distributed, metrics  # noqa: E402
from phoenix.train.optim import build_optimizer  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "sft_vs_trl.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets")
LEARNING_RATE, MAX_GRAD_NORM, SEED = 1e-5, 1.0, 42
STEPS, WARMUP = 2, 3  # of a turn; before the first turn (compiled blocks are compiled in two of these)
GAIN = 1.02  # a setting of TRL helps if it is so many times as fast as its basis

Settings = dict[str, dict[str, Any]]
PHOENIX: Settings = {
    "default": {},  # of recipes/sft.py
    "compiled": {"compile": True},
    "checkpointing": {"activation_checkpointing": True},
    "checkpointing, compiled": {"activation_checkpointing": True, "compile": True},
    "checkpointing, no logits kept": {"activation_checkpointing": True, "logits_memory": 0},
}
OFF = {"gradient_checkpointing": False}
BASIS = "no checkpointing"  # of TRL's further settings
TRL: Settings = {
    "default": {},  # of SFTConfig: activation checkpointing, bfd, SDPA, fused AdamW
    BASIS: OFF,
    "wrapped": {**OFF, "packing_strategy": "wrapped"},
    "selective checkpointing": {"gradient_checkpointing_kwargs": {"selective": True}},
    "eager attention": {**OFF, "attn_implementation": "eager"},
    "flex attention": {**OFF, "attn_implementation": "flex_attention"},
    "unfused AdamW": {**OFF, "optim": "adamw_torch"},
    "one loader process": {**OFF, "dataloader_num_workers": 1},
}
TRL_BF16: Settings = {
    "bf16 weights": {**OFF, "dtype": "bfloat16"},
    "bf16 weights, no autocast": {**OFF, "dtype": "bfloat16", "bf16": False},
}
TRL_LAST: Settings = {"torch_compile": {**OFF, "torch_compile": True}}  # takes minutes


# The rows


def make_documents(number: int, vocab_size: int, max_length: int) -> list[np.ndarray]:
    """Random tokens in log-normal lengths: of 2048, 350 on average; longer than max_length is cut to it."""
    generator = np.random.default_rng(0)
    # The mean is exp(mu + 0.8**2 / 2), less what is cut off.
    drawn = generator.lognormal(np.log(0.176 * max_length) - 0.32, 0.8, number)
    return [generator.integers(3, vocab_size, n) for n in np.clip(drawn, 2, max_length).astype(int)]


def write_rows(folder: Path, documents: list[np.ndarray], vocab_size: int) -> None:
    """A token store for Phoenix and a dataset for TRL, both mapped from disk when they are used."""
    import datasets

    store = folder / "store"
    store.mkdir()
    writer = StoreWriter(store, "train", vocab_size)
    for line, tokens in enumerate(documents):
        writer.add([(tokens, np.ones(len(tokens), bool))], (0, line))
    split = writer.close()
    manifest = {"format_version": FORMAT_VERSION, "kind": "documents", "splits": {"train": split}}
    manifest |= {"chat_template": "chatml", "inputs": []}
    write_json(store / MANIFEST, manifest)
    rows = datasets.Dataset.from_dict({"input_ids": [tokens.tolist() for tokens in documents]})
    rows.save_to_disk(str(folder / "dataset"))


# One side each: (pacer, folder, group, setting, max_length), steps until it is killed


def phoenix_side(pacer: Pacer, folder: Path, group: str, setting: dict, max_length: int) -> None:
    """The loop of recipes/sft.py, with its pieces."""
    distributed.keep_freed_memory()
    world, config = distributed.World(), read_config(folder / "model")
    store = TokenStore.open(folder / "store")
    plan = make_plan(store, max_length, assistant_only_loss=False)
    loader = Loader(store, plan, seed=SEED, global_batch_size=1, micro_batch_tokens=max_length)
    dtype = torch.bfloat16 if group == "bf16" else torch.float32
    peak = metrics.peak_flops(world.device, dtype)
    options = {name: setting.get(name, False) for name in ("activation_checkpointing", "compile")}
    options["logits_memory"] = setting.get("logits_memory", 2**30)
    model = distributed.load_model(folder / "model", world, compute_dtype=dtype, **options)
    optimizer = build_optimizer(model, "adamw", learning_rate=LEARNING_RATE)
    run = Path(tempfile.mkdtemp(dir=folder))
    log = metrics.MetricsLog(run, step=-1)
    model.train()
    for step in itertools.count():
        pacer.wait()
        start, batch, flops = time.perf_counter(), loader.global_batch(step), 0.0
        sums = torch.zeros(3, dtype=torch.float64)
        for index, micro in batch.share(world.rank, world.world_size):
            distributed.seed_step(SEED, step, index)
            stats = model(micro, stats=True)
            (-stats.logps.sum() / batch.num_target_tokens).backward()
            sums += metrics.sft_sums(stats)
            flops += metrics.training_flops(config, micro.layout.q_length)
        extra = torch.cat([sums, torch.tensor([flops], dtype=torch.float64)])
        grad_norm, (*sums, flops) = distributed.reduce_gradients(model, world, extra)
        distributed.scale_gradients(model, grad_norm, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        row = log.log(
            step + 1, **metrics.sft_metrics(sums, batch.num_target_tokens), grad_norm=grad_norm,
            step_seconds=seconds, tokens_per_second=batch.num_tokens / seconds,
            mfu=float(flops) / seconds / peak, peak_memory_gib=metrics.peak_memory_gib(world.device),
        )  # fmt: skip
        pacer.done(tokens=batch.num_tokens, loss=row["loss"], rows=len(plan), fill_rate=plan.fill_rate)


def trl_side(pacer: Pacer, folder: Path, group: str, setting: dict, max_length: int) -> None:
    """SFTTrainer.train with a callback that waits between steps."""
    import datasets
    import trl
    from transformers import TrainerCallback

    class Trainer(trl.SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            now["tokens"], now["loss"] = inputs["input_ids"].numel(), loss.item()
            if not first:
                first.append({name: inputs[name][0].tolist() for name in ("input_ids", "position_ids")
                              if name in inputs})  # fmt: skip
            return loss

    class Turns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            pacer.wait()

        def on_step_end(self, *args, **kwargs):
            row = first.pop() if first and first[0] is not None else None
            pacer.done(**now, row=row)
            first[:] = [None]
            pacer.wait()

    now: dict[str, Any] = {}
    first: list[dict | None] = []
    given = dict(setting)
    model_options = {name: given.pop(name) for name in ("dtype", "attn_implementation") if name in given}
    config = trl.SFTConfig(
        output_dir=tempfile.mkdtemp(dir=folder), use_cpu=True, report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True, max_steps=10**6, seed=SEED, max_length=max_length,
        learning_rate=LEARNING_RATE, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="constant", per_device_train_batch_size=1,
        **{"packing": True, "bf16": group == "bf16", **given}, model_init_kwargs=model_options or None,
    )  # fmt: skip
    rows = datasets.load_from_disk(str(folder / "dataset"))
    trainer = Trainer(
        str(folder / "model"), config, train_dataset=rows, processing_class=make_tokenizer(),
        callbacks=[Turns()],
    )  # fmt: skip
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    now.update(rows=len(lengths), fill_rate=sum(lengths) / len(lengths) / max_length)
    trainer.train()


def make_tokenizer() -> Any:
    """SFTTrainer wants one with an end and a padding token, though all rows are tokens already."""
    import tokenizers
    import transformers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def loss_side(pacer: Pacer, folder: Path, group: str, row: dict[str, list[int]]) -> None:
    """Phoenix' loss with the first weights on a row that TRL packed."""
    pacer.wait()
    model = load_model(folder / "model")
    model.compute_dtype = torch.bfloat16 if group == "bf16" else torch.float32
    tokens, positions = torch.tensor(row["input_ids"]), torch.tensor(row["position_ids"])
    starts = (positions == 0).nonzero().flatten().tolist()
    labels = tokens.roll(-1)
    labels[torch.tensor([*starts[1:], len(tokens)]) - 1] = -100
    layout = AttentionLayout.packed(np.diff([*starts, len(tokens)]).tolist())
    with torch.no_grad():
        loss = -model(PackedBatch(tokens, labels, layout)).sum() / (labels >= 0).sum()
    pacer.done(loss=float(loss))


WORK: dict[str, Callable[..., None]] = {"phoenix": phoenix_side, "trl": trl_side}


# The protocol


@dataclasses.dataclass
class Bench:
    """One run: where everything lies, how long it may take, and what it found."""

    folder: Path
    output: Path
    max_length: int
    repeats: int
    steps: int
    quick: bool
    end: float  # time.monotonic()
    report: dict[str, Any]

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def leave_out(self, what: str) -> None:
        self.report["left_out"].append(what)
        print(f"left out: {what}", flush=True)

    def save(self) -> None:
        write_json(self.output, self.report)


def probe(bench: Bench, group: str, library: str, setting: dict, seconds: float) -> dict[str, Any]:
    """Figures of a few steps after the warm-up, in a process that ends with it; or why it failed."""
    begun, side = time.monotonic(), Side(WORK[library], bench.folder, group, setting, bench.max_length)
    try:
        warm = WARMUP if compiles(setting) else 1
        steps = [side.step(timeout=seconds - (time.monotonic() - begun)) for _ in range(warm + bench.steps)]
    except RuntimeError as error:
        return {"failed": str(error)}
    finally:
        side.close()
    measured = steps[warm:]
    total = sum(step["tokens"] for step in measured) / sum(step["seconds"] for step in measured)
    kept = {name: steps[-1][name] for name in ("peak_memory_gib", "rows", "fill_rate")}
    found = {"tokens_per_second": total, **kept, "first_loss": steps[0]["loss"]}
    row = steps[0].get("row")
    if row and "position_ids" in row:
        found["phoenix_loss_on_the_same_row"] = loss_on(bench, group, row)
    return found


def loss_on(bench: Bench, group: str, row: dict[str, list[int]]) -> float:
    side = Side(loss_side, bench.folder, group, row)
    try:
        return side.step()["loss"]
    finally:
        side.close()


def probe_all(bench: Bench, group: str, end: float) -> dict[str, dict[str, Any]]:
    """Every setting of both libraries while there is time until `end`, the defaults in any case; then TRL's
    helpful ones together.
    """
    settings = {"phoenix": PHOENIX, "trl": {**TRL, **(TRL_BF16 if group == "bf16" else {}), **TRL_LAST}}
    found: dict[str, dict[str, Any]] = {"phoenix": {}, "trl": {}}

    def run(library: str, name: str, setting: dict) -> None:
        left = bench.left if name == "default" else end - time.monotonic()
        if left < 5:
            return bench.leave_out(f"{group}, {library}: {name}")
        values = {"setting": setting, **probe(bench, group, library, setting, min(left, 180))}
        found[library][name] = values
        print(group, library, name, json.dumps(values), flush=True)
        return bench.save()

    for pair in itertools.zip_longest(*([(of, *item) for item in settings[of].items()] for of in settings)):
        for library, name, setting in filter(None, pair):
            if not (bench.quick and compiles(setting)):
                run(library, name, setting)
    if joined := join(found["trl"]):
        run("trl", "all that helped", joined)
    return found


def compiles(setting: dict) -> bool:
    return bool(setting.get("compile") or setting.get("torch_compile"))


def speed(values: dict[str, Any]) -> float:
    return values.get("tokens_per_second", 0.0)


def same_work(setting: dict) -> bool:
    """Whether TRL computes what Phoenix does: whole documents that see themselves alone, fp32 weights."""
    return setting.get("packing_strategy", "bfd") != "wrapped" and "dtype" not in setting


def join(found: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The settings that beat their basis, as one; None if fewer than two do."""
    basis = speed(found.get(BASIS, {}))
    helpful = [
        values
        for name, values in found.items()
        if name not in ("default", BASIS) and basis and speed(values) > GAIN * basis
    ]
    joined: dict[str, Any] = {}
    for values in sorted(helpful, key=speed):  # of two that exclude each other the faster one stays
        joined |= values["setting"]
    return joined if len(helpful) > 1 else None


def choose_sides(found: dict[str, dict[str, Any]]) -> dict[str, tuple[str, str, dict]]:
    """side -> library, name of the setting, setting.  Two sides of a library may be the same setting."""
    sides = {}
    for library, some in found.items():
        working = {name: values for name, values in some.items() if speed(values)}
        exact = {name: values for name, values in working.items() if same_work(values["setting"])}
        candidates = {"default": {"default": working["default"]}, "best": working, "best of same work": exact}
        for side, those in candidates.items():
            name = max(those, key=lambda name: speed(those[name]))
            sides[f"{library} {side}"] = (library, name, those[name]["setting"])
    del sides["phoenix best of same work"]  # which all of its settings do
    return sides


def measure(bench: Bench, group: str, chosen: dict, end: float) -> dict[str, list[list[dict]]]:
    """Steps of each side in each repeat: the sides take turns, after a warm-up that is left out.

    Sides of the same setting are one process.
    """
    processes = {
        (library, name): Side(WORK[library], bench.folder, group, setting, bench.max_length)
        for library, name, setting in {of[:2]: of for of in chosen.values()}.values()
    }
    turns: dict[tuple[str, str], list[list[dict]]] = {key: [] for key in processes}
    try:
        for process in processes.values():
            for _ in range(WARMUP):
                process.step()
        for repeat in range(bench.repeats):
            begun = time.monotonic()
            for key, process in processes.items():
                turns[key].append([process.step() for _ in range(bench.steps)])
            taken = time.monotonic() - begun
            if repeat + 1 < bench.repeats and end - time.monotonic() < taken:
                bench.leave_out(f"{group}: repeats after {repeat + 1} of {bench.repeats}")
                break
    finally:
        for process in processes.values():
            process.close()
    return {side: turns[library, name] for side, (library, name, _) in chosen.items()}


def summarise(turns: dict[str, list[list[dict]]], chosen: dict) -> dict[str, dict[str, Any]]:
    """side -> tokens/s of each repeat, their median and spread, peak memory, packing."""
    sides = {}
    for side, repeats in turns.items():
        rates = [sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps) for steps in repeats]
        library, name, setting = chosen[side]
        sides[side] = {
            "setting": name, "options": setting, "same_work": library == "phoenix" or same_work(setting),
            "tokens_per_second": statistics.median(rates), "spread": spread(rates), "repeats": rates,
            **{key: repeats[-1][-1][key] for key in ("peak_memory_gib", "rows", "fill_rate")},
        }  # fmt: skip
    return sides


def ratios(sides: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Phoenix' speed over TRL's, of paired repeats, and its memory over TRL's."""
    found: dict[str, Any] = {}
    for name in ("best", "best of same work", "default"):
        theirs, key = sides[f"trl {name}"], name.replace(" ", "_")
        speeds, memories = found[f"phoenix_vs_trl_{key}"], found[f"memory_vs_trl_{key}"] = {}, {}
        for which in ("default", "best"):
            ours = sides[f"phoenix {which}"]
            speeds[which] = ratio(ours["repeats"], theirs["repeats"])
            memories[which] = ours["peak_memory_gib"] / theirs["peak_memory_gib"]
    return found


def leanest(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each library the setting that takes the least memory, from the probe, and the ratio of the two."""
    picked = {}
    for library, some in found.items():
        name = min((name for name in some if speed(some[name])), key=lambda n: some[n]["peak_memory_gib"])
        picked[library] = {"setting": name, "peak_memory_gib": some[name]["peak_memory_gib"]}
    return {**picked, "ratio": picked["phoenix"]["peak_memory_gib"] / picked["trl"]["peak_memory_gib"]}


def first_losses(found: dict[str, Any]) -> dict[str, Any]:
    """Both sides' losses with the first weights on the first row of TRL's default."""
    theirs, ours = found["first_loss"], found["phoenix_loss_on_the_same_row"]
    return {"phoenix": ours, "trl": theirs, "relative_difference": abs(ours - theirs) / abs(theirs)}


def run_group(bench: Bench, group: str, end: float) -> None:
    """Probe, then measure, once more if a side was not quiet; into the report."""
    report, begun, known = bench.report[group], time.monotonic(), len(bench.report["left_out"])
    found = report["probe"] = probe_all(bench, group, begun + 0.6 * (end - begun))
    report["probe_complete"] = not bench.report["left_out"][known:]
    for library, some in found.items():
        if not speed(some.get("default", {})):
            report["quiet"] = False
            return bench.leave_out(f"{group}: all but the probe, since the default of {library} did not run")
    report["first_losses"] = first_losses(found["trl"]["default"])
    chosen = choose_sides(found)
    for again in (False, True):
        begun = time.monotonic()
        report["sides"] = summarise(measure(bench, group, chosen, end), chosen)
        report["measured_again"] = again
        bench.report["ratios"][group] = {**ratios(report["sides"]), "leanest_of_probe": leanest(found)}
        bench.save()
        quiet = all(side["spread"] <= MAX_SPREAD for side in report["sides"].values())
        if quiet or bench.quick or again:
            break
        if end - time.monotonic() < time.monotonic() - begun:
            bench.leave_out(f"{group}: a second measurement, though a side spread by more than 15 %")
            break
    report["quiet"] = quiet
    return bench.save()


def main() -> int:
    return side_by_side.main(__doc__, RESULTS, 30, import_peers, run)


def import_peers() -> tuple:
    import trl

    return trl.SFTTrainer, trl.SFTConfig


def run(options: argparse.Namespace) -> int:
    shape, max_length, documents = (TINY_MODEL, 128, 200) if options.quick else (PEER_MODEL, 2048, 2000)
    # At the usual std of 0.02 a loss hardly shows which tokens see which.
    shape = dataclasses.replace(shape, initializer_range=max(0.05, shape.initializer_range))
    report = {
        "ratios": {}, "environment": environment(PACKAGES), "quick": options.quick, "max_length": max_length,
        "rows_per_step": 1, "repeats": 1 if options.quick else options.repeats, "steps_of_a_turn": STEPS,
        "left_out": [], "fp32": {}, "bf16": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as made:
        end = time.monotonic() + 60 * options.minutes
        bench = Bench(
            Path(made), options.output, max_length, report["repeats"], STEPS, options.quick, end, report
        )
        make_model(str(bench.folder / "model"), shape)
        rows = make_documents(documents, shape.vocab_size, max_length)
        report["documents"] = {
            "number": len(rows), "mean_length": float(np.mean([len(row) for row in rows])),
            "longest": max(len(row) for row in rows),
        }  # fmt: skip
        write_rows(bench.folder, rows, shape.vocab_size)
        for group, share in (("fp32", 0.55), ("bf16", 1.0)):
            run_group(bench, group, time.monotonic() + share * bench.left)
    losses = report["fp32"].get("first_losses")
    report["losses_equal"] = losses is not None and losses["relative_difference"] <= 1e-4
    report["quiet"] = all(report[group]["quiet"] for group in ("fp32", "bf16"))
    bench.save()
    print(json.dumps(report["ratios"], indent=2))
    print(f"wrote {options.output}; first losses equal: {report['losses_equal']}; quiet: {report['quiet']}")
    return 0 if report["losses_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
