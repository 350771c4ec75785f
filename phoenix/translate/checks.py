"""Judges a translated piece by its source: empty, cut, looping, not translated, answered, something lost.

A flag is a suspicion from the form of two texts, not from their meaning: a wrong word is not seen.  The
thresholds were set on WMT22 en-de (ALMA-13B's lines and human ones) and on 14,211 human pairs of earlier WMT
years; `docs/translate.md` says how often each flag is wrong there, and what it finds in damaged output.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phoenix.data.language import loops, prose, reply_language, words
from phoenix.files import UserError, require
from phoenix.translate.segments import MARK

if TYPE_CHECKING:
    from phoenix.translate.language import Language
    from phoenix.translate.segments import Piece

# Whether a flag fails a piece, or is only noted: headings and buttons are rightly copied, and people move the
# numbers of one line out of ten that has several.
FLAGS = {
    "empty": True, "source_language": True, "length_ratio": True, "repetition": True, "truncated": True,
    "spans": True, "numbers": True, "answered": True, "prompt_leak": True, "garbled": True,
    "numbers_moved": False, "copied": False,
}  # fmt: skip
SHORT, LONG = 40, 150  # characters of a source from which on the first and the second length ratio hold
LETTERS = 20  # below, identification of a language is guessing
PART_WORDS, PART_LETTERS = 7, 40  # of a clause that is identified by itself
LAST = 8000  # characters of a reply that are judged: a longer one is a loop
# Names of control tokens in use (Llama, Mistral, ChatML, Gemma, BERT) that a server's tokenizer may parse.
CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c<>]{1,40}\uff5c>|</?s>|<(?:unk|pad|mask|bos|eos)>"
    r"|</?(?:start|end)_of_\w+>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_\w+|SYSTEM_PROMPT|IMG)\]|<</?SYS>>"
)
COPIED_WORDS = 5  # in a row, 3 of them in lower case, that a translation has from its source


def check(piece: Piece, reply_text: str, finish_reason: str, language: Language) -> list[str]:
    """The flags (see FLAGS) of a reply to a piece, in the order of FLAGS; none for a good one.

    reply_text: the translation with its marks.  finish_reason: why generation ended; "stop" is the good one,
    "repetition" that of an engine that detects loops, any other means that the reply is not whole.
    "empty" stands alone.  Needs py3langid (extra `translate`).
    """
    source, reply = (
        _LONG_WORD.sub(r"\1", MARK.sub(" ", text)).strip() for text in (piece.source, reply_text[-LAST:])
    )
    if words(piece.source) and not words(reply_text):
        return ["empty"]
    flags = set()
    if finish_reason == "repetition":
        flags.add("repetition")
    elif finish_reason != "stop":
        flags.add("truncated")
    if Counter(MARK.findall(piece.source)) != Counter(MARK.findall(reply_text)):
        flags.add("spans")
    if reply == source:
        flags |= {"copied"} if words(source) else set()
        flags |= {"source_language"} if _left_in_source(source, reply, language) else set()
    else:
        flags |= {name for name, is_found in _CHECKS.items() if is_found(source, reply, language)}
    return [name for name in FLAGS if name in flags]


def register(texts: Sequence[str], language: Language) -> str | None:
    """How the texts of a conversation address the reader: "formal", "informal", "mixed"; None if not at all.

    What stands in quotation marks does not count: there somebody else speaks.
    """
    text = "\n".join(_QUOTED.sub(" ", text) for text in texts)
    found = [any(_addresses(word, text) for word in group) for group in (language.formal, language.informal)]
    return {(True, True): "mixed", (True, False): "formal", (False, True): "informal"}.get(tuple(found))


def score(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Corpus chrF and BLEU by sacrebleu, one reference a line: {"chrf", "bleu", "chrf_signature", ...}.

    Needs sacrebleu (extra `translate`).  Raises ValueError if the numbers of lines differ or are 0.
    """
    if len(hypotheses) != len(references) or not hypotheses:
        raise ValueError(f"got {len(hypotheses)} hypotheses and {len(references)} references")
    metrics = require("sacrebleu.metrics", extra="translate")
    result: dict[str, Any] = {}
    for name, metric in (("chrf", metrics.CHRF()), ("bleu", metrics.BLEU())):
        result[name] = metric.corpus_score(list(hypotheses), [list(references)]).score
        result[f"{name}_signature"] = str(metric.get_signature())
    return result


def check_scoring(references: str | None, model: Path | None) -> None:
    """UserError if `score` and, with a model, `comet_score` could not score in the end."""
    if references:
        require("sacrebleu", "translate")
    if model is None:
        return
    if importlib.util.find_spec("comet") is None:
        raise UserError(
            "comet_model needs the package unbabel-comet, which wants an older numpy; put the rows together "
            "in an environment of its own (pip install unbabel-comet phoenix-lm), or leave comet_model out"
        )
    if not (model.is_file() and references):
        raise UserError(f"comet_model: {model} is no file, or references are not stated; correct that")


def comet_score(texts: Iterable[tuple[str, str, str]], model: Path) -> dict[str, Any]:
    """COMET's system score of (source, hypothesis, reference), on the processor: {"comet", "comet_model"}.

    model: a checkpoint as comet 2 keeps it, hparams.yaml one folder above; comet loads it, nothing of it is
    fetched.
    """
    rows = [dict(zip(("src", "mt", "ref"), row)) for row in texts]
    try:
        scorer = importlib.import_module("comet").load_from_checkpoint(str(model), local_files_only=True)
        score = scorer.predict(rows, batch_size=8, gpus=0).system_score
    except Exception as error:  # comet itself raises Exception
        words = " ".join(str(error).split())[:300]
        raise UserError(f"comet cannot score with {model}: {words}; leave comet_model out") from error
    return {"comet": float(score), "comet_model": str(model)}


def _left_in_source(source: str, reply: str, language: Language) -> bool:
    """The reply, a clause of it, or a run of words from the source, is in the source language."""
    text = prose(reply)
    if len(_SYMBOL.findall(text)) > len(text) / 20:  # code outside of any fence
        return False
    parts = [part for part in re.split(r"(?<=[.!?:;,])\s+", text) if len(words(part)) >= PART_WORDS]
    if any(_is_source(part, language, PART_LETTERS) for part in parts) or _is_source(text, language, LETTERS):
        return True
    known = set(_runs(_WORD.findall(source), COPIED_WORDS))
    copies = [run for run in _runs(_WORD.findall(text), COPIED_WORDS) if run in known]
    copies = [run for run in copies if sum(word.islower() for word in run) >= 3]
    return any(_is_source(" ".join(run), language, 0) for run in copies)


def _is_source(text: str, language: Language, letters: int) -> bool:
    """py3langid, and lingua where it is installed, take the text for the source language."""
    codes = (language.source_code, language.code)
    if reply_language(text, candidates=codes, min_words=1, min_letters=letters) != language.source_code:
        return False
    detector = _lingua(codes)
    found = detector.detect_language_of(text) if detector else None
    return found is None or found.iso_code_639_1.name.lower() == language.source_code


@functools.cache
def _lingua(codes: tuple[str, ...]) -> Any:
    """lingua's detector of these languages; None if it is not installed, or does not know one of them."""
    try:
        lingua = require("lingua", extra="language")
    except UserError:
        return None
    known = [getattr(lingua.IsoCode639_1, code.upper(), None) for code in codes]
    if None in known:
        return None
    return lingua.LanguageDetectorBuilder.from_iso_codes_639_1(*known).build()


def _wrong_length(source: str, reply: str, language: Language) -> bool:
    low, high = language.long_length_ratio if len(source) >= LONG else language.length_ratio
    if len(source) >= SHORT:
        return not low * len(source) <= len(reply) <= high * len(source)
    return not low * len(source) - 3 <= len(reply) <= high * len(source) + 20


def _repeats(source: str, reply: str, _language: Language) -> bool:
    """A loop, 5 words in a row twice, or up to 4 words three times at once; nothing such in the source."""
    if loops(reply) and not loops(source):
        return True
    if _STUTTER.search(reply) and not _STUTTER.search(source):
        return True
    said, asked = words(reply), words(source)
    return (_has_twice(said, 5) and not _has_twice(asked, 3)) or (_thrice(said) and not _thrice(asked))


def _cut(source: str, reply: str, _language: Language) -> bool:
    """The end mark or a closing bracket is missing, or a sentence of several."""
    if _END.search(source) and not _END.search(reply):
        return True
    if reply[-1:] in _DANGLING and source[-1:] not in _DANGLING:
        return True
    if _open_brackets(reply) and not _open_brackets(source):
        return True
    return _sentences(reply) < _sentences(source) and len(reply) < len(source)


def _spans_changed(source: str, reply: str, _language: Language) -> bool:
    """URLs, addresses, tags and placeholders outside of marks are not those of the source."""
    return Counter(_SPAN.findall(source)) != Counter(_SPAN.findall(reply))


def _numbers_changed(source: str, reply: str, language: Language) -> bool:
    """A number is missing and not written as a word, or a long one, or one in place of another, is new.

    Writing is free: 1,234.5 may be 1.234,5 or 1234,5, and 7:30 pm may be 19.30.
    """
    missing, extra = _compare_numbers(source, reply)
    if re.search(r"\dp\.?m\b|\bp\.?\s?m\b", source, re.IGNORECASE):
        for hour in [one for one in missing if len(one) < 3 and str(int(one) + 12) in extra]:
            missing.remove(hour)
            extra.remove(str(int(hour) + 12))
    said = words(reply)
    for number in list(missing):
        word = language.number_words.get(number)
        if len(number) == 4 and number[2:] in extra:  # the 1970s: die 70er
            missing.remove(number)
            extra.remove(number[2:])
        elif word and any(one.startswith(word) for one in said):
            missing.remove(number)
    return any(len(number) > 1 for number in missing) or bool(
        extra and (missing or any(len(number) > 2 for number in extra))
    )


def _numbers_moved(source: str, reply: str, _language: Language) -> bool:
    """Numbers that stand once in both stand in another order."""
    before, after = (
        [part for one in _NUMBER.findall(text) for part in _parts(one)] for text in (source, reply)
    )
    once = {part for part in before if len(part) > 1 and before.count(part) == 1 == after.count(part)}
    return [part for part in before if part in once] != [part for part in after if part in once]


def _compare_numbers(source: str, reply: str) -> tuple[list[str], list[str]]:
    """Digits of the numbers that the reply lacks, and that it has in addition."""
    pool = [(one, _readings(one)) for one in _NUMBER.findall(reply)]
    lost = []
    for number in _NUMBER.findall(source):
        readings = _readings(number)
        same = next((entry for entry in pool if entry[1] & readings), None)
        pool.remove(same) if same else lost.append(number)
    # Parts by themselves: a date turned round, "3.00 pm" that is "15 Uhr".
    pieces, extra = (
        Counter(part for one in many for part in _parts(one)) for many in (lost, [one for one, _ in pool])
    )
    return list((pieces - extra).elements()), [part for part in (extra - pieces).elements() if part != "0"]


def _readings(number: str) -> set[tuple[str, ...]]:
    """1,234.5 -> (1, 234, 5) and (1234, 5): its parts, and the parts with groups of three digits joined."""
    parts, marks = re.split(r"\D", number), re.findall(r"\D", number)
    readings = {tuple(_parts(number))}
    for end in (len(parts), len(parts) - 1):
        grouped = end >= 2 and len(parts[0]) <= 3 and all(len(part) == 3 for part in parts[1:end])
        is_group = grouped and len(set(marks[: end - 1])) == 1 and marks[0] not in ":/-"
        if is_group and marks[end - 1 :] != marks[:1]:
            readings.add(("".join(parts[:end]), *parts[end:]))
    if re.fullmatch(r"\d0", parts[-1]):  # 1.8 m: 1,80 m
        readings |= {(*one[:-1], parts[-1][0]) for one in readings if len(one) > 1}
    return readings


def _parts(number: str) -> list[str]:
    return [part.lstrip("0") or ("0" if len(part) < 3 else "000") for part in re.split(r"\D", number)]


def _answers(source: str, reply: str, language: Language) -> bool:
    """A question that is none any more, an opening of an answer, a further line or sentence."""
    if _QUESTION.search(source) and not _QUESTION.search(reply):
        return True
    if "\n" in reply or (_sentences(reply) > _sentences(source) and len(reply) > 1.5 * len(source)):
        return True
    answers = reply.lstrip("\"„“«'*").startswith((*language.answers, *_OPENINGS))
    return answers and not _POLITE.search(source[:30])


def _leaks(source: str, reply: str, language: Language) -> bool:
    """Labels and orders of the prompt, or control tokens of a chat template, that the source has not."""
    labels = [f"{language.source}:", f"{language.name}:", f"to {language.name}", "Translate this"]
    labels += language.leaks
    leaks, leaked = ([label for label in labels if label.lower() in text.lower()] for text in (source, reply))
    if leaked and not leaks:
        return True
    return bool(_CONTROL.search(reply)) and not _CONTROL.search(source)


def _garbled(source: str, reply: str, language: Language) -> bool:
    """Wrong encoding, escapes, control characters, or letters of a script that the source has not."""
    if _MOJIBAKE.search(reply) and not _MOJIBAKE.search(source):
        return True
    return bool(_scripts(reply) - _scripts(source) - {"LATIN", *_scripts("".join(language.answers))})


def _scripts(text: str) -> set[str]:
    letters = {character for character in text if ord(character) > 0x24F and character.isalpha()}
    return {unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters}


def _sentences(text: str) -> int:
    return max(1, len(_SENTENCE_END.findall(_ABBREVIATION.sub("x", text))))


def _open_brackets(text: str) -> bool:
    return any(text.count(pair[0]) != text.count(pair[1]) for pair in ("()", "[]", "{}"))


def _runs(items: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return list(zip(*(items[start:] for start in range(length))))


def _has_twice(items: list[str], length: int) -> bool:
    runs = _runs(items, length)
    return len(set(runs)) < len(runs)


def _thrice(items: list[str]) -> bool:
    return any(
        items[i : i + k] == items[i + k : i + 2 * k] == items[i + 2 * k : i + 3 * k]
        for k in range(1, 5)
        for i in range(len(items) - 3 * k + 1)
    )


def _addresses(word: str, text: str) -> bool:
    """A word in lower case in any case; a capitalised one as it is, and not where a sentence begins."""
    if word == word.lower():
        return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None
    return re.search(rf"[\w,;)]\s+{re.escape(word)}\b", text) is not None


_CHECKS = {
    "source_language": _left_in_source,
    "length_ratio": _wrong_length,
    "repetition": _repeats,
    "truncated": _cut,
    "spans": _spans_changed,
    "numbers": _numbers_changed,
    "answered": _answers,
    "prompt_leak": _leaks,
    "garbled": _garbled,
    "numbers_moved": _numbers_moved,
}

_LONG_WORD = re.compile(r"([!-~]{200})[!-~]+")  # some patterns take quadratic time on one
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SYMBOL = re.compile(r"[{}()\[\];=<>_\\|&]")
_END = re.compile(r"[.!?…:;。？！][\W_]*$")
_QUESTION = re.compile(r"[?？][\"'”“’»)\]\s*_]*$")
_DANGLING = frozenset(",-(–„")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”“’»)\]]*(?=\s+[\"„“«(¿¡]?[^\W\d_a-zß-ÿ]|\s*$)")
_ABBREVIATION = re.compile(
    r"\b(?:[^\W\d_]|Mr|Mrs|Ms|Dr|St|Sen|Rep|Gov|No|vs|bzw|ca|Nr|Prof|Jr|Sr|Inc|Corp|Co|\d{1,2})\."
)
_STUTTER = re.compile(r"([^\W\d_]{1,3}?)\1{7,}")
_NUMBER = re.compile(r"\d+(?:(?:[.,:'’/-]|[\u00a0\u202f\u2009 ](?=\d{3}(?!\d)))\d+)*")
_SPAN = re.compile(
    r"https?://[^\s<>\"]*[\w/]|\bwww\.[^\s<>\"]*\w|[\w.+-]+@[\w-]+\.\w+|#\w+#|`[^`\n]+`|\{\w*\}|%\(\w+\)[sd]"
    r"|(?<![\w%])%[sdif]\b|</?[a-zA-Z][^<>\n]*>|\$\$[^$]+\$\$|\\[a-zA-Z]+(?=\W)"
)
_MOJIBAKE = re.compile(
    r"\ufffd|Ã[\x80-\xbf„“”‘’–—•…™š›œžŸŠ‹ŒŽ]|â€|\\u[0-9a-fA-F]{4}|[\x00-\x08\x0e-\x1f\x7f]"
)
_CONTROL = re.compile(rf"{CONTROL.pattern}|<\|\w+\|>|### ")
_QUOTED = re.compile(r"„[^“”\"]{0,999}[“”\"]|“[^”]{0,999}”|\"[^\"\n]{0,999}\"|«[^»]{0,999}»|»[^«]{0,999}«")
_OPENINGS = "Sure,|Sure!|Of course|Certainly|Here is|Here's|Here are|As an AI|I'm sorry|I cannot".split("|")
# What such an opening may translate.
_POLITE = re.compile(
    r"\b(?:sure|of course|certain\w*|absolutely|here|this is|that's|these are|sorry|apolog\w+|can|cannot"
    r"|can't|as an?|natural\w*|gladly|happy|glad|pleasure|love|like|yes|yeah|no problem|okay|ok|clear\w*"
    r"|great|obvious\w*|definitely|all right|excuse\w*|answers?|unable|safe\w*|secure\w*)\b",
    re.IGNORECASE,
)
