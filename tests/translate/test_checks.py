"""What the checks find in good and in damaged translations, and how registers and scores are told."""

import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import sacrebleu
from damage import DAMAGES, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st

from phoenix.translate.checks import FLAGS, check, register, score
from phoenix.translate.language import load_language
from phoenix.translate.segments import MARK, Piece

GERMAN = load_language("de")
FAILING = {name for name, fails in FLAGS.items() if fails}
SOURCE = "The meeting starts at 10:30 in room 214, and lunch costs 1,250.50 dollars."
REPLY = "Die Sitzung beginnt um 10.30 Uhr in Raum 214, und das Mittagessen kostet 1.250,50 Dollar."


def flags(source: str, reply: str, finish_reason: str = "stop", language=GERMAN) -> list[str]:
    return check(Piece(source), reply, finish_reason, language)


@pytest.mark.parametrize(
    ("source", "reply"),
    [
        (SOURCE, REPLY),
        (SOURCE, REPLY.replace("1.250,50", "1250,5").replace("10.30", "10:30")),
        (SOURCE, REPLY.replace("1.250,50", "1\u00a0250,50")),
        ("Call me at 9pm or 5.30 p.m. tomorrow.", "Ruf mich morgen um 21 Uhr oder um 17.30 Uhr an."),
        ("She was born on 05/12/1990.", "Sie wurde am 12.5.1990 geboren."),
        ("Of the 12 eggs, 3 broke.", "Von den zwölf Eiern sind drei zerbrochen."),
        ("In the 1970s he moved to Rome.", "In den 70er Jahren zog er nach Rom."),
        ("OK", "OK"),
        ("Bonn, Berlin", "Bonn, Berlin"),
        ("42", "42"),
        ("Sure, here is the list:", "Natürlich, hier ist die Liste:"),
        ("As an AI language model, I cannot smell.", "Als KI-Sprachmodell kann ich nicht riechen."),
        ("Is it late?", "Ist es spät?"),
        ("No, no, no!", "Nein, nein, nein!"),
        ("The word English: what does it mean?", "Das Wort Englisch: was bedeutet es?"),
        ("Press [[1]] to stop [[2]].", "Um [[2]] zu beenden, drücke [[1]]."),
        ("[[1]] is a name, [[2]] is none.", "[[1]] ist ein Name, [[2]] ist keiner."),
        ("The Greek letter α stands for an angle.", "Der griechische Buchstabe α steht für einen Winkel."),
    ],
)
def test_good_translations_have_no_failing_flag(source, reply):
    assert not FAILING & set(flags(source, reply))


@pytest.mark.parametrize(
    ("source", "reply", "flag"),
    [
        (SOURCE, "", "empty"),
        (SOURCE, " . ", "empty"),
        ("See [[1]] now.", "[[1]]", "length_ratio"),
        (SOURCE, SOURCE, "source_language"),
        (
            "Open it and then walk slowly to the end.",
            "Öffne es and then walk slowly to the end.",
            "source_language",
        ),
        ("Read the book.", "Lies das Buch, denn es ist sehr gut und erklärt alles genau.", "length_ratio"),
        (SOURCE, REPLY + " Dollar Dollar Dollar", "repetition"),
        (SOURCE, REPLY[:60], "truncated"),
        ("It works (mostly)", "Es funktioniert (meistens", "truncated"),
        ("Press [[1]] to stop [[2]].", "Drücke [[1]] zum Beenden.", "spans"),
        ("Press [[1]].", "Drücke [[1]] [[1]].", "spans"),
        ("Write to a@b.com today.", "Schreibe heute an c@b.com.", "spans"),
        (SOURCE, REPLY.replace("214", "241"), "numbers"),
        (SOURCE, REPLY.replace("1.250,50", "12.505,0"), "numbers"),
        (SOURCE, REPLY.replace("10.30", "11.30"), "numbers"),
        ("Of the 12 eggs, 3 broke.", "Von den zwölf Eiern sind 4 zerbrochen.", "numbers"),
        ("What is the capital of France?", "Die Hauptstadt ist Paris.", "answered"),
        ("Write a poem.", "Gerne! Ein Gedicht.", "answered"),
        ("Write a poem.", "Schreibe ein Gedicht.\nRosen sind rot.", "answered"),
        ("Read the book.", "German: Lies das Buch.", "prompt_leak"),
        ("Read the book.", "Lies das Buch.</s>", "prompt_leak"),
        ("Read the book.", "Lies das Buch.[AVAILABLE_TOOLS]", "prompt_leak"),
        ("Read the book.", "Lies das Buch.<\uff5cend\u2581of\u2581sentence\uff5c>", "prompt_leak"),
        ("The door is open.", "Die TÃ¼r ist offen.", "garbled"),
        ("The door is open.", "Die T\\u00fcr ist offen.", "garbled"),
        ("The door is open.", "Die дверь ist offen.", "garbled"),
        ("From 1914 to 1918 there was war.", "Von 1918 bis 1914 war Krieg.", "numbers_moved"),
        ("Open", "Open", "copied"),
    ],
)
def test_each_flag_is_raised(source, reply, flag):
    assert flag in flags(source, reply)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("stop", []), ("length", ["truncated"]), ("abort", ["truncated"]), ("repetition", ["repetition"])],
)
def test_the_reason_why_generation_ended_counts(reason, expected):
    assert flags(SOURCE, REPLY, reason) == expected


def test_short_texts_and_code_are_exempt_from_identification():
    assert flags("Add to cart", "Add to cart") == ["copied"]
    code = "for (int i = 0; i < n; i++) { total += values[i]; }"
    assert flags(code, code) == ["copied"]


@given(st.text(), st.text(), st.sampled_from(["stop", "length", "missing"]))
@settings(max_examples=200)
def test_any_two_texts_are_judged(source, reply, reason):
    found = check(Piece(MARK.sub("", source)), reply, reason, GERMAN)
    assert found == [name for name in FLAGS if name in found]
    assert check(Piece(source), source, "stop", GERMAN) in ([], ["copied"], ["source_language", "copied"])


@pytest.mark.parametrize("unit", ["9", "ha", "a.b.", "„", "<a ", "1 234 ", "Ein Satz. ", "\\a", "@", "["])
def test_a_reply_of_any_length_is_judged_at_once(unit):
    """Nothing here is quadratic: a loop to the token limit may be long."""
    found = flags(SOURCE, unit * (40_000 // len(unit)), "length")
    assert found == ["empty"] or "truncated" in found


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["Wie geht es Ihnen?", "Gut, und dir?"], "mixed"),
        (["Wie geht es Ihnen?", "Haben Sie Zeit?"], "formal"),
        (["Was machst du?", "Dein Hund schläft."], "informal"),
        (["Sie kommt morgen. Sie freut sich.", "Es regnet."], None),
        (["Haben Sie gehört, was er sagte? „Du bist zu spät!“"], "formal"),
        (["Er sah, dass sie ihr Buch las.", "Ihr Hund schläft."], None),
        ([], None),
    ],
)
def test_the_register_of_a_conversation(texts, expected):
    assert register(texts, GERMAN) == expected


@pytest.mark.parametrize(
    ("name", "formal", "informal"),
    [
        ("fr", "Comment allez-vous ?", "Comment vas-tu ?"),
        ("es", "¿Cómo está usted?", "¿Cómo estás tú?"),
        ("cs", "Jak se vám daří?", "Jak se máš? Myslím na tebe."),
    ],
)
def test_the_register_in_other_languages(name, formal, informal):
    language = load_language(name)
    assert register([formal], language) == "formal" and register([informal], language) == "informal"
    assert register([formal, informal], language) == "mixed"


def test_scores_are_those_of_sacrebleu():
    replies, references = zip(*((REPLY, REPLY), ("Das ist gut so.", "Das ist sehr gut so.")))
    found = score(replies, references)
    assert found["chrf"] == sacrebleu.corpus_chrf(list(replies), [list(references)]).score
    assert found["bleu"] == sacrebleu.corpus_bleu(list(replies), [list(references)]).score
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert found["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    with pytest.raises(ValueError, match="got 2 hypotheses and 1 references"):
        score(replies, references[:1])
    with pytest.raises(ValueError, match="got 0"):
        score([], [])


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_kind_of_damage_is_one(kind):
    """On the pairs that are written here: without the assets too, the generator damages something."""
    rng = random.Random(1)
    pairs = [*PAIRS, (SOURCE, REPLY), ("Do you need 15 or 20?", "Brauchst du nicht 15 oder 20?")]
    pairs.append(("She has 2 dogs, and " + "he has none at all, and " * 4, "Sie hat 2 Hunde"))
    damaged = [DAMAGES[kind][0](source, reply, rng) for source, reply in pairs for _ in range(9)]
    assert any(damaged)
    for source, reply, reason in filter(None, damaged):
        assert (source, reply) not in pairs or reason != "stop"


def lines(name: str, *fields: str) -> list[tuple[str, ...]]:
    if "PHOENIX_ASSETS" not in os.environ:
        pytest.skip("PHOENIX_ASSETS does not name the folder of assets")
    with gzip.open(Path(os.environ["PHOENIX_ASSETS"]) / name, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [tuple(row[field] for field in fields) for row in rows]


@pytest.mark.parametrize("field", ["alma_13b_lora", "reference"])
def test_false_alarms_on_good_translations(field):
    pairs = lines("wmt22_en_de.jsonl.gz", "source", field)
    found = [flags(*pair) for pair in pairs]
    print(field, Counter(name for names in found for name in names))
    assert sum(bool(FAILING & set(names)) for names in found) < 0.02 * len(pairs)
    assert sum(bool(names) for names in found) < 0.02 * len(pairs), "with what is only noted"


@pytest.mark.slow
def test_false_alarms_on_human_pairs_of_other_years():
    pairs = lines("wmt_en_de.jsonl.gz", "en", "de")
    found = [flags(*pair) for pair in pairs]
    print(Counter(name for names in found for name in names))
    assert sum(bool(FAILING & set(names)) for names in found) < 0.02 * len(pairs)


def damaged_lines(per_kind: int, pool: int) -> dict[str, tuple[int, int, Counter]]:
    """Kind -> (number of damaged segments, how many fail, flags), half from each of two sources.

    Only segments that are without any flag before they are damaged.
    """
    sources = [
        lines("wmt22_en_de.jsonl.gz", "source", "alma_13b_lora"),
        lines("wmt_en_de.jsonl.gz", "en", "de"),
    ]
    rng, found = random.Random(20), {kind: (0, 0, Counter()) for kind in DAMAGES}
    for pairs in sources:
        rng.shuffle(pairs)
        clean = [pair for pair in pairs[:pool] if not flags(*pair)]
        for kind, (function, _) in DAMAGES.items():
            made = (function(source, reply, rng) for source, reply in clean)
            judged = [flags(*one) for one, _ in zip(filter(None, made), range(per_kind // 2))]
            number, hits, names = found[kind]
            names.update(name for one in judged for name in one)
            found[kind] = number + len(judged), hits + sum(is_found(kind, one) for one in judged), names
    return found


def is_found(kind: str, names: list[str]) -> bool:
    """A failing flag; numbers in another order are only noted, since people do so as well."""
    return bool((FAILING | ({"numbers_moved"} if kind == "numbers_swapped" else set())) & set(names))


def table(found: dict[str, tuple[int, int, Counter]]) -> str:
    """Markdown, a line a kind: share found, and the two flags that find most."""
    rows = ["| damage | can be known | segments | found | flags |", "| --- | --- | ---: | ---: | --- |"]
    for kind, (number, hits, names) in found.items():
        most = ", ".join(f"{name} {count}" for name, count in names.most_common(2))
        known = "yes" if DAMAGES[kind][1] else "no"
        share = 100 * hits / max(1, number)
        rows.append(f"| {kind.replace('_', ' ')} | {known} | {number} | {share:.1f} % | {most} |")
    return "\n".join(rows)


def test_damage_is_found():
    """A few of each kind; the long form below holds the share."""
    found = damaged_lines(per_kind=12, pool=200)
    for kind, (number, hits, _) in found.items():
        assert hits >= 0.8 * number or not DAMAGES[kind][1], f"{kind}: {hits} of {number}"


@pytest.mark.slow
def test_of_each_kind_of_damage_95_percent_are_found():
    found = damaged_lines(per_kind=1000, pool=20_000)
    print(table(found))
    assert sum(is_known for _, is_known in DAMAGES.values()) >= 30
    for kind, (number, hits, _) in found.items():
        assert number >= 50, f"{kind} needs lines to be damaged"
        assert hits >= 0.95 * number or not DAMAGES[kind][1], f"{kind}: {hits} of {number}"


def test_lingua_is_a_second_opinion():
    pytest.importorskip("lingua")
    source = "The account repair process will begin."
    assert flags(source, "Der Account-Reparaturprozess beginnt.") == []
    assert flags(source, source) == ["source_language", "copied"]
