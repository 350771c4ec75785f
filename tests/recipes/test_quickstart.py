"""The quickstart as people run it, on a tiny model: it measures, skips what is done, says what is wrong."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phoenix import chat
from phoenix.config import load_config, save_config
from phoenix.data import language
from phoenix.data.store import TokenStore
from phoenix.eval.language import judge, shares
from phoenix.eval.scoring import bits_per_byte
from phoenix.files import UserError
from phoenix.generation import Reply
from phoenix.model.mistral import Mistral, MistralConfig
from phoenix.model.pretrained import save_model
from phoenix.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import quickstart  # noqa: E402

GERMAN = (
    "Wann fährt der Zug?",
    "Der Zug fährt heute zwölf Minuten später ab, weil auf der Strecke gebaut wird.",
)
ENGLISH = (
    "When does the train leave?",
    "The train leaves twelve minutes late today, since the line is repaired.",
)
SHARES = "german_reply_share english_reply_share undecided_share ended_share echo_or_loop_share".split()


def row(name, number, question, answer):
    turns = [{"role": "user", "content": f"{number}. {question}"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "language": name, "category": "small_talk"}


def pair(number):
    question, answer = GERMAN
    said = {"prompt": question, "chosen": answer, "rejected": "No idea."}
    return {**said, "prompt": f"{number}. {question}"}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory, bpe_tokenizer_folder):
    """A tiny base model, rows, configs, and one run of the quickstart over them."""
    folder = tmp_path_factory.mktemp("quickstart")
    shape = MistralConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    model = Mistral(shape, dtype=torch.float32).init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder / "base", Tokenizer.from_pretrained(bpe_tokenizer_folder))
    write_rows(folder / "rows.jsonl", [row("de", n, *GERMAN) for n in range(12)])
    held_out = [row("de", n, *GERMAN) for n in range(20, 24)] + [row("en", 1, *ENGLISH)]
    write_rows(folder / "held_out.jsonl", held_out)
    (folder / "prepare.toml").write_text(
        f'input = ["{folder}/rows.jsonl"]\noutput = "{folder}/store"\nmodel_name_or_path = "{folder}/base"\n'
        'chat_template = "chatml"\nmax_length = 128\nnum_workers = 1\n'
    )
    write_rows(folder / "pairs.jsonl", [pair(n) for n in range(8)])
    write_rows(folder / "held_out_pairs.jsonl", [pair(n) for n in range(30, 33)])
    (folder / "prepare_dpo.toml").write_text(
        f'input = ["{folder}/pairs.jsonl"]\neval_input = ["{folder}/held_out_pairs.jsonl"]\nkind = "pairs"\n'
        f'output = "{folder}/pairs"\nmodel_name_or_path = "{folder}/base"\nchat_template = "chatml"\n'
        "max_length = 128\nnum_workers = 1\n"
    )
    (folder / "dpo.toml").write_text(
        f'model_name_or_path = "{folder}/elsewhere"\nstore = "{folder}/pairs"\n'
        f'output_dir = "{folder}/elsewhere"\nmicro_batch_tokens = 256\nglobal_batch_size = 2\nmax_steps = 3\n'
        'learning_rate = 1e-3\ndtype = "float32"\n'
    )
    (folder / "sft.toml").write_text(
        f'model_name_or_path = "{folder}/base"\nstore = "{folder}/store"\noutput_dir = "{folder}/elsewhere"\n'
        "max_length = 128\nmicro_batch_tokens = 256\nglobal_batch_size = 2\nmax_steps = 2\n"
        'learning_rate = 1e-2\ndtype = "float32"\nsample_prompts = ["Wer?"]\nsample_max_new_tokens = 4\n'
    )
    return folder


def arguments(place):
    return [
        f"output_dir={place}/run", f"prepare_config={place}/prepare.toml", f"sft_config={place}/sft.toml",
        f"held_out={place}/held_out.jsonl", "max_new_tokens=12", "dtype=float32",
        f"prepare_dpo_config={place}/prepare_dpo.toml", f"dpo_config={place}/dpo.toml",
    ]  # fmt: skip


@pytest.fixture
def config(place, monkeypatch):
    monkeypatch.setattr(
        quickstart, "measure_gemm", functools.partial(quickstart.measure_gemm, size=64, repeats=1)
    )
    return load_config(quickstart.QuickstartConfig, arguments(place))


@pytest.fixture
def finished(config):
    return quickstart.main(config)


def test_it_writes_what_scripts_rely_on(place, finished, capsys):
    assert finished == place / "run" / "report.html"
    summary = json.loads((place / "run" / "summary.json").read_text())
    for name in (*SHARES, "bits_per_byte_de", "bits_per_byte_en"):
        assert list(summary[name]) == ["base", "sft", "dpo"], name
    assert all(0 <= summary[name]["sft"] <= 1 for name in SHARES if summary[name]["sft"] is not None)
    assert set(summary["seconds"]) == {"prepare", "measure_base", "sft", "measure_sft", "dpo", "measure_dpo"}
    assert (
        summary["bits_per_byte_de"]["sft"] < summary["bits_per_byte_de"]["base"]
    )  # the rows are its answers
    before, after = summary["preferences"]["eval_rewards/margins"]
    assert before == 0 < after and summary["preferences"]["eval_rewards/accuracies"][1] == 1
    page = finished.read_text(encoding="utf-8")
    for part in (
        "135 million parameters",
        "bits per byte, German reference answers",
        GERMAN[1],
        "<svg",
        "1. When",
    ):
        assert part in page


def test_figures_are_those_of_the_models(place, finished):
    summary = json.loads((place / "run" / "summary.json").read_text())
    rows = [json.loads(line) for line in (place / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    for stage, folder in (("base", place / "base"), ("sft", place / "run" / "sft" / "model")):
        tokenizer, model = Tokenizer.from_pretrained(folder), Mistral.from_pretrained(folder)
        english = [one["messages"] for one in rows if one["language"] == "en"]
        expected = bits_per_byte(model, tokenizer, english, "chatml")
        assert summary["bits_per_byte_en"][stage] == pytest.approx(expected, rel=1e-5)
    assert Tokenizer.from_pretrained(place / "run" / "sft" / "model").chat_template == "chatml"


def test_finished_steps_are_found(place, config, finished, capsys):
    before = (place / "run" / "summary.json").read_bytes()
    files = {path: path.stat().st_mtime_ns for path in place.rglob("*.safetensors")}
    capsys.readouterr()
    quickstart.main(config)
    said = capsys.readouterr().out
    assert said.count("is there") == 5 and said.count("found in") == 3
    assert "GFLOP/s" in said and "bits per byte, German reference answers" in said and str(finished) in said
    assert (place / "run" / "summary.json").read_bytes() == before
    assert files == {path: path.stat().st_mtime_ns for path in place.rglob("*.safetensors")}


def test_other_settings_are_measured_anew_on_the_same_model(place, config, finished, capsys):
    capsys.readouterr()
    quickstart.main(dataclasses.replace(config, max_new_tokens=3, prompts=3))
    said = capsys.readouterr().out
    assert said.count("is there") == 5 and said.count("found in") == 0
    assert said.count("on 3 held-out prompts") == 3
    replies = json.loads((place / "run" / "sft.json").read_text())["replies"]
    assert len(replies) == 3 and all(reply["tokens"] <= 3 for reply in replies)


def test_a_run_of_another_config_is_not_continued(config, finished):
    with pytest.raises(UserError, match="max_steps is 2; expected 3; remove"):
        quickstart.main(dataclasses.replace(config, max_steps=3))


def test_rows_that_changed_after_training_are_noticed(place, config, finished):
    rows = (place / "rows.jsonl").read_text(encoding="utf-8")
    try:
        (place / "rows.jsonl").write_text(rows + rows.replace("heute", "morgen"), encoding="utf-8")
        with pytest.raises(UserError, match="made from other rows"):
            quickstart.main(config)
    finally:
        (place / "rows.jsonl").write_text(rows, encoding="utf-8")


SETTINGS = [
    ("prepare", "max_length = 128", "max_length = 127", "max_length"),
    ("prepare", 'chat_template = "chatml"', 'chat_template = "zephyr"', "chat_template, template_digest"),
    ("prepare", "num_workers = 1", 'filters = ["empty"]', "filters"),
    ("prepare", "num_workers = 1", "seed = 1", "seed"),
    ("prepare", "num_workers = 1", "eval_fraction = 0.2", "eval_fraction"),
    ("prepare", "num_workers = 1", 'eval_input = ["{place}/held_out.jsonl"]', "eval_input, files of rows"),
    ("prepare", "{place}/base", "{other}", "tokenizer_digest, vocab_size"),
    ("prepare_dpo", "num_workers = 1", "max_prompt_length = 9", "max_prompt_length"),
]


@pytest.mark.parametrize("name, old, new, found", SETTINGS)
def test_settings_that_changed_after_training_are_noticed(
    place, config, finished, sp_tokenizer_folder, name, old, new, found
):
    text = (place / f"{name}.toml").read_text()
    old, new = (part.format(place=place, other=sp_tokenizer_folder) for part in (old, new))
    assert old in text
    (place / "changed.toml").write_text(text.replace(old, new))
    other = dataclasses.replace(config, **{f"{name}_config": place / "changed.toml"})
    with pytest.raises(UserError, match=rf"made from other rows or settings \({found}\)") as error:
        quickstart.main(other)
    assert "\n" not in str(error.value)


def test_settings_that_make_the_same_rows_and_older_stores_are_current(place, finished):
    text = (place / "prepare.toml").read_text()
    (place / "changed.toml").write_text(text.replace("num_workers = 1", "num_workers = 2\npreview = 3"))
    preparation = load_config(quickstart.prepare.PrepareConfig, [], place / "changed.toml")
    assert quickstart.made_otherwise(preparation) == []
    manifest = place / "store" / "manifest.json"
    written = manifest.read_text()
    try:
        older = json.loads(written)
        del older["config"]
        manifest.write_text(json.dumps(older))
        assert quickstart.made_otherwise(preparation) == []
        other = dataclasses.replace(preparation, max_length=127, seed=7)
        assert quickstart.made_otherwise(other) == ["max_length", "seed"]
        assert len(TokenStore.open(place / "store")) == 12
    finally:
        manifest.write_text(written)


def test_preferences_trained_on_an_earlier_fine_tuning_are_not_kept(place, config, finished):
    settings = (place / "sft.toml").read_text()
    (place / "sft_again.toml").write_text(settings.replace("learning_rate = 1e-2", "learning_rate = 2e-2"))
    kept = shutil.move(place / "run" / "sft", place / "sft_before")
    try:
        with pytest.raises(UserError, match=r"run/dpo: its training started from another model") as error:
            quickstart.main(dataclasses.replace(config, sft_config=place / "sft_again.toml"))
        assert "\n" not in str(error.value)
    finally:
        shutil.rmtree(place / "run" / "sft")
        shutil.move(kept, place / "run" / "sft")


def test_a_run_that_never_began_may_start_from_another_model(place, config, finished, tmp_path):
    _, training = quickstart.load_stages(config)["dpo"]
    training = dataclasses.replace(training, output_dir=tmp_path / "dpo")
    assert not quickstart.begin_run(training)
    other = dataclasses.replace(training, model_name_or_path=place / "base")
    assert quickstart.begin_run(other)
    save_config(tmp_path / "dpo" / "config.toml", other)
    assert quickstart.begin_run(other)
    save_config(tmp_path / "dpo" / "config.toml", training)
    with pytest.raises(UserError, match="started from another model than now stands in"):
        quickstart.begin_run(training)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_have_bounds(config, steps):
    with pytest.raises(UserError, match=f"max_steps is {steps}; expected a number above 0"):
        quickstart.main(dataclasses.replace(config, max_steps=steps))


def test_a_loss_that_was_not_finite_is_a_dash(place, config, finished, capsys):
    path = place / "run" / "dpo" / "metrics.jsonl"
    written = path.read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    try:
        path.write_text("".join(json.dumps({**row, "eval_loss": None}) + "\n" if "eval_loss" in row
                                else json.dumps(row) + "\n" for row in rows))  # fmt: skip
        capsys.readouterr()
        quickstart.main(config)
    finally:
        path.write_text(written)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "held-out pairs, eval_loss" in line]
    assert line.split()[-2:] == ["-", "-"]


@pytest.mark.parametrize("prompts", [0, 1, 2, 5, 10, 25, 50, 99])
def test_prompts_are_spread_over_languages_and_categories(prompts):
    path = ROOT / "recipes" / "sample" / "held_out.jsonl"
    rows = quickstart.held_out_rows(quickstart.QuickstartConfig(held_out=path, prompts=prompts))
    number = {name: sum(row["language"] == name for row in rows) for name in ("de", "en")}
    if prompts in (0, 50, 99):
        assert number == {"de": 40, "en": 10}
    else:
        assert abs(number["de"] - 0.8 * prompts) <= 1 and number["en"] == max(1, round(0.2 * prompts))
    for name in number:
        categories = [row["category"] for row in rows if row["language"] == name]
        assert len(set(categories)) == min(10, len(categories))
        assert len({row["messages"][0]["content"] for row in rows}) == len(rows)


def test_held_out_rows_of_one_language_are_refused(place):
    write_rows(place / "one.jsonl", [row("de", 1, *GERMAN)])
    with pytest.raises(UserError, match=r"languages are \['de'\]; expected"):
        quickstart.held_out_rows(quickstart.QuickstartConfig(held_out=place / "one.jsonl"))


def test_shares_count_what_they_say():
    index = language.run_index([GERMAN[1]])
    german, english = row("de", 1, *GERMAN), row("en", 1, *ENGLISH)
    replies = [
        (german, Reply(GERMAN[1], [1], "stop")),  # German, ended, a copy of a training row
        (german, Reply(ENGLISH[1], [1], "length")),  # English, not ended
        (german, Reply("Ja.", [1], "stop")),  # undecided
        (german, Reply("und so weiter " * 20, [1], "length")),  # a loop
        (english, Reply(ENGLISH[1], [1], "stop")),
        (english, Reply("Ja.", [1], "stop")),
    ]
    found = shares([judge(one, reply, index) for one, reply in replies])
    assert found == {
        "german_reply_share": 2 / 3, "undecided_share": 1 / 4, "ended_share": 2 / 4,
        "echo_or_loop_share": 1 / 4, "english_reply_share": 1 / 2, "equal_replies": 2, "repeats_training": 1,
    }  # fmt: skip


def test_shares_of_no_replies_are_none():
    index = language.run_index([GERMAN[1]])
    english = [judge(row("en", 1, *ENGLISH), Reply(ENGLISH[1], [1], "stop"), index)]
    assert shares(english) == {**dict.fromkeys(SHARES), "english_reply_share": 1, "equal_replies": 0,
                               "repeats_training": 0}  # fmt: skip
    assert {shares([])[name] for name in SHARES} == {None}


def test_seconds_go_on_over_a_stop(tmp_path):
    config = quickstart.QuickstartConfig(output_dir=tmp_path)
    kept = {"prepare": 7.0, "sft": 100.0}
    (tmp_path / "seconds.json").write_text(json.dumps(kept))
    with pytest.raises(KeyboardInterrupt), quickstart.timed(config, "sft", goes_on=True):
        raise KeyboardInterrupt
    with quickstart.timed(config, "prepare"):
        pass
    seconds = json.loads((tmp_path / "seconds.json").read_text())
    assert 100 <= seconds["sft"] < 110 and seconds["prepare"] < 5


@pytest.mark.slow
def test_the_command(place):
    command = [sys.executable, str(ROOT / "recipes" / "quickstart.py"), *arguments(place)]
    done = subprocess.run([*command, "seed=5"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run([*command, "promts=5"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2
    assert "did you mean 'prompts'" in wrong.stderr


def test_the_templates_stop_token_is_taught(place, finished):
    settings = json.loads((place / "run" / "sft" / "model" / "generation_config.json").read_text())
    tokenizer = Tokenizer.from_pretrained(place / "run" / "sft" / "model")
    assert settings["eos_token_id"] == chat.stop_ids(tokenizer, "chatml")
