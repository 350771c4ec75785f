"""The third step of a run of translation: what is done, put together into rows in the order of the input."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phoenix.data.reading import read_rows
from phoenix.files import UserError, describe_file, json_digest
from phoenix.translate import checks, fields
from phoenix.translate.claims import writing
from phoenix.translate.language import Language
from phoenix.translate.pipeline import Parts, Record, identify, read_record, record_line
from phoenix.translate.segments import MARK, Piece, join

Row = dict[str, Any]


class Translations:
    """source -> record, kept in a file without a name; 16 bytes a segment are in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefixes, self.places = array("Q"), array("Q", [0])  # first 8 bytes of ids; where lines end
        with writing(folder):
            self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, records: Mapping[str, Record]) -> None:
        """All calls together in the order of the ids, as the shards are."""
        with writing(self.folder):
            for source, record in records.items():
                line = record_line(source, record)
                self.file.write(line)
                self.prefixes.append(int.from_bytes(identify(source)[:8]))
                self.places.append(self.places[-1] + len(line))
            self.file.flush()

    def get(self, source: str) -> Record | None:
        identity = identify(source)
        prefix = int.from_bytes(identity[:8])
        index = bisect_left(self.prefixes, prefix)
        while index < len(self.prefixes) and self.prefixes[index] == prefix:
            start, end = self.places[index], self.places[index + 1]
            found, record = read_record(json.loads(os.pread(self.file.fileno(), end - start, start)))
            if found == identity.hex():
                return record
            index += 1
        return None


@dataclass(frozen=True)
class Assembler:
    """Puts translated rows together.

    label: what made all of them, the start of the record beside each; corrections: a segment, as it stands in
    the row or with its marks -> its text; used: those of them that were needed.
    """

    translations: Translations
    language: Language
    label: Mapping[str, Any]
    corrections: Mapping[str, str]
    drops_failed: bool
    used: set[str] = field(default_factory=set)

    def __call__(self, row: Row, parts: Parts, task: str | None) -> tuple[str, Row]:
        """("written", the translated row), or {} with "missing" or "failed" for a row with such a segment."""
        parts = {path: [self._corrected(part) for part in text] for path, text in parts.items()}
        pieces = [part.source for text in parts.values() for part in text if isinstance(part, Piece)]
        records = {source: self.translations.get(source) for source in pieces}
        if None in records.values():
            return "missing", {}
        failed = [source for source in pieces if records[source].failed]
        if failed and self.drops_failed:
            return "failed", {}
        answers = {source: source if record.failed else record.text for source, record in records.items()}
        texts = {path: join(text, answers) for path, text in parts.items()}
        flags = Counter(flag for source in pieces for flag in records[source].flags)
        notes = {"segments": len(pieces), "kept_in_source": len(failed), "flags": dict(sorted(flags.items()))}
        notes |= {
            "source_characters": sum(map(len, pieces)),
            "characters": sum(len(answers[x]) for x in pieces),
        }
        notes |= {"register": checks.register(list(texts.values()), self.language), "task": task}
        return "written", {**fields.with_texts(row, texts), "translation": {**self.label, **notes}}

    def _corrected(self, part: str | Piece) -> str | Piece:
        if isinstance(part, str) or not self.corrections:
            return part
        for name in (join([part], {part.source: part.source}), part.source):
            if name in self.corrections:
                self.used.add(name)
                return join([part], {part.source: self.corrections[name]})
        return part


def is_made(ledger: Path, rows: Path, digest: str) -> bool:
    """Whether rows and ledger are there, whole, and as a config with that digest wants them."""
    try:
        value = json.loads(ledger.read_bytes())
        made = value["made"]
        is_sound = value["digest"] == json_digest(value) and made["file"] == describe_file(rows)
        return is_sound and made["with"] == digest
    except (OSError, ValueError, KeyError, TypeError):
        return False  # missing or damaged


def read_corrections(path: Path | None) -> dict[str, str]:
    """source -> translation of the rows of a file; none without a file."""
    corrections = {}
    for line, row in read_rows(path) if path else ():
        source, text = row.get("source"), row.get("translation")
        if not isinstance(source, str) or not isinstance(text, str):
            raise UserError(f"{path}, line {line}: expected the texts 'source' and 'translation'; correct it")
        if set(MARK.findall(text)) != set(MARK.findall(source)) and MARK.search(source):
            raise UserError(f"{path}, line {line}: the two texts have other marks such as [[1]]; correct it")
        corrections[source] = text
    return corrections


class References:
    """Human translations of the texts of each row: in a field of the row, or in a file of the same rows.

    `next` for each row, and `add` for those that are translated; texts: (source, translation, reference).
    """

    def __init__(self, name: str | None) -> None:
        is_file = name is not None and Path(name).is_file()
        self.rows = (row for _, row in read_rows(Path(name))) if is_file else itertools.repeat(None)
        self.name, self.texts = name, []

    def next(self) -> Row | None:
        """The next row of the file, {} after the last one; None if references are a field, or nothing."""
        return next(self.rows, {})

    def add(self, where: str, row: Row, other: Row | None, translated: Row) -> None:
        if not self.name:
            return
        paths = fields.text_fields(row)
        try:
            found = row[self.name] if other is None else [fields.get(other, path) for path in paths]
        except (KeyError, IndexError, TypeError):
            found = None
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or len(found) != len(paths):
            what = f"{len(paths)} texts, but no reference for each in {self.name}"
            raise UserError(f"{where}: has {what}; correct it, or leave references out")
        pairs = zip(paths, found)
        self.texts += [(fields.get(row, path), fields.get(translated, path), text) for path, text in pairs]

    def scores(self, comet_model: Path | None) -> dict[str, Any]:
        """{"scores": chrF, BLEU and, with a model, COMET of all texts together}; {} without references."""
        if next(self.rows, None) is not None:
            raise UserError(f"{self.name}: has more rows than the input; expected the same rows, translated")
        if not self.texts:
            return {}
        _, translations, references = zip(*self.texts)
        comet = checks.comet_score(self.texts, comet_model) if comet_model else {}
        return {"scores": checks.score(translations, references) | comet}
