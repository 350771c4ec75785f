"""Which rows stay: filters of one row, keys for duplicates and for the held-out split.

A filter is a function of the row that says what it found, or None; it has no state and sees no other row.
Those of length stand in rendering.py and recipes/prepare.py, since they count tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoenix.data.formats import Conversation, Message, PreferencePair, Row, Text
from phoenix.data.language import CANDIDATES, reply_language
from phoenix.data.overlap import EvalIndex, strings
from phoenix.files import UserError, require

# In the order in which they are asked; the last two are decided over all rows.
FILTERS = (
    "empty", "equal_answers", "tie", "test_set", "language", "length_ratio", "refusal", "contaminated",
    "duplicate", "near_duplicate",
)  # fmt: skip


@dataclass(frozen=True)
class RowFilters:
    """The filters of one row that are switched on, with their settings.  Built once a process."""

    names: tuple[str, ...]
    # Characters of a translation per character of its source: outside stood 1 to 3 of 2,037 lines of WMT22
    # en-de, for each of four systems.
    length_ratio: tuple[float, float] = (0.5, 2.0)
    # Open-Platypus holds 564 of the 800 public questions of TheoremQA, UltraFeedback all of TruthfulQA.
    test_sets: tuple[str, ...] = ("theoremqa", "truthful_qa")
    eval_files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Raises UserError here, not at each row: a missing extra, test files that cannot be read, are not
        there, or are there without the filter."""
        if bool(self.eval_files) != ("contaminated" in self.names):
            given, other = ("eval_files", "contaminated")[:: 1 if self.eval_files else -1]
            raise UserError(f"{given} is set, but {other} is not; filters needs contaminated with eval_files")
        needed = {"language": ("py3langid.langid", "language"), "near_duplicate": ("datasketch", "data")}
        for name in needed.keys() & set(self.names):
            require(*needed[name])
        object.__setattr__(self, "eval_index", EvalIndex(self.eval_files))

    def why_dropped(self, row: Row, raw: dict[str, Any], language: str | None) -> tuple[str, str] | None:
        """(name of the first filter that drops the row, what it found); None if the row stays.

        raw: the row as it was read; language: the code that its answers are expected in, None: any.
        """
        for name in FILTERS:
            check = _CHECKS.get(name) if name in self.names else None
            if check and (found := check(self, row, raw, language)):
                return name, found
        return None


def empty(_filters: RowFilters, row: Row, _raw: dict, _expected: str | None) -> str | None:
    """A turn or a text without one visible character (zero-width and control characters are none)."""
    turns = enumerate(all_turns(row), 1)
    return next((f"turn {n}" for n, (role, text) in turns if role != "system" and not _visible(text)), None)


def equal_answers(_filters: RowFilters, row: Row, _raw: dict, _expected: str | None) -> str | None:
    """A pair whose two answers are the same, as a translation can make them."""
    if isinstance(row, PreferencePair) and _joined(_said(row.chosen)) == _joined(_said(row.rejected)):
        return row.chosen[-1]["content"][:60]
    return None


def tie(_filters: RowFilters, row: Row, _raw: dict, _expected: str | None) -> str | None:
    """A pair whose chosen answer is not rated higher than the rejected one; without ratings it stays."""
    if isinstance(row, PreferencePair) and row.scores and row.scores[0] <= row.scores[1]:
        return "{:g} and {:g}".format(*row.scores)
    return None


def test_set(filters: RowFilters, row: Row, raw: dict, _expected: str | None) -> str | None:
    """A row whose source or category is the name of a test set, but for case and punctuation."""
    names = {_plain(name) for name in filters.test_sets}
    stated = (row.source, *(raw.get(field) for field in ("source", "data_source", "dataset", "category")))
    return next((name for name in stated if isinstance(name, str) and _plain(name) in names), None)


def language(_filters: RowFilters, row: Row, _raw: dict, expected: str | None) -> str | None:
    """Answers whose prose is in another language than the expected one; what cannot be decided stays.

    A conversation is judged by all its answers together (one of them may be a translation that was asked
    for), a pair by each of its two.
    """
    if expected is None:
        return None
    turns = all_turns(row)
    answers = {turns[-1][0]: turns}
    if isinstance(row, PreferencePair):
        answers = {"chosen": _said(row.chosen), "rejected": _said(row.rejected)}
    asked = "\n".join(text for role, text in turns if role == "user")
    for name, turns in answers.items():
        text = "\n".join(text for role, text in turns if role in ("assistant", "text"))
        found = reply_language(text, asked, {*CANDIDATES, expected})
        if found not in (None, expected):
            return f"{name} is {found}"
    return None


def length_ratio(filters: RowFilters, row: Row, _raw: dict, _expected: str | None) -> str | None:
    """A translated row that is much shorter or longer than its source: cut, or a loop."""
    low, high = filters.length_ratio
    if row.length_ratio is None or low <= row.length_ratio <= high:
        return None
    return f"ratio {row.length_ratio:.2f}"


def refusal(_filters: RowFilters, row: Row, _raw: dict, _expected: str | None) -> str | None:
    """An assistant's turn that speaks of itself as an AI, or opens with a model's stock refusal (REFUSALS).

    Not what a user says, nor the rejected answer of a pair: it is learned to be avoided.  An answer about
    ChatGPT or OpenAI is none, unless it says "I" of them.
    """
    turns = (*row.prompt, *row.chosen) if isinstance(row, PreferencePair) else getattr(row, "messages", ())
    for turn in turns:
        if turn["role"] == "assistant":
            said = " ".join(turn["content"].replace("\u2019", "'").replace("\u02bc", "'").split())
            if found := _REFUSAL.search(said.lower().lstrip("\"„“»«'*_ ")):
                return found[0][:60]
    return None


def contaminated(filters: RowFilters, _row: Row, raw: dict, _expected: str | None) -> str | None:
    """A question of a test set in any string of the row, be it the original beside the translation."""
    return filters.eval_index.hit(strings(raw))


def row_keys(row: Row) -> tuple[int, int]:
    """64 bits that rows of one text share, of the whole row and of what draws its lot.

    The first is of all turns (a pair: prompt and both answers) or of a plain text; the second is of a pair's
    prompt, so that all pairs of one prompt land on one side, and equal to the first for other rows.  Unicode
    form, white space and letter case make no difference.  Two different rows among a million meet by chance
    with a probability of 3e-8.
    """
    if isinstance(row, PreferencePair):
        prompt, *answers = (_joined(_said(turns)) for turns in (row.prompt, row.chosen, row.rejected))
        return _key("\x1d".join((prompt, *answers))), _key(prompt)
    return (_key(_joined(all_turns(row))),) * 2


def lot(key: int, seed: int) -> float:
    """A number in [0, 1) drawn by a row's second key and the seed: a row always lands on the same side."""
    drawn = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=6).digest()
    return int.from_bytes(drawn, "big") / 2**48


def all_turns(row: Row) -> list[tuple[str, str]]:
    """(role, content) of all turns: of a pair those of the prompt, the chosen and the rejected answer."""
    if isinstance(row, Text):
        return [("text", row.text)]
    return _said(row.messages if isinstance(row, Conversation) else (*row.prompt, *row.chosen, *row.rejected))


def _said(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def _joined(turns: list[tuple[str, str]]) -> str:
    return "\x1e".join(f"{role}\x1f{_normal(text)}" for role, text in turns)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def _visible(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)


def _plain(name: str) -> str:
    """TIGER-Lab/TheoremQA, theorem_qa, TheoremQA.jsonl -> theoremqa"""
    return re.sub(r"[\W_]+", "", name.rsplit("/", 1)[-1].split(".")[0]).casefold()


# How models refuse and speak of themselves, language by language, in lower case; what begins with ^ opens an
# answer, since "Es tut mir leid, aber ich kann" stands within letters and stories, too.
_SENTENCE = r"[^.!?]{0,80}"
_AI_EN = (
    r"(?:large )?(?:ai|artificial intelligence|language model)(?: language)?(?: model| assistant| chatbot)?"
)
_AI_DE = (
    r"(?:ein\w* |rein\w* |groß\w* )*(?:ki|künstliche intelligenz|(?:ki-|ai-)?sprachmodell"
    r"|(?:ki|ai)[- ](?:assistent(?:in)?|modell|system|chatbot|programm))(?![\w-])"  # no "KI-Forscherin"
)
REFUSALS: dict[str, tuple[str, ...]] = {
    "en": (
        r"^i(?:'m| am) (?:very |really |truly )?sorry,? but i (?:can ?not|can't|am unable|am not able)",
        r"^i (?:cannot|can't) (?:fulfill?|comply with|assist with|provide|help with) (?:that|this|your)",
        rf"as an? {_AI_EN}(?:,|(?= i\b)){_SENTENCE}\b(?:i|i'm|my|me)",
        rf"i(?: am|'m) (?:just |only )?an? {_AI_EN}(?=[,.;:!?)]|$| (?:and|so|but|that|with|\w+ed)\b)",
        r"(?:my|the) knowledge cut-?off", r"my last (?:knowledge |training )?update",
        r"i(?: am|'m) chatgpt", rf"i (?:was|am|have been){_SENTENCE}\bby openai",
    ),
    "de": (
        r"^(?:es )?tut mir (?:sehr |wirklich )?leid, (?:aber )?(?:ich kann|das kann ich|als)",
        r"^entschuldigung, (?:aber )?(?:ich kann|das kann ich)",
        rf"als {_AI_DE}{_SENTENCE}\b(?:ich|mir|mich|mein\w*)", rf"ich\b[^.!?]{{0,30}}\bals {_AI_DE}",
        rf"ich bin (?:nur |bloß |lediglich )?(?:eine? )?{_AI_DE}", r"ich bin chatgpt",
        r"meine?[mns]? (?:letzte[rsn]? )?wissensstand\w*", r"stand meines wissens",
        r"meine?[mnrs]? letzten? (?:wissens-?|trainings-?)?(?:update|aktualisierung)",
        rf"ich (?:wurde|bin){_SENTENCE}\bvon openai",
    ),
}  # fmt: skip
_REFUSAL = re.compile(rf"\b(?:{'|'.join(itertools.chain(*REFUSALS.values()))})\b")
_CHECKS = {
    "empty": empty, "equal_answers": equal_answers, "tie": tie, "test_set": test_set, "language": language,
    "length_ratio": length_ratio, "refusal": refusal, "contaminated": contaminated,
}  # fmt: skip
