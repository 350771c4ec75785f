"""What recipes/export_data.py writes is what TRL takes: conversational, with an explicit prompt."""

import json
import sys
from pathlib import Path

import datasets
import pytest
import tokenizers
import transformers
import trl.data_utils

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import export_data  # noqa: E402

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = [{"role": "system", "content": "Kurz."}, {"role": "user", "content": "Hund?"}]
BETTER, WORSE = ([{"role": "assistant", "content": text}] for text in ("Dog.", "Cat.\n\nOder?"))
PAIRS = [  # TRL's explicit prompt, its implicit one, and strings
    {"prompt": QUESTION, "chosen": BETTER, "rejected": WORSE},
    {"chosen": QUESTION + BETTER, "rejected": QUESTION + WORSE},
    {"prompt": "Hund?", "chosen": "Dog.", "rejected": "Cat.\n\nOder?"},
]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, chat_template=CHATML)


def loaded(tmp_path, form, kind, rows):
    tmp_path = tmp_path / "_".join(rows[0])  # datasets keeps what it has loaded from a folder
    tmp_path.mkdir()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = export_data.ExportConfig(tmp_path / "export", input=(path,), kind=kind, format=form)
    folder = export_data.main(config)
    return datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]


def chatml(turns):
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_pairs(tmp_path, tokenizer, form):
    found = loaded(tmp_path, form, "pairs", PAIRS)
    assert len(found) == len(PAIRS)
    for example, question in zip(found, (QUESTION, QUESTION, QUESTION[1:])):
        assert trl.data_utils.is_conversational(example)
        explicit = trl.data_utils.maybe_extract_prompt(example)
        assert explicit == {**example, "prompt": question, "chosen": BETTER, "rejected": WORSE}
        text = trl.data_utils.apply_chat_template(example, tokenizer)
        assert text["prompt"] == chatml(question) + "<|im_start|>assistant\n"
        assert text["chosen"] == "Dog.<|im_end|>\n" and text["rejected"] == "Cat.\n\nOder?<|im_end|>\n"
    alone = found.remove_columns(["source", "license"])  # TRL can double its own columns alone
    singles = trl.data_utils.unpair_preference_dataset(alone)  # for KTO
    assert list(singles["label"]) == [True] * 3 + [False] * 3


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_conversations_and_texts(tmp_path, tokenizer, form):
    example = loaded(tmp_path, form, "documents", [{"messages": QUESTION + BETTER}])[0]
    assert trl.data_utils.is_conversational(example)
    text = trl.data_utils.apply_chat_template(example, tokenizer)
    assert text["text"] == chatml(QUESTION + BETTER)
    [plain] = loaded(tmp_path, form, "documents", [{"text": "Ein Text."}])
    assert not trl.data_utils.is_conversational(plain) and plain["text"] == "Ein Text."
