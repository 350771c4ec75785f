"""Damages good translations in the ways in which engines fail: kind -> function, in DAMAGES.

Each function takes a piece's source, its good translation, and a random generator, and gives (source, damaged
reply, finish reason), or None where the kind does not apply to this pair.  Nothing here imports the checks.
"""

import random
import re

Damaged = tuple[str, str, str] | None
END = re.compile(r"[.!?]$")
LONG_NUMBER = re.compile(r"(?<![\d.,:/])[1-9]\d+(?![.,:/]?\d)")
SMALL_NUMBER = re.compile(r"(?<![\d.,:/-])\b[2-9]\b(?![.,:/-]?\d)")


def cut_at_half(source: str, reply: str, rng: random.Random) -> Damaged:
    return _cut(source, reply, rng.uniform(0.3, 0.7)) if END.search(source) else None


def cut_at_the_end(source: str, reply: str, rng: random.Random) -> Damaged:
    return _cut(source, reply, rng.uniform(0.8, 0.97)) if END.search(source) else None


def cut_early_without_end_mark(source: str, reply: str, rng: random.Random) -> Damaged:
    if END.search(source) or len(source) < 60:
        return None
    return _cut(source, reply, rng.uniform(0.05, 0.3))


def cut_late_without_end_mark(source: str, reply: str, rng: random.Random) -> Damaged:
    return None if END.search(source) else _cut(source, reply, rng.uniform(0.7, 0.95))


def token_limit(source: str, reply: str, rng: random.Random) -> Damaged:
    cut = _cut(source, reply, rng.uniform(0.5, 1))
    return cut and (source, cut[1], "length")


def first_sentence_only(source: str, reply: str, rng: random.Random) -> Damaged:
    two = _several(source, reply, rng, 2)
    return two and (" ".join(two[0]), two[1][0], "stop")


def middle_sentence_missing(source: str, reply: str, rng: random.Random) -> Damaged:
    three = _several(source, reply, rng, 3)
    return three and (" ".join(three[0]), f"{three[1][0]} {three[1][2]}", "stop")


def empty(source: str, reply: str, rng: random.Random) -> Damaged:
    return source, rng.choice(["", "", " ", "-", "...", "\u200b", '""', "."]), "stop"


def english_left(source: str, reply: str, rng: random.Random) -> Damaged:
    return (source, source, "stop") if _letters(source) >= 20 else None


def english_left_and_edited(source: str, reply: str, rng: random.Random) -> Damaged:
    if _letters(source) < 30:
        return None
    edited = rng.choice([source.lower(), source.rstrip(".!?") + "!", source + " ", "- " + source])
    return source, re.sub(r"\b(?:a|an|the) ", "", edited, count=1), "stop"


def second_half_english(source: str, reply: str, rng: random.Random) -> Damaged:
    asked, said = source.split(" "), reply.split(" ")
    if len(asked) < 16:
        return None
    share = rng.uniform(0.35, 0.65)
    return source, " ".join(said[: int(len(said) * share)] + asked[int(len(asked) * share) :]), "stop"


def one_sentence_english(source: str, reply: str, rng: random.Random) -> Damaged:
    two = _several(source, reply, rng, 2)
    if not two or len(two[0][1].split(" ")) < 8:
        return None
    return " ".join(two[0]), f"{two[1][0]} {two[0][1]}", "stop"


def one_word_english(source: str, reply: str, rng: random.Random) -> Damaged:
    words = [word for word in re.findall(r"\b[a-z]{5,}\b", source) if word not in reply]
    said = list(re.finditer(r"\b[a-zäöüß]{5,}\b", reply))
    if not words or not said:
        return None
    match = rng.choice(said)
    return source, reply[: match.start()] + rng.choice(words) + reply[match.end() :], "stop"


def phrase_looped(source: str, reply: str, rng: random.Random) -> Damaged:
    words = reply.split(" ")
    length = rng.randint(2, 6)
    return (
        (source, reply + (" " + " ".join(words[-length:])) * rng.randint(4, 40), "stop")
        if len(words) > 6
        else None
    )


def word_looped(source: str, reply: str, rng: random.Random) -> Damaged:
    words = reply.split(" ")
    position = rng.randint(0, len(words) - 1)
    words[position : position + 1] = [words[position]] * rng.randint(4, 40)
    return (source, " ".join(words), "stop") if _letters(words[position]) else None


def sentence_said_again(source: str, reply: str, rng: random.Random) -> Damaged:
    if len(re.findall(r"\w+", reply)) < 5:
        return None
    return source, " ".join([reply] * rng.randint(2, 4)), "stop"


def looped_to_the_limit(source: str, reply: str, rng: random.Random) -> Damaged:
    looped = phrase_looped(source, reply, rng)
    return looped and (source, looped[1][: -rng.randint(1, 9)], "length")


def loop_found_by_the_engine(source: str, reply: str, rng: random.Random) -> Damaged:
    return source, reply + " " + " ".join(reply.split(" ")[-2:]), "repetition"


def letters_looped(source: str, reply: str, rng: random.Random) -> Damaged:
    cut = _cut(source, reply, rng.uniform(0.3, 0.9))
    return cut and (
        source,
        f"{cut[1]} {rng.choice(['a', 'ha', 'och', 'ß', 'er'])}" + rng.choice("ano") * 30,
        "stop",
    )


def mark_lost(source: str, reply: str, rng: random.Random) -> Damaged:
    marked, translated, number = _with_marks(source, reply, rng)
    return marked, translated.replace(f" [[{number}]]", ""), "stop"


def mark_twice(source: str, reply: str, rng: random.Random) -> Damaged:
    marked, translated, number = _with_marks(source, reply, rng)
    return marked, f"{translated} [[{number}]]", "stop"


def mark_of_another_number(source: str, reply: str, rng: random.Random) -> Damaged:
    marked, translated, number = _with_marks(source, reply, rng)
    return marked, translated.replace(f"[[{number}]]", f"[[{number % 3 + 1}]]"), "stop"


def mark_rewritten(source: str, reply: str, rng: random.Random) -> Damaged:
    marked, translated, number = _with_marks(source, reply, rng)
    other = rng.choice(
        [f"[{number}]", f"[[ {number} ]]", f"({number})", "[[eins]]", f"[[{number}]", f"»{number}«"]
    )
    return marked, translated.replace(f"[[{number}]]", other), "stop"


def url_in_place_of_its_mark(source: str, reply: str, rng: random.Random) -> Damaged:
    marked, translated, number = _with_marks(source, reply, rng)
    url = rng.choice(["https://www.beispiel.de/seite", "http://example.com", "www.example.org/a?b=c"])
    return marked, translated.replace(f"[[{number}]]", url), "stop"


def code_translated(source: str, reply: str, rng: random.Random) -> Damaged:
    marked, translated, number = _with_marks(source, reply, rng)
    code = rng.choice(
        ["`drucke(summe)`", "drucke(summe)", "`für x in liste`", "wenn x == 0:", "WÄHLE * AUS kunden"]
    )
    return marked, translated.replace(f"[[{number}]]", code), "stop"


def url_changed(source: str, reply: str, rng: random.Random) -> Damaged:
    before, after = rng.choice(
        [
            ("https://example.com/help", "https://beispiel.com/hilfe"),
            ("http://shop.example.org/a?id=3", "http://shop.example.org/a?id=4"),
            ("info@example.com", "info@beispiel.com"),
            ("www.example.com", "www.example.de"),
        ]
    )
    return f"{source} {before}", f"{reply} {after}", "stop"


def placeholder_translated(source: str, reply: str, rng: random.Random) -> Damaged:
    before, after = rng.choice(
        [
            ("{name}", "{Name}"),
            ("{count}", "{Anzahl}"),
            ("%s", "% s"),
            ("#PRS_ORG#", "#ORG#"),
            ("%(user)s", "%(nutzer)s"),
        ]
    )
    return f"{before} {source}", f"{after} {reply}", "stop"


def tag_changed(source: str, reply: str, rng: random.Random) -> Damaged:
    before, after = rng.choice(
        [
            ("<b>{}</b>", "<b>{}"),
            ("<i>{}</i>", "{}"),
            ('<a href="x">{}</a>', '<a href="y">{}</a>'),
            ("`{}`", "{}"),
        ]
    )
    return before.format(source), after.format(reply), "stop"


def digit_changed(source: str, reply: str, rng: random.Random) -> Damaged:
    def other(number: str) -> str:
        position = rng.randrange(len(number))
        digit = rng.choice([d for d in "123456789" if d != number[position]])
        return number[:position] + digit + number[position + 1 :]

    return _number(source, reply, rng, LONG_NUMBER, other)


def number_dropped(source: str, reply: str, rng: random.Random) -> Damaged:
    return _number(source, reply, rng, LONG_NUMBER, lambda number: "")


def number_scaled(source: str, reply: str, rng: random.Random) -> Damaged:
    if decimal := re.search(r"\b(\d+),(\d{1,2})\b", reply):
        if decimal[0].replace(",", ".") not in source:
            return None
        scaled = rng.choice(
            [decimal[1] + decimal[2], decimal[1] + decimal[2][0] + "," + (decimal[2][1:] or "0")]
        )
        return source, reply[: decimal.start()] + scaled + reply[decimal.end() :], "stop"
    return _number(source, reply, rng, LONG_NUMBER, lambda number: number + rng.choice(["0", "00", ".000"]))


def small_number_changed(source: str, reply: str, rng: random.Random) -> Damaged:
    return _number(
        source, reply, rng, SMALL_NUMBER, lambda number: rng.choice([d for d in "23456789" if d != number])
    )


def numbers_swapped(source: str, reply: str, rng: random.Random) -> Damaged:
    known = LONG_NUMBER.findall(source)
    found = [one for one in LONG_NUMBER.finditer(reply) if known.count(one[0]) == 1 == reply.count(one[0])]
    if len(found) < 2:
        return None
    first, second = found[:2]
    between = reply[first.end() : second.start()]
    return source, f"{reply[: first.start()]}{second[0]}{between}{first[0]}{reply[second.end() :]}", "stop"


def number_invented(source: str, reply: str, rng: random.Random) -> Damaged:
    addition = rng.choice([" im Jahr {}", " (Seite {})", " {} Euro", " Nr. {}"]).format(
        rng.randint(101, 9999)
    )
    words = reply.split(" ")
    position = rng.randint(1, len(words))
    return source, " ".join(words[:position]) + addition + " ".join(["", *words[position:]]), "stop"


def question_answered(source: str, reply: str, rng: random.Random) -> Damaged:
    if not source.endswith("?"):
        return None
    answer = reply.rstrip('?"“ ')
    answers = [
        "Ja, das ist richtig.",
        "Das weiß ich leider nicht.",
        f"Nein, {answer[:1].lower()}{answer[1:]}.",
    ]
    return (
        source,
        rng.choice([*answers, f"{reply} Ja, genau so ist es.", f"Das ist so, weil {answer}."]),
        "stop",
    )


def answered_at_length(source: str, reply: str, rng: random.Random) -> Damaged:
    return source, " ".join(rng.sample(TALK, min(len(TALK), len(source) // 30 + rng.randint(3, 9)))), "stop"


def refused(source: str, reply: str, rng: random.Random) -> Damaged:
    return source, rng.choice(REFUSALS), "stop"


def preamble(source: str, reply: str, rng: random.Random) -> Damaged:
    return source, rng.choice(PREAMBLES) + reply, "stop"


def comment_added(source: str, reply: str, rng: random.Random) -> Damaged:
    return source, reply + rng.choice(COMMENTS), "stop"


def prompt_repeated(source: str, reply: str, rng: random.Random) -> Damaged:
    order = f"Translate this from English to German: English: {source} German: "
    return (
        source,
        rng.choice([order, order.lower(), f"English: {source} German: ", "German: "]) + reply,
        "stop",
    )


def next_example(source: str, reply: str, rng: random.Random) -> Damaged:
    form = rng.choice(["{}\nEnglish: {}", "{} English: {}", "{}\n\n{}", "{}\nDeutsch: {}", "{} Englisch: {}"])
    return source, form.format(reply, rng.choice(TALK)), "stop"


def control_tokens(source: str, reply: str, rng: random.Random) -> Damaged:
    form = rng.choice(
        ["{}<|im_end|>", "{}</s>", "[INST] {}", "{} [/INST]", "<|assistant|> {}", "### Response: {}"]
    )
    return source, form.format(reply), "stop"


def wrong_encoding(source: str, reply: str, rng: random.Random) -> Damaged:
    garbled = [
        re.sub(r"[äöüßÄÖÜ]+", lambda match: match[0].encode().decode("cp1252", "replace"), reply),
        re.sub(r"[äöüßÄÖÜ]", "\ufffd", reply),
        re.sub(r"[äöüßÄÖÜ]", lambda match: f"\\u{ord(match[0]):04x}", reply),
    ]
    return (source, rng.choice(garbled), "stop") if garbled[1] != reply else None


def other_script(source: str, reply: str, rng: random.Random) -> Damaged:
    words = reply.split(" ")
    position = rng.randrange(len(words))
    words[position] = rng.choice(["перевод", "翻訳", "번역", "ترجمة", "μετάφραση", "翻译"])
    return source, " ".join(words), "stop"


def other_language(source: str, reply: str, rng: random.Random) -> Damaged:
    return source, rng.choice(OTHERS), "stop"


def other_segment(source: str, reply: str, rng: random.Random) -> Damaged:
    return source, rng.choice([line for line in TALK if abs(len(line) - len(source)) < 40] or TALK), "stop"


def negation_dropped(source: str, reply: str, rng: random.Random) -> Damaged:
    return (source, reply.replace(" nicht", "", 1), "stop") if " nicht" in reply else None


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))


def _cut(source: str, reply: str, share: float) -> Damaged:
    """The first words of a reply, without what follows; None if nothing is lost or nothing left."""
    words = reply.split(" ")
    number = max(1, int(len(words) * share))
    return (source, " ".join(words[:number]).rstrip(".!?…"), "stop") if number < len(words) else None


def _several(source: str, reply: str, rng: random.Random, number: int) -> tuple[list[str], list[str]] | None:
    """The pair between others, as one piece; each of its sentences is a fifth of it or more."""
    if not (END.search(source) and END.search(reply)) or not 40 <= len(source) <= 130:
        return None
    others = rng.sample(PAIRS, number - 1)
    pairs = [(source, reply), *others]
    rng.shuffle(pairs)
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _with_marks(source: str, reply: str, rng: random.Random) -> tuple[str, str, int]:
    """The pair with 1 to 3 marks at its end, as after "see", and the number of one of them."""
    count = rng.randint(1, 3)
    marks = "".join(f" [[{number}]]" for number in range(1, count + 1))
    return source + marks, reply + marks, rng.randint(1, count)


def _number(source: str, reply: str, rng: random.Random, pattern: re.Pattern, other) -> Damaged:
    """Exchange one number of the reply that the source has as well."""
    known = pattern.findall(source)
    found = [
        match for match in pattern.finditer(reply) if known.count(match[0]) == 1 == reply.count(match[0])
    ]
    if not found:
        return None
    match = rng.choice(found)
    return source, reply[: match.start()] + other(match[0]) + reply[match.end() :], "stop"


PAIRS = [
    (
        "The library stays open until late in the evening.",
        "Die Bibliothek bleibt bis spät am Abend geöffnet.",
    ),
    (
        "Nobody knew where the old key had been hidden.",
        "Niemand wusste, wo der alte Schlüssel versteckt worden war.",
    ),
    ("Fresh bread smells best early in the morning.", "Frisches Brot riecht am frühen Morgen am besten."),
    (
        "Her brother repairs bicycles in a small workshop.",
        "Ihr Bruder repariert Fahrräder in einer kleinen Werkstatt.",
    ),
    (
        "The river rises every spring when the snow melts.",
        "Der Fluss steigt jeden Frühling, wenn der Schnee schmilzt.",
    ),
    (
        "Please close the window before you leave the room.",
        "Bitte schließen Sie das Fenster, bevor Sie gehen.",
    ),
]
TALK = [
    "Regen fällt leise auf das Dach und wäscht den Staub von den Blättern.",
    "Zuerst sollten wir klären, was mit dieser Frage eigentlich gemeint ist.",
    "Viele Menschen trinken am Morgen Kaffee, andere lieber eine Tasse Tee.",
    "Ein guter Anfang ist ein ruhiger Ort, an dem niemand stört.",
    "Danach vergleicht man die Ergebnisse und schreibt sie in eine Tabelle.",
    "Im Norden ist es kühler, im Süden scheint dafür öfter die Sonne.",
    "Wer täglich übt, macht nach wenigen Wochen deutliche Fortschritte.",
    "Die wichtigste Zutat bleibt die Geduld, auch wenn es lange dauert.",
    "Außerdem lohnt es sich, vorher mit einem Fachmann zu sprechen.",
    "Manche Tiere schlafen den ganzen Winter und wachen erst im März auf.",
    "Das Programm liest eine Datei und gibt jede Zeile einzeln aus.",
    "Am Ende zählt vor allem, dass alle Beteiligten zufrieden sind.",
    "Ein Spaziergang am See tut gut, besonders nach einem langen Tag.",
    "Historisch gesehen war diese Stadt lange ein Zentrum des Handels.",
    "Mit etwas Glück findet man auf dem Markt noch reife Pflaumen.",
    "Die Theorie erklärt, warum sich Licht an einer Kante beugt.",
]
REFUSALS = [
    "Es tut mir leid, aber dabei kann ich nicht helfen.",
    "Als KI-Sprachmodell habe ich dazu keine Meinung.",
    "Als künstliche Intelligenz kann ich diese Frage nicht beantworten.",
    "Tut mir leid, diesen Text darf ich nicht übersetzen.",
    "Ich kann diese Anfrage leider nicht bearbeiten.",
    "I'm sorry, but I can't help with that request.",
    "As an AI language model, I cannot translate this text.",
    "Entschuldigung, das verstehe ich nicht.",
]
PREAMBLES = [
    "Hier ist die Übersetzung: ", "Natürlich! Hier ist die Übersetzung: ", "Die Übersetzung lautet: ",
    "Gerne, hier ist der Satz auf Deutsch: ", "Sure! Here is the translation: ", "Übersetzung: ", "Klar! ",
    "Here's the German translation: ", "Hier ist eine mögliche Übersetzung des Textes: ",
]  # fmt: skip
COMMENTS = [
    " (Anmerkung: Der Name wurde nicht übersetzt.)", " Ich hoffe, das hilft!", " (Die Übersetzung ist frei.)",
    " Lassen Sie mich wissen, ob Sie weitere Hilfe brauchen.", "\n\nHinweis: Das Wort ist mehrdeutig.",
    " Note: This is a literal translation of the sentence.",
]  # fmt: skip
OTHERS = [
    "La bibliothèque reste ouverte jusque tard dans la soirée, même en hiver.",
    "Personne ne savait où la vieille clé avait été cachée par le voisin.",
    "De bibliotheek blijft tot laat in de avond open, ook in de winter.",
    "Niemand wist waar de oude sleutel door de buurman was verstopt.",
    "La biblioteca permanece abierta hasta tarde, también en invierno.",
    "Nessuno sapeva dove il vicino avesse nascosto la vecchia chiave.",
    "Biblioteket er åbent til sent om aftenen, også om vinteren.",
]

# Kind -> (function, whether the two texts show it).
DAMAGES = {
    function.__name__: (function, is_known)
    for is_known, functions in {
        True: [
            cut_at_half, cut_at_the_end, cut_early_without_end_mark, token_limit, first_sentence_only,
            middle_sentence_missing, empty, english_left, english_left_and_edited, second_half_english,
            one_sentence_english, phrase_looped, word_looped, sentence_said_again, looped_to_the_limit,
            loop_found_by_the_engine, letters_looped, mark_lost, mark_twice, mark_of_another_number,
            mark_rewritten, url_in_place_of_its_mark, code_translated, url_changed, placeholder_translated,
            tag_changed, digit_changed, number_dropped, number_scaled, small_number_changed, numbers_swapped,
            number_invented, question_answered, answered_at_length, refused, preamble, prompt_repeated,
            next_example, control_tokens, wrong_encoding, other_script,
            other_language,
        ],
        False: [
            cut_late_without_end_mark, comment_added, one_word_english, other_segment, negation_dropped,
        ],
    }.items()
    for function in functions
}  # fmt: skip
