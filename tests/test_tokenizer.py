"""Tokenizer: text goes in and comes back, never as a control token, in one piece or as a stream."""

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phoenix.files import UserError
from phoenix.tokenizer import Tokenizer

CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "[INST]",
    "▁",
    "Ġ",
]
TEXTS = st.lists(
    st.sampled_from([*CONTROL, " ", "  ", "\n", "Köln", "ß", "👩‍🚀"]) | st.text(max_size=8), max_size=6
)
TEXTS = TEXTS.map("".join)
FAST = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="session", params=["bpe", "sentencepiece", "sentencepiece.json"])
def folder(request, bpe_tokenizer_folder, sp_tokenizer_folder, tmp_path_factory) -> Path:
    if request.param == "bpe":
        return bpe_tokenizer_folder
    if request.param == "sentencepiece":
        return sp_tokenizer_folder
    return converted(sp_tokenizer_folder, tmp_path_factory.mktemp("converted"))


def converted(source: Path, folder: Path, scheme: str = "always") -> Path:
    """The sentencepiece fixture as a tokenizer.json, as converters write it."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    normal = [
        p
        for i, p in enumerate(pieces)
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    ]
    merges = []
    for piece in sorted((p for p in normal if len(p) > 1), key=lambda p: -model.get_score(ids[p])):
        pairs = [
            (piece[:n], piece[n:]) for n in range(1, len(piece)) if piece[:n] in ids and piece[n:] in ids
        ]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    bpe = tokenizers.models.BPE(
        vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    library = tokenizers.Tokenizer(bpe)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    library.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_tokens([tokenizers.AddedToken("<|im_start|>", special=False), "<|im_end|>"])
    library.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    library.enable_truncation(5)
    library.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@FAST
@given(text=TEXTS, starts=st.booleans())
def test_text_comes_back_and_is_never_a_control_token(folder, text, starts):
    tokenizer = load(folder)
    ids = tokenizer.encode(text, starts=starts)
    assert tokenizer.decode(ids, starts=starts) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(tokenizer.spell(text), starts=False) == text


@FAST
@given(data=st.data())
def test_stream_equals_decode(folder, data):
    tokenizer = load(folder)
    anything = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)
    control = st.lists(st.sampled_from(sorted(tokenizer.special_ids.values())), max_size=2)
    ids = data.draw(control) + data.draw(anything | TEXTS.map(tokenizer.encode))
    stream = tokenizer.stream()
    parts = [stream.feed(i) for i in ids]
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids)


def test_stream_gives_whole_characters_only(folder):
    tokenizer, text = load(folder), "Köln 👩‍🚀 ✓"
    stream, seen = tokenizer.stream(), ""
    for i in tokenizer.encode(text):
        seen += stream.feed(i)
        assert text.startswith(seen)
    assert seen == text and stream.flush() == ""


def test_ids_and_names(folder):
    tokenizer = load(folder)
    bpe = (
        (folder / "tokenizer.json").is_file()
        and "sentencepiece" not in folder.name
        and "<s>" not in tokenizer._ids
    )
    assert (tokenizer.bos_id, tokenizer.eos_id) == ((None, 2) if bpe else (1, 2))
    assert tokenizer.vocab_size == (512 if bpe else 482)
    assert {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_ids.keys()
    for i in range(tokenizer.vocab_size):
        assert tokenizer.token_id(tokenizer.piece(i)) == i
    assert tokenizer.token_id("no such piece") is None
    assert tokenizer.chat_template == ("chatml" if bpe else None)


@pytest.mark.parametrize("text", ["Hallo Welt", " Hallo", "  zwei  ", "12 Uhr\n\nÜbung", "", " "])
def test_sentencepiece_text_that_starts_or_goes_on(sp_tokenizer_folder, text):
    model = sentencepiece.SentencePieceProcessor(model_file=str(sp_tokenizer_folder / "tokenizer.model"))
    tokenizer = load(sp_tokenizer_folder)
    assert tokenizer.encode(text) == model.encode(text)
    line_break = model.encode("\n" + text)  # "▁", then the byte of the line break, with which nothing merges
    assert tokenizer.encode(text, starts=False) == line_break[2:]


@pytest.mark.parametrize("scheme, legacy", [("always", True), ("first", False)])
def test_json_equals_sentencepiece_also_with_leading_spaces(sp_tokenizer_folder, tmp_path, scheme, legacy):
    tokenizer, original = load(converted(sp_tokenizer_folder, tmp_path, scheme)), load(sp_tokenizer_folder)
    for text in ["Der Zug nach Köln", " Hallo", "   drei", "a", " ", "Straße\n  eingerückt"]:
        for starts in (True, False):
            assert tokenizer.encode(text, starts=starts) == original.encode(text, starts=starts)
    assert (tokenizer.legacy, original.legacy) == (legacy, True)


def test_model_file_wins_over_a_conversion(sp_tokenizer_folder, tmp_path):
    both = copy(sp_tokenizer_folder, tmp_path)
    converted(sp_tokenizer_folder, tmp_path)
    alone = load(sp_tokenizer_folder)
    assert load(both).digest == alone.digest


def without_byte_tokens(source: Path, folder: Path, characters: str) -> Path:
    """The byte-level fixture without some single-byte tokens, as the GGUF of SmolLM2 is."""
    stored = json.loads((source / "tokenizer.json").read_text())
    gone = set(characters)
    vocabulary = {piece: i for piece, i in stored["model"]["vocab"].items() if not gone & set(piece)}
    stored["model"]["vocab"] = vocabulary
    pairs = [m if isinstance(m, list) else m.split(" ") for m in stored["model"]["merges"]]
    stored["model"]["merges"] = [pair for pair in pairs if not gone & set("".join(pair))]
    copy(source, folder)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    return folder


def test_a_character_without_a_token_is_named(bpe_tokenizer_folder, tmp_path):
    tokenizer = load(without_byte_tokens(bpe_tokenizer_folder, tmp_path, "Ã"))  # byte C3: all umlauts
    with pytest.raises(ValueError, match=r"'ö' \(U\+00F6\)"):
        tokenizer.encode("Der Zug nach Köln")
    assert tokenizer.decode(tokenizer.encode("Der Zug")) == "Der Zug"
    with pytest.raises(ValueError, match="ud800"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("spaces", [True, False])
def test_sentencepiece_without_byte_pieces_names_the_character(tmp_path, spaces):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Der Hund und die Katze"] * 9), model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe", vocab_size=30, hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=not spaces,
    )  # fmt: skip
    tokenizer = load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Der Hund")) == "Der Hund"
    with pytest.raises(ValueError, match="'ß'"):
        tokenizer.encode("DerHundß")
    if spaces:
        assert tokenizer.decode(tokenizer.encode("Der   Hund")) == "Der   Hund"
    else:  # this model joins the spaces: said, not done in silence
        with pytest.raises(ValueError, match="cannot express"):
            tokenizer.encode("Der   Hund")


def test_added_tokens_that_are_not_special_stay_out_of_text(bpe_tokenizer_folder, tmp_path):
    stored = json.loads((bpe_tokenizer_folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": True, "special": False}
    stored["added_tokens"].append({"id": 512, "content": "<think>", **flags})
    stored["added_tokens"].append({"id": 513, "content": "Hund", **flags})
    folder = copy(bpe_tokenizer_folder, tmp_path)
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = load(folder)
    text = " <think> der Hund"
    assert max(tokenizer.encode(text)) < 512 and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == load(bpe_tokenizer_folder).encode(text)
    assert tokenizer.special_ids["<think>"] == 512 and tokenizer.piece(513) == "Hund"


def test_pieces_that_sentencepiece_itself_parses_stay_out_of_text(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Der Hund, die Katze <|x|>"] * 9), model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe", vocab_size=300, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=["<|x|>"], remove_extra_whitespaces=False, normalization_rule_name="identity",
    )  # fmt: skip
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    i = library.piece_to_id("<|x|>")
    assert i in library.encode("der <|x|> Hund")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|x|>": i}))
    tokenizer = load(tmp_path)
    ids = tokenizer.encode("der <|x|> Hund")
    assert i not in ids and tokenizer.decode(ids) == "der <|x|> Hund"


LOOKALIKES = [
    "＜｜im_end｜＞",
    "＜/s＞",
    "＜s＞",
    "［/INST］",
    "<|IM_END|>",
    "﹤/s﹥",
    "<|ｉm_end|>",
    "<|im_end|\u200b>",
]


@pytest.fixture(scope="session", params=["NFKC", "Lowercase", "nmt_nfkc", "nmt_nfkc_cf"])
def folding(request, bpe_tokenizer_folder, tmp_path_factory) -> Tokenizer:
    """A tokenizer whose normaliser would make control tokens of other characters."""
    folder = tmp_path_factory.mktemp(request.param)
    if "nmt" not in request.param:
        copy(bpe_tokenizer_folder, folder)
        edit(folder, "tokenizer.json", normalizer={"type": request.param})
        return load(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Der Hund, die Katze <|im_end|>"] * 9), minloglevel=2, model_type="bpe",
        model_prefix=str(folder / "tokenizer"), vocab_size=300, hard_vocab_limit=False, byte_fallback=True,
        normalization_rule_name=request.param, user_defined_symbols=["<|im_end|>", "[/INST]"],
    )  # fmt: skip
    edit(folder, "added_tokens.json", **{"<|im_end|>": 3, "[/INST]": 4})
    return load(folder)


@pytest.mark.parametrize("lookalike", LOOKALIKES)
@pytest.mark.parametrize("text", ["{}", "der {} Hund", "x{}\n"])
def test_what_a_normaliser_makes_a_control_token_of_is_refused_or_kept_as_it_is(folding, lookalike, text):
    text = text.format(lookalike)
    for starts in (True, False):
        try:
            ids = folding.encode(text, starts=starts)
        except ValueError as error:
            assert "cannot express" in str(error)
            continue
        assert not set(ids) & set(folding.special_ids.values())
        assert folding.decode(ids, starts=starts) == text


def test_digest_is_of_what_decides_the_ids(folder, tmp_path):
    digest = load(folder).digest
    irrelevant, relevant = copy(folder, tmp_path / "a"), copy(folder, tmp_path / "b")
    edit(irrelevant, "tokenizer_config.json", chat_template="x", model_max_length=7, padding_side="left")
    if (irrelevant / "tokenizer.json").is_file():
        stored = json.loads((irrelevant / "tokenizer.json").read_text())
        text = json.dumps({**stored, "padding": None, "truncation": None}, indent=4)
        (irrelevant / "tokenizer.json").write_text(text)
    assert load(irrelevant).digest == digest
    edit(relevant, "tokenizer_config.json", eos_token="<|im_start|>")
    assert load(relevant).digest != digest
    assert re.fullmatch("[0-9a-f]{64}", digest)


def test_save_keeps_the_files_and_names_the_template(folder, tmp_path):
    tokenizer = load(folder)
    tokenizer.chat_template, tokenizer.jinja = "zephyr", "{{ messages }}"
    tokenizer.save(tmp_path)
    for path in folder.glob("*"):
        if path.name in ("tokenizer.json", "tokenizer.model", "added_tokens.json"):
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    again, config = load(tmp_path), json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert again.digest == tokenizer.digest and again.chat_template == "zephyr"
    assert config["chat_template"] == "{{ messages }}"
    again.save(tmp_path / "again")
    assert load(tmp_path / "again").chat_template == "zephyr"


def test_model_file_alone_is_enough(sp_tokenizer_folder, tmp_path):
    shutil.copy(sp_tokenizer_folder / "tokenizer.model", tmp_path)
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.legacy, tokenizer.vocab_size) == (1, 2, True, 480)
    edit(tmp_path, "tokenizer_config.json", add_bos_token=False, legacy=False)
    assert (load(tmp_path).bos_id, load(tmp_path).legacy) == (None, False)


@pytest.mark.parametrize("name, content, message", [
    ("tokenizer.model", b"broken \x01\x02", "not a sentencepiece model"),
    ("tokenizer.model", b"", "not a sentencepiece model"),
    ("tokenizer.json", b"{]", "line 1"),
    ("tokenizer.json", b"[1]", "not an object"),
    ("tokenizer.json", b"{}", "not a usable tokenizer"),
    ("tokenizer.json", b'{"version": "1.0", "model": {"type": "X"}, "normalizer": null, '
     b'"pre_tokenizer": null, "decoder": null}', "not a usable tokenizer"),
    ("tokenizer.pkl", b"\x80\x04", "no tokenizer here.*tokenizer.model or tokenizer.json"),
])  # fmt: skip
def test_broken_folders(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_files_of_different_tokenizers_are_refused(sp_tokenizer_folder, tmp_path):
    folder = copy(sp_tokenizer_folder, tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 300}))
    with pytest.raises(UserError, match=r"<\|im_end\|>.* 300"):
        load(folder)


@pytest.mark.parametrize("values", [
    {"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"a": {"content": "x"}}},
    {"added_tokens_decoder": {"999999999999": {"content": "x"}}},
    {"added_tokens_decoder": {"-1": {"content": "x"}}}, {"added_tokens_decoder": {"600": {}}},
    {"added_tokens_decoder": {"600": {"content": ["x"]}}},
])  # fmt: skip
def test_damaged_added_tokens_are_refused(folder, tmp_path, values):
    copied = copy(folder, tmp_path / "damaged")
    edit(copied, "tokenizer_config.json", **values)
    with pytest.raises(UserError, match="the added tokens are damaged"):
        load(copied)


@pytest.mark.parametrize("entry", [{"content": "x"}, {"id": "600", "content": "x"}, {"id": 600}, 7])
def test_damaged_added_tokens_of_the_library_are_refused(bpe_tokenizer_folder, tmp_path, entry):
    copied = copy(bpe_tokenizer_folder, tmp_path / "damaged")
    edit(copied, "tokenizer.json", added_tokens=[entry])
    with pytest.raises(UserError, match="the added tokens are damaged"):
        load(copied)


@pytest.mark.parametrize("value", [7, ["</s>"], {"content": 7}, {}, True])
def test_an_end_that_is_no_text_is_none(bpe_tokenizer_folder, tmp_path, value):
    copied = copy(bpe_tokenizer_folder, tmp_path / "copy")
    edit(copied, "tokenizer_config.json", eos_token=value)
    assert load(copied).eos_id is None


def test_an_id_outside_the_vocabulary(folder):
    tokenizer = load(folder)
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=str(bad)):
            tokenizer.decode([bad])


def load(folder: Path) -> Tokenizer:
    if folder not in CACHE or folder.name not in ("bpe_tokenizer0", "sp_tokenizer0", "converted0"):
        CACHE[folder] = Tokenizer.from_pretrained(folder)
    return CACHE[folder]


CACHE: dict[Path, Tokenizer] = {}


def copy(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, dirs_exist_ok=True))


def edit(folder: Path, name: str, **values) -> None:
    path = folder / name
    stored = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(stored | values))
