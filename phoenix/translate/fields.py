"""Which fields of a row are translated, by the names of the known schemas; which rows cannot be.

Translated: questions, contexts, answers, system prompts, the text parts of a turn.  Kept: roles, ids, scores,
names of models, tool calls and what tools answered, and the notes of raters (critique, rationale).
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["TextPath", "get", "text_fields", "untranslatable", "with_texts"]

TextPath = tuple[str | int, ...]

# A string, or a list of turns (each with its text under one of TURN), or a list of such (completions).
COLUMNS = """system system_prompt prompt messages conversations conversation instruction input context output
    response completion completions text chosen rejected chosen_response rejected_response poem song
    analysis_prompt analysis""".split()
GERMAN_COLUMNS = "instruction_de context_de output_de response_de".split()  # where there are no others
TURN = "content value text custom_system_prompt response replies".split()
TOOL_ROLES = "tool function function_call function_response observation ipython".split()
QUESTIONS = "system_prompt prompt instruction input instruction_de".split()
USERS = "user human prompter".split()


def text_fields(row: dict[str, Any]) -> list[TextPath]:
    """Where a row holds text, in its order: ("messages", 0, "content"), ("prompt",), ...

    A blank text counts.  Raises ValueError naming the fields found if none of a known schema holds text.
    """
    columns = {*COLUMNS} if any(name in COLUMNS for name in row) else {*GERMAN_COLUMNS}
    paths = [path for name in row if name in columns for path in _texts(row[name], (name,))]
    if not paths:
        found = ", ".join(sorted(map(str, row)))[:300] or "none"
        raise ValueError(f"no text field; found {found}")
    return paths


def get(row: dict[str, Any], path: TextPath) -> str:
    """The text at a path of `text_fields`."""
    value: Any = row
    for step in path:
        value = value[step]
    return value


def with_texts(row: dict[str, Any], texts: Mapping[TextPath, str]) -> dict[str, Any]:
    """A copy of a row with other texts at some paths: same fields in the same order, `row` stays as it is."""
    result = dict(row)
    copied = {(): result}  # path of a container -> its copy
    for path, text in texts.items():
        depth = len(path) - 1
        while path[:depth] not in copied:
            depth -= 1
        for i in range(depth, len(path) - 1):
            parent, step = copied[path[:i]], path[i]
            parent[step] = copied[path[: i + 1]] = parent[step].copy()
        copied[path[:-1]][path[-1]] = text
    return result


def untranslatable(row: dict[str, Any]) -> str | None:
    """The task of a row that makes no sense in another language, read off what the user asks; None if fine.

    "translation", "grammar" (repair, parts of speech), "rhyme" (also metre, acrostics), "letter_count" (also
    words that begin with a letter), "wordplay", "vocabulary" (synonyms, spelling, origin of a word).
    """
    for question in _questions(row):
        # A task stands at one end of a prompt; what lies between is its material.
        ends = question if len(question) <= 3000 else f"{question[:2000]}\n{question[-1000:]}"
        for task, pattern in TASKS.items():
            if pattern.search(ends) and not (task in ALSO_PROGRAMS and PROGRAM.search(ends)):
                return task
    return None


def _texts(value: Any, path: TextPath) -> Iterator[TextPath]:
    """Depth first, in order, without recursion: a tree of replies may be deep."""
    todo = [(value, path)]
    while todo:
        value, path = todo.pop()
        if isinstance(value, str):
            yield path
        elif isinstance(value, list):
            todo += [(item, (*path, i)) for i, item in enumerate(value) if isinstance(item, dict)][::-1]
        elif isinstance(value, dict) and not _is_tool(value):
            todo += [(text, (*path, name)) for name, text in value.items() if name in TURN][::-1]


def _is_tool(turn: dict) -> bool:
    return turn.get("role", turn.get("from")) in TOOL_ROLES or turn.get("type") == "tool_result"


def _questions(row: dict[str, Any]) -> Iterator[str]:
    """What users ask: their turns, the columns for it, a conversation that is one string (HH-RLHF)."""
    for path in text_fields(row):
        role, value = None, row
        for step in path:
            if isinstance(value, dict):
                role = value.get("role", value.get("from")) or role
            value = value[step]
        whole = path in (("chosen",), ("rejected",)) and value.lstrip().startswith("Human:")
        if role in USERS or (role is None and (whole or (len(path) == 1 and path[0] in QUESTIONS))):
            yield value


LANGUAGE = (
    "English|German|French|Spanish|Italian|Portuguese|Dutch|Russian|Chinese|Mandarin|Cantonese|Japanese|"
    "Korean|Arabic|Hebrew|Hindi|Turkish|Polish|Czech|Greek|Latin|Swedish|Danish|Norwegian|Finnish|Ukrainian|"
    "Romanian|Hungarian|Vietnamese|Thai|Indonesian|Persian|Farsi|Urdu|Bengali|Tamil|Telugu|Punjabi|Gujarati|"
    "Icelandic|Deutsche|Englische|Französische|Spanische"
)
NEAR = r"[^\n.!?]{0,60}"  # in the same sentence
WORD_CLASS = "verb|noun|adjective|adverb|pronoun|preposition|conjunction|subject|predicate"
PASSAGE = "word|sentence|phrase|string|text|name|following|paragraph|passage|article|e-?mail|quote|lyrics"
TASKS = {
    task: re.compile("|".join(patterns), re.IGNORECASE)
    for task, patterns in {
        "translation": (
            rf"\btranslat\w+\b[^\n]{{0,120}}\b(?:{LANGUAGE})\b",
            rf"\btranslate\b{NEAR}\b(?:{PASSAGE})s?\b",
            rf"\b(?:{LANGUAGE}) (?:translation|equivalent|word|phrase|name) (?:of|for)\b",
            rf"\b(?:say|write|respond|reply|answer|speak)\b{NEAR}\bin (?:{LANGUAGE})(?=[.,;:!?\"')]|\s*$)",
            rf"\b(?:which|what) language\b{NEAR}\b(?:written|{PASSAGE})\b",
            r"\bübersetz",
        ),
        "grammar": (
            rf"\b(?:correct|fix|check|repair|edit|identify|find|spot|detect)\b{NEAR}"
            r"\b(?:grammar|grammatical(?:ly)?|spelling|punctuation|typos?|misspell\w*)\b",
            r"\bgrammatical(?:ly)? (?:in)?(?:correct|errors?|mistakes?)\b",
            r"\bproofread|\bparts? of speech\b|\bconjugat|\bRechtschreib|\bGrammatik",
            rf"\b(?:{WORD_CLASS})s?\b{NEAR}\b(?:in|of|from) (?:the|this|each)(?: \w+)? (?:sentence|phrase)",
            rf"\b(?:rewrite|change|convert|put|turn)\b{NEAR}\b(?:tense|voice|plural|singular)\b",
            r"\b(?:plural|superlative|comparative|past tense) (?:form )?of\b",
        ),
        "rhyme": (
            r"\brhym(?:e|es|ed|ing)\b|\b(?:limerick|haiku|acrostic|sonnet|villanelle)s?\b|\biambic\b",
            r"\bsyllab(?:le|les|ic)\b|\b(?:Reim(?:e|en|t)?|gereimt)\b",
        ),
        "letter_count": (
            rf"\b(?:how many|count|number of)\b{NEAR}\b(?:letter|vowel|consonant|character|word)s?\b{NEAR}"
            rf"\b(?:{PASSAGE})s?\b",
            r"\b(?:start|begin|end)(?:s|ing)? (?:with|in) (?:the (?:same )?letters?\b|[\"“'‘]\w[\"”'’])",
            r"\b(?:start|begin|end)(?:s|ing)? (?:with|in) (?-i:[A-Z])\b",
            r"\bthe letter [\"“'‘]?\w\b|\bletters? of the alphabet\b|\balphabeti",
            rf"\b(?:revers|spell)\w*\b{NEAR}\b(?:words?|letters|backwards?)\b",
            r"\bexactly \w+ (?:words|letters|characters)\b|\b(?:\d|three|four|five|six)[- ]letter words?\b",
        ),
        "wordplay": (
            r"\b(?:pun|palindrome|anagram|crossword|homophone|homonym|homograph|tongue[- ]?twister)s?\b",
            r"\b(?:word ?play|plays? on words|pig latin|hangman|wordle|scrabble|knock[- ]knock)\b",
            r"\bunscrambl|\balliterat|\bportmanteau",
        ),
        "vocabulary": (
            r"\b(?:synonym|antonym)s?\b|\betymolog",
            r"\b(?:origin|meaning|definition|spelling) of the word\b|\b(?:define|spell) the word\b",
            rf"\buse the word\b{NEAR}\bin a sentence\b|\bhow (?:do you|to) spell\b",
        ),
    }.items()
}
# A program that counts letters counts them in any language.
ALSO_PROGRAMS = ("letter_count", "wordplay")
PROGRAM = re.compile(
    r"\b(?:function|program|script|code|algorithm|regex|python|java\w*|sql)\b", re.IGNORECASE
)
