import csv
import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phoenix.data import reading
from phoenix.data.reading import READERS, parse, raw_rows, read_rows
from phoenix.files import UserError

ROWS = [{"text": "Grüße, „Welt“ 🙂"}, {"text": "zwei\nZeilen", "n": 2}, {"text": "c\u2028d"}]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("change", [
    lambda data: data,
    lambda data: b"\xef\xbb\xbf" + data,
    lambda data: data.replace(b"\n", b"\r\n"),
    lambda data: data.rstrip(b"\n"),
    lambda data: data.replace(b"\n", b"\n  \n"),
])  # fmt: skip
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json"])
def test_json_lines_in_all_their_forms(tmp_path, change, ending):
    path = tmp_path / f"größe mit Leerzeichen{ending}"
    path.write_bytes((gzip.compress if ending.endswith("gz") else bytes)(change(lines(ROWS))))
    assert [row for _, row in read_rows(path)] == ROWS
    assert next(read_rows(path))[0] == 1


def test_a_json_list_csv_and_parquet_give_the_same_rows(tmp_path):
    rows = [{"instruction": f"Frage „{i}“,\nzweite Zeile", "output": 'ja; "nein"'} for i in range(600)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert list(read_rows(tmp_path / "a.json")) == list(enumerate(rows, 1))
    assert list(read_rows(tmp_path / "a.csv")) == [(3 + 2 * i, row) for i, row in enumerate(rows)]
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    nested = [{"messages": [{"role": "user", "content": str(i)}], "source": None} for i in range(600)]
    parquet.write_table(arrow.Table.from_pylist(nested), tmp_path / "a.parquet", row_group_size=100)
    assert list(read_rows(tmp_path / "a.parquet")) == list(enumerate(nested, 1))


def test_an_empty_file_has_no_rows(tmp_path):
    for ending in (".jsonl", ".json", ".csv"):
        (tmp_path / f"a{ending}").write_bytes(b"")
        assert list(read_rows(tmp_path / f"a{ending}")) == []


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".csv"])
def test_raw_rows_come_unparsed_and_parse_makes_them_rows(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    data = b"text\na\nb\n" if ending == ".csv" else b"\xef\xbb\xbf" + GOOD + b"\n" + b"{no json\xff\n"
    path.write_bytes((gzip.compress if ending.endswith("gz") else bytes)(data))
    raw = list(raw_rows(path))
    if ending == ".csv":
        assert raw == [(2, {"text": "a"}), (3, {"text": "b"})] == list(read_rows(path))
        return
    assert raw == [(1, GOOD), (3, b"{no json\xff\n")]
    assert parse(path, *raw[0]) == {"text": "a"}
    for errors, reason in (("strict", "UnicodeDecodeError"), ("replace", "JSONDecodeError")):
        with pytest.raises(UserError, match=reason) as error:
            parse(path, *raw[1], errors)
        with pytest.raises(UserError) as same:
            list(read_rows(path, errors))
        assert str(error.value) == str(same.value) and str(error.value).startswith(f"{path}, line 3: ")


def test_what_is_no_utf8_may_be_replaced(tmp_path):
    for ending, data in (
        (".jsonl", b'{"text": "\xff"}'),
        (".json", b'[{"text": "\xff"}]'),
        (".csv", b"text\n\xff"),
    ):
        path = tmp_path / f"a{ending}"
        path.write_bytes(data)
        assert [row for _, row in read_rows(path, "replace")] == [{"text": "\ufffd"}]
        with pytest.raises(UserError, match="UnicodeDecodeError"):
            list(read_rows(path))


def test_a_file_of_nothing_but_a_mark_or_blanks_has_no_rows(tmp_path):
    for data in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n", b" \t\n\n"):
        for ending in (".jsonl", ".json"):
            (tmp_path / f"a{ending}").write_bytes(data)
            assert list(raw_rows(tmp_path / f"a{ending}")) == []


@pytest.mark.parametrize(
    "bad, reason",
    [
        (b'{"text": "cut', "JSONDecodeError"),
        (b'{"text": "a" "b"}\n', "JSONDecodeError"),
        (b'{"text": "\xff"}\n', "UnicodeDecodeError"),
        (b'{"text": "a\x00"}\n', "holds a NUL byte"),
        (b'{"text": "\xed\xa0\x80"}\n', "UnicodeDecodeError"),  # half a surrogate pair
        (b'\xef\xbb\xbf{"text": "a"}\n', "BOM"),  # accepted at the start of a file alone
        (b'{"messages": [{"role": "user", "role": "user"}]}\n', "stands twice"),
        (b'{"text": "a", "text": "b"}\n', "stands twice"),
        (b"[" * 100_000 + b"\n", "RecursionError|nest"),
        (b'{"n": ' + b"9" * 5000 + b"}\n", "ValueError"),
        (b'["a"]\n', "found a list; expected an object"),
        (b'"a"\n', "found a str"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_bad_line_is_named(tmp_path, bad, reason, zipped):
    path = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    path.write_bytes((gzip.compress if zipped else bytes)(GOOD * 1411 + bad))
    with pytest.raises(UserError, match=reason) as error:
        list(read_rows(path))
    assert f"{path}, line 1412" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("data, ending, place", [
    (b"text,n\na,1\nb\n", "csv", "line 3"),
    (b"text,n\na,1,2\n", "csv", "line 2"),
    (b'text\n"a\n', "csv", "line 2"),
    (b"[1, 2]", "json", "line 1: found a int"),
    (b'[{"text": "a"}', "json", "line 1"),
    (b"PAR1 no parquet", "parquet", "row 1"),
    (gzip.compress(GOOD * 100, mtime=0)[:-20], "jsonl.gz", "line"),
    (b"no gzip", "jsonl.gz", "line 1"),
])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, data, ending, place):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(data)
    with pytest.raises(UserError, match=place) as error:
        list(read_rows(path))
    assert str(path) in str(error.value)


def test_what_is_no_file_of_rows(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"x")
    for name, reason in (("a.xlsx", "ends otherwise"), ("b.jsonl", "does not exist"), (".", "is a folder")):
        with pytest.raises(UserError, match=reason):
            list(read_rows(tmp_path / name))


def test_a_huge_line_and_a_gzip_bomb_stop_early(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_LINE", 1000)
    for name, data in (
        ("a.jsonl", GOOD + b'{"text": "' + b"a" * 2000),
        ("b.jsonl.gz", gzip.compress(b"\n" * 2**22)),
    ):
        (tmp_path / name).write_bytes(data)
        reason = "line 2: .*longer than 1000 bytes" if name == "a.jsonl" else "gzip that holds more than 200"
        with pytest.raises(UserError, match=reason):
            list(read_rows(tmp_path / name))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(GOOD * 500))
    assert len(list(read_rows(tmp_path / "c.jsonl.gz"))) == 500


@given(st.binary(max_size=60), st.sampled_from(sorted(READERS.keys() - {".parquet"})), st.booleans())
@settings(suppress_health_check=list(HealthCheck))
def test_any_bytes_give_rows_or_one_sentence_with_its_place(tmp_path, data, ending, appended):
    path = tmp_path / f"a{ending}"
    path.write_bytes(GOOD * appended + data)
    try:
        assert all(isinstance(row, dict) for _, row in read_rows(path))
    except UserError as error:
        assert f"{path}, " in str(error) and str(error).isprintable()
