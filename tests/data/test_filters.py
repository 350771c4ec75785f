import numpy as np
import pytest

from phoenix.data.filters import lot, row_keys, why_dropped
from phoenix.data.formats import Conversation, PreferencePair, Text


def chat(*contents):
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents))


def conversation(*contents):
    return Conversation(chat(*contents), "x", None, 1)


def pair(prompt, chosen, rejected):
    answers = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return PreferencePair(chat(prompt), *((answer,) for answer in answers), "x", None, 1)


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b\u200b", "\ufeff", "\x07", "\u2028\u00a0"])
def test_what_nobody_can_see_is_empty(text):
    assert why_dropped(Text(text, "x", None, 1)) == "empty"
    assert why_dropped(conversation("Hallo", text)) == "empty"
    assert why_dropped(pair("Hallo", "gut", text)) == "empty"


def test_what_can_be_seen_stays():
    assert why_dropped(Text("…", "x", None, 1)) is None
    assert why_dropped(conversation("?", "🙂")) is None
    system = {"role": "system", "content": ""}
    assert why_dropped(Conversation((system, *chat("a", "b")), "x", None, 1)) is None
    assert why_dropped(pair("a", "b", "c")) is None
    assert why_dropped(pair("a", "Ja  gut", "ja gut ")) == "equal_answers"


def test_a_key_sees_through_form_space_and_case_but_not_content():
    key, of_lot = row_keys(conversation("Größe der Straße?", "Drei Meter."))
    assert key == of_lot
    for question, answer in (
        ("Gro\u0308ße der Straße?", "Drei Meter."),
        (" größe\n der\u00a0STRASSE?", "drei  meter."),
    ):
        assert row_keys(conversation(question, answer)) == (key, key)
    others = [
        conversation("Größe der Straße?", "Drei Meter"),
        conversation("Grosse der Straße?", "Drei Meter."),
        conversation("Größe der Straße? Drei Meter.", "x"),
        conversation("Größe der Straße?", "Drei Meter.", "Größe der Straße?", "Drei Meter."),
        Text("Größe der Straße? Drei Meter.", "x", None, 1),
    ]
    assert len({row_keys(row)[0] for row in others} | {key}) == len(others) + 1


def test_pairs_of_one_prompt_share_the_lot_and_are_no_duplicates():
    keys = [row_keys(pair(*texts)) for texts in (("Q", "A", "B"), ("q ", "a", "B\n"))]
    assert keys[0] == keys[1]
    others = [row_keys(pair(*texts)) for texts in (("Q", "A", "C"), ("Q", "C", "B"), ("Q", "B", "A"))]
    assert {of_lot for _, of_lot in others} == {keys[0][1]}
    assert len({whole for whole, _ in [*others, keys[0]]}) == 4
    other_prompt = row_keys(pair("R", "A", "B"))
    assert other_prompt[0] != keys[0][0] and other_prompt[1] != keys[0][1]
    early, late = (
        PreferencePair(turns[:cut], turns[cut:], chat("Q", "A", "Q", "B")[cut:], "x", None, 1)
        for turns in [chat("Q", "A", "Q", "A")] for cut in (1, 3)
    )  # fmt: skip
    assert row_keys(early)[0] != row_keys(late)[0]


def test_lots_are_even_and_depend_on_key_and_seed():
    keys = range(20_000)
    lots = np.array([lot(key, 1) for key in keys])
    assert lots.min() >= 0 and lots.max() < 1
    assert np.histogram(lots, 10)[0].min() > 1800  # 2000 each are expected, and 1800 is 4.7 deviations off
    assert lot(5, 1) == lots[5] != lot(5, 2)
    assert abs(np.corrcoef(lots, [lot(key, 2) for key in keys])[0, 1]) < 0.05
