"""Replies to German and English prompts: in which language they are, whether they end, echo or loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from phoenix.data import language
from phoenix.generation import Reply

Row = dict[str, Any]


def spread(rows: list[Row], number: int) -> list[Row]:
    """About `number` of the rows, evenly from each `language` and over its rows; 0, or too many: all of them.

    So the rows of all categories are among them, if those stand one behind the other.
    """
    languages = {
        row["language"]: [other for other in rows if other["language"] == row["language"]] for row in rows
    }
    counts = {name: max(1, round(number * len(part) / len(rows))) for name, part in languages.items()}
    if not number or sum(counts.values()) >= len(rows):
        return rows
    return [
        part[i * len(part) // counts[name]] for name, part in languages.items() for i in range(counts[name])
    ]


def judge(row: Row, reply: Reply, index: set[int]) -> Row:
    """A reply beside its row, and what `shares` counts.

    row: `messages`, a list of turns {"role", "content"} that ends with the question and its reference answer,
    and `language`, "de" or "en": that of the prompt.  index: runs of words of the training rows
    (`phoenix.data.language.run_index`).
    """
    prompt, text = row["messages"][-2]["content"], reply.text
    return {
        "prompt": prompt, "reference": row["messages"][-1]["content"], "reply": text,
        "language": row["language"], "tokens": len(reply.tokens), "ended": reply.finish_reason == "stop",
        "reply_language": language.reply_language(text, prompt),
        "echo_or_loop": language.echoes(text, prompt) or language.loops(text),
        "repeats_training": language.repeats_training(text, index),
    }  # fmt: skip


def shares(judged: list[Row]) -> Row:
    """Shares of the replies to German prompts (of German ones: among the decided) and to English prompts.

    A share of no replies is None.
    """
    german, english = ([one for one in judged if one["language"] == name] for name in ("de", "en"))
    decided = [one for one in german if one["reply_language"]]
    return {
        "german_reply_share": _share(decided, lambda one: one["reply_language"] == "de"),
        "undecided_share": _share(german, lambda one: not one["reply_language"]),
        "ended_share": _share(german, lambda one: one["ended"]),
        "echo_or_loop_share": _share(german, lambda one: one["echo_or_loop"]),
        "english_reply_share": _share(english, lambda one: one["reply_language"] == "en"),
        "equal_replies": len(judged) - len({one["reply"] for one in judged}),
        "repeats_training": sum(one["repeats_training"] for one in judged),
    }


def _share(items: list[Row], holds: Callable[[Row], bool]) -> float | None:
    return sum(map(holds, items)) / len(items) if items else None
