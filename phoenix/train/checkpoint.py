"""Resumable checkpoints: weights and optimizer state in safetensors, the rest as JSON, written while training
goes on.

    checkpoints/step_000123/
      shard_00000.safetensors    one a rank: its rows of every tensor, where they start in `__metadata__`
      manifest.json              written last: state, shapes, sizes and sha256 of the files

A save copies into buffers on the host, which is all that a step waits for; a thread of each rank writes its
file; rank 0 adds the manifest and renames the folder once all ranks are done.  Any number of ranks reads the
files again.  The random numbers of a step are a function of (seed, step, micro-batch), so there is no
generator to save; the optimizer's step counter is one number for all parameters and stands in the state.
Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from phoenix.files import UserError, inside, json_digest, read_json, sha256, sync_folder, write_json
from phoenix.model.pretrained import clean_name
from phoenix.train.distributed import World

MANIFEST, FORMAT_VERSION = "manifest.json", 3
CHUNK = 1 << 22  # bytes that are hashed and written at once
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64"}
Rows = tuple[Tensor, int]  # a rank's rows of a tensor, and the number of the first in the whole


class CheckpointWriter:
    """Writes `folder/step_...` in the background, whole or not at all, and keeps the newest few.

    Holds a copy of the rank's weights and optimizer state on the host (12 bytes a parameter with AdamW),
    pinned for a GPU, made here so that no step waits for new memory.  All ranks call `save` and `finish`.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, keep: int
    ) -> None:
        self.folder, self.model, self.optimizer, self.world, self.keep = folder, model, optimizer, world, keep
        self.writes = world.rank < world.world_size // world.dp_replicate  # replicas hold the same rows
        self.rows = {n: rows for n, rows in _rows(model, optimizer).items() if self.writes and len(rows[0])}
        pinned = {"pin_memory": True} if world.device.type == "cuda" else {}
        self.buffers = {
            name: torch.empty_like(local, device="cpu", **pinned).zero_()
            for name, (local, _) in self.rows.items()
        }
        if world.is_main:
            prune_checkpoints(folder, keep)  # a kill may have come before it
        self.thread: threading.Thread | None = None
        self.pending: tuple[Path, dict[str, Any]] | None = None
        self.result: dict[str, Any] | str | None = None  # the entry of this rank's file, or what went wrong

    @property
    def busy(self) -> bool:
        """This rank still writes."""
        return self.thread is not None and self.thread.is_alive()

    def save(self, state: dict[str, Any], *, wait: bool = False) -> None:
        """Begin the checkpoint of state["step"], unless it is there: a run that goes on from it would write
        the same.  An earlier one is finished first.  wait: finish this one too.  Raises UserError."""
        self.finish()
        path = self.folder / f"step_{state['step']:06d}"
        if self.world.broadcast((path / MANIFEST).is_file()):
            return
        state = {**state, "optimizer_step": _optimizer_step(self.optimizer)}
        self.pending = path, {"format": FORMAT_VERSION, "state": state, "shapes": _shapes(self.model)}
        self.world.on_main(self._begin)
        for name, (local, _) in self.rows.items():
            self.buffers[name].copy_(local, non_blocking=True)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint under way, if any, is in its place.  Raises UserError on all ranks alike
        if one of them could not write; then only the older ones are there."""
        if self.pending is None:
            return
        self.thread.join()
        results = self.world.gather(self.result)
        try:
            self.world.on_main(lambda: self._complete(results))
        finally:
            self.pending = self.thread = self.result = None

    def close(self) -> None:
        """After an error: let this rank's thread end, and its half-made checkpoint be."""
        if self.thread is not None:
            self.thread.join()

    @property
    def _temporary(self) -> Path:
        return self.folder / f".{self.pending[0].name}.tmp"

    def _begin(self) -> None:
        try:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)
        except OSError as error:
            raise self._cannot_write(error.strerror) from None

    def _write(self) -> None:
        if sys.platform == "linux":  # the lowest priority, for this thread alone: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            if self.buffers:
                path = self._temporary / f"shard_{self.world.rank:05d}.safetensors"
                starts = {name: start for name, (_, start) in self.rows.items()}
                self.result = {path.name: _write_tensors(path, self.buffers, starts)}
        except OSError as error:
            self.result = error.strerror or str(error)

    def _complete(self, results: list[dict[str, Any] | str | None]) -> None:
        path, manifest = self.pending
        temporary = self._temporary
        try:
            problems = [result for result in results if isinstance(result, str)]
            if problems:
                raise self._cannot_write(problems[0])
            files = {name: entry for result in results if result for name, entry in result.items()}
            manifest = {**manifest, "files": files}
            manifest["digest"] = json_digest(manifest)
            write_json(temporary / MANIFEST, manifest)  # syncs the folder's names too
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
            sync_folder(path.parent)
        except (OSError, UserError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            if isinstance(cause, OSError):
                raise self._cannot_write(cause.strerror or str(cause)) from None
            raise
        prune_checkpoints(self.folder, self.keep)

    def _cannot_write(self, reason: str) -> UserError:
        where = f"cannot write the checkpoint {self.pending[0]}"
        return UserError(f"{where}: {reason}; free space, or choose another output_dir")


def _write_tensors(path: Path, tensors: dict[str, Tensor], starts: dict[str, int]) -> dict[str, Any]:
    """A safetensors file, synced; its size and sha256.  Hashed as it is written: the memory is read once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "starts": json.dumps(starts)}}
    size = 0
    for name, tensor in tensors.items():
        ends = [size, size := size + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": ends}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    parts = [struct.pack("<Q", len(text)) + text, *map(_bytes, tensors.values())]
    return _write_direct(path, parts)


def _write_direct(path: Path, parts: list[bytes | memoryview]) -> dict[str, Any]:
    """Past the page cache where the disk allows: a copy into it would take the processor from training, for
    longer than hashing does, and push out what others have there."""
    digest, written, held = hashlib.sha256(), 0, 0
    handle = _open(path)
    try:
        with mmap.mmap(-1, CHUNK) as buffer:  # direct writes ask for memory at a page's start
            for piece in map(memoryview, parts):
                while len(piece):
                    take = min(CHUNK - held, len(piece))
                    buffer[held : held + take] = piece[:take]
                    held, piece = held + take, piece[take:]
                    if held == CHUNK:
                        written, held = written + _flush(handle, buffer, held, digest), 0
            _buffered(handle)  # the last piece is no multiple of a block
            written += _flush(handle, buffer, held, digest)
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"bytes": written, "sha256": digest.hexdigest()}


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | O_DIRECT, 0o666)
    except OSError as error:  # a file system without direct writes
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _buffered(handle: int) -> None:
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~O_DIRECT)


def _flush(handle: int, buffer: mmap.mmap, size: int, digest: Any) -> int:
    with memoryview(buffer) as view:
        digest.update(view[:size])
        done = 0
        while done < size:
            try:
                done += os.write(handle, view[done:size])
            except OSError as error:  # a block larger than we thought, or what a short write left
                if error.errno != errno.EINVAL or not fcntl.fcntl(handle, fcntl.F_GETFL) & O_DIRECT:
                    raise
                _buffered(handle)
    return size


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first: those that have a manifest."""
    names = folder.glob("step_*") if folder.is_dir() else []
    whole = [path for path in names if re.fullmatch(r"step_\d+", path.name) and (path / MANIFEST).is_file()]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))


def prune_checkpoints(folder: Path, save_total_limit: int) -> None:
    """Keep the newest `save_total_limit` checkpoints, and nothing that a broken save left behind.

    What goes loses its name first: a kill in between leaves no checkpoint without its files.
    """
    for path in find_checkpoints(folder)[:-save_total_limit]:
        hidden = folder / f".{path.name}.tmp"
        shutil.rmtree(hidden, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.rename(hidden)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


@torch.no_grad()
def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World, expected: dict[str, Any]
) -> dict[str, Any]:
    """Read a checkpoint, saved by any number of ranks, into model and optimizer; returns its state.

    Checks the files' hashes first, each rank its share.  UserError if a file is missing or damaged, or if an
    entry of `expected` (model, store, packing ...) differs: it is a checkpoint of something else.
    """
    problem, manifest = _verify(path, expected, _shapes(model), world)
    if problem := next(filter(None, world.gather(problem)), ""):
        raise UserError(problem)
    problem = ""
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(safe_open(path / name, "pt")) for name in manifest["files"]]
            starts = [json.loads(file.metadata()["starts"]) for file in files]
            for name, (local, first) in _rows(model, optimizer).items():
                holders = [(f.get_slice(name), s[name]) for f, s in zip(files, starts) if name in s]
                if _read_rows(local, first, holders) != len(local):
                    raise ValueError(f"rows of {name} are missing, or of another type or shape")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        problem = f"{path}: cannot be read ({error}); choose another output_dir"
    if problem := next(filter(None, world.gather(problem)), ""):
        raise UserError(problem)
    for parameter_state in optimizer.state.values():
        parameter_state["step"].fill_(manifest["state"]["optimizer_step"])
    return manifest["state"]


def _read_rows(local: Tensor, first: int, holders: list[tuple[Any, int]]) -> int:
    """Fill `local`, the rows from `first` on, from slices that begin at these rows; returns how many came
    before the first gap, or slice of another dtype or shape."""
    done = first
    for piece, start in sorted(holders, key=lambda holder: holder[1]):
        rows, *shape = piece.get_shape()
        high = min(first + len(local), start + rows)
        if start <= done < high:
            if piece.get_dtype() != DTYPES[local.dtype] or shape != list(local.shape[1:]):
                break
            local[done - first : high - first].copy_(piece[done - start : high - start])
            done = high
    return done - first


def _verify(
    path: Path, expected: dict[str, Any], shapes: dict[str, list], world: World
) -> tuple[str, dict[str, Any]]:
    """A sentence on what is wrong ("" if nothing is), and the manifest; hashes last, since they take longest:
    each rank those of its share of the files."""
    try:
        manifest = read_json(path / MANIFEST, "manifest of a checkpoint")
        if manifest["format"] != FORMAT_VERSION:
            return f"{path}: written by another version of Phoenix; choose another output_dir", {}
        if manifest["digest"] != json_digest(manifest):
            return f"{path / MANIFEST}: is damaged; remove {path} to go on from the checkpoint before it", {}
        state, found = manifest["state"], manifest["shapes"]
        files = {inside(path, name): (e["bytes"], e["sha256"]) for name, e in manifest["files"].items()}
        other = [name for name in sorted({**found, **shapes}) if found.get(name) != shapes.get(name)]
        changed = [key for key in expected if state.get(key) != expected[key]]
    except (UserError, KeyError, TypeError, AttributeError) as error:
        return f"{path}: not a checkpoint ({error}); remove the folder", {}
    if other:
        sizes = f"{other[0]} is {found.get(other[0])} there and {shapes.get(other[0])} here"
        return f"{path}: is a checkpoint of another model ({sizes}); choose another output_dir", {}
    if changed:
        values = f"{changed[0]} = {state.get(changed[0])!r}, now {expected[changed[0]]!r}"
        return f"{path}: made with {values}; choose another output_dir", {}
    for file in sorted(files)[world.rank :: world.world_size]:
        if not file.is_file() or (file.stat().st_size, sha256(file)) != files[file]:
            return f"{file}: is missing or damaged; remove {path} to go on from the checkpoint before it", {}
    return "", manifest


def _shapes(model: nn.Module) -> dict[str, list]:
    return {clean_name(name): list(parameter.shape) for name, parameter in model.named_parameters()}


def _rows(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Rows]:
    """This rank's rows of every parameter and its optimizer state; a tied weight stands once."""
    rows = {}
    for name, parameter in model.named_parameters():
        rows[f"model.{clean_name(name)}"] = _local(parameter.detach())
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                rows[f"optimizer.{key}.{clean_name(name)}"] = _local(value)
    return rows


def _local(tensor: Tensor) -> Rows:
    if not isinstance(tensor, DTensor):
        return tensor, 0
    _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), start[0]


def _optimizer_step(optimizer: torch.optim.Optimizer) -> float:
    return next((float(state["step"]) for state in optimizer.state.values()), 0.0)
