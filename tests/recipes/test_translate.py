"""translate as people run it: rows in a file -> rows in another language, what is counted, and mistakes."""

import dataclasses
import datetime
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phoenix.config import load_config
from phoenix.files import UserError
from phoenix.translate.checks import score
from phoenix.translate.engines import Reply
from phoenix.translate.segments import Piece, split

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import translate  # noqa: E402

GREETINGS = {
    "Good morning, how did you sleep last night?": "Guten Morgen, wie haben Sie letzte Nacht geschlafen?",
    "Very well, thank you for asking.": "Sehr gut, danke der Nachfrage.",
    "See [[1]] for the timetable of the trains.": "Den Fahrplan der Züge finden Sie unter [[1]].",
    "I would like to buy a new bicycle.": "Ich möchte ein neues Fahrrad kaufen.",
    "Which colour would you like to have?": "Welche Farbe hättest du gerne?",
}
TIMETABLE = "See https://example.org/a for the timetable of the trains."
ASKED = list(GREETINGS)


def say(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


ROWS = [
    {"messages": say(ASKED[0], f"{ASKED[1]}\n\n  - {TIMETABLE}\r\n"), "id": 7, "score": None},
    {"messages": say(ASKED[3], ASKED[4], ASKED[0], ASKED[1]), "id": 8, "score": 0.5},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def configure(tmp_path):
    def configure(rows=ROWS, answers=GREETINGS, **options):
        table = [{"source": source, "translation": text} for source, text in answers.items()]
        files = rows if isinstance(rows, Path) else write(tmp_path / "rows.jsonl", rows)
        base = translate.TranslateConfig(
            input=files, output=tmp_path / "out", engine="table", table=write(tmp_path / "table.jsonl", table)
        )
        return dataclasses.replace(base, **options)

    return configure


def contents(path):
    return [[message["content"] for message in row["messages"]] for row in read(path)]


def test_rows_keep_their_schema_and_their_structure(configure, capsys):
    path = translate.main(configure())
    german = list(GREETINGS.values())
    timetable = german[2].replace("[[1]]", "https://example.org/a")
    assert contents(path) == [
        [german[0], f"{german[1]}\n\n  - {timetable}\r\n"],
        [german[3], german[4], german[0], german[1]],
    ]
    for before, after in zip(ROWS, read(path)):
        record = after.pop("translation")
        assert (
            list(after) == list(before) and after["id"] == before["id"] and after["score"] == before["score"]
        )
        assert record["engine"] == "table" and record["language"] == "de" and record["kept_in_source"] == 0
    assert [row["translation"]["register"] for row in read(path)] == ["formal", "mixed"]
    ledger = json.loads((path.parent / "ledger.json").read_text())
    assert (
        ledger["rows"] == {"written": 2, "register_mixed": 1, "with_source_kept": 0}
        and ledger["input"]["segments"] == 7
    )
    assert ledger["segments"] == 5 and ledger["characters"] == sum(map(len, GREETINGS))
    said = capsys.readouterr().out
    assert "DeepL API Pro, EUR" in said and str(path) in said


def test_what_fails_is_kept_in_the_source_language_or_its_row_is_dropped(configure, capsys):
    answers = GREETINGS | {ASKED[4]: "", ASKED[2]: "Den Fahrplan der Züge finden Sie im Netz."}
    config = configure(answers=answers)
    path = translate.main(config)
    [[_, second], [_, fourth, *_]] = contents(path)
    assert fourth == ASKED[4] and second.endswith(f"  - {TIMETABLE}\r\n")
    ledger = json.loads((path.parent / "ledger.json").read_text())
    assert ledger["failed"] == 2 and ledger["flags"] == {"empty": 1, "spans": 1}
    assert ledger["attempts"] == {"1": 3, "3": 2}
    page = (path.parent / "report.html").read_text(encoding="utf-8")
    assert "Den Fahrplan der Züge finden Sie im Netz." in page and "<h2>spans: 1 of 1</h2>" in page
    # The same folder: nothing is translated again, what comes last may change.
    translate.main(dataclasses.replace(config, on_failure="drop"))
    assert read(path) == [] and json.loads((path.parent / "ledger.json").read_text())["rows"]["failed"] == 2
    fixed = {ASKED[4]: "Welche Farbe?", TIMETABLE: "Fahrplan: https://example.org/a."}
    rows = [{"source": source, "translation": text} for source, text in fixed.items()]
    corrections = write(path.parent.parent / "fixed.jsonl", rows)
    translate.main(dataclasses.replace(config, on_failure="drop", corrections=corrections))
    [[_, second], [_, fourth, *_]] = contents(path)
    assert fourth == "Welche Farbe?" and second.endswith("  - Fahrplan: https://example.org/a.\r\n")
    assert json.loads((path.parent / "ledger.json").read_text())["corrections_used"] == 2


def test_a_finished_run_is_not_made_again_and_one_that_was_changed_is(configure):
    config = configure()
    path = translate.main(config)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.parent.glob("*.*")}
    translate.main(config)
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.parent.glob("*.*")}
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    translate.main(config)
    assert path.read_bytes() == content


@pytest.mark.parametrize("shard_size", [1, 2, 4096])
def test_a_sample_of_more_than_there_is_ends(configure, capsys, shard_size):
    config = configure(shard_size=shard_size)
    assert translate.main(dataclasses.replace(config, sample=1000)).name == "sample.html"
    assert "5 random segments" in (config.output / "sample.html").read_text(encoding="utf-8")
    assert translate.main(config).exists()


def test_what_is_left_in_the_source_language_is_said(configure, capsys):
    rows = [{"text": ASKED[0], "remark": "This stays as it is."}, {"text": ASKED[1]}, {"text": ASKED[0]}]
    path = translate.main(configure(rows, GREETINGS | {ASKED[0]: ""}))
    assert capsys.readouterr().out.endswith(
        "1 of 2 segments failed, so 2 rows hold text as it was; see report.html\n"
    )
    ledger = json.loads((path.parent / "ledger.json").read_text())
    assert ledger["rows"]["with_source_kept"] == 2 and ledger["fields_left_as_they_are"] == {"remark": 1}
    assert ledger["sent_characters"] == 3 * len(ASKED[0]) + len(ASKED[1])
    translate.main(configure(rows, engine="identity", table=None, output=path.parent.parent / "copy"))
    assert capsys.readouterr().out.endswith("nothing was translated: the engine 'identity' copies\n")


def test_a_sample_is_shown_with_an_estimate_and_counts_for_the_whole(configure, capsys):
    config = configure()
    page = translate.main(dataclasses.replace(config, sample=3))
    said = capsys.readouterr().out
    assert said.count("\n- ") + said.startswith("- ") == 3 and "estimate for all 5 segments" in said
    assert page.exists() and not (config.output / "translated.jsonl").exists()
    assert (
        len(b"".join(file.read_bytes() for file in config.output.glob("journal/shard-*")).splitlines()) == 3
    )
    partial = translate.main(dataclasses.replace(config, merge="partial"))
    assert partial.name == "translated.partial.jsonl" and len(read(partial)) < 2
    assert translate.main(config).exists()
    complete = translate.main(dataclasses.replace(config, merge="partial"))
    assert complete.read_bytes() == (config.output / "translated.jsonl").read_bytes()


def test_strings_in_json_are_translated_if_asked_for(configure):
    timetable = GREETINGS[ASKED[2]].replace("[[1]]", "https://example.org/a")
    before = {"id": "to_do", ASKED[0]: [ASKED[0], 1.50, None, {"say": f"{TIMETABLE}\n- {ASKED[3]}"}]}
    after = before | {
        ASKED[0]: [GREETINGS[ASKED[0]], 1.5, None, {"say": f"{timetable}\n- {GREETINGS[ASKED[3]]}"}]
    }
    rows = [{"text": json.dumps(before, indent=2)}]
    config = configure(rows, translate_json=True)
    [row] = read(translate.main(config))
    assert row["text"] == json.dumps(after, indent=2, ensure_ascii=False)
    assert row["translation"]["segments"] == 3 and row["translation"]["kept_in_source"] == 0
    with pytest.raises(UserError, match="holds a run with translate_json True, and this one has False"):
        translate.main(dataclasses.replace(config, translate_json=False))


def test_references_give_the_scores_of_sacrebleu(configure, tmp_path):
    rows = [{"text": source, "reference": text.replace("Sie", "ihr")} for source, text in GREETINGS.items()]
    path = translate.main(configure(rows[:2], references="reference"))
    scores = json.loads((path.parent / "ledger.json").read_text())["scores"]
    expected = score(list(GREETINGS.values())[:2], [row["reference"] for row in rows[:2]])
    assert scores == expected and 0 < scores["bleu"] < 100
    files = write(tmp_path / "human.jsonl", [{"text": row["reference"]} for row in rows[:2]])
    path = translate.main(configure(rows[:2], references=str(files)))
    assert json.loads((path.parent / "ledger.json").read_text())["scores"] == expected
    shutil.rmtree(path.parent)
    kept = {"prompt": "Translate to French: a house", "reference": "Ein Haus"}
    path = translate.main(configure([*rows[:2], kept], references="reference"))
    assert json.loads((path.parent / "ledger.json").read_text())["scores"] == expected
    for others, sentence in (
        (rows, "has more rows than the input"),
        (rows[:2], r"line 3: has 1 texts, but no"),
    ):
        shutil.rmtree(path.parent)
        write(files, [{"text": row["reference"]} for row in others])
        with pytest.raises(UserError, match=sentence):
            translate.main(configure(rows[:3], references=str(files)))


COMET = """
class Model:
    def predict(self, rows, batch_size, gpus):
        assert all(set(row) == {"src", "mt", "ref"} for row in rows)
        self.system_score = sum(row["src"] != row["mt"] == row["ref"] for row in rows) / len(rows)
        return self
def load_from_checkpoint(path, local_files_only):
    if open(path).read() != "weights":
        raise Exception("hparams.yaml file\\nis missing")
    return Model()
"""


def test_comet_scores_where_it_is_installed_and_a_model_is_stated(configure, tmp_path, monkeypatch):
    rows = [{"text": source, "reference": text} for source, text in GREETINGS.items()]
    rows[0]["reference"] = "Guten Tag."
    model = tmp_path / "model.ckpt"
    config = configure(rows, references="reference", comet_model=model)
    with pytest.raises(UserError, match=r"needs the package unbabel-comet, .* environment of its own"):
        translate.main(config)
    assert not config.output.exists()
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "comet.py").write_text(COMET)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    with pytest.raises(UserError, match=r"model.ckpt is no file"):
        translate.main(config)
    model.write_text("other")
    with pytest.raises(
        UserError, match=r"comet cannot score with .*model.ckpt: hparams.yaml file is missing"
    ):
        translate.main(config)
    model.write_text("weights")
    scores = json.loads((translate.main(config).parent / "ledger.json").read_text())["scores"]
    assert scores["comet"] == 0.8 and scores["comet_model"] == str(model) and 0 < scores["chrf"] < 100
    translate.main(dataclasses.replace(config, comet_model=None))
    assert "comet" not in json.loads((config.output / "ledger.json").read_text())["scores"]


def test_a_finished_run_is_put_together_again_where_no_engine_is_installed(configure, monkeypatch):
    class Engine(translate.pipeline.Engine):
        name = "vllm"

        def settings(self):
            return {}

        def translate(self, sources, *, attempt=0):
            return [Reply(GREETINGS[source]) for source in sources]

        def close(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(translate, "open_engine", lambda config, language: Engine())
        patch.setattr(translate, "check_engine", lambda config: None)
        config = configure(engine="vllm", model="models/alma", table=None)
        path = translate.main(config)
    before = path.read_bytes()
    path.unlink()
    assert translate.main(config).read_bytes() == before
    with pytest.raises(UserError, match=r"out is translated by alma; set model=, or choose another"):
        translate.main(dataclasses.replace(config, model="models/other"))


def test_money_is_counted_and_compared(configure, monkeypatch):
    def slow_to_load(config, language):
        time.sleep(0.3)
        return open_engine(config, language)

    open_engine = translate.open_engine
    monkeypatch.setattr(translate, "open_engine", slow_to_load)
    config = configure(gpus=2.0, gpu_price_per_hour=3.0, api_price_per_character=0.01)
    translate.main(dataclasses.replace(config, sample=1))
    spent = json.loads((translate.main(config).parent / "ledger.json").read_text())["time_and_money"]
    characters = sum(map(len, GREETINGS))
    assert spent["engines_loaded"] == 2 and 0.6 <= spent["loading_seconds"] < 10
    assert spent["loading_gpu_seconds"] == pytest.approx(2 * spent["loading_seconds"], abs=1e-3)
    assert spent["gpu_seconds"] == pytest.approx(2 * spent["seconds"], abs=2e-3)
    hours = (spent["gpu_seconds"] + spent["loading_gpu_seconds"]) / 3600
    assert spent["eur"] == pytest.approx(0.01 * characters + 3 * hours, abs=1e-5)
    assert spent["comparison"][0]["eur"] == pytest.approx(spent["eur"], abs=1e-4)
    assert spent["comparison"][1]["eur"] == pytest.approx(2 * hours, abs=1e-4)
    assert [line["way"] for line in spent["comparison"]] == ["this run", "rented GPU", "DeepL API Pro"]
    assert spent["comparison"][2]["eur"] == pytest.approx(characters * 0.00002, abs=1e-4)


def test_identity_gives_the_shipped_sample_back(tmp_path):
    arguments = [str(translate.QUICKSTART), f"output={tmp_path / 'out'}"]
    config = load_config(translate.TranslateConfig, arguments)
    path = translate.main(dataclasses.replace(config, input=ROOT / config.input))
    rows = read(path)
    assert [row.pop("translation")["kept_in_source"] for row in rows] == [0] * len(rows)
    assert rows == read(ROOT / config.input)
    load_config(translate.TranslateConfig, [str(translate.QUICKSTART.with_name("phoenix_translate.toml"))])


MISTAKES = {
    "no such input": ({"input": Path("no.jsonl")}, "there is no file no.jsonl; correct input"),
    "no input": ({"input": ()}, "there is no file at all; correct input"),
    "unknown language": ({"language": "xx"}, "cs, de, es, fr"),
    "negative price": ({"gpu_price_per_hour": -1.0}, "gpu_price_per_hour is -1.0"),
    "negative token price": ({"api_price_per_million_tokens": (0.0, -1.0)}, "api_price_per_million_tokens"),
    "a model of no engine": ({"engine": "identity"}, "'identity' copies, and takes no model"),
    "no model": ({"engine": "vllm"}, "name it: model=FOLDER"),
    "no such model": ({"engine": "vllm", "model": "org/model"}, "org/model: there is no such file or folder"),
    "no table": ({"table": None}, "name it: table=FILE"),
    "partial first": ({"merge": "partial"}, "nothing is translated yet"),
    "references that are none": (
        {"references": "nowhere"},
        "line 1: has 2 texts, but no reference for each in",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_sentence(configure, name):
    changes, sentence = MISTAKES[name]
    with pytest.raises(UserError) as error:
        translate.main(configure(**changes))
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"language": "fr"}, "holds a run with language.code 'de', and this one has 'fr'"),
        ({"max_chars": 5}, "holds a run with max_chars 600, and this one has 5"),
        (
            {"engine": "identity", "table": None},
            "holds a run with engine 'table', and this one has 'identity'",
        ),
    ],
)
def test_a_folder_of_a_run_with_another_config_is_refused(configure, changes, sentence):
    config = configure()
    translate.main(config)
    with pytest.raises(UserError, match=sentence):
        translate.main(dataclasses.replace(config, **changes))


def test_other_rows_or_another_table_are_another_config(configure):
    config = configure()
    translate.main(dataclasses.replace(config, sample=1))
    with pytest.raises(UserError, match=r"holds a run with table "):
        translate.main(configure(answers=GREETINGS | {"a": "b"}))
    with pytest.raises(UserError, match=r"holds a run with input.1 'rows.jsonl, sha256 "):
        translate.main(configure(ROWS[:1]))
    two = dataclasses.replace(
        configure(), input=(config.input, write(config.output.parent / "b.jsonl", ROWS))
    )
    shutil.rmtree(config.output)
    translate.main(two)
    with pytest.raises(UserError, match=r"holds a run with input.2 'b.jsonl, sha256 .* has None"):
        translate.main(config)
    shutil.rmtree(config.output)
    write(config.output.parent / "file", [])
    with pytest.raises(UserError, match="is no run of translation"):
        translate.main(configure(output=config.output.parent / "file"))
    with pytest.raises(UserError, match="is no run of translation"):
        translate.main(configure(output=config.output.parent))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "\xff"}', r"line 2: .*byte 28 of the file.* or set errors=replace"),
        (b'{"text": "cut', r"line 2: cannot be read \(JSONDecodeError"),
        (b'{"a": 1, "b": 2}', r"line 2: .*text"),
        (b'{"text": "a", "translation": "b"}', r"line 2: has a field 'translation' already"),
        (b"[1]", r"line 2: found a list"),
        (b'{"text": "a", "score": NaN}', r"line 2: Out of range float values are not JSON compliant"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(configure, tmp_path, line, sentence):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "Hello"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"{path}, {sentence}") as error:
        translate.main(configure(path))
    assert "\n" not in str(error.value)
    path.write_bytes(b'{"text": "Hello"}\n')  # corrected: the run begins
    assert translate.main(configure(path)).exists()


def test_bytes_that_are_not_utf_8_may_be_replaced(configure, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "Hello \xff"}\n')
    [row] = read(translate.main(configure(path, engine="identity", table=None, errors="replace")))
    assert row["text"] == "Hello \ufffd"


def test_columns_of_parquet_that_json_has_no_form_for_are_refused(configure, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, day = tmp_path / "rows.parquet", datetime.date(2024, 2, 29)
    parquet.write_table(pyarrow.table({"text": ["Hello"], "day": [day]}), path)
    [row] = read(translate.main(configure(path)))
    assert row["day"] == "2024-02-29"
    parquet.write_table(pyarrow.table({"text": ["Hello"], "image": [b"\xff"]}), path)
    with pytest.raises(UserError, match=r"rows.parquet, line 1: JSON has no form for .*, bytes; convert"):
        translate.main(configure(path, output=tmp_path / "other"))


def test_several_inputs_at_the_terminal_and_a_rank_that_is_not_the_first_speaks(tmp_path):
    paths = [str(write(tmp_path / name, [{"text": "Hello"}])) for name in ("a.jsonl", "b.jsonl")]
    command = [sys.executable, ROOT / "recipes" / "translate.py", f"output={tmp_path / 'out'}"]
    command.append(f"input={json.dumps(paths)}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(read(tmp_path / "out" / "translated.jsonl")) == 2, done.stderr
    (tmp_path / "b.jsonl").unlink()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"RANK": "1"})
    assert done.returncode == 2 and done.stderr.startswith("error of rank 1: there is no file")


def test_a_signal_while_a_server_is_waited_for_ends_the_run(tmp_path):
    command = [
        sys.executable,
        ROOT / "recipes" / "translate.py",
        f"output={tmp_path / 'out'}",
        "engine=openai",
    ]
    command.append("server=http://localhost:9")
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    said = ""
    while "asking again" not in said:
        said = process.stderr.readline()
    process.terminate()
    assert process.wait(30) == 75
    assert "Traceback" not in process.stderr.read()


def test_a_mistake_at_the_terminal_is_a_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "recipes" / "translate.py", f"output={tmp_path / 'out'}"]
    for argument in ("gpu_price_per_hour=cheap", "engine=deepl", "lang=de"):
        done = subprocess.run([*command, argument], cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and argument.split("=")[0] in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("PHOENIX_ASSETS" not in os.environ, reason="PHOENIX_ASSETS names no folder")
def test_alma_s_lines_go_through_the_whole_with_the_scores_of_sacrebleu(configure, tmp_path):
    """WMT22 en-de: what ALMA-13B answered is what is written, but for the lines that the checks reject."""
    with gzip.open(
        Path(os.environ["PHOENIX_ASSETS"]) / "wmt22_en_de.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        lines = [json.loads(line) for line in file]
    plain = {
        line["source"]: line
        for line in lines
        if split(line["source"], max_chars=2000) == [Piece(line["source"])]
    }
    answers = {source: line["alma_13b_lora"] for source, line in plain.items()}
    rows = [{"text": source, "reference": line["reference"]} for source, line in plain.items()]
    path = translate.main(configure(rows, answers, references="reference", max_chars=2000, tasks="translate"))
    found = [row["text"] for row in read(path)]
    kept = [row["translation"]["kept_in_source"] for row in read(path)]
    assert found == [source if kept else answers[source] for source, kept in zip(plain, kept)]
    assert len(plain) > 800 and sum(kept) < 0.02 * len(plain)
    metrics = pytest.importorskip("sacrebleu.metrics")
    scores = json.loads((path.parent / "ledger.json").read_text())["scores"]
    for name, metric in (("chrf", metrics.CHRF()), ("bleu", metrics.BLEU())):
        assert scores[name] == metric.corpus_score(found, [[row["reference"] for row in rows]]).score
        assert scores[f"{name}_signature"] == str(metric.get_signature())
