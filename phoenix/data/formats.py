"""Raw rows of every known schema -> Conversation | PreferencePair | Text.

`to_row` converts one row; the table FORMATS at the end lists the known schemas, the most specific first.
What a row means is taken from the names of its fields, never from the name of its file.

A message is {"role": "system" | "user" | "assistant", "content": str}.  In a conversation a system turn may
come first, then user and assistant alternate, and the assistant has the last word.

Of every row: `source`, `license` as the row states it, `line`, and `length_ratio`, the characters of a
translation per character of what was translated, where the row tells.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from phoenix.files import UserError

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """A chat that is trained as a whole."""

    messages: tuple[Message, ...]
    source: str
    license: str | None
    line: int
    length_ratio: float | None = None


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one prompt; the prompt ends with a user's turn, both answers with an assistant's.

    scores: of chosen and rejected, where the row states both.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: str
    license: str | None
    line: int
    length_ratio: float | None = None
    scores: tuple[float, float] | None = None


@dataclass(frozen=True)
class Text:
    """Plain text without a template."""

    text: str
    source: str
    license: str | None
    line: int
    length_ratio: float | None = None


Row = Conversation | PreferencePair | Text


class RowError(UserError):
    """A row that cannot be trained on: no known format, roles out of order, an empty turn, an odd type.

    reason: the filter that drops such rows if it is on, else "bad_row".
    """

    def __init__(self, text: str, reason: str = "bad_row") -> None:
        super().__init__(text)
        self.reason = reason


def to_row(
    row: dict[str, Any], where: tuple[Path, int], kind: str = "documents", format: str | None = None
) -> Row:
    """One raw row of any known schema, or of the one that is named.

    where: its file and line; kind: "documents" (Conversation or Text) or "pairs", for rows that hold both;
    format: a name in FORMATS.  A field whose value is null counts as absent.
    Raises RowError naming file, line, found and expected.
    """
    path, line = where
    try:
        row_type, convert = _format_of(row, kind, format)
        content = convert(row)
        source = _text(str(row.get("source") or row.get("data_source") or os.path.basename(path)), "source")
        licence = stated_license(row)
    except RowError as error:
        raise RowError(f"{path}, line {line}: {error}", error.reason) from None
    more = {"scores": _scores(row)} if row_type is PreferencePair else {}
    return row_type(*content, source, licence, line, _length_ratio(row), **more)


def stated_license(row: dict[str, Any]) -> str | None:
    """What a row's fields `license` and `licence` (in any case) say, joined by AND, as the entries of a list.

    None: nothing, as null and "" are; a number, an object, an empty list become a name that nobody knows.
    """
    stated = [value for name, value in row.items() if name.casefold() in ("license", "licence")]
    lists = [value if isinstance(value, list) and value else [value] for value in stated]
    names = dict.fromkeys(str(name) for names in lists for name in names if name not in (None, ""))
    if len(names) > 1:  # in brackets, which stand for an unknown one: AND binds before OR
        names = [f"({name})" if re.search(r"\sor\s", name, re.IGNORECASE) else name for name in names]
    return _text(" AND ".join(names), "license") or None


def is_message(row: dict[str, Any]) -> bool:
    """Whether a row is one message of a tree, as in oasst1's flat files; `threads` makes trees of them."""
    return row.get("message_id") is not None and row.get("message_tree_id") is not None


def threads(rows: Iterable[tuple[int, dict]], path: Path | str = "rows") -> Iterator[tuple[int, dict]]:
    """(line, row) of flat messages -> (line of the root, tree in the form of oasst1's dump).

    The messages of a tree stand together, in any order; other rows pass as they are.  What hangs on no root
    is left out, and so is what lies more than MAX_TURNS deep.  Raises UserError for a tree that comes again.
    """
    seen = set()
    for tree, group in groupby(rows, lambda row: is_message(row[1]) and str(row[1]["message_tree_id"])):
        if tree is False:
            yield from group
            continue
        answers: dict[str, list] = {}  # id of a message -> what answers it; "" -> roots
        for line, message in group:
            answers.setdefault(str(message.get("parent_id") or ""), []).append((line, message))
        line, root = answers.pop("", [(line, {"message_id": ""})])[0]
        if tree in seen:
            found = f"{path}, line {line}: the tree {tree!r:.50} comes again"
            raise UserError(f"{found}; expected its messages together; sort the rows by message_tree_id")
        seen.add(tree)
        level = [root]
        for _ in range(MAX_TURNS):
            for message in level:  # taken out, so that no message answers itself
                message["replies"] = [reply for _, reply in answers.pop(str(message["message_id"]), [])]
            level = [reply for message in level for reply in message["replies"]]
        stated = {name: root.get(name) for name in ("tree_state", "source", "license")}
        yield line, {**stated, "message_tree_id": tree, "prompt": root}


def messages(row: dict) -> tuple:
    """UltraChat-200k, OpenAI, ShareGPT, OASST-DE: a list of turns under one of three names."""
    name = next(name for name in ("messages", "conversations", "conversation") if row.get(name) is not None)
    return (_conversation(_turns(row[name], name)),)


def oasst(tree: dict) -> tuple:
    """oasst1: at each prompt the best answer, at each answer the follow-up that leads furthest."""
    return (_conversation(_turns(_best_thread(tree), "prompt")),)


def oasst_pairs(tree: dict) -> tuple:
    """oasst1: the best and the worst of the ranked answers to the last prompt of the best thread."""
    *prompt, best = _best_thread(tree)
    ranked = [answer for answer in _replies(prompt[-1]) if _rank(answer) < math.inf] if prompt else []
    if not ranked or _rank(best) == _rank(ranked[-1]):
        raise RowError(
            "no two answers to the last prompt differ in rank; expected a better and a worse", "tie"
        )
    return _pair(*(_turns(turns, "prompt") for turns in (prompt, [best], ranked[-1:])))


def completion(row: dict) -> tuple:
    """TRL's prompt and completion, strings or lists of messages; in KTO's rows `label` says if it is good."""
    if str(row.get("label")).lower() in ("false", "0"):
        raise RowError("'label' is false: the completion is no answer to learn; expected one that is true")
    return (_conversation([*_said(row, "prompt", "user"), *_said(row, "completion", "assistant")]),)


def columns(question: str, context: str | None, answer: str) -> Callable[[dict], tuple]:
    """A schema with a column for the question, an optional one for its context, one for the answer."""

    def convert(row: dict) -> tuple:
        parts = [_text(row.get(name) or "", name) for name in (question, context) if name]
        user = "\n\n".join(part for part in parts if part.strip())
        return (_conversation([*_turn("user", user), *_turn("assistant", _text(row[answer], answer))]),)

    return convert


def text(row: dict) -> tuple:
    """Plain text, as for continued pretraining."""
    if row.get("message_id") is not None:
        raise RowError("the row is one message of a tree (oasst1); expected message_tree_id in each of them")
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
        raise RowError("no two completions are rated differently; expected a better and a worse one", "tie")
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
    return _pair(_said(row, "prompt", "user"), chosen, rejected)


def _format_of(row: dict, kind: str, name: str | None) -> tuple[type, Callable]:
    # Open-Platypus is told from Alpaca by a column that may be null.
    found = {field for field, value in row.items() if value is not None or field == "data_source"}
    asked = {name: FORMATS[name]} if name else FORMATS
    fitting = [(row_type, convert) for row_type, needed, convert in asked.values() if needed <= found]
    for row_type, convert in fitting:
        if row_type in KINDS[kind]:
            return row_type, convert
    if fitting:
        raise RowError(f"the row is a {fitting[0][0].__name__}; expected one for kind={kind!r}; change kind")
    known = "; ".join(f"{name} ({', '.join(sorted(needed))})" for name, (_, needed, _) in asked.items())
    fields = ", ".join(sorted(map(str, found)))[:300] or "none"
    do = "change format" if name else "rename the fields"
    raise RowError(f"found the fields {fields}; expected those of a known format: {known}; {do}")


def _scores(row: dict) -> tuple[float, float] | None:
    for name in SCORES:
        scores = tuple(_number(row.get(name.format(side))) for side in ("chosen", "rejected"))
        if None not in scores:
            return scores
    return None


def _number(value: Any) -> float | None:
    """Of a number or a string such as "4.5"; None for "N/A", an infinity, and anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _length_ratio(row: dict) -> float | None:
    """By the counts in the record of recipes/translate.py, else by the columns X_de that stand beside X."""
    if isinstance(record := row.get("translation"), dict):
        source, text = (_number(record.get(name)) for name in ("source_characters", "characters"))
    else:
        names = [name for name in row if name.endswith("_de") and isinstance(row.get(name[:-3]), str)]
        names = [name for name in names if isinstance(row[name], str)]
        source, text = (sum(len(row[name[:end]]) for name in names) for end in (-3, None))
    return text / source if source and text is not None else None


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
        role = str(_first(turn, "role", "from"))
        if role.lower() not in ROLES or turn.get("tool_calls"):
            found = "calls a tool" if turn.get("tool_calls") else f"has the role {role[:50]!r}"
            raise RowError(f"turn {number} of {name!r} {found}; expected text of one of {', '.join(ROLES)}")
        content = _first(turn, "content", "value", "text")
        result += _turn(ROLES[role.lower()], _text(content, f"content of turn {number}"))
    return result


def _first(row: dict, *names: str) -> Any:
    """The value of the first of the fields that is not null."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _said(row: dict, name: str, role: str) -> list[Message]:
    value = row[name]
    return _turns(value, name) if isinstance(value, list) else _turn(role, _text(value, name).strip())


def _best_thread(tree: dict) -> list[dict]:
    """The messages from the prompt of a tree to an answer; without recursion, as a tree may be deep."""
    _text(tree["message_tree_id"], "message_tree_id")
    if tree.get("tree_state") not in (None, "ready_for_export"):
        raise RowError(f"'tree_state' is {tree['tree_state']!r:.50}; expected 'ready_for_export'")
    order = list(filter(_is_sound, [tree["prompt"]]))
    for message in order:  # grows meanwhile
        order += _replies(message)
    best: dict[int, list[dict]] = {}  # of a message: the thread that begins with it, empty without an answer
    for message in reversed(order):
        further = [best.pop(id(reply)) for reply in _replies(message)]
        if message.get("role") == "assistant":
            best[id(message)] = [message, *max(further, key=len, default=[])]
        else:
            best[id(message)] = [message, *further[0]] if any(further[:1]) else []
    if not any(best.values()):
        raise RowError("no thread from 'prompt' ends in an answer; expected one not deleted, empty or spam")
    return best[id(tree["prompt"])]


def _replies(message: dict) -> list[dict]:
    """Those worth reading, the best rank (0) first, those without a rank last."""
    replies = message.get("replies")
    return sorted(filter(_is_sound, replies if isinstance(replies, list) else []), key=_rank)


def _rank(message: dict) -> float:
    rank = _number(message.get("rank"))
    return math.inf if rank is None else rank


def _is_sound(message: Any) -> bool:
    """A message that is neither deleted nor empty, and spam to less than half of its reviewers."""
    try:  # {"spam": {"value": 0.1, "count": 3}, ...}; in flat files three lists: name, value, count
        labels = message["labels"]
        spam = labels["spam"]["value"] if "spam" in labels else labels["value"][labels["name"].index("spam")]
    except (AttributeError, LookupError, TypeError, ValueError):
        spam = None
    is_there = isinstance(message, dict) and not message.get("deleted") and bool(message.get("text"))
    return is_there and bool(str(message["text"]).strip()) and (_number(spam) or 0) < 0.5


def _conversation(turns: list[Message]) -> tuple[Message, ...]:
    start = int(turns[0]["role"] == "system")
    for number, turn in enumerate(turns[start:], 1):
        expected = "user" if number % 2 else "assistant"
        if turn["role"] != expected or not turn["content"].strip():
            empty = turn["role"] == expected
            found = "empty" if empty else f"the {turn['role']}'s (roles out of order)"
            text = f"turn {number + start} is {found}; expected text of the {expected}"
            raise RowError(text, "empty" if empty else "bad_row")
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
    ratings = [rating for note in notes if (rating := _number(note.get("Rating"))) is not None]
    return sum(ratings) / len(ratings) if ratings else _number(overall)


def _kind(value: Any) -> str:
    return "empty list" if value == [] else "null" if value is None else type(value).__name__


HUMAN_ASSISTANT = re.compile(r"(?:^\s*|\n\n)(Human|Assistant):")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
}
MAX_TURNS = 200  # of a thread of flat messages: far above real ones, and its tree can still be pickled
SCORES = ("score_{}", "{}_score", "{}_avg_rating", "{}-rating", "{}_rating")
KINDS = {"documents": (Conversation, Text), "pairs": (PreferencePair,)}
SCHNABELTIER = ("instruction_de", None, "output_de")
DOLLY_DE = ("instruction_de", "context_de", "response_de")
ALPACA = ("instruction", "input", "output")
# name -> (type of the row, columns that it must have, function)
FORMATS: dict[str, tuple[type, set[str], Callable[[dict], tuple]]] = {
    "oasst": (Conversation, {"message_tree_id", "prompt"}, oasst),
    "oasst_pairs": (PreferencePair, {"message_tree_id", "prompt"}, oasst_pairs),
    "ultrafeedback": (PreferencePair, {"instruction", "completions"}, ultrafeedback),
    "argilla": (PreferencePair, {"instruction", "chosen_response", "rejected_response"}, argilla),
    "preference": (PreferencePair, {"chosen", "rejected"}, preference),
    "messages": (Conversation, {"messages"}, messages),
    "sharegpt": (Conversation, {"conversations"}, messages),
    "oasst_de": (Conversation, {"conversation"}, messages),
    "schnabeltier": (Conversation, {"instruction_de", "output_de"}, columns(*SCHNABELTIER)),
    "dolly_de": (Conversation, {"instruction_de", "response_de"}, columns(*DOLLY_DE)),
    "dolly": (Conversation, {"instruction", "response"}, columns("instruction", "context", "response")),
    "open_platypus": (Conversation, {*ALPACA[::2], "data_source"}, columns(*ALPACA)),
    "alpaca": (Conversation, {*ALPACA[::2]}, columns(*ALPACA)),
    "prompt_completion": (Conversation, {"prompt", "completion"}, completion),
    "poem": (Conversation, {"prompt", "poem"}, columns("prompt", None, "poem")),
    "song": (Conversation, {"prompt", "song"}, columns("prompt", None, "song")),
    "text": (Text, {"text"}, text),
}
