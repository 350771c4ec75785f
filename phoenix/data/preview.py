"""Documents exactly as they are trained: each token, whether it has a loss, whether it is of the template.

In the terminal a token with a loss is green, a piece of the template is inverted, and every second token is
underlined, so that the borders show.  The page shows a token's id and its form in the vocabulary on hovering.
"""

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phoenix.tokenizer import Tokenizer

STYLE = """body{font:15px/1.7 system-ui;max-width:60em;margin:2em auto;padding:0 1em;white-space:pre-wrap}
span{border-left:1px solid #ccc}.loss{background:#cdebc9}.template{color:#777;font-family:monospace}
.loss.template{outline:1px solid #4a4}h2{font-size:1em;margin:2em 0 .5em}"""
LEGEND = "green: has a loss (what the model learns to write); grey, monospaced: a piece of the template"


@dataclass(frozen=True)
class Document:
    """One document of the store, three sequences of one length."""

    title: str
    tokens: Sequence[int]
    loss_mask: Sequence[bool]
    is_template: Sequence[bool]


def preview_text(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    """For a terminal, with ANSI colours; control characters of the rows are shown, not sent."""
    blocks = []
    for document in documents:
        parts = []
        for number, (_, text, loss, template) in enumerate(_pieces(document, tokenizer)):
            codes = ["32"] * loss + ["7"] * template + ["4"] * (number % 2)
            parts.append(f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if codes else text)
        blocks.append(f"--- {_shown(_counts(document))}\n{''.join(parts)}\n")
    return "\n".join(blocks)


def preview_page(documents: Sequence[Document], tokenizer: Tokenizer) -> str:
    """The same as an HTML page that stands alone: what comes from rows is escaped, and there is no script."""
    blocks = [
        f"<!doctype html><meta charset=utf-8><title>Preview</title><style>{STYLE}</style><p>{LEGEND}</p>"
    ]
    for document in documents:
        blocks.append(f"<h2>{html.escape(_counts(document))}</h2>")
        for i, text, loss, template in _pieces(document, tokenizer):
            kinds = " ".join(["loss"] * loss + ["template"] * template)
            title = html.escape(f"{i} {tokenizer.piece(i)}")
            blocks.append(f'<span class="{kinds}" title="{title}">{html.escape(text)}</span>')
    return "".join(blocks) + "\n"


def _counts(document: Document) -> str:
    return f"{document.title}: {len(document.tokens)} tokens, {sum(document.loss_mask)} with a loss"


def _pieces(document: Document, tokenizer: Tokenizer) -> Iterator[tuple[int, str, bool, bool]]:
    """id, text, loss, template of each token; bytes of one character show together at the last of them."""
    names, stream = {i: name for name, i in tokenizer.special_ids.items()}, tokenizer.stream()
    for token, loss, template in zip(document.tokens, document.loss_mask, document.is_template):
        i = int(token)
        yield i, _shown(names.get(i) or stream.feed(i)) or "·", bool(loss), bool(template)


def _shown(text: str) -> str:
    marks = {"\n": "⏎\n", "\t": "→\t"}
    return "".join(c if c.isprintable() else marks.get(c, c.encode("unicode_escape").decode()) for c in text)
