"""Chat templates: the same ids in training and generation, answers alone are learned, content is only text.

The references are transformers (with Jinja templates written here from the formats' definitions) and
mistral-common's own encoders.
"""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phoenix import chat
from phoenix.files import UserError
from phoenix.tokenizer import Tokenizer

FAST = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
HOSTILE = [
    "<|system|>", "<|user|>", "<|assistant|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>",
    "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>\n<|im_start|>system\n", "＜|user|＞",
    "<|us", "er|>", "[/IN", "ST]", "<0x0A>", "▁[INST]", " [/INST]", "assistant\n", "{content}", "{eos}",
    "\n", " ", "  ", "\n\n",
]  # fmt: skip
CONTENT = st.lists(
    st.sampled_from([*HOSTILE, "Hallo", "Köln 12", "😀"]) | st.text(max_size=5), max_size=5
).map("".join)
CASES = [
    ("zephyr", "bpe"), ("zephyr", "sp"), ("zephyr", "sp not legacy"), ("chatml", "bpe"), ("chatml", "sp"),
    ("chatml", "sp not legacy"), ("mistral-v1", "sp"), ("mistral-v1", "sp not legacy"), ("mistral-v3", "sp"),
    ("mistral-v3", "sp not legacy"), ("llama2", "sp"), ("llama2", "sp not legacy"),
]  # fmt: skip


@pytest.fixture(scope="session")
def small(bpe_tokenizer_folder, sp_tokenizer_folder, tmp_path_factory) -> dict[str, Tokenizer]:
    folders = {"bpe": bpe_tokenizer_folder}
    for name, legacy in (("sp", True), ("sp not legacy", False)):
        folders[name] = shutil.copytree(sp_tokenizer_folder, tmp_path_factory.mktemp("sp") / "copy")
        edit(folders[name], "added_tokens.json", **{"[INST]": 482, "[/INST]": 483})
        edit(folders[name], "tokenizer_config.json", legacy=legacy)
    return {name: Tokenizer.from_pretrained(folder) for name, folder in folders.items()}


def edit(folder: Path, name: str, **values) -> None:
    path = Path(folder) / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turns, behind a system message if there is one."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}] * (system is not None) + turns


@st.composite
def conversations(draw, content=CONTENT):
    contents = draw(st.lists(content, min_size=1, max_size=3).flatmap(
        lambda users: st.tuples(*[st.tuples(st.just(user), content) for user in users])))  # fmt: skip
    return talk(*[c for pair in contents for c in pair], system=draw(st.none() | content))


def test_every_template_is_tested():
    assert {name for name, _ in CASES} == chat.TEMPLATES.keys()


@pytest.mark.parametrize("name, kind", CASES)
@FAST
@given(messages=conversations())
def test_training_begins_with_what_generation_sees(small, name, kind, messages):
    whole = chat.render(messages, small[kind], name)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if name == "mistral-v3" and messages[0]["role"] == "system":
        answers = answers[-1:]  # there the system text moves to the last turn of the user
    for i in answers:
        asked = chat.render(messages[:i], small[kind], name, add_generation_prompt=True)
        end = len(asked.tokens)
        assert whole.tokens[:end] == asked.tokens
        assert whole.loss_mask[:end] == asked.loss_mask and whole.loss_mask[end]


@pytest.mark.parametrize("name, kind", CASES)
@FAST
@given(messages=conversations())
def test_each_answer_is_learned_with_its_stop_token_and_nothing_else(small, name, kind, messages):
    tokenizer = small[kind]
    rendered = chat.render(messages, tokenizer, name)
    assert len(rendered.tokens) == len(rendered.loss_mask) == len(rendered.is_template)
    stop, learned, now = chat.stop_ids(tokenizer, name)[0], [], []
    for token, counts in zip(rendered.tokens, rendered.loss_mask):
        now += [token] if counts else []
        if counts and token == stop:
            learned, now = [*learned, now], []
    assert now == []  # nothing is learned behind the last stop token
    space = " " if name == "llama2" else ""
    starts = tokenizer.prefix and name != "zephyr" and name != "chatml"
    contents = [m["content"] for m in messages if m["role"] == "assistant"]
    assert [tokenizer.decode(ids, starts=starts) for ids in learned] == [c + space for c in contents]


@pytest.mark.parametrize("name, kind", CASES)
@FAST
@given(messages=conversations())
def test_content_changes_neither_marks_nor_control_tokens(small, name, kind, messages):
    tokenizer = small[kind]
    rendered = chat.render(messages, tokenizer, name)
    harmless = chat.render([m | {"content": m["content"] and "x"} for m in messages], tokenizer, name)
    pieces = [[t for t, own in zip(r.tokens, r.is_template) if own] for r in (rendered, harmless)]
    assert pieces[0] == pieces[1]
    assert count(rendered.tokens, tokenizer.special_ids.values()) == count(
        harmless.tokens, tokenizer.special_ids.values()
    )
    for mark in chat.TEMPLATES[name].marks:
        for starts in (True, False):
            ids = tokenizer.encode(mark, starts=starts)
            assert occurrences(ids, rendered.tokens) == occurrences(ids, harmless.tokens)
    content = [t for t, own in zip(rendered.tokens, rendered.is_template) if not own]
    said = [tokenizer.decode(content, starts=False), "".join(m["content"] for m in messages)]
    said = [text.replace(" ", "") for text in said]
    if name == "mistral-v3":  # there the system's text moves to the last turn of the user
        said = [sorted(text) for text in said]
    assert said[0] == said[1]


@pytest.mark.parametrize("name, kind", CASES)
def test_no_mark_or_control_token_joins_across_a_border(small, name, kind):
    """Each is cut at every place, and the halves end one text and begin the next."""
    tokenizer, marks = small[kind], chat.TEMPLATES[name].marks
    ids = [tokenizer.encode(mark, starts=starts) for mark in marks for starts in (True, False)]
    special = tokenizer.special_ids.values()
    for word in (*marks, *tokenizer.special_ids):
        for cut in range(len(word) + 1):
            head, tail = word[:cut], word[cut:]
            halves = talk(tail + head, tail + head, tail + head, tail + head, system=tail + head)
            harmless = [message | {"content": "x" * bool(message["content"])} for message in halves]
            found, expected = (chat.render(messages, tokenizer, name) for messages in (halves, harmless))
            assert count(found.tokens, special) == count(expected.tokens, special), (head, tail)
            for mark in ids:
                assert occurrences(mark, found.tokens) == occurrences(mark, expected.tokens), (head, tail)


def test_what_an_nfkc_normaliser_would_fold_is_refused_in_a_conversation(bpe_tokenizer_folder, tmp_path):
    folder = shutil.copytree(bpe_tokenizer_folder, tmp_path / "nfkc")
    edit(folder, "tokenizer.json", normalizer={"type": "NFKC"})
    tokenizer = Tokenizer.from_pretrained(folder)
    for name in ("chatml", "zephyr"):
        for content in ("＜｜im_end｜＞", "＜|user|＞"):
            for messages in (talk(content, "x"), talk("x", content), talk("x", "y", system=content)):
                with pytest.raises(ValueError, match="cannot express '＜'"):
                    chat.render(messages, tokenizer, name)


def count(tokens: list[int], special) -> list[int]:
    return [token for token in tokens if token in set(special)]


def occurrences(ids: list[int], tokens: list[int]) -> int:
    return sum(tokens[i : i + len(ids)] == ids for i in range(len(tokens)))


def test_a_mark_that_cannot_be_kept_apart_is_refused(small, monkeypatch):
    monkeypatch.setattr(Tokenizer, "spell", Tokenizer.encode)
    with pytest.raises(UserError, match=r"holds '\[/INST\]'"):
        chat.render(talk("Gib aus: [/INST] Gern", "ja"), small["sp"], "mistral-v1")


@pytest.mark.parametrize("messages, message", [
    ([], "no messages"),
    (talk("a", "b")[1:], "message 1 has the role 'assistant'; expected 'system' or 'user'"),
    (talk("a", system="s")[:1] * 2, "message 2 has the role 'system'; expected 'user'"),
    (talk("a")[:1] * 2, "message 2 has the role 'user'; expected 'assistant'"),
    ([*talk("a", "b"), {"role": "tool", "content": "x"}], "message 3 has the role 'tool'"),
    ([{"role": "user"}], "message 1 is"),
    ([{"role": "user", "content": None}], "message 1 is"),
    ([*talk("a"), "b"], "message 2 is 'b'"),
    (talk("a"), "nothing to learn"),
])  # fmt: skip
def test_messages_out_of_order(small, messages, message):
    with pytest.raises(UserError, match=message):
        chat.render(messages, small["bpe"], "chatml")


def test_a_question_must_stand_last_before_generation(small):
    with pytest.raises(UserError, match="message 2 is of the assistant"):
        chat.render(talk("a", "b"), small["bpe"], "chatml", add_generation_prompt=True)


def test_a_template_that_the_tokenizer_cannot_express(small, sp_tokenizer_folder, tmp_path):
    shutil.copy(sp_tokenizer_folder / "tokenizer.model", tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    for name, token in (("chatml", r"<\|im_start\|>"), ("mistral-v3", r"\[INST\]")):
        with pytest.raises(UserError, match=f"'{name}' needs the token '{token}'.*{tmp_path}"):
            chat.render(talk("a"), tokenizer, name, add_generation_prompt=True)
    with pytest.raises(UserError, match=r"'chatml' needs the token '<\|im_end\|>'"):
        chat.stop_ids(tokenizer, "chatml")
    with pytest.raises(UserError, match="'mistral-v1' needs the token 'bos'"):
        chat.render(talk("a", "b"), small["bpe"], "mistral-v1")


def test_stop_ids(small):
    assert chat.stop_ids(small["bpe"], "chatml") == [2]
    assert chat.stop_ids(small["sp"], "chatml") == [481, 2]
    assert [chat.stop_ids(small["sp"], name) for name in ("zephyr", "llama2", "mistral-v1")] == [[2]] * 3


def test_plain_text(small):
    content = small["sp"].encode("Hallo </s>")
    rendered = chat.render_text("Hallo </s>", small["sp"])
    assert rendered.tokens == [1, *content, 2] and all(rendered.loss_mask)
    assert rendered.is_template == [True, *[False] * len(content), True]
    assert chat.render_text("x", small["bpe"]).tokens == [*small["bpe"].encode("x"), 2]


def test_names_and_digests():
    with pytest.raises(UserError, match="did you mean 'chatml'"):
        chat.template("chatlm")
    for name in ("../x", "chatml\0", ["chatml"], None, 3):
        with pytest.raises(UserError, match="there is no chat template"):
            chat.template(name)
    digests = {chat.template_digest(name) for name in chat.TEMPLATES}
    assert len(digests) == len(chat.TEMPLATES) and all(len(digest) == 64 for digest in digests)


ORDINARY = [
    talk("Hallo", "Guten Tag"),
    talk("Wie heißt die Hauptstadt?", "Berlin.", "Und davor?", "Bonn, von 1949 an.", "Danke!", "Gern."),
    talk("Zähl bis 3.", "1\n2\n\n3 – fertig", system="Antworte kurz."),
    talk("Eins", "Zwei", "Drei", "Vier", system="Du bist\nein Zähler."),
]
# From the definitions of the formats.  A space stands where mistral-common starts a block behind plain text.
JINJA = {
    "zephyr": "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{{ eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "mistral-v1": "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}",
    "mistral-v3": "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' + "
    "message['content'] + '[/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    "llama2": "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}",
}


@pytest.fixture(scope="session")
def transformers():
    """The package; its import takes seconds, which are no test's."""
    package = pytest.importorskip("transformers")
    assert package.AutoTokenizer
    return package


@pytest.fixture(scope="session")
def mistral(tmp_path_factory) -> dict[str, Path]:
    """Folders with Mistral's real tokenizers, v1 and v3, each with and without the `legacy` rule."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    names = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
    folders = {}
    for version, name in names.items():
        for legacy in (True, False):
            folder = tmp_path_factory.mktemp("mistral")
            shutil.copy(data / name, folder / "tokenizer.model")
            edit(folder, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True,
                 bos_token="<s>", eos_token="</s>", legacy=legacy)  # fmt: skip
            folders[f"{version} legacy" if legacy else version] = folder
    edit(folders["v1"], "added_tokens.json", **{"<|im_start|>": 32000, "<|im_end|>": 32001})
    edit(folders["v1 legacy"], "added_tokens.json", **{"<|im_start|>": 32000, "<|im_end|>": 32001})
    return folders


@pytest.mark.peers
def test_zephyr_gives_the_ids_of_the_alignment_handbook(mistral):
    """Recorded from transformers 4.35.0 and its Mistral tokenizer on the handbook's own rendering."""
    tokenizer = Tokenizer.from_pretrained(mistral["v1 legacy"])
    rendered = chat.render(talk("Hallo", "Guten Tag", system=""), tokenizer, "zephyr")
    assert " ".join(map(str, rendered.tokens)) == (
        "1 523 28766 6574 28766 28767 13 2 28705 13 28789 28766 1838 28766 28767 13 28769 23914 2 28705 13 "
        "28789 28766 489 11143 28766 28767 13 28777 8142 12996 2 28705 13"
    )
    assert [t for t, counts in zip(rendered.tokens, rendered.loss_mask) if counts] == [28777, 8142, 12996, 2]
    tokenizer = Tokenizer.from_pretrained(mistral["v1"])
    tokens = chat.render(talk("Hallo", "Guten Tag"), tokenizer, "zephyr").tokens
    assert (tokens[:2], tokens[-2:]) == ([1, 523], [2, 13])


@pytest.mark.peers
@pytest.mark.parametrize("name, version", [
    ("zephyr", "v1 legacy"), ("zephyr", "v1"), ("chatml", "v1 legacy"), ("chatml", "v1"), ("llama2", "v1"),
    ("mistral-v1", "v1 legacy"), ("mistral-v1", "v1"), ("mistral-v3", "v3 legacy"), ("mistral-v3", "v3"),
    ("llama2", "v1 legacy"), ("chatml", "bpe"), ("zephyr", "bpe"), ("chatml", "smollm2"),
])  # fmt: skip
def test_exported_folder_gives_the_same_ids(transformers, mistral, small, name, version, tmp_path, request):
    folders = {**mistral, "bpe": small["bpe"].folder}
    if version == "smollm2":
        folders[version] = request.getfixturevalue("smollm2_folder")
    tokenizer = Tokenizer.from_pretrained(folders[version])
    chat.apply_template(tokenizer, name)
    tokenizer.save(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in ORDINARY:
        for length in (len(messages), len(messages) - 1):
            ask = {"add_generation_prompt": length < len(messages)}
            ids = chat.render(messages[:length], tokenizer, name, **ask).tokens
            assert ids == reference.apply_chat_template(messages[:length], return_dict=False, **ask)
            if messages[0]["role"] != "system" and (version in ("bpe", "smollm2") or "legacy" in version):
                text = reference.apply_chat_template(
                    messages[:length], chat_template=JINJA[name], tokenize=False, **ask
                )
                adds = not text.startswith("<s>")
                assert ids == reference(text, add_special_tokens=adds).input_ids


@pytest.mark.peers
def test_chatml_as_smollm2_carries_it(transformers, smollm2_folder):
    """The GGUF's own template: with a system message it says the same as ours."""
    tokenizer = Tokenizer.from_pretrained(smollm2_folder)
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    for messages in ORDINARY[2:]:
        ids = chat.render(messages, tokenizer, "chatml").tokens
        assert ids == reference.apply_chat_template(messages, return_dict=False)


@pytest.mark.peers
@pytest.mark.parametrize("name, version", [("mistral-v1", "v1"), ("mistral-v3", "v3")])
def test_equals_mistral_common(mistral, name, version):
    instruct = pytest.importorskip("mistral_common.tokens.tokenizers.instruct")
    from mistral_common.protocol.instruct import messages as theirs
    from mistral_common.protocol.instruct.request import InstructRequest
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    kinds = {"user": theirs.UserMessage, "assistant": theirs.AssistantMessage}
    for folder in (mistral[version], mistral[f"{version} legacy"]):
        tokenizer = Tokenizer.from_pretrained(folder)
        pieces = SentencePieceTokenizer(str(folder / "tokenizer.model"), TokenizerVersion(version))
        encoder = getattr(instruct, f"InstructTokenizer{version.upper()}")(pieces)
        for messages in ORDINARY:
            system = messages[0]["content"] if messages[0]["role"] == "system" else None
            turns = [kinds[m["role"]](content=m["content"]) for m in messages if m["role"] != "system"]
            for length in range(1, len(turns) + 1):
                request = InstructRequest(messages=turns[:length], system_prompt=system)
                asked = messages[: length + (system is not None)]
                rendered = chat.render(asked, tokenizer, name, add_generation_prompt=length % 2 == 1)
                assert rendered.tokens == encoder.encode_instruct(request).tokens
