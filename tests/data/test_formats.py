import json

import pytest

from phoenix.data.formats import FORMATS, Conversation, PreferencePair, RowError, Text, to_row


def say(*contents, roles=("user", "assistant"), names=("role", "content")):
    return [dict(zip(names, (roles[i % 2], content))) for i, content in enumerate(contents)]


def rated(response, ratings, **more):
    notes = {f"aspect {i}": {"Rating": rating} for i, rating in enumerate(ratings)}
    return {"response": response, "annotations": notes, **more}


# One row of each format, and the turns (of a pair: prompt, chosen, rejected) that must come out.
HUMAN, ROLE_TEXT = {"roles": ("human", "gpt"), "names": ("from", "value")}, {"names": ("role", "text")}
SAMPLES = {
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
