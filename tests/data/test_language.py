import json
from pathlib import Path

import pytest

from phoenix.data.language import (
    echoes,
    loops,
    prose,
    repeats_training,
    reply_language,
    run_index,
    words,
)

SAMPLE = Path(__file__).parents[2] / "recipes" / "sample"
GERMAN = "Der Zug hält heute nicht in Köln, weil an der Strecke bis zum Abend gebaut wird."
ENGLISH = "The train does not stop in Cologne today because the line is being repaired."
SAME_IN_ALL = {
    "de": GERMAN,
    "en": ENGLISH,
    "nl": "De trein stopt vandaag niet in Keulen, omdat er tot vanavond aan het spoor wordt gewerkt.",
    "da": "Toget standser ikke i Köln i dag, fordi der arbejdes på strækningen indtil i aften.",
    "fr": "Le train ne s'arrête pas à Cologne aujourd'hui, car la voie est en travaux jusqu'au soir.",
}
# Each of them holds English words that are no prose.
NOT_PROSE = [
    "```python\nfor item in the_list_of_things:\n    print('this is the value of the item', item)\n```",
    "```\nthis fence is never closed because the reply was cut after some hundred tokens or so",
    "~~~text\nthis is another way to write a fence in markdown files of all kinds\n~~~",
    "`git commit --amend --message 'this is what the old message should have been'`",
    "https://example.org/this/is/the/path/to/some-english-page-about-the-weather?and=the&query=of",
    "$the = \\text{sum of all the values} + \\text{error of the mean of them}$",
    "\\[ \\text{the sum of all the values and of the error of the mean of them} \\]",
    '{\n  "name": "the old house at the end of the road",\n  "items": ["this is the first of them"]\n}\n',
    '{"name": "the old house at the end of the road", "kind": "this is not the first of them"}',
    "> this is the line of the mail that the answer quotes from the other person",
]

POEM = """Am Ufer steht die Mühle,
ihr Rad dreht sich im Wind,
die Müllerin trägt Wasser,
so rauscht der alte Bach.

Im Garten blüht der Mohn schon,
die Katze schläft im Gras,
ein Junge sucht die Schuhe,
so rauscht der alte Bach.

Nun wird es Abend draußen,
der Nebel steigt vom Tal,
und alle gehen schlafen,
so rauscht der alte Bach."""


def assistant_replies():
    for path in sorted(SAMPLE.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for before, turn in zip(row["messages"], row["messages"][1:]):
                if turn["role"] == "assistant":
                    yield turn["content"], before["content"], row["language"]


@pytest.mark.parametrize("language", SAME_IN_ALL)
def test_reply_language_tells_the_candidates_apart(language):
    assert reply_language(SAME_IN_ALL[language]) == language
    assert reply_language(SAME_IN_ALL[language].upper()) == language


@pytest.mark.parametrize("noise", NOT_PROSE)
def test_what_is_no_prose_neither_decides_nor_is_decided(noise):
    assert reply_language(noise) is None
    assert reply_language(f"{GERMAN}\n\n{noise}") == "de"
    assert reply_language("\n".join([GERMAN, *NOT_PROSE])) == "de"


@pytest.mark.parametrize(
    ("text", "decided"),
    [
        ("", False),
        ("42", False),
        ("Ja, gerne!", False),
        ("1 + 1 = 2, 2 + 2 = 4, 3 + 3 = 6, 4 + 4 = 8, 5 + 5 = 10", False),
        ("Das ist ja so ein", False),  # 5 words, 13 letters
        ("Geschwindigkeitsbegrenzung Autobahn Landstraße Ortschaft", False),  # 4 words, many letters
        ("Heute scheint endlich wieder Sonne", True),  # 5 words, 30 letters
    ],
)
def test_undecided_below_five_words_or_twenty_letters(text, decided):
    assert (reply_language(text) == "de") == decided
    assert (reply_language(text) is None) == (not decided)


def test_cells_of_a_table_and_marked_words_are_prose():
    table = (
        "| Ort | Zeit |\n|---|---|\n| der kleine Bahnhof | heute Abend |\n| **die alte Brücke** | morgen |"
    )
    assert words(prose(table)) == words(table)
    assert reply_language(table) == "de"


def test_a_quotation_of_the_prompt_counts_for_neither_language():
    prompt = f"Übersetze: {ENGLISH} {ENGLISH}"
    assert reply_language(f"„{ENGLISH}“") == "en"
    assert reply_language(f"„{ENGLISH}“", prompt) is None
    assert reply_language(f"„{ENGLISH}“ heißt auf Deutsch: {GERMAN}", prompt) == "de"
    assert prose("Words before it, " + ENGLISH, ENGLISH).split()[:3] == ["Words", "before", "it,"]


def test_answers_of_the_sample_are_of_their_language_and_neither_echo_nor_loop():
    replies = list(assistant_replies())
    assert len(replies) > 600
    for reply, prompt, language in replies:
        assert reply_language(reply, prompt) == language, reply
        assert not echoes(reply, prompt), reply
        assert not loops(reply), reply


def test_echoes():
    prompt = "Erklär mir bitte in zwei Sätzen, warum der Himmel am Abend rot aussieht und nicht blau."
    answer = "Am Abend legt das Licht einen längeren Weg durch die Luft zurück. Dabei geht das Blau verloren."
    assert echoes(prompt, prompt)
    assert echoes(f"„{prompt.upper()}“\n{answer}", prompt)  # begins with it
    assert echoes(f"Gerne! {prompt} Gerne!", prompt)  # mostly copied
    assert echoes(f"Also: {prompt[:70]}", prompt)  # a cut copy
    assert not echoes(answer, prompt)
    assert not echoes(
        f"{answer} {answer.replace('Abend', 'Morgen')} {prompt}", prompt
    )  # a copy, but little of it
    assert not echoes("Guten Morgen! Wie kann ich helfen?", "Guten Morgen!")
    assert not echoes("", prompt)
    assert not echoes(answer, "")


@pytest.mark.parametrize(
    "unit",
    [
        "Ich bin ein freundlicher Helfer und helfe gerne. ",
        "Das ist ein Satz.\n",
        "und so ",
        "ja",
        "- Das Haus ist groß und hell.\n\n",
        "Auf dem Tisch steht eine Lampe, und neben der Lampe liegt seit gestern Abend ein altes Buch. ",
    ],
)
@pytest.mark.parametrize("before", ["", GERMAN + " "])
@pytest.mark.parametrize("cut", [0, 1])
def test_loops_are_found_wherever_the_reply_is_cut(unit, before, cut):
    looping = before + unit * 12
    assert loops(looping[: len(looping) - cut])
    assert not loops(before + unit)


def test_a_numbered_list_of_one_sentence_is_a_loop():
    assert loops("\n".join(f"{n}. Achte auf die Größe und die Farbe." for n in range(1, 12)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Nein, nein, nein, das geht nicht!",
        "| a | b | c | d | e | f | g |\n|---|---|---|---|---|---|---|\n| 1 | 2 | 3 | 4 | 5 | 6 | 7 |",
        POEM,
        "Das Formular: ........................................................",
        "Eine Million ist 1000000, eine Milliarde ist 1000000000.",
        "| Mo | 6 × 1 min laufen |\n| Mi | 6 × 2 min laufen |\n| Fr | 6 × 3 min laufen |",
    ],
)
def test_no_loop(text):
    assert not loops(text)


def test_repeats_training():
    text = "Eins zwei drei vier fünf, sechs sieben acht neun zehn: elf zwölf dreizehn vierzehn."
    index = run_index([text, "kurz"])
    assert len(index) == 3
    assert repeats_training("Vorher. " + text.upper().replace(",", " –"), index)
    assert repeats_training("zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn", index)
    assert not repeats_training("zwei drei vier fünf sechs sieben acht neun zehn elf zwölf", index)
    assert not repeats_training(text.replace("sieben", "7"), index)
    assert not repeats_training("", index)
