import html
import re

import pytest

from phoenix import chat
from phoenix.data.preview import Document, preview_page, preview_text
from phoenix.tokenizer import Tokenizer

EVIL = "Grüße 🙂 <script>alert(1)</script> & \x1b[31m \"'\ttab\nneue Zeile <|im_end|>"


@pytest.fixture(params=["bpe_tokenizer_folder", "sp_tokenizer_folder"])
def tokenizer(request):
    return Tokenizer.from_pretrained(request.getfixturevalue(request.param))


@pytest.fixture
def document(tokenizer):
    messages = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": "Für dich."}]
    rendered = chat.render(messages, tokenizer, "chatml")
    return Document("<b>rows</b>.jsonl, line 1", rendered.tokens, rendered.loss_mask, rendered.is_template)


def test_the_terminal_shows_every_token_with_its_marks(document, tokenizer):
    shown = preview_text([document], tokenizer).split("\n", 1)[1]
    parts = re.findall(r"\x1b\[([0-9;]*)m(.*?)\x1b\[0m", shown, re.DOTALL)
    marked = [
        (i, loss, template)
        for i, (loss, template) in enumerate(zip(document.loss_mask, document.is_template))
    ]
    marked = [(loss, template) for i, loss, template in marked if loss or template or i % 2]
    assert [("32" in codes.split(";"), "7" in codes.split(";")) for codes, _ in parts] == marked
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "\x1b" not in plain and "\\x1b[31m" in plain.replace("·", "")
    assert "Grüße" in plain.replace("·", "") and "🙂" in plain and "Für dich." in plain.replace("·", "")
    assert "⏎\n" in plain and "<|im_start|>" in plain


def test_the_page_escapes_what_comes_from_rows(document, tokenizer):
    page = preview_page([document], tokenizer)
    assert "<script" not in page and "<b>" not in page and "\x1b" not in page
    spans = re.findall(r'<span class="([a-z ]*)" title="([^"]*)">([^<]*)</span>', page)
    assert len(spans) == len(document.tokens)
    for (kinds, title, _), i, loss, template in zip(
        spans, document.tokens, document.loss_mask, document.is_template
    ):
        assert kinds.split() == ["loss"] * loss + ["template"] * template
        assert html.unescape(title) == f"{i} {tokenizer.piece(i)}"
    text = html.unescape("".join(text for _, _, text in spans)).replace("·", "")
    assert "<script>alert(1)</script> & \\x1b[31m \"'→\ttab⏎\nneue Zeile <|im_end|>" in text


def test_the_counts_are_stated(document, tokenizer):
    counts = f"{len(document.tokens)} tokens, {sum(document.loss_mask)} with a loss"
    assert counts in preview_text([document], tokenizer) and counts in preview_page([document], tokenizer)
    assert preview_text([], tokenizer) == ""
