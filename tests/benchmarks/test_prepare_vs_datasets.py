"""The comparison with datasets: its rows, and that its sides give the same tokens and masks."""

import json

import pytest


@pytest.fixture
def bench(load_script):
    return load_script("prepare_vs_datasets")


def test_rows_differ_and_are_the_same_each_time(bench, tmp_path):
    text = bench.write_rows(tmp_path / "a.jsonl", 300).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len({row["messages"][1]["content"] for row in rows}) > 290
    assert len({row["messages"][0]["content"] for row in rows}) == 300
    assert bench.write_rows(tmp_path / "b.jsonl", 300).read_text(encoding="utf-8") == text


@pytest.mark.peers
def test_the_sides_give_the_same_tokens_and_other_tokens_are_noticed(
    bench, tmp_path, monkeypatch, bpe_tokenizer_folder
):
    pytest.importorskip("datasets")
    monkeypatch.setattr(bench, "MODEL", bpe_tokenizer_folder)
    file = bench.write_rows(tmp_path / "rows.jsonl", 40)
    for side in ("phoenix", "datasets"):
        bench.run(side, file, tmp_path / f"{side} 0", 1)
    assert bench.compare(tmp_path) > 40 * 20
    monkeypatch.setattr(bench, "TEMPLATE", bench.TEMPLATE.replace("m.role + '", "m.role + ' "))
    bench.run("datasets", file, tmp_path / "other" / "datasets 0", 1)
    (tmp_path / "phoenix 0").rename(tmp_path / "other" / "phoenix 0")
    with pytest.raises(AssertionError):
        bench.compare(tmp_path / "other")
