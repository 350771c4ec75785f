"""Rows -> rows that other tools read; of a token store, from the files that it was made of.

    conversations   {"messages": [{"role", "content"}, ...], "source", "license"}
    texts           {"text", "source", "license"}
    pairs           {"prompt": [...], "chosen": [...], "rejected": [...], "source", "license"}, as TRL's

`license` is "" where none is known: no value is null, so that all files have the same types.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from phoenix.data.formats import Row, to_row
from phoenix.data.licenses import canonical
from phoenix.data.parts import file_rows
from phoenix.data.reading import parse
from phoenix.data.store import TokenStore
from phoenix.files import UserError, describe_file

# Type of a row -> kind of the export; and its fields
KINDS = {"Conversation": "conversations", "PreferencePair": "pairs", "Text": "texts"}
FIELDS = {"conversations": ("messages",), "pairs": ("prompt", "chosen", "rejected"), "texts": ("text",)}
Exported = tuple[str, dict[str, Any]]  # kind, and the row


def rows_of_file(path: Path, kind: str) -> Iterator[Exported]:
    """The rows of a file of any known schema; kind: "documents" or "pairs".  Raises UserError."""
    for line, raw in file_rows(path):
        row = to_row(parse(path, line, raw), (path, line), kind)
        yield _exported(row, row.source, canonical(row.license or "") or row.license or "")


def rows_of_store(store: TokenStore) -> Iterator[Exported]:
    """The rows of a split, in its order and as often as they stand there; a prompt that was cut is whole.

    source: the name of the data set and, behind a "/", what the row itself states.  One file is open at a
    time.  `check_files` says whether they are what they were.
    """
    kind, inputs, origins = (store.manifest[name] for name in ("kind", "inputs", "provenance"))
    for number, places in groupby(_places(store, 3 if kind == "pairs" else 1), lambda place: place[0]):
        path, name = Path(inputs[number]["path"]), inputs[number]["source"]
        form = store.manifest["data_sources"][inputs[number]["data_source"]].get("format")
        lines, line = file_rows(path), 0
        for _, wanted, provenance in places:
            if line != wanted:  # equal: a row again, by the weight of its source
                line, raw = next(found for found in lines if found[0] == wanted)
                row = to_row(parse(path, line, raw), (path, line), kind, form)
            origin = origins[provenance]
            source = "/".join(filter(None, (name, origin["subset"])))
            yield _exported(row, source, "" if origin["license"] == "not stated" else origin["license"])


def check_files(store: TokenStore) -> None:
    """UserError if a file of which rows stand in the store is gone, or is not what it was."""
    if lacking := {"provenance", "data_sources"} - set(store.manifest):
        raise UserError(f"{store.folder}: the manifest lacks {lacking}; prepare the store again")
    for entry in store.manifest["inputs"]:
        path, was = Path(entry["path"]), {name: entry[name] for name in ("bytes", "sha256")}
        if entry["kept"] and not (path.is_file() and describe_file(path) == was):
            what = "is not what it was (sha256)" if path.is_file() else "does not exist"
            raise UserError(
                f"{path}: {what}; expected the file that {store.folder} was made of, below the folder where "
                "it was prepared; put it back, or prepare the store again"
            )


def _places(store: TokenStore, pieces: int) -> Iterator[tuple[int, int, int]]:
    """(file, line, provenance) of each row."""
    for shard in store.shards:
        origins, provenance = (shard[name][::pieces].tolist() for name in ("origin", "provenance"))
        yield from ((file, line, number) for (file, line), number in zip(origins, provenance))


def _exported(row: Row, source: str, license: str) -> Exported:
    kind = KINDS[type(row).__name__]
    return kind, {name: getattr(row, name) for name in FIELDS[kind]} | {"source": source, "license": license}
