"""The data card: what the hub reads at its head, tables that add up, and text that stays text."""

import re

import pytest

from phoenix.data import card, parts
from phoenix.data.card import license_head, write_cards, write_data_card

NASTY = (
    'a | b\n# Kopf\n---\n``` ~~~ <script>x</script> [x](y) ![i](j) *k* _u_ \\| `c` &amp; <!-- "quoted": {y}'
)


def entry(source, rows, dropped, licenses, repeated=0, path="/home/jane/rows.jsonl"):
    kept = rows - sum(dropped.values())
    found = {"path": path, "source": source, "rows": rows, "dropped": dropped, "kept": kept}
    return {**found, "repeated": repeated, "licenses": licenses}


@pytest.fixture
def manifest():
    hub = {"path": "hf://datasets/org/set@main/data", "name": "set", "revision": "0ff1ce", "license": "MIT"}
    stated = {"generator": "gpt-4 | x", "generator_license": "LicenseRef-OpenAI-terms", "language": "de"}
    tables = dict.fromkeys(("license_table", "license_join"), "/home//jane/open_platypus.toml")
    hub["license_join"] = "hf://datasets/org/joined@0ff1ce/rows.jsonl"
    own = {
        **tables,
        "path": "/home/jane/rows.jsonl",
        "name": "rows.jsonl",
        "language": "no",
        "url": "https://x.org",
    }
    config = {
        "license_policy": "stated",
        "sources": [{}],
        "eval_files": ["/home/jane/mt.json"],
        "seed": 12345,
    }
    return {
        "kind": "documents", "phoenix_version": "1", "tokenizer_digest": "t", "template_digest": "u",
        "config": {**config, "filters": ["empty"], "max_length": 2048, "input": ["/home/jane/rows.jsonl"]},
        "splits": {"train": {"rows": 1500, "documents": 1500, "tokens": 9, "target_tokens": 4},
                   "eval": {"rows": 10, "documents": 10, "tokens": 2, "target_tokens": 1}},
        "data_sources": [{**hub, **stated}, own],
        "inputs": [
            entry("set", 1000, {"license": 100, "empty": 3}, {"LicenseRef-OpenAI-terms AND MIT": 897},
                  repeated=103, path="/cache/b/1"),
            entry("rows.jsonl", 600, {"cap": 90}, {"CC-BY-SA-3.0": 500, "MIT": 10}),
        ],
    }  # fmt: skip


def card_of(manifest, folder, samples=("Hallo",)):
    write_data_card(folder / "README.md", manifest, [], "About.", samples)
    return (folder / "README.md").read_text(encoding="utf-8")


def table(text, heading):
    """Rows of cells of the table below a heading."""
    lines = text.split(f"## {heading}\n\n")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def number(cell):
    return int(cell.replace(",", "") or 0)


def test_the_head_is_yaml_that_the_hub_reads(manifest, tmp_path):
    yaml = pytest.importorskip("yaml")
    _, head, _ = card_of(manifest, tmp_path).split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "other", "license_name": "cc-by-sa-3.0-and-licenseref-openai-terms-and-mit-and-mit",
        "language": ["de", "no"],
        "size_categories": ["1K<n<10K"], "task_categories": ["text-generation"],
    }  # fmt: skip


def test_the_steps_add_up(manifest, tmp_path):
    text = card_of(manifest, tmp_path)
    _, _, read, *steps, written = table(text, "Steps")
    left = number(read[3])
    assert left == 1600
    for _, _, dropped, then in steps:
        left -= number(dropped)
        assert number(then) == left
    assert [step[0] for step in steps] == ["license", "empty", "cap"]
    assert number(written[3]) == left + 103 == sum(number(row[1]) for row in table(text, "Splits")[2:])
    header, _, *rows = table(text, "Rows of each source")
    for row in rows:
        assert number(row[1]) == sum(map(number, row[2 : header.index("rows out")])) + number(row[-2])
    assert sum(number(row[2]) for row in table(text, "Licences")[2:]) == left


def test_it_says_where_rows_are_from_and_what_their_licences_ask(manifest, tmp_path):
    text = card_of(manifest, tmp_path)
    assert "hf://datasets/org/set@0ff1ce/data" in text and "rows.jsonl https://x.org" in text
    assert "hf://datasets/org/joined@0ff1ce/rows.jsonl" in text
    asked = {row[0]: row[3] for row in table(text, "Licences")[2:]}
    assert "share-alike" in asked["CC-BY-SA-3.0"] and "attribution" in asked["CC-BY-SA-3.0"]
    assert "attribution" in asked["MIT"] and "share-alike" not in asked["MIT"]
    terms = asked["LicenseRef-OpenAI-terms AND MIT"]
    assert "attribution" in terms and "read them" in terms and "share-alike" not in terms
    settings = dict(table(text, "Settings")[2:])
    assert settings["license\\_policy"] == "stated" and settings["eval\\_files"] == "mt.json"
    assert settings["seed"] == "12345" and settings["max\\_length"] == "2048"
    assert "/home" not in text and "/cache" not in text
    assert card_of(manifest, tmp_path) == text


@pytest.mark.parametrize(
    ("licenses", "head"),
    [
        ([], ["license: unknown"]),
        (["not stated"], ["license: unknown"]),
        (["Apache-2.0"], ["license: apache-2.0"]),
        (["GPL-3.0-or-later"], ["license: gpl-3.0"]),
        (["GPL-2.0-only", "MIT"], ["license: other", "license_name: gpl-2.0-only-and-mit"]),
        (["ODC-By-1.0"], ["license: odc-by"]),
        (["MIT-0"], ["license: other", "license_name: mit-0"]),
        (["CC-BY-SA-2.0"], ["license: other", "license_name: cc-by-sa-2.0"]),  # the hub lacks it
        (["LicenseRef-X\n y: [z"], ["license: other", "license_name: licenseref-x-y-z"]),
        (["MIT", "not stated"], ["license: other", "license_name: mit-and-not-stated"]),
        (["MIT AND Apache-2.0"], ["license: other", "license_name: mit-and-apache-2.0"]),
    ],
)
def test_a_single_licence_has_the_name_of_the_hub(licenses, head):
    assert license_head(licenses) == head


@pytest.mark.parametrize("rows", [1, 999, 1000, 9999, 10**4, 10**6, 10**9])
def test_the_size_is_a_category_of_the_hub(manifest, tmp_path, rows):
    manifest["splits"] = {"train": {"rows": rows}}
    [size] = re.findall("size_categories:\n- (.*)", card_of(manifest, tmp_path))
    low, high = re.fullmatch(r"(?:(\w+)<)?n<(\w+)", size).groups()
    value = lambda text: int(text[:-1]) * {"K": 10**3, "M": 10**6, "B": 10**9}[text[-1]]  # noqa: E731
    assert (value(low) if low else 0) <= rows < value(high)


def test_texts_of_users_do_not_break_out(manifest, tmp_path):
    manifest["data_sources"][0] |= dict.fromkeys(("attribution", "url", "generator"), NASTY)
    manifest["data_sources"][0]["name"] = manifest["inputs"][0]["source"] = NASTY
    manifest["data_sources"][1]["language"] = "x\nlicense: mit"
    manifest["inputs"][0]["licenses"] = {NASTY: 897}
    sample = "vorher\n````\n## Kopf\n~~~\n" + NASTY
    text = card_of(manifest, tmp_path, [sample])
    fenced = re.search(r"^(`{3,})text\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)
    assert fenced[2] == sample and len(fenced[1]) == 5
    outside = text.split("---\n", 2)[2].replace(fenced[0], "")
    heads = [line for line in outside.splitlines() if line.startswith("#")]
    assert [line for line in heads if not line.startswith(("## ", "# a "))] == [] and len(heads) == 9
    assert not re.search(r"(?<!\\)(<|!\[|\[|`)", outside)
    for heading in ("Sources", "Rows of each source", "Licences"):
        assert len({len(row) for row in table(text, heading)}) == 1
    assert text.split("---\n", 2)[1].count("license:") == 1


def test_each_reason_has_its_meaning():
    assert list(card.MEANINGS) == list(parts.REASONS)


def test_the_table_of_the_terminal_keeps_columns_apart(manifest):
    manifest["config"]["max_prompt_length"] = None
    manifest["inputs"][0]["dropped"] = {"duplicate": 2, "near_duplicate": 1234567}
    header, first, *_ = card.summary(manifest).splitlines()
    assert header.split() == "input rows in duplicate near_duplicate cap rows out repeated".split()
    assert first.split() == ["/cache/b/1", "1000", "2", "1234567", "0", "897", "103"]


def test_the_report_shows_counts_and_rows_of_each_filter(manifest, tmp_path):
    shown = {"kept": [("a, line 1", "train × 1", "Hallo"), ("a, line 2", "train × 2", "Welt")]}
    shown["empty"] = [("a, line 9", "turn 2", "<script>x</script>")]
    write_cards(tmp_path, manifest, shown)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "empty: 1 of 3 rows" in page and "kept: 2 of 1,407 rows" in page
    assert "<script" not in page and "&lt;script&gt;x" in page and "turn 2" in page
    assert "/home/jane/rows.jsonl" in page, "who makes a store may see where its files lie"
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "viewer: false" in text and "```text\nHallo\n```" in text and "```text\nWelt\n```" in text
    assert (tmp_path / "report.html").stat().st_size < 20_000


@pytest.mark.parametrize(
    "text", [NASTY, "\\", "a\\|b", "&lt;&#65;", "* x", "1. x", "+", "=", "http://x_y_z|", "\x85 \u2028"]
)
def test_a_cell_shows_the_text_itself(manifest, tmp_path, text):
    reader = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    manifest["data_sources"][0]["attribution"] = text
    body = card_of(manifest, tmp_path).split("---\n", 2)[2]
    tokens = [token for token in reader.parse(body.split("## Rows of")[0]) if token.type == "inline"]
    attribution = tokens[tokens.index(next(t for t in tokens if t.content == "set")) + 8]
    assert {child.type for child in attribution.children} <= {"text", "text_special"}
    assert "".join(child.content for child in attribution.children) == " ".join(text.split())
