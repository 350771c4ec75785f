import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phoenix.data.store import MANIFEST, TokenStore
from phoenix.files import UserError

LENGTHS = [7, 1, 12, 3, 30, 5, 9]


@pytest.mark.parametrize("shard_tokens", [1, 13, 10_000])
@pytest.mark.parametrize("vocab_size, dtype", [(500, np.uint16), (65_535, np.uint16), (65_536, np.int32)])
def test_what_was_written_is_read(make_store, shard_tokens, vocab_size, dtype):
    store, documents = make_store(LENGTHS, shard_tokens, vocab_size)
    assert store.lengths.tolist() == LENGTHS and len(store) == len(LENGTHS)
    assert {1: 7, 13: 6, 10_000: 1}[shard_tokens] == len(store.shards)
    for index, (tokens, mask) in enumerate(documents):
        got_tokens, got_mask = store.document(index)
        assert got_tokens.dtype == dtype and got_mask.dtype == bool
        assert got_tokens.tolist() == tokens.tolist() and got_mask.tolist() == mask.tolist()
    whole, masks = (np.concatenate(part) for part in zip(*documents))
    for start, end in [(0, 1), (0, 67), (6, 21), (22, 23), (66, 67)]:
        tokens, mask = store.span(start, end)
        assert tokens.tolist() == whole[start:end].tolist() and mask.tolist() == masks[start:end].tolist()
    assert np.concatenate(list(store.loss_masks())).tolist() == masks.tolist()
    entry = store.manifest["splits"]["train"]
    assert (entry["rows"], entry["documents"], entry["tokens"]) == (7, 7, sum(LENGTHS))
    assert entry["target_tokens"] == masks.sum()
    TokenStore.open(store.folder, verify=True)


def test_a_document_is_a_view_of_the_mapped_file(make_store):
    store, _ = make_store(LENGTHS, 10_000)
    assert np.shares_memory(store.document(3)[0], store.shards[0]["tokens"])
    assert isinstance(store.shards[0]["tokens"], np.memmap)


@pytest.mark.parametrize("shard_tokens", [1, 10_000])
def test_origins_name_all_rows_that_a_span_touches(make_store, shard_tokens):
    store, _ = make_store(LENGTHS, shard_tokens)
    owner = np.repeat(np.arange(1, 8), LENGTHS)
    for start, end in [(0, 1), (6, 7), (6, 9), (7, 8), (0, 67), (66, 67)]:
        assert store.origins(start, end) == [f"rows.jsonl, line {i}" for i in np.unique(owner[start:end])]


def test_the_digest_follows_the_arrays(make_store):
    digests = [make_store(LENGTHS, seed=seed)[0].digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_another_tokenizer_kind_split_or_version_is_refused(make_store):
    store, _ = make_store(LENGTHS)
    store.require_tokenizer("abc")
    with pytest.raises(UserError, match=r"made with the tokenizer abc.*prepare"):
        store.require_tokenizer("def")
    with pytest.raises(UserError, match=r"'documents'.*expected .*'pairs'"):
        TokenStore.open(store.folder, kind="pairs")
    with pytest.raises(UserError, match=r"no split 'eval'; it has train"):
        TokenStore.open(store.folder, "eval")
    assert TokenStore.has_split(store.folder, "train") and not TokenStore.has_split(store.folder, "eval")
    change(store.folder, format_version=3)
    with pytest.raises(UserError, match=r"\(3, 'documents'\); expected \(2, 'documents'\)"):
        TokenStore.open(store.folder)


def test_a_store_of_another_form_of_its_template_is_refused(make_store):
    store, _ = make_store(LENGTHS)
    store.require_template(store.manifest.get("template_digest"))
    with pytest.raises(UserError, match="another form of the template"):
        store.require_template("0" * 64)


def change(folder, **values):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, **values}))


@pytest.mark.parametrize("name", ["tokens", "loss_mask", "offsets", "origin", "provenance"])
def test_damage_is_found_and_named(make_store, name):
    store, _ = make_store(LENGTHS, 10_000)
    path = store.folder / f"train_00000_{name}.npy"
    data = path.read_bytes()
    for damaged in (None, b"", data[:-1], data + b"x"):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"missing or cut.*prepare") as error:
            TokenStore.open(store.folder)
        assert str(path) in str(error.value)
        path.write_bytes(data)
    flipped = bytearray(data)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(UserError, match=r"other sha256"):
        TokenStore.open(store.folder, verify=True)


def test_a_manifest_that_lies_is_refused(make_store):
    store, _ = make_store(LENGTHS, 10_000)
    shards = store.manifest["splits"]["train"]["shards"]
    files = shards[0]["files"]
    for lie in (
        [],
        {"train": {"shards": []}},
        {"train": {"shards": [{}]}},
        {
            "train": {
                "shards": [{"files": {**files, "tokens": files["loss_mask"], "loss_mask": files["offsets"]}}]
            }
        },
        {"train": {"shards": [{"files": {**files, "tokens": {**files["tokens"], "name": "../x.npy"}}}]}},
        {"train": {"shards": [{"files": {**files, "tokens": {**files["tokens"], "name": "/etc/passwd"}}}]}},
    ):
        change(store.folder, splits=lie)
        with pytest.raises(UserError) as error:
            TokenStore.open(store.folder)
        assert str(store.folder) in str(error.value)
    for text in ("", "[]", "{}", '{"format_version": 1, "kind": "documents"}'):
        (store.folder / MANIFEST).write_text(text)
        with pytest.raises(UserError):
            TokenStore.open(store.folder)
    (store.folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest.json: there is no such file.*token store"):
        TokenStore.open(store.folder)


@pytest.mark.parametrize("lie", [
    {"chat_template": None}, {"chat_template": ["chatml"]}, {"inputs": None}, {"inputs": [{}]},
])  # fmt: skip
def test_what_a_run_needs_later_is_checked_when_the_store_is_opened(make_store, lie):
    store, _ = make_store(LENGTHS)
    change(store.folder, **lie)
    with pytest.raises(UserError, match="the store is damaged"):
        TokenStore.open(store.folder)


def test_a_row_of_an_input_that_the_manifest_lacks_is_named_by_number(make_store):
    store, _ = make_store(LENGTHS)
    change(store.folder, inputs=[])
    assert TokenStore.open(store.folder).origins(0, 1) == ["input 0, line 1"]


@given(st.data())
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
def test_any_change_of_a_header_gives_arrays_of_the_right_kind_or_one_sentence(make_store, data):
    store, _ = make_store([7, 1, 12])
    path = store.folder / f"train_00000_{data.draw(st.sampled_from(sorted(store.shards[0])))}.npy"
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, 80), min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255) | st.sampled_from(b"'(){}<>|,PK\n"))
    path.write_bytes(content)
    try:
        opened = TokenStore.open(store.folder)
    except UserError as error:
        assert "the store is damaged" in str(error) and str(error).isprintable()
        return
    tokens, mask = opened.document(0)
    assert len(tokens) == 7 and tokens.min() >= 0 and mask.dtype == bool and opened.origins(0, 20)


def test_a_zip_in_place_of_an_array_is_refused(make_store):
    store, _ = make_store(LENGTHS, 10_000)
    path = store.folder / "train_00000_tokens.npy"
    path.write_bytes(b"PK\x03\x04" + path.read_bytes()[4:])
    with pytest.raises(UserError, match="damaged"):
        TokenStore.open(store.folder)


def test_a_header_that_lies_is_refused(make_store):
    store, _ = make_store(LENGTHS, 10_000)
    path = store.folder / "train_00000_tokens.npy"
    data = path.read_bytes()
    for old, new in (
        (b"(67,)", b"(99,)"),
        (b"'<u2'", b"'|O8'"),
        (b"'<u2'", b"'<i2'"),
        (b"'<u2'", b"'>u2'"),
        (b"'<u2'", b"'|S2'"),
        (b"\x93NUMPY", b"\x93NUMPZ"),
        (b"(67,)", b"(66,)"),
    ):
        path.write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match="damaged"):
            TokenStore.open(store.folder)
