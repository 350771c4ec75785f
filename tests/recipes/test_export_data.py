"""Exports: the rows of a store in its order, from files that must be what they were; loaded by datasets."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from phoenix import chat
from phoenix.config import load_config
from phoenix.data.sources import Source
from phoenix.data.store import TokenStore
from phoenix.files import UserError, sha256
from phoenix.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))
import export_data  # noqa: E402
import prepare  # noqa: E402
from export_data import ExportConfig  # noqa: E402


def say(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def write(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def tree(name, *texts):
    """A thread of oasst1, a message a row."""
    ids = [f"{name}{number}" for number in range(len(texts))]
    roles = ("prompter", "assistant")
    return [
        {"message_tree_id": name, "message_id": own, "parent_id": parent, "text": text, "role": roles[i % 2]}
        for i, (own, parent, text) in enumerate(zip(ids, [None, *ids], texts))
    ]


@pytest.fixture
def prepared(tmp_path, bpe_tokenizer_folder):
    """prepared(*sources, **fields) -> folder of a store."""

    def prepared(*sources, **fields):
        base = {"license_policy": "none", "num_workers": 1, "output": tmp_path / "store"}
        config = {**base, "model_name_or_path": bpe_tokenizer_folder, "sources": sources, **fields}
        return prepare.main(prepare.PrepareConfig(**config))

    return prepared


@pytest.fixture
def mixed(tmp_path):
    """Sources of five schemas in four kinds of file, some of whose rows the filters drop."""
    spoken = [{"messages": say(f"Frage {i}?", f"Antwort {i}.\u2028Zeile")} for i in range(60)]
    spoken[7]["messages"], spoken[9]["license"] = spoken[3]["messages"], "CC0-1.0"
    asked = [{"instruction": f"Löse {i}", "input": "", "output": f"x = {i}",
              "data_source": ("MATH/PRM-800K", "reclor")[i % 2]} for i in range(40)]  # fmt: skip
    trees = [message for i in range(20) for message in tree(f"t{i}", f"Hallo {i}", "Guten Tag!")]
    texts = [{"text": f"Ein Text {i}."} for i in range(5)] + [{"text": "\u200b"}]
    cells = ["prompt,completion,text", *(f'"Was, {i}?","Das\n{i}",Nein {i}' for i in range(8))]
    (tmp_path / "e.csv").write_text("\n".join(cells), encoding="utf-8")
    return (
        Source(str(write(tmp_path / "a.jsonl", spoken)), license="MIT", weight=2.5),
        Source(str(write(tmp_path / "b.jsonl.gz", asked)), name="Platypus"),
        Source(str(write(tmp_path / "c.jsonl", trees)), weight=0.5),
        Source(str(write(tmp_path / "d.jsonl", texts)), cap=3),
        Source(str(tmp_path / "e.csv"), format="text", held_out=True),
    )


def documents(folder, split):
    store = TokenStore.open(folder, split)
    tokens = [store.document(index)[0].tolist() for index in range(len(store))]
    return tokens, [store.provenance(index) for index in range(len(store))]


def test_the_rows_are_those_of_the_store(prepared, mixed, tmp_path, bpe_tokenizer_folder):
    """Rendered again they give its documents, one for one, with the licence of each."""
    store, tokenizer = prepared(*mixed), Tokenizer.from_pretrained(bpe_tokenizer_folder)
    folder = export_data.main(ExportConfig(tmp_path / "export", store=store))
    parts = {kind: read(folder / "data" / kind / "train.jsonl") for kind in ("conversations", "texts")}
    held_out = read(folder / "data" / "texts" / "test.jsonl")
    assert {path.name for path in (folder / "data" / "conversations").iterdir()} == {"train.jsonl"}
    for split, rows in (("train", [*parts["conversations"], *parts["texts"]]), ("eval", held_out)):
        tokens, origins = documents(store, split)
        texts = (row for row in rows if "text" in row)
        spoken = (row for row in rows if "messages" in row)
        is_text = [origin["source"] in ("d.jsonl", "e.csv") for origin in origins]
        for expected, origin, here in zip(tokens, origins, is_text):
            row = next(texts if here else spoken)
            if here:
                assert row["text"] in tokenizer.decode(expected)
            else:
                assert chat.render(row["messages"], tokenizer, "chatml").tokens == expected
            assert row["license"] == origin["license"].replace("not stated", "")
            assert row["source"].split("/")[0] == origin["source"]
        assert not [*texts, *spoken], "no row is left over"
    named = Counter(row["source"] for row in (*parts["conversations"], *parts["texts"], *held_out))
    assert named["Platypus/MATH/PRM-800K"] == named["Platypus/reclor"] == 20 and named["d.jsonl"] == 3
    assert 118 <= named["a.jsonl"] <= 177 and named["e.csv"] == 8
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        assert sha256(folder / entry["path"]) == entry["sha256"]
        assert len(read(folder / entry["path"])) == entry["rows"]


def test_the_terms_of_a_generator_travel_with_the_rows(prepared, tmp_path):
    """Prepared again from an export, a stricter policy drops what it had dropped at first."""
    for name in ("human", "model"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", [{"messages": say(f"{name}, {i}?", "Ja.")} for i in range(3)])
    terms = {"generator": "gpt-4", "generator_license": "LicenseRef-OpenAI-terms"}
    sources = [
        Source(str(tmp_path / "human" / "rows.jsonl"), license="CC-BY-4.0", attribution="Alice"),
        Source(str(tmp_path / "model" / "rows.jsonl"), license="MIT", attribution="Bob", **terms),
    ]
    both, stores = "LicenseRef-OpenAI-terms AND MIT", {}
    for policy in ("nc", "strict"):
        folder = prepared(*sources, license_policy=policy, output=tmp_path / policy)
        stores[policy] = documents(folder, "train")[0]
    folder = export_data.main(ExportConfig(tmp_path / "export", store=tmp_path / "nc"))
    rows = read(folder / "data" / "train.jsonl")
    assert Counter((row["source"], row["license"]) for row in rows) == {
        ("rows.jsonl", "CC-BY-4.0"): 3, ("rows.jsonl (2)", both): 3,
    }  # fmt: skip
    for card in (tmp_path / "nc" / "README.md", folder / "README.md"):
        text = card.read_text(encoding="utf-8")
        assert "license_name: cc-by-4.0-and-licenseref-openai-terms-and-mit" in text
        assert "Alice" in text and "Bob" in text and f"| {both} | rows.jsonl (2) | 3 |" in text
    again = prepared(Source(str(folder / "data" / "train.jsonl")), license_policy="strict")
    assert documents(again, "train")[0] == stores["strict"] != stores["nc"]


def test_no_folder_of_the_machine_is_in_card_or_export(prepared, tmp_path):
    asked = {"instruction": "Why?", "output": "So.", "data_source": "ARB"}
    join, table = write(tmp_path / "join.jsonl", [asked]), tmp_path / "table.toml"
    table.write_text('field = "data_source"\n[licenses]\nARB = "MIT"\n')
    german = {**asked, "instruction_de": "Warum?", "output_de": "Darum."}
    sources = [
        Source(str(write(tmp_path / "a.jsonl", [german])), license_join=str(join), license_table=str(table)),
        Source(f"{write(tmp_path / 'b.jsonl', [asked])}*"),
        Source(f"/{write(tmp_path / 'c.jsonl', [{'text': 'Hallo'}])}", license="MIT"),
    ]
    config = {"license_policy": "stated", "eval_input": (write(tmp_path / "d.jsonl", [{"text": "Du"}]),)}
    eval_file = write(tmp_path / "e.jsonl", [{"question": "Wie viele Brücken führen über den Rhein?"}])
    config |= {"filters": ("contaminated",), "eval_files": (eval_file,), "license": "MIT"}
    store = prepared(*sources, **config)
    folder = export_data.main(ExportConfig(tmp_path / "export", store=store))
    for path in [store / "README.md", *(path for path in folder.rglob("*") if path.is_file())]:
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path


def test_a_prompt_that_was_cut_is_whole(prepared, tmp_path):
    prompt = say("Erste Frage?", "Erste Antwort.", "Zweite Frage?")
    row = {"prompt": prompt, "chosen": say("", "Ja.")[1:], "rejected": say("", "Nein.")[1:]}
    store = prepared(Source(str(write(tmp_path / "p.jsonl", [row]))), kind="pairs", max_prompt_length=25)
    manifest = TokenStore.open(store, kind="pairs").manifest
    assert manifest["inputs"][0]["prompts_cut"] == 1
    folder = export_data.main(ExportConfig(tmp_path / "export", store=store))
    assert read(folder / "data" / "train.jsonl") == [{**row, "source": "p.jsonl", "license": ""}]
    assert "whole here" in (folder / "README.md").read_text(encoding="utf-8")


def test_files_of_rows_are_exported_without_a_store(tmp_path):
    pair = {"source": "flan", "instruction": "Hund?", "chosen_response": "dog", "rejected_response": "cat"}
    path = write(tmp_path / "rows.jsonl", [pair, {**pair, "license": "apache 2.0"}, {**pair, "license": "?"}])
    folder = export_data.main(ExportConfig(tmp_path / "export", input=(path,), kind="pairs"))
    turns = {"prompt": say("Hund?"), "chosen": say("", "dog")[1:], "rejected": say("", "cat")[1:]}
    assert read(folder / "data" / "train.jsonl") == [
        {**turns, "source": "flan", "license": license} for license in ("", "Apache-2.0", "?")
    ]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: other" in card and "| not stated | rows.jsonl | 1 |" in card


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_an_export_is_the_same_each_time_and_replaces_the_last(prepared, mixed, tmp_path, form):
    store, found = prepared(*mixed), []
    for _ in range(2):
        folder = export_data.main(ExportConfig(tmp_path / "export", store=store, format=form))
        found.append({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")})
    assert found[0] == found[1]


def change(path):
    data = path.read_bytes()
    path.write_bytes(data[:-5] + b"x" + data[-4:])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (change, ["a.jsonl", "is not what it was (sha256)", "prepare the store again"]),
        (Path.unlink, ["a.jsonl", "does not exist", "put it back"]),
    ],
)
def test_a_changed_or_lost_file_is_named(prepared, tmp_path, spoil, words):
    path = write(tmp_path / "a.jsonl", [{"messages": say("Frage?", "Antwort.")}])
    store = prepared(Source(str(path)))
    spoil(path)
    with pytest.raises(UserError) as caught:
        export_data.main(ExportConfig(tmp_path / "export", store=store))
    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "export").exists()


def test_mistakes_are_one_sentence(prepared, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": say("Frage?", "Antwort.")}])
    store, empty = prepared(Source(str(path))), write(tmp_path / "empty.jsonl", [])
    cases = [
        ({}, "neither is set"),
        ({"store": store, "input": (path,)}, "both are set"),
        ({"store": tmp_path}, "there is no such file; expected the manifest of a token store"),
        ({"store": store, "output": store}, "exists and is no export; choose another output"),
        ({"input": (path,), "output": tmp_path}, "holds files of others"),
        ({"input": (empty,)}, "hold no row at all"),
        ({"input": (path,), "kind": "pairs"}, "a.jsonl, line 1"),
    ]
    for fields, words in cases:
        with pytest.raises(UserError) as caught:
            export_data.main(ExportConfig(**{"output": tmp_path / "export", **fields}))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    manifest = json.loads((store / "manifest.json").read_text())
    for key in ("kind", "inputs", "provenance", "data_sources"):
        spoilt = {name: value for name, value in manifest.items() if name != key}
        (store / "manifest.json").write_text(json.dumps(spoilt))
        with pytest.raises(UserError, match=f"{key}.*prepare"):
            export_data.main(ExportConfig(tmp_path / "export", store=store))
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert TokenStore.open(store, verify=True) and not (tmp_path / "export").exists()
    with pytest.raises(UserError, match="did you mean 'parquet'"):
        load_config(ExportConfig, ["output=x", "format=parket"])


@pytest.mark.peers
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_datasets_loads_the_folder_by_its_card(prepared, mixed, tmp_path, form, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(export_data, "SHARD_BYTES", 1)
    monkeypatch.setattr(export_data, "GROUP_ROWS", 50)
    plain = export_data.main(ExportConfig(tmp_path / "plain", store=prepared(*mixed)))
    folder = export_data.main(ExportConfig(tmp_path / "export", store=tmp_path / "store", format=form))
    assert datasets.get_dataset_config_names(str(folder)) == ["conversations", "texts"]
    for name in ("conversations", "texts"):
        loaded = datasets.load_dataset(str(folder), name, cache_dir=str(tmp_path / "cache"))
        expected = {path.stem: read(path) for path in (plain / "data" / name).iterdir()}
        assert {split: rows.to_list() for split, rows in loaded.items()} == expected
    if form == "parquet":
        names = sorted(path.name for path in (folder / "data" / "conversations").glob("train*"))
        assert len(names) > 2 and names[0] == f"train-00000-of-{len(names):05d}.parquet"
        files = [str(path) for path in (folder / "data" / "conversations").glob("train*")]
        loaded = datasets.load_dataset("parquet", data_files=sorted(files), cache_dir=str(tmp_path / "c"))
        assert loaded["train"].to_list() == read(plain / "data" / "conversations" / "train.jsonl")


def test_exported_rows_are_prepared_to_the_same_store(prepared, mixed, tmp_path):
    """Formats are closed: what we write we read."""
    store = prepared(mixed[0], mixed[1], filters=())
    folder = export_data.main(ExportConfig(tmp_path / "export", store=store))
    again = prepared(Source(str(folder / "data" / "train.jsonl")), filters=(), output=tmp_path / "again")
    (first, origins), (second, others) = documents(store, "train"), documents(again, "train")
    assert first == second and [a["license"] for a in origins] == [b["license"] for b in others]
