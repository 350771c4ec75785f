import copy
import json
import pickle
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phoenix.data.formats import (
    FORMATS,
    Conversation,
    PreferencePair,
    RowError,
    Text,
    is_message,
    threads,
    to_row,
)
from phoenix.files import UserError


def say(*contents, roles=("user", "assistant"), names=("role", "content")):
    return [dict(zip(names, (roles[i % 2], content))) for i, content in enumerate(contents)]


def rated(response, ratings, **more):
    notes = {f"aspect {i}": {"Rating": rating} for i, rating in enumerate(ratings)}
    return {"response": response, "annotations": notes, **more}


def node(text, *replies, rank=None, **more):
    """A message of a tree with its replies; the role follows from the depth: see `tree`."""
    return {"message_id": text, "text": text, "rank": rank, "replies": list(replies), **more}


def tree(root, **more):
    """A row of oasst1's dump."""
    level, role = [root], "prompter"
    while level:
        for message in level:
            message["role"] = role
        level, role = [reply for message in level for reply in message["replies"]], {
            "prompter": "assistant", "assistant": "prompter"}[role]  # fmt: skip
    return {"message_tree_id": "t1", "tree_state": "ready_for_export", "prompt": root, **more}


ANSWER_A, ANSWER_B = [{"role": "assistant", "content": "A"}], [{"role": "assistant", "content": "B"}]
# One row of each format, and the turns (of a pair: prompt, chosen, rejected) that must come out.
HUMAN, ROLE_TEXT = {"roles": ("human", "gpt"), "names": ("from", "value")}, {"names": ("role", "text")}
SAMPLES = {
    "oasst": (tree(node("Q", node("B", rank=1), node("A", rank=0))), say("Q", "A")),
    "oasst_pairs": (
        tree(node("Q", node("B", rank=1), node("A", rank=0))), (say("Q"), ANSWER_A, ANSWER_B),
    ),
    "ultrafeedback": (
        {"source": "flan", "instruction": "Q", "completions": [rated("bad", "21"), rated("good", "55")]},
        (say("Q"), [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]),
    ),
    "argilla": (
        {"source": "flan", "instruction": "Q", "chosen_response": "A", "rejected_response": "B"},
        (say("Q"), [{"role": "assistant", "content": "A"}], [{"role": "assistant", "content": "B"}]),
    ),
    "preference": (
        {"chosen": say("Q", "A"), "rejected": say("Q", "B")},
        (say("Q"), [{"role": "assistant", "content": "A"}], [{"role": "assistant", "content": "B"}]),
    ),
    "messages": ({"messages": say("Q", "A", "R", "B")}, say("Q", "A", "R", "B")),
    "sharegpt": ({"conversations": say("Q", "A", **HUMAN)}, say("Q", "A")),
    "oasst_de": ({"conversation": say("Q", "A", **ROLE_TEXT)}, say("Q", "A")),
    "schnabeltier": ({"instruction_de": "Q", "output_de": "A"}, say("Q", "A")),
    "dolly_de": ({"instruction_de": "Q", "context_de": "C", "response_de": "A"}, say("Q\n\nC", "A")),
    "dolly": ({"instruction": "Q", "context": "", "response": "A", "category": "qa"}, say("Q", "A")),
    "open_platypus": (
        {"instruction": "Q", "input": "C", "output": "A", "data_source": "ARB"}, say("Q\n\nC", "A"),
    ),
    "alpaca": ({"instruction": "Q", "input": "C", "output": "A"}, say("Q\n\nC", "A")),
    "prompt_completion": ({"prompt": "Q", "completion": "A"}, say("Q", "A")),
    "poem": ({"prompt": "Q", "poem": "A"}, say("Q", "A")),
    "song": ({"prompt": "Q", "song": "A", "analysis_prompt": "x", "analysis": "y"}, say("Q", "A")),
    "text": ({"text": "Es regnet."}, "Es regnet."),
}  # fmt: skip


def content_of(row):
    if isinstance(row, Text):
        return row.text
    if isinstance(row, Conversation):
        return list(row.messages)
    return tuple(list(part) for part in (row.prompt, row.chosen, row.rejected))


def kind_of(name):
    return "pairs" if FORMATS[name][0] is PreferencePair else "documents"


@pytest.mark.parametrize("name", FORMATS)
def test_the_sample_row_of_each_format_converts(name):
    raw, expected = SAMPLES[name]
    row = to_row(raw, ("rows.jsonl", 7), kind_of(name))
    assert type(row) is FORMATS[name][0]
    assert content_of(row) == expected
    assert (row.line, row.license) == (7, None)
    assert row.source == raw.get("source", raw.get("data_source", "rows.jsonl"))
    assert to_row({**raw, "license": "CC0"}, ("x", 1), kind_of(name)).license == "CC0"


@pytest.mark.parametrize(
    "name, column",
    # Open-Platypus's data_source may be null, and without it the row is one of Alpaca.
    [(name, column) for name in FORMATS for column in sorted(FORMATS[name][1] - {"data_source"})],
)
@pytest.mark.parametrize("value", ["absent", None, 5])
def test_a_missing_or_odd_column_is_named(name, column, value):
    raw = {key: text for key, text in SAMPLES[name][0].items() if key != column}
    raw |= {} if value == "absent" else {column: value}
    with pytest.raises(RowError) as error:
        to_row(raw, ("data/rows.jsonl", 1412), kind_of(name))
    message = str(error.value)
    assert (
        message.startswith("data/rows.jsonl, line 1412: ") and "expected" in message and "\n" not in message
    )
    if value == 5:
        assert repr(column) in message
    else:
        assert all(field in message for field in raw if raw[field] is not None)
        assert all(known in message for known in FORMATS)


def test_the_most_specific_format_and_the_asked_kind_decide():
    h4 = {
        "prompt": "Q", "prompt_id": "1", "messages": say("Q", "A"), "score_chosen": 9.0,
        "chosen": say("Q", "A"), "rejected": say("Q", "B"),
    }  # fmt: skip
    assert isinstance(to_row(h4, ("x", 1)), Conversation)
    assert content_of(to_row(h4, ("x", 1), "pairs")) == SAMPLES["preference"][1]
    with_text = {"instruction": "Q", "input": None, "output": "A", "text": "### Q ### A"}
    assert content_of(to_row(with_text, ("x", 1))) == say("Q", "A")
    with pytest.raises(RowError, match=r"PreferencePair.*kind='documents'"):
        to_row(SAMPLES["preference"][0], ("x", 1), "documents")
    with pytest.raises(RowError, match="oasst1"):
        to_row({"message_id": "1", "parent_id": None, "text": "Hi", "role": "prompter"}, ("x", 1))


PAIR = SAMPLES["preference"][1]
ANSWERS = {"chosen": PAIR[1], "rejected": PAIR[2]}


@pytest.mark.parametrize(
    "raw",
    [
        {"prompt": say("Q"), **ANSWERS},  # TRL, explicit prompt
        {"prompt": "Q", **ANSWERS},
        {
            "prompt": "Q",
            "chosen": say("Q", "A"),
            "rejected": say("Q", "B"),
            "chosen-rating": 5.0,
        },  # argilla, cleaned
        {"prompt": "Q", "chosen": " A", "rejected": " B"},  # TRL, plain
        {"chosen": "Q A", "rejected": "Q B"},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},  # HH-RLHF
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " A", "rejected": " B"},
    ],
)
def test_all_forms_of_a_preference_row_give_one_pair(raw):
    assert content_of(to_row(raw, ("x", 1), "pairs")) == PAIR


def test_a_prompt_of_several_turns_ends_where_the_answers_part():
    shared = [{"role": "system", "content": "S"}, *say("Q", "A", "R")]
    raw = {
        "chosen": [*shared, *say("C", "D", "E", roles=("assistant", "user"))],
        "rejected": [*shared, *PAIR[2]],
    }
    row = to_row(raw, ("x", 1), "pairs")
    assert list(row.prompt) == shared and len(row.chosen) == 3 and len(row.rejected) == 1
    # Where a user's turns differ, the pair parts at the answer before them.
    raw = {"chosen": say("Q", "A", "R", "C"), "rejected": say("Q", "A", "S", "C")}
    row = to_row(raw, ("x", 1), "pairs")
    assert list(row.prompt) == say("Q") and [len(row.chosen), len(row.rejected)] == [3, 3]
    # Whole words of a shared beginning, so that "br" of "braun" and "breit" stays with the answers.
    words = to_row({"chosen": "Er ist braun", "rejected": "Er ist breit"}, ("x", 1), "pairs")
    assert [part[0]["content"] for part in (words.prompt, words.chosen, words.rejected)] == [
        "Er ist",
        "braun",
        "breit",
    ]
    equal = to_row({"chosen": say("Q", "A"), "rejected": say("Q", "A")}, ("x", 1), "pairs")
    assert equal.chosen == equal.rejected  # a filter drops it, and counts it


def test_ultrafeedback_takes_the_best_mean_and_always_the_same_lower_one():
    answers = [
        rated("a", "33", overall_score=10),
        rated("b", ["5", "N/A"]),
        rated("c", "44"),
        rated("d", ["N/A"]),
    ]
    rejected = set()
    for number in range(40):
        raw = {"instruction": f"Frage {number}", "completions": answers}
        rows = [to_row(raw, ("x", 1), "pairs") for _ in range(2)]
        assert rows[0] == rows[1]
        assert rows[0].chosen[0]["content"] == "b"
        rejected.add(rows[0].rejected[0]["content"])
    assert rejected == {"a", "c"}
    scored = [{"response": "a", "overall_score": 3}, {"response": "b", "overall_score": 8.5}]
    assert to_row({"instruction": "Q", "completions": scored}, ("x", 1), "pairs").chosen[0]["content"] == "b"
    with pytest.raises(RowError, match="rated differently"):
        to_row({"instruction": "Q", "completions": [rated("a", "3"), rated("b", "3")]}, ("x", 1), "pairs")


@pytest.mark.parametrize(
    "turns, reason",
    [
        (say("A", "Q", roles=("assistant", "user")), "turn 1 is the assistant's .roles out of order"),
        (say("Q", "R", roles=("user", "user")), "turn 2 is the user's .roles out of order"),
        (say("Q", "A", "R"), "last turn .*roles out of order"),
        ([*say("Q", "A"), {"role": "system", "content": "S"}], "turn 3 is the system's"),
        ([{"role": "system", "content": "S"}], "last turn"),
        (say("Q", "  \n"), "turn 2 is empty"),
        (say("Q", None), "content of turn 2.* null"),
        (say("Q", 5), "content of turn 2.* int"),
        (say("Q", "A", roles=("user", "tool")), "turn 2 .*role 'tool'"),
        (say("Q", "A", roles=("user", ["x"])), "turn 2 .*role"),
        (say("Q", [{"type": "image_url", "image_url": "u"}]), "content of turn 2.* list"),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [1]}],
            "calls a tool",
        ),
        ([], "empty list"),
        ("Q", "is a str"),
        (["Q", "A"], "is a list"),
        (say("Q", "A\0"), "NUL"),
        (say("Q", "A\ud800"), "surrogate"),
    ],
)
def test_a_conversation_in_disorder_gives_one_sentence(turns, reason):
    with pytest.raises(RowError, match=reason) as error:
        to_row({"messages": turns}, ("rows.jsonl", 3))
    assert str(error.value).startswith("rows.jsonl, line 3: ") and "expected" in str(error.value)


def test_openai_parts_are_joined_and_an_empty_system_turn_stays():
    turns = [
        {"role": "system", "content": ""},
        *say([{"type": "text", "text": "Gu"}, {"type": "text", "text": "t?"}], "A"),
    ]
    assert [m["content"] for m in to_row({"messages": turns}, ("x", 1)).messages] == ["", "Gut?", "A"]


def test_rows_are_made_of_plain_json():
    for name, (raw, _) in SAMPLES.items():
        assert to_row(json.loads(json.dumps(raw)), ("x", 1), kind_of(name)) == to_row(
            raw, ("x", 1), kind_of(name)
        )


def test_a_named_format_is_the_only_one_tried():
    raw = {"messages": say("Q", "A"), "instruction": "Q", "response": "B", "text": "C"}
    assert content_of(to_row(raw, ("x", 1), format="dolly")) == say("Q", "B")
    assert content_of(to_row(raw, ("x", 1), format="text")) == "C"
    with pytest.raises(
        RowError, match=r"^x, line 1: found the fields .*known format: alpaca .instruction, outp"
    ):
        to_row(raw, ("x", 1), format="alpaca")
    with pytest.raises(RowError, match="the row is a Text; expected one for kind='pairs'"):
        to_row(raw, ("x", 1), "pairs", format="text")
    for name in FORMATS:
        assert to_row(SAMPLES[name][0], ("x", 1), kind_of(name), name) == to_row(
            SAMPLES[name][0], ("x", 1), kind_of(name)
        )


def test_open_platypus_is_told_by_its_column_even_if_that_is_null():
    row = {"instruction": "Q", "input": "", "output": "A"}
    for more in ({"data_source": None}, {"data_source": "reclor"}):
        assert to_row({**row, **more}, ("x", 1), format="open_platypus").source == (
            more["data_source"] or "x"
        )
    with pytest.raises(RowError, match=r"open_platypus .data_source, instruction, output"):
        to_row(row, ("x", 1), format="open_platypus")


def test_null_columns_of_a_table_count_as_absent():
    """A parquet file that holds rows of several schemas gives each row, and each turn, all columns."""
    columns = sorted({column for raw, _ in SAMPLES.values() for column in raw} - {"data_source"})
    for name, (raw, expected) in SAMPLES.items():
        row = to_row(dict.fromkeys(columns) | raw, ("x", 1), kind_of(name))
        assert content_of(row) == expected, name
    none = dict.fromkeys(["role", "from", "content", "value", "text", "tool_calls"])
    for turns in (say("Q", "A"), say("Q", "A", **HUMAN), say("Q", "A", **ROLE_TEXT)):
        assert content_of(to_row({"messages": [none | turn for turn in turns]}, ("x", 1))) == say("Q", "A")


@pytest.mark.parametrize(
    "roles", [("Human", "GPT"), ("USER", "ChatGPT"), ("human", "Bing"), ("user", "bard")]
)
def test_roles_of_sharegpt_in_any_case(roles):
    turns = [{"from": "System", "value": "S"}, *say("Q", "A", roles=roles, names=("from", "value"))]
    assert content_of(to_row({"conversations": turns}, ("x", 1))) == [
        {"role": "system", "content": "S"}, *say("Q", "A")
    ]  # fmt: skip


@pytest.mark.parametrize("role", ["function_call", "observation", "tool", "Function"])
def test_tools_are_refused(role):
    turns = [*say("Q", "A"), *say("Q", "{}", roles=("user", role))]
    with pytest.raises(RowError, match=f"turn 4 of 'messages' has the role '{role}'"):
        to_row({"messages": turns}, ("x", 1))
    old = [*say("Q"), {"role": "assistant", "content": None, "function_call": {"name": "f"}}]
    with pytest.raises(RowError, match="content of turn 2' is a null"):
        to_row({"messages": old}, ("x", 1))


def test_a_completion_that_is_no_answer_to_learn():
    strings = {"prompt": "Q", "completion": " A"}
    lists = {"prompt": say("Q"), "completion": ANSWER_A}
    for row in (strings, lists):
        for label in (True, None, "true", 1):
            assert content_of(to_row({**row, "label": label}, ("x", 1))) == say("Q", "A")
        for label in (False, "False", 0):
            with pytest.raises(RowError, match=r"x, line 1: 'label' is false.*expected one that is true"):
                to_row({**row, "label": label}, ("x", 1))
        with pytest.raises(RowError, match="is a Conversation; expected one for kind='pairs'"):
            to_row({**row, "label": True}, ("x", 1), "pairs")
    with pytest.raises(RowError, match="turn 2 is the user's"):
        to_row({"prompt": say("Q"), "completion": say("Q")}, ("x", 1))


@pytest.mark.parametrize("name", ["schnabeltier", "poem", "song", "dolly", "argilla"])
def test_the_nameless_column_of_row_numbers_in_a_table_is_no_text(name):
    raw, expected = SAMPLES[name]
    assert content_of(to_row({"": "17", **raw}, ("x.csv", 2), kind_of(name))) == expected


def test_citation_marks_stay():
    raw = {"instruction": "Q", "context": "Der Turm.[12]", "response": "Ada.[3]"}
    assert content_of(to_row(raw, ("x", 1))) == say("Q\n\nDer Turm.[12]", "Ada.[3]")


@pytest.mark.parametrize("names", [
    ("score_chosen", "score_rejected"),  # HuggingFaceH4/ultrafeedback_binarized
    ("chosen_score", "rejected_score"),
    ("chosen_avg_rating", "rejected_avg_rating"),  # argilla
    ("chosen-rating", "rejected-rating"),  # argilla, cleaned
    ("chosen_rating", "rejected_rating"),
])  # fmt: skip
def test_scores_are_read_from_numbers_and_strings(names):
    def scores(*values, raw=SAMPLES["preference"][0]):
        return to_row({**raw, **dict(zip(names, values))}, ("x", 1), "pairs").scores

    assert scores(5, 4.5) == (5.0, 4.5)
    assert scores("5", "4.5", raw=SAMPLES["argilla"][0]) == (5.0, 4.5)
    for odd in ("N/A", "", None, "nan", float("inf"), [5], True, 10**400):
        assert scores(5, odd) is None and scores(odd, 5) is None
    assert scores() is None


def test_ratings_of_ultrafeedback_in_all_their_forms():
    for better, worse in (("5", "4.5"), (5, 4), ("4.5", "N/A 4 4".split()), (["5", None], "4")):
        answers = [rated("B", worse if isinstance(worse, list) else [worse])]
        answers.append(rated("A", better if isinstance(better, list) else [better]))
        raw = {"instruction": "Q", "completions": answers}
        assert content_of(to_row(raw, ("x", 1), "pairs")) == SAMPLES["preference"][1]


def test_length_ratio():
    def ratio(**raw):
        return to_row(raw, ("x", 1)).length_ratio

    both = {"instruction": "abcd", "instruction_de": "abcdef", "output": "ab", "output_de": "abc"}
    assert ratio(**both) == 9 / 6
    assert ratio(**both, context_de="x" * 99, context=None) == 9 / 6  # a column without its source
    assert ratio(instruction_de="abc", output_de="d") is None
    assert ratio(**{**both, "instruction": "", "output": ""}) is None
    assert ratio(**both, context_de=5, context="x") == 9 / 6
    record = {"source_characters": 100, "characters": 118}
    assert ratio(messages=say("Q", "A"), translation=record) == 1.18
    assert ratio(messages=say("Q", "A"), translation={"source_characters": 100, "characters": 0}) == 0
    for odd in ({}, {"source_characters": 0, "characters": 0}, {"source_characters": 10}, "abc", None):
        assert ratio(messages=say("Q", "A"), translation=odd) is None
    pair = {**SAMPLES["preference"][0], "translation": record}
    assert to_row(pair, ("x", 1), "pairs").length_ratio == 1.18


SPAM, HAM = ({"spam": {"value": value, "count": 3}} for value in (0.67, 0.33))
FLAT_SPAM = {"name": ["quality", "spam"], "value": [0.5, 1.0], "count": [3, 3]}


@pytest.mark.parametrize("root, expected", [
    (node("Q", node("a", rank=1), node("b", rank=0), node("c")), "Qb"),
    (node("Q", node("a"), node("b", rank=2)), "Qb"),  # none: last
    (node("Q", node("a"), node("b")), "Qa"),  # the first
    # The rank decides at a prompt, the length at an answer, where a thread without an answer counts nothing.
    (node("Q", node("a", node("R", node("c"))), node("b", rank=0)), "Qb"),
    (node("Q", node("a", node("R", node("S")), node("T", node("b", node("U", node("c")))))), "QaTbUc"),
    (node("Q", node("a", node("R", node("b")), node("S", node("c")))), "QaRb"),
    (node("Q", node("a", node("R"))), "Qa"),
    # Left out with what hangs on it.
    (node("Q", node("a", node("R", node("b")), rank=0, deleted=True), node("c", rank=1)), "Qc"),
    (node("Q", node("a", rank=0, labels=SPAM), node("b", rank=1, labels=HAM)), "Qb"),
    (node("Q", node("a", rank=0, labels=FLAT_SPAM), node("b", rank=1, labels={"name": ["spam"]})), "Qb"),
    (node("Q", node("  ", rank=0), node("b", rank=1)), "Qb"),
    (node("Q", node("a", node("R", node("b"), deleted=True))), "Qa"),
])  # fmt: skip
def test_the_best_thread_of_a_tree(root, expected):
    assert content_of(to_row(tree(root), ("x", 1))) == say(*expected)


@pytest.mark.parametrize("row, reason", [
    (tree(node("Q")), "no thread from 'prompt' ends in an answer"),
    (tree(node("Q", node("A"), deleted=True)), "no thread from 'prompt' ends in an answer"),
    (tree(node("Q", node("A")), tree_state="aborted_low_grade"), "'tree_state' is 'aborted_low_grade'"),
    (tree(node("Q", node("A"))) | {"prompt": "Q"}, "no thread from 'prompt'"),
    (tree(node("Q")) | {"prompt": {**node("Q"), "replies": 5}}, "no thread"),
    (tree(node("Q", node("A"))) | {"prompt": {"text": "Q", "replies": [{"text": "A"}]}}, "no thread"),
    ({"message_tree_id": "t", "prompt": {"text": 5, "role": "prompter", "replies": [
        {"text": "A", "role": "assistant"}]}}, "content of turn 1' is a int"),
])  # fmt: skip
def test_a_tree_that_holds_no_thread(row, reason):
    with pytest.raises(RowError, match=f"^x, line 1: .*{reason}.*expected"):
        to_row(row, ("x", 1))


def test_the_pair_of_a_tree_is_the_best_and_the_worst_ranked_answer_to_its_last_prompt():
    last = node("R", node("w", rank=2), node("b", rank=0), node("m", rank=1), node("n"))
    row = to_row(tree(node("Q", node("a", last))), ("x", 1), "pairs")
    assert content_of(row) == (say("Q", "a", "R"), *(say("", c)[1:] for c in "bw"))
    for answers in ([node("a", rank=0)], [node("a", rank=1), node("b", rank=1)], [node("a"), node("b")],
                    [node("a", rank=0), node("b")]):  # fmt: skip
        with pytest.raises(RowError, match="no two answers to the last prompt differ in rank"):
            to_row(tree(node("Q", *answers)), ("x", 1), "pairs")


def flat(row):
    """The messages of a tree as oasst1's flat files hold them, parents first."""
    todo, messages = [(row["prompt"], None)], []
    for message, parent in todo:
        todo += [(reply, message["message_id"]) for reply in message["replies"]]
        fields = {name: value for name, value in message.items() if name != "replies"}
        outer = {name: value for name, value in row.items() if name != "prompt"}
        messages.append({**outer, **fields, "parent_id": parent})
    return messages


def random_tree(rng, name):
    nodes = [node(f"{name}0")]
    for number in range(1, rng.randrange(1, 12)):
        parent = rng.choice(nodes)
        nodes.append(node(f"{name}{number}", rank=rng.choice([None, 0, 1, 2]), deleted=rng.random() < 0.2))
        parent["replies"].append(nodes[-1])
    row = tree(nodes[0], message_tree_id=name, license="Apache-2.0")
    for message in nodes:
        message["rank"] = message["rank"] if message["role"] == "assistant" else None
    return row


def converted(raw, kind):
    try:
        return replace(to_row(raw, ("x", 1), kind), line=0)
    except RowError as error:
        return str(error)


@given(st.integers(0, 2**32))
def test_flat_messages_give_the_rows_of_their_trees(seed):
    """Brothers keep their order, as it decides between equals; all else may be shuffled."""
    rng = random.Random(seed)
    trees = [random_tree(rng, name) for name in "abc"]
    expected = copy.deepcopy(trees)
    rows = []
    for messages in map(flat, trees):
        by_parent = {}
        for message in messages:
            by_parent.setdefault(message["parent_id"], []).append(message)
        order = [parent for parent, brothers in by_parent.items() for _ in brothers]
        rng.shuffle(order)
        rows += [by_parent[parent].pop(0) for parent in order]
    rows = list(enumerate([*rows, {"text": "no message"}], 5))
    roots = [line for line, row in rows if row.get("parent_id", "") is None]
    made = list(threads(iter(rows)))
    assert [line for line, _ in made] == [*roots, rows[-1][0]]
    assert made.pop() == rows[-1] and not is_message(rows[-1][1]) and is_message(rows[0][1])
    for kind in ("documents", "pairs"):
        assert [converted(row, kind) for _, row in made] == [converted(row, kind) for row in expected]


@given(st.integers(0, 2**32))
def test_the_best_thread_is_that_of_a_plain_recursion(seed):
    def best(message):
        replies = [reply for reply in message["replies"] if not reply["deleted"]]
        if message["role"] == "assistant":
            return [message["text"], *max(map(best, replies), key=len, default=[])]
        ranks = [9 if reply["rank"] is None else reply["rank"] for reply in replies]
        return [message["text"], *best(replies[ranks.index(min(ranks))])] if replies else []

    raw = random_tree(random.Random(seed), "a")
    raw["prompt"]["deleted"] = False
    row = converted(raw, "documents")
    expected = best(raw["prompt"])
    assert ([turn["content"] for turn in row.messages] if expected else "no thread" in row) == (
        expected or True
    )


def test_flat_messages_out_of_order_or_in_disorder():
    first, second = (flat(tree(node("Q", node("A")), message_tree_id=name)) for name in ("t1", "t2"))
    rows = enumerate([*first, *second, first[1]], 1)
    with pytest.raises(
        UserError, match=r"^a.jsonl, line 5: the tree 't1' comes again; expected .*message_tree_id"
    ):
        list(threads(rows, "a.jsonl"))
    # Without a root, with a root twice, an id twice, a circle, numbers as ids.
    [(line, row)] = threads(enumerate(first[1:], 7))
    assert line == 7 and "no thread" in converted(row, "documents")
    circle = [
        first[0],
        {**first[1], "message_id": "Q"},
        first[1],
        {**first[1], "message_id": "B", "parent_id": "B"},
    ]
    for messages in ([*first, *first], circle, [first[1], first[0]]):
        [(_, row)] = threads(enumerate(json.loads(json.dumps(messages)), 1))
        assert content_of(to_row(row, ("x", 1))) == say("Q", "A")
    numbers = [{**message, "message_id": i + 1, "parent_id": i or None} for i, message in enumerate(first)]
    [(_, row)] = threads(enumerate(numbers, 1))
    assert content_of(to_row(row, ("x", 1))) == say("Q", "A")


def test_a_very_deep_tree_is_cut_and_can_go_to_another_process():
    names = ("prompter", "assistant")
    messages = [
        {
            "message_tree_id": "t",
            "message_id": i + 1,
            "parent_id": i or None,
            "text": "x",
            "role": names[i % 2],
        }
        for i in range(5000)
    ]
    [(_, row)] = threads(enumerate(messages, 1))
    assert len(to_row(pickle.loads(pickle.dumps(row)), ("x", 1)).messages) == 200


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


ODD = [None, "", " ", "x", 5, -1.5, 10**400, float("nan"), True, [], {}, [[]], [{}], [None], ["x"], {"x": 1}]
ODD += [{"text": 5}, [{"role": "user"}], {"spam": 5}, {"name": 5}, {"name": ["spam"], "value": 5}]


@given(st.sampled_from(sorted(SAMPLES)), st.integers(0, 2**32))
def test_an_odd_value_anywhere_gives_a_row_or_one_sentence(name, seed):
    rng, raw = random.Random(seed), copy.deepcopy(SAMPLES[name][0])
    raw |= {"labels": {}, "label": None, "score_chosen": 1, "score_rejected": "2", "translation": {}}
    raw |= {"source_characters": 1, "license": "MIT", "output_de": "x", "source": "s"}
    for _ in range(rng.randrange(1, 3)):
        *path, last = rng.choice([path for path in places(raw) if path])
        parent = raw
        for step in path:
            parent = parent[step]
        parent[last] = copy.deepcopy(rng.choice(ODD))
    for kind in ("documents", "pairs"):
        try:
            row = to_row(raw, ("x", 1), kind)
        except RowError as error:
            assert "expected" in str(error) and str(error).startswith("x, line 1: ")
        else:
            assert isinstance(row, PreferencePair) == (kind == "pairs")


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"messages": say("Q", " ")}, "documents", "empty"),
        ({"messages": say("Q")}, "documents", "bad_row"),
        ({"instruction": "Q", "completions": [{"response": "a", "overall_score": 1}] * 2}, "pairs", "tie"),
    ],
)
def test_an_error_names_the_filter_that_drops_such_rows(row, kind, reason):
    with pytest.raises(RowError) as raised:
        to_row(row, ("a.jsonl", 1), kind)
    assert raised.value.reason == reason
