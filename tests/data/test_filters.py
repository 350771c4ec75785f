import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from phoenix.data.filters import FILTERS, RowFilters, lot, row_keys
from phoenix.data.formats import Conversation, PreferencePair, Text, to_row
from phoenix.files import UserError


def chat(*contents):
    return tuple({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents))


def conversation(*contents):
    return Conversation(chat(*contents), "x", None, 1)


def pair(prompt, chosen, rejected, **fields):
    answers = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return PreferencePair(chat(prompt), *((answer,) for answer in answers), "x", None, 1, **fields)


def found(name, row, raw=None, language=None, **settings):
    """What the filter of that name finds; None if the row stays."""
    result = RowFilters((name,), **settings).why_dropped(row, raw or {}, language)
    assert result is None or result[0] == name
    return result and result[1]


def why_dropped(row):
    """The name of the filter of its text alone that drops a row."""
    found = RowFilters(("empty", "equal_answers")).why_dropped(row, {}, None)
    return found and found[0]


@pytest.mark.parametrize(
    "text",
    ["", " \n\t", "\u200b\u200b", "\ufeff", "\x07", "\u2028\u00a0", "\u2800", "\ufe0f", "\u3164 \u00ad"],
)
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
        ("Grö\u00adße der Stra\u200bße?", "\ufeffDrei Meter."),
        (" größe\n der\u00a0STRASSE?", "drei  meter."),
    ):
        assert row_keys(conversation(question, answer)) == (key, key)
    assert row_keys(conversation("ΐ", "x")) == row_keys(conversation("ΐ".upper(), "x"))
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


def test_the_first_filter_that_is_on_names_the_row():
    row, raw = pair("Hallo", " ", "", scores=(1.0, 1.0)), {"source": "theoremqa"}
    reasons = ["empty", "equal_answers", "tie", "test_set"]
    for first in range(4):
        assert RowFilters(tuple(reasons[first:][::-1])).why_dropped(row, raw, None)[0] == reasons[first]
    assert RowFilters(()).why_dropped(row, raw, "de") is None
    assert RowFilters(FILTERS[-2:]).why_dropped(row, raw, "de") is None
    others = tuple(name for name in FILTERS if name != "contaminated")  # which needs files
    assert RowFilters(others).why_dropped(pair("Hallo", "Guten Tag!", "Tag."), {}, None) is None


def test_what_was_found_is_said():
    assert found("empty", conversation("Hallo", "\u200b")) == "turn 2"
    assert found("equal_answers", pair("a", "Ja  gut", "ja gut ")) == "Ja  gut"


@pytest.mark.parametrize(
    ("scores", "says"),
    [((4.0, 4.0), "4 and 4"), ((3.5, 4.25), "3.5 and 4.25"), ((5.0, 4.0), None), (None, None)],
)
def test_a_pair_without_a_better_answer_is_a_tie(scores, says):
    assert found("tie", pair("a", "b", "c", scores=scores)) == says
    assert found("tie", conversation("a", "b")) is None


def test_rows_of_a_test_set_are_known_by_their_source_or_category():
    row = conversation("a", "b")
    for field, name in itertools.product(
        ("source", "data_source", "dataset", "category"),
        ("theoremqa", "TIGER-Lab/TheoremQA", "Theorem_QA.jsonl", "set/theoremqa_test", "theorem.qa"),
    ):
        assert found("test_set", row, {field: name}) == name
    assert found("test_set", Conversation(chat("a", "b"), "truthful_qa", None, 1)) == "truthful_qa"
    assert found("test_set", row, {"source": "truthful_qa/generation"}) == "truthful_qa/generation"
    for name in ("mytheoremqa", "theoremqa2", "theorem", "qa"):
        assert found("test_set", row, {"source": name}) is None
    assert found("test_set", row, {"source": "qa", "category": ["theoremqa"], "data_source": None}) is None
    assert (
        found("test_set", row, {"source": "ARC-Challenge"}, test_sets=("arc_challenge",)) == "ARC-Challenge"
    )
    assert found("test_set", row, {"source": "theoremqa"}, test_sets=()) is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"length_ratio": (2.0, 0.5)},
            r"length_ratio is \[2\.0, 0\.5\]; expected the least first; swap the two",
        ),
        ({"names": ("language",), "languages": (None, "xx", "de")}, "language is 'xx'; expected a code that"),
        ({"eval_files": (Path("x.jsonl"),)}, "eval_files is set, but contaminated is not"),
        ({"names": ("contaminated",)}, "contaminated is set, but eval_files is not"),
    ],
)
def test_settings_that_no_row_can_meet_are_refused_before_any_is_read(settings, says):
    pytest.importorskip("py3langid")
    with pytest.raises(UserError, match=says):
        RowFilters(**{"names": (), **settings})


GERMAN = "Der Turm steht seit vielen Jahren in der Mitte der Stadt und ist schon von Weitem zu sehen."
ENGLISH = "The tower has stood in the middle of the town for many years and can be seen from far away."
SPANISH = "La torre está desde hace muchos años en el centro de la ciudad y se ve desde muy lejos."


def test_answers_in_another_language_are_found_and_what_is_undecided_stays():
    pytest.importorskip("py3langid")
    assert found("language", conversation("Wo?", ENGLISH), language="de") == "assistant is en"
    assert found("language", conversation(ENGLISH, GERMAN), language="de") is None
    assert (
        found("language", conversation("Wo?", GERMAN, "And in English?", ENGLISH, "?", GERMAN), language="de")
        is None
    )
    assert found("language", conversation("Wo?", ENGLISH)) is None
    assert found("language", conversation("Wo?", ENGLISH), language="en") is None
    assert found("language", conversation("Wo?", "Yes."), language="de") is None
    assert found("language", conversation("Code?", f"```\n# {ENGLISH}\n```"), language="de") is None
    assert (
        found("language", conversation(f"Wie heißt das Zitat? {ENGLISH}", f"So: {ENGLISH}"), language="de")
        is None
    )
    assert found("language", pair("Wo?", ENGLISH, GERMAN), language="de") == "chosen is en"
    assert found("language", pair("Wo?", GERMAN, ENGLISH), language="de") == "rejected is en"
    assert found("language", Text(ENGLISH, "x", None, 1), language="de") == "text is en"
    assert found("language", conversation("¿Dónde?", SPANISH), language="es") is None


@pytest.mark.parametrize(
    ("ratio", "says"), [(0.49, "ratio 0.49"), (3.1, "ratio 3.10"), (0.5, None), (2.0, None), (None, None)]
)
def test_a_translation_that_is_cut_or_loops_is_known_by_its_length(ratio, says):
    row = Text("x", "x", None, 1, length_ratio=ratio)
    assert found("length_ratio", row) == says
    assert found("length_ratio", row, length_ratio=(0.1, 4.0)) is None


REFUSALS = [
    "As an AI language model, I don't have personal opinions.",
    "As an AI, I cannot feel joy.",
    "Good question! As an artificial intelligence I have no body.",
    "I\u2019m sorry, but I can\u2019t help with that.",
    "I'm sorry, but I cannot write this.",
    "I cannot assist with that request.",
    "My knowledge cutoff is September 2021.",
    "I'm ChatGPT, how can I help?",
    "I was trained by OpenAI to be helpful.",
    "I am just a language model.",
    "Sure! I'm an AI assistant and cannot see you.",
    "I'm an AI designed to help.",
    "Als KI-Sprachmodell habe ich keine eigene Meinung.",
    "ALS KÜNSTLICHE INTELLIGENZ kann ich nicht\nfühlen.",
    "Als ein großes Sprachmodell weiß ich das nicht.",
    "Gute Frage. Ich habe als KI keine Gefühle.",
    "Es tut mir leid, aber ich kann dabei nicht helfen.",
    "Tut mir leid, aber als KI-Modell geht das nicht.",
    "Das war, Stand meines Wissens, im Jahr 2019.",
    "Mein Wissensstand reicht bis 2021.",
    "Ich bin ChatGPT.",
    "Ich wurde von OpenAI entwickelt.",
    "Ich bin nur ein KI-Assistent.",
    "Es tut mir leid, ich kann diese Anfrage nicht beantworten.",
    "I am an AI and cannot see you.",
]
ABOUT = [
    "ChatGPT ist ein Sprachmodell, das von OpenAI entwickelt wurde.",
    "ChatGPT is a chatbot by OpenAI. I would try it first with simple questions.",
    "OpenAI wurde 2015 gegründet. Ich nenne dir drei Produkte: ChatGPT, DALL-E und Whisper.",
    "Als KI bezeichnet man Systeme, die aus Daten lernen.",
    "As an AI researcher, she works on language models.",
    "Ein Sprachmodell wie GPT-4 sagt das nächste Wort voraus.",
    "Liebe Anna,\n\nes tut mir leid, aber ich kann am Freitag nicht kommen.",
    "Dear Tom,\n\nI'm sorry, but I cannot make it on Friday.",
    "Sein Wissensstand war beachtlich, und sein letztes Update kam im Mai.",
    "Dabei helfe ich nicht: Damit würden Menschen um ihr Geld gebracht.",
    "Das Kino zeigt heute einen Film über eine KI. Ich empfehle ihn.",
    "As an airline pilot, I fly a lot.",
    "As an AI engineer, I test models all day.",
    "I'm an AI engineer from Ulm.",
    "I am an intelligence officer.",
    "Als KI-Forscherin habe ich viel zu tun, und ich arbeite als KI-Entwicklerin.",
    "Ich bin KI-Forscher.",
    "The knowledge cutoff of ChatGPT is September 2021.",
    "Es tut mir leid, ich kann heute leider nicht zu deiner Feier kommen.",
    "I am an AI and robotics engineer.",
    "Als KI-System meines Hauses nutze ich Home Assistant.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_a_model_that_speaks_of_itself_or_refuses_by_its_phrase_is_found(text):
    said = found("refusal", conversation("Hallo", "Guten Tag!", "Was?", text))
    assert said and said in " ".join(text.replace("\u2019", "'").lower().split())
    assert found("refusal", pair("Hallo", text, "Guten Tag!")) == said
    assert found("refusal", conversation(text, "Guten Tag!")) is None
    assert found("refusal", pair("Hallo", "Guten Tag!", text)) is None
    assert found("refusal", Text(text, "x", None, 1)) is None


@pytest.mark.parametrize("text", ABOUT)
def test_an_answer_about_models_or_a_letter_of_regret_is_no_refusal(text):
    assert found("refusal", conversation("Hallo", text)) is None


def test_no_row_of_the_sample_is_flagged():
    pytest.importorskip("py3langid")
    filters = RowFilters(FILTERS[:-3])
    dropped = []
    for path in sorted((Path(__file__).parents[2] / "recipes" / "sample").glob("*.jsonl")):
        for line, raw in enumerate(map(json.loads, path.read_text().splitlines()), 1):
            if reason := filters.why_dropped(to_row(raw, (path, line)), raw, raw["language"]):
                dropped.append((path.name, line, reason))
    assert not dropped


def test_a_question_of_a_test_file_is_found_in_any_field(tmp_path):
    question = "Wie viele Brote hat der Bäcker an den drei Tagen vor dem Fest insgesamt verkauft?"
    (tmp_path / "mt.json").write_text(json.dumps([{"turns": ["Wer bist denn du?"]}, {"turns": [question]}]))
    settings = {"eval_files": (tmp_path / "mt.json",)}
    row = conversation("Hallo", "Guten Tag!")
    raw = {
        "messages": [{"role": "user", "content": "Hallo"}],
        "meta": {"original": [f"Frage: {question.upper()}"]},
    }
    said = found("contaminated", row, raw, **settings)
    assert said.startswith(f'{tmp_path}/mt.json, row 2: "wie viele brote hat der bäcker')
    assert found("contaminated", row, {"instruction": "wer bist denn du"}, **settings) is not None
    assert found("contaminated", row, {"instruction": "Und wer bist denn du?"}, **settings) is None
    hh = {
        "chosen": "\n\nHuman: Wer bist denn du?\n\nAssistant: Ada.",
        "rejected": "\n\nHuman: Wer bist denn du?\n\nAssistant: Bob.",
    }
    assert found("contaminated", to_row(hh, ("x", 1), "pairs"), hh, **settings).endswith('"wer bist denn du"')
