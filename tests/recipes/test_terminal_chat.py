"""A conversation in the terminal."""

import io
import sys
from pathlib import Path

import pytest
import torch

from phoenix import Mistral, Tokenizer
from phoenix.files import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import chat


@pytest.fixture
def talk(tmp_path, bpe_tokenizer_folder, tiny_config, monkeypatch, capsys):
    model = Mistral(tiny_config).init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "model", Tokenizer.from_pretrained(bpe_tokenizer_folder))

    def run(text: str, **options) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        options = {
            "model_name_or_path": tmp_path / "model",
            "max_new_tokens": 8,
            "dtype": "float32",
            **options,
        }
        chat.main(chat.ChatConfig(**options))
        return capsys.readouterr().out

    return run


def test_a_new_conversation_begins_like_the_first(talk):
    first, again = talk("Hallo!\n/neu\nHallo!\n\nHallo!\n", temperature=0.0).split("\n")[:2]
    assert first == again
    assert talk("Hallo!\n", temperature=0.0).split("\n")[0] == first


def test_a_reply_cannot_steer_the_terminal():
    assert chat.printable("\x1b[2JGrüße\n\tSie\x07") == "\ufffd[2JGrüße\n\tSie\ufffd"


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0, at most 1"),
        ({"temperature": -1.0}, "temperature is -1.0; expected"),
        ({"max_new_tokens": 250}, "no reply to this: prompt 0 has .* tokens; .*lower max_new_tokens"),
        ({"model_name_or_path": Path("nowhere")}, "nowhere: there is no such folder"),
        ({"chat_template": "chatmk"}, "did you mean 'chatml'"),
    ],
)
def test_a_mistake_is_one_sentence(talk, options, sentence):
    with pytest.raises(UserError, match=sentence):
        talk("Hallo!\n", **options)
