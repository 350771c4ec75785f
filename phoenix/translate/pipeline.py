"""A run of translation in a folder that any number of processes share, and may join or leave at any moment.

    run.json      what the run is: a process with another config is refused
    segments/     the unique sources in the order of their ids, cut into shards; manifest.json counts them
    claims/       who works on what (claims.py)
    journal/      a file a shard and process: a line an attempt at a segment, synced after each batch; and a
                  file an engine: how long it took to load
    done/         a file a finished shard: a line a segment, in the order of the shard
    translated.jsonl, ledger.json, report.html

A segment is what goes to the engine (the source of a Piece); its id is the hash of its text, so shards are
random samples, and what stands on many rows is translated once.  A line of segments, journal or done starts
with a checksum: one that a kill cut off, or that the disk changed, is as if it were not there.
"""

from __future__ import annotations

import contextlib
import datetime
import decimal
import hashlib
import itertools
import json
import os
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoenix.data.reading import read_rows
from phoenix.files import (
    Interrupted,
    UserError,
    atomic_folder,
    atomic_write,
    json_digest,
    read_json,
    sync_folder,
    write_json,
)
from phoenix.translate import fields
from phoenix.translate.checks import FLAGS, check
from phoenix.translate.claims import Claims, writing
from phoenix.translate.engines import Engine, Reply
from phoenix.translate.language import Language
from phoenix.translate.segments import MARK, Piece, join, smaller, split

ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)  # made once
BUCKETS = 64  # files open at once while segments are collected
Parts = dict[tuple, list[str | Piece]]  # path of a text in its row -> the text, taken apart


@dataclass(frozen=True)
class Record:
    """What became of a segment: text and flags of the attempt that passed, or else of the first one.

    attempt: the last one, from 0; tokens and seconds are those of all.
    """

    text: str
    flags: tuple[str, ...] = ()
    attempt: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0  # its share of the engine's time

    @property
    def failed(self) -> bool:
        return any(FLAGS.get(flag, True) for flag in self.flags)

    def next_attempt(self, max_attempts: int) -> int | None:
        return self.attempt + 1 if self.failed and self.attempt + 1 < max_attempts else None


class Stop:
    """Set by SIGTERM and SIGINT; the first lets the batch in flight end, a second one interrupts it.

    opening: an engine is opened, which the first one interrupts, since nothing is lost by it.  At the end a
    UserError is printed where the rank is not 0, of which alone run_recipe prints them.
    """

    def __init__(self) -> None:
        self.asked = self.in_flight = self.opening = False

    def __enter__(self) -> Stop:
        self.handlers = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if isinstance(error, UserError) and (rank := os.environ.get("RANK", "0")) != "0":
            print(f"error of rank {rank}: {error}", file=sys.stderr)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        again, self.asked = self.asked, True
        if self.opening or (again and self.in_flight):
            self.check()

    def wait(self) -> None:
        """Until it is time for another look at what the other processes do."""
        self.check()
        time.sleep(0.2)

    def check(self) -> None:
        if self.asked:
            raise Interrupted("stopped; what is translated is safe, and the same command goes on")


def compare(path: Path, wanted: dict[str, Any]) -> None:
    """UserError that says in what a run differs from what stands in a file of its folder."""
    found, wanted = (dict(_flat(value)) for value in (read_json(path), json.loads(json.dumps(wanted))))
    for name in {**wanted, **found}:
        if found.get(name) != wanted.get(name):
            was = f"{name} {found.get(name)!r:.80}, and this one has {wanted.get(name)!r:.80}"
            raise UserError(f"{path.parent} holds a run with {was}; choose another output, or set it back")


def agree(path: Path, value: dict[str, Any], claims: Claims, stop: Stop) -> None:
    """What all processes have in common: the first one writes it, UserError for one that has another."""
    while not path.exists():
        if claims.take([path.stem]) is None:
            stop.wait()
        elif not path.exists():
            write_json(path, value)
        claims.give_up()
    compare(path, value)


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as one: {"a": {"b": 1}} -> ("a.b", 1)."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _flat(entry, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, value


# 1. Rows -> unique segments.


def read_input(files: Iterable[Path], errors: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file, line", row) of all rows."""
    for path in files:
        try:
            yield from ((f"{path}, line {line}", row) for line, row in read_rows(path, errors))
        except UserError as error:
            if isinstance(error.__context__, UnicodeDecodeError):
                raise UserError(f"{error}, or set errors=replace to get U+FFFD in its place") from None
            raise


def take_apart(row: dict[str, Any], where: str, limit: int, json_strings: bool) -> tuple[str | None, Parts]:
    """The task of a row that translation destroys, if it has one, and its texts, cut into pieces.

    where: file and line, for the UserError of a row that has no text or cannot be written as JSON; limit: the
    max_chars of `split`.
    """
    if "translation" in row:
        raise UserError(f"{where}: has a field 'translation' already, where the record goes; rename it")
    try:
        texts = {path: fields.get(row, path) for path in fields.text_fields(row)}
        STRICT.encode(row)
        parts = {path: split(t, max_chars=limit, json_strings=json_strings) for path, t in texts.items()}
        return fields.untranslatable(row), parts
    except ValueError as error:
        raise UserError(f"{where}: {error}; convert or remove the row") from None


def left_texts(row: dict[str, Any], parts: Parts) -> list[str]:
    """Names of the fields whose text, of three words or more, is not translated."""
    texts = {name: value for name, value in row.items() if isinstance(value, str) and (name,) not in parts}
    return [name for name, text in texts.items() if len(text.split()) > 2]


def collect(folder: Path, rows: Iterable[tuple[str, dict, str | None, Parts]], shard_size: int) -> None:
    """Write segments/ of all rows: (place, row, task that keeps it from being translated, its parts).

    A 64th of the unique segments is in memory at once.
    """
    counts, tasks = Counter(rows=0, texts=0, segments=0, characters=0, unique_characters=0), Counter()
    with atomic_folder(folder / "segments") as target:
        paths = [target / f"bucket-{number}" for number in range(BUCKETS)]
        with contextlib.ExitStack() as stack:
            buckets = [stack.enter_context(open(path, "wb", buffering=2**16)) for path in paths]
            for _, _, task, parts in rows:
                pieces = [part.source for text in parts.values() for part in text if isinstance(part, Piece)]
                counts.update(
                    rows=1, texts=len(parts), segments=len(pieces), characters=sum(map(len, pieces))
                )
                tasks.update([task] if task else [])
                for source in set(pieces):
                    buckets[identify(source)[0] * BUCKETS // 256].write(_to_bytes(source) + b"\n")
        shards, sources = [], itertools.chain.from_iterable(map(_unique, paths))
        while shard := list(itertools.islice(sources, shard_size)):
            with open(target / f"{shard_name(len(shards))}.jsonl", "wb") as file:
                file.writelines(to_line({"source": source}) for source in shard)
            shards.append(len(shard))
            counts["unique_characters"] += sum(map(len, shard))
        if not counts["rows"]:
            raise UserError("input: the files hold no row; expected rows of a known format; give others")
        manifest = {**counts, "unique": sum(shards), "tasks": dict(sorted(tasks.items())), "shards": shards}
        write_json(target / "manifest.json", manifest | {"digest": json_digest(manifest)})


def _unique(path: Path) -> Iterator[str]:
    """The sources in a bucket, once each, in the order of their ids; the bucket is removed."""
    with open(path, "rb") as file:
        lines = {hashlib.blake2b(line[:-1], digest_size=16).digest(): line[:-1] for line in file}
    path.unlink()
    for identity in sorted(lines):
        yield lines[identity].decode("utf-8", "surrogatepass")


# 2. Shards -> journal -> done.


@dataclass(frozen=True)
class Translator:
    """All that the translation of a batch needs.  max_attempts: the last one is in smaller pieces."""

    engine: Engine
    language: Language
    max_attempts: int = 3

    def __call__(self, batch: Mapping[str, Record | None]) -> dict[str, Record]:
        """source -> its record so far, of one attempt each, into its record after the next."""
        before = list(batch.values())
        attempt = before[0].attempt + 1 if before[0] else 0
        pieces = [Piece(source, tuple(found[0] for found in MARK.finditer(source))) for source in batch]
        is_last = 0 < attempt == self.max_attempts - 1
        parts = [smaller(piece) if is_last else [piece] for piece in pieces]
        asked = list(dict.fromkeys(part.source for each in parts for part in each if isinstance(part, Piece)))
        began = time.monotonic()
        answers = self.engine.translate(asked, attempt=attempt) if asked else []
        if len(answers) != len(asked):
            raise RuntimeError(f"the engine gave {len(answers)} replies to {len(asked)} segments")
        seconds = (time.monotonic() - began) / len(batch)
        replies = dict(zip(asked, answers))
        unpaid = dict(replies)  # those whose tokens stand in no record yet: pieces may share a part
        return {
            piece.source: self._record(piece, part, replies, unpaid, seconds, attempt, old)
            for piece, part, old in zip(pieces, parts, before)
        }

    def _record(
        self, piece: Piece, parts: Sequence[str | Piece], replies: Mapping[str, Reply],
        unpaid: dict[str, Reply], seconds: float, attempt: int, old: Record | None,
    ) -> Record:  # fmt: skip
        sources = [part.source for part in parts if isinstance(part, Piece)]
        mine = [replies[source] for source in sources]
        paid = [unpaid.pop(source) for source in dict.fromkeys(sources) if source in unpaid]
        text = mine[0].text if parts == [piece] else join(parts, {s: replies[s].text for s in sources})
        finish_reason = next((r.finish_reason for r in mine if r.finish_reason != "stop"), "stop")
        is_copy = self.engine.name == "identity"  # what does not translate is not judged
        flags = () if is_copy else tuple(check(piece, text, finish_reason, self.language))
        if old and Record(text, flags).failed:
            text, flags = old.text, old.flags
        return Record(
            text, flags, attempt,
            sum(reply.prompt_tokens for reply in paid) + (old.prompt_tokens if old else 0),
            sum(reply.completion_tokens for reply in paid) + (old.completion_tokens if old else 0),
            round(seconds + (old.seconds if old else 0), 6),
        )  # fmt: skip


class Shards:
    """The shards of a folder whose segments are collected: what is asked, what is answered, what is done."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "segments" / "manifest.json"
        self.manifest = read_json(path, "manifest of the segments")
        if self.manifest.get("digest") != json_digest(self.manifest):
            raise _damaged(path)
        with writing(self.folder):
            for name in ("journal", "done"):
                (self.folder / name).mkdir(exist_ok=True)
            sync_folder(self.folder)
            sync_folder(self.folder.parent)
        self.sizes: list[int] = self.manifest["shards"]
        self.counts = {name: n for name, n in self.manifest.items() if name not in ("shards", "digest")}

    def open_ones(self) -> list[int]:
        """Numbers of the shards that are not done."""
        done = set(os.listdir(self.folder / "done"))
        return [number for number in range(len(self.sizes)) if self._done(number).name not in done]

    def sources(self, number: int) -> list[str]:
        """The segments of a shard, in the order of their ids."""
        path = self.folder / "segments" / f"{shard_name(number)}.jsonl"
        sources = [line["source"] for line in read_lines(path)]
        if len(sources) != self.sizes[number]:
            raise _damaged(path)
        return sources

    def is_done(self, number: int) -> bool:
        return self._done(number).exists()

    def journalled(self, number: int) -> dict[str, Record]:
        """source -> record of its last attempt, of all that any process wrote of a shard."""
        found: dict[str, Record] = {}
        for path in self._journals(number):
            with contextlib.suppress(FileNotFoundError):  # finished at this moment
                for identity, record in map(read_record, read_lines(path)):
                    if identity not in found or found[identity].attempt < record.attempt:
                        found[identity] = record
        return {s: found[i] for s in self.sources(number) if (i := identify(s).hex()) in found}

    def finish(self, number: int, records: Mapping[str, Record]) -> None:
        """Write done/ of a shard, in its order, and remove its journal."""
        with atomic_write(self._done(number), "wb") as file:
            file.writelines(record_line(source, record) for source, record in records.items())
        for path in self._journals(number):
            path.unlink(missing_ok=True)

    def finished(self, number: int) -> dict[str, Record]:
        """source -> record of a shard that is done, in the order of the ids; {} if it is not.

        A shard with a damaged line is open again: the good lines become a journal.
        """
        if not self.is_done(number):
            return {}
        found = dict(map(read_record, read_lines(self._done(number))))
        records = {source: found.get(identify(source).hex()) for source in self.sources(number)}
        if None not in records.values():
            return records
        with writing(self._done(number)):
            os.replace(self._done(number), self._new_journal(shard_name(number)))
        return {}

    def journal(self, number: int) -> Journal:
        """Where a process writes of a shard, from now on."""
        return Journal(self._new_journal(shard_name(number)))

    def book_loading(self, seconds: float) -> None:
        """An engine was loaded."""
        with atomic_write(self._new_journal("loading"), "wb") as file:
            file.write(to_line({"seconds": round(seconds, 3)}))

    def loading(self) -> list[float]:
        """Seconds of each loading of an engine, of all processes that there were."""
        paths = sorted((self.folder / "journal").glob("loading.*"))
        return [line["seconds"] for path in paths for line in read_lines(path)]

    def _done(self, number: int) -> Path:
        return self.folder / "done" / f"{shard_name(number)}.jsonl"

    def _journals(self, number: int) -> list[Path]:
        return sorted((self.folder / "journal").glob(f"{shard_name(number)}.*"))

    def _new_journal(self, name: str) -> Path:
        rank, who = os.environ.get("RANK", "0"), f"{os.uname().nodename}-{os.getpid()}"
        return self.folder / "journal" / f"{name}.{who}-{rank}-{time.time_ns()}.jsonl"


class Journal:
    """Records that are safe when `add` returns; the file is made when the first ones come."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    def add(self, records: Mapping[str, Record]) -> None:
        with writing(self.path):
            if not self.file:
                self.file = open(self.path, "xb", buffering=0)  # noqa: SIM115
                sync_folder(self.path.parent)
            lines = b"".join(itertools.starmap(record_line, records.items()))
            while lines:
                lines = lines[self.file.write(lines) :]
            os.fsync(self.file.fileno())


@dataclass(frozen=True)
class Worker:
    """Translates the shards that it is given.  told: called with the segments of a batch that are final."""

    shards: Shards
    translator: Translator
    claims: Claims
    stop: Stop
    batch_size: int
    told: Callable[[Mapping[str, Record]], None]

    def claim(self, numbers: Sequence[int]) -> int | None:
        """One of these shards that is now this process's, and not done; None if others have them all."""
        name = self.claims.take(map(shard_name, numbers))
        number = None if name is None else int(name.rpartition("-")[2])
        if number is None or not self.shards.is_done(number):
            return number
        self.claims.give_up()  # it was finished between the two looks
        return None

    def translate(self, number: int, most: int | None = None) -> dict[str, Record]:
        """source -> record of a claimed shard, which is then done; with `most`, of so many of its segments.

        Ends early, with what there is, if another process took the shard over.
        """
        sources = self.shards.sources(number)[:most]
        journalled = self.shards.journalled(number)
        records = {source: journalled[source] for source in sources if source in journalled}
        self.told(final(records, self.translator.max_attempts))
        with self.shards.journal(number) as journal:
            for batch in self._batches(sources, records):
                self.stop.check()
                if not self.claims.is_held():
                    return records
                self.claims.expect()
                self.stop.in_flight = True
                try:
                    answered = self.translator(batch)
                finally:
                    self.stop.in_flight = False
                journal.add(answered)
                records |= answered
                self.told(final(answered, self.translator.max_attempts))
        if most is None:
            self.shards.finish(number, {source: records[source] for source in sources})
        return records

    def _batches(
        self, sources: Sequence[str], records: Mapping[str, Record]
    ) -> Iterator[dict[str, Record | None]]:
        """What is to be asked, with its record so far; `records` grows meanwhile."""
        most = self.translator.max_attempts
        for attempt in range(most):
            known = ((source, records.get(source)) for source in sources)
            todo = [s for s, record in known if (record.next_attempt(most) if record else 0) == attempt]
            todo.sort(key=len, reverse=True)  # so that the segments of a batch end at about the same time
            for start in range(0, len(todo), self.batch_size):
                yield {source: records.get(source) for source in todo[start : start + self.batch_size]}


def _damaged(path: Path) -> UserError:
    return UserError(f"{path}: is damaged; remove {path.parent}, and the same command makes it again")


def final(records: Mapping[str, Record], max_attempts: int) -> dict[str, Record]:
    """Those that are not tried again."""
    return {source: r for source, r in records.items() if r.next_attempt(max_attempts) is None}


# Lines with a checksum.


def identify(source: str) -> bytes:
    """The id of a segment: 16 bytes."""
    return hashlib.blake2b(_to_bytes(source), digest_size=16).digest()


def _as_text(value: Any) -> str:
    """Of what parquet files hold beside JSON's own types: dates and decimal numbers."""
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal)):
        return str(value)
    raise ValueError(f"JSON has no form for what a field holds, {type(value).__name__}")


STRICT = json.JSONEncoder(allow_nan=False, default=_as_text)


def to_json(value: Any) -> bytes:
    """In UTF-8; half of a surrogate pair, which UTF-8 cannot express, as an escape."""
    try:
        return ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str).encode()


def to_line(value: dict[str, Any]) -> bytes:
    body = to_json(value)[1:]
    return b'{"check": "%08x", %b\n' % (zlib.crc32(body), body)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are as they were written."""
    start = len(to_line({})) - len(b"}\n")
    with open(path, "rb") as file:
        for line in file:
            body = line[start:-1]
            if line == b'{"check": "%08x", %b\n' % (zlib.crc32(body), body):
                yield json.loads(line)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def record_line(source: str, record: Record) -> bytes:
    return to_line({"id": identify(source).hex(), **vars(record)})


def read_record(line: dict[str, Any]) -> tuple[str, Record]:
    rest = {key: value for key, value in line.items() if key not in ("check", "id")}
    return line["id"], Record(**{**rest, "flags": tuple(rest["flags"])})


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
