"""A token store, or files of rows -> a data set that other tools load, with its data card.

    python recipes/export_data.py store=stores/mine output=exports/mine
    python recipes/export_data.py input='["runs/de/translated.jsonl"]' output=exports/de format=parquet

OUTPUT/data/train.jsonl, OUTPUT/data/test.jsonl (the store's split eval) and OUTPUT/README.md, which the
Hugging Face hub and datasets.load_dataset read.  A store's texts come from the files that it was made of, so
these must still be there, unchanged.  --help lists all fields.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import phoenix
from phoenix.config import option, run_recipe
from phoenix.data.card import write_data_card
from phoenix.data.export import FIELDS, Exported, check_files, rows_of_file, rows_of_store
from phoenix.data.formats import KINDS
from phoenix.data.store import MANIFEST, TokenStore
from phoenix.files import UserError, atomic_folder, describe_file, read_json, require, write_json

SPLITS = {"train": "train", "eval": "test"}  # of a store -> of an export
SHARD_BYTES, GROUP_ROWS = 500 * 2**20, 1000  # of a parquet file
MOST_SHOWN = 2000  # characters of a row in the card


@dataclass(frozen=True)
class ExportConfig:
    """Rows of a token store, or of files of any known format, as JSON lines or parquet."""

    output: Path = option("folder of the export; an export that stands there is replaced")
    store: Path | None = option("token store written by recipes/prepare.py", None)
    input: tuple[Path, ...] = option("files of rows, instead of a store", ())
    kind: str = option("of input: conversations and texts, or preference pairs", "documents", tuple(KINDS))
    format: str = option("of the files", "jsonl", ("jsonl", "parquet"))


def main(config: ExportConfig) -> Path:
    """Write the export; returns its folder.  Raises UserError."""
    check(config)
    manifest, splits = of_store(config.store) if config.store else of_files(config.input, config.kind)
    with atomic_folder(config.output) as folder:
        files, samples = write(folder, config.format, splits)
        named = {SPLITS[name]: entry for name, entry in manifest["splits"].items()}
        about = "Each row names its source and its licence."
        if sum(entry.get("prompts_cut", 0) for entry in manifest["inputs"]):
            about += " Prompts that were cut for training are whole here."
        texts = [json.dumps(row, ensure_ascii=False, indent=1)[:MOST_SHOWN] for row in samples]
        card = {**manifest, "splits": named}
        write_data_card(folder / "README.md", card, configs(files), about, texts)
        made = {"kind": manifest["kind"], "format": config.format, "phoenix_version": phoenix.__version__}
        write_json(folder / MANIFEST, {"export": made, "files": files})
    for entry in files:
        print(f"{entry['rows']:>12,} {config.output / entry['path']}")
    return config.output


def check(config: ExportConfig) -> None:
    if bool(config.store) == bool(config.input):
        found = "both are" if config.store else "neither is"
        raise UserError(f"store, input: {found} set; expected one of them; name a store or files of rows")
    if (path := config.output / MANIFEST).is_file() and "export" not in read_json(path):
        raise UserError(f"{config.output} exists and is no export; choose another output, or remove it")
    if config.format == "parquet":
        require("pyarrow", "data")


def of_store(folder: Path) -> tuple[dict[str, Any], dict[str, Iterator[Exported]]]:
    """The manifest of a store, and the rows of each split."""
    manifest = read_json(folder / MANIFEST, "manifest of a token store, which recipes/prepare.py writes")
    kind = "pairs" if manifest.get("kind") == "pairs" else "documents"
    stores = {"train": TokenStore.open(folder, kind=kind, verify=True)}
    if "eval" in manifest["splits"]:
        stores["eval"] = TokenStore.open(folder, "eval", kind=kind, verify=True)
    check_files(stores["train"])
    return manifest, {SPLITS[name]: rows_of_store(store) for name, store in stores.items()}


def of_files(paths: Iterable[Path], kind: str) -> tuple[dict[str, Any], dict[str, Iterator[Exported]]]:
    """What a manifest would say of files, filled in as their rows are read; and the rows."""
    inputs: list[dict[str, Any]] = []
    manifest = {"kind": kind, "splits": {"train": {"rows": 0}}, "inputs": inputs}

    def rows() -> Iterator[Exported]:
        for path in paths:
            licenses: Counter[str] = Counter()
            for kind_of_row, row in rows_of_file(path, kind):
                licenses[row["license"] or "not stated"] += 1
                yield kind_of_row, row
            number = licenses.total()
            manifest["splits"]["train"]["rows"] += number
            entry = {"source": path.name, "rows": number, "kept": number}
            inputs.append({**entry, "dropped": {}, "licenses": dict(sorted(licenses.items()))})

    return manifest, {"train": rows()}


def write(
    folder: Path, form: str, splits: dict[str, Iterator[Exported]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows -> files.  Returns their entries in the manifest, and three rows drawn from all."""
    writers: dict[tuple[str, str], Any] = {}
    samples, draw = [], random.Random(0)
    found = ((split, *exported) for split, rows in splits.items() for exported in rows)
    for number, (split, kind, row) in enumerate(tqdm(found, unit=" rows", disable=None)):
        if (kind, split) not in writers:
            writers[kind, split] = WRITERS[form](folder / "data" / kind, kind, split)
        writers[kind, split].add(row)
        if (place := number if number < 3 else draw.randrange(number + 1)) < 3:
            samples[place : place + 1] = [row]
    entries, kinds = [], {kind for kind, _ in writers}
    for (kind, split), writer in writers.items():
        for path, rows in writer.close():
            if len(kinds) == 1:  # no folder of its own
                path = path.rename(folder / "data" / path.name)
            entry = {"path": path.relative_to(folder).as_posix(), "rows": rows, **describe_file(path)}
            entries.append({**entry, "config": kind if len(kinds) > 1 else "default", "split": split})
    if not entries:
        raise UserError("input: the files hold no row at all; expected rows of a known format; give others")
    if len(kinds) == 1:
        (folder / "data" / kinds.pop()).rmdir()
    return entries, samples


class JsonLines:
    """One file of JSON lines."""

    def __init__(self, folder: Path, _kind: str, split: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.rows = folder / f"{split}.jsonl", 0
        self.file = open(self.path, "w", encoding="utf-8", newline="")  # noqa: SIM115

    def add(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows += 1

    def close(self) -> list[tuple[Path, int]]:
        """Each file and its number of rows."""
        self.file.close()
        return [(self.path, self.rows)]


class Parquet:
    """Parquet files of about SHARD_BYTES; in memory are GROUP_ROWS rows."""

    def __init__(self, folder: Path, kind: str, split: str) -> None:
        arrow, self.parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
        folder.mkdir(parents=True, exist_ok=True)
        text = arrow.string()
        turns = arrow.list_(arrow.struct([("role", text), ("content", text)]))
        fields = [(name, text if name == "text" else turns) for name in FIELDS[kind]]
        self.schema = arrow.schema([*fields, ("source", text), ("license", text)])
        self.table, self.folder, self.split = arrow.Table, folder, split
        self.group: list[dict[str, Any]] = []
        self.files: list[tuple[Path, int]] = []
        self.writer = None

    def add(self, row: dict[str, Any]) -> None:
        self.group.append(row)
        if len(self.group) == GROUP_ROWS:
            self._write()

    def _write(self) -> None:
        if not self.writer:
            self.files.append((self.folder / f"{self.split}-{len(self.files):05d}", 0))
            self.writer = self.parquet.ParquetWriter(self.files[-1][0], self.schema)
        self.writer.write_table(self.table.from_pylist(self.group, self.schema))
        path, rows = self.files[-1]
        self.files[-1] = (path, rows + len(self.group))
        self.group = []
        if path.stat().st_size > SHARD_BYTES:
            self.writer = self.writer.close()

    def close(self) -> list[tuple[Path, int]]:
        """Each file and its number of rows; its name says how many there are."""
        if self.group:
            self._write()
        if self.writer:
            self.writer.close()
        end = f"-of-{len(self.files):05d}.parquet"
        return [(path.rename(path.with_name(path.name + end)), rows) for path, rows in self.files]


def configs(files: list[dict[str, Any]]) -> list[str]:
    """The part of the card's head that says which files are which split."""
    lines = ["configs:"]
    for name in dict.fromkeys(entry["config"] for entry in files):
        lines += [f"- config_name: {name}", "  data_files:"]
        mine = [entry for entry in files if entry["config"] == name]
        for split in dict.fromkeys(entry["split"] for entry in mine):
            paths = [f"    - {entry['path']}" for entry in mine if entry["split"] == split]
            lines += [f"  - split: {split}", "    path:", *paths]
    return lines


WRITERS = {"jsonl": JsonLines, "parquet": Parquet}

if __name__ == "__main__":
    run_recipe(main, ExportConfig)
