import numpy as np
import pytest

from phoenix.data.filters import lot, row_key, why_dropped
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
    key = row_key(conversation("Größe der Straße?", "Drei Meter."))
    for question, answer in (
        ("Gro\u0308ße der Straße?", "Drei Meter."),
        (" größe\n der\u00a0STRASSE?", "drei  meter."),
    ):
        assert row_key(conversation(question, answer)) == key
    others = [
        conversation("Größe der Straße?", "Drei Meter"),
        conversation("Grosse der Straße?", "Drei Meter."),
        conversation("Größe der Straße? Drei Meter.", "x"),
        conversation("Größe der Straße?", "Drei Meter.", "Größe der Straße?", "Drei Meter."),
        Text("Größe der Straße? Drei Meter.", "x", None, 1),
    ]
    assert len({row_key(row) for row in others} | {key}) == len(others) + 1
    assert row_key(pair("Q", "A", "B")) == row_key(pair("q ", "C", "D")) != row_key(pair("R", "A", "B"))


def test_lots_are_even_and_depend_on_key_and_seed():
    keys = range(20_000)
    lots = np.array([lot(key, 1) for key in keys])
    assert lots.min() >= 0 and lots.max() < 1
    assert np.histogram(lots, 10)[0].min() > 1800  # 2000 each are expected, and 1800 is 4.7 deviations off
    assert lot(5, 1) == lots[5] != lot(5, 2)
    assert abs(np.corrcoef(lots, [lot(key, 2) for key in keys])[0, 1]) < 0.05
