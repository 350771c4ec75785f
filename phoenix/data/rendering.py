"""A row -> its documents: tokens, loss mask, and which tokens are the template's own; arrays of one length.

A conversation or a text is one document.  A pair is three: the prompt, and both answers from where its tokens
end.
"""

import numpy as np

from phoenix import chat
from phoenix.data.formats import Conversation, Message, Row, Text
from phoenix.tokenizer import Tokenizer

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens int32, loss mask bool, is a piece of the template
Turns = tuple[Message, ...]


def render_row(
    row: Row, tokenizer: Tokenizer, template: str, *, max_prompt_length: int | None = None
) -> tuple[tuple[Arrays, ...], bool]:
    """The documents of a row, and whether its prompt (of a pair) was cut to max_prompt_length tokens.

    A prompt is cut once a pair, so that both answers see the same one: first whole exchanges from its start,
    the system's turn staying, then tokens, BOS staying.  Raises UserError or ValueError for a row that the
    template or the vocabulary cannot express.
    """
    if isinstance(row, Text):
        return (_arrays(chat.render_text(row.text, tokenizer)),), False
    if isinstance(row, Conversation):
        return (_arrays(chat.render(row.messages, tokenizer, template)),), False
    turns, prompt = _fit_prompt(row.prompt, tokenizer, template, max_prompt_length)
    length, answers = len(prompt[0]), []
    for answer in (row.chosen, row.rejected):
        whole = _arrays(chat.render((*turns, *answer), tokenizer, template))
        if not np.array_equal(whole[0][:length], prompt[0]):
            raise ValueError(f"the template {template} changes a prompt by what follows it")
        answers.append(tuple(part[length:] for part in whole))
    limit, bos = max_prompt_length or length, int(prompt[0][0] == tokenizer.bos_id)
    kept = np.r_[:bos, length - limit + bos : length] if length > limit else slice(None)
    tokens, loss_mask, is_template = (part[kept] for part in prompt)
    is_cut = len(turns) < len(row.prompt) or length > limit
    return ((tokens, np.zeros_like(loss_mask), is_template), *answers), is_cut


def surely_too_long(row: Row, most: int, *, prompt_is_cut: bool) -> bool:
    """Whether a text of the row has more than `most` characters, known by them alone: the tokens of a line of
    60 MB would take half a minute and 3 GB.

    most: what max_length tokens can spell; prompt_is_cut: a pair's prompt does not count, since it is cut.
    """
    if isinstance(row, Text):
        return len(row.text) > most
    if isinstance(row, Conversation):
        turns = row.messages
    else:
        turns = (*(() if prompt_is_cut else row.prompt), *row.chosen, *row.rejected)
    return _longest(turns) > most


def unfit(documents: tuple[Arrays, ...], max_length: int) -> tuple[str, str] | None:
    """(filter, what it found) for a row of more tokens than that, or one whose text, chat or answer has no
    token with a loss; else None."""
    first, *answers = (len(tokens) for tokens, _, _ in documents)
    if (length := first + max(answers, default=0)) > max_length:
        return "too_long", f"{length} tokens"
    learned = [mask for _, mask, _ in documents[1:]] or [documents[0][1][1:]]
    return None if all(mask.any() for mask in learned) else ("no_target", "no token has a loss")


def _fit_prompt(turns: Turns, tokenizer: Tokenizer, template: str, limit: int | None) -> tuple[Turns, Arrays]:
    """A prompt's turns without those that the limit cuts, and their tokens, which may still be too many."""
    most = (limit or 0) * tokenizer.max_token_bytes  # characters that `limit` tokens can spell
    while True:
        shorter = _without_first_exchange(turns) if limit else ()
        if limit and not shorter:
            # Only the last `limit` tokens will stay.  Twice their characters, so that where a text is cut
            # has no effect on them.
            turns = tuple({**turn, "content": turn["content"][-2 * most :]} for turn in turns)
        if not shorter or _longest(turns) <= most:
            prompt = _arrays(chat.render(turns, tokenizer, template, add_generation_prompt=True))
            if not shorter or len(prompt[0]) <= limit:
                return turns, prompt
        turns = shorter


def _without_first_exchange(turns: Turns) -> Turns:
    """A prompt less its first question and answer; the system's turn stays.  Nothing if there is but one."""
    start = int(turns[0]["role"] == "system")
    return (*turns[:start], *turns[start + 2 :]) if len(turns) > start + 2 else ()


def _longest(turns: Turns) -> int:
    return max(len(turn["content"]) for turn in turns)


def _arrays(rendered: chat.Rendered) -> Arrays:
    # Through bytes, which takes a third of the time of np.array(list).
    masks = (np.frombuffer(bytes(mask), bool) for mask in (rendered.loss_mask, rendered.is_template))
    return np.array(rendered.tokens, np.int32), *masks
