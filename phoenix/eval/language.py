"""Replies to German and English prompts: in which language they are, whether they end, echo or loop."""

from __future__ import annotations

from typing import Any

from phoenix.data import language
from phoenix.generation import Reply


def judge(row: dict[str, Any], reply: Reply, index: set[int]) -> dict[str, Any]:
    prompt, text = row["messages"][-2]["content"], reply.text
    return {
        "prompt": prompt, "reference": row["messages"][-1]["content"], "reply": text,
        "language": row["language"], "tokens": len(reply.tokens), "ended": reply.finish_reason == "stop",
        "reply_language": language.reply_language(text, prompt),
        "echo_or_loop": language.echoes(text, prompt) or language.loops(text),
        "repeats_training": language.repeats_training(text, index),
    }  # fmt: skip


def shares(judged: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the replies to German prompts (of German ones: among the decided) and to English prompts."""
    german, english = ([one for one in judged if one["language"] == name] for name in ("de", "en"))
    decided = [one for one in german if one["reply_language"]]
    return {
        "german_reply_share": share(decided, lambda one: one["reply_language"] == "de"),
        "undecided_share": 1 - len(decided) / len(german),
        "ended_share": share(german, lambda one: one["ended"]),
        "echo_or_loop_share": share(german, lambda one: one["echo_or_loop"]),
        "english_reply_share": share(english, lambda one: one["reply_language"] == "en"),
        "equal_replies": len(judged) - len({one["reply"] for one in judged}),
        "repeats_training": sum(one["repeats_training"] for one in judged),
    }


def share(items: list[dict[str, Any]], holds: Any) -> float | None:
    return sum(map(holds, items)) / len(items) if items else None
