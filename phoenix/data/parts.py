"""Rows of files -> part files, made by any number of processes; what a killed run made, the next one finds.

    .NAME.parts/lock                                held by the one run that works here
    .NAME.parts/DIGEST/000017.safetensors           outcome of some consecutive rows of a file

A part holds at most PART_ROWS rows and PART_BYTES bytes of a file, so where one begins depends on the file
alone.  DIGEST is of all that shapes the parts of a file: its bytes, the config, the tokenizer.  A part that
stands there whole is not made again.  Its arrays are read one by one, so that what is decided over all rows
needs the small ones in memory, never the tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from phoenix.data.formats import is_message, threads
from phoenix.data.near_duplicates import NUM_PERM
from phoenix.data.reading import parse, raw_rows
from phoenix.files import UserError, atomic_write, lock

# What may become of a row, in the order in which it is asked; 0 is none of them.
REASONS = (
    "kept", "bad_row", "no_license", "license", "empty", "equal_answers", "tie", "test_set", "language",
    "length_ratio", "refusal", "contaminated", "too_long", "no_target", "weight", "duplicate",
    "near_duplicate", "cap",
)  # fmt: skip
PART_ROWS, PART_BYTES = 1024, 2**22
EXAMPLES, EXCERPT = 10, 300  # rows of each filter that the report shows, and characters of each
Lines = list[tuple[int, Any]]  # line, and the row as `file_rows` gives it
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]  # of a document: tokens, loss mask, is of the template


class Outcome(NamedTuple):
    """What became of a row: the filter that dropped it, and why; or its documents."""

    line: int
    dropped: str = "kept"
    why: str = ""
    excerpt: str = ""
    provenance: tuple[str, str] = ("", "")  # the source that the row itself states, its licence
    keys: tuple[int, int] = (0, 0)  # of filters.row_keys
    held_out: bool = False
    lot: float = 0.0  # for weights
    documents: tuple[Arrays, ...] = ()
    prompt_is_cut: bool = False
    signature: np.ndarray | None = None  # of near_duplicates.signature


Maker = Callable[[int, Lines], list[Outcome]]


@dataclass(frozen=True)
class Part:
    """A part file of the file of this number, read array by array.

    line int64, reason uint8 (index of REASONS), key and prompt_key uint64, held_out bool, lot float32,
    provenance int32 (index of notes["provenance"]), prompt_is_cut bool, all [rows]; length [rows, 1 or 3]
    int32, tokens of the row's documents (0: dropped); tokens int32, loss_mask bool, is_template bool
    [tokens]; signature [rows, 128] uint32, or [rows, 0].  notes: also "examples", {reason: [[line, why,
    excerpt], ...]}.
    """

    file: int
    path: Path

    def __getitem__(self, name: str) -> np.ndarray:
        with self._open() as tensors:
            return tensors.get_tensor(name)

    def documents(self, rows: np.ndarray) -> Iterator[list[Arrays]]:
        """The documents of each of some rows, by their numbers in the part."""
        length, arrays = self["length"], [self[name] for name in ("tokens", "loss_mask", "is_template")]
        ends = length.cumsum().reshape(length.shape)
        for row in rows.tolist():
            pieces = [slice(end - size, end) for size, end in zip(length[row], ends[row])]
            yield [tuple(array[piece] for array in arrays) for piece in pieces]

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens [n] int32 and loss_mask [n] bool of some rows, one behind the other, and their length."""
        length = self["length"]
        sizes = length.sum(1)
        starts, taken = sizes.cumsum() - sizes, sizes[rows]
        index = np.arange(taken.sum()) + np.repeat(starts[rows] - (taken.cumsum() - taken), taken)
        return self["tokens"][index], self["loss_mask"][index], length[rows]

    @property
    def notes(self) -> dict[str, Any]:
        with self._open() as tensors:
            return json.loads(tensors.metadata()["notes"])

    @property
    def is_whole(self) -> bool:
        """Whether it stands there as it was written."""
        try:
            with self._open() as tensors:
                arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
                stated = tensors.metadata()
            return stated["digest"] == _digest(self.path, stated["notes"], arrays)
        except (UserError, KeyError, TypeError):
            return False

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, "np") as tensors:
                yield tensors
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path}: the part is damaged ({error}); remove it, start again") from None


def spans(parts: Sequence[Part]) -> Iterator[slice]:
    """Where the rows of each part stand among those of all."""
    end = 0
    for part in parts:
        start, end = end, end + len(part["reason"])
        yield slice(start, end)


def excerpt(row: dict[str, Any]) -> str:
    """The start of a raw row, for the report."""
    text = json.dumps(row, ensure_ascii=False, default=str)  # parquet has dates and bytes
    return text[:EXCERPT].encode("utf-8", "replace").decode()


def _serialized(outcomes: Sequence[Outcome], pieces: int, path: Path) -> bytes:
    """What stands in the part file of this path; pieces: documents of a row."""
    provenance = {name: number for number, name in enumerate(dict.fromkeys(o.provenance for o in outcomes))}
    column = lambda kind, values: np.array(list(values), kind)  # noqa: E731
    documents = [document for outcome in outcomes for document in outcome.documents]
    parts = zip(*documents) if documents else ((np.empty(0, kind),) for kind in (np.int32, bool, bool))
    tokens, loss_mask, is_template = map(np.concatenate, parts)
    arrays = {
        "line": column(np.int64, (o.line for o in outcomes)),
        "reason": column(np.uint8, (REASONS.index(o.dropped) for o in outcomes)),
        "key": column(np.uint64, (o.keys[0] for o in outcomes)),
        "prompt_key": column(np.uint64, (o.keys[1] for o in outcomes)),
        "held_out": column(bool, (o.held_out for o in outcomes)),
        "lot": column(np.float32, (o.lot for o in outcomes)),
        "provenance": column(np.int32, (provenance[o.provenance] for o in outcomes)),
        "prompt_is_cut": column(bool, (o.prompt_is_cut for o in outcomes)),
        "length": column(np.int32, ([len(d[0]) for d in o.documents] or (0,) * pieces for o in outcomes)),
        "tokens": tokens, "loss_mask": loss_mask, "is_template": is_template,
    }  # fmt: skip
    none = np.zeros(NUM_PERM if any(o.signature is not None for o in outcomes) else 0, np.uint32)
    arrays["signature"] = np.stack([none if o.signature is None else o.signature for o in outcomes])
    examples: dict[str, list] = {}
    for o in outcomes:
        if not o.documents and len(shown := examples.setdefault(o.dropped, [])) < EXAMPLES:
            shown.append((o.line, o.why, o.excerpt))
    notes = json.dumps({"provenance": [*provenance], "examples": examples})
    return save(arrays, metadata={"notes": notes, "digest": _digest(path, notes, arrays)})


def _digest(path: Path, notes: str, arrays: dict[str, np.ndarray]) -> str:
    """Of all that a part file holds, and of its place."""
    digest = hashlib.sha256(f"{path.parent.name} {path.name} {notes}".encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def parts_folder(output: Path) -> Iterator[Path]:
    """The folder of the parts of a run that writes `output`, locked; removed when the block ends well.

    If it ends in an error the parts stay, for the next run.  UserError if another run works there.
    """
    output = Path(output).resolve()
    folder = output.with_name(f".{output.name}.parts")
    taken = f"{output}: another run is writing it; wait, or choose another output"
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, lock(folder / "lock", taken))
        try:
            yield folder
            shutil.rmtree(folder)
        finally:
            if folder.exists() and not any(folder.rglob("*.safetensors")):
                shutil.rmtree(folder)  # nothing that the next run could use


def make_parts(
    files: Iterable[tuple[Path, Path]],
    workers: int,
    build: Callable[..., Maker],
    arguments: tuple,
    pieces: int,
) -> Iterator[Part]:
    """The parts of each (file, its folder of parts), in order; those that do not stand there are made.

    build(*arguments) is called once a process; what it gives makes the outcomes of (number of the file, its
    lines).  pieces: documents of a row.  workers: processes; 1: none beside this one.  Raises UserError, also
    if a worker was killed.
    """
    if workers == 1:
        make = build(*arguments)
        for part, lines in _jobs(files):
            _write(part, lines, make, pieces)
            yield part
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "phoenix.chat", "phoenix.data.formats"])
    pool = futures.ProcessPoolExecutor(workers, context, _start_worker, (build, arguments, pieces))
    jobs = _jobs(files)
    submit = lambda job: (job[0], job[1] and pool.submit(_run_worker, *job))  # noqa: E731
    try:
        waiting = deque(map(submit, islice(jobs, 3 * workers)))  # what is read ahead must not fill the memory
        while waiting:
            part, made = waiting.popleft()
            if made:
                made.result()
            yield part
            waiting.extend(map(submit, islice(jobs, 1)))
    except futures.process.BrokenProcessPool:
        raise UserError("a worker was killed (no memory?); start again with a lower num_workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _jobs(files: Iterable[tuple[Path, Path]]) -> Iterator[tuple[Part, Lines]]:
    """Each part in order, and its rows: none if it stands there already."""
    for number, (path, folder) in enumerate(files):
        folder.mkdir(exist_ok=True)
        for index, lines in enumerate(_split(file_rows(path))):
            part = Part(number, folder / f"{index:06d}.safetensors")
            yield part, [] if part.is_whole else lines


def file_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """As `raw_rows`, but the flat messages of oasst1 are gathered to trees."""
    rows = raw_rows(path)
    first = [*islice(rows, 1)]
    rows = chain(first, rows)
    if first and is_message(parse(path, *first[0])):
        return threads(((line, parse(path, line, raw)) for line, raw in rows), path)
    return rows


def _split(rows: Iterator[tuple[int, Any]]) -> Iterator[Lines]:
    """Up to PART_ROWS rows each, fewer if they are long; what is no line is as long as its repr."""
    lines, size = [], 0
    for line, raw in rows:
        lines.append((line, raw))
        size += len(raw if isinstance(raw, bytes) else repr(raw))
        if len(lines) == PART_ROWS or size >= PART_BYTES:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines


def _write(part: Part, lines: Lines, make: Maker, pieces: int) -> None:
    if lines:
        data = _serialized(make(part.file, lines), pieces, part.path)
        with atomic_write(part.path, "wb") as file:
            file.write(data)


def _start_worker(build: Callable[..., Maker], arguments: tuple, pieces: int) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    _work = build(*arguments), pieces
    # A parent that was killed sends no signal: without this its workers would wait for ever.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run_worker(part: Part, lines: Lines) -> None:
    _write(part, lines, *_work)
