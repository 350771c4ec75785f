"""The whole job on a tiny model: it learns, can be stopped and started anywhere, and says what is wrong."""

import json
import math
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from inputs import (
    POISON,
    QUESTIONS,
    RECIPES,
    STEPS,
    CrashError,
    Inputs,
    after_step,
    ask_to_stop,
    assert_close_run,
    assert_same_run,
    command,
    conversation,
    crash,
    prepare,
    reproducible,
    sft,
    status,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from phoenix import chat
from phoenix.config import load_config
from phoenix.data.loader import Loader
from phoenix.data.packing import make_plan
from phoenix.data.store import TokenStore
from phoenix.files import Interrupted, UserError, read_json_lines
from phoenix.model.mistral import Mistral
from phoenix.tokenizer import Tokenizer
from phoenix.train import metrics
from phoenix.train.checkpoint import CheckpointWriter
from phoenix.train.distributed import World, try_memory


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, bpe_tokenizer_folder) -> Inputs:
    torch.set_num_threads(1)
    return Inputs(tmp_path_factory.mktemp("sft"), bpe_tokenizer_folder)


@pytest.fixture(scope="module")
def finished(inputs) -> Path:
    """A run that was never stopped."""
    sft.main(inputs.config(inputs.folder / "finished"))
    return inputs.folder / "finished"


# What a run writes.


def test_a_run_learns_and_writes_its_folder(inputs, finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "samples.jsonl",
        "status.json",
        "report.html",
    }
    rows = reproducible(finished)
    trained, held_out = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in held_out] == [0, 3, 6]
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"] - 0.1
    assert [row["step"] for row in read_json_lines(finished / "samples.jsonl")] == [0, 3, 6]
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == [
        "step_000004",
        "step_000006",
    ]
    assert load_config(sft.SFTConfig, [str(finished / "config.toml")]) == inputs.config(finished)
    assert status(finished) == (0, "done")


def test_the_numbers_of_a_step_are_those_of_its_batch(inputs, finished):
    config = inputs.config(finished)
    store = TokenStore.open(config.store)
    loader = Loader(store, make_plan(store, 128), seed=42, global_batch_size=3, micro_batch_tokens=128)
    rows = {row["step"]: row for row in reproducible(finished) if "loss" in row}
    model, total = Mistral.from_pretrained(config.model_name_or_path), 0
    for step in range(STEPS):
        batch = loader.global_batch(step)
        total += batch.num_tokens
        assert (rows[step + 1]["num_tokens"], rows[step + 1]["epoch"]) == (total, batch.epoch)
    batch = loader.global_batch(0)
    loss = -sum(float(model(micro).detach().double().sum()) for _, micro in batch.share(0, 1))
    assert rows[1]["loss"] == pytest.approx(loss / batch.num_target_tokens, rel=1e-5)
    rates = [rows[step]["learning_rate"] / 3e-3 for step in range(1, STEPS + 1)]  # 2 of 6 steps rise
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([0.0, 0.5, *cosine])


def test_the_held_out_loss_is_a_plain_mean(inputs, finished):
    store, model = TokenStore.open(inputs.store(), "eval"), Mistral.from_pretrained(finished / "model")
    total = count = 0
    for index in range(len(store)):
        tokens, loss_mask = store.document(index)
        tokens = torch.tensor(tokens.astype(int))
        logps = model.logits(tokens, chat_layout(len(tokens))).detach().double().log_softmax(-1)
        for place in range(1, len(tokens)):
            if loss_mask[place]:
                total -= float(logps[place - 1, tokens[place]])
                count += 1
    assert reproducible(finished)[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def chat_layout(length: int):
    from phoenix.model.layout import AttentionLayout

    return AttentionLayout.packed([length])


def test_the_model_folder_is_whole(inputs, finished):
    folder = finished / "model"
    model, tokenizer = Mistral.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    before = Tokenizer.from_pretrained(inputs.model("base"))
    assert tokenizer.digest == before.digest and tokenizer.chat_template == "chatml"
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert stops == chat.stop_ids(before, "chatml")
    assert "fine-tuned with Phoenix" in (folder / "README.md").read_text(encoding="utf-8")
    [latest] = sorted((finished / "checkpoints").iterdir())[-1].glob("*.safetensors")
    with safe_open(latest, "pt") as checkpoint:
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, checkpoint.get_tensor(f"model.{name}")), name


@pytest.mark.peers
def test_transformers_reads_the_model_and_its_template(finished):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.float32)
    text = transformers.AutoTokenizer.from_pretrained(finished / "model")
    ours, tokenizer = (
        Mistral.from_pretrained(finished / "model"),
        Tokenizer.from_pretrained(finished / "model"),
    )
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    prompt = chat.render(messages, tokenizer, "chatml", add_generation_prompt=True).tokens
    encoded = text.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(encoded) == prompt
    tokens = torch.tensor(prompt)
    logits = ours.logits(tokens, chat_layout(len(prompt))).detach()
    wanted = theirs(tokens[None]).logits[0].detach()
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert set(theirs.generation_config.eos_token_id) == set(chat.stop_ids(tokenizer, "chatml"))


# The same numbers, however the work is cut.

WRAPPED = {
    "packing_strategy": "wrapped",
    "assistant_only_loss": False,
    "max_length": 100,
    "schedule_steps": 9,
}
VARIANTS = {
    "plain": {},
    "noise": {"neftune_noise_alpha": 5.0, "optim": "rmsprop", "learning_rate": 3e-4},
    "wrapped": {**WRAPPED, "dtype": "bfloat16", "model_name_or_path": "tied", "weight_decay": 0.1},
    "recomputed": {"logits_memory": 0.0, "activation_checkpointing": True, "lr_scheduler_type": "linear"},
}


def variant(inputs: Inputs, folder: Path, name: str, **changes) -> sft.SFTConfig:
    values = {**VARIANTS[name], **changes}
    if values.get("model_name_or_path") == "tied":
        values["model_name_or_path"] = inputs.model("tied", tie_word_embeddings=True)
    return inputs.config(folder, **values)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(inputs, tmp_path, name):
    """Stopped by SIGTERM between two checkpoints, then by a crash one step behind a checkpoint."""
    sft.main(variant(inputs, tmp_path / "whole", name))
    config = variant(inputs, tmp_path / "parts", name)
    with (
        after_step(2, ask_to_stop),
        pytest.raises(Interrupted, match="stopped at step 3 of 6; start again to go on"),
    ):
        sft.main(config)
    assert status(config.output_dir)[0] == 75
    with after_step(3, crash), pytest.raises(CrashError):
        sft.main(config)
    assert status(config.output_dir) == (1, "CrashError: ")
    sft.main(config)
    assert_same_run(config.output_dir, tmp_path / "whole")


def test_a_run_that_crashes_before_its_first_checkpoint_begins_anew(inputs, finished, tmp_path):
    with after_step(2, crash), pytest.raises(CrashError):
        sft.main(inputs.config(tmp_path))
    sft.main(inputs.config(tmp_path))
    assert_same_run(tmp_path, finished)


def test_a_finished_run_started_again_changes_nothing(inputs, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "again")
    sft.main(inputs.config(tmp_path / "again"))
    assert_same_run(tmp_path / "again", finished)


@pytest.mark.parametrize(
    "changes", [{"activation_checkpointing": True}, {"logits_memory": 0.0}, {"micro_batch_tokens": 256}]
)
def test_ways_of_saving_memory_change_no_number(inputs, finished, tmp_path, changes):
    sft.main(inputs.config(tmp_path, **changes))
    assert_close_run(reproducible(tmp_path), reproducible(finished))


@pytest.mark.slow
def test_compiled_blocks_change_rounding_alone(inputs, finished, tmp_path):
    sft.main(inputs.config(tmp_path, compile=True))
    assert_close_run(reproducible(tmp_path), reproducible(finished))


def run_on_ranks(world: World, config: sft.SFTConfig) -> str:
    sft.main(config)
    return torch.distributed.is_initialized()


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_give_the_losses_of_one_process(inputs, tmp_path, two_ranks, tied):
    """Three micro-batches a step: the second rank computes one token that asks for nothing."""
    model = inputs.model("tied", tie_word_embeddings=True) if tied else inputs.model("base")
    changes = {
        "max_steps": 20,
        "eval_steps": 20,
        "save_steps": 20,
        "model_name_or_path": model,
        "learning_rate": 1e-3,
    }
    sft.main(inputs.config(tmp_path / "one", **changes))
    assert two_ranks(run_on_ranks, inputs.config(tmp_path / "two", **changes)) == [True, True]
    assert_close_run(reproducible(tmp_path / "two"), reproducible(tmp_path / "one"))
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-4 * float(tensor.abs().max()))


def stop_on_ranks(world: World, config: sft.SFTConfig) -> str:
    """Only the second rank gets the signal."""
    act = ask_to_stop if world.rank == 1 else list
    with after_step(1, act):
        try:
            sft.main(config)
        except Interrupted as stop:
            return str(stop)
    return "not stopped"


def test_a_run_goes_on_with_more_and_with_fewer_ranks(inputs, finished, tmp_path, two_ranks):
    config = inputs.config(tmp_path)
    with after_step(1, ask_to_stop), pytest.raises(Interrupted):
        sft.main(config)
    assert two_ranks(stop_on_ranks, config) == ["stopped at step 4 of 6; start again to go on"] * 2
    sft.main(config)
    assert_close_run(reproducible(tmp_path), reproducible(finished))
    assert status(tmp_path) == (0, "done")


@pytest.mark.parametrize("packing_strategy", ["wrapped", "bfd"])
def test_accumulation_gives_the_same_gradient(inputs, packing_strategy):
    """32 rows as 32 micro-batches, as 4 of 8, as 1."""
    store = TokenStore.open(inputs.store("many", rows=90, eval_fraction=0.0))
    plan = make_plan(
        store, 64 if packing_strategy == "wrapped" else int(store.lengths.max()), packing_strategy
    )
    assert len(plan) >= 32
    size, gradients, counts = plan.max_length, [], []
    for tokens in (size, 8 * size, 32 * size):
        model = Mistral.from_pretrained(inputs.model("base"))
        batch = Loader(store, plan, seed=1, global_batch_size=32, micro_batch_tokens=tokens).global_batch(0)
        for _, micro in batch.share(0, 1):
            (-model(micro).sum() / batch.num_target_tokens).backward()
        counts.append(len(batch.micro_batches))
        gradients.append([p.grad for p in model.parameters()])
    assert counts[2] == 1 and counts == (
        [32, 4, 1] if packing_strategy == "wrapped" else sorted(counts, reverse=True)
    )
    for other in gradients[1:]:
        for found, wanted in zip(other, gradients[0]):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def test_the_trial_and_an_evaluation_leave_nothing_behind(inputs, tmp_path):
    config = inputs.config(tmp_path, neftune_noise_alpha=5.0)
    tokenizer = Tokenizer.from_pretrained(config.model_name_or_path)
    store = TokenStore.open(config.store)
    loader = Loader(store, make_plan(store, 128), seed=1, global_batch_size=3, micro_batch_tokens=128)
    model = Mistral.from_pretrained(config.model_name_or_path)
    model.neftune_noise_alpha = 5.0
    before = [p.detach().clone() for p in model.parameters()]
    log = metrics.MetricsLog(tmp_path, step=-1)
    try_memory(model, loader.largest_micro_batch(), World())
    sft.evaluate(config, model, tokenizer, log, 0, World())
    log.close()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    assert "eval_loss" in reproducible(tmp_path)[0]


# A gradient that is not finite.


@pytest.fixture(scope="module")
def poison(inputs) -> dict:
    """A model with NaN in the embedding of a character that stands in one training row."""
    tokenizer = Tokenizer.from_pretrained(inputs.tokenizer)
    [token] = tokenizer.encode(POISON)
    others = {
        t
        for number in range(40)
        for m in conversation(number)["messages"]
        for t in tokenizer.encode(m["content"])
    }
    assert token not in others
    folder = inputs.folder / "poisoned_model"
    shutil.copytree(inputs.model("base"), folder, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store = inputs.store("poisoned", poisoned=11, eval_fraction=0.0)
    changes = {
        "model_name_or_path": folder,
        "store": store,
        "sample_prompts": (),
        "max_length": 120,
        "micro_batch_tokens": 120,
    }
    return {**changes, "save_steps": 1, "save_total_limit": 99, "global_batch_size": 4}


def checkpoint_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted((folder / "checkpoints" / f"step_{step:06d}").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {f"{file.name} {name}": opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def assert_one_step_skipped(folder: Path, store: Path) -> None:
    rows = [row for row in reproducible(folder) if "loss" in row]
    [bad] = [row for row in rows if "skipped_rows" in row]
    assert bad["loss"] is None and bad["grad_norm"] is None
    assert f"{store}.jsonl, line 12" in bad["skipped_rows"] and len(bad["skipped_rows"]) < 6
    assert [row["skipped_steps"] for row in rows] == [int(row["step"] >= bad["step"]) for row in rows]
    assert all(math.isfinite(row["loss"]) for row in rows if row is not bad)
    for step in range(2, STEPS + 1):
        before, now = (checkpoint_tensors(folder, number) for number in (step - 1, step))
        kept = [name for name in now if torch.equal(now[name].nan_to_num(), before[name].nan_to_num())]
        assert (len(kept) == len(now)) == (step == bad["step"]), step


def test_a_batch_without_a_finite_gradient_is_skipped_and_named(inputs, poison, tmp_path, two_ranks):
    config = inputs.config(tmp_path / "one", **poison)
    sft.main(config)
    assert_one_step_skipped(tmp_path / "one", poison["store"])
    two_ranks(run_on_ranks, inputs.config(tmp_path / "two", **poison))
    assert_one_step_skipped(tmp_path / "two", poison["store"])
    assert_close_run(reproducible(tmp_path / "two"), reproducible(tmp_path / "one"))


def test_too_many_such_steps_in_a_row_end_the_run(inputs, tmp_path):
    folder = inputs.folder / "all_nan"
    shutil.copytree(inputs.model("base"), folder, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = inputs.config(tmp_path, model_name_or_path=folder, max_skipped_steps=3, sample_prompts=())
    sentence = "not finite in 3 steps in a row, the last of them step 3 .*line .*; look at these rows, lower"
    with pytest.raises(UserError, match=sentence):
        sft.main(config)
    assert status(tmp_path)[0] == 2 and not (tmp_path / "model").exists()
    assert [row["skipped_steps"] for row in reproducible(tmp_path) if "loss" in row] == [1, 2, 3]


@pytest.fixture(scope="module")
def spiking(inputs) -> dict:
    """A model that gives one token a log-prob of minus thousands: the loss of its row spikes."""
    [token] = Tokenizer.from_pretrained(inputs.tokenizer).encode(POISON)
    folder = inputs.folder / "spiking_model"
    shutil.copytree(inputs.model("base"), folder, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 3.0  # so one hidden number is positive in every row
    tensors["lm_head.weight"][token, 0] = -2e4
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store = inputs.store("poisoned", poisoned=11, eval_fraction=0.0)
    steps = {"max_steps": 16, "save_steps": 999, "save_total_limit": 99, "eval_steps": 999}
    return {"model_name_or_path": folder, "store": store, **steps}


def test_a_loss_that_spikes_is_kept_flagged_and_saved_before(inputs, spiking, tmp_path, two_ranks):
    one = inputs.config(tmp_path / "one", **spiking)
    sft.main(one)
    rows, losses, expected = [row for row in reproducible(one.output_dir) if "loss" in row], [], []
    for row in rows:
        if len(losses) >= 5 and row["loss"] >= 10 * statistics.median(losses):
            expected.append(row["step"])
        losses.append(row["loss"])
    assert expected and [row["step"] for row in rows if row.get("loss_spike")] == expected
    assert rows[-1]["skipped_steps"] == 0
    checkpoints = sorted((one.output_dir / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [
        f"step_{step:06d}" for step in (*[n - 1 for n in expected], 16)
    ]

    two = inputs.config(tmp_path / "two", **spiking)
    shutil.copytree(one.output_dir, two.output_dir)
    for path in (*sorted((two.output_dir / "checkpoints").iterdir())[1:], two.output_dir / "model"):
        shutil.rmtree(path)  # as if it had been killed in the step after the spike
    sft.main(two)
    assert_same_run(two.output_dir, one.output_dir)
    ranks = inputs.config(tmp_path / "ranks", **spiking)
    two_ranks(run_on_ranks, ranks)
    flagged = [row["step"] for row in reproducible(ranks.output_dir) if row.get("loss_spike")]
    assert flagged == expected


# Files that do not fit.


def test_leftovers_of_a_broken_save_are_ignored_and_go(inputs, finished, tmp_path):
    config = inputs.config(tmp_path)
    with after_step(3, ask_to_stop), pytest.raises(Interrupted):
        sft.main(config)
    for name in (".step_000004.tmp", "step_000005"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "shard-00001-model-00001-of-00001.safetensors").write_text("half")
    sft.main(config)
    assert_same_run(tmp_path, finished)
    assert not (tmp_path / "checkpoints" / ".step_000004.tmp").exists()


def test_a_full_disk_ends_the_run_in_a_sentence_and_it_goes_on(inputs, finished, tmp_path, monkeypatch):
    """No file may grow above 100,000 bytes while the third checkpoint is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    begin = CheckpointWriter._begin

    def begin_on_a_full_disk(writer: CheckpointWriter) -> None:
        """The checkpoint before this one is in its place by now."""
        if writer.pending[0].name == "step_000006":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        begin(writer)

    monkeypatch.setattr(CheckpointWriter, "_begin", begin_on_a_full_disk)
    sentence = r"cannot write the checkpoint .*step_000006: .*File too large; free space, or"
    try:
        with pytest.raises(UserError, match=sentence):
            sft.main(inputs.config(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert status(tmp_path)[0] == 2
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step_000002", "step_000004"]
    sft.main(inputs.config(tmp_path))
    assert_same_run(tmp_path, finished)


def change_bytes(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def damaged_store(inputs: Inputs, folder: Path, **manifest) -> Path:
    shutil.copytree(inputs.store(), folder / "store")
    path = folder / "store" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **manifest}))
    return folder / "store"


def truncated_model(inputs: Inputs, folder: Path) -> Path:
    shutil.copytree(inputs.model("base"), folder / "cut", ignore=shutil.ignore_patterns("manifest.json"))
    change_bytes(folder / "cut" / "model.safetensors", lambda content: content[:-10])
    return folder / "cut"


def pairs_store(inputs: Inputs, folder: Path) -> Path:
    row = {"prompt": "Wie geht es?", "chosen": "Gut, danke.", "rejected": "Nein."}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    options = {"kind": "pairs", "num_workers": 1}
    return prepare.main(
        prepare.PrepareConfig(
            folder / "pairs", inputs.model("base"), input=(folder / "pairs.jsonl",), **options
        )
    )


BAD_INPUTS = {
    "no model": (
        lambda i, f: {"model_name_or_path": f / "none"},
        "none: there is no such folder; expected a model folder",
    ),
    "model is a file": (
        lambda i, f: {"model_name_or_path": i.store() / "manifest.json"},
        "manifest.json: there is no such folder",
    ),
    "small model": (
        lambda i, f: {"model_name_or_path": i.model("small", vocab_size=99)},
        "the tokenizer has .* tokens, but config.json says vocab_size 99; the two",
    ),
    "cut model": (
        lambda i, f: {"model_name_or_path": truncated_model(i, f)},
        "not a whole safetensors file",
    ),
    "no store": (
        lambda i, f: {"store": f / "none"},
        "manifest.json: there is no such file; expected the manifest of a token store",
    ),
    "other tokenizer": (
        lambda i, f: {"store": damaged_store(i, f, tokenizer_digest="0" * 64)},
        "made with the tokenizer 000000000000, but the model has .*; prepare the store again",
    ),
    "missing split": (
        lambda i, f: {"store": damaged_store(i, f, splits={"test": {}})},
        "no split 'train'; it has test",
    ),
    "damaged store": (
        lambda i, f: {"store": damaged_store(i, f, splits={"train": 3})},
        "the store is damaged .*; prepare it again",
    ),
    "pairs": (lambda i, f: {"store": pairs_store(i, f)}, "'pairs'.*expected .*'documents'"),
    "documents too long": (
        lambda i, f: {"max_length": 16},
        "documents are longer than max_length=16 .*; raise max_length",
    ),
    "small micro-batch": (
        lambda i, f: {"micro_batch_tokens": 127},
        "micro_batch_tokens is 127, below max_length 128: no row would fit; raise it",
    ),
    "long samples": (
        lambda i, f: {"sample_max_new_tokens": 512, "sample_prompts": ("Hallo",)},
        "sample_prompts: prompt 0 has .* tokens; .*; change them, or sample_max_new_tokens",
    ),
    "other tracker": (
        lambda i, f: {"report_to": ("tensorbord",)},
        "report_to holds 'tensorbord'; expected some of",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_one_sentence(inputs, tmp_path, case):
    changes, sentence = BAD_INPUTS[case]
    config = inputs.config(tmp_path / "run", **{"max_steps": 1, **changes(inputs, tmp_path)})
    with pytest.raises(UserError, match=sentence) as caught:
        sft.main(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


BAD_NUMBERS = (
    "max_length=0 global_batch_size=0 max_steps=0 max_steps=-1 schedule_steps=0 eval_steps=0 save_steps=-1 "
    "save_total_limit=0 max_skipped_steps=0 sample_max_new_tokens=0 learning_rate=0.0 learning_rate=-1.0 "
    "learning_rate=inf num_train_epochs=0.0 num_train_epochs=inf max_grad_norm=0.0 warmup_ratio=1.5 "
    "warmup_ratio=-0.1 adam_beta1=1.0 adam_beta2=-0.1 adam_epsilon=-1e-08 weight_decay=-0.1 "
    "neftune_noise_alpha=-5.0 logits_memory=-1.0 logits_memory=inf seed=-1"
)


@pytest.mark.parametrize("field", BAD_NUMBERS.split())
def test_a_number_out_of_range_is_refused_before_anything(tmp_path, field):
    folders = [f"{name}={tmp_path / 'none'}" for name in ("model_name_or_path", "store", "output_dir")]
    config = load_config(sft.SFTConfig, [*folders, field])
    with pytest.raises(UserError, match=f"{field.replace('=', ' is ')}; expected .*"):
        sft.main(config)
    assert list(tmp_path.iterdir()) == []


def other_model(inputs, folder):
    return {"model_name_or_path": inputs.model("wide", intermediate_size=64)}


def same_shape(inputs, folder):
    path = shutil.copytree(inputs.model("base"), folder / "same_shape")
    return {"model_name_or_path": path}


OTHER_RUNS = {
    "model": (other_model, "step_000003: "),
    "model of one shape": (same_shape, "step_000003: made with model_name_or_path"),
    "store": (lambda i, f: {"store": i.store("other", rows=30)}, "step_000003: made with store"),
    "seed": (lambda i, f: {"seed": 7}, "step_000003: made with seed = 42, now 7; choose another output_dir"),
    "optimizer": (lambda i, f: {"optim": "rmsprop"}, "made with optim = 'adamw', now 'rmsprop'"),
    "batch": (lambda i, f: {"global_batch_size": 2}, "made with global_batch_size = 3, now 2"),
    "packing": (lambda i, f: {"max_length": 120}, "made with max_length = 128, now 120"),
}


@pytest.fixture(scope="module")
def stopped(inputs) -> Path:
    folder = inputs.folder / "stopped"
    with after_step(2, ask_to_stop), pytest.raises(Interrupted):
        sft.main(inputs.config(folder))
    return folder


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(inputs, stopped, tmp_path, case):
    changes, sentence = OTHER_RUNS[case]
    shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(UserError, match=sentence):
        sft.main(inputs.config(tmp_path / "run", **changes(inputs, tmp_path)))
    assert status(tmp_path / "run")[0] == 2
    for name in ("config.toml", "metrics.jsonl"):  # still those of the run that stands there
        assert (tmp_path / "run" / name).read_bytes() == (stopped / name).read_bytes()


@pytest.mark.parametrize(
    "change", [lambda c: c[:-1], lambda c: c[:-9] + bytes([c[-9] ^ 1]) + c[-8:]], ids=["cut", "flipped"]
)
def test_a_damaged_checkpoint_is_named(inputs, stopped, tmp_path, change):
    shutil.copytree(stopped, tmp_path / "run")
    [file] = (tmp_path / "run" / "checkpoints" / "step_000003").glob("*.safetensors")
    change_bytes(file, change)
    with pytest.raises(UserError, match=f"{file.name}: is missing or damaged; remove .*step_000003"):
        sft.main(inputs.config(tmp_path / "run"))


def too_many_ranks(world: World, config: sft.SFTConfig) -> str:
    try:
        sft.main(config)
    except UserError as error:
        return str(error)
    return ""


def test_ranks_without_work_are_refused(inputs, tmp_path, two_ranks):
    config = inputs.config(tmp_path, global_batch_size=1)
    assert [
        "2 processes, but a global batch has only 1 micro-batches" in e
        for e in two_ranks(too_many_ranks, config)
    ] == [True, True]


# As people run it.


def start(config: sft.SFTConfig) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(config), env=environment, cwd=RECIPES.parent, stdout=pipe, stderr=pipe, text=True
    )


def wait_for_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len([row for row in read_json_lines(folder / "metrics.jsonl") if "loss" in row]) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


LONG = {"max_steps": 80, "eval_steps": 30, "save_steps": 7, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def long_run(inputs) -> Path:
    sft.main(inputs.config(inputs.folder / "long", **LONG))
    return inputs.folder / "long"


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), (signal.SIGKILL, -9)], ids=["SIGTERM", "SIGKILL"]
)
def test_a_process_is_stopped_and_started_again(inputs, long_run, tmp_path, number, code):
    config = inputs.config(tmp_path, **LONG)
    process = start(config)
    wait_for_steps(process, tmp_path, 10)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert status(tmp_path)[0] == (75 if code == 75 else 1)
    steps = len([row for row in reproducible(tmp_path) if "loss" in row])
    assert 10 <= steps < 80
    sft.main(config)
    assert_same_run(tmp_path, long_run)


def test_a_mistake_exits_with_2_and_no_traceback(inputs, tmp_path):
    config = inputs.config(tmp_path / "run")
    wrong = subprocess.run(command(config, "lerning_rate=1e-5"), capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    found = "error: command line, 'lerning_rate=1e-5': unknown field 'lerning_rate'"
    assert wrong.stderr == found + "; did you mean 'learning_rate'?\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_stops_and_goes_on(inputs, long_run, tmp_path):
    config = inputs.config(tmp_path, **LONG)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *command(config)[1:],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        torchrun, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(process, tmp_path, 10)
    process.terminate()
    process.communicate(timeout=300)
    assert process.returncode != 0 and status(tmp_path)[0] == 75
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path) == (0, "done")
    first, wanted = reproducible(tmp_path)[:20], reproducible(long_run)[:20]
    assert_close_run(first, wanted)


@pytest.mark.parametrize("text, sentence", [
    ("lerning_rate = 1e-5", r"line 1: unknown field 'lerning_rate'; did you mean 'learning_rate'\?"),
    ("learning_rate = true", "line 1: learning_rate is True; expected float"),
    ("max_steps = 1.5", "line 1: max_steps is 1.5; expected int or none"),
    ('optim = "adam"', "optim is 'adam'; expected one of adamw, rmsprop; did you mean 'adamw'"),
    ('packing_strategy = "bdf"', "did you mean 'bfd'"),
    ('dtype = "fp16"', "expected one of auto, bfloat16, float32"),
    ('sample_prompts = "Hallo"', "sample_prompts is 'Hallo'; expected list of str"),
    ("max_length = 8", "'model_name_or_path' is not set"),
])  # fmt: skip
def test_a_config_that_does_not_fit(tmp_path, text, sentence):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_config(sft.SFTConfig, [str(tmp_path / "c.toml")])


@pytest.mark.parametrize("name", ["phoenix_sft", "zephyr_sft", "smollm2_de"])
def test_shipped_configs_load_and_pass_the_cheap_checks(name):
    config = load_config(sft.SFTConfig, [str(RECIPES / "configs" / f"{name}.toml")])
    sft.check(config)
    assert config.model_name_or_path.parts[0] == "models" and config.store.parts[0] == "stores"
