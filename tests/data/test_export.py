"""What is exported is read again as the same row, whatever schema it came from."""

import json
from pathlib import Path

import pytest

from phoenix.data.export import FIELDS, rows_of_file
from phoenix.data.formats import KINDS, RowError, to_row

PAGE = Path(__file__).parents[2] / "docs" / "data_formats.md"
ROWS = [json.loads(line) for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith('{"')]


def turns(row):
    return {name: value for name, value in vars(row).items() if name in sum(FIELDS.values(), ())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row)[:40])
def test_a_row_of_any_schema_comes_back(row, kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"license": "cc by 4.0", **row}), encoding="utf-8")
    try:
        first = to_row({"license": "cc by 4.0", **row}, (path, 1), kind)
    except RowError as error:
        with pytest.raises(RowError, match="expected"):
            list(rows_of_file(path, kind))
        assert "expected" in str(error)
        return
    [(name, exported)] = rows_of_file(path, kind)
    assert set(exported) == {*FIELDS[name], "source", "license"}
    again = to_row(json.loads(json.dumps(exported)), (path, 1), kind)
    assert turns(again) == turns(first) and again.source == first.source
    assert exported["license"] == "CC-BY-4.0"
