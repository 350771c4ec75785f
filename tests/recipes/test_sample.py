"""The shipped sample keeps what its README says; every row of it moves the quickstart's result."""

import collections
import json
import re
import statistics
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "recipes" / "sample"
GERMAN = (
    "explaining writing email arithmetic code summaries role_play refusing tables_and_json small_talk".split()
)


def words(text):
    return re.findall(r"\w+", text.casefold())


def load(name):
    lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def rows():
    return {
        f"{path.stem}:{n}": row for path in SAMPLE.glob("*.jsonl") for n, row in enumerate(load(path.stem), 1)
    }


def test_numbers_of_rows():
    german = [row for name in GERMAN for row in load(name)]
    assert all(row["language"] == "de" for row in german)
    assert len(german) >= 300 and all(len(load(name)) >= 20 for name in GERMAN)
    assert sum(len(row["messages"]) > 3 for row in german) >= 60
    held_out = collections.Counter(row["language"] for row in load("held_out"))
    assert held_out["de"] == 40 and held_out["en"] == 10


def test_rows_are_whole_conversations(rows):
    for where, row in rows.items():
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns and turns == ["user", "assistant"] * (len(turns) // 2), where
        assert all(m["content"] and m["content"] == m["content"].strip() for m in row["messages"]), where


def test_no_ten_words_stand_in_two_rows(rows):
    owner = {}
    for where, row in rows.items():
        for message in row["messages"]:
            text = words(message["content"])
            for run in zip(*(text[i:] for i in range(10))):
                assert owner.setdefault(run, where) == where, f"{where} and {owner[run]}: {' '.join(run)}"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_at_most_three_rows_begin_alike(rows, role):
    openings = [next(m["content"] for m in row["messages"] if m["role"] == role) for row in rows.values()]
    [(opening, count)] = collections.Counter(tuple(words(text)[:4]) for text in openings).most_common(1)
    assert count <= 3, opening


def test_answers_are_long_enough(rows):
    answers = [m["content"] for row in rows.values() for m in row["messages"] if m["role"] == "assistant"]
    assert statistics.median(len(words(answer)) for answer in answers) >= 60


def test_german_is_written_with_umlauts(rows):
    spelled_out = re.compile(
        r"\b(fuer|ueber|moechte|koennen|waere|gruesse|naechste\w*|schoen\w*)\b", re.IGNORECASE
    )
    for where, row in rows.items():
        if row["language"] == "de":
            assert not any(spelled_out.search(message["content"]) for message in row["messages"]), where
