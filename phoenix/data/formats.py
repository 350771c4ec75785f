"""Raw rows of every known schema -> Conversation | PreferencePair | Text.

`to_row` converts one row; the table FORMATS at the end lists the known schemas, the most specific first.
What a row means is taken from the names of its fields, never from the name of its file.

A message is {"role": "system" | "user" | "assistant", "content": str}.  In a conversation a system turn may
come first, then user and assistant alternate, and the assistant has the last word.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoenix.data.reading import read_rows
from phoenix.files import UserError

__all__ = [
    "FORMATS",
    "Conversation",
    "Message",
    "PreferencePair",
    "Row",
    "RowError",
    "Text",
    "read_rows",
    "to_row",
]

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A chat that is trained as a whole."""

    messages: tuple[Message, ...]
    source: str
    license: str | None
    line: int


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; the prompt ends with a user's turn, both answers with an assistant's."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str
    license: str | None
    line: int


@dataclass(frozen=True)
class Text:
    """Plain text without a template."""

    text: str
    source: str
    license: str | None
    line: int


Row = Conversation | PreferencePair | Text


class RowError(UserError):
    """A row that cannot be trained on: no known format, roles out of order, an empty turn, an odd type."""


def to_row(row: dict[str, Any], where: tuple[Path, int], kind: str = "documents") -> Row:
    """One raw row of any known schema.

    where: its file and line; kind: "documents" (Conversation or Text) or "pairs", for rows that hold both.
    A field whose value is null counts as absent.  Raises RowError naming file, line, found and expected.
    """
    path, line = where
    try:
        row_type, convert = _format_of(row, kind)
        content = convert(row)
        source = _text(str(row.get("source") or row.get("data_source") or Path(path).name), "source")
        licence = _text(str(row.get("license") or row.get("licence") or ""), "license")
    except RowError as error:
        raise RowError(f"{path}, line {line}: {error}") from None
    return row_type(*content, source, licence or None, line)


def messages(row: dict) -> tuple:
    """UltraChat-200k, OpenAI, ShareGPT, OASST-DE: a list of turns under one of three names."""
    name = next(name for name in ("messages", "conversations", "conversation") if row.get(name) is not None)
    return (_conversation(_turns(row[name], name)),)


def columns(question: str, context: str, answer: str) -> Callable[[dict], tuple]:
    """A schema with a column for the question, an optional one for its context, one for the answer."""

    def convert(row: dict) -> tuple:
        parts = [_text(row.get(name) or "", name) for name in (question, context)]
        user = "\n\n".join(part for part in parts if part.strip())
        return (_conversation([*_turn("user", user), *_turn("assistant", _text(row[answer], answer))]),)

    return convert


def text(row: dict) -> tuple:
    """Plain text, as for continued pretraining."""
    if row.get("message_id") is not None:
        raise RowError("the row is one message of a tree (oasst1); expected whole threads as 'messages'")
    return (_text(row["text"], "text"),)


def ultrafeedback(row: dict) -> tuple:
    """openbmb/UltraFeedback: chosen is the best completion, rejected a lower one, drawn by a hash.

    The mean of the ratings decides, `overall_score` only where there are none: in files before December 2023
    it was 10 for 2,628 completions that deserved a 1.
    """
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(answer, dict) for answer in completions):
        raise RowError("'completions' is no list of objects; expected each with 'response' and 'annotations'")
    scored = [(score, answer) for answer in completions if (score := _score(answer)) is not None]
    best = max((score for score, _ in scored), default=0)
    lower = [answer for score, answer in scored if score < best]
    if not lower:
        raise RowError("no two completions are rated differently; expected a better and a worse one")
    instruction = _text(row["instruction"], "instruction")
    worse = lower[hashlib.sha256(instruction.encode()).digest()[0] % len(lower)]
    better = next(answer for score, answer in scored if score == best)
    answers = (_turn("assistant", _text(answer.get("response"), "response")) for answer in (better, worse))
    return _pair(_turn("user", instruction), *answers)


def argilla(row: dict) -> tuple:
    """argilla/ultrafeedback-binarized-preferences, the set of the paper: flat strings."""
    names = {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}
    return preference({ours: _text(row[theirs], theirs) for ours, theirs in names.items()})


def preference(row: dict) -> tuple:
    """`chosen` and `rejected`, two lists of messages or two strings: answers to `prompt` (TRL's explicit
    prompt) or whole conversations (H4, argilla's cleaned set, HH-RLHF, TRL's implicit prompt)."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        lead = _text("" if prompt is None else prompt, "prompt")
        if HUMAN_ASSISTANT.match(lead + chosen):
            return _split(_human_assistant(lead + chosen), _human_assistant(lead + rejected))
        if prompt is None:  # the whole words that both begin with
            lead = re.match(r"(.*\s)?", chosen[: _common(chosen, rejected)], re.DOTALL)[0]
            chosen, rejected = chosen[len(lead) :], rejected[len(lead) :]
        answers = (_turn("assistant", _text(answer, "chosen").strip()) for answer in (chosen, rejected))
        return _pair(_turn("user", lead.strip()), *answers)
    chosen, rejected = _turns(chosen, "chosen"), _turns(rejected, "rejected")
    if chosen[0]["role"] != "assistant" or prompt is None:
        return _split(chosen, rejected)
    lead = _turns(prompt, "prompt") if isinstance(prompt, list) else _turn("user", _text(prompt, "prompt"))
    return _pair(lead, chosen, rejected)


def _format_of(row: dict, kind: str) -> tuple[type, Callable]:
    found = {name for name, value in row.items() if value is not None}
    fitting = [(row_type, convert) for row_type, needed, convert in FORMATS.values() if needed <= found]
    for row_type, convert in fitting:
        if row_type in KINDS[kind]:
            return row_type, convert
    if fitting:
        raise RowError(f"the row is a {fitting[0][0].__name__}; expected one for kind={kind!r}; change kind")
    known = "; ".join(f"{name} ({', '.join(sorted(needed))})" for name, (_, needed, _) in FORMATS.items())
    fields = ", ".join(sorted(map(str, found)))[:300] or "none"
    raise RowError(f"found the fields {fields}; expected those of a known format: {known}; rename the fields")


def _text(value: Any, name: str) -> str:
    if isinstance(value, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in value):
        value = "".join(part["text"] for part in value)  # OpenAI's parts of type "text"
    if not isinstance(value, str):
        raise RowError(f"{name!r} is a {_kind(value)}; expected a string, or a list of parts that are text")
    if re.search("[\0\ud800-\udfff]", value):
        raise RowError(f"{name!r} holds a NUL or half a surrogate pair; expected text")
    return value


def _turn(role: str, content: str) -> list[Message]:
    return [{"role": role, "content": content}]


def _turns(turns: Any, name: str) -> list[Message]:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{name!r} is a {_kind(turns)}; expected a list of messages with 'role' and 'content'")
    result = []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value", turn.get("text")))
        if str(role) not in ROLES or turn.get("tool_calls"):
            found = "calls a tool" if turn.get("tool_calls") else f"has the role {str(role)[:50]!r}"
            raise RowError(f"turn {number} of {name!r} {found}; expected text of one of {', '.join(ROLES)}")
        result += _turn(ROLES[role], _text(content, f"content of turn {number}"))
    return result


def _conversation(turns: list[Message]) -> tuple[Message, ...]:
    start = int(turns[0]["role"] == "system")
    for number, turn in enumerate(turns[start:], 1):
        expected = "user" if number % 2 else "assistant"
        if turn["role"] != expected or not turn["content"].strip():
            found = "empty" if turn["role"] == expected else f"the {turn['role']}'s (roles out of order)"
            raise RowError(f"turn {number + start} is {found}; expected text of the {expected}")
    if turns[-1]["role"] != "assistant":
        raise RowError("the last turn is not an assistant's (roles out of order); expected an answer")
    return tuple(turns)


def _pair(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> tuple:
    if prompt[-1]["role"] != "user":
        raise RowError("the prompt's last turn is not a user's (roles out of order); expected a question")
    whole = [_conversation(prompt + answer) for answer in (chosen, rejected)]
    return tuple(prompt), *(conversation[len(prompt) :] for conversation in whole)


def _split(chosen: list[Message], rejected: list[Message]) -> tuple:
    """Two whole conversations -> the turns that both begin with, up to a user's, and what follows in each."""
    same = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    while same > 0 and chosen[same - 1]["role"] != "user":
        same -= 1
    if same <= 0:
        raise RowError("'chosen' and 'rejected' do not begin with the same user's turn; expected one prompt")
    return _pair(chosen[:same], chosen[same:], rejected[same:])


def _common(first: Sequence, second: Sequence) -> int:
    differ = (index for index, (one, other) in enumerate(zip(first, second)) if one != other)
    return next(differ, min(len(first), len(second)))


def _human_assistant(conversation: str) -> list[Message]:
    """HH-RLHF: a blank line, "Human: ", text, a blank line, "Assistant: ", text ..."""
    parts = HUMAN_ASSISTANT.split(_text(conversation, "chosen or rejected"))[1:]
    return [_turn(ROLES[role.lower()], said.strip())[0] for role, said in zip(parts[::2], parts[1::2])]


def _score(answer: dict) -> float | None:
    notes, overall = answer.get("annotations"), answer.get("overall_score")
    notes = [note for note in notes.values() if isinstance(note, dict)] if isinstance(notes, dict) else []
    ratings = [int(note["Rating"]) for note in notes if str(note.get("Rating")) in tuple("12345")]  # or "N/A"
    return sum(ratings) / len(ratings) if ratings else overall if isinstance(overall, int | float) else None


def _kind(value: Any) -> str:
    return "empty list" if value == [] else "null" if value is None else type(value).__name__


HUMAN_ASSISTANT = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}
KINDS = {"documents": (Conversation, Text), "pairs": (PreferencePair,)}
SCHNABELTIER = ("instruction_de", "", "output_de")
DOLLY_DE = ("instruction_de", "context_de", "response_de")
# name -> (type of the row, columns that it must have, function)
FORMATS: dict[str, tuple[type, set[str], Callable[[dict], tuple]]] = {
    "ultrafeedback": (PreferencePair, {"instruction", "completions"}, ultrafeedback),
    "argilla": (PreferencePair, {"instruction", "chosen_response", "rejected_response"}, argilla),
    "preference": (PreferencePair, {"chosen", "rejected"}, preference),
    "messages": (Conversation, {"messages"}, messages),
    "sharegpt": (Conversation, {"conversations"}, messages),
    "oasst_de": (Conversation, {"conversation"}, messages),
    "schnabeltier": (Conversation, {"instruction_de", "output_de"}, columns(*SCHNABELTIER)),
    "dolly_de": (Conversation, {"instruction_de", "response_de"}, columns(*DOLLY_DE)),
    "dolly": (Conversation, {"instruction", "response"}, columns("instruction", "context", "response")),
    "alpaca": (Conversation, {"instruction", "output"}, columns("instruction", "input", "output")),
    "prompt_completion": (Conversation, {"prompt", "completion"}, columns("prompt", "", "completion")),
    "poem": (Conversation, {"prompt", "poem"}, columns("prompt", "", "poem")),
    "song": (Conversation, {"prompt", "song"}, columns("prompt", "", "song")),
    "text": (Text, {"text"}, text),
}
