"""Which language a reply is written in, and whether it says anything: prose rule, echoes, loops, copies.

Everything works on words (runs of letters or digits, lower-cased), so markup, spacing and punctuation change
nothing.  The thresholds were set on the shipped sample, none of whose answers echoes or loops.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from phoenix.files import UserError, require

# Without its neighbours, Dutch would be called German or English; with all languages, "Ja, gerne!" is Danish.
CANDIDATES = ("de", "en", "nl", "da", "fr")
MIN_WORDS, MIN_LETTERS = 5, 20  # below, identification of a language is guessing
QUOTE = 8  # words in a row that a reply has from its prompt by copying, not by chance
TAIL = 80  # words at the end of a reply in which a loop shows
COPY = 12  # words in a row that nobody writes twice by chance


def reply_language(
    text: str,
    prompt: str = "",
    candidates: Collection[str] = CANDIDATES,
    *,
    min_words: int = MIN_WORDS,
    min_letters: int = MIN_LETTERS,
) -> str | None:
    """Language code of the prose of a reply, one of `candidates`; None if too little prose is left to decide.

    Needs py3langid (extra `language`).  Raises UserError without it, and for a code that it does not know.
    """
    identifier, text = _identifier(tuple(sorted(candidates))), prose(text, prompt)
    letters = re.findall(r"[^\W\d_]+", text)
    if len(letters) < min_words or sum(map(len, letters)) < min_letters:
        return None
    return identifier.classify(" ".join(text.split()))[0]


def prose(text: str, prompt: str = "") -> str:
    """The text without code, URLs, formulas, JSON, table rules, block quotes, and copies from the prompt.

    A fence or a JSON object that is never closed counts to the end of the text: replies are cut.
    """
    for pattern in _NOT_PROSE:
        text = pattern.sub(" ", text)
    text = re.sub(r"[|*_#~=]+|-{2,}", " ", text)  # the cells of a table and marked words are prose
    return _without_copies(text, words(prompt)) if prompt else text


def words(text: str) -> list[str]:
    """Runs of letters or digits, lower-cased."""
    return [word.lower() for word in re.findall(r"[^\W_]+", text)]


def echoes(reply: str, prompt: str) -> bool:
    """Whether a reply repeats its prompt: begins with all of it, or more than half of its words are copies.

    A prompt below 5 words cannot be echoed ("Guten Morgen!"); a copy is a run of 8 words of the prompt, or of
    the whole prompt if it is shorter.
    """
    said, asked = words(reply), words(prompt)
    if len(asked) < MIN_WORDS or not said:
        return False
    if said[: len(asked)] == asked:
        return True
    return sum(_copied(said, asked, min(QUOTE, len(asked)))) > len(said) / 2


def loops(reply: str) -> bool:
    """Whether a reply ends in a loop: a line or a text over and over, or few distinct word 3-grams.

    A line of at least 3 words at least three times and in every third line (a poem may have a refrain), a
    text of 2 to 100 characters at least 5 times up to the end, or less than 6 of 10 distinct 3-grams in the
    last 80 words (the sample's answers have 9 of 10 and more, a training plan in a table 7).  In the last
    rule numbers do not count, so that a numbered list of one sentence is a loop.
    """
    lines = [tuple(words(line)) for line in reply.splitlines()]
    lines = [line for line in lines if len(line) >= 3]
    if any(lines.count(line) >= max(3, len(lines) / 3) for line in set(lines)):
        return True
    # Rules of tables and rows of dots are no speech.
    if re.search(r"(\S.{1,99}?)\1{4,}\S{0,99}\s*$", re.sub(r"[-=_*.|:\s]+", " ", reply)):
        return True
    tail = [word for word in words(reply) if not word.isdigit()][-TAIL:]
    runs = list(_runs(tail, 3))
    return len(runs) >= 20 and len(set(runs)) < 0.6 * len(runs)


def run_index(texts: Iterable[str], length: int = COPY) -> set[int]:
    """Hashes of all runs of `length` words of the texts, for `repeats_training`."""
    return {hash(run) for text in texts for run in _runs(words(text), length)}


def repeats_training(reply: str, index: set[int], length: int = COPY) -> bool:
    """Whether a reply has `length` words in a row from the texts behind `index`."""
    return any(hash(run) in index for run in _runs(words(reply), length))


def _runs(sequence: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(sequence[start:] for start in range(length)))


def _copied(said: list[str], asked: list[str], length: int) -> list[bool]:
    """For each word said, whether it stands in a run of `length` words that the prompt has too."""
    known, copied = set(_runs(asked, length)), [False] * len(said)
    for start, run in enumerate(_runs(said, length)):
        if run in known:
            copied[start : start + length] = [True] * length
    return copied


def _without_copies(text: str, asked: list[str]) -> str:
    copied = iter(_copied(words(text), asked, QUOTE))
    return re.sub(r"[^\W_]+", lambda match: "" if next(copied, False) else match[0], text)


@functools.cache
def _identifier(candidates: tuple[str, ...]) -> Any:
    langid = require("py3langid.langid", extra="language")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    if unknown := {*candidates} - {*identifier.nb_classes}:
        raise UserError(f"language is {min(unknown)!r}; expected a code that py3langid knows, such as 'de'")
    identifier.set_languages(candidates)
    return identifier


_NOT_PROSE = [
    re.compile(r"(```|~~~).*?(\1|\Z)", re.DOTALL),  # fenced code
    re.compile(r"`[^`\n]*`"),
    re.compile(r"^[ \t]*>.*$", re.MULTILINE),  # block quote
    re.compile(r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)", re.DOTALL),  # formulas
    re.compile(r"\$[^$\s][^$\n]*[^$\s]\$(?!\d)"),
    re.compile(r"\b(?:https?://|www\.)\S+|\S+@\S+\.\w+"),
    re.compile(
        r"^\s*[\[{]\s*(?:\"|\[|\{|\n).*?(?:^\s*[\]}][ \t]*$|\Z)", re.DOTALL | re.MULTILINE
    ),  # JSON over lines
    re.compile(r"[\[{]\s*\"[^\n]*[\]}]"),  # JSON in one line
    re.compile(r"^\s*\"[^\"\n]+\"\s*:.*$", re.MULTILINE),  # a JSON entry without its object
    re.compile(r"</?[a-zA-Z][^>\n]*>"),
]
