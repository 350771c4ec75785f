"""Preference training of a tiny model: it learns, goes on bit for bit, and asks the reference only once."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import (
    STEPS,
    CrashError,
    Inputs,
    after_step,
    ask_to_stop,
    assert_same_run,
    crash,
    dpo,
    reproducible,
    status,
)
from safetensors.torch import load_file, save_file

from phoenix import chat
from phoenix.config import load_config
from phoenix.data.pairs import PairLoader
from phoenix.data.store import StoreWriter, TokenStore
from phoenix.files import Interrupted, UserError, read_json_lines
from phoenix.model.mistral import Mistral
from phoenix.tokenizer import Tokenizer
from phoenix.train import reference
from phoenix.train.distributed import World
from phoenix.train.reference import ReferenceCache


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, bpe_tokenizer_folder) -> Inputs:
    torch.set_num_threads(1)
    return Inputs(tmp_path_factory.mktemp("dpo"), bpe_tokenizer_folder)


@pytest.fixture(scope="module")
def finished(inputs) -> Path:
    dpo.main(inputs.dpo_config(inputs.folder / "finished"))
    return inputs.folder / "finished"


def test_a_run_learns_and_writes_its_folder(finished):
    rows = reproducible(finished)
    trained, held_out = [r for r in rows if "loss" in r], [r for r in rows if "eval_loss" in r]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert [row["step"] for row in held_out] == [0, 3, 6]
    assert trained[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert trained[0]["rewards/accuracies"] == 0, "strictly above: equal to the reference is no success"
    assert held_out[-1]["eval_loss"] < 0.5 and held_out[-1]["eval_rewards/accuracies"] > 0.9
    for row in trained:
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"])
        assert row["nll_loss"] == pytest.approx(-row["logps/chosen"] / row["chosen_length"])
    assert status(finished) == (0, "done") and (finished / "report.html").is_file()
    assert Mistral.from_pretrained(finished / "model")
    assert [row["step"] for row in read_json_lines(finished / "samples.jsonl")] == [0, 3, 6]


def test_a_stopped_run_goes_on_bit_for_bit(inputs, finished, tmp_path):
    """Stopped by SIGTERM, then by a crash behind a checkpoint, then without the cache."""
    config = inputs.dpo_config(tmp_path / "run", reference_cache=tmp_path / "cache")
    with after_step(2, ask_to_stop), pytest.raises(Interrupted):
        dpo.main(config)
    shutil.rmtree(tmp_path / "cache")
    with after_step(2, crash), pytest.raises(CrashError):
        dpo.main(config)
    dpo.main(config)
    assert_same_run(tmp_path / "run", finished)


def test_the_reference_is_asked_once_for_every_run(inputs, finished, tmp_path, monkeypatch):
    """Fresh and cached are equal bit for bit; another learning rate starts at once."""
    monkeypatch.setattr(ReferenceCache, "_compute", lambda *_: pytest.fail("the reference was asked again"))
    dpo.main(inputs.dpo_config(tmp_path / "same"))
    assert_same_run(tmp_path / "same", finished)
    dpo.main(inputs.dpo_config(tmp_path / "other", learning_rate=1e-3))
    assert reproducible(tmp_path / "other")[:2] != reproducible(finished)[1:3]


def test_a_damaged_cache_is_found_and_computed_again(inputs, finished, tmp_path, capsys):
    config = inputs.dpo_config(tmp_path / "one", reference_cache=tmp_path / "cache")
    dpo.main(config)
    path = min((tmp_path / "cache").glob("*/*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    capsys.readouterr()
    dpo.main(dataclasses.replace(config, output_dir=tmp_path / "two"))
    assert "is damaged; what it held is computed again" in capsys.readouterr().out
    assert_same_run(tmp_path / "two", finished)


def assert_close(folder: Path, expected: list[dict]) -> None:
    """Within 1e-5 of a number, or of 1 if it is smaller: rewards are differences of log-probs in hundreds."""
    rows = reproducible(folder)
    assert [sorted(row) for row in rows] == [sorted(row) for row in expected]
    for row, wanted in zip(rows, expected):
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (name, wanted["step"])


def run_on_ranks(world: World, config: dpo.DPOConfig) -> None:
    dpo.main(config)


MIXTURES = [("sigmoid",), ("aot",), ("aot_unpaired", "bco_pair"), ("ipo", "sft"), ("kto",)]


@pytest.mark.parametrize("loss_type", MIXTURES)
def test_ranks_and_micro_batches_change_nothing(inputs, tmp_path, two_ranks, loss_type):
    """Three ways to cut a global batch; losses across pairs included."""
    changes = {"loss_type": loss_type, "max_steps": 10, "eval_steps": 10, "save_steps": 10}
    dpo.main(inputs.dpo_config(tmp_path / "one", **changes))
    expected = reproducible(tmp_path / "one")
    two_ranks(run_on_ranks, inputs.dpo_config(tmp_path / "two", **changes))
    assert_close(tmp_path / "two", expected)
    dpo.main(inputs.dpo_config(tmp_path / "small", micro_batch_tokens=136, **changes))
    assert_close(tmp_path / "small", expected)


def test_another_reference_model(inputs, tmp_path):
    """The margins are against it, so the first loss is not that of a margin of zero."""
    other = inputs.model("other", initializer_range=0.2)
    dpo.main(inputs.dpo_config(tmp_path / "run", reference_model=other, max_steps=1))
    assert abs(reproducible(tmp_path / "run")[0]["eval_loss"] - math.log(2)) > 1e-3


def test_a_model_that_changed_under_its_digest_is_found(inputs, tmp_path, monkeypatch):
    """A cached value that the model does not give: a sample is computed again before training."""
    config = inputs.dpo_config(tmp_path / "one", reference_cache=tmp_path / "cache", max_steps=1)
    dpo.main(config)
    read = ReferenceCache._read

    def shifted(cache):
        values, lost = read(cache)
        return {key: value + 0.1 for key, value in values.items()}, lost

    monkeypatch.setattr(ReferenceCache, "_read", shifted)
    with pytest.raises(UserError, match=r"but the model gives .*; remove the folder to compute it again"):
        dpo.main(dataclasses.replace(config, output_dir=tmp_path / "two"))


def test_a_signal_stops_the_reference_and_what_was_computed_stays(inputs, finished, tmp_path, monkeypatch):
    config = inputs.dpo_config(
        tmp_path / "run", reference_cache=tmp_path / "cache", micro_batch_tokens=136, max_steps=None
    )
    monkeypatch.setattr(reference, "FLUSH", 1)
    write, written, stopped = ReferenceCache._write, [], []

    def write_and_ask_to_stop(cache, values):
        write(cache, values)
        written.append(len(values))
        if len(written) == 2 and not stopped:
            stopped.append(True)
            ask_to_stop()

    monkeypatch.setattr(ReferenceCache, "_write", write_and_ask_to_stop)
    with pytest.raises(Interrupted, match=r"stopped after \d+ of \d+ pairs of the reference"):
        dpo.main(config)
    assert 2 <= len(written) <= 3 and status(tmp_path / "run")[0] == 75
    first = sum(written)
    written.clear()
    dpo.main(config)
    pairs = (
        TokenStore.open(inputs.pairs(), kind="pairs"),
        TokenStore.open(inputs.pairs(), "eval", kind="pairs"),
    )
    answers = {digest for store in pairs for pair in loader_of(store).digests for digest in pair}
    assert sum(written) == len(answers) - first, "nothing is computed twice"


def test_the_quickstarts_model_is_trained_first_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def train(config):
        asked.append(config)
        raise Interrupted("stopped")

    monkeypatch.setattr(dpo.sft, "main", train)
    with pytest.raises(Interrupted):
        dpo.main(load_config(dpo.DPOConfig, [], dpo.QUICKSTART))
    assert asked == [load_config(dpo.sft.SFTConfig, [], dpo.sft.QUICKSTART)]
    other = [f"model_name_or_path={tmp_path / 'mine'}"]
    with pytest.raises(UserError, match="mine: there is no such folder"):
        dpo.main(load_config(dpo.DPOConfig, other, dpo.QUICKSTART))
    assert len(asked) == 1 and not (tmp_path / "stores").exists()


def loader_of(store: TokenStore) -> PairLoader:
    return PairLoader(store, seed=0, global_batch_size=8, micro_batch_tokens=256)


def test_a_reference_that_is_not_finite_is_never_kept(inputs, tmp_path):
    """One row asks for a token whose weights are out of range: the pair is named, and nothing of it stays."""
    model = inputs.model("wild")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][:] = torch.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "manifest.json").unlink(missing_ok=True)
    config = inputs.dpo_config(tmp_path / "run", model_name_or_path=model, reference_cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"pairs.jsonl, line \d+: the reference gives log-probs of nan"):
        dpo.main(config)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_losses_without_a_reference_ask_for_none(inputs, tmp_path):
    config = inputs.dpo_config(
        tmp_path / "run", loss_type=("simpo",), beta=2.0, reference_cache=tmp_path / "cache", max_steps=2
    )
    dpo.main(config)
    rows = [row for row in reproducible(tmp_path / "run") if "loss" in row]
    assert rows[0]["loss"] > 0 and all(row["chosen_fall"] is None for row in rows)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


BAD = {
    "reference": ({"reference_model": Path("nowhere")}, "nowhere: there is no such folder"),
    "mixture": ({"loss_type": ("kto", "sft")}, "kto is not mixed with others"),
    "template": (
        {"model_name_or_path": "zephyr"},
        "tuned with the chat template 'zephyr', .*chat_template=zephyr",
    ),
    "loss": ({"loss_type": ("sigmiod",)}, "'sigmiod'.*sigmoid"),
    "beta": ({"beta": 0.0}, "beta is 0.0"),
    "smoothing": ({"label_smoothing": 0.1, "loss_type": ("hinge",)}, "hinge"),
    "weights": ({"loss_weights": (1.0, 2.0)}, "2 loss_weights for 1 of loss_type"),
    "micro": ({"micro_batch_tokens": 20}, "micro_batch_tokens=20, but a row has"),
    "documents": ({"store": "documents"}, "format and kind are .*documents.*expected .*pairs"),
    "equal": ({"store": "equal"}, "the answers of all .* pairs are equal"),
    "cache": ({"reference_cache": "other"}, "choose another reference_cache"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(inputs, tmp_path, name):
    changes, sentence = BAD[name]
    changes = dict(changes)
    if changes.get("store") == "documents":
        changes["store"] = inputs.store()
    elif changes.get("store") == "equal":
        changes["store"] = equal_pairs(inputs, tmp_path)
    elif "model_name_or_path" in changes:
        changes["model_name_or_path"] = model = inputs.model("zephyr")
        tokenizer = Tokenizer.from_pretrained(model)
        chat.apply_template(tokenizer, "zephyr")
        tokenizer.save(model)
        (model / "manifest.json").unlink(missing_ok=True)
    elif "reference_cache" in changes:
        cache = ReferenceCache(tmp_path / "cache", inputs.model("base"), torch.float32, World())
        (cache.folder / "manifest.json").write_text('{"kind": "something"}')
        changes["reference_cache"] = tmp_path / "cache"
    with pytest.raises(UserError, match=sentence) as error:
        dpo.main(inputs.dpo_config(tmp_path / "run", **changes))
    assert "\n" not in str(error.value)


def equal_pairs(inputs: Inputs, folder: Path) -> Path:
    """A store in which every rejected answer is the chosen one."""
    store = TokenStore.open(inputs.pairs(), kind="pairs")
    (folder / "equal").mkdir()
    writer = StoreWriter(folder / "equal", "train", store.manifest["vocab_size"])
    for number in range(len(store) // 3):
        prompt, chosen = store.document(3 * number), store.document(3 * number + 1)
        writer.add([tuple(map(np.array, part)) for part in (prompt, chosen, chosen)], (0, number + 1))
    manifest = {**store.manifest, "splits": {"train": writer.close()}}
    (folder / "equal" / "manifest.json").write_text(json.dumps(manifest))
    return folder / "equal"
