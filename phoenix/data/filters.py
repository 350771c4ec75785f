"""Which rows stay: keys for duplicates and for the held-out split, rows without content.

The length filter stands in recipes/prepare.py, since it counts tokens.
"""

import hashlib
import unicodedata

from phoenix.data.formats import Conversation, Message, PreferencePair, Text

Row = Conversation | PreferencePair | Text


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


def row_key(row: Row) -> int:
    """64 bits that rows of one text share: of all turns, of a pair's prompt, of a plain text.

    Unicode form, white space and letter case make no difference.  Two different rows among a million meet by
    chance with a probability of 3e-8.
    """
    turns = _turns(row)[: len(row.prompt)] if isinstance(row, PreferencePair) else _turns(row)
    text = "\x1e".join(f"{role}\x1f{_normal(text)}" for role, text in turns)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def lot(key: int, seed: int) -> float:
    """A number in [0, 1) drawn by a row's key and the seed: the same row always lands on the same side."""
    drawn = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=6).digest()
    return int.from_bytes(drawn, "big") / 2**48


def _turns(row: Row) -> list[tuple[str, str]]:
    if isinstance(row, Text):
        return [("text", row.text)]
    messages = row.messages if isinstance(row, Conversation) else (*row.prompt, *row.chosen, *row.rejected)
    return [(message["role"], message["content"]) for message in messages]


def _same(messages: tuple[Message, ...]) -> list[str]:
    return [_normal(message["content"]) for message in messages]


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def _visible(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)
