"""The shipped sample keeps what its README says; every row of it moves the quickstart's result."""

import collections
import itertools
import json
import re
import statistics
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "recipes" / "sample"
GERMAN = (
    "explaining writing email arithmetic code summaries role_play refusing tables_and_json small_talk".split()
)
WEAKNESSES = "english form rambling fact rude".split()


def words(text):
    return re.findall(r"\w+", text.casefold())


def load(name):
    lines = (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def in_folder(pattern):
    names = [path.relative_to(SAMPLE).with_suffix("").as_posix() for path in sorted(SAMPLE.glob(pattern))]
    return {f"{name}:{n}": row for name in names for n, row in enumerate(load(name), 1)}


def conversations(row):
    """The conversation of a row, or the two of a pair: with the chosen answer and with the rejected one."""
    if "messages" in row:
        return [row["messages"]]
    return [row["prompt"] + row[answer] for answer in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def pairs():
    return in_folder("preferences/*.jsonl")


@pytest.fixture(scope="module")
def rows(pairs):
    return in_folder("*.jsonl") | pairs


def test_numbers_of_rows():
    german = [row for name in GERMAN for row in load(name)]
    assert all(row["language"] == "de" for row in german)
    assert len(german) >= 300 and all(len(load(name)) >= 20 for name in GERMAN)
    assert sum(len(row["messages"]) > 3 for row in german) >= 60
    held_out = collections.Counter(row["language"] for row in load("held_out"))
    assert held_out["de"] == 40 and held_out["en"] == 10


def test_numbers_of_pairs(pairs):
    training = [row for name in GERMAN for row in load(f"preferences/{name}")]
    held_out = load("preferences/held_out")
    assert len(training) >= 150 and len(training) + len(held_out) == len(pairs)
    assert all(row["category"] == name for name in GERMAN for row in load(f"preferences/{name}"))
    assert collections.Counter(row["category"] for row in held_out) == dict.fromkeys(GERMAN, 2)
    assert all(row["language"] == "de" for row in pairs.values())
    weaknesses = collections.Counter(row["weakness"] for row in training)
    assert weaknesses.keys() == set(WEAKNESSES) and min(weaknesses.values()) >= 20
    assert {row["weakness"] for row in held_out} == set(WEAKNESSES)
    assert sum(len(row["prompt"]) > 1 for row in pairs.values()) >= 20


def test_pairs_cannot_be_told_apart_by_length(pairs):
    longer = 0
    for where, row in pairs.items():
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert words(chosen["content"]) != words(rejected["content"]), where
        longer += len(words(chosen["content"])) > len(words(rejected["content"]))
    assert 0.25 * len(pairs) <= longer <= 0.75 * len(pairs)


def test_only_the_rejected_answers_of_the_weakness_english_are_english(pairs):
    for where, row in pairs.items():
        for answer in ("chosen", "rejected"):
            count = collections.Counter(words(row[answer][0]["content"]))
            english = count["the"] + count["you"] + count["and"] + count["to"] > 3
            assert english == (answer == "rejected" and row["weakness"] == "english"), where


def test_rows_are_whole_conversations(rows):
    for where, row in rows.items():
        for messages in conversations(row):
            roles = [message["role"] for message in messages]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns and turns == ["user", "assistant"] * (len(turns) // 2), where
            assert all(m["content"] and m["content"] == m["content"].strip() for m in messages), where


def test_no_ten_words_stand_in_two_rows(rows):
    owner = {}
    for where, row in rows.items():
        for message in itertools.chain(*conversations(row)):
            text = words(message["content"])
            for run in zip(*(text[i:] for i in range(10))):
                assert owner.setdefault(run, where) == where, f"{where} and {owner[run]}: {' '.join(run)}"


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_at_most_three_rows_begin_alike(rows, role):
    part = {"user": "prompt", "assistant": "chosen"}[role]
    turns = [row.get("messages") or row[part] for row in rows.values()]
    openings = [next(m["content"] for m in messages if m["role"] == role) for messages in turns]
    [(opening, count)] = collections.Counter(tuple(words(text)[:4]) for text in openings).most_common(1)
    assert count <= 3, opening


@pytest.mark.parametrize("answer", ["messages", "chosen"])
def test_answers_are_long_enough(rows, answer):
    messages = itertools.chain(*(row.get(answer, []) for row in rows.values()))
    lengths = [len(words(message["content"])) for message in messages if message["role"] == "assistant"]
    assert statistics.median(lengths) >= 60


def test_german_is_written_with_umlauts(rows):
    spelled_out = re.compile(
        r"\b(fuer|ueber|moechte|koennen|waere|gruesse|naechste\w*|schoen\w*)\b", re.IGNORECASE
    )
    for where, row in rows.items():
        if row["language"] == "de":
            messages = itertools.chain(*conversations(row))
            assert not any(spelled_out.search(message["content"]) for message in messages), where
