import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phoenix.data.overlap import EvalIndex, normal_words, run_hashes, strings
from phoenix.files import UserError

ASSETS = Path(os.environ.get("PHOENIX_ASSETS", "nowhere"))
LONG = (
    "Ein Bäcker verkauft am Montag 24 Brote, am Dienstag doppelt so viele und am Mittwoch nur die "
    "Hälfte: Wie viele Brote hat er an den drei Tagen insgesamt verkauft?"
)
TEN = "Warum dreht sich das Wasser im Abfluss so herum, Opa?"
FIVE = "Wer hat den Buchdruck erfunden?"


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def index(tmp_path):
    rows = [{"question": "Nur ein Lückenfüller, damit die Zeilen gezählt werden, und noch einmal einer."}]
    rows += [{"question": text, "answer": "x"} for text in (LONG, TEN, FIVE)]
    return EvalIndex((written(tmp_path / "t.jsonl", rows),))


@pytest.mark.parametrize(
    "change",
    [
        str,
        str.upper,
        lambda text: text.replace(",", " –").replace("?", "…").replace(":", "\n\n"),
        lambda text: "„" + "\r\n".join(text.split()) + "“",
        lambda text: text.replace("ä", "a\u0308"),
        lambda text: f"Hallo! Meine Frage ist: {text} Danke schon einmal.",
        lambda text: f"**{text}**".replace(" ", " _"),
        lambda text: text.replace("ass", "a\u00adss").replace("e", "e\u200b").replace("o", "\ufeffo"),
    ],
)
def test_a_planted_question_is_found_whatever_its_form(index, tmp_path, change):
    assert index.hit(["Gut.", change(LONG), "Das sind 84."]).startswith(
        f'{tmp_path}/t.jsonl, row 2: "{" ".join(normal_words(LONG)[:13])}"'
    )
    assert index.hit([change(TEN)]) == f'{tmp_path}/t.jsonl, row 3: "{" ".join(normal_words(TEN))}"'


def test_thirteen_words_are_a_hit_and_twelve_are_not(index):
    said = normal_words(LONG)
    assert len(said) > 20
    for start in range(len(said) - 12):
        assert ", row 2: " in index.hit(["nein " + " ".join(said[start : start + 13]) + " nein"])
        assert index.hit(["nein " + " ".join(said[start : start + 12]) + " nein"]) is None
    changed = [word if n % 12 else "anders" for n, word in enumerate(said, 1)]
    assert index.hit([" ".join(changed)]) is None


def test_short_questions_count_only_as_a_whole(index, tmp_path):
    assert index.hit(["wer hat den BUCHDRUCK erfunden"]) == (
        f'{tmp_path}/t.jsonl, row 4: "wer hat den buchdruck erfunden"'
    )
    assert index.hit([f"{FIVE} Und wann war das?"]) is None
    assert index.hit([TEN.replace("Opa", "Oma")]) is None
    assert (
        EvalIndex((written(tmp_path / "s.jsonl", [{"question": "Warum das?"}]),)).hit(["Warum das?"]) is None
    )


def test_scripts_without_blanks_count_their_letters(tmp_path):
    question, short = "一个面包师在星期一卖了多少个面包？", "谁发明了火药？"
    index = EvalIndex((written(tmp_path / "t.jsonl", [{"question": question}, {"question": short}]),))
    assert index.hit([f"问题：{question}谢谢。"]).startswith(f'{tmp_path}/t.jsonl, row 1: "一 个 面 包 师')
    assert index.hit([question[:8]]) is None
    assert ", row 2: " in index.hit([short]) and index.hit([f"{short}答案"]) is None
    assert normal_words("ある日、GPT 4は 2_3") == ["あ", "る", "日", "gpt", "4", "は", "2", "3"]
    assert normal_words("हिन्दी में कितने शब्द हैं?") == ["हिन्दी", "में", "कितने", "शब्द", "हैं"]
    assert len(normal_words("שָׁלוֹם עוֹלָם")) == 2


def test_nothing_is_found_in_nothing(index):
    assert index.hit([]) is None and index.hit(["", "…", "\ud800"]) is None
    assert EvalIndex(()).hit([LONG]) is None


@pytest.mark.parametrize(
    "row",
    [
        {"question_id": 81, "category": "writing", "turns": ["Hallo, wer bist du?", LONG]},
        {"ind": 4, "activity_label": "x", "ctx_a": "y", "ctx": LONG, "endings": ["a", "b"]},
        {"ctx_a": LONG, "ctx_b": "danach", "endings": ["a"]},
        {"question": LONG, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        {"question": {"stem": LONG, "choices": [{"text": "eins", "label": "A"}]}},
        {"Question": LONG, "Best Answer": "y"},
        {"instruction": LONG, "input": "", "output": "84"},
        {"instruction_de": LONG, "output_de": "84"},
        {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "84"}]},
        {"conversations": [{"from": "human", "value": LONG}, {"from": "gpt", "value": "84"}]},
        {"prompt": LONG, "chosen": "84", "rejected": "85"},
        {"text": LONG},
    ],
)
def test_test_sets_have_their_questions_in_many_fields(tmp_path, row):
    index = EvalIndex((written(tmp_path / "t.jsonl", [row]),))
    assert index.hit([LONG]).startswith(f"{tmp_path}/t.jsonl, row 1: ")


def test_choices_and_answers_are_no_questions(tmp_path):
    answer = "Der erste gute Satz einer Antwort, die genau so lang ist wie jede andere auch."
    rows = [
        {"question": {"stem": LONG, "choices": [{"text": answer, "label": "A"}]}},
        {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": answer}]},
        {"ctx": LONG, "ctx_a": answer, "endings": [answer]},
    ]
    assert EvalIndex((written(tmp_path / "t.jsonl", rows),)).hit([answer]) is None


def test_an_object_of_rows_names_them_by_their_keys(tmp_path):
    path = tmp_path / "mt.json"
    path.write_text(json.dumps({"81": {"turns": [LONG]}, "82": {"turns": [TEN]}}, indent=1))
    assert EvalIndex((path,)).hit([TEN]).startswith(f"{path}, row 82: ")
    path.write_text(json.dumps([{"turns": [LONG]}, {"turns": [TEN]}]))
    assert EvalIndex((path,)).hit([TEN]).startswith(f"{path}, row 2: ")
    for rows in ([{"turns": [LONG]}], [{"turns": [LONG]}, {"turns": [TEN]}]):  # JSON lines under that name
        assert EvalIndex((written(path, rows),)).hit([LONG]).startswith(f"{path}, row 1: ")
    path.write_text('{"81": {"turns": ')
    with pytest.raises(UserError, match=r"mt\.json, line 1: cannot be read"):
        EvalIndex((path,))


def test_a_file_without_questions_is_refused_with_its_fields(tmp_path):
    path = written(tmp_path / "t.jsonl", [{"question": LONG}, {"frage": LONG, "antwort": "x"}])
    with pytest.raises(
        UserError, match=r"t.jsonl, row 2: found the fields frage, antwort; expected .*question"
    ):
        EvalIndex((path,))
    with pytest.raises(UserError, match=r"none\.json does not exist; expected a file of rows"):
        EvalIndex((tmp_path / "none.json",))


def test_hashes_are_those_of_the_words_alone_and_the_same_in_every_process():
    said = normal_words(LONG)
    whole = run_hashes(said, [13, 3])
    assert len(whole) == 2 * len(said) - 14 and len(set(whole.tolist())) == len(whole)
    for start in (0, 1, 7):
        assert run_hashes(said[start : start + 13], [13])[0] == whole[start]
    assert len(run_hashes(said[:3], [13, 3])) == 1 and len(run_hashes([], [1])) == 0
    script = "from phoenix.data.overlap import run_hashes\nprint(run_hashes(['größe', 'zwei'], [2]).tolist())"
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == run_hashes(["größe", "zwei"], [2]).tolist()


def test_strings_are_gathered_at_any_depth():
    assert list(strings({"a": "1", "b": [{"c": "2", "d": 3}, "4"], "e": None})) == ["1", "2", "4"]


@pytest.mark.skipif(not ASSETS.is_dir(), reason="PHOENIX_ASSETS is not there")
def test_no_false_alarm_and_every_planted_question_on_real_text():
    path = ASSETS / "mt_bench_de_questions.json"
    index = EvalIndex((path,))
    for name in ("wmt22_en_de", "german_dpr_instruct"):
        with gzip.open(ASSETS / f"{name}.jsonl.gz", "rt") as file:
            rows = [json.loads(line) for line in file]
        hits = [hit for row in rows if (hit := index.hit(strings(row)))]
        assert len(rows) >= 1000 and not hits, hits
    for key, row in json.loads(path.read_text()).items():
        for turn in row["turns"]:
            found = index.hit(["Bitte.", "\n\n".join(turn.upper().split(" "))])
            assert len(normal_words(turn)) < 4 or found.startswith(f"{path}, row {key}: "), turn
