"""Files of rows, whatever their form: .jsonl, .jsonl.gz, .json, .csv, .parquet.

A reader trusts nothing: each line is checked before it is parsed, and each complaint names file and line.
"""

import codecs
import contextlib
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phoenix.files import UserError, require, unique_keys

MAX_LINE = 64 * 2**20  # bytes; real conversations stay below 1 MB
MAX_INFLATION = 200  # of a gzip file: 3 to 20 on text, 1032 on zeros


def read_rows(path: Path, errors: str = "strict") -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of each row of a file; for .json and .parquet the number of the row, from 1.

    Blank lines are skipped, a BOM and CRLF are accepted.  Raises UserError naming file and line for what is
    no UTF-8, holds a NUL, does not parse, is no object or is longer than MAX_LINE, and for a damaged file.
    errors: "replace" puts U+FFFD in place of what is no UTF-8.
    """
    for line, raw in raw_rows(path, errors):
        yield line, parse(path, line, raw, errors)


def raw_rows(path: Path, errors: str = "strict") -> Iterator[tuple[int, Any]]:
    """As `read_rows`, but a line of JSON lines comes as bytes that only `parse` decodes: what takes long can
    be done elsewhere.  The size of a line and of what a gzip file holds, and NUL, are checked here."""
    path = Path(path)
    reader = next((read for ending, read in READERS.items() if path.name.endswith(ending)), None)
    if not path.is_file() or reader is None:
        found = "ends otherwise" if path.is_file() else "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {found}; expected a file of rows that ends in one of {', '.join(READERS)}")
    yield from reader(path, errors)


def parse(path: Path, line: int, raw: Any, errors: str = "strict") -> dict[str, Any]:
    """The row of what `raw_rows` gave; raises UserError as `read_rows` does."""
    row = raw
    if isinstance(raw, bytes):
        try:
            row = json.loads(raw.decode("utf-8", errors), object_pairs_hook=unique_keys)
        except ERRORS as error:
            raise _unreadable(path, line, error) from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {line}: found a {type(row).__name__}; expected an object of fields")
    return row


@contextlib.contextmanager
def _at(path: Path, line: int) -> Iterator[None]:
    """Give an error of a reader its place and its sentence."""
    try:
        yield
    except ERRORS as error:
        raise _unreadable(path, line, error) from None


def _unreadable(path: Path, line: int, error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, UnicodeDecodeError):
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            size = sum(map(len, itertools.islice(file, line)))
        reason += f", byte {size - len(error.object) + error.start} of the file"
    return UserError(f"{path}, line {line}: cannot be read ({reason}); correct or remove it")


def _lines(path: Path, errors: str | None = None) -> Iterator[tuple[int, Any]]:
    """Numbered lines (bytes if `errors` is none), checked one by one: neither a huge line nor a gzip bomb
    fills the memory.

    One `try` around all lines: a bomb of 10^8 empty lines would spend minutes in a context manager for each.
    """
    number, size, zipped = 0, 0, path.name.endswith(".gz")
    most = MAX_LINE + MAX_INFLATION * path.stat().st_size
    try:
        with (gzip.open if zipped else open)(path, "rb") as file:
            while True:
                number += 1
                line = file.readline(MAX_LINE + 1)
                if not line:
                    return
                size += len(line)
                if len(line) > MAX_LINE:
                    raise ValueError(f"longer than {MAX_LINE} bytes")
                if size > most:
                    raise ValueError(f"gzip that holds more than {MAX_INFLATION} times its size")
                if b"\0" in line:
                    raise ValueError("holds a NUL byte")
                line = line if number > 1 else line.removeprefix(codecs.BOM_UTF8)
                yield number, line.decode("utf-8", errors) if errors else line
    except ERRORS as error:
        raise _unreadable(path, number, error) from None


def _json_lines(path: Path, _errors: str) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in _lines(path) if line.strip())


def _json(path: Path, errors: str) -> Iterator[tuple[int, Any]]:
    """A list of objects, read whole; without a "[" at the start: JSON lines, as in many files of the hub."""
    if not next((line for _, line in _json_lines(path, errors)), b"").lstrip().startswith(b"["):
        yield from _json_lines(path, errors)
        return
    with _at(path, 1):
        rows = json.loads("".join(line for _, line in _lines(path, errors)), object_pairs_hook=unique_keys)
    yield from enumerate(rows, 1)


def _csv(path: Path, errors: str) -> Iterator[tuple[int, Any]]:
    """The line is the last one of a row, which may have several."""
    csv.field_size_limit(MAX_LINE)
    reader, header = csv.reader((line for _, line in _lines(path, errors)), strict=True), []
    while True:
        with _at(path, reader.line_num + 1):
            cells = next(reader, None)
        if cells is None:
            return
        with _at(path, reader.line_num):
            if header and cells and len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, but the header has {len(header)}")
        if header and cells:
            yield reader.line_num, dict(zip(header, cells))
        header = header or cells


def _parquet(path: Path, _errors: str) -> Iterator[tuple[int, Any]]:
    arrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from enumerate(batch.to_pylist(), number + 1)
            number += len(batch)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path}, row {number + 1}: no sound parquet file ({error}); get it again") from None


ERRORS = (ValueError, RecursionError, EOFError, OSError, zlib.error, csv.Error)
READERS = {
    ".jsonl": _json_lines, ".jsonl.gz": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet,
}  # fmt: skip
