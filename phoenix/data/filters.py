"""Which rows stay: keys for duplicates and for the held-out split, rows without content.

The length filters stand in rendering.py and recipes/prepare.py, since they count tokens.
"""

import hashlib
import unicodedata

from phoenix.data.formats import Conversation, Message, PreferencePair, Row, Text


def why_dropped(row: Row) -> str | None:
    """The name of the filter that drops a row, by its text alone; None if it stays.

    "empty": a turn or a text without one visible character (zero-width and control characters are none).
    "equal_answers": a pair whose two answers are the same, as a translation can make them.
    """
    if not all(_visible(text) for role, text in _turns(row) if role != "system"):
        return "empty"
    if isinstance(row, PreferencePair) and _same(row.chosen) == _same(row.rejected):
        return "equal_answers"
    return None


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
    return (_key(_joined(_turns(row))),) * 2


def lot(key: int, seed: int) -> float:
    """A number in [0, 1) drawn by a row's second key and the seed: a row always lands on the same side."""
    drawn = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=6).digest()
    return int.from_bytes(drawn, "big") / 2**48


def _turns(row: Row) -> list[tuple[str, str]]:
    if isinstance(row, Text):
        return [("text", row.text)]
    return _said(row.messages if isinstance(row, Conversation) else (*row.prompt, *row.chosen, *row.rejected))


def _said(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def _joined(turns: list[tuple[str, str]]) -> str:
    return "\x1e".join(f"{role}\x1f{_normal(text)}" for role, text in turns)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _same(messages: tuple[Message, ...]) -> list[str]:
    return [_normal(message["content"]) for message in messages]


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def _visible(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)
