"""Chat templates as data, and one renderer from messages to token ids for training, chat and evaluation.

A turn is written as a string.  In braces stand control tokens (`{eos}`, `{<|im_end|>}`: placed by id, never
parsed from text) and texts (`{content}`, `{system}`); the rest are the template's own words.  Each part is
encoded for itself: nothing merges across the border of a text, and a conversation up to its generation prompt
has the ids with which the whole conversation begins, in training as in generation.  `▁` says that the next
part is encoded as a text that starts (with sentencepiece's "▁"); without it, a part behind a control token
does so where the tokenizer's `legacy` says, and a part behind a text never.

Text of a message never becomes a control token (`Tokenizer.encode` sees to it), nor the ids of a mark that a
template writes in plain words: `<|assistant|>` or `[/INST]` inside a message is spelled byte by byte, which
reads the same and is another sequence of ids.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phoenix.files import UserError

if TYPE_CHECKING:
    from phoenix.tokenizer import Tokenizer

PARTS = re.compile(r"\{(.+?)\}|([^{▁]+|▁)")
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """One chat format, one string a turn.  `{ content}`: the space is encoded with the text that it precedes.

    begin: before everything; `{bos?}` is left out where the tokenizer puts no BOS.  ask: the generation
    prompt; answer: what follows it, learned up to its last control token, which ends an answer.  system: its
    own turn, or else joins: which user turn ("first", "last") takes it, in the form of user_with_system.
    marks: words of the template that must not come out of a message.
    """

    name: str
    user: str
    answer: str
    ask: str = ""
    begin: str = "{bos}"
    system: str = ""
    joins: str = ""
    user_with_system: str = ""
    marks: tuple[str, ...] = ()

    @property
    def stop(self) -> str:
        return PARTS.findall(self.answer.rstrip())[-1][0]


@dataclass(frozen=True)
class Rendered:
    """Three lists of one length: ids; True for an answer with its stop token; True for the template's own."""

    tokens: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    is_template: list[bool] = field(default_factory=list)

    def add(self, ids: list[int], learned: bool, is_template: bool) -> None:
        self.tokens.extend(ids)
        self.loss_mask.extend([learned] * len(ids))
        self.is_template.extend([is_template] * len(ids))


def render(
    messages: Messages, tokenizer: Tokenizer, template: str | Template, *, add_generation_prompt: bool = False
) -> Rendered:
    """The ids of a conversation, what of it is learned, and what is template.

    messages: {"role", "content"}: perhaps one of "system", then "user" and "assistant" in turns.
    Raises UserError for messages out of order (naming the number), for a template whose tokens the tokenizer
    lacks, and, without a generation prompt, for a conversation that has no answer to learn; ValueError for a
    character that the vocabulary cannot express.
    """
    template = _find(template)
    _check_messages(messages, add_generation_prompt)
    rendered, starts = Rendered(), True
    for turn, texts, learned in _turns(messages, template, add_generation_prompt):
        for name, words in PARTS.findall(turn):
            text = name.strip()
            if words == "▁":
                starts = True
            elif words:
                rendered.add(_encode_words(words, tokenizer, starts), learned, True)
                starts = False
            elif text not in texts:
                rendered.add(_control(name, tokenizer, template.name), learned, True)
                learned, starts = learned and name != template.stop, tokenizer.legacy
            elif content := name.replace(text, texts[text]):
                rendered.add(_encode_text(content, tokenizer, template.marks, starts), learned, False)
                starts = False
    if not add_generation_prompt and not any(rendered.loss_mask):
        raise UserError("the conversation has no message of the assistant: nothing to learn; leave it out")
    _check_marks(rendered, tokenizer, template)
    return rendered


def render_text(text: str, tokenizer: Tokenizer) -> Rendered:
    """A plain text between BOS and EOS (those that the tokenizer has), all of it learned."""
    rendered = Rendered()
    rendered.add(_control("bos?", tokenizer), True, True)
    rendered.add(tokenizer.encode(text), True, False)
    rendered.add(_control("eos?", tokenizer), True, True)
    return rendered


def template(name: str) -> Template:
    """The template of that name; UserError names the nearest one."""
    if not isinstance(name, str) or name not in TEMPLATES:
        near = difflib.get_close_matches(str(name), TEMPLATES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(TEMPLATES)}"
        raise UserError(f"there is no chat template {name!r}; {hint}")
    return TEMPLATES[name]


def template_digest(name: str) -> str:
    """Hex sha256 of the template's data: one name stands for several formats in other projects."""
    return hashlib.sha256(repr(template(name)).encode()).hexdigest()


def stop_ids(tokenizer: Tokenizer, template: str | Template) -> list[int]:
    """Ids that end an answer: the template's stop token first, then the tokenizer's EOS if it is another."""
    ids = _control(_find(template).stop, tokenizer, _find(template).name) + _control("eos?", tokenizer)
    return list(dict.fromkeys(ids))


def apply_template(tokenizer: Tokenizer, name: str) -> None:
    """From now on this is the tokenizer's template, and `tokenizer.save` writes it, for others as Jinja."""
    tokenizer.chat_template, tokenizer.jinja = name, jinja(name, tokenizer)


def jinja(template: str | Template, tokenizer: Tokenizer) -> str:
    """The template as transformers and vLLM want it: they get the same ids for ordinary messages.

    They see a conversation as one string, so where our `▁` follows a control token, a space has to stand
    unless `legacy` makes their tokenizer put the "▁" by itself.
    """
    template, ends = _find(template), {"bos": "{{ bos_token }}", "eos": "{{ eos_token }}"}
    ends["bos?"] = ends["bos"] if tokenizer.bos_id is not None else ""
    gap = " " * (tokenizer.prefix and not tokenizer.legacy)

    def word(part: re.Match) -> str:
        name = (part[1] or "").strip()
        if name in ("content", "system"):
            return part[1].replace(name, f"{{{{ {name} }}}}")
        return ends.get(name, name) if name else part[2].replace("▁", gap)

    host = "n.host < 0" if template.joins == "first" else "true"
    slots = vars(template) | {"host": host, "joined": template.user_with_system or template.user}
    return re.sub("<([a-z]+)>", lambda slot: PARTS.sub(word, slots[slot[1]]), _JINJA)


def _find(name: str | Template) -> Template:
    return name if isinstance(name, Template) else template(name)


def _turns(messages: Messages, template: Template, asks: bool) -> Iterator[tuple[str, dict[str, str], bool]]:
    """(turn, its texts, whether it is an answer) in order."""
    has_system = messages[0]["role"] == "system"
    system, talk = messages[0]["content"] if has_system else "", messages[has_system:]
    host = {"first": 0, "last": (len(talk) - 1) // 2 * 2}.get(template.joins) if system else None
    yield template.begin, {}, False
    if has_system and template.system:
        yield template.system, {"system": system}, False
    for number, message in enumerate(talk):
        texts = {"content": message["content"], "system": system}
        if message["role"] == "user":
            yield template.user_with_system if number == host else template.user, texts, False
        else:
            yield template.ask, {}, False
            yield template.answer, texts, True
    if asks:
        yield template.ask, {}, False


@functools.lru_cache(maxsize=256)
def _control(name: str, tokenizer: Tokenizer, template: str = "") -> list[int]:
    ends = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    known = tokenizer.special_ids | ends | {f"{end}?": i for end, i in ends.items()}
    found = known.get(name)
    if found is None and not name.endswith("?"):
        lacks = f"needs the token {name!r}, which the tokenizer in {tokenizer.folder} lacks"
        raise UserError(f"the chat template {template!r} {lacks}; choose another template or tokenizer")
    return [] if found is None else [found]


@functools.lru_cache(maxsize=256)
def _encode_words(words: str, tokenizer: Tokenizer, starts: bool) -> list[int]:
    """The template's own words, which are the same in every conversation."""
    return tokenizer.encode(words, starts=starts)


def _encode_text(text: str, tokenizer: Tokenizer, marks: Sequence[str], starts: bool) -> list[int]:
    if not any(mark in text for mark in marks):
        return tokenizer.encode(text, starts=starts)
    ids: list[int] = []
    for number, part in enumerate(re.split(f"({'|'.join(map(re.escape, marks))})", text)):
        ids += tokenizer.spell(part) if number % 2 else tokenizer.encode(part, starts=starts and not ids)
    return ids


def _check_marks(rendered: Rendered, tokenizer: Tokenizer, template: Template) -> None:
    """No mark's ids stand in the tokens but the template's own, whatever the tokenizer does."""
    for mark in template.marks:
        for ids in (_encode_words(mark, tokenizer, starts) for starts in (True, False)):
            for i in (i for i, token in enumerate(rendered.tokens) if token == ids[0]):
                window = slice(i, i + len(ids))
                if rendered.tokens[window] == ids and not all(rendered.is_template[window]):
                    cannot = (
                        f"the tokenizer in {tokenizer.folder} cannot keep it apart from the template's own"
                    )
                    raise UserError(f"a message holds {mark!r}, and {cannot}; remove it or take chatml")


def _check_messages(messages: Sequence[Any], asks: bool) -> None:
    if not messages:
        raise UserError("the conversation has no messages; expected at least one of the user")
    expected = ("system", "user")
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f"message {number} is {message!r:.80}; expected the texts 'role' and 'content'")
        if role not in expected:
            found = f"message {number} has the role {role!r}; expected {' or '.join(map(repr, expected))}"
            raise UserError(f"{found}; put the turns in order")
        expected = ("assistant",) if role == "user" else ("user",)
    if asks and role != "user":
        raise UserError(
            f"message {len(messages)} is of the {role}; an answer needs one of the user before it"
        )


# <slots> are filled by `jinja`.
_JINJA = (
    "{% set n = namespace(system='', host=-1) %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set n.system = m['content'] %}{% elif m['role'] == 'user' and <host> %}{% set n.host = loop.index0 %}"
    "{% endif %}{% endfor %}<begin>{% for m in messages %}{% set content = m['content'] %}"
    "{% set system = n.system %}{% if m['role'] == 'system' %}<system>{% elif m['role'] == 'assistant' %}"
    "<ask><answer>{% elif system and loop.index0 == n.host %}<joined>{% else %}<user>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<ask>{% endif %}"
)
_ALL = (
    Template(
        "zephyr",
        begin="{bos?}▁",
        system="<|system|>\n{system}{eos}\n",
        user="<|user|>\n{content}{eos}\n",
        ask="<|assistant|>\n",
        answer="{content}{eos}\n",
        marks=("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    Template(
        "chatml",
        begin="{bos?}",
        system="{<|im_start|>}system\n{system}{<|im_end|>}\n",
        user="{<|im_start|>}user\n{content}{<|im_end|>}\n",
        ask="{<|im_start|>}assistant\n",
        answer="{content}{<|im_end|>}\n",
    ),
    Template(
        "mistral-v1",
        user="▁[INST]{ content} [/INST]",
        joins="first",
        user_with_system="▁[INST]{ system}\n\n{content} [/INST]",
        answer="{ content}{eos}",
        marks=("[INST]", "[/INST]"),
    ),
    Template(
        "mistral-v3",
        user="{[INST]}▁{content}{[/INST]}",
        joins="last",
        user_with_system="{[INST]}▁{system}\n\n{content}{[/INST]}",
        answer="▁{content}{eos}",
    ),
    Template(
        "llama2",
        begin="",
        user="{bos}▁[INST]{ content} [/INST]",
        joins="first",
        user_with_system="{bos}▁[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{content} [/INST]",
        answer="{ content} {eos}",
        marks=("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    ),
)
TEMPLATES = {entry.name: entry for entry in _ALL}
