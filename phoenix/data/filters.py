"""Which rows stay: filters of one row, keys for duplicates and for the held-out split.

A filter is a function of the row that says what it found, or None; it has no state and sees no other row.
Those of length stand in rendering.py and recipes/prepare.py, since they count tokens.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from phoenix.data.formats import Conversation, Message, PreferencePair, Row, Text
from phoenix.data.language import CANDIDATES, reply_language
from phoenix.data.overlap import EvalIndex, plain_form, strings
from phoenix.files import UserError, require

# Printed without ink: fillers of Hangul, the empty pattern of Braille, joiners, selectors of a variant.
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10)))


class RowFilters:
    """The filters of one row that are switched on, with their settings.  Built once a process."""

    def __init__(
        self,
        names: Collection[str],
        # Characters of a translation per character of its source: outside stood 1 to 3 of 2,037 lines of
        # WMT22 en-de, for each of four systems.
        length_ratio: tuple[float, float] = (0.5, 2.0),
        # Open-Platypus holds 564 of the 800 public questions of TheoremQA, UltraFeedback all of TruthfulQA.
        test_sets: tuple[str, ...] = ("theoremqa", "truthful_qa"),
        eval_files: tuple[Path, ...] = (),
        languages: Collection[str | None] = (),
    ) -> None:
        """languages: those that `why_dropped` will be asked for.

        Raises UserError here, not at each row: a missing extra, a language that nothing tells, a ratio
        that no row can have, test files that cannot be read, are not there, or are there without the filter.
        """
        if bool(eval_files) != ("contaminated" in names):
            given, other = ("eval_files", "contaminated")[:: 1 if eval_files else -1]
            raise UserError(f"{given} is set, but {other} is not; filters needs contaminated with eval_files")
        if length_ratio[0] > length_ratio[1]:
            raise UserError(f"length_ratio is {[*length_ratio]}; expected the least first; swap the two")
        needed = {"language": ("py3langid.langid", "language"), "near_duplicate": ("datasketch", "data")}
        for name in needed.keys() & set(names):
            require(*needed[name])
        if "language" in names and {*languages} == {None}:
            raise UserError("filters has language, but no source states the language that it expects; add it")
        for language in {*languages} - {None} if "language" in names else ():
            reply_language("", candidates={*CANDIDATES, language})  # ends here if there is no such language
        self.names, self.length_ratio, self.eval_index = names, length_ratio, EvalIndex(eval_files)
        # Any punctuation may stand between the letters of a name; no letter before or behind.
        letters = (re.findall(r"[^\W_]", name.casefold()) for name in test_sets)
        patterns = (r"[\W_]*".join(name) for name in letters if name)
        self.test_sets = [re.compile(rf"(?<![^\W_]){name}(?![^\W_])") for name in patterns]

    def why_dropped(self, row: Row, raw: dict[str, Any], language: str | None) -> tuple[str, str] | None:
        """(name of the first filter that drops the row, what it found); None if the row stays.

        raw: the row as it was read; language: the code that its answers are expected in, None: any.
        """
        for name, check in _CHECKS.items():
            if name in self.names and (found := check(self, row, raw, language)):
                return name, found
        return None


def empty(_filters: RowFilters, row: Row, _raw: dict, _expected: str | None) -> str | None:
    """A turn or a text without one visible character (zero-width, control and filling ones are none)."""
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
    """A row whose source or category holds the name of a test set, whatever its case and punctuation."""
    stated = (row.source, *(raw.get(field) for field in ("source", "data_source", "dataset", "category")))
    names = (name for name in stated if isinstance(name, str))
    return next((n for n in names if any(known.search(n.casefold()) for known in filters.test_sets)), None)


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
    """An assistant's turn that speaks of itself as an AI, or opens with a stock refusal (refusals.toml).

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


def contaminated(filters: RowFilters, row: Row, raw: dict, _expected: str | None) -> str | None:
    """A question of a test set in any string of the row, be it the original beside the translation, or in a
    turn that is part of a string."""
    return filters.eval_index.hit(dict.fromkeys((*strings(raw), *(text for _, text in all_turns(row)))))


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
    return " ".join(plain_form(text).split())


def _visible(text: str) -> bool:
    return any(c.isprintable() and not c.isspace() and c not in BLANK for c in text)


_TABLE = tomllib.loads((Path(__file__).parent / "refusals.toml").read_text(encoding="utf-8"))
_PATTERNS = (p.replace("{ai}", of["ai"]) for of in _TABLE.values() for p in of["patterns"])
_REFUSAL = re.compile(rf"\b(?:{'|'.join(_PATTERNS)})\b".replace("{sentence}", "[^.!?]{0,80}"))
_CHECKS: dict[str, Callable[[RowFilters, Row, dict, str | None], str | None]] = {
    "empty": empty, "equal_answers": equal_answers, "tie": tie, "test_set": test_set, "language": language,
    "length_ratio": length_ratio, "refusal": refusal, "contaminated": contaminated,
}  # fmt: skip
FILTERS = (*_CHECKS, "duplicate", "near_duplicate")  # as they are asked; the last two over all rows
